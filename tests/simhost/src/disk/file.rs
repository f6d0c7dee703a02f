//! A flat file as a disk: positioned reads and writes, holes, extents.
//!
//! `unsafe` here is three plain calls on an open file that the standard library does not offer.

use super::DiskError;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// A stretch of a disk that is either data or a hole that reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len_bytes: u64,
    /// It is a hole.
    pub hole: bool,
}

/// A disk in one flat file (or a block device).
#[derive(Debug)]
pub struct FlatFile {
    file: File,
    path: PathBuf,
    capacity_bytes: AtomicU64,
    regular: bool,
}

impl FlatFile {
    /// Opens a file for reading and writing. Its length must be a multiple of 512.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let error = |what, source| DiskError::Io {
            what,
            path: path.to_owned(),
            place: String::new(),
            source,
        };
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|e| error("open", e))?;
        let meta = file.metadata().map_err(|e| error("look at", e))?;
        let capacity = if meta.file_type().is_block_device() {
            use std::io::Seek;
            (&file)
                .seek(io::SeekFrom::End(0))
                .map_err(|e| error("find the end of", e))?
        } else {
            meta.len()
        };
        if capacity == 0 || !capacity.is_multiple_of(512) {
            let text = format!("{capacity} bytes is not a disk's length: a multiple of 512, not 0");
            return Err(error(
                "use",
                io::Error::new(io::ErrorKind::InvalidInput, text),
            ));
        }
        let regular = meta.file_type().is_file();
        Ok(Self {
            file,
            path: path.to_owned(),
            capacity_bytes: AtomicU64::new(capacity),
            regular,
        })
    }

    /// Makes a sparse file; refuses to replace one. Leaves none behind when it fails.
    pub fn create(path: &Path, capacity_bytes: u64) -> Result<Self, DiskError> {
        let error = |source| DiskError::Io {
            what: "make",
            path: path.to_owned(),
            place: String::new(),
            source,
        };
        let file = File::create_new(path).map_err(error)?;
        let made = file
            .set_len(capacity_bytes)
            .map_err(error)
            .and_then(|()| Self::open(path));
        if made.is_err() {
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Capacity in bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Acquire)
    }

    /// It is a file, no device.
    pub const fn is_regular(&self) -> bool {
        self.regular
    }

    fn whole(&self, what: &'static str) -> impl FnOnce(io::Error) -> DiskError + use<> {
        super::io_error(what, &self.path)
    }

    /// What the file system knows of it.
    pub fn metadata(&self) -> Result<Metadata, DiskError> {
        self.file.metadata().map_err(self.whole("look at"))
    }

    /// Sets the time of its last change.
    pub fn set_modified(&self, to: SystemTime) -> Result<(), DiskError> {
        let set = self.file.set_modified(to);
        set.map_err(self.whole("set the time of"))
    }

    /// Keeps every other opening for writing out, until [`Self::unlock`] or the end of this one.
    pub fn lock(&self) -> Result<(), DiskError> {
        let taken = self.file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                io::Error::new(io::ErrorKind::ResourceBusy, "another process has it open")
            }
            TryLockError::Error(error) => error,
        });
        taken.map_err(self.whole("open"))
    }

    /// Lets others open it for writing.
    pub fn unlock(&self) -> Result<(), DiskError> {
        self.file.unlock().map_err(self.whole("unlock"))
    }

    fn error(&self, what: &'static str, offset: u64, len: u64, source: io::Error) -> DiskError {
        let place = format!(" at byte {offset}, {len} bytes");
        DiskError::Io {
            what,
            path: self.path.clone(),
            place,
            source,
        }
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= self.capacity_bytes());
        end.map(|_| ())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "beyond the disk"))
    }

    /// Fills `buffer` from `offset`.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let len = buffer.len() as u64;
        self.check(offset, len)
            .and_then(|()| self.file.read_exact_at(buffer, offset))
            .map_err(|e| self.error("read", offset, len, e))
    }

    /// Writes `buffer` at `offset`.
    pub fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), DiskError> {
        let len = buffer.len() as u64;
        self.check(offset, len)
            .and_then(|()| self.file.write_all_at(buffer, offset))
            .map_err(|e| self.error("write", offset, len, e))
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = (offset as libc::off_t, len as libc::off_t);
        loop {
            // SAFETY: a plain call on an open file.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// The range reads as zeros afterwards; `may_punch`: its space may be given back.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_punch: bool) -> Result<(), DiskError> {
        let act = || {
            self.check(offset, len)?;
            self.fallocate(quick_zeroes(may_punch), offset, len)
                .or_else(|_| self.plain_zeroes(offset, len))
        };
        act().map_err(|e| self.error("write zeros to", offset, len, e))
    }

    /// The same, or an error of the kind `Unsupported` where it could only be done by writing.
    pub fn write_zeroes_fast(
        &self,
        offset: u64,
        len: u64,
        may_punch: bool,
    ) -> Result<(), DiskError> {
        self.check(offset, len)
            .and_then(|()| self.fallocate(quick_zeroes(may_punch), offset, len))
            .map_err(|e| self.error("write zeros quickly to", offset, len, e))
    }

    fn plain_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        static ZEROS: [u8; 65536] = [0; 65536];
        while len > 0 {
            let step = len.min(ZEROS.len() as u64);
            self.file
                .write_all_at(ZEROS.get(..step as usize).unwrap_or_default(), offset)?;
            offset += step;
            len -= step;
        }
        Ok(())
    }

    /// Everything written before is durable when it returns.
    pub fn flush(&self) -> Result<(), DiskError> {
        self.file
            .sync_data()
            .map_err(|e| self.error("flush", 0, self.capacity_bytes(), e))
    }

    /// Enlarges the disk.
    pub fn grow(&self, capacity_bytes: u64) -> Result<(), DiskError> {
        let old = self.capacity_bytes();
        let fits = capacity_bytes >= old && capacity_bytes.is_multiple_of(512);
        let refuse = || io::Error::new(io::ErrorKind::InvalidInput, "a disk only grows, by 512s");
        let grown = if fits {
            self.file.set_len(capacity_bytes)
        } else {
            Err(refuse())
        };
        grown.map_err(|e| self.error("grow", old, capacity_bytes, e))?;
        self.capacity_bytes.store(capacity_bytes, Ordering::Release); // pairs with `capacity_bytes`
        Ok(())
    }

    /// Takes a growth back of which nobody was told.
    pub(crate) fn take_back_growth(&self, capacity_bytes: u64) -> Result<(), DiskError> {
        self.capacity_bytes.store(capacity_bytes, Ordering::Release); // pairs with `capacity_bytes`
        self.file
            .set_len(capacity_bytes)
            .map_err(self.whole("make smaller again"))
    }

    fn seek(&self, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
        // SAFETY: a plain call on an open file; nothing here uses the file's position.
        let at = unsafe { libc::lseek(self.file.as_raw_fd(), offset as libc::off_t, whence) };
        match u64::try_from(at) {
            Ok(at) => Ok(Some(at)),
            Err(_) => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                e => Err(e),
            },
        }
    }

    /// The extents of a range, in order, at most `limit`; they cover a prefix of it, never nothing.
    pub fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>, DiskError> {
        let end = offset.saturating_add(len).min(self.capacity_bytes());
        let whole = vec![Extent {
            len_bytes: end.saturating_sub(offset),
            hole: false,
        }];
        if !self.regular {
            return Ok(whole);
        }
        let mut found: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < end && found.len() < limit {
            let data = self.seek(at, libc::SEEK_DATA);
            let data = data
                .map_err(|e| self.error("map", at, len, e))?
                .unwrap_or(end)
                .min(end);
            if data > at {
                found.push(Extent {
                    len_bytes: data - at,
                    hole: true,
                });
                at = data;
                continue;
            }
            let hole = self.seek(at, libc::SEEK_HOLE);
            let hole = hole
                .map_err(|e| self.error("map", at, len, e))?
                .unwrap_or(end)
                .min(end);
            if hole <= at {
                return Ok(whole);
            }
            found.push(Extent {
                len_bytes: hole - at,
                hole: false,
            });
            at = hole;
        }
        Ok(if found.is_empty() { whole } else { found })
    }
}

/// How the kernel makes a range read as zeros without writing it.
const fn quick_zeroes(may_punch: bool) -> libc::c_int {
    let how = if may_punch {
        libc::FALLOC_FL_PUNCH_HOLE
    } else {
        libc::FALLOC_FL_ZERO_RANGE
    };
    how | libc::FALLOC_FL_KEEP_SIZE
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn holes_zeros_and_growth() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FlatFile::create(&dir.path().join("d.raw"), 1 << 20).unwrap();
        disk.write_at(&[7; 4096], 65536).unwrap();
        let extents = disk.extents(0, 1 << 20, 8).unwrap();
        assert_eq!(
            extents.first(),
            Some(&Extent {
                len_bytes: 65536,
                hole: true
            })
        );
        assert_eq!(extents.iter().map(|e| e.len_bytes).sum::<u64>(), 1 << 20);
        disk.write_zeroes(65536, 4096, true).unwrap();
        let mut buffer = [1; 4096];
        disk.read_at(&mut buffer, 65536).unwrap();
        assert_eq!(buffer, [0; 4096]);
        let beyond = disk.write_at(&[1; 512], 1 << 20).unwrap_err().to_string();
        assert!(
            beyond.contains("d.raw") && beyond.contains("beyond the disk"),
            "{beyond}"
        );
        disk.grow(2 << 20).unwrap();
        disk.write_at(&[1; 512], 1 << 20).unwrap();
        assert!(disk.grow(1 << 20).is_err());
    }

    #[test]
    fn an_odd_length_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("odd");
        std::fs::write(&path, [0; 100]).unwrap();
        assert!(
            FlatFile::open(&path)
                .unwrap_err()
                .to_string()
                .contains("100 bytes")
        );
    }
}
