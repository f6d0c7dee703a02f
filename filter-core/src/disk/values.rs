//! What a disk is asked and what it answers, as plain values.
//!
//! Invariant: nothing in here has a state: all of it may be copied, and dropped.

use super::pace::PaceConfig;
use crate::lane::inflight::Token;
use crate::lane::layout::DIRTY_BLOCK_BYTES;
use crate::lane::producer::Source;
use crate::record::RecordKind;

/// Choices of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How long a write may be deferred for want of room, in ns.
    pub defer_budget_ns: u64,
    /// Bytes that a sync reads at once: a multiple of the dirty block.
    pub sync_read_bytes: u64,
    /// Reads of a sync in flight at once.
    pub sync_reads: usize,
    /// A change waits for its regions' bits however long the sidecar takes. Otherwise it passes when
    /// the budget ends, and a crash of the host before the sidecar has taken the bits loses sight of it.
    pub intent_strict: bool,
    /// A sync after a crash, or on another host, asks what the replica holds already.
    pub sync_hashes: bool,
    /// How a sync yields to the guest.
    pub pace: PaceConfig,
    /// The model checker takes guards out.
    #[cfg(loom)]
    pub guards: super::guard::Guards,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            defer_budget_ns: 5_000_000,
            sync_read_bytes: 4 * DIRTY_BLOCK_BYTES,
            sync_reads: 2,
            intent_strict: false,
            sync_hashes: true,
            pace: PaceConfig::default(),
            #[cfg(loom)]
            guards: super::guard::Guards::ALL,
        }
    }
}

/// A guest's I/O that changes the disk.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// WRITE, ZERO or UNMAP.
    pub kind: RecordKind,
    /// Start, in bytes.
    pub offset_bytes: u64,
    /// Length, in bytes.
    pub len_bytes: u64,
    /// The data of a WRITE, in order.
    pub sources: &'a [Source<'a>],
}

/// What happens to a change now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Pass it down; give `token` back at its completion. `wake`: the daemon sleeps.
    Pass {
        /// To be given back to [`super::Disk::done`].
        token: Token,
        /// Wake the daemon.
        wake: bool,
    },
    /// Hold it and ask again with [`super::Disk::retry`]: those that wait for room in the order of arrival.
    Defer(Why),
}

/// What a deferred change waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Room in the lane.
    Room,
    /// The sidecar: see [`super::Disk::intent_step`].
    Intent,
    /// Another change of the same place, which is in flight.
    Overlap,
}

/// What a completion leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completed {
    /// Wake the daemon.
    pub wake: bool,
    /// A sync has become necessary, or may go on: call [`super::Disk::sync_step`] soon.
    pub sync: bool,
    /// The last record that the write was published in; `None`: it was not.
    pub seq: Option<u64>,
}

/// How a disk starts, from the attach decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new stream: everything is to be synced.
    Full,
    /// A new stream that relies on what is durable downstream: the regions whose bit is set are to be
    /// synced.
    Regions,
    /// Go on; what is marked, and what was in flight, is to be synced.
    Marked,
    /// Go on; nothing is to be synced.
    Clean,
}

/// Counters since the attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Writes that were deferred.
    pub deferred: u64,
    /// The longest deferral, in ns.
    pub deferred_max_ns: u64,
    /// Times that tracking began.
    pub tracking: u64,
    /// Changes that passed before the sidecar had their regions' bits.
    pub intent_late: u64,
    /// Writes that the disk failed.
    pub failed_writes: u64,
    /// Bytes published by syncs.
    pub sync_bytes: u64,
    /// Bytes that syncs read and the replica held already.
    pub sync_held_bytes: u64,
    /// Sync reads thrown away because a write touched the block meanwhile.
    pub sync_touched: u64,
    /// Sync reads that the disk failed.
    pub sync_read_errors: u64,
}
