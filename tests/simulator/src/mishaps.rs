//! What befalls VMs and their disks: kills, moves, growth, reverts, changes behind the filter's back.
//!
//! Invariant: whatever is done to a disk outside of its guest's writes is told to the oracle at once, or
//! when the disk is opened again.

use crate::faults::Strike;
use crate::world::{Event, MS, SECOND, US, World};

impl World {
    /// Something breaks on one side of a move, or the moving VM's process dies.
    pub(crate) fn break_while_moving(&mut self, vm: usize, host: usize, what: u64) {
        let down = self.numbers.spread(20 * MS, 60 * SECOND);
        match what {
            0 if self.hosts.get(host).is_some_and(|host| host.up) => {
                self.host_crash(host);
                self.restart_elsewhere(host);
            }
            0 => {}
            1 => self.link_cut(host, down),
            2 => {
                self.daemon_gone(host, false);
                self.after(down, Event::DaemonStart(host));
            }
            3 => {
                self.server_gone();
                self.after(down, Event::ServerStart);
            }
            _ => {
                if self.vms.get(vm).is_some_and(|vm| vm.runs) {
                    self.vm_kill(vm);
                    self.after(down, Event::VmStart(vm));
                }
            }
        }
    }

    pub(crate) fn strike_vm(&mut self, strike: Strike) {
        let vm = self.any_vm();
        if strike == Strike::Migrate {
            return self.move_begin(vm);
        }
        let hosts = self.hosts.len();
        let Some(this) = self.vms.get_mut(vm).filter(|vm| vm.runs) else {
            return;
        };
        if strike == Strike::VmStop {
            if this.moving.is_some() {
                return; // an operator cannot have both
            }
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

    pub(crate) fn strike_disk(&mut self, strike: Strike) {
        let disk = self.numbers.below(self.disks.len() as u64) as usize;
        let Some(this) = self.disks.get_mut(disk) else {
            return;
        };
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
            Strike::Revert => return self.revert_begin(disk),
            Strike::Tracking => open.core.enter_tracking(),
            _ => return,
        }
        self.arm_sync(disk, MS);
        if strike != Strike::Tracking && self.numbers.chance(500) {
            // Once more, while the sync that follows goes on.
            let soon = self.numbers.spread(50 * US, 30 * MS);
            self.after(soon, Event::Strike(strike));
        }
    }

    /// What happens to a disk without its filter.
    pub(crate) fn strike_content(&mut self, strike: Strike) {
        let vm = self.any_vm();
        if self.is_between(vm) {
            return; // its guest lives, and would notice
        }
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
        let mut boots = false;
        for disk in disks {
            let content = self.name();
            let value = 1 << 61 | content;
            let Some(this) = self.disks.get_mut(disk) else {
                continue;
            };
            let units = this.storage.units();
            match (strike, this.copy.take()) {
                (Strike::RollBack, Some((storage, sidecar, id))) if storage.units() == units => {
                    let within = id == this.content_id;
                    let same = this.sidecar.raw() == sidecar.raw();
                    // Within one boot such a disk is told from itself only if its sidecar was written since.
                    boots |= within && same;
                    (this.storage, this.sidecar, this.content_id) = (storage, sidecar, id);
                    this.storage.flush();
                    self.count(match within {
                        true => "rolled back within an opening",
                        false => "rolled back",
                    });
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
        if boots || self.numbers.chance(300) {
            let host = self.vms.get(vm).map_or(0, |vm| vm.host);
            self.host_crash(host);
        }
        self.within(MS, 20 * SECOND, Event::VmStart(vm));
    }

    /// VMs of a host that crashed are started there later, or elsewhere.
    pub(crate) fn restart_elsewhere(&mut self, host: usize) {
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
}
