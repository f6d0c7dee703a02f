//! One cell of the kill matrix on one host: a stack, its guests, a state that is brought about, a fault, and
//! the end in which everything has to agree.
//!
//! Invariant: a cell that returns was in its state when the fault came.

use crate::load::{Lateness, Load, Outcome};
use crate::store::Store;
use crate::support::guest::now_ns;
use crate::support::link::Link;
use crate::support::{Numbers, Part, Stack, client, first_difference};
use crate::{State, Victim};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub const D0_BYTES: u64 = 64 << 20;
pub const D1_BYTES: u64 = 8 << 20;
/// Some seconds of load at fio's rate.
pub const LOAD_MEGABYTES: u64 = 16;
/// What has been sent and is not yet durable fills a small ring soon: then disks track.
pub const RING: &str = "jetdr.ring-bytes=2097152";

struct Cell {
    stack: Stack,
    link: Link,
    store: Store,
    numbers: Numbers,
    load: Load,
    deferred_max_ns: u64,
    /// Stopped by SIGSTOP, to be continued.
    frozen: bool,
}

/// A copy of a disk's file, made at the cut `before`.
pub fn as_before(disk: &Path) -> PathBuf {
    disk.with_extension("before")
}

impl Cell {
    fn new(seed: u64, in_azure: bool) -> Self {
        let mut stack = Stack::new(&[("d0.raw", D0_BYTES), ("d1.raw", D1_BYTES)]);
        stack.vm_more.extend(["--property".into(), RING.into()]);
        let store = match in_azure {
            true => Store::azure(&mut stack),
            false => Store::folder(&stack),
        };
        stack.start_drva();
        let link = Link::before(stack.port_base);
        stack.daemon_port_base = Some(link.port_base);
        Self {
            link,
            store,
            numbers: Numbers(seed),
            load: Load::new(stack.dir.path(), D1_BYTES, seed),
            stack,
            deferred_max_ns: 0,
            frozen: false,
        }
    }

    fn start_load(&mut self, megabytes: u64) {
        let seed = self.numbers.next();
        self.load.start(&self.stack.nbd_socket(), megabytes, seed);
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
            Victim::Link => self.link.half_open(),
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
                self.load.end();
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
                self.load.bury();
            }
            State::Syncing | State::MigratingOut | State::MigratingIn => {}
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
        self.load.assert_fio_runs();
        match victim {
            Victim::Vm => {
                self.note_deferrals();
                self.stack.vm.take().unwrap().kill();
                self.load.bury();
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
                self.load.bury();
                self.stack.start_daemon();
                self.stack.start_vm();
            }
            Victim::Store => {
                self.store.goes();
                self.let_go(victim);
                self.store_is_missed();
                self.store.comes();
            }
            Victim::Link => self.link_breaks(),
        }
        self.let_go(victim);
    }

    /// The victim goes while the VM opens its disks.
    fn fault_at_attach(&mut self, victim: Victim) {
        if victim == Victim::Store {
            self.store.goes();
        }
        if victim == Victim::Link {
            self.link.cut();
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
            Victim::Store => self.store.comes(),
            Victim::Link => self.link.heal(),
            _ => {}
        }
    }

    /// Whatever is written now cannot be stored, and the operator is told.
    fn store_is_missed(&self) {
        if !self.load.is_started() {
            let mut io = client("qemu-io");
            io.args(["-f", "raw", "-c", "write -P 5 1M 64k"]);
            assert!(io.arg(self.stack.uri("d0")).status().unwrap().success());
        }
        self.stack.wait("an alarm about the store", |stack| {
            let alarms = stack.domain()["alarms"].to_string();
            alarms.contains("store") || alarms.contains("upload")
        });
    }

    /// Cut, or half-open first; then repaired.
    fn link_breaks(&mut self) {
        if self.numbers.next() >> 40 & 1 == 1 && self.load.is_started() {
            self.link.half_open();
            let (stack, since) = (&self.stack, Instant::now());
            let held = |disk: &serde_json::Value| {
                disk["state"] == "tracking" || since.elapsed() > Duration::from_secs(2)
            };
            stack.wait("nothing comes through", |stack| {
                held(&stack.vm_status()["disks"][0])
            });
        }
        self.link.cut();
        self.stack.wait("the daemon sees it", |stack| {
            let document = stack.daemon_status();
            !document["connected_ports"]
                .as_array()
                .unwrap()
                .contains(&true.into())
        });
        self.link.heal();
    }

    /// All must agree: guests, disks, replica, cuts.
    fn agree(&mut self, state: State) {
        if !self.load.is_started() {
            self.start_load(6);
        }
        self.load.end();
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
    let lateness = Lateness::start();
    // Each of the two kinds for every other state.
    let in_azure = victim == Victim::Store && (seed + state as u64) % 2 == 1;
    for _ in 0..3 {
        let mut cell = Cell::new(seed, in_azure);
        if !cell.bring(victim, state) {
            continue; // a state that was over too soon
        }
        cell.fault(victim, state);
        cell.agree(state);
        let note = match victim {
            Victim::Store => cell.store.kind().to_string(),
            _ => String::new(),
        };
        return lateness.judge(cell.deferred_max_ns, cell.load.memory(), note);
    }
    panic!("{state:?} was over before it could be seen, three times");
}
