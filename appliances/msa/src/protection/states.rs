//! In which state each protected machine is, by what its appliance said last.
//!
//! Invariant: a machine is called recoverable only if its appliance said so lately, of every disk that
//! vCenter knows of; who has nothing to go by says that. The newest moment that can be recovered is kept over
//! restarts of the appliance; it is that of a cut, or of a report that nothing came since that cut.

use super::report::{self, Heard, ReportedDisk, ReportedDomain, ReportedVm};
use crate::alarms::{self, Severity};
use crate::clock::MINUTE_MS;
use crate::inventory::{self, Domain, Drva, Entity, Vm, VmState};
use crate::store::StoreError;
use crate::text::Id;
use rusqlite::{OptionalExtension, Transaction, params};

/// The alarm of a machine that has been degraded for a while.
pub const DEGRADED_ALARM: &str = "vm-degraded";
/// The alarm of a machine whose protection does not work.
pub const ERROR_ALARM: &str = "vm-error";
/// The alarm of an appliance that does not report.
pub const SILENT_ALARM: &str = "appliance-silent";
/// A machine may be degraded for so long before somebody is told.
pub const DEGRADED_LIMIT_MS: i64 = 5 * MINUTE_MS;
/// The newest cut may be so old while newer records are there.
pub const CUT_LIMIT_MS: i64 = MINUTE_MS;

/// What a machine's state is decided from.
pub struct Facts<'a> {
    /// As the state has it.
    pub vm: &'a Vm,
    /// What its appliance said last.
    pub heard: Option<&'a Heard>,
    /// From when on the appliance counts as silent.
    pub silent_from_ms: i64,
    /// What the appliance said of the domain.
    pub domain: Option<&'a ReportedDomain>,
    /// What the appliance said of the machine.
    pub reported: Option<&'a ReportedVm>,
    /// Now.
    pub now_ms: i64,
}

/// A state, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The state.
    pub state: VmState,
    /// Why.
    pub reason: String,
    /// The newest moment that can be recovered, if one is known.
    pub recoverable_at_ms: Option<i64>,
}

impl Facts<'_> {
    /// How many disks it has, if vCenter was asked.
    fn disks(&self) -> Option<usize> {
        self.vm.hardware.as_ref().map(|found| found.disks.len())
    }

    fn is_off(&self) -> bool {
        let hardware = self.vm.hardware.as_ref();
        hardware.is_some_and(|found| !found.is_powered_on)
    }

    /// The newest moment that can be recovered: of all of its disks.
    fn recoverable_at_ms(&self) -> Option<i64> {
        let of_disk = |disk: &ReportedDisk| {
            let at_ms = disk.cut_at_ms?;
            let is_live = disk.is_connected || disk.standing == "closed";
            let is_up_to_date =
                disk.is_current && is_live && !disk.is_syncing && disk.is_complete != Some(false);
            match self.heard {
                Some(heard) if is_up_to_date => Some(heard.at_ms.max(at_ms)),
                _ => Some(at_ms),
            }
        };
        let disks = &self.reported?.disks;
        let all: Option<Vec<i64>> = disks.iter().map(of_disk).collect();
        let is_whole = self.disks().is_none_or(|wanted| disks.len() >= wanted);
        let told = all?.into_iter().min().filter(|_| is_whole);
        told.max(self.vm.recoverable_at_ms)
    }

    /// Not begun: as long as it never was recoverable; later the same is a loss of protection.
    fn before_or_degraded(&self, before: VmState) -> VmState {
        match self.vm.recoverable_at_ms {
            Some(_) => VmState::Degraded,
            None => before,
        }
    }

    /// The state and why.
    pub fn judge(&self) -> Judged {
        let recoverable_at_ms = self.recoverable_at_ms().or(self.vm.recoverable_at_ms);
        let (state, reason) = self.state();
        Judged {
            state,
            reason,
            recoverable_at_ms,
        }
    }

    fn state(&self) -> (VmState, String) {
        if self.vm.is_missing {
            let why = "vCenter lists it in no enabled cluster";
            return (VmState::Error, why.into());
        }
        if self.now_ms >= self.silent_from_ms {
            let why = match self.heard {
                Some(heard) => format!(
                    "its appliance was not heard of for {} s",
                    (self.now_ms - heard.at_ms).max(0) / 1000
                ),
                None => "its appliance has never reported".into(),
            };
            return (VmState::Error, why);
        }
        if self.vm.is_paused {
            let why = "paused by an operator: its filter tracks changes, and they are sent when it is resumed";
            return (VmState::Degraded, why.into());
        }
        let disks = self.reported.map_or(&[][..], |vm| vm.disks.as_slice());
        let missing = self.disks().unwrap_or(1).saturating_sub(disks.len());
        if missing > 0 {
            return self.unpresented(missing, disks.len());
        }
        self.of_disks(disks)
    }

    fn unpresented(&self, missing: usize, known: usize) -> (VmState, String) {
        match (known, self.vm.recoverable_at_ms) {
            (0, Some(_)) => {
                let why =
                    "its appliance knows none of its disks any more: was its data folder lost?";
                (VmState::Error, why.into())
            }
            _ if self.is_off() => (
                self.before_or_degraded(VmState::Initializing),
                format!("{missing} of its disks were not presented yet: it is off"),
            ),
            _ => (
                self.before_or_degraded(VmState::Initializing),
                format!("its host has not presented {missing} of its disks yet"),
            ),
        }
    }

    fn of_disks(&self, disks: &[ReportedDisk]) -> (VmState, String) {
        let named = |is: &dyn Fn(&ReportedDisk) -> bool| {
            let found = disks.iter().find(|disk| is(disk));
            found.map(|disk| (disk.label.clone(), disk.host.clone()))
        };
        if let Some((label, _)) = named(&|disk| disk.standing == "left-out") {
            let why = format!("its appliance has not taken {label} in again yet");
            return (self.before_or_degraded(VmState::Initializing), why);
        }
        if let Some((label, _)) = named(&|disk| disk.standing == "set-aside") {
            let why = format!(
                "{label} was set aside at its appliance: take-back there puts it into cuts again"
            );
            return (VmState::Degraded, why);
        }
        if let Some((label, host)) = named(&|disk| !disk.is_connected && disk.standing != "closed")
        {
            let why = format!("no host sends {label} (it was on {host}): its changes are tracked");
            return (self.before_or_degraded(VmState::InitialSync), why);
        }
        if let Some((label, _)) = named(&|disk| disk.is_syncing) {
            let what = match self.vm.recoverable_at_ms {
                Some(_) => "what changed meanwhile",
                None => "what it held before",
            };
            let why = format!("{what} is being sent of {label}");
            return (self.before_or_degraded(VmState::InitialSync), why);
        }
        if let Some((label, _)) = named(&|disk| disk.is_complete == Some(false)) {
            let why = format!("{label} only tracks changes");
            return (self.before_or_degraded(VmState::InitialSync), why);
        }
        self.of_cuts(disks)
    }

    fn of_cuts(&self, disks: &[ReportedDisk]) -> (VmState, String) {
        let alarms = self.domain.map_or(&[][..], |of| of.alarms.as_slice());
        let why = match alarms {
            [] => String::new(),
            alarms => format!(": {}", alarms.join("; ")),
        };
        let oldest = disks.iter().map(|disk| disk.cut_at_ms).min().flatten();
        let is_current = disks.iter().all(|disk| disk.is_current);
        let Some(at_ms) = oldest else {
            // After a restart of the appliance the cuts before it are still there.
            return match (self.vm.recoverable_at_ms, is_current) {
                (Some(_), true) => (
                    VmState::Recoverable,
                    "nothing came since the newest cut".into(),
                ),
                (Some(_), false) => self.aged(self.vm.recoverable_at_ms.unwrap_or(0), &why),
                (None, _) => (VmState::InitialSync, format!("no cut holds it yet{why}")),
            };
        };
        match is_current {
            true => (
                VmState::Recoverable,
                "nothing came since the newest cut".into(),
            ),
            false => self.aged(at_ms, &why),
        }
    }

    /// Newer records are there than the newest cut holds.
    fn aged(&self, cut_at_ms: i64, why: &str) -> (VmState, String) {
        let said_at_ms = self.heard.map_or(self.now_ms, |heard| heard.at_ms);
        let age_ms = (said_at_ms - cut_at_ms).max(0);
        match age_ms > CUT_LIMIT_MS {
            true => (
                VmState::Degraded,
                format!("the newest cut was {} s old{why}", age_ms / 1000),
            ),
            false => (VmState::Recoverable, "cuts hold it".into()),
        }
    }
}

/// Decides the state of every machine of an appliance's domains anew.
pub fn settle(t: &Transaction<'_>, drva: &Drva, now_ms: i64) -> Result<(), StoreError> {
    let heard = report::last(t, drva.id)?;
    let mut protected_since: Option<i64> = None;
    let mut statement = t.prepare(
        "SELECT vms.* FROM vms JOIN domains ON domains.id = vms.domain_id WHERE domains.drva_id = ?1",
    )?;
    let vms = statement.query_map([drva.id], Vm::from_row)?;
    let vms: Vec<Vm> = vms.collect::<rusqlite::Result<_>>()?;
    for vm in &vms {
        let since = vm.state_since_ms.unwrap_or(vm.created_at_ms);
        protected_since = Some(protected_since.map_or(since, |known| known.min(since)));
        settle_vm(t, vm, heard.as_ref(), now_ms)?;
    }
    for said in heard.iter().flat_map(|heard| &heard.report.domains) {
        let sql = "SELECT * FROM domains WHERE name = ?1 AND drva_id = ?2";
        let mut statement = t.prepare(sql)?;
        let found = statement.query_row(params![said.name, drva.id], Domain::from_row);
        if let Some(domain) = found.optional()? {
            super::placement::settle(t, &domain, said, now_ms)?;
        }
    }
    let silent = protected_since.is_some_and(|since| {
        let from_ms = heard.as_ref().map(Heard::silent_from_ms);
        now_ms >= from_ms.unwrap_or_else(|| report::silent_from_ms(since, 15))
    });
    match silent {
        true => {
            let text = format!(
                "appliance {} does not report: nobody knows whether its {} machines are protected; start it, or mend its way to this server",
                drva.name,
                vms.len()
            );
            raise_once(
                t,
                Severity::Critical,
                SILENT_ALARM,
                drva.name.as_str(),
                &text,
                now_ms,
            )
        }
        false => alarms::clear(t, SILENT_ALARM, drva.name.as_str(), now_ms),
    }
}

/// The same alarm is not raised at every look: each raising is an event.
pub(super) fn raise_once(
    t: &Transaction<'_>,
    severity: Severity,
    kind: &str,
    subject: &str,
    text: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    let sql =
        "SELECT count(*) FROM alarms WHERE kind = ?1 AND subject = ?2 AND cleared_at_ms IS NULL";
    let open: i64 = t.query_row(sql, params![kind, subject], |row| row.get(0))?;
    match open {
        0 => alarms::raise(t, severity, kind, subject, text, now_ms),
        _ => Ok(()),
    }
}

fn settle_vm(
    t: &Transaction<'_>,
    vm: &Vm,
    heard: Option<&Heard>,
    now_ms: i64,
) -> Result<(), StoreError> {
    let Some(domain) = vm.domain_id else {
        return Ok(());
    };
    let domain: Domain = inventory::get(t, domain)?;
    let since = vm.state_since_ms.unwrap_or(vm.created_at_ms);
    // Who was just assigned is not blamed for a silence before.
    let assigned = report::silent_from_ms(since, 15);
    let silent_from_ms = match heard {
        Some(heard) if vm.state == VmState::Initializing => heard.silent_from_ms().max(assigned),
        Some(heard) => heard.silent_from_ms(),
        None => assigned,
    };
    let of_domain = heard.and_then(|heard| heard.domain(domain.name.as_str()));
    let reported = of_domain.and_then(|of| of.vms.iter().find(|one| one.uuid == vm.uuid));
    let facts = Facts {
        vm,
        heard,
        silent_from_ms,
        domain: of_domain,
        reported,
        now_ms,
    };
    let judged = facts.judge();
    write(t, vm, &judged, now_ms)?;
    alarm(t, vm, &judged, now_ms)
}

fn write(t: &Transaction<'_>, vm: &Vm, judged: &Judged, now_ms: i64) -> Result<(), StoreError> {
    let is_same = vm.state == judged.state
        && vm.reason.as_deref() == Some(judged.reason.as_str())
        && vm.recoverable_at_ms == judged.recoverable_at_ms;
    if is_same {
        return Ok(());
    }
    let since_ms = match vm.state == judged.state {
        true => vm.state_since_ms.unwrap_or(now_ms),
        false => {
            let text = format!("{}: {}", judged.state, judged.reason);
            alarms::event(t, "vm-state", vm.name.as_str(), &text, now_ms)?;
            now_ms
        }
    };
    t.execute(
        "UPDATE vms SET state = ?2, reason = ?3, state_since_ms = ?4, recoverable_at_ms = ?5 \
         WHERE id = ?1",
        params![
            vm.id,
            judged.state,
            judged.reason,
            since_ms,
            judged.recoverable_at_ms
        ],
    )?;
    Ok(())
}

fn alarm(t: &Transaction<'_>, vm: &Vm, judged: &Judged, now_ms: i64) -> Result<(), StoreError> {
    // Names are not unique, and change.
    let subject = &vm.uuid.to_string();
    let since_ms = match vm.state == judged.state {
        true => vm.state_since_ms.unwrap_or(now_ms),
        false => now_ms,
    };
    let text = format!("machine {}: {}", vm.name, judged.reason);
    match judged.state {
        VmState::Error => raise_once(t, Severity::Critical, ERROR_ALARM, subject, &text, now_ms)?,
        _ => alarms::clear(t, ERROR_ALARM, subject, now_ms)?,
    }
    match judged.state {
        VmState::Degraded if now_ms - since_ms >= DEGRADED_LIMIT_MS => {
            raise_once(t, Severity::Warning, DEGRADED_ALARM, subject, &text, now_ms)
        }
        VmState::Degraded => Ok(()),
        _ => alarms::clear(t, DEGRADED_ALARM, subject, now_ms),
    }
}

/// Ends what was said of a machine whose protection ends.
pub fn forget(t: &Transaction<'_>, vm: &Vm, now_ms: i64) -> Result<(), StoreError> {
    for kind in [DEGRADED_ALARM, ERROR_ALARM, super::machines::MISSING_ALARM] {
        alarms::clear(t, kind, &vm.uuid.to_string(), now_ms)?;
    }
    Ok(())
}

/// Decides anew for all appliances.
pub fn settle_all(t: &Transaction<'_>, now_ms: i64) -> Result<(), StoreError> {
    let all: Vec<Drva> = inventory::list(t, 0, i64::MAX)?;
    for drva in &all {
        settle(t, drva, now_ms)?;
    }
    Ok(())
}

/// Takes a report, and decides anew for its appliance.
pub fn take(
    t: &Transaction<'_>,
    drva: Id,
    report: &report::Report,
    now_ms: i64,
) -> Result<(), StoreError> {
    report::keep(t, drva, report, now_ms)?;
    let drva: Drva = inventory::get(t, drva)?;
    settle(t, &drva, now_ms)
}
