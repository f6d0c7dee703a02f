//! A pump: one thread, one port, one connection, the lanes that belong to it.
//!
//! Invariant: a pump never waits for one lane, and never blocks a producer; what a producer has to do
//! for it is at most one write to a pipe, and only while the pump sleeps. However much there is to
//! send, a pump looks after orders, cuts and its end after a few MiB.
//!
//! Waking a thread costs far more than moving a record. So after some work a pump naps for a moment
//! without asking to be woken, and finds a batch; only when several looks found nothing it announces
//! that it sleeps.

use crate::connection::{Connection, LinkError, Sending};
use crate::dial::Dialer;
use crate::lane::{Lane, Stage};
use crate::raw::{self, Interest};
use crate::status::{LaneStatus, Shared};
use crossbeam::channel::{Receiver, Sender};
use filter_core::lane::layout::LaneHome;
use filter_core::wire::{Message, PortRole};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Records sent in one frame: large enough that the calls do not count, small enough that lanes take
/// turns.
const FRAME_BYTES: usize = 256 * 1024;
/// Sent in one round at most: a few milliseconds of work.
const ROUND_BYTES: usize = 4 << 20;
/// After work: the time in which a batch gathers.
const NAP: Duration = Duration::from_micros(500);
/// Looks that found nothing before the pump sleeps.
const EMPTY_LOOKS: u32 = 8;
/// The longest sleep: heartbeats and fences are looked after at least this often.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// How often the pump tells how it stands.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// What a round came to.
#[derive(Clone, Copy, Default)]
struct Round {
    /// Something moved.
    worked: bool,
    /// It ended although there is more to send.
    more: bool,
}

/// A pump's state.
pub struct Pump {
    role: PortRole,
    dialer: Dialer,
    /// Lanes that are to be served here.
    orders: Receiver<Box<Lane>>,
    /// To each pump, by port offset: for lanes that move.
    others: Vec<Sender<Box<Lane>>>,
    pipe: File,
    shared: Arc<Shared>,
    lanes: Vec<Lane>,
    connection: Option<Connection>,
    next_channel: u32,
    turn: usize,
}

impl Pump {
    /// A pump for a port.
    pub fn new(
        role: PortRole,
        dialer: Dialer,
        (orders, others): (Receiver<Box<Lane>>, Vec<Sender<Box<Lane>>>),
        pipe: File,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            role,
            dialer,
            orders,
            others,
            pipe,
            shared,
            lanes: Vec::new(),
            connection: None,
            next_channel: 1,
            turn: 0,
        }
    }

    /// Runs until the daemon stops.
    pub fn run(mut self) {
        let mut empty_looks = 0;
        let mut told = Instant::now();
        while !self.shared.stopping.load(Ordering::Acquire) {
            // pairs with the store at SIGTERM
            let changed = self.take_orders() | self.look_at_lanes();
            let round = self.step().unwrap_or_else(|error| {
                self.lost(&error);
                Round::default()
            });
            if told.elapsed() > TELL_EVERY || changed {
                told = Instant::now();
                self.tell();
            }
            empty_looks = if round.worked { 0 } else { empty_looks + 1 };
            if !round.more {
                self.rest(empty_looks);
            }
        }
        self.leave();
    }

    /// The daemon stops. Disks that are closed in order stand where they stand also while nobody
    /// presents them: the appliance is told, if that can be done at once.
    fn leave(&mut self) {
        for lane in &self.lanes {
            lane.consumer.set_link(self.slot(), false);
            if let Some(connection) = &mut self.connection
                && lane.has_channel()
                && lane.ended_in_order()
            {
                connection.queue(&Message::CloseLane { in_order: true }, lane.channel);
            }
        }
        if let Some(connection) = &mut self.connection {
            let _ = connection.flush(); // untold, they are presented again by the next daemon
        }
    }

    fn slot(&self) -> u32 {
        u32::from(self.role.offset())
    }

    fn take_orders(&mut self) -> bool {
        let before = self.lanes.len();
        while let Ok(lane) = self.orders.try_recv() {
            lane.consumer.set_link(self.slot(), false);
            self.lanes.push(*lane);
        }
        self.lanes.len() != before
    }

    /// Answers what is asked about cuts, and drops the lanes that nobody asks about any more.
    fn look_at_lanes(&mut self) -> bool {
        let mut at = 0;
        let mut any = false;
        while let Some(lane) = self.lanes.get_mut(at) {
            lane.find_questions(self.connection.is_some());
            if lane.answer_cuts() {
                at += 1;
                continue;
            }
            any = true;
            let lane = self.lanes.swap_remove(at);
            lane.consumer.set_link(self.slot(), false);
            // A frame of it that is half sent keeps its memory mapped, and goes first.
            if let Some(connection) = &mut self.connection
                && lane.has_channel()
            {
                let in_order = lane.ended_in_order();
                connection.queue(&Message::CloseLane { in_order }, lane.channel);
            }
        }
        any
    }

    fn lost(&mut self, error: &LinkError) {
        self.connection = None;
        let slot = self.slot();
        for lane in &mut self.lanes {
            if lane.has_channel() {
                lane.closed(Duration::ZERO, Instant::now());
            }
            lane.consumer.set_link(slot, false);
        }
        self.dialer.failed(error);
    }

    /// Connects if needed, receives, opens, sends.
    fn step(&mut self) -> Result<Round, LinkError> {
        self.move_lanes();
        if self.connection.is_none() {
            if self.lanes.is_empty() {
                return Ok(Round::default());
            }
            match self.dialer.poll() {
                Some(made) => self.connection = Some(made?),
                None => return Ok(Round::default()),
            }
        }
        let received = self.receive()?;
        self.open_lanes();
        self.ask();
        let sent = self.send()?;
        if let Some(connection) = &mut self.connection {
            connection.keep_alive()?;
            let sending = connection.sending();
            let moved = self
                .lanes
                .iter_mut()
                .fold(false, |moved, lane| lane.settle(sending) | moved);
            if moved || self.lanes.iter().any(|lane| lane.stage == Stage::Open) {
                self.dialer.useful(connection, moved);
            }
        }
        Ok(Round {
            worked: received || sent.worked,
            more: sent.more,
        })
    }

    fn receive(&mut self) -> Result<bool, LinkError> {
        let Some(connection) = &mut self.connection else {
            return Ok(false);
        };
        let (lanes, slot) = (&mut self.lanes, u32::from(self.role.offset()));
        let sending = connection.sending();
        let mut moved = false;
        let any = connection.receive(&mut |channel, message| {
            let lane = lanes
                .iter_mut()
                .find(|lane| lane.channel == channel && lane.has_channel());
            moved |= handle(lane, channel, slot, sending, message, Instant::now())?;
            Ok(())
        })?;
        if moved {
            self.dialer.useful(connection, true);
        }
        Ok(any)
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
                let message = Message::OpenLane(lane.open_on(self.next_channel));
                self.next_channel = self.next_channel.wrapping_add(1).max(1);
                connection.queue(&message, lane.channel);
            }
        }
    }

    /// Sends what filters ask about blocks, behind the records that were taken before.
    fn ask(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        for lane in self.lanes.iter_mut().filter(|l| l.stage == Stage::Open) {
            if !connection.is_sending(lane.channel)
                && let Some(question) = lane.questions.to_send(&lane.consumer)
            {
                connection.queue(&question, lane.channel);
            }
        }
    }

    /// Hands lanes over whose sync has begun or ended, once nothing of them is under way.
    fn move_lanes(&mut self) {
        let mut at = 0;
        while let Some(lane) = self.lanes.get(at) {
            let sending = |c: &Connection| c.is_sending(lane.channel);
            let ready = lane.is_settled() && !self.connection.as_ref().is_some_and(sending);
            let Some(to) = lane.moving_to.filter(|_| ready) else {
                at += 1;
                continue;
            };
            let mut lane = self.lanes.swap_remove(at);
            lane.moving_to = None;
            if lane.has_channel() {
                if let Some(connection) = &mut self.connection {
                    let in_order = false; // it comes back on another port
                    connection.queue(&Message::CloseLane { in_order }, lane.channel);
                }
                lane.stage = Stage::Closed(None);
            }
            if let Some(other) = self.others.get(usize::from(to.offset())) {
                let _ = other.send(Box::new(lane));
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

    fn send(&mut self) -> Result<Round, LinkError> {
        let mut round = Round::default();
        let mut idle = 0u32;
        let mut left = ROUND_BYTES;
        loop {
            let Some(connection) = &mut self.connection else {
                return Ok(round);
            };
            if !connection.flush()? || idle as usize >= self.lanes.len() {
                return Ok(round);
            }
            if left == 0 {
                round.more = true;
                return Ok(round);
            }
            self.turn = (self.turn + 1) % self.lanes.len();
            let Some(lane) = self.lanes.get_mut(self.turn) else {
                return Ok(round);
            };
            let run = lane.take(FRAME_BYTES);
            // After the records were taken, and before they are sent: what lies beyond the end of the
            // disk as the appliance knows it comes after the news that the disk has grown.
            let news = lane.open_again();
            if let Some(news) = &news {
                connection.queue(&Message::OpenLane(news.clone()), lane.channel);
            }
            let Some(run) = run else {
                idle += u32::from(news.is_none());
                continue;
            };
            fault::point("daemon.after-take");
            connection.queue_run(run, lane.channel, lane.mapped.clone());
            left = left.saturating_sub(run.len_bytes);
            (round.worked, idle) = (true, 0);
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

    fn tell(&self) {
        let lanes = self
            .lanes
            .iter()
            .map(|lane| LaneStatus::of(lane, self.role))
            .collect();
        self.shared
            .tell(self.role, self.connection.is_some(), lanes);
    }

    /// Waits for something to do, in the cheapest way that is early enough. Producers are asked to
    /// wake the pump only if it could do something with their records.
    fn rest(&mut self, empty_looks: u32) {
        let Some(connection) = &self.connection else {
            let limit = if self.lanes.is_empty() {
                LONGEST_SLEEP
            } else {
                self.dialer.until_next().min(LONGEST_SLEEP)
            };
            self.poll(false, true, limit);
            return;
        };
        if connection.wants_write() {
            // Nothing can be sent before the socket takes more, whatever is published.
            self.poll(true, true, self.until_reopening());
            return;
        }
        if empty_looks < EMPTY_LOOKS {
            let fills = self.lanes.iter().filter(|lane| lane.listens()).any(|lane| {
                let ring_bytes = lane.mapped.memory().geometry().ring_bytes;
                lane.consumer.backlog_bytes() > ring_bytes / 4
            });
            if fills {
                // Room is what is wanted: acknowledgements end the wait, and it is not long.
                self.poll(false, false, Duration::from_millis(1));
            } else {
                std::thread::sleep(NAP);
            }
            return;
        }
        let mut idle = true;
        for lane in self.lanes.iter().filter(|lane| lane.listens()) {
            idle &= lane.consumer.prepare_sleep() && !lane.questions.is_asked(&lane.consumer);
        }
        if idle {
            self.poll(false, true, self.until_reopening());
        } else {
            // Whatever it is that came, it cannot make the pump spin.
            std::thread::sleep(NAP);
        }
        for lane in self.lanes.iter().filter(|lane| lane.listens()) {
            lane.consumer.awake();
        }
    }

    /// How long until a lane that was refused is to be opened again, or until the longest sleep is over.
    fn until_reopening(&self) -> Duration {
        let now = Instant::now();
        let under_way = |lane: &Lane| {
            let connection = self.connection.as_ref();
            connection.is_some_and(|c| c.is_sending(lane.channel))
        };
        let waits = self.lanes.iter().filter_map(|lane| match lane.stage {
            // What is left of its old channel must go first: the socket tells when it has.
            Stage::Closed(_) if under_way(lane) => None,
            Stage::Closed(at) => {
                Some(at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now)))
            }
            _ => None,
        });
        waits.min().unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP)
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
        // Rounded up: a wait of less than a millisecond must not become a spin.
        let limit = limit.max(Duration::from_millis(1));
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

/// A message of the appliance: about a lane whose channel is open, or about the connection. Returns
/// whether the appliance has made something durable.
pub fn handle<H: LaneHome>(
    lane: Option<&mut Lane<H>>,
    channel: u32,
    slot: u32,
    sending: Option<Sending>,
    message: Message,
    now: Instant,
) -> Result<bool, LinkError> {
    match (message, lane) {
        (
            Message::LaneOpened {
                durable_seq,
                full_base_seq,
                ..
            },
            Some(lane),
        ) if lane.stage == Stage::Opening => {
            lane.opened(durable_seq, full_base_seq);
            lane.consumer.set_link(slot, true);
            Ok(false)
        }
        (
            Message::Ack {
                durable_seq,
                uploaded_seq,
            },
            Some(lane),
        ) => lane.acknowledged(durable_seq, uploaded_seq, sending),
        (Message::Error { code, seq, text }, Some(lane)) => {
            lane.refused(code, seq, &text, now)?;
            if lane.stage != Stage::Open {
                lane.consumer.set_link(slot, false);
            }
            Ok(false)
        }
        (
            Message::Hashes {
                offset_bytes,
                hashes,
            },
            Some(lane),
        ) => {
            lane.questions.came(&lane.consumer, offset_bytes, &hashes)?;
            Ok(false)
        }
        (Message::Error { text, .. }, None) if channel == 0 => Err(LinkError::Refused(text)),
        // About a channel that was closed meanwhile.
        (Message::Error { .. } | Message::Ack { .. }, _) => Ok(false),
        (Message::LaneOpened { .. } | Message::Hashes { .. }, _) => Ok(false),
        _ => Err(LinkError::Protocol(
            "a frame that does not belong on a data port",
        )),
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

#[cfg(test)]
#[path = "pump_tests.rs"]
mod tests;
