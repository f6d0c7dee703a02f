//! The appliance's upload as one task: the log's reader, the rules of what may be fed, the container's
//! writer.
//!
//! Invariant: as in `drva::upload`, whose steps these are, without its threads: a cut is committed when
//! exactly its records were fed; what must wait stays in the log.

use crate::appliance::Domain;
use crate::hasher::Ask;
use drva::gate::Keeper;
use drva::log::format::{Entries, EntryKind};
use drva::log::reader::Reader;
use filter_core::record::RecordIter;
use object_store::ObjectStore;
use recovery_store::{CutMeta, CutWriter, DomainInfo, Fed, RetryPolicy, StoreError, WriterOptions};
use std::cell::RefCell;
use std::collections::VecDeque;
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
    /// A question about blocks was answered: how.
    Answered(&'static str),
    /// Segments of the log were freed, or hosts are to be told what is uploaded.
    Told,
    /// The store failed.
    Failed(String),
    /// A record of a stream that the store is ahead of was passed over.
    Behind,
    /// The log cannot be read.
    Unreadable(String),
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
    /// Questions about what disks hold, not yet answered.
    pub asks: VecDeque<Ask>,
    /// One of them is being looked at.
    pub answering: bool,
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

struct Attempt<'a> {
    of: &'a Upload,
    writer: CutWriter,
    reader: Reader,
    described: u32,
    keeper: Keeper,
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
        let held = writer.fed_positions();
        self.shared.borrow_mut().domain.found_in_store(&held);
        let first = self.shared.borrow().domain.log.first_segment();
        let mut attempt = Attempt {
            of: self,
            writer,
            reader: Reader::new(first),
            described: 0,
            keeper: Keeper::default(),
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
        self.look_at_gate();
        let next = self.reader.next(&self.of.shared.borrow().domain.log);
        match next {
            Ok(Some((number, body))) => {
                self.feed(number, &body).await?;
                self.commit_next().await?;
                Ok(true)
            }
            Ok(None) => self.commit_next().await,
            Err(error) => {
                self.of.post(Post::Unreadable(error.to_string()));
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

    fn look_at_gate(&mut self) {
        let again = {
            let domain = &self.of.shared.borrow().domain;
            let asked = domain.outstanding.as_ref().map(|asked| asked.epoch);
            self.keeper.look(domain.closed.front(), asked)
        };
        if let Some(batch) = again {
            self.reader.rewind(batch);
        }
    }

    async fn feed(&mut self, number: u64, body: &[u8]) -> Result<(), StoreError> {
        self.look_at_gate();
        if self.reader.next_batch() <= number {
            return Ok(()); // it is read again
        }
        self.describe()?;
        for entry in Entries::new(body, number).flatten() {
            if entry.kind != EntryKind::Run {
                continue;
            }
            let disk = Uuid::from_bytes(entry.disk_id);
            for record in RecordIter::trusting(entry.content).flatten() {
                let writer = &self.writer;
                let fed = || {
                    let fed = writer.fed_positions();
                    fed.get(&disk).map_or(0, |position| position.seq)
                };
                if !self.keeper.lets_pass(number, disk, &record.header, fed) {
                    break;
                }
                if self.writer.is_behind(disk, &record.header) {
                    self.of.post(Post::Behind);
                    continue;
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
        if self.keeper.is_impossible(cut.epoch) {
            let why = "a record that it ends with does not exist".into();
            self.of.post(Post::Void(cut.epoch, why));
            self.settled();
            return Ok(true);
        }
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
            left_out: cut.left_out.clone(),
        };
        match self.writer.commit(meta).await {
            Ok(done) => {
                let shared = self.of.shared.borrow();
                for (uuid, position) in &cut.positions {
                    if let Some(disk) = shared.domain.disks.get(uuid.as_bytes()) {
                        disk.settle(*position);
                    }
                }
                drop(shared);
                self.of.shared.borrow_mut().domain.commits += 1;
                self.of.post(Post::Committed(done.cut, cut.epoch));
            }
            Err(StoreError::Commit { reason, .. }) => self.of.post(Post::Void(cut.epoch, reason)),
            Err(error) => return Err(error),
        }
        self.settled();
        Ok(true)
    }

    /// The first closed cut is in the store, or void.
    fn settled(&mut self) {
        self.of.shared.borrow_mut().domain.closed.pop_front();
        self.keeper.settled();
        self.look_at_gate();
        self.tell();
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
