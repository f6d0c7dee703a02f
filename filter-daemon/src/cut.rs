//! A cut on this host: the domain's epoch is bumped, and each lane's last seq below it is found.
//!
//! Invariant: a position is reported as complete only if its disk streamed from before the epoch was
//! bumped until the position was read. A host reports every disk of the domain that was opened on it
//! before the bump, or that it cannot. No guest waits for a cut of one host.

use crate::connection::{Connection, LinkError};
use crate::control::{Control, Known, Order, What, is_fresh};
use crate::lane::{CutAnswer, CutAsk};
use crate::status::Shared;
use crossbeam::channel::{RecvTimeoutError, Sender};
use filter_core::lane::layout::{LaneMemory, LaneState};
use filter_core::lane::ring::{self, Sound};
use filter_core::lane::sync::Ordering::Relaxed;
use filter_core::mapping::{CutPage, MappedLane, monotonic_ns};
use filter_core::mutant::{Guard, holds};
use filter_core::wire::{DiskReport, ErrorCode, Message};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long producers that were stamping at the bump are waited for.
const STAMPING_LIMIT: Duration = Duration::from_millis(20);
/// How long the pumps may take to answer: they look after at most a round of work.
const POSITIONS_LIMIT: Duration = Duration::from_secs(2);
/// How often it is looked, meanwhile, whether the cut is void already.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The protocol from which on a daemon reports disk by disk.
const REPORTS: u16 = 2;

/// What a lane was doing at one moment, as far as a cut is concerned.
#[derive(Debug, PartialEq, Eq)]
pub struct Doing {
    state: u32,
    rounds: u32,
    attach_epoch: u32,
    /// Restarts of the stream: asked for, answered.
    restarts: (u32, u32),
}

impl Doing {
    /// What the lane with this memory is doing.
    pub fn of(memory: LaneMemory) -> Self {
        let words = memory.producer();
        // All Relaxed: ordered by the fences of the epoch's bump and by the stamping word.
        let asked = memory.consumer().restart_request.load(Relaxed); // as below
        Self {
            state: words.state.load(Relaxed),
            rounds: words.tracking_rounds.load(Relaxed),
            attach_epoch: words.attach_epoch.load(Relaxed), // as above
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

/// Why there is no cut here now.
#[derive(Debug)]
pub(crate) struct Void {
    /// The present epoch, if that is why.
    pub(crate) epoch: u32,
    pub(crate) why: String,
}

impl From<String> for Void {
    fn from(why: String) -> Self {
        Self { epoch: 0, why }
    }
}

impl From<&str> for Void {
    fn from(why: &str) -> Self {
        why.to_owned().into()
    }
}

/// By disk its last seq in the cut; `None`: its stream is broken.
type Positions = HashMap<[u8; 16], Option<u64>>;

/// A lane that is asked about a cut.
struct Asked {
    mapped: Arc<MappedLane>,
    asks: Sender<CutAsk>,
    before: Doing,
    open_before: bool,
}

/// A hold of completions, from its beginning to its deadline, in ns of the host's monotonic clock.
#[derive(Clone, Copy)]
struct Hold {
    since_ns: u64,
    until_ns: u64,
}

/// A cut that is being taken. Completions are not held any more when it goes.
struct Taking {
    lanes: Vec<Asked>,
    page: Option<CutPage>,
    hold: Option<Hold>,
    shared: Arc<Shared>,
}

impl Taking {
    fn end_hold(&mut self) {
        let (Some(page), Some(hold)) = (&self.page, self.hold.take()) else {
            return;
        };
        ring::hold_end(page.hold());
        let lasted_ns = monotonic_ns()
            .min(hold.until_ns)
            .saturating_sub(hold.since_ns);
        self.shared.longest_hold_ns.fetch_max(lasted_ns, Relaxed); // a figure
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        self.end_hold();
    }
}

impl Control {
    /// Takes a cut: bumps the domain's epoch and finds the last seq below it, disk by disk. `hold`: it is
    /// one of several hosts, so completions are held until every host has bumped.
    pub(crate) fn cut(
        &mut self,
        epoch: u32,
        domain: &str,
        hold: bool,
        connection: &mut Connection,
    ) -> Result<Message, LinkError> {
        let version = connection.version();
        let taken = match self.begin(epoch, domain, hold, version) {
            Err(void) => Err(void),
            Ok(mut taking) => {
                let in_time = !hold || self.await_release(epoch, domain, &taking, connection)?;
                taking.end_hold();
                if in_time {
                    self.reports(epoch, &taking, version)
                } else {
                    self.shared.holds_over.fetch_add(1, Relaxed); // a counter
                    Err("completions were held for as long as they may be before every host was ready".into())
                }
            }
        };
        let domain = domain.into();
        Ok(match taken {
            Ok(disks) if version >= REPORTS => Message::CutReport {
                epoch,
                domain,
                disks,
            },
            Ok(disks) => Message::CutPositions {
                epoch,
                domain,
                positions: disks.iter().map(|disk| (disk.disk_id, disk.seq)).collect(),
            },
            Err(void) => Message::Error {
                code: ErrorCode::Other,
                seq: void.epoch.into(),
                text: void.why,
            },
        })
    }

    /// Looks what the domain's lanes do, begins to hold completions, moves the domain's epoch on this host to
    /// `epoch`, and waits until nobody stamps with an older one.
    fn begin(&self, epoch: u32, domain: &str, hold: bool, version: u16) -> Result<Taking, Void> {
        let of_domain = |known: &&Known| known.mapped.identity().domain == domain;
        let lanes = self.known.values().filter(of_domain).map(|known| Asked {
            mapped: known.mapped.clone(),
            asks: known.asks.clone(),
            before: Doing::of(known.mapped.memory()),
            open_before: self.is_open(&known.mapped),
        });
        let mut taking = Taking {
            lanes: lanes.collect(),
            page: None,
            hold: None,
            shared: self.shared.clone(),
        };
        if taking.lanes.is_empty() && version < REPORTS {
            return Err(format!("no disk of domain `{domain}` is on this host").into());
        }
        // No page is made for whatever name a peer comes up with; the first disk makes it.
        if taking.lanes.is_empty() && !self.run.has_cut_page(domain) {
            return Ok(taking);
        }
        let page = self.run.cut_page(domain).map_err(|e| e.to_string())?;
        let current = page.epoch().load(Relaxed); // only this thread moves it
        if current >= epoch {
            let why = format!("the cut epoch is {current} here: ask for a higher one");
            return Err(Void {
                epoch: current,
                why,
            });
        }
        if hold {
            let since_ns = monotonic_ns();
            let until_ns = since_ns + self.hold.as_nanos() as u64;
            ring::hold_begin(page.hold(), until_ns);
            taking.hold = Some(Hold { since_ns, until_ns });
            self.shared.holds.fetch_add(1, Relaxed); // a counter
        }
        ring::epoch_bump::<Sound>(page.epoch(), epoch);
        taking.page = Some(page);
        fault::point("daemon.after-bump");
        for lane in &taking.lanes {
            if !self.wait_for_stamping(&lane.mapped) {
                let label = &lane.mapped.identity().disk_label;
                return Err(format!("disk {label} was stamping for too long").into());
            }
        }
        Ok(taking)
    }

    /// Tells the appliance that completions are held, and waits until it says that every host has moved its
    /// epoch. `false`: the hold was over before that, so it may have been for nothing.
    fn await_release(
        &mut self,
        epoch: u32,
        domain: &str,
        taking: &Taking,
        connection: &mut Connection,
    ) -> Result<bool, LinkError> {
        let held = Message::CutHeld {
            epoch,
            domain: domain.into(),
        };
        connection.queue(&held, 0);
        let Some(hold) = taking.hold else {
            return Ok(true); // there is nobody here
        };
        loop {
            connection.flush()?;
            let release = |order: &Order| {
                order.what == What::Release && order.epoch == epoch && order.domain == domain
            };
            let released = self.orders.iter().position(release);
            let left_ns = hold.until_ns.saturating_sub(monotonic_ns());
            if let Some(at) = released {
                self.orders.remove(at);
                return Ok(left_ns > 0 || !holds(Guard::HoldOverVoids));
            }
            let stopping = self.shared.stopping.load(Ordering::Acquire); // pairs with SIGTERM's store
            if (left_ns == 0 && holds(Guard::HoldOverVoids)) || stopping {
                return Ok(false);
            }
            // In whole milliseconds: one more than is left is no harm, filters look at the clock.
            let limit = Duration::from_nanos(left_ns) + Duration::from_millis(1);
            self.hear(connection, limit)?;
        }
    }

    fn reports(&self, epoch: u32, taking: &Taking, version: u16) -> Result<Vec<DiskReport>, Void> {
        let lanes = &taking.lanes;
        let found = self.positions(epoch, lanes)?;
        let mut reports = Vec::new();
        for lane in lanes {
            let id = lane.mapped.identity();
            // The appliance knows where a disk stands that another host has by now.
            let Some(seq) = found.get(&id.disk_id).copied() else {
                continue;
            };
            // Looked at last: a stream that was left, or started anew, while its position was read
            // makes the position worthless.
            let after = Doing::of(lane.mapped.memory());
            let reopened = after.attach_epoch != lane.before.attach_epoch;
            let open = lane.open_before || reopened || self.is_open(&lane.mapped);
            let complete = lane.before.is_complete() && lane.before == after;
            let report = DiskReport {
                disk_id: id.disk_id,
                seq: seq.unwrap_or(0),
                open,
                complete: complete && seq.is_some(),
            };
            if version < REPORTS && !report.complete {
                return Err(format!("disk {} tracks or syncs", id.disk_label).into());
            }
            reports.push(report);
        }
        Ok(reports)
    }

    /// Whether a process has the disk of this lane open; in doubt it may have.
    fn is_open(&self, lane: &MappedLane) -> bool {
        let looked = self.run.disk_is_open(&lane.identity().disk_id);
        looked.unwrap_or(true)
    }

    /// Asks the pumps for each lane's position; `None`: its stream is broken. A lane that another host
    /// has taken over is left out.
    fn positions(&self, epoch: u32, lanes: &[Asked]) -> Result<Positions, Void> {
        let (answer, answers) = crossbeam::channel::unbounded();
        for lane in lanes {
            let memory = lane.mapped.memory();
            let end = ring::observe_tail::<Sound>(&memory.producer().tail); // C1
            let ask = CutAsk {
                end,
                epoch: epoch.saturating_sub(1),
                answer: answer.clone(),
            };
            let _ = lane.asks.send(ask); // who is gone does not answer: the cut is void
        }
        drop(answer);
        self.no_unknown_lanes()?;
        self.shared.wake_all();
        let deadline = Instant::now() + POSITIONS_LIMIT;
        let mut found = Positions::new();
        let mut others = 0; // disks that other hosts have by now
        while found.len() + others < lanes.len() {
            match answers.recv_timeout(LOOK_EVERY) {
                Ok(CutAnswer::At(disk_id, seq)) => {
                    found.insert(disk_id, Some(seq));
                }
                Ok(CutAnswer::Broken(disk_id)) => {
                    found.insert(disk_id, None);
                }
                // What such a disk does here matters to nobody.
                Ok(CutAnswer::NotOurs) => others += 1,
                Err(RecvTimeoutError::Timeout) => {
                    let stopping = self.shared.stopping.load(Ordering::Acquire); // pairs with SIGTERM's store
                    if stopping || Instant::now() > deadline {
                        return Err("a disk's position was not found in time".into());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err("a disk went meanwhile".into());
                }
            }
        }
        Ok(found)
    }

    /// Whether there is a lane that this thread has not looked at: made or replaced since the scan. Then
    /// a disk may have been opened before the bump that nobody would report.
    fn no_unknown_lanes(&self) -> Result<(), Void> {
        let entries = std::fs::read_dir(self.run.lanes_dir());
        let entries = entries.map_err(|e| format!("cannot list the lanes: {e}"))?;
        let unknown = entries.flatten().any(|entry| {
            let path = entry.path();
            let inode = entry.metadata().map(|meta| meta.ino()).ok();
            path.extension().is_some_and(|e| e == "lane")
                && self.known.get(&path).map(|known| known.inode) != inode
                && self.unusable.get(&path).copied() != inode
                && !self.was_never_opened(&path)
        });
        match unknown {
            true => Err("a disk was opened meanwhile".into()),
            false => Ok(()),
        }
    }

    /// Whether a lane is what is left of an opening that was broken off: nothing was ever written there.
    fn was_never_opened(&self, path: &Path) -> bool {
        let lane = MappedLane::open(path);
        // In this order: a process that has the disk by now has begun after the bump.
        lane.is_ok_and(|lane| is_fresh(&lane) && !self.is_open(&lane))
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
                return !self.is_open(lane);
            }
            std::thread::yield_now();
        }
        true
    }
}
