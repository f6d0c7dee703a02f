//! The scripted appliance: six ports, driven by hand ([`Ports`], [`Peer`]) or serving by themselves
//! ([`Server`]) the way the protocol asks for, with faults on request.

use crate::vm::payload;
use crate::{DEADLINE, Numbers, wait_for};
use filter_core::record::{RecordIter, RecordKind};
use filter_core::wire::{
    FRAME_HEADER_BYTES, FrameHeader, FrameKind, Hello, Message, OpenLane, PeerRole, PortRole,
};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// Six free ports in a row, listened to.
pub struct Ports {
    pub base: u16,
    listeners: Vec<TcpListener>,
}

impl Ports {
    pub fn bind() -> Self {
        for _ in 0..1000 {
            let first = TcpListener::bind("127.0.0.1:0").unwrap();
            let base = first.local_addr().unwrap().port();
            if base > u16::MAX - 5 {
                continue;
            }
            let rest = (1..6).map(|n| TcpListener::bind(("127.0.0.1", base + n)));
            if let Ok(rest) = rest.collect::<io::Result<Vec<_>>>() {
                let mut listeners = vec![first];
                listeners.extend(rest);
                return Self { base, listeners };
            }
        }
        panic!("no six free ports in a row");
    }

    /// The next connection to a port.
    pub fn accept(&self, role: PortRole) -> Peer {
        let listener = &self.listeners[usize::from(role.offset())];
        listener.set_nonblocking(true).unwrap();
        let mut stream = None;
        wait_for("the daemon connects", || {
            stream = listener.accept().ok();
            stream.is_some()
        });
        Peer::of(stream.unwrap().0, role)
    }

    /// Accepts and says hello.
    pub fn greet(&self, role: PortRole) -> Peer {
        let mut peer = self.accept(role);
        peer.greet();
        peer
    }

    /// The same, up to this protocol.
    pub fn greet_speaking(&self, role: PortRole, newest: u16) -> Peer {
        let mut peer = self.accept(role);
        peer.newest = newest;
        peer.greet();
        peer
    }
}

pub struct Peer {
    pub stream: TcpStream,
    pub role: PortRole,
    /// The newest protocol that it speaks.
    pub newest: u16,
}

pub struct Frame {
    pub header: FrameHeader,
    pub body: Vec<u8>,
}

impl Peer {
    fn of(stream: TcpStream, role: PortRole) -> Self {
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            role,
            newest: 1,
        }
    }

    pub fn hello(&self) -> Hello {
        Hello {
            oldest: 1,
            newest: self.newest,
            role: PeerRole::Appliance,
            port_offset: self.role.offset() as u8,
            peer_id: [3; 16],
            incarnation: 1,
            name: "scripted".into(),
        }
    }

    pub fn send(&mut self, message: &Message, channel: u32) {
        // The daemon may have left: then what follows finds out.
        let _ = self.stream.write_all(&message.encode(channel));
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn frame(&mut self) -> io::Result<Frame> {
        let mut raw = [0u8; FRAME_HEADER_BYTES];
        self.stream.read_exact(&mut raw)?;
        let header = FrameHeader::decode(&raw).expect("the daemon sends good frames");
        let mut body = vec![0u8; header.body_len as usize];
        self.stream.read_exact(&mut body)?;
        Ok(Frame { header, body })
    }

    pub fn message(&mut self) -> (u32, Message) {
        loop {
            let frame = self.frame().expect("a frame comes");
            let message = Message::decode(&frame.header, &frame.body).expect("a good message");
            if !matches!(message, Message::Heartbeat { .. }) {
                return (frame.header.channel, message);
            }
        }
    }

    pub fn greet(&mut self) {
        let (_, theirs) = self.message();
        assert!(matches!(theirs, Message::Hello(_)), "{theirs:?}");
        self.send(&Message::Hello(self.hello()), 0);
    }

    /// Waits for an OPEN_LANE; its channel.
    pub fn expect_open(&mut self) -> (u32, OpenLane) {
        match self.message() {
            (channel, Message::OpenLane(lane)) => (channel, lane),
            (_, other) => panic!("{other:?} instead of OPEN_LANE"),
        }
    }

    /// Opens the lane that the daemon presents; its channel.
    pub fn open(&mut self, durable_seq: u64) -> u32 {
        let (channel, lane) = self.expect_open();
        let attach_epoch = lane.attach_epoch;
        self.send(
            &Message::LaneOpened {
                durable_seq,
                attach_epoch,
                full_base_seq: 0,
            },
            channel,
        );
        channel
    }

    /// The next DATA frame: the seqs in it.
    pub fn data(&mut self) -> Vec<u64> {
        let frame = self.frame().expect("records come");
        assert_eq!(frame.header.kind, FrameKind::Data);
        RecordIter::new(&frame.body)
            .map(|record| record.expect("a good record").header.seq)
            .collect()
    }

    pub fn ack(&mut self, channel: u32, durable_seq: u64) {
        self.send(
            &Message::Ack {
                durable_seq,
                uploaded_seq: 0,
            },
            channel,
        );
    }

    /// Reads until the daemon ends the connection.
    pub fn wait_gone(&mut self) {
        let end = Instant::now() + DEADLINE;
        let mut sink = vec![0u8; 65536];
        loop {
            match self.stream.read(&mut sink) {
                Ok(0) => return,
                Ok(_) => assert!(Instant::now() < end, "the daemon goes on and on"),
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return,
                Err(e) => panic!("the daemon does not end the connection: {e}"),
            }
        }
    }
}

/// A record as the server got it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub seq: u64,
    pub attach_epoch: u32,
    pub cut_epoch: u32,
    pub port: u16,
}

#[derive(Default)]
pub struct Disk {
    pub log: Vec<Seen>,
    pub durable: u64,
    /// Seq of the last base that relied on nothing.
    pub full_base: u64,
    generation: u64,
}

impl Disk {
    pub fn last(&self) -> u64 {
        self.log.last().map_or(0, |seen| seen.seq)
    }
}

#[derive(Default)]
pub struct State {
    pub disks: HashMap<[u8; 16], Disk>,
    /// Each OPEN_LANE: disk, port, attach epoch.
    pub opens: Vec<([u8; 16], u16, u32)>,
    /// Each CLOSE_LANE: disk, port.
    pub closes: Vec<([u8; 16], u16)>,
    /// Those of them that said that the disk was closed in order.
    pub closed_in_order: Vec<[u8; 16]>,
    /// What the daemon did wrong.
    pub wrongs: Vec<String>,
    /// Answers to requests for cuts.
    pub cuts: Vec<Message>,
    pub connections: u64,
    control: Option<TcpStream>,
    streams: Vec<TcpStream>,
}

/// Faults on request.
pub struct Faults {
    /// Records are read and never acknowledged.
    pub never_acks: AtomicBool,
    /// Data connections end after some bytes.
    pub breaks: AtomicBool,
}

/// Serves until it is dropped.
pub struct Server {
    pub base: u16,
    pub state: Arc<Mutex<State>>,
    pub faults: Arc<Faults>,
    stopping: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Server {
    pub fn start() -> Self {
        Self::on(Ports::bind(), Numbers(1))
    }

    pub fn on(ports: Ports, mut numbers: Numbers) -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let faults = Arc::new(Faults {
            never_acks: AtomicBool::new(false),
            breaks: AtomicBool::new(false),
        });
        let stopping = Arc::new(AtomicBool::new(false));
        let base = ports.base;
        let listeners = PortRole::ALL.into_iter().zip(ports.listeners);
        let threads = listeners.map(|(role, listener)| {
            let (state, faults, stopping) = (state.clone(), faults.clone(), stopping.clone());
            let mut numbers = Numbers(numbers.draw() | 1);
            listener.set_nonblocking(false).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    if stopping.load(SeqCst) {
                        return;
                    }
                    let stream = stream.unwrap();
                    let mut locked = state.lock().unwrap();
                    locked.connections += 1;
                    locked.streams.push(stream.try_clone().unwrap());
                    drop(locked);
                    let left = numbers.draw() % (3 << 20);
                    let (state, faults) = (state.clone(), faults.clone());
                    std::thread::spawn(move || {
                        let mut session = Session {
                            peer: Peer::of(stream, role),
                            state,
                            faults,
                            left,
                            channels: HashMap::new(),
                        };
                        let _ = session.run();
                        let _ = session.peer.stream.shutdown(Shutdown::Both);
                    });
                }
            })
        });
        let threads = threads.collect();
        Self {
            base,
            state,
            faults,
            stopping,
            threads,
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Waits until a disk's record `seq` is here, and checks everything before it.
    pub fn wait_received(&self, disk: &[u8; 16], seq: u64) {
        wait_for(&format!("record {seq} arrives"), || {
            let state = self.state();
            assert!(state.wrongs.is_empty(), "{:?}", state.wrongs);
            state.disks.get(disk).is_some_and(|d| d.last() >= seq)
        });
    }

    /// Asks for a cut and returns the answer.
    pub fn cut(&self, epoch: u32, domain: &str) -> Message {
        wait_for("a control connection", || self.state().control.is_some());
        let before = self.state().cuts.len();
        let domain = domain.into();
        let request = Message::CutRequest { epoch, domain }.encode(0);
        let control = self.state().control.as_ref().unwrap().try_clone().unwrap();
        (&control).write_all(&request).unwrap();
        wait_for("the answer to a request for a cut", || {
            self.state().cuts.len() > before
        });
        self.state().cuts[before].clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, SeqCst);
        for port in self.base..self.base + 6 {
            let _ = TcpStream::connect(("127.0.0.1", port));
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        for stream in &state.streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

struct Session {
    peer: Peer,
    state: Arc<Mutex<State>>,
    faults: Arc<Faults>,
    /// Bytes until the connection ends, if connections end.
    left: u64,
    channels: HashMap<u32, ([u8; 16], u64)>,
}

impl Session {
    /// A frame, or the end of the connection in the middle of one.
    fn frame(&mut self) -> io::Result<Frame> {
        let port = self.peer.role != PortRole::Control;
        if port && self.faults.breaks.load(SeqCst) {
            let mut raw = [0u8; FRAME_HEADER_BYTES];
            self.peer.stream.peek(&mut raw[..1])?;
            let want = raw.len() as u64 + 256 * 1024;
            if self.left < want {
                let mut part = vec![0u8; self.left as usize];
                let _ = self.peer.stream.read(&mut part);
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
        let frame = self.peer.frame()?;
        self.left = self.left.saturating_sub(32 + frame.body.len() as u64);
        Ok(frame)
    }

    fn run(&mut self) -> io::Result<()> {
        self.peer.stream.set_read_timeout(None)?;
        let hello = self.peer.frame()?;
        assert_eq!(hello.header.kind, FrameKind::Hello);
        let ours = self.peer.hello();
        self.peer.send(&Message::Hello(ours), 0);
        if self.peer.role == PortRole::Control {
            self.state.lock().unwrap().control = Some(self.peer.stream.try_clone()?);
        }
        loop {
            let frame = self.frame()?;
            if frame.header.kind == FrameKind::Data {
                self.data(&frame);
                continue;
            }
            let channel = frame.header.channel;
            match Message::decode(&frame.header, &frame.body).unwrap() {
                Message::OpenLane(lane) => self.open(channel, &lane),
                Message::CloseLane { in_order } => {
                    let closed = self.channels.remove(&channel);
                    let mut state = self.state.lock().unwrap();
                    match closed {
                        Some((disk, _)) => {
                            state.closes.push((disk, self.peer.role.offset()));
                            state.closed_in_order.extend(in_order.then_some(disk));
                        }
                        None => state.wrongs.push("an unknown channel was closed".into()),
                    }
                }
                Message::Heartbeat { clock_ns, answer } => {
                    if !answer {
                        let answer = true;
                        self.peer.send(&Message::Heartbeat { clock_ns, answer }, 0);
                    }
                }
                answer @ (Message::CutPositions { .. }
                | Message::CutReport { .. }
                | Message::Error { .. }) => {
                    self.state.lock().unwrap().cuts.push(answer);
                }
                other => {
                    let wrong = format!("{other:?}");
                    self.state.lock().unwrap().wrongs.push(wrong);
                }
            }
        }
    }

    fn open(&mut self, channel: u32, lane: &OpenLane) {
        let mut state = self.state.lock().unwrap();
        let port = self.peer.role.offset();
        state.opens.push((lane.disk_id, port, lane.attach_epoch));
        let disk = state.disks.entry(lane.disk_id).or_default();
        disk.generation += 1;
        self.channels
            .insert(channel, (lane.disk_id, disk.generation));
        let (durable_seq, full_base_seq) = (disk.durable, disk.full_base);
        let attach_epoch = lane.attach_epoch;
        drop(state);
        self.peer.send(
            &Message::LaneOpened {
                durable_seq,
                attach_epoch,
                full_base_seq,
            },
            channel,
        );
    }

    fn data(&mut self, frame: &Frame) {
        let channel = frame.header.channel;
        let Some((disk_id, generation)) = self.channels.get(&channel).copied() else {
            return;
        };
        let mut state = self.state.lock().unwrap();
        let state = &mut *state;
        let disk = state.disks.get_mut(&disk_id).unwrap();
        if disk.generation != generation {
            return;
        }
        for record in RecordIter::new(&frame.body) {
            let record = record.unwrap();
            let header = record.header;
            if header.seq <= disk.last() {
                continue;
            }
            let base = header.flags & filter_core::record::FLAG_STREAM_BASE != 0;
            if header.seq != disk.last() + 1 && !base {
                let wrong = format!("record {} follows {}", header.seq, disk.last());
                state.wrongs.push(wrong);
            }
            if base {
                let (relies_on, last) = (header.offset_bytes, disk.last());
                if relies_on != 0 && !(disk.full_base..=last).contains(&relies_on) {
                    let wrong = format!("base {} relies on {relies_on}, held: {last}", header.seq);
                    state.wrongs.push(wrong);
                }
                if relies_on == 0 {
                    disk.full_base = header.seq;
                }
            }
            let right = payload(&disk_id, header.seq, record.payload.len().max(8));
            if header.kind == RecordKind::Write && record.payload != right {
                state
                    .wrongs
                    .push(format!("record {}: wrong bytes", header.seq));
            }
            disk.log.push(Seen {
                seq: header.seq,
                attach_epoch: header.attach_epoch,
                cut_epoch: header.cut_epoch,
                port: self.peer.role.offset(),
            });
        }
        if !self.faults.never_acks.load(SeqCst) {
            disk.durable = disk.last();
            let durable = disk.durable;
            self.peer.ack(channel, durable);
        }
    }
}
