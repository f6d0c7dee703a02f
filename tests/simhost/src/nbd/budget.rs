//! How much of the host's memory clients may take.
//!
//! Invariant: a connection that has nothing under way may always begin one request, and one within
//! its own share never depends on others: who takes much waits for much, and harms nobody else.

use super::connection::Connection;
use parking_lot::Mutex;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The handshake, from the first byte to the last.
    pub handshake: Duration,
    /// How long the last replies of a connection may take when it ends.
    pub linger: Duration,
    /// Most connections at once.
    pub connections: usize,
    /// Most requests of one connection under way at once.
    pub requests: usize,
    /// Most bytes of one connection: data under way, and replies that it has not taken.
    pub connection_bytes: usize,
    /// Bytes of a connection that do not count against `shared_bytes`.
    pub own_bytes: usize,
    /// Most bytes of all connections together, beyond each one's own.
    pub shared_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            linger: Duration::from_secs(10),
            connections: 256,
            requests: 1024,
            connection_bytes: 64 << 20,
            own_bytes: 4 << 20,
            shared_bytes: 512 << 20,
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    taken_bytes: usize,
    waiting: Vec<Weak<Connection>>,
}

/// The part that all connections of a server share.
#[derive(Debug)]
pub struct Budget {
    pub(super) limits: Limits,
    shared: Mutex<Shared>,
}

impl Budget {
    /// Nothing taken.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            shared: Mutex::default(),
        }
    }

    /// Takes bytes for a connection. `false`: there are not enough, the connection is told when to
    /// try again; `must`: they are taken in any case.
    pub(super) fn take(&self, bytes: usize, must: bool, of: &Arc<Connection>) -> bool {
        let mut shared = self.shared.lock();
        let taken = shared.taken_bytes.saturating_add(bytes);
        if taken <= self.limits.shared_bytes || must {
            shared.taken_bytes = taken;
            return true;
        }
        let of = Arc::downgrade(of);
        if !shared.waiting.iter().any(|known| known.ptr_eq(&of)) {
            shared.waiting.push(of);
        }
        false
    }

    /// Gives bytes back. No connection may be locked by the caller.
    pub(super) fn give_back(&self, bytes: usize) {
        let waiting = {
            let mut shared = self.shared.lock();
            shared.taken_bytes = shared.taken_bytes.saturating_sub(bytes);
            std::mem::take(&mut shared.waiting)
        };
        for connection in waiting.iter().filter_map(Weak::upgrade) {
            connection.look_again();
        }
    }
}
