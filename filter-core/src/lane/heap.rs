//! A lane in ordinary memory: what the tests and the simulator put in the place of a mapped file.
//!
//! Invariant: the memory is owned by this value alone and zeroed before the lane is written into it;
//! every handle to it is gone before the value is.

use super::consumer::Run;
use super::layout::{Identity, LaneError, LaneHome, LaneMemory, PAGE_BYTES};
use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use alloc::vec::Vec;
use core::ptr::NonNull;

/// A lane on the heap.
#[derive(Debug)]
pub struct HeapLane {
    base: NonNull<u8>,
    layout: Layout,
    memory: LaneMemory,
    identity: Identity,
}

// SAFETY: it owns its memory, which is reached through atomics and raw copies only, as `LaneMemory` says.
unsafe impl Send for HeapLane {}
// SAFETY: as above.
unsafe impl Sync for HeapLane {}

impl HeapLane {
    /// A fresh lane.
    pub fn create(identity: &Identity, capacity_bytes: u64) -> Result<Self, LaneError> {
        let len = identity.geometry.total_bytes() as usize;
        let too_long = LaneError::Field {
            field: "ring bytes",
            value: identity.geometry.ring_bytes,
        };
        let layout = Layout::from_size_align(len, PAGE_BYTES).map_err(|_| too_long)?;
        // SAFETY: the size is not zero: a lane has its fixed pages.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: just allocated, zeroed, nobody else's, and freed with this value only.
        let memory = unsafe { LaneMemory::create(base, len, identity, capacity_bytes) };
        let memory = memory.inspect_err(|_| {
            // SAFETY: allocated with this layout just before, and nobody has it.
            unsafe { dealloc(base.as_ptr(), layout) };
        })?;
        Ok(Self {
            base,
            layout,
            memory,
            identity: identity.clone(),
        })
    }

    /// The lane's memory.
    pub const fn memory(&self) -> LaneMemory {
        self.memory
    }

    /// Address of the lane's first byte.
    pub const fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Offset in the ring of an address that the consumer handed out; `None`: it lies elsewhere.
    pub fn ring_offset(&self, address: *const u8) -> Option<u64> {
        let data = self.base.as_ptr() as u64 + self.memory.geometry().data_at();
        let offset = (address as u64).checked_sub(data)?;
        (offset < self.memory.geometry().ring_bytes).then_some(offset)
    }

    /// Changes bits of a byte of the ring, as a fault of the memory would.
    pub fn flip(&self, ring_offset: u64, mask: u8) {
        let geometry = self.memory.geometry();
        if ring_offset >= geometry.ring_bytes {
            return;
        }
        let at = (geometry.data_at() + ring_offset) as usize;
        // SAFETY: just checked to lie inside the ring, which lives as long as `self`; a raw access, as all
        // are to memory that somebody else may write.
        unsafe {
            let byte = self.base.as_ptr().add(at);
            byte.write(byte.read() ^ mask);
        }
    }

    /// A copy of a run's bytes; `None` if it is no run of this lane, or goes round.
    pub fn bytes_of(&self, run: &Run) -> Option<Vec<u8>> {
        let end = self.ring_offset(run.base)? + run.len_bytes as u64;
        if end > self.memory.geometry().ring_bytes {
            return None;
        }
        let mut bytes = alloc::vec![0; run.len_bytes];
        // SAFETY: just checked to lie inside the ring, which lives as long as `self`; a raw copy.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(run.base, run.len_bytes)
        };
        Some(bytes)
    }
}

impl LaneHome for HeapLane {
    fn memory(&self) -> LaneMemory {
        self.memory
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }
}

impl Drop for HeapLane {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `create`.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}
