//! The simulated cluster: a vCenter, and hosts that really install packages and run virtual machines.
//!
//! | module | holds |
//! |---|---|
//! | [`host`] | a host: root folder, address, firewall, packages, processes |
//! | [`world`] | what vCenter knows and does: clusters, tasks, filters, machines |
//! | [`server`] | vCenter's port: VI-JSON |
//! | [`control`] | what an operator, a cable or a power failure does |
//! | [`cli`] | the commands |
//!
//! Invariant: everything lies below one folder and runs on loopback; when the site ends, so do all of its
//! processes.

pub mod cli;
pub mod control;
pub mod host;
pub mod refusal;
pub mod server;
pub mod world;

pub use server::Server;
pub use world::{DiskSpec, HostSpec, MachineSpec, Options, World};
