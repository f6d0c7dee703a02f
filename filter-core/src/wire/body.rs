//! The fields of a frame's body: written and read back in order.
//!
//! Invariant: reading never goes past the body's end, and every value is checked against its limit.

use super::{
    DiskReport, Hello, MAX_CUT_DISKS, MAX_NAME_BYTES, MAX_TEXT_BYTES, OpenLane, PeerRole, WireError,
};
use crate::lane::layout::DIRTY_BLOCK_BYTES;
use crate::lineage::{Attach, Lineage, MAX_ANCESTORS};
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

#[derive(Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }
    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    /// Length and bytes, cut to the limit at a character's end.
    pub(super) fn text(&mut self, text: &str) {
        let mut len = text.len().min(MAX_TEXT_BYTES);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        self.u16(len as u16);
        self.0.extend_from_slice(&text.as_bytes()[..len]);
    }
}

pub(super) struct Cursor<'a> {
    pub(super) kind: u8,
    pub(super) rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) fn bad(&self, field: &'static str) -> WireError {
        WireError::Field {
            kind: self.kind,
            field,
        }
    }
    pub(super) fn take(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(self.bad(field))?;
        self.rest = rest;
        Ok(head)
    }
    pub(super) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], WireError> {
        let bytes = self.take(N, field)?;
        bytes.try_into().map_err(|_| self.bad(field))
    }
    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        Ok(self.array::<1>(field)?[0])
    }
    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }
    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }
    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }
    pub(super) fn id(&mut self, field: &'static str) -> Result<[u8; 16], WireError> {
        self.array(field)
    }
    pub(super) fn text(&mut self, field: &'static str) -> Result<String, WireError> {
        let len = usize::from(self.u16(field)?);
        if len > MAX_TEXT_BYTES {
            return Err(self.bad(field));
        }
        let bytes = self.take(len, field)?;
        core::str::from_utf8(bytes)
            .map(ToString::to_string)
            .map_err(|_| self.bad(field))
    }
    pub(super) fn seq(&self, seq: u64) -> Result<u64, WireError> {
        if seq > crate::position::MAX_SEQ {
            Err(self.bad("seq"))
        } else {
            Ok(seq)
        }
    }
    pub(super) fn block_offset(&self, word: u64) -> Result<u64, WireError> {
        let aligned = word.is_multiple_of(DIRTY_BLOCK_BYTES);
        if aligned && word <= crate::record::MAX_DISK_BYTES {
            Ok(word)
        } else {
            Err(self.bad("offset"))
        }
    }
    pub(super) fn epoch(&self, word: u64) -> Result<u32, WireError> {
        u32::try_from(word).map_err(|_| self.bad("cut epoch"))
    }

    pub(super) fn hello(&mut self, incarnation: u64) -> Result<Hello, WireError> {
        let (oldest, newest) = (self.u16("oldest")?, self.u16("newest")?);
        let role = match self.u8("role")? {
            1 => PeerRole::Daemon,
            2 => PeerRole::Appliance,
            _ => return Err(self.bad("role")),
        };
        let port_offset = self.u8("port offset")?;
        let peer_id = self.id("peer id")?;
        let name = self.text("name")?;
        Ok(Hello {
            oldest,
            newest,
            role,
            port_offset,
            peer_id,
            incarnation,
            name,
        })
    }

    pub(super) fn disk_reports(&mut self) -> Result<Vec<DiskReport>, WireError> {
        let count = self.u32("count")?;
        if count > MAX_CUT_DISKS || count as usize * 25 > self.rest.len() {
            return Err(self.bad("count"));
        }
        let mut disks = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let (disk_id, seq) = (self.id("disk id")?, self.u64("seq")?);
            let flags = self.u8("flags")?;
            if flags & !3 != 0 {
                return Err(self.bad("flags"));
            }
            disks.push(DiskReport {
                disk_id,
                seq: self.seq(seq)?,
                open: flags & 1 != 0,
                complete: flags & 2 != 0,
            });
        }
        Ok(disks)
    }

    fn lineage(&mut self) -> Result<Lineage, WireError> {
        let root_epoch = self.u32("root epoch")?;
        let count = usize::from(self.u8("openings before")?);
        if count > MAX_ANCESTORS {
            return Err(self.bad("openings before"));
        }
        let mut ancestors = Vec::with_capacity(count);
        for _ in 0..count {
            ancestors.push(Attach {
                epoch: self.u32("epoch before")?,
                id: self.u64("attach id before")?,
                generation: self.u64("map generation before")?,
            });
        }
        Lineage::from_parts(root_epoch, ancestors).ok_or(self.bad("openings before"))
    }

    pub(super) fn open_lane(&mut self, durable_seq: u64) -> Result<OpenLane, WireError> {
        let durable_seq = self.seq(durable_seq)?;
        let (disk_id, vm_id) = (self.id("disk id")?, self.id("vm id")?);
        let attach_epoch = self.u32("attach epoch")?;
        let attach_id = self.u64("attach id")?;
        let capacity_bytes = self.u64("capacity")?;
        if capacity_bytes > crate::record::MAX_DISK_BYTES {
            return Err(self.bad("capacity"));
        }
        let (flag, relies_on) = (self.u8("base")?, self.u64("base")?);
        let base = match flag {
            0 if relies_on == 0 => None,
            1 => Some(self.seq(relies_on)?),
            _ => return Err(self.bad("base")),
        };
        let mut name = |field| {
            let name = self.text(field)?;
            if name.is_empty() || name.len() > MAX_NAME_BYTES {
                Err(self.bad(field))
            } else {
                Ok(name)
            }
        };
        let (domain, vm_name) = (name("domain")?, name("vm name")?);
        let disk_label = name("disk label")?;
        let again = match self.u8("again")? {
            0 => false,
            1 => true,
            _ => return Err(self.bad("again")),
        };
        let map_generation = self.u64("map generation")?;
        let lineage = Box::new(self.lineage()?);
        Ok(OpenLane {
            disk_id,
            vm_id,
            again,
            attach_epoch,
            attach_id,
            map_generation,
            lineage,
            durable_seq,
            capacity_bytes,
            base,
            domain,
            vm_name,
            disk_label,
        })
    }
}
