//! Which opening of a disk an opening goes back to: how an appliance tells a disk that went on from one
//! that was put back to an earlier state, together with its sidecar.
//!
//! Invariant: an opening that is taken either descends from the newest one that was presented, *and* from
//! a state of it that is not older than the newest which the replica may show traces of; or it descends
//! from an opening later than that one in which the stream began anew, relying on nothing.
//!
//! # Why the generation of the region map is enough
//!
//! The *generation* of a sidecar's region map is the sum of the generations of its blocks. Each write of
//! a block raises it, so within an opening it only rises, and what a power cut tears counts as not
//! written. An opening tells, with OPEN_LANE, the generation in which the newest bit was set; and it tells
//! a higher one before the first record that was published since. The appliance's log has the number
//! before it has that record.
//!
//! Let a copy of disk and sidecar be made, let the disk go on, and let the copy be put back and opened
//! where the lane is gone (after a boot, or on another host). Let `g` be the generation that the copy's map
//! has, and `r` a region.
//!
//! - The copy's map has the bit of `r`: `r` is read again and compared with what the replica holds. Whatever
//!   happened to `r` since the copy was made, the replica holds the copy's content afterwards.
//! - It does not: when the map was written that way all that had been published of `r` was durable at
//!   the appliance, and flushed below; and nothing was written to `r` until the copy was made, since its
//!   bit would have been durable first. So at that moment copy and replica agreed on `r`. They differ now only
//!   if the replica holds a record of `r` that was published later. Before that record came the bit,
//!   with a generation above `g`; the appliance was told of that one before, and has it at least as durably as
//!   the record. The copy's `g` is lower: the opening is refused.
//!
//! So a copy that lacks no bit is taken, and costs its marked regions; one that lacks a bit of which the
//! replica may show traces is refused, and all of it is synced. A write that the host let pass before
//! the sidecar had its bit (the budget of `jetdr.region-intent=budget` ended) raises the number
//! that is told by more than all other writes of the map could meanwhile: until the bit is there, the
//! sidecar counts as one from before.
//!
//! # Why ancestors
//!
//! An opening that no appliance ever heard of (the link was cut, the host died) leaves nothing to compare but
//! a higher epoch. So the sidecar remembers the openings that led to it, each with the generation that the
//! next one found: the newest one that the appliance knows must be among them. A disk that was opened
//! more than [`MAX_ANCESTORS`] times without an appliance is synced in full.
//!
//! A migration hands the sidecar over after its last write, with the generation that was told last or
//! a later one. A revert of an open disk may put an older sidecar in place: until all of the map
//! was written anew, with generations above those in memory, it counts as what it is, rolled back. A clone has
//! another id.

use crate::mutant::{Guard, holds};

/// Openings that a lineage remembers.
pub const MAX_ANCESTORS: usize = 32;

/// One opening of a disk, and how far its sidecar had come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attach {
    /// Its epoch.
    pub epoch: u32,
    /// A number of its own: two openings have the same epoch if disk and sidecar were rolled back
    /// between them. 0: not known.
    pub id: u64,
    /// Generation of the region map: that of an ancestor as the next opening found it, of the present one
    /// as it is told now.
    pub generation: u64,
}

impl Attach {
    /// Whether both are the same opening.
    pub const fn is_same(&self, other: &Self) -> bool {
        self.epoch == other.epoch && self.id == other.id
    }

    /// What is known once `other` was presented too; one of an older epoch tells nothing new.
    pub fn advanced(&self, other: &Self) -> Self {
        if other.epoch < self.epoch {
            return *self;
        }
        let generation = match self.is_same(other) {
            true => self.generation.max(other.generation),
            false => other.generation,
        };
        Self {
            generation,
            ..*other
        }
    }
}

/// What an opening goes back to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Lineage {
    /// The opening in which the stream began anew, relying on nothing; openings before it do not matter.
    root_epoch: u32,
    /// The newest first.
    ancestors: [Attach; MAX_ANCESTORS],
    count: usize,
}

impl Default for Lineage {
    fn default() -> Self {
        Self::anew(0)
    }
}

impl core::fmt::Debug for Lineage {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Lineage({}, {:?})", self.root_epoch, self.ancestors())
    }
}

impl Lineage {
    /// Of an opening of this epoch in which the stream begins anew, relying on nothing.
    pub const fn anew(root_epoch: u32) -> Self {
        let none = Attach {
            epoch: 0,
            id: 0,
            generation: 0,
        };
        Self {
            root_epoch,
            ancestors: [none; MAX_ANCESTORS],
            count: 0,
        }
    }

    /// From its parts, the newest ancestor first. `None`: too many.
    pub fn from_parts(
        root_epoch: u32,
        ancestors: impl IntoIterator<Item = Attach>,
    ) -> Option<Self> {
        let mut lineage = Self::anew(root_epoch);
        for ancestor in ancestors {
            *lineage.ancestors.get_mut(lineage.count)? = ancestor;
            lineage.count += 1;
        }
        Some(lineage)
    }

    /// Of the opening that follows `parent`, whose lineage this is.
    pub fn child(&self, parent: Attach) -> Self {
        let mut next = *self;
        next.ancestors.rotate_right(1);
        if let Some(first) = next.ancestors.first_mut() {
            *first = parent;
        }
        next.count = (self.count + 1).min(MAX_ANCESTORS);
        next
    }

    /// Epoch of the opening in which the stream began anew.
    pub const fn root_epoch(&self) -> u32 {
        self.root_epoch
    }

    /// The openings before, the newest first.
    pub fn ancestors(&self) -> &[Attach] {
        self.ancestors.get(..self.count).unwrap_or_default()
    }

    /// Whether an opening of this lineage goes on from what is known: `known` is the newest opening
    /// that was presented, with the highest generation that was told of it.
    pub fn goes_on_from(&self, known: &Attach) -> bool {
        let never = known.epoch == 0 || known.id == 0;
        let replaced = known.epoch < self.root_epoch;
        let mut ancestors = self.ancestors().iter();
        let parent = ancestors.find(|ancestor| ancestor.is_same(known));
        let later = parent.is_some_and(|found| found.generation >= known.generation);
        never || replaced || later || !holds(Guard::RollBackNoticed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn attach(epoch: u32, id: u64, generation: u64) -> Attach {
        Attach {
            epoch,
            id,
            generation,
        }
    }

    #[test]
    fn an_opening_goes_on_from_the_newest_that_is_known_or_a_later_beginning() {
        let first = Lineage::anew(1);
        let second = first.child(attach(1, 11, 40));
        let third = second.child(attach(2, 12, 50));
        assert_eq!(third.ancestors(), [attach(2, 12, 50), attach(1, 11, 40)]);
        for (known, goes_on) in [
            (attach(0, 0, 0), true),
            (attach(2, 12, 50), true),
            (attach(2, 12, 49), true),
            (attach(2, 12, 51), false), // the sidecar is from before
            (attach(2, 13, 50), false), // another opening of that epoch
            (attach(1, 11, 40), true),  // the second was never presented
            (attach(1, 11, 41), false), // as above, and it was rolled back before
            (attach(9, 11, 40), false),
            (attach(2, 0, 0), true), // by somebody who could not tell
        ] {
            assert_eq!(third.goes_on_from(&known), goes_on, "{known:?}");
        }
        let anew = Lineage::anew(4).child(attach(4, 14, 7));
        assert!(anew.goes_on_from(&attach(3, 13, 999)), "it was replaced");
        assert!(!anew.goes_on_from(&attach(4, 15, 0)));
    }

    #[test]
    fn the_oldest_ancestors_are_forgotten_and_then_refused() {
        let mut lineage = Lineage::anew(1);
        for epoch in 1..=MAX_ANCESTORS as u32 + 1 {
            lineage = lineage.child(attach(epoch, u64::from(epoch), 5));
        }
        assert_eq!(lineage.ancestors().len(), MAX_ANCESTORS);
        assert!(lineage.goes_on_from(&attach(2, 2, 5)));
        assert!(!lineage.goes_on_from(&attach(1, 1, 5)));
        let parts = lineage.ancestors().iter().copied();
        assert_eq!(Lineage::from_parts(1, parts), Some(lineage));
        let mut long = lineage.ancestors().to_vec();
        long.push(attach(1, 1, 1));
        assert_eq!(Lineage::from_parts(1, long), None);
    }

    #[test]
    fn what_is_known_of_one_opening_only_rises() {
        let known = attach(3, 7, 50);
        assert_eq!(known.advanced(&attach(3, 7, 40)), known);
        assert_eq!(known.advanced(&attach(3, 7, 60)), attach(3, 7, 60));
        assert_eq!(known.advanced(&attach(4, 8, 2)), attach(4, 8, 2));
        assert_eq!(known.advanced(&attach(2, 6, 99)), known);
    }
}
