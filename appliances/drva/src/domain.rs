//! A protected domain in the appliance: its disks, its log, where each disk stands.
//!
//! Invariant: records of a disk reach the log in seq order, each once: admitting and queueing happen
//! under the disk's lock, whichever connection they come over.

use crate::log::format::EntryKind;
use crate::log::recover::Recovered;
use crate::log::{Durability, Log, LogError, LogOptions, Submission};
use crate::session::Outbox;
use filter_core::position::Received;
use filter_core::record::{FLAG_SYNC_BEGIN, FLAG_SYNC_END, RecordIter};
use filter_core::session::{Admit, Receiver, Refusal};
use filter_core::wire::{ErrorCode, OpenLane};
use hdrhistogram::Histogram;
use parking_lot::{Condvar, Mutex, RwLock};
use recovery_store::DiskInfo;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Disks of one appliance, at most.
pub const MAX_DISKS: usize = 500;

/// Time since 1970, in ns.
pub fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64)
}

/// Where acknowledgements of a disk go.
pub struct Route {
    /// The connection's outbox.
    pub outbox: Arc<Outbox>,
    /// The channel on it.
    pub channel: u32,
}

/// Begin and end of the last syncs of a stream.
#[derive(Debug, Default)]
struct Brackets(VecDeque<(u64, u64)>);

impl Brackets {
    fn note(&mut self, seq: u64, begin: bool) {
        if begin {
            if self.0.len() == 16 {
                self.0.pop_front();
            }
            self.0.push_back((seq, u64::MAX));
        } else {
            // An END closes every begun one: a sync that was broken off begins again.
            for bracket in self.0.iter_mut().filter(|bracket| bracket.1 == u64::MAX) {
                bracket.1 = seq;
            }
        }
    }

    /// Whether the replica is not consistent once everything up to `seq` was applied.
    fn open_at(&self, seq: u64) -> bool {
        self.0
            .iter()
            .any(|(begin, end)| *begin <= seq && seq < *end)
    }
}

struct DiskStream {
    receiver: Receiver,
    brackets: Brackets,
    /// Tells the present channel from earlier ones.
    generation: u64,
}

/// A disk of a domain.
pub struct Disk {
    stream: Mutex<DiskStream>,
    /// Last durable seq.
    pub durable: AtomicU64,
    /// Last seq in the store.
    pub uploaded: AtomicU64,
    /// Where acknowledgements go.
    pub route: Mutex<Option<Route>>,
    /// Its description.
    pub info: RwLock<DiskInfo>,
    /// The host that presents it.
    pub host: Mutex<[u8; 16]>,
}

impl Disk {
    fn new(info: DiskInfo, receiver: Receiver, durable: u64) -> Self {
        let stream = DiskStream {
            receiver,
            brackets: Brackets::default(),
            generation: 0,
        };
        Self {
            stream: Mutex::new(stream),
            durable: AtomicU64::new(durable),
            uploaded: AtomicU64::new(0),
            route: Mutex::new(None),
            info: RwLock::new(info),
            host: Mutex::new([0; 16]),
        }
    }

    /// Last seq received, newest epoch, whether a sync is under way.
    pub fn received(&self) -> (u64, u32, bool) {
        let stream = self.stream.lock();
        let receiver = &stream.receiver;
        (
            receiver.received().0,
            receiver.attach_epoch(),
            receiver.syncing(),
        )
    }

    /// Whether a cut may end at this seq.
    pub fn consistent_at(&self, seq: u64) -> bool {
        !self.stream.lock().brackets.open_at(seq)
    }
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
}

/// What the upload may feed, and what waits for it.
#[derive(Default)]
pub struct CutState {
    /// Cuts in the log that the store does not hold.
    pub closed: VecDeque<ClosedCut>,
    /// A cut that was asked for and not yet closed or void: its epoch.
    pub outstanding: Option<u32>,
    /// The newest epoch ever asked for or seen.
    pub last_epoch: u32,
    /// The newest cut in the store: number, name, time.
    pub newest: Option<(u64, Option<String>, u64)>,
    /// Names that operators asked for, not yet taken.
    pub wanted: VecDeque<String>,
    /// Bumped when a cut was committed or given up: who waits looks again.
    pub resolved: u64,
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
    /// Figures.
    pub figures: Figures,
    /// Something an operator should know; the newest first.
    pub alarms: Mutex<BTreeMap<&'static str, String>>,
    /// The appliance stops.
    pub stopping: AtomicBool,
}

/// A lane that was opened.
pub struct Opened {
    /// Its disk.
    pub disk: Arc<Disk>,
    /// Tells this channel from earlier ones of the disk.
    pub generation: u64,
    /// Last durable seq.
    pub durable_seq: u64,
    /// Newest attach epoch seen.
    pub attach_epoch: u32,
}

/// What a DATA frame led to.
pub enum Outcome {
    /// Taken.
    Taken,
    /// The channel is not the disk's present one.
    Superseded,
    /// Refused.
    Refused(ErrorCode, u64, String),
}

impl Domain {
    /// Opens the domain's log in `dir`, makes out of it where every disk stands.
    pub fn open(name: &str, dir: &Path, options: LogOptions) -> Result<Arc<Self>, LogError> {
        let id = domain_id(name, dir)?;
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
            let Ok(info) = describe_back(*disk_id, &state.description) else {
                tracing::error!("domain {name}: the description of a disk in the log is malformed");
                continue;
            };
            let (seq, syncing) = (Received(state.last_seq), state.sync_begin != 0);
            let receiver = Receiver::restored(seq, state.attach_epoch, syncing);
            let disk = Disk::new(info, receiver, state.last_seq);
            if syncing {
                disk.stream.lock().brackets.note(state.sync_begin, true);
            }
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
            figures: Figures::default(),
            alarms: Mutex::default(),
            stopping: AtomicBool::new(false),
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

    /// A host presents a lane.
    pub fn open_lane(
        &self,
        lane: &OpenLane,
        host: [u8; 16],
        route: Route,
    ) -> Result<Opened, (ErrorCode, String)> {
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
                    let mut known = disk.info.write();
                    let mut info = info;
                    info.capacity_bytes = info.capacity_bytes.max(known.capacity_bytes);
                    let changed = *known != info;
                    *known = info;
                    (disk.clone(), changed)
                }
                None if disks.len() >= MAX_DISKS => {
                    let text = format!("this appliance serves at most {MAX_DISKS} disks");
                    return Err((ErrorCode::Limit, text));
                }
                None => {
                    let disk = Arc::new(Disk::new(info, Receiver::new(), 0));
                    disks.insert(lane.disk_id, disk.clone());
                    (disk, true)
                }
            }
        };
        if changed {
            let content = describe(&disk.info.read()).into_bytes();
            let entry = Submission {
                kind: EntryKind::Disk,
                disk_id: lane.disk_id,
                first_seq: 0,
                last_seq: 0,
                epoch: 0,
                time_ns: 0,
                len: content.len(),
                content,
            };
            self.log
                .submit(entry)
                .map_err(|e| (ErrorCode::Log, e.to_string()))?;
            self.described.fetch_add(1, Ordering::AcqRel);
        }
        let mut stream = disk.stream.lock();
        let opened = stream.receiver.open(lane.attach_epoch);
        opened.map_err(|refusal| (ErrorCode::Fenced, refusal.to_string()))?;
        stream.generation += 1;
        let (generation, attach_epoch) = (stream.generation, stream.receiver.attach_epoch());
        *disk.host.lock() = host;
        *disk.route.lock() = Some(route);
        let durable_seq = disk.durable.load(Ordering::Acquire);
        drop(stream);
        Ok(Opened {
            disk,
            generation,
            durable_seq,
            attach_epoch,
        })
    }

    /// Records of a disk have come over a channel of this generation. Waits while the log is full.
    pub fn data(&self, disk: &Disk, generation: u64, content: Vec<u8>, len: usize) -> Outcome {
        let mut stream = disk.stream.lock();
        if stream.generation != generation {
            return Outcome::Superseded;
        }
        let disk_id = *disk.info.read().uuid.as_bytes();
        let bytes = content.get(..len).unwrap_or_default();
        let mut skip = 0; // bytes of records that are there already
        let mut end = 0;
        let mut first = None;
        let mut last = (0, 0, 0);
        let mut refusal = None;
        for record in RecordIter::with_crc(bytes, crc32c::crc32c_append) {
            let header = match record {
                Ok(record) => record.header,
                Err(error) => {
                    let seq = stream.receiver.received().0 + 1;
                    refusal = Some((ErrorCode::Corrupt, seq, error.to_string()));
                    break;
                }
            };
            match stream.receiver.admit(&header) {
                Ok(Admit::Duplicate) => {
                    skip += header.span_bytes();
                    end = skip;
                    self.figures.duplicates.fetch_add(1, Ordering::Relaxed); // a figure
                    continue;
                }
                Ok(Admit::Append) => {}
                Err(error) => {
                    let code = match error {
                        Refusal::Gap { .. } => ErrorCode::Gap,
                        Refusal::Fenced { .. } => ErrorCode::Fenced,
                    };
                    refusal = Some((code, header.seq, error.to_string()));
                    break;
                }
            }
            if header.flags & (FLAG_SYNC_BEGIN | FLAG_SYNC_END) != 0 {
                stream
                    .brackets
                    .note(header.seq, header.flags & FLAG_SYNC_BEGIN != 0);
            }
            first.get_or_insert(header.seq);
            last = (header.seq, header.attach_epoch, header.time_ns);
            end += header.span_bytes();
            self.figures.records.fetch_add(1, Ordering::Relaxed); // a figure
        }
        if let Some(first_seq) = first {
            self.figures
                .received_bytes
                .fetch_add((end - skip) as u64, Ordering::Relaxed); // a figure
            let (mut content, len) = (content, end - skip);
            if skip > 0 {
                content.copy_within(skip..end, 0);
            }
            let (last_seq, epoch, time_ns) = last;
            let kind = EntryKind::Run;
            let entry = Submission {
                kind,
                disk_id,
                first_seq,
                last_seq,
                epoch,
                time_ns,
                content,
                len,
            };
            // Still under the disk's lock: what comes over another connection must queue behind.
            if let Err(error) = self.log.submit(entry) {
                return Outcome::Refused(ErrorCode::Log, first_seq, error.to_string());
            }
        }
        match refusal {
            None => Outcome::Taken,
            Some((code, seq, text)) => {
                stream.generation += 1; // nothing more over this channel
                Outcome::Refused(code, seq, text)
            }
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
            disk.durable.store(durable.seq, Ordering::Release); // pairs with `open_lane`
            if durable.time_ns > 0 {
                let lag_us = now.saturating_sub(durable.time_ns) / 1000;
                self.figures.durable_lag_us.lock().saturating_record(lag_us);
            }
            let uploaded = disk.uploaded.load(Ordering::Relaxed); // a figure for the host
            if let Some(route) = disk.route.lock().as_ref() {
                route
                    .outbox
                    .acknowledge(route.channel, durable.seq, uploaded);
            }
        }
        drop(disks);
        self.cuts_changed.notify_all();
    }

    /// Waits until every disk is durable up to its position.
    pub fn wait_durable(&self, positions: &BTreeMap<[u8; 16], u64>, limit: Duration) -> bool {
        let deadline = std::time::Instant::now() + limit;
        let mut cuts = self.cuts.lock();
        loop {
            let disks = self.disks.read();
            let done = positions.iter().all(|(id, seq)| {
                disks
                    .get(id)
                    .is_some_and(|disk| disk.durable.load(Ordering::Acquire) >= *seq)
            });
            drop(disks);
            if done {
                return true;
            }
            if std::time::Instant::now() >= deadline || self.stopping.load(Ordering::Acquire) {
                return false;
            }
            let soon = std::time::Instant::now() + Duration::from_millis(20);
            self.cuts_changed.wait_until(&mut cuts, soon.min(deadline));
        }
    }

    /// Logs a closed cut and hands it to the upload.
    pub fn close_cut(&self, cut: ClosedCut) -> Result<(), LogError> {
        let content = cut_out(&cut).into_bytes();
        let entry = Submission {
            kind: EntryKind::Cut,
            disk_id: [0; 16],
            first_seq: 0,
            last_seq: 0,
            epoch: cut.epoch,
            time_ns: 0,
            len: content.len(),
            content,
        };
        // In the list before the log has it: the upload must not feed beyond it meanwhile.
        {
            let mut cuts = self.cuts.lock();
            cuts.outstanding = None;
            cuts.closed.push_back(cut);
        }
        self.log.submit(entry)?;
        self.cuts_changed.notify_all();
        Ok(())
    }

    /// Stops the log; what was queued is written.
    pub fn close(&self) {
        self.stopping.store(true, Ordering::Release); // pairs with the loads
        self.cuts_changed.notify_all();
        self.log.close();
    }
}

/// The domain's id: made when its folder is, kept in it.
fn domain_id(name: &str, dir: &Path) -> Result<[u8; 16], LogError> {
    let error = |what, source| LogError::Io {
        what,
        path: dir.to_owned(),
        source,
    };
    std::fs::create_dir_all(dir).map_err(|e| error("make the folder", e))?;
    let path = dir.join("domain-id");
    if !path.exists() {
        std::fs::write(&path, Uuid::new_v4().simple().to_string())
            .map_err(|e| error("write domain-id in", e))?;
    }
    let text = std::fs::read_to_string(&path).map_err(|e| error("read domain-id in", e))?;
    filter_core::mapping::parse_id(&text).ok_or_else(|| {
        let text = format!("domain-id of {name} does not hold 32 hex digits");
        error(
            "understand",
            std::io::Error::new(std::io::ErrorKind::InvalidData, text),
        )
    })
}

fn describe(info: &DiskInfo) -> String {
    serde_json::json!({
        "vm_uuid": info.vm_uuid.to_string(),
        "vm_name": info.vm_name,
        "name": info.name,
        "capacity_bytes": info.capacity_bytes,
    })
    .to_string()
}

fn describe_back(disk_id: [u8; 16], text: &[u8]) -> Result<DiskInfo, serde_json::Error> {
    let value: serde_json::Value = serde_json::from_slice(text)?;
    let string = |key: &str| value.get(key).and_then(|v| v.as_str()).unwrap_or_default();
    Ok(DiskInfo {
        uuid: Uuid::from_bytes(disk_id),
        vm_uuid: Uuid::parse_str(string("vm_uuid")).unwrap_or_default(),
        vm_name: string("vm_name").into(),
        name: string("name").into(),
        capacity_bytes: value
            .get("capacity_bytes")
            .and_then(|v| v.as_u64())
            .unwrap_or(0),
    })
}

fn cut_out(cut: &ClosedCut) -> String {
    let positions: BTreeMap<String, u64> = cut
        .positions
        .iter()
        .map(|(disk, seq)| (disk.to_string(), *seq))
        .collect();
    serde_json::json!({"time_ns": cut.time_ns, "name": cut.name, "positions": positions})
        .to_string()
}

fn cut_back(epoch: u32, text: &[u8]) -> Option<ClosedCut> {
    let value: serde_json::Value = serde_json::from_slice(text).ok()?;
    let mut positions = BTreeMap::new();
    for (disk, seq) in value.get("positions")?.as_object()? {
        positions.insert(Uuid::parse_str(disk).ok()?, seq.as_u64()?);
    }
    Some(ClosedCut {
        epoch,
        time_ns: value.get("time_ns")?.as_u64()?,
        name: value.get("name").and_then(|v| v.as_str()).map(String::from),
        positions,
    })
}
