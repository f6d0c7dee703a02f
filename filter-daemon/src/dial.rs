//! Dialling: connections are made on a thread of their own, with a growing wait between attempts.
//!
//! Invariant: whoever wants a connection never blocks for it, and an appliance that accepts and leaves
//! again is not hammered: the wait shrinks only after a connection was of use.

use crate::connection::{Connection, Identity, LinkError};
use crate::status::Shared;
use crate::transport::Connector;
use crossbeam::channel::{Receiver, TryRecvError, bounded};
use filter_core::wire::PortRole;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// First and longest wait before another attempt.
const WAIT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// A connection that has been up for so long, with something on it, was of use.
const PROVEN: Duration = Duration::from_secs(2);

/// Makes the connections of one port.
pub struct Dialer {
    role: PortRole,
    connector: Arc<dyn Connector>,
    identity: Identity,
    shared: Arc<Shared>,
    under_way: Option<Receiver<Result<Connection, LinkError>>>,
    retry_at: Instant,
    wait: Duration,
    last_problem: String,
    /// The connection that stands was told of.
    told: bool,
}

impl Dialer {
    /// For the port of this role; whoever sleeps on that port's pipe is woken when there is news.
    pub fn new(
        role: PortRole,
        connector: Arc<dyn Connector>,
        identity: Identity,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            role,
            connector,
            identity,
            shared,
            under_way: None,
            retry_at: Instant::now(),
            wait: WAIT.0,
            last_problem: String::new(),
            told: false,
        }
    }

    /// Begins an attempt when it is time, and returns what one that was begun has led to.
    pub fn poll(&mut self) -> Option<Result<Connection, LinkError>> {
        if let Some(under_way) = &self.under_way {
            let result = match under_way.try_recv() {
                Ok(result) => result,
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => Err(LinkError::Protocol("dialling failed")),
            };
            self.under_way = None;
            return Some(result);
        }
        if Instant::now() < self.retry_at {
            return None;
        }
        let (sender, receiver) = bounded(1);
        let (role, connector) = (self.role, self.connector.clone());
        let (identity, shared) = (self.identity.clone(), self.shared.clone());
        let thread = std::thread::Builder::new().name(format!("dial-{}", role.offset()));
        // Not joined: it ends within the limits of connecting, whatever becomes of this one.
        let spawned = thread.spawn(move || {
            let _ = sender.send(Connection::open(connector.as_ref(), role, &identity));
            shared.wake_pump(role);
        });
        match spawned {
            Ok(_) => {
                self.under_way = Some(receiver);
                None
            }
            Err(error) => Some(Err(error.into())),
        }
    }

    /// How long until there is something to do here that nobody tells.
    pub fn until_next(&self) -> Duration {
        if self.under_way.is_some() {
            Duration::MAX
        } else {
            self.retry_at.saturating_duration_since(Instant::now())
        }
    }

    /// An attempt failed, or a connection was lost: waits, and says so if it is news.
    pub fn failed(&mut self, error: &LinkError) {
        self.told = false;
        let text = error.to_string();
        if text != self.last_problem {
            let address = self.connector.describe(self.role);
            tracing::warn!("connection to the appliance at {address}: {text}");
            self.last_problem = text;
        }
        // Some chance in the wait, so that the hosts of a cluster do not come back in step.
        let jitter = u64::from(std::process::id()) ^ self.identity.incarnation;
        let wait = self.wait.mul_f64(0.75 + (jitter % 32) as f64 / 64.0);
        self.retry_at = Instant::now() + wait;
        self.wait = (self.wait * 2).min(WAIT.1);
    }

    /// The connection was of use: `moved` if the appliance has just made something durable, else it
    /// only has a lane open, which counts when it lasts.
    pub fn useful(&mut self, connection: &Connection, moved: bool) {
        let proven = moved || connection.age() > PROVEN;
        if !proven || self.told {
            return;
        }
        self.told = true;
        self.wait = WAIT.0;
        self.last_problem.clear();
        let address = self.connector.describe(self.role);
        tracing::info!("connected to the appliance at {address}");
    }
}
