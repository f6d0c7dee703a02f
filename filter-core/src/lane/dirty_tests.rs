#![allow(clippy::unwrap_used)]
use super::super::layout::MIN_RING_BYTES;
use super::super::test_lane::{HeapLane, Numbers, with_seeds};
use super::*;
use std::collections::BTreeSet;

#[test]
fn the_map_is_a_set_of_blocks() {
    with_seeds(20, |seed| {
        let mut numbers = Numbers::new(seed);
        let lane = HeapLane::new(1 << 30, MIN_RING_BYTES, 1);
        let map = DirtyMap::new(lane.memory());
        let blocks = lane.memory().geometry().max_capacity_bytes() / DIRTY_BLOCK_BYTES;
        let mut model = BTreeSet::new();
        for _ in 0..1500 {
            // Near the words' borders, near the map's end and beyond it, and anywhere.
            let block = match numbers.below(4) {
                0 => numbers.below(6) * 64 + numbers.below(3),
                1 => (blocks + 2).saturating_sub(numbers.below(70)),
                _ => numbers.below(blocks),
            };
            match numbers.below(10) {
                0..4 => {
                    let skew = numbers.pick(&[0, 1, 512, DIRTY_BLOCK_BYTES - 1]);
                    let offset = block * DIRTY_BLOCK_BYTES + skew;
                    let whole = numbers.pick(&[0, 1, 63, 64, 65, 200]) * DIRTY_BLOCK_BYTES;
                    let len = whole + numbers.pick(&[0, 1, 512, DIRTY_BLOCK_BYTES - 1]);
                    map.mark(offset, len);
                    let first = offset / DIRTY_BLOCK_BYTES;
                    let end = (offset + len).div_ceil(DIRTY_BLOCK_BYTES);
                    let end = if len == 0 { first } else { end.min(blocks) };
                    model.extend(first..end);
                }
                4..8 => {
                    map.clear_block(block);
                    model.remove(&block);
                }
                8 if numbers.chance(2) => {
                    map.clear_all();
                    model.clear();
                }
                _ => {
                    let found: Vec<u64> =
                        std::iter::successors(map.next_set(0), |at| map.next_set(at + 1)).collect();
                    assert!(found.iter().eq(model.iter()), "{found:?}");
                }
            }
            assert_eq!(map.is_set(block), model.contains(&block), "{block}");
            assert_eq!(map.next_set(block), model.range(block..).next().copied());
            assert_eq!(map.count(), model.len() as u64);
        }
    });
}

#[test]
fn ranges_beyond_the_map_change_nothing() {
    let lane = HeapLane::new(1 << 30, MIN_RING_BYTES, 1);
    let map = DirtyMap::new(lane.memory());
    let end = lane.memory().geometry().max_capacity_bytes();
    for offset in [end, end + 1, end * 64, u64::MAX - 1, u64::MAX] {
        for len in [1, DIRTY_BLOCK_BYTES, u64::MAX] {
            map.mark(offset, len);
            assert_eq!(map.count(), 0, "{offset} {len}");
        }
        assert!(!map.is_set(offset / DIRTY_BLOCK_BYTES));
        map.clear_block(offset / DIRTY_BLOCK_BYTES);
        assert_eq!(map.next_set(offset / DIRTY_BLOCK_BYTES), None);
    }
    // The ring begins right behind the map.
    map.mark(0, u64::MAX);
    assert_eq!(map.count(), end / DIRTY_BLOCK_BYTES);
    let words = lane.memory().dirty_words().len();
    // SAFETY: the eight bytes after the map are the ring's first.
    let behind = unsafe {
        lane.memory()
            .dirty_words()
            .as_ptr()
            .add(words)
            .cast::<u64>()
            .read()
    };
    assert_eq!(behind, 0);
}

/// A disk's last block may be cut short: a mark of its last byte is a mark of that block, and the
/// map has a bit for it whatever the capacity.
#[test]
fn each_disk_has_a_bit_for_its_last_byte() {
    for capacity in [
        512,
        65_535,
        65_536,
        65_537,
        (1 << 30) - 512,
        1 << 30,
        (5 << 30) + 512,
    ] {
        let lane = HeapLane::new(capacity, MIN_RING_BYTES, 1);
        let map = DirtyMap::new(lane.memory());
        map.mark(capacity - 1, 1);
        assert_eq!(
            map.next_set(0),
            Some(capacity.div_ceil(DIRTY_BLOCK_BYTES) - 1)
        );
        assert_eq!(map.count(), 1);
        assert!(lane.memory().geometry().max_capacity_bytes() >= 2 * capacity);
    }
}
