//! Little-endian reading and writing over byte slices; every length is checked before use.

use crate::error::FormatError;
use uuid::Uuid;

/// Reads fields one after the other; never beyond the slice.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn left(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(FormatError::Truncated {
                what: self.what,
                have: self.rest.len() as u64,
                need: len as u64,
            })?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(FormatError::Truncated {
                what: self.what,
                have: self.rest.len() as u64,
                need: N as u64,
            })?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn uuid(&mut self) -> Result<Uuid, FormatError> {
        Ok(Uuid::from_bytes(self.array()?))
    }

    pub(crate) fn text(&mut self, len: usize) -> Result<String, FormatError> {
        let raw = self.bytes(len)?;
        let text = std::str::from_utf8(raw).map_err(|_| FormatError::Utf8(self.what))?;
        Ok(text.to_owned())
    }

    /// The next `len` bytes must be zero: room for later versions.
    pub(crate) fn zeros(&mut self, len: usize) -> Result<(), FormatError> {
        let what = self.what;
        match self.bytes(len)?.iter().find(|b| **b != 0) {
            None => Ok(()),
            Some(byte) => Err(FormatError::Field {
                what,
                value: u64::from(*byte),
            }),
        }
    }
}

/// Appends fields one after the other.
pub(crate) trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_zeros(&mut self, len: usize);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_zeros(&mut self, len: usize) {
        self.resize(self.len() + len, 0);
    }
}

/// Lower-case hexadecimal of a hash.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut out, byte| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}
