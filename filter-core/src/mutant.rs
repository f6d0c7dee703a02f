//! The guards of the product, by name, so that the simulator can show that each one is needed.
//!
//! Invariant: in a product every guard holds: [`holds`] is constant, and nothing can change that. Only in
//! a build with the feature `mutants`, which the simulator asks for and nothing else, can one be taken out,
//! for the whole process.

/// A guard: a check or an order of steps without which something would be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Guard {
    /// A write that is not published is marked before it is passed down.
    FirstMark = 1,
    /// It is marked again at its completion.
    SecondMark,
    /// A sync reads nothing that a write in flight overlaps.
    InFlightCheck,
    /// What a write touched since the sync's read began is not published.
    TouchCheck,
    /// A block's mark is cleared only after its content was published.
    ClearAfterPublish,
    /// What was in flight when a producer died is marked when the disk is opened again.
    Leftovers,
    /// A write is held for at most the budget; then the disk tracks.
    DeferBudget,
    /// A sync ends only when no unpublished write is in flight.
    SyncEndWaits,
    /// A failed write's range is marked.
    FailedWriteMark,
    /// A revert voids the sync's reads under way.
    RevertTouches,
    /// Growing voids the sync's read of the last block.
    GrowTouches,
    /// After a restart nothing is published before the stream's new beginning.
    BaseFirst,
    /// A restarted stream begins above every seq that the appliance holds.
    BaseAboveAll,
    /// A new lane begins above every seq of the lanes before it.
    FloorRaised,
    /// A lane from before another attach is not adopted.
    LaneOfThisAttach,
    /// After a reconnect everything that is not durable is sent again.
    RewindOnClose,
    /// Space in the lane is freed only up to what the appliance holds durably.
    ReleaseDurable,
    /// A cut is void when a disk tracked or synced while it was taken.
    CutVoidWhileSyncing,
    /// The appliance drops what it has.
    DuplicateDrop,
    /// The appliance refuses a record that does not follow.
    GapCheck,
    /// The appliance refuses records of an older epoch.
    FenceAtAdmit,
    /// The appliance refuses a lane of an older epoch.
    FenceAtOpen,
    /// Records that come over a channel that was superseded are not taken.
    SupersededChannel,
    /// An acknowledgement goes out only after the log's write is durable.
    AckAfterDurable,
    /// A torn end of the log is cut off at a restart.
    TornEnd,
    /// A cut closes only when every disk is durable up to its position.
    CutWaitsForDurable,
    /// A cut closes only where no disk is within a sync.
    ConsistentAt,
    /// Records of the next cut wait until the one before is settled.
    UploadHolds,
    /// The upload goes back to the records that had to wait.
    UploadRewinds,
    /// A cut counts as committed only when the store has its last object.
    CommitAwaited,
    /// A segment of the log goes only when all of its records are in the store.
    ReleaseUploaded,
    /// A region's bit is durable in the sidecar before the first write to it passes.
    IntentFirst,
    /// A region's bit is cleared only when what was published of it is durable downstream.
    IntentClearDurable,
    /// A region's bit is not cleared while anything in it is marked or in flight.
    IntentClearBusy,
    /// A region's bit is cleared only after the disk below was flushed.
    IntentClearFlush,
    /// A disk that was opened without its filter is synced in full.
    FullWhenChanged,
    /// A stream that begins anew is taken only where what it relies on is held.
    BaseStands,
    /// A disk that was rolled back with its sidecar goes on above the epoch that the appliance knows.
    RisesWhenRolledBack,
    /// A cut is void while nobody reports a disk that was not closed in order.
    LostDiskVoids,
    /// A cut is void while a disk that nobody has open may have been opened on a host that cannot be asked.
    AbsentHostVoids,
    /// Completions are held while a cut over several hosts is taken.
    HoldCompletions,
    /// A cut is void if a host's hold was over before every host had raised its epoch.
    HoldOverVoids,
    /// A lane that is not gone on with is removed before the sidecar knows of the new opening.
    OldLaneGone,
    /// A block of the region map with a copy that is not whole counts with all its bits.
    MapCopyDoubted,
    /// Under `ack = log` a completion is held until the appliance's log has the write.
    AckHeld,
    /// A completion is held for at most the budget.
    AckBudget,
    /// No hash counts once the disk has got a change that the replica does not get.
    HashesForgotten,
    /// A block that a record has touched since the newest cut has no hash.
    HashesTouched,
    /// That is looked at again after the block was read.
    HashesLookedAtAgain,
    /// A question about blocks is sent only behind all that was published before it.
    HashesBehind,
    /// A disk of which the store holds more than the log comes again, above what the store holds.
    StoreAhead,
    /// A disk that was rolled back is found out by the generation of its region map.
    RollBackNoticed,
    /// The generation in which a bit was set is told before the records that rely on it.
    GenerationFirst,
    /// No mark is taken between a revert's announcement and its end.
    ChangePausesSync,
    /// A revert waits until the sidecar names the whole disk.
    ChangeIntended,
    /// A disk that was rolled back goes on above every seq of the openings that were forgotten.
    FloorRisen,
    /// A cut is void if a disk's stream began anew before it had come to its position.
    CutOfOneStream,
    /// A record of a newer opening is never taken for one that the appliance has.
    DuplicateOfItsEpoch,
    /// Under `ack = log` nothing counts as in the log that a stream gave up when it began anew.
    AckOfOneStream,
}

/// All guards, each with what it does.
pub const ALL: &[(Guard, &str)] = &[
    (
        Guard::FirstMark,
        "A write that is not published is marked before it is passed down.",
    ),
    (Guard::SecondMark, "It is marked again at its completion."),
    (
        Guard::InFlightCheck,
        "A sync reads nothing that a write in flight overlaps.",
    ),
    (
        Guard::TouchCheck,
        "What a write touched since the sync's read began is not published.",
    ),
    (
        Guard::ClearAfterPublish,
        "A block's mark is cleared only after its content was published.",
    ),
    (
        Guard::Leftovers,
        "What was in flight when a producer died is marked when the disk is opened again.",
    ),
    (
        Guard::DeferBudget,
        "A write is held for at most the budget; then the disk tracks.",
    ),
    (
        Guard::SyncEndWaits,
        "A sync ends only when no unpublished write is in flight.",
    ),
    (Guard::FailedWriteMark, "A failed write's range is marked."),
    (
        Guard::RevertTouches,
        "A revert voids the sync's reads under way.",
    ),
    (
        Guard::GrowTouches,
        "Growing voids the sync's read of the last block.",
    ),
    (
        Guard::BaseFirst,
        "After a restart nothing is published before the stream's new beginning.",
    ),
    (
        Guard::BaseAboveAll,
        "A restarted stream begins above every seq that the appliance holds.",
    ),
    (
        Guard::FloorRaised,
        "A new lane begins above every seq of the lanes before it.",
    ),
    (
        Guard::LaneOfThisAttach,
        "A lane from before another attach is not adopted.",
    ),
    (
        Guard::RewindOnClose,
        "After a reconnect everything that is not durable is sent again.",
    ),
    (
        Guard::ReleaseDurable,
        "Space in the lane is freed only up to what the appliance holds durably.",
    ),
    (
        Guard::CutVoidWhileSyncing,
        "A cut is void when a disk tracked or synced while it was taken.",
    ),
    (Guard::DuplicateDrop, "The appliance drops what it has."),
    (
        Guard::GapCheck,
        "The appliance refuses a record that does not follow.",
    ),
    (
        Guard::FenceAtAdmit,
        "The appliance refuses records of an older epoch.",
    ),
    (
        Guard::FenceAtOpen,
        "The appliance refuses a lane of an older epoch.",
    ),
    (
        Guard::SupersededChannel,
        "Records that come over a channel that was superseded are not taken.",
    ),
    (
        Guard::AckAfterDurable,
        "An acknowledgement goes out only after the log's write is durable.",
    ),
    (
        Guard::TornEnd,
        "A torn end of the log is cut off at a restart.",
    ),
    (
        Guard::CutWaitsForDurable,
        "A cut closes only when every disk is durable up to its position.",
    ),
    (
        Guard::ConsistentAt,
        "A cut closes only where no disk is within a sync.",
    ),
    (
        Guard::UploadHolds,
        "Records of the next cut wait until the one before is settled.",
    ),
    (
        Guard::UploadRewinds,
        "The upload goes back to the records that had to wait.",
    ),
    (
        Guard::CommitAwaited,
        "A cut counts as committed only when the store has its last object.",
    ),
    (
        Guard::ReleaseUploaded,
        "A segment of the log goes only when all of its records are in the store.",
    ),
    (
        Guard::IntentFirst,
        "A region's bit is durable in the sidecar before the first write to it passes.",
    ),
    (
        Guard::IntentClearDurable,
        "A region's bit is cleared only when what was published of it is durable downstream.",
    ),
    (
        Guard::IntentClearBusy,
        "A region's bit is not cleared while anything in it is marked or in flight.",
    ),
    (
        Guard::IntentClearFlush,
        "A region's bit is cleared only after the disk below was flushed.",
    ),
    (
        Guard::FullWhenChanged,
        "A disk that was opened without its filter is synced in full.",
    ),
    (
        Guard::BaseStands,
        "A stream that begins anew is taken only where what it relies on is held.",
    ),
    (
        Guard::RisesWhenRolledBack,
        "A disk that was rolled back with its sidecar goes on above the epoch that the appliance knows.",
    ),
    (
        Guard::LostDiskVoids,
        "A cut is void while nobody reports a disk that was not closed in order.",
    ),
    (
        Guard::AbsentHostVoids,
        "A cut is void while a disk that nobody has open may have been opened on a host that cannot be asked.",
    ),
    (
        Guard::HoldCompletions,
        "Completions are held while a cut over several hosts is taken.",
    ),
    (
        Guard::HoldOverVoids,
        "A cut is void if a host's hold was over before every host had raised its epoch.",
    ),
    (
        Guard::OldLaneGone,
        "A lane that is not gone on with is removed before the sidecar knows of the new opening.",
    ),
    (
        Guard::MapCopyDoubted,
        "A block of the region map with a copy that is not whole counts with all its bits.",
    ),
    (
        Guard::AckHeld,
        "Under `ack = log` a completion is held until the appliance's log has the write.",
    ),
    (
        Guard::AckBudget,
        "A completion is held for at most the budget.",
    ),
    (
        Guard::HashesForgotten,
        "No hash counts once the disk has got a change that the replica does not get.",
    ),
    (
        Guard::HashesTouched,
        "A block that a record has touched since the newest cut has no hash.",
    ),
    (
        Guard::HashesLookedAtAgain,
        "That is looked at again after the block was read.",
    ),
    (
        Guard::HashesBehind,
        "A question about blocks is sent only behind all that was published before it.",
    ),
    (
        Guard::StoreAhead,
        "A disk of which the store holds more than the log comes again, above what the store holds.",
    ),
    (
        Guard::RollBackNoticed,
        "A disk that was rolled back is found out by the generation of its region map.",
    ),
    (
        Guard::GenerationFirst,
        "The generation in which a bit was set is told before the records that rely on it.",
    ),
    (
        Guard::ChangePausesSync,
        "No mark is taken between a revert's announcement and its end.",
    ),
    (
        Guard::ChangeIntended,
        "A revert waits until the sidecar names the whole disk.",
    ),
    (
        Guard::FloorRisen,
        "A disk that was rolled back goes on above every seq of the openings that were forgotten.",
    ),
    (
        Guard::CutOfOneStream,
        "A cut is void if a disk's stream began anew before it had come to its position.",
    ),
    (
        Guard::DuplicateOfItsEpoch,
        "A record of a newer opening is never taken for one that the appliance has.",
    ),
    (
        Guard::AckOfOneStream,
        "Under `ack = log` nothing counts as in the log that a stream gave up when it began anew.",
    ),
];

/// Guards that stand behind others: taken out alone, what they hold off is held off by these. Each with what
/// it is taken out together with, and why it stays.
pub const BEHIND: &[(Guard, &[Guard], &str)] = &[
    (
        Guard::FirstMark,
        &[Guard::SecondMark],
        "while the write is in flight the in-flight table keeps its place from being read, and outlives its process; then it \
         is marked again",
    ),
    (
        Guard::SecondMark,
        &[Guard::FirstMark],
        "nothing reads the place of a write in flight, so the first mark still stands",
    ),
    (
        Guard::SyncEndWaits,
        &[Guard::FirstMark],
        "the first mark of the write in flight keeps the sync from ending",
    ),
];

/// Whether the guard is in place: always.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn holds(_guard: Guard) -> bool {
    true
}

#[cfg(feature = "mutants")]
mod out {
    use super::Guard;
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

    /// A bit for each guard that is out.
    static OUT: AtomicU64 = AtomicU64::new(0);

    const fn bit(guard: Guard) -> u64 {
        1 << guard as u32
    }

    /// Whether the guard is in place.
    pub fn holds(guard: Guard) -> bool {
        OUT.load(Relaxed) & bit(guard) == 0 // set before anything runs
    }

    /// Takes a guard out, for this process.
    pub fn take_out(guard: Guard) {
        OUT.fetch_or(bit(guard), Relaxed); // as above
    }

    /// Puts all guards back.
    pub fn put_back() {
        OUT.store(0, Relaxed); // nothing runs meanwhile
    }
}
#[cfg(feature = "mutants")]
pub use out::{holds, put_back, take_out};
