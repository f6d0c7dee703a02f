//! The consumer's side of a lane: poll, check, release.
//!
//! Invariant: a header is copied out of the shared memory before it is checked, and only the copy is
//! used; the position, the last seq and what may be released are this side's private truth. Space is
//! released only up to what the appliance holds durably.

use super::copy::copy_crc32c;
use super::layout::{LaneMemory, LaneState};
use super::ring::{self, Sound};
use super::sync::Ordering::{Acquire, Relaxed, Release};
use super::walk::header_at;
use crate::position::{Durable, MAX_SEQ, Sent};
use crate::record::{
    FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, HEADER_BYTES, MAX_PAYLOAD_BYTES, RECORD_ALIGN, RecordError,
    RecordHeader, RecordKind,
};
use alloc::collections::VecDeque;
use alloc::vec;

/// What is wrong with a lane's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaneFault {
    /// The tail went backwards, is not aligned, or is further than the ring is long.
    #[error("lane tail {tail} is impossible: read up to {read}, head {head}")]
    Tail {
        /// The tail found.
        tail: u64,
        /// How far was read.
        read: u64,
        /// The head.
        head: u64,
    },
    /// The record at this position does not check.
    #[error("lane position {at}: {error}")]
    Record {
        /// Position in the lane.
        at: u64,
        /// What is wrong.
        error: RecordError,
    },
    /// A record does not follow the one before it.
    #[error("lane position {at}: record {found} follows record {last}")]
    Sequence {
        /// Position in the lane.
        at: u64,
        /// The seq before.
        last: u64,
        /// The seq found.
        found: u64,
    },
}

/// Contiguous whole records in the ring, checked, ready to be sent. The memory stays valid until the
/// consumer releases it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where the records lie: shared memory, to be read by raw copy or by the kernel only.
    pub base: *const u8,
    /// Their bytes.
    pub len_bytes: usize,
    /// First seq.
    pub first_seq: u64,
    /// Last seq.
    pub last_seq: u64,
    /// The newest record's time, ns since 1970.
    pub time_ns: u64,
    /// The last marker in the run: true for SYNC_BEGIN, false for SYNC_END.
    pub marker: Option<bool>,
}

/// Where the stream passed from one cut epoch to a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochEdge {
    /// Last seq stamped with an epoch below `epoch`.
    pub last_seq: u64,
    /// The epoch of the record after it.
    pub epoch: u32,
}

/// The consumer's side of a lane.
#[derive(Debug)]
pub struct Consumer {
    memory: LaneMemory,
    head: u64,
    durable: Durable,
    read: u64,
    sent: Sent,
    /// (last seq, end position) of each run that was taken and not released.
    pending: VecDeque<(u64, u64)>,
    /// Restart request that is under way: discard until the producer has answered it.
    restarting: bool,
    epoch: u32,
    edges: VecDeque<EpochEdge>,
}

/// Epoch edges that are remembered: older ones belong to cuts that nobody asks for any more.
const MAX_EDGES: usize = 64;

impl Consumer {
    /// Takes over the consumer's side where the shared words say that the last one stood. If they
    /// cannot be right, a restart is asked for.
    pub fn attach(memory: LaneMemory) -> Self {
        let words = memory.consumer();
        let head = words.head.load(Relaxed); // written by a consumer that is gone
        let durable = Durable(words.durable_seq.load(Relaxed)); // as above
        // No stream gets that far: the word is damaged, and nothing may be computed from it.
        let nonsense = durable.0 >= MAX_SEQ / 2;
        let durable = if nonsense { Durable::NONE } else { durable };
        let mut consumer = Self {
            memory,
            head,
            durable,
            read: head,
            sent: Sent(durable.0),
            pending: VecDeque::new(),
            restarting: false,
            epoch: 0,
            edges: VecDeque::new(),
        };
        ring::awake(&words.sleeping);
        let done = memory.producer().restart_done.load(Acquire); // pairs with the producer's Release
        if words.restart_request.load(Relaxed) != done {
            consumer.restarting = true;
        } else if nonsense || consumer.tail().is_err() || consumer.skip_durable().is_err() {
            consumer.request_restart(durable.0);
        }
        consumer
    }

    /// The lane's memory.
    pub const fn memory(&self) -> LaneMemory {
        self.memory
    }

    /// What the appliance holds durably.
    pub const fn durable(&self) -> Durable {
        self.durable
    }

    /// What was handed out.
    pub const fn sent(&self) -> Sent {
        self.sent
    }

    /// Whether the producer still has to answer a restart request.
    pub const fn restarting(&self) -> bool {
        self.restarting
    }

    /// What the producer says it is doing.
    pub fn state(&self) -> Option<LaneState> {
        LaneState::from_word(self.memory.producer().state.load(Relaxed)) // for routing and people
    }

    /// Bytes that were published and not released.
    pub fn backlog_bytes(&self) -> u64 {
        self.tail().map_or(0, |tail| tail - self.head)
    }

    /// Whether everything published was taken.
    pub fn is_drained(&self) -> bool {
        self.tail().is_ok_and(|tail| tail == self.read)
    }

    /// The end of what is published now; `None`: it cannot be right.
    pub fn published_end(&self) -> Option<u64> {
        self.tail().ok()
    }

    /// Whether everything before this end was taken.
    pub const fn has_taken(&self, end: u64) -> bool {
        self.read >= end
    }

    /// C1, with the checks.
    fn tail(&self) -> Result<u64, LaneFault> {
        let tail = ring::observe_tail::<Sound>(&self.memory.producer().tail); // C1
        let ring_bytes = self.memory.geometry().ring_bytes;
        let sane = tail >= self.read
            && self.head <= self.read
            && tail - self.head <= ring_bytes
            && (tail | self.head).is_multiple_of(RECORD_ALIGN as u64);
        if sane {
            Ok(tail)
        } else {
            Err(LaneFault::Tail {
                tail,
                read: self.read,
                head: self.head,
            })
        }
    }

    /// Takes the next run of at most about `max_bytes` (always at least one record), or `None` when
    /// nothing is there (or a restart is awaited). A fault behind good records shows at the next call.
    pub fn take(&mut self, max_bytes: usize) -> Result<Option<Run>, LaneFault> {
        if self.restarting && !self.finish_restart() {
            return Ok(None);
        }
        let tail = self.tail()?;
        if self.read == tail {
            self.tell_head_again();
        }
        let mut run: Option<Run> = None;
        while self.read < tail {
            let (header, span) = match header_at(self.memory, self.read, tail) {
                Ok(found) => found,
                Err(_) if run.is_some() => break,
                Err(fault) => return Err(fault),
            };
            if header.kind == RecordKind::Pad {
                if run.is_some() {
                    break; // a run is contiguous: the pad starts the next call
                }
                self.read += span;
                continue;
            }
            let at_start = self.memory.data(self.read).1 == self.memory.geometry().ring_bytes;
            if run.is_some() && at_start {
                break; // a record that ends at the ring's end leaves no pad: a run never goes round
            }
            if header.seq != self.sent.0 + 1 {
                if run.is_some() {
                    break;
                }
                let (at, last, found) = (self.read, self.sent.0, header.seq);
                return Err(LaneFault::Sequence { at, last, found });
            }
            if run.is_some_and(|run| run.len_bytes + span as usize > max_bytes) {
                break;
            }
            self.note_epoch(&header);
            let run = run.get_or_insert(Run {
                base: self.memory.data(self.read).0,
                len_bytes: 0,
                first_seq: header.seq,
                last_seq: 0,
                time_ns: 0,
                marker: None,
            });
            run.len_bytes += span as usize;
            run.last_seq = header.seq;
            run.time_ns = header.time_ns;
            if header.is_marker() {
                run.marker = Some(header.flags & FLAG_SYNC_BEGIN != 0);
            }
            self.read += span;
            self.sent = Sent(header.seq);
            if header.flags & FLAG_STREAM_BASE != 0 {
                break; // the stream's new beginning travels alone: what follows depends on the answer
            }
        }
        if let Some(run) = &run {
            self.pending.push_back((run.last_seq, self.read));
        }
        Ok(run)
    }

    fn note_epoch(&mut self, header: &RecordHeader) {
        if header.cut_epoch > self.epoch {
            if self.edges.len() == MAX_EDGES {
                self.edges.pop_front();
            }
            let edge = EpochEdge {
                last_seq: header.seq - 1,
                epoch: header.cut_epoch,
            };
            self.edges.push_back(edge);
            self.epoch = header.cut_epoch;
        }
    }

    /// The last taken seq that was stamped with an epoch of at most `epoch`. Meaningful once
    /// everything that could carry such an epoch was taken.
    pub fn last_seq_of_epoch(&self, epoch: u32) -> u64 {
        self.edges
            .iter()
            .find(|edge| edge.epoch > epoch)
            .map_or(self.sent.0, |edge| edge.last_seq)
    }

    /// The last seq before position `end` that was stamped with an epoch of at most `epoch`, whether
    /// it was taken or not: records that were not taken are looked at where they lie. `end` must be a
    /// tail that was seen. `None` while a restart is under way: then no position means anything.
    pub fn last_seq_before(&self, end: u64, epoch: u32) -> Result<Option<u64>, LaneFault> {
        if self.restarting {
            return Ok(None);
        }
        let tail = self.tail()?;
        let mut last = self.last_seq_of_epoch(epoch);
        if last < self.sent.0 {
            return Ok(Some(last)); // the edge lies in what was taken
        }
        let (mut at, mut before) = (self.read, self.sent.0);
        while at < end.min(tail) {
            let (header, span) = header_at(self.memory, at, tail)?;
            if header.kind != RecordKind::Pad {
                if header.seq != before + 1 {
                    let (last, found) = (before, header.seq);
                    return Err(LaneFault::Sequence { at, last, found });
                }
                if header.cut_epoch > epoch {
                    break;
                }
                before = header.seq;
                last = last.max(before);
            }
            at += span;
        }
        Ok(Some(last))
    }

    /// Whether everything that was taken and not freed is still as it was published: headers, order
    /// and payloads. What the appliance finds corrupt although this finds nothing was damaged on the
    /// way.
    pub fn check_taken(&self) -> Result<(), LaneFault> {
        let mut scratch = vec![0u8; MAX_PAYLOAD_BYTES as usize];
        let mut at = self.head;
        while at < self.read {
            let (header, span) = header_at(self.memory, at, self.read)?;
            let len = header.payload_len as usize;
            if header.kind != RecordKind::Pad && len > 0 {
                let source = self.memory.data(at).0.wrapping_add(HEADER_BYTES);
                // SAFETY: `header_at` checked that the span lies before the ring's end, so the payload
                // is mapped; `scratch` holds the largest payload that a header may announce (checked
                // when it was decoded). A raw copy, since the other process can write there.
                let computed = unsafe { copy_crc32c(0, source, scratch.as_mut_ptr(), len) };
                if computed != header.payload_crc {
                    let (seq, stored) = (header.seq, header.payload_crc);
                    let error = RecordError::PayloadCrc {
                        seq,
                        stored,
                        computed,
                    };
                    return Err(LaneFault::Record { at, error });
                }
            }
            at += span;
        }
        Ok(())
    }

    /// Above which seq the restart that was asked for last must begin.
    pub fn restart_above(&self) -> u64 {
        self.memory.consumer().restart_above_seq.load(Relaxed) // our own word
    }

    /// C3 and C4: the appliance holds everything up to `durable`; frees the space of whole runs.
    /// An acknowledgement beyond what was sent is ignored and `false` is returned.
    pub fn release(&mut self, durable: Durable) -> bool {
        if durable.0 > self.sent.0 {
            return false;
        }
        if !self.durable.advance(durable) {
            return true;
        }
        let mut to = self.head;
        while let Some(&(last_seq, end)) = self.pending.front() {
            if last_seq > durable.0 {
                break;
            }
            to = end;
            self.pending.pop_front();
        }
        // The seq goes first: a successor that finds the old head skips what is durable.
        self.memory.consumer().durable_seq.store(durable.0, Release); // pairs with status reads
        self.free(to);
        true
    }

    /// A word of ours that somebody else changed: a producer that believes in a ring which is full would
    /// publish nothing, so that nothing would ever be freed again.
    fn tell_head_again(&self) {
        let word = &self.memory.consumer().head;
        if word.load(Relaxed) != self.head {
            ring::release::<Sound>(word, self.head); // C4
        }
    }

    /// After a reconnect: everything not durable will be taken again.
    pub fn rewind(&mut self) -> Result<(), LaneFault> {
        self.read = self.head;
        self.sent = Sent(self.durable.0);
        self.pending.clear();
        // Edges before the next record stay known: what lies before them may be freed already.
        self.edges.retain(|edge| edge.last_seq < self.durable.0);
        self.epoch = self.edges.back().map_or(0, |edge| edge.epoch);
        if self.restarting {
            Ok(())
        } else {
            self.skip_durable()
        }
    }

    /// The appliance holds more than was known: goes on after `durable`, from the start.
    pub fn resume_after(&mut self, durable: Durable) -> Result<(), LaneFault> {
        if self.durable.advance(durable) {
            self.memory
                .consumer()
                .durable_seq
                .store(self.durable.0, Release); // as in `release`
        }
        self.rewind()
    }

    /// Steps over records at the head that are durable already, frees their space, and checks that the
    /// next one follows. Without the freeing a full ring that is wholly durable would stay full: the
    /// producer would wait for room, the consumer for a record.
    fn skip_durable(&mut self) -> Result<(), LaneFault> {
        let tail = self.tail()?;
        while self.read < tail {
            let (header, span) = header_at(self.memory, self.read, tail)?;
            if header.kind != RecordKind::Pad {
                if header.seq > self.durable.0 {
                    let (at, last, found) = (self.read, self.durable.0, header.seq);
                    if found != last + 1 {
                        return Err(LaneFault::Sequence { at, last, found });
                    }
                    break;
                }
                self.note_epoch(&header);
            }
            self.read += span;
        }
        self.free(self.read);
        Ok(())
    }

    /// C4: frees everything before `to`.
    fn free(&mut self, to: u64) {
        if to != self.head {
            self.head = to;
            ring::release::<Sound>(&self.memory.consumer().head, to); // C4
        }
    }

    /// Whether the stream that will be taken next begins anew, so that the appliance need not hold
    /// what came before it.
    pub fn next_is_base(&self) -> bool {
        self.next_base().is_some()
    }

    /// The seq that the stream which will be taken next relies on, if that stream begins anew.
    pub fn next_base(&self) -> Option<u64> {
        let tail = self.tail().ok()?;
        let mut at = self.read;
        while at < tail {
            let (header, span) = header_at(self.memory, at, tail).ok()?;
            if header.kind != RecordKind::Pad {
                return header.relies_on();
            }
            at += span;
        }
        None
    }

    /// Asks the producer to start the stream anew, above seq `above`, with a full sync. Nothing is
    /// taken until it has answered; if no producer lives, the next attach answers.
    pub fn request_restart(&mut self, above: u64) {
        let words = self.memory.consumer();
        words
            .restart_above_seq
            .store(above.max(self.durable.0), Relaxed); // published by the Release below
        let done = self.memory.producer().restart_done.load(Acquire); // pairs with the producer's Release
        words.restart_request.store(done.wrapping_add(1), Release); // pairs with the producer's Acquire
        self.restarting = true;
        self.pending.clear();
    }

    /// If the producer has answered, jumps to the stream's new beginning.
    fn finish_restart(&mut self) -> bool {
        let (ours, theirs) = (self.memory.consumer(), self.memory.producer());
        let done = theirs.restart_done.load(Acquire); // pairs with the producer's Release
        if done != ours.restart_request.load(Relaxed) {
            return false;
        }
        let at = theirs.restart_at.load(Relaxed); // ordered by the Acquire just before
        let seq = theirs.restart_seq.load(Relaxed); // as above
        let tail = ring::observe_tail::<Sound>(&theirs.tail); // C1
        let ring_bytes = self.memory.geometry().ring_bytes;
        let placed = at <= tail && tail - at <= ring_bytes;
        if !placed || !at.is_multiple_of(RECORD_ALIGN as u64) || seq >= MAX_SEQ / 2 {
            // Nonsense. The producer believes that it has answered: only a new request moves it.
            self.request_restart(self.restart_above());
            return false;
        }
        self.restarting = false;
        self.read = at;
        self.head = at;
        self.sent = Sent(seq);
        self.durable = Durable(seq);
        self.pending.clear();
        self.edges.clear();
        self.epoch = 0;
        ours.durable_seq.store(seq, Release); // as in `release`
        ring::release::<Sound>(&ours.head, at); // C4
        true
    }

    /// C5 to C7: announces sleep. `false`: something came, do not sleep.
    pub fn prepare_sleep(&self) -> bool {
        let words = self.memory.consumer();
        let idle =
            ring::prepare_sleep::<Sound>(&self.memory.producer().tail, &words.sleeping, self.read);
        // A restart that was answered meanwhile is something to do as well.
        let answered = self.restarting
            && self.memory.producer().restart_done.load(Acquire)
                == words.restart_request.load(Relaxed); // pairs as in `finish_restart`
        (idle || self.restarting) && !answered
    }

    /// Awake again.
    pub fn awake(&self) {
        ring::awake(&self.memory.consumer().sleeping);
    }

    /// Tells the producer's side which wake-up pipe to use and whether a session stands.
    pub fn set_link(&self, wake_slot: u32, linked: bool) {
        let words = self.memory.consumer();
        words.wake_slot.store(wake_slot, Relaxed); // a wrong pipe for a moment costs a late wake-up
        words.linked.store(u32::from(linked), Release); // pairs with the disk's Acquire
    }

    /// Tells the filter that the appliance knows of a newer attach epoch than the lane's (0: it takes
    /// the lane).
    pub fn set_fenced(&self, newest_epoch: u32) {
        let word = &self.memory.consumer().fenced_epoch;
        word.store(newest_epoch, Relaxed); // the filter looks at it again and again
    }

    /// Tells what the object store holds, for status pages on the host.
    pub fn set_uploaded(&self, seq: u64) {
        self.memory.consumer().uploaded_seq.store(seq, Relaxed); // for people
    }
}

#[cfg(test)]
#[path = "consumer_tests.rs"]
mod tests;
