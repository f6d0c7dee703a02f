//! The shared files of a host's run folder, for the shells: lanes, locks, cut pages, wake-up pipes.
//!
//! Behind the feature `mapping`, since it needs an operating system; nothing else of this crate does.
//! Invariant: a lane gets its name only when it is complete, its space is allocated (so that no store
//! into it can fault for want of room), and it stays mapped while any [`MappedLane`] of it lives.
//!
//! ```text
//! <run>/boot-id              16 bytes in hex: this boot of the host
//! <run>/lanes/<disk>.lane    the lane; <disk> is the disk's id in hex
//! <run>/lanes/<disk>.lock    locked by the process that has the disk open
//! <run>/domains/<domain>.cut the domain's cut epoch
//! <run>/wake-<n>             the daemon's wake-up pipes (FIFOs)
//! <run>/daemon.lock          locked by the daemon
//! ```

use crate::lane::layout::{Identity, LaneError, LaneHome, LaneMemory, PAGE_BYTES};
use crate::lane::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};
use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use core::ptr::NonNull;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a lock is waited for that somebody only looks at.
const LOOK_LIMIT: Duration = Duration::from_secs(1);
const CUT_MAGIC: u32 = u32::from_le_bytes(*b"jdrC");
const CUT_VERSION: u8 = 1;

/// What went wrong with a file of the run folder.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The operating system refused.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not a usable lane.
    #[error("{path}: {source}")]
    Lane {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: LaneError,
    },
    /// The file is not a cut page.
    #[error("{0} is not a cut page: remove it, it is made anew")]
    CutPage(PathBuf),
    /// A name that cannot be a file's.
    #[error("`{0}` cannot be a domain's name: use letters, digits, `.`, `_` and `-`, at most 80")]
    Name(String),
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> MappingError + 'a {
    move |source| MappingError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Whether a name is fit for a domain: it becomes a file's and a container's name.
pub fn domain_name_is_valid(name: &str) -> bool {
    let fits = (1..=80).contains(&name.len()) && !name.starts_with('.');
    fits && name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// The host's monotonic clock, in ns: the same for all of its processes.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a plain call that fills the struct. It cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Bytes as lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// 16 bytes from 32 hex digits; anything between the digits that is not one is an error.
pub fn parse_id(text: &str) -> Option<[u8; 16]> {
    let digits = text.trim().replace('-', "");
    if digits.len() != 32 || !digits.is_ascii() {
        return None;
    }
    let mut id = [0u8; 16];
    for (i, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(id)
}

/// A host's run folder.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// The run folder at `path`; its folders are made if they are missing.
    pub fn open(path: &Path) -> Result<Self, MappingError> {
        for dir in [path.to_owned(), path.join("lanes"), path.join("domains")] {
            std::fs::create_dir_all(&dir).map_err(io_error("make the folder", &dir))?;
        }
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of the lanes.
    pub fn lanes_dir(&self) -> PathBuf {
        self.path.join("lanes")
    }

    /// A disk's lane.
    pub fn lane_path(&self, disk_id: &[u8; 16]) -> PathBuf {
        self.lanes_dir().join(format!("{}.lane", hex(disk_id)))
    }

    /// This boot of the host: the run folder's own file if there is one, else the kernel's.
    pub fn boot_id(&self) -> Result<[u8; 16], MappingError> {
        let own = self.path.join("boot-id");
        let path = if own.exists() {
            own
        } else {
            PathBuf::from("/proc/sys/kernel/random/boot_id")
        };
        let text = std::fs::read_to_string(&path).map_err(io_error("read", &path))?;
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "not 32 hex digits");
        parse_id(&text).ok_or_else(|| io_error("understand", &path)(invalid()))
    }

    /// Takes the lock of the process that has the disk open; `None` if another holds it.
    pub fn lock_disk(&self, disk_id: &[u8; 16]) -> Result<Option<Lock>, MappingError> {
        Lock::take(&self.lanes_dir().join(format!("{}.lock", hex(disk_id))))
    }

    /// Whether a process has the disk open. Looks by a shared lock, which [`Self::lock_disk`] tells
    /// from an owner's: a disk that is being opened at this moment is not refused because of it.
    pub fn disk_is_open(&self, disk_id: &[u8; 16]) -> Result<bool, MappingError> {
        let path = self.lanes_dir().join(format!("{}.lock", hex(disk_id)));
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Ok(!Lock::is_shareable(&file, &path)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(io_error("open", &path)(e)),
        }
    }

    /// Takes the daemon's lock; `None` if another daemon holds it.
    pub fn lock_daemon(&self) -> Result<Option<Lock>, MappingError> {
        Lock::take(&self.path.join("daemon.lock"))
    }

    /// Path of a wake-up pipe.
    pub fn wake_path(&self, slot: u32) -> PathBuf {
        self.path.join(format!("wake-{slot}"))
    }

    /// Opens the daemon's end of a wake-up pipe, making it if needed. Reads never block. The other
    /// end is held open too, so that a reader that polls does not see a hang-up when producers go.
    pub fn wake_reader(&self, slot: u32) -> Result<File, MappingError> {
        let path = self.wake_path(slot);
        let name = c_path(&path)?;
        // SAFETY: `name` is a valid C string for the length of the call.
        let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
        if made != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(io_error("make the pipe", &path)(error));
            }
        }
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        options
            .open(&path)
            .map_err(io_error("open the pipe", &path))
    }

    /// Whether a disk of the domain was ever opened here: then there is a page of its cut epoch.
    pub fn has_cut_page(&self, domain: &str) -> bool {
        domain_name_is_valid(domain) && self.cut_page_path(domain).exists()
    }

    fn cut_page_path(&self, domain: &str) -> PathBuf {
        self.path.join("domains").join(format!("{domain}.cut"))
    }

    /// Opens the page of a domain's cut epoch, making it (with epoch 1) if needed.
    pub fn cut_page(&self, domain: &str) -> Result<CutPage, MappingError> {
        if !domain_name_is_valid(domain) {
            return Err(MappingError::Name(domain.into()));
        }
        let path = self.cut_page_path(domain);
        if !path.exists() {
            let mut page = [0u8; PAGE_BYTES];
            page[..4].copy_from_slice(&CUT_MAGIC.to_le_bytes());
            page[4] = CUT_VERSION;
            page[64] = 1;
            let temporary = self
                .path
                .join(format!("domains/.{domain}.{}", std::process::id()));
            std::fs::write(&temporary, page).map_err(io_error("write", &temporary))?;
            // A link never replaces: of two that make the page at once, one wins and both use it.
            let linked = std::fs::hard_link(&temporary, &path);
            let _ = std::fs::remove_file(&temporary);
            match linked {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io_error("make", &path)(e));
                }
                _ => {}
            }
        }
        let map = Map::open(&path)?;
        if map.len < PAGE_BYTES || map.word(0).load(Relaxed) != CUT_MAGIC {
            return Err(MappingError::CutPage(path));
        }
        Ok(CutPage { map })
    }
}

fn c_path(path: &Path) -> Result<alloc::ffi::CString, MappingError> {
    let nul = |_| io_error("use the name", path)(io::ErrorKind::InvalidInput.into());
    alloc::ffi::CString::new(path.as_os_str().as_bytes()).map_err(nul)
}

/// A lock on a file, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    fn take(path: &Path) -> Result<Option<Self>, MappingError> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(path).map_err(io_error("open", path))?;
        let since = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Self { _file: file })),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => return Err(io_error("lock", path)(e)),
            }
            // Who only looks holds a shared lock, and lets go at once: that is no owner.
            if !Self::is_shareable(&file, path)? || since.elapsed() > LOOK_LIMIT {
                return Ok(None);
            }
            std::thread::yield_now();
        }
    }

    /// Whether a shared lock can be had, that is, nobody holds the lock as its owner. Lets go at once.
    fn is_shareable(file: &File, path: &Path) -> Result<bool, MappingError> {
        match file.try_lock_shared() {
            Ok(()) => {
                file.unlock().map_err(io_error("unlock", path))?;
                Ok(true)
            }
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(e)) => Err(io_error("lock", path)(e)),
        }
    }
}

/// A shared mapping of a whole file; unmapped when dropped.
#[derive(Debug)]
struct Map {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory; what is done with it is up to its users, who use atomics.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn open(path: &Path) -> Result<Self, MappingError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(io_error("open", path))?;
        Self::of(&file, path)
    }

    fn of(file: &File, path: &Path) -> Result<Self, MappingError> {
        let len = file.metadata().map_err(io_error("look at", path))?.len();
        let Some(len) = usize::try_from(len).ok().filter(|len| *len > 0) else {
            let need = PAGE_BYTES as u64;
            let source = LaneError::TooShort { have: len, need };
            return Err(MappingError::Lane {
                path: path.to_owned(),
                source,
            });
        };
        // SAFETY: a fresh shared mapping of a file that is open for reading and writing.
        let base = unsafe {
            libc::mmap(
                core::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { base, len }),
            _ => Err(io_error("map", path)(io::Error::last_os_error())),
        }
    }

    /// The 32-bit word at a constant offset inside the first page.
    fn word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= PAGE_BYTES && offset.is_multiple_of(4));
        // SAFETY: the first page is mapped (callers checked the length), aligned, atomics only.
        unsafe { self.base.add(offset).cast().as_ref() }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `of` with this length and is not used after this.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The page of a domain's cuts on a host. Little-endian; a page of version 0 has no hold yet, and zeros
/// in its place.
///
/// | at | bytes | field |
/// |---|---|---|
/// | 0 | 4 | magic `jdrC` |
/// | 4 | 4 | version, 1 |
/// | 64 | 4 | cut epoch |
/// | 128 | 8 | completions are held until then, ns of CLOCK_MONOTONIC; 0: they are not |
#[derive(Debug)]
pub struct CutPage {
    map: Map,
}

impl CutPage {
    /// The epoch word: see `ring::stamp_enter` and `ring::epoch_bump`.
    pub fn epoch(&self) -> &AtomicU32 {
        self.map.word(64)
    }

    /// The hold word: see `ring::hold_begin`, `ring::hold_until`.
    pub fn hold(&self) -> &AtomicU64 {
        // SAFETY: the first page is mapped (checked when the page was opened), aligned, atomics only.
        unsafe { self.map.base.add(128).cast().as_ref() }
    }
}

/// A lane that is mapped. [`LaneMemory`] copies taken from it must not outlive it.
#[derive(Debug)]
pub struct MappedLane {
    memory: LaneMemory,
    identity: Identity,
    path: PathBuf,
    _map: Map,
}

impl LaneHome for MappedLane {
    fn memory(&self) -> LaneMemory {
        self.memory()
    }

    fn identity(&self) -> &Identity {
        self.identity()
    }
}

impl MappedLane {
    /// Makes a lane and gives it its name, replacing what had that name.
    pub fn create(
        run: &RunFolder,
        identity: &Identity,
        capacity_bytes: u64,
    ) -> Result<Self, MappingError> {
        let path = run.lane_path(&identity.disk_id);
        let temporary = path.with_extension(format!("new-{}", std::process::id()));
        let mut options = OpenOptions::new();
        options
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .mode(0o600);
        let file = options
            .open(&temporary)
            .map_err(io_error("make", &temporary))?;
        let made = Self::fill(&file, &temporary, identity, capacity_bytes).and_then(|lane| {
            std::fs::rename(&temporary, &path).map_err(io_error("name", &path))?;
            Ok(Self { path, ..lane })
        });
        if made.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        made
    }

    fn fill(
        file: &File,
        path: &Path,
        identity: &Identity,
        capacity_bytes: u64,
    ) -> Result<Self, MappingError> {
        let bytes = identity.geometry.total_bytes();
        let len = libc::off_t::try_from(bytes).unwrap_or(libc::off_t::MAX);
        // SAFETY: a plain call on an open file. The space must be there before the mapping is
        // written: a full file system would otherwise kill the VM's process by SIGBUS.
        let refused = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) };
        if refused != 0 {
            return Err(io_error("allocate", path)(io::Error::from_raw_os_error(
                refused,
            )));
        }
        let map = Map::of(file, path)?;
        // SAFETY: freshly allocated and zero, not yet named, mapped as long as `map` lives, which
        // is as long as the lane lives.
        let memory = unsafe { LaneMemory::create(map.base, map.len, identity, capacity_bytes) }
            .map_err(|source| MappingError::Lane {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            memory,
            identity: identity.clone(),
            path: path.to_owned(),
            _map: map,
        })
    }

    /// Opens a lane by its path and checks its identity.
    pub fn open(path: &Path) -> Result<Self, MappingError> {
        let map = Map::open(path)?;
        // SAFETY: mapped as long as `map` lives, which is as long as the lane lives.
        let (memory, identity) =
            unsafe { LaneMemory::open(map.base, map.len) }.map_err(|source| {
                MappingError::Lane {
                    path: path.to_owned(),
                    source,
                }
            })?;
        Ok(Self {
            memory,
            identity,
            path: path.to_owned(),
            _map: map,
        })
    }

    /// The memory.
    pub const fn memory(&self) -> LaneMemory {
        self.memory
    }

    /// What the lane belongs to.
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The producers' end of the daemon's wake-up pipes.
#[derive(Debug)]
pub struct WakeSender {
    run: RunFolder,
    open: Option<(u32, File)>,
}

impl WakeSender {
    /// Opens pipes of this run folder when they are needed.
    pub const fn new(run: RunFolder) -> Self {
        Self { run, open: None }
    }

    /// Wakes the daemon that reads pipe `slot`. Never blocks; with no daemon there, does nothing
    /// (a daemon that starts looks at every lane first).
    pub fn wake(&mut self, slot: u32) {
        if self.open.as_ref().is_none_or(|(open, _)| *open != slot) {
            let mut options = OpenOptions::new();
            options
                .read(true) // with nobody there a write would otherwise raise SIGPIPE, which can kill the VM
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
            self.open = options
                .open(self.run.wake_path(slot))
                .ok()
                .map(|file| (slot, file));
        }
        if let Some((_, pipe)) = &mut self.open {
            match pipe.write(&[1]) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {} // full: it will wake anyway
                Err(_) => self.open = None, // the reader is gone; the next one is opened anew
            }
        }
    }
}

#[cfg(test)]
#[path = "mapping_tests.rs"]
mod tests;
