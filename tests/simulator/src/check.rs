//! What a recovered cut holds, read with the container's own reader.
//!
//! Invariant: nothing here knows what the product decided: only objects are read. Each cut is read from
//! where the last one ended, and a block of a part, which its hash names, once; in the end all of it anew.

use crate::storage::{UNIT_BYTES, unit_of};
use object_store::ObjectStore;
use recovery_store::{
    Container, CutInfo, CutSelector, CutView, PartBlocks, Sha256Hash, StoreError,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A recovered cut: per disk its units.
pub type Recovered = Vec<(usize, Vec<u64>)>;

/// The units of a block; `None`: its content is torn.
type Units = Vec<Option<u64>>;

/// The store, and the blocks that were read of it.
pub struct Archive {
    objects: Arc<dyn ObjectStore>,
    /// The last cut that was read.
    view: Option<CutView>,
    blocks: BTreeMap<(Sha256Hash, u32), Units>,
}

impl Archive {
    /// Of this store; nothing was read yet.
    pub fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self {
            objects,
            view: None,
            blocks: BTreeMap::new(),
        }
    }

    /// The cut of this number; `None`: it is not there.
    pub async fn find(&self, number: u64) -> Result<Option<(Container, CutInfo)>, String> {
        let container = match Container::open_store(self.objects.clone(), "memory").await {
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
    pub async fn recover(
        &mut self,
        container: &Container,
        info: &CutInfo,
    ) -> Result<Recovered, String> {
        let text = |error: StoreError| error.to_string();
        let view = match self.view.take() {
            Some(before) => container.follow(before, info).await.map_err(text)?,
            None => container.view(info, None, |_, _| {}).await.map_err(text)?,
        };
        self.read_blocks(container, &view).await?;
        let cut = self.units_of(&view);
        self.view = Some(view);
        cut
    }

    fn units_of(&self, view: &CutView) -> Result<Recovered, String> {
        view.info
            .disks
            .iter()
            .map(|disk| {
                let first = disk.uuid.as_bytes().first().copied().unwrap_or(0);
                let number = usize::from(first).wrapping_sub(1);
                let mut units = vec![0; (disk.capacity_bytes / UNIT_BYTES) as usize];
                let map = view.extents(disk.uuid).ok_or("a disk without a map")?;
                for piece in map.iter() {
                    if let PartBlocks::Block {
                        part,
                        block,
                        offset_bytes,
                    } = piece.place
                    {
                        let key = view.parts.get(part as usize).map(|of| (of.sha256, block));
                        let block = key.and_then(|key| self.blocks.get(&key));
                        let block = block.ok_or("a block is missing")?;
                        let place = (piece.offset_bytes, piece.len_bytes);
                        copy(block, offset_bytes, place, &mut units)
                            .map_err(|what| format!("disk {number}: {what}"))?;
                    }
                }
                Ok((number, units))
            })
            .collect()
    }

    /// Reads the blocks that are not known yet, and forgets those that are not needed any more.
    async fn read_blocks(&mut self, container: &Container, view: &CutView) -> Result<(), String> {
        let mut wanted: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for map in view.extents.values() {
            for piece in map.iter() {
                if let PartBlocks::Block { part, block, .. } = piece.place {
                    wanted.entry(part).or_default().insert(block);
                }
            }
        }
        let mut known = std::mem::take(&mut self.blocks);
        for (part, numbers) in wanted {
            let of = view.parts.get(part as usize).ok_or("a part is missing")?;
            let mut unknown = Vec::new();
            for number in numbers {
                let key = (of.sha256, number);
                match known.remove(&key) {
                    Some(units) => {
                        self.blocks.insert(key, units);
                    }
                    None => unknown.push(number),
                }
            }
            if unknown.is_empty() {
                continue;
            }
            let read = container.read_part(of, &unknown).await;
            for (number, bytes) in read.map_err(|error| error.to_string())? {
                let units = bytes.chunks(UNIT_BYTES as usize).map(unit_of).collect();
                self.blocks.insert((of.sha256, number), units);
            }
        }
        Ok(())
    }
}

/// Copies a piece of a disk, at (offset, length) in bytes, from where it begins in its block.
fn copy(block: &Units, from: u32, place: (u64, u64), disk: &mut [u64]) -> Result<(), String> {
    let (offset, len) = place;
    if [offset, len, from.into()]
        .iter()
        .any(|n| n % UNIT_BYTES != 0)
    {
        return Err("a unit is torn".into());
    }
    let (first, count) = ((offset / UNIT_BYTES) as usize, (len / UNIT_BYTES) as usize);
    let from = (u64::from(from) / UNIT_BYTES) as usize;
    let units = block.get(from..from + count);
    let units = units.ok_or("a piece ends beyond its block")?;
    let places = disk.iter_mut().enumerate().skip(first);
    for ((unit, place), value) in places.zip(units) {
        *place = value.ok_or_else(|| format!("unit {unit}: its content is torn"))?;
    }
    Ok(())
}

/// Reads every object of the store, and the newest cut once more with nothing known before.
pub async fn verify(objects: Arc<dyn ObjectStore>, newest: u64) -> Result<Recovered, String> {
    let mut archive = Archive::new(objects);
    let found = archive.find(newest).await?;
    let (container, info) = found.ok_or("the newest cut is gone")?;
    let report = container.verify(|_| {}).await;
    let report = report.map_err(|error| error.to_string())?;
    if !report.is_good() {
        return Err(format!("the container is damaged: {report:?}"));
    }
    archive.recover(&container, &info).await
}
