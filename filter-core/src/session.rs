//! What the two ends of a lane's stream decide: the sender's place after a (re)connect, and what the
//! receiver does with each record.
//!
//! Invariant: delivery is idempotent by (disk, epoch, seq): whatever is sent again, the receiver
//! appends each seq once, in order, and never one of an older epoch once it has seen a newer.

pub use crate::lineage::Attach;
use crate::lineage::Lineage;
use crate::mutant::{Guard, holds};
use crate::position::{Durable, Received};
use crate::record::{FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, FLAG_SYNC_END, RecordHeader};

/// Where a sender goes on after the appliance has answered OPEN_LANE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The lane holds what comes next: release up to here, then send from the record after it.
    After(Durable),
    /// The lane's next record begins the stream anew, and the appliance holds what it relies on: send
    /// from there.
    AtBase,
    /// The appliance does not hold what the lane has already freed or relies on (another log, a lost
    /// log), or holds more than the lane ever published: the stream must start anew, above this seq.
    Restart {
        /// The new stream's first seq must be greater than this.
        above_seq: u64,
    },
}

/// In the place of a full base's seq: nothing of a stream stands, it must begin anew above all that is
/// held.
pub const NOTHING_STANDS: u64 = u64::MAX;

/// Whether a receiver that holds `held` and whose last base that relied on nothing is `full_base_seq`
/// can take a base that relies on `relies_on`: it must hold everything up to there, and no full sync
/// may have begun above it, since that one may lack what the regions of this base do not cover.
fn base_stands(relies_on: u64, full_base_seq: u64, held: u64) -> bool {
    relies_on == 0 || (full_base_seq <= relies_on && relies_on <= held) || !holds(Guard::BaseStands)
}

/// Decides from what the lane knows (`lane_durable`, `last_published`, and what its next record relies
/// on if that is a base) and what the appliance answered.
pub fn resume(
    lane_durable: Durable,
    last_published: u64,
    next_base: Option<u64>,
    appliance_durable: u64,
    full_base_seq: u64,
) -> Resume {
    let restart = Resume::Restart {
        above_seq: appliance_durable.max(last_published),
    };
    if appliance_durable > last_published {
        return restart;
    }
    if full_base_seq == NOTHING_STANDS {
        let anew = next_base == Some(0) && lane_durable.seq() >= appliance_durable;
        return if anew { Resume::AtBase } else { restart };
    }
    match next_base {
        // The appliance has the base already: what is durable of it is skipped, the rest follows.
        Some(relies_on) if appliance_durable > lane_durable.seq() => {
            // If it is the lane's base that it has, and not a stream of somebody else.
            let ours = lane_durable.seq() + 1;
            let known = relies_on > 0 || full_base_seq == ours;
            if known && full_base_seq <= ours {
                Resume::After(Durable(appliance_durable))
            } else {
                restart
            }
        }
        Some(relies_on) if base_stands(relies_on, full_base_seq, appliance_durable) => {
            Resume::AtBase
        }
        None if appliance_durable >= lane_durable.seq() => {
            Resume::After(Durable(appliance_durable))
        }
        _ => restart,
    }
}

/// What the receiver does with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admit {
    /// It is the next one: append it.
    Append,
    /// It is there already: drop it. Normal after a reconnect: the sender starts from what it knows
    /// to be durable, which may be less than what was received.
    Duplicate,
}

/// Why the receiver refuses a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A record is missing before it.
    #[error("record {found} follows record {last}: {missing} missing", missing = found - last - 1)]
    Gap {
        /// Last seq received.
        last: u64,
        /// Seq that came.
        found: u64,
    },
    /// A newer attach epoch was seen: the host that sends this has lost the VM.
    #[error(
        "attach epoch {found} is fenced: another host, or an earlier state of the disk, was opened with epoch {current}"
    )]
    Fenced {
        /// Newest epoch seen.
        current: u32,
        /// Epoch of the record.
        found: u32,
    },
    /// The opening does not go on from the newest that was presented: disk and sidecar were rolled back.
    #[error(
        "the disk that was opened with attach epoch {found} does not go on from what was opened with epoch {current}: disk and sidecar were rolled back"
    )]
    RolledBack {
        /// Newest epoch seen.
        current: u32,
        /// Epoch of the opening.
        found: u32,
    },
    /// A record of a newer opening has a seq that another record has already.
    #[error(
        "record {seq} of attach epoch {found} has the number of one that is held: those up to {last}, of epoch {current}"
    )]
    SeqTwice {
        /// Its seq.
        seq: u64,
        /// Last seq received.
        last: u64,
        /// Newest epoch of a record.
        current: u32,
        /// Epoch of the record.
        found: u32,
    },
    /// The stream begins anew and relies on records that are not held here.
    #[error(
        "the stream that begins anew at record {seq} relies on record {relies_on}; held are those up to {last}, after a full sync that began at {full_base}"
    )]
    Base {
        /// Seq of the base.
        seq: u64,
        /// The seq that it relies on.
        relies_on: u64,
        /// Seq of the last base that relied on nothing.
        full_base: u64,
        /// Last seq received.
        last: u64,
    },
}

/// No lane was ever presented.
const NEVER: Attach = Attach {
    epoch: 0,
    id: 0,
    generation: 0,
};

impl Refusal {
    /// The epoch above which the disk may come again, if it is refused for its epoch or its lineage.
    pub fn fenced_by(&self) -> Option<u32> {
        match *self {
            Self::Fenced { current, .. } => Some(current),
            Self::RolledBack { current, found } => Some(current.max(found)),
            Self::Gap { .. } | Self::Base { .. } | Self::SeqTwice { .. } => None,
        }
    }
}

/// What an appliance knows of one disk's stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receiver {
    received: Received,
    attach_epoch: u32,
    syncing: bool,
    seen_base: bool,
    full_base_seq: u64,
    /// The newest opening that a host presented a lane of.
    presented: Attach,
}

impl Receiver {
    /// A disk never seen: nothing received. It counts as syncing, since its replica holds nothing.
    pub const fn new() -> Self {
        Self {
            received: Received::NONE,
            attach_epoch: 0,
            syncing: true,
            seen_base: false,
            full_base_seq: 0,
            presented: NEVER,
        }
    }

    /// A disk as a restarted appliance finds it in its log or its store.
    pub const fn restored(
        received: Received,
        attach_epoch: u32,
        syncing: bool,
        full_base_seq: u64,
    ) -> Self {
        Self {
            received,
            attach_epoch,
            syncing,
            seen_base: received.0 > 0,
            full_base_seq,
            presented: NEVER,
        }
    }

    /// The same, with the newest opening that is known to have been presented.
    pub const fn with_presented(mut self, presented: Attach) -> Self {
        self.presented = presented;
        self
    }

    /// Last seq received.
    pub const fn received(&self) -> Received {
        self.received
    }

    /// Newest attach epoch seen.
    pub const fn attach_epoch(&self) -> u32 {
        self.attach_epoch
    }

    /// Seq of the last base that relied on nothing; 0 before the first.
    pub const fn full_base_seq(&self) -> u64 {
        self.full_base_seq
    }

    /// Whether the stream is between SYNC_BEGIN and SYNC_END (or has not begun): no cut may close.
    pub const fn syncing(&self) -> bool {
        self.syncing
    }

    /// The newest epoch that is known of: presented, or of a record.
    pub fn newest_epoch(&self) -> u32 {
        self.attach_epoch.max(self.presented.epoch)
    }

    /// The newest opening that was presented, with the highest generation that was told of it.
    pub const fn presented(&self) -> Attach {
        self.presented
    }

    /// Whether a lane of this opening may be presented: not if a newer epoch was, or was received; nor
    /// if another opening had the same epoch, nor if it does not go on from the newest one.
    pub fn may_open(&self, attach: Attach, lineage: &Lineage) -> Result<(), Refusal> {
        let (current, found) = (self.newest_epoch(), attach.epoch);
        let known = self.presented;
        let other =
            known.epoch == found && known.id != attach.id && known.id != 0 && attach.id != 0;
        if (found < current || other) && holds(Guard::FenceAtOpen) {
            return Err(Refusal::Fenced { current, found });
        }
        if found > known.epoch && !lineage.goes_on_from(&known) {
            return Err(Refusal::RolledBack { current, found });
        }
        Ok(())
    }

    /// A host presents a lane of this opening: from now on none of an older epoch may be. Records are not
    /// fenced by that: an adopted lane still holds some of the epochs before its own, and they come
    /// first; for them the fence falls with the first record of the new epoch.
    pub fn open(&mut self, attach: Attach, lineage: &Lineage) -> Result<(), Refusal> {
        self.may_open(attach, lineage)?;
        self.presented = self.presented.advanced(&attach);
        Ok(())
    }

    /// The store holds records of this disk up to this seq, of this epoch. If nothing here is as new, a log
    /// was lost that knew of them: the stream must begin anew above them, with a newer epoch if its own
    /// is older. Returns whether that is so.
    pub fn found_in_store(&mut self, seq: u64, attach_epoch: u32) -> bool {
        let known = self.received.0 >= seq && self.newest_epoch() >= attach_epoch;
        if known || !holds(Guard::StoreAhead) {
            return false;
        }
        self.received = Received(self.received.0.max(seq));
        self.attach_epoch = self.attach_epoch.max(attach_epoch);
        self.full_base_seq = NOTHING_STANDS;
        (self.seen_base, self.syncing) = (false, true);
        true
    }

    /// Decides about one record and, if it is to be appended, takes it in.
    pub fn admit(&mut self, header: &RecordHeader) -> Result<Admit, Refusal> {
        if header.seq <= self.received.0 && holds(Guard::DuplicateDrop) {
            // One of a newer opening cannot have come before: its number was given twice.
            if header.attach_epoch > self.attach_epoch && holds(Guard::DuplicateOfItsEpoch) {
                return Err(Refusal::SeqTwice {
                    seq: header.seq,
                    last: self.received.0,
                    current: self.attach_epoch,
                    found: header.attach_epoch,
                });
            }
            return Ok(Admit::Duplicate);
        }
        if header.attach_epoch < self.attach_epoch && holds(Guard::FenceAtAdmit) {
            let (current, found) = (self.attach_epoch, header.attach_epoch);
            return Err(Refusal::Fenced { current, found });
        }
        let base = header.flags & FLAG_STREAM_BASE != 0;
        let follows = header.seq == self.received.0 + 1 && self.seen_base;
        if !follows && !base && holds(Guard::GapCheck) {
            return Err(Refusal::Gap {
                last: self.received.0,
                found: header.seq,
            });
        }
        if base {
            let (relies_on, full_base) = (header.offset_bytes, self.full_base_seq);
            if !base_stands(relies_on, full_base, self.received.0) {
                let (seq, last) = (header.seq, self.received.0);
                return Err(Refusal::Base {
                    seq,
                    relies_on,
                    full_base,
                    last,
                });
            }
            if relies_on == 0 {
                self.full_base_seq = header.seq;
            }
        }
        self.received = Received(header.seq);
        self.attach_epoch = header.attach_epoch;
        self.seen_base = true;
        if header.flags & FLAG_SYNC_BEGIN != 0 {
            self.syncing = true;
        }
        if header.flags & FLAG_SYNC_END != 0 {
            self.syncing = false;
        }
        Ok(Admit::Append)
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
