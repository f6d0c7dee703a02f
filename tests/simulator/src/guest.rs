//! VMs and their filters: guests' I/O through the core's state machine, its sync, its way of holding.
//!
//! Invariant: as in the filter library, whose calls these are: the core decides, what is held is tried
//! again every half millisecond, and each completion is told to the core before it is told to the guest.

use crate::moving::Moving;
use crate::regions::Writing;
use crate::reverting::Reverting;
use crate::storage::{Disk as Storage, Sidecar, UNIT_BYTES, bytes_of};
use crate::through::Completions;
use crate::world::{Event, MS, US, World};
use filter_core::disk::sync::Ticket;
use filter_core::disk::{Change, Decision, Disk, Why};
use filter_core::lane::heap::HeapLane;
use filter_core::lane::inflight::Token;
use filter_core::lane::producer::{Source, Stamps};
use filter_core::lane::sync::{AtomicU32, AtomicU64, Ordering};
use filter_core::record::RecordKind;
use filter_core::sidecar::Sidecar as Header;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// One thread: any ordering does.
pub const RELAXED: Ordering = Ordering::Relaxed; // see above
/// How soon held I/Os are tried again.
const RETRY_NS: u64 = 500 * US;
/// How long a guest's write may be held.
pub const BUDGET_NS: u64 = 5 * MS;
/// The budget that the core is told: a held I/O goes on at the last look before the real one ends.
pub const CORE_BUDGET_NS: u64 = BUDGET_NS - 2 * RETRY_NS;
/// How often things are looked after that no I/O brings about.
pub(crate) const HOUSEKEEPING_NS: u64 = 50 * MS;
/// How soon a sync that has to wait is tried again.
pub(crate) const SYNC_RETRY_NS: u64 = MS;

/// A VM.
pub struct Vm {
    /// Its id.
    pub id: [u8; 16],
    /// Where it runs, or ran last.
    pub host: usize,
    /// Tells one run from another.
    pub run: u64,
    /// Whether it runs.
    pub runs: bool,
    /// It is to be closed in order once nothing is in flight.
    pub stopping: bool,
    /// Its disks.
    pub disks: Vec<usize>,
    /// Last stamp used.
    pub stamp: Arc<AtomicU64>,
    /// The guest writes until then.
    pub busy_until: u64,
    /// The usual time between two I/Os.
    pub gap_ns: u64,
    /// Of 1000 writes, how many are large.
    pub large: u64,
    /// The oracle's moment in which it died.
    pub died: u64,
    /// It is stunned: its guest stands.
    pub paused: bool,
    /// It is on its way to another host.
    pub moving: Option<Moving>,
    /// One of its disks becomes what it was.
    pub reverting: Option<Reverting>,
    /// How long its completions may wait for the appliance's log, in ns; 0: they do not.
    pub ack_budget_ns: u64,
}

/// A guest's I/O.
#[derive(Clone, Debug)]
pub struct Io {
    /// Its units.
    pub units: Range<usize>,
    /// What it writes to each.
    pub value: u64,
    /// What it is.
    pub kind: RecordKind,
    /// The oracle's moment.
    pub issued: u64,
    /// When, in ns.
    pub at: u64,
    /// The core let it pass.
    pub token: Option<Token>,
    /// Units that have reached the disk.
    pub landed: usize,
}

/// A read of the sync.
pub struct Read {
    pub(crate) ticket: Ticket,
    pub(crate) units: Range<usize>,
    pub(crate) early: Vec<u64>,
}

/// A disk that is open.
pub struct Open {
    /// The core.
    pub core: Disk,
    /// The lane.
    pub lane: Arc<HeapLane>,
    /// The domain's cut epoch on the host.
    pub cut_epoch: Arc<AtomicU32>,
    /// The sidecar's header, as the filter wrote it last.
    pub header: Header,
    /// I/Os that are held, in order, and what for.
    pub held: VecDeque<(u64, Why)>,
    retry_armed: bool,
    pub(crate) sync_armed: bool,
    house_armed: bool,
    pub(crate) reads: BTreeMap<u64, Read>,
    /// The region map's timer.
    pub regions_armed: bool,
    /// A step of the map is under way.
    pub regions_work: bool,
    /// Its write, if that is the step.
    pub regions_write: Option<Writing>,
    /// Completions that wait for the appliance's log.
    pub completions: Completions,
}

impl Open {
    /// A disk that was just attached.
    pub fn new(
        core: Disk,
        lane: Arc<HeapLane>,
        cut_epoch: Arc<AtomicU32>,
        header: Header,
        ack_budget_ns: u64,
    ) -> Self {
        Self {
            core,
            lane,
            cut_epoch,
            header,
            held: VecDeque::new(),
            retry_armed: false,
            sync_armed: false,
            house_armed: false,
            reads: BTreeMap::new(),
            regions_armed: false,
            regions_work: false,
            regions_write: None,
            completions: Completions::new(ack_budget_ns),
        }
    }
}

impl Open {
    /// The header that a close writes (the filter library writes it twice if the disk has grown).
    pub fn header_at_close(&self, in_order: bool) -> Header {
        let capacity_bytes = self.core.capacity_bytes();
        let grown = self.header.capacity_bytes < capacity_bytes;
        let header = match grown {
            true => self.header.grown(capacity_bytes),
            false => self.header,
        };
        let closed = header.closed(in_order);
        // As one write: into the older of the two copies.
        Header {
            generation: self.header.generation + 1,
            ..closed
        }
    }

    /// Whether the filter has something under way that a close waits for.
    pub fn is_working(&self) -> bool {
        self.regions_work || !self.reads.is_empty()
    }
}

/// Where and when a disk was opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenedOn {
    /// The host.
    pub host: usize,
    /// Its boot.
    pub boot: u64,
    /// The attach epoch.
    pub epoch: u32,
}

/// A disk under protection.
pub struct ProtectedDisk {
    /// Its VM.
    pub vm: usize,
    /// Its id.
    pub id: [u8; 16],
    /// What it holds.
    pub storage: Storage,
    /// Its sidecar.
    pub sidecar: Sidecar,
    /// What the host calls its content: another at each opening.
    pub content_id: u64,
    /// Its sidecar was damaged since it was opened last: the next opening may sync anything.
    pub spoiled: bool,
    /// The dirty map that was left for the next host.
    pub handed: Option<Vec<u8>>,
    /// A copy of disk, sidecar and content id that was made some time ago.
    pub copy: Option<(Storage, Sidecar, u64)>,
    /// Its newest opening.
    pub opened_on: Option<OpenedOn>,
    /// It is open.
    pub open: Option<Open>,
    /// I/Os that were issued and not completed.
    pub ios: BTreeMap<u64, Io>,
}

impl ProtectedDisk {
    /// Bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.storage.units() as u64 * UNIT_BYTES
    }

    /// Whether the guest waits for nothing.
    pub fn is_quiet(&self) -> bool {
        let told = |open: &Open| open.completions.is_empty();
        self.ios.is_empty() && self.open.as_ref().is_none_or(told)
    }
}

impl World {
    /// The disk, if it is open in this run of its VM.
    pub fn open_of(&mut self, disk: usize, of: u64) -> Option<&mut ProtectedDisk> {
        let vm = self.disks.get(disk)?.vm;
        let runs = self.vms.get(vm).is_some_and(|vm| vm.runs && vm.run == of);
        self.disks
            .get_mut(disk)
            .filter(|disk| runs && disk.open.is_some())
    }

    /// Which run of its VM a disk is in.
    pub fn run_of(&self, disk: usize) -> u64 {
        let vm = self.disks.get(disk).map_or(0, |disk| disk.vm);
        self.vms.get(vm).map_or(0, |vm| vm.run)
    }

    /// Calls the core of an open disk.
    pub fn core<R>(
        &mut self,
        disk: usize,
        act: impl FnOnce(&mut Open, &Stamps<'_>) -> R,
    ) -> Option<R> {
        let of = self.disks.get_mut(disk)?;
        let vm = self.vms.get(of.vm)?;
        let (stamp, time_ns) = (vm.stamp.clone(), self.now);
        let open = of.open.as_mut()?;
        let epoch = open.cut_epoch.clone();
        let stamps = Stamps {
            stamp: &stamp,
            cut_epoch: &epoch,
            time_ns,
        };
        Some(act(open, &stamps))
    }

    /// The guest's next I/O.
    pub fn guest(&mut self, vm: usize, of: u64) {
        let Some(this) = self.vms.get(vm) else { return };
        if !this.runs || this.run != of || this.stopping || self.now >= this.busy_until {
            return;
        }
        let (gap, disks, large) = (this.gap_ns, this.disks.clone(), this.large);
        if !this.paused
            && let Some(disk) = self.numbers.pick(&disks)
        {
            self.issue(disk, large);
        }
        let delay = self.numbers.between(gap / 4, gap * 7 / 4);
        self.after(delay, Event::Guest(vm, of));
    }

    fn issue(&mut self, disk: usize, large: u64) {
        let run = self.run_of(disk);
        let Some(of) = self.disks.get(disk) else {
            return;
        };
        let all = of.storage.units() as u64;
        let habits = &self.plan.habits;
        let (hot, hot_units) = (habits.hot, habits.hot_units);
        if of.ios.len() >= habits.depth || of.open.is_none() {
            return;
        }
        if self.numbers.chance(habits.flushes) {
            self.within(200 * US, 4 * MS, Event::Flushed(disk, run));
            return;
        }
        let count = match self.numbers.below(1000) {
            n if n < large => self.numbers.between(16, 64),
            n if n < large + large / 10 => self.numbers.between(64, 300),
            _ => self.numbers.between(1, 4),
        };
        let count = count.min(all);
        let most = match self.numbers.chance(hot) {
            true => hot_units.min(all - count),
            false => all - count,
        };
        let first = self.numbers.between(0, most) as usize;
        let units = first..first + count as usize;
        let busy = |io: &Io| io.units.start < units.end && units.start < io.units.end;
        let untold = |open: &Open| open.completions.overlaps(&units);
        if of.ios.values().any(busy) || of.open.as_ref().is_some_and(untold) {
            return; // a guest does not write to the same place twice at a time
        }
        let name = self.name();
        let kind = match self.numbers.below(20) {
            0 => RecordKind::Zero,
            1 => RecordKind::Unmap,
            _ => RecordKind::Write,
        };
        let value = if kind == RecordKind::Write { name } else { 0 };
        let issued = self.oracle.issue(disk, units.clone(), value);
        self.count("guest: write");
        let io = Io {
            units,
            value,
            kind,
            issued,
            at: self.now,
            token: None,
            landed: 0,
        };
        if let Some(of) = self.disks.get_mut(disk) {
            of.ios.insert(name, io);
        }
        if let Err(why) = self.offer(disk, name, None) {
            self.count(match why {
                Why::Room => "guest: write held for room",
                Why::Intent => "guest: write held for the region map",
                Why::Overlap => "guest: write held for another",
            });
            let armed = self.core(disk, |open, _| {
                open.held.push_back((name, why));
                std::mem::replace(&mut open.retry_armed, true)
            });
            if why == Why::Intent {
                self.drive_regions(disk);
            }
            if armed == Some(false) {
                self.after(RETRY_NS, Event::Retry(disk, run));
            }
        }
    }

    /// Shows an I/O to the core. An error: what it is to be held for.
    fn offer(&mut self, disk: usize, name: u64, again: Option<(u64, Why)>) -> Result<(), Why> {
        let run = self.run_of(disk);
        let Some(io) = self.disks.get(disk).and_then(|d| d.ios.get(&name)).cloned() else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        if io.kind == RecordKind::Write {
            bytes_of(&vec![io.value; io.units.len()], &mut bytes);
        }
        let sources = [Source::from_slice(&bytes)];
        let change = Change {
            kind: io.kind,
            offset_bytes: io.units.start as u64 * UNIT_BYTES,
            len_bytes: io.units.len() as u64 * UNIT_BYTES,
            sources: if bytes.is_empty() { &[] } else { &sources },
        };
        let decision = self.core(disk, |open, stamps| match again {
            None => open.core.start(&change, stamps),
            Some((waited, why)) => open.core.retry(&change, stamps, waited, why),
        });
        let token = match decision {
            None => return Ok(()),
            Some(Decision::Pass { token, .. }) => token,
            Some(Decision::Defer(why)) => {
                let held = self.now - io.at;
                if held > BUDGET_NS {
                    let ms = held as f64 / 1e6;
                    self.violated(format!("a guest's write is held since {ms} ms"));
                }
                return Err(why);
            }
        };
        let held = self.now - io.at;
        self.longest_held_ns = self.longest_held_ns.max(held);
        if held > BUDGET_NS {
            let ms = held as f64 / 1e6;
            self.violated(format!(
                "a guest's write was held for {ms} ms by replication"
            ));
        }
        if let Some(io) = self.disks.get_mut(disk).and_then(|d| d.ios.get_mut(&name)) {
            io.token = Some(token);
        }
        let slow = self.pace.disk;
        let land = self.numbers.between(20 * US, 800 * US) * slow / 100;
        let done = land + self.numbers.between(10 * US, 400 * US) * slow / 100;
        self.after(land, Event::Land(disk, run, name));
        self.after(done, Event::Done(disk, run, name));
        self.wake_pump(disk);
        self.arm_regions(disk);
        Ok(())
    }

    /// Part of an I/O reaches the disk.
    pub fn land(&mut self, disk: usize, of: u64, name: u64) {
        let part = self.numbers.below(1000);
        let Some(this) = self.open_of(disk, of) else {
            return;
        };
        if let Some(io) = this.ios.get_mut(&name) {
            io.landed = io.units.len() * part as usize / 1000;
            for unit in io.units.start..io.units.start + io.landed {
                this.storage.write(unit, io.value);
            }
        }
    }

    /// An I/O is completed below; then the guest is told.
    pub fn done(&mut self, disk: usize, of: u64, name: u64) {
        let fails = self.numbers.chance(self.rates.write);
        let Some(this) = self.open_of(disk, of) else {
            return;
        };
        let Some(io) = this.ios.remove(&name) else {
            return;
        };
        if !fails {
            for unit in io.units.clone().skip(io.landed) {
                this.storage.write(unit, io.value);
            }
        }
        let Some(token) = io.token else { return };
        let completed = self.core(disk, |open, stamps| open.core.done(token, !fails, stamps));
        if fails {
            self.count("fault: guest's write failed by its disk");
            if let Some(this) = self.disks.get(disk) {
                let content = this.storage.content();
                self.oracle
                    .settle(disk, io.units.clone(), content, io.issued);
            }
        } else {
            self.came_back(
                disk,
                name,
                &io,
                completed.and_then(|completed| completed.seq),
            );
        }
        if completed.is_some_and(|completed| completed.sync) {
            self.arm_sync(disk, SYNC_RETRY_NS);
        }
        self.wake_pump(disk);
        self.stop_if_idle(disk);
    }

    /// The guest's flush.
    pub fn flushed(&mut self, disk: usize, of: u64) {
        if let Some(this) = self.open_of(disk, of) {
            this.storage.flush();
            self.count("guest: flush");
        }
    }

    /// Held I/Os are tried again, in order, before their timer says so.
    pub fn retry(&mut self, disk: usize, of: u64) {
        self.try_held(disk, of, false);
    }

    /// The timer of held I/Os.
    pub fn retry_timer(&mut self, disk: usize, of: u64) {
        self.try_held(disk, of, true);
    }

    fn try_held(&mut self, disk: usize, of: u64, timer: bool) {
        if self.open_of(disk, of).is_none() {
            return;
        }
        let mut at = 0;
        let mut intent = false;
        while let Some(Some((name, why))) = self.core(disk, |open, _| open.held.get(at).copied()) {
            let io = self.disks.get(disk).and_then(|d| d.ios.get(&name));
            let waited = self.now - io.map_or(self.now, |io| io.at);
            match self.offer(disk, name, Some((waited, why))) {
                Ok(()) => {
                    self.core(disk, |open, _| open.held.remove(at));
                }
                Err(why) => {
                    self.core(disk, |open, _| {
                        if let Some(held) = open.held.get_mut(at) {
                            held.1 = why;
                        }
                    });
                    intent |= why == Why::Intent;
                    if why == Why::Room {
                        break; // those behind it have come later
                    }
                    at += 1;
                }
            }
        }
        if intent {
            self.drive_regions(disk);
        }
        // One timer is under way as long as anything is held.
        let again = self.core(disk, |open, _| {
            if timer {
                open.retry_armed = !open.held.is_empty();
            }
            timer && open.retry_armed
        });
        if again == Some(true) {
            self.after(RETRY_NS, Event::Retry(disk, of));
        }
        self.arm_sync(disk, SYNC_RETRY_NS);
    }

    /// Something has changed in the lane that the filter will look at in its next round.
    pub fn poke_filter(&mut self, disk: usize) {
        let of = self.run_of(disk);
        let armed = self.core(disk, |open, _| {
            std::mem::replace(&mut open.house_armed, true)
        });
        if armed == Some(false) {
            self.within(0, HOUSEKEEPING_NS, Event::House(disk, of));
        }
    }

    /// The filter's round.
    pub fn housekeeping(&mut self, disk: usize, of: u64) {
        if self.open_of(disk, of).is_some() {
            let now = self.now;
            self.look_at_completions(disk);
            let due = self.core(disk, |open, _| {
                open.house_armed = false;
                open.core.intent_due(now)
            });
            self.drive_sync(disk);
            if due == Some(true) {
                self.drive_regions(disk);
            }
            self.look_at_fence(disk);
        }
    }

    /// A VM that is to stop, and has nothing in flight, is closed in order.
    pub fn stop_if_idle(&mut self, disk: usize) {
        let Some(vm) = self.disks.get(disk).map(|d| d.vm) else {
            return;
        };
        let Some(this) = self.vms.get(vm) else { return };
        let idle = this.runs && this.stopping && this.reverting.is_none();
        let disks = this.disks.clone();
        let quiet = |d: &usize| self.disks.get(*d).is_none_or(ProtectedDisk::is_quiet);
        if idle && disks.iter().all(quiet) {
            self.vm_close(vm);
        }
    }
}
