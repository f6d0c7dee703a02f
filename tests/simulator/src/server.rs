//! The appliance's sessions, its log's writer and its cuts, as events; and how frames travel.
//!
//! Invariant: as in `drva`: records are admitted in the order of their connection, acknowledged when their
//! batch is durable, and a cut is closed only when every disk has a position, is durable up to it and is
//! consistent at it.

use crate::appliance::{Domain, Step};
use crate::hasher::Hasher;
use crate::numbers::Numbers;
use crate::upload::{Shared, Upload};
use crate::world::{Event, MS, US, World};
use drva::disk::{Outcome, Route};
use drva::log::LogOptions;
use drva::presence::{Host, HostId, Reports};
use filter_core::mutant::{Guard, holds};
use filter_core::wire::{ErrorCode, Message};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// How soon a write that the log's volume refused is tried again.
const LOG_RETRY: u64 = 500 * MS;

/// Where a cut stands.
pub(crate) enum Cut {
    None,
    Asked {
        epoch: u32,
        hosts: BTreeSet<HostId>,
        /// Hosts of which is awaited that they hold completions.
        unheld: BTreeSet<HostId>,
        reports: Reports,
        /// It is one of several hosts.
        hold: bool,
        time_ns: u64,
        beginnings: BTreeMap<[u8; 16], u64>,
    },
    Waiting {
        epoch: u32,
        time_ns: u64,
        positions: BTreeMap<[u8; 16], u64>,
        beginnings: BTreeMap<[u8; 16], u64>,
    },
}

/// The appliance's process.
pub struct Server {
    /// Tells it from earlier ones.
    pub run: u64,
    /// The domain, shared with the upload.
    pub shared: Rc<RefCell<Shared>>,
    upload: JoinHandle<()>,
    hasher: JoinHandle<()>,
    /// Wakes the hasher.
    pub(crate) questions: Rc<Notify>,
    /// Channels: connection and number, to disk and what tells the channel from earlier ones.
    pub(crate) channels: BTreeMap<(u64, u32), ([u8; 16], u64)>,
    pub(crate) cut: Cut,
    pub(crate) cut_armed: bool,
    pub(crate) cut_wait: u64,
    log_armed: bool,
    /// Positions of the last cut that was closed.
    pub(crate) taken: BTreeMap<[u8; 16], u64>,
}

impl World {
    /// The sizes of the log.
    fn log_options(&self) -> LogOptions {
        LogOptions {
            segment_bytes: 256 << 10,
            max_bytes: 2 << 20 << (self.seed % 3),
        }
    }

    /// The appliance starts.
    pub fn server_start(&mut self) {
        if self.server.is_some() {
            return;
        }
        let domain = match Domain::open(self.volume.clone(), self.log_options()) {
            Ok(domain) => domain,
            Err(error) => return self.log_put_aside(&error.to_string()),
        };
        self.plan.log_damaged = false;
        self.acknowledged_is_there(&domain);
        self.count("appliance started");
        self.say(|| "the appliance starts".into());
        let shared = Rc::new(RefCell::new(Shared {
            domain,
            posts: Vec::new(),
            busy: true,
            asks: VecDeque::new(),
            answering: false,
        }));
        let questions = Rc::new(Notify::new());
        let hasher = Hasher {
            shared: shared.clone(),
            store: self.store.clone(),
            work: questions.clone(),
            told: self.told.clone(),
            numbers: RefCell::new(Numbers::new(self.numbers.any())),
        };
        let upload = Upload {
            shared: shared.clone(),
            store: self.store.clone(),
            work: self.work.clone(),
            told: self.told.clone(),
            part_bytes: 256 << 10,
        };
        let run = self.name();
        self.server = Some(Server {
            run,
            shared,
            upload: tokio::task::spawn_local(upload.run()),
            hasher: tokio::task::spawn_local(hasher.run()),
            questions,
            channels: BTreeMap::new(),
            cut: Cut::None,
            cut_armed: false,
            cut_wait: self.plan.cut_interval,
            log_armed: false,
            taken: BTreeMap::new(),
        });
        self.arm_cut();
    }

    /// What was acknowledged is in the log that a restarted appliance reads.
    fn acknowledged_is_there(&mut self, domain: &Domain) {
        if !self.plan.log_is_whole {
            self.plan.log_is_whole = true;
            self.plan.acknowledged.clear();
            return;
        }
        for (id, acknowledged) in &self.plan.acknowledged {
            let held = domain.disks.get(id).map_or(0, |disk| disk.received().0);
            if held < *acknowledged {
                let text = format!(
                    "record {acknowledged} was acknowledged as durable; after a crash the log ends at {held}"
                );
                return self.violated(text);
            }
        }
    }

    /// The appliance's process dies.
    pub fn server_gone(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        server.upload.abort();
        server.hasher.abort();
        self.say(|| "the appliance is gone".into());
        if self.volume.crash() {
            self.count("fault: log write torn by a crash");
        }
        let all: Vec<u64> = self.connections.keys().copied().collect();
        for connection in all {
            self.close_by_appliance(connection);
        }
    }

    // ---- sessions -----------------------------------------------------------------------------

    pub(crate) fn message_up(
        &mut self,
        connection: u64,
        host: usize,
        channel: u32,
        message: Message,
    ) {
        let id = self.hosts.get(host).map_or([0; 16], |host| host.id);
        let named = Host {
            id,
            name: format!("host-{host}"),
        };
        let outbox = self.connections.get(&connection).map(|c| c.outbox.clone());
        let (Some(server), Some(outbox)) = (&mut self.server, outbox) else {
            return;
        };
        match message {
            Message::OpenLane(lane) => {
                let route = Route {
                    outbox: outbox.clone(),
                    channel,
                };
                if self.trace {
                    let (disk, epoch) = (lane.disk_id[0], lane.attach_epoch);
                    let base = lane.base;
                    println!(
                        "{:>16.6} s  conn {connection}.{channel}: OPEN_LANE disk {} epoch {epoch} durable {} base {base:?}",
                        self.now as f64 / 1e9,
                        disk - 1,
                        lane.durable_seq
                    );
                }
                let open = server.channels.get(&(connection, channel));
                let again = match (lane.again, open) {
                    (false, _) => None,
                    (true, Some((_, generation))) => Some(*generation),
                    (true, None) => return,
                };
                let opened = server
                    .shared
                    .borrow_mut()
                    .domain
                    .open_lane(&lane, &named, route, again);
                match opened {
                    Ok(None) => self.count("news over a superseded channel"),
                    Ok(Some(generation)) => {
                        let channels = &mut server.channels;
                        channels.insert((connection, channel), (lane.disk_id, generation));
                        self.presented.insert(lane.disk_id, lane.attach_epoch);
                        self.count("lane opened");
                    }
                    Err((code, seq, text)) => {
                        outbox.send(&Message::Error { code, seq, text }, channel)
                    }
                }
                self.arm_log();
                self.arm_cut();
            }
            Message::HashRequest {
                offset_bytes,
                blocks,
            } => self.hash_request((connection, channel), outbox, offset_bytes, blocks),
            Message::CloseLane { in_order } => {
                if let Some((disk, generation)) = server.channels.remove(&(connection, channel)) {
                    let mut shared = server.shared.borrow_mut();
                    shared.domain.close_lane(&disk, generation, in_order);
                    drop(shared);
                    self.arm_log();
                }
            }
            Message::CutHeld { epoch, .. } => self.cut_held(id, epoch),
            Message::CutReport { epoch, disks, .. } => self.cut_report(id, epoch, disks),
            Message::Error { seq, text, .. } => {
                let mut shared = server.shared.borrow_mut();
                let known = u32::try_from(seq).unwrap_or(0);
                shared.domain.last_epoch = shared.domain.last_epoch.max(known);
                drop(shared);
                if matches!(&server.cut, Cut::Asked { hosts, .. } if hosts.contains(&id)) {
                    self.void(&text);
                }
            }
            _ => {}
        }
    }

    pub(crate) fn data_up(&mut self, connection: u64, channel: u32, bytes: Vec<u8>) {
        let outbox = self.connections.get(&connection).map(|c| c.outbox.clone());
        let (Some(server), Some(outbox)) = (&mut self.server, outbox) else {
            return;
        };
        let key = (connection, channel);
        let Some((disk, generation)) = server.channels.get(&key).copied() else {
            return;
        };
        let outcome = server
            .shared
            .borrow_mut()
            .domain
            .data(&disk, generation, bytes);
        match outcome {
            Outcome::Taken => {}
            Outcome::Superseded => {
                server.channels.remove(&key);
                self.count("data over a superseded channel");
            }
            Outcome::Refused(code, seq, text) => {
                if self.trace {
                    let at = self.now as f64 / 1e9;
                    println!(
                        "{at:>16.6} s  conn {connection}.{channel}: DATA refused {code:?} at {seq}: {text}"
                    );
                }
                server.channels.remove(&key);
                outbox.send(&Message::Error { code, seq, text }, channel);
                if code == ErrorCode::Corrupt {
                    self.count("appliance found a record corrupt");
                }
            }
        }
        self.arm_log();
        self.arm_cut();
    }

    // ---- log ----------------------------------------------------------------------------------

    pub(crate) fn arm_log(&mut self) {
        if let Some(server) = &mut self.server
            && !std::mem::replace(&mut server.log_armed, true)
        {
            let run = server.run;
            self.within(10 * US, 200 * US, Event::LogStep(run));
        }
    }

    /// The log's writer goes on.
    pub fn log_step(&mut self, of: u64) {
        let fails = self.numbers.chance(self.rates.log);
        let kind = self.numbers.below(3);
        let Some(server) = self.server.as_mut().filter(|s| s.run == of) else {
            return;
        };
        server.log_armed = false;
        if fails {
            match kind {
                0 => self.volume.plan_write(crate::volume::Fault::Refused),
                1 => self.volume.plan_write(crate::volume::Fault::Torn),
                _ => self.volume.plan_create(),
            }
        }
        let step = server.shared.borrow_mut().domain.log.step();
        match step {
            Step::Idle => {}
            Step::Begun => {
                if !holds(Guard::AckAfterDurable) {
                    let shared = server.shared.clone();
                    let early = shared.borrow().domain.log.under_way();
                    self.tell_durable(&early);
                }
                let slow = self.pace.log;
                let delay = self.numbers.between(100 * US, 3 * MS) * slow / 100;
                self.after(delay, Event::LogDurable(of));
            }
            Step::Full => {
                self.count("log: full");
                self.wake_upload();
            }
            Step::Refused => {
                self.count("fault: log write refused");
                self.after(LOG_RETRY, Event::LogStep(of));
            }
        }
    }

    pub(crate) fn tell_durable(&mut self, all: &[drva::log::Durability]) {
        let Some(server) = &self.server else { return };
        server.shared.borrow().domain.tell_durable(all);
        for durable in all {
            let known = self.plan.acknowledged.entry(durable.disk_id).or_default();
            *known = (*known).max(durable.seq);
        }
        self.flush_outboxes();
    }

    /// The log's write under way is durable.
    pub fn log_durable(&mut self, of: u64) {
        let Some(server) = self.server.as_mut().filter(|s| s.run == of) else {
            return;
        };
        let shared = server.shared.clone();
        self.note_logged();
        let durable = shared.borrow_mut().domain.log.durable();
        self.tell_durable(&durable);
        self.unblock();
        self.arm_log();
        self.try_close();
        self.wake_upload();
    }

    pub(crate) fn unblock(&mut self) {
        let blocked: Vec<u64> = self
            .connections
            .iter_mut()
            .filter_map(|(name, c)| std::mem::take(&mut c.blocked).then_some(*name))
            .collect();
        for connection in blocked {
            self.arm_up(connection);
        }
    }

    /// The upload may have something to do.
    pub fn wake_upload(&mut self) {
        if let Some(server) = &self.server {
            server.shared.borrow_mut().busy = true;
            self.work.notify_one();
        }
    }

    /// The upload has freed something.
    pub fn log_has_room(&mut self) {
        self.arm_log();
        self.flush_outboxes();
    }
}
