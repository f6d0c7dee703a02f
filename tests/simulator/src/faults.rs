//! What is planned: bursts of writes with faults among them, long pauses in between, and at last a time in
//! which everything is well.
//!
//! Invariant: everything that is broken is mended by an event that is planned when it breaks, so that the
//! last phase begins with nothing broken for good.

use crate::numbers::Numbers;
use crate::store::Mood;
use crate::world::{Event, HOUR, MS, SECOND, US, World};
use std::collections::BTreeMap;

/// How long it may take, once all is well, until every disk streams and the newest cut is what they hold.
pub const LIVENESS_LIMIT: u64 = 1800 * SECOND;

/// A fault, or something that an operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// A VM's process is killed, and started again.
    VmKill,
    /// A VM is shut down in order, and started again.
    VmStop,
    /// A VM is killed and started on another host.
    VmMove,
    /// A host's daemon is killed.
    DaemonKill,
    /// A host loses its power.
    HostCrash,
    /// The appliance is killed.
    ServerKill,
    /// The appliance loses its log.
    LogLost,
    /// A host's link is cut.
    LinkCut,
    /// A host's connections are closed by the daemon's side.
    ResetByDaemon,
    /// They are closed by the appliance's side.
    ResetByAppliance,
    /// The network is slow.
    SlowLink,
    /// The log's volume is slow.
    SlowLog,
    /// Guests' disks are slow.
    SlowDisk,
    /// The store does not answer.
    StoreDown,
    /// The store fails now and then, and is slow.
    StoreFlaky,
    /// Writes of guests fail.
    WritesFail,
    /// Reads of syncs fail.
    ReadsFail,
    /// Writes of sidecars fail.
    SidecarsFail,
    /// Writes of the log fail.
    LogFails,
    /// A disk grows.
    Grow,
    /// A disk is reverted to a snapshot.
    Revert,
    /// A filter is told that replication cannot go on.
    Tracking,
    /// Sidecars are slow.
    SlowSidecar,
    /// A disk is changed without its filter while its VM is down.
    Behind,
    /// A copy of a disk with its sidecar is made.
    Copy,
    /// A disk and its sidecar become what they were when the copy was made.
    RollBack,
}

/// All of them, with how often each strikes relative to the others.
const STRIKES: &[(Strike, u64)] = &[
    (Strike::VmKill, 12),
    (Strike::VmStop, 6),
    (Strike::VmMove, 3),
    (Strike::DaemonKill, 10),
    (Strike::HostCrash, 4),
    (Strike::ServerKill, 12),
    (Strike::LogLost, 1),
    (Strike::LinkCut, 10),
    (Strike::ResetByDaemon, 8),
    (Strike::ResetByAppliance, 8),
    (Strike::SlowLink, 5),
    (Strike::SlowLog, 5),
    (Strike::SlowDisk, 5),
    (Strike::StoreDown, 6),
    (Strike::StoreFlaky, 8),
    (Strike::WritesFail, 4),
    (Strike::ReadsFail, 4),
    (Strike::SidecarsFail, 4),
    (Strike::LogFails, 5),
    (Strike::Grow, 3),
    (Strike::Revert, 3),
    (Strike::Tracking, 3),
    (Strike::SlowSidecar, 4),
    (Strike::Behind, 3),
    (Strike::Copy, 8),
    (Strike::RollBack, 6),
];

/// Every kind that may happen: one that never does is reported.
pub const KINDS: &[&str] = &[
    "guest: write",
    "guest: write held for room",
    "guest: write held for the region map",
    "guest: flush",
    "strike: VmKill",
    "strike: VmStop",
    "strike: VmMove",
    "strike: DaemonKill",
    "strike: HostCrash",
    "strike: ServerKill",
    "strike: LogLost",
    "strike: LinkCut",
    "strike: ResetByDaemon",
    "strike: ResetByAppliance",
    "strike: SlowLink",
    "strike: SlowLog",
    "strike: SlowDisk",
    "strike: StoreDown",
    "strike: StoreFlaky",
    "strike: WritesFail",
    "strike: ReadsFail",
    "strike: SidecarsFail",
    "strike: LogFails",
    "strike: Grow",
    "strike: Revert",
    "strike: Tracking",
    "strike: SlowSidecar",
    "strike: Behind",
    "strike: Copy",
    "strike: RollBack",
    "rolled back",
    "rolled back: epoch raised",
    "region map written",
    "region map: flush",
    "fault: region map's write failed",
    "fault: region map's write cut off",
    "fault: guest's write failed by its disk",
    "fault: sync's read failed by its disk",
    "fault: sidecar write torn",
    "fault: sidecar write refused",
    "fault: vm died while a disk was opened",
    "fault: flush missing at a power cut",
    "fault: log write torn by a crash",
    "fault: log write refused",
    "store: request while down",
    "store: refused before",
    "store: answer lost",
    "store: request delayed",
    "store: late arrival",
    "attach: full",
    "attach: regions",
    "attach: restart",
    "attach: adopted, marked",
    "attach: adopted, clean",
    "close: in order",
    "close: not all was published",
    "sync finished",
    "lane changed its port",
    "refused: gap",
    "refused: fenced",
    "restart of a stream asked for",
    "frames under way after their sender left",
    "an end gave a silent connection up",
    "data over a superseded channel",
    "log: no room in the queue",
    "log: full",
    "cut: asked for",
    "cut: closed",
    "cut: void",
    "cut: void at the host",
    "cut: in the store",
    "upload: store failed",
];

/// Where the run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Anything may happen.
    Safety,
    /// All is well since then: the replica must become what the disks hold.
    Liveness(u64),
    /// It has.
    Over,
}

/// What is planned.
pub struct Plan {
    /// Where the run stands.
    pub phase: Phase,
    episodes: u64,
    /// The usual time between cuts.
    pub cut_interval: u64,
    /// What the appliance has acknowledged, disk by disk.
    pub acknowledged: BTreeMap<[u8; 16], u64>,
    /// Whether the log was not lost since the appliance started last.
    pub log_is_whole: bool,
    store: u64,
    /// When the guests stopped for good.
    still_since: u64,
}

impl Plan {
    /// A plan of a seed.
    pub fn new(numbers: &mut Numbers) -> Self {
        Self {
            phase: Phase::Safety,
            episodes: numbers.between(6, 14),
            cut_interval: numbers.spread(100 * MS, 5 * SECOND),
            acknowledged: BTreeMap::new(),
            log_is_whole: true,
            store: 0,
            still_since: 0,
        }
    }
}

impl World {
    /// The plan goes on.
    pub fn plan_step(&mut self) {
        match self.plan.phase {
            Phase::Safety if self.plan.episodes == 0 => self.all_is_well(),
            Phase::Safety => {
                self.plan.episodes -= 1;
                self.episode();
            }
            Phase::Liveness(since) => {
                self.look_after_vms();
                if self.now > since + LIVENESS_LIMIT {
                    let text = self.what_is_missing();
                    self.violated(format!("not well again in time: {text}"));
                }
                self.after(SECOND, Event::Plan);
            }
            Phase::Over => {}
        }
    }

    /// A burst with faults, then a pause.
    fn episode(&mut self) {
        let burst = self.numbers.spread(50 * MS, 3 * SECOND);
        let (gap, large) = match self.numbers.below(4) {
            0 => (300 * US, 300),
            1 => (MS, 100),
            _ => (self.numbers.spread(MS, 20 * MS), 30),
        };
        self.say(|| format!("episode: {} s of writes", burst as f64 / 1e9));
        for vm in 0..self.vms.len() {
            if let Some(vm) = self.vms.get_mut(vm) {
                (vm.gap_ns, vm.large) = (gap, large);
            }
            self.vm_busy(vm, burst);
        }
        for _ in 0..self.numbers.below(4) {
            let total = STRIKES.iter().map(|(_, weight)| weight).sum();
            let mut at = self.numbers.below(total);
            let chosen = STRIKES.iter().find(|(_, weight)| {
                let found = at < *weight;
                at = at.saturating_sub(*weight);
                found
            });
            if let Some((strike, _)) = chosen {
                self.within(0, burst * 3 / 2, Event::Strike(*strike));
            }
        }
        let pause = match self.numbers.below(3) {
            0 => self.numbers.spread(10 * MS, 10 * SECOND),
            1 => self.numbers.spread(SECOND, 600 * SECOND),
            _ => self.numbers.spread(600 * SECOND, 24 * HOUR),
        };
        self.after(burst + pause, Event::Plan);
    }

    fn any_vm(&mut self) -> usize {
        self.numbers.below(self.vms.len() as u64) as usize
    }

    fn any_host(&mut self) -> usize {
        // Where there is something to break.
        let vm = self.any_vm();
        self.vms.get(vm).map_or(0, |vm| vm.host)
    }

    /// A fault strikes.
    pub fn strike(&mut self, strike: Strike) {
        if self.plan.phase != Phase::Safety {
            return;
        }
        self.say(|| format!("{strike:?}"));
        let name = KINDS
            .iter()
            .find(|kind| kind.strip_prefix("strike: ") == Some(&format!("{strike:?}")));
        if let Some(name) = name {
            self.count(name);
        }
        match strike {
            Strike::VmKill | Strike::VmStop | Strike::VmMove => self.strike_vm(strike),
            Strike::Grow | Strike::Revert | Strike::Tracking => self.strike_disk(strike),
            Strike::DaemonKill => {
                let host = self.any_host();
                self.daemon_gone(host, false);
                let down = self.numbers.spread(50 * MS, 600 * SECOND);
                self.after(down, Event::DaemonStart(host));
            }
            Strike::HostCrash => {
                let host = self.any_host();
                if self.hosts.get(host).is_some_and(|host| host.up) {
                    self.host_crash(host);
                    self.restart_elsewhere(host);
                }
            }
            Strike::ServerKill | Strike::LogLost => {
                self.server_gone();
                if strike == Strike::LogLost {
                    self.volume.lose();
                    self.presented.clear();
                    self.plan.log_is_whole = false;
                }
                let down = self.numbers.spread(20 * MS, 600 * SECOND);
                self.after(down, Event::ServerStart);
            }
            Strike::LinkCut => {
                let host = self.any_host();
                let down = self.numbers.spread(10 * MS, 2 * HOUR);
                self.link_cut(host, down);
            }
            Strike::ResetByDaemon | Strike::ResetByAppliance => self.reset(strike),
            Strike::SlowLink => self.slow(0),
            Strike::SlowLog => self.slow(1),
            Strike::SlowDisk => self.slow(2),
            Strike::SlowSidecar => self.slow(7),
            Strike::Behind | Strike::Copy | Strike::RollBack => self.strike_content(strike),
            Strike::WritesFail => {
                self.rates.write = self.numbers.between(2, 100);
                self.mend(3);
            }
            Strike::ReadsFail => {
                self.rates.read = self.numbers.between(20, 500);
                self.mend(4);
            }
            Strike::SidecarsFail => {
                self.rates.sidecar = self.numbers.between(100, 800);
                self.mend(5);
                let vm = self.any_vm();
                self.vm_kill(vm);
                self.within(MS, 10 * SECOND, Event::VmStart(vm));
            }
            Strike::LogFails => {
                self.rates.log = self.numbers.between(20, 500);
                self.mend(6);
            }
            Strike::StoreDown | Strike::StoreFlaky => {
                let mood = Mood {
                    down: strike == Strike::StoreDown,
                    fail_before: self.numbers.between(0, 300),
                    fail_after: self.numbers.between(0, 300),
                    delay_ms: self.numbers.spread(1, 3000),
                };
                self.store.set(mood);
                self.plan.store += 1;
                let down = self.numbers.spread(500 * MS, 900 * SECOND);
                self.after(down, Event::StoreUp(self.plan.store));
            }
        }
    }

    fn strike_vm(&mut self, strike: Strike) {
        let vm = self.any_vm();
        let hosts = self.hosts.len();
        let Some(this) = self.vms.get_mut(vm).filter(|vm| vm.runs) else {
            return;
        };
        if strike == Strike::VmStop {
            this.stopping = true;
            let first = this.disks.first().copied().unwrap_or(0);
            self.stop_if_idle(first);
            self.within(50 * MS, 20 * SECOND, Event::VmStart(vm));
            return;
        }
        self.vm_kill(vm);
        let down = self.numbers.spread(MS, 60 * SECOND);
        if strike == Strike::VmMove
            && let Some(this) = self.vms.get_mut(vm)
        {
            this.host = (this.host + 1) % hosts;
        }
        self.after(down, Event::VmStart(vm));
    }

    fn strike_disk(&mut self, strike: Strike) {
        let disk = self.numbers.below(self.disks.len() as u64) as usize;
        let Some(this) = self.disks.get_mut(disk) else {
            return;
        };
        let quiet = this.ios.is_empty();
        let Some(open) = &mut this.open else { return };
        match strike {
            Strike::Grow => {
                let units = self.numbers.between(1, 40) as usize;
                let capacity = this.storage.units() + units;
                let bytes = capacity as u64 * crate::storage::UNIT_BYTES;
                if !open.core.grow(bytes) {
                    return;
                }
                let value = self.name();
                if let Some(this) = self.disks.get_mut(disk) {
                    this.storage.grow(units, value);
                }
                self.oracle.grow(disk, units, value);
            }
            Strike::Revert if quiet => {
                let now = self.oracle.now();
                for unit in 0..this.storage.units() {
                    if self.numbers.chance(50) {
                        let value = 1 << 60 | self.numbers.any() >> 4;
                        this.storage.write(unit, value);
                    }
                }
                this.storage.flush();
                open.core.mark_all();
                let content = this.storage.content();
                self.oracle.settle(disk, 0..content.len(), content, now);
            }
            Strike::Tracking => open.core.enter_tracking(),
            _ => return,
        }
        self.arm_sync(disk, MS);
    }

    /// What happens to a disk without its filter.
    fn strike_content(&mut self, strike: Strike) {
        let vm = self.any_vm();
        let disks = self.vms.get(vm).map_or(Vec::new(), |vm| vm.disks.clone());
        if strike == Strike::Copy {
            for disk in disks {
                if let Some(this) = self.disks.get_mut(disk) {
                    let copy = (this.storage.clone(), this.sidecar.clone(), this.content_id);
                    this.copy = Some(copy);
                }
            }
            return;
        }
        self.vm_kill(vm);
        for disk in disks {
            let content = self.name();
            let value = 1 << 61 | content;
            let Some(this) = self.disks.get_mut(disk) else {
                continue;
            };
            let units = this.storage.units();
            match (strike, this.copy.take()) {
                // A copy from within the present opening cannot be told from the disk itself: no
                // content id and no epoch says so.
                (Strike::RollBack, Some((storage, sidecar, id)))
                    if storage.units() == units && id != this.content_id =>
                {
                    (this.storage, this.sidecar, this.content_id) = (storage, sidecar, id);
                    this.storage.flush();
                    self.count("rolled back");
                }
                (Strike::Behind, _) => {
                    for unit in 0..units {
                        if self.numbers.chance(20) {
                            this.storage.write(unit, value);
                        }
                    }
                    this.storage.flush();
                    this.content_id = content;
                }
                _ => {}
            }
        }
        self.within(MS, 20 * SECOND, Event::VmStart(vm));
    }

    fn reset(&mut self, strike: Strike) {
        let host = self.any_host();
        let mine = self.connections.iter();
        let mine = mine.filter(|(_, c)| c.host == host && c.daemon_has && c.appliance_has);
        let mine: Vec<_> = mine.map(|(name, c)| (*name, c.role)).collect();
        for (connection, role) in mine {
            if self.numbers.chance(300) {
                continue;
            }
            if strike == Strike::ResetByDaemon {
                self.close_by_daemon(connection);
                self.lost(host, role);
            } else {
                self.close_by_appliance(connection);
            }
        }
    }

    /// VMs of a host that crashed are started there later, or elsewhere.
    fn restart_elsewhere(&mut self, host: usize) {
        let elsewhere = self.numbers.chance(500);
        let hosts = self.hosts.len();
        for vm in 0..self.vms.len() {
            let delay = self.numbers.spread(SECOND, 300 * SECOND);
            if let Some(this) = self.vms.get_mut(vm).filter(|vm| vm.host == host) {
                if elsewhere {
                    this.host = (host + 1) % hosts;
                }
                self.after(delay, Event::VmStart(vm));
            }
        }
    }

    fn slow(&mut self, which: u8) {
        let pace = self.numbers.spread(200, 20_000);
        match which {
            0 => self.pace.link = pace,
            1 => self.pace.log = pace,
            7 => self.pace.sidecar = pace,
            _ => self.pace.disk = pace.min(2000),
        }
        self.mend(which);
    }

    fn mend(&mut self, which: u8) {
        let after = self.numbers.spread(100 * MS, 300 * SECOND);
        self.after(after, Event::Quick(which));
    }

    /// Something slow is quick again, or something that failed works.
    pub fn quick(&mut self, which: u8) {
        match which {
            0 => self.pace.link = 100,
            1 => self.pace.log = 100,
            2 => self.pace.disk = 100,
            3 => self.rates.write = 0,
            4 => self.rates.read = 0,
            5 => self.rates.sidecar = 0,
            7 => self.pace.sidecar = 100,
            _ => self.rates.log = 0,
        }
    }

    /// The store is well again.
    pub fn store_up(&mut self, of: u64) {
        if self.plan.store == of {
            self.store.set(Mood::default());
        }
    }

    /// The faults stop; everything that is down is started, on one host.
    fn all_is_well(&mut self) {
        self.say(|| "from here on all is well".into());
        self.plan.phase = Phase::Liveness(self.now);
        (0..=7).for_each(|which| self.quick(which));
        self.store.set(Mood::default());
        self.plan.store += 1;
        for host in 0..self.hosts.len() {
            let cut = self.hosts.get(host).map_or(0, |h| h.cuts_of_link);
            self.link_up(host, cut);
            self.host_up(host);
        }
        self.after(0, Event::ServerStart);
        for vm in 0..self.vms.len() {
            if let Some(vm) = self.vms.get_mut(vm) {
                (vm.gap_ns, vm.large) = (2 * MS, 30);
            }
            self.vm_busy(vm, 2 * SECOND);
        }
        self.plan.still_since = self.now + 2 * SECOND;
        self.after(SECOND, Event::Plan);
    }

    /// Cuts are taken of domains on one host: all VMs are brought there.
    fn look_after_vms(&mut self) {
        let home = self.vms.first().map_or(0, |vm| vm.host);
        for vm in 0..self.vms.len() {
            let Some(this) = self.vms.get(vm) else {
                continue;
            };
            if this.host != home && this.runs && self.now > self.plan.still_since {
                let first = this.disks.first().copied().unwrap_or(0);
                if let Some(this) = self.vms.get_mut(vm) {
                    this.stopping = true;
                }
                self.stop_if_idle(first);
            } else if !this.runs {
                if let Some(this) = self.vms.get_mut(vm) {
                    this.host = home;
                }
                self.after(0, Event::VmStart(vm));
            }
        }
    }

    fn what_is_missing(&mut self) -> String {
        let mut text = Vec::new();
        for (number, disk) in self.disks.iter_mut().enumerate() {
            let open = disk.open.as_mut();
            let state = open.map(|open| {
                let free = open.core.producer().free_bytes();
                let (core, held) = (&open.core, open.held.len());
                (
                    core.state(),
                    free,
                    held,
                    core.has_deferred(),
                    core.dirty_bytes(),
                )
            });
            text.push(format!("disk {number}: {state:?}"));
        }
        for host in &self.hosts {
            for served in host.daemon.iter().flat_map(|daemon| &daemon.lanes) {
                let lane = &served.lane;
                let at = (lane.stage, lane.moving_to, lane.consumer.restarting());
                text.push(format!("{}: {at:?}", lane.label()));
            }
        }
        text.push(format!("newest cut: {:?}", self.committed.last()));
        text.join("; ")
    }

    /// Whether nothing is left to do for the replica to be what the disks hold.
    pub fn is_still(&self) -> bool {
        let still =
            matches!(self.plan.phase, Phase::Liveness(_)) && self.now > self.plan.still_since;
        still
            && self.vms.iter().all(|vm| vm.runs && !vm.stopping)
            && self.disks.iter().all(|disk| disk.ios.is_empty())
    }
}
