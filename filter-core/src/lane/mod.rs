//! The lane: a shared-memory ring, one per disk, one producer process and one consumer process.
//!
//! Invariant: no memory of one side can wedge the other. Each side keeps its own truth in private
//! memory and checks the other's words before use; a lane that fails a check is restarted, by a
//! handshake in which the producer names the position from which the stream is whole again.
//!
//! The mapping, in pages of 4 KiB: identity (written once), producer page, in-flight table, consumer
//! page, dirty map, data. No Rust reference is ever made to memory that the peer may write, except
//! to atomics; payloads move by raw copies.
//!
//! | file | holds |
//! |---|---|
//! | [`ring`] | the memory orderings: P1..P5 and C1..C7, generic so that loom checks the same code |
//! | [`layout`] | the pages, their words, the identity |
//! | [`producer`] | reserve, copy, publish |
//! | [`consumer`] | poll, check, release |
//! | [`walk`] | stepping through records, the scan at attach |
//! | [`inflight`] | writes that were passed down and not yet completed |
//! | [`dirty`] | the dirty map |
//! | [`opening`] | which opening the producer is, and what it goes back to |
//! | [`attach`] | what is found at attach, and what follows from it |
//! | [`copy`] | CRC32C and the copy that computes it |

pub mod attach;
pub mod consumer;
pub mod copy;
pub mod dirty;
#[cfg(all(any(test, feature = "sim"), not(loom)))]
pub mod heap;
pub mod inflight;
pub mod layout;
pub mod opening;
pub mod producer;
pub mod ring;
pub mod walk;

#[cfg(all(test, not(loom)))]
#[path = "damage_tests.rs"]
mod damage_tests;
#[cfg(all(test, not(loom)))]
#[path = "hostile_tests.rs"]
mod hostile_tests;
#[cfg(all(test, not(loom)))]
#[path = "model_tests.rs"]
mod model_tests;
#[cfg(all(test, not(loom)))]
#[allow(clippy::unwrap_used)]
pub(crate) mod test_lane;

#[cfg(loom)]
pub mod model;

/// The atomics that the lane's words are made of.
pub mod sync {
    pub use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
}
