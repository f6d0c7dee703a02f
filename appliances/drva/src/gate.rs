//! Which records the upload may feed now, and which have to wait in the log.
//!
//! Invariant: while a cut is asked for only records stamped below its epoch pass, and while one is closed
//! and not committed only those up to its positions; once one of a disk waits, all later ones of it do.

use crate::domain::ClosedCut;
use filter_core::mutant::{Guard, holds};
use filter_core::record::RecordHeader;
use std::collections::{BTreeMap, HashMap};
use uuid::Uuid;

/// What may be fed.
#[derive(Debug, Default, PartialEq, Eq)]
enum Gate {
    /// Everything.
    #[default]
    Open,
    /// A cut of this epoch is asked for.
    Asked(u32),
    /// A cut is closed, and waits to be committed: its epoch, per disk its last record.
    Closed(u32, BTreeMap<Uuid, u64>),
}

impl Gate {
    fn passes(&self, disk: &Uuid, record: &RecordHeader) -> bool {
        match self {
            _ if !holds(Guard::UploadHolds) => true,
            Self::Open => true,
            Self::Asked(epoch) => record.cut_epoch < *epoch,
            // A disk that has no position is not in the cut: it waits with all that it has.
            Self::Closed(_, positions) => positions.get(disk).is_some_and(|at| record.seq <= *at),
        }
    }

    const fn asked_epoch(&self) -> Option<u32> {
        match self {
            Self::Asked(epoch) => Some(*epoch),
            _ => None,
        }
    }

    const fn closed_epoch(&self) -> Option<u32> {
        match self {
            Self::Closed(epoch, _) => Some(*epoch),
            _ => None,
        }
    }
}

/// Records that had to wait for a cut to be settled.
#[derive(Debug, Default)]
struct Held {
    /// First batch that holds any.
    batch: Option<u64>,
    /// Per disk the first of them: all later records of the disk wait too.
    firsts: HashMap<Uuid, u64>,
}

/// Decides record by record.
#[derive(Debug, Default)]
pub struct Keeper {
    gate: Gate,
    /// What had to wait at this gate.
    held: Held,
    /// The cut of this epoch can never be whole: a record that it ends with does not exist.
    impossible: Option<u32>,
}

impl Keeper {
    /// Looks at what may be fed now: the first cut that is closed and not committed, and the epoch of
    /// one that is asked for. If that has changed, what had to wait is to be read again, from the batch
    /// that is returned, unless all of it has to wait still.
    pub fn look(&mut self, closed: Option<&ClosedCut>, asked: Option<u32>) -> Option<u64> {
        let gate = match (closed, asked) {
            (Some(cut), _) if self.gate.closed_epoch() == Some(cut.epoch) => return None,
            (Some(cut), _) => Gate::Closed(cut.epoch, cut.positions.clone()),
            (None, Some(epoch)) => Gate::Asked(epoch),
            (None, None) => Gate::Open,
        };
        if gate == self.gate {
            return None;
        }
        let before = std::mem::replace(&mut self.gate, gate);
        let waits_on = match &self.gate {
            // The usual way of a cut: then what waited lies beyond its positions.
            Gate::Closed(epoch, positions) if before.asked_epoch() == Some(*epoch) => {
                let beyond = |(disk, first): (&Uuid, &u64)| {
                    positions.get(disk).is_none_or(|position| first > position)
                };
                self.held.firsts.iter().all(beyond)
            }
            _ => false,
        };
        if waits_on {
            return None;
        }
        let batch = std::mem::take(&mut self.held).batch;
        batch.filter(|_| holds(Guard::UploadRewinds))
    }

    /// Whether a record of this batch may be fed; if not it waits, and all of its disk that follow.
    /// `fed_seq`: the last record of the disk that was fed.
    pub fn lets_pass(
        &mut self,
        batch: u64,
        disk: Uuid,
        record: &RecordHeader,
        fed_seq: impl Fn() -> u64,
    ) -> bool {
        let waits = self.held.firsts.contains_key(&disk);
        if self.gate.passes(&disk, record) && !waits {
            return true;
        }
        self.held.batch.get_or_insert(batch);
        if waits {
            return false;
        }
        self.held.firsts.insert(disk, record.seq);
        if let Gate::Closed(epoch, positions) = &self.gate {
            // Records of a disk lie in the log in order: those up to the position were met before.
            let position = positions.get(&disk).copied().unwrap_or(0);
            if fed_seq() < position {
                self.impossible = Some(*epoch);
            }
        }
        false
    }

    /// Whether the cut of this epoch can never be whole.
    pub fn is_impossible(&self, epoch: u32) -> bool {
        self.impossible == Some(epoch)
    }

    /// The first closed cut is committed, or void.
    pub const fn settled(&mut self) {
        self.impossible = None;
    }
}
