//! The chain of parts: which part is due next, which hash it names, and where a writer goes on.
//!
//! Invariant: parts are accepted in the order of their names without a gap, and each names the hash of
//! the one before (the first: of `timeline.json`).

use crate::builder::DiskState;
use crate::error::StoreError;
use crate::format::{PartIndex, Sha256Hash};
use crate::layout::{FIRST_TIMELINE, PartName, short, timeline_object};
use crate::reader::{Container, INDEX_PARALLEL};
use futures::{StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Where a writer goes on.
pub(crate) struct ResumePoint {
    /// The last part, and whether it commits its cut.
    pub(crate) newest: Option<(PartName, bool)>,
    pub(crate) previous: Sha256Hash,
    pub(crate) disks: BTreeMap<Uuid, DiskState>,
    /// Raw bytes in the parts of the open cut.
    pub(crate) cut_raw_bytes: u64,
}

impl Container {
    /// Finds where a writer goes on: the end of the chain and how far it has each disk.
    pub(crate) async fn chain_end(&self, timeline: u32) -> Result<ResumePoint, StoreError> {
        let (parts, _) = self.list_parts(timeline).await?;
        let mut point = ResumePoint {
            newest: None,
            previous: self.timeline_hash(timeline).await?,
            disks: BTreeMap::new(),
            cut_raw_bytes: 0,
        };
        let Some(last) = parts.last() else {
            return Ok(point);
        };
        // The last part tells whether its cut is open. If so, the positions are those of the cut
        // before it, moved on by the open cut's parts.
        let open_cut = last.name.cut;
        let from = parts.partition_point(|part| part.name.cut + 1 < open_cut);
        let recent = parts.get(from..).unwrap_or_default();
        let indexes: Vec<PartIndex> = futures::stream::iter(recent)
            .map(|part| self.fetch_index(part))
            .buffered(INDEX_PARALLEL)
            .try_collect()
            .await?;
        let mut link = match recent.first() {
            Some(first) if first.name.cut > 1 => ChainLink::joined(timeline, first.name.cut, None),
            _ => ChainLink::start(point.previous),
        };
        for (part, index) in recent.iter().zip(indexes) {
            link.expect_name(part.name)?;
            link.expect_previous(part.name, &index.header.previous)?;
            link.accept(part.name, &index);
            point.take(index);
        }
        point.newest = Some((last.name, !link.open));
        point.previous = link.hash.unwrap_or(point.previous);
        Ok(point)
    }
}

impl ResumePoint {
    fn take(&mut self, index: PartIndex) {
        let raw_bytes: u64 = index.blocks.iter().map(|b| u64::from(b.raw_bytes)).sum();
        self.cut_raw_bytes += raw_bytes;
        if index.commit.is_some() {
            // A commit's table has every disk of the domain: what is not in it has left.
            self.disks.clear();
            self.cut_raw_bytes = 0;
        }
        for disk in index.disks {
            let state = DiskState {
                seq: disk.last_seq,
                attach_epoch: disk.attach_epoch,
                sync_open: disk.sync_open,
                info_changed: false,
                info: disk.info,
            };
            self.disks.insert(state.info.uuid, state);
        }
    }
}

/// Walks the chain: which part is due next, and which hash it must name.
pub(crate) struct ChainLink {
    timeline: u32,
    pub(crate) cut: u64,
    part: u32,
    /// Whether the cut is not committed yet.
    pub(crate) open: bool,
    /// The hash of the part before, unless that part is not known.
    pub(crate) hash: Option<Sha256Hash>,
}

impl ChainLink {
    /// At the start of the first timeline, before any part.
    pub(crate) fn start(timeline_hash: Sha256Hash) -> Self {
        Self {
            timeline: FIRST_TIMELINE,
            cut: 0,
            part: 0,
            open: false,
            hash: Some(timeline_hash),
        }
    }

    /// In the middle of the chain, before the first part of `cut`; what is before is not looked at.
    /// `hash`: that of the part before, if it is known.
    pub(crate) fn joined(timeline: u32, cut: u64, hash: Option<Sha256Hash>) -> Self {
        Self {
            timeline,
            cut: cut - 1,
            part: 0,
            open: false,
            hash,
        }
    }

    /// The part that is due.
    pub(crate) fn next_name(&self) -> PartName {
        let (cut, part) = if self.open {
            (self.cut, self.part + 1)
        } else {
            (self.cut + 1, 1)
        };
        PartName {
            timeline: self.timeline,
            cut,
            part,
        }
    }

    pub(crate) fn expect_name(&self, name: PartName) -> Result<(), StoreError> {
        if name == self.next_name() {
            return Ok(());
        }
        Err(StoreError::Missing {
            object: self.next_name().to_string(),
        })
    }

    pub(crate) fn expect_previous(
        &self,
        name: PartName,
        previous: &Sha256Hash,
    ) -> Result<(), StoreError> {
        match &self.hash {
            Some(expected) if expected != previous => Err(StoreError::Chain {
                object: name.to_string(),
                previous: match name.before_in_cut() {
                    Some(before) => before.to_string(),
                    None if name.cut == 1 => timeline_object(name.timeline),
                    None => format!("(the last part of cut {})", name.cut - 1),
                },
                expected: format!("{}…", short(expected)),
                found: format!("{}…", short(previous)),
            }),
            _ => Ok(()),
        }
    }

    pub(crate) fn accept(&mut self, name: PartName, index: &PartIndex) {
        self.jump(name, index.commit.is_some(), Some(index.sha256));
    }

    /// Goes to a part whatever was due; `hash` is unknown if the part could not be read.
    pub(crate) fn jump(&mut self, name: PartName, commits: bool, hash: Option<Sha256Hash>) {
        self.cut = name.cut;
        self.part = name.part;
        self.open = !commits;
        self.hash = hash;
    }
}
