//! What runs outside the I/O path: timers, work, and the sync's own reads.
//!
//! Invariant: a timer, a task or a request holds a reference to its disk, and is counted; `finish`
//! returns only when none is left, so nothing calls back into a disk that is gone.

use crate::abi;
use crate::guard;
use crate::host::Level;
use crate::instance::{HOUSEKEEPING_NS, RETRY_NS, Replicated, SYNC_RETRY_NS};
use core::ffi::c_void;
use filter_core::disk::hashes::Hash;
use filter_core::disk::pace::PROBE_NS;
use filter_core::disk::sync::{SyncStep, Ticket};
use filter_core::lane::layout::DIRTY_BLOCK_BYTES;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// A task of the contract.
pub type Task = unsafe extern "C" fn(*mut c_void);

/// Buffers that are kept between the reads of a sync.
const SPARE_BUFFERS: usize = 2;

/// Steps that one call takes before it lets others run.
const STEPS: usize = 8;

/// A reference that travels through the host as userdata.
fn into_userdata(this: &Arc<Replicated>) -> *mut c_void {
    Arc::into_raw(this.clone()).cast_mut().cast()
}

/// Takes the reference back.
///
/// # Safety
/// `userdata` must come from `into_userdata`, and be taken back once.
pub(crate) unsafe fn from_userdata(userdata: *mut c_void) -> Arc<Replicated> {
    // SAFETY: the caller's promise.
    unsafe { Arc::from_raw(userdata.cast_const().cast()) }
}

impl Replicated {
    /// Arms a one-shot timer; `false`: there is none to be had (or the disk is closing).
    pub(crate) fn arm(self: &Arc<Self>, delay_ns: u64, task: Task) -> bool {
        // The lock is held across the call so that the number is on the list before `finish` looks.
        let mut outstanding = self.outstanding.lock();
        if outstanding.closing {
            return false;
        }
        let userdata = into_userdata(self);
        match self.host.timer_start(self.handle, delay_ns, task, userdata) {
            Ok(timer) => {
                outstanding.calls += 1;
                outstanding.timers.push((timer, userdata));
                // Timers that have run stay on the list until it is pruned here: a cancel of one
                // that has run does nothing. One that is pruned too early is waited for instead.
                if outstanding.timers.len() > 64 {
                    outstanding.timers.drain(..32);
                }
                true
            }
            Err(_) => {
                // SAFETY: the host refused, so nobody else takes it back.
                drop(unsafe { from_userdata(userdata) });
                false
            }
        }
    }

    /// Arms the sync's timer, if it is not armed already.
    pub(crate) fn arm_sync(self: &Arc<Self>, delay_ns: u64) {
        if !self.sync_armed.swap(true, SeqCst) && !self.arm(delay_ns, sync_task) {
            self.sync_armed.store(false, SeqCst);
        }
    }

    /// Arms the timer by which the pace knows how late timers are. It is no part of the sync's own
    /// chain of timers, which waits for itself.
    fn arm_probe(self: &Arc<Self>) {
        if self.probing.swap(true, SeqCst) {
            return;
        }
        let due_ns = self.host.now_mono_ns() + PROBE_NS;
        self.probe_due_ns.store(due_ns, Relaxed); // `arm` takes a lock after it
        if !self.arm(PROBE_NS, probe_task) {
            self.probing.store(false, SeqCst);
        }
    }

    /// Runs a task where blocking is allowed.
    /// `false`: the queue is full, or the disk is closing.
    pub(crate) fn work(self: &Arc<Self>, task: Task) -> bool {
        let mut outstanding = self.outstanding.lock();
        if outstanding.closing {
            return false;
        }
        let userdata = into_userdata(self);
        let taken = self.host.work_submit(self.handle, task, userdata) >= 0;
        if taken {
            outstanding.calls += 1;
        } else {
            // SAFETY: the host refused, so nobody else takes it back.
            drop(unsafe { from_userdata(userdata) });
        }
        taken
    }

    /// The host is about to be given something that it calls back; `false`: the disk is closing.
    pub(crate) fn call_begins(&self) -> bool {
        let mut outstanding = self.outstanding.lock();
        outstanding.calls += usize::from(!outstanding.closing);
        !outstanding.closing
    }

    pub(crate) fn call_ended(&self) {
        let mut outstanding = self.outstanding.lock();
        outstanding.calls -= 1;
        if outstanding.calls == 0 {
            self.ended.notify_all();
        }
    }

    /// Ends everything that calls back. Control context: may wait.
    pub fn finish(self: &Arc<Self>) {
        self.release_completions();
        let timers = {
            let mut outstanding = self.outstanding.lock();
            outstanding.closing = true;
            std::mem::take(&mut outstanding.timers)
        };
        for (timer, userdata) in timers {
            if self.host.timer_cancel(self.handle, timer) {
                // SAFETY: the host says that the task will never run: its reference comes back here.
                drop(unsafe { from_userdata(userdata) });
                self.call_ended();
            }
        }
        let mut outstanding = self.outstanding.lock();
        while outstanding.calls > 0 {
            self.ended.wait(&mut outstanding);
        }
        drop(outstanding);
        self.host.work_flush(self.handle);
    }

    /// The hashes of what was read, if they are of use: outside the lock, since they take a while.
    fn hashes_of(&self, data: Option<&[u8]>) -> Vec<Hash> {
        let Some(data) = data.filter(|_| self.core.lock().disk.wants_hashes()) else {
            return Vec::new();
        };
        let (blocks, _) = data.as_chunks::<{ DIRTY_BLOCK_BYTES as usize }>();
        let hash = |block: &[u8; DIRTY_BLOCK_BYTES as usize]| {
            let whole: [u8; 32] = Sha256::digest(block).into();
            let mut hash = Hash::default();
            for (byte, of) in hash.iter_mut().zip(whole) {
                *byte = of;
            }
            hash
        };
        blocks.iter().map(hash).collect()
    }

    /// Keeps a buffer for the sync's next read; as many as there are reads at once.
    fn keep(&self, buffer: Vec<u8>) {
        let mut spare = self.spare.lock();
        if spare.len() < SPARE_BUFFERS {
            spare.push(buffer);
        }
    }

    /// Goes on with the sync as far as it can.
    pub(crate) fn drive_sync(self: &Arc<Self>) {
        for _ in 0..STEPS {
            if self.failed.load(SeqCst) {
                return;
            }
            let (step, watches) = {
                let stamps = self.stamps();
                let now_ns = self.host.now_mono_ns();
                let mut core = self.core.lock();
                core.disk.tick();
                core.disk.observe(now_ns, &self.met);
                (core.disk.sync_step(&stamps), core.disk.watches_timers())
            };
            if watches {
                self.arm_probe();
            }
            // Only a sync has a use for the guest's latencies.
            let syncs = !matches!(step, SyncStep::Idle | SyncStep::Finished { .. });
            self.timing.store(syncs, Relaxed); // an I/O more or less makes no difference
            match step {
                SyncStep::Idle => return,
                SyncStep::Wait { wake, after_ns } => {
                    if wake {
                        self.wake();
                    }
                    self.arm_sync(if after_ns == 0 {
                        SYNC_RETRY_NS
                    } else {
                        after_ns
                    });
                    return;
                }
                SyncStep::Finished { wake } => {
                    if wake {
                        self.wake();
                    }
                    self.spare.lock().clear();
                    let figures = self.core.lock().disk.pace().figures();
                    let text = format!("sync is complete; its pace at the end: {figures}");
                    self.host.log(Some(self.handle), Level::Info, &text);
                    return;
                }
                SyncStep::Read {
                    ticket,
                    offset_bytes,
                    len_bytes,
                    wake,
                } => {
                    if wake {
                        self.wake();
                    }
                    if !SyncRead::submit(self, ticket, offset_bytes, len_bytes) {
                        self.arm_sync(SYNC_RETRY_NS);
                        return;
                    }
                }
            }
        }
        self.arm_sync(0);
    }
}

/// A read of the sync, alive while the host has it.
struct SyncRead {
    request: abi::jio_request,
    iov: abi::jio_iovec,
    buffer: Vec<u8>,
    ticket: Ticket,
    owner: Arc<Replicated>,
}

impl SyncRead {
    fn submit(owner: &Arc<Replicated>, ticket: Ticket, offset_bytes: u64, len_bytes: u64) -> bool {
        if !owner.call_begins() {
            return false;
        }
        let mut buffer = owner.spare.lock().pop().unwrap_or_default();
        buffer.resize(len_bytes as usize, 0);
        let mut read = Box::new(Self {
            // SAFETY: plain numbers and pointers, for which zeros are valid.
            request: unsafe { core::mem::zeroed() },
            iov: abi::jio_iovec {
                base: core::ptr::null_mut(),
                len_bytes,
            },
            buffer,
            ticket,
            owner: owner.clone(),
        });
        read.iov.base = read.buffer.as_mut_ptr().cast();
        read.request.size = size_of::<abi::jio_request>() as u32;
        read.request.kind = abi::JIO_IO_READ;
        read.request.iov_count = 1;
        read.request.offset_bytes = offset_bytes;
        read.request.len_bytes = len_bytes;
        read.request.done = Some(sync_read_done);
        let raw = Box::into_raw(read);
        // SAFETY: the box was just made and nobody else has it yet.
        unsafe {
            (*raw).request.iov = &raw const (*raw).iov;
            (*raw).request.userdata = raw.cast();
        }
        // SAFETY: as above; the request stays in its box until `done` takes the box back.
        let status = owner
            .host
            .submit(owner.handle, unsafe { &raw mut (*raw).request });
        if status >= 0 {
            return true;
        }
        // SAFETY: the host refused: `done` will not be called, the box is ours.
        let read = unsafe { Box::from_raw(raw) };
        let stamps = owner.stamps();
        owner.core.lock().disk.sync_read(read.ticket, None, &stamps);
        owner.call_ended();
        false
    }
}

/// Callback of the host. A read of the sync has come back.
unsafe extern "C" fn sync_read_done(
    userdata: *mut c_void,
    _request: *mut abi::jio_request,
    status: i32,
) {
    // SAFETY: `userdata` is the box that `submit` handed over; the host calls this once.
    let mut read = unsafe { Box::from_raw(userdata.cast::<SyncRead>()) };
    let owner = read.owner.clone();
    guard::disk(&owner, "sync", || {
        let data = (status >= 0).then_some(read.buffer.as_slice());
        let stamps = owner.stamps();
        let hashes = owner.hashes_of(data);
        let wake = owner
            .core
            .lock()
            .disk
            .sync_read_hashed(read.ticket, data, &hashes, &stamps);
        if wake {
            owner.wake();
        }
        let done = data.is_some();
        owner.keep(core::mem::take(&mut read.buffer));
        if done {
            owner.drive_sync();
        } else {
            // The disk failed the read: the block stays marked; try again, not at once.
            owner.arm_sync(HOUSEKEEPING_NS);
        }
    });
    drop(read);
    owner.call_ended();
}

/// Callback of the host. Tells the pace how late it is, for as long as the pace wants to know.
unsafe extern "C" fn probe_task(userdata: *mut c_void) {
    // SAFETY: the userdata of `arm`, called once.
    let this = unsafe { from_userdata(userdata) };
    let now_ns = this.host.now_mono_ns();
    let due_ns = this.probe_due_ns.load(Relaxed); // written before it was armed, which is a lock
    this.met.timers.add(now_ns.saturating_sub(due_ns));
    this.probing.store(false, SeqCst);
    guard::disk(&this, "probe", || {
        if this.core.lock().disk.watches_timers() {
            this.arm_probe();
        }
    });
    this.call_ended();
}

/// Callback of the host. Goes on with the sync.
pub unsafe extern "C" fn sync_task(userdata: *mut c_void) {
    // SAFETY: the userdata of `arm`, called once.
    let this = unsafe { from_userdata(userdata) };
    this.sync_armed.store(false, SeqCst);
    guard::disk(&this, "sync", || this.drive_sync());
    this.call_ended();
}

/// Callback of the host. Tries held I/Os again.
pub unsafe extern "C" fn retry_task(userdata: *mut c_void) {
    // SAFETY: the userdata of `arm`, called once.
    let this = unsafe { from_userdata(userdata) };
    guard::disk(&this, "retry", || {
        if this.retry_held() && !this.arm(RETRY_NS, retry_task) {
            this.release_held_tracking();
        }
    });
    this.call_ended();
}

/// Callback of the host. Looks after restarts, the way back from tracking, and syncs that became necessary.
pub unsafe extern "C" fn housekeeping_task(userdata: *mut c_void) {
    // SAFETY: the userdata of `arm`, called once.
    let this = unsafe { from_userdata(userdata) };
    guard::disk(&this, "housekeeping", || {
        this.drive_sync();
        let now_ns = this.host.now_mono_ns();
        let (sleeps, intent, rest) = {
            let mut core = this.core.lock();
            core.disk.publish_figures();
            let intent = core.disk.intent_due(now_ns) || core.disk.is_fenced();
            let sleeps = core.disk.producer().consumer_sleeps();
            (sleeps, intent, this.look_at_held(&mut core))
        };
        this.after_look(rest);
        if intent {
            this.drive_intent();
        }
        // A wake-up that was lost with a daemon that died would otherwise wait for the next write.
        if sleeps && this.positions().0 > this.positions().1 {
            this.wake();
        }
    });
    this.arm(HOUSEKEEPING_NS, housekeeping_task);
    this.call_ended();
}

/// Work of the host's queue. Writes down that replication was lost.
pub unsafe extern "C" fn record_loss_task(userdata: *mut c_void) {
    // SAFETY: the userdata of `work`, called once.
    let this = unsafe { from_userdata(userdata) };
    guard::disk(&this, "the record of a loss", || this.record_loss());
    this.call_ended();
}
