//! What is found at attach, and the one table that says what follows from it.
//!
//! Invariant: every combination of what can be found meets exactly one row of [`TABLE`] (a test
//! walks them all). A lane is adopted only when nothing in it contradicts the sidecar and nobody
//! else is attached. Without it the sidecar's region map says what may differ from the replica; if the
//! sidecar itself is in doubt, the disk is synced in full.

/// The lane's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LaneFile {
    /// There is none.
    Absent,
    /// It cannot be read as a lane, or its records do not check.
    Unusable,
    /// It is from another boot of the host, or of another disk: nothing in it can be trusted.
    Foreign,
    /// Identity and records check.
    Good,
}

/// The process that last attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OldProducer {
    /// It still holds the lane's lock.
    Alive,
    /// Nobody holds it.
    Gone,
}

/// The sidecar, beside the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sidecar {
    /// It says nothing that can be relied on: the disk was never synced, the sidecar is damaged or a
    /// copy, replication stopped after a defect, or the disk was changed without the filter.
    Doubtful,
    /// It can be relied on, but the lane is not of its last attach: the disk was open elsewhere since.
    OtherEpoch,
    /// It belongs to the lane.
    Matches,
}

/// What the lane's last producer was doing, by the lane's state word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WasDoing {
    /// It closed the disk in order, the dirty map empty.
    Closed,
    /// It published every write (the dirty map may hold what a sync had not reached).
    Publishing,
    /// It only marked writes.
    Tracking,
    /// It never began.
    Nothing,
}

/// Everything that the decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Found {
    /// The lane's file.
    pub file: LaneFile,
    /// The process that last attached.
    pub producer: OldProducer,
    /// The sidecar.
    pub sidecar: Sidecar,
    /// What was being done.
    pub was: WasDoing,
    /// The consumer asked for a restart that nobody answered.
    pub restart_asked: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Another process has the disk open: do not touch the lane.
    Refuse,
    /// Make a new lane, with a new seq base; sync the disk in full.
    Full,
    /// Make a new lane, with a new seq base; sync the regions whose bit is set in the sidecar.
    Regions,
    /// Go on in the lane; the consumer lost its place: start the stream anew and sync in full.
    Restart,
    /// Go on in the lane; sync what is marked and what was in flight.
    AdoptMarked,
    /// Go on in the lane; nothing is to be synced.
    AdoptClean,
}

/// A row: a description, what it applies to, what follows.
pub struct Row {
    /// For people.
    pub when: &'static str,
    matches: fn(&Found) -> bool,
    /// What follows.
    pub action: Action,
}

fn usable(f: &Found) -> bool {
    f.producer == OldProducer::Gone && f.file == LaneFile::Good && f.sidecar == Sidecar::Matches
}

fn trusted(f: &Found) -> bool {
    f.producer == OldProducer::Gone && f.sidecar != Sidecar::Doubtful
}

/// The rows; exactly one matches.
pub static TABLE: [Row; 9] = [
    Row {
        when: "another process is attached",
        matches: |f| f.producer == OldProducer::Alive,
        action: Action::Refuse,
    },
    Row {
        when: "the sidecar is in doubt: the disk is synced in full",
        matches: |f| f.producer == OldProducer::Gone && f.sidecar == Sidecar::Doubtful,
        action: Action::Full,
    },
    Row {
        when: "no lane of this boot: the regions that the sidecar names are synced",
        matches: |f| trusted(f) && matches!(f.file, LaneFile::Absent | LaneFile::Foreign),
        action: Action::Regions,
    },
    Row {
        when: "the lane does not check: the regions that the sidecar names are synced",
        matches: |f| trusted(f) && f.file == LaneFile::Unusable,
        action: Action::Regions,
    },
    Row {
        when: "the disk was open elsewhere since: the regions that the sidecar names are synced",
        matches: |f| trusted(f) && f.file == LaneFile::Good && f.sidecar == Sidecar::OtherEpoch,
        action: Action::Regions,
    },
    Row {
        when: "a good lane whose consumer lost its place",
        matches: |f| usable(f) && f.restart_asked,
        action: Action::Restart,
    },
    Row {
        when: "a good lane that nobody used yet",
        matches: |f| usable(f) && !f.restart_asked && f.was == WasDoing::Nothing,
        action: Action::Regions,
    },
    Row {
        when: "a good lane of a producer that died",
        matches: |f| {
            usable(f)
                && !f.restart_asked
                && matches!(f.was, WasDoing::Publishing | WasDoing::Tracking)
        },
        action: Action::AdoptMarked,
    },
    Row {
        when: "a good lane, closed in order",
        matches: |f| usable(f) && !f.restart_asked && f.was == WasDoing::Closed,
        action: Action::AdoptClean,
    },
];

/// The row for what was found.
pub fn decide(found: &Found) -> &'static Row {
    // The test below shows that a row always matches; the refusing one is the safe answer.
    TABLE
        .iter()
        .find(|row| (row.matches)(found))
        .unwrap_or(&TABLE[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_state() -> impl Iterator<Item = Found> {
        use {LaneFile::*, Sidecar as S, WasDoing::*};
        let files = [Absent, Unusable, Foreign, Good];
        let producers = [OldProducer::Alive, OldProducer::Gone];
        let sidecars = [S::Doubtful, S::OtherEpoch, S::Matches];
        let was = [Closed, Publishing, Tracking, Nothing];
        files.into_iter().flat_map(move |file| {
            producers.into_iter().flat_map(move |producer| {
                sidecars.into_iter().flat_map(move |sidecar| {
                    was.into_iter().flat_map(move |was| {
                        [false, true].map(|restart_asked| Found {
                            file,
                            producer,
                            sidecar,
                            was,
                            restart_asked,
                        })
                    })
                })
            })
        })
    }

    #[test]
    fn every_state_meets_exactly_one_row() {
        let mut count = 0;
        for found in every_state() {
            let rows: alloc::vec::Vec<_> = TABLE
                .iter()
                .filter(|row| (row.matches)(&found))
                .map(|row| row.when)
                .collect();
            assert_eq!(rows.len(), 1, "{found:?} meets {rows:?}");
            count += 1;
        }
        assert_eq!(count, 4 * 2 * 3 * 4 * 2);
    }

    #[test]
    fn every_row_is_met() {
        for row in &TABLE {
            assert!(
                every_state().any(|found| (row.matches)(&found)),
                "{} is dead",
                row.when
            );
        }
    }

    #[test]
    fn nothing_is_skipped_unless_it_was_closed_in_order() {
        for found in every_state() {
            if decide(&found).action == Action::AdoptClean {
                assert_eq!(found.was, WasDoing::Closed);
                assert_eq!(found.sidecar, Sidecar::Matches);
            }
        }
    }

    #[test]
    fn only_doubt_costs_a_full_sync() {
        for found in every_state() {
            let full = matches!(decide(&found).action, Action::Full | Action::Restart);
            let gone = found.producer == OldProducer::Gone;
            let doubt = found.sidecar == Sidecar::Doubtful;
            let asked = usable(&found) && found.restart_asked;
            assert_eq!(full, gone && (doubt || asked), "{found:?}");
        }
    }
}
