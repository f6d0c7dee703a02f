//! What is told of a vCenter and of what is in it.

use crate::text::{Moid, VersionText};
use std::fmt;

/// What vCenter refuses a call with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// An argument is wrong; of the cluster methods also: it is no cluster but a single host.
    #[error("vCenter refuses an argument: {0}")]
    InvalidArgument(String),
    /// A filter of this name is on the cluster.
    #[error("the filter is on the cluster already")]
    AlreadyExists,
    /// No such filter, cluster, host or task.
    #[error("vCenter does not know {0}")]
    NotFound(String),
    /// Virtual disks still use the filter.
    #[error("disks still use the filter: {0:?}")]
    FilterInUse(Vec<FilterDisk>),
    /// The cluster is not in a state for this; of an uninstallation: DRS is off.
    #[error("the cluster is not in a state for this: {0}")]
    InvalidState(String),
    /// Name and password, or a session, were not taken.
    #[error("vCenter does not take the login")]
    NotAuthenticated,
    /// The user may not.
    #[error("vCenter's user may not do this: it takes {0}")]
    NoPermission(String),
    /// It cannot be reached, or does not answer as it should.
    #[error("vCenter: {0}")]
    Other(String),
}

/// A virtual disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterDisk {
    /// Its virtual machine.
    pub vm: Moid,
    /// Its key in that machine.
    pub disk_key: i32,
}

/// What vCenter is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Its version.
    pub version: VersionText,
    /// Its build.
    pub build: String,
    /// Its own id, which stays when its name changes.
    pub instance_uuid: uuid::Uuid,
    /// Its time, in ms since 1970.
    pub now_ms: i64,
}

/// A cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterInfo {
    /// Its id.
    pub moid: Moid,
    /// Its name.
    pub name: String,
    /// Whether DRS moves machines by itself: an uninstallation needs it.
    pub drs_enabled: bool,
    /// Its hosts.
    pub hosts: Vec<Moid>,
    /// Its datastores.
    pub datastores: Vec<Moid>,
}

/// Something that is known by a name: a datastore, a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Its id.
    pub moid: Moid,
    /// Its name.
    pub name: String,
}

/// Whether vCenter reaches a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// It does.
    Connected,
    /// An operator disconnected it.
    Disconnected,
    /// It does not.
    NotResponding,
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInfo {
    /// Its id.
    pub moid: Moid,
    /// Its name in DNS, or its address.
    pub name: String,
    /// Whether vCenter reaches it.
    pub connection: Connection,
    /// Whether it is in maintenance mode.
    pub in_maintenance: bool,
    /// Its version.
    pub version: VersionText,
    /// Its build.
    pub build: u64,
    /// Its time, in ms since 1970. Nothing: vCenter does not reach it.
    pub now_ms: Option<i64>,
    /// The addresses of its name servers; none if it has none.
    pub dns_servers: Vec<String>,
    /// Its services, as far as vCenter tells of them.
    pub services: Vec<HostService>,
    /// The rulesets of its firewall.
    pub rulesets: Vec<HostRuleset>,
    /// The I/O filters on it.
    pub filters: Vec<HostFilter>,
}

impl HostInfo {
    /// Whether its CIM service runs.
    pub fn is_cim_running(&self) -> bool {
        let is_cim = |service: &&HostService| service.key == "sfcbd-watchdog";
        self.services
            .iter()
            .any(|one| is_cim(&one) && one.is_running)
    }
}

/// A service of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostService {
    /// Its key, like `sfcbd-watchdog` or `iofilterd-jetdr`.
    pub key: String,
    /// Whether it runs.
    pub is_running: bool,
}

/// A ruleset of a host's firewall.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRuleset {
    /// Its key.
    pub key: String,
    /// Whether it is in force.
    pub is_enabled: bool,
    /// What it opens.
    pub rules: Vec<HostRule>,
}

/// Ports that a ruleset opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRule {
    /// To the host instead of from it.
    pub is_inbound: bool,
    /// First and last port.
    pub ports: (u16, u16),
}

/// An I/O filter on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFilter {
    /// Its id: `<VENDOR>_<name>_<version>`.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Whether it can be used.
    pub is_available: bool,
}

/// A virtual disk of a machine, as far as protection asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Its key in the machine.
    pub key: i32,
    /// What people see: `Hard disk 1`.
    pub label: String,
    /// Its capacity.
    pub capacity_bytes: u64,
    /// Whether other machines may write it too.
    pub is_shared: bool,
    /// Whether it is a physical-mode raw device mapping.
    pub is_physical_rdm: bool,
    /// Filters on it, by name.
    pub filters: Vec<String>,
    /// Where its content lies: `[datastore] folder/file.vmdk`.
    pub path: String,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmInfo {
    /// Its id.
    pub moid: Moid,
    /// Its name.
    pub name: String,
    /// Its instance UUID.
    pub instance_uuid: uuid::Uuid,
    /// The host on which it is.
    pub host: Option<Moid>,
    /// Whether it runs.
    pub is_powered_on: bool,
    /// Whether it has snapshots: its policy cannot be changed then.
    pub has_snapshots: bool,
    /// Its disks.
    pub disks: Vec<DiskInfo>,
}

/// A task that vCenter works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskId(pub Moid);

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a task stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// It waits.
    Queued,
    /// It runs; percent done, if vCenter says.
    Running(Option<u8>),
    /// It is done.
    Success,
    /// It failed.
    Error(Fault),
}

/// What is done with a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterOperation {
    /// It is installed.
    Install,
    /// It is removed.
    Uninstall,
    /// It is replaced.
    Upgrade,
}

/// A filter on a cluster. Its id is `<VENDOR>_<name>_<version>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterFilter {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Who made it.
    pub vendor: String,
    /// Its version.
    pub version: String,
    /// What was last done with it.
    pub operation: FilterOperation,
    /// Where hosts get it.
    pub vib_url: Option<String>,
}

/// Whom a host believes to be the server of a VIB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VibTrust {
    /// Whom the host's own trusted authorities vouch for.
    HostAuthorities,
    /// Who has just this certificate (PEM).
    Pinned(String),
    /// Anybody.
    Anybody,
}

/// By what a filter is put on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FilterSource {
    /// A storage policy, by its id.
    Policy(String),
    /// The filter itself.
    Filter {
        /// Its name.
        name: String,
        /// Its properties.
        properties: Vec<(String, String)>,
    },
}

/// A storage policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its number: later ones have higher ones.
    pub key: i64,
    /// vCenter's name for its kind.
    pub kind: String,
    /// When, in ms since 1970.
    pub at_ms: i64,
    /// What, in words.
    pub message: String,
}

/// A plug-in's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its key, like `com.example.jetdr`.
    pub key: String,
    /// What people see.
    pub label: String,
    /// Who made it.
    pub company: String,
    /// Its version.
    pub version: VersionText,
    /// Where its server is.
    pub url: Option<String>,
}

/// What is wrong with a filter on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIssue {
    /// The host.
    pub host: Moid,
    /// What is wrong, as vCenter says it.
    pub issues: Vec<String>,
}

/// What is wrong with a filter on a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterIssues {
    /// What was being done.
    pub operation: FilterOperation,
    /// Host by host.
    pub hosts: Vec<HostIssue>,
}

/// A role: privileges under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// Its id.
    pub id: i32,
    /// Its name.
    pub name: String,
    /// What it allows, like `Host.Config.Patch`.
    pub privileges: Vec<String>,
}

/// Who has a role on all of the inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permission {
    /// The user, or the group.
    pub principal: String,
    /// Whether it is a group.
    pub is_group: bool,
    /// The role's id.
    pub role: i32,
}

/// A virtual machine that is to be made: without disks, powered off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVm {
    /// Its name.
    pub name: String,
    /// The cluster.
    pub cluster: Moid,
    /// Where its files go: a datastore's name.
    pub datastore: String,
    /// The network of its only card.
    pub network: Moid,
    /// A note for people.
    pub annotation: String,
}
