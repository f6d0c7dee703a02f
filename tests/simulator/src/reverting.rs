//! A disk becomes what a snapshot of it was, while its VM's process has it open and its guest stands.
//!
//! Invariant: as in the filter library's `snapshot`, and in the host's way with it: the revert is announced,
//! and happens only once the sidecar names the whole disk; then the filter hears that it has happened. In
//! between everything else goes on, faults too. What the disk holds is told to the oracle when it changes.

use crate::world::{Event, MS, SECOND, US, World};
use filter_core::mutant::{Guard, holds};

/// How long the guest's I/O, and then the sidecar, may take.
const LIMIT_NS: u64 = 5 * SECOND;
/// How often that is looked at.
const LOOK_NS: u64 = 500 * US;

/// Where a revert stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The guest stands; its I/O ends.
    Pause,
    /// The filter was told that it is to happen; the sidecar is written.
    Announced,
    /// It has happened; the filter does not know yet.
    Happened,
}

/// A revert under way.
#[derive(Clone, Copy, Debug)]
pub struct Reverting {
    step: Step,
    until_ns: u64,
}

impl World {
    /// A disk is to be reverted.
    pub(crate) fn revert_begin(&mut self, disk: usize) {
        let until_ns = self.now + LIMIT_NS;
        let Some(vm) = self.disks.get(disk).map(|disk| disk.vm) else {
            return;
        };
        let Some(this) = self.vms.get_mut(vm) else {
            return;
        };
        if !this.runs || this.stopping || this.moving.is_some() || this.reverting.is_some() {
            return;
        }
        this.paused = true;
        let step = Step::Pause;
        this.reverting = Some(Reverting { step, until_ns });
        self.count("revert: begun");
        self.say(|| format!("disk {disk} is to be reverted"));
        self.after(0, Event::Revert(disk, self.run_of(disk)));
    }

    /// A revert goes on.
    pub fn revert_step(&mut self, disk: usize, of: u64) {
        let Some(this) = self.open_of(disk, of) else {
            return;
        };
        let (vm, quiet) = (this.vm, this.is_quiet());
        let Some(reverting) = self.vms.get(vm).and_then(|vm| vm.reverting) else {
            return;
        };
        let late = self.now >= reverting.until_ns;
        match reverting.step {
            Step::Pause if quiet => {
                self.core(disk, |open, _| open.core.change_begins());
                self.drive_regions(disk);
                self.revert_goes_on(disk, Step::Announced, 0);
            }
            Step::Announced => {
                let pending = self.core(disk, |open, _| open.core.intent_pending());
                if pending == Some(true) && holds(Guard::ChangeIntended) {
                    if late {
                        self.revert_end(disk, false);
                        return;
                    }
                    self.drive_regions(disk);
                    return self.after(LOOK_NS, Event::Revert(disk, of));
                }
                self.revert_content(disk);
                if self.numbers.chance(100) {
                    self.break_while_reverting(vm);
                }
                let took_ns = self.numbers.spread(50 * US, 10 * SECOND);
                self.revert_goes_on(disk, Step::Happened, took_ns);
            }
            Step::Happened => self.revert_end(disk, true),
            Step::Pause if late => self.revert_end(disk, false),
            Step::Pause => self.after(LOOK_NS, Event::Revert(disk, of)),
        }
    }

    fn revert_goes_on(&mut self, disk: usize, step: Step, after_ns: u64) {
        let until_ns = self.now + LIMIT_NS;
        let vm = self.disks.get(disk).map_or(usize::MAX, |disk| disk.vm);
        // Gone with its VM's process, if that has died of it.
        let under_way = self.vms.get_mut(vm).and_then(|vm| vm.reverting.as_mut());
        let Some(reverting) = under_way else { return };
        *reverting = Reverting { step, until_ns };
        self.after(after_ns, Event::Revert(disk, self.run_of(disk)));
    }

    /// The content is another from now on, durably, whatever becomes of the VM.
    fn revert_content(&mut self, disk: usize) {
        let now = self.oracle.now();
        let Some(this) = self.disks.get_mut(disk) else {
            return;
        };
        for unit in 0..this.storage.units() {
            if self.numbers.chance(50) {
                let value = 1 << 60 | self.numbers.any() >> 4;
                this.storage.write(unit, value);
            }
        }
        this.storage.flush();
        let content = this.storage.content();
        self.oracle.settle(disk, 0..content.len(), content, now);
        self.count("revert: happened");
        self.say(|| format!("disk {disk} is another"));
    }

    /// Right after the content has changed something dies.
    fn break_while_reverting(&mut self, vm: usize) {
        let host = self.vms.get(vm).map_or(0, |vm| vm.host);
        let what = self.numbers.below(5);
        self.count("revert: something died within");
        self.break_while_moving(vm, host, what);
    }

    fn revert_end(&mut self, disk: usize, has_happened: bool) {
        self.core(disk, |open, _| open.core.change_ends(has_happened));
        if !has_happened {
            self.count("revert: refused");
        }
        self.say(|| format!("disk {disk}: the revert is over"));
        let vm = self.disks.get(disk).map_or(usize::MAX, |disk| disk.vm);
        if let Some(this) = self.vms.get_mut(vm) {
            (this.reverting, this.paused) = (None, false);
            let first = this.disks.first().copied().unwrap_or(0);
            self.stop_if_idle(first);
        }
        if self.disks.get(disk).is_some_and(|disk| disk.open.is_some()) {
            self.drive_regions(disk);
            self.arm_sync(disk, MS);
            if has_happened && self.numbers.chance(500) {
                // Once more, while the sync that follows goes on.
                let soon = self.numbers.spread(50 * US, 30 * MS);
                self.after(soon, Event::RevertBegin(disk));
            }
        }
    }
}
