//! The guests of a cell: fio with verification on `d0`, and on `d1` a guest that remembers what was
//! acknowledged, also over the death of its host. And how late the machine itself is meanwhile.
//!
//! Invariant: a guest that ends in order has seen no error; one whose host died is buried, and what it knew
//! goes on.

use crate::support::client;
use crate::witness::{Memory, Witness};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long the filter may defer a write, by its default.
const BUDGET: Duration = Duration::from_millis(5);

/// What was seen.
pub struct Outcome {
    /// The longest that the filter deferred a write, as the host's checks measured it.
    pub deferred_max: Duration,
    /// What it may have been: the budget, and what this machine's scheduling adds.
    pub allowed: Duration,
    /// The longest that a write took the guest that remembers, with its disk.
    pub slowest_write: Duration,
    pub writes: u64,
    pub took: Duration,
    /// What else there is to say of it.
    pub note: String,
}

/// How late this machine wakes a thread that asked for a millisecond: what a timer of the filter may be
/// late as well.
pub struct Lateness {
    since: Instant,
    stop: Arc<AtomicBool>,
    worst_ns: Arc<AtomicU64>,
}

impl Lateness {
    pub fn start() -> Self {
        let meter = Self {
            since: Instant::now(),
            stop: Arc::default(),
            worst_ns: Arc::default(),
        };
        let (stop, worst_ns) = (meter.stop.clone(), meter.worst_ns.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let since = Instant::now();
                std::thread::sleep(Duration::from_millis(1)); // time under test: the machine's own
                worst_ns.fetch_max(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
            }
        });
        meter
    }

    /// The budget, and three times the worst lateness (a timer, a thread, the disk's own), at least 50 ms:
    /// a meter that looks once a millisecond does not see every moment.
    fn allowed(&self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let worst = Duration::from_nanos(self.worst_ns.load(Ordering::Relaxed));
        BUDGET + (3 * worst).max(Duration::from_millis(50))
    }

    /// What was seen; the longest deferral must be within what is allowed.
    pub fn judge(&self, deferred_max_ns: u64, memory: &Memory, note: String) -> Outcome {
        let outcome = Outcome {
            deferred_max: Duration::from_nanos(deferred_max_ns),
            allowed: self.allowed(),
            slowest_write: memory.slowest,
            writes: memory.writes,
            took: self.since.elapsed(),
            note,
        };
        assert!(
            outcome.deferred_max <= outcome.allowed,
            "a write was deferred for {:?}, more than {:?}",
            outcome.deferred_max,
            outcome.allowed
        );
        outcome
    }
}

/// fio; ended with the cell, however that ends.
struct Fio(Child);

impl Fio {
    /// Writes `megabytes` of `d0` at a bounded rate, and reads all of it back.
    fn start(folder: &Path, socket: &Path, megabytes: u64, seed: u64) -> Self {
        let mut fio = client("fio");
        // A job that is a process of its own would outlive fio.
        fio.arg("--thread").current_dir(folder);
        fio.args(["--name=chaos", "--ioengine=nbd", "--rw=randwrite"]);
        fio.args(["--bsrange=4k-32k", "--iodepth=8", "--verify=crc32c"]);
        fio.args(["--verify_fatal=1", "--verify_state_save=0"]);
        fio.args(["--verify_backlog=256", "--rate_iops=600,600"]);
        fio.arg(format!("--size={megabytes}M"));
        fio.arg(format!("--randseed={}", seed % 1_000_000));
        fio.arg(format!("--uri=nbd+unix:///d0?socket={}", socket.display()));
        let log = File::create(folder.join("fio.log")).unwrap();
        fio.stdin(Stdio::null()).stdout(log.try_clone().unwrap());
        Self(fio.stderr(log).spawn().unwrap())
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        // fio ignores SIGTERM; and its server may be gone, then it would wait for ever.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Both guests.
pub struct Load {
    /// Where fio works, and what it says.
    folder: PathBuf,
    fio: Option<Fio>,
    witness: Option<Witness>,
    memory: Option<Memory>,
}

impl Load {
    /// None at work yet; `d1` holds zeros.
    pub fn new(folder: &Path, d1_bytes: u64, seed: u64) -> Self {
        Self {
            folder: folder.to_owned(),
            fio: None,
            witness: None,
            memory: Some(Memory::new(d1_bytes, seed)),
        }
    }

    /// Sets both to work; fio with `megabytes` of writes.
    pub fn start(&mut self, nbd_socket: &Path, megabytes: u64, seed: u64) {
        self.fio = Some(Fio::start(&self.folder, nbd_socket, megabytes, seed));
        let memory = self.memory.take().unwrap();
        self.witness = Some(Witness::start(nbd_socket.to_owned(), "d1", memory));
    }

    /// Whether guests are at work, or could be.
    pub fn is_started(&self) -> bool {
        self.witness.is_some()
    }

    /// Whether fio has not yet done its work.
    pub fn assert_fio_runs(&mut self) {
        if let Some(fio) = &mut self.fio {
            let ended = fio.0.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "the load is over before the fault: {ended:?}"
            );
        }
    }

    /// They end in order, and must have seen no error, and what they wrote.
    pub fn end(&mut self) {
        if let Some(mut fio) = self.fio.take() {
            let status = fio.0.wait().unwrap();
            let said = std::fs::read_to_string(self.folder.join("fio.log")).unwrap_or_default();
            assert!(status.success(), "the guest saw an error: {said}");
        }
        if let Some(witness) = self.witness.take() {
            self.memory = Some(witness.finish());
        }
    }

    /// They die with their host.
    pub fn bury(&mut self) {
        self.fio = None;
        if let Some(witness) = self.witness.take() {
            self.memory = Some(witness.buried());
        }
    }

    /// What the guest that remembers knows, between two lives.
    pub fn memory(&self) -> &Memory {
        self.memory.as_ref().unwrap()
    }
}
