//! What the simulated vCenter knows, and what it does with it.
//!
//! | module | does |
//! |---|---|
//! | `access` | users, roles, who may do what |
//! | `document` | managed objects as VI-JSON documents |
//! | `entries` | machines without disks, made and deleted over VI-JSON |
//! | `filters` | the methods of the IoFilterManager |
//! | `machines` | power, migration, maintenance mode, filters on disks |
//! | `setup` | makes and changes what is simulated |
//! | `tasks` | tasks and events |
//!
//! Invariant: the lock on the state is held for looks and changes only, never while a host works; one
//! task at a time changes a cluster (its `work` lock), the others are queued.

mod access;
mod document;
mod entries;
mod filters;
mod machines;
mod setup;
mod tasks;

pub use setup::{DiskSpec, HostSpec, MachineInfo, MachineSpec, Options};

use crate::host::{Host, Tools};
use crate::refusal::Refusal;
use access::Access;
use filters::Filter;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tasks::{Event, Task};

/// A filter on disks: its name, and its properties.
type DiskFilter = (String, Vec<(String, String)>);

/// A cluster.
#[derive(Debug)]
struct Cluster {
    name: String,
    is_drs_on: bool,
    hosts: Vec<String>,
    filters: Vec<Filter>,
    work: Arc<Mutex<()>>,
}

/// A host, as vCenter has it.
#[derive(Clone, Debug)]
struct HostEntry {
    host: Arc<Host>,
    cluster: Option<String>,
    is_in_maintenance: bool,
    is_disconnected: bool,
    work: Arc<Mutex<()>>,
}

/// A virtual disk.
#[derive(Clone, Debug)]
struct Disk {
    key: i32,
    label: String,
    path: PathBuf,
    capacity_bytes: u64,
    is_shared: bool,
    is_physical_rdm: bool,
}

/// A virtual machine.
#[derive(Clone, Debug)]
struct Vm {
    name: String,
    uuid: uuid::Uuid,
    host: String,
    disks: Vec<Disk>,
    has_snapshots: bool,
    /// A note for people.
    annotation: String,
    /// The networks of its cards.
    networks: Vec<String>,
    /// The filter on its disks, and the filter's properties.
    filter: Option<DiskFilter>,
    /// The storage policy that brought the filter.
    policy: Option<String>,
}

/// A storage policy.
#[derive(Clone, Debug)]
struct PolicyEntry {
    name: String,
    /// As it was made.
    spec: Value,
    filter: Option<DiskFilter>,
}

#[derive(Debug, Default)]
struct State {
    clusters: BTreeMap<String, Cluster>,
    hosts: BTreeMap<String, HostEntry>,
    datastores: BTreeMap<String, (String, PathBuf)>,
    vms: BTreeMap<String, Vm>,
    policies: BTreeMap<String, PolicyEntry>,
    extensions: BTreeMap<String, Value>,
    tasks: BTreeMap<String, Task>,
    events: Vec<Event>,
    /// User by session.
    sessions: BTreeMap<String, String>,
    access: Access,
    last_id: u64,
    last_host: u8,
}

impl State {
    /// A number that no other object has.
    fn next(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn cluster(&self, id: &str) -> Result<&Cluster, Refusal> {
        let found = self.clusters.get(id);
        found.ok_or_else(|| Refusal::no_object("ClusterComputeResource", id))
    }

    fn cluster_mut(&mut self, id: &str) -> Result<&mut Cluster, Refusal> {
        let found = self.clusters.get_mut(id);
        found.ok_or_else(|| Refusal::no_object("ClusterComputeResource", id))
    }

    fn host(&self, id: &str) -> Result<&HostEntry, Refusal> {
        let found = self.hosts.get(id);
        found.ok_or_else(|| Refusal::no_object("HostSystem", id))
    }

    fn host_mut(&mut self, id: &str) -> Result<&mut HostEntry, Refusal> {
        let found = self.hosts.get_mut(id);
        found.ok_or_else(|| Refusal::no_object("HostSystem", id))
    }

    fn vm(&self, id: &str) -> Result<&Vm, Refusal> {
        let found = self.vms.get(id);
        found.ok_or_else(|| Refusal::no_object("VirtualMachine", id))
    }

    fn vm_mut(&mut self, id: &str) -> Result<&mut Vm, Refusal> {
        let found = self.vms.get_mut(id);
        found.ok_or_else(|| Refusal::no_object("VirtualMachine", id))
    }

    /// The cluster that a machine is in.
    fn cluster_of_vm(&self, vm: &Vm) -> Option<String> {
        self.hosts.get(&vm.host)?.cluster.clone()
    }
}

/// The simulated site.
#[derive(Debug)]
pub struct World {
    state: Mutex<State>,
    tools: Arc<Tools>,
    folder: PathBuf,
    /// The second and third number of the hosts' addresses, 127.x.y.n: no other site of this machine
    /// has them.
    network: (u8, u8),
    instance: uuid::Uuid,
}

impl World {
    /// Whether a session is known.
    pub fn has_session(&self, id: &str) -> bool {
        self.state.lock().sessions.contains_key(id)
    }

    /// Logs in; the session's id.
    pub fn log_in(&self, user: &str, password: &str) -> Result<String, Refusal> {
        let mut state = self.state.lock();
        if !state.access.takes(user, password) {
            let words = "Cannot complete login due to an incorrect user name or password.";
            return Err(Refusal::new("InvalidLogin", words));
        }
        let id = uuid::Uuid::new_v4().simple().to_string();
        state.sessions.insert(id.clone(), user.to_owned());
        Ok(id)
    }

    /// Ends a session.
    pub fn log_out(&self, id: &str) {
        self.state.lock().sessions.remove(id);
    }

    /// Ends all sessions, as a restart of vCenter's services would.
    pub fn end_sessions(&self) {
        self.state.lock().sessions.clear();
    }

    /// The managed objects from which all others are found.
    pub fn content(&self) -> Value {
        let one = crate::refusal::reference;
        json!({
            "_typeName": "ServiceContent",
            "rootFolder": one("Folder", "group-d1"),
            "propertyCollector": one("PropertyCollector", "propertyCollector"),
            "sessionManager": one("SessionManager", "SessionManager"),
            "ioFilterManager": one("IoFilterManager", "IoFilterManager"),
            "extensionManager": one("ExtensionManager", "ExtensionManager"),
            "eventManager": one("EventManager", "EventManager"),
            "authorizationManager": one("AuthorizationManager", "AuthorizationManager"),
            "about": {
                "_typeName": "AboutInfo", "name": "Simulated vCenter", "fullName": "Simulated vCenter 8.0.3",
                "vendor": "jetdr", "version": "8.0.3", "build": "24022515", "osType": "linux-x64",
                "productLineId": "vpx", "apiType": "VirtualCenter", "apiVersion": "8.0.3.0",
                "instanceUuid": self.instance.to_string(),
            },
        })
    }

    /// Makes a storage policy.
    pub fn create_policy(&self, spec: &Value) -> Result<String, Refusal> {
        let name = spec.get("name").and_then(Value::as_str);
        let name = name.ok_or_else(|| Refusal::argument("name", "the policy has no name"))?;
        let mut state = self.state.lock();
        if state.policies.values().any(|policy| policy.name == name) {
            let words = format!("a policy `{name}` is there");
            return Err(Refusal::new("PbmDuplicateName", words).with("name", json!(name)));
        }
        let id = uuid::Uuid::new_v4().to_string();
        let policy = PolicyEntry {
            name: name.to_owned(),
            spec: spec.clone(),
            filter: filters::of_policy(spec),
        };
        state.policies.insert(id.clone(), policy);
        Ok(id)
    }

    /// The policies' ids.
    pub fn policies(&self) -> Vec<String> {
        self.state.lock().policies.keys().cloned().collect()
    }

    /// A policy's name and how it was made.
    pub fn policy(&self, id: &str) -> Result<(String, Value), Refusal> {
        let state = self.state.lock();
        let found = state.policies.get(id);
        let found =
            found.ok_or_else(|| Refusal::argument("profileIds", format!("no policy {id}")))?;
        Ok((found.name.clone(), found.spec.clone()))
    }

    /// Deletes a policy that no disk has.
    pub fn delete_policy(&self, id: &str) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        if !state.policies.contains_key(id) {
            return Err(Refusal::new("NotFound", format!("policy {id}")));
        }
        let has_it = |vm: &&Vm| vm.policy.as_deref() == Some(id);
        if let Some(vm) = state.vms.values().find(has_it) {
            return Err(Refusal::state(format!("{} has the policy", vm.name)));
        }
        state.policies.remove(id);
        Ok(())
    }

    /// The extension with a key.
    pub fn extension(&self, key: &str) -> Option<Value> {
        self.state.lock().extensions.get(key).cloned()
    }

    /// Registers an extension.
    pub fn register_extension(&self, extension: &Value) -> Result<(), Refusal> {
        let key = extension.get("key").and_then(Value::as_str);
        let key = key.ok_or_else(|| Refusal::argument("extension.key", "it has no key"))?;
        let mut state = self.state.lock();
        if state.extensions.contains_key(key) {
            let words = format!("an extension {key} is registered");
            return Err(Refusal::argument("extension.key", words));
        }
        state.extensions.insert(key.to_owned(), extension.clone());
        Ok(())
    }

    /// Takes an extension out.
    pub fn unregister_extension(&self, key: &str) -> Result<(), Refusal> {
        let gone = self.state.lock().extensions.remove(key);
        gone.map(drop)
            .ok_or_else(|| Refusal::new("NotFound", format!("extension {key}")))
    }
}
