//! What a lane tells of the opening that its producer is: its number, how far its region map has come,
//! which openings it goes back to.
//!
//! Invariant: of the two places the one that names the lane's attach epoch is whole, for the epoch is stored
//! after it; only the other one is ever filled anew. The generation that is told rises before the records that
//! rely on it are published.

use super::layout::{LaneMemory, OpeningWords};
use super::sync::Ordering::{Acquire, Relaxed, Release};
use super::sync::fence;
use crate::lineage::{Attach, Lineage, MAX_ANCESTORS};
use crate::mutant::{Guard, holds};

/// How often a reader tries again when the opening changes under it.
const TRIES: usize = 3;

fn place_of(memory: &LaneMemory, epoch: u32) -> Option<&OpeningWords> {
    let mut places = memory.openings().iter();
    places.find(|place| place.epoch.load(Acquire) == epoch) // pairs with the Release in `tell`
}

/// Tells of an opening that begins, before its epoch is stored in the lane.
pub fn tell(memory: LaneMemory, attach: &Attach, lineage: &Lineage) {
    let [first, second] = memory.openings();
    let present = memory.producer().attach_epoch.load(Relaxed); // our own word, or its writer is gone
    let place = match first.epoch.load(Relaxed) == present && present != 0 {
        true => second, // as above
        false => first,
    };
    place.epoch.store(0, Relaxed); // before what follows: the fence
    fence(Release); // pairs with the Acquire fence in `read`
    place.root_epoch.store(lineage.root_epoch(), Relaxed); // published by the epoch, as the rest
    place.id.store(attach.id, Relaxed);
    place.told_generation.store(attach.generation, Relaxed);
    place.durable_generation.store(attach.generation, Relaxed);
    let ancestors = lineage.ancestors();
    place.count.store(ancestors.len() as u32, Relaxed);
    for (words, ancestor) in place.ancestors.iter().zip(ancestors) {
        let values = [ancestor.epoch.into(), ancestor.id, ancestor.generation];
        for (word, value) in words.iter().zip(values) {
            word.store(value, Relaxed);
        }
    }
    place.epoch.store(attach.epoch, Release); // pairs with the Acquire of whoever looks for the place
}

/// The region map has come further: `told` goes to the appliance, `durable` is what the sidecar has.
pub fn raise(memory: LaneMemory, epoch: u32, told: u64, durable: u64) {
    if let Some(place) = place_of(&memory, epoch) {
        place.durable_generation.store(durable, Relaxed); // read when this process is gone
        place.told_generation.store(told, Relaxed); // published by the tail that follows it
    }
}

/// The opening that the lane tells of, and what it goes back to. One of which nothing is told (or which
/// changes again and again while it is read) has the id 0 and goes back to nothing.
pub fn told(memory: LaneMemory) -> (Attach, Lineage) {
    let mut epoch = 0;
    for _ in 0..TRIES {
        epoch = memory.producer().attach_epoch.load(Acquire); // pairs with the producer's Release
        let place = place_of(&memory, epoch);
        if let Some(read) = place.and_then(|place| read(place, epoch)) {
            return read;
        }
    }
    let unknown = Attach {
        epoch,
        ..Attach::default()
    };
    (unknown, Lineage::default())
}

fn read(place: &OpeningWords, epoch: u32) -> Option<(Attach, Lineage)> {
    let attach = Attach {
        epoch,
        id: place.id.load(Relaxed), // whether all of it belongs together is looked at below
        generation: place.told_generation.load(Relaxed),
    };
    let count = place.count.load(Relaxed) as usize;
    let root_epoch = place.root_epoch.load(Relaxed);
    let ancestors = place
        .ancestors
        .iter()
        .take(count)
        .map(|[epoch, id, generation]| Attach {
            epoch: epoch.load(Relaxed) as u32,
            id: id.load(Relaxed),
            generation: generation.load(Relaxed),
        });
    let lineage = Lineage::from_parts(root_epoch, ancestors);
    fence(Acquire); // pairs with the Release fence in `tell`
    let whole = place.epoch.load(Relaxed) == epoch && count <= MAX_ANCESTORS; // ordered by the fence
    lineage.filter(|_| whole).map(|lineage| (attach, lineage))
}

/// Of a lane whose producer is gone: the generation that it told of the opening of this epoch, and the one that
/// the sidecar had then.
pub fn left(memory: LaneMemory, epoch: u32) -> Option<(u64, u64)> {
    let place = place_of(&memory, epoch)?;
    Some((
        place.told_generation.load(Relaxed), // the writer is gone
        place.durable_generation.load(Relaxed),
    ))
}

/// Whether a lane's producer, gone now, has seen a later state of the sidecar than the one that was found:
/// then disk and sidecar were rolled back under it. `left`: see [`left`].
pub fn knows_later(left: Option<(u64, u64)>, found_generation: Option<u64>) -> bool {
    let later = left.zip(found_generation);
    later.is_some_and(|((_, durable), found)| durable > found) && holds(Guard::RollBackNoticed)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::lane::layout::MIN_RING_BYTES;
    use crate::lane::producer::Producer;
    use crate::lane::test_lane::HeapLane;

    fn attach(epoch: u32, id: u64, generation: u64) -> Attach {
        Attach {
            epoch,
            id,
            generation,
        }
    }

    #[test]
    fn the_place_of_the_present_epoch_stays_whole_while_the_next_is_told() {
        let lane = HeapLane::new(1 << 20, MIN_RING_BYTES, 1);
        let memory = lane.memory();
        assert_eq!(told(memory).0, attach(0, 0, 0), "nobody has told");
        let mut lineage = Lineage::anew(1);
        for epoch in 1..6 {
            let (now, before) = (attach(epoch, 70 + u64::from(epoch), 5), told(memory));
            tell(memory, &now, &lineage);
            assert_eq!(told(memory), before, "until the epoch is stored");
            let _ = Producer::new(memory, epoch, 0, 1);
            assert_eq!(told(memory), (now, lineage));
            raise(memory, epoch, 9, 8);
            assert_eq!(told(memory).0.generation, 9);
            assert_eq!(left(memory, epoch), Some((9, 8)));
            raise(memory, epoch + 1, 99, 99); // no such opening
            lineage = lineage.child(told(memory).0);
        }
        assert_eq!(told(memory).1.ancestors().len(), 4);
        assert_eq!(left(memory, 9), None);
    }

    /// Whatever another process wrote there: an answer, and nothing of use to it.
    #[test]
    fn a_place_that_makes_no_sense_is_not_believed() {
        let lane = HeapLane::new(1 << 20, MIN_RING_BYTES, 1);
        let memory = lane.memory();
        tell(memory, &attach(1, 7, 5), &Lineage::anew(1));
        let _ = Producer::new(memory, 1, 0, 1);
        for place in memory.openings() {
            place.count.store(u32::MAX, Relaxed);
        }
        assert_eq!(told(memory), (attach(1, 0, 0), Lineage::default()));
    }
}
