//! The world: everything that is simulated, the queue of what is to happen, the clock.
//!
//! Invariant: one thing happens at a time, in the order of the queue; all chance comes from the seed.
//! Time in which nothing happens costs nothing.

use crate::faults::{Ill, Strike};
use crate::guest::{ProtectedDisk, Vm};
use crate::host::Host;
use crate::network::Connection;
use crate::numbers::Numbers;
use crate::oracle::Oracle;
use crate::plan::Plan;
use crate::server::Server;
use crate::store::Faulty;
use crate::through::Through;
use crate::volume::Memory;
use filter_core::wire::PortRole;
use object_store::memory::InMemory;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A microsecond, in ns.
pub const US: u64 = 1_000;
/// A millisecond.
pub const MS: u64 = 1_000_000;
/// A second.
pub const SECOND: u64 = 1_000_000_000;
/// An hour.
pub const HOUR: u64 = 3600 * SECOND;

/// Something that is to happen. What names an incarnation does not happen to a later one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest's next I/O: VM, incarnation.
    Guest(usize, u64),
    /// Part of an I/O reaches the disk: disk, incarnation, I/O.
    Land(usize, u64, u64),
    /// An I/O is completed.
    Done(usize, u64, u64),
    /// The guest's flush of a disk is completed.
    Flushed(usize, u64),
    /// Held I/Os are tried again.
    Retry(usize, u64),
    /// The region map is looked after.
    Regions(usize, u64),
    /// A write of the region map has ended.
    RegionsWritten(usize, u64),
    /// A flush for the region map has ended.
    RegionsFlushed(usize, u64),
    /// Held completions are looked at.
    Completions(usize, u64),
    /// The sync goes on.
    Sync(usize, u64),
    /// A read of the sync comes back: disk, incarnation, number.
    ReadBack(usize, u64, u64),
    /// What no I/O brings about is looked after.
    House(usize, u64),
    /// A VM is started, or its start is tried again.
    VmStart(usize),
    /// A VM's move to another host goes on: VM, which move.
    Move(usize, u64),
    /// A disk is to be reverted to a snapshot.
    RevertBegin(usize),
    /// A revert goes on: disk, incarnation.
    Revert(usize, u64),
    /// A pump looks after its lanes: host, incarnation of the daemon, port.
    Pump(usize, u64, PortRole),
    /// The folder of lanes is looked at.
    Scan(usize, u64),
    /// The daemon dials.
    Dial(usize, u64, PortRole),
    /// The positions of a cut are read: host, incarnation, epoch.
    Positions(usize, u64, u32),
    /// A hold of completions is over: host, its deadline.
    HoldOver(usize, u64),
    /// The daemon starts.
    DaemonStart(usize),
    /// The host is up again.
    HostUp(usize),
    /// A frame arrives at the appliance.
    Up(u64),
    /// A frame arrives at the daemon.
    Down(u64),
    /// An end has heard nothing for too long: connection, whether the daemon's, the cut of the link.
    GiveUp(u64, bool, u64),
    /// The link of a host works again.
    LinkUp(usize, u64),
    /// The log's writer goes on.
    LogStep(u64),
    /// The log's write under way is durable.
    LogDurable(u64),
    /// A cut is to be taken.
    Cut(u64),
    /// A cut has taken too long: incarnation, epoch.
    CutLimit(u64, u32),
    /// The appliance starts.
    ServerStart,
    /// The plan goes on.
    Plan,
    /// A fault strikes.
    Strike(Strike),
    /// The store is well again.
    StoreUp(u64),
    /// Something that was slow or failed is well again.
    Mended(Ill),
    /// The guests do a little in a long pause: the pause's end.
    Trickle(u64),
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    at: u64,
    number: u64,
    event: Event,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// What is slower than usual now, in per cent of the usual.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Guests' disks.
    pub disk: u64,
    /// The network.
    pub link: u64,
    /// The log's volume.
    pub log: u64,
    /// Sidecars.
    pub sidecar: u64,
}

impl Pace {
    /// The usual.
    pub const USUAL: Self = Self {
        disk: 100,
        link: 100,
        log: 100,
        sidecar: 100,
    };
}

/// How often things fail by themselves, of 1000.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// A guest's write.
    pub write: u64,
    /// A read of the sync.
    pub read: u64,
    /// A write of a sidecar.
    pub sidecar: u64,
    /// A write of the log.
    pub log: u64,
}

/// Everything.
pub struct World {
    /// The seed.
    pub seed: u64,
    /// Print what happens.
    pub trace: bool,
    /// ns since the start.
    pub now: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    next_entry: u64,
    /// Events that happened.
    pub events: u64,
    /// All chance.
    pub numbers: Numbers,
    /// What guests were told.
    pub oracle: Oracle,
    /// Hosts.
    pub hosts: Vec<Host>,
    /// VMs.
    pub vms: Vec<Vm>,
    /// Protected disks.
    pub disks: Vec<ProtectedDisk>,
    /// Connections.
    pub connections: BTreeMap<u64, Connection>,
    /// The appliance, if it runs.
    pub server: Option<Server>,
    /// Its log's volume.
    pub volume: Arc<Memory>,
    /// The object store as the appliance sees it.
    pub store: Arc<Faulty>,
    /// What it really holds.
    pub objects: Arc<InMemory>,
    /// Wakes the upload.
    pub work: Rc<Notify>,
    /// The upload has told something.
    pub told: Rc<Notify>,
    /// What is planned.
    pub plan: Plan,
    /// What is slow.
    pub pace: Pace,
    /// What fails by itself.
    pub rates: Rates,
    /// Counts of what happened.
    pub counts: BTreeMap<&'static str, u64>,
    /// What was violated.
    pub violation: Option<String>,
    /// Names things that come and go.
    next_name: u64,
    base: Instant,
    /// Cuts in the store: number, epoch.
    pub committed: Vec<(u64, u32)>,
    /// When each cut was asked for, by its epoch.
    pub asked: BTreeMap<u32, u64>,
    /// Epochs of cuts that were taken in ignorance of an opening: they are right VM by VM only.
    pub blind: BTreeSet<u32>,
    /// The newest epoch of each disk that was presented to the appliance, since it lost its log last.
    pub presented: BTreeMap<[u8; 16], u32>,
    /// Disks whose host crashed after a write had passed that neither sidecar nor appliance knew of.
    pub lost_sight: BTreeSet<usize>,
    /// The longest time that a guest's write was held, in ns.
    pub longest_held_ns: u64,
    /// The longest time that a completion was held for a cut, in ns.
    pub longest_cut_hold_ns: u64,
    /// The longest time that a completion waited for the log, in ns.
    pub longest_acked_ns: u64,
    /// What was promised with `ack = log`.
    pub through: Through,
}

impl World {
    /// A world of a seed, not yet begun.
    pub fn new(seed: u64, trace: bool) -> Self {
        let objects = Arc::new(InMemory::new());
        let mut numbers = Numbers::new(seed);
        let plan = Plan::new(&mut numbers);
        Self {
            seed,
            trace,
            now: 0,
            queue: BinaryHeap::new(),
            next_entry: 0,
            events: 0,
            store: Arc::new(Faulty::new(objects.clone(), numbers.any())),
            objects,
            volume: Arc::new(Memory::new(numbers.any())),
            oracle: Oracle::default(),
            hosts: Vec::new(),
            vms: Vec::new(),
            disks: Vec::new(),
            connections: BTreeMap::new(),
            server: None,
            work: Rc::default(),
            told: Rc::default(),
            pace: plan.habits.pace,
            plan,
            rates: Rates::default(),
            counts: BTreeMap::new(),
            violation: None,
            next_name: 0,
            base: Instant::now(),
            committed: Vec::new(),
            asked: BTreeMap::new(),
            blind: BTreeSet::new(),
            presented: BTreeMap::new(),
            lost_sight: BTreeSet::new(),
            longest_held_ns: 0,
            longest_cut_hold_ns: 0,
            longest_acked_ns: 0,
            through: Through::default(),
            numbers,
        }
    }

    /// A number that was never given before.
    pub const fn name(&mut self) -> u64 {
        self.next_name += 1;
        self.next_name
    }

    /// The present, for code that wants an instant.
    pub fn instant(&self) -> Instant {
        self.base + Duration::from_nanos(self.now)
    }

    /// So many ns from now on, as an instant says.
    pub fn until(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.instant()).as_nanos() as u64
    }

    /// Plans an event.
    pub fn after(&mut self, delay_ns: u64, event: Event) {
        self.next_entry += 1;
        let (at, number) = (self.now + delay_ns, self.next_entry);
        self.queue.push(Reverse(Entry { at, number, event }));
    }

    /// Plans an event at some time in a span.
    pub fn within(&mut self, first_ns: u64, last_ns: u64, event: Event) {
        let delay = self.numbers.between(first_ns, last_ns);
        self.after(delay, event);
    }

    /// Counts something.
    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Says what happens, if anybody wants to know.
    pub fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>16.6} s  {}", self.now as f64 / 1e9, what());
        }
    }

    /// A promise was broken.
    pub fn violated(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.say(|| format!("VIOLATED: {what}"));
        self.violation.get_or_insert(what);
    }

    /// When the next event is due.
    pub fn next_at(&self) -> Option<u64> {
        self.queue.peek().map(|Reverse(entry)| entry.at)
    }

    /// The next event; the clock moves on to it.
    pub fn pop(&mut self) -> Option<Event> {
        let Reverse(entry) = self.queue.pop()?;
        self.now = self.now.max(entry.at);
        self.events += 1;
        Some(entry.event)
    }

    /// Something happens.
    pub fn happen(&mut self, event: Event) {
        match event {
            Event::Guest(vm, of) => self.guest(vm, of),
            Event::Land(disk, of, io) => self.land(disk, of, io),
            Event::Done(disk, of, io) => self.done(disk, of, io),
            Event::Flushed(disk, of) => self.flushed(disk, of),
            Event::Retry(disk, of) => self.retry_timer(disk, of),
            Event::Regions(disk, of) => self.regions_timer(disk, of),
            Event::RegionsWritten(disk, of) => self.regions_written(disk, of),
            Event::RegionsFlushed(disk, of) => self.regions_flushed(disk, of),
            Event::Completions(disk, of) => self.completions_timer(disk, of),
            Event::Sync(disk, of) => self.sync_timer(disk, of),
            Event::ReadBack(disk, of, read) => self.read_back(disk, of, read),
            Event::House(disk, of) => self.housekeeping(disk, of),
            Event::VmStart(vm) => self.vm_start(vm),
            Event::Move(vm, name) => self.move_step(vm, name),
            Event::RevertBegin(disk) => self.revert_begin(disk),
            Event::Revert(disk, of) => self.revert_step(disk, of),
            Event::Pump(host, of, role) => self.pump_event(host, of, role),
            Event::Scan(host, of) => self.scan_event(host, of),
            Event::Dial(host, of, role) => self.dial(host, of, role),
            Event::Positions(host, of, epoch) => self.positions(host, of, epoch),
            Event::HoldOver(host, until) => self.hold_over(host, until),
            Event::DaemonStart(host) => self.daemon_start(host),
            Event::HostUp(host) => self.host_up(host),
            Event::Up(connection) => self.up(connection),
            Event::Down(connection) => self.down(connection),
            Event::GiveUp(connection, daemon, cut) => self.give_up(connection, daemon, cut),
            Event::LinkUp(host, cut) => self.link_up(host, cut),
            Event::LogStep(of) => self.log_step(of),
            Event::LogDurable(of) => self.log_durable(of),
            Event::Cut(of) => self.cut_timer(of),
            Event::CutLimit(of, epoch) => self.cut_limit(of, epoch),
            Event::ServerStart => self.server_start(),
            Event::Plan => self.plan_step(),
            Event::Strike(strike) => self.strike(strike),
            Event::StoreUp(of) => self.store_up(of),
            Event::Mended(which) => self.mended(which),
            Event::Trickle(until) => self.trickle(until),
        }
    }
}
