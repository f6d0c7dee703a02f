//! Memory of the lane's kind for the plain copy: a shared mapping of a file on tmpfs.
//!
//! Invariant: the file has no name any more when the mapping is handed out, so no other process can
//! reach it and plain slices over it are sound. Ordinary heap memory may get huge pages, a lane does
//! not: the copy would look faster than it is.

use anyhow::Context;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// The mapping; unmapped when dropped.
#[derive(Debug)]
pub struct PlainMap {
    base: NonNull<u8>,
    len_bytes: usize,
}

impl PlainMap {
    /// Maps `len_bytes` of a nameless file in `folder`, every page touched.
    pub fn new(folder: &std::path::Path, len_bytes: usize) -> anyhow::Result<Self> {
        anyhow::ensure!(len_bytes > 0, "an empty mapping cannot be made");
        let file = tempfile::tempfile_in(folder)
            .with_context(|| format!("make a file in {}", folder.display()))?;
        file.set_len(len_bytes as u64)
            .context("set the length of the plain target")?;
        // SAFETY: a fresh shared mapping of a file that is open for reading and writing.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        let base =
            NonNull::new(base.cast::<u8>()).filter(|p| p.as_ptr().cast() != libc::MAP_FAILED);
        let Some(base) = base else {
            return Err(std::io::Error::last_os_error()).context("map the plain target");
        };
        let mut map = Self { base, len_bytes };
        map.bytes_mut().fill(1);
        Ok(map)
    }

    /// The memory.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped for `len_bytes` while `self` lives; nobody else can reach it (no name, one
        // mapping), and the borrow of `self` keeps slices apart.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len_bytes) }
    }
}

impl Drop for PlainMap {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length, not used after this.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len_bytes) };
    }
}
