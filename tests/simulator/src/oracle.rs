//! What the guests were told, and whether a recovered cut agrees with it.
//!
//! Invariant: of each unit of each disk every content that it ever had is kept, with the moment in which
//! it was asked for and the moment from which the guest could rely on it.
//!
//! A cut is right if there is one moment T such that it holds every write that had completed before T and
//! none that was issued after it, over all disks: then with each write it holds all that had completed
//! before that one was issued. A recovered unit says which T are possible: from the issue of what it
//! holds to the completion of what came next. The intersection over all units must not be empty.

/// A moment: each thing that a guest sees happens in one of its own.
pub type Moment = u64;

/// Not yet.
const NEVER: Moment = Moment::MAX;

#[derive(Clone, Copy, Debug)]
struct Version {
    value: u64,
    issued: Moment,
    /// From here on the guest relies on it.
    done: Moment,
}

/// A disk's history.
#[derive(Debug, Default)]
struct Disk {
    units: Vec<Vec<Version>>,
}

/// All disks' histories.
#[derive(Debug, Default)]
pub struct Oracle {
    disks: Vec<Disk>,
    now: Moment,
}

/// A span of moments, both ends included.
type Span = (Moment, Moment);

impl Oracle {
    /// Adds a disk of zeros; returns its number.
    pub fn add(&mut self, units: usize) -> usize {
        self.disks.push(Disk::default());
        let disk = self.disks.len() - 1;
        self.grow(disk, units, 0);
        disk
    }

    /// A disk has grown: its new units hold this.
    pub fn grow(&mut self, disk: usize, units: usize, value: u64) {
        let now = if self.now == 0 { 0 } else { self.tick() };
        let version = |value, at| Version {
            value,
            issued: at,
            done: at,
        };
        // A cut of before may have been given the new length already: then the new part is zeros.
        let mut history = vec![version(0, 0)];
        if now > 0 {
            history.push(version(value, now));
        }
        if let Some(disk) = self.disks.get_mut(disk) {
            let all = disk.units.len() + units;
            disk.units.resize(all, history);
        }
    }

    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// The present moment.
    pub const fn now(&self) -> Moment {
        self.now
    }

    fn versions(&mut self, disk: usize, unit: usize) -> Option<&mut Vec<Version>> {
        self.disks.get_mut(disk)?.units.get_mut(unit)
    }

    /// A guest issues a write; returns when.
    pub fn issue(&mut self, disk: usize, units: std::ops::Range<usize>, value: u64) -> Moment {
        let issued = self.tick();
        for unit in units {
            if let Some(versions) = self.versions(disk, unit) {
                let done = NEVER;
                versions.push(Version {
                    value,
                    issued,
                    done,
                });
            }
        }
        issued
    }

    /// The guest was told that the write of that moment is done.
    pub fn complete(&mut self, disk: usize, units: std::ops::Range<usize>, issued: Moment) {
        let now = self.tick();
        for unit in units {
            let versions = self.versions(disk, unit);
            let found = versions.and_then(|v| v.iter_mut().rev().find(|v| v.issued == issued));
            if let Some(version) = found {
                version.done = now;
            }
        }
    }

    /// The content is what the disk says, whatever was written: the guest will see it from now on.
    /// `since`: when it may have become so.
    pub fn settle(
        &mut self,
        disk: usize,
        units: std::ops::Range<usize>,
        content: &[u64],
        since: Moment,
    ) {
        let done = self.tick();
        for unit in units {
            let Some(value) = content.get(unit).copied() else {
                continue;
            };
            let Some(versions) = self.versions(disk, unit) else {
                continue;
            };
            let last = versions.last();
            if last.is_none_or(|last| last.value != value || last.done == NEVER) {
                let issued = last.map_or(since, |last| last.issued.max(since));
                versions.push(Version {
                    value,
                    issued,
                    done,
                });
            }
        }
    }

    /// Checks a recovered cut: per disk its units. `after`: the cut was asked for then, so T is not earlier.
    pub fn check(&self, cut: &[(usize, Vec<u64>)], after: Moment) -> Result<(), String> {
        let mut possible: Vec<Span> = vec![(after, self.now)];
        for (disk, content) in cut {
            let history = self.disks.get(*disk).ok_or("a disk that nobody knows")?;
            for (unit, value) in content.iter().enumerate() {
                let Some(versions) = history.units.get(unit) else {
                    continue; // beyond what the oracle knows: grown and not yet told
                };
                // Most units: what is there was there when the cut was asked for, and nothing came since.
                let last = versions.last();
                if last.is_some_and(|last| last.value == *value && last.done <= after) {
                    continue;
                }
                let allowed = spans(versions, *value, after);
                if allowed.is_empty() && spans(versions, *value, 0).is_empty() {
                    return Err(format!(
                        "disk {disk}, unit {unit} holds {value}, which was never written there"
                    ));
                }
                let left = meet(&possible, &allowed);
                if left.is_empty() {
                    let allowed = spans(versions, *value, 0);
                    let last = versions.iter().rev().take(4).collect::<Vec<_>>();
                    return Err(format!(
                        "disk {disk}, unit {unit} holds {value}, right at {allowed:?}; \
                         the rest of the cut is right at {possible:?}; newest: {last:?}"
                    ));
                }
                possible = left;
            }
        }
        Ok(())
    }
}

/// The moments in which a unit with this history may be seen to hold `value`; those that end before
/// `after` are left out.
fn spans(versions: &[Version], value: u64, after: Moment) -> Vec<Span> {
    let mut found = Vec::new();
    let mut until = NEVER;
    for version in versions.iter().rev() {
        if version.value == value && version.issued <= until {
            found.push((version.issued, until));
        }
        until = until.min(version.done);
        if until < after {
            break;
        }
    }
    found.sort_unstable();
    // Those that touch become one: else the lists would grow with each intersection.
    let mut apart: Vec<Span> = Vec::new();
    for (from, to) in found {
        match apart.last_mut() {
            Some(last) if from <= last.1.saturating_add(1) => last.1 = last.1.max(to),
            _ => apart.push((from, to)),
        }
    }
    apart
}

fn meet(a: &[Span], b: &[Span]) -> Vec<Span> {
    let mut out = Vec::new();
    for (a0, a1) in a {
        for (b0, b1) in b {
            let (from, to) = ((*a0).max(*b0), (*a1).min(*b1));
            if from <= to {
                out.push((from, to));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_that_lacks_what_was_done_before_what_it_holds_is_found() {
        let mut oracle = Oracle::default();
        let (a, b) = (oracle.add(1), oracle.add(1));
        let first = oracle.issue(a, 0..1, 7);
        oracle.complete(a, 0..1, first);
        let second = oracle.issue(b, 0..1, 8);
        let cut = |x, y| vec![(a, vec![x]), (b, vec![y])];
        for good in [cut(0, 0), cut(7, 0), cut(7, 8)] {
            assert_eq!(oracle.check(&good, 0), Ok(()), "{good:?}");
        }
        assert!(oracle.check(&cut(0, 8), 0).is_err());
        assert!(oracle.check(&cut(9, 0), 0).is_err());
        assert!(oracle.check(&cut(0, 0), second).is_err(), "too old");
        oracle.complete(b, 0..1, second);
        let later = oracle.now();
        assert!(oracle.check(&cut(7, 0), later + 1).is_err());
    }

    #[test]
    fn what_a_crash_undid_is_right_before_and_wrong_after_it() {
        let mut oracle = Oracle::default();
        let a = oracle.add(1);
        let first = oracle.issue(a, 0..1, 7);
        let crash = oracle.now();
        oracle.settle(a, 0..1, &[0], crash);
        let next = oracle.issue(a, 0..1, 9);
        oracle.complete(a, 0..1, next);
        assert_eq!(oracle.check(&[(a, vec![7])], first), Ok(()));
        assert!(oracle.check(&[(a, vec![7])], next).is_err());
        assert_eq!(oracle.check(&[(a, vec![9])], next), Ok(()));
    }
}
