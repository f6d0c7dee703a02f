//! A connection in transmission: what is under way, and the way of replies to the client.
//!
//! Invariant: replies go out whole, in any order. A thread that sends without the lock has taken the
//! bytes out; only the connection's own two threads ever wait for the client. The reading thread
//! gathers replies while more requests are at hand and sends them together. Whoever completes a request
//! on another thread sends at once what the socket takes without waiting; the writing thread sends
//! the rest, and is idle otherwise.

use super::budget::Budget;
use super::engine::{Io, Kind};
use super::proto::{self, RequestHeader, cflag, chunk, errno};
use super::stream::Stream;
use crate::raw;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ThreadId;
use std::time::Instant;

/// Replies are gathered up to this much.
const OUTPUT_BYTES: usize = 256 * 1024;
/// Data of this length goes to the socket from where it is.
const DIRECT_BYTES: usize = 64 * 1024;
/// Request objects that are kept for reuse, and the buffers that they may keep.
const POOL: usize = 64;
const POOL_BUFFER_BYTES: usize = 1 << 20;
const POOL_BYTES: usize = 8 << 20;

#[derive(Debug, Default)]
struct State {
    /// Replies that nobody has begun to send.
    out: Vec<u8>,
    spare: Vec<u8>,
    /// Bytes that a thread has taken and is sending without the lock.
    sending: Option<usize>,
    reader: Option<ThreadId>,
    /// The reading thread, from its beginning to its end.
    thread: Option<raw::Thread>,
    under_way: usize,
    payload_bytes: usize,
    /// Taken from what all connections share.
    borrowed_bytes: usize,
    /// Boxed, since a request travels by pointer and comes back the same.
    #[allow(clippy::vec_box)]
    pool: Vec<Box<Io>>,
    pool_bytes: usize,
    /// The writing thread has something to do.
    is_stalled: bool,
    /// The reading thread stands: what it has read and not served; and one request under way waits for
    /// the rest.
    parked: Option<(Vec<u8>, bool)>,
    is_broken: bool,
    is_ended: bool,
}

impl State {
    fn held_bytes(&self) -> usize {
        self.payload_bytes + self.out.len() + self.sending.unwrap_or(0)
    }

    fn is_reader(&self) -> bool {
        self.reader == Some(std::thread::current().id())
    }

    /// Keeps a request object; otherwise the caller frees it, without the lock.
    fn keep(&mut self, io: Box<Io>) -> Option<Box<Io>> {
        let bytes = io.buffer.capacity();
        let fits = bytes <= POOL_BUFFER_BYTES && self.pool_bytes + bytes <= POOL_BYTES;
        if self.pool.len() >= POOL || !fits {
            return Some(io);
        }
        self.pool_bytes += bytes;
        self.pool.push(io);
        None
    }

    fn reuse(&mut self) -> Option<Box<Io>> {
        let io = self.pool.pop()?;
        self.pool_bytes -= io.buffer.capacity();
        Some(io)
    }
}

/// A client's connection in transmission.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    structured: bool,
    budget: Arc<Budget>,
    /// The reading thread is to stand before its next read.
    is_paused: AtomicBool,
    /// It is about to read, or reads.
    is_reading: AtomicBool,
    state: Mutex<State>,
    /// The reading thread waits here for room, for the sender, for the end of what is under way; the
    /// writing thread for the sender.
    changed: Condvar,
    /// The writing thread waits here for work.
    stalled: Condvar,
}

fn push_structured(out: &mut Vec<u8>, kind: u16, cookie: u64, len: usize) {
    out.extend_from_slice(&proto::STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&chunk::DONE.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&(len as u32).to_be_bytes());
}

impl Connection {
    pub(super) fn new(stream: Stream, structured: bool, budget: Arc<Budget>) -> Self {
        let state = State {
            out: Vec::with_capacity(OUTPUT_BYTES),
            ..State::default()
        };
        Self {
            stream,
            structured,
            budget,
            is_paused: AtomicBool::new(false),
            is_reading: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Condvar::new(),
            stalled: Condvar::new(),
        }
    }

    // ---- replies --------------------------------------------------------------------------------

    /// All of a reply but its data.
    fn push_head(&self, out: &mut Vec<u8>, cookie: u64, error: u32, data: Option<(u64, usize)>) {
        if !self.structured {
            out.extend_from_slice(&proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
            out.extend_from_slice(&error.to_be_bytes());
            out.extend_from_slice(&cookie.to_be_bytes());
            return;
        }
        match (error, data) {
            (0, None) => push_structured(out, chunk::NONE, cookie, 0),
            (0, Some((offset, len))) => {
                push_structured(out, chunk::OFFSET_DATA, cookie, 8 + len);
                out.extend_from_slice(&offset.to_be_bytes());
            }
            (error, _) => {
                push_structured(out, chunk::ERROR, cookie, 6);
                out.extend_from_slice(&error.to_be_bytes());
                out.extend_from_slice(&0u16.to_be_bytes());
            }
        }
    }

    pub(super) fn reply(&self, io: Box<Io>, mut error: u32) {
        let mut data: &[u8] = &[];
        if io.kind == Kind::Read && error == 0 {
            data = io.data();
            // A reply that is shorter than its request would make the client lose its place.
            if data.len() != io.len_bytes as usize {
                (error, data) = (errno::IO, &[]);
            }
        }
        let place = (!data.is_empty()).then_some((io.offset_bytes, data.len()));
        let mut state = self.state.lock();
        let is_reader = state.is_reader();
        let direct = is_reader && data.len() >= DIRECT_BYTES;
        if direct {
            self.wait_for_sender(&mut state);
        }
        if !state.is_broken {
            self.push_head(&mut state.out, io.cookie, error, place);
            if direct {
                self.send(&mut state, data);
            } else {
                state.out.extend_from_slice(data);
            }
        }
        self.pushed(&mut state, is_reader);
        let charged = io.charged_bytes;
        let unkept = state.keep(io);
        self.ended(state, charged);
        drop(unkept);
    }

    pub(super) fn reply_dropped(&self, cookie: u64, charged: usize) {
        let mut state = self.state.lock();
        let is_reader = state.is_reader();
        self.push_head(&mut state.out, cookie, errno::IO, None);
        self.pushed(&mut state, is_reader);
        self.ended(state, charged);
    }

    /// Answers what never became a request of the engine. The reading thread's.
    pub(super) fn reply_error(self: &Arc<Self>, cookie: u64, error: u32) {
        let mut state = self.state.lock();
        let _ = self.wait_for_room(&mut state, 0); // if it is broken nothing is sent
        self.push_head(&mut state.out, cookie, error, None);
        self.pushed(&mut state, true);
    }

    /// A reply with the extents of the one metadata context. The reading thread's.
    pub(super) fn reply_extents(self: &Arc<Self>, cookie: u64, extents: &[crate::disk::Extent]) {
        let mut state = self.state.lock();
        let _ = self.wait_for_room(&mut state, 0); // as above
        let out = &mut state.out;
        push_structured(out, chunk::BLOCK_STATUS, cookie, 4 + 8 * extents.len());
        out.extend_from_slice(&proto::CONTEXT_ID.to_be_bytes());
        for extent in extents {
            out.extend_from_slice(&(extent.len_bytes as u32).to_be_bytes());
            // Bit 0: a hole; bit 1: reads as zeros.
            out.extend_from_slice(&(if extent.hole { 3u32 } else { 0 }).to_be_bytes());
        }
        self.pushed(&mut state, true);
    }

    /// A request is over.
    fn ended(&self, mut state: MutexGuard<'_, State>, charged: usize) {
        state.payload_bytes -= charged;
        state.under_way -= 1;
        self.changed.notify_all();
        self.settle(&mut state);
    }

    /// Gives back what is no longer needed of what all share.
    fn settle(&self, state: &mut MutexGuard<'_, State>) {
        if state.borrowed_bytes == 0 {
            return;
        }
        let needed = state
            .held_bytes()
            .saturating_sub(self.budget.limits.own_bytes);
        let back = state.borrowed_bytes.saturating_sub(needed);
        if back > 0 {
            state.borrowed_bytes -= back;
            MutexGuard::unlocked(state, || self.budget.give_back(back));
        }
    }

    // ---- sending --------------------------------------------------------------------------------

    fn break_off(&self, state: &mut State) {
        state.is_broken = true;
        state.out = Vec::new();
        self.stream.shutdown();
        self.changed.notify_all();
    }

    fn wait_for_sender(&self, state: &mut MutexGuard<'_, State>) {
        while state.sending.is_some() {
            self.changed.wait(state);
        }
    }

    /// Sends all replies, and `tail` after them; waits for the client, without the lock. Only for the
    /// connection's own threads, and when nobody else is sending.
    fn send(&self, state: &mut MutexGuard<'_, State>, mut tail: &[u8]) {
        while !(state.is_broken || state.out.is_empty() && tail.is_empty()) {
            let spare = std::mem::take(&mut state.spare);
            let mut taken = std::mem::replace(&mut state.out, spare);
            state.sending = Some(taken.len() + tail.len());
            let sent = MutexGuard::unlocked(state, || self.stream.write_both(&taken, tail).is_ok());
            state.sending = None;
            tail = &[];
            taken.clear();
            taken.shrink_to(4 * OUTPUT_BYTES);
            // The buffer that is in the cache goes on being used.
            if state.out.is_empty() {
                std::mem::swap(&mut state.out, &mut taken);
            }
            state.spare = taken;
            if !sent {
                self.break_off(state);
            }
            self.changed.notify_all();
        }
        // Not before: it lets go of the lock for a moment, and one thread at a time may send.
        self.settle(state);
    }

    /// Replies were added: the reading thread goes on gathering, any other sends without waiting.
    fn pushed(&self, state: &mut MutexGuard<'_, State>, is_reader: bool) {
        if state.is_broken {
            state.out.clear();
            return;
        }
        if is_reader {
            if state.out.len() >= OUTPUT_BYTES {
                self.wait_for_sender(state);
                self.send(state, &[]);
            }
            return;
        }
        // Whoever sends looks again when it is done.
        if state.sending.is_some() || state.is_stalled || state.out.is_empty() {
            return;
        }
        match self.stream.write_now(&state.out) {
            Ok(written) if written == state.out.len() => state.out.clear(),
            Ok(written) => {
                state.out.drain(..written);
                state.is_stalled = true;
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                state.is_stalled = true;
            }
            Err(_) => self.break_off(state),
        }
        if state.is_stalled {
            self.stalled.notify_one();
        }
    }

    /// The writing thread: sends what the socket did not take at once.
    pub(super) fn write_stalled(&self) {
        let mut state = self.state.lock();
        loop {
            while !state.is_stalled && !state.is_ended {
                self.stalled.wait(&mut state);
            }
            if state.is_ended {
                return;
            }
            self.wait_for_sender(&mut state);
            state.is_stalled = false;
            self.send(&mut state, &[]);
            self.changed.notify_all(); // not stalled any more, even if there was nothing to send
        }
    }

    /// Sends what was gathered. `false`: the connection is broken. The reading thread's.
    pub(super) fn flush(&self) -> bool {
        let mut state = self.state.lock();
        if !state.out.is_empty() {
            self.wait_for_sender(&mut state);
            self.send(&mut state, &[]);
        }
        !state.is_broken
    }

    // ---- requests -------------------------------------------------------------------------------

    /// Reads from the client; stands while the connection is paused. `so_far` is what was read and not
    /// served, and whether a request under way waits for the rest. The reading thread's.
    pub(super) fn read(
        &self,
        buffer: &mut [u8],
        so_far: impl Fn() -> (Vec<u8>, bool),
    ) -> io::Result<usize> {
        loop {
            // First said, then looked: whoever pauses does it the other way round, so one of both sees the
            // other.
            self.is_reading.store(true, Ordering::SeqCst);
            if self.is_paused.load(Ordering::SeqCst) {
                self.is_reading.store(false, Ordering::SeqCst);
                self.stand(so_far());
                continue;
            }
            let read = (&mut &self.stream).read(buffer);
            self.is_reading.store(false, Ordering::SeqCst);
            match read {
                // A reply that was just being sent without waiting: it holds the lock.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => drop(self.state.lock()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// The reading thread begins.
    pub(super) fn begin(&self) {
        let mut state = self.state.lock();
        state.reader = Some(std::thread::current().id());
        state.thread = Some(raw::Thread::current());
    }

    // ---- pauses ---------------------------------------------------------------------------------

    fn stand(&self, ahead: (Vec<u8>, bool)) {
        let mut state = self.state.lock();
        state.parked = Some(ahead);
        self.changed.notify_all();
        while self.is_paused.load(Ordering::SeqCst) && !state.is_broken {
            self.changed.wait(&mut state);
        }
        state.parked = None;
    }

    /// The reading thread is to stand before its next read; calls it out of one.
    pub(super) fn pause(&self) {
        self.is_paused.store(true, Ordering::SeqCst);
        let state = self.state.lock();
        if let Some(thread) = state.thread
            && self.is_reading.load(Ordering::SeqCst)
        {
            // SAFETY: it takes itself out under this lock before it ends.
            unsafe { thread.interrupt() };
        }
    }

    /// It goes on.
    pub(super) fn resume(&self) {
        self.is_paused.store(false, Ordering::SeqCst);
        self.look_again();
    }

    /// The reading thread stands, no request is under way, each reply is sent.
    pub(super) fn is_quiet(&self) -> bool {
        let state = self.state.lock();
        let own = |(_, within): &(Vec<u8>, bool)| usize::from(*within);
        let is_idle = state.parked.as_ref().map(own) == Some(state.under_way);
        is_idle && state.out.is_empty() && state.sending.is_none() && !state.is_stalled
    }

    /// What was read ahead, and the socket; only while it is quiet.
    pub(super) fn parked(&self) -> io::Result<Option<(Stream, Vec<u8>)>> {
        let parked = self.state.lock().parked.clone();
        let Some((ahead, _)) = parked else {
            return Ok(None);
        };
        Ok(Some((self.stream.try_clone()?, ahead)))
    }

    // ---- requests, again ------------------------------------------------------------------------

    /// Something changed for which this connection waits.
    pub(super) fn look_again(&self) {
        // With the lock: the reading thread either waits already or has not looked yet.
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    fn has_room(self: &Arc<Self>, state: &mut State, len: usize) -> bool {
        let limits = &self.budget.limits;
        let held = state.held_bytes();
        let wanted = held.saturating_add(len);
        if state.under_way >= limits.requests || (held > 0 && wanted > limits.connection_bytes) {
            return false;
        }
        let beyond = wanted.saturating_sub(limits.own_bytes);
        let more = beyond.saturating_sub(state.borrowed_bytes);
        if more > 0 && !self.budget.take(more, held == 0, self) {
            return false;
        }
        state.borrowed_bytes += more;
        true
    }

    /// Waits until `len` more bytes may be under way. `false`: the connection is broken.
    fn wait_for_room(self: &Arc<Self>, state: &mut MutexGuard<'_, State>, len: usize) -> bool {
        while !state.is_broken && !self.has_room(state, len) {
            // What was gathered counts, and goes out by nobody else.
            if state.sending.is_none() && !state.out.is_empty() {
                self.send(state, &[]);
            } else {
                self.changed.wait(state);
            }
        }
        !state.is_broken
    }

    /// A request that is under way from now on; `None`: the connection is broken.
    pub(super) fn take_io(self: &Arc<Self>, header: &RequestHeader, kind: Kind) -> Option<Box<Io>> {
        let has_data = matches!(kind, Kind::Read | Kind::Write);
        let len = if has_data {
            header.len_bytes as usize
        } else {
            0
        };
        let reused = {
            let mut state = self.state.lock();
            if !self.wait_for_room(&mut state, len) {
                return None;
            }
            state.under_way += 1;
            state.payload_bytes += len;
            state.reuse()
        };
        let mut io = reused.unwrap_or_else(|| Box::new(Io::new(kind)));
        io.kind = kind;
        io.fua = header.flags & cflag::FUA != 0;
        io.may_unmap = header.flags & cflag::NO_HOLE == 0;
        io.must_be_fast = header.flags & cflag::FAST_ZERO != 0;
        io.offset_bytes = header.offset_bytes;
        io.len_bytes = header.len_bytes;
        io.cookie = header.cookie;
        io.charged_bytes = len;
        io.connection = Some(self.clone());
        if io.buffer.len() < len {
            // Fresh zeros cost no memory until the client's bytes are there.
            io.buffer = vec![0; len];
        }
        Some(io)
    }

    /// Ends the connection from outside, whatever its threads wait for.
    pub(super) fn abandon(&self) {
        self.break_off(&mut self.state.lock());
    }

    // ---- the end --------------------------------------------------------------------------------

    /// The reading thread gathers no more: replies of any thread go out at once.
    pub(super) fn stop_gathering(&self) {
        let mut state = self.state.lock();
        state.reader = None;
        state.thread = None;
        self.pushed(&mut state, false);
    }

    /// Waits for the requests under way; `false`: some are left at the deadline.
    pub(super) fn drain(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        while state.under_way > 0 {
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) => {
                    if self.changed.wait_until(&mut state, deadline).timed_out() {
                        return state.under_way == 0;
                    }
                }
            }
        }
        true
    }

    /// Sends the last replies, if the client takes them in time, and hangs up.
    pub(super) fn hang_up(&self, deadline: Instant) {
        let mut state = self.state.lock();
        // What is left is with the writing thread, or waits for it.
        while !state.is_broken && (state.is_stalled || state.sending.is_some()) {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                self.break_off(&mut state); // and the sender fails
            }
        }
        self.wait_for_sender(&mut state);
        self.break_off(&mut state);
        state.is_ended = true;
        state.pool = Vec::new();
        state.spare = Vec::new();
        self.stalled.notify_all();
        self.settle(&mut state);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let borrowed = std::mem::take(&mut self.state.get_mut().borrowed_bytes);
        if borrowed > 0 {
            self.budget.give_back(borrowed);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::budget::Limits;
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn a_read_that_meets_a_reply_being_sent_goes_on() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let second = ours.try_clone().unwrap();
        let budget = Arc::new(Budget::new(Limits::default()));
        let connection = Arc::new(Connection::new(Stream::Unix(ours), true, budget));
        let of = connection.clone();
        let (send, read) = std::sync::mpsc::channel();
        // As in the middle of a write that does not wait.
        let state = connection.state.lock();
        second.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 8];
            send.send(
                of.read(&mut buffer, Default::default)
                    .map(|n| buffer[..n].to_vec()),
            )
        });
        let early = read.recv_timeout(Duration::from_millis(200));
        assert!(early.is_err(), "{early:?}");
        second.set_nonblocking(false).unwrap();
        drop(state);
        theirs.write_all(b"on").unwrap();
        let got = read.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(got.unwrap(), b"on");
    }
}
