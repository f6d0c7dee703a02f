//! Connections of hosts: hello, lanes, records in, acknowledgements out.
//!
//! Invariant: whatever a peer sends, it harms only its own connection; a length is checked before
//! anything is reserved for it; a peer that does not read is cut off, and never holds the log up.

use crate::appliance::Appliance;
use crate::cut::Answer;
use crate::disk::Refused;
use crate::disk::{Disk, Outcome, Route};
use crate::domain::Domain;
use crate::hashes::Ask;
use crate::link::{Link, LinkReader};
use crate::outbox::{MAX_WAITING, MAX_WAITING_BYTES, Outbox};
use crate::presence::Host;
use filter_core::wire::{
    DiskReport, ErrorCode, FRAME_HEADER_BYTES, FrameHeader, FrameKind, Hello, Message, OpenLane,
    PROTOCOL_NEWEST, PROTOCOL_OLDEST, PeerRole, PortRole, WireError,
};
use std::collections::HashMap;
use std::io::{self, BufReader, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// A peer that sends nothing for so long is given up.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// Lanes of one connection.
const MAX_CHANNELS: usize = 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("{0}")]
    Io(io::Error),
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Protocol(String),
    #[error("the host sent nothing for {} s", SILENCE_LIMIT.as_secs())]
    Silent,
    #[error(
        "the host does not read what it is answered: over {MAX_WAITING} answers, or {MAX_WAITING_BYTES} bytes, wait"
    )]
    Unread,
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Io(error),
        }
    }
}

/// A peer's text with nothing that a terminal or a log's reader obeys.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '.' } else { c })
        .collect()
}

/// An end of a wait, in words: a socket calls it "Resource temporarily unavailable".
fn why(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "the handshake was not done in its time".into()
        }
        _ => error.to_string(),
    }
}

/// Ends the sending thread, however the session ends.
struct Closes<'a>(&'a Outbox);

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct Channel {
    domain: Arc<Domain>,
    disk: Arc<Disk>,
    generation: u64,
    /// The machine as which it was opened.
    vm_id: [u8; 16],
}

struct Session<'a> {
    appliance: &'a Arc<Appliance>,
    role: PortRole,
    reader: BufReader<LinkReader<'a>>,
    outbox: Arc<Outbox>,
    /// The host's id, as its certificate has it.
    certified: Option<Uuid>,
    host: Host,
    channels: HashMap<u32, Channel>,
    /// The assignments by which the channels were opened.
    assigned: u64,
}

/// Serves a connection until it ends; `id` is its number.
pub fn serve(appliance: &Arc<Appliance>, role: PortRole, stream: &TcpStream, id: u64) {
    let peer = stream
        .peer_addr()
        .map_or("?".into(), |address| address.to_string());
    let _ = stream.set_nodelay(true);
    let (link, certified) = match &appliance.tls {
        None => (Link::plain(stream), None),
        Some(tls) => match Link::secure(stream, tls) {
            Ok((link, shown)) if appliance.let_in(id, &shown) => (link, Some(shown.identity.id)),
            Ok((link, shown)) => {
                // Revoked while the handshake was under way.
                let who = shown.identity;
                tracing::warn!(
                    "refused {peer} on port +{}: the certificate of {who} was revoked",
                    role.offset()
                );
                link.close();
                return;
            }
            // Who only looks whether the port is open says nothing.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return,
            Err(error) => {
                let why = why(&error);
                tracing::warn!("refused {peer} on port +{}: {why}", role.offset());
                return;
            }
        },
    };
    let _ = stream.set_read_timeout(Some(SILENCE_LIMIT));
    let _ = stream.set_write_timeout(Some(SILENCE_LIMIT));
    let outbox = Arc::new(Outbox::new());
    std::thread::scope(|scope| {
        let sender = outbox.clone();
        let link = &link;
        scope.spawn(move || sender.run(link));
        let closes = Closes(&outbox);
        let mut session = Session {
            appliance,
            role,
            reader: BufReader::with_capacity(64 * 1024, link.reader()),
            outbox: outbox.clone(),
            certified,
            host: Host::default(),
            channels: HashMap::new(),
            assigned: 0,
        };
        let ended = session.run();
        drop(session); // it leaves
        match ended {
            Ok(()) => {}
            Err(SessionError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(SessionError::Io(e)) if e.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => {
                if matches!(error, SessionError::Unread) {
                    // Else the sender would wait for it until the end of its time.
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                }
                if !appliance.stopping.load(Ordering::Acquire) {
                    tracing::warn!("connection of {peer} on port +{}: {error}", role.offset());
                }
                let code = match &error {
                    SessionError::Wire(WireError::Version { .. }) => ErrorCode::Version,
                    _ => ErrorCode::Malformed,
                };
                let message = Message::Error {
                    code,
                    seq: 0,
                    text: error.to_string(),
                };
                outbox.send(&message, 0);
            }
        }
        drop(closes);
    });
}

impl Session<'_> {
    fn header(&mut self) -> Result<FrameHeader, SessionError> {
        let mut raw = [0u8; FRAME_HEADER_BYTES];
        self.reader.read_exact(&mut raw)?;
        let header = FrameHeader::decode(&raw);
        if header.is_err() && matches!(raw, [0x16, 0x03, ..]) {
            let text =
                "the host speaks TLS, and this appliance was started with --insecure-plain-text";
            return Err(SessionError::Protocol(text.into()));
        }
        Ok(header?)
    }

    fn message(&mut self, header: &FrameHeader) -> Result<Message, SessionError> {
        let mut body = vec![0u8; header.body_len as usize];
        self.reader.read_exact(&mut body)?;
        Ok(Message::decode(header, &body)?)
    }

    fn run(&mut self) -> Result<(), SessionError> {
        let ours = Hello {
            oldest: PROTOCOL_OLDEST,
            newest: PROTOCOL_NEWEST,
            role: PeerRole::Appliance,
            port_offset: self.role.offset() as u8,
            peer_id: self.appliance.wire_id(),
            incarnation: self.appliance.incarnation,
            name: self.appliance.name.clone(),
        };
        self.outbox.send(&Message::Hello(ours), 0);
        let header = self.header()?;
        if header.kind != FrameKind::Hello {
            return Err(SessionError::Protocol(
                "the first frame is not a hello".into(),
            ));
        }
        let Message::Hello(hello) = self.message(&header)? else {
            return Err(SessionError::Protocol(
                "the first frame is not a hello".into(),
            ));
        };
        let protocol = hello.agree()?;
        if hello.role != PeerRole::Daemon || u16::from(hello.port_offset) != self.role.offset() {
            let text = format!("a hello for port +{} came on this port", hello.port_offset);
            return Err(SessionError::Protocol(text));
        }
        if let Some(certified) = self.certified.filter(|id| id.as_bytes() != &hello.peer_id) {
            let named = Uuid::from_bytes(hello.peer_id);
            let text =
                format!("the hello names host {named}, the certificate is host {certified}'s");
            return Err(SessionError::Protocol(text));
        }
        self.host = Host {
            id: hello.peer_id,
            name: plain(&hello.name),
        };
        if self.role == PortRole::Control {
            self.appliance
                .host_joined(&self.host, protocol, self.outbox.clone());
        }
        loop {
            let header = self.header()?;
            if self.appliance.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            if self.outbox.has_overflowed() {
                return Err(SessionError::Unread);
            }
            self.judge_again();
            if header.kind == FrameKind::Data {
                self.data(&header)?;
                continue;
            }
            let message = self.message(&header)?;
            self.take(header.channel, message)?;
        }
    }

    fn take(&mut self, channel: u32, message: Message) -> Result<(), SessionError> {
        match message {
            Message::Heartbeat {
                clock_ns,
                answer: false,
            } => {
                self.outbox.send(
                    &Message::Heartbeat {
                        clock_ns,
                        answer: true,
                    },
                    0,
                );
                Ok(())
            }
            Message::Heartbeat { .. } => Ok(()),
            Message::OpenLane(mut lane) if self.role != PortRole::Control => {
                for name in [&mut lane.vm_name, &mut lane.disk_label] {
                    *name = plain(name);
                }
                self.open(channel, &lane);
                Ok(())
            }
            Message::CloseLane { in_order } => {
                if let Some(closed) = self.channels.remove(&channel) {
                    let (disk, generation) = (&closed.disk, closed.generation);
                    closed.domain.close_lane(disk, generation, in_order);
                }
                Ok(())
            }
            Message::HashRequest {
                offset_bytes,
                blocks,
            } if self.role != PortRole::Control => {
                self.hashes(channel, offset_bytes, blocks);
                Ok(())
            }
            answer @ (Message::CutPositions { .. }
            | Message::CutReport { .. }
            | Message::CutHeld { .. })
                if self.role == PortRole::Control =>
            {
                self.cut_answer(answer);
                Ok(())
            }
            Message::Error { seq, text, .. } if self.role == PortRole::Control => {
                self.appliance.cut_refused(self.host.id, seq, &plain(&text));
                Ok(())
            }
            other => {
                let name = format!("{other:?}");
                let name = name
                    .split([' ', '(', '{'])
                    .next()
                    .unwrap_or_default()
                    .to_string();
                Err(SessionError::Protocol(format!(
                    "a frame {name} does not belong on this port"
                )))
            }
        }
    }

    /// A host's answer about a cut.
    fn cut_answer(&self, message: Message) {
        let (domain, answer) = match message {
            Message::CutHeld { epoch, domain } => (domain, Answer::Held(epoch)),
            Message::CutReport {
                epoch,
                domain,
                disks,
            } => (domain, Answer::Report(epoch, disks)),
            Message::CutPositions {
                epoch,
                domain,
                positions,
            } => {
                // Protocol 1 reports only what is complete, and does not say what is open: who has a
                // disk there is taken to have it open.
                let report = |(disk_id, seq)| DiskReport {
                    disk_id,
                    seq,
                    open: true,
                    complete: true,
                };
                let disks = positions.into_iter().map(report).collect();
                (domain, Answer::Report(epoch, disks))
            }
            _ => return,
        };
        self.appliance.cut_answer(&domain, self.host.id, answer);
    }

    /// Whether this host may have a disk that another machine presented: else it could have any by calling
    /// it one of its own machines'.
    fn may_take(&self, lane: &OpenLane, before: &Uuid) -> Result<(), Refused> {
        let rule = &self.appliance.assignments;
        let judged = rule.judge(&self.host.id, &lane.domain, before.as_bytes());
        judged.map_err(|why| {
            let text = format!("the disk is VM {before}'s, and of that: {why}");
            (ErrorCode::Domain, 0, text)
        })
    }

    /// Closes the channels that the present assignments do not allow any more.
    fn judge_again(&mut self) {
        let rule = &self.appliance.assignments;
        let version = rule.version();
        if version == self.assigned {
            return;
        }
        self.assigned = version;
        let (host, outbox) = (&self.host, &self.outbox);
        self.channels.retain(|channel, open| {
            let Err(text) = rule.judge(&host.id, &open.domain.name, &open.vm_id) else {
                return true;
            };
            let disk = open.disk.info.read().uuid;
            tracing::warn!("host {}: disk {disk} is closed: {text}", host.name);
            open.disk.detach(open.generation, false);
            let (code, seq) = (ErrorCode::Domain, 0);
            outbox.send(&Message::Error { code, seq, text }, *channel);
            false
        });
    }

    fn open(&mut self, channel: u32, lane: &OpenLane) {
        let host = &self.host;
        let refuse = |code, seq, text: String| {
            let (vm, label) = (&lane.vm_name, &lane.disk_label);
            let disk = Uuid::from_bytes(lane.disk_id);
            tracing::warn!(
                "lane {vm}/{label} (disk {disk}) of host {}: {text}",
                host.name
            );
            self.outbox
                .send(&Message::Error { code, seq, text }, channel);
        };
        if channel == 0 || self.channels.len() >= MAX_CHANNELS {
            refuse(
                ErrorCode::Limit,
                0,
                "channel 0, or too many channels".into(),
            );
            return;
        }
        // Before anything is made for it.
        let rule = &self.appliance.assignments;
        let domain = plain(&lane.domain);
        if let Err(text) = rule.judge(&self.host.id, &domain, &lane.vm_id) {
            refuse(ErrorCode::Domain, 0, text);
            return;
        }
        let domain = match self.appliance.domain(&lane.domain) {
            Ok(domain) => domain,
            Err(error) => {
                refuse(ErrorCode::Domain, 0, error.to_string());
                return;
            }
        };
        let route = Route {
            outbox: self.outbox.clone(),
            channel,
        };
        let open = self.channels.get(&channel);
        let open = open.filter(|open| open.disk.info.read().uuid.as_bytes() == &lane.disk_id);
        let again = match (lane.again, open) {
            (false, _) => None,
            (true, Some(open)) => Some(open.generation),
            // It was closed while the news was under way.
            (true, None) => return,
        };
        let may_take = |before: &Uuid| self.may_take(lane, before);
        match domain.open_lane(lane, &self.host, route, again, &may_take) {
            Ok(None) => {}
            Ok(Some((disk, generation))) => {
                let opened = Channel {
                    domain,
                    disk,
                    generation,
                    vm_id: lane.vm_id,
                };
                if let Some(before) = self.channels.insert(channel, opened) {
                    before.disk.detach(before.generation, false);
                }
            }
            Err((code, word, text)) => refuse(code, word, text),
        }
    }

    /// A question about a channel's disk. It is answered later, or at once if nobody can know.
    fn hashes(&self, channel: u32, offset_bytes: u64, blocks: u32) {
        let of = self.channels.get(&channel);
        let Some(of) = of.filter(|of| !of.disk.is_superseded(of.generation)) else {
            let hashes = Vec::new();
            let message = Message::Hashes {
                offset_bytes,
                hashes,
            };
            self.outbox.send(&message, channel);
            return;
        };
        of.domain.ask(Ask {
            disk: of.disk.clone(),
            offset_bytes,
            blocks,
            outbox: self.outbox.clone(),
            channel,
            came: Instant::now(),
        });
    }

    fn data(&mut self, header: &FrameHeader) -> Result<(), SessionError> {
        let len = header.body_len as usize;
        let Some(channel) = self.channels.get(&header.channel) else {
            // Frames that were under way when the channel was closed.
            io::copy(&mut (&mut self.reader).take(len as u64), &mut io::sink())?;
            return Ok(());
        };
        let mut content = channel.domain.log.buffer(len);
        let body = content
            .get_mut(..len)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.reader.read_exact(body)?;
        fault::point("drva.after-receive");
        match channel
            .domain
            .data(&channel.disk, channel.generation, content, len)
        {
            Outcome::Taken => {}
            Outcome::Superseded => {
                self.channels.remove(&header.channel);
            }
            Outcome::Refused(code, seq, text) => {
                self.channels.remove(&header.channel);
                tracing::warn!("record {seq}: {text}");
                self.outbox
                    .send(&Message::Error { code, seq, text }, header.channel);
            }
        }
        Ok(())
    }
}

/// The connection is gone: nothing more is sent to it.
impl Drop for Session<'_> {
    fn drop(&mut self) {
        for channel in self.channels.values() {
            channel.disk.detach(channel.generation, false);
        }
        if self.role == PortRole::Control {
            self.appliance.host_left(self.host.id, &self.outbox);
        }
    }
}
