//! The upload: reads what is durable in the log, feeds it to the container, commits closed cuts.
//!
//! Invariant: a cut is committed when exactly its records were fed. While a cut is asked for or
//! waits to be committed, only records stamped below its epoch are fed: all of them belong to it,
//! and none of the others does (the hosts bump the epoch before they report positions). Records that
//! must wait stay in the log: the reader goes back to the first of them after the commit, and what it
//! meets twice is dropped by its seq. So the upload needs no memory for them.

use crate::domain::{ClosedCut, Domain};
use crate::log::format::{Entries, EntryKind};
use crate::log::reader::Reader;
use filter_core::record::RecordIter;
use recovery_store::{CutMeta, CutWriter, DomainInfo, StoreError, StoreUrl, WriterOptions};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use uuid::Uuid;

/// Wait before a store that failed is opened again.
const REOPEN: Duration = Duration::from_secs(1);
/// The longest time without telling where the upload stands.
const TELL: Duration = Duration::from_millis(200);

/// Uploads a domain until the appliance stops.
pub struct Uploader {
    /// The domain.
    pub domain: Arc<Domain>,
    /// Its container.
    pub url: StoreUrl,
    /// Sizes.
    pub options: WriterOptions,
    /// Where async work runs.
    pub runtime: Handle,
}

/// One attempt, from opening the container to the first error.
struct Attempt<'a> {
    of: &'a Uploader,
    writer: CutWriter,
    reader: Reader,
    described: u32,
    /// First batch that holds records which had to wait.
    back_to: Option<u64>,
    /// Disks of which a record had to wait: all later ones wait too.
    waiting: HashSet<[u8; 16]>,
    told: Instant,
}

impl Uploader {
    /// Runs until the appliance stops.
    pub fn run(&self) {
        crate::raw::yield_to_others();
        while !self.domain.stopping.load(Ordering::Acquire) {
            match self.attempt() {
                Ok(()) => return,
                Err(error) => {
                    self.domain.alarm("store", Some(format!("upload: {error}")));
                    let mut cuts = self.domain.cuts.lock();
                    let until = Instant::now() + REOPEN;
                    while Instant::now() < until && !self.domain.stopping.load(Ordering::Acquire) {
                        self.domain.cuts_changed.wait_until(&mut cuts, until);
                    }
                }
            }
        }
    }

    fn attempt(&self) -> Result<(), StoreError> {
        let info = DomainInfo::new(Uuid::from_bytes(self.domain.id), &self.domain.name);
        let open = CutWriter::open(&self.url, &info, self.options.clone());
        let writer = self.runtime.block_on(open)?;
        self.domain.alarm("store", None);
        let first = self.domain.log.segments().first().copied().unwrap_or(1);
        let mut attempt = Attempt {
            of: self,
            writer,
            reader: Reader::new(first),
            described: 0,
            back_to: None,
            waiting: HashSet::new(),
            told: Instant::now(),
        };
        let ended = attempt.run();
        // Only when nothing of this writer is under way may the next one open the container.
        self.runtime.block_on(attempt.writer.close());
        ended
    }
}

impl Attempt<'_> {
    fn run(&mut self) -> Result<(), StoreError> {
        let domain = self.of.domain.clone();
        self.drop_committed_cuts();
        loop {
            if domain.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            self.describe()?;
            let read = match self.reader.next(&domain.log) {
                Ok(read) => read,
                Err(error) => {
                    domain.alarm("log", Some(format!("reading the log: {error}")));
                    std::thread::sleep(REOPEN);
                    self.reader.rewind(self.reader.next_batch());
                    continue;
                }
            };
            match &read {
                Some((number, body)) => self.feed(*number, body)?,
                None => {
                    if !self.commit_next()? {
                        domain.log.wait_beyond(self.reader.next_batch() - 1, TELL);
                    }
                }
            }
            // A cut may be complete long before the log's end is reached.
            self.commit_next()?;
            if self.told.elapsed() > TELL {
                self.tell();
            }
        }
    }

    /// Cuts in the log that the container has already (the appliance stopped between the two).
    fn drop_committed_cuts(&mut self) {
        let fed = self.writer.fed_positions();
        let mut cuts = self.of.domain.cuts.lock();
        let changes = self.writer.has_changes();
        while let Some(cut) = cuts.closed.front() {
            let passed = cut
                .positions
                .iter()
                .all(|(disk, seq)| fed.get(disk).map_or(0, |position| position.seq) >= *seq);
            let beyond = cut
                .positions
                .iter()
                .any(|(disk, seq)| fed.get(disk).map_or(0, |position| position.seq) > *seq);
            if passed && (beyond || !changes) {
                cuts.closed.pop_front();
            } else {
                break;
            }
        }
    }

    /// Tells the writer of new or changed disks.
    fn describe(&mut self) -> Result<(), StoreError> {
        let domain = &self.of.domain;
        let version = domain.described.load(Ordering::Acquire);
        if version == self.described {
            return Ok(());
        }
        for disk in domain.disks.read().values() {
            let mut info = disk.info.read().clone();
            let known = self.writer.disks().find(|known| known.uuid == info.uuid);
            let known = known.map_or(0, |known| known.capacity_bytes);
            info.capacity_bytes = info.capacity_bytes.max(known);
            self.writer.set_disk(info)?;
        }
        self.described = version;
        Ok(())
    }

    /// Records stamped with this epoch or a later one have to wait.
    fn limit(&self) -> u32 {
        let cuts = self.of.domain.cuts.lock();
        let closed = cuts.closed.front().map(|cut| cut.epoch);
        closed.or(cuts.outstanding).unwrap_or(u32::MAX)
    }

    fn feed(&mut self, number: u64, body: &[u8]) -> Result<(), StoreError> {
        // After the batch was read: a record that was stamped for a later cut can only be in it if
        // that cut was asked for before, so the limit that is seen here knows of it.
        let limit = self.limit();
        self.describe()?;
        for entry in Entries::new(body, number).flatten() {
            if entry.kind != EntryKind::Run {
                continue;
            }
            let disk = Uuid::from_bytes(entry.disk_id);
            for record in RecordIter::with_crc(entry.content, crc32c::crc32c_append) {
                let record = match record {
                    Ok(record) => record,
                    Err(error) => {
                        let text = format!("batch {number} of the log: {error}");
                        self.of.domain.alarm("log", Some(text));
                        break;
                    }
                };
                if record.header.cut_epoch >= limit || self.waiting.contains(&entry.disk_id) {
                    self.waiting.insert(entry.disk_id);
                    self.back_to.get_or_insert(number);
                    break;
                }
                self.of.runtime.block_on(self.writer.apply(disk, &record))?;
            }
        }
        Ok(())
    }

    /// Commits the next closed cut if all of it was fed. Returns whether it did.
    fn commit_next(&mut self) -> Result<bool, StoreError> {
        let domain = self.of.domain.clone();
        let (next, asked) = {
            let cuts = domain.cuts.lock();
            (cuts.closed.front().cloned(), cuts.outstanding.is_some())
        };
        let Some(cut) = next else {
            if !asked {
                self.go_back();
            }
            return Ok(false);
        };
        let fed = self.writer.fed_positions();
        let missing = cut
            .positions
            .iter()
            .any(|(disk, seq)| fed.get(disk).map_or(0, |position| position.seq) < *seq);
        if missing {
            return Ok(false);
        }
        let meta = CutMeta {
            cut_epoch: cut.epoch,
            time_ns: cut.time_ns,
            name: cut.name.clone(),
            positions: cut.positions.clone(),
        };
        match self.of.runtime.block_on(self.writer.commit(meta)) {
            Ok(done) => self.committed(&cut, done.cut),
            Err(StoreError::Commit { reason: why, .. }) => {
                // The records are safe and go into the next cut.
                domain.alarm(
                    "commit",
                    Some(format!("cut of epoch {} is void: {why}", cut.epoch)),
                );
                domain.figures.cuts_void.fetch_add(1, Ordering::Relaxed); // a figure
            }
            Err(error) => return Err(error),
        }
        let mut cuts = domain.cuts.lock();
        cuts.closed.pop_front();
        cuts.resolved += 1;
        drop(cuts);
        domain.cuts_changed.notify_all();
        self.back_to.get_or_insert(self.reader.next_batch());
        self.go_back();
        self.tell();
        Ok(true)
    }

    fn committed(&self, cut: &ClosedCut, number: u64) {
        let domain = &self.of.domain;
        let waited_us = crate::domain::now_ns().saturating_sub(cut.time_ns) / 1000;
        domain.figures.commit_us.lock().saturating_record(waited_us);
        domain.figures.cuts_closed.fetch_add(1, Ordering::Relaxed); // a figure
        domain.cuts.lock().newest = Some((number, cut.name.clone(), cut.time_ns));
        domain.alarm("commit", None);
    }

    /// Returns to the first batch with records that had to wait, if nothing makes them wait any more.
    fn go_back(&mut self) {
        if let Some(batch) = self.back_to.take() {
            self.waiting.clear();
            if batch < self.reader.next_batch() {
                self.reader.rewind(batch);
            }
        }
    }

    /// Tells hosts and log what the store holds.
    fn tell(&mut self) {
        self.told = Instant::now();
        let domain = &self.of.domain;
        let uploaded = self.writer.uploaded_positions();
        let disks = domain.disks.read();
        for (disk, position) in &uploaded {
            if let Some(disk) = disks.get(disk.as_bytes()) {
                disk.uploaded.store(position.seq, Ordering::Release); // pairs with the acks' loads
                if let Some(route) = disk.route.lock().as_ref() {
                    let durable = disk.durable.load(Ordering::Acquire);
                    route
                        .outbox
                        .acknowledge(route.channel, durable, position.seq);
                }
            }
        }
        drop(disks);
        let stats = self.writer.stats();
        domain
            .figures
            .stored_bytes
            .store(stats.stored_bytes, Ordering::Relaxed); // a figure
        // Cuts before the first one that waits are in the store.
        let settled = {
            let cuts = domain.cuts.lock();
            cuts.closed.front().map_or(u32::MAX, |cut| cut.epoch - 1)
        };
        let of = |id: &[u8; 16]| uploaded.get(&Uuid::from_bytes(*id)).map_or(0, |p| p.seq);
        domain.log.release(&of, settled);
    }
}
