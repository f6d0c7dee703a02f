//! Listeners and connections.
//!
//! Invariant: a connection has one reading thread; replies go through one lock, whole, in any order.
//! The reading thread gathers replies while more requests are at hand and sends them together;
//! whoever completes a request from another thread sends at once.

use super::engine::{Engine, Io, Kind};
use super::handshake::{self, Agreed, HandshakeError};
use super::proto::{self, REQUEST_BYTES, RequestHeader, cflag, chunk, cmd, errno};
use super::stream::Stream;
use parking_lot::{Condvar, Mutex};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

/// How long a client may take over its handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Requests are read this much at a time.
const INPUT_BYTES: usize = 256 * 1024;
/// Replies are gathered up to this much.
const OUTPUT_BYTES: usize = 256 * 1024;
/// Most requests of one connection under way at once.
const MAX_UNDER_WAY: usize = 1024;
/// Request objects that are kept for reuse.
const POOL: usize = 64;
/// Buffers longer than this are not kept.
const POOL_BUFFER_BYTES: usize = 1 << 20;
/// Most connections at once.
const MAX_CONNECTIONS: usize = 256;
/// Extents in one answer.
const MAX_EXTENTS: usize = 1024;

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

/// A client's connection in transmission.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    structured: bool,
    output: Mutex<Vec<u8>>,
    reader: Mutex<Option<ThreadId>>,
    under_way: Mutex<usize>,
    drained: Condvar,
    /// Boxed, since a request travels by pointer and comes back the same.
    #[allow(clippy::vec_box)]
    pool: Mutex<Vec<Box<Io>>>,
    broken: AtomicBool,
}

impl Connection {
    fn push_reply(&self, out: &mut Vec<u8>, cookie: u64, error: u32, data: Option<(u64, &[u8])>) {
        if !self.structured {
            out.extend_from_slice(&proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
            out.extend_from_slice(&error.to_be_bytes());
            out.extend_from_slice(&cookie.to_be_bytes());
            if let Some((_, data)) = data.filter(|_| error == 0) {
                out.extend_from_slice(data);
            }
            return;
        }
        let mut head = |kind: u16, len: usize| {
            out.extend_from_slice(&proto::STRUCTURED_REPLY_MAGIC.to_be_bytes());
            out.extend_from_slice(&chunk::DONE.to_be_bytes());
            out.extend_from_slice(&kind.to_be_bytes());
            out.extend_from_slice(&cookie.to_be_bytes());
            out.extend_from_slice(&(len as u32).to_be_bytes());
        };
        match (error, data) {
            (0, None) => head(chunk::NONE, 0),
            (0, Some((offset, data))) => {
                head(chunk::OFFSET_DATA, 8 + data.len());
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(data);
            }
            (error, _) => {
                head(chunk::ERROR, 6);
                out.extend_from_slice(&error.to_be_bytes());
                out.extend_from_slice(&0u16.to_be_bytes());
            }
        }
    }

    /// Sends what was gathered. An error ends the connection.
    fn flush(&self, out: &mut Vec<u8>) {
        if !out.is_empty() && (&mut &self.stream).write_all(out).is_err() {
            self.broken.store(true, Ordering::Release); // pairs with the reader's look
            self.stream.shutdown();
        }
        out.clear();
    }

    /// Sends at once, unless this is the reading thread, which gathers.
    fn pushed(&self, mut out: parking_lot::MutexGuard<'_, Vec<u8>>) {
        let gathers = *self.reader.lock() == Some(std::thread::current().id());
        if !gathers || out.len() >= OUTPUT_BYTES {
            self.flush(&mut out);
        }
    }

    pub(super) fn reply(&self, io: Box<Io>, error: u32) {
        let mut out = self.output.lock();
        let data = (io.kind == Kind::Read).then(|| (io.offset_bytes, io.data()));
        self.push_reply(&mut out, io.cookie, error, data);
        self.pushed(out);
        let mut pool = self.pool.lock();
        if pool.len() < POOL && io.buffer.capacity() <= POOL_BUFFER_BYTES {
            pool.push(io);
        }
        drop(pool);
        self.ended();
    }

    pub(super) fn reply_dropped(&self, cookie: u64) {
        let mut out = self.output.lock();
        self.push_reply(&mut out, cookie, errno::IO, None);
        self.pushed(out);
        self.ended();
    }

    fn reply_error(&self, cookie: u64, error: u32) {
        let mut out = self.output.lock();
        self.push_reply(&mut out, cookie, error, None);
        self.pushed(out);
    }

    fn ended(&self) {
        let mut under_way = self.under_way.lock();
        *under_way -= 1;
        if *under_way == 0 || *under_way == MAX_UNDER_WAY - 1 {
            self.drained.notify_all();
        }
    }

    fn begin(&self) {
        let mut under_way = self.under_way.lock();
        while *under_way >= MAX_UNDER_WAY {
            self.drained.wait(&mut under_way);
        }
        *under_way += 1;
    }

    fn take_io(self: &Arc<Self>, header: &RequestHeader, kind: Kind) -> Box<Io> {
        let mut io = self.pool.lock().pop().unwrap_or_else(|| {
            Box::new(Io {
                kind,
                fua: false,
                may_unmap: false,
                offset_bytes: 0,
                len_bytes: 0,
                buffer: Vec::new(),
                cookie: 0,
                connection: None,
            })
        });
        io.kind = kind;
        io.fua = header.flags & cflag::FUA != 0;
        io.may_unmap = header.flags & cflag::NO_HOLE == 0;
        io.offset_bytes = header.offset_bytes;
        io.len_bytes = header.len_bytes;
        io.cookie = header.cookie;
        if matches!(kind, Kind::Read | Kind::Write) && io.buffer.len() < header.len_bytes as usize {
            io.buffer.resize(header.len_bytes as usize, 0);
        }
        self.begin();
        io.connection = Some(self.clone());
        io
    }
}

/// Bytes read ahead from a client.
struct Input {
    buffer: Vec<u8>,
    at: usize,
    end: usize,
}

impl Input {
    fn available(&self) -> &[u8] {
        self.buffer.get(self.at..self.end).unwrap_or_default()
    }

    /// Reads until `need` bytes (at most a request's header) are there. `false`: orderly end.
    fn fill(&mut self, connection: &Connection, need: usize) -> io::Result<bool> {
        while self.end - self.at < need {
            // Nothing more is at hand: what was gathered goes out before this thread may wait.
            connection.flush(&mut connection.output.lock());
            if connection.broken.load(Ordering::Acquire) {
                return Ok(false); // pairs with the store in `flush`
            }
            self.buffer.copy_within(self.at..self.end, 0);
            self.end -= self.at;
            self.at = 0;
            let free = self.buffer.get_mut(self.end..).unwrap_or_default();
            match (&mut &connection.stream).read(free) {
                Ok(0) if self.end == 0 => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.end += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Moves exactly `target.len()` bytes of payload: what was read ahead, then from the socket.
    fn take(&mut self, connection: &Connection, target: &mut [u8]) -> io::Result<()> {
        let ahead = self.available().len().min(target.len());
        let (head, tail) = target.split_at_mut(ahead);
        head.copy_from_slice(self.available().get(..ahead).unwrap_or_default());
        self.at += ahead;
        if !tail.is_empty() {
            connection.flush(&mut connection.output.lock());
            (&mut &connection.stream).read_exact(tail)?;
        }
        Ok(())
    }

    fn skip(&mut self, connection: &Connection, mut len: usize) -> io::Result<()> {
        let mut sink = [0u8; 4096];
        while len > 0 {
            let step = len.min(sink.len());
            self.take(connection, sink.get_mut(..step).unwrap_or_default())?;
            len -= step;
        }
        Ok(())
    }
}

/// Why transmission ended.
#[derive(Debug, thiserror::Error)]
enum TransmissionError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("request magic is wrong: the client has lost its place in the stream")]
    Magic,
    #[error("a write of {0} bytes was announced, at most {max} are allowed", max = proto::MAX_PAYLOAD_BYTES)]
    PayloadTooLong(u32),
}

/// Serves requests until the client goes.
fn transmit(connection: &Arc<Connection>, agreed: &Agreed) -> Result<(), TransmissionError> {
    let mut input = Input {
        buffer: vec![0; INPUT_BYTES],
        at: 0,
        end: 0,
    };
    *connection.reader.lock() = Some(std::thread::current().id());
    while input.fill(connection, REQUEST_BYTES)? {
        let Some(raw) = input.available().first_chunk() else {
            break;
        };
        let header = proto::parse_request(raw).ok_or(TransmissionError::Magic)?;
        input.at += REQUEST_BYTES;
        if header.command == cmd::DISC {
            break;
        }
        serve(connection, agreed, &mut input, &header)?;
    }
    Ok(())
}

/// Whether a request may go on; otherwise the error for the client.
fn check(agreed: &Agreed, header: &RequestHeader) -> Result<(), u32> {
    let known = cflag::FUA | cflag::NO_HOLE | cflag::DF | cflag::REQ_ONE | cflag::FAST_ZERO;
    if header.flags & !known != 0 {
        return Err(errno::INVAL);
    }
    let end = header.offset_bytes.checked_add(header.len_bytes.into());
    let inside = end.is_some_and(|end| end <= agreed.engine.capacity_bytes());
    match header.command {
        cmd::FLUSH => Ok(()),
        cmd::READ if header.len_bytes > proto::MAX_PAYLOAD_BYTES => Err(errno::OVERFLOW),
        cmd::WRITE | cmd::WRITE_ZEROES if !inside => Err(errno::NOSPC),
        _ if !inside || header.len_bytes == 0 => Err(errno::INVAL),
        _ => Ok(()),
    }
}

fn serve(
    connection: &Arc<Connection>,
    agreed: &Agreed,
    input: &mut Input,
    header: &RequestHeader,
) -> Result<(), TransmissionError> {
    let write = header.command == cmd::WRITE;
    if write && header.len_bytes > proto::MAX_PAYLOAD_BYTES {
        // The payload cannot be skipped in bounded time: the client is answered and cut off.
        connection.reply_error(header.cookie, errno::OVERFLOW);
        connection.flush(&mut connection.output.lock());
        return Err(TransmissionError::PayloadTooLong(header.len_bytes));
    }
    if let Err(error) = check(agreed, header) {
        if write {
            input.skip(connection, header.len_bytes as usize)?;
        }
        connection.reply_error(header.cookie, error);
        return Ok(());
    }
    let kind = match header.command {
        cmd::READ => Kind::Read,
        cmd::WRITE => Kind::Write,
        cmd::FLUSH => Kind::Flush,
        cmd::TRIM => Kind::Unmap,
        cmd::WRITE_ZEROES => Kind::Zero,
        cmd::BLOCK_STATUS if agreed.block_status => {
            block_status(connection, agreed, header);
            return Ok(());
        }
        cmd::CACHE => {
            connection.reply_error(header.cookie, 0);
            return Ok(());
        }
        _ => {
            connection.reply_error(header.cookie, errno::INVAL);
            return Ok(());
        }
    };
    let mut io = connection.take_io(header, kind);
    if kind == Kind::Flush {
        (io.offset_bytes, io.len_bytes) = (0, 0);
    }
    if write {
        input.take(connection, io.data_mut())?;
    }
    agreed.engine.submit(io);
    Ok(())
}

fn block_status(connection: &Connection, agreed: &Agreed, header: &RequestHeader) {
    let one = header.flags & cflag::REQ_ONE != 0;
    let limit = if one { 1 } else { MAX_EXTENTS };
    let len = u64::from(header.len_bytes);
    let extents = match agreed.engine.extents(header.offset_bytes, len, limit) {
        Ok(extents) => extents,
        Err(error) => {
            tracing::warn!("{error}");
            connection.reply_error(header.cookie, super::engine::wire_error(&error));
            return;
        }
    };
    let mut out = connection.output.lock();
    out.extend_from_slice(&proto::STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&chunk::DONE.to_be_bytes());
    out.extend_from_slice(&chunk::BLOCK_STATUS.to_be_bytes());
    out.extend_from_slice(&header.cookie.to_be_bytes());
    out.extend_from_slice(&((4 + 8 * extents.len()) as u32).to_be_bytes());
    out.extend_from_slice(&proto::CONTEXT_ID.to_be_bytes());
    for extent in extents {
        out.extend_from_slice(&(extent.len_bytes as u32).to_be_bytes());
        // Bit 0: a hole; bit 1: reads as zeros.
        out.extend_from_slice(&(if extent.hole { 3u32 } else { 0 }).to_be_bytes());
    }
    connection.pushed(out);
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Listen {
    /// A TCP address; port 0 takes a free one.
    Tcp(SocketAddr),
    /// A unix socket; a file that is there is replaced if nobody listens on it.
    Unix(PathBuf),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(l) => {
                let (stream, _) = l.accept()?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(l, _) => Ok(Stream::Unix(l.accept()?.0)),
        }
    }
}

struct State {
    exports: Exports,
    stopping: AtomicBool,
    connections: Mutex<Vec<(u64, Stream)>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A running server. Stopped when dropped.
pub struct Server {
    state: Arc<State>,
    acceptors: Vec<JoinHandle<()>>,
    addresses: Vec<Listen>,
}

fn bind(listen: &Listen) -> io::Result<Listener> {
    match listen {
        Listen::Tcp(address) => TcpListener::bind(address).map(Listener::Tcp),
        Listen::Unix(path) => {
            // A socket that a killed server left behind is in the way, but nobody answers there.
            if path.exists() && UnixStream::connect(path).is_err() {
                std::fs::remove_file(path)?;
            }
            Ok(Listener::Unix(UnixListener::bind(path)?, path.clone()))
        }
    }
}

impl Server {
    /// Listens, and serves the exports to whoever connects.
    pub fn start(listens: &[Listen], exports: Exports) -> io::Result<Self> {
        let state = Arc::new(State {
            exports,
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
            threads: Mutex::default(),
        });
        let mut server = Self {
            state,
            acceptors: Vec::new(),
            addresses: Vec::new(),
        };
        for listen in listens {
            let name = |e: io::Error| {
                io::Error::new(e.kind(), format!("cannot listen on {listen:?}: {e}"))
            };
            let listener = bind(listen).map_err(name)?;
            server.addresses.push(match &listener {
                Listener::Tcp(l) => Listen::Tcp(l.local_addr()?),
                Listener::Unix(_, path) => Listen::Unix(path.clone()),
            });
            let state = server.state.clone();
            let name = "nbd-accept".to_string();
            let run = move || accept_loop(&listener, &state);
            server
                .acceptors
                .push(std::thread::Builder::new().name(name).spawn(run)?);
        }
        Ok(server)
    }

    /// Where it really listens.
    pub fn addresses(&self) -> &[Listen] {
        &self.addresses
    }

    /// Stops listening, ends all connections, waits for their threads.
    pub fn stop(&mut self) {
        if self.state.stopping.swap(true, Ordering::AcqRel) {
            return; // whoever came first does it
        }
        for address in &self.addresses {
            // A connection of our own wakes the acceptor, which then sees `stopping`.
            match address {
                Listen::Tcp(address) => drop(TcpStream::connect(address)),
                Listen::Unix(path) => drop(UnixStream::connect(path)),
            }
        }
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        for (_, stream) in self.state.connections.lock().iter() {
            stream.shutdown();
        }
        let threads = std::mem::take(&mut *self.state.threads.lock());
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

fn accept_loop(listener: &Listener, state: &Arc<State>) {
    let mut next = 0u64;
    loop {
        let accepted = listener.accept();
        if state.stopping.load(Ordering::Acquire) {
            break; // pairs with the swap in `stop`
        }
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!("NBD: cannot accept a connection: {error}");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let Ok(second) = stream.try_clone() else {
            continue;
        };
        let mut connections = state.connections.lock();
        if connections.len() >= MAX_CONNECTIONS {
            tracing::warn!("NBD: refused a connection: {MAX_CONNECTIONS} are open");
            continue;
        }
        next += 1;
        let id = next;
        connections.push((id, second));
        drop(connections);
        let of = state.clone();
        let run = move || {
            serve_connection(stream, &of);
            of.connections.lock().retain(|(known, _)| *known != id);
        };
        if let Ok(thread) = std::thread::Builder::new()
            .name("nbd-client".into())
            .spawn(run)
        {
            let mut threads = state.threads.lock();
            threads.retain(|thread| !thread.is_finished());
            threads.push(thread);
        }
    }
    if let Listener::Unix(_, path) = listener {
        let _ = std::fs::remove_file(path as &Path);
    }
}

fn serve_connection(stream: Stream, state: &State) {
    let _ = stream.set_read_timeout(Some(HANDSHAKE_LIMIT));
    let agreed = match handshake::shake(&stream, &state.exports) {
        Ok(agreed) => agreed,
        Err(HandshakeError::Aborted) => return,
        Err(HandshakeError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof => return,
        Err(error) => {
            tracing::warn!("NBD: handshake failed: {error}");
            stream.shutdown();
            return;
        }
    };
    let _ = stream.set_read_timeout(None);
    let connection = Arc::new(Connection {
        stream,
        structured: agreed.structured,
        output: Mutex::new(Vec::with_capacity(OUTPUT_BYTES)),
        reader: Mutex::new(None),
        under_way: Mutex::new(0),
        drained: Condvar::new(),
        pool: Mutex::default(),
        broken: AtomicBool::new(false),
    });
    if let Err(error) = transmit(&connection, &agreed) {
        tracing::warn!("NBD: connection ended: {error}");
    }
    *connection.reader.lock() = None;
    agreed.engine.disconnected(&connection);
    let mut under_way = connection.under_way.lock();
    while *under_way > 0 {
        connection.drained.wait(&mut under_way);
    }
    drop(under_way);
    connection.flush(&mut connection.output.lock());
    connection.stream.shutdown();
    connection.pool.lock().clear();
}
