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

#[cfg(test)]
mod tests {
    use super::*;

    struct Worse;

    impl Drop for Worse {
        fn drop(&mut self) {
            panic!("while the payload is dropped");
        }
    }

    /// As the host would call it: a panic that got this far would end the VM's process.
    extern "C" fn called_by_a_host(how: u32) -> i32 {
        any(|| match how {
            0 => 7,
            1 => panic!("a defect"),
            _ => std::panic::panic_any(Worse),
        })
        .unwrap_or(-1)
    }

    #[test]
    fn no_panic_gets_out() {
        assert_eq!([0, 1, 2].map(|how| called_by_a_host(how)), [7, -1, -1]);
    }

    /// Whatever the host can call runs inside a guard: read off the source, so that a function that is
    /// added without one is noticed.
    #[test]
    fn every_function_of_the_border_is_guarded() {
        let guards = [
            "guard::any(",
            "guard::disk(",
            "control(",
            "with_info(",
            "with_disk(",
        ];
        let mut seen = 0;
        for source in [
            include_str!("lib.rs"),
            include_str!("drive.rs"),
            include_str!("hold.rs"),
        ] {
            for part in source.split("extern \"C\" fn ").skip(1) {
                let (name, _) = part.split_once('(').unwrap_or_default();
                if name.is_empty() {
                    continue; // the type of a function
                }
                let body = part.split("\n}\n").next().unwrap_or_default();
                let guarded = guards.iter().any(|guard| body.contains(guard));
                assert!(guarded, "{name} runs without a guard");
                seen += 1;
            }
        }
        assert!(seen >= 19, "{seen} functions were found");
    }
}
