//! The upload: reads what is durable in the log, feeds it to the container, commits closed cuts.
//!
//! Invariant: a cut is committed when exactly its records were fed: those up to its position of their
//! disk, whatever their epoch. While a cut is asked for and its positions are not known, only records
//! stamped below its epoch are fed: all of them belong to it (the host bumps the epoch before it
//! reports positions, and if a disk changes its host meanwhile the cut is void). Records that must wait
//! stay in the log: the reader goes back to the first of them once the cut is settled, and what it meets
//! twice is dropped by its seq. So the upload needs no memory for them.

use crate::domain::{ClosedCut, Domain};
use crate::gate::Keeper;
use crate::log::format::{Entries, EntryKind};
use crate::log::reader::Reader;
use filter_core::record::RecordIter;
use recovery_store::{CutMeta, CutWriter, DomainInfo, Fed, StoreError, StoreUrl, WriterOptions};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use uuid::Uuid;

/// Wait before a store that failed is opened again.
const REOPEN: Duration = Duration::from_secs(1);
/// The longest time without telling where the upload stands.
const TELL: Duration = Duration::from_millis(200);

/// How long what is under way may take when the appliance stops. What is cut off is in the log.
const STOP_GRACE: Duration = Duration::from_secs(2);

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

/// Why an attempt ended.
enum Ended {
    Stopping,
    Store(StoreError),
}

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// One attempt, from opening the container to the first error.
struct Attempt<'a> {
    of: &'a Uploader,
    writer: CutWriter,
    reader: Reader,
    described: u32,
    keeper: Keeper,
    told: Instant,
    /// The log could not be read.
    log_alarm: bool,
}

impl Uploader {
    /// Runs until the appliance stops.
    pub fn run(&self) {
        crate::raw::yield_to_others();
        loop {
            match self.attempt() {
                Err(Ended::Store(error)) if !self.domain.is_stopping() => {
                    self.domain.alarm("store", Some(format!("upload: {error}")));
                    self.domain.pause(REOPEN);
                }
                _ => return,
            }
        }
    }

    /// Waits for the store; not for long when the appliance stops.
    fn wait<T, F>(&self, work: F) -> Result<T, Ended>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut stopped = self.domain.stopped();
        let patience = async move {
            // An error means that the sender is gone: the same.
            let _ = stopped.wait_for(|stopping| *stopping).await;
            tokio::time::sleep(STOP_GRACE).await;
        };
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                result = work => result.map_err(Ended::Store),
                () = patience => Err(Ended::Stopping),
            }
        })
    }

    fn attempt(&self) -> Result<(), Ended> {
        let info = DomainInfo::new(Uuid::from_bytes(self.domain.id), &self.domain.name);
        let open = CutWriter::open(&self.url, &info, self.options.clone());
        let writer = self.wait(open)?;
        self.domain.alarm("store", None);
        self.domain.found_in_store(&writer.fed_positions());
        let mut attempt = Attempt::new(self, writer);
        let ended = attempt.run();
        // Only when nothing of this writer is under way may the next one open the container.
        let close = async {
            attempt.writer.close().await;
            Ok(())
        };
        self.wait(close)?;
        ended
    }
}

impl<'a> Attempt<'a> {
    fn new(of: &'a Uploader, writer: CutWriter) -> Self {
        let first = of.domain.log.segments().first().copied().unwrap_or(1);
        Self {
            of,
            writer,
            reader: Reader::new(first),
            described: 0,
            keeper: Keeper::default(),
            told: Instant::now(),
            log_alarm: false,
        }
    }

    fn run(&mut self) -> Result<(), Ended> {
        let domain = self.of.domain.clone();
        self.drop_committed_cuts();
        while !domain.is_stopping() {
            if !self.step()? {
                self.make_room()?;
                domain.log.wait_beyond(self.reader.next_batch() - 1, TELL);
            }
            if self.told.elapsed() > TELL {
                self.tell();
            }
        }
        Ok(())
    }

    /// Feeds one batch, commits what can be. Returns whether there was anything to do.
    fn step(&mut self) -> Result<bool, Ended> {
        let domain = self.of.domain.clone();
        self.describe()?;
        self.look_at_gate();
        match self.reader.next(&domain.log) {
            Ok(Some((number, body))) => {
                if std::mem::take(&mut self.log_alarm) {
                    domain.alarm("log", None);
                }
                self.feed(number, &body)?;
                // A cut may be complete long before the log's end is reached.
                self.commit_next()?;
                Ok(true)
            }
            Ok(None) => self.commit_next(),
            Err(error) => {
                self.log_alarm = true;
                domain.alarm("log", Some(format!("reading the log: {error}")));
                domain.pause(REOPEN);
                self.reader.rewind(self.reader.next_batch());
                Ok(true)
            }
        }
    }

    /// A full log must not wait for a part that never fills: what was fed goes to the store as it is.
    fn make_room(&mut self) -> Result<(), Ended> {
        if !self.of.domain.log.is_full() {
            return Ok(());
        }
        let writer = &mut self.writer;
        self.of.wait(async {
            writer.flush_part().await?;
            writer.settle().await
        })?;
        self.tell();
        Ok(())
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

    /// Looks at what may be fed now. If that has changed, what had to wait is read again, unless all of
    /// it has to wait still.
    fn look_at_gate(&mut self) {
        let again = {
            let cuts = self.of.domain.cuts.lock();
            let asked = cuts.outstanding.as_ref().map(|asked| asked.epoch);
            self.keeper.look(cuts.closed.front(), asked)
        };
        if let Some(batch) = again {
            self.reader.rewind(batch);
        }
    }

    fn feed(&mut self, number: u64, body: &[u8]) -> Result<(), Ended> {
        // After the batch was read: a record that was stamped for a later cut can only be in it if
        // that cut was asked for before, so what is seen here knows of it.
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
            // Payloads were checked when they came, and the batch's CRC, just checked, holds them.
            for record in RecordIter::trusting(entry.content) {
                let record = match record {
                    Ok(record) => record,
                    Err(error) => {
                        let text = format!("batch {number} of the log: {error}");
                        self.of.domain.alarm("log", Some(text));
                        break;
                    }
                };
                let writer = &self.writer;
                let fed = || {
                    let fed = writer.fed_positions();
                    fed.get(&disk).map_or(0, |position| position.seq)
                };
                if !self.keeper.lets_pass(number, disk, &record.header, fed) {
                    break;
                }
                // Of a stream that was sent away: see `Domain::found_in_store`.
                if self.writer.is_behind(disk, &record.header) {
                    continue;
                }
                if self.writer.feed(disk, &record)? == Fed::PartFull {
                    self.of.wait(self.writer.flush_part())?;
                }
            }
        }
        Ok(())
    }

    /// Commits the next closed cut if all of it was fed. Returns whether it did.
    fn commit_next(&mut self) -> Result<bool, Ended> {
        let domain = self.of.domain.clone();
        let Some(cut) = domain.cuts.lock().closed.front().cloned() else {
            return Ok(false);
        };
        if self.keeper.is_impossible(cut.epoch) {
            self.void(&cut, "a record that it ends with does not exist");
            return Ok(true);
        }
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
            left_out: cut.left_out.clone(),
        };
        fault::point("drva.before-commit");
        match self.of.wait(self.writer.commit(meta)) {
            Ok(done) => {
                fault::point("drva.after-commit");
                self.committed(&cut, done.cut);
                self.settled();
            }
            Err(Ended::Store(StoreError::Commit { reason, .. })) => self.void(&cut, &reason),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// The first closed cut came to nothing. Its records are safe and go into the next one.
    fn void(&mut self, cut: &ClosedCut, why: &str) {
        let domain = self.of.domain.clone();
        let text = format!("cut of epoch {} is void: {why}", cut.epoch);
        domain.alarm("commit", Some(text));
        domain.figures.cuts_void.fetch_add(1, Ordering::Relaxed); // a figure
        // Who asked for it by name gets the next one.
        domain.cuts.lock().wanted.extend(cut.name.clone());
        self.settled();
    }

    /// The first closed cut is in the store, or void.
    fn settled(&mut self) {
        let domain = self.of.domain.clone();
        domain.cuts.lock().closed.pop_front();
        domain.cuts_changed.notify_all();
        self.keeper.settled();
        self.look_at_gate();
        self.tell();
    }

    fn committed(&self, cut: &ClosedCut, number: u64) {
        let domain = &self.of.domain;
        let waited_us = crate::domain::now_ns().saturating_sub(cut.time_ns) / 1000;
        domain.figures.commit_us.lock().saturating_record(waited_us);
        domain.figures.cuts_closed.fetch_add(1, Ordering::Relaxed); // a figure
        {
            let disks = domain.disks.read();
            for (uuid, position) in &cut.positions {
                if let Some(disk) = disks.get(uuid.as_bytes()) {
                    disk.settle(*position);
                    disk.held_by_cut(cut.time_ns, *position);
                }
            }
        }
        domain.commits.fetch_add(1, Ordering::AcqRel); // pairs with the load of whoever reads the store
        let mut cuts = domain.cuts.lock();
        cuts.committed(number, cut);
        drop(cuts);
        domain.alarm("commit", None);
    }

    /// Tells hosts and log what the store holds.
    fn tell(&mut self) {
        self.told = Instant::now();
        let domain = &self.of.domain;
        let uploaded = self.writer.uploaded_positions();
        let disks = domain.disks.read();
        for (disk, position) in &uploaded {
            if let Some(disk) = disks.get(disk.as_bytes()) {
                disk.uploaded(position.seq);
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

#[cfg(test)]
#[path = "upload_tests.rs"]
mod tests;
