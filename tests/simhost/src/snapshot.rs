//! Snapshots of disks, and copies: real files beside the disk, with its sidecars.
//!
//! `<disk>.snapshots/` holds `index.json` and a folder for each snapshot: the data, the descriptor or the
//! content id, the sidecars. Snapshots form a tree: each knows the one that the disk stood on.
//!
//! Invariant: a snapshot is in the index only when all of it is durable. A revert that was cut off is
//! noted, and finished before the disk is opened again: a disk never holds half of two states.

use crate::disk::identity::{self, replace, sync_folder};
use crate::disk::{FlatFile, Format, vmdk};
use crate::vm::sidecar;
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Data is copied this much at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// A snapshot, as it is listed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its number.
    pub id: u64,
    /// The one that the disk stood on.
    pub parent: Option<u64>,
    /// The disk's capacity then.
    pub capacity_bytes: u64,
}

/// The snapshots of a disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Index {
    /// The one that the disk stands on now.
    pub current: Option<u64>,
    /// All of them.
    pub snapshots: Vec<Snapshot>,
    /// A revert that has begun.
    reverting: Option<u64>,
}

/// A disk as files.
#[derive(Clone, Copy, Debug)]
pub struct DiskFiles<'a> {
    /// The disk.
    pub path: &'a Path,
    /// How it is stored.
    pub format: Format,
    /// Its data.
    pub data: &'a FlatFile,
}

fn folder(disk: &Path) -> PathBuf {
    let mut name = disk.file_name().unwrap_or_default().to_os_string();
    name.push(".snapshots");
    disk.with_file_name(name)
}

/// The snapshots of a disk; none if it never had one.
pub fn index(disk: &Path) -> anyhow::Result<Index> {
    let path = folder(disk).join("index.json");
    match std::fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Index::default()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn store(disk: &Path, index: &Index) -> anyhow::Result<()> {
    let path = folder(disk).join("index.json");
    let bytes = serde_json::to_vec_pretty(index)?;
    replace(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn find(disk: &Path, index: &Index, id: u64) -> anyhow::Result<Snapshot> {
    match index.snapshots.iter().find(|snapshot| snapshot.id == id) {
        Some(snapshot) => Ok(snapshot.clone()),
        None => {
            let known: Vec<u64> = index.snapshots.iter().map(|s| s.id).collect();
            bail!("{} has no snapshot {id}; it has {known:?}", disk.display())
        }
    }
}

/// Copies a disk's data; what is a hole, or holds nothing but zeros, takes no space.
fn copy_data(from: &FlatFile, to: &FlatFile) -> anyhow::Result<()> {
    let capacity = from.capacity_bytes();
    let (mut at, mut buffer) = (0, vec![0; PIECE_BYTES as usize]);
    while at < capacity {
        for extent in from.extents(at, capacity - at, 1024)? {
            let end = at + extent.len_bytes;
            if extent.hole {
                to.write_zeroes(at, extent.len_bytes, true)?;
            } else {
                while at < end {
                    let step = PIECE_BYTES.min(end - at);
                    let piece = buffer.get_mut(..step as usize).unwrap_or_default();
                    from.read_at(piece, at)?;
                    to.write_at(piece, at)?;
                    at += step;
                }
            }
            at = end;
        }
    }
    Ok(to.flush()?)
}

fn copy_file(from: &Path, to: &Path) -> anyhow::Result<()> {
    let copy = || {
        std::fs::copy(from, to)?;
        File::open(to)?.sync_all()
    };
    copy().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// The small file of a disk: a VMDK's descriptor, a raw disk's content id.
fn small_file(disk: &Path, format: Format) -> PathBuf {
    match format {
        Format::Raw => identity::record_path(disk),
        Format::Vmdk => disk.to_owned(),
    }
}

/// Keeps the disk as it is now under a number. Nothing may be written meanwhile.
pub fn create(disk: DiskFiles<'_>, id: u64) -> anyhow::Result<()> {
    let mut index = index(disk.path)?;
    if index.snapshots.iter().any(|snapshot| snapshot.id == id) {
        bail!("{} has a snapshot {id} already", disk.path.display());
    }
    disk.data.flush()?;
    let whole = folder(disk.path).join(id.to_string());
    let half = folder(disk.path).join(format!("{id}.half"));
    let _ = std::fs::remove_dir_all(&half);
    std::fs::create_dir_all(&half).with_context(|| format!("cannot make {}", half.display()))?;
    let copied = FlatFile::create(&half.join("data"), disk.data.capacity_bytes())?;
    copy_data(disk.data, &copied)?;
    let small = small_file(disk.path, disk.format);
    if small.exists() {
        copy_file(&small, &half.join("small"))?;
    }
    for (key, path) in sidecar::list(disk.path)? {
        copy_file(&path, &half.join(format!("{key:016x}.vmfd")))?;
    }
    sync_folder(&half.join("data"))?;
    std::fs::rename(&half, &whole).with_context(|| format!("cannot make {}", whole.display()))?;
    sync_folder(&whole)?;
    index.snapshots.push(Snapshot {
        id,
        parent: index.current,
        capacity_bytes: disk.data.capacity_bytes(),
    });
    index.current = Some(id);
    store(disk.path, &index)
}

/// What goes back besides the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revert {
    /// The disk is closed: its ids too.
    Closed,
    /// The disk is open: the ids are those of this opening.
    Open,
}

/// Puts the disk back as it was. Nothing may be written meanwhile.
pub fn revert(disk: DiskFiles<'_>, id: u64, how: Revert) -> anyhow::Result<()> {
    let mut index = index(disk.path)?;
    let snapshot = find(disk.path, &index, id)?;
    if snapshot.capacity_bytes != disk.data.capacity_bytes() {
        bail!(
            "{} has {} bytes, its snapshot {id} has {}: a disk is never made smaller",
            disk.path.display(),
            disk.data.capacity_bytes(),
            snapshot.capacity_bytes
        );
    }
    index.reverting = Some(id);
    store(disk.path, &index)?;
    put_back(disk, id, how)?;
    index.reverting = None;
    index.current = Some(id);
    store(disk.path, &index)
}

/// Finishes a revert that was cut off.
pub fn finish_revert(disk: DiskFiles<'_>) -> anyhow::Result<()> {
    if !folder(disk.path).exists() {
        return Ok(());
    }
    match index(disk.path)?.reverting {
        None => Ok(()),
        Some(id) => {
            tracing::warn!("disk {}: finishing a revert to {id}", disk.path.display());
            revert(disk, id, Revert::Closed)
        }
    }
}

fn put_back(disk: DiskFiles<'_>, id: u64, how: Revert) -> anyhow::Result<()> {
    let kept = folder(disk.path).join(id.to_string());
    copy_data(&FlatFile::open(&kept.join("data"))?, disk.data)?;
    let mut keys = Vec::new();
    for entry in std::fs::read_dir(&kept)? {
        let path = entry?.path();
        if let Some(key) = sidecar::key_of(&path, "") {
            // In place: whoever has it open goes on with the same file.
            sidecar::overwrite(disk.path, key, &std::fs::read(&path)?)?;
            keys.push(key);
        }
    }
    for (key, path) in sidecar::list(disk.path)? {
        if !keys.contains(&key) && sidecar::SidecarFile::open(disk.path, key).is_ok() {
            std::fs::remove_file(path)?;
        }
    }
    if how == Revert::Open {
        return Ok(());
    }
    let small = small_file(disk.path, disk.format);
    match std::fs::read(kept.join("small")) {
        Ok(bytes) => replace(&small, &bytes)?,
        Err(_) if disk.format == Format::Raw => std::fs::remove_file(&small)?,
        Err(error) => return Err(error).context("the snapshot has no descriptor"),
    }
    if disk.format == Format::Raw {
        identity::as_recorded(disk.path, disk.data)?;
    }
    Ok(())
}

/// Forgets a snapshot, or all; the disk stays as it is.
pub fn consolidate(disk: &Path, id: Option<u64>) -> anyhow::Result<()> {
    let mut index = index(disk)?;
    let gone: Vec<u64> = match id {
        Some(id) => vec![find(disk, &index, id)?.id],
        None => index.snapshots.iter().map(|s| s.id).collect(),
    };
    for id in &gone {
        let parent = find(disk, &index, *id)?.parent;
        index.snapshots.retain(|snapshot| snapshot.id != *id);
        let children = index.snapshots.iter_mut().map(|s| &mut s.parent);
        for place in children.chain([&mut index.current]) {
            if *place == Some(*id) {
                *place = parent;
            }
        }
    }
    // First from the index: what is left of a folder harms nobody.
    store(disk, &index)?;
    for id in gone {
        std::fs::remove_dir_all(folder(disk).join(id.to_string()))?;
    }
    Ok(())
}

/// A copy that is being made: its files are there, empty.
pub struct Copy {
    path: PathBuf,
    format: Format,
    data: FlatFile,
    /// Of the copy.
    pub disk_uuid: [u8; 16],
}

impl Copy {
    /// Makes the files of a copy.
    pub fn begin(to: &Path, format: Format, capacity_bytes: u64) -> anyhow::Result<Self> {
        let (data, disk_uuid) = match format {
            Format::Raw => {
                let data = FlatFile::create(to, capacity_bytes)?;
                let uuid = identity::raw_uuid(&data.metadata()?);
                (data, uuid)
            }
            Format::Vmdk => {
                let uuid = uuid::Uuid::new_v4().into_bytes();
                (vmdk::create_as(to, capacity_bytes, uuid)?, uuid)
            }
        };
        Ok(Self {
            path: to.to_owned(),
            format,
            data,
            disk_uuid,
        })
    }

    /// Fills it: the disk's data and its sidecars as they are now.
    pub fn fill(&self, disk: DiskFiles<'_>) -> anyhow::Result<()> {
        copy_data(disk.data, &self.data)?;
        for (key, path) in sidecar::list(disk.path)? {
            copy_file(&path, &sidecar::path_of(&self.path, key))?;
            sidecar::describe_copy(&self.path, self.format, key)?;
        }
        Ok(sync_folder(&self.path)?)
    }

    /// It is not to be: its files go.
    pub fn cancel(self) {
        for (_, path) in sidecar::list(&self.path).unwrap_or_default() {
            let _ = std::fs::remove_file(path);
        }
        let _ = std::fs::remove_file(self.data.path());
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
