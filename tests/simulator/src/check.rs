//! What a recovered cut holds, read with the container's own reader.
//!
//! Invariant: nothing here knows what the product decided: only objects are read.

use crate::storage::{UNIT_BYTES, unit_of};
use object_store::ObjectStore;
use recovery_store::{Container, CutInfo, CutSelector, PartBlocks, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A recovered cut: per disk its units.
pub type Recovered = Vec<(usize, Vec<u64>)>;

/// The cut of this number; `None`: it is not there.
pub async fn find(
    objects: Arc<dyn ObjectStore>,
    number: u64,
) -> Result<Option<(Container, CutInfo)>, String> {
    let container = match Container::open_store(objects, "memory").await {
        Ok(container) => container,
        Err(StoreError::NoContainer { .. }) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    match container.select(&CutSelector::Number(number)).await {
        Ok(info) => Ok(Some((container, info))),
        Err(StoreError::NoSuchCut { hint, .. }) if !hint.contains("others") => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads all disks of a cut.
pub async fn recover(container: &Container, info: &CutInfo) -> Result<Recovered, String> {
    let text = |error: StoreError| error.to_string();
    let view = container.view(info, None, |_, _| {}).await.map_err(text)?;
    let mut wanted: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for map in view.extents.values() {
        for piece in map.iter() {
            if let PartBlocks::Block { part, block, .. } = piece.place {
                wanted.entry(part).or_default().insert(block);
            }
        }
    }
    let mut blocks = BTreeMap::new();
    for (part, numbers) in wanted {
        let numbers: Vec<u32> = numbers.into_iter().collect();
        let of = view.parts.get(part as usize).ok_or("a part is missing")?;
        for (number, bytes) in container.read_part(of, &numbers).await.map_err(text)? {
            blocks.insert((part, number), bytes);
        }
    }
    let mut disks = Vec::new();
    for disk in &info.disks {
        let number =
            usize::from(disk.uuid.as_bytes().first().copied().unwrap_or(0)).wrapping_sub(1);
        let mut units = vec![0; (disk.capacity_bytes / UNIT_BYTES) as usize];
        let map = view.extents(disk.uuid).ok_or("a disk without a map")?;
        for piece in map.iter() {
            let PartBlocks::Block {
                part,
                block,
                offset_bytes,
            } = piece.place
            else {
                continue;
            };
            let bytes = blocks.get(&(part, block)).ok_or("a block is missing")?;
            let from = offset_bytes as usize;
            let bytes = bytes.get(from..from + piece.len_bytes as usize);
            let bytes = bytes.ok_or("a piece ends beyond its block")?;
            if piece.offset_bytes % UNIT_BYTES != 0 || piece.len_bytes % UNIT_BYTES != 0 {
                return Err(format!("disk {number}: a unit is torn"));
            }
            let first = (piece.offset_bytes / UNIT_BYTES) as usize;
            for (i, unit) in bytes.chunks(UNIT_BYTES as usize).enumerate() {
                let value = unit_of(unit).ok_or_else(|| {
                    format!("disk {number}, unit {}: its content is torn", first + i)
                })?;
                if let Some(place) = units.get_mut(first + i) {
                    *place = value;
                }
            }
        }
        disks.push((number, units));
    }
    Ok(disks)
}
