//! An I/O on its way through the filter: down, up, held, given up.
//!
//! Invariant: each I/O of a guest is answered exactly once. An I/O that the filter holds is on the
//! disk's list from before the filter may answer it until somebody has taken it; while it is on the list
//! its object lives. Objects are never freed, and used again as late as possible, so that a filter
//! that answers one twice is told so.

use super::hostdisk::{BLOCK_BYTES, HostDisk};
use super::points::Point;
use crate::abi;
use crate::contract::HOLD_SLACK;
use crate::contract::io::{Answer, Answered, IoCell, IoState};
use crate::disk::{DiskError, Extent};
use crate::nbd::connection::Connection;
use crate::nbd::engine::{Engine, Io, Kind, execute, wire_error};
use crate::nbd::proto::errno;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// An I/O on its way. The contract's struct comes first, so that a pointer to one is a pointer to the
/// other.
#[repr(C)]
pub struct FilterIo {
    jio: abi::jio_io,
    iov: abi::jio_iovec,
    state: IoCell,
    /// The error of an answer that may overtake a call of the filter.
    answered: AtomicU32,
    /// The disk's own error.
    result: u32,
    io: Option<Box<Io>>,
}

/// An object rests until this many others rest too.
const REST: usize = 32;

/// An I/O that the filter holds.
struct Held {
    io: usize,
    connection: usize,
    since: Instant,
    completion: bool,
}

/// The I/Os of one disk.
#[derive(Default)]
pub struct Pipeline {
    next_id: AtomicU64,
    in_flight: AtomicU64,
    #[allow(clippy::vec_box)] // objects travel by pointer and come back the same
    pool: Mutex<VecDeque<Box<FilterIo>>>,
    held: Mutex<Vec<Held>>,
    answered: Condvar,
    /// The guest is stopped: what it asks for waits in the list.
    stopped: AtomicBool,
    #[allow(clippy::vec_box)] // as above
    waiting: Mutex<Vec<Box<Io>>>,
}

// SAFETY: the pool holds I/O objects that no thread uses; the list holds addresses, which are used only
// as the invariant above allows.
unsafe impl Send for Pipeline {}
// SAFETY: as above.
unsafe impl Sync for Pipeline {}

impl Pipeline {
    /// I/Os that have not been answered.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Acquire)
    }

    fn take(&self, io: Box<Io>) -> Box<FilterIo> {
        let rested = {
            let mut pool = self.pool.lock();
            (pool.len() >= REST).then(|| pool.pop_front()).flatten()
        };
        let mut object = rested.unwrap_or_else(|| {
            Box::new(FilterIo {
                // SAFETY: plain numbers and pointers, for which zeros are valid.
                jio: unsafe { std::mem::zeroed() },
                iov: abi::jio_iovec {
                    base: null_mut(),
                    len_bytes: 0,
                },
                state: IoCell::default(),
                answered: AtomicU32::new(0),
                result: 0,
                io: None,
            })
        });
        let has_data = matches!(io.kind, Kind::Read | Kind::Write);
        let zero_flag = io.may_unmap && io.kind == Kind::Zero;
        let flags = [
            (io.fua, abi::JIO_IO_FUA),
            (zero_flag, abi::JIO_IO_MAY_UNMAP),
        ];
        let iov = &raw const object.iov;
        let jio = &mut object.jio;
        jio.size = size_of::<abi::jio_io>() as u32;
        jio.kind = match io.kind {
            Kind::Read => abi::JIO_IO_READ,
            Kind::Write => abi::JIO_IO_WRITE,
            Kind::Zero => abi::JIO_IO_ZERO,
            Kind::Unmap => abi::JIO_IO_UNMAP,
            Kind::Flush => abi::JIO_IO_FLUSH,
        };
        jio.flags = flags.iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum();
        jio.id = self.next_id.fetch_add(1, Ordering::Relaxed) + 1; // unique is all it must be
        jio.offset_bytes = io.offset_bytes;
        jio.len_bytes = u64::from(io.len_bytes);
        jio.filter_word = [0; 2];
        jio.iov_count = u32::from(has_data);
        jio.iov = if has_data { iov } else { std::ptr::null() };
        object.iov.base = io.buffer.as_ptr().cast_mut().cast();
        object.iov.len_bytes = u64::from(io.len_bytes);
        object.result = 0;
        object.io = Some(io);
        object
    }

    fn holds(&self, raw: *mut FilterIo, connection: usize, completion: bool) {
        self.held.lock().push(Held {
            io: raw as usize,
            connection,
            since: Instant::now(),
            completion,
        });
    }

    /// Takes an I/O off the list.
    fn forget(&self, raw: *mut FilterIo) -> Option<Held> {
        let mut held = self.held.lock();
        let at = held.iter().position(|h| h.io == raw as usize)?;
        self.answered.notify_all();
        Some(held.swap_remove(at))
    }

    fn of_connection(&self, connection: usize) -> Vec<usize> {
        let held = self.held.lock();
        held.iter()
            .filter(|h| h.connection == connection)
            .map(|h| h.io)
            .collect()
    }

    /// Begins to abort an I/O that is still held for a connection; `Some(true)`: its completion is.
    fn begin_abort(&self, raw: *mut FilterIo, connection: usize) -> Option<bool> {
        let held = self.held.lock();
        held.iter()
            .find(|h| h.io == raw as usize && h.connection == connection)?;
        // SAFETY: on the list, so it lives; and the list is locked.
        let state = unsafe { &(*raw).state };
        if state.step(IoState::Deferred, IoState::AbortingDeferred) {
            Some(false)
        } else {
            state
                .step(IoState::Held, IoState::AbortingHeld)
                .then_some(true)
        }
    }
}

/// The guest's error for a status of the filter.
fn guest_error(status: i32) -> u32 {
    match status {
        0.. => 0,
        abi::JIO_E_NO_SPACE => errno::NOSPC,
        abi::JIO_E_READ_ONLY => errno::PERM,
        _ => errno::IO,
    }
}

/// An I/O that may change threads.
struct Owned(*mut FilterIo);
// SAFETY: an I/O that its state has given to whoever holds this.
unsafe impl Send for Owned {}

impl HostDisk {
    /// An I/O of the guest.
    fn submit(self: &Arc<Self>, io: Box<Io>) {
        let aligned = (io.offset_bytes | u64::from(io.len_bytes)).is_multiple_of(BLOCK_BYTES);
        if !aligned {
            io.complete(errno::INVAL);
            return;
        }
        // First counted, then looked: whoever stops the guest does it the other way round, so one of both
        // sees the other.
        self.pipeline.in_flight.fetch_add(1, Ordering::SeqCst);
        if self.pipeline.stopped.load(Ordering::SeqCst) {
            self.pipeline.in_flight.fetch_sub(1, Ordering::SeqCst);
            self.park(io);
            return;
        }
        let Some(instance) = self.instance() else {
            self.pipeline.in_flight.fetch_sub(1, Ordering::AcqRel);
            io.complete(errno::SHUTDOWN);
            return;
        };
        let from = io
            .connection
            .as_ref()
            .map_or(0, |c| Arc::as_ptr(c) as usize);
        let object = self.pipeline.take(io);
        object.state.set(IoState::Starting);
        let raw = Box::into_raw(object);
        let (verdict, status) = self.filter.io_start(instance, raw.cast());
        // SAFETY: the object is this thread's while it is `Starting`, and lives in any case.
        let state = unsafe { &(*raw).state };
        match verdict {
            abi::JIO_PASS => {
                if !state.step(IoState::Starting, IoState::Down) {
                    self.violated("an I/O was answered, and then passed");
                    state.set(IoState::Down);
                }
                self.run_down(raw, from);
            }
            abi::JIO_DEFER => {
                self.pipeline.holds(raw, from, false);
                // If the filter was faster the I/O goes on here; otherwise it is the filter's now.
                if !state.step(IoState::Starting, IoState::Deferred) {
                    self.pipeline.forget(raw);
                    self.carry_on(raw, from);
                }
            }
            abi::JIO_COMPLETE | abi::JIO_FAIL => {
                if !state.step(IoState::Starting, IoState::Ended) {
                    self.violated("an I/O was answered, and then completed or failed");
                }
                let failed = verdict == abi::JIO_FAIL;
                if failed && status >= 0 {
                    self.violated("FAIL without a status");
                }
                let error = if status < 0 {
                    guest_error(status)
                } else {
                    errno::IO
                };
                self.finish(raw, if failed { error } else { 0 });
            }
            other => {
                self.violated(&format!("io_start's verdict {other} is none"));
                state.set(IoState::Down);
                self.run_down(raw, from);
            }
        }
    }

    /// An I/O that came while the guest is stopped.
    fn park(self: &Arc<Self>, io: Box<Io>) {
        let mut waiting = self.pipeline.waiting.lock();
        if self.pipeline.stopped.load(Ordering::SeqCst) {
            waiting.push(io);
            return;
        }
        drop(waiting);
        self.submit(io); // let go meanwhile
    }

    /// From now on no new I/O of the guest begins.
    pub fn stop_guest(&self) {
        self.pipeline.stopped.store(true, Ordering::SeqCst);
    }

    /// Waits until none is under way, or held by the filter.
    pub fn wait_for_guest(&self, deadline: Instant) -> anyhow::Result<()> {
        while self.pipeline.in_flight.load(Ordering::SeqCst) > 0 {
            if Instant::now() > deadline {
                anyhow::bail!("disk {}: the guest's I/O does not end", self.setup.label);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// The guest goes on, with what has waited first.
    pub fn let_guest_go(self: &Arc<Self>) {
        let waiting = {
            let mut waiting = self.pipeline.waiting.lock();
            self.pipeline.stopped.store(false, Ordering::SeqCst);
            std::mem::take(&mut *waiting)
        };
        for io in waiting {
            let this = self.clone();
            self.tasks.run_io(Box::new(move || this.submit(io)));
        }
    }

    /// Goes on with an I/O that was answered while its `io_start` or `io_abort` ran.
    fn carry_on(self: &Arc<Self>, raw: *mut FilterIo, from: usize) {
        // SAFETY: answered, so nobody but this thread has it.
        let object = unsafe { &mut *raw };
        match object.state.get() {
            IoState::Completed => self.finish(raw, *object.answered.get_mut()),
            IoState::Released => self.finish(raw, object.result),
            _ => {
                object.state.set(IoState::Down);
                self.run_down(raw, from);
            }
        }
    }

    /// The layers below, then the completion up. The I/O is this thread's, and `Down`.
    fn run_down(self: &Arc<Self>, raw: *mut FilterIo, from: usize) {
        // SAFETY: the caller's: nobody else has it until the filter is called below.
        let object = unsafe { &mut *raw };
        let Some(io) = object.io.as_mut() else { return };
        let point = match io.kind {
            Kind::Write | Kind::Zero | Kind::Unmap => Some(Point::IoWritten),
            Kind::Flush => Some(Point::Flushed),
            Kind::Read => None,
        };
        if point == Some(Point::IoWritten) {
            self.pass(Point::IoStarted);
        }
        let outcome = execute(&self.disk, io).map_err(|error| {
            tracing::warn!("disk {}: {error}", self.setup.label);
            wire_error(&error)
        });
        if let Some(point) = point {
            self.pass(point);
        }
        let error = outcome.err().unwrap_or(0);
        object.result = error;
        let status = match error {
            0 => abi::JIO_OK,
            errno::NOSPC => abi::JIO_E_NO_SPACE,
            errno::PERM => abi::JIO_E_READ_ONLY,
            _ => abi::JIO_E_IO,
        };
        self.contract.calls.fetch_add(1, Ordering::Relaxed); // a counter
        let instance = self.instance().unwrap_or(null_mut());
        let verdict = self.filter.io_done(instance, raw.cast(), status);
        // SAFETY: the object is this thread's while it is `Down`, and lives in any case.
        let state = unsafe { &(*raw).state };
        match verdict {
            abi::JIO_DEFER => {
                self.pipeline.holds(raw, from, true);
                if state.step(IoState::Down, IoState::Held) {
                    return;
                }
                self.pipeline.forget(raw);
            }
            abi::JIO_PASS => {
                if !state.step(IoState::Down, IoState::Ended) {
                    self.violated("a completion was released, and then passed");
                }
            }
            other => self.violated(&format!("io_done's verdict {other} is not allowed")),
        }
        self.finish(raw, error);
    }

    /// Answers the guest. The I/O is this thread's; afterwards it is nobody's.
    fn finish(&self, raw: *mut FilterIo, error: u32) {
        // SAFETY: from `into_raw` in `submit`, and given to this thread by its state.
        let mut object = unsafe { Box::from_raw(raw) };
        object.state.set(IoState::Ended);
        let io = object.io.take();
        self.pipeline.pool.lock().push_back(object);
        if let Some(io) = io {
            io.complete(error);
        }
        self.pipeline.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    fn note(&self, held: &Held) {
        let waited = held.since.elapsed();
        if held.completion {
            self.contract.note_hold(waited);
        } else {
            self.contract.note_deferral(waited);
        }
        if waited > self.hold_limit() {
            self.violated(&format!("an I/O was held for {} ms", waited.as_millis()));
        }
    }

    fn hold_limit(&self) -> Duration {
        Duration::from_nanos(self.defer_ns_max).saturating_add(HOLD_SLACK)
    }

    /// The filter answers an I/O that it holds; `status` is the guest's, for `Complete`.
    pub fn answer(self: &Arc<Self>, io: *mut abi::jio_io, answer: Answer, status: i32) -> i32 {
        let raw = io.cast::<FilterIo>();
        // SAFETY: the contract: NULL or an I/O of this disk; objects are never freed.
        let Some(object) = (unsafe { raw.as_ref() }) else {
            return abi::JIO_E_INVALID;
        };
        if answer == Answer::Complete {
            object
                .answered
                .store(guest_error(status), Ordering::Release);
        }
        match object.state.answer(answer) {
            Answered::Left => return abi::JIO_OK,
            Answered::Refused(found) => {
                let id = object.jio.id;
                self.violated(&format!("{answer:?} of I/O {id}, which is {found:?}"));
                return abi::JIO_E_DENIED;
            }
            Answered::Take => {}
        }
        let from = self.pipeline.forget(raw).map_or(0, |held| {
            self.note(&held);
            held.connection
        });
        // Not here: this is inside the filter, perhaps under its locks.
        let (this, owned) = (self.clone(), Owned(raw));
        self.tasks.run_io(Box::new(move || {
            let owned = owned;
            // SAFETY: taken above, so it is this closure's.
            let (result, answered) = unsafe { ((*owned.0).result, (*owned.0).answered.get_mut()) };
            match answer {
                Answer::Continue => this.run_down(owned.0, from),
                Answer::Complete => this.finish(owned.0, *answered),
                Answer::Release => this.finish(owned.0, result),
            }
        }));
        abi::JIO_OK
    }

    /// A client is gone: what the filter holds of it is given up, if the filter lets go.
    fn abort_of(self: &Arc<Self>, connection: usize) {
        let Some(instance) = self.instance() else {
            return;
        };
        for raw in self.pipeline.of_connection(connection) {
            let raw = raw as *mut FilterIo;
            let Some(completion) = self.pipeline.begin_abort(raw, connection) else {
                continue; // answered meanwhile
            };
            let answer = self.filter.io_abort(instance, raw.cast());
            // SAFETY: `Aborting...`: whoever answers it now leaves it to this thread.
            let object = unsafe { &*raw };
            let (aborting, back) = if completion {
                (IoState::AbortingHeld, IoState::Held)
            } else {
                (IoState::AbortingDeferred, IoState::Deferred)
            };
            let let_go = answer == abi::JIO_OK;
            if !let_go && !matches!(answer, abi::JIO_E_BUSY | abi::JIO_E_NOT_FOUND) {
                self.violated(&format!("io_abort's answer {answer} is none"));
            }
            let to = if let_go { IoState::Ended } else { back };
            if object.state.step(aborting, to) {
                if let_go {
                    self.pipeline.forget(raw);
                    self.finish(raw, if completion { object.result } else { errno::IO });
                }
                continue; // kept: the usual answer comes
            }
            if let_go {
                self.violated("io_abort let go of an I/O that was answered");
            }
            self.pipeline.forget(raw);
            self.carry_on(raw, connection);
        }
        self.wait_for_answers(connection);
    }

    /// Waits until the filter has answered what it holds for a connection; ends what it never answers.
    fn wait_for_answers(&self, connection: usize) {
        let deadline = Instant::now() + self.hold_limit();
        let mut held = self.pipeline.held.lock();
        while held.iter().any(|h| h.connection == connection) {
            if !self
                .pipeline
                .answered
                .wait_until(&mut held, deadline)
                .timed_out()
            {
                continue;
            }
            let late: Vec<usize> = held
                .iter()
                .filter(|h| h.connection == connection)
                .map(|h| h.io)
                .collect();
            held.retain(|h| h.connection != connection);
            drop(held);
            for raw in late {
                let raw = raw as *mut FilterIo;
                // SAFETY: objects are never freed.
                let state = unsafe { &(*raw).state };
                let mine = state.step(IoState::Deferred, IoState::Ended)
                    || state.step(IoState::Held, IoState::Ended);
                if mine {
                    self.violated("an I/O is held without end");
                    self.finish(raw, errno::IO);
                }
            }
            return;
        }
    }
}

/// A disk as an export.
pub struct FilterEngine(pub Arc<HostDisk>);

impl Engine for FilterEngine {
    fn capacity_bytes(&self) -> u64 {
        self.0.disk.capacity_bytes()
    }

    fn submit(&self, io: Box<Io>) {
        self.0.submit(io);
    }

    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>, DiskError> {
        self.0.disk.extents(offset, len, limit)
    }

    fn disconnected(&self, connection: &Arc<Connection>) {
        self.0.abort_of(Arc::as_ptr(connection) as usize);
    }
}
