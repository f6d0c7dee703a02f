//! The log's writer: gathers what is queued into batches, makes each durable, starts new segments.
//! What it writes is the [`Batcher`]'s matter, which has no thread and never waits.
//!
//! Invariant: one batch is under way at a time, and the next begins only when it is durable; a segment
//! counts only when its first batch, which tells where every disk stands, is durable in it.

use super::format::{self, BATCH_HEADER_BYTES, BatchHeader, Entry, EntryKind};
use super::recover::{self, Recovered};
use super::volume::{Volume, Writable};
use super::{
    DiskState, Durability, LogError, LogOptions, OnDurable, RETRY, Segment, Shared, Submission,
    io_error,
};
use crate::raw::AlignedBuffer;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Body bytes that one batch gathers.
const BATCH_BYTES: usize = 1 << 20;
/// Buffers kept for reuse.
const POOL: usize = 32;

pub(super) struct Writer {
    shared: Arc<Shared>,
    batcher: Batcher,
    on_durable: OnDurable,
}

/// Makes batches out of submissions and writes them, one after the other, into segments.
pub struct Batcher {
    volume: Arc<dyn Volume>,
    domain_id: [u8; 16],
    segment_bytes: u64,
    /// The segment, and where the next batch goes.
    open: Option<(Box<dyn Writable>, u64)>,
    next_batch: u64,
    chain: u32,
    /// The batch that is being made, where direct I/O takes it from: no copy on the way.
    buffer: AlignedBuffer,
    /// End of what is in the buffer; its header's place is left free at the start.
    end: usize,
    states: BTreeMap<[u8; 16], DiskState>,
}

/// What is queued, up to the size of a batch in a log whose segments have this length.
pub fn gather(waiting: &mut VecDeque<Submission>, segment_bytes: u64) -> Vec<Submission> {
    let limit = BATCH_BYTES.min(segment_bytes as usize / 2);
    let mut taken: Vec<Submission> = Vec::new();
    let mut bytes = 0;
    while let Some(next) = waiting.front() {
        if !taken.is_empty() && bytes + next.len > limit {
            break;
        }
        bytes += next.len;
        taken.extend(waiting.pop_front());
    }
    taken
}

/// What a batch makes durable, disk by disk.
pub fn durability(batch: &[Submission]) -> Vec<Durability> {
    let mut durable: Vec<Durability> = Vec::new();
    for submission in batch.iter().filter(|s| s.kind == EntryKind::Run) {
        let (disk_id, seq, time_ns) = (submission.disk_id, submission.last_seq, submission.time_ns);
        match durable.iter_mut().find(|d| d.disk_id == disk_id) {
            Some(known) => (known.seq, known.time_ns) = (seq, time_ns),
            None => durable.push(Durability {
                disk_id,
                seq,
                time_ns,
            }),
        }
    }
    durable
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        domain_id: [u8; 16],
        options: LogOptions,
        recovered: &Recovered,
        on_durable: OnDurable,
    ) -> Result<Self, LogError> {
        let batcher = Batcher::new(shared.volume.clone(), domain_id, options, recovered)?;
        Ok(Self {
            shared,
            batcher,
            on_durable,
        })
    }
    /// What is queued, up to a batch's size; `None`: the log is closing and nothing is left.
    fn gather(&self) -> Option<Vec<Submission>> {
        let mut queue = self.shared.queue.lock();
        while queue.waiting.is_empty() {
            if self.shared.closing.load(Ordering::Acquire) {
                return None; // pairs with the store of close
            }
            self.shared.queued.wait(&mut queue);
        }
        Some(gather(&mut queue.waiting, self.batcher.segment_bytes))
    }

    pub(super) fn run(mut self) {
        while let Some(batch) = self.gather() {
            if !self.commit(&batch) {
                return;
            }
            let mut queue = self.shared.queue.lock();
            for submission in batch {
                queue.bytes -= submission.len;
                if queue.pool.len() < POOL && submission.content.capacity() <= BATCH_BYTES {
                    queue.pool.push(submission.content);
                }
            }
            drop(queue);
            self.shared.room.notify_all();
        }
    }

    /// Makes a batch durable; tries for as long as it takes. `false`: the log is closing and it could
    /// not be written.
    fn commit(&mut self, batch: &[Submission]) -> bool {
        if let Some(need) = self.batcher.segment_needed(batch)
            && !self.insist("start a new segment of", |this| this.new_segment(need))
        {
            return false;
        }
        // A new segment begins with the state of every disk as it was before this batch.
        self.batcher.note_states(batch);
        if !self.insist("write to", |this| this.batcher.write(batch)) {
            return false;
        }
        fault::point("drva.log.after-write");
        note_segment(&mut self.shared.segments.lock(), batch);
        let durable = durability(batch);
        let number = self.batcher.last_batch();
        self.shared.durable_batch.store(number, Ordering::Release); // pairs with `durable_batch`
        // Relaxed: figures.
        self.shared.batches.fetch_add(1, Ordering::Relaxed);
        self.shared
            .entries
            .fetch_add(batch.len() as u64, Ordering::Relaxed);
        (self.on_durable)(&durable);
        drop(self.shared.progress.lock());
        self.shared.progressed.notify_all();
        true
    }

    /// Repeats until it succeeds; a failure is an alarm, said once.
    fn insist(
        &mut self,
        what: &'static str,
        mut act: impl FnMut(&mut Self) -> std::io::Result<()>,
    ) -> bool {
        loop {
            match act(self) {
                Ok(()) => {
                    if self.shared.failing.swap(false, Ordering::AcqRel) {
                        tracing::info!("the log {} works again", self.shared.dir().display());
                    }
                    return true;
                }
                Err(error) => {
                    if !self.shared.failing.swap(true, Ordering::AcqRel) {
                        let dir = self.shared.dir().display();
                        tracing::error!(
                            "cannot {what} the log {dir}: {error}; hosts wait meanwhile"
                        );
                    }
                    if self.shared.closing.load(Ordering::Acquire) {
                        return false; // pairs with the store of close
                    }
                    std::thread::sleep(RETRY);
                }
            }
        }
    }

    /// Waits for room, then makes a segment of `need` bytes.
    fn new_segment(&mut self, need: u64) -> std::io::Result<()> {
        let shared = self.shared.clone();
        while shared.used_bytes.load(Ordering::Acquire) + need > shared.max_bytes {
            if !shared.full.swap(true, Ordering::AcqRel) {
                tracing::error!(
                    "the log {} is full ({} bytes): hosts wait until the store takes more",
                    shared.dir().display(),
                    shared.max_bytes
                );
            }
            if shared.closing.load(Ordering::Acquire) {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            let mut queue = shared.queue.lock();
            shared.room.wait_for(&mut queue, RETRY);
        }
        if shared.full.swap(false, Ordering::AcqRel) {
            tracing::info!("the log {} has room again", shared.dir().display());
        }
        let first = self.batcher.start_segment(need)?;
        if shared.batches.load(Ordering::Relaxed) == 0 && !self.batcher.is_direct() {
            tracing::info!(
                "{}: no direct I/O here, fdatasync is used",
                shared.dir().display()
            );
        }
        shared.segments.lock().insert(first, Segment::of(need));
        shared.used_bytes.fetch_add(need, Ordering::AcqRel);
        Ok(())
    }
}

/// Notes what a batch has put into the newest segment.
pub fn note_segment(segments: &mut BTreeMap<u64, Segment>, batch: &[Submission]) {
    let Some(segment) = segments.values_mut().next_back() else {
        return;
    };
    for submission in batch {
        match submission.kind {
            EntryKind::Run => {
                segment.last.insert(submission.disk_id, submission.last_seq);
            }
            EntryKind::Cut => segment.cut_epoch = segment.cut_epoch.max(submission.epoch),
            _ => {}
        }
    }
}

impl Batcher {
    /// Goes on where the log ended.
    pub fn new(
        volume: Arc<dyn Volume>,
        domain_id: [u8; 16],
        options: LogOptions,
        recovered: &Recovered,
    ) -> Result<Self, LogError> {
        let open = match recovered.open_segment {
            Some((first_batch, offset)) => {
                let path = volume.path_of(first_batch);
                let resumed = volume.resume(first_batch, offset);
                Some((resumed.map_err(io_error("go on in", &path))?, offset))
            }
            None => None,
        };
        Ok(Self {
            volume,
            domain_id,
            segment_bytes: options
                .segment_bytes
                .next_multiple_of(format::BATCH_ALIGN as u64),
            open,
            next_batch: recovered.next_batch,
            chain: recovered.chain,
            buffer: AlignedBuffer::new(BATCH_HEADER_BYTES + format::MAX_BODY_BYTES),
            end: BATCH_HEADER_BYTES,
            states: recovered.disks.clone(),
        })
    }

    /// The bytes that a segment must have before this batch can be written; `None`: the open one has room.
    pub fn segment_needed(&self, batch: &[Submission]) -> Option<u64> {
        let body_len: usize = batch.iter().map(Submission::span_bytes).sum();
        let span = (BATCH_HEADER_BYTES + body_len).next_multiple_of(format::BATCH_ALIGN) as u64;
        let fits = self
            .open
            .as_ref()
            .is_some_and(|(segment, at)| at + span <= segment.len_bytes());
        let states: usize = self
            .states
            .values()
            .map(|s| s.description.len() + 128)
            .sum();
        let states = (states + BATCH_HEADER_BYTES).next_multiple_of(format::BATCH_ALIGN);
        (!fits).then(|| self.segment_bytes.max(span + states as u64))
    }

    /// Makes a segment of `need` bytes, begins it with the state of every disk; gives its first batch.
    pub fn start_segment(&mut self, need: u64) -> std::io::Result<u64> {
        let first = self.next_batch;
        let segment = self.volume.create(first, need)?;
        fault::point("drva.log.segment-made");
        self.open = Some((segment, 0));
        self.end = BATCH_HEADER_BYTES;
        let states = std::mem::take(&mut self.states);
        let appended = states
            .iter()
            .try_for_each(|(id, state)| self.append_state(id, state));
        self.states = states;
        appended?;
        if self.end > BATCH_HEADER_BYTES {
            // A failure leaves no open segment: the next attempt makes it anew.
            self.write_batch().inspect_err(|_| self.open = None)?;
        }
        Ok(first)
    }

    /// Writes a batch; when this returns it is durable.
    pub fn write(&mut self, batch: &[Submission]) -> std::io::Result<()> {
        self.end = BATCH_HEADER_BYTES;
        batch.iter().try_for_each(|s| self.append(&s.entry()))?;
        self.write_batch()
    }

    /// The batch that was written last.
    pub const fn last_batch(&self) -> u64 {
        self.next_batch - 1
    }

    fn is_direct(&self) -> bool {
        self.open
            .as_ref()
            .is_some_and(|(segment, _)| segment.is_direct())
    }

    /// Takes into each disk's state what a batch tells of it, before that batch is written.
    pub fn note_states(&mut self, batch: &[Submission]) {
        for submission in batch {
            if submission.kind == EntryKind::Cut {
                continue;
            }
            let state = self.states.entry(submission.disk_id).or_default();
            match submission.kind {
                EntryKind::Disk => {
                    state.description = submission
                        .content
                        .get(..submission.len)
                        .unwrap_or_default()
                        .to_vec();
                }
                _ => {
                    recover::note_run(state, &submission.entry());
                }
            }
        }
    }

    /// Where a disk stands, as a new segment begins with it.
    fn append_state(&mut self, disk_id: &[u8; 16], state: &DiskState) -> std::io::Result<()> {
        let mut entry = Entry {
            kind: EntryKind::Disk,
            disk_id: *disk_id,
            first_seq: 0,
            last_seq: 0,
            epoch: 0,
            content: &state.description,
        };
        self.append(&entry)?;
        entry.kind = EntryKind::State;
        (entry.first_seq, entry.last_seq) = (state.sync_begin, state.last_seq);
        let full_base = state.full_base_seq.to_le_bytes();
        (entry.epoch, entry.content) = (state.attach_epoch, &full_base);
        self.append(&entry)
    }

    /// Adds an entry to the batch that is being made.
    fn append(&mut self, entry: &Entry<'_>) -> std::io::Result<()> {
        for bytes in [entry.header().as_slice(), entry.content] {
            let range = self.end..self.end + bytes.len();
            let place = self.buffer.bytes().get_mut(range);
            let too_long = std::io::ErrorKind::InvalidInput;
            place.ok_or(too_long)?.copy_from_slice(bytes);
            self.end += bytes.len();
        }
        Ok(())
    }

    /// Writes what is in the buffer as the next batch.
    fn write_batch(&mut self) -> std::io::Result<()> {
        let Some((segment, at)) = &mut self.open else {
            return Err(std::io::ErrorKind::NotFound.into());
        };
        let too_long = std::io::ErrorKind::InvalidInput;
        let bytes = self.buffer.bytes();
        let body = bytes.get(BATCH_HEADER_BYTES..self.end).ok_or(too_long)?;
        let header = BatchHeader {
            domain_id: self.domain_id,
            number: self.next_batch,
            body_len: body.len() as u32,
            body_crc: crc32c::crc32c(body),
            before: self.chain,
        };
        let (raw, chain) = header.encode();
        let span = header.span_bytes() as usize;
        let (head, rest) = bytes.split_at_mut(BATCH_HEADER_BYTES);
        head.copy_from_slice(&raw);
        let padding = self.end - BATCH_HEADER_BYTES..span - BATCH_HEADER_BYTES;
        rest.get_mut(padding).ok_or(too_long)?.fill(0);
        fault::check("drva.log.before-write")?;
        segment.write(&mut self.buffer, span, *at)?;
        *at += span as u64;
        self.next_batch += 1;
        self.chain = chain;
        Ok(())
    }
}
