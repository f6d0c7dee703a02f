//! Plain calls that the standard library does not offer, and memory aligned for direct I/O.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// Direct I/O wants offsets, lengths and addresses that are multiples of this.
pub const DIRECT_ALIGN: usize = 4096;

/// A buffer that direct I/O accepts.
#[derive(Debug)]
pub struct AlignedBuffer {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its memory, like a Box.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// Zeroed, of this length rounded up.
    pub fn new(len: usize) -> Self {
        let len = len.next_multiple_of(DIRECT_ALIGN).max(DIRECT_ALIGN);
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else {
            handle_alloc_error(layout)
        };
        Self { base, len }
    }

    fn layout(len: usize) -> Layout {
        // The length is a multiple of the alignment and far below the limit of a layout.
        Layout::from_size_align(len, DIRECT_ALIGN).unwrap_or(Layout::new::<u64>())
    }

    /// Its bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: it owns `len` initialised bytes.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), Self::layout(self.len)) };
    }
}

/// Reserves a file's space, so that later writes only fill it.
pub fn allocate(file: &File, len: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a plain call on an open file.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Lets this thread run only when others do not want to.
pub fn yield_to_others() {
    // SAFETY: plain calls; a refusal changes nothing.
    unsafe {
        let thread = libc::syscall(libc::SYS_gettid) as libc::id_t;
        libc::setpriority(libc::PRIO_PROCESS, thread, 10);
    }
}
