//! What an earlier opening has left of a disk on this host: its lane.
//!
//! Invariant: looking changes nothing. A lane that is not gone on with is taken away, or made to say that it is
//! not the disk's any more, before the disk passes an I/O.

use crate::host::DiskInfo;
use crate::open::OpenError;
use filter_core::lane::attach::Sidecar as SidecarFound;
use filter_core::lane::attach::{Found, LaneFile, OldProducer, WasDoing};
use filter_core::lane::layout::LaneState;
use filter_core::lane::opening::{self, knows_later};
use filter_core::lane::sync::Ordering;
use filter_core::lane::walk::{Scan, scan};
use filter_core::mapping::{MappedLane, RunFolder};
use filter_core::sidecar::Sidecar;
use std::path::Path;

/// What is found.
pub struct Looked {
    /// For the decision table.
    pub found: Found,
    /// The lane, if it can be gone on with.
    pub lane: Option<(MappedLane, Scan)>,
    /// As the lane has it.
    pub capacity_bytes: u64,
    /// What the lane's last producer told of its region map's generation.
    pub told_generation: Option<u64>,
}

impl Looked {
    const fn nothing(found: Found) -> Self {
        Self {
            found,
            lane: None,
            capacity_bytes: 0,
            told_generation: None,
        }
    }
}

/// What is found at attach, the lock already held. `found_generation`: of the region map, if the
/// sidecar can be trusted.
pub fn look(
    run: &RunFolder,
    sidecar: &Sidecar,
    found_generation: Option<u64>,
    boot_id: &[u8; 16],
    info: &DiskInfo,
    domain: &str,
) -> Looked {
    let trusted = found_generation.is_some();
    let mut found = Found {
        file: LaneFile::Absent,
        producer: OldProducer::Gone,
        sidecar: match trusted {
            true => SidecarFound::OtherEpoch,
            false => SidecarFound::Doubtful,
        },
        was: WasDoing::Nothing,
        restart_asked: false,
    };
    let path = run.lane_path(&sidecar.disk_id);
    if !path.exists() {
        return Looked::nothing(found);
    }
    let Ok(lane) = MappedLane::open(&path) else {
        found.file = LaneFile::Unusable;
        return Looked::nothing(found);
    };
    let identity = lane.identity();
    let memory = lane.memory();
    let words = memory.producer();
    let foreign = identity.boot_id != *boot_id
        || identity.disk_id != sidecar.disk_id
        || identity.vm_id != info.vm_uuid
        || identity.domain != domain
        || lane.memory().geometry().max_capacity_bytes() < info.capacity_bytes;
    let scanned = scan(memory);
    let state = LaneState::from_word(words.state.load(Ordering::Relaxed)); // the writer is gone
    found.file = match (&scanned, foreign, state) {
        (_, true, _) => LaneFile::Foreign,
        (Err(_), ..) | (_, _, None) => LaneFile::Unusable,
        _ => LaneFile::Good,
    };
    let lane_epoch = words.attach_epoch.load(Ordering::Relaxed); // as above
    if trusted && sidecar.matches_lane(lane_epoch, boot_id) {
        found.sidecar = SidecarFound::Matches;
    }
    // Closed in order here, and the sidecar does not know of it: it is from before.
    if state == Some(LaneState::Closed) && lane_epoch == sidecar.attach_epoch && !sidecar.closed {
        found.sidecar = SidecarFound::Doubtful;
    }
    let left = opening::left(memory, lane_epoch);
    if found.sidecar == SidecarFound::Matches && knows_later(left, found_generation) {
        found.sidecar = SidecarFound::Doubtful;
    }
    found.was = match state {
        Some(LaneState::Closed) => WasDoing::Closed,
        Some(LaneState::Streaming | LaneState::Syncing) => WasDoing::Publishing,
        Some(LaneState::Tracking) => WasDoing::Tracking,
        Some(LaneState::Fresh) | None => WasDoing::Nothing,
    };
    let asked = memory.consumer().restart_request.load(Ordering::Acquire); // pairs with the consumer's Release
    found.restart_asked = asked != words.restart_done.load(Ordering::Relaxed); // the writer is gone
    let capacity_bytes = words.capacity_bytes.load(Ordering::Relaxed); // as above
    Looked {
        found,
        lane: scanned.ok().map(|scan| (lane, scan)),
        capacity_bytes,
        told_generation: left.map(|(told, _)| told),
    }
}

/// Takes the old lane away before the sidecar knows of the opening: a process that dies before it has made
/// the new one must not leave a lane that seems to be of its opening, and knows nothing of why it is not.
pub fn remove_lane(run: &RunFolder, disk_id: &[u8; 16]) -> Result<(), OpenError> {
    let path = run.lane_path(disk_id);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(OpenError::OldLane(path, error))
        }
        _ => Ok(()),
    }
}

/// What an earlier opening has left on this host must not go on to say that the disk was closed in order:
/// then cuts would hold the disk as it was. A lane that cannot be reached says nothing to the daemon either.
pub fn disown_lane(info: &DiskInfo, disk_id: &[u8; 16]) {
    let Ok(run) = RunFolder::open(Path::new(&info.run_dir)) else {
        return;
    };
    if matches!(run.lock_disk(disk_id), Ok(None)) {
        return; // its owner says how it stands
    }
    if let Ok(lane) = MappedLane::open(&run.lane_path(disk_id)) {
        let memory = lane.memory();
        let state = &memory.producer().state;
        state.store(LaneState::Tracking as u32, Ordering::Release); // nothing is published with it
    }
}
