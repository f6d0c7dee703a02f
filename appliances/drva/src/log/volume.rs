//! Where a log's segments lie: a folder of files, or (in the simulator) memory.
//!
//! Invariant: a write is on stable storage when it returns, and so are a segment's name and space when
//! it was made, and its end when it was removed.

use super::segment::{self, SegmentWriter};
use crate::raw::AlignedBuffer;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where segments lie, each named by the number of its first batch.
pub trait Volume: Send + Sync {
    /// Those that are there, in order.
    fn list(&self) -> io::Result<Vec<u64>>;
    /// Opens one for reading.
    fn open(&self, first_batch: u64) -> io::Result<Box<dyn Readable>>;
    /// Makes one of this length, filled with zeros.
    fn create(&self, first_batch: u64, len_bytes: u64) -> io::Result<Box<dyn Writable>>;
    /// Goes on in one; everything from `keep_bytes` on becomes zeros.
    fn resume(&self, first_batch: u64, keep_bytes: u64) -> io::Result<Box<dyn Writable>>;
    /// Removes one.
    fn remove(&self, first_batch: u64) -> io::Result<()>;
    /// The place, for messages.
    fn dir(&self) -> &Path;
    /// The place of a segment, for messages.
    fn path_of(&self, first_batch: u64) -> PathBuf {
        segment::path_of(self.dir(), first_batch)
    }
}

/// A segment for reading.
pub trait Readable: Send {
    /// Its length.
    fn len_bytes(&self) -> io::Result<u64>;
    /// Fills `raw` from `at` on; [`io::ErrorKind::UnexpectedEof`] if it ends before.
    fn read_exact_at(&self, raw: &mut [u8], at: u64) -> io::Result<()>;
}

/// A segment for writing.
pub trait Writable: Send {
    /// Whether writes go past the page cache.
    fn is_direct(&self) -> bool;
    /// Its length.
    fn len_bytes(&self) -> u64;
    /// Writes durably; offset and length are multiples of 4096.
    fn write(&mut self, buffer: &mut AlignedBuffer, len: usize, offset: u64) -> io::Result<()>;
}

/// A folder of files.
pub struct Folder(PathBuf);

impl Folder {
    /// This one.
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }
}

impl Volume for Folder {
    fn list(&self) -> io::Result<Vec<u64>> {
        segment::list(&self.0)
    }

    fn open(&self, first_batch: u64) -> io::Result<Box<dyn Readable>> {
        Ok(Box::new(File::open(self.path_of(first_batch))?))
    }

    fn create(&self, first_batch: u64, len_bytes: u64) -> io::Result<Box<dyn Writable>> {
        let made = SegmentWriter::create(&self.0, first_batch, len_bytes)?;
        Ok(Box::new(made))
    }

    fn resume(&self, first_batch: u64, keep_bytes: u64) -> io::Result<Box<dyn Writable>> {
        let resumed = SegmentWriter::resume(&self.0, first_batch, keep_bytes)?;
        Ok(Box::new(resumed))
    }

    fn remove(&self, first_batch: u64) -> io::Result<()> {
        std::fs::remove_file(self.path_of(first_batch))?;
        segment::sync_folder(&self.0)
    }

    fn dir(&self) -> &Path {
        &self.0
    }
}

impl Readable for File {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, raw: &mut [u8], at: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, raw, at)
    }
}

impl Writable for SegmentWriter {
    fn is_direct(&self) -> bool {
        self.is_direct()
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes()
    }

    fn write(&mut self, buffer: &mut AlignedBuffer, len: usize, offset: u64) -> io::Result<()> {
        Self::write(self, buffer, len, offset)
    }
}
