//! Listeners, and the life of connections.
//!
//! Invariant: every connection has a slot, which goes with its thread however that ends, or with the
//! failure to start it; the slot's number is unique over all listeners. Stopping needs nothing but this
//! process: no file, no connection of its own.

use super::budget::{Budget, Limits};
use super::connection::Connection;
use super::engine::Engine;
use super::handshake::{self, Agreed, HandshakeError};
use super::stream::Stream;
use super::transmit::transmit;
use crate::socket::{ListenError, TcpSocket, UnixSocket};
use parking_lot::Mutex;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// The exports of a server, by name. The first is the default one.
#[derive(Clone, Default)]
pub struct Exports(Arc<Vec<(String, Arc<dyn Engine>)>>);

impl Exports {
    /// These exports.
    pub fn new(exports: Vec<(String, Arc<dyn Engine>)>) -> Self {
        Self(Arc::new(exports))
    }

    /// An export; the empty name is the first.
    pub fn find(&self, name: &str) -> Option<Arc<dyn Engine>> {
        let found = self.0.iter().find(|(known, _)| known == name);
        let found = if name.is_empty() {
            self.0.first()
        } else {
            found
        };
        found.map(|(_, engine)| engine.clone())
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Listen {
    /// A TCP address; port 0 takes a free one.
    Tcp(SocketAddr),
    /// A unix socket; a socket that is there is replaced if nobody listens on it.
    Unix(PathBuf),
}

enum Listener {
    Tcp(TcpSocket),
    Unix(UnixSocket),
}

impl Listener {
    fn bind(listen: &Listen) -> Result<Self, ListenError> {
        match listen {
            Listen::Tcp(address) => TcpSocket::bind(*address).map(Self::Tcp),
            Listen::Unix(path) => UnixSocket::bind(path).map(Self::Unix),
        }
    }

    fn address(&self) -> Listen {
        match self {
            Self::Tcp(socket) => Listen::Tcp(socket.address()),
            Self::Unix(socket) => Listen::Unix(socket.path().to_owned()),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(socket) => {
                let stream = socket.accept()?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(socket) => Ok(Stream::Unix(socket.accept()?)),
        }
    }

    fn wake(&self) {
        match self {
            Self::Tcp(socket) => socket.wake(),
            Self::Unix(socket) => socket.wake(),
        }
    }
}

/// An open connection, seen from outside.
struct Open {
    id: u64,
    stream: Stream,
    /// From the end of the handshake.
    connection: Weak<Connection>,
}

struct Shared {
    exports: Exports,
    budget: Arc<Budget>,
    stopping: AtomicBool,
    next: AtomicU64,
    connections: Mutex<Vec<Open>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A connection's place among the connections: given up, and the connection ended, when dropped.
struct Slot {
    shared: Arc<Shared>,
    id: u64,
}

impl Slot {
    /// `None`: all are taken.
    fn take(shared: &Arc<Shared>, stream: Stream) -> Option<Self> {
        let mut connections = shared.connections.lock();
        if connections.len() >= shared.budget.limits.connections {
            return None;
        }
        let id = shared.next.fetch_add(1, Ordering::Relaxed); // unique is all it must be
        connections.push(Open {
            id,
            stream,
            connection: Weak::new(),
        });
        Some(Self {
            shared: shared.clone(),
            id,
        })
    }

    /// The handshake is over. `false`: the server is stopping, and may have passed this one by.
    fn transmits(&self, connection: &Arc<Connection>) -> bool {
        let mut connections = self.shared.connections.lock();
        if let Some(open) = connections.iter_mut().find(|open| open.id == self.id) {
            open.connection = Arc::downgrade(connection);
        }
        !self.shared.stopping.load(Ordering::Acquire) // pairs with the swap in `stop`
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut connections = self.shared.connections.lock();
        if let Some(at) = connections.iter().position(|open| open.id == self.id) {
            connections.swap_remove(at).stream.shutdown();
        }
    }
}

/// A running server. Stopped when dropped.
pub struct Server {
    shared: Arc<Shared>,
    acceptors: Vec<(Arc<Listener>, JoinHandle<()>)>,
    addresses: Vec<Listen>,
}

impl Server {
    /// Listens, and serves the exports to whoever connects.
    pub fn start(listens: &[Listen], exports: Exports) -> Result<Self, ListenError> {
        Self::start_with(listens, exports, Limits::default())
    }

    /// The same with other limits.
    pub fn start_with(
        listens: &[Listen],
        exports: Exports,
        limits: Limits,
    ) -> Result<Self, ListenError> {
        let mut server = Self {
            shared: Arc::new(Shared {
                exports,
                budget: Arc::new(Budget::new(limits)),
                stopping: AtomicBool::new(false),
                next: AtomicU64::new(0),
                connections: Mutex::default(),
                threads: Mutex::default(),
            }),
            acceptors: Vec::new(),
            addresses: Vec::new(),
        };
        for listen in listens {
            let listener = Arc::new(Listener::bind(listen)?);
            server.addresses.push(listener.address());
            let (of, shared) = (listener.clone(), server.shared.clone());
            let thread = Builder::new()
                .name("nbd-accept".into())
                .spawn(move || accept_loop(&of, &shared))
                .map_err(ListenError::io(format!("{listen:?}")))?;
            server.acceptors.push((listener, thread));
        }
        Ok(server)
    }

    /// Where it really listens.
    pub fn addresses(&self) -> &[Listen] {
        &self.addresses
    }

    /// Connections that are open now.
    pub fn connections(&self) -> usize {
        self.shared.connections.lock().len()
    }

    /// Stops listening, ends all connections, waits for their threads.
    pub fn stop(&mut self) {
        if self.shared.stopping.swap(true, Ordering::AcqRel) {
            return; // whoever came first does it
        }
        for (listener, _) in &self.acceptors {
            listener.wake();
        }
        for (_, acceptor) in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        for open in self.shared.connections.lock().iter() {
            open.stream.shutdown();
            // Its thread may wait for room, not for the client.
            if let Some(connection) = open.connection.upgrade() {
                connection.abandon();
            }
        }
        let threads = std::mem::take(&mut *self.shared.threads.lock());
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept_loop(listener: &Listener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::Acquire) {
            break; // pairs with the swap in `stop`
        }
        let both = accepted.and_then(|stream| Ok((stream.try_clone()?, stream)));
        let (second, stream) = match both {
            Ok(both) => both,
            Err(error) => {
                tracing::warn!("NBD: cannot accept a connection: {error}");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let Some(slot) = Slot::take(shared, second) else {
            let open = shared.budget.limits.connections;
            tracing::warn!("NBD: refused a connection: {open} are open");
            continue;
        };
        // The slot is the thread's: it goes with it, or here if there is none.
        let run = move || {
            serve_connection(stream, &slot);
            drop(slot);
        };
        match Builder::new().name("nbd-client".into()).spawn(run) {
            Ok(thread) => {
                let mut threads = shared.threads.lock();
                threads.retain(|thread| !thread.is_finished());
                threads.push(thread);
            }
            Err(error) => tracing::warn!("NBD: cannot serve a connection: no thread: {error}"),
        }
    }
}

fn serve_connection(stream: Stream, slot: &Slot) {
    let shared = &slot.shared;
    let deadline = Instant::now() + shared.budget.limits.handshake;
    let agreed = match handshake::shake(&stream, &shared.exports, deadline) {
        Ok(agreed) => agreed,
        Err(HandshakeError::Aborted) => return,
        Err(HandshakeError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof => return,
        Err(error) => {
            tracing::warn!("NBD: handshake failed: {error}");
            return;
        }
    };
    let budget = shared.budget.clone();
    let connection = Arc::new(Connection::new(stream, agreed.structured, budget));
    if !slot.transmits(&connection) {
        return;
    }
    let of = connection.clone();
    let writer = Builder::new().name("nbd-writer".into());
    match writer.spawn(move || of.write_stalled()) {
        Ok(writer) => {
            serve_requests(&connection, &agreed, shared.budget.limits.linger);
            let _ = writer.join();
        }
        Err(error) => tracing::warn!("NBD: cannot serve a connection: no thread: {error}"),
    }
}

fn serve_requests(connection: &Arc<Connection>, agreed: &Agreed, linger: Duration) {
    // A panic of the engine ends this connection only, and in order.
    let served = catch_unwind(AssertUnwindSafe(|| transmit(connection, agreed)));
    if let Ok(Err(error)) = &served {
        tracing::warn!("NBD: connection ended: {error}");
    }
    connection.stop_gathering();
    let given_up = catch_unwind(AssertUnwindSafe(|| agreed.engine.disconnected(connection)));
    let has_panicked = served.is_err() || given_up.is_err();
    if has_panicked {
        tracing::error!("NBD: connection ended: the engine panicked");
    }
    // What a panic took with it never completes.
    let deadline = has_panicked.then(|| Instant::now() + linger);
    if !connection.drain(deadline) {
        tracing::error!("NBD: the engine left requests behind when it panicked");
    }
    connection.hang_up(Instant::now() + linger);
}
