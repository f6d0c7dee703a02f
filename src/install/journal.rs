//! The journal of an installation: what was asked for, and how far it is.
//!
//! Invariant: a step is in the journal before anything of it is done, and what a step made is there before the
//! next begins; each change of the file is whole, so that a kill leaves the one or the other.

use super::fields::Fields;
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

const NAME: &str = "install.json";
const LOCK: &str = "install.lock";
const VERSION: u32 = 1;
/// It stays far below.
const MAX_BYTES: u64 = 1 << 20;

/// What is being done with the installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It is being made.
    Installing,
    /// It is there.
    Installed,
    /// A step failed: all is being taken back.
    TakingBack,
    /// It is being removed.
    Uninstalling,
    /// All of it is gone but the folder.
    Uninstalled,
}

/// What steps made, as far as it has names that are not in the fields.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    /// The role's id in vCenter.
    pub role: Option<i32>,
    /// The vCenter's id in the server.
    pub vcenter: Option<String>,
}

/// The journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    version: u32,
    /// Whose things are whose: it is noted with what is made.
    pub id: uuid::Uuid,
    /// What was asked for.
    pub fields: Fields,
    /// What is being done.
    pub phase: Phase,
    /// So many steps were begun: all but the last of them are done.
    pub begun: usize,
    /// So many steps are done.
    pub done: usize,
    /// What they made.
    pub made: Made,
    /// Why it is being taken back.
    pub why: Option<String>,
}

impl Journal {
    pub fn new(fields: Fields) -> Self {
        Self {
            version: VERSION,
            id: uuid::Uuid::new_v4(),
            fields,
            phase: Phase::Installing,
            begun: 0,
            done: 0,
            made: Made::default(),
            why: None,
        }
    }
}

/// An installation's folder, held by this process.
pub struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Makes the folder, if it is not there, and holds it.
    pub fn make(path: &Path) -> anyhow::Result<Self> {
        let what = || format!("cannot make {}", path.display());
        fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(path)
            .with_context(what)?;
        Self::hold(path)
    }

    /// Holds a folder that is there.
    pub fn hold(path: &Path) -> anyhow::Result<Self> {
        let path = path
            .canonicalize()
            .with_context(|| format!("cannot find {}", path.display()))?;
        let at = path.join(LOCK);
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&at)
            .with_context(|| format!("cannot open {}", at.display()))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(TryLockError::WouldBlock) => bail!(
                "another `jetdr install` or `jetdr uninstall` works on {}: wait for its end",
                path.display()
            ),
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", at.display()))
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The journal; nothing, if no installation was begun here.
    pub fn journal(&self) -> anyhow::Result<Option<Journal>> {
        let path = self.path.join(NAME);
        let bytes = match fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Ok(found) if found.len() > MAX_BYTES => bail!("{} is no journal", path.display()),
            _ => fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?,
        };
        let journal: Journal = serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "{} is damaged: restore it from a backup of the folder",
                path.display()
            )
        })?;
        if journal.version != VERSION {
            bail!(
                "{} is of version {}, this program knows {VERSION}: use the program that made it",
                path.display(),
                journal.version
            );
        }
        Ok(Some(journal))
    }

    /// Writes the journal: it is durable when this returns.
    pub fn keep(&self, journal: &Journal) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec_pretty(journal)?;
        Ok(msa::authority::write_private(
            &self.path.join(NAME),
            &bytes,
        )?)
    }

    /// Whether nothing lies in it but the lock.
    pub fn is_empty(&self) -> anyhow::Result<bool> {
        for entry in fs::read_dir(&self.path)? {
            if entry?.file_name() != LOCK {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Lets go of a folder in which nothing was begun: as it was before it was held.
    pub fn release(&self) {
        let _ = fs::remove_file(self.path.join(LOCK));
        // It stays, if anything else is in it.
        let _ = fs::remove_dir(&self.path);
    }

    /// Removes the folder with all that an installation puts there, the journal last; what else lies there
    /// stays, with the folder.
    pub fn remove(self) -> anyhow::Result<()> {
        for name in super::server::FILES {
            remove(&self.path.join(name))?;
        }
        remove(&self.path.join(NAME))?;
        remove(&self.path.join(LOCK))?;
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
                println!("{} holds other files, and stays", self.path.display());
                Ok(())
            }
            done => done.with_context(|| format!("cannot remove {}", self.path.display())),
        }
    }
}

/// Removes a file or a folder, if it is there.
pub fn remove(path: &Path) -> anyhow::Result<()> {
    let done = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match done {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done.with_context(|| format!("cannot remove {}", path.display())),
    }
}
