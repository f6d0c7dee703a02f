//! The appliance: its disks (the product's own), its log's queue and batches, what it holds of cuts.
//!
//! Invariant: as in `drva::domain`: nothing is acknowledged before its batch is durable, and what has no
//! room in the queue waits on its connection.

use crate::volume::Memory;
use drva::disk::{Disk, Outcome, Route};
use drva::documents::{cut_back, cut_out, describe, describe_back};
use drva::domain::{Asked, ClosedCut};
use drva::log::format::EntryKind;
use drva::log::reader::Batches;
use drva::log::recover;
use drva::log::volume::Volume;
use drva::log::{
    Batcher, Durability, LogError, LogOptions, Segment, Submission, durability, gather,
    note_segment,
};
use drva::presence::Host;
use filter_core::record::RecordHeader;
use filter_core::session::Refusal;
use filter_core::wire::{ErrorCode, OpenLane};
use recovery_store::{DiskInfo, DiskPosition};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use uuid::Uuid;

/// Bytes that may wait for the log's writer.
const QUEUE_BYTES: usize = 1 << 20;

/// The domain's id.
pub const DOMAIN_ID: [u8; 16] = *b"simulated domain";

/// The replication log.
pub struct Log {
    /// Where it lies.
    pub volume: Arc<Memory>,
    queue: VecDeque<Submission>,
    queue_bytes: usize,
    segments: BTreeMap<u64, Segment>,
    used: u64,
    options: LogOptions,
    /// Its writer waits for room.
    pub full: bool,
    durable_batch: u64,
    batcher: Batcher,
    /// The batch under way.
    writing: Option<Vec<Submission>>,
    /// Whether the batch under way is on the volume already.
    written: bool,
}

/// What a step of the log's writer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is nothing to write, or a write is under way.
    Idle,
    /// A write has begun.
    Begun,
    /// There is no room: the store must take more first.
    Full,
    /// The volume refused: again in a while.
    Refused,
}

impl Batches for Log {
    fn durable_batch(&self) -> u64 {
        self.durable_batch
    }

    fn segments(&self) -> Vec<u64> {
        self.segments.keys().copied().collect()
    }

    fn volume(&self) -> &dyn Volume {
        &*self.volume
    }
}

impl Log {
    /// The first batch that is there.
    pub fn first_segment(&self) -> u64 {
        self.segments.keys().next().copied().unwrap_or(1)
    }

    /// Whether a submission would not have to wait.
    pub const fn has_room(&self) -> bool {
        self.queue_bytes < QUEUE_BYTES
    }

    fn submit(&mut self, submission: Submission) {
        self.queue_bytes += submission.len;
        self.queue.push_back(submission);
    }

    /// Begins to write what is queued.
    pub fn step(&mut self) -> Step {
        if self.written {
            return Step::Idle;
        }
        if self.writing.is_none() {
            if self.queue.is_empty() {
                return Step::Idle;
            }
            self.writing = Some(gather(&mut self.queue, self.options.segment_bytes));
        }
        let batch = self.writing.take().unwrap_or_default();
        let step = self.write(&batch);
        self.writing = Some(batch);
        step
    }

    fn write(&mut self, batch: &[Submission]) -> Step {
        if let Some(need) = self.batcher.segment_needed(batch) {
            let most = self.options.max_bytes.max(2 * self.options.segment_bytes);
            self.full = self.used + need > most;
            if self.full {
                return Step::Full;
            }
            match self.batcher.start_segment(need) {
                Ok(first) => self.segments.insert(first, Segment::of(need)),
                Err(_) => return Step::Refused,
            };
            self.used += need;
        }
        // Noting it twice, after a refusal, changes nothing.
        self.batcher.note_states(batch);
        if self.batcher.write(batch).is_err() {
            return Step::Refused;
        }
        self.written = true;
        Step::Begun
    }

    /// What the batch under way will make durable.
    pub fn under_way(&self) -> Vec<Durability> {
        self.writing.as_deref().map(durability).unwrap_or_default()
    }

    /// The headers of the records in the batch under way, each with its disk.
    pub fn records_under_way(&self) -> impl Iterator<Item = ([u8; 16], RecordHeader)> + '_ {
        let runs = self.writing.iter().flatten();
        let runs = runs.filter(|entry| entry.kind == EntryKind::Run);
        runs.flat_map(|entry| {
            let headers = recover::headers(entry.content.get(..entry.len).unwrap_or_default());
            headers.map(|header| (entry.disk_id, header))
        })
    }

    /// The write under way is durable.
    pub fn durable(&mut self) -> Vec<Durability> {
        self.volume.settle();
        self.written = false;
        let batch = self.writing.take().unwrap_or_default();
        self.queue_bytes -= batch.iter().map(|s| s.len).sum::<usize>();
        note_segment(&mut self.segments, &batch);
        self.durable_batch = self.batcher.last_batch();
        durability(&batch)
    }

    /// Frees segments all of whose records are uploaded and whose cuts are settled.
    pub fn release(&mut self, uploaded: &dyn Fn(&[u8; 16]) -> u64, settled_epoch: u32) {
        while self.segments.len() > 1 {
            let Some((first, segment)) = self.segments.first_key_value() else {
                break;
            };
            let done = segment.is_done(uploaded, settled_epoch);
            let (first, bytes) = (*first, segment.bytes);
            if !done || self.volume.remove(first).is_err() {
                break;
            }
            self.segments.remove(&first);
            self.used -= bytes;
        }
    }
}

/// The domain.
pub struct Domain {
    /// Its id.
    pub id: [u8; 16],
    /// Its disks.
    pub disks: BTreeMap<[u8; 16], Arc<Disk>>,
    /// Its log.
    pub log: Log,
    /// Cuts in the log that the store does not hold.
    pub closed: VecDeque<ClosedCut>,
    /// A cut that was asked for and not yet closed or void.
    pub outstanding: Option<Asked>,
    /// The newest epoch ever asked for or seen.
    pub last_epoch: u32,
    /// Bumped when a disk's description changes.
    pub described: u32,
    /// Bumped when a cut is in the store.
    pub commits: u64,
    /// What the container held of each disk when it was opened for writing.
    in_store: BTreeMap<[u8; 16], DiskPosition>,
}

impl Domain {
    /// Reads the log; what a restarted appliance knows.
    pub fn open(volume: Arc<Memory>, options: LogOptions) -> Result<Self, LogError> {
        let recovered = recover::open(&*volume, DOMAIN_ID)?;
        let batcher = Batcher::new(volume.clone(), DOMAIN_ID, options, &recovered)?;
        let mut disks = BTreeMap::new();
        for (id, state) in &recovered.disks {
            if let Ok((info, presented, presence)) = describe_back(*id, &state.description) {
                let touched = recovered.touched.get(id);
                let disk = Disk::restored(info, state, presented, presence, touched);
                disks.insert(*id, Arc::new(disk));
            }
        }
        let found = recovered.segments.iter();
        let segments: BTreeMap<u64, Segment> = found.map(|f| (f.first_batch, f.into())).collect();
        let closed = recovered.cuts.iter();
        let closed = closed.filter_map(|(epoch, text)| cut_back(*epoch, text));
        Ok(Self {
            id: DOMAIN_ID,
            disks,
            log: Log {
                volume,
                queue: VecDeque::new(),
                queue_bytes: 0,
                used: segments.values().map(|s| s.bytes).sum(),
                segments,
                options,
                full: false,
                durable_batch: recovered.next_batch - 1,
                batcher,
                writing: None,
                written: false,
            },
            closed: closed.collect(),
            outstanding: None,
            last_epoch: recovered.cut_epoch.max(1),
            described: 1,
            commits: 0,
            in_store: BTreeMap::new(),
        })
    }

    fn entry(&mut self, kind: EntryKind, disk_id: [u8; 16], epoch: u32, content: String) {
        let content = content.into_bytes();
        self.log
            .submit(Submission::note(kind, disk_id, epoch, content));
    }

    /// A host presents a lane, or presents it again on a channel that is open (`again`). Gives what tells
    /// its channel from earlier ones; `None`: it is superseded.
    pub fn open_lane(
        &mut self,
        lane: &OpenLane,
        host: &Host,
        route: Route,
        again: Option<u64>,
    ) -> Result<Option<u64>, (ErrorCode, u64, String)> {
        let fenced = |refusal: Refusal| {
            let word = refusal.fenced_by().unwrap_or(0).into();
            (ErrorCode::Fenced, word, refusal.to_string())
        };
        let info = DiskInfo {
            uuid: Uuid::from_bytes(lane.disk_id),
            vm_uuid: Uuid::from_bytes(lane.vm_id),
            vm_name: lane.vm_name.clone(),
            name: lane.disk_label.clone(),
            capacity_bytes: lane.capacity_bytes,
        };
        let attach = lane.attach();
        let known = self.disks.get(&lane.disk_id).cloned();
        let (disk, changed) = match known {
            Some(disk) => {
                disk.may_open(attach, &lane.lineage).map_err(fenced)?;
                let mut now = disk.info.write();
                let mut info = info;
                info.capacity_bytes = info.capacity_bytes.max(now.capacity_bytes);
                let changed = *now != info;
                *now = info;
                drop(now);
                (disk, changed)
            }
            None => {
                let disk = Arc::new(Disk::new(info));
                if let Some(found) = self.in_store.get(&lane.disk_id) {
                    disk.found_in_store(found.seq, found.attach_epoch);
                }
                self.disks.insert(lane.disk_id, disk.clone());
                (disk, true)
            }
        };
        let owed = {
            let mut described = disk.described.lock();
            let same = described.presented.is_same(&attach);
            let presented = described.presented.advanced(&attach);
            let presence = described.presence.presented(host, same);
            let news = presented != described.presented || presence != described.presence;
            (described.presented, described.presence) = (presented, presence);
            changed || news
        };
        if owed {
            let content = describe(&disk.info.read(), &disk.described.lock());
            self.entry(EntryKind::Disk, lane.disk_id, 0, content);
        }
        self.described += u32::from(changed);
        let generation = disk
            .attach(attach, &lane.lineage, host.id, route, again)
            .map_err(fenced)?;
        // A cut that others were asked for is void.
        let asked = self.outstanding.as_mut();
        if let Some(asked) = asked.filter(|of| !of.hosts.contains(&host.id)) {
            asked.void = true;
        }
        Ok(generation)
    }

    /// A lane's channel has ended.
    pub fn close_lane(&mut self, disk_id: &[u8; 16], generation: u64, in_order: bool) {
        let Some(disk) = self.disks.get(disk_id).cloned() else {
            return;
        };
        if disk.detach(generation, in_order) {
            let content = describe(&disk.info.read(), &disk.described.lock());
            self.entry(EntryKind::Disk, *disk_id, 0, content);
        }
    }

    /// The container was opened for writing, and holds the disks up to here.
    pub fn found_in_store(&mut self, held: &BTreeMap<Uuid, DiskPosition>) {
        let held = held.iter().map(|(uuid, at)| (uuid.into_bytes(), *at));
        self.in_store = held.collect();
        for (disk, at) in &self.in_store {
            if let Some(disk) = self.disks.get(disk) {
                disk.found_in_store(at.seq, at.attach_epoch);
            }
        }
    }

    /// Records of a disk have come over a channel of this generation; there must be room.
    pub fn data(&mut self, disk_id: &[u8; 16], generation: u64, content: Vec<u8>) -> Outcome {
        let Some(disk) = self.disks.get(disk_id).cloned() else {
            return Outcome::Superseded;
        };
        let len = content.len();
        let mut queued = None;
        let (outcome, _) = disk.admit(generation, content, len, |submission| {
            queued = Some(submission);
            Ok(())
        });
        if let Some(submission) = queued {
            self.log.submit(submission);
        }
        outcome
    }

    /// The log holds these positions durably: tells the hosts.
    pub fn tell_durable(&self, all: &[Durability]) {
        for durability in all {
            if let Some(disk) = self.disks.get(&durability.disk_id) {
                disk.durable(durability);
            }
        }
    }

    /// Logs a closed cut and hands it to the upload.
    /// `false`: a disk came from another host meanwhile.
    pub fn close_cut(&mut self, cut: ClosedCut) -> bool {
        let (epoch, content) = (cut.epoch, cut_out(&cut));
        let asked = self.outstanding.take_if(|asked| asked.epoch == epoch);
        if asked.is_none_or(|asked| asked.void) {
            return false;
        }
        self.closed.push_back(cut);
        self.entry(EntryKind::Cut, [0; 16], epoch, content);
        true
    }
}
