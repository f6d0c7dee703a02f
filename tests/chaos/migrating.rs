//! One cell of the kill matrix while the VM is on its way between two hosts: the VM's process is held at a
//! named point of the migration, the fault comes, the process goes on.
//!
//! Invariant: when the fault comes the VM is between its hosts. A guest sees an error only where the VM's own
//! process or host was killed and nobody else had the VM yet.

use crate::cell::{D0_BYTES, D1_BYTES, LOAD_MEGABYTES, RING, as_before};
use crate::load::{Lateness, Load, Outcome};
use crate::store::Store;
use crate::support::link::Link;
use crate::support::site::{Site, try_ask};
use crate::support::{Numbers, first_difference, ok};
use crate::{State, Victim};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

/// Points of the source, in order; from the fifth on the other side has the VM.
const OUT: [&str; 6] = [
    "migrate-out-prepared",
    "migrate-out-stunned",
    "migrate-out-handoff",
    "migrate-out-closed",
    "migrate-out-sent",
    "migrate-out-go",
];
/// Points of the destination, in order; at the last one the source has let go.
const IN: [&str; 4] = [
    "migrate-in-waiting",
    "migrate-in-received",
    "migrate-in-opened",
    "migrate-in-arrived",
];

/// Who has the VM when its process at the one side, or all of that host, was killed at a point; `None`:
/// nobody.
fn owner_after(point: &str) -> Option<usize> {
    match point {
        "migrate-out-sent" | "migrate-out-go" => Some(1),
        "migrate-in-waiting" | "migrate-in-received" | "migrate-in-opened" => Some(0),
        _ => None,
    }
}

/// Without these nothing of the stream arrives.
fn is_of_stream(victim: Victim) -> bool {
    matches!(victim, Victim::Daemon | Victim::Appliance | Victim::Link)
}

/// Where the process that passes a point waits.
struct Hold {
    folder: tempfile::TempDir,
    listener: UnixListener,
}

impl Hold {
    fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("jd-hold-")
            .tempdir_in("/dev/shm")
            .unwrap();
        let listener = UnixListener::bind(folder.path().join("hold.sock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { folder, listener }
    }

    fn flag(&self, point: &str) -> String {
        let socket = self.folder.path().join("hold.sock");
        format!("--hold-at={point}={}", socket.display())
    }

    /// Waits until the point is reached. The process goes on when the stream goes.
    fn reached(self, site: &Site, point: &str, migration: &Migration) -> UnixStream {
        let mut held = None;
        site.wait(point, |_| {
            held = self.listener.accept().ok();
            assert!(
                held.is_some() || !migration.is_finished(),
                "the migration was over before {point}"
            );
            held.is_some()
        });
        let (stream, _) = held.unwrap();
        stream.set_nonblocking(false).unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        assert!(line.contains(point), "{line}");
        stream
    }
}

type Migration = JoinHandle<std::io::Result<Value>>;

struct Cell {
    site: Site,
    /// Before each host's daemon.
    links: [Link; 2],
    store: Store,
    numbers: Numbers,
    load: Load,
    deferred_max_ns: u64,
    point: &'static str,
    /// The host where the victim is, if it is one of a host.
    side: usize,
    /// Where the VM was started: there is the guest's socket.
    started_at: usize,
    /// Where it runs.
    at: usize,
}

impl Cell {
    fn new(victim: Victim, state: State, seed: u64) -> Self {
        let mut site = Site::new(&[("d0.raw", D0_BYTES), ("d1.raw", D1_BYTES)]);
        let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let side = usize::from(state == State::MigratingIn);
        let in_azure = victim == Victim::Store && (seed + side as u64) % 2 == 1;
        let store = match in_azure {
            true => Store::azure(&mut site.stack),
            false => Store::folder(&site.stack),
        };
        site.stack.start_drva();
        let links = [(); 2].map(|()| Link::before(site.stack.port_base));
        for (host, link) in site.hosts.iter_mut().zip(&links) {
            host.port_base = link.port_base;
            host.boot();
        }
        let points: &[&str] = match side {
            // Only here the stream's end matters: what is not delivered goes along as marks.
            0 if is_of_stream(victim) && numbers.next() >> 40 & 1 == 1 => &OUT[..1],
            0 => &OUT,
            _ => &IN,
        };
        let point = points[(numbers.next() >> 32) as usize % points.len()];
        Self {
            links,
            store,
            load: Load::new(site.stack.dir.path(), D1_BYTES, seed),
            site,
            numbers,
            deferred_max_ns: 0,
            point,
            side,
            started_at: 0,
            at: 0,
        }
    }

    fn coin(&mut self) -> bool {
        self.numbers.next() >> 40 & 1 == 1
    }

    fn start_load(&mut self, megabytes: u64) {
        let (socket, seed) = (self.site.nbd_socket(self.started_at), self.numbers.next());
        self.load.start(&socket, megabytes, seed);
    }

    /// Reads the host's checks of a VM's process; before it ends, too.
    fn note_deferrals(&mut self, host: usize) {
        let status = self.site.hosts[host].vm_status();
        assert_eq!(status["contract_violations"], 0, "{status}");
        self.note_deferred(&status["host_deferred_max_ns"]);
    }

    fn note_deferred(&mut self, max_ns: &Value) {
        self.deferred_max_ns = self.deferred_max_ns.max(max_ns.as_u64().unwrap());
    }

    /// Two hosts, guests at work, a cut that must be there unchanged in the end; then the VM is on its way,
    /// and held.
    fn bring(&mut self) -> (UnixStream, Migration) {
        let hold = Hold::new();
        let property = format!("--property={RING}");
        self.site.start_vm(0, &[property, hold.flag(self.point)]);
        self.site.settle(0);
        self.site.stack.cut("before");
        for (_, disk) in &self.site.stack.disks {
            std::fs::copy(disk, as_before(disk)).unwrap();
        }
        let records = |site: &Site| site.stack.domain()["records"].as_u64().unwrap_or(0);
        let before = records(&self.site);
        self.start_load(LOAD_MEGABYTES);
        self.site
            .wait("records arrive", |site| records(site) >= before + 200);
        let (socket, command) = self.site.migration(0);
        let migration: Migration = std::thread::spawn(move || try_ask(&socket, &command));
        let held = hold.reached(&self.site, self.point, &migration);
        self.load.assert_fio_runs();
        self.note_deferrals(0);
        (held, migration)
    }

    fn fault(&mut self, victim: Victim) {
        let half_open = self.coin();
        let side = self.side;
        let host = &mut self.site.hosts[side];
        match victim {
            Victim::Vm => drop(host.obey(&serde_json::json!({"cmd": "kill", "vm": "vm"}))),
            Victim::Host => host.crash(),
            Victim::Daemon => host.daemon.take().unwrap().kill(),
            Victim::Appliance => self.site.stack.drva.take().unwrap().kill(),
            Victim::Store => self.store.goes(),
            Victim::Link if half_open => self.links[side].half_open(),
            Victim::Link => self.links[side].cut(),
        }
    }

    /// The guest still runs at this point: so much of what it writes now is not delivered when it stands.
    fn wait_for_undelivered(&self) {
        let published = |site: &Site| -> u64 {
            let status = site.hosts[0].vm_status();
            let disks = status["disks"].as_array().unwrap().iter();
            disks
                .map(|disk| disk["published_seq"].as_u64().unwrap())
                .sum()
        };
        let before = published(&self.site);
        self.site.wait("the guest writes on", |site| {
            let disk = site.hosts[0].disk();
            disk["state"] == "tracking" || published(site) > before + 100
        });
    }

    /// The fault is over.
    fn mend(&mut self, victim: Victim) {
        match victim {
            Victim::Vm => {}
            Victim::Host => self.site.hosts[self.side].boot(),
            Victim::Daemon => self.site.hosts[self.side].start_daemon(),
            Victim::Appliance => self.site.stack.start_drva(),
            Victim::Store => self.store.comes(),
            Victim::Link => self.links[self.side].heal(),
        }
    }

    /// Who has the VM now, and that the others do not; starts it where nobody has it.
    fn find(&mut self, victim: Victim, answer: std::io::Result<Value>) {
        let killed = matches!(victim, Victim::Vm | Victim::Host);
        let owner = if killed {
            owner_after(self.point)
        } else {
            // Nothing of replication is in a migration's way.
            let moved = answer.unwrap();
            assert_eq!(moved["migrated"], true, "{moved}");
            assert_eq!(moved["end"]["verdict"], "clean", "{moved}");
            self.note_deferred(&moved["deferred_max_ns"]);
            Some(1)
        };
        self.site.wait("the VM runs where it must", |site| {
            let mut hosts = site.hosts.iter().enumerate();
            hosts.all(|(at, host)| match owner == Some(at) {
                true => host.has_vm(),
                false => host.is_without_vm(),
            })
        });
        if let Some(owner) = owner {
            self.at = owner;
            return;
        }
        self.load.bury();
        // Another host after a crash, as its operator would; else either.
        let other = 1 - self.side;
        self.at = match victim {
            Victim::Host => other,
            _ if self.coin() => other,
            _ => self.side,
        };
        self.started_at = self.at;
        let property = format!("--property={RING}");
        self.site.start_vm(self.at, &[property]);
    }

    /// The operator is told of a store that is away.
    fn store_is_missed(&self) {
        self.site.wait("an alarm about the store", |site| {
            let alarms = site.stack.domain()["alarms"].to_string();
            alarms.contains("store") || alarms.contains("upload")
        });
    }

    /// It can migrate again, and all agree: guests, disks, replica, cuts.
    fn agree(&mut self) {
        if !self.load.is_started() {
            self.start_load(6);
        }
        self.site.settle(self.at);
        let moved = self.site.try_migrate(self.at).unwrap();
        assert_eq!(moved["migrated"], true, "{moved}");
        self.note_deferred(&moved["deferred_max_ns"]);
        self.at = 1 - self.at;
        self.load.end();
        self.note_deferrals(self.at);
        self.site.compare(self.at, "end");
        ok(Ok(self.site.stack.rocva(&["verify"])));
        self.site.stack.compare_cut("before", as_before);
        for (_, disk) in &self.site.stack.disks {
            let changed = first_difference(disk, &as_before(disk));
            assert!(changed.is_some(), "no guest wrote to {}", disk.display());
        }
    }
}

/// Runs a cell; whatever does not hold is a panic.
pub fn run(victim: Victim, state: State, seed: u64) -> Outcome {
    let lateness = Lateness::start();
    let mut cell = Cell::new(victim, state, seed);
    let (held, migration) = cell.bring();
    cell.fault(victim);
    if is_of_stream(victim) && cell.point == OUT[0] {
        cell.wait_for_undelivered();
    }
    let early = is_of_stream(victim) && cell.coin();
    if early {
        cell.mend(victim);
    }
    drop(held);
    let answer = migration.join().unwrap();
    cell.find(victim, answer);
    if victim == Victim::Store {
        cell.store_is_missed();
    }
    if !early {
        cell.mend(victim);
    }
    cell.agree();
    let mut note = cell.point.to_string();
    if victim == Victim::Store {
        note = format!("{note}, {}", cell.store.kind());
    }
    lateness.judge(cell.deferred_max_ns, cell.load.memory(), note)
}
