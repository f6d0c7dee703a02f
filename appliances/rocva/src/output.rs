//! A disk's file in the making: written under another name, taken up again after an interruption.
//!
//! Invariant: the final name appears by one atomic step, after the bytes are on the disk; the state file
//! names only portions whose bytes are on the disk; a file that is there is replaced only by force.

use anyhow::{Context, bail};
use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The largest state file that is read: one line of at most 21 bytes for a portion.
const MAX_STATE_BYTES: u64 = 64 << 20;

/// A file that is being filled by portions.
pub(crate) struct PartialFile {
    path: PathBuf,
    state_path: PathBuf,
    file: File,
    state: File,
    done: HashSet<usize>,
    /// Written, but not yet known to be on the disk.
    unsynced: Vec<usize>,
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

impl PartialFile {
    /// Opens `<target>.partial` of `len_bytes`; `key` says what it is filled with. What an earlier run
    /// with the same key has finished is kept, anything else is started over.
    pub(crate) fn open(target: &Path, key: &str, len_bytes: u64) -> anyhow::Result<Self> {
        let path = with_suffix(target, ".partial");
        let state_path = with_suffix(target, ".partial.state");
        let open = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .with_context(|| format!("opening {}", path.display()))
        };
        let file = open(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("{} is being written by another recovery", path.display())
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", path.display()));
            }
        }
        let mut state = open(&state_path)?;
        let done = match read_state(&mut state, key) {
            Some(done) if file.metadata()?.len() == len_bytes => done,
            _ => {
                // First the state, then the data: never a state that promises what is not there.
                state.set_len(0)?;
                state.sync_all()?;
                file.set_len(0)?;
                state.write_all_at(format!("{key}\n").as_bytes(), 0)?;
                file.set_len(len_bytes)
                    .with_context(|| format!("giving {} its length", path.display()))?;
                HashSet::new()
            }
        };
        Ok(Self {
            path,
            state_path,
            file,
            state,
            done,
            unsynced: Vec::new(),
        })
    }

    /// Whether an earlier run has finished the portion.
    pub(crate) fn has(&self, portion: usize) -> bool {
        self.done.contains(&portion)
    }

    /// Portions that earlier runs finished.
    pub(crate) fn resumed(&self) -> usize {
        self.done.len()
    }

    /// The file, for writing at offsets.
    pub(crate) fn file(&self) -> anyhow::Result<File> {
        self.file
            .try_clone()
            .with_context(|| format!("opening {} again", self.path.display()))
    }

    /// A portion was written. Every so often, what was written is made durable and remembered.
    pub(crate) fn wrote(&mut self, portion: usize) -> anyhow::Result<()> {
        self.unsynced.push(portion);
        if self.unsynced.len() >= 32 {
            self.remember()?;
        }
        Ok(())
    }

    /// Makes durable what was written, and then notes it.
    pub(crate) fn remember(&mut self) -> anyhow::Result<()> {
        self.file
            .sync_data()
            .with_context(|| format!("syncing {}", self.path.display()))?;
        let lines: String = self
            .unsynced
            .drain(..)
            .map(|portion| format!("{portion}\n"))
            .collect();
        let end = self.state.metadata()?.len();
        self.state.write_all_at(lines.as_bytes(), end)?;
        self.state.sync_data()?;
        Ok(())
    }

    /// All is written: the bytes go to the disk, the file gets its final name.
    pub(crate) fn finish(self, target: &Path, force: bool) -> anyhow::Result<()> {
        self.file
            .sync_all()
            .with_context(|| format!("syncing {}", self.path.display()))?;
        publish(&self.path, target, force)?;
        remove(&self.state_path)
    }

    /// The path of the unfinished file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the unfinished file: another one was made from it.
    pub(crate) fn discard(self) -> anyhow::Result<()> {
        remove(&self.state_path)?;
        remove(&self.path)
    }
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The finished portions, if the state is of the same key; a torn last line is left out.
fn read_state(state: &mut File, key: &str) -> Option<HashSet<usize>> {
    let mut text = String::new();
    state.take(MAX_STATE_BYTES).read_to_string(&mut text).ok()?;
    let whole = text
        .rfind('\n')
        .map_or("", |end| text.get(..end).unwrap_or(""));
    let mut lines = whole.lines();
    if lines.next() != Some(key) {
        return None;
    }
    lines.map(|line| line.parse().ok()).collect()
}

/// Refuses to go on if something is there already.
pub(crate) fn check_free(target: &Path, force: bool) -> anyhow::Result<()> {
    if !force && target.symlink_metadata().is_ok() {
        bail!(
            "{} is there already: remove it, choose another folder, or use --force",
            target.display()
        );
    }
    Ok(())
}

/// Gives a finished, synced file its final name, and makes the name durable.
pub(crate) fn publish(from: &Path, to: &Path, force: bool) -> anyhow::Result<()> {
    let context = || format!("giving {} its name {}", from.display(), to.display());
    if force {
        std::fs::rename(from, to).with_context(context)?;
    } else {
        // A link fails where a rename would replace a file that came in the meantime.
        match std::fs::hard_link(from, to) {
            Ok(()) => remove(from)?,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => check_free(to, false)?,
            // A file system without links: what is left is to look and to rename.
            Err(_) => {
                check_free(to, false)?;
                std::fs::rename(from, to).with_context(context)?;
            }
        }
    }
    let folder = to.parent().filter(|dir| !dir.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|dir| dir.sync_all())
        .with_context(|| format!("syncing the folder {}", folder.display()))
}

/// Writes a small file as a whole under its final name.
pub(crate) fn write_whole(target: &Path, bytes: &[u8], force: bool) -> anyhow::Result<()> {
    let path = with_suffix(target, ".partial");
    let mut file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("writing {}", path.display()))?;
    publish(&path, target, force)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finished_portions_survive_and_others_do_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let target = dir.path().join("disk.raw");
        let mut first = PartialFile::open(&target, "key", 1024).expect("opens");
        first.file.write_all_at(b"abc", 5).expect("writes");
        first.wrote(3).expect("noted");
        first.remember().expect("remembered");
        first.wrote(4).expect("noted");
        let error = PartialFile::open(&target, "key", 1024)
            .map(|_| ())
            .expect_err("locked");
        assert!(error.to_string().contains("another recovery"), "{error}");
        drop(first);

        let again = PartialFile::open(&target, "key", 1024).expect("opens");
        assert!(again.has(3) && !again.has(4), "{:?}", again.done);
        drop(again);

        let other = PartialFile::open(&target, "other", 1024).expect("opens");
        assert_eq!(other.resumed(), 0);
        let mut bytes = [1; 8];
        other.file.read_exact_at(&mut bytes, 0).expect("reads");
        assert_eq!(bytes, [0; 8], "another recovery's bytes are gone");
        other.finish(&target, false).expect("finishes");
        assert_eq!(std::fs::metadata(&target).expect("is there").len(), 1024);
        assert_eq!(std::fs::read_dir(dir.path()).expect("lists").count(), 1);
    }

    #[test]
    fn a_torn_state_line_is_not_believed() {
        let dir = tempfile::tempdir().expect("a folder");
        let target = dir.path().join("disk.raw");
        drop(PartialFile::open(&target, "key", 64).expect("opens"));
        std::fs::write(with_suffix(&target, ".partial.state"), "key\n1\n23").expect("writes");
        let again = PartialFile::open(&target, "key", 64).expect("opens");
        assert!(again.has(1) && !again.has(23) && !again.has(2));
    }

    #[test]
    fn a_file_that_is_there_is_not_replaced_without_force() {
        let dir = tempfile::tempdir().expect("a folder");
        let target = dir.path().join("disk.raw");
        let partial = PartialFile::open(&target, "key", 64).expect("opens");
        std::fs::write(&target, "precious").expect("writes");
        let error = partial.finish(&target, false).expect_err("refused");
        assert!(error.to_string().contains("--force"), "{error}");
        assert_eq!(std::fs::read(&target).expect("reads"), b"precious");
        write_whole(&target, b"new", true).expect("forced");
        assert_eq!(std::fs::read(&target).expect("reads"), b"new");
    }
}
