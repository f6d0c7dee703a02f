//! The 512-byte header that ustar and visor tar share: made and read, with its checksum.
//!
//! Invariant: nothing of a header is believed before its checksum and its magic are.

use crate::finding::Rule;

pub(super) const BLOCK_BYTES: usize = 512;
pub(super) const USTAR: &[u8] = b"ustar\x0000";
const GNU: &[u8] = b"ustar  \0";
pub(super) const VISOR: &[u8] = b"visor  \0";
const MAGIC_AT: usize = 257;
/// Four little-endian numbers at the end of a visor tar's header.
const VISOR_FIELDS_AT: usize = 0x1f0;
/// Eleven octal digits.
pub(super) const MAX_LEN_BYTES: u64 = 0o777_7777_7777;

/// What is wrong with a payload so that it cannot be read on.
pub(crate) struct Broken {
    pub(crate) rule: Rule,
    pub(crate) element: String,
    pub(crate) problem: String,
}

impl Broken {
    pub(super) fn new(
        rule: Rule,
        element: impl Into<String>,
        problem: impl Into<String>,
    ) -> Broken {
        Broken {
            rule,
            element: element.into(),
            problem: problem.into(),
        }
    }
}

/// Which of the two tars a payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `tgz`: gzip of an ordinary tar; every host since 5.0 takes it.
    Tgz,
    /// `vgz`: gzip of a visor tar, as the packages of the host's maker use it.
    Vgz,
}

impl Format {
    /// As a descriptor says it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Tgz => "tgz",
            Format::Vgz => "vgz",
        }
    }

    /// What a descriptor says, if it is one that can be looked into.
    pub fn parse(name: &str) -> Option<Format> {
        [Format::Tgz, Format::Vgz]
            .into_iter()
            .find(|format| format.name() == name)
    }
}

/// A header that was read.
pub(super) struct Header {
    /// As it stands there, prefix included.
    pub(super) name: String,
    pub(super) mode: u32,
    pub(super) len_bytes: u64,
    pub(super) kind: u8,
    pub(super) link: String,
    /// Of a visor tar: where the data begins, from the tar's first byte.
    pub(super) data_at: u64,
}

/// What a header is made from.
pub(super) struct New<'a> {
    pub(super) name: &'a str,
    pub(super) mode: u32,
    pub(super) len_bytes: u64,
    pub(super) mtime_s: u64,
    pub(super) kind: u8,
    /// Of a visor tar only.
    pub(super) data_at: Option<u32>,
}

fn put(block: &mut [u8; BLOCK_BYTES], at: usize, bytes: &[u8]) {
    if let Some(place) = block.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn checksum(block: &[u8; BLOCK_BYTES]) -> u64 {
    let byte = |(at, byte): (usize, &u8)| match at {
        148..156 => u64::from(b' '),
        _ => u64::from(*byte),
    };
    block.iter().enumerate().map(byte).sum()
}

/// Makes a header; the name must have at most 100 bytes, the length at most `MAX_LEN_BYTES`.
pub(super) fn build(new: &New<'_>) -> [u8; BLOCK_BYTES] {
    let mut block = [0u8; BLOCK_BYTES];
    put(&mut block, 0, new.name.as_bytes());
    put(
        &mut block,
        100,
        format!("{:07o}", new.mode & 0o7777).as_bytes(),
    );
    put(&mut block, 108, b"0000000");
    put(&mut block, 116, b"0000000");
    put(
        &mut block,
        124,
        format!("{:011o}", new.len_bytes.min(MAX_LEN_BYTES)).as_bytes(),
    );
    put(
        &mut block,
        136,
        format!("{:011o}", new.mtime_s.min(MAX_LEN_BYTES)).as_bytes(),
    );
    put(&mut block, 156, &[new.kind]);
    put(
        &mut block,
        MAGIC_AT,
        if new.data_at.is_some() { VISOR } else { USTAR },
    );
    if let Some(at) = new.data_at {
        put(&mut block, VISOR_FIELDS_AT, &at.to_le_bytes());
    }
    let sum = format!("{:06o}\0 ", checksum(&block));
    put(&mut block, 148, sum.as_bytes());
    block
}

/// Text up to the first NUL.
fn text(block: &[u8; BLOCK_BYTES], at: usize, len: usize) -> Option<String> {
    let bytes = block.get(at..at + len)?;
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8(bytes.get(..end)?.to_vec()).ok()
}

/// Octal digits, padded with spaces or NULs; an empty field is zero.
fn number(block: &[u8; BLOCK_BYTES], at: usize, len: usize) -> Option<u64> {
    let field = text(block, at, len)?;
    let digits = field.trim_matches(' ');
    if digits.is_empty() {
        return Some(0);
    }
    // `from_str_radix` would take a sign.
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    u64::from_str_radix(digits, 8).ok()
}

/// Reads a header of the tar `format`; `at`: its place in the tar, for messages.
pub(super) fn parse(block: &[u8; BLOCK_BYTES], format: Format, at: u64) -> Result<Header, Broken> {
    let place = || format!("header at byte {at}");
    let broken = |problem: &str| Broken::new(Rule::TarHeader, place(), problem);
    if number(block, 148, 8) != Some(checksum(block)) {
        return Err(broken("its checksum does not match"));
    }
    let magic = block.get(MAGIC_AT..MAGIC_AT + 8).unwrap_or_default();
    let good = match format {
        Format::Tgz => magic == USTAR || magic == GNU,
        Format::Vgz => magic == VISOR,
    };
    if !good {
        let wanted = match format {
            Format::Tgz => "ustar",
            Format::Vgz => "visor",
        };
        let problem = format!(
            "its magic is `{}`, a {} has `{wanted}`",
            magic.escape_ascii(),
            format.name()
        );
        return Err(broken(&problem));
    }
    let mut name = text(block, 0, 100).ok_or_else(|| broken("its name is no UTF-8"))?;
    // The other tars keep other things where ustar keeps the front part of a long name.
    if magic == USTAR {
        let prefix = text(block, 345, 155).ok_or_else(|| broken("its name is no UTF-8"))?;
        if !prefix.is_empty() {
            name = format!("{prefix}/{name}");
        }
    }
    let element = || format!("entry `{}`", name.escape_default());
    let lie = |what: &str| {
        Broken::new(
            Rule::TarHeader,
            element(),
            format!("its {what} is no octal number"),
        )
    };
    let mode = number(block, 100, 8).ok_or_else(|| lie("mode"))?;
    let len_bytes = number(block, 124, 12).ok_or_else(|| lie("length"))?;
    let mode = u32::try_from(mode).ok().filter(|mode| *mode <= 0o177_7777);
    let mode = mode.ok_or_else(|| lie("mode"))? & 0o7777;
    let link = text(block, 157, 100).unwrap_or_default();
    let mut visor = block
        .get(VISOR_FIELDS_AT..)
        .unwrap_or_default()
        .chunks_exact(4)
        .map(|bytes| {
            let bytes = bytes.try_into().unwrap_or_default();
            u64::from(u32::from_le_bytes(bytes))
        });
    let data_at = visor.next().unwrap_or(0);
    if format == Format::Vgz && visor.any(|value| value != 0) {
        let problem = "it has text pages or fix-ups, which cannot be read here";
        return Err(Broken::new(Rule::TarHeader, element(), problem));
    }
    let kind = block.get(156).copied().unwrap_or(0);
    Ok(Header {
        name,
        mode,
        len_bytes,
        kind,
        link,
        data_at,
    })
}
