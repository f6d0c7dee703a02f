//! What an appliance says of its domains, machine by machine: the last word of each is kept.
//!
//! Invariant: a report is taken from the appliance whose certificate was shown, and counts for its own
//! domains only. What it says is never newer than the moment at which it came.

use crate::store::StoreError;
use crate::text::Id;
use rusqlite::{OptionalExtension, Transaction, params};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A disk, as its appliance knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReportedDisk {
    /// Its id, as its sidecar has it.
    pub uuid: Id,
    /// Its label in the machine.
    pub label: String,
    /// Its capacity.
    pub capacity_bytes: u64,
    /// The host that presented it last.
    pub host: String,
    /// Whether that host's connection for it stands.
    pub is_connected: bool,
    /// Whether what it held is being sent.
    pub is_syncing: bool,
    /// `open`, `closed` in order, `set-aside` by an operator, or `left-out` since its machine is paused or not
    /// assigned.
    pub standing: String,
    /// What its host said at the last try of a cut: whether the stream holds every write. None: not asked.
    pub is_complete: Option<bool>,
    /// The newest record that came.
    pub received_seq: u64,
    /// When the newest cut was taken that holds it and is in the store, in ms since 1970. None: not since the
    /// appliance was started.
    pub cut_at_ms: Option<i64>,
    /// Whether nothing came since that cut.
    pub is_current: bool,
}

/// A machine, as its appliance knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReportedVm {
    /// Its instance UUID.
    pub uuid: Id,
    /// Its disks that were ever presented.
    pub disks: Vec<ReportedDisk>,
}

/// A domain's replication log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReportedLog {
    /// Its folder on the appliance.
    pub path: String,
    /// How much of it is used.
    pub used_bytes: u64,
    /// How much of it may be used.
    pub max_bytes: u64,
    /// Nothing more fits.
    pub is_full: bool,
    /// It cannot be written.
    pub is_failing: bool,
}

/// A domain, as its appliance knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReportedDomain {
    /// Its name.
    pub name: String,
    /// Where its container is.
    pub store: String,
    /// Its log.
    pub log: ReportedLog,
    /// When the newest cut was taken that is in the store, in ms since 1970. None: not since the appliance was
    /// started.
    pub newest_cut_at_ms: Option<i64>,
    /// What is wrong, in the appliance's words.
    pub alarms: Vec<String>,
    /// Its machines.
    pub vms: Vec<ReportedVm>,
}

/// What an appliance says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// It reports so often, in seconds.
    pub every_s: u32,
    /// Its domains.
    pub domains: Vec<ReportedDomain>,
}

/// What an appliance said last, and when.
#[derive(Clone, Debug)]
pub struct Heard {
    /// When it came.
    pub at_ms: i64,
    /// What it said.
    pub report: Report,
}

impl Heard {
    /// From when on the appliance counts as silent: three reports that did not come.
    pub fn silent_from_ms(&self) -> i64 {
        silent_from_ms(self.at_ms, self.report.every_s)
    }

    /// What it said of a domain.
    pub fn domain(&self, name: &str) -> Option<&ReportedDomain> {
        self.report.domains.iter().find(|of| of.name == name)
    }
}

/// From when on an appliance counts as silent that should have reported at this time.
pub fn silent_from_ms(due_ms: i64, every_s: u32) -> i64 {
    due_ms + (3 * i64::from(every_s.clamp(1, 3600)) + 15) * 1000
}

/// Keeps what an appliance said.
pub fn keep(t: &Transaction<'_>, drva: Id, report: &Report, now_ms: i64) -> Result<(), StoreError> {
    let known: i64 = t.query_row("SELECT count(*) FROM drvas WHERE id = ?1", [drva], |row| {
        row.get(0)
    })?;
    if known == 0 {
        return Err(StoreError::not_found("appliance", drva));
    }
    let text = serde_json::to_string(report)
        .map_err(|error| StoreError::conflict(format!("the report cannot be kept: {error}")))?;
    t.execute(
        "INSERT INTO reports (drva_id, at_ms, document) VALUES (?1, ?2, ?3) \
         ON CONFLICT (drva_id) DO UPDATE SET at_ms = excluded.at_ms, document = excluded.document",
        params![drva, now_ms, text],
    )?;
    Ok(())
}

/// What an appliance said last. One that another version of this program cannot read counts as none.
pub fn last(t: &Transaction<'_>, drva: Id) -> Result<Option<Heard>, StoreError> {
    let sql = "SELECT at_ms, document FROM reports WHERE drva_id = ?1";
    let found: Option<(i64, String)> = t
        .query_row(sql, [drva], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    Ok(found.and_then(|(at_ms, text)| {
        let report = serde_json::from_str(&text).ok()?;
        Some(Heard { at_ms, report })
    }))
}
