//! What the server needs of a vCenter: its inventory, its tasks, and the methods of its IoFilterManager.
//!
//! Behind a trait, so that what uses it can be shown to work without one. There is no implementation
//! for a real vCenter yet.
//!
//! Invariant: each method declares the faults that vCenter's documentation declares for it, and no
//! other outcome is mistaken for them: everything else is [`Fault::Other`].

use crate::text::{Moid, VersionText};

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
    /// Its time, in ms since 1970.
    pub now_ms: i64,
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

/// A vCenter. Calls block; one that starts a task answers when the task is made, not when it is done.
pub trait Vcenter: Send + Sync {
    /// What it is.
    fn about(&self) -> Result<About, Fault>;

    /// Its clusters. A host outside a cluster is in none.
    fn clusters(&self) -> Result<Vec<ClusterInfo>, Fault>;

    /// The hosts of a cluster. [`Fault::NotFound`]: no such cluster.
    fn hosts(&self, cluster: &Moid) -> Result<Vec<HostInfo>, Fault>;

    /// The virtual machines of a cluster. [`Fault::NotFound`]: no such cluster.
    fn vms(&self, cluster: &Moid) -> Result<Vec<VmInfo>, Fault>;

    /// Where a task stands. [`Fault::NotFound`]: vCenter has forgotten it; look for what it did.
    fn task(&self, task: &TaskId) -> Result<TaskState, Fault>;

    /// Asks for the end of a task. One that cannot be ended goes on.
    fn cancel_task(&self, task: &TaskId) -> Result<(), Fault>;

    /// Installs a filter on all hosts of a cluster; each host fetches `vib_url` itself.
    /// [`Fault::InvalidArgument`]: not a cluster; [`Fault::AlreadyExists`].
    fn install_filter(&self, cluster: &Moid, vib_url: &str) -> Result<TaskId, Fault>;

    /// Removes a filter from a cluster. [`Fault::InvalidArgument`], [`Fault::NotFound`],
    /// [`Fault::FilterInUse`], [`Fault::InvalidState`] (DRS is off).
    fn uninstall_filter(&self, cluster: &Moid, filter: &str) -> Result<TaskId, Fault>;

    /// Replaces a filter on a cluster. [`Fault::InvalidArgument`], [`Fault::NotFound`],
    /// [`Fault::InvalidState`].
    fn upgrade_filter(&self, cluster: &Moid, filter: &str, vib_url: &str) -> Result<TaskId, Fault>;

    /// The filters on a cluster. vCenter may answer nothing instead of an empty list: that is none.
    fn filters(&self, cluster: &Moid) -> Result<Vec<ClusterFilter>, Fault>;

    /// What is wrong with a filter, host by host; to be asked after a task failed.
    /// [`Fault::NotFound`].
    fn filter_issues(&self, cluster: &Moid, filter: &str) -> Result<FilterIssues, Fault>;

    /// The disks that use a filter. [`Fault::NotFound`].
    fn disks_using(&self, cluster: &Moid, filter: &str) -> Result<Vec<FilterDisk>, Fault>;

    /// Tries again what failed, on all hosts of a cluster. [`Fault::NotFound`].
    fn resolve_on_cluster(&self, cluster: &Moid, filter: &str) -> Result<TaskId, Fault>;

    /// Tries again what failed, on one host. [`Fault::NotFound`].
    fn resolve_on_host(&self, host: &Moid, filter: &str) -> Result<TaskId, Fault>;
}
