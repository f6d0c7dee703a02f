//! The operations `pause-vms` and `resume-vms`: the filter stays on the disks, and tracks what changes;
//! nothing is sent before they are resumed.
//!
//! The appliance is told so with its assignments: it takes nothing of a paused machine, and makes cuts
//! without it. Without room for records the filter tracks; resumed, what was tracked is sent.
//!
//! Invariant: what an operation changes is one transaction; it is taken back if the appliance does not
//! report that it has done so.

use super::unprotect::protected;
use super::{Noted, check_count, report};
use crate::clusters::{needed, note, noted, parameters};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::{self, Domain, Vm};
use crate::store::{Actor, Done, StoreError};
use crate::text::Label;
use rusqlite::{Transaction, params};
use serde::Deserialize;
use std::time::Instant;

/// The kind `pause-vms`.
pub const PAUSE: Kind = Kind {
    about: "pauses the protection of machines: the filter stays and tracks what changes, nothing is sent",
    for_admins: false,
    make: |making| make(making, true),
};
/// The kind `resume-vms`.
pub const RESUME: Kind = Kind {
    about: "resumes the protection of machines: what changed meanwhile is sent",
    for_admins: false,
    make: |making| make(making, false),
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    /// Names, instance UUIDs or ids in vCenter.
    vms: Vec<Label>,
}

struct Change {
    given: Parameters,
    pauses: bool,
}

fn make(making: &Making<'_>, pauses: bool) -> Result<Box<dyn Operation>, String> {
    let given: Parameters = parameters(making)?;
    check_count(&given.vms)?;
    Ok(Box::new(Change { given, pauses }))
}

fn set(t: &Transaction<'_>, vms: &[Noted], is_paused: bool) -> Result<(), StoreError> {
    for vm in vms {
        t.execute(
            "UPDATE vms SET is_paused = ?2 WHERE id = ?1 AND domain_id IS NOT NULL",
            params![vm.id, is_paused],
        )?;
    }
    Ok(())
}

/// Whether the appliance does what is asked of it: a paused machine is left out, another is not.
fn is_done(t: &Transaction<'_>, vm: &Vm, since_ms: i64) -> Result<bool, StoreError> {
    let Some(domain) = vm.domain_id else {
        return Ok(true);
    };
    let domain: Domain = inventory::get(t, domain)?;
    let Some(heard) = report::last(t, domain.drva_id)? else {
        return Ok(false);
    };
    let of_domain = heard.domain(domain.name.as_str());
    let reported = of_domain.and_then(|of| of.vms.iter().find(|one| one.uuid == vm.uuid));
    let disks = reported.map_or(&[][..], |of| of.disks.as_slice());
    let is_as_wanted = |disk: &report::ReportedDisk| match vm.is_paused {
        true => disk.standing == "left-out" && !disk.is_connected,
        false => disk.standing != "left-out",
    };
    Ok(heard.at_ms >= since_ms && disks.iter().all(is_as_wanted))
}

impl Change {
    fn check(&self, context: &Context) -> Result<(), StepError> {
        let chosen = context.store.read(|t| protected(t, &self.given.vms))?;
        let word = if self.pauses { "paused" } else { "not paused" };
        let mut vms = Vec::new();
        for vm in &chosen {
            match vm.is_paused == self.pauses {
                true => context.log(format!("machine {} is {word} already", vm.name))?,
                false => vms.push(Noted::of(vm)),
            }
        }
        note(context, "plan", &vms)
    }

    fn change(&self, context: &Context) -> Result<(), StepError> {
        let vms: Vec<Noted> = needed(context, "plan")?;
        if vms.is_empty() {
            return Ok(());
        }
        let now_ms = context.store.now_ms();
        note(context, "since", &now_ms)?;
        let names: Vec<&str> = vms.iter().map(|vm| vm.name.as_str()).collect();
        let action = if self.pauses { "pause" } else { "resume" };
        let done = context.store.change(&Actor::system(), action, |t| {
            set(t, &vms, self.pauses)?;
            Ok(Done::new((), names.join(", ")))
        });
        Ok(done?)
    }

    fn undo_change(&self, context: &Context) -> Result<(), StepError> {
        let vms: Vec<Noted> = noted(context, "plan")?.unwrap_or_default();
        Ok(context.store.record(|t| set(t, &vms, !self.pauses))?)
    }

    fn wait(&self, context: &Context) -> Result<(), StepError> {
        let vms: Vec<Noted> = needed(context, "plan")?;
        if vms.is_empty() {
            return Ok(());
        }
        let since_ms: i64 = needed(context, "since")?;
        let (began, limit) = (Instant::now(), super::report_limit(context));
        loop {
            let late = context.store.read(|t| {
                let mut late = Vec::new();
                for noted in &vms {
                    if !is_done(t, &inventory::get(t, noted.id)?, since_ms)? {
                        late.push(noted.name.clone());
                    }
                }
                Ok(late)
            })?;
            if late.is_empty() {
                let words = match self.pauses {
                    true => "nothing of them is taken any more: their filters track changes",
                    false => "what changed meanwhile is taken again",
                };
                return context.log(words);
            }
            if began.elapsed() >= limit {
                return Err(StepError::failed(format!(
                    "the appliance of {} has not reported within {} s that it does so: is it running?",
                    late.join(", "),
                    limit.as_secs()
                )));
            }
            context.wait(context.outside.patience.poll)?;
        }
    }
}

impl Operation for Change {
    fn steps(&self) -> &'static [&'static str] {
        &["check", "change", "wait"]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            0 => self.check(context),
            1 => self.change(context),
            _ => self.wait(context),
        }
    }

    fn undo(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            1 => self.undo_change(context),
            _ => Ok(()),
        }
    }
}
