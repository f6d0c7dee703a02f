//! The operation `protect-vms`: machines of enabled clusters come into a domain.
//!
//! Invariant: nothing is begun while anything stands in the way of one of them; what was done is taken back
//! if their appliance does not report that it has them. A machine that was in the domain before stays in it.

use super::findings::{self, Finding, FindingKind};
use super::{Noted, change_filter, check_count, domain_named, machines, policy, states};
use crate::assignments;
use crate::clusters::{Link, needed, note, noted, parameters, refused};
use crate::executions::operation::Making;
use crate::executions::{Context, Kind, Operation, StepError};
use crate::inventory::{self, Domain, VmState};
use crate::store::{Actor, Done};
use crate::text::{Id, Label, Name};
use crate::vcenter::{FilterSource, VmInfo};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use vib_packaging::component;

/// The kind `protect-vms`.
pub const KIND: Kind = Kind {
    about: "protects machines of enabled clusters in a domain: its policy comes onto their disks, and its appliance takes them",
    for_admins: false,
    make,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    domain: Name,
    /// Names, instance UUIDs or ids in vCenter.
    vms: Vec<Label>,
    vcenter: Option<Name>,
}

struct Protect {
    given: Parameters,
}

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    let given: Parameters = parameters(making)?;
    check_count(&given.vms)?;
    Ok(Box::new(Protect { given }))
}

/// What the first step found.
#[derive(Serialize, Deserialize)]
struct Plan {
    domain: Id,
    vms: Vec<Noted>,
}

struct Site {
    link: Link,
    domain: Domain,
    vms: Vec<Noted>,
}

impl Protect {
    fn link(&self, context: &Context) -> Result<Link, StepError> {
        Link::open(context, self.given.vcenter.as_ref())
    }

    /// Nothing, if the first step has not come to its end.
    fn planned(&self, context: &Context) -> Result<Option<(Domain, Vec<Noted>)>, StepError> {
        let Some(plan) = noted::<Plan>(context, "plan")? else {
            return Ok(None);
        };
        let domain = context.store.read(|t| inventory::get(t, plan.domain))?;
        Ok(Some((domain, plan.vms)))
    }

    fn site(&self, context: &Context) -> Result<Site, StepError> {
        let _: Plan = needed(context, "plan")?;
        let planned = self.planned(context)?;
        let (domain, vms) =
            planned.ok_or_else(|| StepError::failed("the journal has no note plan"))?;
        let link = self.link(context)?;
        Ok(Site { link, domain, vms })
    }

    /// Looks, and changes nothing but the inventory.
    fn check(&self, context: &Context) -> Result<(), StepError> {
        let domain = context
            .store
            .read(|t| domain_named(t, &self.given.domain))?;
        let link = self.link(context)?;
        let listing = machines::refresh(context, &link)?;
        let elsewhere = elsewhere(&link, &listing)?;
        let mut found: Vec<Finding> = Vec::new();
        let chosen = findings::choose(context, &listing, &elsewhere, &self.given.vms, &mut found)?;
        let now_ms = context.store.now_ms();
        context.store.read(|t| {
            for one in &chosen {
                findings::of_machine(t, one, &domain, &mut found)?;
            }
            findings::of_appliance(t, &domain, now_ms, &mut found)
        })?;
        findings::report_all(context, &found)?;
        let mut vms = Vec::new();
        for one in &chosen {
            let has = |disk: &crate::vcenter::DiskInfo| {
                disk.filters.iter().any(|name| name == component::NAME)
            };
            if one.vm.domain_id.is_some() && one.info.disks.iter().all(has) {
                context.log(format!(
                    "machine {} is protected in domain {} already: nothing to do",
                    one.vm.name, domain.name
                ))?;
                continue;
            }
            let noted = Noted::of(&one.vm);
            context.log(format!(
                "machine {}: {} disks",
                noted.name,
                noted.disks.len()
            ))?;
            vms.push(noted);
        }
        let domain = domain.id;
        note(context, "plan", &Plan { domain, vms })
    }

    fn make_policy(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        if site.vms.is_empty() {
            return Ok(());
        }
        let (made, is_new) = policy::ensure(&site.link, &site.domain)?;
        let words = if is_new { "is made" } else { "is there" };
        context.log(format!("storage policy {} {words}", made.name))
    }

    fn undo_policy(&self, context: &Context) -> Result<(), StepError> {
        match self.planned(context)? {
            Some((domain, _)) => super::drop_policy(context, &self.link(context)?, &domain, &[]),
            None => Ok(()),
        }
    }

    /// All machines at once: their appliance takes them from now on.
    fn assign(&self, context: &Context) -> Result<(), StepError> {
        let Some((domain, vms)) = self.planned(context)? else {
            return Ok(());
        };
        let names: Vec<&str> = vms.iter().map(|vm| vm.name.as_str()).collect();
        let target = format!("domain {}", domain.name);
        let now_ms = context.store.now_ms();
        let done = context.store.change(&Actor::system(), "protect", |t| {
            for vm in &vms {
                assignments::set_domain(t, vm.id, Some(domain.id), now_ms)?;
            }
            Ok(Done::new((), target).with_detail(names.join(", ")))
        });
        Ok(done?)
    }

    fn undo_assign(&self, context: &Context) -> Result<(), StepError> {
        let Some((domain, vms)) = self.planned(context)? else {
            return Ok(());
        };
        let now_ms = context.store.now_ms();
        Ok(context.store.record(|t| {
            for vm in vms.iter().filter(|vm| !vm.was_assigned) {
                let known: inventory::Vm = inventory::get(t, vm.id)?;
                // Who took it out of the domain meanwhile has done so already.
                if known.domain_id == Some(domain.id) {
                    assignments::set_domain(t, vm.id, None, now_ms)?;
                    states::forget(t, &known, now_ms)?;
                }
            }
            Ok(())
        })?)
    }

    fn attach(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        let mut begun: BTreeSet<Id> = noted(context, "attached")?.unwrap_or_default();
        if site.vms.is_empty() {
            return Ok(());
        }
        let (policy, _) = policy::ensure(&site.link, &site.domain)?;
        let source = FilterSource::Policy(policy.id);
        for vm in &site.vms {
            context.check()?;
            // Noted before it is done: what is taken back is whatever may have been done.
            begun.insert(vm.id);
            note(context, "attached", &begun)?;
            if !change_filter(context, &site.link, vm, Some(&source), None)? {
                return Err(StepError::failed(format!(
                    "machine {}: vCenter does not know it any more [{}]",
                    vm.name,
                    FindingKind::VmUnknown
                )));
            }
            context.log(format!(
                "machine {}: the policy is on {} disks",
                vm.name,
                vm.disks.len()
            ))?;
        }
        Ok(())
    }

    fn undo_attach(&self, context: &Context) -> Result<(), StepError> {
        let begun: BTreeSet<Id> = noted(context, "attached")?.unwrap_or_default();
        let Some((_, vms)) = self.planned(context)? else {
            return Ok(());
        };
        if begun.is_empty() {
            return Ok(());
        }
        let link = self.link(context)?;
        let limit = Some(context.outside.patience.undo);
        for vm in vms.iter().filter(|vm| begun.contains(&vm.id)) {
            if change_filter(context, &link, vm, None, limit)? {
                context.log(format!("machine {}: its disks are as before", vm.name))?;
            }
        }
        Ok(())
    }

    /// It is protected when its appliance says so, not when it was asked for.
    fn wait(&self, context: &Context) -> Result<(), StepError> {
        let Some((_, vms)) = self.planned(context)? else {
            return Ok(());
        };
        let (on, off): (Vec<Noted>, Vec<Noted>) = vms.into_iter().partition(|vm| vm.is_on);
        for vm in off {
            context.log(format!(
                "machine {} is off: it is sent when it is powered on",
                vm.name
            ))?;
        }
        if on.is_empty() {
            return Ok(());
        }
        context.log("waiting for the appliance to report the machines")?;
        let limit = super::report_limit(context);
        let reported = super::wait_for_states(context, &on, limit, &super::is_sent)?;
        for vm in reported {
            let reason = vm.reason.unwrap_or_default();
            context.log(format!("machine {} is {}: {reason}", vm.name, vm.state))?;
            if vm.state == VmState::Degraded {
                context.log("see its alarms, should it stay so")?;
            }
        }
        Ok(())
    }
}

/// Machines of clusters that are not enabled, by their cluster's name: to say why they are not found.
fn elsewhere(
    link: &Link,
    listing: &machines::Listing,
) -> Result<Vec<(String, Vec<VmInfo>)>, StepError> {
    let clusters = link
        .api
        .clusters()
        .map_err(refused("asking for clusters"))?;
    let is_listed = |moid: &str| listing.iter().any(|(one, _)| one.moid.as_str() == moid);
    let mut found = Vec::new();
    for cluster in clusters {
        if is_listed(cluster.moid.as_str()) {
            continue;
        }
        let what = format!("asking for the machines of cluster {}", cluster.name);
        let vms = link.api.vms(&cluster.moid).map_err(refused(&what))?;
        found.push((cluster.name, vms));
    }
    Ok(found)
}

impl Operation for Protect {
    fn steps(&self) -> &'static [&'static str] {
        &["check", "policy", "assign", "attach", "wait"]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            0 => self.check(context),
            1 => self.make_policy(context),
            2 => self.assign(context),
            3 => self.attach(context),
            _ => self.wait(context),
        }
    }

    fn undo(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        match step {
            1 => self.undo_policy(context),
            2 => self.undo_assign(context),
            3 => self.undo_attach(context),
            // One looks only, the last waits only.
            _ => Ok(()),
        }
    }
}
