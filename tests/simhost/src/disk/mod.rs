//! Virtual disks as files: raw, or monolithic flat VMDK (a text descriptor and a flat extent).
//!
//! Invariant: a call either does all of what it was asked or returns an error that says which file
//! and where; several threads may call at once, the kernel orders what overlaps. At most one process has
//! a disk open for writing (a lock on the file with the data).

mod file;
pub mod identity;
pub mod undo;
pub mod vmdk;

pub use file::{Extent, FlatFile};
pub use identity::Identity;

use parking_lot::Mutex;
use std::ops::Deref;
use std::path::{Path, PathBuf};

/// What went wrong with a disk's files.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The operating system refused.
    #[error("cannot {what} {path}{place}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Where in it, for people; may be empty.
        place: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A VMDK descriptor that cannot be used.
    #[error("{path}: {why}")]
    Descriptor {
        /// The descriptor.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// How a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// A text descriptor names the flat extent.
    Vmdk,
}

impl Format {
    /// The format that a file's name suggests.
    pub fn of(path: &Path) -> Self {
        match path.extension() {
            Some(e) if e.eq_ignore_ascii_case("vmdk") => Self::Vmdk,
            _ => Self::Raw,
        }
    }
}

/// What I/O is carried out on.
pub trait Storage {
    /// Fills `buffer` from `offset`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError>;
    /// Writes `buffer` at `offset`.
    fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), DiskError>;
    /// The range reads as zeros afterwards; `may_punch`: its space may be given back.
    fn write_zeroes(&self, offset: u64, len: u64, may_punch: bool) -> Result<(), DiskError>;
    /// The same, or an error where it could only be done by writing.
    fn write_zeroes_fast(&self, offset: u64, len: u64, may_punch: bool) -> Result<(), DiskError>;
    /// Everything written before is durable when it returns.
    fn flush(&self) -> Result<(), DiskError>;
}

impl Storage for OpenDisk {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), DiskError> {
        self.file.write_at(buffer, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_punch: bool) -> Result<(), DiskError> {
        self.file.write_zeroes(offset, len, may_punch)
    }

    fn write_zeroes_fast(&self, offset: u64, len: u64, may_punch: bool) -> Result<(), DiskError> {
        self.file.write_zeroes_fast(offset, len, may_punch)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.file.flush()
    }
}

/// The error of a call on a whole file.
pub(crate) fn io_error(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> DiskError + use<> {
    let path = path.to_owned();
    move |source| DiskError::Io {
        what,
        path,
        place: String::new(),
        source,
    }
}

/// A disk that this process has open for writing, and nobody else. Dropped without [`Self::closed`]
/// it is left as by a process that was killed.
#[derive(Debug)]
pub struct OpenDisk {
    file: FlatFile,
    path: PathBuf,
    format: Format,
    identity: Mutex<Identity>,
}

impl Deref for OpenDisk {
    type Target = FlatFile;

    fn deref(&self) -> &FlatFile {
        &self.file
    }
}

impl OpenDisk {
    /// Which disk it is, and the ids of this opening.
    pub fn identity(&self) -> Identity {
        *self.identity.lock()
    }

    /// How it is stored.
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Closes it in order, so that another process may open it. Nothing is written through this handle any
    /// more, unless it is opened again.
    pub fn closed(&self) -> Result<(), DiskError> {
        let identity = self.identity();
        identity::closed(&self.path, self.format, &self.file, &identity)?;
        self.file.unlock()
    }

    /// Opens it again after [`Self::closed`]: an opening like any other.
    pub fn open_again(&self) -> Result<(), DiskError> {
        self.file.lock()?;
        *self.identity.lock() = identity::opened(&self.path, self.format, &self.file)?;
        Ok(())
    }
}

/// A disk's data, without an opening of the disk: no lock, no id.
pub(crate) fn open_file(path: &Path, format: Format) -> Result<FlatFile, DiskError> {
    match format {
        Format::Raw => FlatFile::open(path),
        Format::Vmdk => vmdk::open(path),
    }
}

/// Opens a disk for writing; `format` `None` goes by the name. A volatile cache is written back first.
pub fn open(path: &Path, format: Option<Format>) -> Result<OpenDisk, DiskError> {
    let disk = open_cached(path, format)?;
    undo::settle(path, &disk)?;
    Ok(disk)
}

/// The same with the volatile cache that it may have.
pub fn open_cached(path: &Path, format: Option<Format>) -> Result<OpenDisk, DiskError> {
    let format = format.unwrap_or(Format::of(path));
    let file = open_file(path, format)?;
    file.lock()?;
    let files = crate::snapshot::DiskFiles {
        path,
        format,
        data: &file,
    };
    crate::snapshot::finish_revert(files).map_err(|error| DiskError::Descriptor {
        path: path.to_owned(),
        why: format!("a revert was cut off and cannot be finished: {error:#}"),
    })?;
    let identity = identity::opened(path, format, &file)?;
    Ok(OpenDisk {
        file,
        path: path.to_owned(),
        format,
        identity: Mutex::new(identity),
    })
}

/// Makes a disk of zeros.
pub fn create(path: &Path, format: Format, capacity_bytes: u64) -> Result<FlatFile, DiskError> {
    match format {
        Format::Raw => FlatFile::create(path, capacity_bytes),
        Format::Vmdk => vmdk::create(path, capacity_bytes),
    }
}
