//! Faults, and what an operator does: what strikes, how often, and for how long.
//!
//! Invariant: everything that is broken is mended by an event that is planned when it breaks, so that the
//! last phase begins with nothing broken for good.

use crate::kinds::KINDS;
use crate::plan::Phase;
use crate::store::Mood;
use crate::world::{Event, HOUR, MS, SECOND, World};

/// A fault, or something that an operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// A VM's process is killed, and started again.
    VmKill,
    /// A VM is shut down in order, and started again.
    VmStop,
    /// A VM is killed and started on another host.
    VmMove,
    /// A running VM moves to another host.
    Migrate,
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
    /// Bytes of a sidecar change.
    DamageSidecar,
    /// Bytes of a lane change.
    DamageLane,
    /// Bytes of the appliance's log change.
    DamageLog,
}

/// Something that is slow or fails for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ill {
    /// The network is slow.
    SlowLink,
    /// The log's volume is slow.
    SlowLog,
    /// Guests' disks are slow.
    SlowDisks,
    /// Sidecars are slow.
    SlowSidecars,
    /// Guests' writes fail.
    Writes,
    /// Reads of syncs fail.
    Reads,
    /// Writes of sidecars fail.
    Sidecars,
    /// Writes of the log fail.
    LogWrites,
}

/// All of them.
pub const ILLS: &[Ill] = &[
    Ill::SlowLink,
    Ill::SlowLog,
    Ill::SlowDisks,
    Ill::SlowSidecars,
    Ill::Writes,
    Ill::Reads,
    Ill::Sidecars,
    Ill::LogWrites,
];

/// All of them, with how often each strikes relative to the others.
pub const STRIKES: &[(Strike, u64)] = &[
    (Strike::VmKill, 12),
    (Strike::VmStop, 6),
    (Strike::VmMove, 3),
    (Strike::Migrate, 10),
    (Strike::DaemonKill, 10),
    (Strike::HostCrash, 7),
    (Strike::ServerKill, 12),
    (Strike::LogLost, 2),
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
    (Strike::DamageSidecar, 5),
    (Strike::DamageLane, 6),
    (Strike::DamageLog, 2),
];

impl World {
    pub(crate) fn any_vm(&mut self) -> usize {
        self.numbers.below(self.vms.len() as u64) as usize
    }

    pub(crate) fn any_host(&mut self) -> usize {
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
            Strike::VmKill | Strike::VmStop | Strike::VmMove | Strike::Migrate => {
                self.strike_vm(strike);
            }
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
                    self.plan.log_damaged = false;
                    self.plan.log_is_whole = false;
                    self.through.log_lost();
                }
                let down = self.numbers.spread(20 * MS, 600 * SECOND);
                self.after(down, Event::ServerStart);
            }
            Strike::LinkCut => {
                let host = self.any_host();
                let down = self.numbers.spread(10 * MS, 2 * HOUR);
                self.link_cut(host, down);
            }
            Strike::DamageSidecar | Strike::DamageLane | Strike::DamageLog => self.damage(strike),
            Strike::ResetByDaemon | Strike::ResetByAppliance => self.reset(strike),
            Strike::SlowLink => self.slow(Ill::SlowLink),
            Strike::SlowLog => self.slow(Ill::SlowLog),
            Strike::SlowDisk => self.slow(Ill::SlowDisks),
            Strike::SlowSidecar => self.slow(Ill::SlowSidecars),
            Strike::Behind | Strike::Copy | Strike::RollBack => self.strike_content(strike),
            Strike::WritesFail => {
                self.rates.write = self.numbers.between(2, 100);
                self.mend(Ill::Writes);
            }
            Strike::ReadsFail => {
                self.rates.read = self.numbers.between(20, 1000);
                self.mend(Ill::Reads);
            }
            Strike::SidecarsFail => {
                self.rates.sidecar = self.numbers.between(100, 800);
                self.mend(Ill::Sidecars);
                let vm = self.any_vm();
                self.vm_kill(vm);
                self.within(MS, 10 * SECOND, Event::VmStart(vm));
            }
            Strike::LogFails => {
                self.rates.log = self.numbers.between(20, 500);
                self.mend(Ill::LogWrites);
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

    fn slow(&mut self, which: Ill) {
        let pace = self.numbers.spread(200, 20_000);
        match which {
            Ill::SlowLink => self.pace.link = pace,
            Ill::SlowLog => self.pace.log = pace,
            Ill::SlowSidecars => self.pace.sidecar = pace,
            _ => self.pace.disk = pace.min(2000),
        }
        self.mend(which);
    }

    fn mend(&mut self, which: Ill) {
        let after = self.numbers.spread(100 * MS, 300 * SECOND);
        self.after(after, Event::Mended(which));
    }

    /// Something slow is as quick as it usually is, or something that failed works.
    pub fn mended(&mut self, which: Ill) {
        let usual = self.plan.habits.pace;
        match which {
            Ill::SlowLink => self.pace.link = usual.link,
            Ill::SlowLog => self.pace.log = usual.log,
            Ill::SlowDisks => self.pace.disk = usual.disk,
            Ill::SlowSidecars => self.pace.sidecar = usual.sidecar,
            Ill::Writes => self.rates.write = 0,
            Ill::Reads => self.rates.read = 0,
            Ill::Sidecars => self.rates.sidecar = 0,
            Ill::LogWrites => self.rates.log = 0,
        }
    }

    /// The store is well again.
    pub fn store_up(&mut self, of: u64) {
        if self.plan.store == of {
            self.store.set(Mood::default());
        }
    }
}
