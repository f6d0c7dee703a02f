//! The operation `backup`: a copy of the state, checked, in the data folder's `backups/`.
//!
//! The authority's key is not in it: it is a file of its own, kept by whoever keeps keys.
//!
//! Invariant: a file `backups/<name>.sqlite` is a whole, checked copy; anything less bears another name.

use super::operation::{Context, Kind, Making, Operation, StepError};
use rusqlite::{Connection, OpenFlags};
use serde::Deserialize;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The kind `backup`.
pub const KIND: Kind = Kind {
    about: "copies the server's state to backups/<execution name>.sqlite in its data folder, and checks the copy",
    for_admins: true,
    make,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {}

struct Backup {
    folder: PathBuf,
    partial: PathBuf,
    whole: PathBuf,
}

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    let _: Parameters =
        serde_json::from_value(making.parameters.clone()).map_err(|error| error.to_string())?;
    let folder = making.data_dir.join("backups");
    let file = |ending: &str| folder.join(format!("{}.{ending}", making.name));
    Ok(Box::new(Backup {
        partial: file("partial"),
        whole: file("sqlite"),
        folder,
    }))
}

fn failed(what: &str, path: &Path, error: &dyn std::fmt::Display) -> StepError {
    StepError::failed(format!("cannot {what} {}: {error}", path.display()))
}

fn remove(path: &Path) -> Result<(), StepError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove", path, &error))
        }
        _ => Ok(()),
    }
}

fn sync_folder(path: &Path) -> Result<(), StepError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| failed("sync", path, &error))
}

impl Backup {
    fn copy(&self, context: &Context) -> Result<(), StepError> {
        let made = fs::create_dir(&self.folder);
        if let Err(error) = made
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(failed("make", &self.folder, &error));
        }
        // What an earlier try left is of no use; SQLite refuses to write over it.
        remove(&self.partial)?;
        context.store.copy_to(&self.partial)?;
        File::open(&self.partial)
            .and_then(|file| file.sync_all())
            .map_err(|error| failed("sync", &self.partial, &error))?;
        sync_folder(&self.folder)
    }

    fn check(&self, context: &Context) -> Result<(), StepError> {
        let bad = |error: &dyn std::fmt::Display| failed("read the copy", &self.partial, error);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let copy = Connection::open_with_flags(&self.partial, flags).map_err(|e| bad(&e))?;
        let verdict: String = copy
            .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
            .map_err(|error| bad(&error))?;
        if verdict != "ok" {
            return Err(bad(&verdict));
        }
        let lines: i64 = copy
            .query_row("SELECT count(*) FROM audit", [], |row| row.get(0))
            .map_err(|error| bad(&error))?;
        context.log(format!("the copy is whole: {lines} lines of audit"))
    }

    fn publish(&self, context: &Context) -> Result<(), StepError> {
        // Nothing to do, if it was cut off after the deed.
        if self.partial.exists() {
            fs::rename(&self.partial, &self.whole)
                .map_err(|error| failed("rename to", &self.whole, &error))?;
        }
        sync_folder(&self.folder)?;
        context.log(format!("{} is there", self.whole.display()))
    }
}

impl Operation for Backup {
    fn steps(&self) -> &'static [&'static str] {
        &["copy", "check", "publish"]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        context.check()?;
        match step {
            0 => self.copy(context),
            1 => self.check(context),
            _ => self.publish(context),
        }
    }

    fn undo(&mut self, step: usize, _context: &Context) -> Result<(), StepError> {
        match step {
            0 => remove(&self.partial),
            1 => Ok(()),
            _ => remove(&self.whole),
        }
    }
}
