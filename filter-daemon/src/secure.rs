//! TLS to the appliance: over the same socket, polled as before.
//!
//! Invariant: no byte of a frame goes out before both ends know each other; nothing is kept of a frame
//! but what was encrypted and not yet taken by the socket, at most `PIECE_BYTES` more than a record.
//! A connection whose appliance was revoked, or is not this host's any more, ends at its next call.

use crate::raw;
use crate::transport::{Connected, Connector, TcpConnector, Transport};
use filter_core::lane::consumer::Run;
use filter_core::wire::PortRole;
use parking_lot::RwLock;
use rustls::ClientConnection;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tls::{ClientTls, Folder, Identity, Role, TlsError};

/// Who may be dialled.
const SERVERS: &[Role] = &[Role::Drva];
/// Encrypted before the socket is asked to take it: large enough that the calls do not count.
const PIECE_BYTES: usize = 128 * 1024;
/// A TLS record's content.
const RECORD_BYTES: usize = 16 * 1024;
/// How often the socket is read in one call while nothing of it is content. A record takes up to four reads.
const MAX_EMPTY_PULLS: usize = 64;
const APPLIANCE: &str = "the appliance";

/// The appliance that this host sends to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where it is.
    pub tcp: TcpConnector,
    /// Who it is.
    pub identity: Identity,
}

/// What changes while the daemon runs: certificates, and the appliance.
#[derive(Default)]
pub struct InForce {
    tls: RwLock<Option<Arc<ClientTls>>>,
    target: RwLock<Option<Target>>,
}

impl InForce {
    /// For this appliance; `None`: it is not known yet.
    pub fn new(target: Option<Target>) -> Arc<Self> {
        Arc::new(Self {
            tls: RwLock::default(),
            target: RwLock::new(target),
        })
    }

    /// Takes the folder's files, as they are now. After an error what was in force stays.
    pub fn load(&self, folder: &Folder) -> Result<(), TlsError> {
        let known = self.tls.read().clone();
        if let Some(tls) = known {
            return tls.reload();
        }
        let tls = ClientTls::load(tls::provider::ring(), folder.files(), Role::Host, SERVERS)?;
        *self.tls.write() = Some(Arc::new(tls));
        Ok(())
    }

    /// Another appliance; connections to the one before end.
    pub fn set_target(&self, target: Target) {
        *self.target.write() = Some(target);
    }

    /// The appliance, if it is known.
    pub fn target(&self) -> Option<Target> {
        self.target.read().clone()
    }
}

/// TCP with TLS above it.
pub struct TlsConnector(pub Arc<InForce>);

fn not_yet(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, text)
}

/// An error of TLS in words that say what to do.
fn explained(error: &rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, tls::explain(error, APPLIANCE))
}

impl Connector for TlsConnector {
    fn connect(&self, role: PortRole, limit: Duration) -> io::Result<Connected> {
        let end = Instant::now() + limit;
        let tls = self.0.tls.read().clone();
        let tls = tls.ok_or_else(|| not_yet("this host has no certificate yet: enrol it"))?;
        let target = self.0.target();
        let target =
            target.ok_or_else(|| not_yet("the management server has assigned no appliance yet"))?;
        let version = tls.version();
        let (own, config) = tls.config();
        let socket = target.tcp.dial(role, limit)?;
        let name = target.identity.server_name().map_err(io::Error::other)?;
        let mut connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        connection.set_buffer_limit(None); // it is looked after here
        let mut transport = Tls {
            socket,
            connection,
            plain: Vec::with_capacity(RECORD_BYTES),
            serial: Vec::new(),
            version,
            tls,
            in_force: self.0.clone(),
            target,
        };
        transport.shake(end)?;
        Ok(Connected {
            host_id: Some(own.id.into_bytes()),
            transport: Box::new(transport),
        })
    }

    fn describe(&self, role: PortRole) -> String {
        match self.0.target() {
            Some(target) => target.tcp.describe(role),
            None => format!("an unknown address, port +{}", role.offset()),
        }
    }
}

fn too_slow() -> io::Error {
    let text = "the appliance does not answer in the handshake's time";
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// The end of a wait, in words: a socket calls it "Resource temporarily unavailable".
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => too_slow(),
        _ => error,
    }
}

struct Tls {
    socket: TcpStream,
    connection: ClientConnection,
    /// A record's content on its way out of the ring.
    plain: Vec<u8>,
    /// The appliance's certificate, by its number.
    serial: Vec<u8>,
    version: u64,
    tls: Arc<ClientTls>,
    in_force: Arc<InForce>,
    target: Target,
}

impl Tls {
    /// The handshake; blocks until `end` at most.
    fn shake(&mut self, end: Instant) -> io::Result<()> {
        while self.connection.is_handshaking() || self.connection.wants_write() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(too_slow());
            }
            self.set_limit(Some(left))?;
            if self.connection.wants_write() {
                self.push().map_err(in_words)?;
            } else if self.pull().map_err(in_words)? == 0 {
                return Err(not_yet(
                    "the appliance ended the connection before it said who it is",
                ));
            }
        }
        let peer = tls::peer_of(&self.connection).map_err(io::Error::other)?;
        self.serial = peer.map(|peer| peer.serial).unwrap_or_default();
        Ok(())
    }

    /// Sends what is encrypted. `WouldBlock`: not all of it.
    fn push(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut self.socket) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads once from the socket, and looks at what has come; 0: it has ended.
    fn pull(&mut self) -> io::Result<usize> {
        let n = self.connection.read_tls(&mut self.socket)?;
        if let Err(error) = self.connection.process_new_packets() {
            let _ = self.push(); // tells the other end why
            return Err(explained(&error));
        }
        Ok(n)
    }

    /// Whether this connection may go on.
    fn check(&mut self) -> io::Result<()> {
        let version = self.tls.version();
        if version != self.version {
            self.version = version;
            if self.tls.is_revoked(&self.serial) {
                let text = "the appliance's certificate was revoked";
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
        }
        if self.in_force.target.read().as_ref() != Some(&self.target) {
            return Err(not_yet("this host was assigned to another appliance"));
        }
        Ok(())
    }
}

impl Read for Tls {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        // Records without content (of which TLS allows any number) are no reason to stay here for ever.
        for _ in 0..MAX_EMPTY_PULLS {
            match self.connection.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Cut off or closed in order: every frame says itself whether it is whole.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            self.pull()?;
        }
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl Write for Tls {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check()?;
        self.push()?;
        let taken = bytes.len().min(PIECE_BYTES);
        let taken = self
            .connection
            .writer()
            .write(bytes.get(..taken).unwrap_or_default())?;
        match self.push() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.push()
    }
}

impl Transport for Tls {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn set_limit(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.socket.set_nonblocking(limit.is_none())?;
        if limit.is_some() {
            self.socket.set_read_timeout(limit)?;
            self.socket.set_write_timeout(limit)?;
        }
        Ok(())
    }

    fn send_frame(&mut self, header: &[u8], run: &Run, sent: usize) -> io::Result<usize> {
        self.check()?;
        self.push()?;
        let mut gone = 0;
        while gone < PIECE_BYTES {
            raw::copy_frame(header, run, sent + gone, RECORD_BYTES, &mut self.plain);
            if self.plain.is_empty() {
                break;
            }
            gone += self.connection.writer().write(&self.plain)?;
        }
        match self.push() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(gone),
        }
    }

    fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    fn is_buffering(&mut self) -> bool {
        let state = self.connection.process_new_packets();
        state.is_ok_and(|state| state.plaintext_bytes_to_read() > 0)
    }
}
