//! One connection to the appliance: frames in, frames out, never blocking once it is up.
//!
//! Invariant: a frame that was begun is finished before anything else is sent, and the memory that it
//! is sent from stays mapped until then; small frames that were queued go before one that is not begun.
//! No more is kept of what the appliance sends than one frame of the length that its kind may have.

use crate::transport::{Connected, Connector, Transport};
use filter_core::lane::consumer::Run;
use filter_core::lane::layout::{HASH_BYTES, MAX_HASHES};
use filter_core::mapping::MappedLane;
use filter_core::wire::{
    FRAME_HEADER_BYTES, FrameHeader, FrameKind, Hello, MAX_BODY_BYTES, MAX_TEXT_BYTES, Message,
    PROTOCOL_NEWEST, PROTOCOL_OLDEST, PeerRole, PortRole, WireError,
};
use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long connecting and the hello may take together.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// A heartbeat goes out after this much silence.
pub const HEARTBEAT_AFTER: Duration = Duration::from_secs(5);
/// The peer is given up after this much silence.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// Longest body of what an appliance sends after its hello: a text, and room for fields to come.
const MAX_ANSWER_BYTES: u32 = 4 * MAX_TEXT_BYTES as u32;
/// The same of hashes, which are many.
const MAX_HASHES_BYTES: u32 = 4 + (MAX_HASHES * HASH_BYTES) as u32;
/// Read in one call.
const CHUNK_BYTES: usize = 16 * 1024;
/// Calls in one look: what else has come waits for the next one.
const CHUNKS: usize = 4;
/// While more than this waits to be sent, heartbeats are not answered: a peer that asks and does not
/// read must not make this grow.
const MAX_WAITING_BYTES: usize = 64 * 1024;

/// Why a connection is not, or no longer, there.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The network.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The appliance closed the connection.
    #[error("the appliance closed the connection")]
    Closed,
    /// The appliance sent what it may not send.
    #[error("the appliance broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// The appliance refused.
    #[error("the appliance refused: {0}")]
    Refused(String),
    /// It speaks TLS, and this end does not.
    #[error(
        "the appliance speaks TLS, and this daemon does not: give it its certificate (--tls-dir), or start the appliance with --insecure-plain-text"
    )]
    SpeaksTls,
    /// It said nothing for too long.
    #[error("the appliance has been silent for {} s", SILENCE_LIMIT.as_secs())]
    Silent,
    /// It took too long to say hello.
    #[error("the appliance did not say hello within {} s", CONNECT_LIMIT.as_secs())]
    NoHello,
    /// Bytes changed on the way: the lane is whole, the appliance got something else.
    #[error("record {seq} of lane {lane} was damaged on the way to the appliance: sent again")]
    Damaged {
        /// The lane.
        lane: String,
        /// The record that the appliance names.
        seq: u64,
    },
    /// It acknowledged what it cannot have.
    #[error(
        "the appliance broke the protocol: it acknowledged record {acknowledged} of lane {lane}, \
         of which at most {sent} was sent; nothing was freed"
    )]
    Acknowledged {
        /// The lane.
        lane: String,
        /// What it says it holds.
        acknowledged: u64,
        /// What it can hold at most.
        sent: u64,
    },
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

/// The frame that is being sent: which records of which channel.
#[derive(Clone, Copy, Debug)]
pub struct Sending {
    /// Its channel.
    pub channel: u32,
    /// First seq.
    pub first_seq: u64,
    /// Last seq.
    pub last_seq: u64,
}

/// A DATA frame that is being sent from the ring.
struct Outgoing {
    header: [u8; FRAME_HEADER_BYTES],
    run: Run,
    channel: u32,
    sent: usize,
    /// Keeps the run mapped, also when the lane is given up meanwhile.
    _lane: Arc<MappedLane>,
}

// SAFETY: the run's pointer leads into the mapping that is kept beside it, and is only handed to the
// transport, by whichever thread holds the connection.
unsafe impl Send for Outgoing {}

/// A connection whose hello is done.
pub struct Connection {
    transport: Box<dyn Transport>,
    chunk: Box<[u8]>,
    input: Vec<u8>,
    small: Vec<u8>,
    frame: Option<Outgoing>,
    version: u16,
    since: Instant,
    heard: Instant,
    spoke: Instant,
}

/// The longest body that an appliance may send in a frame of this kind after its hello.
fn answer_limit(header: &FrameHeader) -> Result<u32, LinkError> {
    match header.kind {
        FrameKind::LaneOpened
        | FrameKind::Ack
        | FrameKind::Error
        | FrameKind::CutRequest
        | FrameKind::CutHold
        | FrameKind::CutRelease
        | FrameKind::Heartbeat => Ok(MAX_ANSWER_BYTES),
        FrameKind::Hashes => Ok(MAX_HASHES_BYTES),
        FrameKind::Hello => Err(LinkError::Protocol("a second hello")),
        FrameKind::OpenLane
        | FrameKind::Data
        | FrameKind::CutPositions
        | FrameKind::CutReport
        | FrameKind::CutHeld
        | FrameKind::CloseLane
        | FrameKind::HashRequest => Err(LinkError::Protocol("a frame that only a daemon sends")),
    }
}

/// Whether this is how TLS begins, or says no: a handshake or an alert.
fn is_tls(first: &[u8]) -> bool {
    matches!(first, [0x15 | 0x16, 0x03, ..])
}

/// Reads exactly so many bytes before `end`.
fn read_before(
    transport: &mut dyn Transport,
    mut into: &mut [u8],
    end: Instant,
) -> Result<(), LinkError> {
    while !into.is_empty() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(LinkError::NoHello);
        }
        transport.set_limit(Some(left))?;
        match transport.read(into) {
            Ok(0) => return Err(LinkError::Closed),
            Ok(n) => into = into.get_mut(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(LinkError::NoHello),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => return Err(LinkError::NoHello),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

impl Connection {
    /// Connects and exchanges hellos; blocks for [`CONNECT_LIMIT`] at most (a name service may add to
    /// that).
    pub fn open(
        connector: &dyn Connector,
        role: PortRole,
        identity: &Identity,
    ) -> Result<Self, LinkError> {
        let end = Instant::now() + CONNECT_LIMIT;
        let Connected {
            mut transport,
            host_id,
            appliance_id,
        } = connector.connect(role, CONNECT_LIMIT)?;
        let hello = Hello {
            oldest: PROTOCOL_OLDEST,
            newest: PROTOCOL_NEWEST,
            role: PeerRole::Daemon,
            port_offset: role.offset() as u8,
            peer_id: host_id.unwrap_or(identity.host_id),
            incarnation: identity.incarnation,
            name: identity.name.clone(),
        };
        transport.set_limit(Some(CONNECT_LIMIT))?;
        // Should it fail, what the appliance said before it left says more than that.
        let sent = transport.write_all(&Message::Hello(hello).encode(0));
        let sent = sent.and_then(|()| transport.flush());
        let mut raw = [0u8; FRAME_HEADER_BYTES];
        let read = read_before(transport.as_mut(), &mut raw, end);
        if is_tls(&raw) {
            return Err(LinkError::SpeaksTls);
        }
        match (read, sent) {
            (Err(LinkError::Closed), Err(error)) => return Err(error.into()),
            (read, _) => read?,
        }
        let header = FrameHeader::decode(&raw)?;
        // A hello may grow by fields that this program does not know.
        let limit = match header.kind {
            FrameKind::Hello => MAX_BODY_BYTES,
            FrameKind::Error => MAX_ANSWER_BYTES,
            _ => return Err(LinkError::Protocol("its first frame is not a hello")),
        };
        if header.body_len > limit {
            return Err(LinkError::Protocol("its first frame is too long"));
        }
        let mut body = vec![0u8; header.body_len as usize];
        read_before(transport.as_mut(), &mut body, end)?;
        let version = match Message::decode(&header, &body)? {
            Message::Hello(theirs) => {
                let version = theirs.agree()?;
                let right = theirs.role == PeerRole::Appliance
                    && u16::from(theirs.port_offset) == role.offset();
                if !right {
                    return Err(LinkError::Protocol("another service answers on this port"));
                }
                if appliance_id.is_some_and(|id| id != theirs.peer_id) {
                    return Err(LinkError::Protocol(
                        "its hello names another appliance than its certificate",
                    ));
                }
                version
            }
            Message::Error { text, .. } => return Err(LinkError::Refused(text)),
            _ => return Err(LinkError::Protocol("its first frame is not a hello")),
        };
        transport.set_limit(None)?;
        let now = Instant::now();
        Ok(Self {
            transport,
            chunk: vec![0; CHUNK_BYTES].into(),
            input: Vec::new(),
            small: Vec::new(),
            frame: None,
            version,
            since: now,
            heard: now,
            spoke: now,
        })
    }

    /// The protocol that was agreed on.
    pub const fn version(&self) -> u16 {
        self.version
    }

    /// For poll.
    pub fn fd(&self) -> RawFd {
        self.transport.fd()
    }

    /// For how long it has been up.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Whether something waits to be sent.
    pub fn wants_write(&self) -> bool {
        self.frame.is_some() || !self.small.is_empty() || self.transport.wants_write()
    }

    /// The frame that is being sent, of which the appliance cannot have the last byte.
    pub fn sending(&self) -> Option<Sending> {
        self.frame.as_ref().map(|frame| Sending {
            channel: frame.channel,
            first_seq: frame.run.first_seq,
            last_seq: frame.run.last_seq,
        })
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

    /// Queues a DATA frame of a lane; only when nothing waits to be sent.
    pub fn queue_run(&mut self, run: Run, channel: u32, lane: Arc<MappedLane>) {
        debug_assert!(self.frame.is_none());
        let header = FrameHeader::data(channel, run.first_seq, run.len_bytes as u32).encode();
        self.frame = Some(Outgoing {
            header,
            run,
            channel,
            sent: 0,
            _lane: lane,
        });
    }

    /// Sends what waits. `true`: all of it is gone.
    pub fn flush(&mut self) -> Result<bool, LinkError> {
        let begun = |frame: &Outgoing| frame.sent > 0;
        if !self.frame.as_ref().is_some_and(begun) && !self.flush_small()? {
            return Ok(false);
        }
        Ok(self.flush_frame()? && self.flush_small()? && self.flush_transport()?)
    }

    /// What the transport took and the socket did not.
    fn flush_transport(&mut self) -> Result<bool, LinkError> {
        match self.transport.flush() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            flushed => Ok(flushed.map(|()| true)?),
        }
    }

    fn flush_frame(&mut self) -> Result<bool, LinkError> {
        while let Some(frame) = &mut self.frame {
            let mut run = frame.run;
            let halved = frame.sent == 0 && fault::is_asked_for("daemon.mid-frame");
            if halved {
                run.len_bytes /= 2;
            }
            match self.transport.send_frame(&frame.header, &run, frame.sent) {
                Ok(gone) => {
                    frame.sent += gone;
                    if halved {
                        fault::point("daemon.mid-frame");
                    }
                    if frame.sent >= FRAME_HEADER_BYTES + frame.run.len_bytes {
                        self.frame = None;
                        self.spoke = Instant::now();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    fn flush_small(&mut self) -> Result<bool, LinkError> {
        while !self.small.is_empty() {
            match self.transport.write(&self.small) {
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

    /// Reads what has come; whole messages are handed to `take`, also those before an end of the
    /// connection. Returns whether any came.
    pub fn receive(
        &mut self,
        take: &mut dyn FnMut(u32, Message) -> Result<(), LinkError>,
    ) -> Result<bool, LinkError> {
        let mut any = false;
        let mut chunks = 0;
        // What the transport holds already must not wait for a poll, which does not know of it.
        while chunks < CHUNKS || self.transport.is_buffering() {
            chunks += 1;
            let n = match self.transport.read(&mut self.chunk) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            };
            let came = self.chunk.get(..n).unwrap_or_default();
            self.input.extend_from_slice(came);
            any |= self.parse(take)?;
            if n < CHUNK_BYTES {
                break; // most likely all: the next look finds out, without a call for nothing now
            }
        }
        Ok(any)
    }

    fn parse(
        &mut self,
        take: &mut dyn FnMut(u32, Message) -> Result<(), LinkError>,
    ) -> Result<bool, LinkError> {
        let mut any = false;
        let mut at = 0;
        while let Some(raw) = self.input.get(at..).and_then(|rest| rest.first_chunk()) {
            let header = FrameHeader::decode(raw)?;
            let limit = answer_limit(&header)?;
            if header.body_len > limit {
                return Err(WireError::TooLong {
                    kind: header.kind as u8,
                    len: header.body_len,
                    limit,
                }
                .into());
            }
            let end = at + FRAME_HEADER_BYTES + header.body_len as usize;
            let Some(body) = self.input.get(at + FRAME_HEADER_BYTES..end) else {
                break;
            };
            let message = Message::decode(&header, body)?;
            at = end;
            any = true;
            match message {
                Message::Heartbeat {
                    clock_ns,
                    answer: false,
                } if self.small.len() < MAX_WAITING_BYTES => {
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
        if any {
            self.heard = Instant::now();
            self.input.drain(..at);
        }
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
