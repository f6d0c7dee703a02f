//! What carries the bytes to the appliance: plain TCP here, TLS over it in [`crate::secure`].
//!
//! Invariant: the layers above know a descriptor to poll and bytes that go in order; nothing in them
//! knows that it is TCP.

use crate::raw;
use filter_core::lane::consumer::Run;
use filter_core::wire::PortRole;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

/// A connected, ordered stream of bytes.
pub trait Transport: Read + Write + Send {
    /// What to poll.
    fn fd(&self) -> RawFd;

    /// From now on a call takes at most this long, or never blocks (`None`).
    fn set_limit(&mut self, limit: Option<Duration>) -> io::Result<()>;

    /// Sends what is left of a frame: its header, then the run's bytes, which lie in memory that another
    /// process can write, so they may be read by raw copy or by the kernel only. `sent` is how much of
    /// both together has gone; returns how much went now. What was reported as gone is not read again.
    fn send_frame(&mut self, header: &[u8], run: &Run, sent: usize) -> io::Result<usize>;

    /// Whether something that was reported as gone waits for the socket here: [`Write::flush`] sends it.
    fn wants_write(&self) -> bool {
        false
    }

    /// Whether bytes have come of which no poll will tell.
    fn is_buffering(&mut self) -> bool {
        false
    }
}

/// A connection, and what is known of its two ends for certain.
pub struct Connected {
    /// What carries the bytes.
    pub transport: Box<dyn Transport>,
    /// This host's id, as the other end knows it.
    pub host_id: Option<[u8; 16]>,
    /// The appliance's id.
    pub appliance_id: Option<[u8; 16]>,
}

/// Makes connections.
pub trait Connector: Send + Sync {
    /// Connects to the port of this role, within about this time.
    fn connect(&self, role: PortRole, limit: Duration) -> io::Result<Connected>;

    /// The address, for messages.
    fn describe(&self, role: PortRole) -> String;
}

/// Plain TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpConnector {
    /// The appliance.
    pub host: String,
    /// Its first port.
    pub port_base: u16,
}

impl TcpConnector {
    /// Connects to the port of this role.
    pub fn dial(&self, role: PortRole, limit: Duration) -> io::Result<TcpStream> {
        let end = Instant::now() + limit;
        let port = self.port_base.saturating_add(role.offset());
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (self.host.as_str(), port).to_socket_addrs()? {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl Connector for TcpConnector {
    fn connect(&self, role: PortRole, limit: Duration) -> io::Result<Connected> {
        Ok(Connected {
            transport: Box::new(Tcp(self.dial(role, limit)?)),
            host_id: None,
            appliance_id: None,
        })
    }

    fn describe(&self, role: PortRole) -> String {
        let port = self.port_base.saturating_add(role.offset());
        format!("{}:{port}", self.host)
    }
}

struct Tcp(TcpStream);

impl Read for Tcp {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Tcp {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Tcp {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn set_limit(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.0.set_nonblocking(limit.is_none())?;
        if limit.is_some() {
            self.0.set_read_timeout(limit)?;
            self.0.set_write_timeout(limit)?;
        }
        Ok(())
    }

    fn send_frame(&mut self, header: &[u8], run: &Run, sent: usize) -> io::Result<usize> {
        raw::send_frame(&self.0, header, run, sent)
    }
}
