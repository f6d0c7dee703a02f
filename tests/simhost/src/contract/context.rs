//! In which call of the filter this thread is, and what may be called from there.
//!
//! Invariant: the context is set around every call of the filter, and put back as it was afterwards.

use std::cell::Cell;

/// The contexts of the contract's thread table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// Not in the filter: a thread of the filter's own, which the contract does not know.
    None,
    /// An I/O: must not block.
    Io,
    /// A timer, or a request that is done: must not block.
    Callback,
    /// Work.
    Work,
    /// A control call.
    Control,
}

thread_local! {
    static CONTEXT: Cell<Context> = const { Cell::new(Context::None) };
}

/// Puts the context back when dropped.
#[derive(Debug)]
pub struct Entered(Context);

/// This thread goes into the filter.
pub fn enter(context: Context) -> Entered {
    Entered(CONTEXT.replace(context))
}

impl Drop for Entered {
    fn drop(&mut self) {
        CONTEXT.set(self.0);
    }
}

/// Where this thread is.
pub fn current() -> Context {
    CONTEXT.get()
}

/// Whether a service that blocks may be called.
pub fn may_block() -> bool {
    matches!(current(), Context::Work | Context::Control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_nest() {
        assert_eq!(current(), Context::None);
        let outer = enter(Context::Control);
        assert!(may_block());
        {
            let _inner = enter(Context::Io);
            assert!(!may_block());
        }
        assert_eq!(current(), Context::Control);
        drop(outer);
        assert!(!may_block());
    }
}
