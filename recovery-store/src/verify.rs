//! Reads everything in a container and says what is wrong with it, object by object.
//!
//! Invariant: a container is reported good only if every object was read, every checksum matched and
//! the chain has no gap. What cannot be noticed from inside: that the newest objects were removed.

use crate::block::{decode_block, decode_object};
use crate::chain::ChainLink;
use crate::codec::hex;
use crate::error::StoreError;
use crate::format::{MAX_PART_OBJECT_BYTES, PartIndex};
use crate::layout::{FIRST_TIMELINE, MAX_JSON_BYTES, timeline_object};
use crate::reader::{Container, Listed};
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use std::collections::HashMap;
use uuid::Uuid;

/// Objects read at once; each may be as large as a part.
const PARALLEL: usize = 4;
/// Problems kept in a report; more are only counted.
const MAX_PROBLEMS: usize = 1000;

/// Something wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The object.
    pub object: String,
    /// What is wrong.
    pub what: String,
}

/// What was read, and what is wrong.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VerifyReport {
    /// Part objects read.
    pub objects: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// Raw data bytes in them.
    pub raw_bytes: u64,
    /// Committed cuts.
    pub cuts: u64,
    /// Parts after the newest committed cut: a cut that is still open.
    pub open_parts: u64,
    /// The first problems, in the order of the objects.
    pub problems: Vec<Problem>,
    /// How many there are in all.
    pub problem_count: u64,
}

/// How far a verification is.
#[derive(Clone, Copy, Debug)]
pub struct VerifyProgress {
    /// Objects read.
    pub objects: u64,
    /// Objects in all.
    pub of_objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes in all.
    pub of_bytes: u64,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.problem_count == 0
    }

    fn add(&mut self, object: impl ToString, what: impl ToString) {
        self.problem_count += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem {
                object: object.to_string(),
                what: what.to_string(),
            });
        }
    }
}

/// The positions of the disks along the chain; unknown after a gap.
#[derive(Default)]
struct SeqCheck {
    disks: HashMap<Uuid, u64>,
    known: bool,
}

impl SeqCheck {
    /// What is wrong with the part's seq ranges, if they do not follow the part before.
    fn take(&mut self, index: &PartIndex) -> Option<String> {
        let mut wrong = None;
        for disk in &index.disks {
            let before = self.disks.get(&disk.info.uuid).copied().unwrap_or(0);
            let follows = if disk.first_seq == 0 {
                disk.last_seq == before
            } else {
                disk.first_seq == before + 1 || disk.stream_base
            };
            if !follows && self.known {
                wrong = Some(format!(
                    "disk {}: covers records {} to {}, after {before} (records are missing)",
                    disk.info.uuid, disk.first_seq, disk.last_seq
                ));
            }
            self.disks.insert(disk.info.uuid, disk.last_seq);
        }
        if index.commit.is_some() {
            // A commit's table has every disk of the domain: what is not in it has left.
            self.disks
                .retain(|uuid, _| index.disks.iter().any(|disk| disk.info.uuid == *uuid));
            self.known = true;
        }
        wrong
    }
}

impl Container {
    /// Reads every object, checks every checksum, the names, the hash chain, that each cut is complete
    /// and that no record is missing. An error means that the store could not be read.
    pub async fn verify(
        &self,
        mut progress: impl FnMut(VerifyProgress),
    ) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        let mut link = match self.timeline_hash(FIRST_TIMELINE).await {
            Ok(hash) => ChainLink::start(hash),
            Err(error @ StoreError::Store { .. }) => return Err(error),
            Err(error) => {
                report.add(timeline_object(FIRST_TIMELINE), error);
                let mut link = ChainLink::start([0; 32]);
                link.hash = None;
                link
            }
        };
        self.report_other_timelines(&mut report).await?;
        let (parts, strangers) = self.list_parts(FIRST_TIMELINE).await?;
        for stranger in strangers {
            report.add(stranger, "is not a part of the container");
        }
        let mut state = VerifyProgress {
            objects: 0,
            of_objects: parts.len() as u64,
            bytes: 0,
            of_bytes: parts.iter().map(|part| part.size_bytes).sum(),
        };
        let mut seqs = SeqCheck {
            known: true,
            ..SeqCheck::default()
        };
        let mut open_parts = 0;
        let mut checked = futures::stream::iter(parts)
            .map(|part| async move { (part, self.check_part(&part).await) })
            .buffered(PARALLEL);
        while let Some((part, result)) = checked.next().await {
            state.objects += 1;
            state.bytes += part.size_bytes;
            report.objects += 1;
            report.stored_bytes += part.size_bytes;
            let gap = link.expect_name(part.name);
            if let Err(StoreError::Missing { object }) = &gap {
                let up_to = if link.next_name().cut == part.name.cut {
                    String::new()
                } else {
                    format!(" (the next object that is there is {})", part.name)
                };
                report.add(object, format!("is missing{up_to}"));
                link.hash = None;
                seqs.known = false;
            }
            match result {
                Err(error @ StoreError::Store { .. }) => return Err(error),
                Err(error) => {
                    report.add(part.name, error);
                    // Nothing in it can be believed: the next part is taken as it comes.
                    link.jump(part.name, false, None);
                    link.open = self.next_in_same_cut(&part).await?;
                    seqs.known = false;
                }
                Ok(index) => {
                    if let Err(error) = link.expect_previous(part.name, &index.header.previous) {
                        report.add(part.name, error);
                    }
                    link.accept(part.name, &index);
                    if let Some(wrong) = seqs.take(&index) {
                        report.add(part.name, wrong);
                    }
                    report.raw_bytes += index
                        .blocks
                        .iter()
                        .map(|block| u64::from(block.raw_bytes))
                        .sum::<u64>();
                    open_parts += 1;
                    if index.commit.is_some() {
                        report.cuts += 1;
                        open_parts = 0;
                    }
                }
            }
            progress(state);
        }
        report.open_parts = open_parts;
        Ok(report)
    }

    /// Whether the part after a damaged one is of the same cut, by the names in the store.
    async fn next_in_same_cut(&self, part: &Listed) -> Result<bool, StoreError> {
        let next = crate::PartName {
            part: part.name.part + 1,
            ..part.name
        };
        let object = next.to_string();
        let target = self.target();
        use object_store::ObjectStoreExt;
        match target.store.head(&target.path(&object)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(target.failed("read", &object, error)),
        }
    }

    async fn check_part(&self, part: &Listed) -> Result<PartIndex, StoreError> {
        let object = part.name.to_string();
        let bytes = self
            .target()
            .get_small(&object, MAX_PART_OBJECT_BYTES.max(MAX_JSON_BYTES))
            .await?
            .ok_or_else(|| StoreError::Missing {
                object: object.clone(),
            })?;
        let name = object.clone();
        let index = tokio::task::spawn_blocking(move || check_bytes(&name, &bytes))
            .await
            .map_err(|error| StoreError::Task(error.to_string()))??;
        self.check_identity(part.name, &index)?;
        Ok(index)
    }

    /// This version writes one timeline: others cannot be vouched for.
    async fn report_other_timelines(&self, report: &mut VerifyReport) -> Result<(), StoreError> {
        let target = self.target();
        let mut listing = target.store.list(Some(&target.path("t")));
        let own = target.path("t/0000000001");
        let mut told = false;
        while let Some(meta) = listing
            .try_next()
            .await
            .map_err(|error| target.failed("list", "t", error))?
        {
            if !told && !meta.location.prefix_matches(&own) {
                told = true;
                report.add(
                    &meta.location,
                    "is of a timeline that this version does not know: it was not verified",
                );
            }
        }
        Ok(())
    }
}

/// Checks a whole part by its bytes alone.
fn check_bytes(object: &str, bytes: &[u8]) -> Result<PartIndex, StoreError> {
    let bad = |error| StoreError::format(object, error);
    let (index, computed) = decode_object(bytes).map_err(bad)?;
    // The blocks before the hash: they say where the damage is.
    for (number, block) in index.blocks.iter().enumerate() {
        let start = block.offset_bytes as usize;
        let stored = bytes
            .get(start..start + block.stored_bytes as usize)
            .unwrap_or_default();
        decode_block(number as u32, block, stored).map_err(|error| {
            StoreError::format(format!("{object}: block {number} at byte {start}"), error)
        })?;
    }
    if computed != index.sha256 {
        return Err(StoreError::Hash {
            object: object.to_owned(),
            stored: hex(&index.sha256),
            computed: hex(&computed),
        });
    }
    Ok(index)
}
