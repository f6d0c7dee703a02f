//! The appliance takes cuts: asks, waits, closes.
//!
//! Invariant: as in `drva::cut`: a cut is closed only if each disk of the domain has a position, is durable up
//! to it and is consistent at it, and if no disk came from another host meanwhile.

use crate::host::DOMAIN;
use crate::server::Cut;
use crate::world::{Event, SECOND, World};
use drva::disk::beginnings;
use drva::domain::{Asked, ClosedCut};
use drva::presence::{HostId, Missing, Reports, assemble, hosts_of};
use filter_core::mutant::{Guard, holds};
use filter_core::wire::{DiskReport, Message, PortRole};
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
        let asked = self.connected_hosts();
        let Some(server) = &mut self.server else {
            return Ok(());
        };
        let mut shared = server.shared.borrow_mut();
        let domain = &mut shared.domain;
        if domain.disks.values().any(|disk| disk.received().2) {
            return Err("a disk is syncing".into());
        }
        let attached = domain.disks.values().filter(|disk| disk.is_attached());
        let attached: BTreeSet<HostId> = attached.map(|disk| disk.presence().host).collect();
        let hold = attached.len() > 1;
        if asked.is_empty() {
            return Err("no host of the domain is connected".into());
        }
        domain.last_epoch += 1;
        let epoch = domain.last_epoch;
        let hosts: BTreeSet<HostId> = asked.keys().copied().collect();
        domain.outstanding = Some(Asked {
            epoch,
            hosts: hosts.clone(),
            void: false,
        });
        let beginnings = beginnings(&shared.domain.disks);
        drop(shared);
        if !attached.is_subset(&hosts) {
            return Err("a host's control connection is down".into());
        }
        let (time_ns, run) = (self.now, server.run);
        let domain = DOMAIN.into();
        self.send_to_hosts(match hold {
            true => Message::CutHold { epoch, domain },
            false => Message::CutRequest { epoch, domain },
        });
        if hold {
            self.count("cut: of several hosts");
        }
        self.say(|| {
            let now = self.oracle.now();
            format!(
                "cut of epoch {epoch} is asked for of {} hosts, moment {now}",
                hosts.len()
            )
        });
        if let Some(server) = &mut self.server {
            server.cut = Cut::Asked {
                epoch,
                unheld: if hold { hosts.clone() } else { BTreeSet::new() },
                hosts,
                reports: Reports::new(),
                hold,
                time_ns,
                beginnings,
            };
        }
        // An appliance that lost its log asks for an epoch once more, and the store may hold the cut of the
        // first time.
        let now = self.oracle.now();
        self.asked.entry(epoch).or_insert(now);
        self.through.cut_asked(epoch);
        self.count("cut: asked for");
        self.flush_outboxes();
        self.after(LIMIT, Event::CutLimit(run, epoch));
        Ok(())
    }

    /// The hosts whose control connection stands, as the appliance sees it: the newest connection of each.
    fn connected_hosts(&self) -> BTreeMap<HostId, u64> {
        let control = self.connections.iter();
        let control = control.filter(|(_, c)| c.role == PortRole::Control && c.appliance_has);
        let id = |host: usize| self.hosts.get(host).map(|host| host.id);
        control
            .filter_map(|(name, c)| Some((id(c.host)?, *name)))
            .collect()
    }

    fn send_to_hosts(&mut self, message: Message) {
        for connection in self.connected_hosts().into_values() {
            if let Some(control) = self.connections.get(&connection) {
                control.outbox.send(&message, 0);
            }
        }
        self.flush_outboxes();
    }

    /// A host holds completions, and has moved its epoch.
    pub(crate) fn cut_held(&mut self, from: HostId, of: u32) {
        let Some(server) = &mut self.server else {
            return;
        };
        let Cut::Asked { epoch, unheld, .. } = &mut server.cut else {
            return;
        };
        let epoch = *epoch;
        if epoch == of && unheld.remove(&from) && unheld.is_empty() {
            let domain = DOMAIN.into();
            self.send_to_hosts(Message::CutRelease { epoch, domain });
        }
    }

    /// Notes a cut that may lack writes of an opening that the appliance cannot have heard of: its host
    /// never had a disk of the domain and was not asked, or has crashed since and took all that told of it
    /// along.
    pub(crate) fn note_blind(&mut self, epoch: u32, reports: &Reports) {
        let Some(server) = &self.server else { return };
        let known = hosts_of(&server.shared.borrow().domain.disks);
        let blind = self.disks.iter().any(|disk| {
            let Some(opening) = disk.opened_on else {
                return false;
            };
            let presented = self.presented.get(&disk.id).copied().unwrap_or(0);
            let Some(host) = self.hosts.get(opening.host) else {
                return false;
            };
            let heard = reports.contains_key(&host.id);
            let unknown = !heard && !known.contains_key(&host.id);
            presented < opening.epoch && (unknown || host.boot != opening.boot)
        });
        if blind {
            self.blind.insert(epoch);
            self.count("cut: taken in ignorance of an opening");
        }
    }

    pub(crate) fn void(&mut self, why: &str) {
        self.count("cut: void");
        self.say(|| format!("no cut: {why}"));
        let Some(server) = &mut self.server else {
            return;
        };
        let before = std::mem::replace(&mut server.cut, Cut::None);
        server.shared.borrow_mut().domain.outstanding = None;
        // Seldom is enough while it cannot be.
        server.cut_wait = (server.cut_wait * 2).min(self.plan.cut_interval.max(60 * SECOND));
        self.arm_cut();
        self.wake_upload();
        if let Cut::Asked { epoch, unheld, .. } = before
            && !unheld.is_empty()
        {
            let domain = DOMAIN.into();
            self.send_to_hosts(Message::CutRelease { epoch, domain });
        }
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

    pub(crate) fn cut_report(&mut self, from: HostId, of: u32, disks: Vec<DiskReport>) {
        let Some(server) = &mut self.server else {
            return;
        };
        let Cut::Asked {
            epoch,
            hosts,
            reports,
            time_ns,
            hold,
            beginnings,
            ..
        } = &mut server.cut
        else {
            return;
        };
        if *epoch != of || !hosts.contains(&from) {
            return;
        }
        reports.insert(from, disks);
        if reports.len() < hosts.len() {
            return;
        }
        let (epoch, time_ns, reports, hold) = (*epoch, *time_ns, reports.clone(), *hold);
        let beginnings = beginnings.clone();
        let assembled = assemble(&server.shared.borrow().domain.disks, &reports);
        let positions = match assembled {
            Ok(assembled) => assembled.positions,
            Err(why) => {
                self.count(match why {
                    Missing::Lost { .. } => "cut: void for a lost disk",
                    Missing::Absent { .. } => "cut: void for an absent host",
                    Missing::Moving(_) | Missing::Unpresented => "cut: void for a disk that moves",
                    Missing::Incomplete(_) => "cut: void for a disk that syncs",
                });
                return self.void(&why.to_string());
            }
        };
        let open = reports.values();
        let open = open.filter(|disks| disks.iter().any(|disk| disk.open));
        if open.count() > 1 && !hold {
            return self.void("a disk was opened on another host meanwhile");
        }
        server.cut = Cut::Waiting {
            epoch,
            time_ns,
            positions,
            beginnings,
        };
        self.note_blind(epoch, &reports);
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
            beginnings,
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
        let consistent = positions.iter().all(|(id, seq)| {
            let since = beginnings.get(id).copied().unwrap_or(0);
            let disk = disks.get(id);
            disk.is_some_and(|disk| disk.is_of(since, *seq) && disk.consistent_at(*seq))
        });
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
            left_out: BTreeSet::new(),
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
