//! The region map at work: what the core asks of the sidecar and of the disk below is done here, in
//! work context, one step at a time.
//!
//! Invariant: at most one piece of work for the map of a disk is queued or runs, so its steps come in
//! order; who waits for the map is told after each.

use crate::abi;
use crate::drive::from_userdata;
use crate::guard;
use crate::host::Level;
use crate::instance::Replicated;
use core::ffi::c_void;
use filter_core::disk::intent::IntentStep;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

/// Records that are drained in no time.
const CLOSE_RECORDS: u64 = 64;
/// How long a control call waits for the sidecar.
const CONTROL_LIMIT: Duration = Duration::from_secs(10);
/// How long a close waits for the appliance to hold everything, and the disk to be flushed.
pub const CLOSE_LIMIT: Duration = Duration::from_secs(2);

impl Replicated {
    /// Has the map's work done soon.
    pub(crate) fn drive_intent(self: &Arc<Self>) {
        if self.intent_working.swap(true, SeqCst) || self.work(intent_task) {
            return;
        }
        // The queue is full: the retry of held I/Os, or housekeeping, asks again.
        self.intent_working.store(false, SeqCst);
    }

    fn intent_steps(self: &Arc<Self>) {
        loop {
            let now_ns = self.host.now_mono_ns();
            let step = self.core.lock().disk.intent_step(now_ns);
            match step {
                IntentStep::Idle => return self.tell_capacity(),
                IntentStep::Flush => {
                    if !self.flush_below() {
                        self.core.lock().disk.intent_flushed(false, now_ns);
                    }
                }
                IntentStep::Write {
                    offset_bytes,
                    bytes,
                } => {
                    let written = self.beside.lock().write_block(offset_bytes, &*bytes);
                    self.core.lock().disk.intent_written(written.is_ok());
                    self.intent_moved.notify_all();
                    if let Err(error) = written {
                        let text =
                            format!("the region map cannot be written, tried again: {error}");
                        self.host.event(self.handle, Level::Error, 5, &text);
                        return;
                    }
                    self.retry_held();
                }
            }
        }
    }

    /// Writes the disk's capacity down once the map has the bits of a part that is new.
    fn tell_capacity(&self) {
        let (capacity_bytes, pending) = {
            let core = self.core.lock();
            (core.disk.capacity_bytes(), core.disk.intent_pending())
        };
        let mut beside = self.beside.lock();
        if pending || beside.header().capacity_bytes >= capacity_bytes {
            return;
        }
        let next = beside.header().grown(capacity_bytes);
        if let Err(error) = beside.save(next) {
            // Nothing is lost: at the next open the new part counts as never seen.
            self.host
                .log(Some(self.handle), Level::Warn, &format!("grow: {error}"));
        }
    }

    /// Waits until the sidecar has every bit that is wanted. Control context.
    pub(crate) fn settle_intent(self: &Arc<Self>) -> bool {
        let deadline = Instant::now() + CONTROL_LIMIT;
        let mut core = self.core.lock();
        while core.disk.intent_pending() {
            drop(core);
            self.drive_intent();
            core = self.core.lock();
            let soon = (Instant::now() + Duration::from_millis(20)).min(deadline);
            if core.disk.intent_pending() {
                self.intent_moved.wait_until(&mut core, soon);
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        !core.disk.intent_pending()
    }

    /// After a revert: what this opening has written to the sidecar may be gone.
    pub(crate) fn sidecar_replaced(&self) {
        let mut beside = self.beside.lock();
        let again = beside.header().again();
        if let Err(error) = beside.save(again) {
            // Then the next opening has an epoch that was there before, which the appliance notices.
            let text = format!("the sidecar cannot be written after a revert: {error}");
            self.host.event(self.handle, Level::Error, 8, &text);
        }
        drop(beside);
        self.core.lock().disk.intent_replaced();
    }

    /// Waits until the appliance holds everything, as long as that may come soon. Control context.
    pub(crate) fn drain_for(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let (published, durable, streaming) = self.positions();
            let hopeless = !streaming || !self.lane_linked();
            if durable >= published || hopeless || Instant::now() >= deadline {
                return;
            }
            // The acknowledgement comes from another process, which wakes nobody.
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until the appliance is not far behind, or cannot come closer. Control context.
    pub(crate) fn come_close(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let (published, durable, streaming) = self.positions();
            let close = self.lane_linked() && published.saturating_sub(durable) < CLOSE_RECORDS;
            if close || !streaming || Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(1)); // as in `drain_for`
        }
    }

    /// Before the disk is closed: gives the appliance a moment to hold everything, and flushes the disk.
    /// Whether it was flushed. Control context.
    pub(crate) fn prepare_close(self: &Arc<Self>, drain_for: Duration) -> bool {
        self.drain_for(drain_for);
        let deadline = Instant::now() + CLOSE_LIMIT;
        let done = Arc::new((parking_lot::Mutex::new(None), parking_lot::Condvar::new()));
        if !Flush::submit(self, Some(done.clone())) {
            return false;
        }
        let mut status = done.0.lock();
        while status.is_none() {
            if done.1.wait_until(&mut status, deadline).timed_out() {
                break;
            }
        }
        *status == Some(true)
    }

    /// Asks the host to flush the disk below; the map is told of the outcome.
    fn flush_below(self: &Arc<Self>) -> bool {
        Flush::submit(self, None)
    }

    /// If the appliance knows of another opening with this epoch or a newer one: finds out whether somebody has attached since (then this
    /// host has lost the disk), or disk and sidecar were rolled back (then the stream starts anew).
    pub(crate) fn look_at_fence(self: &Arc<Self>) {
        let (fenced, ours) = {
            let mut core = self.core.lock();
            let memory = core.disk.memory();
            let fenced = memory.consumer().fenced_epoch.load(Relaxed); // looked at again and again
            (fenced, core.disk.producer().attach_epoch())
        };
        if fenced == 0 || fenced < ours || self.lost_to_epoch.load(Relaxed) == fenced {
            return;
        }
        let mut beside = self.beside.lock();
        let risen = beside.is_ours().and_then(|ours| {
            if !ours {
                return Ok(false);
            }
            let next = beside.header().risen(fenced)?;
            beside.save(next)?;
            Ok(true)
        });
        match risen {
            Ok(true) => {
                let header = beside.header();
                let (epoch, above_seq) = (header.attach_epoch, header.above_forgotten());
                drop(beside);
                self.core.lock().disk.rise(epoch, above_seq);
                let text = "disk and sidecar were rolled back: the disk is synced in full";
                self.host.event(self.handle, Level::Warn, 6, text);
                self.drive_intent();
            }
            Ok(false) => {
                self.lost_to_epoch.store(fenced, Relaxed); // this work's own
                let text = "another host has the disk: what is written here is not replicated";
                self.host.event(self.handle, Level::Error, 7, text);
            }
            Err(error) => {
                let text = format!("fenced, and the sidecar cannot tell why: {error}");
                self.host.log(Some(self.handle), Level::Error, &text);
            }
        }
    }
}

/// Who waits for a flush.
type Waiter = Arc<(parking_lot::Mutex<Option<bool>>, parking_lot::Condvar)>;

/// A flush of the disk below, alive while the host has it.
struct Flush {
    request: abi::jio_request,
    waiter: Option<Waiter>,
    owner: Arc<Replicated>,
}

impl Flush {
    fn submit(owner: &Arc<Replicated>, waiter: Option<Waiter>) -> bool {
        if !owner.call_begins() {
            return false;
        }
        let mut flush = Box::new(Self {
            // SAFETY: plain numbers and pointers, for which zeros are valid.
            request: unsafe { core::mem::zeroed() },
            waiter,
            owner: owner.clone(),
        });
        flush.request.size = size_of::<abi::jio_request>() as u32;
        flush.request.kind = abi::JIO_IO_FLUSH;
        flush.request.done = Some(flush_done);
        let raw = Box::into_raw(flush);
        // SAFETY: the box was just made and nobody else has it yet.
        unsafe { (*raw).request.userdata = raw.cast() };
        // SAFETY: as above; the request stays in its box until `done` takes the box back.
        let request = unsafe { &raw mut (*raw).request };
        if owner.host.submit(owner.handle, request) >= 0 {
            return true;
        }
        // SAFETY: the host refused: `done` will not be called, the box is ours.
        drop(unsafe { Box::from_raw(raw) });
        owner.call_ended();
        false
    }
}

/// Callback of the host. The disk below was flushed, or could not be.
unsafe extern "C" fn flush_done(userdata: *mut c_void, _: *mut abi::jio_request, status: i32) {
    // SAFETY: `userdata` is the box that `submit` handed over; the host calls this once.
    let flush = unsafe { Box::from_raw(userdata.cast::<Flush>()) };
    let owner = flush.owner.clone();
    guard::disk(&owner, "flush", || match &flush.waiter {
        Some(waiter) => {
            *waiter.0.lock() = Some(status >= 0);
            waiter.1.notify_all();
        }
        None => {
            let now_ns = owner.host.now_mono_ns();
            owner.core.lock().disk.intent_flushed(status >= 0, now_ns);
            owner.drive_intent();
        }
    });
    drop(flush);
    owner.call_ended();
}

/// Work of the host's queue. Goes on with the region map.
unsafe extern "C" fn intent_task(userdata: *mut c_void) {
    // SAFETY: the userdata of `work`, called once.
    let this = unsafe { from_userdata(userdata) };
    guard::disk(&this, "the region map", || {
        this.intent_steps();
        this.look_at_fence();
    });
    this.intent_working.store(false, SeqCst);
    // What has come between the last step and this store has found it at work.
    let now_ns = this.host.now_mono_ns();
    let waits = {
        let core = this.core.lock();
        let failing = core.disk.intent().is_some_and(|map| map.is_failing());
        core.disk.intent_due(now_ns) && !failing
    };
    if waits {
        this.drive_intent();
    }
    this.call_ended();
}
