//! Checking the bytes of a part: one block, or the whole object.
//!
//! Invariant: bytes that are returned matched their checksum.

use crate::error::FormatError;
use crate::format::{
    BlockEntry, MAX_BLOCK_RAW_BYTES, PartIndex, Sha256Hash, decode_footer, decode_header,
    decode_index, field, sha256,
};
use crc32c::crc32c;

/// Gives the raw bytes of a block from its stored bytes, checked.
pub fn decode_block(
    number: u32,
    entry: &BlockEntry,
    stored: &[u8],
) -> Result<Vec<u8>, FormatError> {
    if stored.len() as u64 != u64::from(entry.stored_bytes) {
        return Err(FormatError::Truncated {
            what: "data block",
            have: stored.len() as u64,
            need: entry.stored_bytes.into(),
        });
    }
    // An entry from `decode_index` is below the limit; one made by hand may not be.
    if entry.raw_bytes > MAX_BLOCK_RAW_BYTES {
        return Err(field("block raw length", entry.raw_bytes));
    }
    let raw = if entry.compressed {
        zstd::bulk::decompress(stored, entry.raw_bytes as usize).map_err(|error| {
            FormatError::Decompress {
                block: number,
                reason: error.to_string(),
            }
        })?
    } else {
        stored.to_vec()
    };
    if raw.len() as u64 != u64::from(entry.raw_bytes) {
        return Err(FormatError::Decompress {
            block: number,
            reason: format!("{} bytes came out, not {}", raw.len(), entry.raw_bytes),
        });
    }
    let computed = crc32c(&raw);
    if computed != entry.crc {
        return Err(FormatError::Crc {
            what: "data block",
            stored: entry.crc,
            computed,
        });
    }
    Ok(raw)
}

/// Checks a whole object: header, footer, index, hash. The blocks are not decompressed.
pub(crate) fn decode_object(bytes: &[u8]) -> Result<(PartIndex, Sha256Hash), FormatError> {
    let header = decode_header(bytes)?;
    let footer = decode_footer(bytes, bytes.len() as u64)?;
    let end = footer.index_offset_bytes + footer.index_bytes;
    let index_raw = bytes
        .get(footer.index_offset_bytes as usize..end as usize)
        .ok_or(field("index offset", footer.index_offset_bytes))?;
    let index = decode_index(index_raw, &footer)?;
    if index.header != header {
        return Err(field("copy of the header in the index", index.header.cut));
    }
    let hashed = bytes.len() - 36;
    let computed = sha256(bytes.get(..hashed).unwrap_or_default());
    Ok((index, computed))
}
