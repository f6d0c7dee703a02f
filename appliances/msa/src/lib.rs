//! The management server: it knows vCenters, clusters, hosts, appliances and what is protected; it is
//! the site's certificate authority; operators and machines talk to it over REST.
//!
//! The path of a request: [`rest::server`] accepts it, [`rest::gate`] looks who calls and whether they
//! may, a handler of [`rest`] reads it into the types of [`text`], and [`store`] changes the state and
//! writes the audit in one transaction. What takes longer is an execution ([`executions`]). The
//! crate [`vcenter`] is what the server needs of a vCenter. [`assignments`] are what hosts and appliances are told,
//! [`protection`] is how machines get into a domain and what becomes of them.
//!
//! Invariant: it handles no replication data, and replication goes on without it.

pub mod alarms;
pub mod assignments;
pub mod authority;
pub mod certificates;
pub mod cli;
pub mod clock;
pub mod clusters;
pub mod connect;
pub mod executions;
pub mod inventory;
pub mod login;
pub mod outside;
pub mod packages;
pub mod protection;
pub mod rest;
pub mod secret;
pub mod service;
pub mod store;
pub mod text;
pub mod users;

pub use cli::{Command, run};
pub use vcenter;
