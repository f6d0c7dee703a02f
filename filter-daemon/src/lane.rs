//! A lane as the daemon holds it: its consumer, its channel, where it stands with the appliance.
//!
//! Invariant: records are taken only while the channel is open; after any doubt the lane is rewound
//! to what is durable, so that everything else is sent again. What an acknowledgement frees was sent
//! whole over the present connection.

use crate::connection::{LinkError, Sending};
use crate::hashes::Questions;
use crossbeam::channel::{Receiver, Sender, TryRecvError, unbounded};
use filter_core::lane::consumer::{Consumer, LaneFault, Run};
use filter_core::lane::layout::{LaneHome, LaneState};
use filter_core::lane::opening;
use filter_core::lane::sync::Ordering::{Acquire, Relaxed};
use filter_core::lineage::{Attach, Lineage};
use filter_core::mapping::MappedLane;
use filter_core::mutant::{Guard, holds};
use filter_core::position::Durable;
use filter_core::session::{Resume, resume};
use filter_core::wire::{ErrorCode, OpenLane, PortRole};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// First wait after a refusal that an operator or time must settle.
const REFUSED_WAIT: Duration = Duration::from_millis(500);
/// First wait after a refusal that opening again may settle, if that was tried already.
const AGAIN_WAIT: Duration = Duration::from_millis(50);
/// Longest wait after refusals.
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// Where a lane stands with the appliance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// To be opened, not before this moment.
    Closed(Option<Instant>),
    /// OPEN_LANE is under way.
    Opening,
    /// Records flow.
    Open,
    /// A newer epoch has attached elsewhere: silent until this lane's own epoch changes.
    Fenced(u32),
}

/// What an appliance is told again when it changes, before the records that rely on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Told {
    attach: Attach,
    lineage: Lineage,
    capacity_bytes: u64,
}

/// Asks a lane for its position in a cut. It waits in the lane, so it is found wherever the lane is,
/// also on its way between two pumps.
#[derive(Debug)]
pub struct CutAsk {
    /// The lane's tail after the epoch was bumped and nobody was stamping any more.
    pub end: u64,
    /// The last epoch of the cut.
    pub epoch: u32,
    /// Where the answer goes.
    pub answer: Sender<CutAnswer>,
}

/// What a lane says about a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutAnswer {
    /// The disk's last seq in the cut.
    At([u8; 16], u64),
    /// The lane is fenced: the disk is another host's.
    NotOurs,
    /// The stream of this disk's lane is broken, or about to start anew.
    Broken([u8; 16]),
}

/// The refusals of a lane that came one after another.
#[derive(Debug)]
struct Refusal {
    code: ErrorCode,
    text: String,
    opening: bool,
    wait: Duration,
}

/// A lane that this daemon serves.
pub struct Lane<H: LaneHome = MappedLane> {
    /// Keeps it mapped.
    pub mapped: Arc<H>,
    /// The consumer's side.
    pub consumer: Consumer,
    /// Its channel on the present connection.
    pub channel: u32,
    /// Where it stands.
    pub stage: Stage,
    /// It is to be handed to this port once nothing of it is under way.
    pub moving_to: Option<PortRole>,
    /// Faults found in it since the daemon knows it.
    pub faults: u64,
    /// What the appliance was told last.
    told: Told,
    /// What the filter asks about blocks.
    pub questions: Questions,
    asks: Receiver<CutAsk>,
    /// The highest seq that any daemon may have sent an appliance, so that one may acknowledge.
    may_be_there: u64,
    /// The highest seq that the appliance acknowledged on this channel.
    claimed: u64,
    refusal: Option<Refusal>,
}

impl<H: LaneHome> Lane<H> {
    /// Takes over a lane that was found. It lasts as long as the other end of its questions is held.
    pub fn new(mapped: Arc<H>) -> (Self, Sender<CutAsk>) {
        let consumer = Consumer::attach(mapped.memory());
        let (sender, asks) = unbounded();
        // A daemon before this one may have sent all that is there.
        let published = mapped.memory().producer().last_seq.load(Relaxed); // told before the tail
        let lane = Self {
            may_be_there: published.max(consumer.sent().0),
            mapped,
            channel: 0,
            stage: Stage::Closed(None),
            moving_to: None,
            faults: 0,
            told: Told::default(),
            questions: Questions::of(&consumer),
            asks,
            claimed: 0,
            refusal: None,
            consumer,
        };
        (lane, sender)
    }

    /// The disk.
    pub fn disk_id(&self) -> [u8; 16] {
        self.mapped.identity().disk_id
    }

    /// For messages.
    pub fn label(&self) -> String {
        let id = self.mapped.identity();
        format!("{}/{}", id.vm_name, id.disk_label)
    }

    /// The port that a lane found in this state belongs to.
    pub fn home(mapped: &H) -> PortRole {
        let state = mapped.memory().producer().state.load(Relaxed); // routing only
        match LaneState::from_word(state) {
            Some(LaneState::Streaming | LaneState::Closed) => {
                PortRole::of_disk(&mapped.identity().disk_id)
            }
            _ => PortRole::Bulk,
        }
    }

    fn attach_epoch(&self) -> u32 {
        let memory = self.mapped.memory();
        memory.producer().attach_epoch.load(Acquire) // pairs with the producer's Release: the id came before
    }

    /// Whether the appliance knows the lane's channel.
    pub fn has_channel(&self) -> bool {
        matches!(self.stage, Stage::Opening | Stage::Open)
    }

    /// Whether new records would be taken: then the producer is to wake a pump that sleeps.
    pub fn listens(&self) -> bool {
        self.stage == Stage::Open && self.moving_to.is_none()
    }

    /// Answers what is asked about cuts. `false`: the lane is to be dropped, nobody asks any more.
    pub fn answer_cuts(&mut self) -> bool {
        loop {
            match self.asks.try_recv() {
                Ok(ask) => {
                    let answer = self.cut_answer(&ask);
                    let _ = ask.answer.send(answer);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn cut_answer(&mut self, ask: &CutAsk) -> CutAnswer {
        let disk_id = self.disk_id();
        if matches!(self.stage, Stage::Fenced(_)) {
            return CutAnswer::NotOurs;
        }
        match self.consumer.last_seq_before(ask.end, ask.epoch) {
            Ok(Some(seq)) => CutAnswer::At(disk_id, seq),
            Ok(None) => CutAnswer::Broken(disk_id),
            Err(fault) => {
                self.restart(&fault);
                CutAnswer::Broken(disk_id)
            }
        }
    }

    /// Whether the disk was closed in order and everything that was published of it is durable at the
    /// appliance: then it stands where it stands until it is opened again.
    pub fn ended_in_order(&self) -> bool {
        let memory = self.mapped.memory();
        let words = memory.producer();
        // Acquire, pairs with the producer's Release: what it published last came before.
        let closed = LaneState::from_word(words.state.load(Acquire)) == Some(LaneState::Closed);
        let delivered = self.consumer.durable().0 == words.last_seq.load(Relaxed); // as above
        closed && delivered && !self.consumer.restarting()
    }

    /// What OPEN_LANE says of it, on a new channel.
    pub fn open_on(&mut self, channel: u32) -> OpenLane {
        self.channel = channel;
        self.stage = Stage::Opening;
        self.claimed = 0;
        self.describe(false)
    }

    /// OPEN_LANE on the channel that is open, if what the appliance was told last is no longer so: the
    /// disk has grown, a VM has attached that adopted the lane, or the region map has come further.
    pub fn open_again(&mut self) -> Option<OpenLane> {
        let changed = self.stage == Stage::Open && self.told != self.to_tell();
        changed.then(|| self.describe(true))
    }

    fn to_tell(&self) -> Told {
        let memory = self.mapped.memory();
        let capacity_bytes = memory.producer().capacity_bytes.load(Relaxed); // told again if it is late
        let (mut attach, lineage) = opening::told(memory);
        if attach.is_same(&self.told.attach) && !holds(Guard::GenerationFirst) {
            attach = self.told.attach;
        }
        Told {
            attach,
            lineage,
            capacity_bytes,
        }
    }

    fn describe(&mut self, again: bool) -> OpenLane {
        self.told = self.to_tell();
        let id = self.mapped.identity();
        OpenLane {
            disk_id: id.disk_id,
            vm_id: id.vm_id,
            again,
            attach_epoch: self.told.attach.epoch,
            attach_id: self.told.attach.id,
            map_generation: self.told.attach.generation,
            lineage: Box::new(self.told.lineage),
            durable_seq: self.consumer.durable().0,
            capacity_bytes: self.told.capacity_bytes,
            base: self.consumer.next_base(),
            domain: id.domain.clone(),
            vm_name: id.vm_name.clone(),
            disk_label: id.disk_label.clone(),
        }
    }

    /// The connection is gone, or the channel: everything not durable will be sent again. A lane that
    /// was about to move still moves: the marker that said so may be durable, and never come again.
    pub fn closed(&mut self, wait: Duration, now: Instant) {
        self.stage = Stage::Closed((!wait.is_zero()).then(|| now + wait));
        self.may_be_there = self.may_be_there.max(self.consumer.sent().0);
        self.questions.lost(&self.consumer);
        if holds(Guard::RewindOnClose)
            && let Err(fault) = self.consumer.rewind()
        {
            self.restart(&fault);
        }
    }

    /// The lane's content cannot be used: the filter is asked to start the stream anew.
    pub fn restart(&mut self, fault: &LaneFault) {
        self.faults += 1;
        tracing::error!(
            "lane {}: {fault}; the disk is to be synced anew",
            self.label()
        );
        self.consumer.request_restart(self.consumer.durable().0);
    }

    /// The appliance has answered OPEN_LANE.
    pub fn opened(&mut self, appliance_durable: u64, full_base_seq: u64) {
        self.stage = Stage::Open;
        self.consumer.set_fenced(0);
        if self.refusal.as_ref().is_some_and(|last| last.opening) {
            self.refusal = None;
        }
        let published = self.mapped.memory().producer().last_seq.load(Relaxed); // told before the tail
        let published = published.max(self.consumer.durable().0);
        let decision = resume(
            self.consumer.durable(),
            published,
            self.consumer.next_base(),
            appliance_durable,
            full_base_seq,
        );
        match decision {
            Resume::After(durable) => {
                if let Err(fault) = self.consumer.resume_after(durable) {
                    self.restart(&fault);
                }
            }
            Resume::AtBase => {}
            Resume::Restart { above_seq } => {
                // One that is awaited already must begin above what the appliance holds, too: what
                // begins below would count as known there.
                let enough = appliance_durable <= published.max(self.consumer.restart_above());
                if !(self.consumer.restarting() && enough) {
                    tracing::warn!(
                        "lane {}: the appliance stands at {appliance_durable} (full sync from \
                         {full_base_seq}), the lane begins after {}: the disk is to be synced anew",
                        self.label(),
                        self.consumer.durable().0
                    );
                    self.consumer.request_restart(above_seq);
                }
            }
        }
    }

    /// The next records to send.
    pub fn take(&mut self, max_bytes: usize) -> Option<Run> {
        if !self.listens() {
            return None;
        }
        match self.consumer.take(max_bytes) {
            Ok(run) => {
                if let Some(run) = run.filter(|_| !holds(Guard::ReleaseDurable)) {
                    self.consumer.release(Durable(run.last_seq));
                }
                run
            }
            Err(fault) => {
                self.restart(&fault);
                None
            }
        }
    }

    /// The last seq that has gone out whole. Of a frame that is being sent nothing counts yet.
    fn gone(&self, sending: Option<Sending>) -> u64 {
        match sending {
            Some(frame) if frame.channel == self.channel => frame.first_seq.saturating_sub(1),
            _ => self.consumer.sent().0,
        }
    }

    /// The appliance has acknowledged. What it can hold from an earlier connection is remembered and
    /// frees space once this connection has sent it too; more than it can hold is an error.
    pub fn acknowledged(
        &mut self,
        durable: u64,
        uploaded: u64,
        sending: Option<Sending>,
    ) -> Result<bool, LinkError> {
        let gone = self.gone(sending);
        self.may_be_there = self.may_be_there.max(gone);
        // An appliance may work on a frame while it arrives; the end of it has not arrived.
        let arriving = sending.filter(|frame| frame.channel == self.channel);
        let most = arriving.map_or(0, |frame| frame.last_seq.saturating_sub(1));
        let most = most.max(self.may_be_there);
        if durable > most {
            return Err(LinkError::Acknowledged {
                lane: self.label(),
                acknowledged: durable,
                sent: most,
            });
        }
        self.claimed = self.claimed.max(durable);
        self.consumer.set_uploaded(uploaded.min(durable));
        Ok(self.settle(sending))
    }

    /// Frees what was acknowledged and has gone out whole. Returns whether it was something.
    pub fn settle(&mut self, sending: Option<Sending>) -> bool {
        let before = self.consumer.durable();
        if self.claimed <= before.0 || self.stage != Stage::Open {
            return false;
        }
        let durable = self.claimed.min(self.gone(sending));
        fault::point("daemon.before-release");
        let moved = self.consumer.release(Durable(durable)) && self.consumer.durable() > before;
        if moved {
            self.refusal = None;
        }
        moved
    }

    /// Nothing of it is under way: all that was taken is durable.
    pub fn is_settled(&self) -> bool {
        self.consumer.sent().0 == self.consumer.durable().0
    }

    /// Looks for questions about blocks. `connected`: there is a connection to ask them over.
    pub fn find_questions(&mut self, connected: bool) {
        let soon = matches!(
            self.stage,
            Stage::Open | Stage::Opening | Stage::Closed(None)
        );
        self.questions.find(&self.consumer, connected && soon);
    }

    /// A fenced lane whose epoch has changed since may try again. What lies in it from before is of an
    /// epoch that is refused for ever: the stream starts anew.
    pub fn look_at_fence(&mut self) {
        if let Stage::Fenced(epoch) = self.stage
            && self.attach_epoch() != epoch
        {
            self.consumer.request_restart(self.consumer.durable().0);
            self.stage = Stage::Closed(None);
        }
    }

    /// The appliance refuses the lane, or record `seq` of it (a newer epoch is named instead if that is
    /// why). An error ends the connection.
    pub fn refused(
        &mut self,
        code: ErrorCode,
        seq: u64,
        text: &str,
        now: Instant,
    ) -> Result<(), LinkError> {
        let opening = self.stage == Stage::Opening;
        if code == ErrorCode::Corrupt {
            // Looked at before the lane is rewound: where the damage is decides what follows.
            let lane = self.label();
            return match self.consumer.check_taken() {
                Ok(()) => Err(LinkError::Damaged { lane, seq }),
                Err(fault) => {
                    self.restart(&fault);
                    self.closed(Duration::ZERO, now);
                    Ok(())
                }
            };
        }
        let wait = self.next_wait(code);
        let last = self.refusal.as_ref();
        if last.is_none_or(|last| last.code != code || last.text != text) {
            let label = self.label();
            tracing::warn!("lane {label}: the appliance refuses it at {seq}: {text} ({code:?})");
        }
        self.refusal = Some(Refusal {
            code,
            text: text.into(),
            opening,
            wait,
        });
        self.closed(wait, now);
        if code == ErrorCode::Fenced {
            // By the epoch that was presented: a newer one of this lane is not what was refused.
            self.stage = Stage::Fenced(self.told.attach.epoch);
            self.consumer.set_fenced(u32::try_from(seq).unwrap_or(0));
            fault::point("daemon.after-fenced");
        }
        Ok(())
    }

    /// Ever longer, until the lane is opened or makes progress again.
    fn next_wait(&self, code: ErrorCode) -> Duration {
        let passes = matches!(code, ErrorCode::Gap | ErrorCode::NoChannel);
        match &self.refusal {
            None if passes => Duration::ZERO,
            None => REFUSED_WAIT,
            Some(last) if passes => (last.wait * 2).clamp(AGAIN_WAIT, LONGEST_WAIT),
            Some(last) => (last.wait * 2).clamp(REFUSED_WAIT, LONGEST_WAIT),
        }
    }
}
