//! The visor tar of a `vgz`: all headers, one block of zeros, then all data back to back. Each header
//! says where its data begins.
//!
//! Invariant: data is read in one pass, so it must come in the order of the headers; two entries never
//! share bytes, and between them is nothing but zeros.

use super::header::{BLOCK_BYTES, Broken, Format, New, build, parse};
use super::{
    EntryKind, FOLDER_MODE, File, Visit, Walk, end_of_zeros, hand_out, names, read_block,
    skip_zeros,
};
use crate::finding::Rule;
use std::io::Read;

pub(super) fn pack(files: &[File], mtime_s: u64) -> Vec<u8> {
    let folders = names::folders(files.iter().map(|file| file.path.as_str()));
    let headers = folders.len() + files.len() + 1;
    let mut data_at = headers * BLOCK_BYTES;
    let mut out = Vec::new();
    // The builder's limits keep a package far below 4 GiB.
    let place = |at: usize| Some(u32::try_from(at).unwrap_or(u32::MAX));
    for folder in &folders {
        out.extend_from_slice(&build(&New {
            name: &format!("{folder}/"),
            mode: FOLDER_MODE,
            len_bytes: 0,
            mtime_s,
            kind: b'5',
            data_at: Some(0),
        }));
    }
    for file in files {
        out.extend_from_slice(&build(&New {
            name: &file.path,
            mode: file.mode,
            len_bytes: file.bytes.len() as u64,
            mtime_s,
            kind: b'0',
            data_at: place(data_at),
        }));
        data_at += file.bytes.len();
    }
    out.resize(out.len() + BLOCK_BYTES, 0);
    for file in files {
        out.extend_from_slice(&file.bytes);
    }
    out
}

pub(super) fn walk(
    stream: &mut dyn Read,
    walk: &mut Walk<'_>,
    visit: Visit<'_>,
) -> Result<(), Broken> {
    let mut headers = Vec::new();
    let mut at = 0u64;
    loop {
        let Some(block) = read_block(stream, at)? else {
            let problem = "it ends without a block of zeros after its headers";
            return Err(Broken::new(Rule::TarLength, format!("byte {at}"), problem));
        };
        at += BLOCK_BYTES as u64;
        if block.iter().all(|byte| *byte == 0) {
            break;
        }
        let header = parse(&block, Format::Vgz, at - BLOCK_BYTES as u64)?;
        let entry = walk.admit(&header)?;
        headers.push((header, entry));
    }
    for (header, entry) in &headers {
        let is_folder = entry
            .as_ref()
            .is_some_and(|entry| entry.kind == EntryKind::Folder);
        if !is_folder && header.len_bytes > 0 {
            let Some(gap) = header.data_at.checked_sub(at) else {
                let (begin, name) = (header.data_at, header.name.escape_default());
                let problem = format!(
                    "its data begins at byte {begin}, before byte {at}, where the last one's ended"
                );
                return Err(Broken::new(
                    Rule::TarLength,
                    format!("entry `{name}`"),
                    problem,
                ));
            };
            skip_zeros(stream, gap, at)?;
            at = header.data_at;
        }
        hand_out(
            stream,
            entry.as_ref(),
            header.len_bytes,
            &header.name,
            visit,
        )?;
        at = at.saturating_add(header.len_bytes);
    }
    end_of_zeros(stream, at)
}
