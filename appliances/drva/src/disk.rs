//! A disk in the appliance: which records are admitted, where its acknowledgements go.
//!
//! Invariant: records of a disk reach the log in seq order, each once: admitting and queueing happen
//! under the disk's lock, whichever connection they come over. Nobody waits under that lock: room in
//! the log is held before it is taken.

use crate::log::format::EntryKind;
use crate::log::{DiskState, Durability, Log, LogError, Submission};
use crate::outbox::Outbox;
use crate::presence::{HostId, Presence, Standing};
use crate::report::Newest;
use crate::touched::Touched;
use filter_core::lane::layout::DIRTY_BLOCK_BYTES;
use filter_core::lineage::Lineage;
use filter_core::mutant::{Guard, holds};
use filter_core::position::Received;
use filter_core::record::{FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, FLAG_SYNC_END, RecordIter};
use filter_core::session::{Admit, Attach, Receiver, Refusal};
use filter_core::wire::{ErrorCode, Message};
use parking_lot::{Mutex, RwLock};
use recovery_store::DiskInfo;
use ringbuf::HeapRb;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where acknowledgements of a disk go.
pub struct Route {
    /// The connection's outbox.
    pub outbox: Arc<Outbox>,
    /// The channel on it.
    pub channel: u32,
}

/// A channel that a disk is presented on.
struct Present {
    route: Route,
    attach_epoch: u32,
    host: HostId,
}

/// What the log tells of a disk besides its records.
#[derive(Clone, Debug, Default)]
pub struct Described {
    /// The newest opening, with the highest generation.
    pub presented: Attach,
    /// Where it is.
    pub presence: Presence,
    /// The log does not have it yet.
    pub owed: bool,
}

/// Syncs and losses that are remembered: cuts ask about the newest positions only.
const MAX_BRACKETS: usize = 16;

/// Where a stream holds no consistent image: within syncs, and where records were lost. The oldest is
/// overwritten.
struct Brackets(HeapRb<(u64, u64)>);

impl Default for Brackets {
    fn default() -> Self {
        Self(HeapRb::new(MAX_BRACKETS))
    }
}

impl Brackets {
    fn push(&mut self, begin: u64, end: u64) {
        self.0.push_overwrite((begin, end));
    }

    /// A sync begins at this seq.
    fn begin(&mut self, seq: u64) {
        self.push(seq, u64::MAX);
    }

    /// A sync ends: with it every begun one, since one that was broken off begins again.
    fn end(&mut self, seq: u64) {
        for bracket in self.0.iter_mut().filter(|bracket| bracket.1 == u64::MAX) {
            bracket.1 = seq;
        }
    }

    /// The stream began anew at `base`: what lies between was lost.
    fn jump(&mut self, last: u64, base: u64) {
        if last + 1 < base {
            self.push(last + 1, base);
        }
    }

    /// Whether the replica is not consistent once everything up to `seq` was applied.
    fn open_at(&mut self, seq: u64) -> bool {
        self.0
            .iter()
            .any(|(begin, end)| *begin <= seq && seq < *end)
    }
}

struct DiskStream {
    receiver: Receiver,
    brackets: Brackets,
    /// How often it began anew since the appliance was started, and what it had come to before.
    beginnings: u64,
    before: u64,
    touched: Touched,
}

/// What a frame of records led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Taken.
    Taken,
    /// The channel is not the disk's present one.
    Superseded,
    /// Refused: why, at which seq (or, if the epoch is why, the newest one).
    Refused(ErrorCode, u64, String),
}

/// What was counted of a frame.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Records taken.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Records that were there already.
    pub duplicates: u64,
}

/// How often each disk's stream has begun anew.
pub fn beginnings(disks: &BTreeMap<[u8; 16], Arc<Disk>>) -> BTreeMap<[u8; 16], u64> {
    let all = disks.iter();
    all.map(|(id, disk)| (*id, disk.beginnings())).collect()
}

/// A disk of a domain.
pub struct Disk {
    stream: Mutex<DiskStream>,
    /// Tells the present channel from earlier ones; changes under the stream's lock only.
    generation: AtomicU64,
    /// Last durable seq.
    durable: AtomicU64,
    /// Last seq in the store.
    uploaded: AtomicU64,
    /// Where acknowledgements go.
    route: Mutex<Option<Present>>,
    /// What the log has of it, or is to have before its next records.
    pub described: Mutex<Described>,
    /// Its description.
    pub info: RwLock<DiskInfo>,
    /// What it can be recovered to.
    newest: Mutex<Newest>,
}

impl Disk {
    /// A disk never seen.
    pub fn new(info: DiskInfo) -> Self {
        Self::with(info, Receiver::new(), 0)
    }

    /// A disk as the log of a restarted appliance has it; `touched`: by its records.
    pub fn restored(
        info: DiskInfo,
        state: &DiskState,
        presented: Attach,
        presence: Presence,
        touched: Option<&Touched>,
    ) -> Self {
        let receiver = Receiver::restored(
            Received(state.last_seq),
            state.attach_epoch,
            state.sync_begin != 0,
            state.full_base_seq,
        )
        .with_presented(presented);
        let disk = Self::with(info, receiver, state.last_seq);
        {
            let described = &mut *disk.described.lock();
            (described.presented, described.presence) = (presented, presence);
        }
        if let Some(touched) = touched {
            disk.stream.lock().touched = touched.clone();
        }
        if state.sync_begin != 0 {
            disk.stream.lock().brackets.begin(state.sync_begin);
        }
        disk
    }

    fn with(info: DiskInfo, receiver: Receiver, durable: u64) -> Self {
        Self {
            stream: Mutex::new(DiskStream {
                touched: Touched::above(receiver.received().0),
                receiver,
                brackets: Brackets::default(),
                beginnings: 0,
                before: 0,
            }),
            generation: AtomicU64::new(0),
            durable: AtomicU64::new(durable),
            uploaded: AtomicU64::new(0),
            route: Mutex::new(None),
            described: Mutex::default(),
            info: RwLock::new(info),
            newest: Mutex::default(),
        }
    }

    /// Last seq received, newest epoch, whether a sync is under way.
    pub fn received(&self) -> (u64, u32, bool) {
        let receiver = self.stream.lock().receiver;
        (
            receiver.received().0,
            receiver.attach_epoch(),
            receiver.syncing(),
        )
    }

    /// The newest epoch that is known of: presented, or of a record.
    pub fn newest_epoch(&self) -> u32 {
        self.stream.lock().receiver.newest_epoch()
    }

    /// For messages.
    pub fn label(&self) -> String {
        let info = self.info.read();
        format!("{}/{}", info.vm_name, info.name)
    }

    /// Where it is.
    pub fn presence(&self) -> Presence {
        self.described.lock().presence.clone()
    }

    /// Changes what is known of where it is; whether that is something new, which the log is to have.
    pub fn change_presence(&self, change: impl FnOnce(&mut Presence)) -> bool {
        let mut described = self.described.lock();
        let before = described.presence.clone();
        change(&mut described.presence);
        let changed = described.presence != before;
        described.owed |= changed;
        changed
    }

    /// Whether a lane of this opening may be presented.
    pub fn may_open(&self, attach: Attach, lineage: &Lineage) -> Result<(), Refusal> {
        self.stream.lock().receiver.may_open(attach, lineage)
    }

    /// Whether a cut may end at this seq.
    pub fn consistent_at(&self, seq: u64) -> bool {
        !self.stream.lock().brackets.open_at(seq) || !holds(Guard::ConsistentAt)
    }

    /// How often its stream has begun anew.
    pub fn beginnings(&self) -> u64 {
        self.stream.lock().beginnings
    }

    /// Whether this seq is of the stream that was there when it had begun so often: what a stream that
    /// begins anew has not come to never comes, whatever its own numbers are.
    pub fn is_of(&self, beginnings: u64, seq: u64) -> bool {
        let stream = self.stream.lock();
        match stream.beginnings.saturating_sub(beginnings) {
            0 => true,
            1 => seq <= stream.before || !holds(Guard::CutOfOneStream),
            _ => !holds(Guard::CutOfOneStream),
        }
    }

    /// A cut that ends here is in the store.
    pub fn settle(&self, position: u64) {
        self.stream.lock().touched.settle(position);
    }

    /// When the cut was taken that is in the store now, and ends here.
    pub fn held_by_cut(&self, time_ns: u64, position: u64) {
        self.newest.lock().cut = Some((time_ns, position));
    }

    /// Its host has said whether its stream holds every write.
    pub fn told_complete(&self, is_complete: bool) {
        self.newest.lock().is_complete = Some(is_complete);
    }

    /// What it can be recovered to.
    pub fn newest(&self) -> Newest {
        *self.newest.lock()
    }

    /// Which of the blocks from an offset on no record above `position` has touched, of those that were
    /// admitted so far; `None`: that is not known.
    pub fn untouched(&self, position: u64, offset_bytes: u64, blocks: usize) -> Option<Vec<bool>> {
        let stream = self.stream.lock();
        let first = offset_bytes / DIRTY_BLOCK_BYTES;
        // A store that is ahead of the log holds what nobody here can vouch for.
        let known = position <= stream.receiver.received().0;
        known.then(|| stream.touched.untouched(position, first, blocks))?
    }

    /// Last durable seq.
    pub fn durable_seq(&self) -> u64 {
        self.durable.load(Ordering::Acquire) // pairs with `durable`
    }

    /// Last seq in the store.
    pub fn uploaded_seq(&self) -> u64 {
        self.uploaded.load(Ordering::Acquire) // pairs with `uploaded`
    }

    /// Whether a host presents it.
    pub fn is_attached(&self) -> bool {
        self.route.lock().is_some()
    }

    /// A host presents the disk on a channel, which supersedes the one before; a host whose epoch is
    /// older is told that it has lost the disk. Answers the host, and gives what tells this channel
    /// from others; `None`: it was open already (as `again`), and another has superseded it.
    pub fn attach(
        &self,
        attach: Attach,
        lineage: &Lineage,
        host: HostId,
        route: Route,
        again: Option<u64>,
    ) -> Result<Option<u64>, Refusal> {
        let attach_epoch = attach.epoch;
        let mut stream = self.stream.lock();
        // News that was still under way when the lane was opened elsewhere.
        if again.is_some_and(|open| self.is_superseded(open)) {
            return Ok(None);
        }
        stream.receiver.open(attach, lineage)?;
        let generation = self.generation.fetch_add(1, Ordering::AcqRel) + 1; // under the lock
        let mut present = self.route.lock();
        // What becomes durable from here on is acknowledged over the new route: `durable` stores the
        // position first and then takes this lock.
        let opened = Message::LaneOpened {
            durable_seq: self.durable.load(Ordering::Acquire), // pairs with `durable`
            attach_epoch: stream.receiver.attach_epoch(),
            full_base_seq: stream.receiver.full_base_seq(),
        };
        route.outbox.send(&opened, route.channel);
        let before = present.replace(Present {
            route,
            attach_epoch,
            host,
        });
        // A host that has it still, in another lane or in one that a VM has adopted, need not be told.
        let before = before.filter(|before| before.host != host);
        if let Some(lost) = before.filter(|before| before.attach_epoch < attach_epoch) {
            let (current, found) = (attach_epoch, lost.attach_epoch);
            let message = Message::Error {
                code: ErrorCode::Fenced,
                seq: u64::from(current),
                text: Refusal::Fenced { current, found }.to_string(),
            };
            lost.route.outbox.send(&message, lost.route.channel);
        }
        Ok(Some(generation))
    }

    /// The store holds records up to this seq, of this epoch. If they are newer than anything that the log
    /// knows of, the log that knew of them was lost: the host is sent away, and comes again above them.
    pub fn found_in_store(&self, seq: u64, attach_epoch: u32) {
        let mut stream = self.stream.lock();
        let last = stream.receiver.received().0;
        if !stream.receiver.found_in_store(seq, attach_epoch) {
            return;
        }
        stream.brackets.begin(0);
        stream.touched = Touched::above(seq.max(last));
        self.durable.fetch_max(seq, Ordering::AcqRel); // pairs with `attach`
        let present = self.route.lock().take();
        if let Some(Present { route, .. }) = present {
            let text = format!(
                "the store holds record {seq} of attach epoch {attach_epoch}, which the log does not know of: the stream must begin anew"
            );
            let (code, seq) = (ErrorCode::Gap, last + 1);
            let message = Message::Error { code, seq, text };
            route.outbox.send(&message, route.channel);
        }
        self.generation.fetch_add(1, Ordering::AcqRel); // under the lock: nothing more comes over it
    }

    /// The channel of this generation has ended: nothing more comes or goes over it. `in_order`: its host
    /// says that the disk was closed in order, and that it has everything acknowledged. Whether the log is
    /// to have something new.
    pub fn detach(&self, generation: u64, in_order: bool) -> bool {
        let stream = self.stream.lock();
        let ended = self.end_channel(generation);
        let receiver = stream.receiver;
        let whole = receiver.received().0 == self.durable_seq() && !receiver.syncing();
        let closed = ended && in_order && whole;
        self.change_presence(|presence| {
            if closed && presence.standing == Standing::Open {
                presence.standing = Standing::Closed;
            }
        })
    }

    /// Under the stream's lock. Whether it was the disk's present channel.
    fn end_channel(&self, generation: u64) -> bool {
        let next = generation + 1;
        // Only the present one: a newer channel has its own.
        let ended =
            self.generation
                .compare_exchange(generation, next, Ordering::AcqRel, Ordering::Acquire);
        if ended.is_ok() {
            *self.route.lock() = None;
        }
        ended.is_ok()
    }

    /// Whether the channel of this generation is no longer the disk's.
    pub fn is_superseded(&self, generation: u64) -> bool {
        let present = self.generation.load(Ordering::Acquire); // pairs with `attach`, `end_channel`
        present != generation && holds(Guard::SupersededChannel)
    }

    /// Records have come over a channel: those that are new and in order go to the log. Waits while
    /// the log has no room, for as long as the channel is the disk's.
    pub fn take(
        &self,
        log: &Log,
        generation: u64,
        content: Vec<u8>,
        len: usize,
    ) -> (Outcome, Counted) {
        let permit = match log.reserve(len, &|| self.is_superseded(generation)) {
            Ok(permit) => permit,
            Err(LogError::GivenUp) => return (Outcome::Superseded, Counted::default()),
            Err(error) => {
                let refused = Outcome::Refused(ErrorCode::Log, 0, error.to_string());
                return (refused, Counted::default());
            }
        };
        self.admit(generation, content, len, |entry| log.submit(permit, entry))
    }

    /// The same, with room in the log held already; `submit` queues what is new, and must not wait.
    pub fn admit(
        &self,
        generation: u64,
        content: Vec<u8>,
        len: usize,
        submit: impl FnOnce(Submission) -> Result<(), LogError>,
    ) -> (Outcome, Counted) {
        let mut counted = Counted::default();
        let mut stream = self.stream.lock();
        if self.is_superseded(generation) {
            return (Outcome::Superseded, counted);
        }
        let bytes = content.get(..len).unwrap_or_default();
        let (run, refusal) = stream.admit(bytes, &mut counted);
        let mut outcome = match refusal {
            None => Outcome::Taken,
            Some((code, seq, text)) => Outcome::Refused(code, seq, text),
        };
        if let Some(run) = run {
            counted.bytes = (run.end - run.start) as u64;
            let mut content = content;
            if run.start > 0 {
                content.copy_within(run.start..run.end, 0);
            }
            let entry = Submission {
                kind: EntryKind::Run,
                disk_id: *self.info.read().uuid.as_bytes(),
                first_seq: run.first_seq,
                last_seq: run.last_seq,
                epoch: run.epoch,
                time_ns: run.time_ns,
                content,
                len: run.end - run.start,
            };
            // Still under the lock: what comes over another connection must queue behind.
            if let Err(error) = submit(entry) {
                outcome = Outcome::Refused(ErrorCode::Log, run.first_seq, error.to_string());
            }
        }
        if matches!(outcome, Outcome::Refused(..)) {
            self.end_channel(generation);
        }
        (outcome, counted)
    }

    /// The log holds the disk durably up to here: tells its host.
    pub fn durable(&self, durability: &Durability) {
        // What was queued before the store was found to be ahead is below what is told by now.
        let known = self.durable.fetch_max(durability.seq, Ordering::AcqRel); // pairs with `attach`
        self.acknowledge(
            known.max(durability.seq),
            self.uploaded.load(Ordering::Relaxed),
        ); // a figure
    }

    /// The store holds the disk up to here: tells its host.
    pub fn uploaded(&self, seq: u64) {
        self.uploaded.store(seq, Ordering::Release); // pairs with the status document's load
        self.acknowledge(self.durable_seq(), seq);
    }

    fn acknowledge(&self, durable_seq: u64, uploaded_seq: u64) {
        if let Some(Present { route, .. }) = self.route.lock().as_ref() {
            route
                .outbox
                .acknowledge(route.channel, durable_seq, uploaded_seq);
        }
    }
}

/// The new records of a frame: they lie together.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    start: usize,
    end: usize,
    first_seq: u64,
    last_seq: u64,
    epoch: u32,
    time_ns: u64,
}

/// Why a peer is refused: the code, the word that goes with it, and the reason.
pub type Refused = (ErrorCode, u64, String);

impl DiskStream {
    /// Admits a frame's records up to the first that is refused.
    fn admit(&mut self, bytes: &[u8], counted: &mut Counted) -> (Option<Run>, Option<Refused>) {
        let mut at = 0;
        let mut run: Option<Run> = None;
        for record in RecordIter::with_crc(bytes, crc32c::crc32c_append) {
            let header = match record {
                Ok(record) => record.header,
                Err(error) => {
                    let seq = self.receiver.received().0 + 1;
                    return (run, Some((ErrorCode::Corrupt, seq, error.to_string())));
                }
            };
            let span = header.span_bytes();
            let last = self.receiver.received().0;
            match self.receiver.admit(&header) {
                // Sent again after a reconnect: only before what is new.
                Ok(Admit::Duplicate) if run.is_none() => {
                    counted.duplicates += 1;
                    at += span;
                    continue;
                }
                Ok(Admit::Duplicate) => {
                    let text = format!("record {} follows record {last}", header.seq);
                    return (run, Some((ErrorCode::Gap, header.seq, text)));
                }
                Ok(Admit::Append) => {}
                Err(error) => {
                    let (code, word) = match error {
                        Refusal::Gap { .. } | Refusal::Base { .. } | Refusal::SeqTwice { .. } => {
                            (ErrorCode::Gap, header.seq)
                        }
                        Refusal::Fenced { current, .. } | Refusal::RolledBack { current, .. } => {
                            (ErrorCode::Fenced, current.into())
                        }
                    };
                    return (run, Some((code, word, error.to_string())));
                }
            }
            self.touched.note(&header);
            self.brackets.jump(last, header.seq);
            if header.flags & FLAG_STREAM_BASE != 0 {
                (self.beginnings, self.before) = (self.beginnings + 1, last);
            }
            if header.flags & FLAG_SYNC_BEGIN != 0 {
                self.brackets.begin(header.seq);
            }
            if header.flags & FLAG_SYNC_END != 0 {
                self.brackets.end(header.seq);
            }
            counted.records += 1;
            let run = run.get_or_insert(Run {
                start: at,
                end: at,
                first_seq: header.seq,
                last_seq: 0,
                epoch: 0,
                time_ns: 0,
            });
            at += span;
            (run.end, run.last_seq) = (at, header.seq);
            (run.epoch, run.time_ns) = (header.attach_epoch, header.time_ns);
        }
        (run, None)
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
