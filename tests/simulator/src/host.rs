//! Hosts: their lanes, their VMs' beginnings and ends, their crashes.
//!
//! Invariant: as in the filter library's opening of a disk: the new attach epoch is durable in the sidecar
//! before the lane is touched, and what is done with the lane is the matching row of the core's table.

use crate::daemon::Daemon;
use crate::guest::{CORE_BUDGET_NS, Open};
use crate::storage::SidecarFault;
use crate::world::{Event, MS, SECOND, World};
use filter_core::disk::{Config, Disk, Start};
use filter_core::lane::attach::{
    self, Action, Found, LaneFile, OldProducer, Sidecar as SidecarFound, WasDoing,
};
use filter_core::lane::heap::HeapLane;
use filter_core::lane::layout::{Geometry, Identity, LaneState, MIN_RING_BYTES};
use filter_core::lane::producer::Producer;
use filter_core::lane::sync::{AtomicU32, Ordering};
use filter_core::lane::walk::{Scan, scan};
use filter_core::sidecar::Sidecar;
use std::collections::BTreeMap;
use std::sync::Arc;

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
        if this.runs {
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
        for disk in disks {
            // Nothing may be written any more, so this is what the guest will find.
            if let Some(this) = self.disks.get(disk) {
                let content = this.storage.content();
                self.oracle.settle(disk, 0..content.len(), content, died);
            }
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

    /// Opens a disk: `open.rs` of the filter library, without its files.
    fn attach(&mut self, disk: usize, host: usize) -> Result<(), Refused> {
        let sidecar_fault = self.numbers.chance(self.rates.sidecar);
        let torn = self.numbers.chance(500);
        let dies_early = self.numbers.chance(15);
        let dies_late = self.numbers.chance(15);
        let hosts = self.hosts.get_mut(host);
        let (Some(on), Some(this)) = (hosts, self.disks.get_mut(disk)) else {
            return Err(Refused::Died);
        };
        let sidecar = Sidecar::decode(this.sidecar.raw());
        let sidecar = sidecar.map_err(|error| Refused::Sidecar(error.to_string()))?;
        let boot_id = boot_id(host, on.boot);
        let capacity = this.capacity_bytes();
        let lane = on.lanes.get(&disk).cloned();
        let looked = look(lane.as_deref(), &sidecar, &boot_id, capacity);
        let row = attach::decide(&looked.found);
        let fresh = match row.action {
            Action::Refuse => return Err(Refused::Sidecar("in use".into())),
            Action::Fresh => true,
            Action::Restart | Action::AdoptMarked | Action::AdoptClean => false,
        };
        let next = sidecar.attached(boot_id, fresh);
        let next = next.map_err(|error| Refused::Sidecar(error.to_string()))?;
        let fault = match (sidecar_fault, torn) {
            (false, _) => None,
            (true, false) => Some(SidecarFault::Refused),
            (true, true) => Some(SidecarFault::Torn),
        };
        let saved = this.sidecar.write(
            next.offset_bytes(),
            &next.encode(),
            fault,
            &mut self.numbers,
        );
        if !saved {
            self.count(match torn {
                true => "fault: sidecar write torn",
                false => "fault: sidecar write refused",
            });
            return Err(Refused::Sidecar("its write was refused".into()));
        }
        if dies_early {
            return Err(Refused::Died);
        }
        let vm = this.vm;
        let identity = Identity {
            geometry: Geometry::for_disk(4 * capacity, MIN_RING_BYTES)
                .map_err(|error| Refused::Sidecar(error.to_string()))?,
            disk_id: this.id,
            vm_id: [vm as u8 + 1; 16],
            boot_id,
            base_seq: sidecar.seq_floor + 1,
            domain: DOMAIN.into(),
            vm_name: format!("vm-{vm}"),
            disk_label: format!("disk-{disk}"),
        };
        let (lane, scan) = match (lane, looked.scan) {
            (Some(lane), Some(scan)) if !fresh => (lane, scan),
            _ => {
                let lane = HeapLane::create(&identity, capacity)
                    .map_err(|error| Refused::Sidecar(error.to_string()))?;
                let lane = Arc::new(lane);
                on.lanes.insert(disk, lane.clone());
                let scan = Scan {
                    tail: 0,
                    next_seq: identity.base_seq,
                    last_stamp: 0,
                };
                (lane, scan)
            }
        };
        let cut_epoch = on.cut_epoch.clone();
        self.within(0, 100 * MS, Event::Scan(host, 0));
        if dies_late {
            return Err(Refused::Died);
        }
        if let Some(vm) = self.vms.get(vm) {
            // A clock that is good to some seconds, and what the lane itself knows.
            let floor = scan.last_stamp.max(self.now);
            vm.stamp.fetch_max(floor, Ordering::Relaxed); // one thread
        }
        let mut producer =
            Producer::new(lane.memory(), next.attach_epoch, scan.tail, scan.next_seq);
        let start = match row.action {
            Action::AdoptMarked => Start::Marked,
            Action::AdoptClean => Start::Clean,
            _ => Start::Full,
        };
        if row.action == Action::Restart {
            producer.restart();
        }
        let config = Config {
            defer_budget_ns: CORE_BUDGET_NS,
            ..Config::default()
        };
        let mut core = Disk::new(producer, capacity, start, config);
        if !fresh && looked.capacity_bytes < capacity {
            core.grown_since(looked.capacity_bytes);
        }
        self.count(match row.action {
            Action::Fresh => "attach: fresh",
            Action::Restart => "attach: restart",
            Action::AdoptMarked => "attach: adopted, marked",
            Action::AdoptClean => "attach: adopted, clean",
            Action::Refuse => "attach: refused",
        });
        self.say(|| format!("disk {disk}: {} -> {:?}, {start:?}", row.when, row.action));
        if let Some(this) = self.disks.get_mut(disk) {
            this.open = Some(Open::new(core, lane, cut_epoch));
        }
        self.arm_sync(disk, MS);
        Ok(())
    }

    /// A VM's process is killed: what it passed down may land or not, nobody hears of it.
    pub fn vm_kill(&mut self, vm: usize) {
        let Some(this) = self.vms.get_mut(vm).filter(|vm| vm.runs) else {
            return;
        };
        (this.runs, this.stopping) = (false, false);
        this.died = self.oracle.now();
        for disk in this.disks.clone() {
            let Some(this) = self.disks.get_mut(disk) else {
                continue;
            };
            this.open = None;
            for io in std::mem::take(&mut this.ios).into_values() {
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
            if let Ok(sidecar) = Sidecar::decode(this.sidecar.raw()) {
                let next = sidecar.closed(in_order);
                let at = next.offset_bytes();
                let written = this
                    .sidecar
                    .write(at, &next.encode(), None, &mut self.numbers);
                debug_assert!(written);
            }
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
            self.vm_kill(vm);
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
        }
        let down = self.numbers.spread(5 * SECOND, 1200 * SECOND);
        self.after(down, Event::HostUp(host));
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
}

/// What is found at attach.
fn look(
    lane: Option<&HeapLane>,
    sidecar: &Sidecar,
    boot_id: &[u8; 16],
    capacity_bytes: u64,
) -> Looked {
    let mut found = Found {
        file: LaneFile::Absent,
        producer: OldProducer::Gone,
        sidecar: SidecarFound::Absent,
        was: WasDoing::Nothing,
        restart_asked: false,
    };
    let Some(lane) = lane else {
        return Looked {
            found,
            scan: None,
            capacity_bytes: 0,
        };
    };
    use filter_core::lane::layout::LaneHome;
    let identity = lane.identity();
    let memory = lane.memory();
    let words = memory.producer();
    let foreign =
        identity.boot_id != *boot_id || memory.geometry().max_capacity_bytes() < capacity_bytes;
    let scanned = scan(memory);
    let state = LaneState::from_word(words.state.load(Ordering::Relaxed)); // one thread
    found.file = match (&scanned, foreign, state) {
        (_, true, _) => LaneFile::Foreign,
        (Err(_), ..) | (_, _, None) => LaneFile::Unusable,
        _ => LaneFile::Good,
    };
    let lane_epoch = words.attach_epoch.load(Ordering::Relaxed); // one thread
    let ours = sidecar.matches_lane(lane_epoch, boot_id);
    found.sidecar = match ours {
        true => SidecarFound::Matches,
        false => SidecarFound::OtherEpoch,
    };
    found.was = match state {
        Some(LaneState::Closed) => WasDoing::Closed,
        Some(LaneState::Streaming | LaneState::Syncing) => WasDoing::Publishing,
        Some(LaneState::Tracking) => WasDoing::Tracking,
        Some(LaneState::Fresh) | None => WasDoing::Nothing,
    };
    let asked = memory.consumer().restart_request.load(Ordering::Relaxed); // one thread
    found.restart_asked = asked != words.restart_done.load(Ordering::Relaxed); // one thread
    let capacity_bytes = words.capacity_bytes.load(Ordering::Relaxed); // one thread
    Looked {
        found,
        scan: scanned.ok(),
        capacity_bytes,
    }
}
