//! The operation `unprotect-vms`: machines leave their domain. What is in the container stays there.
//!
//! Invariant: until the last step, which is one transaction, everything can be taken back: disks get the
//! domain's policy again, and are synchronised anew.

use super::{Noted, change_filter, check_count, policy, states};
use crate::assignments;
use crate::clusters::{Link, needed, note, noted, parameters};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::{self, Domain, Vm, VmState};
use crate::store::{Actor, Done, StoreError};
use crate::text::{Id, Label, Name};
use crate::vcenter::FilterSource;
use rusqlite::Transaction;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// The kind `unprotect-vms`.
pub const KIND: Kind = Kind {
    about: "ends the protection of machines: what is under way is waited for, the filter comes off their disks; the container stays",
    for_admins: false,
    make,
};

/// So long is waited for a cut with everything, unless asked otherwise.
const DRAIN_S: u64 = 60;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    /// Names, instance UUIDs or ids in vCenter.
    vms: Vec<Label>,
    vcenter: Option<Name>,
    /// So long is waited for a cut with everything; 0: not at all.
    drain_s: Option<u64>,
}

struct Unprotect {
    given: Parameters,
}

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    let given: Parameters = parameters(making)?;
    check_count(&given.vms)?;
    if given.drain_s.is_some_and(|seconds| seconds > 3600) {
        return Err("drain_s: takes 0 to 3600".into());
    }
    Ok(Box::new(Unprotect { given }))
}

/// What the first step found.
#[derive(Serialize, Deserialize)]
struct Plan {
    vms: Vec<(Id, Noted)>,
    since_ms: i64,
}

/// The protected machines that these words mean; else why one means none, or several.
pub(super) fn protected(t: &Transaction<'_>, words: &[Label]) -> Result<Vec<Vm>, StoreError> {
    let all: Vec<Vm> = inventory::list(t, 0, i64::MAX)?;
    let mut chosen: Vec<Vm> = Vec::new();
    let mut wrong = Vec::new();
    for word in words {
        let uuid = uuid::Uuid::try_parse(word.as_str()).ok().map(Id);
        let is_meant = |vm: &&Vm| {
            vm.domain_id.is_some()
                && (Some(vm.uuid) == uuid || &vm.name == word || vm.moid.as_str() == word.as_str())
        };
        let found: Vec<&Vm> = all.iter().filter(is_meant).collect();
        match found.as_slice() {
            [vm] if chosen.iter().any(|one| one.id == vm.id) => {}
            [vm] => chosen.push((*vm).clone()),
            [] => wrong.push(format!("machine {word} is not protected [vm-unknown]")),
            several => {
                let uuids: Vec<String> = several.iter().map(|vm| vm.uuid.to_string()).collect();
                wrong.push(format!(
                    "machine {word}: {} protected machines are called so: name one by its instance UUID: {} [vm-ambiguous]",
                    several.len(),
                    uuids.join(", ")
                ));
            }
        }
    }
    match wrong.is_empty() {
        true => Ok(chosen),
        false => Err(StoreError::conflict(wrong.join("; "))),
    }
}

impl Unprotect {
    fn link(&self, context: &Context) -> Result<Link, StepError> {
        Link::open(context, self.given.vcenter.as_ref())
    }

    fn plan(&self, context: &Context) -> Result<Plan, StepError> {
        needed(context, "plan")
    }

    fn domains(&self, context: &Context, plan: &Plan) -> Result<Vec<Domain>, StepError> {
        let ids: BTreeSet<String> = plan.vms.iter().map(|(of, _)| of.to_string()).collect();
        let all: Vec<Domain> = context.store.read(|t| inventory::list(t, 0, i64::MAX))?;
        let is_ours = |one: &Domain| ids.contains(&one.id.to_string());
        Ok(all.into_iter().filter(is_ours).collect())
    }

    fn check(&self, context: &Context) -> Result<(), StepError> {
        let link = self.link(context)?;
        super::machines::refresh(context, &link)?;
        let chosen = context.store.read(|t| protected(t, &self.given.vms))?;
        let mut vms = Vec::new();
        for vm in &chosen {
            let snapshots = vm
                .hardware
                .as_ref()
                .is_some_and(|found| found.has_snapshots);
            if snapshots && !vm.is_missing {
                return Err(StepError::failed(format!(
                    "machine {}: it has snapshots: vCenter does not change its disks' policy then; delete them [has-snapshots]",
                    vm.name
                )));
            }
            vms.extend(vm.domain_id.map(|domain| (domain, Noted::of(vm))));
        }
        let since_ms = context.store.now_ms();
        note(context, "plan", &Plan { vms, since_ms })
    }

    /// Waits for a cut that holds what was written until now. Without one it goes on, and says so.
    fn drain(&self, context: &Context) -> Result<(), StepError> {
        let plan = self.plan(context)?;
        let limit = Duration::from_secs(self.given.drain_s.unwrap_or(DRAIN_S));
        let can = |vm: &Vm| vm.state == VmState::Recoverable;
        let waits: Vec<Noted> = context.store.read(|t| {
            let mut waits = Vec::new();
            for (_, noted) in &plan.vms {
                if can(&inventory::get(t, noted.id)?) {
                    waits.push(noted.clone());
                }
            }
            Ok(waits)
        })?;
        let is_drained = |vm: &Vm| {
            let at_ms = vm.recoverable_at_ms.unwrap_or(0);
            at_ms >= plan.since_ms || !can(vm)
        };
        if !waits.is_empty() && !limit.is_zero() {
            context.log(format!(
                "waiting for a cut of {} machines, for at most {} s",
                waits.len(),
                limit.as_secs()
            ))?;
            match super::wait_for_states(context, &waits, limit, &is_drained) {
                Ok(_) => {}
                Err(StepError::Failed(why)) => context.log(why)?,
                Err(error) => return Err(error),
            }
        }
        for (_, noted) in &plan.vms {
            let vm: Vm = context.store.read(|t| inventory::get(t, noted.id))?;
            let words = match vm.recoverable_at_ms {
                Some(at_ms) if at_ms >= plan.since_ms => {
                    "a cut holds what was written until now".to_owned()
                }
                Some(at_ms) => format!(
                    "the newest cut that holds it is {} s old; what came later is not recoverable",
                    (context.store.now_ms() - at_ms).max(0) / 1000
                ),
                None => "no cut holds it".to_owned(),
            };
            context.log(format!("machine {}: {words}", vm.name))?;
        }
        Ok(())
    }

    fn detach(&self, context: &Context) -> Result<(), StepError> {
        let plan = self.plan(context)?;
        let link = self.link(context)?;
        let mut begun: BTreeSet<Id> = noted(context, "detached")?.unwrap_or_default();
        for (_, vm) in &plan.vms {
            context.check()?;
            begun.insert(vm.id);
            note(context, "detached", &begun)?;
            let words = match change_filter(context, &link, vm, None, None)? {
                true => "the filter is off its disks",
                false => "vCenter does not know it any more",
            };
            context.log(format!("machine {}: {words}", vm.name))?;
        }
        Ok(())
    }

    fn undo_detach(&self, context: &Context) -> Result<(), StepError> {
        let begun: BTreeSet<Id> = noted(context, "detached")?.unwrap_or_default();
        let plan = self.plan(context)?;
        if begun.is_empty() {
            return Ok(());
        }
        let link = self.link(context)?;
        let limit = Some(context.outside.patience.undo);
        for domain in self.domains(context, &plan)? {
            let (policy, _) = policy::ensure(&link, &domain)?;
            let source = FilterSource::Policy(policy.id);
            let ours = plan.vms.iter().filter(|(of, _)| *of == domain.id);
            for (_, vm) in ours.filter(|(_, vm)| begun.contains(&vm.id)) {
                if change_filter(context, &link, vm, Some(&source), limit)? {
                    context.log(format!(
                        "machine {}: its disks have the filter again, and are synchronised anew",
                        vm.name
                    ))?;
                }
            }
        }
        Ok(())
    }

    fn drop_policies(&self, context: &Context) -> Result<(), StepError> {
        let plan = self.plan(context)?;
        let link = self.link(context)?;
        let leaving: Vec<Noted> = plan.vms.iter().map(|(_, vm)| vm.clone()).collect();
        for domain in self.domains(context, &plan)? {
            super::drop_policy(context, &link, &domain, &leaving)?;
        }
        Ok(())
    }

    fn finish(&self, context: &Context) -> Result<(), StepError> {
        let plan = self.plan(context)?;
        let names: Vec<&str> = plan.vms.iter().map(|(_, vm)| vm.name.as_str()).collect();
        let now_ms = context.store.now_ms();
        let done = context.store.change(&Actor::system(), "unprotect", |t| {
            for (domain, noted) in &plan.vms {
                let vm: Vm = inventory::get(t, noted.id)?;
                if vm.domain_id == Some(*domain) {
                    assignments::set_domain(t, vm.id, None, now_ms)?;
                    states::forget(t, &vm, now_ms)?;
                }
            }
            Ok(Done::new((), names.join(", ")))
        });
        done?;
        context.log("their protection has ended; their containers stay")
    }
}

impl Operation for Unprotect {
    fn steps(&self) -> &'static [&'static str] {
        &["check", "drain", "detach", "policy", "finish"]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            0 => self.check(context),
            1 => self.drain(context),
            2 => self.detach(context),
            3 => self.drop_policies(context),
            _ => self.finish(context),
        }
    }

    fn undo(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            2 => self.undo_detach(context),
            // The policy comes back with the filter; the last is one transaction.
            _ => Ok(()),
        }
    }

    fn is_final(&self, step: usize) -> bool {
        step == 4
    }
}
