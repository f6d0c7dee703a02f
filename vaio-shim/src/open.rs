//! From a disk that is being opened to a lane that is attached.
//!
//! Invariant: the new attach epoch is durable in the sidecar before the lane is touched and before
//! any I/O; what is done with the lane is the one row of the core's decision table that matches. A
//! region map that is to have every bit set has them before the header says that the disk was opened.

use crate::beside::{self, Beside, Found as FoundBeside, region_blocks};
use crate::host::{DiskHandle, DiskInfo, Host, Level};
use crate::{abi, vm};
use filter_core::disk::ack::AckConfig;
use filter_core::disk::cut_hold::CUT_HOLD_NS;
use filter_core::disk::intent::Intent;
use filter_core::disk::{Config, Disk, Start};
use filter_core::lane::attach::Sidecar as SidecarFound;
use filter_core::lane::attach::{self, Action, Found, LaneFile, OldProducer, WasDoing};
use filter_core::lane::layout::{DEFAULT_RING_BYTES, Geometry, Identity, LaneState};
use filter_core::lane::opening::{self, knows_later};
use filter_core::lane::producer::{Producer, Stamps};
use filter_core::lane::sync::Ordering;
use filter_core::lane::walk::{Scan, scan};
use filter_core::lineage::Attach;
use filter_core::mapping::{CutPage, Lock, MappedLane, MappingError, RunFolder};
use filter_core::sidecar::regions::{DEFAULT_REGION_SHIFT, REGION_SHIFTS, map_generation};
use filter_core::sidecar::{Opening, Sidecar, SidecarError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Names of the properties that the filter understands.
pub const PROPERTY_DOMAIN: &str = "jetdr.domain";
/// Length of the lane's ring, in bytes.
pub const PROPERTY_RING_BYTES: &str = "jetdr.ring-bytes";
/// How long a write may be deferred, in microseconds.
pub const PROPERTY_DEFER_US: &str = "jetdr.defer-budget-us";
/// When a write is done: `host`, or `log`.
pub const PROPERTY_ACK: &str = "jetdr.ack";
/// How long a completion may wait for the appliance's log, in microseconds.
pub const PROPERTY_ACK_US: &str = "jetdr.ack-budget-us";
/// How long a completion may be held for a cut over several hosts, in microseconds.
pub const PROPERTY_CUT_HOLD_US: &str = "jetdr.cut-hold-us";
/// A sync's lowest rate, in bytes per second.
pub const PROPERTY_SYNC_FLOOR: &str = "jetdr.sync-floor-bytes-s";
/// A sync's highest rate, in bytes per second.
pub const PROPERTY_SYNC_MAX: &str = "jetdr.sync-max-bytes-s";

/// Length of a region of the region map, in bytes.
pub const PROPERTY_REGION_BYTES: &str = "jetdr.region-bytes";
/// How long a region must be left alone before its bit is cleared, at least, in ms.
pub const PROPERTY_QUIET_MS: &str = "jetdr.region-quiet-ms";
/// `budget` or `strict`: whether a change passes when the budget ends before the sidecar has its bit.
pub const PROPERTY_INTENT: &str = "jetdr.region-intent";
/// `on` or `off`: whether a sync after a crash asks what the replica holds already.
pub const PROPERTY_SYNC_HASHES: &str = "jetdr.sync-hashes";
/// How long a migration waits, the guest stunned, for the appliance to hold everything, in ms. What it
/// does not hold by then goes along as marks.
pub const PROPERTY_HANDOFF_MS: &str = "jetdr.handoff-drain-ms";
const DEFAULT_QUIET_MS: u64 = 5_000;
const DEFAULT_HANDOFF_MS: u64 = 500;

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
    let shift = region_shift(info)?;
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
pub fn give_up(host: Host, handle: DiskHandle) -> Result<(), OpenError> {
    let found = FoundBeside::open(host, handle)?;
    // One that cannot be read is in doubt already.
    let Some(header) = found.header else {
        return Ok(());
    };
    found.keep(header).save(header.failed())
}

fn number(info: &DiskInfo, key: &'static str) -> Result<Option<u64>, OpenError> {
    let Some(value) = info.property(key) else {
        return Ok(None);
    };
    let parsed = value
        .parse()
        .map_err(|_| OpenError::Property(key, format!("`{value}` is not a whole number")))?;
    Ok(Some(parsed))
}

/// The configuration that the disk's properties ask for.
pub fn config(info: &DiskInfo) -> Result<Config, OpenError> {
    let mut config = Config::default();
    if let Some(us) = number(info, PROPERTY_DEFER_US)? {
        if us > 1_000_000 {
            let why = format!("{us} is more than the largest budget, 1000000");
            return Err(OpenError::Property(PROPERTY_DEFER_US, why));
        }
        config.defer_budget_ns = us * 1000;
    }
    for (key, place) in [
        (PROPERTY_SYNC_FLOOR, &mut config.pace.floor_bytes_s),
        (PROPERTY_SYNC_MAX, &mut config.pace.max_bytes_s),
    ] {
        if let Some(bytes_s) = number(info, key)? {
            if bytes_s == 0 {
                return Err(OpenError::Property(key, "0 would never end".into()));
            }
            *place = bytes_s;
        }
    }
    config.sync_hashes = match info.property(PROPERTY_SYNC_HASHES) {
        None | Some("on") => true,
        Some("off") => false,
        Some(other) => {
            let why = format!("`{other}` is neither `on` nor `off`");
            return Err(OpenError::Property(PROPERTY_SYNC_HASHES, why));
        }
    };
    config.intent_strict = match info.property(PROPERTY_INTENT) {
        None | Some("budget") => false,
        Some("strict") => true,
        Some(other) => {
            let why = format!("`{other}` is neither `budget` nor `strict`");
            return Err(OpenError::Property(PROPERTY_INTENT, why));
        }
    };
    // A held I/O is looked at every RETRY_NS: it must go on at the last look before the budget ends.
    let margin_ns = 2 * crate::instance::RETRY_NS;
    config.defer_budget_ns = config.defer_budget_ns.saturating_sub(margin_ns);
    Ok(config)
}

/// When completions go up, as the disk's properties ask for.
pub fn ack_config(info: &DiskInfo) -> Result<AckConfig, OpenError> {
    let log = match info.property(PROPERTY_ACK) {
        None | Some("host") => false,
        Some("log") => true,
        Some(other) => {
            let why = format!("`{other}` is neither `host` nor `log`");
            return Err(OpenError::Property(PROPERTY_ACK, why));
        }
    };
    let mut ack = AckConfig {
        log,
        ..AckConfig::default()
    };
    if let Some(us) = number(info, PROPERTY_ACK_US)? {
        if !(1000..=10_000_000).contains(&us) {
            let why = format!("{us} is not between 1000 and 10000000");
            return Err(OpenError::Property(PROPERTY_ACK_US, why));
        }
        ack.budget_ns = us * 1000;
    }
    // As for held I/Os: the last look comes before the budget ends.
    ack.budget_ns -= 2 * crate::hold::ACK_POLL_NS;
    Ok(ack)
}

/// How long a completion is held for a cut at most, as the disk's properties ask for.
pub fn cut_hold_ns(info: &DiskInfo) -> Result<u64, OpenError> {
    let Some(us) = number(info, PROPERTY_CUT_HOLD_US)? else {
        return Ok(CUT_HOLD_NS);
    };
    if us > 1_000_000 {
        let why = format!("{us} is more than the largest budget, 1000000");
        return Err(OpenError::Property(PROPERTY_CUT_HOLD_US, why));
    }
    Ok(us * 1000)
}

fn region_shift(info: &DiskInfo) -> Result<u32, OpenError> {
    let Some(bytes) = number(info, PROPERTY_REGION_BYTES)? else {
        return Ok(DEFAULT_REGION_SHIFT);
    };
    if !bytes.is_power_of_two() || !REGION_SHIFTS.contains(&bytes.trailing_zeros()) {
        let why = format!("{bytes} is no power of two from 65536 to 68719476736");
        return Err(OpenError::Property(PROPERTY_REGION_BYTES, why));
    }
    Ok(bytes.trailing_zeros())
}

fn quiet_ns(info: &DiskInfo) -> Result<u64, OpenError> {
    let ms = number(info, PROPERTY_QUIET_MS)?.unwrap_or(DEFAULT_QUIET_MS);
    Ok(ms.min(3_600_000) * 1_000_000)
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
    let config = config(info)?;
    let ack = ack_config(info)?;
    let cut_hold_ns = cut_hold_ns(info)?;
    let (shift, quiet_ns) = (region_shift(info)?, quiet_ns(info)?);
    let handoff_ms = number(info, PROPERTY_HANDOFF_MS)?.unwrap_or(DEFAULT_HANDOFF_MS);
    let domain = info.property(PROPERTY_DOMAIN).unwrap_or_default();
    if !filter_core::mapping::domain_name_is_valid(domain) {
        let why = format!("`{domain}` is not a domain's name");
        return Err(OpenError::Property(PROPERTY_DOMAIN, why));
    }
    let found = FoundBeside::open(host, handle)?;
    let (header, trusted) = identity_of(host, handle, info, &found)?;
    let run = RunFolder::open(Path::new(&info.run_dir))?;
    let boot_id = run.boot_id()?;
    let ring_bytes = number(info, PROPERTY_RING_BYTES)?.unwrap_or(DEFAULT_RING_BYTES);
    let geometry = Geometry::for_disk(info.capacity_bytes, ring_bytes)?;
    let cut = run.cut_page(domain)?;

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
        domain,
    );
    let row = attach::decide(&looked.found);
    let (start, new_lane) = match row.action {
        Action::Refuse => return Err(OpenError::InUse),
        Action::Full => (Start::Full, true),
        Action::Regions => (Start::Regions, true),
        Action::Restart => (Start::Full, false),
        Action::AdoptMarked => (Start::Marked, false),
        Action::AdoptClean => (Start::Clean, false),
    };
    let full = start == Start::Full;
    let (beside, intent) = open_map(
        host,
        handle,
        info,
        found,
        header,
        map,
        (full, shift, quiet_ns),
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
        None => make_lane(&run, info, &header, geometry, boot_id, domain)?,
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
    let mut disk = Disk::new(producer, info.capacity_bytes, start, Some(intent), config);
    if new_lane {
        let stamps = Stamps {
            stamp: &stamps.0,
            cut_epoch: cut.epoch(),
            time_ns: host.now_wall_ns(),
        };
        // A ring that was just made has room for it.
        let _ = disk.begin_base(&stamps);
    }
    let left = beside::left(host, handle, &header, info.capacity_bytes);
    if let Some(map) = left.filter(|_| start == Start::Regions) {
        disk.only_handed_over(&map);
    }
    beside::forget_left(host, handle);
    // Enlarged while it was closed: the new part was never seen.
    let known = if new_lane {
        header.capacity_bytes
    } else {
        header.capacity_bytes.min(looked.capacity_bytes)
    };
    disk.grown_since(known);
    let story = row.when;
    Ok(Attached {
        disk,
        lane,
        lock,
        cut,
        stamps,
        beside,
        handoff_limit: Duration::from_millis(handoff_ms.min(60_000)),
        run,
        ack,
        cut_hold_ns,
        story,
    })
}

/// Takes the old lane away before the sidecar knows of the opening: a process that dies before it has made
/// the new one must not leave a lane that seems to be of its opening, and knows nothing of why it is not.
fn remove_lane(run: &RunFolder, disk_id: &[u8; 16]) -> Result<(), OpenError> {
    let path = run.lane_path(disk_id);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(OpenError::OldLane(path, error))
        }
        _ => Ok(()),
    }
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

struct Looked {
    found: Found,
    lane: Option<(MappedLane, Scan)>,
    capacity_bytes: u64,
    /// What the lane's last producer told of its region map's generation.
    told_generation: Option<u64>,
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
fn look(
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
