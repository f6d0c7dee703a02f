//! The appliance takes cuts: asks, waits, closes.
//!
//! Invariant: as in `drva::cut`: a cut is closed only if each disk of the domain has a position, is durable up
//! to it and is consistent at it, and if no disk came from another host meanwhile.

use crate::guest::RELAXED;
use crate::host::DOMAIN;
use crate::server::Cut;
use crate::world::{Event, SECOND, World};
use drva::domain::{Asked, ClosedCut};
use filter_core::mutant::{Guard, holds};
use filter_core::wire::{Message, PortRole};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// How long a host may take to answer, and a log to hold the positions.
const LIMIT: u64 = 5 * SECOND;

impl World {
    pub(crate) fn arm_cut(&mut self) {
        if let Some(server) = &mut self.server
            && !std::mem::replace(&mut server.cut_armed, true)
        {
            let (run, wait) = (server.run, server.cut_wait);
            self.after(wait, Event::Cut(run));
        }
    }

    /// A cut is taken, if anything was written.
    pub fn cut_timer(&mut self, of: u64) {
        let Some(server) = self.server.as_mut().filter(|s| s.run == of) else {
            return;
        };
        server.cut_armed = false;
        if !matches!(server.cut, Cut::None) {
            return;
        }
        let wanted = server
            .shared
            .borrow()
            .domain
            .disks
            .iter()
            .any(|(id, disk)| {
                let received = disk.received().0;
                received > 0 && server.taken.get(id).copied().unwrap_or(0) < received
            });
        if wanted && let Err(why) = self.cut_begin() {
            self.void(&why);
        }
    }

    pub(crate) fn cut_begin(&mut self) -> Result<(), String> {
        let Some(server) = &mut self.server else {
            return Ok(());
        };
        let mut shared = server.shared.borrow_mut();
        let domain = &mut shared.domain;
        if domain.disks.values().any(|disk| disk.received().2) {
            return Err("a disk is syncing".into());
        }
        let attached = domain.disks.values().filter(|disk| disk.is_attached());
        let hosts: BTreeSet<[u8; 16]> = attached.map(|disk| *disk.host.lock()).collect();
        let mut hosts = hosts.into_iter();
        let host = match (hosts.next(), hosts.next()) {
            (None, _) => return Err("no host of the domain is connected".into()),
            (Some(_), Some(_)) => return Err("its disks are on several hosts".into()),
            (Some(host), None) => host,
        };
        domain.last_epoch += 1;
        let epoch = domain.last_epoch;
        domain.outstanding = Some(Asked {
            epoch,
            host,
            void: false,
        });
        drop(shared);
        let number = self.hosts.iter().position(|h| h.id == host);
        let control = self
            .connections
            .values()
            .find(|c| Some(c.host) == number && c.role == PortRole::Control && c.appliance_has);
        let Some(control) = control else {
            return Err("the host's control connection is down".into());
        };
        let domain = DOMAIN.into();
        let request = Message::CutRequest { epoch, domain };
        control.outbox.send(&request, 0);
        let (time_ns, run) = (self.now, server.run);
        server.cut = Cut::Asked {
            epoch,
            host,
            time_ns,
        };
        self.say(|| {
            format!(
                "cut of epoch {epoch} is asked for of {number:?}, moment {}",
                self.oracle.now()
            )
        });
        self.note_blind(epoch, host);
        self.asked.insert(epoch, self.oracle.now());
        self.through.cut_asked(epoch);
        self.count("cut: asked for");
        self.flush_outboxes();
        self.after(LIMIT, Event::CutLimit(run, epoch));
        Ok(())
    }

    /// Notes a cut that is taken while a VM runs elsewhere.
    pub(crate) fn note_blind(&mut self, epoch: u32, host: [u8; 16]) {
        let asked = self.hosts.iter().position(|h| h.id == host);
        let lanes = asked.and_then(|host| self.hosts.get(host));
        // A lane that a VM has left behind is not its disk.
        let there = |disk: &usize| {
            let lane = lanes.and_then(|host| host.lanes.get(disk));
            let epoch = lane.map(|lane| lane.memory().producer().attach_epoch.load(RELAXED));
            epoch.is_some() && epoch == self.header_of(*disk).map(|header| header.attach_epoch)
        };
        let unknown = |vm: &crate::guest::Vm| {
            vm.runs && Some(vm.host) != asked || !vm.disks.iter().all(there)
        };
        let vms = self.vms.iter().enumerate();
        let apart = vms.filter(|(_, vm)| unknown(vm));
        let apart: Vec<_> = apart.map(|(at, _)| (epoch, at)).collect();
        if !apart.is_empty() {
            self.apart.extend(apart);
            self.blind.insert(epoch);
            self.count("cut: taken while a VM ran on another host");
        }
    }

    pub(crate) fn void(&mut self, why: &str) {
        self.count("cut: void");
        self.say(|| format!("no cut: {why}"));
        let Some(server) = &mut self.server else {
            return;
        };
        server.cut = Cut::None;
        server.shared.borrow_mut().domain.outstanding = None;
        // Seldom is enough while it cannot be.
        server.cut_wait = (server.cut_wait * 2).min(self.plan.cut_interval.max(60 * SECOND));
        self.arm_cut();
        self.wake_upload();
    }

    /// A cut has taken too long.
    pub fn cut_limit(&mut self, of: u64, late: u32) {
        let Some(server) = self.server.as_ref().filter(|s| s.run == of) else {
            return;
        };
        match &server.cut {
            Cut::Asked { epoch, .. } if *epoch == late => {
                self.void("the host did not answer in time");
            }
            Cut::Waiting { epoch, .. } if *epoch == late => {
                self.void("the log did not reach the positions in time");
            }
            _ => {}
        }
    }

    pub(crate) fn cut_positions(
        &mut self,
        from: [u8; 16],
        of: u32,
        reported: Vec<([u8; 16], u64)>,
    ) {
        let Some(server) = &mut self.server else {
            return;
        };
        let Cut::Asked {
            epoch,
            host,
            time_ns,
        } = server.cut
        else {
            return;
        };
        if epoch != of || host != from {
            return;
        }
        let mut positions: BTreeMap<[u8; 16], u64> = reported.into_iter().collect();
        let mut void = None;
        for (id, disk) in &server.shared.borrow().domain.disks {
            if !positions.contains_key(id) {
                if disk.is_attached() {
                    void = Some("the host reported no position of a disk");
                }
                positions.insert(*id, disk.durable_seq());
            }
        }
        if let Some(why) = void {
            return self.void(why);
        }
        server.cut = Cut::Waiting {
            epoch,
            time_ns,
            positions,
        };
        self.note_blind(epoch, from);
        self.try_close();
    }

    /// Closes the cut that waits, if every disk has reached its position.
    pub(crate) fn try_close(&mut self) {
        let Some(server) = &mut self.server else {
            return;
        };
        let Cut::Waiting {
            epoch,
            time_ns,
            positions,
        } = &server.cut
        else {
            return;
        };
        let (epoch, time_ns, positions) = (*epoch, *time_ns, positions.clone());
        let mut shared = server.shared.borrow_mut();
        let disks = &shared.domain.disks;
        let reached = positions.iter().all(|(id, seq)| {
            let there = disks.get(id).is_some_and(|disk| disk.durable_seq() >= *seq);
            there || !holds(Guard::CutWaitsForDurable)
        });
        if !reached {
            return;
        }
        let consistent = positions
            .iter()
            .all(|(id, seq)| disks.get(id).is_some_and(|disk| disk.consistent_at(*seq)));
        if !consistent {
            drop(shared);
            return self.void("a disk was syncing at its position");
        }
        let out = positions.iter();
        let out = out.map(|(id, seq)| (Uuid::from_bytes(*id), *seq)).collect();
        let closed = shared.domain.close_cut(ClosedCut {
            epoch,
            time_ns,
            name: None,
            positions: out,
        });
        drop(shared);
        if !closed {
            return self.void("a disk came from another host meanwhile");
        }
        let text = format!("cut of epoch {epoch} is closed at {:?}", positions.values());
        server.taken = positions;
        server.cut = Cut::None;
        server.cut_wait = self.plan.cut_interval;
        self.count("cut: closed");
        self.say(|| text);
        self.arm_cut();
        self.arm_log();
        self.wake_upload();
    }
}
