//! How frames travel between hosts and the appliance, and how connections end.
//!
//! Invariant: frames arrive in the order in which they were sent; while a link is cut nothing arrives, and
//! each end learns of it by itself.

use crate::network::{Connection, Frame};
use crate::world::{Event, SECOND, US, World};
use filter_core::wire::{FRAME_HEADER_BYTES, FrameHeader, Message, PortRole};

impl World {
    /// A daemon connects.
    pub fn connect(&mut self, host: usize, daemon: u64, role: PortRole) -> u64 {
        let name = self.name();
        let connection = Connection::new(host, daemon, role);
        self.connections.insert(name, connection);
        self.count("connection made");
        name
    }

    pub(crate) fn latency(&mut self) -> u64 {
        self.numbers.between(50 * US, 600 * US) * self.pace.link / 100
    }

    pub(crate) fn works(&self, connection: u64) -> bool {
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

    pub(crate) fn arm_up(&mut self, connection: u64) {
        let latency = self.latency();
        let Some(this) = self.connections.get_mut(&connection) else {
            return;
        };
        if !this.up.is_empty() && !this.blocked && !std::mem::replace(&mut this.up_armed, true) {
            self.after(latency, Event::Up(connection));
        }
    }

    pub(crate) fn arm_down(&mut self, connection: u64) {
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

    pub(crate) fn forget_closed(&mut self, connection: u64) {
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
                    disk.detach(generation, false);
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

    pub(crate) fn is_daemon(&self, host: usize, of: u64) -> bool {
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
}
