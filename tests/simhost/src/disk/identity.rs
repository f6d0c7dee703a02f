//! Which disk this is, and which content it has: the ids of the contract.
//!
//! Invariant: the content id is another one, durably, before the first byte of an opening can be
//! written; so whoever knows the id of an earlier opening knows whether there was one since.
//!
//! A VMDK has both in its descriptor (`ddb.uuid`, `CID`). A raw disk has its content id in a small file
//! beside it, with what the disk looked like when it was closed in order: a program that wrote it
//! meanwhile changed that. Its uuid is made from what makes a file this file.

use super::{DiskError, FlatFile, Format, io_error, vmdk};
use serde::{Deserialize, Serialize};
use std::fs::{File, Metadata};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What the contract tells of an open disk; zeros: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Another one for a copy.
    pub disk_uuid: [u8; 16],
    /// Of this opening.
    pub content_id: u64,
    /// Before this opening.
    pub content_id_before: u64,
}

/// The file beside a raw disk.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    content_id: u64,
    /// As the disk was when it was closed in order; none: it is open, or its end was another one.
    closed: Option<Looks>,
}

/// What another program's write changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Looks {
    modified_s: i64,
    modified_ns: i64,
    len_bytes: u64,
    device: u64,
    inode: u64,
}

impl Looks {
    fn of(meta: &Metadata) -> Self {
        Self {
            modified_s: meta.mtime(),
            modified_ns: meta.mtime_nsec(),
            len_bytes: meta.len(),
            device: meta.dev(),
            inode: meta.ino(),
        }
    }
}

/// The file that keeps a raw disk's content id.
pub fn record_path(disk: &Path) -> PathBuf {
    let mut name = disk.file_name().unwrap_or_default().to_os_string();
    name.push(".cid");
    disk.with_file_name(name)
}

/// Makes a file's name durable.
pub fn sync_folder(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// Puts a small file in place of an older one; durable, whole or not at all.
pub fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    sync_folder(path)
}

fn random_id() -> u64 {
    // Never 0, which stands for "not known".
    (uuid::Uuid::new_v4().as_u128() as u64).max(1)
}

/// A raw disk's uuid: device, inode and time of birth, mixed.
pub fn raw_uuid(meta: &Metadata) -> [u8; 16] {
    let born = meta.created().ok();
    let born = born.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let born_ns = born.map_or(0, |since| since.as_nanos() as u64);
    let mut state = 0x6a65_7464_7264_6973u64;
    let mut halves = [0u64; 2];
    for half in &mut halves {
        for word in [meta.dev(), meta.ino(), born_ns] {
            // Each step is a bijection of the state, so that a bit of a word is never lost alone.
            state = (state ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            state ^= state >> 29;
        }
        *half = state;
    }
    let all = u128::from(halves[0]) << 64 | u128::from(halves[1]);
    uuid::Builder::from_custom_bytes(all.to_be_bytes())
        .into_uuid()
        .into_bytes()
}

/// Notes that a disk is opened for writing, and tells its ids. The caller holds the disk's lock.
pub fn opened(path: &Path, format: Format, file: &FlatFile) -> Result<Identity, DiskError> {
    match format {
        Format::Vmdk => vmdk_opened(path),
        Format::Raw if !file.is_regular() => Ok(Identity::default()),
        Format::Raw => raw_opened(path, file),
    }
}

fn vmdk_opened(path: &Path) -> Result<Identity, DiskError> {
    let (cid, uuid) = vmdk::ids(path)?;
    let disk_uuid = uuid.unwrap_or_else(|| uuid::Uuid::new_v4().into_bytes());
    let next = vmdk::next_content_id(cid);
    vmdk::set_ids(path, next, uuid.is_none().then_some(disk_uuid))?;
    Ok(Identity {
        disk_uuid,
        content_id: u64::from(next),
        content_id_before: u64::from(cid),
    })
}

fn raw_opened(path: &Path, file: &FlatFile) -> Result<Identity, DiskError> {
    let meta = file.metadata()?;
    let record = record_path(path);
    let found = match std::fs::read(&record) {
        Ok(bytes) => serde_json::from_slice::<Record>(&bytes).ok(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(io_error("read", &record)(error)),
    };
    let before = match found {
        // After an end that was not in order its last writes are its own: the id alone counts.
        Some(Record { content_id, closed }) if closed.is_none_or(|was| was == Looks::of(&meta)) => {
            content_id
        }
        Some(_) => {
            tracing::warn!(
                "disk {}: it was changed while it was closed",
                path.display()
            );
            random_id()
        }
        None => random_id(),
    };
    let content_id = random_id();
    write_record(&record, content_id, None)?;
    Ok(Identity {
        disk_uuid: raw_uuid(&meta),
        content_id,
        content_id_before: before,
    })
}

fn write_record(record: &Path, content_id: u64, closed: Option<Looks>) -> Result<(), DiskError> {
    let bytes = serde_json::to_vec(&Record { content_id, closed }).unwrap_or_default();
    replace(record, &bytes).map_err(io_error("write", record))
}

/// A raw disk was brought back to when its record was written: makes it look like that.
pub fn as_recorded(path: &Path, file: &FlatFile) -> Result<(), DiskError> {
    let found = std::fs::read(record_path(path)).ok();
    let found = found.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
    let Some(looks) = found.and_then(|record| record.closed) else {
        return Ok(());
    };
    let since = Duration::new(looks.modified_s as u64, looks.modified_ns as u32);
    file.set_modified(UNIX_EPOCH + since)
}

/// Notes how a raw disk looks at an orderly close.
pub fn closed(
    path: &Path,
    format: Format,
    file: &FlatFile,
    of: &Identity,
) -> Result<(), DiskError> {
    if format == Format::Vmdk || !file.is_regular() {
        return Ok(());
    }
    file.flush()?;
    // The kernel's own times are coarse: a write within the same tick would not be seen. This one is
    // of a kind that no tick has.
    file.set_modified(SystemTime::now())?;
    let looks = Looks::of(&file.metadata()?);
    write_record(&record_path(path), of.content_id, Some(looks))
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
