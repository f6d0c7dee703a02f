//! The files beside a disk that the host keeps for the filter.
//!
//! Invariant: a sidecar has one holder at a time, over all processes (a lock on the file); a write is
//! on stable storage when it returns.

use crate::disk::identity::sync_folder;
use crate::disk::{Format, vmdk};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Lengths and offsets are multiples of this.
pub const UNIT_BYTES: u64 = 4096;
/// The longest sidecar.
pub const MAX_BYTES: u64 = 256 << 20;

/// The sidecar's file: `<disk>-<16 hex>.vmfd` beside the disk.
pub fn path_of(disk: &Path, key: u64) -> PathBuf {
    let stem = disk.file_stem().unwrap_or_default().to_string_lossy();
    disk.with_file_name(format!("{stem}-{key:016x}.vmfd"))
}

/// The key in a sidecar's name, `<prefix><16 hex>.vmfd`.
pub fn key_of(path: &Path, prefix: &str) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let digits = name.strip_prefix(prefix)?.strip_suffix(".vmfd")?;
    let number = u64::from_str_radix(digits, 16).ok()?;
    (digits.len() == 16).then_some(number)
}

/// The sidecars of a disk.
pub fn list(disk: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let prefix = format!(
        "{}-",
        disk.file_stem().unwrap_or_default().to_string_lossy()
    );
    let folder = disk.parent().filter(|p| !p.as_os_str().is_empty());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder.unwrap_or(Path::new(".")))? {
        let path = entry?.path();
        found.extend(key_of(&path, &prefix).map(|key| (key, path)));
    }
    found.sort();
    Ok(found)
}

/// Gives a sidecar other content, in place, whoever has it open; durable when it returns.
pub fn overwrite(disk: &Path, key: u64, bytes: &[u8]) -> io::Result<()> {
    let path = path_of(disk, key);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)?;
    file.set_len(bytes.len() as u64)?;
    file.write_all_at(bytes, 0)?;
    file.sync_all()?;
    sync_folder(&path)
}

/// Notes the sidecar of a copy in its descriptor.
pub fn describe_copy(disk: &Path, format: Format, key: u64) -> io::Result<()> {
    let path = path_of(disk, key);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    describe(disk, format, Some((key, &name)))
}

/// An open sidecar.
#[derive(Debug)]
pub struct SidecarFile {
    file: File,
    len_bytes: u64,
}

impl SidecarFile {
    /// Makes one of zeros, durable with its name.
    pub fn create(disk: &Path, format: Format, key: u64, len_bytes: u64) -> io::Result<Self> {
        let path = path_of(disk, key);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        let made = file.set_len(len_bytes).and_then(|()| file.sync_all());
        let made = made.and_then(|()| sync_folder(&path)).and_then(|()| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            describe(disk, format, Some((key, &name)))
        });
        if let Err(error) = made {
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        Self::lock(file, len_bytes)
    }

    /// Opens one; `WouldBlock`: somebody else has it open.
    pub fn open(disk: &Path, key: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path_of(disk, key))?;
        let len_bytes = file.metadata()?.len();
        Self::lock(file, len_bytes)
    }

    fn lock(file: File, len_bytes: u64) -> io::Result<Self> {
        match file.try_lock() {
            Ok(()) => Ok(Self { file, len_bytes }),
            Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Its length.
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Fills a buffer.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Writes durably.
    pub fn write(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.file.write_all_at(buffer, offset)?;
        self.file.sync_data()
    }
}

/// Deletes a sidecar durably; `WouldBlock`: it is open.
pub fn delete(disk: &Path, format: Format, key: u64) -> io::Result<()> {
    let path = path_of(disk, key);
    let open = SidecarFile::open(disk, key)?;
    std::fs::remove_file(&path)?;
    drop(open);
    describe(disk, format, None)?;
    sync_folder(&path)
}

/// Notes the filter and its sidecar in a VMDK's descriptor, as the platform does.
fn describe(disk: &Path, format: Format, sidecar: Option<(u64, &str)>) -> io::Result<()> {
    if format != Format::Vmdk {
        return Ok(());
    }
    let line = sidecar.map(|(key, name)| format!("{key:016x},{name}"));
    let filter = sidecar.map(|_| "jetdr");
    vmdk::set_line(disk, "ddb.iofilters", filter)
        .and_then(|()| vmdk::set_line(disk, "ddb.sidecars", line.as_deref()))
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn life_of_a_sidecar() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("d.vmdk");
        crate::disk::vmdk::create(&disk, 1 << 20).unwrap();
        let made = SidecarFile::create(&disk, Format::Vmdk, 7, 8192).unwrap();
        made.write(4096, &[3; 4096]).unwrap();
        assert_eq!(
            SidecarFile::open(&disk, 7).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(made);
        let text = std::fs::read_to_string(&disk).unwrap();
        assert!(text.contains("ddb.sidecars = \"0000000000000007,d-0000000000000007.vmfd\""));
        let mut buffer = [0; 4096];
        SidecarFile::open(&disk, 7)
            .unwrap()
            .read(4096, &mut buffer)
            .unwrap();
        assert_eq!(buffer, [3; 4096]);
        let twice = SidecarFile::create(&disk, Format::Vmdk, 7, 8192).unwrap_err();
        assert_eq!(twice.kind(), io::ErrorKind::AlreadyExists);
        delete(&disk, Format::Vmdk, 7).unwrap();
        assert!(!std::fs::read_to_string(&disk).unwrap().contains("sidecars"));
        assert_eq!(
            SidecarFile::open(&disk, 7).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
