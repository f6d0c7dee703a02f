//! The layout of a recovery container: write, read, verify.
//!
//! A container holds one domain as immutable objects only (`docs/store-format.md` describes every
//! byte). Invariant: an object is never overwritten, and a cut is visible if and only if the part
//! that commits it is there, after all parts before it.
//!
//! # Writing
//!
//! ```no_run
//! # async fn example(record: &filter_core::record::RecordRef<'_>) -> Result<(), recovery_store::StoreError> {
//! use recovery_store::{CutMeta, CutWriter, DiskInfo, DomainInfo, StoreUrl, WriterOptions};
//! # let (domain_uuid, disk_uuid, vm_uuid) = (uuid::Uuid::nil(), uuid::Uuid::nil(), uuid::Uuid::nil());
//! let url = StoreUrl::parse("/srv/container", &[])?;
//! let domain = DomainInfo::new(domain_uuid, "accounts");
//! // Creates the container or goes on where the last writer stopped.
//! let mut writer = CutWriter::open(&url, &domain, WriterOptions::default()).await?;
//! // Feed every record with seq > fed position, per disk in seq order. After `open` the two are equal.
//! let resume_after = writer.uploaded_positions();
//! writer.set_disk(DiskInfo {
//!     uuid: disk_uuid,
//!     vm_uuid,
//!     vm_name: "db".into(),
//!     name: "disk0".into(),
//!     capacity_bytes: 1 << 30,
//! })?;
//! writer.apply(disk_uuid, record).await?; // old seq: ignored; a full part is uploaded in the background
//! let done = writer.commit(CutMeta {
//!     cut_epoch: 7,
//!     time_ns: 0,
//!     name: None,
//!     positions: [(disk_uuid, record.header.seq)].into(),
//!     left_out: [].into(),
//! }).await?; // returns when the store holds the cut
//! # let _ = (resume_after, done.cut); Ok(()) }
//! ```
//!
//! [`CutWriter::feed`] is `apply` without the upload, for callers that are not async: when it
//! returns [`Fed::PartFull`], call [`CutWriter::flush_part`]. The cut's number is the writer's:
//! last committed + 1. Positions must be exactly what was fed; records that belong to the next cut
//! must be fed after `commit`. While a disk is between SYNC_BEGIN and SYNC_END, `commit` refuses.
//! After an error from `flush_part`, `apply` or `commit` about the store the writer is finished:
//! [`CutWriter::close`] it, open a new one and feed again from its
//! [`CutWriter::uploaded_positions`].
//!
//! # Reading
//!
//! [`Container::open`], [`Container::cuts`], [`Container::select`], then [`Container::view`]: the
//! disks of the cut and, per disk, the newest-wins [`ExtentMap`] built from indexes alone;
//! [`Container::read_part`] fetches and checks blocks. [`Container::verify`] reads everything.
#![warn(missing_docs)]

mod block;
mod builder;
mod chain;
mod codec;
mod encode;
mod error;
mod extents;
mod format;
mod layout;
mod put;
mod reader;
mod upload;
mod url;
mod verify;
mod view;
mod writer;

pub use block::decode_block;
pub use builder::{DEFAULT_BLOCK_BYTES, DEFAULT_PART_BYTES, Fed};
pub use error::{FormatError, StoreError};
pub use extents::{ExtentMap, Piece, Place};
pub use format::{
    BlockEntry, Commit, DiskInfo, Extent, FOOTER_BYTES, Footer, HEADER_BYTES, PartDisk, PartHeader,
    PartIndex, Position, Sha256Hash, Source, decode_footer, decode_header, decode_index, sha256,
};
pub use layout::{CONTAINER_FORMAT, CONTAINER_VERSION, DomainInfo, PartName, TimelineInfo};
pub use put::{Alarm, AlarmFn, RetryPolicy};
pub use reader::Container;
pub use url::{StoreKind, StoreUrl};
pub use verify::{Problem, VerifyProgress, VerifyReport};
pub use view::{CutEntry, CutInfo, CutSelector, CutView, PartBlocks, PartRef};
pub use writer::{CommitDone, CutMeta, CutWriter, DiskPosition, WriterOptions, WriterStats};
