//! Cuts at a host: the epoch is raised, completions are held, positions are read.
//!
//! Invariant: as in `filter_daemon::cut`, whose view of a lane this is: a hold begins before the epoch moves, and
//! what is reported after it is worth something only if it lasted until the appliance ended it.

use crate::guest::{ProtectedDisk, Vm};
use crate::host::DOMAIN;
use crate::network::Frame;
use crate::world::{Event, MS, World};
use filter_core::disk::cut_hold::CUT_HOLD_NS;
use filter_core::lane::layout::LaneState;
use filter_core::lane::ring::{self, Sound};
use filter_core::lane::sync::Ordering::Relaxed;
use filter_core::mutant::{Guard, holds};
use filter_core::wire::{DiskReport, ErrorCode, Message};
use filter_daemon::cut::Doing;
use filter_daemon::lane::{CutAnswer, CutAsk};
use std::sync::Arc;

/// A cut that is being taken.
pub struct Taking {
    epoch: u32,
    connection: u64,
    /// Completions are held for it, and are to be until the appliance says otherwise.
    holds: bool,
    /// Per disk what it did, and whether it was open.
    before: Vec<(usize, Doing, bool)>,
}

impl World {
    /// The appliance asks for a cut: the epoch is bumped; the positions are read a little later.
    pub(crate) fn cut_request(&mut self, host: usize, connection: u64, epoch: u32, hold: bool) {
        let Some(this) = self.hosts.get_mut(host) else {
            return;
        };
        let Some(daemon) = &mut this.daemon else {
            return;
        };
        let current = this.cut_epoch.load(Relaxed); // one thread
        if current >= epoch {
            self.void_cut(connection, current.into(), "the cut epoch is higher here");
            return;
        }
        let before = daemon.lanes.iter();
        let before = before.map(|s| {
            let open = is_open(&self.vms, &self.disks, host, s.disk);
            (s.disk, Doing::of(s.lane.consumer.memory()), open)
        });
        daemon.taking = Some(Taking {
            epoch,
            connection,
            holds: hold,
            before: before.collect(),
        });
        let run = daemon.run;
        if hold {
            this.hold_until = self.now + CUT_HOLD_NS;
        }
        ring::epoch_bump::<Sound>(&this.cut_epoch, epoch);
        if !hold {
            self.within(0, 2 * MS, Event::Positions(host, run, epoch));
            return;
        }
        self.after(CUT_HOLD_NS, Event::HoldOver(host, self.now + CUT_HOLD_NS));
        let held = Message::CutHeld {
            epoch,
            domain: DOMAIN.into(),
        };
        self.send_up(connection, 0, Frame::Message(held));
    }

    /// Every host has moved its epoch, or the cut is given up.
    pub(crate) fn cut_release(&mut self, host: usize, epoch: u32) {
        let now = self.now;
        let Some(this) = self.hosts.get_mut(host) else {
            return;
        };
        let Some(daemon) = &mut this.daemon else {
            return;
        };
        let taking = daemon
            .taking
            .as_mut()
            .filter(|t| t.epoch == epoch && t.holds);
        let Some(taking) = taking else {
            return; // of a cut that is over
        };
        taking.holds = false;
        let (run, connection) = (daemon.run, taking.connection);
        let in_time = now < this.hold_until || !holds(Guard::HoldOverVoids);
        if !in_time {
            daemon.taking = None;
        }
        this.hold_until = 0;
        self.look_at_cut_holds(host);
        if in_time {
            self.within(0, 2 * MS, Event::Positions(host, run, epoch));
        } else {
            self.void_cut(connection, 0, "the hold was over too early");
        }
    }

    /// The deadline of a hold: filters go on by themselves, and the daemon gives the cut up.
    pub fn hold_over(&mut self, host: usize, until: u64) {
        let Some(this) = self.hosts.get_mut(host) else {
            return;
        };
        if this.hold_until != until {
            return;
        }
        self.count("cut: hold over");
        self.look_at_cut_holds(host);
        let daemon = self.hosts.get_mut(host).and_then(|h| h.daemon.as_mut());
        let taking = daemon.filter(|_| holds(Guard::HoldOverVoids));
        let taking = taking.and_then(|daemon| daemon.taking.take_if(|taking| taking.holds));
        if let Some(taking) = taking {
            self.void_cut(taking.connection, 0, "the hold was over too early");
        }
    }

    /// Whatever cut was being taken on a host is given up, and nothing is held for it.
    pub(crate) fn give_cut_up(&mut self, host: usize) {
        if let Some(this) = self.hosts.get_mut(host) {
            if let Some(daemon) = &mut this.daemon {
                daemon.taking = None;
            }
            this.hold_until = 0;
        }
        self.look_at_cut_holds(host);
    }

    fn void_cut(&mut self, connection: u64, seq: u64, text: &str) {
        self.count("cut: void at the host");
        let message = Message::Error {
            code: ErrorCode::Other,
            seq,
            text: text.into(),
        };
        self.send_up(connection, 0, Frame::Message(message));
    }

    /// The positions of a cut are read, and looked at once more.
    pub fn positions(&mut self, host: usize, of: u64, epoch: u32) {
        let Some(this) = self.hosts.get_mut(host) else {
            return;
        };
        let Some(daemon) = this.daemon.as_mut().filter(|d| d.run == of) else {
            return;
        };
        let Some(taking) = daemon.taking.take_if(|taking| taking.epoch == epoch) else {
            return;
        };
        let known = this.lanes.iter().all(|(disk, lane)| {
            let served = daemon.lanes.iter().find(|s| s.disk == *disk);
            let state = lane.memory().producer().state.load(Relaxed); // one thread
            let fresh = LaneState::from_word(state) == Some(LaneState::Fresh);
            let left = fresh && !is_open(&self.vms, &self.disks, host, *disk);
            left || served.is_some_and(|s| Arc::ptr_eq(&s.lane.mapped, lane))
        });
        let mut positions = Vec::new();
        let void = (!known).then_some("a disk was opened meanwhile");
        for served in &mut daemon.lanes {
            let memory = served.lane.consumer.memory();
            let (answer, answers) = crossbeam::channel::unbounded();
            let end = ring::observe_tail::<Sound>(&memory.producer().tail); // C1
            let ask = CutAsk {
                end,
                epoch: epoch.saturating_sub(1),
                answer,
            };
            let _ = served.asks.send(ask);
            served.lane.answer_cuts();
            let seq = match answers.try_recv() {
                Ok(CutAnswer::At(_, seq)) => Some(seq),
                Ok(CutAnswer::NotOurs) => continue,
                _ => None,
            };
            let mut before = taking.before.iter();
            let before = before.find(|(disk, ..)| *disk == served.disk);
            let same = before
                .is_some_and(|(_, before, _)| before.is_complete() && *before == Doing::of(memory));
            let open = is_open(&self.vms, &self.disks, host, served.disk);
            positions.push(DiskReport {
                disk_id: served.lane.disk_id(),
                seq: seq.unwrap_or(0),
                open: open || before.is_none_or(|(.., open)| *open),
                complete: seq.is_some() && (same || !holds(Guard::CutVoidWhileSyncing)),
            });
        }
        match void {
            Some(text) => self.void_cut(taking.connection, 0, text),
            None => {
                let message = Message::CutReport {
                    epoch,
                    domain: DOMAIN.into(),
                    disks: positions,
                };
                self.send_up(taking.connection, 0, Frame::Message(message));
            }
        }
    }
}

/// Whether a disk is open on this host.
fn is_open(vms: &[Vm], disks: &[ProtectedDisk], host: usize, disk: usize) -> bool {
    let disk = disks.get(disk).filter(|disk| disk.open.is_some());
    let vm = disk.and_then(|disk| vms.get(disk.vm));
    vm.is_some_and(|vm| vm.runs && vm.host == host)
}
