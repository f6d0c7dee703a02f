//! The appliance's upload as one task: the log's reader, the rules of what may be fed, the container's
//! writer.
//!
//! Invariant: as in `drva::upload`, whose steps these are, without its threads: a cut is committed when
//! exactly its records were fed; what must wait stays in the log.

use crate::appliance::Domain;
use drva::log::format::{Entries, EntryKind};
use drva::log::reader::Reader;
use filter_core::mutant::{Guard, holds};
use filter_core::record::RecordIter;
use object_store::ObjectStore;
use recovery_store::{CutMeta, CutWriter, DomainInfo, Fed, RetryPolicy, StoreError, WriterOptions};
use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use uuid::Uuid;

/// Wait before a store that failed is opened again.
const REOPEN: Duration = Duration::from_secs(1);

/// What the upload tells the rest.
#[derive(Clone, Debug)]
pub enum Post {
    /// The store holds a new cut: its number, its epoch.
    Committed(u64, u32),
    /// The container refused a closed cut.
    Void(u32, String),
    /// Segments of the log were freed, or hosts are to be told what is uploaded.
    Told,
    /// The store failed.
    Failed(String),
    /// The container cannot be opened, and never will.
    Broken(String),
}

/// What the upload shares with the rest of the appliance.
pub struct Shared {
    /// The domain.
    pub domain: Domain,
    /// What it told.
    pub posts: Vec<Post>,
    /// The upload has something to do, or waits for the store.
    pub busy: bool,
}

/// An upload.
pub struct Upload {
    /// What it shares.
    pub shared: Rc<RefCell<Shared>>,
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// Notified when there may be something to do.
    pub work: Rc<Notify>,
    /// Notified when something was told.
    pub told: Rc<Notify>,
    /// Bytes of a part.
    pub part_bytes: usize,
}

#[derive(Default)]
struct Held {
    batch: Option<u64>,
    disks: HashSet<[u8; 16]>,
    limit: u32,
}

struct Attempt<'a> {
    of: &'a Upload,
    writer: CutWriter,
    reader: Reader,
    described: u32,
    held: Held,
}

impl Upload {
    fn post(&self, post: Post) {
        self.shared.borrow_mut().posts.push(post);
        self.told.notify_one();
    }

    /// Runs until it is aborted.
    pub async fn run(self) {
        loop {
            let failed = match self.attempt().await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            let lasting = matches!(
                failed,
                StoreError::Chain { .. } | StoreError::Missing { .. } | StoreError::Format { .. }
            );
            let text = failed.to_string();
            if lasting {
                self.post(Post::Broken(text));
            } else {
                self.post(Post::Failed(text));
            }
            tokio::time::sleep(REOPEN).await; // virtual: the clock is paused
        }
    }

    async fn attempt(&self) -> Result<std::convert::Infallible, StoreError> {
        let id = self.shared.borrow().domain.id;
        let info = DomainInfo::new(Uuid::from_bytes(id), "sim");
        let options = WriterOptions {
            part_bytes: self.part_bytes,
            retry: RetryPolicy {
                max_attempts: 3,
                first_wait: Duration::from_millis(200),
                max_wait: Duration::from_secs(2),
            },
            ..WriterOptions::default()
        };
        let writer = CutWriter::open_store(self.store.clone(), "memory", &info, options).await?;
        let first = self.shared.borrow().domain.log.first_segment();
        let mut attempt = Attempt {
            of: self,
            writer,
            reader: Reader::new(first),
            described: 0,
            held: Held::default(),
        };
        let Err(error) = attempt.run().await;
        attempt.writer.close().await;
        Err(error)
    }
}

impl Attempt<'_> {
    async fn run(&mut self) -> Result<std::convert::Infallible, StoreError> {
        self.drop_committed_cuts();
        loop {
            if self.step().await? {
                continue;
            }
            if self.of.shared.borrow().domain.log.full {
                self.writer.flush_part().await?;
                self.writer.settle().await?;
            }
            self.tell();
            self.of.shared.borrow_mut().busy = false;
            self.of.told.notify_one();
            self.of.work.notified().await;
        }
    }

    async fn step(&mut self) -> Result<bool, StoreError> {
        self.describe()?;
        self.release_held();
        let next = self.reader.next(&self.of.shared.borrow().domain.log);
        match next {
            Ok(Some((number, body))) => {
                self.feed(number, &body).await?;
                self.commit_next().await?;
                Ok(true)
            }
            Ok(None) => self.commit_next().await,
            Err(error) => {
                self.of
                    .post(Post::Broken(format!("reading the log: {error}")));
                tokio::time::sleep(REOPEN).await; // virtual
                self.reader.rewind(self.reader.next_batch());
                Ok(true)
            }
        }
    }

    fn drop_committed_cuts(&mut self) {
        let fed = self.writer.fed_positions();
        let changes = self.writer.has_changes();
        let mut shared = self.of.shared.borrow_mut();
        let closed = &mut shared.domain.closed;
        while let Some(cut) = closed.front() {
            let at = |disk| fed.get(disk).map_or(0, |position| position.seq);
            let passed = cut.positions.iter().all(|(disk, seq)| at(disk) >= *seq);
            let beyond = cut.positions.iter().any(|(disk, seq)| at(disk) > *seq);
            if passed && (beyond || !changes) {
                closed.pop_front();
            } else {
                break;
            }
        }
    }

    fn describe(&mut self) -> Result<(), StoreError> {
        let shared = self.of.shared.borrow();
        let domain = &shared.domain;
        if domain.described == self.described {
            return Ok(());
        }
        for disk in domain.disks.values() {
            let mut info = disk.info.read().clone();
            let known = self.writer.disks().find(|known| known.uuid == info.uuid);
            let known = known.map_or(0, |known| known.capacity_bytes);
            info.capacity_bytes = info.capacity_bytes.max(known);
            self.writer.set_disk(info)?;
        }
        self.described = domain.described;
        Ok(())
    }

    fn limit(&self) -> u32 {
        let shared = self.of.shared.borrow();
        let closed = shared.domain.closed.front().map(|cut| cut.epoch);
        closed.or(shared.domain.outstanding).unwrap_or(u32::MAX)
    }

    async fn feed(&mut self, number: u64, body: &[u8]) -> Result<(), StoreError> {
        let limit = self.limit();
        self.describe()?;
        for entry in Entries::new(body, number).flatten() {
            if entry.kind != EntryKind::Run {
                continue;
            }
            let disk = Uuid::from_bytes(entry.disk_id);
            for record in RecordIter::trusting(entry.content).flatten() {
                let waits = record.header.cut_epoch >= limit && holds(Guard::UploadHolds);
                if waits || self.held.disks.contains(&entry.disk_id) {
                    if self.held.batch.is_none() {
                        (self.held.batch, self.held.limit) = (Some(number), limit);
                    }
                    self.held.disks.insert(entry.disk_id);
                    break;
                }
                if self.writer.feed(disk, &record)? == Fed::PartFull {
                    self.writer.flush_part().await?;
                }
            }
        }
        Ok(())
    }

    async fn commit_next(&mut self) -> Result<bool, StoreError> {
        let Some(cut) = self.of.shared.borrow().domain.closed.front().cloned() else {
            return Ok(false);
        };
        let fed = self.writer.fed_positions();
        let at = |disk| fed.get(disk).map_or(0, |position| position.seq);
        if cut.positions.iter().any(|(disk, seq)| at(disk) < *seq) {
            return Ok(false);
        }
        let meta = CutMeta {
            cut_epoch: cut.epoch,
            time_ns: cut.time_ns,
            name: cut.name.clone(),
            positions: cut.positions.clone(),
        };
        match self.writer.commit(meta).await {
            Ok(done) => self.of.post(Post::Committed(done.cut, cut.epoch)),
            Err(StoreError::Commit { reason, .. }) => self.of.post(Post::Void(cut.epoch, reason)),
            Err(error) => return Err(error),
        }
        self.of.shared.borrow_mut().domain.closed.pop_front();
        self.release_held();
        self.tell();
        Ok(true)
    }

    fn release_held(&mut self) {
        let Some(batch) = self.held.batch else {
            return;
        };
        if self.limit() > self.held.limit {
            self.held = Held::default();
            if holds(Guard::UploadRewinds) {
                self.reader.rewind(batch);
            }
        }
    }

    fn tell(&mut self) {
        let uploaded = self.writer.uploaded_positions();
        let mut shared = self.of.shared.borrow_mut();
        let domain = &mut shared.domain;
        for (disk, position) in &uploaded {
            if let Some(disk) = domain.disks.get(disk.as_bytes()) {
                disk.uploaded(position.seq);
            }
        }
        let settled = domain.closed.front().map_or(u32::MAX, |cut| cut.epoch - 1);
        let of = |id: &[u8; 16]| uploaded.get(&Uuid::from_bytes(*id)).map_or(0, |p| p.seq);
        domain.log.release(&of, settled);
        shared.posts.push(Post::Told);
        drop(shared);
        self.of.told.notify_one();
    }
}
