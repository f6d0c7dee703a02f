//! One part on its way: compressed in a blocking task, then put into the store.
//!
//! Invariant: positions count as uploaded only after the store has answered for their part, and parts
//! run one after the other: each job gets the end of the chain from the one before.

use crate::builder::{DiskState, Encoder, PartBuilder};
use crate::error::StoreError;
use crate::format::{Commit, PartHeader, Sha256Hash};
use crate::layout::PartName;
use crate::put::Target;
use crate::writer::{DiskPosition, WriterStats};
use object_store::PutPayload;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::runtime::{Handle, RuntimeFlavor};
use uuid::Uuid;

#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) uploaded: BTreeMap<Uuid, DiskPosition>,
    pub(crate) stats: WriterStats,
}

/// Where the chain stands: what the next part needs of the one before.
pub(crate) struct ChainEnd {
    pub(crate) encoder: Encoder,
    pub(crate) previous: Sha256Hash,
    /// Raw bytes in the parts of the open cut so far.
    pub(crate) cut_raw_bytes: u64,
    pub(crate) spare: Vec<u8>,
}

/// One part on its way to the store.
pub(crate) struct PartJob {
    pub(crate) target: Arc<Target>,
    pub(crate) shared: Arc<Mutex<Shared>>,
    pub(crate) name: PartName,
    pub(crate) header: PartHeader,
    pub(crate) part: PartBuilder,
    pub(crate) disks: BTreeMap<Uuid, DiskState>,
    pub(crate) commit: Option<Commit>,
}

impl PartJob {
    pub(crate) async fn run(self, mut chain: ChainEnd) -> Result<ChainEnd, StoreError> {
        let Self {
            target,
            shared,
            name,
            header,
            part,
            disks,
            mut commit,
        } = self;
        if let Some(commit) = &mut commit {
            commit.raw_bytes = chain.cut_raw_bytes;
        }
        let object = name.to_string();
        let encode = move || {
            let encoded = chain.encoder.encode(header, part, &disks, commit);
            (chain, encoded, disks)
        };
        // Whoever has one thread only wants everything on it, in an order that can be repeated.
        let (mut chain, encoded, disks) = match Handle::current().runtime_flavor() {
            RuntimeFlavor::CurrentThread => encode(),
            _ => tokio::task::spawn_blocking(encode)
                .await
                .map_err(|error| StoreError::Task(error.to_string()))?,
        };
        let encoded = encoded.map_err(|error| StoreError::format(&object, error))?;
        let stored_bytes = encoded.object.len() as u64;
        target
            .put_immutable(&object, PutPayload::from(encoded.object))
            .await?;
        chain.previous = encoded.sha256;
        chain.cut_raw_bytes += encoded.raw_bytes;
        chain.spare = encoded.arena;
        let mut shared = shared.lock();
        for (uuid, disk) in &disks {
            shared.uploaded.insert(*uuid, position_of(disk));
        }
        shared.stats.raw_bytes += encoded.raw_bytes;
        shared.stats.stored_bytes += stored_bytes;
        shared.stats.parts += 1;
        Ok(chain)
    }
}

pub(crate) fn position_of(disk: &DiskState) -> DiskPosition {
    DiskPosition {
        seq: disk.seq,
        attach_epoch: disk.attach_epoch,
        sync_open: disk.sync_open,
    }
}
