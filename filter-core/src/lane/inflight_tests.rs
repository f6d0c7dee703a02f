#![allow(clippy::unwrap_used)]
use super::super::layout::{DIRTY_BLOCK_BYTES, MIN_RING_BYTES};
use super::super::test_lane::{HeapLane, Numbers, with_seeds};
use super::*;
use std::collections::BTreeMap;

fn lane() -> HeapLane {
    HeapLane::new(1 << 30, MIN_RING_BYTES, 1)
}

/// What another process reads from the lane: the ranges in flight, sorted.
fn mirrored(lane: &HeapLane) -> Vec<(u64, u64)> {
    let memory = lane.memory();
    let pairs = memory.inflight_words().chunks_exact(2);
    let pairs = pairs.map(|pair| (pair[0].load(Relaxed), pair[1].load(Relaxed)));
    let mut pairs: Vec<_> = pairs.filter(|(_, len)| *len != 0).collect();
    pairs.sort_unstable();
    pairs
}

#[test]
fn the_table_is_a_list_of_ranges() {
    with_seeds(20, |seed| {
        let mut numbers = Numbers::new(seed);
        let lane = lane();
        let mut table = InFlight::new(lane.memory());
        // By token: the range, tracked, mirrored.
        let mut model: BTreeMap<u64, (u64, u64, bool, bool)> = BTreeMap::new();
        let mut adding = 60;
        for _ in 0..3000 {
            if numbers.below(200) == 0 {
                adding = numbers.pick(&[20, 60, 95]);
            }
            if numbers.chance(adding) {
                let (offset, len) = (numbers.below(10_000), numbers.between(1, 300));
                let tracked = numbers.chance(30);
                let (token, mirrored) = table.add(offset, len, tracked);
                let shared = model.values().filter(|write| write.3).count();
                assert_eq!(mirrored, shared < SLOTS, "a slot is free, or none is");
                let before = model.insert(token.to_word(), (offset, len, tracked, mirrored));
                assert_eq!(before, None, "a token was given twice");
            } else if let Some(&word) = model.keys().nth(numbers.below(model.len() as u64) as usize)
            {
                let (offset, len, tracked, _) = model.remove(&word).unwrap();
                let token = Token::from_word(word).unwrap();
                assert_eq!(table.remove(token), Some((offset, len, tracked)));
                assert_eq!(table.remove(token), None, "a token is good once");
            }
            let (at, len) = (numbers.below(10_500), numbers.pick(&[1, 10, 100]));
            let overlaps = model.values().any(|(offset, own, ..)| {
                (*offset..offset + own).any(|b| (at..at + len).contains(&b))
            });
            assert_eq!(table.overlaps(at, len), overlaps, "{at} {len}");
            assert_eq!(table.len(), model.len());
            assert_eq!(table.is_empty(), model.is_empty());
            let tracked = model.values().filter(|write| write.2).count();
            assert_eq!(table.tracked(), tracked);
            let mut shared: Vec<_> = model.values().filter(|w| w.3).map(|w| (w.0, w.1)).collect();
            shared.sort_unstable();
            assert_eq!(mirrored(&lane), shared);
        }
    });
}

#[test]
fn overlap_ends_where_the_range_ends() {
    let lane = lane();
    let mut table = InFlight::new(lane.memory());
    let (token, _) = table.add(1000, 100, false);
    for (at, len, overlaps) in [
        (0, 1000, false),
        (0, 1001, true),
        (999, 1, false),
        (1000, 1, true),
        (1099, 1, true),
        (1100, 1, false),
        (900, 500, true),
        (1050, 1, true),
    ] {
        assert_eq!(table.overlaps(at, len), overlaps, "{at} {len}");
    }
    table.remove(token);
    assert!(!table.overlaps(0, 1 << 40));
}

#[test]
fn words_that_are_no_token_are_refused() {
    let lane = lane();
    let mut table = InFlight::new(lane.memory());
    assert_eq!(Token::from_word(0), None);
    assert_eq!(Token::from_word(u64::MAX), None);
    assert_eq!(Token::from_word((1 << 32) + 1), None);
    for word in [1, 256, 257, 1 << 32] {
        assert_eq!(
            table.remove(Token::from_word(word).unwrap()),
            None,
            "{word}"
        );
    }
}

/// What a killed producer left is marked, all of it and nothing else; a new table begins empty.
#[test]
fn leftovers_are_marked() {
    let lane = lane();
    let dirty = DirtyMap::new(lane.memory());
    let mut table = InFlight::new(lane.memory());
    let mut tokens = Vec::new();
    for block in 0..SLOTS as u64 {
        tokens.push(table.add(block * 3 * DIRTY_BLOCK_BYTES + 5, DIRTY_BLOCK_BYTES, false));
    }
    assert!(tokens.iter().all(|(_, mirrored)| *mirrored));
    assert!(!table.add(0, 1, true).1, "more than the table holds");
    for (token, _) in tokens.iter().step_by(2) {
        table.remove(*token);
    }
    assert_eq!(InFlight::leftovers(lane.memory(), dirty), SLOTS / 2);
    for block in 0..SLOTS as u64 * 3 {
        let left = (block / 3) % 2 == 1 && block % 3 != 2;
        assert_eq!(dirty.is_set(block), left, "{block}");
    }
    assert!(InFlight::new(lane.memory()).is_empty());
    assert_eq!(mirrored(&lane), []);
}
