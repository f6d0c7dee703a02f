//! Makes and changes what is simulated: what an operator, a cable or a power failure does to a real site.

use super::access::Access;
use super::{Cluster, Disk, HostEntry, State, Vm, World};
use crate::host::{Host, Settings, Tools};
use crate::refusal::Refusal;
use anyhow::{Context, bail};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vib_packaging::{AcceptanceLevel, Anchors};

const NETWORK_LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libhostnet.so"));
/// A virtual disk's first key.
const FIRST_DISK: i32 = 2000;

/// What a site starts with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where all of it lies: short, as sockets are in it. It must not be there yet, or be empty.
    pub folder: PathBuf,
    /// The program whose `vm`, `firewall-refresh` and `probe` commands hosts use.
    pub program: PathBuf,
    /// Its arguments before those.
    pub prefix: Vec<String>,
    /// PEM of whose signatures of packages hosts take.
    pub signers: Option<Vec<u8>>,
    /// The user.
    pub user: String,
    /// The user's password.
    pub password: String,
}

/// A host to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostSpec {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its build.
    pub build: u64,
    /// A boot lays its root anew.
    pub stateless: bool,
    /// Packages below this level are refused: certified, accepted, partner, community.
    pub level: String,
    /// It looks neither at signatures nor at levels of packages.
    pub force: bool,
    /// Its name servers.
    pub dns: Vec<String>,
}

impl Default for HostSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            version: "8.0.3".into(),
            build: 24_022_510,
            stateless: false,
            level: "partner".into(),
            force: false,
            dns: vec!["192.0.2.53".into()],
        }
    }
}

/// A virtual disk to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Its capacity.
    pub bytes: u64,
    /// Other machines may write it too.
    #[serde(default)]
    pub shared: bool,
    /// It is a physical-mode raw device mapping.
    #[serde(default)]
    pub physical_rdm: bool,
}

/// A machine to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Its name.
    pub name: String,
    /// The host on which it is.
    pub host: String,
    /// Its disks, labelled `disk0` and so on.
    pub disks: Vec<DiskSpec>,
    /// It has snapshots.
    #[serde(default)]
    pub snapshots: bool,
}

/// A machine, as whoever simulates it sees it.
#[derive(Clone, Debug)]
pub struct MachineInfo {
    /// Its name.
    pub name: String,
    /// The host on which it is.
    pub host: String,
    /// The files of its disks, by label.
    pub disks: BTreeMap<String, PathBuf>,
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let known = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    match (1..=40).contains(&name.len()) && name.bytes().all(known) && !name.starts_with('.') {
        true => Ok(()),
        false => bail!("`{name}` is no name: 1 to 40 letters, digits and . _ -"),
    }
}

fn of(refusal: &Refusal) -> anyhow::Error {
    anyhow::anyhow!("{}", refusal.words())
}

impl World {
    /// A site with a datastore and nothing else.
    pub fn new(options: Options) -> anyhow::Result<Arc<Self>> {
        let folder = &options.folder;
        std::fs::create_dir_all(folder)?;
        let folder = folder.canonicalize()?;
        if std::fs::read_dir(&folder)?.next().is_some() {
            bail!(
                "{} is not empty: give a folder of its own",
                folder.display()
            );
        }
        for name in ["hosts", "guests", "datastore1"] {
            std::fs::create_dir_all(folder.join(name))?;
        }
        let network = folder.join("libhostnet.so");
        std::fs::write(&network, NETWORK_LIBRARY)?;
        let signers = options.signers.as_deref();
        let signers = signers
            .map(|pem| Anchors::from_pem("signers", pem))
            .transpose()?;
        let tools = Tools {
            program: options.program,
            prefix: options.prefix,
            network,
            signers,
        };
        let random = uuid::Uuid::new_v4().into_bytes();
        let mut state = State::default();
        let store = ("datastore1".to_owned(), folder.join("datastore1"));
        state.datastores.insert("datastore-5".into(), store);
        state.last_id = 10;
        state.access = Access::new(options.user, options.password);
        Ok(Arc::new(Self {
            state: Mutex::new(state),
            tools: Arc::new(tools),
            folder,
            network: (random[0].clamp(1, 254), random[1]),
            instance: uuid::Uuid::new_v4(),
        }))
    }

    /// The folder of all of it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes a cluster; its id.
    pub fn add_cluster(&self, name: &str, is_drs_on: bool) -> anyhow::Result<String> {
        check_name(name)?;
        let mut state = self.state.lock();
        if state.clusters.values().any(|cluster| cluster.name == name) {
            bail!("a cluster `{name}` is there");
        }
        let id = format!("domain-c{}", state.next());
        let cluster = Cluster {
            name: name.to_owned(),
            is_drs_on,
            hosts: Vec::new(),
            filters: Vec::new(),
            work: Arc::default(),
        };
        state.clusters.insert(id.clone(), cluster);
        Ok(id)
    }

    /// Switches DRS.
    pub fn set_drs(&self, cluster: &str, is_on: bool) -> anyhow::Result<()> {
        let mut state = self.state.lock();
        let cluster = state.cluster_mut(cluster).map_err(|e| of(&e))?;
        cluster.is_drs_on = is_on;
        Ok(())
    }

    /// Makes a host that is in no cluster; its id.
    pub fn add_host(&self, spec: &HostSpec) -> anyhow::Result<String> {
        check_name(&spec.name)?;
        let level = AcceptanceLevel::parse(&spec.level);
        let level = level.with_context(|| format!("`{}` is no level", spec.level))?;
        let (id, number) = {
            let mut state = self.state.lock();
            if state
                .hosts
                .values()
                .any(|entry| entry.host.name == spec.name)
            {
                bail!("a host `{}` is there", spec.name);
            }
            // Hosts are never taken away, so no address is given twice.
            state.last_host = state
                .last_host
                .checked_add(1)
                .context("a site has 254 hosts")?;
            (format!("host-{}", state.next()), state.last_host)
        };
        let address = Ipv4Addr::new(127, self.network.0, self.network.1, number);
        let settings = Settings {
            version: spec.version.clone(),
            build: spec.build,
            is_reachable: true,
            clock_ahead_ms: 0,
            is_cim_running: true,
            dns_servers: spec.dns.clone(),
            is_stateless: spec.stateless,
            level,
            is_forced: spec.force,
            is_held: false,
        };
        let folder = self.folder.join("hosts").join(&id);
        let host = Host::new(
            &id,
            &spec.name,
            address,
            &folder,
            self.tools.clone(),
            settings,
        )?;
        let entry = HostEntry {
            host,
            cluster: None,
            is_in_maintenance: false,
            is_disconnected: false,
            work: Arc::default(),
        };
        self.state.lock().hosts.insert(id.clone(), entry);
        Ok(id)
    }

    /// A host.
    pub fn host(&self, id: &str) -> anyhow::Result<Arc<Host>> {
        let state = self.state.lock();
        Ok(state.host(id).map_err(|error| of(&error))?.host.clone())
    }

    /// Puts a host into a cluster, whose filters it gets; the task of that.
    pub fn join(self: &Arc<Self>, host: &str, cluster: &str) -> anyhow::Result<Value> {
        let entry = {
            let mut state = self.state.lock();
            let entry = state.host(host).map_err(|error| of(&error))?.clone();
            if let Some(other) = &entry.cluster {
                bail!("{host} is in {other}: take it out first");
            }
            let found = state.cluster_mut(cluster).map_err(|error| of(&error))?;
            found.hosts.push(host.to_owned());
            state.host_mut(host).map_err(|error| of(&error))?.cluster = Some(cluster.to_owned());
            entry.host
        };
        Ok(self.bring_in(cluster, &entry))
    }

    /// Takes a host out of its cluster; it loses the cluster's filters; the task of that. It must be in
    /// maintenance mode, so that nothing runs on it.
    pub fn leave(self: &Arc<Self>, host: &str) -> anyhow::Result<Value> {
        let entry = {
            let mut state = self.state.lock();
            let entry = state.host_mut(host).map_err(|error| of(&error))?;
            if !entry.is_in_maintenance {
                bail!("{host} is not in maintenance mode");
            }
            let Some(cluster) = entry.cluster.take() else {
                bail!("{host} is in no cluster");
            };
            let entry = entry.host.clone();
            let found = state.cluster_mut(&cluster).map_err(|error| of(&error))?;
            found.hosts.retain(|one| one != host);
            entry
        };
        Ok(self.clean(&entry, true))
    }

    /// Boots a host: in order, or as after a power failure. A stateless one gets its cluster's filters
    /// again; the task of that.
    pub fn reboot(self: &Arc<Self>, host: &str, is_crash: bool) -> anyhow::Result<Option<Value>> {
        let entry = {
            let state = self.state.lock();
            state.host(host).map_err(|error| of(&error))?.clone()
        };
        entry.host.reboot(is_crash)?;
        match entry.cluster.filter(|_| entry.host.settings().is_stateless) {
            Some(cluster) => Ok(Some(self.bring_in(&cluster, &entry.host))),
            None => Ok(None),
        }
    }

    /// An operator disconnects a host from vCenter, or connects it again.
    pub fn set_disconnected(&self, host: &str, is_disconnected: bool) -> anyhow::Result<()> {
        let mut state = self.state.lock();
        let entry = state.host_mut(host).map_err(|error| of(&error))?;
        entry.is_disconnected = is_disconnected;
        Ok(())
    }

    /// Makes a machine with empty disks, powered off; its id.
    pub fn add_vm(&self, spec: &MachineSpec) -> anyhow::Result<String> {
        check_name(&spec.name)?;
        let mut state = self.state.lock();
        state.host(&spec.host).map_err(|error| of(&error))?;
        if state.vms.values().any(|vm| vm.name == spec.name) {
            bail!("a machine `{}` is there", spec.name);
        }
        let folder = self.folder.join("datastore1").join(&spec.name);
        std::fs::create_dir_all(&folder)?;
        let mut disks = Vec::new();
        for ((number, key), disk) in (0..).zip(FIRST_DISK..).zip(&spec.disks) {
            let label = format!("disk{number}");
            let path = folder.join(format!("{label}.raw"));
            simhost::disk::create(&path, simhost::disk::Format::Raw, disk.bytes)?;
            disks.push(Disk {
                key,
                label,
                path,
                capacity_bytes: disk.bytes,
                is_shared: disk.shared,
                is_physical_rdm: disk.physical_rdm,
            });
        }
        let id = format!("vm-{}", state.next());
        let vm = Vm {
            name: spec.name.clone(),
            uuid: uuid::Uuid::new_v4(),
            host: spec.host.clone(),
            disks,
            has_snapshots: spec.snapshots,
            annotation: String::new(),
            networks: Vec::new(),
            filter: None,
            policy: None,
        };
        state.vms.insert(id.clone(), vm);
        Ok(id)
    }

    /// A machine gets snapshots, or loses them.
    pub fn set_snapshots(&self, vm: &str, has_snapshots: bool) -> anyhow::Result<()> {
        let mut state = self.state.lock();
        let entry = state.vm_mut(vm).map_err(|error| of(&error))?;
        entry.has_snapshots = has_snapshots;
        Ok(())
    }

    /// A machine.
    pub fn machine(&self, vm: &str) -> anyhow::Result<MachineInfo> {
        let state = self.state.lock();
        let vm = state.vm(vm).map_err(|error| of(&error))?;
        let disks = vm.disks.iter();
        Ok(MachineInfo {
            name: vm.name.clone(),
            host: vm.host.clone(),
            disks: disks
                .map(|disk| (disk.label.clone(), disk.path.clone()))
                .collect(),
        })
    }

    /// Whether a task has come to its end; what it failed with.
    pub fn task_end(&self, task: &Value) -> Option<Result<(), String>> {
        let id = task.get("value").and_then(Value::as_str)?;
        let document = self.document("Task", id).ok()?;
        let info = document.get("info")?;
        let words = |name: &str| {
            let text = info
                .get("error")
                .and_then(|error| error.get(name)?.as_str());
            text.unwrap_or_default().to_owned()
        };
        match info.get("state").and_then(Value::as_str) {
            Some("success") => Some(Ok(())),
            Some("error") => Some(Err(words("localizedMessage"))),
            _ => None,
        }
    }

    /// All ids with their names.
    pub fn overview(&self) -> Value {
        let state = self.state.lock();
        let clusters = state.clusters.iter().map(|(id, cluster)| {
            serde_json::json!({
                "id": id, "name": cluster.name, "drs": cluster.is_drs_on, "hosts": cluster.hosts,
            })
        });
        let hosts = state.hosts.iter().map(|(id, entry)| {
            serde_json::json!({
                "id": id, "name": entry.host.name, "cluster": entry.cluster,
                "address": entry.host.address, "in_maintenance": entry.is_in_maintenance,
            })
        });
        let vms = state.vms.iter().map(|(id, vm)| {
            let filter = vm.filter.as_ref().map(|(name, _)| name);
            serde_json::json!({"id": id, "name": vm.name, "host": vm.host, "filter": filter})
        });
        let (clusters, hosts): (Vec<_>, Vec<_>) = (clusters.collect(), hosts.collect());
        let vms: Vec<_> = vms.collect();
        serde_json::json!({"clusters": clusters, "hosts": hosts, "vms": vms})
    }

    /// Ends all processes of all hosts.
    pub fn stop(&self) {
        let hosts: Vec<Arc<Host>> = {
            let state = self.state.lock();
            state
                .hosts
                .values()
                .map(|entry| entry.host.clone())
                .collect()
        };
        for host in hosts {
            host.set(|settings| settings.is_held = false);
            host.go_down(false);
        }
    }
}
