//! The daemon of a host: finds lanes, pumps them.
//!
//! Invariant: as in `filter_daemon`, whose lanes, answers to messages and view of a cut these are; the
//! rounds of its pumps and of its control thread are events here.

use crate::network::Frame;
use crate::taking::Taking;
use crate::world::{Event, MS, SECOND, US, World};
use crossbeam::channel::Sender;
use filter_core::lane::heap::HeapLane;
use filter_core::lane::layout::LaneState;
use filter_core::lane::sync::Ordering::Relaxed;
use filter_core::wire::{ErrorCode, Message, PortRole};
use filter_daemon::lane::{CutAsk, Lane, Stage};
use filter_daemon::pump::handle;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Records sent in one frame.
const FRAME_BYTES: usize = 256 * 1024;

/// A lane that the daemon serves.
pub struct Served {
    /// The product's.
    pub lane: Lane<HeapLane>,
    pub(crate) asks: Sender<CutAsk>,
    role: PortRole,
    pub(crate) disk: usize,
}

/// A daemon.
pub struct Daemon {
    /// Tells it from earlier ones.
    pub run: u64,
    /// Lanes.
    pub lanes: Vec<Served>,
    /// Connections by port.
    pub connections: BTreeMap<u16, u64>,
    next_channel: u32,
    pumps: BTreeSet<u16>,
    dials: BTreeSet<u16>,
    pub(crate) taking: Option<Taking>,
}

impl World {
    /// The daemon of a host starts.
    pub fn daemon_start(&mut self, host: usize) {
        let run = self.name();
        let Some(this) = self.hosts.get_mut(host) else {
            return;
        };
        if !this.up || this.daemon.is_some() {
            return;
        }
        this.daemon = Some(Daemon {
            run,
            lanes: Vec::new(),
            connections: BTreeMap::new(),
            next_channel: 1,
            pumps: BTreeSet::new(),
            dials: BTreeSet::new(),
            taking: None,
        });
        self.count("daemon started");
        self.within(0, 100 * MS, Event::Scan(host, 0));
        self.want_dial(host, PortRole::Control, 100 * MS);
    }

    fn daemon(&mut self, host: usize, of: u64) -> Option<&mut Daemon> {
        let daemon = self.hosts.get_mut(host)?.daemon.as_mut()?;
        (of == 0 || daemon.run == of).then_some(daemon)
    }

    /// The daemon dies. `silent`: the appliance is not told, its host died with it.
    pub fn daemon_gone(&mut self, host: usize, silent: bool) {
        let gone = self.hosts.get_mut(host).and_then(|h| h.daemon.take());
        let Some(daemon) = gone else { return };
        self.say(|| format!("the daemon of host {host} is gone"));
        for connection in daemon.connections.into_values() {
            if silent {
                if let Some(this) = self.connections.get_mut(&connection) {
                    this.daemon_has = false;
                    this.down.clear();
                }
                self.within(
                    25 * SECOND,
                    35 * SECOND,
                    Event::GiveUp(connection, false, u64::MAX),
                );
            } else {
                self.close_by_daemon(connection);
            }
        }
    }

    /// The pump that has a disk's lane looks after it soon.
    pub fn wake_pump(&mut self, disk: usize) {
        let vm = self.disks.get(disk).map_or(0, |disk| disk.vm);
        let host = self.vms.get(vm).map_or(0, |vm| vm.host);
        let Some(daemon) = self.daemon(host, 0) else {
            return;
        };
        let role = daemon.lanes.iter().find(|l| l.disk == disk).map(|l| l.role);
        if let Some(role) = role {
            self.want_pump(host, role, 400 * US);
        }
    }

    /// A pump is to look after its lanes within this time.
    pub fn want_pump(&mut self, host: usize, role: PortRole, within_ns: u64) {
        let Some(daemon) = self.daemon(host, 0) else {
            return;
        };
        let run = daemon.run;
        if daemon.pumps.insert(role.offset()) {
            self.within(0, within_ns, Event::Pump(host, run, role));
        }
    }

    fn want_dial(&mut self, host: usize, role: PortRole, within_ns: u64) {
        let Some(daemon) = self.daemon(host, 0) else {
            return;
        };
        let run = daemon.run;
        if daemon.dials.insert(role.offset()) {
            self.within(0, within_ns, Event::Dial(host, run, role));
        }
    }

    /// The daemon dials.
    pub fn dial(&mut self, host: usize, of: u64, role: PortRole) {
        let linked = self.hosts.get(host).is_some_and(|h| h.linked);
        let served = self.server.is_some();
        let Some(daemon) = self.daemon(host, of) else {
            return;
        };
        daemon.dials.remove(&role.offset());
        if daemon.connections.contains_key(&role.offset()) {
            return;
        }
        if !linked {
            return; // dialled again when the link is back
        }
        if !served {
            self.want_dial(host, role, 5 * SECOND);
            return;
        }
        let connection = self.connect(host, of, role);
        if let Some(daemon) = self.daemon(host, of) {
            daemon.connections.insert(role.offset(), connection);
        }
        self.want_pump(host, role, MS);
    }

    /// The link is back: the daemon dials, at some time.
    pub fn dial_all(&mut self, host: usize) {
        let Some(daemon) = self.daemon(host, 0) else {
            return;
        };
        let roles: BTreeSet<u16> = daemon.lanes.iter().map(|l| l.role.offset()).collect();
        for offset in roles.into_iter().chain([0]) {
            if let Some(role) = PortRole::from_offset(offset) {
                self.want_dial(host, role, 10 * SECOND);
            }
        }
    }

    /// The folder of lanes is looked at.
    pub fn scan_event(&mut self, host: usize, of: u64) {
        let Some(this) = self.hosts.get_mut(host) else {
            return;
        };
        let Some(daemon) = this.daemon.as_mut().filter(|d| of == 0 || d.run == of) else {
            return;
        };
        let mut fresh = false;
        daemon.lanes.retain(|served| {
            let present = this.lanes.get(&served.disk);
            present.is_some_and(|lane| Arc::ptr_eq(lane, &served.lane.mapped))
        });
        let mut found = Vec::new();
        for (disk, lane) in &this.lanes {
            if daemon.lanes.iter().any(|served| served.disk == *disk) {
                continue;
            }
            let state = lane.memory().producer().state.load(Relaxed); // one thread
            if LaneState::from_word(state) == Some(LaneState::Fresh) {
                // Its producer is not there yet. If it died whoever opens the disk next has it looked at.
                let open = self.disks.get(*disk).and_then(|disk| disk.open.as_ref());
                fresh |= open.is_some_and(|open| Arc::ptr_eq(&open.lane, lane));
                continue;
            }
            let role = Lane::home(&**lane);
            let (lane, asks) = Lane::new(lane.clone());
            daemon.lanes.push(Served {
                lane,
                asks,
                role,
                disk: *disk,
            });
            found.push((*disk, role));
        }
        let run = daemon.run;
        for (disk, role) in found {
            self.want_pump(host, role, MS);
            self.poke_filter(disk);
        }
        if fresh {
            self.within(50 * MS, 100 * MS, Event::Scan(host, run));
        }
    }

    /// A pump's round.
    pub fn pump_event(&mut self, host: usize, of: u64, role: PortRole) {
        let Some(daemon) = self.daemon(host, of) else {
            return;
        };
        daemon.pumps.remove(&role.offset());
        let connected = daemon.connections.contains_key(&role.offset());
        for served in daemon.lanes.iter_mut().filter(|s| s.role == role) {
            served.lane.find_questions(connected);
        }
        self.move_lanes(host, role);
        let Some(daemon) = self.daemon(host, of) else {
            return;
        };
        if !daemon.lanes.iter().any(|served| served.role == role) {
            return;
        }
        let Some(connection) = daemon.connections.get(&role.offset()).copied() else {
            self.want_dial(host, role, 2 * SECOND);
            return;
        };
        self.open_lanes(host, role, connection);
        self.send(host, role, connection);
        self.settle(host, role);
    }

    /// Hands lanes over whose sync has begun or ended, once nothing of them is under way.
    fn move_lanes(&mut self, host: usize, role: PortRole) {
        let mut closed = Vec::new();
        let mut moved = Vec::new();
        let Some(daemon) = self.daemon(host, 0) else {
            return;
        };
        for served in daemon.lanes.iter_mut().filter(|s| s.role == role) {
            let lane = &mut served.lane;
            let Some(to) = lane.moving_to.filter(|_| lane.is_settled()) else {
                continue;
            };
            lane.moving_to = None;
            if lane.has_channel() {
                closed.push(lane.channel);
                lane.stage = Stage::Closed(None);
            }
            served.role = to;
            moved.push(to);
        }
        let connection = daemon.connections.get(&role.offset()).copied();
        if let Some(connection) = connection {
            for channel in closed {
                let in_order = false; // it comes back on another port
                let close = Message::CloseLane { in_order };
                self.send_up(connection, channel, Frame::Message(close));
            }
        }
        for to in moved {
            self.count("lane changed its port");
            self.want_pump(host, to, MS);
        }
    }

    fn open_lanes(&mut self, host: usize, role: PortRole, connection: u64) {
        let now = self.instant();
        let mut frames = Vec::new();
        let mut later = Vec::new();
        let Some(daemon) = self.daemon(host, 0) else {
            return;
        };
        for served in daemon.lanes.iter_mut().filter(|s| s.role == role) {
            served.lane.look_at_fence();
            match served.lane.stage {
                Stage::Closed(at) if at.is_none_or(|at| now >= at) => {
                    let message = Message::OpenLane(served.lane.open_on(daemon.next_channel));
                    daemon.next_channel = daemon.next_channel.wrapping_add(1).max(1);
                    frames.push((served.lane.channel, message));
                }
                Stage::Closed(Some(at)) => later.push(at),
                // Looked at every half second.
                Stage::Fenced(_) => {}
                _ => {}
            }
        }
        let run = daemon.run;
        for (channel, message) in frames {
            self.send_up(connection, channel, Frame::Message(message));
        }
        for at in later {
            let delay = self.until(at);
            self.after(delay, Event::Pump(host, run, role));
        }
    }

    fn send(&mut self, host: usize, role: PortRole, connection: u64) {
        let mut worked = true;
        while worked {
            worked = false;
            let Some(daemon) = self.hosts.get_mut(host).and_then(|h| h.daemon.as_mut()) else {
                return;
            };
            let mut frames = Vec::new();
            for served in daemon.lanes.iter_mut().filter(|s| s.role == role) {
                let window = self.connections.get(&connection);
                if !window.is_some_and(|c| c.has_window()) {
                    return;
                }
                // Behind what was taken before, not behind what is taken now.
                if served.lane.stage == Stage::Open
                    && let Some(question) = served.lane.questions.to_send(&served.lane.consumer)
                {
                    frames.push((served.lane.channel, Frame::Message(question)));
                }
                let run = served.lane.take(FRAME_BYTES);
                if let Some(news) = served.lane.open_again() {
                    let frame = Frame::Message(Message::OpenLane(news));
                    frames.push((served.lane.channel, frame));
                }
                let Some(run) = run else {
                    continue;
                };
                worked = true;
                let bytes = served.lane.mapped.bytes_of(&run).unwrap_or_default();
                frames.push((served.lane.channel, Frame::Data(bytes)));
                if let Some(begin) = run.marker {
                    let home = match begin {
                        true => PortRole::Bulk,
                        false => PortRole::of_disk(&served.lane.disk_id()),
                    };
                    served.lane.moving_to = (home != role).then_some(home);
                }
            }
            for (channel, frame) in frames {
                self.send_up(connection, channel, frame);
            }
        }
    }

    fn settle(&mut self, host: usize, role: PortRole) {
        let mut freed = Vec::new();
        if let Some(daemon) = self.daemon(host, 0) {
            for served in daemon.lanes.iter_mut().filter(|s| s.role == role) {
                if served.lane.settle(None) || served.lane.consumer.restarting() {
                    freed.push(served.disk);
                }
            }
        }
        for disk in freed {
            self.poke_filter(disk);
        }
        self.move_lanes(host, role);
    }

    /// A connection's end has come: whatever is not durable is sent again.
    pub fn lost(&mut self, host: usize, role: PortRole) {
        let now = self.instant();
        let Some(daemon) = self.daemon(host, 0) else {
            return;
        };
        daemon.connections.remove(&role.offset());
        let mut any = role == PortRole::Control;
        let mut poke = Vec::new();
        for served in daemon.lanes.iter_mut().filter(|s| s.role == role) {
            any = true;
            if served.lane.has_channel() {
                served.lane.closed(Duration::ZERO, now);
            }
            if served.lane.consumer.restarting() {
                poke.push(served.disk);
            }
            served
                .lane
                .consumer
                .set_link(u32::from(role.offset()), false);
        }
        if role == PortRole::Control {
            self.give_cut_up(host);
        }
        for disk in poke {
            self.poke_filter(disk);
        }
        if any {
            self.want_dial(host, role, 3 * SECOND);
        }
    }

    /// A frame has come from the appliance.
    pub fn heard(
        &mut self,
        host: usize,
        role: PortRole,
        connection: u64,
        channel: u32,
        message: Message,
    ) {
        if role == PortRole::Control {
            match message {
                Message::CutRequest { epoch, .. } => {
                    self.cut_request(host, connection, epoch, false);
                }
                Message::CutHold { epoch, .. } => self.cut_request(host, connection, epoch, true),
                Message::CutRelease { epoch, .. } => self.cut_release(host, epoch),
                _ => {}
            }
            return;
        }
        let (now, slot) = (self.instant(), u32::from(role.offset()));
        if let Message::Error { code, text, .. } = &message {
            let what = match code {
                ErrorCode::Gap => "refused: gap",
                ErrorCode::Fenced => "refused: fenced",
                ErrorCode::Corrupt => "refused: corrupt",
                _ => "refused: other",
            };
            let (code, text) = (*code, text.clone());
            self.count(what);
            self.say(|| format!("host {host}, port {}: {code:?}: {text}", role.offset()));
        }
        let Some(daemon) = self.daemon(host, 0) else {
            return;
        };
        let mut lanes = daemon.lanes.iter_mut().filter(|s| s.role == role);
        let served = lanes.find(|s| s.lane.channel == channel && s.lane.has_channel());
        let disk = served.as_ref().map(|s| s.disk);
        let lane = served.map(|s| &mut s.lane);
        let restarts = lane.as_ref().is_some_and(|l| l.consumer.restarting());
        let handled = handle(lane, channel, slot, None, message, now);
        let asked = daemon
            .lanes
            .iter()
            .any(|s| Some(s.disk) == disk && s.lane.consumer.restarting());
        if asked && !restarts {
            self.count("restart of a stream asked for");
            self.say(|| format!("host {host}: disk {disk:?} is asked to start its stream anew"));
        }
        match handled {
            Ok(_) => {
                if let Some(disk) = disk {
                    self.poke_filter(disk);
                }
                self.want_pump(host, role, 400 * US);
            }
            Err(error) => {
                self.say(|| format!("host {host}, port {}: {error}", role.offset()));
                self.count("daemon gave a connection up");
                self.close_by_daemon(connection);
                self.lost(host, role);
            }
        }
    }
}
