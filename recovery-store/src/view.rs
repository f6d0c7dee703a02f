//! What a reader gets of a cut: who is in it, and per disk where its newest bytes are.
//!
//! Invariant: the maps hold what applying the parts in order gives; a range that no part mentions reads
//! as zeros.

use crate::codec::hex;
use crate::extents::{ExtentMap, Place};
use crate::format::{BlockEntry, DiskInfo, PartIndex, Position, Sha256Hash, Source};
use crate::layout::PartName;
use serde::Serialize;
use std::collections::HashMap;
use std::sync::Arc;
use uuid::Uuid;

/// What there is to know of a committed cut.
#[derive(Clone, Debug, Serialize)]
pub struct CutInfo {
    /// Its number.
    pub cut: u64,
    /// When it was closed, ns since 1970.
    pub time_ns: u64,
    /// The hosts' cut epoch.
    pub cut_epoch: u32,
    /// The operator's name for it.
    pub name: Option<String>,
    /// Its parts.
    pub parts: u32,
    /// Records in it.
    pub records: u64,
    /// Raw data bytes in its parts.
    pub raw_bytes: u64,
    /// Bytes of its objects.
    pub stored_bytes: u64,
    /// The disks that it has.
    pub disks: Vec<DiskInfo>,
    /// Per disk, its last record in the cut.
    pub positions: Vec<Position>,
}

/// A cut in a listing: known, or damaged.
#[derive(Clone, Debug)]
pub struct CutEntry {
    /// Its number.
    pub cut: u64,
    /// What is known, or what is wrong.
    pub state: Result<CutInfo, String>,
}

/// Which cut is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CutSelector {
    /// The newest committed one.
    Latest,
    /// By number.
    Number(u64),
    /// By the operator's name; the newest of that name.
    Name(String),
}

impl std::str::FromStr for CutSelector {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.parse() {
            Ok(number) => Self::Number(number),
            Err(_) if text == "latest" => Self::Latest,
            Err(_) => Self::Name(text.to_owned()),
        })
    }
}

/// Where the newest bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartBlocks {
    /// The range reads as zeros.
    Zero,
    /// In a block of a part.
    Block {
        /// Index into [`CutView::parts`].
        part: u32,
        /// The block's number in the part.
        block: u32,
        /// Start in the raw block, in bytes.
        offset_bytes: u32,
    },
}

impl Place for PartBlocks {
    fn skip(self, bytes: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Block {
                part,
                block,
                offset_bytes,
            } => Self::Block {
                part,
                block,
                // An extent ends within its block, which is far below 4 GiB.
                offset_bytes: offset_bytes + bytes as u32,
            },
        }
    }

    fn continues(self, len_bytes: u64, next: Self) -> bool {
        match self {
            Self::Zero => next == Self::Zero,
            // Within one block only: an entry never spans blocks.
            Self::Block { .. } => self.skip(len_bytes) == next,
        }
    }
}

/// A part that a cut needs, and its blocks.
#[derive(Clone, Debug)]
pub struct PartRef {
    /// Which part.
    pub name: PartName,
    /// Its hash.
    pub sha256: Sha256Hash,
    /// Its data blocks.
    pub blocks: Arc<[BlockEntry]>,
}

/// The disks of a domain as of one cut.
pub struct CutView {
    /// The cut.
    pub info: CutInfo,
    /// The parts that the maps refer to.
    pub parts: Vec<PartRef>,
    /// Per disk, where its newest bytes are; ranges that are absent read as zeros.
    pub extents: HashMap<Uuid, ExtentMap<PartBlocks>>,
    /// The hash of the cut's last part: it identifies cut, history and container.
    pub sha256: Sha256Hash,
}

impl CutView {
    pub(crate) fn add_part(&mut self, name: PartName, index: PartIndex) {
        let number = self.parts.len() as u32;
        for disk in &index.disks {
            let Some(map) = self.extents.get_mut(&disk.info.uuid) else {
                continue;
            };
            for extent in &disk.extents {
                let place = match extent.source {
                    Source::Zero => PartBlocks::Zero,
                    Source::Block {
                        block,
                        offset_bytes,
                    } => PartBlocks::Block {
                        part: number,
                        block,
                        offset_bytes,
                    },
                };
                map.insert(extent.offset_bytes, extent.len_bytes, place, |_, _| {});
            }
        }
        self.sha256 = index.sha256;
        self.parts.push(PartRef {
            name,
            sha256: index.sha256,
            blocks: index.blocks.into(),
        });
    }

    /// The map of a disk.
    pub fn extents(&self, disk: Uuid) -> Option<&ExtentMap<PartBlocks>> {
        self.extents.get(&disk)
    }

    /// The hash of the cut's last part, in hexadecimal.
    pub fn sha256_hex(&self) -> String {
        hex(&self.sha256)
    }
}
