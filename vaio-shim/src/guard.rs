//! The border: no panic crosses it.
//!
//! Invariant: every function that the host can call runs its body inside one of these.

use crate::instance::Replicated;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Runs `body`; `None` if it panicked. The panic's payload is leaked rather than dropped, since a
/// payload's own drop may panic again.
pub fn any<R>(body: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => Some(result),
        Err(payload) => {
            std::mem::forget(payload);
            None
        }
    }
}

/// Runs `body` for a disk; if it panics the disk fails open.
pub fn disk<R>(disk: &Arc<Replicated>, what: &str, body: impl FnOnce() -> R) -> Option<R> {
    let result = any(body);
    if result.is_none() {
        // Failing open can panic too (the defect may lie anywhere); then it is at least stopped here.
        any(|| disk.fail_open(what));
    }
    result
}
