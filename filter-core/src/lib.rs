//! The deciding part of jetdr: records, lanes, dirty map, state machines and protocol.
//!
//! This crate does no I/O, has no clock and starts no thread. Shells (the shim, the daemon, the
//! appliances, the simulator) feed it events and carry out the actions it returns, so the same code
//! runs in the product and in the simulator.
//!
//! The path of a write through this crate: [`disk`] decides what happens to it, [`record`] is what
//! it becomes, [`lane`] carries it to the daemon, [`wire`] and [`session`] carry it to the appliance.
#![cfg_attr(not(any(test, loom, feature = "mapping")), no_std)]
#![warn(missing_docs)]

extern crate alloc;

pub mod crc;
pub mod disk;
pub mod lane;
pub mod lineage;
#[cfg(feature = "mapping")]
pub mod mapping;
pub mod mutant;
pub mod position;
pub mod record;
pub mod session;
pub mod sidecar;
pub mod wire;
