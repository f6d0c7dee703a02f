//! One cell of the kill matrix: a stack, its guests, a state that is brought about, a fault, and the end in
//! which everything has to agree.
//!
//! Two guests work at a time: fio with verification on `d0`, and on `d1` a guest that remembers what was
//! acknowledged, also over the death of its host. Invariant: a cell that returns was in its state when the
//! fault came.

use crate::support::guest::now_ns;
use crate::support::link::{Link, Weather};
use crate::support::{Numbers, Part, Stack, client, first_difference};
use crate::witness::{Memory, Witness};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const D0_BYTES: u64 = 64 << 20;
const D1_BYTES: u64 = 8 << 20;
/// Some seconds of load at fio's rate.
const LOAD_MEGABYTES: u64 = 16;
/// How long the filter may defer a write, by its default.
const BUDGET: Duration = Duration::from_millis(5);

/// What goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    Vm,
    Daemon,
    Appliance,
    Host,
    Store,
    Link,
}

/// When it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Idle,
    Streaming,
    Tracking,
    Syncing,
    Attaching,
}

pub const VICTIMS: [Victim; 6] = [
    Victim::Vm,
    Victim::Daemon,
    Victim::Appliance,
    Victim::Host,
    Victim::Store,
    Victim::Link,
];
pub const STATES: [State; 5] = [
    State::Idle,
    State::Streaming,
    State::Tracking,
    State::Syncing,
    State::Attaching,
];

/// What was seen.
pub struct Outcome {
    /// The longest that the filter deferred a write, as the host's checks measured it.
    pub deferred_max: Duration,
    /// What it may have been: the budget, and what this machine's scheduling adds.
    pub allowed: Duration,
    /// The longest that a write took the guest that remembers, with its disk.
    pub slowest_write: Duration,
    pub writes: u64,
    pub took: Duration,
}

/// How late this machine wakes a thread that asked for a millisecond: what a timer of the filter may be
/// late as well.
struct Lateness {
    stop: Arc<AtomicBool>,
    worst_ns: Arc<AtomicU64>,
}

impl Lateness {
    fn start() -> Self {
        let meter = Self {
            stop: Arc::default(),
            worst_ns: Arc::default(),
        };
        let (stop, worst_ns) = (meter.stop.clone(), meter.worst_ns.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let since = Instant::now();
                std::thread::sleep(Duration::from_millis(1)); // time under test: the machine's own
                worst_ns.fetch_max(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
            }
        });
        meter
    }

    /// The budget, and three times the worst lateness (a timer, a thread, the disk's own), at least 50 ms:
    /// a meter that looks once a millisecond does not see every moment.
    fn allowed(&self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let worst = Duration::from_nanos(self.worst_ns.load(Ordering::Relaxed));
        BUDGET + (3 * worst).max(Duration::from_millis(50))
    }
}

/// fio; ended with the cell, however that ends.
struct Fio(Child);

impl Fio {
    /// Writes `megabytes` of `d0` at a bounded rate, and reads all of it back.
    fn start(stack: &Stack, megabytes: u64, seed: u64) -> Self {
        let mut fio = client("fio");
        // A job that is a process of its own would outlive fio.
        fio.arg("--thread").current_dir(stack.dir.path());
        fio.args(["--name=chaos", "--ioengine=nbd", "--rw=randwrite"]);
        fio.args(["--bsrange=4k-32k", "--iodepth=8", "--verify=crc32c"]);
        fio.args(["--verify_fatal=1", "--verify_state_save=0"]);
        fio.args(["--verify_backlog=256", "--rate_iops=600,600"]);
        fio.arg(format!("--size={megabytes}M"));
        fio.arg(format!("--randseed={}", seed % 1_000_000));
        fio.arg(format!("--uri={}", stack.uri("d0")));
        let log = std::fs::File::create(stack.log("fio")).unwrap();
        fio.stdin(Stdio::null()).stdout(log.try_clone().unwrap());
        Self(fio.stderr(log).spawn().unwrap())
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// The guest must have seen no error, and what it wrote.
    fn finish(mut self, stack: &Stack) {
        let said = || std::fs::read_to_string(stack.log("fio")).unwrap_or_default();
        assert!(
            self.0.wait().unwrap().success(),
            "the guest saw an error: {}",
            said()
        );
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        // fio ignores SIGTERM; and its server may be gone, then it would wait for ever.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Cell {
    stack: Stack,
    link: Link,
    numbers: Numbers,
    fio: Option<Fio>,
    witness: Option<Witness>,
    memory: Option<Memory>,
    deferred_max_ns: u64,
    /// Stopped by SIGSTOP, to be continued.
    frozen: bool,
}

/// A copy of a disk's file, made at the cut `before`.
fn as_before(disk: &Path) -> PathBuf {
    disk.with_extension("before")
}

impl Cell {
    fn new(seed: u64, ring_bytes: u64) -> Self {
        let mut stack = Stack::new(&[("d0.raw", D0_BYTES), ("d1.raw", D1_BYTES)]);
        let property = format!("jetdr.ring-bytes={ring_bytes}");
        stack.vm_more.extend(["--property".into(), property]);
        stack.start_drva();
        let link = Link::before(stack.port_base);
        stack.daemon_port_base = Some(link.port_base);
        Self {
            stack,
            link,
            numbers: Numbers(seed),
            fio: None,
            witness: None,
            memory: Some(Memory::new(D1_BYTES, seed)),
            deferred_max_ns: 0,
            frozen: false,
        }
    }

    fn start_witness(&mut self) {
        let memory = self.memory.take().unwrap();
        self.witness = Some(Witness::start(self.stack.nbd_socket(), "d1", memory));
    }

    fn start_load(&mut self, megabytes: u64) {
        let seed = self.numbers.next();
        self.fio = Some(Fio::start(&self.stack, megabytes, seed));
        self.start_witness();
    }

    fn end_load(&mut self) {
        if let Some(fio) = self.fio.take() {
            fio.finish(&self.stack);
        }
        if let Some(witness) = self.witness.take() {
            self.memory = Some(witness.finish());
        }
    }

    /// The guests die with their host.
    fn bury_load(&mut self) {
        self.fio = None;
        if let Some(witness) = self.witness.take() {
            self.memory = Some(witness.buried());
        }
    }

    /// Reads the host's checks; before a VM ends, too.
    fn note_deferrals(&mut self) {
        let status = self.stack.vm_status();
        assert_eq!(status["contract_violations"], 0, "{status}");
        let max_ns = status["host_deferred_max_ns"].as_u64().unwrap();
        self.deferred_max_ns = self.deferred_max_ns.max(max_ns);
    }

    fn states(&self) -> Vec<String> {
        let status = self.stack.vm_status();
        let disks = status["disks"].as_array().unwrap();
        let state = |disk: &serde_json::Value| disk["state"].as_str().unwrap().to_string();
        disks.iter().map(state).collect()
    }

    /// A cut of the settled disks that must be there unchanged in the end.
    fn cut_before(&self) {
        self.stack.settle();
        self.stack.cut("before");
        for (_, disk) in &self.stack.disks {
            std::fs::copy(disk, as_before(disk)).unwrap();
        }
    }

    fn wait_for_records(&self, more: u64) {
        let count = |stack: &Stack| stack.domain()["records"].as_u64().unwrap_or(0);
        let before = count(&self.stack);
        self.stack
            .wait("records arrive", |stack| count(stack) >= before + more);
    }

    /// Stops whoever stands in the victim's way of tracking: the victim itself where that is possible.
    fn hold_up(&mut self, victim: Victim) {
        self.frozen = true;
        match victim {
            Victim::Daemon => self.stack.daemon.as_ref().unwrap().signal("STOP"),
            Victim::Link => self.link.set(Weather::Stalled),
            _ => self.stack.drva.as_ref().unwrap().signal("STOP"),
        }
    }

    fn let_go(&mut self, victim: Victim) {
        if std::mem::take(&mut self.frozen) {
            match victim {
                Victim::Daemon | Victim::Appliance => {} // it was killed
                Victim::Link => {}                       // it is repaired
                _ => self.stack.drva.as_ref().unwrap().signal("CONT"),
            }
        }
    }

    /// Brings the state about; `false`: it was over before it could be seen.
    fn bring(&mut self, victim: Victim, state: State) -> bool {
        if state == State::Syncing {
            return self.bring_syncing();
        }
        self.stack.start_daemon();
        self.stack.start_vm();
        self.cut_before();
        match state {
            State::Idle => {
                self.start_load(2);
                self.end_load();
                self.stack.settle();
            }
            State::Streaming => {
                self.start_load(LOAD_MEGABYTES);
                self.wait_for_records(400);
                self.stack
                    .wait("both stream", |_| self.states() == ["streaming"; 2]);
            }
            State::Tracking => {
                self.start_load(LOAD_MEGABYTES);
                self.wait_for_records(100);
                self.hold_up(victim);
                let tracks = |_: &Stack| self.states().iter().any(|state| state == "tracking");
                self.stack.wait("a disk tracks", tracks);
            }
            State::Attaching => {
                self.start_load(LOAD_MEGABYTES);
                self.wait_for_records(100);
                self.note_deferrals();
                self.stack.vm.take().unwrap().kill();
                self.bury_load();
            }
            State::Syncing => {}
        }
        state != State::Streaming || self.states() == ["streaming"; 2]
    }

    /// The first sync of a disk that is full, with the guests at work.
    fn bring_syncing(&mut self) -> bool {
        let mut numbers = Numbers(now_ns());
        let bytes: Vec<u8> = (0..D0_BYTES / 8)
            .flat_map(|_| numbers.next().to_le_bytes())
            .collect();
        std::fs::write(&self.stack.disks[0].1, bytes).unwrap();
        self.stack.start_daemon();
        self.stack.drva.as_ref().unwrap().signal("STOP");
        self.stack.start_vm();
        self.start_load(LOAD_MEGABYTES);
        self.stack.drva.as_ref().unwrap().signal("CONT");
        let mut state = String::new();
        self.stack.wait("the sync is under way", |stack| {
            let disk = stack.vm_status()["disks"][0].take();
            state = disk["state"].as_str().unwrap().to_string();
            let durable = disk["durable_seq"].as_u64().unwrap_or(0);
            state == "streaming" || (state == "syncing" && durable > 20)
        });
        state == "syncing"
    }

    /// The fault, and that it is over.
    fn fault(&mut self, victim: Victim, state: State) {
        if state == State::Attaching {
            return self.fault_at_attach(victim);
        }
        if let Some(fio) = &mut self.fio {
            assert!(fio.runs(), "the load is over before the fault");
        }
        match victim {
            Victim::Vm => {
                self.note_deferrals();
                self.stack.vm.take().unwrap().kill();
                self.bury_load();
                self.stack.start_vm();
            }
            Victim::Daemon => {
                self.stack.daemon.take().unwrap().kill();
                self.stack.start_daemon();
            }
            Victim::Appliance => {
                self.stack.drva.take().unwrap().kill();
                self.stack.start_drva();
            }
            Victim::Host => {
                self.note_deferrals();
                self.stack.reboot();
                self.bury_load();
                self.stack.start_daemon();
                self.stack.start_vm();
            }
            Victim::Store => {
                self.store_goes();
                self.let_go(victim);
                self.store_is_missed();
                self.store_comes();
            }
            Victim::Link => self.link_breaks(),
        }
        self.let_go(victim);
    }

    /// The victim goes while the VM opens its disks.
    fn fault_at_attach(&mut self, victim: Victim) {
        if victim == Victim::Store {
            self.store_goes();
        }
        if victim == Victim::Link {
            self.link.set(Weather::Cut);
        }
        let mut vm = Part::spawn(&self.stack.log("vm"), &self.stack.vm_arguments());
        // Somewhere in it, up to the end of it.
        let late = self.numbers.next() >> 40 & 1 == 1;
        if late {
            assert!(vm.wait_ready());
        } else {
            std::thread::sleep(Duration::from_micros(self.numbers.next() >> 40 & 0x3fff)); // time under test
        }
        match victim {
            Victim::Vm => {
                vm.kill();
                return self.stack.start_vm();
            }
            Victim::Host => {
                self.stack.vm = Some(vm);
                self.stack.reboot();
                self.stack.start_daemon();
                return self.stack.start_vm();
            }
            Victim::Daemon => {
                self.stack.daemon.take().unwrap().kill();
                self.stack.start_daemon();
            }
            Victim::Appliance => {
                self.stack.drva.take().unwrap().kill();
                self.stack.start_drva();
            }
            Victim::Store | Victim::Link => {}
        }
        assert!(late || vm.wait_ready());
        self.stack.vm = Some(vm);
        match victim {
            Victim::Store => self.store_comes(),
            Victim::Link => self.link.set(Weather::Fine),
            _ => {}
        }
    }

    /// The store's folder is away, and a file in its place makes that nobody begins another one there.
    fn store_goes(&self) {
        std::fs::rename(&self.stack.store, format!("{}.away", self.stack.store)).unwrap();
        std::fs::write(&self.stack.store, "no folder").unwrap();
    }

    /// Whatever is written now cannot be stored, and the operator is told.
    fn store_is_missed(&self) {
        if self.fio.is_none() {
            let mut io = client("qemu-io");
            io.args(["-f", "raw", "-c", "write -P 5 1M 64k"]);
            assert!(io.arg(self.stack.uri("d0")).status().unwrap().success());
        }
        self.stack.wait("an alarm about the store", |stack| {
            let alarms = stack.domain()["alarms"].to_string();
            alarms.contains("store") || alarms.contains("upload")
        });
    }

    fn store_comes(&self) {
        std::fs::remove_file(&self.stack.store).unwrap();
        std::fs::rename(format!("{}.away", self.stack.store), &self.stack.store).unwrap();
    }

    /// Cut, or half-open first; then repaired.
    fn link_breaks(&mut self) {
        if self.numbers.next() >> 40 & 1 == 1 && self.fio.is_some() {
            self.link.set(Weather::Stalled);
            let (stack, since) = (&self.stack, Instant::now());
            let held = |disk: &serde_json::Value| {
                disk["state"] == "tracking" || since.elapsed() > Duration::from_secs(2)
            };
            stack.wait("nothing comes through", |stack| {
                held(&stack.vm_status()["disks"][0])
            });
        }
        self.link.set(Weather::Cut);
        self.stack.wait("the daemon sees it", |stack| {
            let document = stack.daemon_status();
            !document["connected_ports"]
                .as_array()
                .unwrap()
                .contains(&true.into())
        });
        self.link.set(Weather::Fine);
    }

    /// All must agree: guests, disks, replica, cuts.
    fn agree(&mut self, state: State) {
        if self.witness.is_none() {
            self.start_load(6);
        }
        self.end_load();
        self.note_deferrals();
        self.stack.recover_and_compare("end");
        if state != State::Syncing {
            self.stack.compare_cut("before", as_before);
        }
        for (_, disk) in &self.stack.disks {
            if as_before(disk).exists() {
                let changed = first_difference(disk, &as_before(disk));
                assert!(changed.is_some(), "no guest wrote to {}", disk.display());
            }
        }
    }
}

/// Runs a cell; whatever does not hold is a panic.
pub fn run(victim: Victim, state: State, seed: u64) -> Outcome {
    let since = Instant::now();
    let lateness = Lateness::start();
    // What has been sent and is not yet durable fills a small ring soon: then disks track.
    let ring_bytes = 2 << 20;
    for _ in 0..3 {
        let mut cell = Cell::new(seed, ring_bytes);
        if !cell.bring(victim, state) {
            continue; // a state that was over too soon
        }
        cell.fault(victim, state);
        cell.agree(state);
        let memory = cell.memory.as_ref().unwrap();
        let outcome = Outcome {
            deferred_max: Duration::from_nanos(cell.deferred_max_ns),
            allowed: lateness.allowed(),
            slowest_write: memory.slowest,
            writes: memory.writes,
            took: since.elapsed(),
        };
        assert!(
            outcome.deferred_max <= outcome.allowed,
            "a write was deferred for {:?}, more than {:?}",
            outcome.deferred_max,
            outcome.allowed
        );
        return outcome;
    }
    panic!("{state:?} was over before it could be seen, three times");
}
