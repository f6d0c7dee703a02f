//! What the management server needs of a vCenter: its inventory, its tasks, its extensions, its storage
//! policies, and the methods of its IoFilterManager.
//!
//! [`Vcenter`] is the trait that the server uses; [`Client`] speaks it to a vCenter over VI-JSON
//! (`/sdk/vim25/{release}/{type}/{id}/{method}`). `tests/simcluster` answers the same paths.
//!
//! Invariant: each method declares the faults that vCenter's documentation declares for it, and no
//! other outcome is mistaken for them: everything else is [`Fault::Other`]. What comes from a vCenter is
//! text from outside: ids and versions are checked when they are read, and nothing else goes into a path.

mod api;
mod model;
mod text;
pub mod trust;
mod vijson;

pub use api::{Administration, Vcenter};
pub use model::{
    About, ClusterFilter, ClusterInfo, Connection, DiskInfo, Event, Extension, Fault, FilterDisk,
    FilterIssues, FilterOperation, FilterSource, HostFilter, HostInfo, HostIssue, HostRule,
    HostRuleset, HostService, Named, NewVm, Permission, Policy, Role, TaskId, TaskState, VibTrust,
    VmInfo,
};
pub use text::{BadText, Moid, VersionText};
pub use vijson::{Client, Login};
