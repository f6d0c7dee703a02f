//! The control thread: finds lanes, speaks on the control port, takes cuts.
//!
//! Invariant: a cut's positions are reported only if every disk of the domain on this host streamed
//! from before the epoch was bumped until its position was read; otherwise the cut is void. No guest
//! waits for a cut.

use crate::connection::{Connection, LinkError};
use crate::dial::Dialer;
use crate::lane::{CutAnswer, CutAsk, Lane};
use crate::raw::{self, Interest};
use crate::status::Shared;
use crossbeam::channel::{RecvTimeoutError, Sender};
use filter_core::lane::layout::{LaneMemory, LaneState};
use filter_core::lane::ring::{self, Sound};
use filter_core::lane::sync::Ordering::{Acquire, Relaxed};
use filter_core::mapping::{MappedLane, RunFolder};
use filter_core::wire::{ErrorCode, Message, PortRole};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often the folder of the lanes is looked at.
const SCAN_EVERY: Duration = Duration::from_millis(100);
/// How long producers that were stamping at the bump are waited for.
const STAMPING_LIMIT: Duration = Duration::from_millis(20);
/// How long the pumps may take to answer: they look after at most a round of work.
const POSITIONS_LIMIT: Duration = Duration::from_secs(2);
/// How often it is looked, meanwhile, whether the cut is void already.
const LOOK_EVERY: Duration = Duration::from_millis(20);

struct Known {
    inode: u64,
    mapped: Arc<MappedLane>,
    /// The lane lives in a pump as long as this end is held.
    asks: Sender<CutAsk>,
}

/// The control thread's state.
pub struct Control {
    run: RunFolder,
    pumps: Vec<Sender<Box<Lane>>>,
    shared: Arc<Shared>,
    known: HashMap<PathBuf, Known>,
    unusable: HashMap<PathBuf, u64>,
}

/// What a lane was doing at one moment, as far as a cut is concerned.
#[derive(Debug, PartialEq, Eq)]
pub struct Doing {
    state: u32,
    rounds: u32,
    /// Restarts of the stream: asked for, answered.
    restarts: (u32, u32),
}

impl Doing {
    /// What the lane with this memory is doing.
    pub fn of(memory: LaneMemory) -> Self {
        let words = memory.producer();
        // Relaxed: ordered by the fences of the epoch's bump and by the stamping word.
        let asked = memory.consumer().restart_request.load(Relaxed); // as below
        Self {
            state: words.state.load(Relaxed),
            rounds: words.tracking_rounds.load(Relaxed),
            restarts: (asked, words.restart_done.load(Relaxed)),
        }
    }

    /// Whether the stream holds every write.
    pub fn is_complete(&self) -> bool {
        let state = LaneState::from_word(self.state);
        let whole = self.restarts.0 == self.restarts.1;
        whole && matches!(state, Some(LaneState::Streaming | LaneState::Closed))
    }
}

/// Whether a lane was made, and its producer has not yet begun.
fn is_fresh(lane: &MappedLane) -> bool {
    let state = lane.memory().producer().state.load(Acquire); // follows the base in the producer's order
    LaneState::from_word(state) == Some(LaneState::Fresh)
}

impl Control {
    /// A control thread.
    pub fn new(run: RunFolder, pumps: Vec<Sender<Box<Lane>>>, shared: Arc<Shared>) -> Self {
        Self {
            run,
            pumps,
            shared,
            known: HashMap::new(),
            unusable: HashMap::new(),
        }
    }

    /// Runs until the daemon stops.
    pub fn run(mut self, mut dialer: Dialer) {
        let mut connection: Option<Connection> = None;
        while !self.shared.stopping.load(Ordering::Acquire) {
            // pairs with the store at SIGTERM
            self.scan();
            let connected = connection.is_some();
            self.shared.tell(PortRole::Control, connected, Vec::new());
            let Some(open) = &mut connection else {
                match (!self.known.is_empty()).then(|| dialer.poll()).flatten() {
                    Some(Ok(made)) => connection = Some(made),
                    Some(Err(error)) => dialer.failed(&error),
                    None => std::thread::sleep(SCAN_EVERY),
                }
                continue;
            };
            match self.converse(open) {
                Ok(asked) => dialer.useful(open, asked),
                Err(error) => {
                    dialer.failed(&error);
                    connection = None;
                }
            }
        }
    }

    /// One round on the control connection. Returns whether a cut was asked for.
    fn converse(&mut self, connection: &mut Connection) -> Result<bool, LinkError> {
        let interest = Interest {
            fd: connection.fd(),
            write: connection.wants_write(),
        };
        raw::poll(&[interest], SCAN_EVERY)?;
        let mut requests = Vec::new();
        connection.receive(&mut |_, message| match message {
            Message::CutRequest { epoch, domain } => {
                requests.push((epoch, domain));
                Ok(())
            }
            Message::Error { text, .. } => Err(LinkError::Refused(text)),
            _ => Err(LinkError::Protocol(
                "a frame that does not belong on the control port",
            )),
        })?;
        let asked = !requests.is_empty();
        for (epoch, domain) in requests {
            if self.shared.stopping.load(Ordering::Acquire) {
                break; // pairs with the store at SIGTERM
            }
            let answer = self.cut(epoch, &domain);
            let counter = match &answer {
                Message::CutPositions { .. } => &self.shared.cuts_reported,
                _ => &self.shared.cuts_void,
            };
            counter.fetch_add(1, Relaxed); // a counter
            connection.queue(&answer, 0);
        }
        connection.keep_alive()?;
        connection.flush()?;
        Ok(asked)
    }

    /// Looks for lanes that have come, were replaced, or went.
    fn scan(&mut self) {
        let Ok(entries) = std::fs::read_dir(self.run.lanes_dir()) else {
            return;
        };
        let mut seen = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|e| e != "lane") {
                continue;
            }
            let Ok(meta) = entry.metadata() else { continue };
            let inode = meta.ino();
            seen.push(path.clone());
            let known = self.known.get(&path).map(|known| known.inode);
            if known == Some(inode) || self.unusable.get(&path) == Some(&inode) {
                continue;
            }
            if known.is_some() {
                self.forget(&path);
            }
            match MappedLane::open(&path) {
                // Its stream's base, which decides how it is opened, is not published yet.
                Ok(mapped) if is_fresh(&mapped) => {}
                Ok(mapped) => self.found(path, inode, mapped),
                Err(error) => {
                    tracing::error!("{error}; the filter makes it anew when the disk is opened");
                    self.unusable.insert(path, inode);
                }
            }
        }
        let gone: Vec<PathBuf> = self
            .known
            .keys()
            .filter(|path| !seen.contains(path))
            .cloned()
            .collect();
        gone.iter().for_each(|path| self.forget(path));
    }

    fn found(&mut self, path: PathBuf, inode: u64, mapped: MappedLane) {
        let id = mapped.identity();
        tracing::info!(
            "lane of {}/{} in domain {}",
            id.vm_name,
            id.disk_label,
            id.domain
        );
        let mapped = Arc::new(mapped);
        let role = Lane::home(&*mapped);
        let (lane, asks) = Lane::new(mapped.clone());
        let known = Known {
            inode,
            mapped,
            asks,
        };
        self.known.insert(path, known);
        if let Some(pump) = self.pumps.get(usize::from(role.offset())) {
            let _ = pump.send(Box::new(lane));
            self.shared.wake_pump(role);
        }
    }

    fn forget(&mut self, path: &PathBuf) {
        // Whichever pump has the lane, or will have it next, finds its questions cut off.
        if self.known.remove(path).is_some() {
            self.shared.wake_all();
        }
    }

    /// Takes a cut: bumps the domain's epoch and finds the last seq below it, disk by disk.
    fn cut(&self, epoch: u32, domain: &str) -> Message {
        let void = |seq: u64, text: String| Message::Error {
            code: ErrorCode::Other,
            seq,
            text,
        };
        let of_domain = self
            .known
            .values()
            .filter(|known| known.mapped.identity().domain == domain);
        let (lanes, asks): (Vec<&Arc<MappedLane>>, Vec<&Sender<CutAsk>>) =
            of_domain.map(|known| (&known.mapped, &known.asks)).unzip();
        if lanes.is_empty() {
            // Nor is a page made for whatever name a peer comes up with.
            return void(0, format!("no disk of domain `{domain}` is on this host"));
        }
        let page = match self.run.cut_page(domain) {
            Ok(page) => page,
            Err(error) => return void(0, error.to_string()),
        };
        let before: Vec<Doing> = lanes.iter().map(|lane| Doing::of(lane.memory())).collect();
        let current = page.epoch().load(Relaxed); // only this thread moves it
        if current >= epoch {
            let text = format!("the cut epoch is {current} here: ask for a higher one");
            return void(u64::from(current), text);
        }
        ring::epoch_bump::<Sound>(page.epoch(), epoch);
        for lane in &lanes {
            if !self.wait_for_stamping(lane) {
                let label = &lane.identity().disk_label;
                return void(0, format!("disk {label} was stamping for too long"));
            }
        }
        let (answer, answers) = crossbeam::channel::unbounded();
        for (lane, asks) in lanes.iter().zip(asks) {
            let memory = lane.memory();
            let end = ring::observe_tail::<Sound>(&memory.producer().tail); // C1
            let ask = CutAsk {
                end,
                epoch: epoch.saturating_sub(1),
                answer: answer.clone(),
            };
            let _ = asks.send(ask); // who is gone does not answer: the cut is void
        }
        drop(answer);
        if self.unknown_lanes() {
            return void(0, "a disk was opened meanwhile".into());
        }
        self.shared.wake_all();
        let deadline = Instant::now() + POSITIONS_LIMIT;
        let mut positions = Vec::new();
        let mut others = 0; // disks that other hosts have by now
        while positions.len() + others < lanes.len() {
            match answers.recv_timeout(LOOK_EVERY) {
                Ok(CutAnswer::At(disk_id, seq)) => positions.push((disk_id, seq)),
                // The appliance knows where such a disk stands; what it does here matters to nobody.
                Ok(CutAnswer::NotOurs) => others += 1,
                Ok(CutAnswer::Broken) => return void(0, "a disk's stream starts anew".into()),
                Err(RecvTimeoutError::Timeout) => {
                    let stopping = self.shared.stopping.load(Ordering::Acquire); // pairs with SIGTERM's store
                    if stopping || Instant::now() > deadline {
                        return void(0, "a disk's position was not found in time".into());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return void(0, "a disk went meanwhile".into());
                }
            }
        }
        // Looked at last: a stream that was left, or started anew, while its position was read makes
        // the position worthless.
        for (lane, before) in lanes.iter().zip(&before) {
            let id = lane.identity();
            let ours = positions.iter().any(|(disk_id, _)| *disk_id == id.disk_id);
            if ours && !(before.is_complete() && *before == Doing::of(lane.memory())) {
                return void(0, format!("disk {} tracks or syncs", id.disk_label));
            }
        }
        Message::CutPositions {
            epoch,
            domain: domain.into(),
            positions,
        }
    }

    /// Whether there is a lane that this thread has not looked at: made or replaced since the scan.
    fn unknown_lanes(&self) -> bool {
        let Ok(entries) = std::fs::read_dir(self.run.lanes_dir()) else {
            return true;
        };
        entries.flatten().any(|entry| {
            let path = entry.path();
            let inode = entry.metadata().map(|meta| meta.ino()).ok();
            path.extension().is_some_and(|e| e == "lane")
                && self.known.get(&path).map(|known| known.inode) != inode
                && self.unusable.get(&path).copied() != inode
        })
    }

    /// Waits until whoever was stamping at the bump has published; microseconds, unless its process
    /// was killed in between.
    fn wait_for_stamping(&self, lane: &MappedLane) -> bool {
        let memory = lane.memory();
        let word = &memory.producer().stamping;
        let first = ring::stamping_round(word);
        let since = Instant::now();
        while first & 1 == 1 && ring::stamping_round(word) == first {
            if since.elapsed() > STAMPING_LIMIT {
                // A producer that died while stamping has published nothing more.
                return !self
                    .run
                    .disk_is_open(&lane.identity().disk_id)
                    .unwrap_or(true);
            }
            std::thread::yield_now();
        }
        true
    }
}
