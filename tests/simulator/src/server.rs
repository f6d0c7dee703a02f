//! The appliance's sessions, its log's writer and its cuts, as events; and how frames travel.
//!
//! Invariant: as in `drva`: records are admitted in the order of their connection, acknowledged when their
//! batch is durable, and a cut is closed only when every disk has a position, is durable up to it and is
//! consistent at it.

use crate::appliance::{Domain, Step};
use crate::host::DOMAIN;
use crate::network::{Connection, Frame};
use crate::upload::{Shared, Upload};
use crate::world::{Event, MS, SECOND, US, World};
use drva::disk::{Outcome, Route};
use drva::domain::{Asked, ClosedCut};
use drva::log::LogOptions;
use filter_core::mutant::{Guard, holds};
use filter_core::wire::{ErrorCode, FRAME_HEADER_BYTES, FrameHeader, Message, PortRole};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// How long a host may take to answer, and a log to hold the positions.
const LIMIT: u64 = 5 * SECOND;
/// How soon a write that the log's volume refused is tried again.
const LOG_RETRY: u64 = 500 * MS;

/// Where a cut stands.
enum Cut {
    None,
    Asked {
        epoch: u32,
        host: [u8; 16],
        time_ns: u64,
    },
    Waiting {
        epoch: u32,
        time_ns: u64,
        positions: BTreeMap<[u8; 16], u64>,
    },
}

/// The appliance's process.
pub struct Server {
    /// Tells it from earlier ones.
    pub run: u64,
    /// The domain, shared with the upload.
    pub shared: Rc<RefCell<Shared>>,
    upload: JoinHandle<()>,
    /// Channels: connection and number, to disk and what tells the channel from earlier ones.
    channels: BTreeMap<(u64, u32), ([u8; 16], u64)>,
    cut: Cut,
    cut_armed: bool,
    cut_wait: u64,
    log_armed: bool,
    /// Positions of the last cut that was closed.
    taken: BTreeMap<[u8; 16], u64>,
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
            Err(error) => return self.violated(format!("the log cannot be opened: {error}")),
        };
        self.acknowledged_is_there(&domain);
        self.count("appliance started");
        self.say(|| "the appliance starts".into());
        let shared = Rc::new(RefCell::new(Shared {
            domain,
            posts: Vec::new(),
            busy: true,
        }));
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
        self.say(|| "the appliance is gone".into());
        if self.volume.crash() {
            self.count("fault: log write torn by a crash");
        }
        let all: Vec<u64> = self.connections.keys().copied().collect();
        for connection in all {
            self.close_by_appliance(connection);
        }
    }

    // ---- connections --------------------------------------------------------------------------

    /// A daemon connects.
    pub fn connect(&mut self, host: usize, daemon: u64, role: PortRole) -> u64 {
        let name = self.name();
        let connection = Connection::new(host, daemon, role);
        self.connections.insert(name, connection);
        self.count("connection made");
        name
    }

    fn latency(&mut self) -> u64 {
        self.numbers.between(50 * US, 600 * US) * self.pace.link / 100
    }

    fn works(&self, connection: u64) -> bool {
        let host = self.connections.get(&connection).map(|c| c.host);
        host.and_then(|host| self.hosts.get(host))
            .is_some_and(|host| host.linked)
    }

    /// The daemon sends a frame.
    pub fn send_up(&mut self, connection: u64, channel: u32, frame: Frame) {
        let Some(this) = self.connections.get_mut(&connection) else {
            return;
        };
        if let Frame::Data(bytes) = &frame {
            this.up_bytes += bytes.len();
        }
        this.up.push_back((channel, frame));
        self.arm_up(connection);
    }

    fn arm_up(&mut self, connection: u64) {
        let latency = self.latency();
        let Some(this) = self.connections.get_mut(&connection) else {
            return;
        };
        if !this.up.is_empty() && !this.blocked && !std::mem::replace(&mut this.up_armed, true) {
            self.after(latency, Event::Up(connection));
        }
    }

    fn arm_down(&mut self, connection: u64) {
        let latency = self.latency();
        let Some(this) = self.connections.get_mut(&connection) else {
            return;
        };
        if !this.down.is_empty() && !std::mem::replace(&mut this.down_armed, true) {
            self.after(latency, Event::Down(connection));
        }
    }

    /// A frame arrives at the appliance.
    pub fn up(&mut self, connection: u64) {
        let works = self.works(connection);
        let Some(this) = self.connections.get_mut(&connection) else {
            return;
        };
        this.up_armed = false;
        if !this.appliance_has {
            this.up.clear();
            this.up_bytes = 0;
            return;
        }
        if !works || this.blocked {
            return;
        }
        let Some((channel, frame)) = this.up.pop_front() else {
            return;
        };
        let (host, role) = (this.host, this.role);
        match frame {
            Frame::Message(message) => self.message_up(connection, host, channel, message),
            Frame::End => self.close_by_appliance(connection),
            Frame::Data(bytes) => {
                let Some(server) = &self.server else { return };
                let room = server.shared.borrow().domain.log.has_room();
                if !room {
                    self.count("log: no room in the queue");
                    if let Some(this) = self.connections.get_mut(&connection) {
                        this.up.push_front((channel, Frame::Data(bytes)));
                        this.blocked = true;
                    }
                    return;
                }
                if let Some(this) = self.connections.get_mut(&connection) {
                    this.up_bytes -= bytes.len();
                }
                self.data_up(connection, channel, bytes);
                self.want_pump(host, role, 200 * US);
            }
        }
        self.flush_outboxes();
        self.arm_up(connection);
    }

    /// A frame arrives at the daemon.
    pub fn down(&mut self, connection: u64) {
        let works = self.works(connection);
        let Some(this) = self.connections.get_mut(&connection) else {
            return;
        };
        this.down_armed = false;
        if !works {
            return;
        }
        let Some(frame) = this.down.pop_front() else {
            return;
        };
        let (host, daemon, role, has) = (this.host, this.daemon, this.role, this.daemon_has);
        let present = self.hosts.get(host).and_then(|h| h.daemon.as_ref());
        let has = has && present.is_some_and(|d| d.run == daemon);
        match frame {
            None => {
                if let Some(this) = self.connections.get_mut(&connection) {
                    this.daemon_has = false;
                }
                if has {
                    self.lost(host, role);
                }
                self.forget_closed(connection);
                return;
            }
            Some((channel, message)) if has => {
                self.heard(host, role, connection, channel, message);
            }
            Some(_) => {}
        }
        self.arm_down(connection);
    }

    fn forget_closed(&mut self, connection: u64) {
        let gone = self.connections.get(&connection);
        if gone.is_some_and(|c| !c.daemon_has && !c.appliance_has) {
            self.connections.remove(&connection);
        }
    }

    /// The daemon closes a connection: some of what is under way still arrives.
    pub fn close_by_daemon(&mut self, connection: u64) {
        let part = self.numbers.below(1001);
        let Some(this) = self.connections.get_mut(&connection) else {
            return;
        };
        if !std::mem::replace(&mut this.daemon_has, false) {
            return;
        }
        this.down.clear();
        let keep = this.up.len() * part as usize / 1000;
        this.up.truncate(keep);
        let bytes = |frame: &(u32, Frame)| match &frame.1 {
            Frame::Data(bytes) => bytes.len(),
            _ => 0,
        };
        this.up_bytes = this.up.iter().map(bytes).sum();
        if keep > 0 {
            self.count("frames under way after their sender left");
        }
        self.send_up(connection, 0, Frame::End);
        self.forget_closed(connection);
    }

    /// The appliance closes a connection, or died: its channels end.
    pub fn close_by_appliance(&mut self, connection: u64) {
        let part = self.numbers.below(1001);
        let Some(this) = self.connections.get_mut(&connection) else {
            return;
        };
        if !std::mem::replace(&mut this.appliance_has, false) {
            return;
        }
        this.up.clear();
        this.up_bytes = 0;
        let keep = this.down.len() * part as usize / 1000;
        this.down.truncate(keep);
        this.down.push_back(None);
        if let Some(server) = &mut self.server {
            let mine = server
                .channels
                .extract_if(.., |(of, _), _| *of == connection);
            let mine: Vec<_> = mine.collect();
            let shared = server.shared.borrow();
            for (_, (disk, generation)) in mine {
                if let Some(disk) = shared.domain.disks.get(&disk) {
                    disk.detach(generation);
                }
            }
        }
        self.arm_down(connection);
        self.forget_closed(connection);
    }

    /// An end has heard nothing for too long.
    pub fn give_up(&mut self, connection: u64, daemon: bool, cut: u64) {
        let Some(this) = self.connections.get(&connection) else {
            return;
        };
        let (host, of, role, has) = (this.host, this.daemon, this.role, this.daemon_has);
        let still = self.hosts.get(host);
        let still = still.is_some_and(|h| cut == u64::MAX || (!h.linked && h.cuts_of_link == cut));
        if !still {
            return;
        }
        self.count("an end gave a silent connection up");
        if daemon {
            self.close_by_daemon(connection);
            if has && self.is_daemon(host, of) {
                self.lost(host, role);
            }
        } else {
            self.close_by_appliance(connection);
        }
    }

    fn is_daemon(&self, host: usize, of: u64) -> bool {
        let daemon = self.hosts.get(host).and_then(|h| h.daemon.as_ref());
        daemon.is_some_and(|daemon| daemon.run == of)
    }

    /// The link of a host is cut: nothing arrives, and nobody is told.
    pub fn link_cut(&mut self, host: usize, for_ns: u64) {
        let Some(this) = self.hosts.get_mut(host).filter(|h| h.linked) else {
            return;
        };
        this.linked = false;
        this.cuts_of_link += 1;
        let cut = this.cuts_of_link;
        self.say(|| format!("host {host}: link cut for {} s", for_ns as f64 / 1e9));
        self.after(for_ns, Event::LinkUp(host, cut));
        let mine = self.connections.iter().filter(|(_, c)| c.host == host);
        let mine: Vec<u64> = mine.map(|(name, _)| *name).collect();
        for connection in mine {
            for daemon in [true, false] {
                self.within(
                    25 * SECOND,
                    35 * SECOND,
                    Event::GiveUp(connection, daemon, cut),
                );
            }
        }
    }

    /// The link works again: what was under way goes on.
    pub fn link_up(&mut self, host: usize, cut: u64) {
        let Some(this) = self.hosts.get_mut(host) else {
            return;
        };
        if this.cuts_of_link != cut || this.linked {
            return;
        }
        this.linked = true;
        self.say(|| format!("host {host}: link up"));
        let mine = self.connections.iter().filter(|(_, c)| c.host == host);
        let mine: Vec<u64> = mine.map(|(name, _)| *name).collect();
        for connection in mine {
            self.arm_up(connection);
            self.arm_down(connection);
        }
        self.dial_all(host);
    }

    /// What the appliance's disks want to be sent goes on its way.
    pub fn flush_outboxes(&mut self) {
        let mut full = Vec::new();
        for (name, connection) in &mut self.connections {
            let bytes = connection.outbox.drain();
            let mut rest = bytes.as_slice();
            if !connection.appliance_has {
                continue;
            }
            while let Some((raw, after)) = rest.split_first_chunk::<FRAME_HEADER_BYTES>() {
                let Ok(header) = FrameHeader::decode(raw) else {
                    break;
                };
                let Some((body, after)) = after.split_at_checked(header.body_len as usize) else {
                    break;
                };
                if let Ok(message) = Message::decode(&header, body) {
                    connection.down.push_back(Some((header.channel, message)));
                }
                rest = after;
            }
            if !connection.down.is_empty() {
                full.push(*name);
            }
        }
        for name in full {
            self.arm_down(name);
        }
    }

    // ---- sessions -----------------------------------------------------------------------------

    fn message_up(&mut self, connection: u64, host: usize, channel: u32, message: Message) {
        let id = self.hosts.get(host).map_or([0; 16], |host| host.id);
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
                let opened = server
                    .shared
                    .borrow_mut()
                    .domain
                    .open_lane(&lane, id, route);
                match opened {
                    Ok(generation) => {
                        let channels = &mut server.channels;
                        channels.insert((connection, channel), (lane.disk_id, generation));
                        self.count("lane opened");
                    }
                    Err((code, seq, text)) => {
                        outbox.send(&Message::Error { code, seq, text }, channel)
                    }
                }
                self.arm_log();
                self.arm_cut();
            }
            Message::CloseLane => {
                if let Some((disk, generation)) = server.channels.remove(&(connection, channel))
                    && let Some(disk) = server.shared.borrow().domain.disks.get(&disk)
                {
                    disk.detach(generation);
                }
            }
            Message::CutPositions {
                epoch, positions, ..
            } => self.cut_positions(id, epoch, positions),
            Message::Error { seq, text, .. } => {
                let mut shared = server.shared.borrow_mut();
                let known = u32::try_from(seq).unwrap_or(0);
                shared.domain.last_epoch = shared.domain.last_epoch.max(known);
                drop(shared);
                if matches!(&server.cut, Cut::Asked { host, .. } if *host == id) {
                    self.void(&text);
                }
            }
            _ => {}
        }
    }

    fn data_up(&mut self, connection: u64, channel: u32, bytes: Vec<u8>) {
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

    fn arm_log(&mut self) {
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

    fn tell_durable(&mut self, all: &[drva::log::Durability]) {
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
        let durable = server.shared.borrow_mut().domain.log.durable();
        self.tell_durable(&durable);
        self.unblock();
        self.arm_log();
        self.try_close();
        self.wake_upload();
    }

    fn unblock(&mut self) {
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

    // ---- cuts ---------------------------------------------------------------------------------

    fn arm_cut(&mut self) {
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

    fn cut_begin(&mut self) -> Result<(), String> {
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
        self.count("cut: asked for");
        self.flush_outboxes();
        self.after(LIMIT, Event::CutLimit(run, epoch));
        Ok(())
    }

    /// Notes a cut that is taken while a VM runs elsewhere.
    fn note_blind(&mut self, epoch: u32, host: [u8; 16]) {
        let asked = self.hosts.iter().position(|h| h.id == host);
        let lanes = asked.and_then(|host| self.hosts.get(host));
        let unknown = |vm: &crate::guest::Vm| {
            let there = |disk| lanes.is_some_and(|host| host.lanes.contains_key(disk));
            vm.runs && Some(vm.host) != asked || !vm.disks.iter().all(there)
        };
        if self.vms.iter().any(unknown) {
            self.blind.insert(epoch);
            self.count("cut: taken while a VM ran on another host");
        }
    }

    fn void(&mut self, why: &str) {
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

    fn cut_positions(&mut self, from: [u8; 16], of: u32, reported: Vec<([u8; 16], u64)>) {
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
    fn try_close(&mut self) {
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
