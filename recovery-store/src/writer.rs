//! The writer of a container: feeds records into parts, uploads parts in order, commits cuts.
//!
//! Invariant: a part is in the store only if all parts before it are; each part covers, per disk, the
//! records that follow the part before; a cut's last part is written only when its positions are exactly
//! what was fed. So a container can be cut off after any object and is still valid.

use crate::builder::{
    DEFAULT_BLOCK_BYTES, DEFAULT_PART_BYTES, DiskState, Encoder, Fed, PartBuilder,
};
use crate::error::StoreError;
use crate::format::{Commit, DiskInfo, PartHeader, Position};
use crate::layout::{DomainInfo, FIRST_TIMELINE, PartName};
use crate::put::{AlarmFn, RetryPolicy, Target};
use crate::reader::Container;
use crate::upload::{ChainEnd, PartJob, Shared, position_of};
use crate::url::StoreUrl;
use filter_core::mutant::{Guard, holds};
use filter_core::record::{FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, FLAG_SYNC_END, RecordRef};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// How a writer works.
#[derive(Clone)]
pub struct WriterOptions {
    /// Raw bytes after which a part is finished; brought into 64 KiB..=16 MiB.
    pub part_bytes: usize,
    /// Raw bytes of a block; brought into 4..=256 KiB.
    pub block_bytes: usize,
    /// zstd's level.
    pub zstd_level: i32,
    /// What to do when the store fails.
    pub retry: RetryPolicy,
    /// Told at each failed attempt to upload.
    pub alarm: Option<AlarmFn>,
    /// Written to a new container's timeline, for people.
    pub owner: String,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            part_bytes: DEFAULT_PART_BYTES,
            block_bytes: DEFAULT_BLOCK_BYTES,
            zstd_level: 1,
            retry: RetryPolicy::default(),
            alarm: None,
            owner: "drva".into(),
        }
    }
}

/// How far the container has a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskPosition {
    /// The last record; 0 for none.
    pub seq: u64,
    /// The highest attach epoch.
    pub attach_epoch: u32,
    /// Whether a sync is under way at that record (no cut can close there).
    pub sync_open: bool,
}

/// What the caller says of a cut.
#[derive(Clone, Debug, Default)]
pub struct CutMeta {
    /// The hosts' cut epoch that it closes.
    pub cut_epoch: u32,
    /// When it was closed, ns since 1970.
    pub time_ns: u64,
    /// The operator's name for it.
    pub name: Option<String>,
    /// Per disk of the domain, its last record in the cut: exactly what was fed.
    pub positions: BTreeMap<Uuid, u64>,
    /// Disks with content that are not in the cut, and are meant not to be. Their records are stored all
    /// the same: a later cut may have them again.
    pub left_out: BTreeSet<Uuid>,
}

/// A cut that the store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitDone {
    /// Its number.
    pub cut: u64,
    /// Its parts.
    pub parts: u32,
    /// Records in it, as far as this writer fed them.
    pub records: u64,
    /// Raw data bytes in its parts.
    pub raw_bytes: u64,
}

/// Totals of a writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriterStats {
    /// Records fed that were not old.
    pub records: u64,
    /// Payload bytes of these.
    pub fed_bytes: u64,
    /// Raw data bytes that survived within their part, uploaded.
    pub raw_bytes: u64,
    /// Bytes of the objects uploaded.
    pub stored_bytes: u64,
    /// Objects uploaded.
    pub parts: u64,
    /// Cuts committed.
    pub cuts: u64,
}

/// The one writer of a container's timeline.
pub struct CutWriter {
    target: Arc<Target>,
    domain: Uuid,
    timeline: u32,
    options: WriterOptions,
    /// The cut being fed, and its next part.
    cut: u64,
    next_part: u32,
    disks: BTreeMap<Uuid, DiskState>,
    builder: PartBuilder,
    cut_records: u64,
    cut_changed: bool,
    /// The chain's end, while no part is under way; else the task that will give it back.
    chain: Option<ChainEnd>,
    under_way: Option<JoinHandle<Result<ChainEnd, StoreError>>>,
    broken: Option<String>,
    shared: Arc<Mutex<Shared>>,
}

impl CutWriter {
    /// Opens the container at `url` for writing: creates it, or goes on after its last part.
    pub async fn open(
        url: &StoreUrl,
        domain: &DomainInfo,
        options: WriterOptions,
    ) -> Result<Self, StoreError> {
        let (store, prefix) = url.open(true)?;
        let target = Target {
            store,
            prefix,
            location: url.to_string(),
            retry: options.retry.clone(),
            alarm: options.alarm.clone(),
        };
        Self::open_target(target, domain, options).await
    }

    /// The same on a store that the caller made, such as one in memory.
    pub async fn open_store(
        store: Arc<dyn object_store::ObjectStore>,
        location: &str,
        domain: &DomainInfo,
        options: WriterOptions,
    ) -> Result<Self, StoreError> {
        let target = Target {
            store,
            prefix: object_store::path::Path::default(),
            location: location.to_owned(),
            retry: options.retry.clone(),
            alarm: options.alarm.clone(),
        };
        Self::open_target(target, domain, options).await
    }

    async fn open_target(
        target: Target,
        domain: &DomainInfo,
        mut options: WriterOptions,
    ) -> Result<Self, StoreError> {
        options.part_bytes = options.part_bytes.clamp(64 << 10, 16 << 20);
        options.block_bytes = options.block_bytes.clamp(4 << 10, 256 << 10);
        let container = Container::create(target, domain, &options.owner).await?;
        let end = container.chain_end(FIRST_TIMELINE).await?;
        let encoder = Encoder::new(options.zstd_level, options.block_bytes)?;
        let uploaded = end
            .disks
            .iter()
            .map(|(uuid, disk)| (*uuid, position_of(disk)))
            .collect();
        let (cut, next_part) = match end.newest {
            None => (1, 1),
            Some((name, true)) => (name.cut + 1, 1),
            Some((name, false)) => (name.cut, name.part + 1),
        };
        Ok(Self {
            target: container.into_target(),
            domain: domain.uuid,
            timeline: FIRST_TIMELINE,
            options,
            cut,
            next_part,
            disks: end.disks,
            builder: PartBuilder::default(),
            cut_records: 0,
            cut_changed: next_part > 1,
            chain: Some(ChainEnd {
                encoder,
                previous: end.previous,
                cut_raw_bytes: end.cut_raw_bytes,
                spare: Vec::new(),
            }),
            under_way: None,
            broken: None,
            shared: Arc::new(Mutex::new(Shared {
                uploaded,
                stats: WriterStats::default(),
            })),
        })
    }

    /// Announces a disk, or a change of its description. A capacity may only grow.
    pub fn set_disk(&mut self, info: DiskInfo) -> Result<(), StoreError> {
        let refuse = |reason: String| {
            Err(StoreError::Disk {
                disk: info.uuid,
                reason,
            })
        };
        if info.name.len().max(info.vm_name.len()) > crate::format::MAX_NAME_BYTES {
            return refuse("its name, or its VM's, is too long".into());
        }
        if info.capacity_bytes > filter_core::record::MAX_DISK_BYTES {
            return refuse(format!(
                "a capacity of {} bytes is too large",
                info.capacity_bytes
            ));
        }
        if let Some(state) = self.disks.get_mut(&info.uuid) {
            if info.capacity_bytes < state.info.capacity_bytes {
                return refuse(format!(
                    "its capacity would shrink from {} to {} bytes",
                    state.info.capacity_bytes, info.capacity_bytes
                ));
            }
            if state.info != info {
                state.info = info;
                state.info_changed = true;
            }
            return Ok(());
        }
        if self.disks.len() >= crate::format::MAX_DISKS as usize {
            return refuse("the container has too many disks".into());
        }
        let state = DiskState {
            seq: 0,
            attach_epoch: 0,
            sync_open: false,
            info_changed: true,
            info,
        };
        self.disks.insert(state.info.uuid, state);
        Ok(())
    }

    /// The disk is no longer in the domain: later cuts do not have it, earlier ones keep it.
    pub fn remove_disk(&mut self, disk: Uuid) {
        self.builder.forget(disk);
        self.cut_changed |= self.disks.remove(&disk).is_some();
        self.shared.lock().uploaded.remove(&disk);
    }

    /// Per disk, the last record that the store holds, in a committed cut or not.
    pub fn uploaded_positions(&self) -> BTreeMap<Uuid, DiskPosition> {
        self.shared.lock().uploaded.clone()
    }

    /// Per disk, the last record that was fed.
    pub fn fed_positions(&self) -> BTreeMap<Uuid, DiskPosition> {
        self.disks
            .iter()
            .map(|(uuid, disk)| (*uuid, position_of(disk)))
            .collect()
    }

    /// Whether a record is of an older epoch than the container holds of its disk: `feed` would refuse it.
    pub fn is_behind(&self, disk: Uuid, record: &filter_core::record::RecordHeader) -> bool {
        let known = self.disks.get(&disk);
        known.is_some_and(|known| record.attach_epoch < known.attach_epoch)
    }

    /// The descriptions of the disks that the writer knows (after `open`: those in the container).
    pub fn disks(&self) -> impl Iterator<Item = &DiskInfo> {
        self.disks.values().map(|disk| &disk.info)
    }

    /// The number that the next commit gets.
    pub fn open_cut(&self) -> u64 {
        self.cut
    }

    /// Whether anything was fed or changed since the last commit.
    pub fn has_changes(&self) -> bool {
        self.cut_changed || !self.builder.is_empty() || self.disks.values().any(|d| d.info_changed)
    }

    /// Totals so far.
    pub fn stats(&self) -> WriterStats {
        self.shared.lock().stats
    }

    /// Takes a record into the current part. Never waits.
    pub fn feed(&mut self, disk: Uuid, record: &RecordRef<'_>) -> Result<Fed, StoreError> {
        self.check_usable()?;
        let header = &record.header;
        let state = self
            .disks
            .get_mut(&disk)
            .ok_or(StoreError::UnknownDisk(disk))?;
        if header.seq <= state.seq {
            return Ok(Fed::Old);
        }
        if header.attach_epoch < state.attach_epoch {
            return Err(StoreError::StaleEpoch {
                disk,
                seq: header.seq,
                got: header.attach_epoch,
                have: state.attach_epoch,
            });
        }
        let stream_base = header.flags & FLAG_STREAM_BASE != 0;
        let expected = state.seq + 1;
        if header.seq != expected && !stream_base {
            return Err(StoreError::SeqGap {
                disk,
                expected,
                got: header.seq,
            });
        }
        if header.flags & FLAG_SYNC_BEGIN != 0 {
            state.sync_open = true;
        }
        if header.flags & FLAG_SYNC_END != 0 {
            state.sync_open = false;
        }
        if header.end_bytes() > state.info.capacity_bytes {
            // The disk took the write, so it is at least that large; its description comes later.
            tracing::warn!(%disk, end_bytes = header.end_bytes(), "a record ends beyond the disk's known capacity: the disk has grown");
            state.info.capacity_bytes = header.end_bytes();
            state.info_changed = true;
        }
        state.seq = header.seq;
        state.attach_epoch = header.attach_epoch;
        self.builder.take(disk, record, stream_base);
        self.cut_records += 1;
        self.cut_changed = true;
        {
            let stats = &mut self.shared.lock().stats;
            stats.records += 1;
            stats.fed_bytes += record.payload.len() as u64;
        }
        Ok(if self.builder.is_full(self.options.part_bytes) {
            Fed::PartFull
        } else {
            Fed::Taken
        })
    }

    /// Takes a record; when the part is full, starts its upload, after the one before it is done.
    pub async fn apply(&mut self, disk: Uuid, record: &RecordRef<'_>) -> Result<Fed, StoreError> {
        let fed = self.feed(disk, record)?;
        if fed == Fed::PartFull {
            self.flush_part().await?;
            return Ok(Fed::Taken);
        }
        Ok(fed)
    }

    /// Finishes the current part, if anything is in it, and starts its upload. Waits only for the
    /// part before it: one is uploaded while the next is filled.
    pub async fn flush_part(&mut self) -> Result<(), StoreError> {
        self.check_usable()?;
        if self.builder.is_empty() {
            return Ok(());
        }
        self.start_part(None).await
    }

    /// Waits until every finished part is in the store.
    pub async fn settle(&mut self) -> Result<(), StoreError> {
        self.check_usable()?;
        self.join_part().await
    }

    /// Waits for the part under way. The handle stays until the result is here, so that a caller who
    /// stops waiting loses nothing.
    async fn join_part(&mut self) -> Result<(), StoreError> {
        if let Some(task) = &mut self.under_way {
            let result = task
                .await
                .unwrap_or_else(|error| Err(StoreError::Task(error.to_string())));
            self.under_way = None;
            self.chain = Some(result.map_err(|error| self.break_off(error))?);
        }
        Ok(())
    }

    /// Ends the writer after the part under way, if any, has arrived or failed. What was fed and not
    /// flushed is dropped: the next writer asks for it again. Call it before another writer is opened
    /// in the same process, else the part under way may collide with the other's.
    pub async fn close(mut self) {
        if let Some(task) = self.under_way.take() {
            // Its failure has no consequence: the next writer goes by what the store holds.
            let _ = task.await;
        }
    }

    /// Closes the cut: uploads what is left, with the commit in the last part. When this returns, the
    /// store holds the cut. A refusal ([`StoreError::Commit`]) changes nothing.
    pub async fn commit(&mut self, meta: CutMeta) -> Result<CommitDone, StoreError> {
        self.check_usable()?;
        self.check_commit(&meta)?;
        let done = CommitDone {
            cut: self.cut,
            parts: self.next_part,
            records: self.cut_records,
            raw_bytes: 0,
        };
        let commit = Commit {
            cut_epoch: meta.cut_epoch,
            time_ns: meta.time_ns,
            parts: self.next_part,
            records: self.cut_records,
            raw_bytes: 0,
            name: meta.name,
            positions: meta
                .positions
                .iter()
                .map(|(disk, seq)| Position {
                    disk: *disk,
                    seq: *seq,
                })
                .collect(),
        };
        self.start_part(Some(commit)).await?;
        // If the caller stops waiting here, whether the cut is there is for the next writer to find out.
        self.broken = Some("the wait for a commit was given up".into());
        if holds(Guard::CommitAwaited) {
            self.join_part().await?;
        }
        self.broken = None;
        let raw_bytes = match &mut self.chain {
            Some(chain) => std::mem::take(&mut chain.cut_raw_bytes),
            None => 0,
        };
        self.cut += 1;
        self.next_part = 1;
        self.cut_records = 0;
        self.cut_changed = false;
        self.shared.lock().stats.cuts += 1;
        Ok(CommitDone { raw_bytes, ..done })
    }

    fn check_commit(&self, meta: &CutMeta) -> Result<(), StoreError> {
        let refuse = |reason: String| {
            Err(StoreError::Commit {
                cut: self.cut,
                reason,
            })
        };
        if meta
            .name
            .as_ref()
            .is_some_and(|name| name.len() > crate::format::MAX_NAME_BYTES)
        {
            return refuse("its name is too long".into());
        }
        for (disk, seq) in &meta.positions {
            match self.disks.get(disk) {
                None => return refuse(format!("disk {disk} is not registered")),
                Some(state) if state.sync_open => {
                    return refuse(format!("disk {disk} is in the middle of a sync"));
                }
                Some(state) if state.seq == 0 => {
                    return refuse(format!("disk {disk} has no content yet"));
                }
                Some(state) if state.seq != *seq => {
                    return refuse(format!(
                        "disk {disk} is at record {}, the cut wants {seq}",
                        state.seq
                    ));
                }
                Some(_) => {}
            }
        }
        // A disk that is left out by mistake would silently not be recoverable.
        for (disk, state) in &self.disks {
            let named = meta.positions.contains_key(disk) || meta.left_out.contains(disk);
            if state.seq > 0 && !named {
                return refuse(format!(
                    "disk {disk} has no position in it (remove the disk if it left the domain)"
                ));
            }
        }
        Ok(())
    }

    fn check_usable(&self) -> Result<(), StoreError> {
        match &self.broken {
            Some(reason) => Err(StoreError::Poisoned(reason.clone())),
            None => Ok(()),
        }
    }

    fn break_off(&mut self, error: StoreError) -> StoreError {
        self.broken = Some(error.to_string());
        error
    }

    /// Hands the current part to a task that compresses and uploads it.
    async fn start_part(&mut self, commit: Option<Commit>) -> Result<(), StoreError> {
        self.join_part().await?;
        let Some(mut chain) = self.chain.take() else {
            let error = StoreError::Task("the end of the chain is unknown".into());
            return Err(self.break_off(error));
        };
        let name = PartName {
            timeline: self.timeline,
            cut: self.cut,
            part: self.next_part,
        };
        self.next_part += 1;
        let header = PartHeader {
            domain: self.domain,
            timeline: name.timeline,
            cut: name.cut,
            part: name.part,
            commit: commit.is_some(),
            previous: chain.previous,
            time_ns: now_ns(),
        };
        let spare = std::mem::take(&mut chain.spare);
        let part = std::mem::replace(&mut self.builder, PartBuilder::with_arena(spare));
        let disks = self.disks.clone();
        for disk in self.disks.values_mut() {
            disk.info_changed = false;
        }
        let job = PartJob {
            target: self.target.clone(),
            shared: self.shared.clone(),
            name,
            header,
            part,
            disks,
            commit,
        };
        self.under_way = Some(tokio::spawn(job.run(chain)));
        Ok(())
    }
}

impl Drop for CutWriter {
    fn drop(&mut self) {
        // Else a part of this writer could still arrive after the next one has looked at the store. (A
        // request that is out already may: then the next writer meets a conflict and must open again.)
        if let Some(task) = &self.under_way {
            task.abort();
        }
    }
}

pub(crate) fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}
