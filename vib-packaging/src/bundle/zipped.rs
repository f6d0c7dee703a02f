//! Zip files: written the same each time, read into memory with limits.
//!
//! Invariant: what [`read`] returns are regular files with plain paths, each once, none larger than its
//! limit. Everything is stored, not deflated: what is large in a bundle is compressed already, and
//! deflate would make the bytes depend on who compressed.

use crate::finding::{Finding, Report, Rule};
use crate::limits::Limits;
use crate::payload::path_problem;
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipArchive, ZipWriter};

/// The zip of these files, in this order. A time outside of what a zip can say becomes 1980.
pub(super) fn write(
    files: &[(String, Vec<u8>)],
    time: jiff::Timestamp,
) -> zip::result::ZipResult<Vec<u8>> {
    let utc = time.to_zoned(jiff::tz::TimeZone::UTC);
    let small = |value: i8| u8::try_from(value).unwrap_or(0);
    let time = DateTime::from_date_and_time(
        u16::try_from(utc.year()).unwrap_or(0),
        small(utc.month()),
        small(utc.day()),
        small(utc.hour()),
        small(utc.minute()),
        small(utc.second()),
    );
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(time.unwrap_or_default())
        .unix_permissions(0o644);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (path, bytes) in files {
        zip.start_file(path.as_str(), options)?;
        zip.write_all(bytes)?;
    }
    Ok(zip.finish()?.into_inner())
}

/// How many files the end of the zip says there are: a reader that keeps files by name would not
/// notice that a name is there twice.
fn count_at_end(bytes: &[u8]) -> Option<usize> {
    let at = bytes
        .windows(4)
        .rposition(|window| window == b"PK\x05\x06")?;
    let count = bytes.get(at + 10..at + 12)?.try_into().ok()?;
    Some(usize::from(u16::from_le_bytes(count)))
}

/// The files of a zip by their paths; what is wrong goes into `report`, problems of the zip itself
/// under `rule`.
pub(super) fn read(
    file: &str,
    bytes: &[u8],
    limits: &Limits,
    rule: Rule,
    report: &mut Report,
) -> Option<BTreeMap<String, Vec<u8>>> {
    let broken = |problem: String| Finding::new(rule, file, "", problem);
    let mut archive = match ZipArchive::new(Cursor::new(bytes)) {
        Ok(archive) => archive,
        Err(error) => {
            report.add(broken(format!("it is no zip: {error}")));
            return None;
        }
    };
    if archive.len() > limits.entries {
        let problem = format!("it has {} files, over {}", archive.len(), limits.entries);
        report.add(Finding::new(Rule::TooManyEntries, file, "", problem));
        return None;
    }
    if count_at_end(bytes) != Some(archive.len()) {
        let problem = format!(
            "it tells of another number of files than the {} that it has: a path is there twice",
            archive.len()
        );
        report.add(Finding::new(Rule::BundlePath, file, "", problem));
        return None;
    }
    let mut files = BTreeMap::new();
    let mut left_bytes = limits.unpacked_bytes;
    for index in 0..archive.len() {
        let mut entry = match archive.by_index(index) {
            Ok(entry) => entry,
            Err(error) => {
                report.add(broken(format!(
                    "file {} cannot be read: {error}",
                    index + 1
                )));
                continue;
            }
        };
        let path = String::from_utf8_lossy(entry.name_raw()).into_owned();
        let element = format!("file `{}`", path.escape_default());
        if entry.is_dir() {
            continue;
        }
        let problem = if entry.is_symlink() {
            Some("it is a symbolic link".into())
        } else {
            bad_path(&path)
        };
        if let Some(problem) = problem {
            report.add(Finding::new(Rule::BundlePath, file, element, problem));
            continue;
        }
        let limit = if path.ends_with(".vib") {
            limits.vib_bytes
        } else {
            limits.text_bytes
        };
        let limit = limit.min(left_bytes);
        let mut content = Vec::new();
        match (&mut entry).take(limit + 1).read_to_end(&mut content) {
            Ok(_) if content.len() as u64 > limit => {
                let problem = format!("it has over {limit} bytes");
                report.add(Finding::new(Rule::TooLarge, file, element, problem));
            }
            Ok(_) => {
                left_bytes -= content.len() as u64;
                files.insert(path, content);
            }
            Err(error) => report.add(broken(format!("{element} cannot be read: {error}"))),
        }
    }
    Some(files)
}

/// Paths in a bundle may be longer than in a package: they hold its name and its id.
fn bad_path(path: &str) -> Option<String> {
    let long = path.len() > 200;
    let whole = || path.split('/').find_map(path_problem);
    if long {
        Some(format!("the path has {} characters", path.len()))
    } else if path.starts_with('/') {
        Some("the path begins with `/`".into())
    } else {
        whole()
    }
}
