//! The producer's side of a lane: reserve, copy, publish.
//!
//! Invariant: the tail, the next seq and the state are this side's private truth; the shared words
//! are only told. The consumer's head is believed only if it lies between the last head seen and the
//! tail, on a record boundary's alignment. The caller holds the disk's lock around every call.

use super::copy::copy_crc32c;
use super::layout::{LaneMemory, LaneState};
use super::ring::{self, Sound};
use super::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};
use crate::mutant::{Guard, holds};
use crate::position::{MAX_SEQ, Published};
use crate::record::{
    FLAG_FRAGMENT_MORE, FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, FLAG_SYNC_END, HEADER_BYTES,
    MAX_PAYLOAD_BYTES, MAX_RANGE_BYTES, RECORD_ALIGN, RecordHeader, RecordKind, record_span_bytes,
};
use core::marker::PhantomData;

/// A piece of memory that is read by raw copy: a guest's buffer, which may change meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    base: *const u8,
    len: usize,
    lives: PhantomData<&'a [u8]>,
}

impl<'a> Source<'a> {
    /// A piece of ordinary memory.
    pub const fn from_slice(bytes: &'a [u8]) -> Self {
        Self {
            base: bytes.as_ptr(),
            len: bytes.len(),
            lives: PhantomData,
        }
    }

    /// A piece of memory that others may write meanwhile.
    ///
    /// # Safety
    /// `base` must be readable for `len` bytes for the lifetime `'a`.
    pub const unsafe fn from_raw(base: *const u8, len: usize) -> Self {
        Self {
            base,
            len,
            lives: PhantomData,
        }
    }
}

/// What to publish.
#[derive(Clone, Copy, Debug)]
pub struct Draft<'a> {
    /// WRITE, ZERO, UNMAP, SYNC or VOID.
    pub kind: RecordKind,
    /// Start of the range, in bytes.
    pub offset_bytes: u64,
    /// Length of the range, in bytes. For WRITE and SYNC the sources hold exactly as much.
    pub len_bytes: u64,
    /// The data, in order.
    pub sources: &'a [Source<'a>],
}

/// What every record is stamped with.
#[derive(Clone, Copy, Debug)]
pub struct Stamps<'a> {
    /// The VM's counter over all its disks; holds the last stamp used.
    pub stamp: &'a AtomicU64,
    /// The domain's cut epoch on this host.
    pub cut_epoch: &'a AtomicU32,
    /// Host time, ns since 1970.
    pub time_ns: u64,
}

/// Why nothing was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The consumer has not freed enough space yet.
    #[error("the lane is full: {needed} bytes needed, {free} free")]
    Full {
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The write can never fit: it needs more than half the ring.
    #[error("the write needs {needed} bytes of the lane, at most {limit} can be used at once")]
    TooLarge {
        /// Bytes needed.
        needed: u64,
        /// Half the ring.
        limit: u64,
    },
    /// The sequence numbers are used up, or the range cannot be described.
    #[error("the range cannot be recorded")]
    Range,
}

/// What was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a consumer that sleeps must be woken"]
pub struct PublishedGroup {
    /// Last seq published.
    pub last: Published,
    /// The consumer sleeps: write to its wake-up pipe.
    pub wake: bool,
}

/// The producer's side of a lane.
#[derive(Debug)]
pub struct Producer {
    memory: LaneMemory,
    attach_epoch: u32,
    /// A stream that begins anew has larger seqs than this.
    restart_above: u64,
    tail: u64,
    head_seen: u64,
    next_seq: u64,
    bad_heads: u64,
    /// The next SYNC_BEGIN starts a stream anew, which relies on the appliance's holding everything
    /// up to this seq (0: nothing).
    stream_base: Option<u64>,
}

impl Producer {
    /// Takes over the producer's side at (`tail`, `next_seq`), as found by the attach scan; what is told
    /// of the opening ([`super::opening::tell`]) comes before.
    pub fn new(memory: LaneMemory, attach_epoch: u32, tail: u64, next_seq: u64) -> Self {
        let words = memory.producer();
        words
            .attach_epoch
            .store(attach_epoch, super::sync::Ordering::Release); // pairs with the daemon's Acquire when it presents the lane
        // Round up a stamping word that a killed producer left odd.
        ring::stamp_leave(&words.stamping);
        // The head is looked at again, with checks, before space is reused.
        let head_seen = tail.saturating_sub(memory.geometry().ring_bytes);
        Self {
            memory,
            attach_epoch,
            restart_above: 0,
            tail,
            head_seen,
            next_seq,
            bad_heads: 0,
            stream_base: None,
        }
    }

    /// The lane's memory.
    pub const fn memory(&self) -> LaneMemory {
        self.memory
    }

    /// The attach epoch that records are stamped with.
    pub const fn attach_epoch(&self) -> u32 {
        self.attach_epoch
    }

    /// End of what is published, in bytes since the lane began.
    pub const fn tail(&self) -> u64 {
        self.tail
    }

    /// The last seq published.
    pub const fn published(&self) -> Published {
        Published(self.next_seq - 1)
    }

    /// How often the consumer's head was found to be impossible.
    pub const fn bad_heads(&self) -> u64 {
        self.bad_heads
    }

    /// The epoch was raised while the disk is open, and was told of; a restart of the stream follows.
    /// Then it begins above `above_seq`.
    pub fn rise(&mut self, attach_epoch: u32, above_seq: u64) {
        self.attach_epoch = attach_epoch;
        self.restart_above = above_seq;
        self.memory
            .producer()
            .attach_epoch
            .store(attach_epoch, super::sync::Ordering::Release); // as in `new`
    }

    /// Bytes of the ring that are free.
    pub fn free_bytes(&mut self) -> u64 {
        let ring_bytes = self.memory.geometry().ring_bytes;
        let head = ring::observe_head::<Sound>(&self.memory.consumer().head); // P1
        let aligned = head.is_multiple_of(RECORD_ALIGN as u64);
        if aligned && (self.head_seen..=self.tail).contains(&head) {
            self.head_seen = head;
        } else {
            self.bad_heads += 1;
        }
        ring_bytes - (self.tail - self.head_seen)
    }

    /// Tells the state to whoever looks at the lane.
    pub fn set_state(&self, state: LaneState) {
        let words = self.memory.producer();
        let release = super::sync::Ordering::Release; // pairs with the daemon's Acquire: a base came before
        words.state.store(state as u32, release);
    }

    /// Publishes a write (in fragments), zero, unmap, void or sync range as one group.
    pub fn publish(
        &mut self,
        draft: &Draft<'_>,
        stamps: &Stamps<'_>,
    ) -> Result<PublishedGroup, PublishError> {
        let has_data = matches!(draft.kind, RecordKind::Write | RecordKind::Sync);
        let step = u64::from(if has_data {
            MAX_PAYLOAD_BYTES
        } else {
            MAX_RANGE_BYTES
        });
        let given: u64 = draft.sources.iter().map(|s| s.len as u64).sum();
        if draft.len_bytes == 0 || (has_data && given != draft.len_bytes) {
            return Err(PublishError::Range);
        }
        let count = draft.len_bytes.div_ceil(step);
        let end = draft
            .offset_bytes
            .checked_add(draft.len_bytes)
            .ok_or(PublishError::Range)?;
        if end > crate::record::MAX_DISK_BYTES / 2 || self.next_seq + count > MAX_SEQ {
            return Err(PublishError::Range);
        }
        self.reserve(draft.len_bytes, step, has_data)?;

        let words = self.memory.producer();
        let cut_epoch = ring::stamp_enter::<Sound>(&words.stamping, stamps.cut_epoch);
        let mut cursor = Cursor {
            sources: draft.sources,
            at: 0,
        };
        let mut tail = self.tail;
        let mut done = 0;
        let mut last_stamp = 0;
        while done < draft.len_bytes {
            let len = step.min(draft.len_bytes - done);
            let more = done + len < draft.len_bytes;
            last_stamp = stamps.stamp.fetch_add(1, Relaxed) + 1; // unique and rising is all it must be
            let header = RecordHeader {
                kind: draft.kind,
                flags: if more { FLAG_FRAGMENT_MORE } else { 0 },
                payload_len: if has_data { len as u32 } else { 0 },
                payload_crc: 0,
                seq: self.next_seq,
                stamp: last_stamp,
                offset_bytes: draft.offset_bytes + done,
                attach_epoch: self.attach_epoch,
                cut_epoch,
                time_ns: stamps.time_ns,
                range_len: len as u32,
            };
            tail = self.put(tail, header, &mut cursor);
            self.next_seq += 1;
            done += len;
        }
        words.last_stamp.store(last_stamp, Relaxed); // read at the next attach
        Ok(self.commit(tail))
    }

    /// Publishes a marker: SYNC_BEGIN (with STREAM_BASE after a restart) or SYNC_END.
    pub fn publish_marker(
        &mut self,
        begin: bool,
        stamps: &Stamps<'_>,
    ) -> Result<PublishedGroup, PublishError> {
        self.reserve(0, 1, false)?;
        let words = self.memory.producer();
        let cut_epoch = ring::stamp_enter::<Sound>(&words.stamping, stamps.cut_epoch);
        let (flags, relies_on) = match (begin, self.stream_base) {
            (true, Some(seq)) => (FLAG_SYNC_BEGIN | FLAG_STREAM_BASE, seq),
            (true, None) => (FLAG_SYNC_BEGIN, 0),
            (false, _) => (FLAG_SYNC_END, 0),
        };
        if begin {
            self.stream_base = None;
        }
        let stamp = stamps.stamp.fetch_add(1, Relaxed) + 1; // as in `publish`
        let header = RecordHeader {
            kind: RecordKind::Sync,
            flags,
            payload_len: 0,
            payload_crc: 0,
            seq: self.next_seq,
            stamp,
            offset_bytes: relies_on,
            attach_epoch: self.attach_epoch,
            cut_epoch,
            time_ns: stamps.time_ns,
            range_len: 0,
        };
        let tail = self.put(
            self.tail,
            header,
            &mut Cursor {
                sources: &[],
                at: 0,
            },
        );
        self.next_seq += 1;
        words.last_stamp.store(stamp, Relaxed); // read at the next attach
        Ok(self.commit(tail))
    }

    /// The stream starts anew at the present tail: the next SYNC_BEGIN carries STREAM_BASE, and
    /// relies on the appliance's holding everything up to `relies_on_seq` (0: a full sync follows).
    pub fn start_base(&mut self, relies_on_seq: u64) {
        self.stream_base = Some(relies_on_seq);
    }

    /// Whether the stream starts anew and its beginning is not published yet: no other record may
    /// come before it.
    pub const fn base_pending(&self) -> bool {
        self.stream_base.is_some()
    }

    /// Whether the consumer asks for a restart of the stream.
    pub fn restart_requested(&self) -> bool {
        let asked = self
            .memory
            .consumer()
            .restart_request
            .load(super::sync::Ordering::Acquire); // pairs with the consumer's Release
        asked != self.memory.producer().restart_done.load(Relaxed) // our own word
    }

    /// Answers a restart request: everything before the present tail is given up, the stream goes on
    /// with a SYNC_BEGIN that carries STREAM_BASE, and a full sync follows.
    pub fn restart(&mut self) {
        let (words, theirs) = (self.memory.producer(), self.memory.consumer());
        let asked = theirs.restart_request.load(super::sync::Ordering::Acquire); // pairs with the consumer's Release
        let above = theirs.restart_above_seq.load(Relaxed); // ordered by the Acquire just before
        if above < MAX_SEQ / 2 && holds(Guard::BaseAboveAll) {
            self.next_seq = self.next_seq.max(above + 1);
        }
        self.next_seq = self.next_seq.max(self.restart_above + 1);
        words.restart_at.store(self.tail, Relaxed); // published by the Release below
        words.restart_seq.store(self.next_seq - 1, Relaxed); // published by the Release below
        words.last_seq.store(self.next_seq - 1, Relaxed); // published by the Release below
        words
            .restart_done
            .store(asked, super::sync::Ordering::Release); // pairs with the consumer's Acquire
        self.stream_base = Some(0);
    }

    /// Whether the consumer sleeps although something is published: a wake-up for the shell to send
    /// after a restart or at attach.
    pub fn consumer_sleeps(&self) -> bool {
        ring::publish::<Sound>(
            &self.memory.producer().tail,
            &self.memory.consumer().sleeping,
            self.tail,
        )
    }

    /// Checks that a group fits, in the worst case of one pad and rounding.
    fn reserve(&mut self, len_bytes: u64, step: u64, has_data: bool) -> Result<(), PublishError> {
        let count = len_bytes.div_ceil(step).max(1);
        let largest = if has_data {
            record_span_bytes(len_bytes.min(step) as u32)
        } else {
            HEADER_BYTES
        };
        let spans = count * largest as u64;
        let ring_bytes = self.memory.geometry().ring_bytes;
        // A pad never takes more than the record that did not fit.
        let needed = spans + largest as u64;
        let limit = ring_bytes / 2;
        if needed > limit {
            return Err(PublishError::TooLarge { needed, limit });
        }
        if ring_bytes - (self.tail - self.head_seen) >= needed {
            return Ok(()); // the head seen before is enough: no look at the consumer's cache line
        }
        let free = self.free_bytes();
        if free < needed {
            Err(PublishError::Full { needed, free })
        } else {
            Ok(())
        }
    }

    /// P2: writes one record at `tail` (after a pad, if it would not fit before the ring's end).
    fn put(&self, mut tail: u64, mut header: RecordHeader, cursor: &mut Cursor<'_>) -> u64 {
        let span = header.span_bytes() as u64;
        let (mut at, contiguous) = self.memory.data(tail);
        if contiguous < span {
            let pad = RecordHeader {
                kind: RecordKind::Pad,
                flags: 0,
                payload_len: (contiguous - HEADER_BYTES as u64) as u32,
                payload_crc: 0,
                seq: 0,
                stamp: 0,
                range_len: 0,
                ..header
            };
            write_header(at, &pad);
            tail += contiguous;
            at = self.memory.data(tail).0;
        }
        let len = header.payload_len as usize;
        if len > 0 {
            // SAFETY: `reserve` made sure of `span` free bytes, and they are contiguous here.
            header.payload_crc = unsafe { cursor.copy_to(at.add(HEADER_BYTES), len) };
            let padding = span as usize - HEADER_BYTES - len;
            // SAFETY: the padding lies inside the span.
            unsafe { at.add(HEADER_BYTES + len).write_bytes(0, padding) };
        }
        write_header(at, &header);
        tail + span
    }

    /// P3 to P5.
    fn commit(&mut self, tail: u64) -> PublishedGroup {
        let words = self.memory.producer();
        self.tail = tail;
        words.last_seq.store(self.next_seq - 1, Relaxed); // for people
        let wake = ring::publish::<Sound>(&words.tail, &self.memory.consumer().sleeping, tail);
        ring::stamp_leave(&words.stamping);
        PublishedGroup {
            last: self.published(),
            wake,
        }
    }
}

/// Writes a header at a 64-byte aligned place in the ring.
fn write_header(at: *mut u8, header: &RecordHeader) {
    let bytes = header.encode();
    // SAFETY: `at` came from `LaneMemory::data` for a position with at least a header's bytes left
    // before the ring's end: positions are multiples of 64, and so is the ring's length.
    unsafe { at.copy_from_nonoverlapping(bytes.as_ptr(), HEADER_BYTES) };
}

/// Walks the sources across record boundaries.
struct Cursor<'a> {
    sources: &'a [Source<'a>],
    at: usize,
}

impl Cursor<'_> {
    /// Copies the next `len` bytes to `target`, returns their CRC32C.
    ///
    /// # Safety
    /// `target` must be writable for `len` bytes.
    unsafe fn copy_to(&mut self, target: *mut u8, len: usize) -> u32 {
        let mut done = 0;
        let mut crc = 0;
        while done < len {
            let Some(source) = self.sources.first() else {
                break;
            };
            let take = (source.len - self.at).min(len - done);
            // SAFETY: `take` bytes are left in the source and in the target.
            crc = unsafe { copy_crc32c(crc, source.base.add(self.at), target.add(done), take) };
            done += take;
            self.at += take;
            if self.at == source.len {
                self.sources = self.sources.get(1..).unwrap_or_default();
                self.at = 0;
            }
        }
        crc
    }
}
