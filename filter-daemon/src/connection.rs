//! One connection to the appliance: frames in, frames out, never blocking once it is up.
//!
//! Invariant: a frame that was begun is finished before anything else is sent.

use crate::raw;
use filter_core::lane::consumer::Run;
use filter_core::wire::{
    FRAME_HEADER_BYTES, FrameHeader, FrameKind, Hello, MAX_BODY_BYTES, Message, PROTOCOL_NEWEST,
    PROTOCOL_OLDEST, PeerRole, PortRole, WireError,
};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

/// How long connecting and the hello may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// A heartbeat goes out after this much silence.
pub const HEARTBEAT_AFTER: Duration = Duration::from_secs(5);
/// The peer is given up after this much silence.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// Why a connection is not, or no longer, there.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The network.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The appliance sent what it may not send.
    #[error("the appliance broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// The appliance refused.
    #[error("the appliance refused: {0}")]
    Refused(String),
    /// It said nothing for too long.
    #[error("the appliance has been silent for {} s", SILENCE_LIMIT.as_secs())]
    Silent,
    /// Anything else that it may not do.
    #[error("the appliance broke the protocol: {0}")]
    Protocol(&'static str),
}

/// Who this daemon is, in its hello.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Lasting identity of the host.
    pub host_id: [u8; 16],
    /// Changes at each start.
    pub incarnation: u64,
    /// For people.
    pub name: String,
}

/// Makes connections: the seam at which TLS comes in. What it returns is connected and blocking.
pub trait Connector: Send + Sync {
    /// Connects to the port of this role.
    fn connect(&self, role: PortRole) -> io::Result<TcpStream>;

    /// The address, for messages.
    fn describe(&self, role: PortRole) -> String;
}

/// Plain TCP.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    /// The appliance.
    pub host: String,
    /// Its first port.
    pub port_base: u16,
}

impl Connector for TcpConnector {
    fn connect(&self, role: PortRole) -> io::Result<TcpStream> {
        let port = self.port_base.saturating_add(role.offset());
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (self.host.as_str(), port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn describe(&self, role: PortRole) -> String {
        format!(
            "{}:{}",
            self.host,
            self.port_base.saturating_add(role.offset())
        )
    }
}

/// A DATA frame that is being sent from the ring.
#[derive(Debug)]
struct Outgoing {
    header: [u8; FRAME_HEADER_BYTES],
    run: Run,
    channel: u32,
    sent: usize,
}

/// A connection whose hello is done.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    small: Vec<u8>,
    frame: Option<Outgoing>,
    heard: Instant,
    spoke: Instant,
    /// Bytes sent since the connection was made.
    pub sent_bytes: u64,
}

// SAFETY: the run's pointer is only handed to the kernel, by whichever thread holds the connection.
unsafe impl Send for Connection {}

impl Connection {
    /// Connects and exchanges hellos.
    pub fn open(
        connector: &dyn Connector,
        role: PortRole,
        identity: &Identity,
    ) -> Result<Self, LinkError> {
        let mut stream = connector.connect(role)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CONNECT_LIMIT))?;
        stream.set_write_timeout(Some(CONNECT_LIMIT))?;
        let hello = Hello {
            oldest: PROTOCOL_OLDEST,
            newest: PROTOCOL_NEWEST,
            role: PeerRole::Daemon,
            port_offset: role.offset() as u8,
            peer_id: identity.host_id,
            incarnation: identity.incarnation,
            name: identity.name.clone(),
        };
        stream.write_all(&Message::Hello(hello).encode(0))?;
        let mut raw = [0u8; FRAME_HEADER_BYTES];
        stream.read_exact(&mut raw)?;
        let header = FrameHeader::decode(&raw)?;
        if header.kind == FrameKind::Data {
            return Err(LinkError::Protocol("data before its hello"));
        }
        let mut body = vec![0u8; header.body_len as usize];
        stream.read_exact(&mut body)?;
        match Message::decode(&header, &body)? {
            Message::Hello(theirs) => {
                theirs.agree()?;
                let right = theirs.role == PeerRole::Appliance
                    && u16::from(theirs.port_offset) == role.offset();
                if !right {
                    return Err(LinkError::Protocol("another service answers on this port"));
                }
            }
            Message::Error { text, .. } => return Err(LinkError::Refused(text)),
            _ => return Err(LinkError::Protocol("its first frame is not a hello")),
        }
        stream.set_nonblocking(true)?;
        let now = Instant::now();
        Ok(Self {
            stream,
            input: Vec::new(),
            small: Vec::new(),
            frame: None,
            heard: now,
            spoke: now,
            sent_bytes: 0,
        })
    }

    /// For poll.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Whether something waits to be sent.
    pub fn wants_write(&self) -> bool {
        self.frame.is_some() || !self.small.is_empty()
    }

    /// Whether a frame of this channel is being sent.
    pub fn is_sending(&self, channel: u32) -> bool {
        self.frame
            .as_ref()
            .is_some_and(|frame| frame.channel == channel)
    }

    /// Queues a small frame.
    pub fn queue(&mut self, message: &Message, channel: u32) {
        self.small.extend_from_slice(&message.encode(channel));
    }

    /// Queues a DATA frame; only when nothing waits to be sent.
    pub fn queue_run(&mut self, run: Run, channel: u32) {
        let header = FrameHeader::data(channel, run.first_seq, run.len_bytes as u32).encode();
        self.frame = Some(Outgoing {
            header,
            run,
            channel,
            sent: 0,
        });
    }

    /// Sends what waits. `true`: all of it is gone.
    pub fn flush(&mut self) -> Result<bool, LinkError> {
        while let Some(frame) = &mut self.frame {
            match raw::send_frame(&self.stream, &frame.header, &frame.run, frame.sent) {
                Ok(gone) => {
                    frame.sent += gone;
                    self.sent_bytes += gone as u64;
                    if frame.sent == FRAME_HEADER_BYTES + frame.run.len_bytes {
                        self.frame = None;
                        self.spoke = Instant::now();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        while !self.small.is_empty() {
            match self.stream.write(&self.small) {
                Ok(gone) => {
                    self.small.drain(..gone);
                    self.spoke = Instant::now();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Reads what has come; whole messages are handed to `take`. Returns whether any came.
    pub fn receive(
        &mut self,
        take: &mut dyn FnMut(u32, Message) -> Result<(), LinkError>,
    ) -> Result<bool, LinkError> {
        let mut chunk = [0u8; 16 * 1024];
        let limit = MAX_BODY_BYTES as usize + FRAME_HEADER_BYTES;
        while self.input.len() < limit {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => self
                    .input
                    .extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        let mut any = false;
        let mut at = 0;
        while let Some(raw) = self.input.get(at..).and_then(|rest| rest.first_chunk()) {
            let header = FrameHeader::decode(raw)?;
            let end = at + FRAME_HEADER_BYTES + header.body_len as usize;
            let Some(body) = self.input.get(at + FRAME_HEADER_BYTES..end) else {
                break;
            };
            let message = Message::decode(&header, body)?;
            at = end;
            any = true;
            self.heard = Instant::now();
            match message {
                Message::Heartbeat {
                    clock_ns,
                    answer: false,
                } => {
                    let answer = Message::Heartbeat {
                        clock_ns,
                        answer: true,
                    };
                    self.small.extend_from_slice(&answer.encode(0));
                }
                Message::Heartbeat { .. } => {}
                message => take(header.channel, message)?,
            }
        }
        self.input.drain(..at);
        Ok(any)
    }

    /// Says that it is alive after a silence, and gives up a peer that does not.
    pub fn keep_alive(&mut self) -> Result<(), LinkError> {
        if self.heard.elapsed() > SILENCE_LIMIT {
            return Err(LinkError::Silent);
        }
        if self.spoke.elapsed() > HEARTBEAT_AFTER {
            self.spoke = Instant::now();
            self.queue(
                &Message::Heartbeat {
                    clock_ns: 0,
                    answer: false,
                },
                0,
            );
        }
        Ok(())
    }
}
