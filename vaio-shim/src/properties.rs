//! What an operator asks of a disk's protection, by the properties that the host hands to the filter.
//!
//! Invariant: what is not understood is refused by name before anything is opened; what is not asked for has a
//! default, and a budget is told to the core less what a late timer may take.

use crate::host::DiskInfo;
use crate::open::OpenError;
use filter_core::disk::Config;
use filter_core::disk::ack::AckConfig;
use filter_core::disk::cut_hold::CUT_HOLD_NS;
use filter_core::lane::layout::DEFAULT_RING_BYTES;
use filter_core::sidecar::regions::{DEFAULT_REGION_SHIFT, REGION_SHIFTS};
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

/// All of it, for one opening.
pub struct Asked<'a> {
    /// How the disk's state machine works.
    pub config: Config,
    /// When a completion goes up.
    pub ack: AckConfig,
    /// How long one is held for a cut at most.
    pub cut_hold_ns: u64,
    /// Log2 of a region's bytes.
    pub region_shift: u32,
    /// How long a region is left alone before its bit is cleared.
    pub quiet_ns: u64,
    /// How long a migration drains the lane.
    pub handoff_limit: Duration,
    /// Length of the lane's ring.
    pub ring_bytes: u64,
    /// The domain's name.
    pub domain: &'a str,
}

impl<'a> Asked<'a> {
    /// What is asked of this disk.
    pub fn of(info: &'a DiskInfo) -> Result<Self, OpenError> {
        let handoff_ms = number(info, PROPERTY_HANDOFF_MS)?.unwrap_or(DEFAULT_HANDOFF_MS);
        let domain = info.property(PROPERTY_DOMAIN).unwrap_or_default();
        if !filter_core::mapping::domain_name_is_valid(domain) {
            let why = format!("`{domain}` is not a domain's name");
            return Err(OpenError::Property(PROPERTY_DOMAIN, why));
        }
        Ok(Self {
            config: config(info)?,
            ack: ack_config(info)?,
            cut_hold_ns: cut_hold_ns(info)?,
            region_shift: region_shift(info)?,
            quiet_ns: quiet_ns(info)?,
            handoff_limit: Duration::from_millis(handoff_ms.min(60_000)),
            ring_bytes: number(info, PROPERTY_RING_BYTES)?.unwrap_or(DEFAULT_RING_BYTES),
            domain,
        })
    }
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

pub fn region_shift(info: &DiskInfo) -> Result<u32, OpenError> {
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
