//! An appliance as a real process, and a host that does exactly what a test tells it to.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

#[path = "../../../../recovery-store/tests/support/mod.rs"]
pub mod store;

use filter_core::wire::{
    ErrorCode, FRAME_HEADER_BYTES, FrameHeader, Hello, Message, OpenLane, PeerRole, PortRole,
};
use recovery_store::{Container, CutInfo, StoreUrl};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use store::{Model, Rec, read_disk};
use uuid::Uuid;

/// Every wait ends here.
pub const LIMIT: Duration = Duration::from_secs(60);
pub const DOMAIN: &str = "scripted";
/// The host that is meant if no other is named.
pub const HOST: [u8; 16] = [0x51; 16];
/// Another one.
pub const OTHER_HOST: [u8; 16] = [0x52; 16];
pub const CAPACITY_BYTES: u64 = 1 << 20;

/// A folder with an appliance's data and store.
pub struct Site {
    pub dir: tempfile::TempDir,
    pub more: Vec<String>,
    /// Instead of a folder.
    pub other_store: Option<OsString>,
    /// Faults that the appliance is to have: see JETDR_FAULT.
    pub fault: Option<String>,
}

/// A running appliance; killed when dropped.
pub struct Drva {
    pub child: Child,
    pub port_base: u16,
    socket: PathBuf,
}

impl Site {
    pub fn new(more: &[&str]) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            more: more.iter().map(|text| text.to_string()).collect(),
            other_store: None,
            fault: None,
        }
    }

    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn start(&self) -> Drva {
        let socket = self.dir.path().join("status");
        let errors = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log.txt"))
            .unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_drva"))
            .arg("--data-dir")
            .arg(self.data())
            .arg("--store")
            .arg(
                self.other_store
                    .clone()
                    .unwrap_or_else(|| self.store().into()),
            )
            .arg("--status-socket")
            .arg(&socket)
            .args(["--port-base", "0", "--insecure-plain-text"])
            .args(&self.more)
            .env("JETDR_FAULT", self.fault.clone().unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let ready: Value = match line.strip_prefix("READY ") {
            Some(json) => serde_json::from_str(json).unwrap(),
            None => panic!("did not start: {line}{}", self.said()),
        };
        let port_base = ready["port_base"].as_u64().unwrap() as u16;
        Drva {
            child,
            port_base,
            socket,
        }
    }

    /// What the appliance logged.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log.txt")).unwrap_or_default()
    }

    /// The cuts in the store, and the disks of the last as they would be recovered.
    pub fn recover(&self) -> (Vec<CutInfo>, BTreeMap<Uuid, Vec<u8>>) {
        let cuts = self.recover_all();
        let last = cuts.last().map(|(_, disks)| disks.clone());
        let infos = cuts.into_iter().map(|(info, _)| info).collect();
        (infos, last.unwrap_or_default())
    }

    /// Every cut in the store with its disks.
    pub fn recover_all(&self) -> Vec<(CutInfo, BTreeMap<Uuid, Vec<u8>>)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let path = self.store().join(DOMAIN);
            let url = StoreUrl::parse(path.to_str().unwrap(), &[]).unwrap();
            let container = Container::open(&url).await.unwrap();
            let mut all = Vec::new();
            for entry in container.cuts().await.unwrap() {
                let info = entry.state.unwrap();
                let view = container.view(&info, None, |_, _| {}).await.unwrap();
                let mut disks = BTreeMap::new();
                for disk in &info.disks {
                    disks.insert(disk.uuid, read_disk(&container, &view, disk).await);
                }
                all.push((info, disks));
            }
            all
        })
    }
}

impl Drva {
    /// A command on the status socket.
    pub fn ask(&self, command: &Value) -> Value {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        writeln!(stream, "{command}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The status of the tests' domain.
    pub fn status(&self) -> Value {
        let mut status = self.ask(&json!({"cmd": "status"}));
        status["domains"][0].take()
    }

    /// Waits until the domain's status is as wanted.
    pub fn wait_until(&self, what: &str, good: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if good(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "never {what}: {status:#}");
            std::thread::yield_now();
        }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; must end well, and within the limit.
    pub fn stop(&mut self, limit: Duration) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").arg(id).status().unwrap().success());
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            assert!(Instant::now() < deadline, "does not stop");
            std::thread::yield_now();
        }
    }

    pub fn connect(&self, role: PortRole) -> Link {
        self.connect_as(HOST, role)
    }

    /// As the host of this identity.
    pub fn connect_as(&self, host: [u8; 16], role: PortRole) -> Link {
        self.connect_speaking(host, role, 1)
    }

    /// The same, up to this protocol.
    pub fn connect_speaking(&self, host: [u8; 16], role: PortRole, newest: u16) -> Link {
        let mut link = self.connect_bare(role);
        let hello = Hello {
            oldest: 1,
            newest,
            role: PeerRole::Daemon,
            port_offset: role.offset() as u8,
            peer_id: host,
            incarnation: 1,
            name: "scripted".into(),
        };
        link.send(&Message::Hello(hello), 0);
        assert!(matches!(link.next(), (_, Message::Hello(_))));
        link
    }

    /// Without a hello.
    pub fn connect_bare(&self, role: PortRole) -> Link {
        let port = self.port_base + role.offset();
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        Link { stream }
    }
}

impl Drop for Drva {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection of the host.
pub struct Link {
    pub stream: TcpStream,
}

impl Link {
    pub fn send(&mut self, message: &Message, channel: u32) {
        self.stream.write_all(&message.encode(channel)).unwrap();
    }

    /// The next frame; `None`: the appliance has closed the connection.
    pub fn try_next(&mut self) -> Option<(u32, Message)> {
        let mut raw = [0u8; FRAME_HEADER_BYTES];
        if let Err(error) = self.stream.read_exact(&mut raw) {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no answer");
            return None;
        }
        let header = FrameHeader::decode(&raw).unwrap();
        let mut body = vec![0; header.body_len as usize];
        self.stream.read_exact(&mut body).unwrap();
        Some((header.channel, Message::decode(&header, &body).unwrap()))
    }

    pub fn next(&mut self) -> (u32, Message) {
        self.try_next()
            .expect("the appliance closed the connection")
    }

    /// Opens a lane; gives the durable seq.
    pub fn open(&mut self, channel: u32, disk: &Disk) -> Result<u64, Box<Message>> {
        self.send(&Message::OpenLane(disk.open.clone()), channel);
        loop {
            match self.next() {
                (of, Message::LaneOpened { durable_seq, .. }) if of == channel => {
                    return Ok(durable_seq);
                }
                (of, error @ Message::Error { .. }) if of == channel => return Err(error.into()),
                _ => {}
            }
        }
    }

    /// Asks what the appliance holds of a channel's disk.
    pub fn ask_hashes(&mut self, channel: u32, offset_bytes: u64, blocks: u32) -> Vec<[u8; 16]> {
        let question = Message::HashRequest {
            offset_bytes,
            blocks,
        };
        self.send(&question, channel);
        self.wait_hashes(channel, offset_bytes)
    }

    /// The answer to the first question that is not answered yet.
    pub fn wait_hashes(&mut self, channel: u32, offset_bytes: u64) -> Vec<[u8; 16]> {
        loop {
            if let (
                of,
                Message::Hashes {
                    offset_bytes: at,
                    hashes,
                },
            ) = self.next()
            {
                assert_eq!((of, at), (channel, offset_bytes));
                return hashes;
            }
        }
    }

    /// In frames of a few records.
    pub fn records(&mut self, channel: u32, records: &[Rec]) {
        records.chunks(8).for_each(|part| self.frame(channel, part));
    }

    fn frame(&mut self, channel: u32, records: &[Rec]) {
        let mut body = Vec::new();
        for record in records {
            let header = record.header;
            body.extend_from_slice(&header.encode());
            body.extend_from_slice(&record.payload);
            let span = header.span_bytes() - 64 - record.payload.len();
            body.extend(std::iter::repeat_n(0, span));
        }
        self.raw_records(channel, records.first().map_or(0, |r| r.header.seq), &body);
    }

    pub fn raw_records(&mut self, channel: u32, first_seq: u64, body: &[u8]) {
        let header = FrameHeader::data(channel, first_seq, body.len() as u32);
        self.stream.write_all(&header.encode()).unwrap();
        self.stream.write_all(body).unwrap();
    }

    /// Waits until the channel is acknowledged up to here.
    pub fn wait_durable(&mut self, channel: u32, seq: u64) {
        loop {
            match self.next() {
                (of, Message::Ack { durable_seq, .. }) if of == channel && durable_seq >= seq => {
                    return;
                }
                (of, error @ Message::Error { .. }) if of == channel => panic!("{error:?}"),
                _ => {}
            }
        }
    }

    /// The next error on a channel.
    pub fn wait_error(&mut self, channel: u32) -> Message {
        loop {
            if let (of, error @ Message::Error { .. }) = self.next()
                && of == channel
            {
                return error;
            }
        }
    }
}

/// A disk of the scripted host, with what its guest wrote.
pub struct Disk {
    pub open: OpenLane,
    pub uuid: Uuid,
    pub model: Model,
    pub seq: u64,
    pub cut_epoch: u32,
}

impl Disk {
    pub fn new(number: u128) -> Self {
        let uuid = Uuid::from_u128(0x100 + number);
        Self {
            open: OpenLane {
                disk_id: uuid.into_bytes(),
                vm_id: [0x20; 16],
                attach_epoch: 1,
                again: false,
                attach_id: 0,
                map_generation: 0,
                lineage: Box::default(),
                durable_seq: 0,
                capacity_bytes: CAPACITY_BYTES,
                base: Some(0),
                domain: DOMAIN.into(),
                vm_name: "vm".into(),
                disk_label: format!("disk{number}"),
            },
            uuid,
            model: Model::new(CAPACITY_BYTES),
            seq: 0,
            cut_epoch: 1,
        }
    }

    /// The next record is this one.
    pub fn push(&mut self, mut record: Rec) -> Rec {
        self.seq += 1;
        record.header.seq = self.seq;
        record.header.stamp = self.seq;
        record.header.attach_epoch = self.open.attach_epoch;
        record.header.cut_epoch = self.cut_epoch;
        record.header.payload_crc = match record.payload.len() {
            0 => 0,
            _ => crc32c::crc32c(&record.payload),
        };
        self.model.apply(&record);
        record
    }

    /// The stream begins, and its sync of an empty disk is complete.
    pub fn begin(&mut self) -> Vec<Rec> {
        vec![
            self.push(store::stream_base(1)),
            self.push(store::sync_end(1)),
        ]
    }

    /// The disk goes on in a new lane with this epoch, above a gap in the seqs; nothing was lost: its
    /// sync is empty.
    pub fn move_to_new_lane(&mut self, attach_epoch: u32) -> Vec<Rec> {
        let relies_on = self.seq;
        self.open.attach_epoch = attach_epoch;
        self.open.base = Some(relies_on);
        self.seq += 100;
        let mut base = store::stream_base(1);
        base.header.offset_bytes = relies_on;
        vec![self.push(base), self.push(store::sync_end(1))]
    }

    /// The disk is larger from now on.
    pub fn grow(&mut self, capacity_bytes: u64) {
        self.open.capacity_bytes = capacity_bytes;
        self.model.bytes.resize(capacity_bytes as usize, 0);
    }

    pub fn write(&mut self, offset_bytes: u64, len: u32, fill: u8) -> Rec {
        self.push(store::write(1, offset_bytes, len, fill))
    }
}

/// A host's identity as text.
pub fn hex_of(host: [u8; 16]) -> String {
    filter_core::mapping::hex(&host)
}

/// Answers a request for a cut of this epoch: later records of the disks are of the new epoch.
pub fn answer_cut(control: &mut Link, disks: &mut [Disk], epoch: u32) {
    for disk in disks.iter_mut() {
        disk.cut_epoch = epoch;
    }
    send_positions(control, epoch, positions_of(disks));
}

/// Where the disks stand now.
pub fn positions_of(disks: &[Disk]) -> Vec<([u8; 16], u64)> {
    disks.iter().map(|d| (d.open.disk_id, d.seq)).collect()
}

/// Answers a request for a cut.
pub fn send_positions(control: &mut Link, epoch: u32, positions: Vec<([u8; 16], u64)>) {
    let domain = DOMAIN.into();
    let answer = Message::CutPositions {
        epoch,
        domain,
        positions,
    };
    control.send(&answer, 0);
}

/// Answers that no cut can be taken now.
pub fn refuse_cut(control: &mut Link, epoch: u32) {
    let refusal = Message::Error {
        code: ErrorCode::Other,
        seq: u64::from(epoch),
        text: "not now".into(),
    };
    control.send(&refusal, 0);
}

/// The epoch of the next request for a cut.
pub fn next_request(control: &mut Link) -> u32 {
    loop {
        if let (0, Message::CutRequest { epoch, .. }) = control.next() {
            return epoch;
        }
    }
}

/// The next request, if one is there already.
pub fn request_now(control: &mut Link) -> Option<u32> {
    control.stream.set_nonblocking(true).unwrap();
    let waiting = control.stream.peek(&mut [0]).is_ok();
    control.stream.set_nonblocking(false).unwrap();
    waiting.then(|| next_request(control))
}

/// Takes a cut of the disks as they are now; gives its number once the store holds it.
pub fn cut_now(drva: &Drva, control: &mut Link, disks: &mut [Disk], name: &str) -> u64 {
    let command = json!({"cmd": "cut", "domain": DOMAIN, "name": name});
    let answer = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| drva.ask(&command));
        while !waiter.is_finished() {
            if let Some(epoch) = request_now(control) {
                answer_cut(control, disks, epoch);
            }
            std::thread::yield_now();
        }
        waiter.join().unwrap()
    });
    answer["cut"].as_u64().unwrap_or_else(|| panic!("{answer}"))
}

/// The test's seed: printed, and can be given by JETDR_SEED.
pub fn seed() -> u64 {
    let seed = std::env::var("JETDR_SEED").ok();
    let seed = seed.and_then(|text| text.parse().ok()).unwrap_or(7);
    println!("JETDR_SEED={seed}");
    seed
}
