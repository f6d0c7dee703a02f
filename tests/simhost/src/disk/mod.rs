//! Virtual disks as files: raw, or monolithic flat VMDK (a text descriptor and a flat extent).
//!
//! Invariant: a call either does all of what it was asked or returns an error that says which file
//! and where; several threads may call at once, the kernel orders what overlaps. At most one process has
//! a disk open for writing (a lock on the file with the data).

mod file;
pub mod identity;
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

fn open_file(path: &Path, format: Format) -> Result<FlatFile, DiskError> {
    match format {
        Format::Raw => FlatFile::open(path),
        Format::Vmdk => vmdk::open(path),
    }
}

/// Opens a disk for writing; `format` `None` goes by the name.
pub fn open(path: &Path, format: Option<Format>) -> Result<OpenDisk, DiskError> {
    let format = format.unwrap_or(Format::of(path));
    let file = open_file(path, format)?;
    file.lock()?;
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
