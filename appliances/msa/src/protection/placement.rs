//! Whether an appliance works where it was told to: its store, its log, how much of it.
//!
//! The appliance is started with flags that say so; the state says it too. Invariant: who works elsewhere is
//! named, with both places.

use super::report::ReportedDomain;
use crate::alarms::{self, Severity};
use crate::inventory::{self, Domain, LogVolume, Site};
use crate::store::StoreError;
use rusqlite::Transaction;

/// The alarm of a domain that its appliance keeps elsewhere than the state says.
pub const PLACEMENT_ALARM: &str = "domain-placement";

/// What differs, in words; nothing, if all is as the state says.
pub fn differs(
    domain: &Domain,
    site: &Site,
    volume: &LogVolume,
    said: &ReportedDomain,
) -> Option<String> {
    let store = format!(
        "{}/{}",
        site.store.as_str().trim_end_matches('/'),
        domain.name
    );
    if said.store != store {
        return Some(format!(
            "its container is to be at {store}, and is at {}: start the appliance with --store {}",
            said.store, site.store
        ));
    }
    let folder = volume.path.as_str();
    let is_in = said
        .log
        .path
        .strip_prefix(folder)
        .is_some_and(|rest| rest.starts_with('/'));
    if !is_in {
        return Some(format!(
            "its log is to lie on volume {} ({folder}), and lies at {}: start the appliance with --data-dir {folder}",
            volume.name, said.log.path
        ));
    }
    let capacity_bytes = u64::try_from(volume.capacity_bytes).unwrap_or(0);
    (said.log.max_bytes > capacity_bytes).then(|| {
        format!(
            "its log may take {} bytes, and volume {} has {capacity_bytes} for it: start the appliance with --log-max-bytes {capacity_bytes}",
            said.log.max_bytes, volume.name
        )
    })
}

/// Raises or clears the alarm of a domain.
pub fn settle(
    t: &Transaction<'_>,
    domain: &Domain,
    said: &ReportedDomain,
    now_ms: i64,
) -> Result<(), StoreError> {
    let site: Site = inventory::get(t, domain.site_id)?;
    let volume: LogVolume = inventory::get(t, domain.log_volume_id)?;
    let subject = domain.name.as_str();
    match differs(domain, &site, &volume, said) {
        None => alarms::clear(t, PLACEMENT_ALARM, subject, now_ms),
        Some(why) => {
            let text = format!("domain {subject}: {why}");
            let severity = Severity::Warning;
            super::states::raise_once(t, severity, PLACEMENT_ALARM, subject, &text, now_ms)
        }
    }
}
