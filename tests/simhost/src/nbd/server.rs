//! Listeners, and the life of connections.
//!
//! Invariant: every connection has a slot, which goes with its thread however that ends, or with the
//! failure to start it; the slot's number is unique over all listeners. Stopping needs nothing but this
//! process: no file, no connection of its own.

use super::budget::{Budget, Limits};
use super::connection::Connection;
use super::engine::Engine;
use super::handover::Parked;
use super::handshake::{self, Agreed, HandshakeError};
use super::stream::Stream;
use super::transmit::transmit;
use crate::raw;
use crate::socket::{ListenError, TcpSocket, UnixSocket};
use parking_lot::Mutex;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// How often a pause looks whether all stand.
const PAUSE_LOOK: Duration = Duration::from_micros(200);

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

    fn inherit(listen: &Listen, fd: OwnedFd) -> io::Result<Self> {
        match listen {
            Listen::Tcp(_) => TcpSocket::inherit(fd).map(Self::Tcp),
            Listen::Unix(path) => UnixSocket::inherit(fd, path).map(Self::Unix),
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
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
    agreed: Option<Agreed>,
}

struct Shared {
    exports: Exports,
    budget: Arc<Budget>,
    stopping: AtomicBool,
    /// The acceptors' end.
    pause: UnixStream,
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
            agreed: None,
        });
        Some(Self {
            shared: shared.clone(),
            id,
        })
    }

    /// The handshake is over. `false`: the server is stopping, and may have passed this one by.
    fn transmits(&self, connection: &Arc<Connection>, agreed: &Agreed) -> bool {
        let mut connections = self.shared.connections.lock();
        if let Some(open) = connections.iter_mut().find(|open| open.id == self.id) {
            open.connection = Arc::downgrade(connection);
            open.agreed = Some(agreed.clone());
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
    acceptors: Vec<(Arc<Listener>, Option<JoinHandle<()>>)>,
    addresses: Vec<Listen>,
    /// A byte in it: the acceptors stand.
    pause: UnixStream,
    is_paused: bool,
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
        let mut bound = Vec::new();
        for listen in listens {
            bound.push(Listener::bind(listen)?);
        }
        Self::serve(bound, exports, limits)
    }

    /// The same on sockets that another process listened on.
    pub(super) fn inherit(
        listeners: Vec<(Listen, OwnedFd)>,
        exports: Exports,
    ) -> Result<Self, ListenError> {
        let mut bound = Vec::new();
        for (listen, fd) in listeners {
            let place = format!("{listen:?}");
            bound.push(Listener::inherit(&listen, fd).map_err(ListenError::io(place))?);
        }
        Self::serve(bound, exports, Limits::default())
    }

    fn serve(
        listeners: Vec<Listener>,
        exports: Exports,
        limits: Limits,
    ) -> Result<Self, ListenError> {
        let (pause, theirs) = UnixStream::pair().map_err(ListenError::io("a pair of sockets"))?;
        let mut server = Self {
            pause,
            is_paused: false,
            shared: Arc::new(Shared {
                pause: theirs,
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
        for listener in listeners {
            server.addresses.push(listener.address());
            server.acceptors.push((Arc::new(listener), None));
        }
        server.accept()?;
        Ok(server)
    }

    fn accept(&mut self) -> Result<(), ListenError> {
        for (listener, thread) in &mut self.acceptors {
            let (of, shared) = (listener.clone(), self.shared.clone());
            let spawned = Builder::new()
                .name("nbd-accept".into())
                .spawn(move || accept_loop(&of, &shared));
            let place = format!("{:?}", listener.address());
            *thread = Some(spawned.map_err(ListenError::io(place))?);
        }
        Ok(())
    }

    /// Accepts nobody, and stands at the end of each client's request, replies sent. After an error
    /// nothing stands.
    pub fn pause(&mut self, deadline: Instant) -> anyhow::Result<()> {
        (&self.pause).write_all(b"p")?;
        self.is_paused = true;
        for (_, acceptor) in &mut self.acceptors {
            if let Some(acceptor) = acceptor.take() {
                let _ = acceptor.join();
            }
        }
        loop {
            let all: Vec<Option<Arc<Connection>>> = {
                let connections = self.shared.connections.lock();
                let all = connections.iter();
                all.map(|open| open.connection.upgrade()).collect()
            };
            // One in its handshake is none yet: that is over soon.
            let is_quiet = |connection: &Option<Arc<Connection>>| {
                connection.as_ref().is_some_and(|connection| {
                    connection.is_quiet() || {
                        connection.pause();
                        false
                    }
                })
            };
            // Not `all`: each is to be told.
            if all.iter().filter(|one| !is_quiet(one)).count() == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.resume();
                anyhow::bail!(
                    "a client does not come to the end of its request, or takes no reply"
                );
            }
            std::thread::sleep(PAUSE_LOOK);
        }
    }

    /// Goes on after a pause.
    pub fn resume(&mut self) {
        if !std::mem::take(&mut self.is_paused) {
            return;
        }
        for open in self.shared.connections.lock().iter() {
            if let Some(connection) = open.connection.upgrade() {
                connection.resume();
            }
        }
        let mut byte = [0];
        let _ = (&self.shared.pause).read(&mut byte);
        if let Err(error) = self.accept() {
            tracing::error!("NBD: {error}");
        }
    }

    /// Copies of the listening sockets.
    pub(super) fn listeners(&self) -> io::Result<Vec<(Listen, OwnedFd)>> {
        let all = self.acceptors.iter();
        all.map(|(listener, _)| Ok((listener.address(), listener.as_fd().try_clone_to_owned()?)))
            .collect()
    }

    /// The connections, which stand.
    pub(super) fn parked(&self) -> io::Result<Vec<Parked>> {
        let mut all = Vec::new();
        for open in self.shared.connections.lock().iter() {
            let connection = open.connection.upgrade().zip(open.agreed.clone());
            let Some((connection, agreed)) = connection else {
                continue;
            };
            if let Some((stream, ahead)) = connection.parked()? {
                all.push(Parked {
                    stream,
                    agreed,
                    ahead,
                });
            }
        }
        Ok(all)
    }

    /// Goes on with a connection of another process.
    pub(super) fn adopt(&mut self, parked: Parked) -> io::Result<()> {
        let slot = Slot::take(&self.shared, parked.stream.try_clone()?);
        let slot = slot.ok_or_else(|| io::Error::other("too many connections"))?;
        let run = move || serve_agreed(parked.stream, &slot, &parked.agreed, parked.ahead);
        let thread = Builder::new().name("nbd-client".into()).spawn(run)?;
        self.shared.threads.lock().push(thread);
        Ok(())
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
            let _ = acceptor.map(JoinHandle::join);
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
        let pause = shared.pause.as_fd();
        if let Ok((_, true)) = raw::wait_for_either(listener.as_fd(), pause, None) {
            break;
        }
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
    serve_agreed(stream, slot, &agreed, Vec::new());
}

fn serve_agreed(stream: Stream, slot: &Slot, agreed: &Agreed, ahead: Vec<u8>) {
    let shared = &slot.shared;
    let budget = shared.budget.clone();
    let connection = Arc::new(Connection::new(stream, agreed.structured, budget));
    if !slot.transmits(&connection, agreed) {
        return;
    }
    let of = connection.clone();
    let writer = Builder::new().name("nbd-writer".into());
    match writer.spawn(move || of.write_stalled()) {
        Ok(writer) => {
            serve_requests(&connection, agreed, ahead, shared.budget.limits.linger);
            let _ = writer.join();
        }
        Err(error) => tracing::warn!("NBD: cannot serve a connection: no thread: {error}"),
    }
}

fn serve_requests(connection: &Arc<Connection>, agreed: &Agreed, ahead: Vec<u8>, linger: Duration) {
    // A panic of the engine ends this connection only, and in order.
    let served = catch_unwind(AssertUnwindSafe(|| transmit(connection, agreed, ahead)));
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
