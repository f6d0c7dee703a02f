//! The lane: a shared-memory ring, one per disk.
pub mod copy;
