//! Connections between hosts and the appliance: in order, with delay, and with ends that learn of a
//! failure at different times.
//!
//! Invariant: what arrives on a connection is a prefix of what was sent on it; after an end has given up
//! what is still under way may arrive at the other.

use drva::outbox::Outbox;
use filter_core::wire::{Message, PortRole};
use std::collections::VecDeque;
use std::sync::Arc;

/// A frame to the appliance.
#[derive(Clone, Debug)]
pub enum Frame {
    /// A message.
    Message(Message),
    /// Whole records.
    Data(Vec<u8>),
    /// The connection's end.
    End,
}

/// Bytes that may be under way to the appliance on one connection.
pub const WINDOW_BYTES: usize = 1 << 20;

/// A connection.
pub struct Connection {
    /// The host.
    pub host: usize,
    /// Its incarnation of the daemon.
    pub daemon: u64,
    /// Its port.
    pub role: PortRole,
    /// The daemon still has it.
    pub daemon_has: bool,
    /// The appliance still has it.
    pub appliance_has: bool,
    /// Under way to the appliance.
    pub up: VecDeque<(u32, Frame)>,
    /// Bytes of that.
    pub up_bytes: usize,
    /// Under way to the daemon; `None`: the end.
    pub down: VecDeque<Option<(u32, Message)>>,
    /// A delivery is planned.
    pub up_armed: bool,
    /// As above.
    pub down_armed: bool,
    /// The appliance's log has no room: nothing is read.
    pub blocked: bool,
    /// What the appliance's disks want to be sent.
    pub outbox: Arc<Outbox>,
}

impl Connection {
    /// A new one.
    pub fn new(host: usize, daemon: u64, role: PortRole) -> Self {
        Self {
            host,
            daemon,
            role,
            daemon_has: true,
            appliance_has: true,
            up: VecDeque::new(),
            up_bytes: 0,
            down: VecDeque::new(),
            up_armed: false,
            down_armed: false,
            blocked: false,
            outbox: Arc::new(Outbox::new()),
        }
    }

    /// Whether more may be sent to the appliance.
    pub const fn has_window(&self) -> bool {
        self.up_bytes < WINDOW_BYTES
    }
}
