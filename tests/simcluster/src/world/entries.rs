//! Machines that are made and deleted over VI-JSON: entries without disks.
//!
//! Invariant: a name is taken once; what runs is not deleted.

use super::document::{NETWORK, POOL};
use super::{Vm, World};
use crate::refusal::{Refusal, reference};
use serde_json::{Value, json};
use std::sync::Arc;

/// What a machine's configuration says, as far as it is understood here.
struct Config {
    name: String,
    annotation: String,
    networks: Vec<String>,
}

fn config_of(config: &Value) -> Result<Config, Refusal> {
    let text = |name: &str| config.get(name).and_then(Value::as_str).map(str::to_owned);
    let name = text("name").filter(|name| {
        let known = |b: u8| b.is_ascii_alphanumeric() || b"._- ".contains(&b);
        (1..=80).contains(&name.len()) && name.bytes().all(known) && !name.starts_with('.')
    });
    let words = "here a name has 1 to 80 letters, digits and . _ - and spaces";
    let name = name.ok_or_else(|| Refusal::new("InvalidName", words))?;
    let path = config.get("files").and_then(|f| f.get("vmPathName"));
    if path.and_then(Value::as_str) != Some("[datastore1]") {
        let words = format!("{} is no datastore here", path.unwrap_or(&Value::Null));
        return Err(Refusal::new("InvalidDatastorePath", words));
    }
    let mut networks = Vec::new();
    for change in config
        .get("deviceChange")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let backing = change.get("device").and_then(|d| d.get("backing"));
        let network = backing.and_then(|b| b.get("network")?.get("value")?.as_str());
        match network {
            Some(NETWORK) => networks.push(NETWORK.to_owned()),
            _ => {
                return Err(Refusal::argument(
                    "config.deviceChange",
                    "here only a card on a network can be added",
                ));
            }
        }
    }
    Ok(Config {
        name,
        annotation: text("annotation").unwrap_or_default(),
        networks,
    })
}

impl World {
    /// `CreateVM_Task`: a machine without disks, on a host that vCenter chooses.
    pub fn create_vm(self: &Arc<Self>, config: &Value, pool: &str) -> Result<Value, Refusal> {
        let config = config_of(config)?;
        let cluster = pool.strip_prefix(POOL).unwrap_or(pool).to_owned();
        let work = {
            let state = self.state.lock();
            let found = state.clusters.get(&cluster);
            let found = found.ok_or_else(|| Refusal::no_object("ResourcePool", pool))?;
            found.work.clone()
        };
        let (world, of) = (self.clone(), cluster.clone());
        let entity = reference("Folder", "group-v3");
        let job = move |_: &super::tasks::Work| world.create_now(config, &of);
        Ok(self.start("Folder.createVm", entity, vec![work], job))
    }

    fn create_now(&self, config: Config, cluster: &str) -> Result<Value, Refusal> {
        let mut state = self.state.lock();
        if state.vms.values().any(|vm| vm.name == config.name) {
            let words = format!("a machine `{}` is there", config.name);
            return Err(Refusal::new("DuplicateName", words).with("name", json!(config.name)));
        }
        let host = state.cluster(cluster)?.hosts.first().cloned();
        let host = host.ok_or_else(|| Refusal::state("the cluster has no host"))?;
        let id = format!("vm-{}", state.next());
        let words = format!("{} was made", config.name);
        let vm = Vm {
            name: config.name,
            uuid: uuid::Uuid::new_v4(),
            host,
            disks: Vec::new(),
            has_snapshots: false,
            annotation: config.annotation,
            networks: config.networks,
            filter: None,
            policy: None,
        };
        state.vms.insert(id.clone(), vm);
        state.happened("VmCreatedEvent", words);
        Ok(reference("VirtualMachine", &id))
    }

    /// `Destroy_Task`.
    pub fn destroy_vm(self: &Arc<Self>, vm: &str) -> Result<Value, Refusal> {
        let work = {
            let state = self.state.lock();
            state.work_of(&state.vm(vm)?.host)?
        };
        let (world, id) = (self.clone(), vm.to_owned());
        let job = move |_: &super::tasks::Work| {
            let mut state = world.state.lock();
            let entry = state.vm(&id)?.clone();
            if state.is_running(&entry) {
                let words = format!("{} is on", entry.name);
                return Err(Refusal::new("InvalidPowerState", words));
            }
            state.vms.remove(&id);
            state.happened("VmRemovedEvent", format!("{} was deleted", entry.name));
            drop(state);
            let folder = world.folder.join("datastore1").join(&entry.name);
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(anyhow::Error::new(error).into())
                }
                _ => Ok(Value::Null),
            }
        };
        let entity = reference("VirtualMachine", vm);
        Ok(self.start("VirtualMachine.destroy", entity, vec![work], job))
    }
}
