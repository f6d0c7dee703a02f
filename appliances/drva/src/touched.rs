//! Which blocks of a disk were touched lately: of these the store cannot tell what they hold.
//!
//! Invariant: every block that a record above the floor touched is marked; a question about anything
//! below the floor has no answer. So whatever is forgotten can only make fewer answers, never a wrong one.

use filter_core::lane::layout::DIRTY_BLOCK_BYTES;
use filter_core::mutant::{Guard, holds};
use filter_core::record::RecordHeader;
use std::collections::HashMap;

/// Blocks of one chunk: the bits of a word.
const CHUNK_BLOCKS: u64 = 64;
/// Chunks that are remembered of one disk: 64 GiB of it.
const MAX_CHUNKS: usize = 16 << 10;

#[derive(Clone, Copy, Debug)]
struct Chunk {
    mask: u64,
    /// The last record that touched any block of it.
    last_seq: u64,
}

/// The blocks of one disk that records above a floor have touched.
#[derive(Clone, Debug)]
pub struct Touched {
    floor: u64,
    chunks: HashMap<u64, Chunk>,
}

impl Touched {
    /// Nothing is known of what came up to this seq.
    pub fn above(floor: u64) -> Self {
        Self {
            floor,
            chunks: HashMap::new(),
        }
    }

    /// A record was admitted.
    pub fn note(&mut self, header: &RecordHeader) {
        if header.range_len == 0 {
            return;
        }
        let first = header.offset_bytes / DIRTY_BLOCK_BYTES;
        let last = (header.end_bytes() - 1) / DIRTY_BLOCK_BYTES;
        for number in first / CHUNK_BLOCKS..=last / CHUNK_BLOCKS {
            let start = number * CHUNK_BLOCKS;
            let from = first.saturating_sub(start);
            let to = (last - start).min(CHUNK_BLOCKS - 1);
            let mask = (u64::MAX << from) & (u64::MAX >> (CHUNK_BLOCKS - 1 - to));
            if self.chunks.len() >= MAX_CHUNKS && !self.chunks.contains_key(&number) {
                self.chunks.clear();
                self.floor = header.seq;
                return;
            }
            let chunk = self.chunks.entry(number).or_insert(Chunk {
                mask: 0,
                last_seq: 0,
            });
            chunk.mask |= mask;
            chunk.last_seq = header.seq;
        }
    }

    /// A cut that ends here is in the store: questions are about this one from now on.
    pub fn settle(&mut self, position: u64) {
        if position > self.floor {
            self.floor = position;
            self.chunks.retain(|_, chunk| chunk.last_seq > position);
        }
    }

    /// Which of `blocks` blocks no record above `position` has touched; `None`: that is not known.
    pub fn untouched(&self, position: u64, first_block: u64, blocks: usize) -> Option<Vec<bool>> {
        if position < self.floor {
            return None;
        }
        let untouched = |block: u64| match self.chunks.get(&(block / CHUNK_BLOCKS)) {
            Some(chunk) if chunk.last_seq > position && holds(Guard::HashesTouched) => {
                chunk.mask >> (block % CHUNK_BLOCKS) & 1 == 0
            }
            _ => true,
        };
        Some((first_block..).take(blocks).map(untouched).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use filter_core::record::RecordKind;
    use proptest::prelude::*;

    fn record(seq: u64, offset_bytes: u64, range_len: u32) -> RecordHeader {
        RecordHeader {
            kind: RecordKind::Zero,
            flags: 0,
            payload_len: 0,
            payload_crc: 0,
            seq,
            stamp: seq,
            offset_bytes,
            attach_epoch: 1,
            cut_epoch: 1,
            time_ns: 0,
            range_len,
        }
    }

    proptest! {
        /// Never says of a touched block that it was not, whatever was settled in between.
        #[test]
        fn no_touched_block_passes(
            records in proptest::collection::vec((0u64..400, 1u32..40), 1..60),
            settled in proptest::collection::vec(0u64..60, 0..4),
            position in 0u64..70,
        ) {
            let mut touched = Touched::above(0);
            for (seq, (sector, sectors)) in (1..).zip(&records) {
                touched.note(&record(seq, sector * 16384, sectors * 16384));
                for at in settled.iter().filter(|at| **at == seq / 2) {
                    touched.settle(*at);
                }
            }
            let Some(answer) = touched.untouched(position, 0, 128) else {
                prop_assert!(settled.iter().any(|at| *at > position));
                return Ok(());
            };
            for (seq, (sector, sectors)) in (1u64..).zip(&records) {
                if seq > position {
                    let (start, end) = (sector * 16384, (sector + u64::from(*sectors)) * 16384);
                    for block in start / DIRTY_BLOCK_BYTES..end.div_ceil(DIRTY_BLOCK_BYTES) {
                        prop_assert!(!answer[block as usize], "record {seq}, block {block}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_was_not_touched_is_known_and_too_much_is_forgotten() {
        let mut touched = Touched::above(7);
        assert_eq!(touched.untouched(6, 0, 2), None, "below the floor");
        touched.note(&record(8, 65536, 1));
        touched.note(&record(9, 64 * 65536 - 1, 2));
        let of = |touched: &Touched, at, block| touched.untouched(at, block, 1).map(|of| of[0]);
        assert_eq!(of(&touched, 7, 0), Some(true));
        assert_eq!(of(&touched, 7, 1), Some(false));
        assert_eq!(of(&touched, 7, 63), Some(false));
        assert_eq!(of(&touched, 7, 64), Some(false));
        assert_eq!(of(&touched, 9, 64), Some(true), "not above 9");
        touched.settle(9);
        assert_eq!(of(&touched, 9, 1), Some(true));
        assert_eq!(of(&touched, 8, 1), None, "a newer cut is in the store");
        assert!(touched.chunks.is_empty());
        for chunk in 0..=MAX_CHUNKS as u64 {
            touched.note(&record(10 + chunk, chunk * 64 * 65536, 512));
        }
        assert!(touched.chunks.len() <= MAX_CHUNKS);
        assert_eq!(of(&touched, 9, 1), None, "too much to remember");
    }
}
