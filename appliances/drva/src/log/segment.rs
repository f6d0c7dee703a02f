//! Segment files: made, written, read, found again.
//!
//! Invariant: a segment's space is allocated before it is used, so a write never changes a file's
//! length; a write is on stable storage when it returns (O_DSYNC, or fdatasync where the file
//! system has no direct I/O).

use crate::raw::{self, AlignedBuffer};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Path of the segment whose first batch has this number.
pub fn path_of(dir: &Path, first_batch: u64) -> PathBuf {
    dir.join(format!("seg-{first_batch:020}.log"))
}

/// The segments of a folder by their first batch's number, in order.
pub fn list(dir: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let number = name
            .strip_prefix("seg-")
            .and_then(|rest| rest.strip_suffix(".log"));
        found.extend(number.and_then(|digits| digits.parse::<u64>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Makes a folder's entries durable.
pub fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A segment that is being written.
#[derive(Debug)]
pub struct SegmentWriter {
    file: File,
    direct: bool,
    len_bytes: u64,
}

fn open_for_writing(path: &Path) -> io::Result<(File, bool)> {
    let direct = libc::O_DIRECT | libc::O_DSYNC;
    match OpenOptions::new()
        .write(true)
        .custom_flags(direct)
        .open(path)
    {
        Ok(file) => Ok((file, true)),
        // tmpfs and some others have no direct I/O.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            Ok((OpenOptions::new().write(true).open(path)?, false))
        }
        Err(e) => Err(e),
    }
}

impl SegmentWriter {
    /// Makes a segment, durable with its name and its space.
    pub fn create(dir: &Path, first_batch: u64, len_bytes: u64) -> io::Result<Self> {
        let path = path_of(dir, first_batch);
        let made = || {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .open(&path)?;
            fault::check("drva.log.allocate")
                .map_err(|_| io::Error::from_raw_os_error(libc::ENOSPC))?;
            raw::allocate(&file, len_bytes)?;
            file.sync_all()?;
            sync_folder(dir)?;
            let (file, direct) = open_for_writing(&path)?;
            Ok(Self {
                file,
                direct,
                len_bytes,
            })
        };
        made().inspect_err(|_: &io::Error| {
            let _ = std::fs::remove_file(&path);
        })
    }

    /// Opens a segment after a restart; everything from `keep_bytes` on becomes zeros, so that a torn
    /// batch can never be taken for a whole one later.
    pub fn resume(dir: &Path, first_batch: u64, keep_bytes: u64) -> io::Result<Self> {
        let path = path_of(dir, first_batch);
        let file = OpenOptions::new().write(true).open(&path)?;
        let len_bytes = file.metadata()?.len().max(keep_bytes);
        file.set_len(keep_bytes)?;
        file.set_len(len_bytes)?;
        raw::allocate(&file, len_bytes)?;
        file.sync_all()?;
        let (file, direct) = open_for_writing(&path)?;
        Ok(Self {
            file,
            direct,
            len_bytes,
        })
    }

    /// Whether writes go past the page cache.
    pub const fn is_direct(&self) -> bool {
        self.direct
    }

    /// Its length.
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Writes durably; offset and length are multiples of 4096.
    pub fn write(&self, buffer: &mut AlignedBuffer, len: usize, offset: u64) -> io::Result<()> {
        let bytes = buffer
            .bytes()
            .get(..len)
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.file.write_all_at(bytes, offset)?;
        if self.direct {
            Ok(())
        } else {
            self.file.sync_data()
        }
    }
}
