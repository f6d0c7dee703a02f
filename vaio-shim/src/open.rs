//! From a disk that is being opened to a lane that is attached.
//!
//! Invariant: the new attach epoch is durable in the sidecar before the lane is touched and before
//! any I/O; what is done with the lane is the one row of the core's decision table that matches.

use crate::host::{DiskHandle, DiskInfo, Host, Level, OpenSidecar};
use crate::{abi, vm};
use filter_core::disk::ack::AckConfig;
use filter_core::disk::{Config, Disk, Start};
use filter_core::lane::attach::Sidecar as SidecarFound;
use filter_core::lane::attach::{self, Action, Found, LaneFile, OldProducer, WasDoing};
use filter_core::lane::layout::{DEFAULT_RING_BYTES, Geometry, Identity, LaneState};
use filter_core::lane::producer::Producer;
use filter_core::lane::sync::Ordering;
use filter_core::lane::walk::{Scan, scan};
use filter_core::mapping::{CutPage, Lock, MappedLane, MappingError, RunFolder};
use filter_core::sidecar::{SIDECAR_BYTES, Sidecar, SidecarError};
use std::path::Path;
use std::sync::Arc;

/// The filter's own number of its sidecar.
pub const SIDECAR_KEY: u64 = 0x6a65_7464_7200_0001;

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
/// A sync's lowest rate, in bytes per second.
pub const PROPERTY_SYNC_FLOOR: &str = "jetdr.sync-floor-bytes-s";
/// A sync's highest rate, in bytes per second.
pub const PROPERTY_SYNC_MAX: &str = "jetdr.sync-max-bytes-s";

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
    /// The sidecar's content now.
    pub sidecar: Sidecar,
    /// The run folder.
    pub run: RunFolder,
    /// When a completion goes up.
    pub ack: AckConfig,
    /// What was found and done, for the log.
    pub story: &'static str,
}

/// The attach call: makes the sidecar.
pub fn protect(host: Host, handle: DiskHandle, info: &DiskInfo) -> Result<(), OpenError> {
    let id = info
        .disk_uuid
        .or_else(|| host.random_id())
        .ok_or(OpenError::Random)?;
    let file = host
        .sidecar_create(handle, SIDECAR_KEY, SIDECAR_BYTES as u64)
        .map_err(|status| OpenError::SidecarIo("create", status))?;
    let first = Sidecar::new(id, [0; 16]);
    let written = store(&file, &first);
    drop(file);
    if written.is_err() {
        host.sidecar_delete(handle, SIDECAR_KEY);
    }
    written
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
    match host.sidecar_delete(handle, SIDECAR_KEY) {
        status if status >= 0 || status == abi::JIO_E_NOT_FOUND => Ok(()),
        status => Err(OpenError::SidecarIo("delete", status)),
    }
}

/// Reads the sidecar.
pub fn load(host: Host, handle: DiskHandle) -> Result<Sidecar, OpenError> {
    let (file, len) = host
        .sidecar_open(handle, SIDECAR_KEY)
        .map_err(|status| match status {
            abi::JIO_E_NOT_FOUND => OpenError::NotAttached,
            status => OpenError::SidecarIo("open", status),
        })?;
    let mut raw = [0u8; SIDECAR_BYTES];
    if len != SIDECAR_BYTES as u64 {
        return Err(SidecarError::Damaged.into());
    }
    file.read(0, &mut raw)
        .map_err(|status| OpenError::SidecarIo("read", status))?;
    Ok(Sidecar::decode(&raw)?)
}

fn store(file: &OpenSidecar, sidecar: &Sidecar) -> Result<(), OpenError> {
    file.write(sidecar.offset_bytes(), &sidecar.encode())
        .map_err(|status| OpenError::SidecarIo("write", status))
}

/// Writes the sidecar; durable on success.
pub fn save(host: Host, handle: DiskHandle, sidecar: &Sidecar) -> Result<(), OpenError> {
    let (file, _) = host
        .sidecar_open(handle, SIDECAR_KEY)
        .map_err(|status| OpenError::SidecarIo("open", status))?;
    store(&file, sidecar)
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

/// The disk's sidecar as it is to be used: a damaged one, or a copy of another disk's, is replaced
/// by one with an identity of its own, so that the disk is synced in full.
fn identity_of(
    host: Host,
    handle: DiskHandle,
    info: &DiskInfo,
) -> Result<(Sidecar, bool), OpenError> {
    let found = match load(host, handle) {
        Err(OpenError::Sidecar(SidecarError::Damaged)) => {
            host.event(
                handle,
                Level::Warn,
                1,
                "the sidecar is damaged: the disk is synced in full",
            );
            None
        }
        Err(error) => return Err(error),
        Ok(sidecar) => Some(sidecar),
    };
    match (found, info.disk_uuid) {
        (Some(sidecar), None) => Ok((sidecar, true)),
        (Some(sidecar), Some(uuid)) if sidecar.disk_id == uuid => Ok((sidecar, true)),
        (_, uuid) => {
            let id = uuid.or_else(|| host.random_id()).ok_or(OpenError::Random)?;
            Ok((Sidecar::new(id, [0; 16]), false))
        }
    }
}

/// Opens the lane of a disk by the decision table.
pub fn attach(host: Host, handle: DiskHandle, info: &DiskInfo) -> Result<Attached, OpenError> {
    let config = config(info)?;
    let ack = ack_config(info)?;
    let domain = info.property(PROPERTY_DOMAIN).unwrap_or_default();
    if !filter_core::mapping::domain_name_is_valid(domain) {
        let why = format!("`{domain}` is not a domain's name");
        return Err(OpenError::Property(PROPERTY_DOMAIN, why));
    }
    let (sidecar, sidecar_known) = identity_of(host, handle, info)?;
    let run = RunFolder::open(Path::new(&info.run_dir))?;
    let boot_id = run.boot_id()?;
    let ring_bytes = number(info, PROPERTY_RING_BYTES)?.unwrap_or(DEFAULT_RING_BYTES);
    let geometry = Geometry::for_disk(info.capacity_bytes, ring_bytes)?;
    let cut = run.cut_page(domain)?;

    let Some(lock) = run.lock_disk(&sidecar.disk_id)? else {
        return Err(OpenError::InUse);
    };
    let looked = look(&run, &sidecar, sidecar_known, &boot_id, info, domain);
    let row = attach::decide(&looked.found);
    let fresh = match row.action {
        Action::Refuse => return Err(OpenError::InUse),
        Action::Fresh => true,
        Action::Restart | Action::AdoptMarked | Action::AdoptClean => false,
    };
    let next = sidecar.attached(boot_id, fresh)?;
    save(host, handle, &next)?;

    let (lane, scan) = match looked.lane {
        Some((lane, scan)) if !fresh => (lane, scan),
        _ => {
            let base_seq = sidecar.seq_floor + 1;
            let identity = Identity {
                geometry,
                disk_id: sidecar.disk_id,
                vm_id: info.vm_uuid,
                boot_id,
                base_seq,
                domain: domain.into(),
                vm_name: or_unknown(&info.vm_name),
                disk_label: or_unknown(&info.label),
            };
            let lane = MappedLane::create(&run, &identity, info.capacity_bytes)?;
            (
                lane,
                Scan {
                    tail: 0,
                    next_seq: base_seq,
                    last_stamp: 0,
                },
            )
        }
    };
    let stamps = vm::stamps(&info.vm_uuid, host.now_wall_ns().max(scan.last_stamp));
    let mut producer = Producer::new(lane.memory(), next.attach_epoch, scan.tail, scan.next_seq);
    let start = match row.action {
        Action::AdoptMarked => Start::Marked,
        Action::AdoptClean => Start::Clean,
        _ => Start::Full,
    };
    if row.action == Action::Restart {
        producer.restart();
    }
    let mut disk = Disk::new(producer, info.capacity_bytes, start, config);
    if !fresh && looked.capacity_bytes < info.capacity_bytes {
        // Enlarged while it was closed: the new part was never seen.
        disk.grown_since(looked.capacity_bytes);
    }
    let story = row.when;
    Ok(Attached {
        disk,
        lane,
        lock,
        cut,
        stamps,
        sidecar: next,
        run,
        ack,
        story,
    })
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
}

/// What is found at attach, the lock already held.
fn look(
    run: &RunFolder,
    sidecar: &Sidecar,
    sidecar_known: bool,
    boot_id: &[u8; 16],
    info: &DiskInfo,
    domain: &str,
) -> Looked {
    let mut found = Found {
        file: LaneFile::Absent,
        producer: OldProducer::Gone,
        sidecar: SidecarFound::Absent,
        was: WasDoing::Nothing,
        restart_asked: false,
    };
    let path = run.lane_path(&sidecar.disk_id);
    if !path.exists() {
        return Looked {
            found,
            lane: None,
            capacity_bytes: 0,
        };
    }
    let Ok(lane) = MappedLane::open(&path) else {
        found.file = LaneFile::Unusable;
        return Looked {
            found,
            lane: None,
            capacity_bytes: 0,
        };
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
    found.sidecar = match sidecar_known {
        false => SidecarFound::Absent,
        true if sidecar.matches_lane(lane_epoch, boot_id) => SidecarFound::Matches,
        true => SidecarFound::OtherEpoch,
    };
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
    }
}
