//! Stepping through the records in a ring, for the consumer and for the scan at attach.
//!
//! Invariant: a header is copied out of the shared memory before it is checked, only the copy is
//! used, and a span is believed only if it ends before both the tail and the ring's end.

use super::consumer::LaneFault;
use super::layout::LaneMemory;
use super::ring::{self, Sound};
use super::sync::Ordering::Relaxed;
use crate::record::{HEADER_BYTES, RECORD_ALIGN, RecordError, RecordHeader, RecordKind};

/// C2 for a header: a private copy, checked; pads are returned too. Returns the header and its span.
pub(super) fn header_at(
    memory: LaneMemory,
    at: u64,
    tail: u64,
) -> Result<(RecordHeader, u64), LaneFault> {
    let mut raw = [0u8; HEADER_BYTES];
    let (address, contiguous) = memory.data(at);
    // SAFETY: positions are multiples of 64 below the tail, so 64 bytes lie there; a raw copy,
    // since the other process can write them.
    unsafe {
        raw.as_mut_ptr()
            .copy_from_nonoverlapping(address, HEADER_BYTES)
    };
    let fault = |error| LaneFault::Record { at, error };
    let header = RecordHeader::decode(&raw).map_err(fault)?;
    let pad = header.kind == RecordKind::Pad;
    let span = if pad {
        HEADER_BYTES as u64 + u64::from(header.payload_len)
    } else {
        header.span_bytes() as u64
    };
    let whole = if pad {
        span == contiguous
    } else {
        span <= contiguous
    };
    if !whole || span > tail - at {
        let value = header.payload_len.into();
        return Err(fault(RecordError::Field {
            seq: header.seq,
            field: "payload length",
            value,
        }));
    }
    Ok((header, span))
}

/// Names the ranges of all records from the consumer's head to `tail`: what was published and is not
/// known to be durable downstream.
pub fn undelivered(
    memory: LaneMemory,
    tail: u64,
    mut name: impl FnMut(u64, u64),
) -> Result<(), LaneFault> {
    let head = ring::observe_head::<Sound>(&memory.consumer().head); // P1
    let ring_bytes = memory.geometry().ring_bytes;
    if head > tail || tail - head > ring_bytes || !head.is_multiple_of(RECORD_ALIGN as u64) {
        return Err(LaneFault::Tail {
            tail,
            read: head,
            head,
        });
    }
    let mut at = head;
    while at < tail {
        let (header, span) = header_at(memory, at, tail)?;
        if header.kind != RecordKind::Pad && !header.is_marker() {
            name(header.offset_bytes, header.range_len.into());
        }
        at += span;
    }
    Ok(())
}

/// Where a producer that is gone left a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    /// End of what is published.
    pub tail: u64,
    /// The seq that comes next.
    pub next_seq: u64,
    /// The last stamp used for this disk.
    pub last_stamp: u64,
}

/// Checks everything between head and tail of a lane whose producer is gone.
pub fn scan(memory: LaneMemory) -> Result<Scan, LaneFault> {
    let words = memory.producer();
    let tail = ring::observe_tail::<Sound>(&words.tail); // C1
    let head = ring::observe_head::<Sound>(&memory.consumer().head); // P1
    let ring_bytes = memory.geometry().ring_bytes;
    let aligned = (tail | head).is_multiple_of(RECORD_ALIGN as u64);
    if head > tail || tail - head > ring_bytes || !aligned {
        return Err(LaneFault::Tail {
            tail,
            read: head,
            head,
        });
    }
    let mut at = head;
    let mut last_seq = None;
    // Relaxed: the writer is gone.
    let mut last_stamp = words.last_stamp.load(Relaxed);
    while at < tail {
        let (header, span) = header_at(memory, at, tail)?;
        if header.kind != RecordKind::Pad {
            if last_seq.is_some_and(|last: u64| header.seq != last + 1) {
                let (last, found) = (last_seq.unwrap_or(0), header.seq);
                // A restart may have moved the seq forward inside the ring; never backwards.
                if found <= last {
                    return Err(LaneFault::Sequence { at, last, found });
                }
            }
            last_seq = Some(header.seq);
            last_stamp = last_stamp.max(header.stamp);
        }
        at += span;
    }
    // Only what is published counts: the word is written just before the tail, so after a kill in
    // between it names a record that nobody can see, and going on after that would leave a gap. An
    // empty ring has everything released, that is durable; a restart names its own beginning.
    let durable = memory.consumer().durable_seq.load(Relaxed); // a figure that only grows
    let restarted = words.restart_at.load(Relaxed) == tail; // the writer is gone
    let base = if restarted {
        words.restart_seq.load(Relaxed)
    } else {
        0
    }; // as above
    let last = last_seq.unwrap_or(durable).max(base);
    // A damaged word may name a seq or a stamp that leaves no room to count on.
    if last.max(last_stamp) >= crate::position::MAX_SEQ / 2 {
        return Err(LaneFault::Sequence {
            at: tail,
            last: durable,
            found: last,
        });
    }
    Ok(Scan {
        tail,
        next_seq: last + 1,
        last_stamp,
    })
}
