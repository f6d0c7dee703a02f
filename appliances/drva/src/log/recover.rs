//! The scan at restart: what the log holds, where it goes on.
//!
//! Invariant: a batch that does not check ends the log only if nothing later is there. A torn write
//! is the last one ever made (one batch is in flight at a time, and the next begins only when it is
//! durable), so a whole batch after a bad one means damage in the middle, which is an error. A read
//! that the storage refuses tells nothing of what is there: it never ends a log, it is an error.

use super::LogError;
use super::format::{BATCH_ALIGN, BatchError, BatchHeader, Entries, Entry, EntryKind};
use super::reader::{ReadError, read_body, read_header};
use super::volume::{Readable, Volume};
use super::{DiskState, io_error};
use crate::documents::cut_back;
use crate::touched::Touched;
use filter_core::record::{FLAG_SYNC_BEGIN, FLAG_SYNC_END, RecordHeader};
use std::collections::{BTreeMap, HashMap};
use std::io;

/// A segment that was found.
#[derive(Clone, Debug)]
pub struct FoundSegment {
    /// Number of its first batch.
    pub first_batch: u64,
    /// Its file's length.
    pub bytes: u64,
    /// Per disk the last seq in it.
    pub last: HashMap<[u8; 16], u64>,
    /// Highest cut epoch closed in it.
    pub cut_epoch: u32,
}

/// What the log holds.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// The segments.
    pub segments: Vec<FoundSegment>,
    /// The segment to go on in, and where in it.
    pub open_segment: Option<(u64, u64)>,
    /// Number of the next batch.
    pub next_batch: u64,
    /// Chain value of the last.
    pub chain: u32,
    /// Where each disk stands.
    pub disks: BTreeMap<[u8; 16], DiskState>,
    /// Which blocks the log's records have touched.
    pub touched: BTreeMap<[u8; 16], Touched>,
    /// Closed cuts: epoch and JSON document.
    pub cuts: Vec<(u32, Vec<u8>)>,
    /// Highest cut epoch seen in a cut or a record.
    pub cut_epoch: u32,
}

/// The headers of whole records that lie back to back; ends at the first that does not check.
pub fn headers(mut bytes: &[u8]) -> impl Iterator<Item = RecordHeader> {
    std::iter::from_fn(move || {
        let header = RecordHeader::decode(bytes).ok()?;
        bytes = bytes.get(header.span_bytes()..)?;
        Some(header)
    })
}

/// Takes a run or state entry into a disk's state.
pub fn note_run(state: &mut DiskState, entry: &Entry<'_>) -> u32 {
    let mut cut_epoch = 0;
    match entry.kind {
        EntryKind::Run => {
            // Headers only: payloads were checked before they were logged, and the batch's CRC holds.
            for header in headers(entry.content) {
                state.last_seq = header.seq;
                state.attach_epoch = header.attach_epoch;
                cut_epoch = cut_epoch.max(header.cut_epoch);
                if header.flags & FLAG_SYNC_BEGIN != 0 {
                    state.sync_begin = header.seq;
                }
                if header.flags & FLAG_SYNC_END != 0 {
                    state.sync_begin = 0;
                }
                if header.relies_on() == Some(0) {
                    state.full_base_seq = header.seq;
                }
            }
        }
        EntryKind::State => {
            state.last_seq = state.last_seq.max(entry.last_seq);
            state.attach_epoch = state.attach_epoch.max(entry.epoch);
            state.sync_begin = entry.first_seq;
            // Without it every base counts as full: then only one that relies on all of it stands.
            let full_base = entry.content.first_chunk().copied();
            let full_base = full_base.map_or(entry.last_seq, u64::from_le_bytes);
            state.full_base_seq = state.full_base_seq.max(full_base);
        }
        EntryKind::Disk => state.description = entry.content.to_vec(),
        EntryKind::Cut => {}
    }
    cut_epoch
}

/// Notes what an entry's records touched, from the first that the log has of the disk on.
fn note_touched(all: &mut BTreeMap<[u8; 16], Touched>, entry: &Entry<'_>) {
    match entry.kind {
        EntryKind::State => {
            let state = || Touched::above(entry.last_seq);
            all.entry(entry.disk_id).or_insert_with(state);
        }
        EntryKind::Run => {
            let before = || Touched::above(entry.first_seq.saturating_sub(1));
            let touched = all.entry(entry.disk_id).or_insert_with(before);
            headers(entry.content).for_each(|header| touched.note(&header));
        }
        EntryKind::Disk | EntryKind::Cut => {}
    }
}

/// What a closed cut holds is asked of that cut, once it is in the store.
fn settle(all: &mut BTreeMap<[u8; 16], Touched>, entry: &Entry<'_>) {
    let Some(cut) = cut_back(entry.epoch, entry.content) else {
        return;
    };
    for (disk, position) in cut.positions {
        if let Some(touched) = all.get_mut(disk.as_bytes()) {
            touched.settle(position);
        }
    }
}

fn take(recovered: &mut Recovered, segment: &mut FoundSegment, entry: &Entry<'_>) {
    match entry.kind {
        EntryKind::Cut => {
            settle(&mut recovered.touched, entry);
            recovered.cuts.push((entry.epoch, entry.content.to_vec()));
            recovered.cut_epoch = recovered.cut_epoch.max(entry.epoch);
            segment.cut_epoch = segment.cut_epoch.max(entry.epoch);
        }
        kind => {
            note_touched(&mut recovered.touched, entry);
            let state = recovered.disks.entry(entry.disk_id).or_default();
            let epoch = note_run(state, entry);
            recovered.cut_epoch = recovered.cut_epoch.max(epoch);
            if kind == EntryKind::Run {
                segment.last.insert(entry.disk_id, entry.last_seq);
            }
        }
    }
}

/// Whether a whole batch of this domain with a number of at least `number` starts anywhere from
/// `offset` on.
fn something_follows(
    file: &dyn Readable,
    offset: u64,
    len: u64,
    domain: [u8; 16],
    number: u64,
) -> io::Result<bool> {
    let mut at = offset + BATCH_ALIGN as u64;
    while at + BATCH_ALIGN as u64 <= len {
        let found = read_header(file, at).and_then(|(header, _)| {
            let later = header.domain_id == domain && header.number > number;
            if !later {
                return Ok(false);
            }
            read_body(file, at, &header).map(|_| true)
        });
        match found {
            Ok(true) => return Ok(true),
            Ok(false) | Err(ReadError::Bad(_)) => at += BATCH_ALIGN as u64,
            Err(ReadError::Io(error)) => return Err(error),
        }
    }
    Ok(false)
}

/// Reads the whole log, and puts aside what the writer must make anew.
pub fn open(volume: &dyn Volume, domain_id: [u8; 16]) -> Result<Recovered, LogError> {
    let mut recovered = scan(volume, domain_id)?;
    if let Some((first, 0)) = recovered.open_segment {
        // Made, but its first batch (where every disk stands) never became durable: it is made
        // anew, else the segments before it could be freed and the disks' state with them.
        let path = volume.path_of(first);
        volume.remove(first).map_err(io_error("remove", &path))?;
        recovered.segments.pop();
        recovered.open_segment = None;
    }
    Ok(recovered)
}

/// Reads the whole log.
pub fn scan(volume: &dyn Volume, domain_id: [u8; 16]) -> Result<Recovered, LogError> {
    let firsts = volume.list().map_err(io_error("list", volume.dir()))?;
    let mut recovered = Recovered {
        next_batch: 1,
        ..Recovered::default()
    };
    let mut chain_known = false;
    for (i, first) in firsts.iter().enumerate() {
        let path = volume.path_of(*first);
        let damaged = |offset, why: String| LogError::Damaged {
            path: path.clone(),
            offset,
            why,
        };
        if i == 0 {
            // Older segments were uploaded and removed: the log begins here.
            recovered.next_batch = *first;
        } else if *first != recovered.next_batch {
            let expected = recovered.next_batch;
            let why = format!("batches {expected} to {} are missing before it", first - 1);
            return Err(damaged(0, why));
        }
        let file = volume.open(*first).map_err(io_error("open", &path))?;
        let len = file.len_bytes().map_err(io_error("look at", &path))?;
        let mut found = FoundSegment {
            first_batch: *first,
            bytes: len,
            last: HashMap::new(),
            cut_epoch: 0,
        };
        let mut at = 0;
        let last_segment = i + 1 == firsts.len();
        while at + BATCH_ALIGN as u64 <= len {
            match read_batch(&*file, at, domain_id, recovered.next_batch) {
                Ok((header, chain, body)) => {
                    if chain_known && header.before != recovered.chain {
                        return Err(damaged(at, BatchError::Chain(header.number).to_string()));
                    }
                    for entry in Entries::new(&body, header.number) {
                        let entry = entry.map_err(|e| damaged(at, e.to_string()))?;
                        take(&mut recovered, &mut found, &entry);
                    }
                    (recovered.chain, chain_known) = (chain, true);
                    recovered.next_batch += 1;
                    at += header.span_bytes();
                }
                Err(ReadError::Io(error)) => return Err(io_error("read", &path)(error)),
                Err(ReadError::Bad(
                    error @ (BatchError::Version(_) | BatchError::Domain | BatchError::Reserved(_)),
                )) => {
                    return Err(damaged(at, error.to_string()));
                }
                Err(ReadError::Bad(error)) => {
                    let number = recovered.next_batch;
                    let follows = something_follows(&*file, at, len, domain_id, number);
                    if follows.map_err(io_error("read", &path))? {
                        return Err(damaged(at, error.to_string()));
                    }
                    break;
                }
            }
        }
        if last_segment {
            recovered.open_segment = Some((*first, at));
        }
        recovered.segments.push(found);
    }
    Ok(recovered)
}

fn read_batch(
    file: &dyn Readable,
    at: u64,
    domain_id: [u8; 16],
    expected: u64,
) -> Result<(BatchHeader, u32, Vec<u8>), ReadError> {
    let (header, chain) = read_header(file, at)?;
    if header.domain_id != domain_id {
        return Err(BatchError::Domain.into());
    }
    if header.number != expected {
        let found = header.number;
        return Err(BatchError::Number { expected, found }.into());
    }
    let body = read_body(file, at, &header)?;
    Ok((header, chain, body))
}
