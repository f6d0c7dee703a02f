//! The ordinary tar of a `tgz`: header, data, header, data, two blocks of zeros.
//!
//! Pax headers that only tell times and owners are read over: tools write them unasked. Any that would
//! change a path or a length is refused, since readers disagree about those.

use super::header::{BLOCK_BYTES, Broken, Format, New, build, parse};
use super::{
    FOLDER_MODE, File, Visit, Walk, end_of_zeros, hand_out, names, read_block, skip_zeros,
};
use crate::finding::Rule;
use std::io::Read;

const MAX_PAX_BYTES: u64 = 64 << 10;
/// Of a pax header, what changes neither where nor what an entry is.
const HARMLESS: [&str; 8] = [
    "mtime", "atime", "ctime", "comment", "uid", "gid", "uname", "gname",
];

fn padding(len_bytes: u64) -> u64 {
    let block = BLOCK_BYTES as u64;
    (block - len_bytes % block) % block
}

pub(super) fn pack(files: &[File], mtime_s: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for folder in names::folders(files.iter().map(|file| file.path.as_str())) {
        let name = format!("{folder}/");
        out.extend_from_slice(&build(&New {
            name: &name,
            mode: FOLDER_MODE,
            len_bytes: 0,
            mtime_s,
            kind: b'5',
            data_at: None,
        }));
    }
    for file in files {
        out.extend_from_slice(&build(&New {
            name: &file.path,
            mode: file.mode,
            len_bytes: file.bytes.len() as u64,
            mtime_s,
            kind: b'0',
            data_at: None,
        }));
        out.extend_from_slice(&file.bytes);
        out.resize(out.len().next_multiple_of(BLOCK_BYTES), 0);
    }
    out.resize(out.len() + 2 * BLOCK_BYTES, 0);
    out
}

/// The keys of a pax header: `<length> <key>=<value>\n`, again and again.
fn pax_keys(bytes: &[u8]) -> Option<Vec<String>> {
    let mut keys = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let space = rest.iter().position(|b| *b == b' ')?;
        let digits = std::str::from_utf8(rest.get(..space)?).ok()?;
        let length: usize = digits
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| digits.parse().ok())??;
        let record = rest.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|b| *b == b'=')?;
        keys.push(String::from_utf8(record.get(..equals)?.to_vec()).ok()?);
        rest = rest.get(length..)?;
    }
    Some(keys)
}

/// Reads a pax header's data; an error if it says more than may be read over.
fn pass_pax(stream: &mut dyn Read, len_bytes: u64, at: u64) -> Result<(), Broken> {
    let broken =
        |problem: String| Broken::new(Rule::TarHeader, format!("pax header at byte {at}"), problem);
    if len_bytes > MAX_PAX_BYTES {
        return Err(broken(format!("it has {len_bytes} bytes")));
    }
    let mut bytes = Vec::new();
    let read = stream.take(len_bytes).read_to_end(&mut bytes);
    read.map_err(|error| super::read_error(&error))?;
    let keys = pax_keys(&bytes).ok_or_else(|| broken("it is damaged".into()))?;
    match keys.iter().find(|key| !HARMLESS.contains(&key.as_str())) {
        Some(key) => Err(broken(format!(
            "it sets `{}`, which no package needs",
            key.escape_default()
        ))),
        None => Ok(()),
    }
}

pub(super) fn walk(
    stream: &mut dyn Read,
    walk: &mut Walk<'_>,
    visit: Visit<'_>,
) -> Result<(), Broken> {
    let mut at = 0u64;
    loop {
        let Some(block) = read_block(stream, at)? else {
            let problem = "it ends without a block of zeros";
            return Err(Broken::new(Rule::TarLength, format!("byte {at}"), problem));
        };
        if block.iter().all(|byte| *byte == 0) {
            return end_of_zeros(stream, at);
        }
        let header = parse(&block, Format::Tgz, at)?;
        if matches!(header.kind, b'x' | b'g') {
            pass_pax(stream, header.len_bytes, at)?;
        } else {
            let entry = walk.admit(&header)?;
            hand_out(
                stream,
                entry.as_ref(),
                header.len_bytes,
                &header.name,
                visit,
            )?;
        }
        let data_end = at + BLOCK_BYTES as u64 + header.len_bytes;
        let padding = padding(header.len_bytes);
        skip_zeros(stream, padding, data_end)?;
        at = data_end + padding;
    }
}
