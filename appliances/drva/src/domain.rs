//! A protected domain in the appliance: its disks, its log, its cuts, its figures.
//!
//! Invariant: every closed cut is in the list for the upload before anything after it is fed; locks are
//! taken in the order described, disks, stream, route, and nothing is waited for under any of them.

use crate::disk::{Described, Disk, Outcome, Refused, Route};
use crate::documents::{cut_back, cut_out, describe, describe_back};
use crate::hashes::{Ask, MAX_WAITING};
use crate::identity;
use crate::log::format::EntryKind;
use crate::log::recover::Recovered;
use crate::log::{Durability, Log, LogError, LogOptions, Submission};
use crate::presence::{Host, HostId, Standing, hosts_of};
use crossbeam::channel::{Receiver, Sender, bounded};
use filter_core::session::Refusal;
use filter_core::wire::{ErrorCode, OpenLane};
use hdrhistogram::Histogram;
use parking_lot::{Condvar, Mutex, RwLock};
use recovery_store::{DiskInfo, DiskPosition};
use ringbuf::HeapRb;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use uuid::Uuid;

/// Disks of one appliance, at most.
pub const MAX_DISKS: usize = 500;

/// Named cuts of one domain that may be waited for at once.
pub const MAX_WANTED: usize = 64;

/// Time since 1970, in ns.
pub fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64)
}

/// Figures of a domain.
pub struct Figures {
    /// Record's time to durable, in us.
    pub durable_lag_us: Mutex<Histogram<u64>>,
    /// Cut's time to committed in the store, in us.
    pub commit_us: Mutex<Histogram<u64>>,
    /// Payload and headers received.
    pub received_bytes: AtomicU64,
    /// Records received.
    pub records: AtomicU64,
    /// Records that were there already.
    pub duplicates: AtomicU64,
    /// Cuts in the store.
    pub cuts_closed: AtomicU64,
    /// Cuts that could not be taken.
    pub cuts_void: AtomicU64,
    /// Cuts for which hosts were asked to hold completions.
    pub cuts_held: AtomicU64,
    /// Bytes of objects.
    pub stored_bytes: AtomicU64,
}

fn histogram() -> Mutex<Histogram<u64>> {
    // 1 us to an hour, two digits: bounds that are always valid.
    #[allow(clippy::unwrap_used)]
    Mutex::new(Histogram::new_with_bounds(1, 3_600_000_000, 2).unwrap())
}

impl Default for Figures {
    fn default() -> Self {
        Self {
            durable_lag_us: histogram(),
            commit_us: histogram(),
            received_bytes: AtomicU64::new(0),
            records: AtomicU64::new(0),
            duplicates: AtomicU64::new(0),
            cuts_closed: AtomicU64::new(0),
            cuts_void: AtomicU64::new(0),
            cuts_held: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
        }
    }
}

/// A closed cut on its way to the store.
#[derive(Clone, Debug)]
pub struct ClosedCut {
    /// Records below this epoch belong to it.
    pub epoch: u32,
    /// When it was closed.
    pub time_ns: u64,
    /// The operator's name.
    pub name: Option<String>,
    /// Per disk its last record in the cut.
    pub positions: BTreeMap<Uuid, u64>,
    /// Disks that an operator has set aside: they are not in it.
    pub left_out: BTreeSet<Uuid>,
}

/// A cut that hosts were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Records below this epoch will belong to it.
    pub epoch: u32,
    /// Who was asked.
    pub hosts: BTreeSet<HostId>,
    /// Another host has presented a disk meanwhile: nothing can come of it.
    pub void: bool,
}

/// Why a cut could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    /// A disk came from a host that was not asked.
    #[error("a disk came from another host meanwhile")]
    Moved,
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// What the upload may feed, and what waits for it.
pub struct CutState {
    /// Cuts in the log that the store does not hold.
    pub closed: VecDeque<ClosedCut>,
    /// A cut that was asked for and not yet closed or void.
    pub outstanding: Option<Asked>,
    /// The newest epoch ever asked for or seen.
    pub last_epoch: u32,
    /// The newest cut in the store: number, name, time.
    pub newest: Option<(u64, Option<String>, u64)>,
    /// Names that operators asked for, not yet taken.
    pub wanted: VecDeque<String>,
    /// The last named cuts that came into the store: name, epoch, number, time.
    named: HeapRb<(String, u32, u64, u64)>,
}

impl Default for CutState {
    fn default() -> Self {
        Self {
            closed: VecDeque::new(),
            outstanding: None,
            last_epoch: 0,
            newest: None,
            wanted: VecDeque::new(),
            named: HeapRb::new(MAX_WANTED),
        }
    }
}

impl CutState {
    /// A cut is in the store.
    pub fn committed(&mut self, number: u64, cut: &ClosedCut) {
        if let Some(name) = &cut.name {
            // The oldest goes: whoever asked for it has looked long ago.
            let named = (name.clone(), cut.epoch, number, cut.time_ns);
            self.named.push_overwrite(named);
        }
        self.newest = Some((number, cut.name.clone(), cut.time_ns));
    }

    /// The cut of this name that was begun after the one of epoch `after`, if it is in the store: its
    /// number and time.
    pub fn named_after(&mut self, name: &str, after: u32) -> Option<(u64, u64)> {
        let mut named = self.named.iter();
        let found = named.find(|(known, epoch, ..)| known == name && *epoch > after);
        found.map(|(.., number, time_ns)| (*number, *time_ns))
    }

    /// A cut that was begun when so many waited for its name is closed: it is for all of them.
    pub fn served(&mut self, name: &str, count: usize) {
        for _ in 0..count {
            if let Some(at) = self.wanted.iter().position(|wanted| wanted == name) {
                self.wanted.remove(at);
            }
        }
    }
}

/// A domain.
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: [u8; 16],
    /// Its disks.
    pub disks: RwLock<BTreeMap<[u8; 16], Arc<Disk>>>,
    /// Its log.
    pub log: Log,
    /// Cuts.
    pub cuts: Mutex<CutState>,
    /// Cuts have changed.
    pub cuts_changed: Condvar,
    /// Bumped when a disk's description changes.
    pub described: AtomicU32,
    /// Bumped when a cut is in the store.
    pub commits: AtomicU64,
    /// Questions about what disks hold, not yet answered.
    pub asks: (Sender<Ask>, Receiver<Ask>),
    /// What the container held of each disk when it was opened for writing.
    in_store: Mutex<BTreeMap<[u8; 16], DiskPosition>>,
    /// Figures.
    pub figures: Figures,
    /// Something an operator should know; the newest first.
    pub alarms: Mutex<BTreeMap<&'static str, String>>,
    /// The appliance stops.
    stopping: watch::Sender<bool>,
}

impl Domain {
    /// Opens the domain's log in `dir`, makes out of it where every disk stands.
    pub fn open(name: &str, dir: &Path, options: LogOptions) -> Result<Arc<Self>, LogError> {
        let id = identity::lasting_id(dir, "domain-id").map_err(|source| LogError::Io {
            what: "read or make the domain's id in",
            path: dir.to_owned(),
            source,
        })?;
        // The log's writer tells the domain, which owns the log: the way back is weak, and is set
        // before anything can be submitted.
        let back: Arc<OnceLock<Weak<Self>>> = Arc::default();
        let of = back.clone();
        let on_durable = Box::new(move |all: &[Durability]| {
            if let Some(domain) = of.get().and_then(Weak::upgrade) {
                domain.durable(all);
            }
        });
        let (log, recovered) = Log::open(&dir.join("log"), id, options, on_durable)?;
        let domain = Arc::new(Self::restored(name, id, log, &recovered));
        let _ = back.set(Arc::downgrade(&domain));
        Ok(domain)
    }

    fn restored(name: &str, id: [u8; 16], log: Log, recovered: &Recovered) -> Self {
        let mut disks = BTreeMap::new();
        for (disk_id, state) in &recovered.disks {
            let described = describe_back(*disk_id, &state.description);
            let Ok((info, presented, presence)) = described else {
                tracing::error!("domain {name}: the description of a disk in the log is malformed");
                continue;
            };
            let touched = recovered.touched.get(disk_id);
            let disk = Disk::restored(info, state, presented, presence, touched);
            disks.insert(*disk_id, Arc::new(disk));
        }
        let closed = recovered
            .cuts
            .iter()
            .filter_map(|(epoch, text)| cut_back(*epoch, text));
        let cuts = CutState {
            closed: closed.collect(),
            // Hosts begin at epoch 1, so the first that can be asked for is 2.
            last_epoch: recovered.cut_epoch.max(1),
            ..CutState::default()
        };
        Self {
            name: name.into(),
            id,
            disks: RwLock::new(disks),
            log,
            cuts: Mutex::new(cuts),
            cuts_changed: Condvar::new(),
            described: AtomicU32::new(1),
            commits: AtomicU64::new(0),
            asks: bounded(MAX_WAITING),
            in_store: Mutex::default(),
            figures: Figures::default(),
            alarms: Mutex::default(),
            stopping: watch::Sender::new(false),
        }
    }

    /// Raises or clears an alarm.
    pub fn alarm(&self, key: &'static str, text: Option<String>) {
        let mut alarms = self.alarms.lock();
        match text {
            Some(text) => {
                if alarms.insert(key, text.clone()).as_ref() != Some(&text) {
                    tracing::warn!("domain {}: {text}", self.name);
                }
            }
            None => {
                if alarms.remove(key).is_some() {
                    tracing::info!("domain {}: alarm `{key}` is over", self.name);
                }
            }
        }
    }

    /// A disk.
    pub fn disk(&self, id: &[u8; 16]) -> Option<Arc<Disk>> {
        self.disks.read().get(id).cloned()
    }

    /// A host presents a lane, or presents it again on a channel that is open (`again`). Gives its disk and
    /// what tells the channel from earlier ones (`None`: it is superseded), or why not, with the word
    /// that goes with it.
    pub fn open_lane(
        &self,
        lane: &OpenLane,
        host: &Host,
        route: Route,
        again: Option<u64>,
        may_take: &dyn Fn(&Uuid) -> Result<(), Refused>,
    ) -> Result<Option<(Arc<Disk>, u64)>, Refused> {
        let fenced = |refusal: Refusal| {
            let word = refusal.fenced_by().unwrap_or(0).into();
            (ErrorCode::Fenced, word, refusal.to_string())
        };
        let attach = lane.attach();
        let info = DiskInfo {
            uuid: Uuid::from_bytes(lane.disk_id),
            vm_uuid: Uuid::from_bytes(lane.vm_id),
            vm_name: lane.vm_name.clone(),
            name: lane.disk_label.clone(),
            capacity_bytes: lane.capacity_bytes,
        };
        let (disk, changed) = {
            let mut disks = self.disks.write();
            match disks.get(&lane.disk_id) {
                Some(disk) => {
                    // Asked under this lock: two machines that present a disk at once are one after the other.
                    may_take(&disk.info.read().vm_uuid)?;
                    // Nor may it describe what is not its own.
                    disk.may_open(attach, &lane.lineage).map_err(fenced)?;
                    let mut known = disk.info.write();
                    let mut info = info;
                    info.capacity_bytes = info.capacity_bytes.max(known.capacity_bytes);
                    let changed = *known != info;
                    *known = info;
                    (disk.clone(), changed)
                }
                None if disks.len() >= MAX_DISKS => {
                    let text = format!("this appliance serves at most {MAX_DISKS} disks");
                    return Err((ErrorCode::Limit, 0, text));
                }
                None => {
                    let disk = Arc::new(Disk::new(info));
                    if let Some(found) = self.in_store.lock().get(&lane.disk_id) {
                        disk.found_in_store(found.seq, found.attach_epoch);
                    }
                    disks.insert(lane.disk_id, disk.clone());
                    (disk, true)
                }
            }
        };
        let moved;
        {
            let mut described = disk.described.lock();
            let same = described.presented.is_same(&attach);
            let presented = described.presented.advanced(&attach);
            let presence = described.presence.presented(host, same);
            moved = presence != described.presence;
            described.owed |= changed || moved || presented != described.presented;
            (described.presented, described.presence) = (presented, presence);
        }
        // The opening alone is not worth a wait now: the next records wait for it.
        match self.log_owed(&lane.disk_id, &disk, &|| !changed && !moved) {
            Ok(()) | Err(LogError::GivenUp) => {}
            Err(error) => return Err((ErrorCode::Log, 0, error.to_string())),
        }
        if changed {
            self.described.fetch_add(1, Ordering::AcqRel); // pairs with the upload's load
        }
        let generation = disk
            .attach(attach, &lane.lineage, host.id, route, again)
            .map_err(fenced)?;
        let Some(generation) = generation else {
            return Ok(None);
        };
        self.presented_by(host.id);
        Ok(Some((disk, generation)))
    }

    /// A lane's channel has ended; `in_order`: its host says that the disk was closed in order.
    pub fn close_lane(&self, disk: &Disk, generation: u64, in_order: bool) {
        if disk.detach(generation, in_order) {
            // Lost, the disk counts as one that was not closed in order: nobody waits for room.
            let _ = self.write_down(disk, &|| true);
        }
    }

    /// Logs where a disk is, if that is owed.
    pub(crate) fn write_down(
        &self,
        disk: &Disk,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(), LogError> {
        let disk_id = disk.info.read().uuid.into_bytes();
        self.log_owed(&disk_id, disk, give_up)
    }

    /// An operator sets disks aside that are not to be waited for, or takes that back.
    pub fn set_aside(&self, disks: &[Arc<Disk>], aside: bool) -> Result<(), LogError> {
        for disk in disks {
            disk.change_presence(|presence| match (aside, presence.standing) {
                (true, _) => presence.standing = Standing::SetAside,
                (false, Standing::SetAside) => presence.standing = Standing::Open,
                (false, _) => {}
            });
            self.write_down(disk, &|| self.is_stopping())?;
        }
        Ok(())
    }

    /// Every host that ever had a disk of the domain, by name.
    pub fn hosts(&self) -> BTreeMap<HostId, String> {
        hosts_of(&self.disks.read())
    }

    /// An operator says that a host has left for good, and that nothing can be opened there any more.
    pub fn forget_host(&self, host: &HostId) -> Result<(), LogError> {
        let disks: Vec<Arc<Disk>> = self.disks.read().values().cloned().collect();
        for disk in disks {
            disk.change_presence(|presence| {
                presence.hosts.remove(host);
            });
            self.write_down(&disk, &|| self.is_stopping())?;
        }
        Ok(())
    }

    /// The container was opened for writing, and holds the disks up to here: what a log that was lost knew.
    pub fn found_in_store(&self, held: &BTreeMap<Uuid, DiskPosition>) {
        let held = held.iter().map(|(uuid, at)| (uuid.into_bytes(), *at));
        let held: BTreeMap<[u8; 16], DiskPosition> = held.collect();
        // Under the lock, so that none is presented between the two.
        let disks = self.disks.write();
        for (disk, at) in &held {
            if let Some(disk) = disks.get(disk) {
                disk.found_in_store(at.seq, at.attach_epoch);
            }
        }
        *self.in_store.lock() = held;
    }

    /// A host has a disk from now on: a cut that another was asked for is void, since what this one
    /// sends may be stamped with any epoch. Called before anything of it is taken.
    fn presented_by(&self, host: HostId) {
        let mut cuts = self.cuts.lock();
        let asked = cuts.outstanding.as_mut();
        if let Some(asked) = asked.filter(|asked| !asked.hosts.contains(&host)) {
            asked.void = true;
            self.cuts_changed.notify_all();
        }
    }

    /// Logs a disk's description, if the log is to have it before anything else of the disk. Waits for
    /// room, unless told to give up, and under no lock.
    fn log_owed(
        &self,
        disk_id: &[u8; 16],
        disk: &Disk,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(), LogError> {
        let content = |described: &Described| {
            let known = describe(&disk.info.read(), described);
            described.owed.then(|| known.into_bytes())
        };
        loop {
            let Some(expected) = content(&disk.described.lock()) else {
                return Ok(());
            };
            let permit = self.log.reserve(expected.len(), give_up)?;
            let mut described = disk.described.lock();
            match content(&described) {
                None => return Ok(()),
                // It has changed meanwhile, and is longer.
                Some(content) if content.len() > expected.len() => {}
                Some(content) => {
                    let entry = Submission::note(EntryKind::Disk, *disk_id, 0, content);
                    self.log.submit(permit, entry)?;
                    described.owed = false;
                    return Ok(());
                }
            }
        }
    }

    /// Records of a disk have come over a channel of this generation. Waits while the log is full.
    pub fn data(&self, disk: &Disk, generation: u64, content: Vec<u8>, len: usize) -> Outcome {
        // Before the records that rely on it: a disk that is put back to before them is found out by it.
        let disk_id = *disk.info.read().uuid.as_bytes();
        let superseded = || disk.is_superseded(generation);
        match self.log_owed(&disk_id, disk, &superseded) {
            Ok(()) => {}
            Err(LogError::GivenUp) => return Outcome::Superseded,
            Err(error) => return Outcome::Refused(ErrorCode::Log, 0, error.to_string()),
        }
        let (outcome, counted) = disk.take(&self.log, generation, content, len);
        let figures = &self.figures;
        // Relaxed: figures.
        figures
            .records
            .fetch_add(counted.records, Ordering::Relaxed);
        figures
            .received_bytes
            .fetch_add(counted.bytes, Ordering::Relaxed);
        figures
            .duplicates
            .fetch_add(counted.duplicates, Ordering::Relaxed);
        outcome
    }

    /// A host asks what a disk of its holds. Never waits: with too many questions nothing is known.
    pub fn ask(&self, ask: Ask) {
        if let Err(error) = self.asks.0.try_send(ask) {
            error.into_inner().answer(Vec::new());
        }
    }

    /// The log holds these positions durably: tells the hosts. Called by the log's writer.
    fn durable(&self, all: &[Durability]) {
        let now = now_ns();
        let disks = self.disks.read();
        for durable in all {
            let Some(disk) = disks.get(&durable.disk_id) else {
                continue;
            };
            disk.durable(durable);
            if durable.time_ns > 0 {
                let lag_us = now.saturating_sub(durable.time_ns) / 1000;
                self.figures.durable_lag_us.lock().saturating_record(lag_us);
            }
        }
        drop(disks);
        self.cuts_changed.notify_all();
    }

    /// Logs a closed cut's entry; waits for room.
    fn log_cut(&self, epoch: u32, content: String) -> Result<(), LogError> {
        let permit = self.log.reserve(content.len(), &|| false)?;
        let entry = Submission::note(EntryKind::Cut, [0; 16], epoch, content.into_bytes());
        self.log.submit(permit, entry)
    }

    /// Waits until every disk is durable up to its position. `false`: not in time, or the cut is void.
    pub fn wait_durable(&self, positions: &BTreeMap<[u8; 16], u64>, limit: Duration) -> bool {
        let deadline = std::time::Instant::now() + limit;
        let mut cuts = self.cuts.lock();
        loop {
            let disks = self.disks.read();
            let done = positions
                .iter()
                .all(|(id, seq)| disks.get(id).is_some_and(|disk| disk.durable_seq() >= *seq));
            drop(disks);
            if done {
                return true;
            }
            let void = cuts.outstanding.as_ref().is_some_and(|asked| asked.void);
            if void || std::time::Instant::now() >= deadline || self.is_stopping() {
                return false;
            }
            let soon = std::time::Instant::now() + Duration::from_millis(20);
            self.cuts_changed.wait_until(&mut cuts, soon.min(deadline));
        }
    }

    /// Logs a closed cut and hands it to the upload.
    pub fn close_cut(&self, cut: ClosedCut) -> Result<(), CloseError> {
        let (epoch, content) = (cut.epoch, cut_out(&cut));
        // In the list before the log has it: the upload must not feed beyond it meanwhile. A host that
        // presents a disk after this finds nothing to make void: what it sends lies beyond the cut.
        {
            let mut cuts = self.cuts.lock();
            let asked = cuts.outstanding.take_if(|asked| asked.epoch == epoch);
            if asked.is_none_or(|asked| asked.void) {
                return Err(CloseError::Moved);
            }
            cuts.closed.push_back(cut);
        }
        fault::point("drva.before-cut-logged");
        self.log_cut(epoch, content)?;
        fault::point("drva.after-cut-logged");
        self.cuts_changed.notify_all();
        Ok(())
    }

    /// Stops the log; what was queued is written.
    pub fn close(&self) {
        self.stopping.send_replace(true);
        let cuts = self.cuts.lock(); // whoever has looked and not yet waits would miss it
        self.cuts_changed.notify_all();
        drop(cuts);
        self.log.close();
    }

    /// Whether the appliance stops.
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Tells async work when the appliance stops.
    pub fn stopped(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Waits, but not when the appliance stops.
    pub fn pause(&self, time: Duration) {
        let until = std::time::Instant::now() + time;
        let mut cuts = self.cuts.lock();
        while !self.is_stopping() && !self.cuts_changed.wait_until(&mut cuts, until).timed_out() {}
    }
}
