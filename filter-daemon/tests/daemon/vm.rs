//! A host's run folder, the producers in it, and the daemon's process.

use crate::{DEADLINE, wait_for};
use filter_core::lane::layout::{Geometry, Identity, LaneState, MIN_RING_BYTES};
use filter_core::lane::producer::{Draft, Producer, PublishError, Source, Stamps};
use filter_core::lane::sync::AtomicU64;
use filter_core::mapping::{CutPage, Lock, MappedLane, RunFolder, WakeSender, hex};
use filter_core::record::RecordKind;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

pub const DISK: [u8; 16] = [7; 16];
pub const DOMAIN: &str = "domain";

/// A host: its run folder goes when it is dropped.
pub struct Host {
    pub run: RunFolder,
    dir: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        let base = if std::path::Path::new("/dev/shm").is_dir() {
            PathBuf::from("/dev/shm")
        } else {
            std::env::temp_dir()
        };
        let dir = tempfile::Builder::new().prefix("jd-").tempdir_in(base);
        let dir = dir.unwrap();
        let run = RunFolder::open(dir.path()).unwrap();
        Self { run, dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A VM with one disk, which streams from the start.
    pub fn vm(&self, disk: [u8; 16]) -> Vm {
        Vm::new(&self.run, disk, 1, 1)
    }

    /// The same with a ring that no socket's buffers hold.
    pub fn large_vm(&self, disk: [u8; 16]) -> Vm {
        Vm::with_ring(&self.run, disk, 1, 1, 64 << 20)
    }
}

/// What record `seq` of a disk holds.
pub fn payload(disk: &[u8; 16], seq: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![disk[0] ^ seq as u8; len];
    bytes[..8].copy_from_slice(&seq.to_le_bytes());
    bytes
}

fn identity(run: &RunFolder, disk: [u8; 16], base_seq: u64, ring_bytes: u64) -> Identity {
    Identity {
        geometry: Geometry::for_disk(1 << 30, ring_bytes).unwrap(),
        disk_id: disk,
        vm_id: [9; 16],
        boot_id: run.boot_id().unwrap(),
        base_seq,
        domain: DOMAIN.into(),
        vm_name: "vm".into(),
        disk_label: format!("disk{}", disk[0]),
    }
}

pub struct Vm {
    pub lane: MappedLane,
    pub producer: Producer,
    page: CutPage,
    stamp: AtomicU64,
    wake: WakeSender,
    pub disk: [u8; 16],
    _lock: Lock,
}

impl Vm {
    pub fn new(run: &RunFolder, disk: [u8; 16], epoch: u32, base_seq: u64) -> Self {
        Self::with_ring(run, disk, epoch, base_seq, MIN_RING_BYTES)
    }

    pub fn with_ring(
        run: &RunFolder,
        disk: [u8; 16],
        epoch: u32,
        base_seq: u64,
        ring_bytes: u64,
    ) -> Self {
        let lock = run.lock_disk(&disk).unwrap().expect("the disk is free");
        let identity = identity(run, disk, base_seq, ring_bytes);
        let lane = MappedLane::create(run, &identity, 1 << 30).unwrap();
        let producer = Producer::new(lane.memory(), epoch, 0, base_seq);
        producer.set_state(LaneState::Streaming);
        Self::of(run, lane, producer, lock)
    }

    /// A lane that is made and not yet begun: whoever begins it publishes its base first.
    pub fn fresh(run: &RunFolder, disk: [u8; 16], epoch: u32, base_seq: u64) -> Self {
        let lock = run.lock_disk(&disk).unwrap().expect("the disk is free");
        let identity = identity(run, disk, base_seq, MIN_RING_BYTES);
        let lane = MappedLane::create(run, &identity, 1 << 30).unwrap();
        let producer = Producer::new(lane.memory(), epoch, 0, base_seq);
        Self::of(run, lane, producer, lock)
    }

    fn of(run: &RunFolder, lane: MappedLane, producer: Producer, lock: Lock) -> Self {
        let disk = lane.identity().disk_id;
        Self {
            lane,
            producer,
            page: run.cut_page(DOMAIN).unwrap(),
            stamp: AtomicU64::new(0),
            wake: WakeSender::new(run.clone()),
            disk,
            _lock: lock,
        }
    }

    fn wake(&mut self, wake: bool) {
        if wake {
            let slot = self.lane.memory().consumer().wake_slot.load(Relaxed); // as the filter does
            self.wake.wake(slot);
        }
    }

    /// Publishes one record.
    pub fn write(&mut self, len: usize) -> Result<u64, PublishError> {
        let bytes = payload(&self.disk, self.producer.published().seq() + 1, len);
        let draft = Draft {
            kind: RecordKind::Write,
            offset_bytes: 0,
            len_bytes: len as u64,
            sources: &[Source::from_slice(&bytes)],
        };
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: self.page.epoch(),
            time_ns: 1,
        };
        let group = self.producer.publish(&draft, &stamps)?;
        self.wake(group.wake);
        Ok(group.last.seq())
    }

    /// Publishes one record as soon as there is room for it.
    pub fn push(&mut self, len: usize) -> u64 {
        let end = Instant::now() + DEADLINE;
        loop {
            match self.write(len) {
                Ok(seq) => return seq,
                Err(PublishError::Full { .. }) => {
                    let seq = self.producer.published().seq();
                    assert!(Instant::now() < end, "no room after record {seq}");
                    std::thread::yield_now();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Publishes until the ring is full; the last seq.
    pub fn fill(&mut self, len: usize) -> u64 {
        while self.write(len).is_ok() {}
        self.producer.published().seq()
    }

    /// SYNC_BEGIN (a new beginning of the stream if `base`) or SYNC_END.
    pub fn marker(&mut self, begin: bool, base: bool) -> u64 {
        if base {
            self.producer.start_base(0);
        }
        self.publish_marker(begin)
    }

    /// The stream begins anew, relying on the appliance's holding everything up to a seq.
    pub fn begin_relying_on(&mut self, seq: u64) -> u64 {
        self.producer.start_base(seq);
        self.publish_marker(true)
    }

    fn publish_marker(&mut self, begin: bool) -> u64 {
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: self.page.epoch(),
            time_ns: 1,
        };
        let group = self.producer.publish_marker(begin, &stamps).unwrap();
        self.producer.set_state(if begin {
            LaneState::Syncing
        } else {
            LaneState::Streaming
        });
        self.wake(group.wake);
        group.last.seq()
    }

    pub fn free_bytes(&mut self) -> u64 {
        self.producer.free_bytes()
    }
}

/// The daemon's process; killed when it is dropped.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    socket: PathBuf,
}

impl Daemon {
    pub fn command(host: &Host, port_base: u16) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_iofilterd-jetdr"));
        command
            .arg("--run-dir")
            .arg(host.run.path())
            .args(["--port-base", &port_base.to_string()])
            .arg("--insecure-plain-text")
            .arg("--status-socket")
            .arg(host.path("status"));
        command
    }

    pub fn start(host: &Host, port_base: u16) -> Self {
        Self::start_with(host, port_base, "")
    }

    /// With faults.
    pub fn start_with(host: &Host, port_base: u16, fault: &str) -> Self {
        Self::spawn(host, port_base, fault, &[])
    }

    /// With more arguments.
    pub fn start_with_args(host: &Host, port_base: u16, more: &[&str]) -> Self {
        Self::spawn(host, port_base, "", more)
    }

    fn spawn(host: &Host, port_base: u16, fault: &str, more: &[&str]) -> Self {
        let log = host.path("daemon.log");
        let mut options = File::options();
        let file = options.create(true).append(true).open(&log).unwrap();
        let mut child = Self::command(host, port_base)
            .args(more)
            .env("JETDR_FAULT", fault)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert!(line.starts_with("READY "), "the daemon says `{line}`");
        Self {
            child,
            log,
            socket: host.path("status"),
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn status(&self) -> Value {
        let mut text = String::new();
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.read_to_string(&mut text).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// What the status says of a disk's lane.
    pub fn lane(&self, disk: &[u8; 16]) -> Option<Value> {
        let status = self.status();
        let lanes = status["lanes"].as_array().unwrap();
        lanes.iter().find(|lane| lane["disk"] == hex(disk)).cloned()
    }

    /// Waits until the daemon can send no more although there is more, since nobody reads; the last
    /// seq that it took.
    pub fn wait_stuck(&self, disk: &[u8; 16], last: u64) -> u64 {
        let sent = || self.lane(disk).unwrap()["sent_seq"].as_u64().unwrap();
        let mut before = 0;
        wait_for("the socket is full", || {
            std::thread::sleep(Duration::from_millis(300)); // poll
            let now = sent();
            let still = now == before && now > 0;
            before = now;
            still
        });
        assert!(before < last, "the socket took the whole ring");
        before
    }

    /// A start that must fail: what it says.
    pub fn refuses_to_start(host: &Host) -> String {
        let mut child = Self::command(host, 40000)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut status = None;
        let end = Instant::now() + DEADLINE;
        while status.is_none() && Instant::now() < end {
            status = child.try_wait().unwrap();
            std::thread::sleep(Duration::from_millis(2)); // poll
        }
        let _ = child.kill();
        let mut said = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        let _ = child.wait();
        assert!(status.is_some_and(|s| !s.success()), "it started: {said}");
        said
    }

    /// The processor's time that it has used so far, and how often a thread of it went to sleep.
    fn effort(&self) -> (Duration, u64) {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let stat = std::fs::read_to_string(proc.join("stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        let tasks = std::fs::read_dir(proc.join("task")).unwrap().flatten();
        let switches = |status: String| {
            let line = status.lines().find(|l| l.starts_with("voluntary_ctxt"));
            let number = line.and_then(|line| line.split_whitespace().last()?.parse().ok());
            number.unwrap_or(0)
        };
        let sleeps = tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
            .map(switches)
            .sum();
        (Duration::from_millis(ticks * 10), sleeps)
    }

    /// Watches it for a second in which it has nothing to do: it may neither use the processor nor
    /// wake up all the time.
    pub fn expect_quiet(&self, why: &str) {
        let (before, since) = (self.effort(), Instant::now());
        std::thread::sleep(Duration::from_secs(1)); // time under test
        let after = self.effort();
        let seconds = since.elapsed().as_secs_f64();
        let load = (after.0 - before.0).as_secs_f64() / seconds;
        let wakes = after.1.saturating_sub(before.1) as f64 / seconds;
        assert!(load < 0.05, "load {load} with {why}");
        assert!(wakes < 150.0, "{wakes} wake-ups in a second with {why}");
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// SIGTERM, and how long it took to end after that.
    pub fn stop(&mut self) -> Duration {
        let pid = self.child.id().to_string();
        let since = Instant::now();
        assert!(Command::new("kill").arg(&pid).status().unwrap().success());
        wait_for("the daemon ends after SIGTERM", || !self.is_running());
        since.elapsed()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            println!("--- the daemon's log\n{}", self.log());
        }
    }
}
