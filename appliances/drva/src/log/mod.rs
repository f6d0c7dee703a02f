//! The replication log of one domain.
//!
//! Invariant: what was acknowledged is on stable storage; records of a disk lie in it in seq order;
//! nothing is dropped: when the log is full or its storage fails, whoever submits waits.
//!
//! | file | holds |
//! |---|---|
//! | this one | submit, group commit, release |
//! | [`format`] | the bytes |
//! | [`segment`] | the files |
//! | [`recover`] | the scan at restart |
//! | [`reader`] | reading what is durable, for the upload |

pub mod format;
pub mod reader;
pub mod recover;
pub mod segment;

use crate::raw::AlignedBuffer;
use format::{BATCH_HEADER_BYTES, BatchHeader, Entry, EntryKind};
use parking_lot::{Condvar, Mutex};
use recover::Recovered;
use segment::SegmentWriter;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Body bytes that one batch gathers.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes that may wait for the writer; beyond it submitters wait.
const QUEUE_BYTES: usize = 8 << 20;
/// Buffers kept for reuse.
const POOL: usize = 32;
/// Wait before a failed write is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// What went wrong with a log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The operating system refused.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Something in the middle of the log is damaged: what follows it would be lost.
    #[error(
        "{path} is damaged at byte {offset}: {why}; later batches are there, so this is no torn end. Keep the file; a new log (another --data-dir) makes the hosts sync again"
    )]
    Damaged {
        /// The segment.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// Another process has it open.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// The log is being closed.
    #[error("the log is closing")]
    Closing,
}

/// Sizes of a log.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Bytes of all segments; beyond it submitters wait until something was uploaded.
    pub max_bytes: u64,
}

/// Something to be logged.
#[derive(Debug)]
pub struct Submission {
    /// What it is.
    pub kind: EntryKind,
    /// The disk; zeros for a cut.
    pub disk_id: [u8; 16],
    /// First seq.
    pub first_seq: u64,
    /// Last seq.
    pub last_seq: u64,
    /// Epoch.
    pub epoch: u32,
    /// Newest record's time, ns since 1970, for the lag figures.
    pub time_ns: u64,
    /// The content: `len` bytes of it.
    pub content: Vec<u8>,
    /// Bytes of the content that count.
    pub len: usize,
}

/// What a batch made durable of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durability {
    /// The disk.
    pub disk_id: [u8; 16],
    /// Everything up to here.
    pub seq: u64,
    /// Newest record's time.
    pub time_ns: u64,
}

/// Called by the writer after each batch, outside all locks of the log. Must not block.
pub type OnDurable = Box<dyn Fn(&[Durability]) + Send>;

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Submission>,
    bytes: usize,
    pool: Vec<Vec<u8>>,
}

/// Where a disk stands, for the state entries of a new segment.
#[derive(Clone, Debug, Default)]
pub struct DiskState {
    /// Its description: a JSON document.
    pub description: Vec<u8>,
    /// Last seq in the log.
    pub last_seq: u64,
    /// Newest attach epoch.
    pub attach_epoch: u32,
    /// The seq of the open SYNC_BEGIN, or 0.
    pub sync_begin: u64,
}

struct Segment {
    bytes: u64,
    /// Per disk the last seq in it.
    last: HashMap<[u8; 16], u64>,
    /// Highest cut epoch closed in it.
    cut_epoch: u32,
}

struct Shared {
    dir: PathBuf,
    queue: Mutex<Queue>,
    queued: Condvar,
    room: Condvar,
    segments: Mutex<BTreeMap<u64, Segment>>,
    durable_batch: AtomicU64,
    closing: AtomicBool,
    full: AtomicBool,
    failing: AtomicBool,
    used_bytes: AtomicU64,
    max_bytes: u64,
    batches: AtomicU64,
    entries: AtomicU64,
    progressed: Condvar,
    progress: Mutex<()>,
}

/// The log of one domain.
pub struct Log {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
    _lock: File,
}

fn io_error<'a>(
    what: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> LogError + 'a {
    move |source| LogError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

impl Log {
    /// Opens the log in `dir` (made if it is missing), cuts a torn end, starts its writer.
    pub fn open(
        dir: &Path,
        domain_id: [u8; 16],
        options: LogOptions,
        on_durable: OnDurable,
    ) -> Result<(Self, Recovered), LogError> {
        std::fs::create_dir_all(dir).map_err(io_error("make the folder", dir))?;
        let lock_path = dir.join("lock");
        let mut open = OpenOptions::new();
        open.create(true).truncate(false).write(true);
        let lock = open
            .open(&lock_path)
            .map_err(io_error("open", &lock_path))?;
        if lock.try_lock().is_err() {
            return Err(LogError::InUse(dir.to_owned()));
        }
        let recovered = recover::scan(dir, domain_id)?;
        let mut segments = BTreeMap::new();
        for found in &recovered.segments {
            let (last, cut_epoch) = (found.last.clone(), found.cut_epoch);
            segments.insert(
                found.first_batch,
                Segment {
                    bytes: found.bytes,
                    last,
                    cut_epoch,
                },
            );
        }
        let used: u64 = segments.values().map(|s| s.bytes).sum();
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            queue: Mutex::default(),
            queued: Condvar::new(),
            room: Condvar::new(),
            segments: Mutex::new(segments),
            durable_batch: AtomicU64::new(recovered.next_batch - 1),
            closing: AtomicBool::new(false),
            full: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            used_bytes: AtomicU64::new(used),
            max_bytes: options.max_bytes.max(2 * options.segment_bytes),
            batches: AtomicU64::new(0),
            entries: AtomicU64::new(0),
            progressed: Condvar::new(),
            progress: Mutex::new(()),
        });
        let open = match recovered.open_segment {
            Some((first_batch, offset)) => {
                let resumed = SegmentWriter::resume(dir, first_batch, offset);
                let path = segment::path_of(dir, first_batch);
                Some((
                    resumed.map_err(io_error("go on in", &path))?,
                    first_batch,
                    offset,
                ))
            }
            None => None,
        };
        let writer = Writer {
            shared: shared.clone(),
            domain_id,
            segment_bytes: options
                .segment_bytes
                .next_multiple_of(format::BATCH_ALIGN as u64),
            open,
            next_batch: recovered.next_batch,
            chain: recovered.chain,
            buffer: AlignedBuffer::new(BATCH_HEADER_BYTES + format::MAX_BODY_BYTES),
            body: Vec::new(),
            states: recovered.disks.clone(),
            on_durable,
        };
        let thread = std::thread::Builder::new().name("log".into());
        let thread = thread
            .spawn(move || writer.run())
            .map_err(io_error("start the writer of", dir))?;
        Ok((
            Self {
                shared,
                writer: Mutex::new(Some(thread)),
                _lock: lock,
            },
            recovered,
        ))
    }

    /// A buffer for a submission's content, of at least this length.
    pub fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.shared.queue.lock().pool.pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        buffer
    }

    /// Queues a submission; waits while the queue or the log is full.
    pub fn submit(&self, submission: Submission) -> Result<(), LogError> {
        let shared = &self.shared;
        let mut queue = shared.queue.lock();
        while queue.bytes >= QUEUE_BYTES {
            if shared.closing.load(Ordering::Acquire) {
                return Err(LogError::Closing); // pairs with the store of close
            }
            shared.room.wait_for(&mut queue, RETRY);
        }
        if shared.closing.load(Ordering::Acquire) {
            return Err(LogError::Closing); // as above
        }
        queue.bytes += submission.len;
        queue.waiting.push_back(submission);
        shared.queued.notify_one();
        Ok(())
    }

    /// The newest durable batch.
    pub fn durable_batch(&self) -> u64 {
        self.shared.durable_batch.load(Ordering::Acquire) // pairs with the writer's store
    }

    /// Waits until a batch above this one is durable, or some time has passed.
    pub fn wait_beyond(&self, batch: u64, limit: Duration) {
        let mut guard = self.shared.progress.lock();
        if self.durable_batch() <= batch && !self.is_closing() {
            self.shared.progressed.wait_for(&mut guard, limit);
        }
    }

    /// Whether the log is being closed.
    pub fn is_closing(&self) -> bool {
        self.shared.closing.load(Ordering::Acquire) // pairs with the store of close
    }

    /// Frees segments all of whose records are uploaded and whose cuts are settled.
    pub fn release(&self, uploaded: &dyn Fn(&[u8; 16]) -> u64, settled_epoch: u32) {
        let mut segments = self.shared.segments.lock();
        while segments.len() > 1 {
            let Some((first, segment)) = segments.first_key_value() else {
                break;
            };
            let done = segment.cut_epoch <= settled_epoch
                && segment
                    .last
                    .iter()
                    .all(|(disk, seq)| uploaded(disk) >= *seq);
            if !done {
                break;
            }
            let (first, bytes) = (*first, segment.bytes);
            let path = segment::path_of(&self.shared.dir, first);
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::error!("cannot remove {}: {error}", path.display());
                break;
            }
            segments.remove(&first);
            self.shared.used_bytes.fetch_sub(bytes, Ordering::AcqRel);
            self.shared.room.notify_all();
        }
    }

    /// Bytes used, bytes allowed, whether it is full, whether its storage fails.
    pub fn usage(&self) -> (u64, u64, bool, bool) {
        let shared = &self.shared;
        let used = shared.used_bytes.load(Ordering::Relaxed); // figures
        let (full, failing) = (&shared.full, &shared.failing);
        (
            used,
            shared.max_bytes,
            full.load(Ordering::Relaxed),
            failing.load(Ordering::Relaxed),
        )
    }

    /// Batches written, entries in them.
    pub fn counts(&self) -> (u64, u64) {
        let shared = &self.shared;
        // Relaxed: figures.
        (
            shared.batches.load(Ordering::Relaxed),
            shared.entries.load(Ordering::Relaxed),
        )
    }

    /// The log's folder.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// The first batch of each segment.
    pub fn segments(&self) -> Vec<u64> {
        self.shared.segments.lock().keys().copied().collect()
    }

    /// Writes what is queued and stops.
    pub fn close(&self) {
        self.shared.closing.store(true, Ordering::Release); // pairs with the loads
        self.shared.queued.notify_all();
        self.shared.room.notify_all();
        self.shared.progressed.notify_all();
        if let Some(thread) = self.writer.lock().take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.close();
    }
}

struct Writer {
    shared: Arc<Shared>,
    domain_id: [u8; 16],
    segment_bytes: u64,
    /// The segment, the number of its first batch, where the next batch goes.
    open: Option<(SegmentWriter, u64, u64)>,
    next_batch: u64,
    chain: u32,
    buffer: AlignedBuffer,
    body: Vec<u8>,
    states: BTreeMap<[u8; 16], DiskState>,
    on_durable: OnDurable,
}

impl Writer {
    fn run(mut self) {
        loop {
            let batch = {
                let mut queue = self.shared.queue.lock();
                while queue.waiting.is_empty() {
                    if self.shared.closing.load(Ordering::Acquire) {
                        return; // pairs with the store of close
                    }
                    self.shared.queued.wait(&mut queue);
                }
                let limit = BATCH_BYTES.min(self.segment_bytes as usize / 2);
                let mut taken = Vec::new();
                let mut bytes = 0;
                while let Some(next) = queue.waiting.front() {
                    if !taken.is_empty() && bytes + next.len > limit {
                        break;
                    }
                    bytes += next.len;
                    taken.extend(queue.waiting.pop_front());
                }
                taken
            };
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
        self.body.clear();
        for submission in batch {
            entry_of(submission).write(&mut self.body);
        }
        let span = (BATCH_HEADER_BYTES + self.body.len()).next_multiple_of(format::BATCH_ALIGN);
        let fits = self
            .open
            .as_ref()
            .is_some_and(|(segment, _, at)| at + span as u64 <= segment.len_bytes());
        if !fits
            && !self.insist("start a new segment of", |this| {
                this.new_segment(span as u64)
            })
        {
            return false;
        }
        // A new segment begins with the state of every disk as it was before this batch.
        self.note_states(batch);
        self.body.clear();
        for submission in batch {
            entry_of(submission).write(&mut self.body);
        }
        if !self.insist("write to", Self::write_batch) {
            return false;
        }
        self.note_segment(batch);
        let mut durable: Vec<Durability> = Vec::new();
        for submission in batch.iter().filter(|s| s.kind == EntryKind::Run) {
            let (disk_id, seq, time_ns) =
                (submission.disk_id, submission.last_seq, submission.time_ns);
            match durable.iter_mut().find(|d| d.disk_id == disk_id) {
                Some(known) => (known.seq, known.time_ns) = (seq, time_ns),
                None => durable.push(Durability {
                    disk_id,
                    seq,
                    time_ns,
                }),
            }
        }
        let number = self.next_batch - 1;
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
                        tracing::info!("the log {} works again", self.shared.dir.display());
                    }
                    return true;
                }
                Err(error) => {
                    if !self.shared.failing.swap(true, Ordering::AcqRel) {
                        let dir = self.shared.dir.display();
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

    fn note_states(&mut self, batch: &[Submission]) {
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
                    recover::note_run(state, &entry_of(submission));
                }
            }
        }
    }

    fn note_segment(&self, batch: &[Submission]) {
        let mut segments = self.shared.segments.lock();
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

    /// Waits for room, makes a segment, begins it with the state of every disk.
    /// It has room for a batch of `span` bytes after that.
    fn new_segment(&mut self, span: u64) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let states: usize = self
            .states
            .values()
            .map(|s| s.description.len() + 128)
            .sum();
        let states = (states + BATCH_HEADER_BYTES).next_multiple_of(format::BATCH_ALIGN);
        let need = self.segment_bytes.max(span + states as u64);
        while shared.used_bytes.load(Ordering::Acquire) + need > shared.max_bytes {
            if !shared.full.swap(true, Ordering::AcqRel) {
                tracing::error!(
                    "the log {} is full ({} bytes): hosts wait until the store takes more",
                    shared.dir.display(),
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
            tracing::info!("the log {} has room again", shared.dir.display());
        }
        let segment = SegmentWriter::create(&shared.dir, self.next_batch, need)?;
        if self.open.is_none() && !segment.is_direct() {
            tracing::info!(
                "{}: no direct I/O here, fdatasync is used",
                shared.dir.display()
            );
        }
        let first = self.next_batch;
        self.open = Some((segment, first, 0));
        let new = Segment {
            bytes: need,
            last: HashMap::new(),
            cut_epoch: 0,
        };
        shared.segments.lock().insert(first, new);
        shared.used_bytes.fetch_add(need, Ordering::AcqRel);
        self.body.clear();
        for (disk_id, state) in &self.states {
            let mut entry = Entry {
                kind: EntryKind::Disk,
                disk_id: *disk_id,
                first_seq: 0,
                last_seq: 0,
                epoch: 0,
                content: &state.description,
            };
            entry.write(&mut self.body);
            entry.kind = EntryKind::State;
            (entry.first_seq, entry.last_seq) = (state.sync_begin, state.last_seq);
            (entry.epoch, entry.content) = (state.attach_epoch, &[]);
            entry.write(&mut self.body);
        }
        if self.body.is_empty() {
            Ok(())
        } else {
            self.write_batch()
        }
    }

    /// Writes the body as the next batch.
    fn write_batch(&mut self) -> std::io::Result<()> {
        let Some((segment, _, at)) = &mut self.open else {
            return Err(std::io::ErrorKind::NotFound.into());
        };
        let header = BatchHeader {
            domain_id: self.domain_id,
            number: self.next_batch,
            body_len: self.body.len() as u32,
            body_crc: crc32c::crc32c(&self.body),
            before: self.chain,
        };
        let (raw, chain) = header.encode();
        let span = header.span_bytes() as usize;
        let bytes = self.buffer.bytes();
        let end = BATCH_HEADER_BYTES + self.body.len();
        let too_long = std::io::ErrorKind::InvalidInput;
        bytes
            .get_mut(..BATCH_HEADER_BYTES)
            .ok_or(too_long)?
            .copy_from_slice(&raw);
        bytes
            .get_mut(BATCH_HEADER_BYTES..end)
            .ok_or(too_long)?
            .copy_from_slice(&self.body);
        bytes.get_mut(end..span).ok_or(too_long)?.fill(0);
        segment.write(&mut self.buffer, span, *at)?;
        *at += span as u64;
        self.next_batch += 1;
        self.chain = chain;
        Ok(())
    }
}

fn entry_of(submission: &Submission) -> Entry<'_> {
    Entry {
        kind: submission.kind,
        disk_id: submission.disk_id,
        first_seq: submission.first_seq,
        last_seq: submission.last_seq,
        epoch: submission.epoch,
        content: submission.content.get(..submission.len).unwrap_or_default(),
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
