//! One open disk: the contract's calls on one side, the core's state machine on the other.
//!
//! Invariant: the core is entered only with its lock held, and the lock is never held across a call
//! that may block or that waits for another thread of the filter. After a defect (a panic in here)
//! the disk fails open: I/O passes, nothing is held, and the loss is written to the sidecar.

use crate::abi;
use crate::beside::{self, Beside};
use crate::host::{DiskHandle, Host, Level};
use crate::open::{Attached, OpenError};
use crate::vm::Stamps as VmStamps;
use filter_core::disk::ack::Ack;
use filter_core::disk::cut_hold::CutHold;
use filter_core::disk::pace::Met;
use filter_core::disk::{Change, Decision, Disk, Why};
use filter_core::lane::inflight::Token;
use filter_core::lane::layout::LaneState;
use filter_core::lane::producer::{Source, Stamps};
use filter_core::lane::sync::Ordering::Relaxed;
use filter_core::mapping::{CutPage, Lock, MappedLane, WakeSender};
use filter_core::record::RecordKind;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

/// How soon held I/Os are tried again.
pub const RETRY_NS: u64 = 500_000;
/// How often things are looked after that no I/O brings about.
pub const HOUSEKEEPING_NS: u64 = 50_000_000;
/// How soon a sync that has to wait is tried again.
pub const SYNC_RETRY_NS: u64 = 1_000_000;
/// Sources that are collected without an allocation: NBD and most guests use far fewer.
const INLINE_SOURCES: usize = 16;

/// A held I/O. Owned by the host until it is answered.
struct Held {
    io: *mut abi::jio_io,
    since_ns: u64,
    why: Why,
}

/// What the lock protects.
pub struct Core {
    /// The state machine.
    pub disk: Disk,
    held: VecDeque<Held>,
    retry_armed: bool,
    /// Completions that wait for the appliance's log.
    pub(crate) ack: Ack<*mut abi::jio_io>,
    pub(crate) ack_armed: bool,
    /// Completions that wait for a cut over several hosts.
    pub(crate) cut_hold: CutHold<*mut abi::jio_io>,
    pub(crate) cut_armed: bool,
}

// SAFETY: the I/Os that are held are the host's, and the contract lets them be answered from any
// thread.
unsafe impl Send for Core {}

/// Timers and requests that must end before the instance may go.
#[derive(Default)]
pub struct Outstanding {
    /// Timers armed: their numbers, and the reference that each holds.
    pub timers: Vec<(u64, *mut core::ffi::c_void)>,
    /// Tasks and requests that the host will still call back.
    pub calls: usize,
    /// No new ones.
    pub closing: bool,
}

// SAFETY: the pointers are references that may be given back on any thread.
unsafe impl Send for Outstanding {}

/// One open disk that is replicated.
pub struct Replicated {
    pub(crate) host: Host,
    pub(crate) handle: DiskHandle,
    pub(crate) core: Mutex<Core>,
    pub(crate) outstanding: Mutex<Outstanding>,
    pub(crate) ended: Condvar,
    pub(crate) failed: AtomicBool,
    /// A timer for the sync is armed: one is enough.
    pub(crate) sync_armed: AtomicBool,
    /// The guest's I/Os are timed, since a sync runs.
    pub(crate) timing: AtomicBool,
    pub(crate) met: Met,
    /// Buffers of the sync's reads, to be used again: memory that is new for each read costs more time than
    /// the read.
    pub(crate) spare: Mutex<Vec<Vec<u8>>>,
    /// A timer is armed whose only job is to tell how late timers are; when it is due, ns.
    pub(crate) probing: AtomicBool,
    pub(crate) probe_due_ns: AtomicU64,
    /// Work for the region map is queued or runs: one is enough.
    pub(crate) intent_working: AtomicBool,
    /// The region map has come further; goes with `core`.
    pub(crate) intent_moved: Condvar,
    /// The epoch that this host was found to have lost the disk to; 0: none.
    pub(crate) lost_to_epoch: AtomicU32,
    pub(crate) beside: Mutex<Beside>,
    /// How long a migration drains the lane.
    pub(crate) handoff_limit: std::time::Duration,
    wake: Mutex<WakeSender>,
    stamps: Arc<VmStamps>,
    pub(crate) cut: CutPage,
    lane: MappedLane,
    _lock: Lock,
}

/// An instance: what `open` hands to the host.
pub enum Instance {
    /// Opened for reading only: everything passes.
    Passing,
    /// Replicated. In an Arc, since timers and requests refer to it.
    Replicated(Arc<Replicated>),
}

/// Collects an I/O's buffers.
fn with_sources<R>(io: &abi::jio_io, act: impl FnOnce(&[Source<'_>]) -> R) -> R {
    let count = if io.iov.is_null() {
        0
    } else {
        io.iov_count as usize
    };
    let source = |i: usize| {
        // SAFETY: the contract: `iov_count` buffers lie there, alive until the I/O's end.
        let iov = unsafe { &*io.iov.add(i) };
        // SAFETY: the contract: the buffer is readable for its length until the I/O's end; the guest
        // may change it, which `Source` allows.
        unsafe { Source::from_raw(iov.base.cast(), iov.len_bytes as usize) }
    };
    if count <= INLINE_SOURCES {
        let mut sources = [Source::from_slice(&[]); INLINE_SOURCES];
        for (i, slot) in sources.iter_mut().enumerate().take(count) {
            *slot = source(i);
        }
        act(sources.get(..count).unwrap_or_default())
    } else {
        let sources: Vec<_> = (0..count.min(abi::JIO_IOV_MAX as usize))
            .map(source)
            .collect();
        act(&sources)
    }
}

fn kind_of(io: &abi::jio_io) -> Option<RecordKind> {
    match io.kind {
        abi::JIO_IO_WRITE => Some(RecordKind::Write),
        abi::JIO_IO_ZERO => Some(RecordKind::Zero),
        abi::JIO_IO_UNMAP => Some(RecordKind::Unmap),
        _ => None,
    }
}

impl Replicated {
    /// Takes over an attached disk.
    pub fn new(host: Host, handle: DiskHandle, attached: Attached) -> Arc<Self> {
        let Attached {
            disk,
            lane,
            lock,
            cut,
            stamps,
            beside,
            handoff_limit,
            run,
            ack,
            cut_hold_ns,
            story: _,
        } = attached;
        let core = Core {
            disk,
            held: VecDeque::new(),
            retry_armed: false,
            ack: Ack::new(ack),
            ack_armed: false,
            cut_hold: CutHold::new(cut_hold_ns),
            cut_armed: false,
        };
        Arc::new(Self {
            host,
            handle,
            core: Mutex::new(core),
            outstanding: Mutex::default(),
            ended: Condvar::new(),
            failed: AtomicBool::new(false),
            sync_armed: AtomicBool::new(false),
            timing: AtomicBool::new(false),
            met: Met::default(),
            spare: Mutex::default(),
            probing: AtomicBool::new(false),
            probe_due_ns: AtomicU64::new(0),
            intent_working: AtomicBool::new(false),
            intent_moved: Condvar::new(),
            lost_to_epoch: AtomicU32::new(0),
            beside: Mutex::new(beside),
            handoff_limit,
            wake: Mutex::new(WakeSender::new(run)),
            stamps,
            cut,
            lane,
            _lock: lock,
        })
    }

    /// What records are stamped with now.
    pub(crate) fn stamps(&self) -> Stamps<'_> {
        Stamps {
            stamp: &self.stamps.0,
            cut_epoch: self.cut.epoch(),
            time_ns: self.host.now_wall_ns(),
        }
    }

    /// Wakes the daemon, which sleeps.
    pub(crate) fn wake(&self) {
        let slot = self.lane.memory().consumer().wake_slot.load(Relaxed); // a stale one costs a late wake-up
        self.wake.lock().wake(slot);
    }

    /// An I/O on its way down.
    pub fn io_start(self: &Arc<Self>, io: &mut abi::jio_io) -> u32 {
        let io_handle: *mut abi::jio_io = io;
        if self.timing.load(Relaxed) && io.kind != abi::JIO_IO_FLUSH {
            io.filter_word[1] = self.host.now_mono_ns().max(1);
        }
        let Some(kind) = kind_of(io) else {
            return abi::JIO_PASS;
        };
        if io.len_bytes == 0 || self.failed.load(SeqCst) {
            return abi::JIO_PASS;
        }
        let stamps = self.stamps();
        let (offset_bytes, len_bytes) = (io.offset_bytes, io.len_bytes);
        let mut wake_daemon = false;
        let mut arm = false;
        let mut intent = false;
        let verdict = with_sources(io, |sources| {
            let change = Change {
                kind,
                offset_bytes,
                len_bytes,
                sources,
            };
            let mut core = self.core.lock();
            match core.disk.start(&change, &stamps) {
                Decision::Pass { token, wake } => {
                    wake_daemon = wake;
                    Some(token)
                }
                Decision::Defer(why) => {
                    let since_ns = self.host.now_mono_ns();
                    core.held.push_back(Held {
                        io: io_handle,
                        since_ns,
                        why,
                    });
                    intent = why == Why::Intent;
                    arm = !core.retry_armed;
                    core.retry_armed = true;
                    None
                }
            }
        });
        if arm && !self.arm(RETRY_NS, crate::drive::retry_task) {
            // No timer to be had: holding would have no end.
            self.release_held_tracking();
        }
        if intent {
            self.drive_intent();
        }
        if wake_daemon {
            self.wake();
        }
        match verdict {
            Some(token) => {
                io.filter_word[0] = token.to_word();
                abi::JIO_PASS
            }
            None => abi::JIO_DEFER,
        }
    }

    /// Tries held I/Os again, in order. Returns whether some are still held.
    pub(crate) fn retry_held(self: &Arc<Self>) -> bool {
        let mut wake_daemon = false;
        let mut intent = false;
        let mut core = self.core.lock();
        let mut at = 0;
        while let Some(front) = core.held.get(at) {
            let (io, since_ns, why) = (front.io, front.since_ns, front.why);
            let waited_ns = self.host.now_mono_ns().saturating_sub(since_ns);
            // SAFETY: a held I/O lives until it is answered, which happens under this lock only.
            let held = unsafe { &mut *io };
            let Some(kind) = kind_of(held) else { break };
            let (offset_bytes, len_bytes) = (held.offset_bytes, held.len_bytes);
            let decision = with_sources(held, |sources| {
                let change = Change {
                    kind,
                    offset_bytes,
                    len_bytes,
                    sources,
                };
                core.disk.retry(&change, &self.stamps(), waited_ns, why)
            });
            match decision {
                Decision::Pass { token, wake } => {
                    wake_daemon |= wake;
                    held.filter_word[0] = token.to_word();
                    core.held.remove(at);
                    self.host.io_continue(self.handle, io);
                }
                Decision::Defer(why) => {
                    if let Some(held) = core.held.get_mut(at) {
                        held.why = why;
                    }
                    intent |= why == Why::Intent;
                    if why == Why::Room {
                        break; // those behind it have come later
                    }
                    at += 1;
                }
            }
        }
        let left = !core.held.is_empty();
        core.retry_armed = left;
        drop(core);
        if wake_daemon {
            self.wake();
        }
        if intent {
            self.drive_intent();
        }
        left
    }

    /// Gives up publishing: what is held is marked and goes on.
    pub(crate) fn release_held_tracking(self: &Arc<Self>) {
        self.core.lock().disk.enter_tracking();
        self.retry_held();
    }

    /// A completion on its way up.
    pub fn io_done(self: &Arc<Self>, io: *mut abi::jio_io, status: i32) -> u32 {
        // SAFETY: the contract: the I/O lives until this has returned.
        let [token, since_ns] = unsafe { (*io).filter_word };
        if since_ns != 0 {
            let took_ns = self.host.now_mono_ns().saturating_sub(since_ns);
            self.met.ios.add(took_ns);
        }
        let mut held = false;
        if let Some(token) = Token::from_word(token)
            && !self.failed.load(SeqCst)
        {
            let (completed, rest) = {
                let mut core = self.core.lock();
                let completed = core.disk.done(token, status >= 0, &self.stamps());
                held = status >= 0 && self.hold(&mut core, io, completed.seq);
                held = held || self.hold_for_cut(&mut core, io);
                (completed, self.look_at_held(&mut core))
            };
            self.after_look(rest);
            if completed.wake {
                self.wake();
            }
            if completed.sync {
                self.arm_sync(SYNC_RETRY_NS);
            }
        }
        // Perhaps it has been handed back meanwhile: an answer may overtake the verdict.
        if held { abi::JIO_DEFER } else { abi::JIO_PASS }
    }

    /// The guest gives up on an I/O.
    pub fn io_abort(&self, io: *mut abi::jio_io) -> i32 {
        let mut core = self.core.lock();
        if core.ack.forget(io) {
            return abi::JIO_OK; // it goes up now
        }
        if core.cut_hold.forget(io) {
            core.disk.tear_cut();
            return abi::JIO_OK;
        }
        let Some(at) = core.held.iter().position(|held| core::ptr::eq(held.io, io)) else {
            return abi::JIO_E_NOT_FOUND;
        };
        if let Some(held) = core.held.remove(at) {
            core.disk.forget_deferred(held.why);
        }
        abi::JIO_OK
    }

    /// A defect was stopped at the border: from now on everything passes.
    pub fn fail_open(self: &Arc<Self>, what: &str) {
        if self.failed.swap(true, SeqCst) {
            return;
        }
        let text = format!(
            "replication stopped after a defect in {what}: I/O passes, the disk is to be synced in full"
        );
        self.host.event(self.handle, Level::Error, 2, &text);
        let held = {
            let mut core = self.core.lock();
            core.disk.enter_tracking();
            self.release_all(&mut core);
            std::mem::take(&mut core.held)
        };
        for held in held {
            self.host.io_continue(self.handle, held.io);
        }
        self.work(crate::drive::record_loss_task);
    }

    /// Writes the loss down, where blocking is allowed.
    pub(crate) fn record_loss(&self) {
        let mut beside = self.beside.lock();
        let next = beside.header().failed();
        if let Err(error) = beside.save(next) {
            let text = format!("the loss of replication cannot be written down: {error}");
            self.host.event(self.handle, Level::Error, 3, &text);
        }
    }

    /// The last call; nothing is in flight and nothing will call back. `flushed`: all that the guest
    /// wrote is on stable storage.
    pub fn close(&self, how: u32, flushed: bool) -> i32 {
        let mut beside = self.beside.lock();
        let written = match how {
            abi::JIO_CLOSE_LOST => Ok(()),
            _ => self.write_down_close(&mut beside, how, flushed),
        };
        // Now, and not when the last timer lets go of this.
        beside.shut();
        match written {
            Ok(()) => abi::JIO_OK,
            Err(error) => {
                self.host
                    .log(Some(self.handle), Level::Error, &format!("close: {error}"));
                error.code()
            }
        }
    }

    fn write_down_close(
        &self,
        beside: &mut Beside,
        how: u32,
        flushed: bool,
    ) -> Result<(), OpenError> {
        let mut core = self.core.lock();
        let in_order = core.disk.is_settled();
        if self.failed.load(SeqCst) {
            return beside.save(beside.header().failed());
        }
        if flushed {
            core.disk.intent_close();
        }
        core.disk
            .intent_write_all(|offset, bytes| beside.write_block(offset, bytes))?;
        // Grown a moment ago: else the next opening would take the new part for one never seen.
        let capacity_bytes = core.disk.capacity_bytes();
        if beside.header().capacity_bytes < capacity_bytes {
            beside.save(beside.header().grown(capacity_bytes))?;
        }
        if how == abi::JIO_CLOSE_HANDOFF
            && let Some(Some(map)) = core.disk.handoff()
        {
            beside::leave(self.host, self.handle, beside.header(), &map)?;
        }
        beside.save(beside.header().closed(in_order))?;
        // After the sidecar: a lane that says so beside a sidecar that does not is how a disk is found out
        // that was rolled back with its sidecar.
        core.disk.close();
        Ok(())
    }

    /// Fills a status.
    pub fn status(&self, out: &mut abi::jio_filter_status) {
        let mut core = self.core.lock();
        let memory = core.disk.memory();
        let consumer = memory.consumer();
        let linked = consumer.linked.load(Relaxed) != 0; // a figure
        let state = core.disk.state();
        let counters = core.disk.counters();
        let failed = self.failed.load(SeqCst);
        let mut alarms = 0;
        let mut raise = |on: bool, bit: u32| alarms |= if on { bit } else { 0 };
        raise(!linked, abi::JIO_ALARM_NO_CONSUMER);
        raise(core.disk.has_deferred(), abi::JIO_ALARM_BACK_PRESSURE);
        raise(state == LaneState::Tracking, abi::JIO_ALARM_TRACKING);
        let sidecar = core.disk.intent().is_some_and(|map| map.is_failing());
        raise(sidecar, abi::JIO_ALARM_SIDECAR);
        raise(failed, abi::JIO_ALARM_INTERNAL);
        let through = state == LaneState::Streaming && !failed && !core.ack.has_fallen_back();
        raise(core.ack.is_on() && !through, abi::JIO_ALARM_ACK_FALLBACK);
        out.state = match state {
            _ if failed => abi::JIO_STATE_FAILED,
            LaneState::Tracking => abi::JIO_STATE_TRACKING,
            LaneState::Syncing => abi::JIO_STATE_SYNCING,
            _ => abi::JIO_STATE_STREAMING,
        };
        let ring_bytes = memory.geometry().ring_bytes;
        let dirty_bytes = core.disk.dirty_bytes();
        let intent_bytes = core.disk.intent().map_or(0, |map| map.wanted_bytes());
        let producer = core.disk.producer();
        out.alarms = alarms;
        out.epoch = u64::from(producer.attach_epoch());
        out.published_seq = producer.published().seq();
        out.durable_seq = consumer.durable_seq.load(Relaxed); // a figure
        out.lane_used_bytes = ring_bytes - producer.free_bytes();
        out.lane_capacity_bytes = ring_bytes;
        out.dirty_bytes = dirty_bytes;
        out.deferred_count = counters.deferred;
        out.deferred_ns_max = counters.deferred_max_ns;
        out.held_count = core.ack.held_count() + core.cut_hold.held_count();
        out.tracking_count = counters.tracking;
        out.intent_bytes = intent_bytes.min(core.disk.capacity_bytes());
        out.intent_late_count = counters.intent_late;
        out.synced_bytes = counters.sync_bytes;
        out.held_bytes = counters.sync_held_bytes;
    }

    /// Whether the daemon has a session for the lane.
    pub(crate) fn lane_linked(&self) -> bool {
        self.lane.memory().consumer().linked.load(Relaxed) != 0 // a figure
    }

    /// Last seq published, last seq durable, and whether the disk streams.
    pub(crate) fn positions(&self) -> (u64, u64, bool) {
        let mut core = self.core.lock();
        let streaming = core.disk.state() == LaneState::Streaming && !self.failed.load(SeqCst);
        let durable = core.disk.memory().consumer().durable_seq.load(Relaxed); // a figure that only grows
        (core.disk.producer().published().seq(), durable, streaming)
    }
}
