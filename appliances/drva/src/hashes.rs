//! What the appliance holds of a disk's blocks, as hashes: so that a sync need not send them again.
//!
//! Answered from the newest cut in the store, for blocks that no record above that cut's position has
//! touched. Invariant: a hash is that of the block as the replica holds it at some moment after the
//! question came: what was touched is decided by position, under the disk's lock, after the block was
//! read. In any doubt, or if it would take long, the answer is "not known". All work is done on a thread
//! of its own, one question at a time: acknowledgements never wait for it.

use crate::disk::Disk;
use crate::domain::Domain;
use crate::outbox::Outbox;
use crossbeam::channel::RecvTimeoutError;
use filter_core::lane::layout::{DIRTY_BLOCK_BYTES, HASH_BYTES};
use filter_core::mutant::{Guard, holds};
use filter_core::wire::Message;
use futures::StreamExt;
use recovery_store::{
    Container, CutInfo, CutSelector, PartBlocks, PartRef, Piece, StoreError, StoreUrl, sha256,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use uuid::Uuid;

/// Questions of one domain that may wait; more are answered "not known" at once.
pub const MAX_WAITING: usize = 64;
/// A question that has waited for longer is not worth an answer.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long the store may take for one question.
pub const READ_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to open the container and read the indexes of a cut.
pub const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// After a failure of the store: how long nothing is known.
pub const AFTER_FAILURE: Duration = Duration::from_secs(5);
/// A cut that nobody has asked about for so long is closed.
const KEPT: Duration = Duration::from_secs(60);
/// How often it is looked whether the appliance stops.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Parts of a container whose indexes are held in memory, at most.
const MAX_PARTS: usize = 64 << 10;
/// Blocks that are read together.
const BATCH_BLOCKS: usize = 16;
/// Parts that are read from at once.
const PARALLEL: usize = 8;

/// One hash; zeros: not known.
pub type BlockHash = [u8; HASH_BYTES];

/// A question about a disk.
pub struct Ask {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Start of the first block, in bytes.
    pub offset_bytes: u64,
    /// How many blocks.
    pub blocks: u32,
    /// Where the answer goes.
    pub outbox: Arc<Outbox>,
    /// The channel that it came over.
    pub channel: u32,
    /// When it came.
    pub came: Instant,
}

impl Ask {
    /// Answers: every question is answered once, in the order in which they came over the channel.
    pub fn answer(&self, hashes: Vec<BlockHash>) {
        let offset_bytes = self.offset_bytes;
        let message = Message::Hashes {
            offset_bytes,
            hashes,
        };
        self.outbox.send(&message, self.channel);
    }
}

/// A cut that is open for reading.
pub struct View {
    commits: u64,
    container: Container,
    cut: CutInfo,
    parts: Vec<PartRef>,
    /// Per disk its pieces, in order of their offset.
    pieces: HashMap<Uuid, Vec<Piece<PartBlocks>>>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Unknown {
    /// The store.
    Store(StoreError),
    /// It took too long, the appliance stops, or there is too much of it.
    GivenUp(&'static str),
    /// The disk is not in the cut, or nothing is known of what was touched since.
    Disk,
}

impl From<StoreError> for Unknown {
    fn from(error: StoreError) -> Self {
        match error {
            // No cut yet: nothing is wrong.
            StoreError::NoSuchCut { .. } | StoreError::NoContainer { .. } => Self::Disk,
            error => Self::Store(error),
        }
    }
}

/// Answers the questions about a domain's disks until the appliance stops.
pub struct Hasher {
    /// The domain.
    pub domain: Arc<Domain>,
    /// Its container.
    pub url: StoreUrl,
    /// Where async work runs.
    pub runtime: Handle,
}

impl Hasher {
    /// Runs until the appliance stops.
    pub fn run(&self) {
        crate::raw::yield_to_others();
        let mut view = None;
        let mut quiet_until = Instant::now();
        let mut used = Instant::now();
        while !self.domain.is_stopping() {
            let ask = match self.domain.asks.1.recv_timeout(LOOK_EVERY) {
                Ok(ask) => ask,
                Err(RecvTimeoutError::Timeout) => {
                    view = view.filter(|_| used.elapsed() < KEPT);
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if ask.came.elapsed() > PATIENCE || Instant::now() < quiet_until {
                ask.answer(Vec::new());
                continue;
            }
            used = Instant::now();
            let hashes = self.look(&mut view, &ask).unwrap_or_else(|unknown| {
                let why = match unknown {
                    Unknown::Disk => return Vec::new(),
                    Unknown::Store(error) => error.to_string(),
                    Unknown::GivenUp(why) => why.into(),
                };
                tracing::warn!("domain {}: no hashes for a sync: {why}", self.domain.name);
                // What was opened may be what is wrong.
                view = None;
                quiet_until = Instant::now() + AFTER_FAILURE;
                Vec::new()
            });
            ask.answer(hashes);
        }
    }

    /// Waits for the store, for a limited time, and not when the appliance stops.
    fn wait<T, F>(&self, limit: Duration, work: F) -> Result<T, Unknown>
    where
        F: Future<Output = Result<T, Unknown>>,
    {
        let mut stopped = self.domain.stopped();
        self.runtime.block_on(async {
            tokio::select! {
                result = work => result,
                () = tokio::time::sleep(limit) => Err(Unknown::GivenUp("the store is too slow")),
                _ = stopped.wait_for(|stopping| *stopping) => {
                    Err(Unknown::GivenUp("the appliance stops"))
                }
            }
        })
    }

    fn look(&self, view: &mut Option<View>, ask: &Ask) -> Result<Vec<BlockHash>, Unknown> {
        let commits = self.domain.commits.load(Ordering::Acquire); // pairs with the upload's add
        if view.as_ref().is_none_or(|view| view.commits != commits) {
            *view = None; // two of them at once are too much memory
            let open = async { View::of(Container::open(&self.url).await?, commits).await };
            *view = Some(self.wait(OPEN_LIMIT, open)?);
        }
        let view = view.as_ref().ok_or(Unknown::Disk)?;
        // Looked at before, to spare the reading, and after: what came meanwhile counts, too.
        let before = view.untouched(&ask.disk, ask.offset_bytes, ask.blocks)?;
        let read = view.read(&ask.disk, ask.offset_bytes, &before);
        let mut hashes = self.wait(READ_LIMIT, read)?;
        fault::point("drva.hashes-read");
        view.forget_touched(&ask.disk, ask.offset_bytes, &mut hashes)?;
        Ok(hashes)
    }
}

impl View {
    /// Opens a container's newest cut. `commits`: how many cuts had been committed just before the
    /// container was opened.
    pub async fn of(container: Container, commits: u64) -> Result<Self, Unknown> {
        let cut = container.select(&CutSelector::Latest).await?;
        let too_many = tokio::sync::Notify::new();
        let view = container.view(&cut, None, |_, parts| {
            if parts > MAX_PARTS {
                too_many.notify_one();
            }
        });
        let view = tokio::select! {
            view = view => view?,
            () = too_many.notified() => return Err(Unknown::GivenUp("the container has too many parts")),
        };
        let pieces = view.extents.iter();
        let pieces = pieces
            .map(|(disk, map)| (*disk, map.iter().collect()))
            .collect();
        Ok(Self {
            commits,
            container,
            cut,
            parts: view.parts,
            pieces,
        })
    }

    /// How many cuts had been committed when it was opened: another number makes it old.
    pub const fn commits(&self) -> u64 {
        self.commits
    }

    /// Which of the blocks from an offset on no record above the cut has touched, of all that was
    /// admitted so far.
    pub fn untouched(
        &self,
        disk: &Disk,
        offset_bytes: u64,
        blocks: u32,
    ) -> Result<Vec<bool>, Unknown> {
        let uuid = disk.info.read().uuid;
        let position = self.cut.positions.iter().find(|at| at.disk == uuid);
        let position = position.ok_or(Unknown::Disk)?.seq;
        let found = disk.untouched(position, offset_bytes, blocks as usize);
        found.ok_or(Unknown::Disk)
    }

    /// Hashes of the wanted blocks from an offset on, as the cut holds them.
    pub async fn read(
        &self,
        disk: &Disk,
        offset_bytes: u64,
        wanted: &[bool],
    ) -> Result<Vec<BlockHash>, Unknown> {
        let uuid = disk.info.read().uuid;
        let found = self.cut.disks.iter().find(|disk| disk.uuid == uuid);
        let capacity_bytes = found.ok_or(Unknown::Disk)?.capacity_bytes;
        let pieces = self.pieces.get(&uuid).ok_or(Unknown::Disk)?;
        let mut hashes = vec![BlockHash::default(); wanted.len()];
        for (from, to) in batches(wanted) {
            let start = offset_bytes + from as u64 * DIRTY_BLOCK_BYTES;
            let end = start + (to - from) as u64 * DIRTY_BLOCK_BYTES;
            if start >= capacity_bytes {
                break;
            }
            let content = content(self, pieces, start..end.min(capacity_bytes)).await?;
            let blocks = content.chunks(DIRTY_BLOCK_BYTES as usize);
            for (hash, block) in hashes.iter_mut().skip(from).zip(blocks) {
                *hash = hash_of(block);
            }
        }
        Ok(hashes)
    }

    /// Takes out what a record has touched by now: what came while the blocks were read.
    pub fn forget_touched(
        &self,
        disk: &Disk,
        offset_bytes: u64,
        hashes: &mut [BlockHash],
    ) -> Result<(), Unknown> {
        let untouched = self.untouched(disk, offset_bytes, hashes.len() as u32)?;
        for (hash, untouched) in hashes.iter_mut().zip(untouched) {
            if !untouched && holds(Guard::HashesLookedAtAgain) {
                *hash = BlockHash::default();
            }
        }
        Ok(())
    }
}

/// The hash of a block: the first bytes of its SHA-256.
pub fn hash_of(block: &[u8]) -> BlockHash {
    let whole = sha256(block);
    whole.first_chunk().copied().unwrap_or_default()
}

/// Runs of wanted blocks, none longer than a batch.
fn batches(wanted: &[bool]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, _) in wanted.iter().enumerate().filter(|(_, wanted)| **wanted) {
        match runs.last_mut() {
            Some((from, to)) if *to == at && at - *from < BATCH_BLOCKS => *to = at + 1,
            _ => runs.push((at, at + 1)),
        }
    }
    runs
}

/// The bytes of a range in the cut.
async fn content(
    view: &View,
    pieces: &[Piece<PartBlocks>],
    range: Range<u64>,
) -> Result<Vec<u8>, Unknown> {
    let mut bytes = vec![0u8; (range.end - range.start) as usize];
    let first = pieces.partition_point(|piece| piece.offset_bytes + piece.len_bytes <= range.start);
    let here = pieces.iter().skip(first);
    let here: Vec<_> = here
        .take_while(|piece| piece.offset_bytes < range.end)
        .collect();
    let mut wanted: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for piece in &here {
        if let PartBlocks::Block { part, block, .. } = piece.place {
            wanted.entry(part).or_default().insert(block);
        }
    }
    let fetches = wanted.into_iter().map(|(part, blocks)| async move {
        let of = view.parts.get(part as usize).ok_or(Unknown::Disk)?;
        let blocks: Vec<u32> = blocks.into_iter().collect();
        let read = view.container.read_part(of, &blocks).await?;
        Ok::<_, Unknown>((part, read))
    });
    let mut fetched: HashMap<(u32, u32), Vec<u8>> = HashMap::new();
    let mut fetches = futures::stream::iter(fetches).buffered(PARALLEL);
    while let Some(read) = fetches.next().await {
        let (part, read) = read?;
        fetched.extend(read.into_iter().map(|(block, raw)| ((part, block), raw)));
    }
    for piece in here {
        let PartBlocks::Block {
            part,
            block,
            offset_bytes,
        } = piece.place
        else {
            continue;
        };
        let from = piece.offset_bytes.max(range.start);
        let to = (piece.offset_bytes + piece.len_bytes).min(range.end);
        let skipped = u64::from(offset_bytes) + (from - piece.offset_bytes);
        let source = fetched.get(&(part, block));
        let source =
            source.and_then(|raw| raw.get(skipped as usize..)?.get(..(to - from) as usize));
        let place = bytes.get_mut((from - range.start) as usize..(to - range.start) as usize);
        match (place, source) {
            (Some(place), Some(source)) => place.copy_from_slice(source),
            _ => return Err(Unknown::GivenUp("an extent does not lie in its block")),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_what_is_wanted_and_nothing_else() {
        let wanted: Vec<bool> = (0..100).map(|at| at < 40 || at % 7 == 0).collect();
        let mut covered = vec![false; 100];
        for (from, to) in batches(&wanted) {
            assert!(to - from <= BATCH_BLOCKS);
            for at in covered.iter_mut().take(to).skip(from) {
                assert!(!std::mem::replace(at, true));
            }
        }
        assert_eq!(covered, wanted);
    }
}
