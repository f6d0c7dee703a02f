//! The trait through which a vCenter is used.

use crate::model::{
    About, ClusterFilter, ClusterInfo, Event, Extension, Fault, FilterDisk, FilterIssues,
    FilterSource, HostInfo, Named, NewVm, Permission, Policy, Role, TaskId, TaskState, VibTrust,
    VmInfo,
};
use crate::text::Moid;

/// A vCenter. Calls block; one that starts a task answers when the task is made, not when it is done.
/// Every call may also fail with [`Fault::NotAuthenticated`], [`Fault::NoPermission`], [`Fault::Other`].
pub trait Vcenter: Send + Sync {
    /// What it is.
    fn about(&self) -> Result<About, Fault>;

    /// Its clusters. A host outside a cluster is in none.
    fn clusters(&self) -> Result<Vec<ClusterInfo>, Fault>;

    /// The hosts of a cluster. [`Fault::NotFound`]: no such cluster.
    fn hosts(&self, cluster: &Moid) -> Result<Vec<HostInfo>, Fault>;

    /// The virtual machines of a cluster. [`Fault::NotFound`]: no such cluster.
    fn vms(&self, cluster: &Moid) -> Result<Vec<VmInfo>, Fault>;

    /// Virtual machines with this name, in whatever folder of whatever datacenter.
    fn vms_named(&self, name: &str) -> Result<Vec<Moid>, Fault>;

    /// Where a task stands. [`Fault::NotFound`]: vCenter has forgotten it; look for what it did.
    fn task(&self, task: &TaskId) -> Result<TaskState, Fault>;

    /// Asks for the end of a task. One that cannot be ended goes on ([`Fault::InvalidState`] if it has
    /// ended already). [`Fault::NotFound`].
    fn cancel_task(&self, task: &TaskId) -> Result<(), Fault>;

    /// What happened lately, oldest first; at most 1000.
    fn events(&self) -> Result<Vec<Event>, Fault>;

    /// Installs a filter on all hosts of a cluster; each host fetches `vib_url` itself.
    /// [`Fault::InvalidArgument`]: not a cluster; [`Fault::AlreadyExists`].
    fn install_filter(
        &self,
        cluster: &Moid,
        vib_url: &str,
        trust: &VibTrust,
    ) -> Result<TaskId, Fault>;

    /// Removes a filter from a cluster. [`Fault::InvalidArgument`], [`Fault::NotFound`],
    /// [`Fault::FilterInUse`], [`Fault::InvalidState`] (DRS is off).
    fn uninstall_filter(&self, cluster: &Moid, filter: &str) -> Result<TaskId, Fault>;

    /// Replaces a filter on a cluster. [`Fault::InvalidArgument`], [`Fault::NotFound`],
    /// [`Fault::InvalidState`].
    fn upgrade_filter(
        &self,
        cluster: &Moid,
        filter: &str,
        vib_url: &str,
        trust: &VibTrust,
    ) -> Result<TaskId, Fault>;

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

    /// Puts a filter on disks of a virtual machine. [`Fault::NotFound`]: no such machine;
    /// [`Fault::InvalidArgument`]: no such disk, policy or filter. The task fails with
    /// [`Fault::InvalidState`] while the machine has snapshots or moves.
    fn attach_filter(
        &self,
        vm: &Moid,
        disk_keys: &[i32],
        filter: &FilterSource,
    ) -> Result<TaskId, Fault>;

    /// Takes all filters off disks of a virtual machine; faults as for [`Vcenter::attach_filter`].
    fn detach_filters(&self, vm: &Moid, disk_keys: &[i32]) -> Result<TaskId, Fault>;

    /// The storage policies for virtual disks.
    fn policies(&self) -> Result<Vec<Policy>, Fault>;

    /// Makes a storage policy that puts a filter on disks. `properties` are the filter's.
    /// [`Fault::AlreadyExists`]: one has the name.
    fn create_policy(
        &self,
        name: &str,
        filter: &str,
        properties: &[(String, String)],
    ) -> Result<Policy, Fault>;

    /// Deletes a storage policy. [`Fault::NotFound`]; [`Fault::InvalidState`]: disks have it.
    fn delete_policy(&self, id: &str) -> Result<(), Fault>;

    /// Puts a host into maintenance mode: its running machines are moved away first, if DRS may.
    /// [`Fault::NotFound`]; the task fails with [`Fault::InvalidState`] if they cannot be moved.
    fn enter_maintenance(&self, host: &Moid) -> Result<TaskId, Fault>;

    /// Takes a host out of maintenance mode. [`Fault::NotFound`].
    fn exit_maintenance(&self, host: &Moid) -> Result<TaskId, Fault>;

    /// The extension with a key.
    fn extension(&self, key: &str) -> Result<Option<Extension>, Fault>;

    /// Registers an extension. [`Fault::InvalidArgument`]: one with the key is there.
    fn register_extension(&self, extension: &Extension) -> Result<(), Fault>;

    /// Takes an extension out. [`Fault::NotFound`].
    fn unregister_extension(&self, key: &str) -> Result<(), Fault>;

    /// The datastores of a cluster. [`Fault::NotFound`]: no such cluster.
    fn datastores(&self, cluster: &Moid) -> Result<Vec<Named>, Fault>;

    /// The networks of a cluster. [`Fault::NotFound`]: no such cluster.
    fn networks(&self, cluster: &Moid) -> Result<Vec<Named>, Fault>;

    /// Tasks about a cluster that are queued or running: after a restart, what was asked for before.
    /// [`Fault::NotFound`]: no such cluster.
    fn cluster_tasks(&self, cluster: &Moid) -> Result<Vec<TaskId>, Fault>;

    /// Sets an advanced option of a host; an empty value is as good as none.
    /// [`Fault::NotFound`]: no such host, or it has no such option; [`Fault::Other`]: vCenter does not reach it.
    fn set_host_option(&self, host: &Moid, key: &str, value: &str) -> Result<(), Fault>;
}

/// What an installation asks of a vCenter beyond what the server asks day by day. A trait of its own, so that
/// nothing in the server can ask for it. There is no way to make a user: vCenter's users are made by its
/// single sign-on, which has an interface of its own.
pub trait Administration: Vcenter {
    /// The roles, vCenter's own among them.
    fn roles(&self) -> Result<Vec<Role>, Fault>;

    /// Makes a role; its id. [`Fault::AlreadyExists`]: one has the name; [`Fault::InvalidArgument`]: no such
    /// privilege.
    fn add_role(&self, name: &str, privileges: &[&str]) -> Result<i32, Fault>;

    /// Removes a role that nobody has. [`Fault::NotFound`]; [`Fault::InvalidState`]: somebody has it.
    fn remove_role(&self, role: i32) -> Result<(), Fault>;

    /// Who has which role on all of the inventory: what is set on the root folder itself.
    fn permissions(&self) -> Result<Vec<Permission>, Fault>;

    /// Gives a user a role on all of the inventory; one that the user had there is replaced.
    /// [`Fault::NotFound`]: no such user or role.
    fn set_permission(&self, user: &str, role: i32) -> Result<(), Fault>;

    /// Takes a user's role on all of the inventory away. [`Fault::NotFound`]: the user has none there.
    fn remove_permission(&self, user: &str) -> Result<(), Fault>;

    /// Makes a virtual machine without disks, powered off. [`Fault::NotFound`]: no such cluster or network.
    /// The task fails with [`Fault::AlreadyExists`] if the name is taken.
    fn create_vm(&self, new: &NewVm) -> Result<TaskId, Fault>;

    /// What is noted with a virtual machine; empty, if nothing is. [`Fault::NotFound`].
    fn annotation(&self, vm: &Moid) -> Result<String, Fault>;

    /// Deletes a virtual machine and its files. [`Fault::NotFound`]; the task fails with
    /// [`Fault::InvalidState`] while it runs.
    fn destroy_vm(&self, vm: &Moid) -> Result<TaskId, Fault>;
}
