//! A guest's disk and its sidecar as the host has them: what a power cut takes, and what it tears.
//!
//! Invariant: what was flushed is never lost; of what was not, each unit keeps one of the contents that
//! it had since it was flushed last.
//!
//! Content is kept as one number for each unit of 4 KiB; its bytes are that number, again and again.

use crate::numbers::Numbers;
use filter_core::sidecar::BLOCK_BYTES;
use std::collections::BTreeMap;

/// Bytes of a unit: the guest's I/O is a multiple of it.
pub const UNIT_BYTES: u64 = 4096;

/// Fills `out` with the bytes of these units.
pub fn bytes_of(units: &[u64], out: &mut Vec<u8>) {
    out.clear();
    out.reserve_exact(units.len() * UNIT_BYTES as usize);
    for unit in units {
        let word = unit.to_le_bytes();
        let start = out.len();
        out.extend_from_slice(&word);
        // Doubling: far quicker than word by word.
        while out.len() - start < UNIT_BYTES as usize {
            out.extend_from_within(start..);
        }
    }
}

/// The unit that these bytes are; `None`: they are none.
pub fn unit_of(bytes: &[u8]) -> Option<u64> {
    let (words, rest) = bytes.as_chunks::<8>();
    let first = words.first()?;
    (rest.is_empty() && words.iter().all(|word| word == first)).then(|| u64::from_le_bytes(*first))
}

/// A disk.
#[derive(Clone, Debug)]
pub struct Disk {
    content: Vec<u64>,
    /// Per unit that is not flushed: what it held when it was, and what it held since.
    volatile: BTreeMap<usize, Vec<u64>>,
}

impl Disk {
    /// Of zeros.
    pub fn new(units: usize) -> Self {
        Self {
            content: vec![0; units],
            volatile: BTreeMap::new(),
        }
    }

    /// What it holds.
    pub fn content(&self) -> &[u64] {
        &self.content
    }

    /// Its units.
    pub fn units(&self) -> usize {
        self.content.len()
    }

    /// Writes a unit.
    pub fn write(&mut self, unit: usize, value: u64) {
        if let Some(place) = self.content.get_mut(unit) {
            self.volatile
                .entry(unit)
                .or_insert_with(|| vec![*place])
                .push(value);
            *place = value;
        }
    }

    /// Everything that was written is durable from now on.
    pub fn flush(&mut self) {
        self.volatile.clear();
    }

    /// Grows by so many units, of this content.
    pub fn grow(&mut self, units: usize, value: u64) {
        self.content.extend(std::iter::repeat_n(value, units));
    }

    /// The power goes. Returns how many units lost what was written last.
    pub fn power_cut(&mut self, numbers: &mut Numbers) -> usize {
        let mut lost = 0;
        for (unit, values) in std::mem::take(&mut self.volatile) {
            let kept = numbers.pick(&values);
            if let (Some(kept), Some(place)) = (kept, self.content.get_mut(unit)) {
                lost += usize::from(*place != kept);
                *place = kept;
            }
        }
        lost
    }
}

/// What happens to writes of a sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SidecarFault {
    /// They are refused, and change nothing.
    Refused,
    /// They are refused, and some sectors are changed.
    Torn,
}

/// A sidecar.
#[derive(Clone, Debug, Default)]
pub struct Sidecar {
    raw: Vec<u8>,
}

impl Sidecar {
    /// Of this length.
    pub fn new(len_bytes: u64) -> Self {
        Self {
            raw: vec![0; len_bytes as usize],
        }
    }

    /// Its bytes.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Changes bits of a byte.
    pub fn flip(&mut self, at: u64, mask: u8) {
        if let Some(byte) = self.raw.get_mut(at as usize) {
            *byte ^= mask;
        }
    }

    /// Writes a block durably. `false`: it was refused.
    pub fn write(
        &mut self,
        offset_bytes: u64,
        block: &[u8; BLOCK_BYTES],
        fault: Option<SidecarFault>,
        numbers: &mut Numbers,
    ) -> bool {
        let at = offset_bytes as usize;
        let Some(place) = self.raw.get_mut(at..at + BLOCK_BYTES) else {
            return false;
        };
        for (sector, new) in place.chunks_mut(512).zip(block.chunks(512)) {
            let written = match fault {
                None => true,
                Some(SidecarFault::Refused) => false,
                Some(SidecarFault::Torn) => numbers.chance(500),
            };
            if written {
                sector.copy_from_slice(new);
            }
        }
        fault.is_none()
    }
}
