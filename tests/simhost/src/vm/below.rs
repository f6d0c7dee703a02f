//! What lies below the filter: the disk's file, with the faults that were asked for, and perhaps a cache
//! that a power cut empties.
//!
//! Invariant: all I/O of a disk under the filter goes through here, the guest's and the filter's own.

use super::faults::{Faults, Strike, What, die};
use crate::disk::undo::Undo;
use crate::disk::{DiskError, OpenDisk, Storage};
use parking_lot::Mutex;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// A disk below the filter.
pub struct Below {
    disk: OpenDisk,
    label: String,
    faults: Arc<Faults>,
    /// What is in it no flush has covered.
    cache: Option<Mutex<Undo>>,
}

impl Deref for Below {
    type Target = OpenDisk;

    fn deref(&self) -> &OpenDisk {
        &self.disk
    }
}

impl Below {
    /// This disk, with these faults.
    pub fn new(disk: OpenDisk, label: &str, faults: Arc<Faults>, cache: Option<Undo>) -> Self {
        Self {
            disk,
            label: label.into(),
            faults,
            cache: cache.map(Mutex::new),
        }
    }

    fn injected(&self, what: &'static str, offset: u64, len: u64) -> DiskError {
        DiskError::Io {
            what,
            path: self.disk.path().to_owned(),
            place: format!(" at byte {offset}, {len} bytes"),
            source: io::Error::from_raw_os_error(libc::EIO),
        }
    }

    /// Changes a range; what it held goes to the cache's journal first, in the order of the changes.
    fn change(
        &self,
        offset: u64,
        len: u64,
        change: impl FnOnce() -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let Some(cache) = &self.cache else {
            return change();
        };
        let mut cache = cache.lock();
        if offset.saturating_add(len) <= self.disk.capacity_bytes() {
            cache.note(&self.disk, offset, len)?;
        }
        change()
    }

    /// Does what is left of a write after the faults; `part` does a part of it.
    fn struck(
        &self,
        offset: u64,
        len: u64,
        part: impl Fn(Range<usize>) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        match self.faults.strike(What::Write, &self.label, offset, len) {
            Strike::Pass => self.change(offset, len, || part(0..len as usize)),
            Strike::Fail => Err(self.injected("write, as asked for,", offset, len)),
            Strike::Tear { landed, kill } => {
                for run in landed {
                    let (at, bytes) = (offset + run.start as u64, run.len() as u64);
                    self.change(at, bytes, || part(run))?;
                }
                if kill {
                    die("in the middle of a write of the disk");
                }
                Err(self.injected("write all, as asked for,", offset, len))
            }
        }
    }
}

impl Storage for Below {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let len = buffer.len() as u64;
        match self.faults.strike(What::Read, &self.label, offset, len) {
            Strike::Pass => self.disk.read_at(buffer, offset),
            _ => Err(self.injected("read, as asked for,", offset, len)),
        }
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), DiskError> {
        self.struck(offset, buffer.len() as u64, |run| {
            let at = offset + run.start as u64;
            self.disk.write_at(buffer.get(run).unwrap_or_default(), at)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_punch: bool) -> Result<(), DiskError> {
        self.struck(offset, len, |run| {
            let at = offset + run.start as u64;
            self.disk.write_zeroes(at, run.len() as u64, may_punch)
        })
    }

    fn write_zeroes_fast(&self, offset: u64, len: u64, may_punch: bool) -> Result<(), DiskError> {
        self.struck(offset, len, |run| {
            let at = offset + run.start as u64;
            self.disk.write_zeroes_fast(at, run.len() as u64, may_punch)
        })
    }

    fn flush(&self) -> Result<(), DiskError> {
        match self.faults.strike(What::Flush, &self.label, 0, 0) {
            Strike::Pass => {}
            _ => return Err(self.injected("flush, as asked for,", 0, 0)),
        }
        match &self.cache {
            None => self.disk.flush(),
            Some(cache) => cache.lock().flush(&self.disk),
        }
    }
}
