//! A VM moves to the other host while its guest runs.
//!
//! Invariant: as in the filter library's `migrate` and `close`, and in the hosts' way with them: the source
//! comes close to drained, the guest is stunned with nothing in flight, the lanes are drained, the disks are
//! closed, and only then the destination opens them. Until then the source can take everything back, and
//! it does if the destination cannot. The guest lives through all of it: what it was told stays true.
//!
//! What the move may cost is checked, too: where the appliance held everything at the close nothing is
//! synced, else no more than the marks that went along.

use crate::guest::Open;
use crate::plan::Phase;
use crate::storage::SidecarFault;
use crate::world::{Event, MS, SECOND, US, World};
use filter_core::disk::handoff::Handoff;
use filter_core::lane::layout::LaneState;

/// Records that are drained in no time.
const CLOSE_RECORDS: u64 = 64;
/// How long the lanes are drained, and before that, how long they may take to come close.
const HANDOFF_NS: u64 = 500 * MS;
/// How long the guest's I/O may take to end.
const PAUSE_NS: u64 = 5 * SECOND;

/// Where a move stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The guest runs; the lanes come close to drained.
    Prepare,
    /// The guest stands; its I/O ends.
    Pause,
    /// The lanes are drained.
    Drain,
    /// What the filter itself has under way ends; then the disks are closed.
    Close,
    /// The source is closed; the destination opens.
    Open,
}

/// A VM that moves.
#[derive(Clone, Debug)]
pub struct Moving {
    name: u64,
    to: usize,
    step: Step,
    until_ns: u64,
    /// Per disk, the bytes that may be synced at most.
    most: Vec<(usize, u64)>,
}

/// Records that are not durable, whether the daemon has a session, whether the disk streams.
type Stand = (u64, bool, bool);

fn behind(open: &mut Open) -> Stand {
    let published = open.core.producer().published().seq();
    let memory = open.core.memory();
    let words = memory.consumer();
    let durable = words.durable_seq.load(crate::guest::RELAXED);
    let linked = words.linked.load(crate::guest::RELAXED) != 0;
    let streaming = open.core.state() == LaneState::Streaming;
    (published.saturating_sub(durable), linked, streaming)
}

impl World {
    /// A VM is asked to move to the other host.
    pub fn move_begin(&mut self, vm: usize) {
        let hosts = self.hosts.len();
        let (name, now) = (self.name(), self.now);
        let Some(this) = self.vms.get_mut(vm) else {
            return;
        };
        if !this.runs || this.stopping || this.moving.is_some() || this.reverting.is_some() {
            return;
        }
        let to = (this.host + 1) % hosts;
        this.moving = Some(Moving {
            name,
            to,
            step: Step::Prepare,
            until_ns: now + HANDOFF_NS,
            most: Vec::new(),
        });
        self.count("move: begun");
        self.say(|| format!("vm {vm} is to move to host {to}"));
        self.after(0, Event::Move(vm, name));
    }

    /// Whether a VM is on its way between two hosts, open on neither.
    pub fn is_between(&self, vm: usize) -> bool {
        let vm = self.vms.get(vm);
        vm.is_some_and(|vm| !vm.runs && vm.moving.is_some())
    }

    /// A move goes on.
    pub fn move_step(&mut self, vm: usize, name: u64) {
        let Some(this) = self.vms.get(vm) else { return };
        let Some(moving) = this.moving.clone().filter(|moving| moving.name == name) else {
            return;
        };
        self.fault_while_moving(vm, &moving);
        let still = self.vms.get(vm).and_then(|vm| vm.moving.as_ref());
        if still.is_none_or(|moving| moving.name != name) {
            return;
        }
        match moving.step {
            Step::Prepare => {
                let close = |(behind, linked, streaming): Stand| {
                    linked && behind < CLOSE_RECORDS || !streaming
                };
                self.move_wait(vm, &moving, close, Step::Pause, MS, PAUSE_NS);
                let paused = self.vms.get(vm).and_then(|vm| vm.moving.as_ref());
                if paused.is_some_and(|moving| moving.step == Step::Pause)
                    && let Some(this) = self.vms.get_mut(vm)
                {
                    this.paused = true;
                }
            }
            Step::Pause => self.move_pause(vm, &moving),
            Step::Drain => {
                let drained =
                    |(behind, linked, streaming): Stand| behind == 0 || !streaming || !linked;
                self.move_wait(vm, &moving, drained, Step::Close, 200 * US, PAUSE_NS);
            }
            Step::Close => self.move_close(vm, moving),
            Step::Open => self.move_open(vm, &moving),
        }
    }

    fn disks_of(&self, vm: usize) -> Vec<usize> {
        self.vms.get(vm).map_or(Vec::new(), |vm| vm.disks.clone())
    }

    fn move_to(&mut self, vm: usize, step: Step, limit_ns: u64) {
        let until_ns = self.now + limit_ns;
        if let Some(moving) = self.vms.get_mut(vm).and_then(|vm| vm.moving.as_mut()) {
            (moving.step, moving.until_ns) = (step, until_ns);
        }
    }

    /// Waits for all lanes, or for the time to end; then the next step comes.
    fn move_wait(
        &mut self,
        vm: usize,
        moving: &Moving,
        done: impl Fn(Stand) -> bool,
        next: Step,
        look_ns: u64,
        limit_ns: u64,
    ) {
        let mut all = true;
        for disk in self.disks_of(vm) {
            let behind = self.core(disk, |open, _| behind(open));
            all &= behind.is_none_or(&done);
        }
        if all || self.now >= moving.until_ns {
            self.move_to(vm, next, limit_ns);
        }
        self.after(look_ns, Event::Move(vm, moving.name));
    }

    /// The guest's I/O ends; if it does not in time the guest goes on where it is.
    fn move_pause(&mut self, vm: usize, moving: &Moving) {
        let disks = self.disks_of(vm);
        let ended = |disk: &usize| self.disks.get(*disk).is_none_or(|d| d.ios.is_empty());
        if disks.iter().all(ended) {
            for disk in disks {
                self.release_completions(disk);
            }
            self.move_to(vm, Step::Drain, HANDOFF_NS);
        } else if self.now >= moving.until_ns {
            self.count("move: given up, I/O did not end");
            return self.move_cancel(vm);
        }
        self.after(200 * US, Event::Move(vm, moving.name));
    }

    fn move_cancel(&mut self, vm: usize) {
        if let Some(this) = self.vms.get_mut(vm) {
            (this.moving, this.paused) = (None, false);
        }
    }

    /// The disks are closed with what goes along, once nothing of the filter is under way.
    fn move_close(&mut self, vm: usize, mut moving: Moving) {
        let disks = self.disks_of(vm);
        let busy = |disk: &usize| {
            let open = self.disks.get(*disk).and_then(|d| d.open.as_ref());
            open.is_some_and(Open::is_working)
        };
        if disks.iter().any(busy) {
            self.after(MS, Event::Move(vm, moving.name));
            return;
        }
        for disk in disks {
            let most = self.close_handoff(disk);
            moving.most.extend(most.map(|bytes| (disk, bytes)));
        }
        moving.step = Step::Open;
        let name = moving.name;
        if let Some(this) = self.vms.get_mut(vm) {
            (this.runs, this.moving) = (false, Some(moving));
        }
        self.within(MS, 50 * MS, Event::Move(vm, name));
    }

    /// `close` of the filter library, with `JIO_CLOSE_HANDOFF`. Returns how many bytes the next opening may
    /// have to sync; `None`: that cannot be told.
    fn close_handoff(&mut self, disk: usize) -> Option<u64> {
        let flush_fails = self.numbers.chance(self.rates.write);
        let this = self.disks.get_mut(disk)?;
        if !flush_fails {
            this.storage.flush();
        }
        let id = this.id;
        let mut open = this.open.take()?;
        let in_order = open.core.is_settled();
        if !flush_fails {
            open.core.intent_close();
        }
        let written = open.core.intent_write_all(|offset_bytes, block| {
            self.write_beside(disk, offset_bytes, block)
                .then_some(())
                .ok_or(())
        });
        if written.is_err() {
            self.count("move: the sidecar refused");
            return None;
        }
        let handoff = open.core.handoff();
        if let Some(Some(map)) = &handoff {
            // A sidecar of its own, made for this.
            if self.numbers.chance(self.rates.sidecar) {
                self.count("move: the sidecar refused");
                return None;
            }
            let raw = map.encode(&id, open.header.attach_epoch);
            if let Some(this) = self.disks.get_mut(disk) {
                this.handed = Some(raw);
            }
        }
        let header = open.header_at_close(in_order);
        if !self.write_beside(disk, header.offset_bytes(), &header.encode()) {
            self.count("move: the sidecar refused");
            return None;
        }
        open.core.close();
        match handoff {
            None => {
                self.count("move: the appliance held everything");
                (!flush_fails).then_some(0)
            }
            Some(None) => None,
            Some(Some(map)) => {
                self.count("move: marks went along");
                Some(map.marked_bytes())
            }
        }
    }

    fn write_beside(
        &mut self,
        disk: usize,
        offset_bytes: u64,
        block: &[u8; filter_core::sidecar::BLOCK_BYTES],
    ) -> bool {
        let fails = self.numbers.chance(self.rates.sidecar);
        let fault = fails.then_some(SidecarFault::Torn);
        let this = self.disks.get_mut(disk);
        this.is_some_and(|this| {
            this.sidecar
                .write(offset_bytes, block, fault, &mut self.numbers)
        })
    }

    /// The dirty map that the attach of this epoch left: taken by the next opening, whatever comes of it.
    pub(crate) fn handed_over(&mut self, disk: usize, attach_epoch: u32) -> Option<Handoff> {
        let this = self.disks.get_mut(disk)?;
        let raw = this.handed.take()?;
        Handoff::decode(&raw, &this.id, attach_epoch, this.capacity_bytes())
    }

    /// The destination opens the disks; or else the source again; or else the guest is gone.
    fn move_open(&mut self, vm: usize, moving: &Moving) {
        let from = self.vms.get(vm).map_or(0, |vm| vm.host);
        let went = self.move_open_on(vm, moving.to);
        if went {
            self.count("move: done");
            for (disk, most) in &moving.most {
                let this = self.disks.get_mut(*disk);
                if this.is_none_or(|this| std::mem::take(&mut this.spoiled)) {
                    continue;
                }
                let dirty = self.core(*disk, |open, _| open.core.dirty_bytes());
                if dirty.is_some_and(|dirty| dirty > *most) {
                    self.violated(format!(
                        "disk {disk}: {dirty:?} bytes are synced after a move, at most {most} are needed"
                    ));
                }
            }
        } else if self.move_open_on(vm, from) {
            self.count("move: taken back");
        } else {
            self.count("move: neither side could go on");
            self.within(SECOND, 10 * SECOND, Event::VmStart(vm));
        }
        self.move_cancel(vm);
        if let Some(this) = self.vms.get(vm)
            && this.runs
            && self.now < this.busy_until
        {
            let run = this.run;
            self.within(0, 5 * MS, Event::Guest(vm, run));
        }
    }

    fn move_open_on(&mut self, vm: usize, host: usize) -> bool {
        if !self.hosts.get(host).is_some_and(|host| host.up) {
            return false;
        }
        let run = self.name();
        if let Some(this) = self.vms.get_mut(vm) {
            (this.run, this.runs, this.host) = (run, true, host);
        }
        self.say(|| format!("vm {vm} is opened on host {host}"));
        for disk in self.disks_of(vm) {
            if !self.attach_moved(disk, host) {
                // Whoever has it open closes it, or ends.
                self.vm_kill(vm);
                return false;
            }
        }
        true
    }

    /// Something breaks while a VM moves.
    fn fault_while_moving(&mut self, vm: usize, moving: &Moving) {
        let often = match moving.step {
            Step::Prepare | Step::Pause => 3,
            Step::Drain => 10,
            Step::Close | Step::Open => 60,
        };
        if self.plan.phase != Phase::Safety || !self.numbers.chance(often) {
            return;
        }
        let from = self.vms.get(vm).map_or(0, |vm| vm.host);
        let side = if self.numbers.chance(500) {
            from
        } else {
            moving.to
        };
        let what = self.numbers.below(5);
        self.count(match what {
            0 => "move: a host crashed",
            1 => "move: a link was cut",
            2 => "move: a daemon died",
            3 => "move: the appliance died",
            _ => "move: the VM's process died",
        });
        self.break_while_moving(vm, side, what);
    }
}
