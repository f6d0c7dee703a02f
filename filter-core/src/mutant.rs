//! The guards of the product, by name, so that the simulator can show that each one is needed.
//!
//! Invariant: in a product every guard holds: [`holds`] is constant, and nothing can change that. Only
//! a build with `--cfg jetdr_mutants` can take one out, for the whole process.

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
    /// A restarted stream begins above every seq used so far.
    BaseAboveAll,
    /// A lane from before another attach is not adopted.
    LaneOfThisAttach,
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
    /// Space in the lane is freed only up to what the appliance holds durably.
    ReleaseDurable,
    /// A cut is void when a disk tracked or synced while it was taken.
    CutVoidWhileSyncing,
    /// A cut waits for whoever was stamping at the bump.
    StampingWait,
    /// A cut closes only when every disk is durable up to its position.
    CutWaitsForDurable,
    /// Records of the next cut wait until the one before is settled.
    UploadHolds,
    /// The upload goes back to the records that had to wait.
    UploadRewinds,
    /// A cut's commit is its last object.
    CommitLast,
    /// A part follows only when the one before it is in the store.
    PartsInOrder,
    /// A segment of the log goes only when all of its records are in the store.
    ReleaseUploaded,
    /// A cut is taken into the list of those that wait before the log has it.
    CutListedFirst,
    /// A region's bit is durable before the first write to it passes.
    IntentFirst,
    /// A region's bit is cleared only after everything in it is durable downstream.
    IntentClearDurable,
    /// A region's bit is cleared only after the disk was flushed.
    IntentClearFlush,
    /// A disk that changed behind the filter is synced in full.
    FullWhenChanged,
}

/// All guards.
pub const ALL: [Guard; 32] = {
    use Guard::*;
    [
        FirstMark,
        SecondMark,
        InFlightCheck,
        TouchCheck,
        ClearAfterPublish,
        Leftovers,
        DeferBudget,
        SyncEndWaits,
        FailedWriteMark,
        BaseAboveAll,
        LaneOfThisAttach,
        DuplicateDrop,
        GapCheck,
        FenceAtAdmit,
        FenceAtOpen,
        SupersededChannel,
        AckAfterDurable,
        TornEnd,
        ReleaseDurable,
        CutVoidWhileSyncing,
        StampingWait,
        CutWaitsForDurable,
        UploadHolds,
        UploadRewinds,
        CommitLast,
        PartsInOrder,
        ReleaseUploaded,
        CutListedFirst,
        IntentFirst,
        IntentClearDurable,
        IntentClearFlush,
        FullWhenChanged,
    ]
};

/// Whether the guard is in place: always.
#[cfg(not(jetdr_mutants))]
#[inline(always)]
pub const fn holds(_guard: Guard) -> bool {
    true
}

#[cfg(jetdr_mutants)]
mod out {
    use super::Guard;
    use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

    static OUT: AtomicU32 = AtomicU32::new(0);

    /// Whether the guard is in place.
    pub fn holds(guard: Guard) -> bool {
        OUT.load(Relaxed) != guard as u32 // set before anything runs
    }

    /// Takes a guard out, for this process.
    pub fn take_out(guard: Option<Guard>) {
        OUT.store(guard.map_or(0, |guard| guard as u32), Relaxed); // as above
    }
}
#[cfg(jetdr_mutants)]
pub use out::{holds, take_out};
