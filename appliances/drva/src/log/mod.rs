//! The replication log of one domain.
//!
//! Invariant: what was acknowledged is on stable storage; records of a disk lie in it in seq order;
//! nothing is dropped: when the log is full or its storage fails, whoever submits waits.
//!
//! | file | holds |
//! |---|---|
//! | this one | what others call: reserve, submit, release |
//! | `writer` | group commit, new segments |
//! | [`mod@format`] | the bytes |
//! | [`segment`] | the files |
//! | [`recover`] | the scan at restart |
//! | [`reader`] | reading what is durable, for the upload |
//! | [`volume`] | where the segments lie |

pub mod format;
pub mod reader;
pub mod recover;
pub mod segment;
pub mod volume;
mod writer;

use filter_core::mutant::{Guard, holds};
use format::{ENTRY_HEADER_BYTES, Entry, EntryKind};
use parking_lot::{Condvar, Mutex};
use recover::{FoundSegment, Recovered};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use volume::{Folder, Volume};
use writer::Writer;
pub use writer::{Batcher, durability, gather, note_segment};

/// Bytes that may wait for the writer; beyond it submitters wait.
const QUEUE_BYTES: usize = 8 << 20;
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
        "{path} is damaged at byte {offset}: {why}; later batches are there, so this is no torn end. Move the folder that it lies in aside (not the whole --data-dir: the container is told by its domain-id) and start again: what the store does not hold yet is synced from the hosts"
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
    /// Whoever wanted to submit does not any more.
    #[error("given up while the log had no room")]
    GivenUp,
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

impl Submission {
    /// Something that is no run of records: a description, a cut.
    pub fn note(kind: EntryKind, disk_id: [u8; 16], epoch: u32, content: Vec<u8>) -> Self {
        Self {
            kind,
            disk_id,
            first_seq: 0,
            last_seq: 0,
            epoch,
            time_ns: 0,
            len: content.len(),
            content,
        }
    }
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
    /// The seq of the last base that relied on nothing, or 0.
    pub full_base_seq: u64,
}

/// Room in the queue, held for a submission; given back if none is made.
pub struct Permit<'a> {
    shared: &'a Shared,
    len: usize,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.len > 0 {
            self.shared.queue.lock().bytes -= self.len;
            self.shared.room.notify_all();
        }
    }
}

impl Submission {
    /// What is written of it.
    fn entry(&self) -> Entry<'_> {
        Entry {
            kind: self.kind,
            disk_id: self.disk_id,
            first_seq: self.first_seq,
            last_seq: self.last_seq,
            epoch: self.epoch,
            content: self.content.get(..self.len).unwrap_or_default(),
        }
    }

    const fn span_bytes(&self) -> usize {
        ENTRY_HEADER_BYTES + self.len
    }
}

/// A segment, as far as freeing it is concerned.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its length.
    pub bytes: u64,
    /// Per disk the last seq in it.
    pub last: HashMap<[u8; 16], u64>,
    /// Highest cut epoch closed in it.
    pub cut_epoch: u32,
}

impl Segment {
    /// A new one of this length.
    pub fn of(bytes: u64) -> Self {
        Self {
            bytes,
            last: HashMap::new(),
            cut_epoch: 0,
        }
    }

    /// Whether it may go: all of its records are uploaded, its cuts are settled.
    pub fn is_done(&self, uploaded: &dyn Fn(&[u8; 16]) -> u64, settled_epoch: u32) -> bool {
        self.cut_epoch <= settled_epoch
            && (self.last.iter().all(|(disk, seq)| uploaded(disk) >= *seq)
                || !holds(Guard::ReleaseUploaded))
    }
}

impl From<&FoundSegment> for Segment {
    fn from(found: &FoundSegment) -> Self {
        Self {
            bytes: found.bytes,
            last: found.last.clone(),
            cut_epoch: found.cut_epoch,
        }
    }
}

struct Shared {
    volume: Arc<dyn Volume>,
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

impl Shared {
    fn dir(&self) -> &Path {
        self.volume.dir()
    }
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
        let volume: Arc<dyn Volume> = Arc::new(Folder::new(dir));
        let recovered = recover::open(&*volume, domain_id)?;
        let found = recovered.segments.iter();
        let segments: BTreeMap<u64, Segment> = found.map(|f| (f.first_batch, f.into())).collect();
        let used: u64 = segments.values().map(|s| s.bytes).sum();
        let shared = Arc::new(Shared {
            volume,
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
        let writer = Writer::new(shared.clone(), domain_id, options, &recovered, on_durable)?;
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

    /// Waits until the queue has room for a submission of `len` bytes, and holds it. `give_up` is
    /// asked now and then.
    pub fn reserve(&self, len: usize, give_up: &dyn Fn() -> bool) -> Result<Permit<'_>, LogError> {
        let shared = &*self.shared;
        let mut queue = shared.queue.lock();
        loop {
            // pairs with the store of close
            if shared.closing.load(Ordering::Acquire) {
                return Err(LogError::Closing);
            }
            if queue.bytes < QUEUE_BYTES {
                queue.bytes += len;
                return Ok(Permit { shared, len });
            }
            shared.room.wait_for(&mut queue, RETRY);
            if give_up() {
                return Err(LogError::GivenUp);
            }
        }
    }

    /// Queues a submission of at most the permit's length. Never waits: it may be called under locks.
    pub fn submit(&self, mut permit: Permit<'_>, submission: Submission) -> Result<(), LogError> {
        let shared = &self.shared;
        let mut queue = shared.queue.lock();
        // pairs with the store of close
        if shared.closing.load(Ordering::Acquire) {
            drop(queue); // the permit wants it
            return Err(LogError::Closing);
        }
        // From here on the bytes are the submission's: the writer gives them back.
        queue.bytes = queue.bytes + submission.len - std::mem::take(&mut permit.len);
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
            if !segment.is_done(uploaded, settled_epoch) {
                break;
            }
            let (first, bytes) = (*first, segment.bytes);
            // Durably, one by one: after a crash a gap would look like a lost segment.
            if let Err(error) = self.shared.volume.remove(first) {
                let path = self.shared.volume.path_of(first);
                tracing::error!("cannot remove {}: {error}", path.display());
                break;
            }
            fault::point("drva.log.segment-deleted");
            segments.remove(&first);
            self.shared.used_bytes.fetch_sub(bytes, Ordering::AcqRel); // pairs with the writer's load
            self.shared.room.notify_all();
        }
    }

    /// Whether its writer waits for room.
    pub fn is_full(&self) -> bool {
        self.shared.full.load(Ordering::Relaxed) // looked at again soon
    }

    /// Whether submitters wait.
    #[cfg(test)]
    pub fn queue_is_full(&self) -> bool {
        self.shared.queue.lock().bytes >= QUEUE_BYTES
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
        self.shared.dir()
    }

    /// The first batch of each segment.
    pub fn segments(&self) -> Vec<u64> {
        self.shared.segments.lock().keys().copied().collect()
    }

    /// Writes what is queued and stops.
    pub fn close(&self) {
        self.shared.closing.store(true, Ordering::Release); // pairs with the loads
        // Under the locks: whoever has looked and not yet waits would miss it.
        let queue = self.shared.queue.lock();
        self.shared.queued.notify_all();
        self.shared.room.notify_all();
        drop(queue);
        let progress = self.shared.progress.lock();
        self.shared.progressed.notify_all();
        drop(progress);
        if let Some(thread) = self.writer.lock().take() {
            let _ = thread.join();
        }
    }
}

impl reader::Batches for Log {
    fn durable_batch(&self) -> u64 {
        self.durable_batch()
    }

    fn segments(&self) -> Vec<u64> {
        self.segments()
    }

    fn volume(&self) -> &dyn Volume {
        &*self.shared.volume
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
