#![allow(clippy::unwrap_used)]
use super::*;
use alloc::vec;

const DISK: [u8; 16] = [7; 16];

fn block(index: u32, generation: u64, first_word: u64) -> RegionBlock {
    let mut bits = [0; BLOCK_WORDS];
    bits[0] = first_word;
    RegionBlock {
        index,
        shift: DEFAULT_REGION_SHIFT,
        generation,
        durable_seq: 10 * generation,
        bits,
    }
}

fn put(raw: &mut [u8], block: &RegionBlock) {
    let at = block.offset_bytes() as usize;
    raw[at..at + BLOCK_BYTES].copy_from_slice(&block.encode(&DISK));
}

#[test]
fn a_block_lies_where_its_index_and_generation_say() {
    let mut raw = vec![0u8; 6 * BLOCK_BYTES];
    for generation in [3, 4, 5] {
        put(&mut raw, &block(0, generation.min(4), 1));
        put(&mut raw, &block(1, generation, 2));
    }
    assert_eq!(&raw[2 * BLOCK_BYTES..2 * BLOCK_BYTES + 8], b"jdrREGN1");
    assert_eq!(&raw[5 * BLOCK_BYTES..5 * BLOCK_BYTES + 8], b"jdrREGN1");
    assert_eq!(
        decode(&raw, &DISK, 2).unwrap(),
        [block(0, 4, 1), block(1, 5, 2)]
    );
    assert_eq!(
        decode(&raw, &DISK, 3),
        Err(SidecarError::Damaged),
        "a block too many"
    );
    assert_eq!(
        decode(&raw, &[8; 16], 2),
        Err(SidecarError::Damaged),
        "another disk"
    );
    // Swapped copies and swapped blocks.
    let (a, b) = raw.split_at_mut(4 * BLOCK_BYTES);
    a[2 * BLOCK_BYTES..].swap_with_slice(b);
    assert_eq!(decode(&raw, &DISK, 2), Err(SidecarError::Damaged));
}

/// A torn write looks like a whole one that was damaged later, whose bits may have been relied on.
#[test]
fn a_copy_that_is_not_whole_makes_all_bits_count() {
    let mut raw = vec![0u8; 4 * BLOCK_BYTES];
    put(&mut raw, &block(0, 1, 1));
    for generation in 2..8 {
        let (before, next) = (
            block(0, generation - 1, generation - 1),
            block(0, generation, generation),
        );
        for sectors in 0..8 {
            // Sectors are whole, in any order: here those from the front and those from the back.
            for back in [false, true] {
                let mut torn = raw.clone();
                let (at, new) = (next.offset_bytes() as usize, next.encode(&DISK));
                let range = if back {
                    4096 - sectors * 512..4096
                } else {
                    0..sectors * 512
                };
                torn[at + range.start..at + range.end].copy_from_slice(&new[range]);
                let found = decode(&torn, &DISK, 1).unwrap();
                let same = new == torn[at..at + BLOCK_BYTES];
                let old = raw[at..at + BLOCK_BYTES] == torn[at..at + BLOCK_BYTES];
                let doubted = RegionBlock {
                    bits: [u64::MAX; BLOCK_WORDS],
                    ..before.clone()
                };
                // Nothing arrived: the copy of before is whole, unless there was none.
                assert_eq!(
                    found[0],
                    match (same, old && generation > 2) {
                        (true, _) => next.clone(),
                        (_, true) => before.clone(),
                        _ => doubted,
                    }
                );
            }
        }
        put(&mut raw, &next);
        assert_eq!(decode(&raw, &DISK, 1).unwrap(), [next]);
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let good = block(0, 2, 0x8000_0000_0000_0001);
    let raw = good.encode(&DISK);
    for bit in (0..BLOCK_BYTES * 8).step_by(if cfg!(miri) { 997 } else { 1 }) {
        let mut bad = raw;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(RegionBlock::decode(&bad, &DISK, 0, 0), None, "bit {bit}");
    }
}

#[test]
fn sizes() {
    assert_eq!(BLOCK_REGIONS, 32_256);
    assert_eq!(blocks_for(1, 22), 1);
    assert_eq!(blocks_for(BLOCK_REGIONS << 22, 22), 1);
    assert_eq!(blocks_for((BLOCK_REGIONS << 22) + 1, 22), 2);
    assert_eq!(blocks_for(0, 22), 0);
}

#[test]
fn blocks_of_different_regions_do_not_fit_together() {
    let mut raw = vec![0u8; 6 * BLOCK_BYTES];
    put(&mut raw, &block(0, 1, 1));
    let other = RegionBlock {
        shift: 23,
        ..block(1, 1, 1)
    };
    put(&mut raw, &other);
    assert_eq!(decode(&raw, &DISK, 2), Err(SidecarError::Damaged));
}
