//! A pump: one thread, one port, one connection, the lanes that belong to it.
//!
//! Invariant: a pump never waits for one lane, and never blocks a producer; what a producer has to do
//! for it is at most one write to a pipe, and only while the pump sleeps.
//!
//! Waking a thread costs far more than moving a record. So after some work a pump naps for a moment
//! without asking to be woken, and finds a batch; only when several looks found nothing it announces
//! that it sleeps.

use crate::connection::{Connection, Connector, Identity, LinkError};
use crate::lane::{Lane, Stage};
use crate::raw::{self, Interest};
use crate::status::{LaneStatus, Shared};
use crossbeam::channel::{Receiver, Sender};
use filter_core::wire::{ErrorCode, Message, PortRole};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Records sent in one frame: large enough that the calls do not count, small enough that lanes take
/// turns.
const FRAME_BYTES: usize = 256 * 1024;
/// After work: the time in which a batch gathers.
const NAP: Duration = Duration::from_micros(500);
/// Looks that found nothing before the pump sleeps.
const EMPTY_LOOKS: u32 = 8;
/// The longest sleep: heartbeats, reconnects and fences are looked after at least this often.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// First and longest wait before a reconnect.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Wait before a channel is opened again after the appliance refused it for a reason that may pass.
const REOPEN_AFTER: Duration = Duration::from_millis(500);

/// What a pump is asked for.
pub enum Order {
    /// Serve this lane.
    Add(Box<Lane>),
    /// Drop the lane of this disk if its file is this one.
    Drop([u8; 16], u64),
    /// Once everything before `end` was taken from this disk's lane, answer with the disk and the last
    /// seq stamped with an epoch of at most `epoch`.
    Cut {
        /// The disk.
        disk_id: [u8; 16],
        /// End position in the lane.
        end: u64,
        /// The epoch.
        epoch: u32,
        /// Where the answer goes.
        answer: Sender<([u8; 16], u64)>,
    },
}

struct CutWait {
    disk_id: [u8; 16],
    end: u64,
    epoch: u32,
    answer: Sender<([u8; 16], u64)>,
    since: Instant,
}

/// A pump's state.
pub struct Pump {
    role: PortRole,
    connector: Arc<dyn Connector>,
    identity: Identity,
    orders: Receiver<Order>,
    /// To each pump, by port offset: for lanes that move.
    others: Vec<Sender<Order>>,
    pipe: File,
    shared: Arc<Shared>,
    lanes: Vec<Lane>,
    connection: Option<Connection>,
    retry_at: Instant,
    retry_wait: Duration,
    next_channel: u32,
    turn: usize,
    cuts: Vec<CutWait>,
    last_problem: String,
}

impl Pump {
    /// A pump for a port.
    pub fn new(
        role: PortRole,
        connector: Arc<dyn Connector>,
        identity: Identity,
        (orders, others): (Receiver<Order>, Vec<Sender<Order>>),
        pipe: File,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            role,
            connector,
            identity,
            orders,
            others,
            pipe,
            shared,
            lanes: Vec::new(),
            connection: None,
            retry_at: Instant::now(),
            retry_wait: RECONNECT.0,
            next_channel: 1,
            turn: 0,
            cuts: Vec::new(),
            last_problem: String::new(),
        }
    }

    /// Runs until the daemon stops.
    pub fn run(mut self) {
        let mut empty_looks = 0;
        let mut told = Instant::now();
        while !self.shared.stopping.load(Ordering::Acquire) {
            // pairs with the store at SIGTERM
            let ordered = self.take_orders();
            let worked = self.step().unwrap_or_else(|error| {
                self.lost(&error);
                false
            });
            self.answer_cuts();
            if told.elapsed() > Duration::from_millis(100) || ordered {
                told = Instant::now();
                self.tell();
            }
            empty_looks = if worked { 0 } else { empty_looks + 1 };
            self.rest(empty_looks);
        }
        for lane in &self.lanes {
            lane.consumer.set_link(self.slot(), false);
        }
    }

    fn slot(&self) -> u32 {
        u32::from(self.role.offset())
    }

    fn take_orders(&mut self) -> bool {
        let mut any = false;
        while let Ok(order) = self.orders.try_recv() {
            any = true;
            match order {
                Order::Add(lane) => {
                    let disk_id = lane.disk_id();
                    self.lanes.retain(|known| known.disk_id() != disk_id);
                    lane.consumer.set_link(self.slot(), false);
                    self.lanes.push(*lane);
                }
                Order::Drop(disk_id, inode) => {
                    self.drop_lane(|lane| lane.disk_id() == disk_id && lane.inode == inode);
                }
                Order::Cut {
                    disk_id,
                    end,
                    epoch,
                    answer,
                } => {
                    self.cuts.push(CutWait {
                        disk_id,
                        end,
                        epoch,
                        answer,
                        since: Instant::now(),
                    });
                }
            }
        }
        any
    }

    fn drop_lane(&mut self, which: impl Fn(&Lane) -> bool) {
        // A frame of the lane that is half sent must not outlive its mapping.
        let sending = |lane: &Lane| {
            self.connection
                .as_ref()
                .is_some_and(|c| c.is_sending(lane.channel))
        };
        if self.lanes.iter().any(|lane| which(lane) && sending(lane)) {
            self.connection = None;
            self.lanes.iter_mut().for_each(|lane| lane.closed(None));
        }
        self.lanes.retain(|lane| !which(lane));
    }

    fn lost(&mut self, error: &LinkError) {
        let text = error.to_string();
        if text != self.last_problem {
            let address = self.connector.describe(self.role);
            tracing::warn!("connection to the appliance at {address}: {text}");
            self.last_problem = text;
        }
        self.connection = None;
        for lane in &mut self.lanes {
            lane.closed(None);
            lane.consumer.set_link(u32::from(self.role.offset()), false);
        }
        // Some chance in the wait, so that the hosts of a cluster do not come back in step.
        let jitter = u64::from(std::process::id()) ^ self.identity.incarnation;
        let wait = self.retry_wait.mul_f64(0.75 + (jitter % 32) as f64 / 64.0);
        self.retry_at = Instant::now() + wait;
        self.retry_wait = (self.retry_wait * 2).min(RECONNECT.1);
    }

    /// Connects if needed, receives, opens, sends. Returns whether anything moved.
    fn step(&mut self) -> Result<bool, LinkError> {
        if self.connection.is_none() {
            if self.lanes.is_empty() || Instant::now() < self.retry_at {
                return Ok(false);
            }
            let made = Connection::open(self.connector.as_ref(), self.role, &self.identity)?;
            tracing::info!(
                "connected to the appliance at {}",
                self.connector.describe(self.role)
            );
            self.connection = Some(made);
            self.retry_wait = RECONNECT.0;
            self.last_problem.clear();
        }
        let received = self.receive()?;
        self.open_lanes();
        self.move_lanes();
        let sent = self.send()?;
        if let Some(connection) = &mut self.connection {
            connection.keep_alive()?;
        }
        Ok(received || sent)
    }

    fn receive(&mut self) -> Result<bool, LinkError> {
        let Some(connection) = &mut self.connection else {
            return Ok(false);
        };
        let (lanes, slot) = (&mut self.lanes, u32::from(self.role.offset()));
        connection.receive(&mut |channel, message| {
            let lane = lanes
                .iter_mut()
                .find(|lane| lane.channel == channel && channel != 0);
            handle(lane, slot, message)
        })
    }

    fn open_lanes(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        for lane in &mut self.lanes {
            lane.look_at_fence();
            if let Stage::Closed(at) = lane.stage
                && at.is_none_or(|at| Instant::now() >= at)
                && !connection.is_sending(lane.channel)
            {
                lane.channel = self.next_channel;
                self.next_channel = self.next_channel.wrapping_add(1).max(1);
                lane.stage = Stage::Opening;
                connection.queue(&Message::OpenLane(lane.open_message()), lane.channel);
            }
        }
    }

    /// Hands lanes over whose sync has begun or ended, once nothing of them is under way.
    fn move_lanes(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let mut at = 0;
        while at < self.lanes.len() {
            let ready = self.lanes.get(at).and_then(|lane| {
                let ready = lane.is_settled() && !connection.is_sending(lane.channel);
                lane.moving_to.filter(|_| ready)
            });
            let Some(to) = ready else {
                at += 1;
                continue;
            };
            let mut lane = self.lanes.swap_remove(at);
            connection.queue(&Message::CloseLane, lane.channel);
            lane.stage = Stage::Closed(None);
            lane.moving_to = None;
            if let Some(other) = self.others.get(usize::from(to.offset())) {
                let _ = other.send(Order::Add(Box::new(lane)));
                self.shared.wake_pump(to);
            }
        }
    }

    /// The port that a lane belongs to after this marker, if it is another than this.
    fn after_marker(&self, begin: bool, disk_id: &[u8; 16]) -> Option<PortRole> {
        let home = if begin {
            PortRole::Bulk
        } else {
            PortRole::of_disk(disk_id)
        };
        (home != self.role).then_some(home)
    }

    fn send(&mut self) -> Result<bool, LinkError> {
        let mut any = false;
        let mut idle = 0;
        loop {
            let Some(connection) = &mut self.connection else {
                return Ok(any);
            };
            if !connection.flush()? || idle >= self.lanes.len() {
                return Ok(any);
            }
            self.turn = (self.turn + 1) % self.lanes.len();
            let Some(lane) = self.lanes.get_mut(self.turn) else {
                return Ok(any);
            };
            let Some(run) = lane.take(FRAME_BYTES) else {
                idle += 1;
                continue;
            };
            connection.queue_run(run, lane.channel);
            (any, idle) = (true, 0);
            if let Some(begin) = run.marker {
                let disk_id = lane.disk_id();
                let to = self.after_marker(begin, &disk_id);
                if let Some(lane) = self.lanes.get_mut(self.turn) {
                    lane.moving_to = to;
                }
            }
            // Acknowledgements are looked at between frames, so that space is freed early.
            self.receive()?;
        }
    }

    fn answer_cuts(&mut self) {
        let lanes = &self.lanes;
        self.cuts.retain(|cut| {
            // Every pump is asked; the one that has the lane answers.
            let Some(lane) = lanes.iter().find(|lane| lane.disk_id() == cut.disk_id) else {
                return false;
            };
            if !lane.consumer.taken_up_to(cut.end) || lane.consumer.restarting() {
                return cut.since.elapsed() < Duration::from_secs(3);
            }
            let seq = lane.consumer.last_seq_of_epoch(cut.epoch);
            let _ = cut.answer.send((cut.disk_id, seq));
            false
        });
    }

    fn tell(&self) {
        let lanes = self
            .lanes
            .iter()
            .map(|lane| LaneStatus::of(lane, self.role))
            .collect();
        self.shared
            .tell(self.role, self.connection.is_some(), lanes);
    }

    /// Waits for something to do, in the cheapest way that is early enough.
    fn rest(&mut self, empty_looks: u32) {
        let blocked = self
            .connection
            .as_ref()
            .is_some_and(Connection::wants_write);
        let busy = self.lanes.iter().any(|lane| {
            let ring_bytes = lane.mapped.memory().geometry().ring_bytes;
            lane.consumer.backlog_bytes() > ring_bytes / 4
        });
        if busy && self.connection.is_some() {
            // The ring fills: wait only for the socket, and not for long.
            self.poll(blocked, false, Duration::from_millis(1));
            return;
        }
        if empty_looks < EMPTY_LOOKS && !blocked {
            std::thread::sleep(NAP);
            return;
        }
        let mut may_sleep = self.cuts.is_empty();
        for lane in &self.lanes {
            may_sleep &= lane.consumer.prepare_sleep() || lane.stage != Stage::Open;
        }
        if may_sleep {
            let limit = if self.connection.is_none() && !self.lanes.is_empty() {
                self.retry_at
                    .saturating_duration_since(Instant::now())
                    .min(LONGEST_SLEEP)
            } else {
                LONGEST_SLEEP
            };
            self.poll(blocked, true, limit.max(Duration::from_millis(1)));
        }
        for lane in &self.lanes {
            lane.consumer.awake();
        }
    }

    fn poll(&mut self, write: bool, pipe: bool, limit: Duration) {
        let mut interests = Vec::with_capacity(2);
        if let Some(connection) = &self.connection {
            interests.push(Interest {
                fd: connection.fd(),
                write,
            });
        }
        if pipe {
            interests.push(Interest {
                fd: self.pipe.as_raw_fd(),
                write: false,
            });
        }
        if let Err(error) = raw::poll(&interests, limit) {
            tracing::error!("poll: {error}");
            std::thread::sleep(NAP);
        }
        if pipe {
            let mut sink = [0u8; 4096];
            while matches!(self.pipe.read(&mut sink), Ok(n) if n == sink.len()) {}
        }
    }
}

/// A message of the appliance about a lane (or about the connection, without one).
fn handle(lane: Option<&mut Lane>, slot: u32, message: Message) -> Result<(), LinkError> {
    match (message, lane) {
        (Message::LaneOpened { durable_seq, .. }, Some(lane)) if lane.stage == Stage::Opening => {
            lane.opened(durable_seq);
            lane.consumer.set_link(slot, true);
            Ok(())
        }
        (
            Message::Ack {
                durable_seq,
                uploaded_seq,
            },
            Some(lane),
        ) => {
            if lane.stage == Stage::Open && !lane.acknowledged(durable_seq, uploaded_seq) {
                return Err(LinkError::Protocol("it acknowledged more than was sent"));
            }
            Ok(())
        }
        (Message::Error { code, seq, text }, Some(lane)) => {
            refused(lane, code, seq, &text);
            Ok(())
        }
        (Message::Error { text, .. }, None) => Err(LinkError::Refused(text)),
        // About a channel that was closed meanwhile.
        (Message::Ack { .. } | Message::LaneOpened { .. }, _) => Ok(()),
        _ => Err(LinkError::Protocol("a frame that only a daemon sends")),
    }
}

fn refused(lane: &mut Lane, code: ErrorCode, seq: u64, text: &str) {
    tracing::warn!(
        "lane {}: the appliance refuses record {seq}: {text}",
        lane.label()
    );
    match code {
        ErrorCode::Fenced => lane.fenced(),
        ErrorCode::Corrupt if seq != 0 && lane.corrupt_seq == seq => {
            // Twice the same: it is corrupt in the lane, not on the way.
            lane.closed(None);
            lane.faults += 1;
            lane.consumer.request_restart(seq);
        }
        ErrorCode::Corrupt => {
            lane.corrupt_seq = seq;
            lane.closed(None);
        }
        ErrorCode::Gap | ErrorCode::NoChannel => lane.closed(None),
        _ => lane.closed(Some(REOPEN_AFTER)),
    }
}

/// Wakes whoever reads a pipe.
pub fn poke(pipe: &File) {
    use std::io::Write;
    match (&mut &*pipe).write(&[1]) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => tracing::error!("wake-up pipe: {error}"),
    }
}
