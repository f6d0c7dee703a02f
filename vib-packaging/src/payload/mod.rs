//! What is inside a payload: files and folders, packed and read in one stream.
//!
//! Invariant: what [`walk`] hands out has been checked: a plain path below the root that nothing else
//! of the package has, a regular file or a folder, no more bytes than the limits allow. What cannot be
//! checked is not handed out.

mod header;
mod names;
mod ustar;
mod visor;

pub(crate) use header::Broken;
pub use header::Format;
pub(crate) use names::{Names, path_problem};

use crate::finding::{Finding, Report, Rule};
use header::{BLOCK_BYTES, Header};
use std::io::Read;

/// The sticky bit: a host keeps such a file's changes over a reboot.
pub const KEPT: u32 = 0o1000;
pub(crate) const FOLDER_MODE: u32 = 0o755;
const MAX_PATH: usize = 99;

/// A file of a package: where it goes, with which rights, and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Below the root, without a leading `/`.
    pub path: String,
    /// Rights; [`KEPT`] marks configuration that is kept.
    pub mode: u32,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
}

/// An entry of a payload that has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Below the root: no leading `/`, no `.` or `..`, at most 99 printable ASCII characters.
    pub path: String,
    /// File or folder.
    pub kind: EntryKind,
    /// Rights, without set-user-id and set-group-id.
    pub mode: u32,
    /// Bytes of the file; 0 of a folder.
    pub len_bytes: u64,
}

/// Where entries go as they are read. A failure ends the walk.
pub(crate) type Visit<'v> = &'v mut dyn FnMut(&Entry, &mut dyn Read) -> std::io::Result<()>;

/// Packs files; they must have good paths, each once, in order, and lengths that a header can hold.
pub(crate) fn pack(format: Format, files: &[File], mtime_s: u64) -> Vec<u8> {
    match format {
        Format::Tgz => ustar::pack(files, mtime_s),
        Format::Vgz => visor::pack(files, mtime_s),
    }
}

/// What is common to all payloads of a package while they are read.
pub(crate) struct Walk<'r> {
    /// `package: payload`, for findings.
    pub(crate) file: String,
    pub(crate) names: &'r mut Names,
    pub(crate) report: &'r mut Report,
    pub(crate) max_entries: usize,
}

/// Reads a payload from its unpacked `stream` to the end; each good entry goes to `visit`, what is
/// wrong with others to the report. `Err` if the rest cannot be told.
pub(crate) fn walk(
    format: Format,
    stream: &mut dyn Read,
    walk: &mut Walk<'_>,
    visit: Visit<'_>,
) -> Result<(), Broken> {
    match format {
        Format::Tgz => ustar::walk(stream, walk, visit),
        Format::Vgz => visor::walk(stream, walk, visit),
    }
}

impl Walk<'_> {
    fn find(&mut self, rule: Rule, element: &str, problem: String) {
        let element = format!("entry `{}`", element.escape_default());
        self.report
            .add(Finding::new(rule, &self.file, element, problem));
    }

    /// What a header stands for; `None` if it may not be handed out.
    fn admit(&mut self, header: &Header) -> Result<Option<Entry>, Broken> {
        if self.names.count() >= self.max_entries {
            let problem = format!("the package has more than {} entries", self.max_entries);
            return Err(Broken::new(Rule::TooManyEntries, "", problem));
        }
        let kind = match header.kind {
            b'0' | 0 => EntryKind::File,
            b'5' => EntryKind::Folder,
            other => {
                let what = match other {
                    b'1' => format!("a hard link to `{}`", header.link.escape_default()),
                    b'2' => format!("a symbolic link to `{}`", header.link.escape_default()),
                    b'3' | b'4' => "a device".into(),
                    b'6' => "a pipe".into(),
                    b'L' | b'K' => "a GNU header for a long name".into(),
                    _ => format!("of the unknown type `{}`", other.escape_ascii()),
                };
                self.names.skip();
                self.find(Rule::EntryKind, &header.name, format!("it is {what}"));
                return Ok(None);
            }
        };
        // `tar -C folder .` begins each path so; it means the same.
        let path = header.name.trim_start_matches("./");
        let path = match kind {
            EntryKind::Folder => path.strip_suffix('/').unwrap_or(path),
            EntryKind::File => path,
        };
        if kind == EntryKind::Folder
            && (path.is_empty() || path == ".")
            && !header.name.starts_with('/')
        {
            self.names.skip();
            return Ok(None);
        }
        if kind == EntryKind::Folder && header.len_bytes != 0 {
            let problem = format!("a folder that says {} bytes", header.len_bytes);
            return Err(Broken::new(
                Rule::TarLength,
                format!("entry `{}`", path.escape_default()),
                problem,
            ));
        }
        if let Some(problem) = path_problem(path) {
            self.names.skip();
            self.find(Rule::EntryPath, &header.name, problem);
            return Ok(None);
        }
        if let Some(problem) = self.names.take(path, kind) {
            self.find(Rule::EntryTwice, path, problem);
            return Ok(None);
        }
        self.look_at_mode(path, kind, header.mode);
        Ok(Some(Entry {
            path: path.to_owned(),
            kind,
            mode: header.mode & !0o6000,
            len_bytes: header.len_bytes,
        }))
    }

    fn look_at_mode(&mut self, path: &str, kind: EntryKind, mode: u32) {
        if mode & 0o6000 != 0 {
            self.find(
                Rule::EntryMode,
                path,
                format!("mode {mode:04o} sets user or group"),
            );
        } else if kind == EntryKind::File && mode & 0o002 != 0 {
            self.find(
                Rule::EntryMode,
                path,
                format!("mode {mode:04o} lets everybody write"),
            );
        } else if kind == EntryKind::File && mode & KEPT == 0 && mode != 0o555 && mode != 0o444 {
            self.find(
                Rule::EntryModeUsual,
                path,
                format!("mode {mode:04o} is not usual"),
            );
        }
    }
}

/// Reads a block; `None` where the stream ends before it.
fn read_block(stream: &mut dyn Read, at: u64) -> Result<Option<[u8; BLOCK_BYTES]>, Broken> {
    let mut block = [0u8; BLOCK_BYTES];
    let mut have = 0;
    while let Some(rest) = block.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match stream.read(rest).map_err(|error| read_error(&error))? {
            0 if have == 0 => return Ok(None),
            0 => {
                let problem = format!("it ends {have} bytes into a block");
                return Err(Broken::new(
                    Rule::TarLength,
                    format!("block at byte {at}"),
                    problem,
                ));
            }
            count => have += count,
        }
    }
    Ok(Some(block))
}

/// A failure of the stream itself; who owns the stream knows which rule it breaks.
fn read_error(error: &std::io::Error) -> Broken {
    Broken::new(Rule::Gzip, "", error.to_string())
}

/// Skips `len` bytes, which must be zero: nothing may hide there.
fn skip_zeros(stream: &mut dyn Read, len: u64, at: u64) -> Result<(), Broken> {
    let mut buffer = [0u8; 4096];
    let mut left = len;
    while left > 0 {
        let want = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let part = buffer.get_mut(..want).unwrap_or_default();
        let count = stream.read(part).map_err(|error| read_error(&error))?;
        if count == 0 {
            let problem = format!("it ends {left} bytes before the end of its padding");
            return Err(Broken::new(Rule::TarLength, format!("byte {at}"), problem));
        }
        if buffer.iter().take(count).any(|byte| *byte != 0) {
            return Err(Broken::new(
                Rule::TarTrailing,
                format!("byte {at}"),
                "there is something where nothing should be",
            ));
        }
        left -= count as u64;
    }
    Ok(())
}

/// The rest of the stream must be zeros.
fn end_of_zeros(stream: &mut dyn Read, at: u64) -> Result<(), Broken> {
    let mut buffer = [0u8; 4096];
    loop {
        let count = stream
            .read(&mut buffer)
            .map_err(|error| read_error(&error))?;
        if count == 0 {
            return Ok(());
        }
        if buffer.iter().take(count).any(|byte| *byte != 0) {
            return Err(Broken::new(
                Rule::TarTrailing,
                format!("byte {at}"),
                "something follows the end of the tar",
            ));
        }
    }
}

/// Hands an entry's bytes to `visit` and skips what it leaves; all must be there.
fn hand_out(
    stream: &mut dyn Read,
    entry: Option<&Entry>,
    len_bytes: u64,
    name: &str,
    visit: Visit<'_>,
) -> Result<(), Broken> {
    let element = || format!("entry `{}`", name.escape_default());
    let mut body = stream.take(len_bytes);
    if let Some(entry) = entry {
        visit(entry, &mut body)
            .map_err(|error| Broken::new(Rule::Gzip, element(), error.to_string()))?;
    }
    let copied = std::io::copy(&mut body, &mut std::io::sink());
    copied.map_err(|error| read_error(&error))?;
    match body.limit() {
        0 => Ok(()),
        left => {
            let problem =
                format!("it says {len_bytes} bytes, and the payload ends {left} bytes before");
            Err(Broken::new(Rule::TarLength, element(), problem))
        }
    }
}
