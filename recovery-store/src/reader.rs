//! A container for reading: its cuts, and the disks of a cut as maps from range to block.
//!
//! Invariant: what is returned was checked against the name, the domain and the hash chain; a cut is
//! offered only if the part that commits it is there. Maps are built from indexes alone.

use crate::block::decode_block;
use crate::chain::ChainLink;
use crate::error::{FormatError, StoreError};
use crate::extents::ExtentMap;
use crate::format::{
    BlockEntry, DiskInfo, FOOTER_BYTES, PartIndex, Sha256Hash, decode_footer, decode_index, sha256,
};
use crate::layout::{
    DOMAIN_OBJECT, DomainInfo, FIRST_TIMELINE, MAX_JSON_BYTES, PartName, TimelineInfo, cuts_folder,
    decode_domain, encode_domain, timeline_object, to_json,
};
use crate::put::{RetryPolicy, Target};
use crate::url::StoreUrl;
use crate::view::{CutEntry, CutInfo, CutSelector, CutView, PartRef};
use crate::writer::now_ns;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use uuid::Uuid;

/// Indexes that are fetched at once.
pub(crate) const INDEX_PARALLEL: usize = 32;
/// Bytes fetched from the end of a part in the hope that its index is in them.
const TAIL_BYTES: u64 = 32 << 10;
/// Blocks closer than this in their object are fetched in one range.
const RANGE_GAP_BYTES: u64 = 64 << 10;

/// A container, opened and identified.
pub struct Container {
    target: Arc<Target>,
    domain: DomainInfo,
}

/// A range of an object, and the blocks in it.
type BlockRange = (Range<u64>, Vec<(u32, BlockEntry)>);

/// A part as the store lists it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listed {
    pub(crate) name: PartName,
    pub(crate) size_bytes: u64,
}

impl Container {
    /// Opens the container at `url` for reading.
    pub async fn open(url: &StoreUrl) -> Result<Self, StoreError> {
        let (store, prefix) = url.open(false)?;
        Self::open_target(Target {
            store,
            prefix,
            location: url.to_string(),
            retry: RetryPolicy::default(),
            alarm: None,
        })
        .await
    }

    /// The same on a store that the caller made, such as one in memory.
    pub async fn open_store(
        store: Arc<dyn ObjectStore>,
        location: &str,
    ) -> Result<Self, StoreError> {
        Self::open_target(Target {
            store,
            prefix: object_store::path::Path::default(),
            location: location.to_owned(),
            retry: RetryPolicy::default(),
            alarm: None,
        })
        .await
    }

    async fn open_target(target: Target) -> Result<Self, StoreError> {
        let bytes = target.get_small(DOMAIN_OBJECT, MAX_JSON_BYTES).await?;
        let Some(bytes) = bytes else {
            return Err(StoreError::NoContainer {
                location: target.location,
            });
        };
        let domain = decode_domain(&bytes, &target.location)?;
        Ok(Self {
            target: Arc::new(target),
            domain,
        })
    }

    /// Opens the container of `domain` for writing; creates what is missing of it.
    pub(crate) async fn create(
        target: Target,
        domain: &DomainInfo,
        owner: &str,
    ) -> Result<Self, StoreError> {
        let location = target.location.clone();
        if target
            .get_small(DOMAIN_OBJECT, MAX_JSON_BYTES)
            .await?
            .is_none()
        {
            let bytes = encode_domain(domain, now_ns())
                .map_err(|error| StoreError::format(DOMAIN_OBJECT, error))?;
            put_first(&target, DOMAIN_OBJECT, bytes).await?;
        }
        let container = Self::open_target(target).await?;
        if container.domain.uuid != domain.uuid {
            return Err(StoreError::OtherDomain {
                location,
                expected: domain.uuid,
                found: container.domain.uuid,
            });
        }
        let object = timeline_object(FIRST_TIMELINE);
        let target = &container.target;
        if target.get_small(&object, MAX_JSON_BYTES).await?.is_none() {
            let timeline = TimelineInfo {
                timeline: FIRST_TIMELINE,
                domain: domain.uuid,
                parent: None,
                owner: owner.to_owned(),
                generation: 1,
                created_ns: now_ns(),
            };
            let bytes = to_json(&timeline).map_err(|error| StoreError::format(&object, error))?;
            put_first(target, &object, bytes).await?;
        }
        Ok(container)
    }

    pub(crate) fn into_target(self) -> Arc<Target> {
        self.target
    }

    pub(crate) fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// The domain that the container holds.
    pub fn domain(&self) -> &DomainInfo {
        &self.domain
    }

    /// The hash that the first part of a timeline names as its predecessor.
    pub(crate) async fn timeline_hash(&self, timeline: u32) -> Result<Sha256Hash, StoreError> {
        let object = timeline_object(timeline);
        let bytes = self.target.get_small(&object, MAX_JSON_BYTES).await?;
        let bytes = bytes.ok_or(StoreError::Missing {
            object: object.clone(),
        })?;
        let info: TimelineInfo = serde_json::from_slice(&bytes)
            .map_err(|error| StoreError::format(&object, FormatError::Json(error.to_string())))?;
        if info.domain != self.domain.uuid || info.timeline != timeline {
            return Err(StoreError::Identity {
                object,
                found: format!("timeline {} of domain {}", info.timeline, info.domain),
            });
        }
        Ok(sha256(&bytes))
    }

    /// The parts of a timeline in order, and the names in their folder that are not parts.
    pub(crate) async fn list_parts(
        &self,
        timeline: u32,
    ) -> Result<(Vec<Listed>, Vec<String>), StoreError> {
        let folder = cuts_folder(timeline);
        let path = self.target.path(&folder);
        let mut parts = Vec::new();
        let mut strangers = Vec::new();
        let mut listing = self.target.store.list(Some(&path));
        while let Some(meta) = listing
            .try_next()
            .await
            .map_err(|error| self.target.failed("list", &folder, error))?
        {
            let file = meta
                .location
                .as_ref()
                .strip_prefix(path.as_ref())
                .map_or("", |rest| rest.trim_start_matches('/'));
            match PartName::parse_file(timeline, file) {
                Some(name) => parts.push(Listed {
                    name,
                    size_bytes: meta.size,
                }),
                None => strangers.push(format!("{folder}/{file}")),
            }
        }
        parts.sort_unstable_by_key(|part| part.name);
        Ok((parts, strangers))
    }

    async fn get_range(&self, object: &str, range: Range<u64>) -> Result<Vec<u8>, StoreError> {
        match self
            .target
            .store
            .get_range(&self.target.path(object), range)
            .await
        {
            Ok(bytes) => Ok(bytes.into()),
            Err(object_store::Error::NotFound { .. }) => Err(StoreError::Missing {
                object: object.to_owned(),
            }),
            Err(error) => Err(self.target.failed("read", object, error)),
        }
    }

    /// Fetches and checks the index of a part: usually one range from the object's end.
    pub(crate) async fn fetch_index(&self, part: &Listed) -> Result<PartIndex, StoreError> {
        let object = part.name.to_string();
        let bad = |error| StoreError::format(&object, error);
        if part.size_bytes < (crate::format::HEADER_BYTES + FOOTER_BYTES) as u64 {
            return Err(bad(FormatError::Truncated {
                what: "part object",
                have: part.size_bytes,
                need: (crate::format::HEADER_BYTES + FOOTER_BYTES) as u64,
            }));
        }
        let tail_start = part.size_bytes.saturating_sub(TAIL_BYTES);
        let tail = self.get_range(&object, tail_start..part.size_bytes).await?;
        let footer = decode_footer(&tail, part.size_bytes).map_err(bad)?;
        let index_end = footer.index_offset_bytes + footer.index_bytes;
        let index_raw;
        let in_tail = footer
            .index_offset_bytes
            .checked_sub(tail_start)
            .and_then(|at| {
                let end = index_end - tail_start;
                tail.get(at as usize..end as usize)
            });
        let bytes = match in_tail {
            Some(bytes) => bytes,
            None => {
                index_raw = self
                    .get_range(&object, footer.index_offset_bytes..index_end)
                    .await?;
                &index_raw
            }
        };
        let index = decode_index(bytes, &footer).map_err(bad)?;
        self.check_identity(part.name, &index)?;
        Ok(index)
    }

    /// The object must be what its name says.
    pub(crate) fn check_identity(
        &self,
        name: PartName,
        index: &PartIndex,
    ) -> Result<(), StoreError> {
        let header = &index.header;
        let says = PartName {
            timeline: header.timeline,
            cut: header.cut,
            part: header.part,
        };
        if says != name || header.domain != self.domain.uuid {
            return Err(StoreError::Identity {
                object: name.to_string(),
                found: format!("{says} of domain {}", header.domain),
            });
        }
        Ok(())
    }

    /// The committed cuts in order; damaged ones are among them, with what is wrong.
    pub async fn cuts(&self) -> Result<Vec<CutEntry>, StoreError> {
        let (parts, _) = self.list_parts(FIRST_TIMELINE).await?;
        let groups: Vec<Vec<Listed>> = parts
            .chunk_by(|a, b| a.name.cut == b.name.cut)
            .map(<[Listed]>::to_vec)
            .collect();
        let newest = parts.last().map_or(0, |part| part.name.cut);
        let entries: Vec<Option<CutEntry>> = futures::stream::iter(groups)
            .map(|group| async move { self.entry(&group, newest).await })
            .buffered(INDEX_PARALLEL)
            .try_collect()
            .await?;
        let mut cuts: Vec<CutEntry> = entries.into_iter().flatten().collect();
        let mut expected = 1;
        let mut gaps = Vec::new();
        for entry in &cuts {
            for missing in (expected..entry.cut).take(1000) {
                gaps.push(CutEntry {
                    cut: missing,
                    state: Err("all its parts are missing".into()),
                });
            }
            expected = entry.cut.saturating_add(1);
        }
        cuts.extend(gaps);
        cuts.sort_by_key(|entry| entry.cut);
        Ok(cuts)
    }

    /// The entry of the cut that these parts are of; none if it is still open.
    async fn entry(&self, group: &[Listed], newest: u64) -> Result<Option<CutEntry>, StoreError> {
        let Some(last) = group.last() else {
            return Ok(None);
        };
        let cut = last.name.cut;
        let state = match self.fetch_index(last).await {
            // A store that does not answer says nothing about the cut.
            Err(error @ StoreError::Store { .. }) => return Err(error),
            Err(error) => Err(error.to_string()),
            Ok(index) => match (first_missing(group), cut_info(&index, group)) {
                (Some(missing), _) => Err(StoreError::Missing {
                    object: missing.to_string(),
                }
                .to_string()),
                (None, Some(info)) => Ok(info),
                (None, None) if cut == newest => return Ok(None),
                (None, None) => Err("the part that commits it is missing".into()),
            },
        };
        Ok(Some(CutEntry { cut, state }))
    }

    /// Finds a cut.
    pub async fn select(&self, wanted: &CutSelector) -> Result<CutInfo, StoreError> {
        let (parts, _) = self.list_parts(FIRST_TIMELINE).await?;
        let newest = parts.last().map_or(0, |part| part.name.cut);
        let groups: Vec<&[Listed]> = parts.chunk_by(|a, b| a.name.cut == b.name.cut).collect();
        let none = |wanted: String| {
            let hint = match newest {
                0 => "the container has no cut yet".to_owned(),
                _ => "`list` shows those that are there".to_owned(),
            };
            Err(StoreError::NoSuchCut { wanted, hint })
        };
        let cut = match wanted {
            CutSelector::Latest => {
                for group in groups.iter().rev().take(2) {
                    if let Some(entry) = self.entry(group, newest).await? {
                        return entry_info(entry);
                    }
                }
                return Err(StoreError::NoSuchCut {
                    wanted: "latest".into(),
                    hint: "the container has no cut yet".into(),
                });
            }
            CutSelector::Name(name) => {
                let named = |entry: &CutEntry| match &entry.state {
                    Ok(info) => info.name.as_ref() == Some(name),
                    Err(_) => false,
                };
                return match self.cuts().await?.into_iter().rev().find(named) {
                    Some(entry) => entry_info(entry),
                    None => none(format!("{name:?}")),
                };
            }
            CutSelector::Number(cut) => *cut,
        };
        for group in groups {
            if group.first().is_some_and(|part| part.name.cut == cut)
                && let Some(entry) = self.entry(group, newest).await?
            {
                return entry_info(entry);
            }
        }
        none(cut.to_string())
    }

    /// Builds the maps of `disks` (all, if `None`) as of a cut, from the indexes of all parts up to it.
    /// Each part must be there and continue the hash chain. `progress` is told (parts done, of).
    pub async fn view(
        &self,
        cut: &CutInfo,
        disks: Option<&[Uuid]>,
        progress: impl FnMut(usize, usize),
    ) -> Result<CutView, StoreError> {
        let mut view = CutView {
            info: cut.clone(),
            parts: Vec::new(),
            extents: HashMap::new(),
            sha256: [0; 32],
        };
        for disk in &cut.disks {
            if disks.is_none_or(|wanted| wanted.contains(&disk.uuid)) {
                view.extents.insert(disk.uuid, ExtentMap::default());
            }
        }
        let link = ChainLink::start(self.timeline_hash(FIRST_TIMELINE).await?);
        self.extend(view, link, progress).await
    }

    /// Builds the maps of all disks as of a cut from those as of an earlier one, from the indexes of the
    /// parts in between alone: for who follows a container. If a disk came, left or grew in between
    /// everything is read anew.
    pub async fn follow(&self, mut view: CutView, cut: &CutInfo) -> Result<CutView, StoreError> {
        let known = |disk: &DiskInfo| {
            let before = view.info.disks.iter().find(|old| old.uuid == disk.uuid);
            let same = before.is_some_and(|old| old.capacity_bytes == disk.capacity_bytes);
            same && view.extents.contains_key(&disk.uuid)
        };
        let same = view.extents.len() == cut.disks.len() && cut.disks.iter().all(known);
        if !same || cut.cut < view.info.cut {
            return self.view(cut, None, |_, _| {}).await;
        }
        let link = ChainLink::joined(FIRST_TIMELINE, view.info.cut + 1, Some(view.sha256));
        view.info = cut.clone();
        self.extend(view, link, |_, _| {}).await
    }

    /// Goes on with a view that stands at `link`, up to the cut that it is of.
    async fn extend(
        &self,
        mut view: CutView,
        mut link: ChainLink,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<CutView, StoreError> {
        let (from, to) = (link.cut, view.info.cut);
        let (mut listed, _) = self.list_parts(FIRST_TIMELINE).await?;
        listed.retain(|part| part.name.cut > from && part.name.cut <= to);
        let total = listed.len();
        let mut done = 0;
        let mut indexes = futures::stream::iter(listed)
            .map(|part| async move { (part, self.fetch_index(&part).await) })
            .buffered(INDEX_PARALLEL);
        while let Some((part, index)) = indexes.next().await {
            link.expect_name(part.name)?;
            let index = index?;
            link.expect_previous(part.name, &index.header.previous)?;
            link.accept(part.name, &index);
            view.add_part(part.name, index);
            done += 1;
            progress(done, total);
        }
        if link.open || link.cut != to {
            return Err(StoreError::Missing {
                object: link.next_name().to_string(),
            });
        }
        for disk in &view.info.disks {
            if let Some(map) = view.extents.get_mut(&disk.uuid) {
                map.truncate(disk.capacity_bytes);
            }
        }
        Ok(view)
    }

    /// Fetches blocks of a part (numbers in ascending order) and checks each; neighbours are
    /// fetched together. Returns (number, raw bytes).
    pub async fn read_part(
        &self,
        part: &PartRef,
        wanted: &[u32],
    ) -> Result<Vec<(u32, Vec<u8>)>, StoreError> {
        let object = part.name.to_string();
        let bad = |error| StoreError::format(&object, error);
        let mut ranges: Vec<BlockRange> = Vec::new();
        for &number in wanted {
            let entry = *part.blocks.get(number as usize).ok_or_else(|| {
                bad(FormatError::Field {
                    what: "block number",
                    value: number.into(),
                })
            })?;
            let end = entry.offset_bytes + u64::from(entry.stored_bytes);
            match ranges.last_mut() {
                Some((range, blocks))
                    if entry.offset_bytes >= range.end
                        && entry.offset_bytes - range.end <= RANGE_GAP_BYTES =>
                {
                    range.end = end;
                    blocks.push((number, entry));
                }
                _ => ranges.push((entry.offset_bytes..end, vec![(number, entry)])),
            }
        }
        let mut out = Vec::with_capacity(wanted.len());
        for (range, blocks) in ranges {
            let start = range.start;
            let bytes = self.get_range(&object, range).await?;
            for (number, entry) in blocks {
                let at = (entry.offset_bytes - start) as usize;
                let stored = bytes
                    .get(at..at + entry.stored_bytes as usize)
                    .unwrap_or_default();
                out.push((number, decode_block(number, &entry, stored).map_err(bad)?));
            }
        }
        Ok(out)
    }
}

fn entry_info(entry: CutEntry) -> Result<CutInfo, StoreError> {
    entry.state.map_err(|reason| StoreError::NoSuchCut {
        wanted: format!("{} in good order", entry.cut),
        hint: format!("{reason}; `list` shows the others"),
    })
}

/// The first part that is missing before the last one of the cut.
fn first_missing(group: &[Listed]) -> Option<PartName> {
    for (due, part) in (1..).zip(group) {
        if part.name.part != due {
            return Some(PartName {
                part: due,
                ..part.name
            });
        }
    }
    None
}

fn cut_info(index: &PartIndex, group: &[Listed]) -> Option<CutInfo> {
    let commit = index.commit.as_ref()?;
    let in_cut = |disk: &DiskInfo| commit.positions.iter().any(|p| p.disk == disk.uuid);
    Some(CutInfo {
        cut: index.header.cut,
        time_ns: commit.time_ns,
        cut_epoch: commit.cut_epoch,
        name: commit.name.clone(),
        parts: commit.parts,
        records: commit.records,
        raw_bytes: commit.raw_bytes,
        stored_bytes: group.iter().map(|part| part.size_bytes).sum(),
        disks: index
            .disks
            .iter()
            .map(|disk| disk.info.clone())
            .filter(in_cut)
            .collect(),
        positions: commit.positions.clone(),
    })
}

/// Creates a document; if another writer was faster, its document stands and is read next.
async fn put_first(target: &Target, object: &str, bytes: Vec<u8>) -> Result<(), StoreError> {
    match target.put_immutable(object, PutPayload::from(bytes)).await {
        Err(StoreError::Conflict { .. }) => Ok(()),
        other => other,
    }
}
