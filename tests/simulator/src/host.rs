//! Hosts: their lanes, their VMs' beginnings and ends, their crashes.
//!
//! Invariant: as in the filter library's opening of a disk: the new attach epoch is durable in the sidecar
//! before the lane is touched, and what is done with the lane is the matching row of the core's table.

use crate::daemon::Daemon;
use crate::guest::{CORE_BUDGET_NS, Open, OpenedOn, RELAXED};
use crate::regions::QUIET_NS;
use crate::storage::SidecarFault;
use crate::world::{Event, MS, SECOND, World};
use filter_core::disk::intent::Intent;
use filter_core::disk::{Config, Disk, Start};
use filter_core::lane::attach::{
    self, Action, Found, LaneFile, OldProducer, Sidecar as SidecarFound, WasDoing,
};
use filter_core::lane::heap::HeapLane;
use filter_core::lane::layout::{Geometry, Identity, LaneError, LaneState, MIN_RING_BYTES};
use filter_core::lane::opening::{self, knows_later};
use filter_core::lane::producer::{Producer, Stamps};
use filter_core::lane::sync::AtomicU32;
use filter_core::lane::walk::{Scan, scan};
use filter_core::lineage::Attach;
use filter_core::mutant::{Guard, holds};
use filter_core::sidecar::regions::map_generation;
use filter_core::sidecar::{BLOCK_BYTES, Opening, Sidecar, SidecarError, regions};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A region of the sidecar's map: 256 KiB, so that small disks have many.
pub const REGION_SHIFT: u32 = 18;
/// The domain of all disks.
pub const DOMAIN: &str = "sim";

/// A host.
pub struct Host {
    /// Its id.
    pub id: [u8; 16],
    /// Changes at each boot.
    pub boot: u64,
    /// Whether it runs.
    pub up: bool,
    /// Lanes by disk: they outlive VMs and the daemon.
    pub lanes: BTreeMap<usize, Arc<HeapLane>>,
    /// The domain's cut epoch.
    pub cut_epoch: Arc<AtomicU32>,
    /// Completions are held until then; 0: they are not.
    pub hold_until: u64,
    /// The daemon, if it runs.
    pub daemon: Option<Daemon>,
    /// Whether the link to the appliance works.
    pub linked: bool,
    /// Counts the link's cuts.
    pub cuts_of_link: u64,
}

impl Host {
    /// A host that has just booted.
    pub fn new(number: usize) -> Self {
        Self {
            id: [number as u8 + 1; 16],
            boot: 1,
            up: true,
            lanes: BTreeMap::new(),
            cut_epoch: first_epoch(),
            hold_until: 0,
            daemon: None,
            linked: true,
            cuts_of_link: 0,
        }
    }
}

fn first_epoch() -> Arc<AtomicU32> {
    Arc::new(AtomicU32::new(1))
}

fn boot_id(host: usize, boot: u64) -> [u8; 16] {
    let mut id = [host as u8; 16];
    id[..8].copy_from_slice(&boot.to_le_bytes());
    id
}

/// Why a disk cannot be opened now.
enum Refused {
    Sidecar(String),
    Died,
}

impl World {
    /// A VM is started on its host.
    pub fn vm_start(&mut self, vm: usize) {
        let Some(this) = self.vms.get(vm) else { return };
        if this.runs || this.moving.is_some() {
            return;
        }
        let (host, disks, died) = (this.host, this.disks.clone(), this.died);
        if !self.hosts.get(host).is_some_and(|host| host.up) {
            self.within(SECOND, 20 * SECOND, Event::VmStart(vm));
            return;
        }
        self.count("vm started");
        self.say(|| format!("vm {vm} starts on host {host}"));
        let run = self.name();
        if let Some(this) = self.vms.get_mut(vm) {
            (this.run, this.runs, this.stopping) = (run, true, false);
        }
        for disk in disks.clone() {
            match self.attach(disk, host) {
                Ok(()) => {}
                Err(Refused::Died) => {
                    self.count("fault: vm died while a disk was opened");
                    self.vm_kill(vm);
                    self.within(SECOND, 10 * SECOND, Event::VmStart(vm));
                    return;
                }
                Err(Refused::Sidecar(why)) => {
                    self.say(|| format!("disk {disk} cannot be opened: {why}"));
                    self.vm_kill(vm);
                    self.within(SECOND, 10 * SECOND, Event::VmStart(vm));
                    return;
                }
            }
        }
        for disk in disks {
            // Nothing was written since, so this is what the guest will find.
            if let Some(this) = self.disks.get(disk) {
                let content = this.storage.content();
                self.oracle.settle(disk, 0..content.len(), content, died);
            }
        }
        if self.now < self.vms.get(vm).map_or(0, |vm| vm.busy_until) {
            self.within(MS, 20 * MS, Event::Guest(vm, run));
        }
    }

    /// The guest writes from now on, for so long.
    pub fn vm_busy(&mut self, vm: usize, for_ns: u64) {
        let until = self.now + for_ns;
        let Some(this) = self.vms.get_mut(vm) else {
            return;
        };
        let idle = this.busy_until <= self.now;
        this.busy_until = this.busy_until.max(until);
        let run = this.run;
        if idle && this.runs {
            self.within(0, 5 * MS, Event::Guest(vm, run));
        }
    }

    /// Opens a disk of a VM that has moved; `false`: it could not be.
    pub fn attach_moved(&mut self, disk: usize, host: usize) -> bool {
        match self.attach(disk, host) {
            Ok(()) => true,
            Err(Refused::Died) => {
                self.count("fault: vm died while a disk was opened");
                false
            }
            Err(Refused::Sidecar(why)) => {
                self.say(|| format!("disk {disk} cannot be opened: {why}"));
                false
            }
        }
    }

    /// Opens a disk: `open.rs` of the filter library, without its files.
    fn attach(&mut self, disk: usize, host: usize) -> Result<(), Refused> {
        let dies_early = self.numbers.chance(15);
        let dies_late = self.numbers.chance(15);
        let content_now = self.name();
        let text = |error: SidecarError| Refused::Sidecar(error.to_string());
        let header = self.header_of(disk);
        let (Some(on), Some(this)) = (self.hosts.get(host), self.disks.get_mut(disk)) else {
            return Err(Refused::Died);
        };
        let boot_id = boot_id(host, on.boot);
        let capacity = this.capacity_bytes();
        let content_before = std::mem::replace(&mut this.content_id, content_now);
        // A damaged one gets another in its place, which says nothing.
        let found = header.filter(|header| header.disk_id == this.id);
        let trusted = found.is_some_and(|header| header.is_trusted(content_before));
        let map =
            found.and_then(|h| regions::decode(this.sidecar.raw(), &this.id, h.region_blocks).ok());
        let header = found.unwrap_or_else(|| Sidecar::new(this.id, 1));
        let (damaged, doubtful) = (found.is_none(), map.is_none());
        let lane = on.lanes.get(&disk).cloned();
        let known = trusted && map.is_some();
        let found_generation = map.as_deref().map_or(0, map_generation);
        let looked = look(
            lane.as_deref(),
            &header,
            known.then_some(found_generation),
            &boot_id,
            capacity,
        );
        let row = attach::decide(&looked.found);
        let (start, new_lane) = match row.action {
            Action::Refuse => return Err(Refused::Sidecar("in use".into())),
            Action::Full => (Start::Full, true),
            Action::Regions => (Start::Regions, true),
            Action::Restart => (Start::Full, false),
            Action::AdoptMarked => (Start::Marked, false),
            Action::AdoptClean => (Start::Clean, false),
        };
        let id = this.id;
        let mut intent = match map {
            Some(map) if start != Start::Full => {
                let mut intent = Intent::load(id, &map, QUIET_NS).map_err(text)?;
                intent.want_beyond(header.capacity_bytes, capacity);
                intent
            }
            map => {
                let map = map.unwrap_or_default();
                Intent::full(id, REGION_SHIFT, header.region_blocks, &map, QUIET_NS)
            }
        };
        let written = intent.write_all(|offset, bytes| self.write_sidecar(disk, offset, bytes));
        written?;
        if new_lane
            && holds(Guard::OldLaneGone)
            && let Some(on) = self.hosts.get_mut(host)
        {
            on.lanes.remove(&disk);
        }
        // Another number at each opening.
        let attach_id = content_now | 1 << 40;
        let told = looked.told_generation.filter(|_| !new_lane);
        let opening = Opening {
            boot_id,
            content_id: content_now,
            attach_id,
            new_lane,
            found_generation: (start != Start::Full)
                .then_some(found_generation.max(told.unwrap_or(0))),
        };
        let mut next = header.attached(&opening).map_err(text)?;
        next.capacity_bytes = capacity;
        self.write_sidecar(disk, next.offset_bytes(), &next.encode())?;
        if dies_early {
            return Err(Refused::Died);
        }
        let adopted = lane.zip(looked.scan).filter(|_| !new_lane);
        let (lane, scan) = match adopted {
            Some(adopted) => adopted,
            None => self.make_lane(disk, host, &header, boot_id)?,
        };
        self.within(0, 100 * MS, Event::Scan(host, 0));
        if dies_late {
            return Err(Refused::Died);
        }
        let now = self.now;
        let left = self.handed_over(disk, header.attach_epoch);
        let (Some(on), Some(this)) = (self.hosts.get(host), self.disks.get_mut(disk)) else {
            return Err(Refused::Died);
        };
        let Some(vm) = self.vms.get(this.vm) else {
            return Err(Refused::Died);
        };
        // A clock that is good to some seconds, and what the lane itself knows.
        vm.stamp.fetch_max(scan.last_stamp.max(now), RELAXED);
        let attach = Attach {
            epoch: next.attach_epoch,
            id: attach_id,
            generation: intent.generations().0,
        };
        opening::tell(lane.memory(), &attach, &next.lineage);
        let mut producer =
            Producer::new(lane.memory(), next.attach_epoch, scan.tail, scan.next_seq);
        if row.action == Action::Restart {
            producer.restart();
        }
        let config = Config {
            defer_budget_ns: CORE_BUDGET_NS,
            ..Config::default()
        };
        let mut core = Disk::new(producer, capacity, start, Some(intent), config);
        if new_lane {
            let stamps = Stamps {
                stamp: &vm.stamp,
                cut_epoch: &on.cut_epoch,
                time_ns: now,
            };
            // A ring that was just made has room for it.
            let _ = core.begin_base(&stamps);
        }
        if let Some(map) = left.filter(|_| start == Start::Regions) {
            core.only_handed_over(&map);
        }
        let seen = match new_lane {
            true => header.capacity_bytes,
            false => header.capacity_bytes.min(looked.capacity_bytes),
        };
        core.grown_since(seen);
        this.opened_on = Some(OpenedOn {
            host,
            boot: on.boot,
            epoch: next.attach_epoch,
        });
        let budget_ns = vm.ack_budget_ns;
        let opened = Open::new(core, lane, on.cut_epoch.clone(), next, budget_ns);
        this.open = Some(opened);
        if header.attach_epoch == 0 && !damaged {
            self.count("attach: the first");
        } else if damaged {
            self.count("sidecar: no copy of the header was whole");
        } else if doubtful {
            self.count("sidecar: no copy of the map was whole");
        }
        self.count(match row.action {
            Action::Full => "attach: full",
            Action::Regions => "attach: regions",
            Action::Restart => "attach: restart",
            Action::AdoptMarked => "attach: adopted, marked",
            Action::AdoptClean => "attach: adopted, clean",
            Action::Refuse => "attach: refused",
        });
        self.say(|| {
            let epoch = next.attach_epoch;
            format!("disk {disk}: {} -> {start:?}, epoch {epoch}", row.when)
        });
        self.arm_sync(disk, MS);
        self.arm_regions(disk);
        Ok(())
    }

    /// A write of the sidecar while a disk is opened.
    fn write_sidecar(
        &mut self,
        disk: usize,
        offset: u64,
        block: &[u8; BLOCK_BYTES],
    ) -> Result<(), Refused> {
        let fails = self.numbers.chance(self.rates.sidecar);
        let torn = self.numbers.chance(500);
        let fault = match (fails, torn) {
            (false, _) => None,
            (true, false) => Some(SidecarFault::Refused),
            (true, true) => Some(SidecarFault::Torn),
        };
        if let Some(this) = self.disks.get_mut(disk)
            && this.sidecar.write(offset, block, fault, &mut self.numbers)
        {
            return Ok(());
        }
        self.count(match torn {
            true => "fault: sidecar write torn",
            false => "fault: sidecar write refused",
        });
        Err(Refused::Sidecar("its write was refused".into()))
    }

    fn make_lane(
        &mut self,
        disk: usize,
        host: usize,
        header: &Sidecar,
        boot_id: [u8; 16],
    ) -> Result<(Arc<HeapLane>, Scan), Refused> {
        let text = |error: LaneError| Refused::Sidecar(error.to_string());
        let hosts = self.hosts.get_mut(host);
        let (Some(on), Some(this)) = (hosts, self.disks.get(disk)) else {
            return Err(Refused::Died);
        };
        let capacity = this.capacity_bytes();
        let base_seq = header.seq_floor + 1;
        let identity = Identity {
            geometry: Geometry::for_disk(4 * capacity, MIN_RING_BYTES).map_err(text)?,
            disk_id: this.id,
            vm_id: [this.vm as u8 + 1; 16],
            boot_id,
            base_seq,
            domain: DOMAIN.into(),
            vm_name: format!("vm-{}", this.vm),
            disk_label: format!("disk-{disk}"),
        };
        let lane = Arc::new(HeapLane::create(&identity, capacity).map_err(text)?);
        on.lanes.insert(disk, lane.clone());
        let scan = Scan {
            tail: 0,
            next_seq: base_seq,
            last_stamp: 0,
        };
        Ok((lane, scan))
    }

    /// A VM's process is killed: what it passed down may land or not, nobody hears of it.
    pub fn vm_kill(&mut self, vm: usize) {
        self.vm_gone(vm, false);
    }

    fn vm_gone(&mut self, vm: usize, power: bool) {
        let runs = self.vms.get(vm).filter(|vm| vm.runs);
        for disk in runs.map_or(Vec::new(), |vm| vm.disks.clone()) {
            self.regions_cut_off(disk, power);
        }
        let Some(this) = self.vms.get_mut(vm).filter(|vm| vm.runs) else {
            return;
        };
        (this.runs, this.stopping, this.paused) = (false, false, false);
        this.reverting = None;
        // Open on one side only: whoever moves it learns of this.
        this.moving = None;
        this.died = self.oracle.now();
        for disk in this.disks.clone() {
            let Some(this) = self.disks.get_mut(disk) else {
                continue;
            };
            this.open = None;
            let this_ios = std::mem::take(&mut this.ios);
            for io in this_ios.into_values() {
                if io.token.is_none() {
                    continue; // never went down
                }
                let left = io.units.len() - io.landed;
                let more = match self.numbers.below(3) {
                    0 => 0,
                    1 => left,
                    _ => self.numbers.below(left as u64 + 1) as usize,
                };
                for unit in io.units.clone().skip(io.landed).take(more) {
                    this.storage.write(unit, io.value);
                }
            }
        }
        self.say(|| format!("vm {vm} is gone"));
    }

    /// A VM is closed in order: nothing is in flight.
    pub fn vm_close(&mut self, vm: usize) {
        let Some(this) = self.vms.get_mut(vm).filter(|vm| vm.runs) else {
            return;
        };
        (this.runs, this.stopping) = (false, false);
        this.died = self.oracle.now();
        self.say(|| format!("vm {vm} is closed in order"));
        for disk in self.vms.get(vm).map_or(Vec::new(), |vm| vm.disks.clone()) {
            let Some(this) = self.disks.get_mut(disk) else {
                continue;
            };
            this.storage.flush();
            let Some(mut open) = this.open.take() else {
                continue;
            };
            let in_order = open.core.close();
            // Flushed below just now: what the appliance holds needs no bit any more.
            open.core.intent_close();
            let sidecar = &mut this.sidecar;
            let numbers = &mut self.numbers;
            let written = open.core.intent_write_all(|at, bytes| {
                sidecar
                    .write(at, bytes, None, numbers)
                    .then_some(())
                    .ok_or(())
            });
            debug_assert!(written.is_ok());
            let header = open.header_at_close(in_order);
            self.save_header(disk, &header);
            self.count(match in_order {
                true => "close: in order",
                false => "close: not all was published",
            });
        }
    }

    /// A host loses its power: all memory is gone, and what its disks had not made durable.
    pub fn host_crash(&mut self, host: usize) {
        self.count("fault: host crash");
        self.say(|| format!("host {host} crashes"));
        for vm in 0..self.vms.len() {
            if self.vms.get(vm).is_none_or(|vm| vm.host != host) {
                continue;
            }
            let ran = self.vms.get(vm).is_some_and(|vm| vm.runs);
            for disk in self.vms.get(vm).map_or(Vec::new(), |vm| vm.disks.clone()) {
                self.look_for_lost_sight(disk);
            }
            self.vm_gone(vm, true);
            for disk in self.vms.get(vm).map_or(Vec::new(), |vm| vm.disks.clone()) {
                if ran && let Some(this) = self.disks.get_mut(disk) {
                    let lost = this.storage.power_cut(&mut self.numbers);
                    if lost > 0 {
                        self.count("fault: flush missing at a power cut");
                    }
                }
            }
        }
        self.daemon_gone(host, true);
        if let Some(this) = self.hosts.get_mut(host) {
            this.up = false;
            this.boot += 1;
            this.lanes.clear();
            this.cut_epoch = first_epoch();
            this.hold_until = 0;
        }
        let down = self.numbers.spread(5 * SECOND, 1200 * SECOND);
        self.after(down, Event::HostUp(host));
    }

    /// A write that could not wait for the sidecar any longer, and of which neither sidecar nor appliance knows
    /// when the host loses its power: the one case in which a crash loses sight of something. From here on this
    /// disk's content is not judged; all else is.
    fn look_for_lost_sight(&mut self, disk: usize) {
        let Some(this) = self.disks.get(disk) else {
            return;
        };
        let intent = this.open.as_ref().and_then(|open| open.core.intent());
        let (told, durable) = intent.map_or((0, 0), Intent::generations);
        let known = self.server.as_ref().and_then(|server| {
            let shared = server.shared.borrow();
            let disk = shared.domain.disks.get(&this.id)?;
            Some(disk.described.lock().presented.generation)
        });
        if told > durable && known.is_none_or(|known| known < told) {
            self.count("crash: sight of a write was lost");
            self.say(|| format!("disk {disk}: a write had passed that nobody knows of"));
            self.lost_sight.insert(disk);
        }
    }

    /// A host is up again; its daemon starts by itself.
    pub fn host_up(&mut self, host: usize) {
        if let Some(this) = self.hosts.get_mut(host) {
            this.up = true;
        }
        self.within(0, 5 * SECOND, Event::DaemonStart(host));
    }
}

struct Looked {
    found: Found,
    scan: Option<Scan>,
    capacity_bytes: u64,
    /// What the lane's last producer told of its region map's generation.
    told_generation: Option<u64>,
}

/// What is found at attach.
fn look(
    lane: Option<&HeapLane>,
    sidecar: &Sidecar,
    found_generation: Option<u64>,
    boot_id: &[u8; 16],
    capacity_bytes: u64,
) -> Looked {
    let trusted = found_generation.is_some();
    let mut found = Found {
        file: LaneFile::Absent,
        producer: OldProducer::Gone,
        sidecar: match trusted {
            true => SidecarFound::OtherEpoch,
            false => SidecarFound::Doubtful,
        },
        was: WasDoing::Nothing,
        restart_asked: false,
    };
    let Some(lane) = lane else {
        return Looked {
            found,
            scan: None,
            capacity_bytes: 0,
            told_generation: None,
        };
    };
    use filter_core::lane::layout::LaneHome;
    let identity = lane.identity();
    let memory = lane.memory();
    let words = memory.producer();
    let foreign =
        identity.boot_id != *boot_id || memory.geometry().max_capacity_bytes() < capacity_bytes;
    let scanned = scan(memory);
    let state = LaneState::from_word(words.state.load(RELAXED)); // one thread
    found.file = match (&scanned, foreign, state) {
        (_, true, _) => LaneFile::Foreign,
        (Err(_), ..) | (_, _, None) => LaneFile::Unusable,
        _ => LaneFile::Good,
    };
    let lane_epoch = words.attach_epoch.load(RELAXED); // one thread
    if trusted && sidecar.matches_lane(lane_epoch, boot_id) {
        found.sidecar = SidecarFound::Matches;
    }
    let left = opening::left(memory, lane_epoch);
    if found.sidecar == SidecarFound::Matches && knows_later(left, found_generation) {
        found.sidecar = SidecarFound::Doubtful;
    }
    found.was = match state {
        Some(LaneState::Closed) => WasDoing::Closed,
        Some(LaneState::Streaming | LaneState::Syncing) => WasDoing::Publishing,
        Some(LaneState::Tracking) => WasDoing::Tracking,
        Some(LaneState::Fresh) | None => WasDoing::Nothing,
    };
    let asked = memory.consumer().restart_request.load(RELAXED); // one thread
    found.restart_asked = asked != words.restart_done.load(RELAXED); // one thread
    let capacity_bytes = words.capacity_bytes.load(RELAXED); // one thread
    Looked {
        found,
        scan: scanned.ok(),
        capacity_bytes,
        told_generation: left.map(|(told, _)| told),
    }
}
