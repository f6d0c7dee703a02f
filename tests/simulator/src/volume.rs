//! The volume of the appliance's log: one write is under way at a time, and a crash tears it.
//!
//! Invariant: what was settled is never lost; of the write under way each sector of 512 bytes may have
//! arrived or not.

use crate::numbers::Numbers;
use drva::log::volume::{Readable, Volume, Writable};
use drva::raw::AlignedBuffer;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What happens to the next write, or the next new segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is refused; nothing arrives.
    Refused,
    /// It is refused; some of it arrives.
    Torn,
}

#[derive(Default)]
struct Segment {
    /// What is there; beyond it are zeros up to `len`.
    bytes: Vec<u8>,
    len: u64,
}

impl Segment {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        if let Some(place) = self.bytes.get_mut(at as usize..end) {
            place.copy_from_slice(bytes);
        }
    }
}

/// A segment's file: who has it open keeps it when its name goes.
type File = Arc<Mutex<Segment>>;

struct Pending {
    segment: File,
    at: u64,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct State {
    segments: BTreeMap<u64, File>,
    pending: Option<Pending>,
    write_fault: Option<Fault>,
    create_fault: bool,
    numbers: Option<Numbers>,
}

impl State {
    fn settle(&mut self) {
        if let Some(pending) = self.pending.take() {
            pending.segment.lock().put(pending.at, &pending.bytes);
        }
    }

    fn tear(&mut self, pending: &Pending) {
        let Some(numbers) = &mut self.numbers else {
            return;
        };
        let mut segment = pending.segment.lock();
        let some = numbers.between(1, 999);
        for (i, sector) in pending.bytes.chunks(512).enumerate() {
            if numbers.chance(some) {
                segment.put(pending.at + i as u64 * 512, sector);
            }
        }
    }
}

/// A volume in memory.
#[derive(Default)]
pub struct Memory(Arc<Mutex<State>>);

impl Memory {
    /// An empty one.
    pub fn new(seed: u64) -> Self {
        let state = State {
            numbers: Some(Numbers::new(seed)),
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The write under way has arrived.
    pub fn settle(&self) {
        self.0.lock().settle();
    }

    /// The appliance crashes. Returns whether a write was torn.
    pub fn crash(&self) -> bool {
        let mut state = self.0.lock();
        let pending = state.pending.take();
        if let Some(pending) = &pending {
            state.tear(pending);
        }
        pending.is_some()
    }

    /// This happens to the next write.
    pub fn plan_write(&self, fault: Fault) {
        self.0.lock().write_fault = Some(fault);
    }

    /// The next new segment is refused.
    pub fn plan_create(&self) {
        self.0.lock().create_fault = true;
    }

    /// Changes bits of a byte that was written. Returns the segment and the place.
    pub fn damage(&self, random: u64, mask: u8) -> Option<(u64, usize)> {
        let state = self.0.lock();
        let of = random as usize % state.segments.len().max(1);
        let (first, segment) = state.segments.iter().nth(of)?;
        let mut segment = segment.lock();
        let at = (random >> 20) as usize % segment.bytes.len().max(1);
        *segment.bytes.get_mut(at)? ^= mask;
        Some((*first, at))
    }

    /// Everything is gone: another volume.
    pub fn lose(&self) {
        let mut state = self.0.lock();
        state.segments.clear();
        state.pending = None;
    }
}

impl Volume for Memory {
    fn list(&self) -> io::Result<Vec<u64>> {
        Ok(self.0.lock().segments.keys().copied().collect())
    }

    fn open(&self, first_batch: u64) -> io::Result<Box<dyn Readable>> {
        let state = self.0.lock();
        let file = state.segments.get(&first_batch).cloned();
        let file = file.ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(Handle(self.0.clone(), file)))
    }

    fn create(&self, first_batch: u64, len_bytes: u64) -> io::Result<Box<dyn Writable>> {
        let mut state = self.0.lock();
        state.settle();
        if std::mem::take(&mut state.create_fault) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let segment = Segment {
            bytes: Vec::new(),
            len: len_bytes,
        };
        let file = Arc::new(Mutex::new(segment));
        state.segments.insert(first_batch, file.clone());
        Ok(Box::new(Handle(self.0.clone(), file)))
    }

    fn resume(&self, first_batch: u64, keep_bytes: u64) -> io::Result<Box<dyn Writable>> {
        let file = self.0.lock().segments.get(&first_batch).cloned();
        let file = file.ok_or(io::ErrorKind::NotFound)?;
        let mut segment = file.lock();
        segment.bytes.truncate(keep_bytes as usize);
        segment.len = segment.len.max(keep_bytes);
        drop(segment);
        Ok(Box::new(Handle(self.0.clone(), file)))
    }

    fn remove(&self, first_batch: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        state.settle();
        let gone = state.segments.remove(&first_batch);
        gone.map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn dir(&self) -> &Path {
        Path::new("log")
    }
}

/// An open segment.
struct Handle(Arc<Mutex<State>>, File);

impl Readable for Handle {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.1.lock().len)
    }

    fn read_exact_at(&self, raw: &mut [u8], at: u64) -> io::Result<()> {
        let segment = self.1.lock();
        if at + raw.len() as u64 > segment.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let there = segment.bytes.get(at as usize..).unwrap_or_default();
        let known = there.len().min(raw.len());
        raw[..known].copy_from_slice(&there[..known]);
        raw[known..].fill(0);
        Ok(())
    }
}

impl Writable for Handle {
    fn is_direct(&self) -> bool {
        true
    }

    fn len_bytes(&self) -> u64 {
        Readable::len_bytes(self).unwrap_or(0)
    }

    fn write(&mut self, buffer: &mut AlignedBuffer, len: usize, offset: u64) -> io::Result<()> {
        let bytes = buffer.bytes().get(..len).unwrap_or_default().to_vec();
        let pending = Pending {
            segment: self.1.clone(),
            at: offset,
            bytes,
        };
        let mut state = self.0.lock();
        // The writer begins the next one only when this one is durable.
        state.settle();
        match state.write_fault.take() {
            Some(fault) => {
                if fault == Fault::Torn {
                    state.tear(&pending);
                }
                Err(io::Error::other("the log's disk failed a write"))
            }
            None => {
                state.pending = Some(pending);
                Ok(())
            }
        }
    }
}
