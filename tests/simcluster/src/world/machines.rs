//! Power, migration, maintenance mode, filters on disks.
//!
//! Invariant: a machine's host in the state is the one on which its process is, or was last.

use super::tasks::Work;
use super::{State, Vm, World};
use crate::host::{Host, Machine, MachineDisk};
use crate::refusal::{Refusal, reference};
use anyhow::Context;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;

impl Vm {
    fn machine(&self) -> Machine {
        let disk = |disk: &super::Disk| MachineDisk {
            label: disk.label.clone(),
            path: disk.path.clone(),
        };
        Machine {
            name: self.name.clone(),
            uuid: self.uuid,
            disks: self.disks.iter().map(disk).collect(),
            filter: self.filter.clone(),
        }
    }
}

impl State {
    pub(super) fn is_running(&self, vm: &Vm) -> bool {
        let host = self.hosts.get(&vm.host);
        host.is_some_and(|entry| entry.host.running().contains(&vm.name))
    }

    /// Running machines on a host.
    fn running_on(&self, host: &str) -> Vec<String> {
        let on = |vm: &Vm| vm.host == host && self.is_running(vm);
        let found = self.vms.iter().filter(|(_, vm)| on(vm));
        found.map(|(id, _)| id.clone()).collect()
    }

    /// What keeps a machine from running on a host.
    fn obstacle(&self, vm: &Vm, host: &str) -> Option<String> {
        let entry = self.hosts.get(host)?;
        let name = &entry.host.name;
        if entry.is_disconnected || !entry.host.settings().is_reachable {
            return Some(format!("{name} does not respond"));
        }
        if entry.is_in_maintenance {
            return Some(format!("{name} is in maintenance mode"));
        }
        match &vm.filter {
            Some((filter, _)) if entry.host.library(filter).is_none() => {
                Some(format!("{name} does not have the filter {filter}"))
            }
            _ => None,
        }
    }

    /// The lock under which a host's machines are changed.
    pub(super) fn work_of(&self, host: &str) -> Result<Arc<Mutex<()>>, Refusal> {
        let entry = self.host(host)?;
        match entry.cluster.as_ref().and_then(|id| self.clusters.get(id)) {
            Some(cluster) => Ok(cluster.work.clone()),
            None => Ok(entry.work.clone()),
        }
    }

    /// Where DRS would put a machine: the host of its cluster that runs the fewest.
    fn place(&self, vm: &Vm) -> Result<Arc<Host>, Refusal> {
        let cluster = self.cluster_of_vm(vm);
        let hosts = cluster.and_then(|id| Some(self.clusters.get(&id)?.hosts.clone()));
        let mut why = Vec::new();
        let mut best: Option<(usize, Arc<Host>)> = None;
        for id in hosts.unwrap_or_default() {
            if id == vm.host {
                continue;
            }
            if let Some(obstacle) = self.obstacle(vm, &id) {
                why.push(obstacle);
                continue;
            }
            let Some(entry) = self.hosts.get(&id) else {
                continue;
            };
            let count = entry.host.running().len();
            if best.as_ref().is_none_or(|(fewest, _)| count < *fewest) {
                best = Some((count, entry.host.clone()));
            }
        }
        match best {
            Some((_, host)) => Ok(host),
            None => Err(Refusal::state(format!(
                "no other host can run {}: {}",
                vm.name,
                match why.is_empty() {
                    true => "there is none".to_owned(),
                    false => why.join("; "),
                }
            ))),
        }
    }
}

impl World {
    /// Whether a machine runs.
    pub fn is_powered_on(&self, vm: &str) -> Result<bool, Refusal> {
        let state = self.state.lock();
        Ok(state.is_running(state.vm(vm)?))
    }

    fn moved(&self, vm: &str, to: &str) {
        let mut state = self.state.lock();
        let Ok(entry) = state.vm_mut(vm) else { return };
        let name = entry.name.clone();
        let from = std::mem::replace(&mut entry.host, to.to_owned());
        state.happened(
            "VmMigratedEvent",
            format!("{name} moved from {from} to {to}"),
        );
    }

    /// Moves a running machine; `to` of its cluster, or one that DRS chooses.
    fn move_now(&self, vm: &str, to: Option<&str>) -> Result<(), Refusal> {
        let (entry, from, to) = {
            let state = self.state.lock();
            let entry = state.vm(vm)?.clone();
            let to = match to {
                None => state.place(&entry)?,
                Some(id) => match state.obstacle(&entry, id) {
                    None => state.host(id)?.host.clone(),
                    Some(obstacle) => return Err(Refusal::state(obstacle)),
                },
            };
            let from = state.host(&entry.host)?.host.clone();
            (entry, from, to)
        };
        if from.id == to.id {
            return Ok(());
        }
        if from.running().contains(&entry.name) {
            from.hand_over(&to, &entry.machine())?;
        }
        self.moved(vm, &to.id);
        Ok(())
    }

    /// Evacuates a host and puts it into maintenance mode; whoever calls has the cluster's work.
    pub(super) fn enter_maintenance_now(&self, host: &str) -> Result<(), Refusal> {
        let (running, may_move) = {
            let state = self.state.lock();
            let entry = state.host(host)?;
            if !entry.host.settings().is_reachable {
                return Err(Refusal::state(format!(
                    "{} does not respond",
                    entry.host.name
                )));
            }
            let cluster = entry.cluster.as_ref().and_then(|id| state.clusters.get(id));
            (state.running_on(host), cluster.is_some_and(|c| c.is_drs_on))
        };
        if !running.is_empty() && !may_move {
            let words = format!("DRS is off and {} run there", running.join(", "));
            return Err(Refusal::state(words));
        }
        for vm in running {
            self.move_now(&vm, None)?;
        }
        let mut state = self.state.lock();
        let entry = state.host_mut(host)?;
        entry.is_in_maintenance = true;
        let name = entry.host.name.clone();
        state.happened(
            "EnteredMaintenanceModeEvent",
            format!("{name} is in maintenance mode"),
        );
        Ok(())
    }

    pub(super) fn exit_maintenance_now(&self, host: &str) {
        let mut state = self.state.lock();
        if let Ok(entry) = state.host_mut(host) {
            entry.is_in_maintenance = false;
            let name = entry.host.name.clone();
            state.happened(
                "ExitMaintenanceModeEvent",
                format!("{name} left maintenance mode"),
            );
        }
    }

    /// `EnterMaintenanceMode_Task`.
    pub fn enter_maintenance(self: &Arc<Self>, host: &str) -> Result<Value, Refusal> {
        let work = self.state.lock().work_of(host)?;
        let (world, id) = (self.clone(), host.to_owned());
        let job = move |_: &Work| world.enter_maintenance_now(&id).map(|()| Value::Null);
        let entity = reference("HostSystem", host);
        Ok(self.start("HostSystem.enterMaintenanceMode", entity, vec![work], job))
    }

    /// `ExitMaintenanceMode_Task`.
    pub fn exit_maintenance(self: &Arc<Self>, host: &str) -> Result<Value, Refusal> {
        let work = self.state.lock().work_of(host)?;
        let (world, id) = (self.clone(), host.to_owned());
        let job = move |_: &Work| {
            world.exit_maintenance_now(&id);
            Ok(Value::Null)
        };
        let entity = reference("HostSystem", host);
        Ok(self.start("HostSystem.exitMaintenanceMode", entity, vec![work], job))
    }

    /// `MigrateVM_Task`.
    pub fn migrate(self: &Arc<Self>, vm: &str, to: Option<&str>) -> Result<Value, Refusal> {
        let work = {
            let state = self.state.lock();
            if let Some(to) = to {
                state.host(to)?;
            }
            state.work_of(&state.vm(vm)?.host)?
        };
        let (world, id, to) = (self.clone(), vm.to_owned(), to.map(str::to_owned));
        let job = move |_: &Work| world.move_now(&id, to.as_deref()).map(|()| Value::Null);
        let entity = reference("VirtualMachine", vm);
        Ok(self.start("VirtualMachine.migrate", entity, vec![work], job))
    }

    /// `PowerOnVM_Task`, `PowerOffVM_Task`.
    pub fn power(self: &Arc<Self>, vm: &str, is_on: bool) -> Result<Value, Refusal> {
        let work = {
            let state = self.state.lock();
            state.work_of(&state.vm(vm)?.host)?
        };
        let (world, id) = (self.clone(), vm.to_owned());
        let job = move |_: &Work| world.power_now(&id, is_on).map(|()| Value::Null);
        let name = if is_on { "powerOn" } else { "powerOff" };
        let entity = reference("VirtualMachine", vm);
        Ok(self.start(&format!("VirtualMachine.{name}"), entity, vec![work], job))
    }

    fn power_now(&self, vm: &str, is_on: bool) -> Result<(), Refusal> {
        let (entry, host, is_running, obstacle) = {
            let state = self.state.lock();
            let entry = state.vm(vm)?.clone();
            let host = state.host(&entry.host)?.host.clone();
            let obstacle = state.obstacle(&entry, &entry.host);
            let is_running = state.is_running(&entry);
            (entry, host, is_running, obstacle)
        };
        if is_on == is_running {
            let words = format!(
                "{} is {} already",
                entry.name,
                if is_on { "on" } else { "off" }
            );
            return Err(Refusal::new("InvalidPowerState", words));
        }
        if !is_on {
            host.power_off(&entry.name, false);
            return Ok(());
        }
        if let Some(obstacle) = obstacle {
            return Err(Refusal::state(obstacle));
        }
        let socket = host.power_on(&entry.machine())?;
        // Guests find it by the machine's name, wherever it runs.
        let link = self.guest_socket(&entry.name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&socket, &link)
            .with_context(|| format!("cannot make {}", link.display()))?;
        Ok(())
    }

    /// Where guests reach a machine's disks over NBD, an export a disk.
    pub fn guest_socket(&self, vm: &str) -> std::path::PathBuf {
        self.folder.join("guests").join(format!("{vm}.sock"))
    }

    /// `ReconfigVM_Task`, as far as it is about filters.
    pub fn reconfigure(self: &Arc<Self>, vm: &str, spec: &Value) -> Result<Value, Refusal> {
        let (change, work) = {
            let state = self.state.lock();
            let entry = state.vm(vm)?;
            (change_of(&state, entry, spec)?, state.work_of(&entry.host)?)
        };
        let (world, id) = (self.clone(), vm.to_owned());
        let job = move |_: &Work| world.change_filter(&id, change).map(|()| Value::Null);
        let entity = reference("VirtualMachine", vm);
        Ok(self.start("VirtualMachine.reconfigure", entity, vec![work], job))
    }

    fn change_filter(&self, vm: &str, change: Change) -> Result<(), Refusal> {
        let (before, host, obstacle) = {
            let state = self.state.lock();
            let before = state.vm(vm)?.clone();
            let mut to_be = before.clone();
            to_be.filter = change.filter.clone();
            let obstacle = state.obstacle(&to_be, &before.host);
            (
                before.clone(),
                state.host(&before.host)?.host.clone(),
                obstacle,
            )
        };
        if before.has_snapshots {
            let words = format!("{} has snapshots: its policy cannot change", before.name);
            return Err(Refusal::state(words));
        }
        if let (Some(obstacle), true) = (obstacle, change.filter.is_some()) {
            return Err(Refusal::state(obstacle));
        }
        let mut to_be = before.clone();
        to_be.filter = change.filter;
        to_be.policy = change.policy;
        if to_be.filter != before.filter && host.running().contains(&before.name) {
            host.hand_over(&host, &to_be.machine())?;
        }
        let mut state = self.state.lock();
        *state.vm_mut(vm)? = to_be;
        let words = format!("the filters of {} changed", before.name);
        state.happened("VmReconfiguredEvent", words);
        Ok(())
    }
}

/// What a machine's disks are to have.
#[derive(Debug)]
struct Change {
    filter: Option<super::DiskFilter>,
    policy: Option<String>,
}

/// Reads a machine's new configuration. All of its disks must be in it, and all get the same.
fn change_of(state: &State, vm: &Vm, spec: &Value) -> Result<Change, Refusal> {
    let wrong = |what: &str| Refusal::argument("spec.deviceChange", what);
    let changes = spec.get("deviceChange").and_then(Value::as_array);
    let changes = changes.ok_or_else(|| wrong("it names no disk"))?;
    let mut keys: Vec<i64> = Vec::new();
    let mut found: Option<&Value> = None;
    for change in changes {
        let key = change
            .get("device")
            .and_then(|device| device.get("key")?.as_i64());
        let known = |key: &i64| vm.disks.iter().any(|disk| i64::from(disk.key) == *key);
        keys.push(
            key.filter(known)
                .ok_or_else(|| wrong("the machine has no such disk"))?,
        );
        found = Some(change);
    }
    keys.sort_unstable();
    keys.dedup();
    let Some(change) = found.filter(|_| keys.len() == vm.disks.len()) else {
        let words =
            "a simulated machine has a filter on all of its disks or on none: name them all";
        return Err(wrong(words));
    };
    let first = |name: &str| change.get(name).and_then(|list| list.as_array()?.first());
    let text = |value: &Value, name: &str| Some(value.get(name)?.as_str()?.to_owned());
    if let Some(id) = first("profile").and_then(|profile| text(profile, "profileId")) {
        let policy = state.policies.get(&id);
        let policy = policy.ok_or_else(|| Refusal::argument("profileId", "no such policy"))?;
        let filter = policy.filter.clone();
        installed(state, vm, filter.as_ref().map(|(name, _)| name.as_str()))?;
        return Ok(Change {
            filter,
            policy: Some(id),
        });
    }
    let filter = first("filterSpec").and_then(|filter| {
        let name = text(filter, "filterName")?;
        let pairs = filter.get("filterCapabilities").and_then(Value::as_array);
        let pair = |pair: &Value| Some((text(pair, "key")?, text(pair, "value")?));
        let pairs = pairs.into_iter().flatten().filter_map(pair).collect();
        Some((name, pairs))
    });
    installed(state, vm, filter.as_ref().map(|(name, _)| name.as_str()))?;
    Ok(Change {
        filter,
        policy: None,
    })
}

/// Only a filter that is on the machine's cluster can be put on its disks.
fn installed(state: &State, vm: &Vm, filter: Option<&str>) -> Result<(), Refusal> {
    let Some(filter) = filter else { return Ok(()) };
    let cluster = state
        .cluster_of_vm(vm)
        .and_then(|id| state.clusters.get(&id));
    let has = cluster.is_some_and(|c| c.filters.iter().any(|one| one.name == filter));
    match has {
        true => Ok(()),
        false => Err(Refusal::argument(
            "filterName",
            format!("the filter {filter} is not on the machine's cluster"),
        )
        .with("filter", json!(filter))),
    }
}
