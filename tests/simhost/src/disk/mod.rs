//! Virtual disks as files: raw, or monolithic flat VMDK (a text descriptor and a flat extent).
//!
//! Invariant: a call either does all of what it was asked or returns an error that says which file
//! and where; several threads may call at once, the kernel orders what overlaps.

mod file;
pub mod vmdk;

pub use file::{Extent, FlatFile};

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

/// Opens a disk; `format` `None` goes by the name.
pub fn open(path: &Path, format: Option<Format>) -> Result<FlatFile, DiskError> {
    match format.unwrap_or(Format::of(path)) {
        Format::Raw => FlatFile::open(path),
        Format::Vmdk => vmdk::open(path),
    }
}

/// Makes a disk of zeros.
pub fn create(path: &Path, format: Format, capacity_bytes: u64) -> Result<FlatFile, DiskError> {
    match format {
        Format::Raw => FlatFile::create(path, capacity_bytes),
        Format::Vmdk => vmdk::create(path, capacity_bytes),
    }
}
