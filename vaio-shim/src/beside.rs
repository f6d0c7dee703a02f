//! The sidecar of one disk: the header and the region map, read at open and written from then on.
//!
//! Invariant: the header that is kept here is what the sidecar holds; it is replaced only after its
//! successor is durable. Everything in here may block: work and control context only.

use crate::abi;
use crate::host::{DiskHandle, Host, OpenSidecar};
use crate::open::OpenError;
use filter_core::disk::handoff::Handoff;
use filter_core::disk::intent::Intent;
use filter_core::sidecar::regions::{self, RegionBlock};
use filter_core::sidecar::{HEADERS_BYTES, MAX_REGION_BLOCKS, Sidecar, SidecarError, total_bytes};

/// The filter's own number of its sidecar.
pub const SIDECAR_KEY: u64 = 0x6a65_7464_7200_0001;

/// The filter's own number of the dirty map that goes along to another host.
const HANDOFF_KEY: u64 = SIDECAR_KEY + 1;

/// Leaves a dirty map for the next host; durable on success.
pub fn leave(
    host: Host,
    handle: DiskHandle,
    header: &Sidecar,
    map: &Handoff,
) -> Result<(), OpenError> {
    host.sidecar_delete(handle, HANDOFF_KEY);
    let raw = map.encode(&header.disk_id, header.attach_epoch);
    let file = host
        .sidecar_create(handle, HANDOFF_KEY, raw.len() as u64)
        .map_err(|status| OpenError::SidecarIo("create", status))?;
    let written = write(&file, 0, &raw);
    drop(file);
    if written.is_err() {
        host.sidecar_delete(handle, HANDOFF_KEY);
    }
    written
}

/// The dirty map that the attach before this one left, if there is one and it is whole. `header`: what
/// that attach wrote last.
pub fn left(
    host: Host,
    handle: DiskHandle,
    header: &Sidecar,
    capacity_bytes: u64,
) -> Option<Handoff> {
    let (file, len_bytes) = host.sidecar_open(handle, HANDOFF_KEY).ok()?;
    // A disk that has grown since is longer than its map.
    let mut raw = vec![0; usize::try_from(len_bytes.min(256 << 20)).ok()?];
    file.read(0, &mut raw).ok()?;
    Handoff::decode(&raw, &header.disk_id, header.attach_epoch, capacity_bytes)
}

/// The dirty map has served, or is of no use.
pub fn forget_left(host: Host, handle: DiskHandle) {
    host.sidecar_delete(handle, HANDOFF_KEY);
}

/// Blocks of the region map of a disk of this capacity: with room to grow to twice that, and for a
/// terabyte at least.
pub fn region_blocks(capacity_bytes: u64, shift: u32) -> u32 {
    let room = capacity_bytes.saturating_mul(2).max(1 << 40);
    let blocks = regions::blocks_for(room, shift).min(u64::from(MAX_REGION_BLOCKS));
    blocks as u32
}

/// An open sidecar.
pub struct Beside {
    /// `None`: the disk is closed.
    file: Option<OpenSidecar>,
    header: Sidecar,
}

/// What a sidecar holds, as far as it can be read.
pub struct Found {
    file: OpenSidecar,
    len_bytes: u64,
    /// The header; `None`: damaged, or of an older program.
    pub header: Option<Sidecar>,
    raw: Vec<u8>,
}

/// Makes the sidecar of a disk that comes under protection.
pub fn create(host: Host, handle: DiskHandle, header: &Sidecar) -> Result<(), OpenError> {
    let file = host
        .sidecar_create(handle, SIDECAR_KEY, header.total_bytes())
        .map_err(|status| OpenError::SidecarIo("create", status))?;
    let written = write(&file, header.offset_bytes(), &header.encode());
    drop(file);
    if written.is_err() {
        delete(host, handle);
    }
    written
}

/// Deletes the sidecar.
pub fn delete(host: Host, handle: DiskHandle) -> i32 {
    host.sidecar_delete(handle, SIDECAR_KEY)
}

fn write(file: &OpenSidecar, offset: u64, bytes: &[u8]) -> Result<(), OpenError> {
    file.write(offset, bytes)
        .map_err(|status| OpenError::SidecarIo("write", status))
}

impl Found {
    /// Opens and reads a sidecar. A newer program's is an error: it is not to be touched.
    pub fn open(host: Host, handle: DiskHandle) -> Result<Self, OpenError> {
        let (file, len_bytes) =
            host.sidecar_open(handle, SIDECAR_KEY)
                .map_err(|status| match status {
                    abi::JIO_E_NOT_FOUND => OpenError::NotAttached,
                    status => OpenError::SidecarIo("open", status),
                })?;
        if len_bytes > total_bytes(MAX_REGION_BLOCKS) {
            return Err(SidecarError::Damaged.into());
        }
        let mut raw = vec![0; len_bytes as usize];
        file.read(0, &mut raw)
            .map_err(|status| OpenError::SidecarIo("read", status))?;
        let headers = raw.first_chunk::<HEADERS_BYTES>();
        let header = match headers.map_or(Err(SidecarError::Damaged), Sidecar::decode) {
            Ok(header) => Some(header),
            Err(SidecarError::Damaged) => None,
            Err(error @ SidecarError::Version(_)) if !error.is_older() => return Err(error.into()),
            Err(_) => None,
        };
        Ok(Self {
            file,
            len_bytes,
            header,
            raw,
        })
    }

    /// The region map, if all of it is whole and it is long enough.
    pub fn map(&self, capacity_bytes: u64) -> Option<Vec<RegionBlock>> {
        let header = self.header.as_ref()?;
        let blocks = regions::decode(&self.raw, &header.disk_id, header.region_blocks).ok()?;
        let shift = blocks.first()?.shift;
        let enough = regions::blocks_for(capacity_bytes, shift) <= blocks.len() as u64;
        enough.then_some(blocks)
    }

    /// Goes on with this sidecar; `header` is what it holds.
    pub fn keep(self, header: Sidecar) -> Beside {
        let file = Some(self.file);
        Beside { file, header }
    }

    /// Goes on with a sidecar of another header and length: this one, or one in its place.
    pub fn renew(
        self,
        host: Host,
        handle: DiskHandle,
        header: Sidecar,
    ) -> Result<Beside, OpenError> {
        if self.len_bytes == header.total_bytes() {
            return Ok(self.keep(header));
        }
        drop(self.file);
        let status = delete(host, handle);
        if status < 0 {
            return Err(OpenError::SidecarIo("delete", status));
        }
        create(host, handle, &header)?;
        let (file, _) = host
            .sidecar_open(handle, SIDECAR_KEY)
            .map_err(|status| OpenError::SidecarIo("open", status))?;
        let file = Some(file);
        Ok(Beside { file, header })
    }
}

impl Beside {
    /// The header.
    pub const fn header(&self) -> &Sidecar {
        &self.header
    }

    fn file(&self) -> Result<&OpenSidecar, OpenError> {
        let closed = OpenError::SidecarIo("use", abi::JIO_E_CLOSED);
        self.file.as_ref().ok_or(closed)
    }

    /// The disk is being closed: the host takes the file back. Control context.
    pub fn shut(&mut self) {
        self.file = None;
    }

    /// Writes a header; it is durable on success.
    pub fn save(&mut self, next: Sidecar) -> Result<(), OpenError> {
        write(self.file()?, next.offset_bytes(), &next.encode())?;
        self.header = next;
        Ok(())
    }

    /// Writes a block of the region map; it is durable on success.
    pub fn write_block(&self, offset: u64, bytes: &[u8]) -> Result<(), OpenError> {
        write(self.file()?, offset, bytes)
    }

    /// Writes what waits of a map.
    pub fn write_map(&self, intent: &mut Intent) -> Result<(), OpenError> {
        intent.write_all(|offset, bytes| self.write_block(offset, bytes))
    }

    /// Reads the header anew: whether nobody has attached since.
    pub fn is_ours(&self) -> Result<bool, OpenError> {
        let mut raw = [0u8; HEADERS_BYTES];
        self.file()?
            .read(0, &mut raw)
            .map_err(|status| OpenError::SidecarIo("read", status))?;
        let found = Sidecar::decode(&raw)?;
        let ours = &self.header;
        Ok(found.disk_id == ours.disk_id && found.attach_epoch == ours.attach_epoch)
    }
}
