//! A host's connection below its frames: plain TCP, or TLS over it.
//!
//! Invariant: one thread reads, one writes, and neither waits for the other: the lock is held while bytes
//! are encrypted or decrypted, never while the socket is waited for. No frame is looked at before the
//! handshake is done, and that has its time.

use parking_lot::Mutex;
use rustls::ServerConnection;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tls::{Peer, ServerTls};

/// How long a handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long who was refused may take to hear it.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);
/// Read from the socket in one call.
const CHUNK_BYTES: usize = 64 * 1024;
/// Most bytes that are read from a peer that was refused.
const MAX_FAREWELL_BYTES: usize = 1 << 20;
const HOST: &str = "the host";

/// A connection.
pub struct Link<'a> {
    socket: &'a TcpStream,
    tls: Option<Mutex<ServerConnection>>,
}

/// An error of TLS in words that say what to do.
fn explained(error: &rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, tls::explain(error, HOST))
}

/// Lets a peer read why it was refused: what it has sent and nobody reads would have the network take
/// the reason away.
fn part(socket: &TcpStream) {
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.set_read_timeout(Some(FAREWELL_LIMIT));
    let end = Instant::now() + FAREWELL_LIMIT;
    let (mut sink, mut all) = ([0; 4096], 0);
    while let Ok(n) = (&mut &*socket).read(&mut sink) {
        all += n;
        if n == 0 || all > MAX_FAREWELL_BYTES || Instant::now() >= end {
            break;
        }
    }
}

impl<'a> Link<'a> {
    /// In plain text.
    pub fn plain(socket: &'a TcpStream) -> Self {
        Self { socket, tls: None }
    }

    /// With TLS; the peer, as its certificate names it.
    pub fn secure(socket: &'a TcpStream, tls: &Arc<ServerTls>) -> io::Result<(Self, Peer)> {
        let mut connection = ServerConnection::new(tls.config()).map_err(io::Error::other)?;
        let end = Instant::now() + HANDSHAKE_LIMIT;
        match shake(&mut connection, socket, end) {
            Ok(()) => {}
            Err(error) => {
                let _ = connection.write_tls(&mut &*socket);
                part(socket);
                return Err(error);
            }
        }
        connection.set_buffer_limit(None); // only small frames go out
        let peer = tls::peer_of(&connection).map_err(io::Error::other)?;
        let peer = peer.ok_or_else(|| io::Error::other("the host showed no certificate"))?;
        let tls = Some(Mutex::new(connection));
        Ok((Self { socket, tls }, peer))
    }

    /// The reading end.
    pub fn reader(&self) -> LinkReader<'_> {
        LinkReader {
            link: self,
            chunk: match self.tls {
                Some(_) => vec![0; CHUNK_BYTES],
                None => Vec::new(),
            },
            at: 0,
            end: 0,
        }
    }

    /// Sends all of it.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let Some(tls) = &self.tls else {
            return (&mut &*self.socket).write_all(bytes);
        };
        let mut out = Vec::with_capacity(bytes.len() + 64);
        {
            let mut connection = tls.lock();
            connection.writer().write_all(bytes)?;
            while connection.wants_write() {
                connection.write_tls(&mut out)?;
            }
        }
        (&mut &*self.socket).write_all(&out)
    }

    /// Says that nothing more comes, and ends the connection.
    pub fn close(&self) {
        if let Some(tls) = &self.tls {
            let mut out = Vec::new();
            {
                let mut connection = tls.lock();
                connection.send_close_notify();
                while connection.wants_write() && connection.write_tls(&mut out).is_ok() {}
            }
            let _ = (&mut &*self.socket).write_all(&out);
        }
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

fn shake(connection: &mut ServerConnection, socket: &TcpStream, end: Instant) -> io::Result<()> {
    while connection.is_handshaking() || connection.wants_write() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        socket.set_write_timeout(Some(left))?;
        if connection.wants_write() {
            connection.write_tls(&mut &*socket)?;
            continue;
        }
        if connection.read_tls(&mut &*socket)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        connection
            .process_new_packets()
            .map_err(|error| explained(&error))?;
    }
    Ok(())
}

/// Reads what a host sends.
pub struct LinkReader<'a> {
    link: &'a Link<'a>,
    /// What came from the socket and was not decrypted yet lies from `at` to `end`.
    chunk: Vec<u8>,
    at: usize,
    end: usize,
}

impl Read for LinkReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.link.tls else {
            return (&mut &*self.link.socket).read(into);
        };
        loop {
            {
                let mut connection = tls.lock();
                match connection.reader().read(into) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
                if let Some(mut came) = self.chunk.get(self.at..self.end).filter(|c| !c.is_empty())
                {
                    self.at += connection.read_tls(&mut came)?;
                    connection
                        .process_new_packets()
                        .map_err(|error| explained(&error))?;
                    continue;
                }
            }
            let n = (&mut &*self.link.socket).read(&mut self.chunk)?;
            if n == 0 {
                return Ok(0);
            }
            (self.at, self.end) = (0, n);
        }
    }
}
