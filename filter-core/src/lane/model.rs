//! The ring's orderings once more, the same file, over loom's atomics: what the model checker runs.
//!
//! Invariant: nothing is written twice: [`ring`] here is `ring.rs`, with other atomics beside it.
#![allow(missing_docs)]

/// Loom's atomics.
pub mod sync {
    pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
}

#[path = "ring.rs"]
pub mod ring;
