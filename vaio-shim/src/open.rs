//! From a disk that is being opened to a lane that is attached.
//!
//! Invariant: the new attach epoch is durable in the sidecar before the lane is touched and before
//! any I/O; what is done with the lane is the one row of the core's decision table that matches. A
//! region map that is to have every bit set has them before the header says that the disk was opened.

use crate::beside::{self, Beside, Found as FoundBeside, region_blocks};
use crate::host::{DiskHandle, DiskInfo, Host, Level};
use crate::looked::{disown_lane, look, remove_lane};
use crate::properties::{self, Asked};
use crate::{abi, vm};
use filter_core::disk::ack::AckConfig;
use filter_core::disk::intent::Intent;
use filter_core::disk::{Disk, Start};
use filter_core::lane::attach::{self, Action};
use filter_core::lane::layout::{Geometry, Identity};
use filter_core::lane::opening::{self};
use filter_core::lane::producer::{Producer, Stamps};
use filter_core::lane::walk::Scan;
use filter_core::lineage::Attach;
use filter_core::mapping::{CutPage, Lock, MappedLane, MappingError, RunFolder};
use filter_core::sidecar::regions::map_generation;
use filter_core::sidecar::{Opening, Sidecar, SidecarError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Why a disk cannot be opened, or not be replicated.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk is not under this filter.
    #[error("the disk is not attached to this filter: its sidecar is missing")]
    NotAttached,
    /// The host could not do something with the sidecar.
    #[error("cannot {0} the sidecar: the host answered {1}")]
    SidecarIo(&'static str, i32),
    /// The sidecar cannot be used.
    #[error("sidecar: {0}")]
    Sidecar(#[from] SidecarError),
    /// A file of the run folder.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// Another process has the disk open.
    #[error("another process has the disk open for replication")]
    InUse,
    /// A property is missing or wrong.
    #[error("property `{0}`: {1}")]
    Property(&'static str, String),
    /// The lane cannot be made.
    #[error("lane: {0}")]
    Lane(#[from] filter_core::lane::layout::LaneError),
    /// A lane that is to be replaced cannot be removed.
    #[error("removing the old lane {0}: {1}")]
    OldLane(std::path::PathBuf, std::io::Error),
    /// The host gave no random bytes.
    #[error("the host gave no random bytes for the disk's id")]
    Random,
}

impl OpenError {
    /// The contract's code.
    pub fn code(&self) -> i32 {
        match self {
            Self::NotAttached => abi::JIO_E_NOT_FOUND,
            Self::InUse => abi::JIO_E_BUSY,
            Self::Property(..) => abi::JIO_E_INVALID,
            Self::SidecarIo(_, status) => *status,
            _ => abi::JIO_E_IO,
        }
    }
}

/// A disk that is attached to its lane.
pub struct Attached {
    /// The state machine.
    pub disk: Disk,
    /// Keeps the lane mapped.
    pub lane: MappedLane,
    /// Keeps other processes out.
    pub lock: Lock,
    /// The domain's cut epoch.
    pub cut: CutPage,
    /// The VM's stamps.
    pub stamps: Arc<vm::Stamps>,
    /// The sidecar.
    pub beside: Beside,
    /// How long a migration drains the lane.
    pub handoff_limit: Duration,
    /// The run folder.
    pub run: RunFolder,
    /// When a completion goes up.
    pub ack: AckConfig,
    /// How long one is held for a cut at most.
    pub cut_hold_ns: u64,
    /// What was found and done, for the log.
    pub story: &'static str,
}

/// The attach call: makes the sidecar.
pub fn protect(host: Host, handle: DiskHandle, info: &DiskInfo) -> Result<(), OpenError> {
    let id = info
        .disk_uuid
        .or_else(|| host.random_id())
        .ok_or(OpenError::Random)?;
    let shift = properties::region_shift(info)?;
    let first = Sidecar::new(id, region_blocks(info.capacity_bytes, shift));
    beside::create(host, handle, &first)
}

/// The detach call: deletes the sidecar, and the lane if nobody has it open.
pub fn unprotect(host: Host, handle: DiskHandle, info: &DiskInfo) -> Result<(), OpenError> {
    if let Ok(sidecar) = load(host, handle)
        && let Ok(run) = RunFolder::open(Path::new(&info.run_dir))
    {
        let Some(_lock) = run.lock_disk(&sidecar.disk_id)? else {
            return Err(OpenError::InUse);
        };
        let _ = std::fs::remove_file(run.lane_path(&sidecar.disk_id));
    }
    match beside::delete(host, handle) {
        status if status >= 0 || status == abi::JIO_E_NOT_FOUND => Ok(()),
        status => Err(OpenError::SidecarIo("delete", status)),
    }
}

/// Reads the sidecar's header.
pub fn load(host: Host, handle: DiskHandle) -> Result<Sidecar, OpenError> {
    let found = FoundBeside::open(host, handle)?;
    found.header.ok_or_else(|| SidecarError::Damaged.into())
}

/// Writes down that a disk is opened which cannot be replicated; durable on success.
pub fn give_up(host: Host, handle: DiskHandle, info: &DiskInfo) -> Result<(), OpenError> {
    let found = FoundBeside::open(host, handle)?;
    // One that cannot be read is in doubt already.
    let Some(header) = found.header else {
        return Ok(());
    };
    disown_lane(info, &header.disk_id);
    found.keep(header).save(header.failed())
}

/// Whose disk this is, and whether its sidecar can be relied on. A damaged one, or a copy of another
/// disk's, gets an identity of its own.
fn identity_of(
    host: Host,
    handle: DiskHandle,
    info: &DiskInfo,
    found: &FoundBeside,
) -> Result<(Sidecar, bool), OpenError> {
    let warn = |text: &str| host.event(handle, Level::Warn, 1, text);
    if let Some(header) = found.header {
        if info.disk_uuid.is_none_or(|uuid| uuid == header.disk_id) {
            let trusted = header.is_trusted(info.content_before);
            if !trusted && header.attach_epoch > 0 && !header.failed {
                warn("the disk was opened without its filter: it is synced in full");
            }
            return Ok((header, trusted));
        }
        warn("the sidecar is a copy of another disk's: this disk is synced in full");
    } else {
        warn("the sidecar is damaged, or an older program's: the disk is synced in full");
    }
    let id = info.disk_uuid.or_else(|| host.random_id());
    Ok((Sidecar::new(id.ok_or(OpenError::Random)?, 0), false))
}

/// Opens the lane of a disk by the decision table.
pub fn attach(host: Host, handle: DiskHandle, info: &DiskInfo) -> Result<Attached, OpenError> {
    let asked = Asked::of(info)?;
    let found = FoundBeside::open(host, handle)?;
    let (header, trusted) = identity_of(host, handle, info, &found)?;
    let run = RunFolder::open(Path::new(&info.run_dir))?;
    let boot_id = run.boot_id()?;
    let geometry = Geometry::for_disk(info.capacity_bytes, asked.ring_bytes)?;
    let cut = run.cut_page(asked.domain)?;

    let Some(lock) = run.lock_disk(&header.disk_id)? else {
        return Err(OpenError::InUse);
    };
    let map = found.map(info.capacity_bytes);
    let found_generation = map.as_deref().map_or(0, map_generation);
    let looked = look(
        &run,
        &header,
        (trusted && map.is_some()).then_some(found_generation),
        &boot_id,
        info,
        asked.domain,
    );
    let row = attach::decide(&looked.found);
    let (start, new_lane) = begin_as(row.action)?;
    let full = start == Start::Full;
    let (beside, intent) = open_map(
        host,
        handle,
        info,
        found,
        header,
        map,
        (full, asked.region_shift, asked.quiet_ns),
    )?;
    let mut beside = beside;
    // An adopted lane may have told of bits that the sidecar was to get, and lacks.
    let told = looked.told_generation.filter(|_| !new_lane);
    let opening = Opening {
        boot_id,
        content_id: info.content_id,
        attach_id: attach_id(host)?,
        new_lane,
        found_generation: (!full).then_some(found_generation.max(told.unwrap_or(0))),
    };
    let mut next = beside.header().attached(&opening)?;
    next.capacity_bytes = info.capacity_bytes;
    if new_lane {
        remove_lane(&run, &header.disk_id)?;
    }
    beside.save(next)?;

    let adopted = looked.lane.filter(|_| !new_lane);
    let (lane, scan) = match adopted {
        Some(adopted) => adopted,
        None => make_lane(&run, info, &header, geometry, boot_id, asked.domain)?,
    };
    let stamps = vm::stamps(&info.vm_uuid, host.now_wall_ns().max(scan.last_stamp));
    let told = Attach {
        epoch: next.attach_epoch,
        id: next.attach_id,
        generation: intent.generations().0,
    };
    opening::tell(lane.memory(), &told, &next.lineage);
    let mut producer = Producer::new(lane.memory(), next.attach_epoch, scan.tail, scan.next_seq);
    if row.action == Action::Restart {
        producer.restart();
    }
    let mut disk = Disk::new(
        producer,
        info.capacity_bytes,
        start,
        Some(intent),
        asked.config,
    );
    if new_lane {
        let stamps = Stamps {
            stamp: &stamps.0,
            cut_epoch: cut.epoch(),
            time_ns: host.now_wall_ns(),
        };
        // A ring that was just made has room for it.
        let _ = disk.begin_base(&stamps);
    }
    let seen_bytes = match new_lane {
        true => u64::MAX,
        false => looked.capacity_bytes,
    };
    take_up(&mut disk, host, handle, info, &header, (start, seen_bytes));
    let story = row.when;
    Ok(Attached {
        disk,
        lane,
        lock,
        cut,
        stamps,
        beside,
        handoff_limit: asked.handoff_limit,
        run,
        ack: asked.ack,
        cut_hold_ns: asked.cut_hold_ns,
        story,
    })
}

/// How the disk begins, and whether with a lane of its own.
const fn begin_as(action: Action) -> Result<(Start, bool), OpenError> {
    Ok(match action {
        Action::Refuse => return Err(OpenError::InUse),
        Action::Full => (Start::Full, true),
        Action::Regions => (Start::Regions, true),
        Action::Restart => (Start::Full, false),
        Action::AdoptMarked => (Start::Marked, false),
        Action::AdoptClean => (Start::Clean, false),
    })
}

/// What the opening before left beside the disk, and what became of the disk while it was closed.
/// `seen_bytes`: what of it the adopted lane has seen.
fn take_up(
    disk: &mut Disk,
    host: Host,
    handle: DiskHandle,
    info: &DiskInfo,
    header: &Sidecar,
    (start, seen_bytes): (Start, u64),
) {
    let left = beside::left(host, handle, header, info.capacity_bytes);
    if let Some(map) = left.filter(|_| start == Start::Regions) {
        disk.only_handed_over(&map);
    }
    beside::forget_left(host, handle);
    // Enlarged while it was closed: the new part was never seen.
    disk.grown_since(header.capacity_bytes.min(seen_bytes));
}

/// The region map of a disk that is being opened, with the bits that it must have in the sidecar.
fn open_map(
    host: Host,
    handle: DiskHandle,
    info: &DiskInfo,
    found: FoundBeside,
    header: Sidecar,
    map: Option<Vec<filter_core::sidecar::regions::RegionBlock>>,
    (full, shift, quiet_ns): (bool, u32, u64),
) -> Result<(Beside, Intent), OpenError> {
    let (beside, mut intent) = match map {
        Some(map) if !full => {
            let mut intent = Intent::load(header.disk_id, &map, quiet_ns)?;
            intent.want_beyond(header.capacity_bytes, info.capacity_bytes);
            (found.keep(header), intent)
        }
        map => {
            let blocks = region_blocks(info.capacity_bytes, shift);
            let map = map.unwrap_or_default();
            let intent = Intent::full(header.disk_id, shift, blocks, &map, quiet_ns);
            let mut header = header;
            header.region_blocks = blocks;
            (found.renew(host, handle, header)?, intent)
        }
    };
    beside.write_map(&mut intent)?;
    Ok((beside, intent))
}

fn attach_id(host: Host) -> Result<u64, OpenError> {
    let random = host.random_id().ok_or(OpenError::Random)?;
    let (id, _) = random.as_chunks::<8>();
    // Zero would be: not known.
    Ok(id.first().map_or(1, |id| u64::from_le_bytes(*id) | 1))
}

fn make_lane(
    run: &RunFolder,
    info: &DiskInfo,
    header: &Sidecar,
    geometry: Geometry,
    boot_id: [u8; 16],
    domain: &str,
) -> Result<(MappedLane, Scan), OpenError> {
    let base_seq = header.seq_floor + 1;
    let identity = Identity {
        geometry,
        disk_id: header.disk_id,
        vm_id: info.vm_uuid,
        boot_id,
        base_seq,
        domain: domain.into(),
        vm_name: or_unknown(&info.vm_name),
        disk_label: or_unknown(&info.label),
    };
    let lane = MappedLane::create(run, &identity, info.capacity_bytes)?;
    let scan = Scan {
        tail: 0,
        next_seq: base_seq,
        last_stamp: 0,
    };
    Ok((lane, scan))
}

fn or_unknown(name: &str) -> String {
    let mut name = if name.is_empty() {
        "unknown".to_string()
    } else {
        name.to_string()
    };
    while name.len() > filter_core::lane::layout::MAX_NAME_BYTES {
        name.pop();
    }
    name
}
