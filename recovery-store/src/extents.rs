//! A map of disjoint extents of one disk, in which the newest insertion wins.
//!
//! Invariant: entries never overlap and have no length 0; neighbours that continue each other are
//! one entry.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// Where the bytes of an extent come from; `skip` gives the place of its tail.
pub trait Place: Copy {
    /// The place of the byte `bytes` further on.
    fn skip(self, bytes: u64) -> Self;
    /// Whether `next` holds what follows `len_bytes` of self, so that both can be one entry.
    fn continues(self, len_bytes: u64, next: Self) -> bool;
}

/// One entry of an [`ExtentMap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<P> {
    /// Start on the disk, in bytes.
    pub offset_bytes: u64,
    /// Length in bytes, not 0.
    pub len_bytes: u64,
    /// Where its bytes are.
    pub place: P,
}

/// Disjoint extents of one disk; what was inserted last wins.
#[derive(Clone, Debug)]
pub struct ExtentMap<P> {
    entries: BTreeMap<u64, (u64, P)>,
}

impl<P> Default for ExtentMap<P> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
        }
    }
}

impl<P: Place> ExtentMap<P> {
    /// Entries in the map.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is in the map.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in order of their offset.
    pub fn iter(&self) -> impl Iterator<Item = Piece<P>> + '_ {
        self.entries
            .iter()
            .map(|(&offset_bytes, &(len_bytes, place))| Piece {
                offset_bytes,
                len_bytes,
                place,
            })
    }

    /// Puts `len_bytes` at `offset_bytes`, over whatever was there; `dropped` is told the place and
    /// length of everything that disappears. `offset_bytes + len_bytes` must not overflow.
    pub fn insert(
        &mut self,
        offset_bytes: u64,
        len_bytes: u64,
        place: P,
        mut dropped: impl FnMut(P, u64),
    ) {
        if len_bytes == 0 {
            return;
        }
        let end = offset_bytes + len_bytes;
        // The common case, a rewrite of exactly the same range, touches the tree once.
        if let Entry::Occupied(mut same) = self.entries.entry(offset_bytes)
            && same.get().0 == len_bytes
        {
            let (_, old) = same.insert((len_bytes, place));
            dropped(old, len_bytes);
            return;
        }
        if let Some((&start, &(len, old))) = self.entries.range(..offset_bytes).next_back()
            && start + len > offset_bytes
        {
            let old_end = start + len;
            self.entries.insert(start, (offset_bytes - start, old));
            dropped(
                old.skip(offset_bytes - start),
                old_end.min(end) - offset_bytes,
            );
            if old_end > end {
                self.entries
                    .insert(end, (old_end - end, old.skip(end - start)));
            }
        }
        while let Some((&start, &(len, old))) = self.entries.range(offset_bytes..end).next() {
            self.entries.remove(&start);
            let old_end = start + len;
            dropped(old, old_end.min(end) - start);
            if old_end > end {
                self.entries
                    .insert(end, (old_end - end, old.skip(end - start)));
            }
        }
        self.join(offset_bytes, len_bytes, place);
    }

    /// Adds an entry to a gap, as one with the neighbours that it continues.
    fn join(&mut self, mut offset_bytes: u64, mut len_bytes: u64, mut place: P) {
        if let Some((&start, &(len, before))) = self.entries.range(..offset_bytes).next_back()
            && start + len == offset_bytes
            && before.continues(len, place)
        {
            (offset_bytes, len_bytes, place) = (start, len + len_bytes, before);
        }
        let end = offset_bytes + len_bytes;
        if let Some(&(len, after)) = self.entries.get(&end)
            && place.continues(len_bytes, after)
        {
            self.entries.remove(&end);
            len_bytes += len;
        }
        self.entries.insert(offset_bytes, (len_bytes, place));
    }

    /// Changes every place, in order of the offsets.
    pub(crate) fn map_places(&mut self, mut change: impl FnMut(P, u64) -> P) {
        for (len, place) in self.entries.values_mut() {
            *place = change(*place, *len);
        }
    }

    /// Cuts everything at and beyond `end_bytes` off.
    pub fn truncate(&mut self, end_bytes: u64) {
        self.entries.split_off(&end_bytes);
        if let Some((&start, &(len, place))) = self.entries.iter().next_back()
            && start + len > end_bytes
        {
            self.entries.insert(start, (end_bytes - start, place));
        }
    }
}
