//! What serves requests: at once on the caller's thread, or later from any other.
//!
//! Invariant: every [`Io`] that was submitted is completed exactly once; dropping one without
//! completing it answers the client with an I/O error, so that no client waits for ever.

use super::connection::Connection;
use super::proto::errno;
use crate::disk::{DiskError, Extent, OpenDisk, Storage};
use std::sync::Arc;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Fill the buffer.
    Read,
    /// Take the buffer.
    Write,
    /// Make the range read as zeros.
    Zero,
    /// Give the range's space back.
    Unmap,
    /// Make durable what was completed before.
    Flush,
}

/// A request under way. It owns its buffer.
#[derive(Debug)]
pub struct Io {
    /// What it does.
    pub kind: Kind,
    /// Durable before it completes.
    pub fua: bool,
    /// Zero: the space may be given back.
    pub may_unmap: bool,
    /// Zero: rather an error than anything slower than a write of the same length.
    pub must_be_fast: bool,
    /// Start, in bytes.
    pub offset_bytes: u64,
    /// Length, in bytes.
    pub len_bytes: u32,
    /// The data of a read or write: exactly `len_bytes` of it are meant.
    pub buffer: Vec<u8>,
    pub(super) cookie: u64,
    /// Counted against the connection's limit until the request is over.
    pub(super) charged_bytes: usize,
    pub(crate) connection: Option<Arc<Connection>>,
}

impl Io {
    /// An empty request of nobody.
    pub(super) const fn new(kind: Kind) -> Self {
        Self {
            kind,
            fua: false,
            may_unmap: false,
            must_be_fast: false,
            offset_bytes: 0,
            len_bytes: 0,
            buffer: Vec::new(),
            cookie: 0,
            charged_bytes: 0,
            connection: None,
        }
    }

    /// The bytes to write.
    pub fn data(&self) -> &[u8] {
        self.buffer
            .get(..self.len_bytes as usize)
            .unwrap_or_default()
    }

    /// The bytes to fill.
    pub fn data_mut(&mut self) -> &mut [u8] {
        self.buffer
            .get_mut(..self.len_bytes as usize)
            .unwrap_or_default()
    }

    /// Answers the client; `error` 0 is success.
    pub fn complete(mut self: Box<Self>, error: u32) {
        if let Some(connection) = self.connection.take() {
            connection.reply(self, error);
        }
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.reply_dropped(self.cookie, self.charged_bytes);
        }
    }
}

/// Serves one export.
pub trait Engine: Send + Sync {
    /// Capacity in bytes, now.
    fn capacity_bytes(&self) -> u64;

    /// Takes a request whose range was checked. Completes it at once or later.
    fn submit(&self, io: Box<Io>);

    /// The extents of a range; they cover a prefix of it.
    fn extents(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, DiskError>;

    /// Zeros are often faster than a write, and a request that must be fast fails if they are not.
    fn has_fast_zero(&self) -> bool {
        false
    }

    /// A connection has ended: requests of it that are held may be given up.
    fn disconnected(&self, _connection: &Arc<Connection>) {}
}

/// The error number for a disk's error.
pub fn wire_error(error: &DiskError) -> u32 {
    match error {
        DiskError::Io { source, .. } => match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => errno::NOSPC,
            Some(libc::EOPNOTSUPP) => errno::NOTSUP,
            Some(libc::EROFS | libc::EACCES | libc::EPERM) => errno::PERM,
            _ if source.kind() == std::io::ErrorKind::InvalidInput => errno::INVAL,
            _ => errno::IO,
        },
        DiskError::Descriptor { .. } => errno::IO,
    }
}

/// Carries a request out on a disk.
pub fn execute(disk: &impl Storage, io: &mut Io) -> Result<(), DiskError> {
    let (offset, len) = (io.offset_bytes, u64::from(io.len_bytes));
    match io.kind {
        Kind::Read => disk.read_at(io.data_mut(), offset)?,
        Kind::Write => disk.write_at(io.data(), offset)?,
        Kind::Zero if io.must_be_fast => disk.write_zeroes_fast(offset, len, io.may_unmap)?,
        Kind::Zero => disk.write_zeroes(offset, len, io.may_unmap)?,
        Kind::Unmap => disk.write_zeroes(offset, len, true)?,
        Kind::Flush => return disk.flush(),
    }
    if io.fua { disk.flush() } else { Ok(()) }
}

/// An export without a filter: requests are carried out on the caller's thread.
#[derive(Debug)]
pub struct DiskEngine(pub OpenDisk);

impl Engine for DiskEngine {
    fn capacity_bytes(&self) -> u64 {
        self.0.capacity_bytes()
    }

    fn submit(&self, mut io: Box<Io>) {
        let error = match execute(&self.0, &mut io) {
            Ok(()) => 0,
            Err(error) => {
                tracing::warn!("{error}");
                wire_error(&error)
            }
        };
        io.complete(error);
    }

    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>, DiskError> {
        self.0.extents(offset, len, limit)
    }

    fn has_fast_zero(&self) -> bool {
        true
    }
}
