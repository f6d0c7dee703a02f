//! What has to be fetched for a disk, in portions of bounded memory; and how its files are called.
//!
//! Invariant: a plan depends on the container and the cut alone, so that an interrupted recovery finds
//! the same portions under the same numbers.

use anyhow::{Context, bail};
use recovery_store::{CutInfo, CutView, DiskInfo, PartBlocks};
use uuid::Uuid;

/// Raw bytes of the blocks of one portion; a portion is in memory as a whole.
const PORTION_BYTES: u64 = 4 << 20;
/// The longest name that is made for a file.
const MAX_STEM_BYTES: usize = 100;

/// One piece of a block, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Piece {
    pub(crate) part: u32,
    pub(crate) block: u32,
    pub(crate) at_bytes: u32,
    pub(crate) len_bytes: u32,
    pub(crate) disk_offset_bytes: u64,
}

/// What has to be fetched for one disk.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Sorted by part and block.
    pieces: Vec<Piece>,
    /// Ends of the portions in `pieces`.
    ends: Vec<usize>,
    /// Bytes in all pieces.
    pub(crate) data_bytes: u64,
}

impl Plan {
    /// The plan of a disk of the view.
    pub(crate) fn new(view: &CutView, disk: Uuid) -> anyhow::Result<Self> {
        let map = view.extents(disk).context("the disk is not in the view")?;
        let mut pieces = Vec::new();
        for piece in map.iter() {
            if let PartBlocks::Block {
                part,
                block,
                offset_bytes,
            } = piece.place
            {
                pieces.push(Piece {
                    part,
                    block,
                    at_bytes: offset_bytes,
                    // Within one block, which is at most 256 KiB.
                    len_bytes: piece.len_bytes as u32,
                    disk_offset_bytes: piece.offset_bytes,
                });
            }
        }
        pieces.sort_unstable();
        let data_bytes = pieces.iter().map(|piece| u64::from(piece.len_bytes)).sum();
        let raw_bytes = |piece: &Piece| {
            view.parts
                .get(piece.part as usize)
                .and_then(|part| part.blocks.get(piece.block as usize))
                .map_or(0, |block| u64::from(block.raw_bytes))
        };
        let mut ends = Vec::new();
        let mut portion_bytes = 0;
        let mut before: Option<&Piece> = None;
        for (number, piece) in pieces.iter().enumerate() {
            let same_part = before.is_none_or(|b| b.part == piece.part);
            let same_block = before.is_some_and(|b| b.part == piece.part && b.block == piece.block);
            if !same_part || (!same_block && portion_bytes >= PORTION_BYTES) {
                ends.push(number);
                portion_bytes = 0;
            }
            if !same_block {
                portion_bytes += raw_bytes(piece);
            }
            before = Some(piece);
        }
        if !pieces.is_empty() {
            ends.push(pieces.len());
        }
        Ok(Self {
            pieces,
            ends,
            data_bytes,
        })
    }

    /// How many portions there are.
    pub(crate) fn portions(&self) -> usize {
        self.ends.len()
    }

    /// The pieces of a portion: all of one part.
    pub(crate) fn portion(&self, number: usize) -> &[Piece] {
        let start = match number.checked_sub(1) {
            None => 0,
            Some(before) => self.ends.get(before).copied().unwrap_or(0),
        };
        let end = self.ends.get(number).copied().unwrap_or(start);
        self.pieces.get(start..end).unwrap_or_default()
    }
}

/// The name of a disk's files without extension: `<vm>-<disk>`, reduced to harmless characters.
pub fn file_stem(disk: &DiskInfo) -> String {
    let harmless = |c: char| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' | '.' => c,
        _ => '_',
    };
    let mut stem: String = format!("{}-{}", disk.vm_name, disk.name)
        .chars()
        .map(harmless)
        .take(MAX_STEM_BYTES)
        .collect();
    if stem.starts_with('.') {
        stem.replace_range(0..1, "_");
    }
    stem
}

/// The disks that were asked for (all, if none was), with the names of their files.
pub(crate) fn choose(cut: &CutInfo, wanted: &[String]) -> anyhow::Result<Vec<(DiskInfo, String)>> {
    let mut chosen: Vec<&DiskInfo> = Vec::new();
    for want in wanted {
        let found: Vec<&DiskInfo> = cut
            .disks
            .iter()
            .filter(|disk| {
                disk.name == *want
                    || format!("{}/{}", disk.vm_name, disk.name) == *want
                    || want.parse() == Ok(disk.uuid)
            })
            .collect();
        match found.as_slice() {
            [disk] => {
                if !chosen.iter().any(|other| other.uuid == disk.uuid) {
                    chosen.push(disk);
                }
            }
            [] => bail!(
                "cut {} has no disk {want:?}; it has: {}",
                cut.cut,
                names(&cut.disks.iter().collect::<Vec<_>>())
            ),
            several => bail!(
                "{want:?} is the name of several disks: {}; give the UUID",
                names(several)
            ),
        }
    }
    if wanted.is_empty() {
        chosen = cut.disks.iter().collect();
    }
    let stems: Vec<String> = chosen.iter().map(|disk| file_stem(disk)).collect();
    Ok(chosen
        .iter()
        .zip(&stems)
        .map(|(disk, stem)| {
            // Names that differ only in case are one file on some file systems.
            let same = |other: &&String| other.eq_ignore_ascii_case(stem);
            let unique = stems.iter().filter(same).count() == 1;
            let stem = if unique {
                stem.clone()
            } else {
                format!("{stem}-{}", disk.uuid)
            };
            ((*disk).clone(), stem)
        })
        .collect())
}

fn names(disks: &[&DiskInfo]) -> String {
    let names: Vec<String> = disks
        .iter()
        .map(|disk| format!("{}/{} ({})", disk.vm_name, disk.name, disk.uuid))
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(number: u128, vm_name: &str, name: &str) -> DiskInfo {
        DiskInfo {
            uuid: Uuid::from_u128(number),
            vm_uuid: Uuid::nil(),
            vm_name: vm_name.into(),
            name: name.into(),
            capacity_bytes: 512,
        }
    }

    fn cut(disks: Vec<DiskInfo>) -> CutInfo {
        CutInfo {
            cut: 1,
            time_ns: 0,
            cut_epoch: 0,
            name: None,
            parts: 1,
            records: 0,
            raw_bytes: 0,
            stored_bytes: 0,
            disks,
            positions: Vec::new(),
        }
    }

    #[test]
    fn a_name_from_the_container_cannot_leave_the_folder() {
        assert_eq!(
            file_stem(&disk(1, "../../etc", "pass wd")),
            "_._.._etc-pass_wd"
        );
        assert_eq!(file_stem(&disk(1, "", "")), "-");
        assert!(file_stem(&disk(1, &"x".repeat(500), "d")).len() <= MAX_STEM_BYTES);
    }

    #[test]
    fn disks_of_one_name_get_files_of_their_own() {
        let cut = cut(vec![
            disk(1, "a", "d"),
            disk(2, "A", "d"),
            disk(3, "b", "d"),
        ]);
        let all = choose(&cut, &[]).expect("all");
        let stems: Vec<&str> = all.iter().map(|(_, stem)| stem.as_str()).collect();
        assert_eq!(stems[0], format!("a-d-{}", Uuid::from_u128(1)));
        assert_eq!(stems[1], format!("A-d-{}", Uuid::from_u128(2)));
        assert_eq!(stems[2], "b-d");
        let error = choose(&cut, &["d".into()]).expect_err("several");
        assert!(error.to_string().contains("several"), "{error}");
        let error = choose(&cut, &["e".into()]).expect_err("none");
        assert!(error.to_string().contains("b/d"), "{error}");
        let one = choose(&cut, &["b/d".into(), Uuid::from_u128(3).to_string()]).expect("one");
        assert_eq!(one.len(), 1);
    }
}
