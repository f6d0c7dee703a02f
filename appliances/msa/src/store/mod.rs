//! The state: one SQLite database, written by one process.
//!
//! Invariants: a change is durable before anybody hears of it (`synchronous=FULL`); it is whole or not
//! there at all; the audit's line about a change is in the same transaction as the change. A database of
//! a newer program, or of another one, is refused and not touched.

pub mod schema;

use crate::clock::Clock;
use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};
use std::fs::{File, TryLockError};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The database's file in the data folder.
pub const FILE: &str = "msa.sqlite";
const LOCK: &str = "lock";
/// A reader waits so long for a writer that checkpoints; WAL readers wait for nothing else.
const BUSY: Duration = Duration::from_secs(10);
/// Readers that are kept open.
const READERS: usize = 4;

/// What can be wrong with the state, or with what is asked of it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite's own.
    #[error("the state's database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// A file of the data folder.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process has it.
    #[error("{} is in use by another management server: stop that one first", path.display())]
    InUse {
        /// The data folder.
        path: PathBuf,
    },
    /// Not made yet.
    #[error("{0} holds no state: `jetdr msa init --data-dir {0}` makes it", path.display())]
    Missing {
        /// The data folder.
        path: PathBuf,
    },
    /// A newer program wrote it.
    #[error("{} has schema {found}, this program knows {known} at most: run the newer program, or restore the copy from before its upgrade", path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The newest that this program knows.
        known: usize,
    },
    /// Another program wrote it.
    #[error("{} is no database of a management server: nothing in it was changed", path.display())]
    Foreign {
        /// The database.
        path: PathBuf,
    },
    /// What is asked for is not there.
    #[error("there is no {what} {id}")]
    NotFound {
        /// What it would be.
        what: &'static str,
        /// Its name or id.
        id: String,
    },
    /// What is asked for contradicts what is there.
    #[error("{why}")]
    Conflict {
        /// Why, and what to do.
        why: String,
    },
    /// What is asked for makes no sense by itself.
    #[error("{field}: {why}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong, and what to do.
        why: String,
    },
}

impl StoreError {
    /// Not there.
    pub fn not_found(what: &'static str, id: impl ToString) -> Self {
        let id = id.to_string();
        Self::NotFound { what, id }
    }

    /// A contradiction.
    pub fn conflict(why: impl Into<String>) -> Self {
        Self::Conflict { why: why.into() }
    }

    /// No sense.
    pub fn invalid(field: &'static str, why: impl Into<String>) -> Self {
        let why = why.into();
        Self::Invalid { field, why }
    }
}

/// What the schema says about a change, in words for who asked.
fn explained(error: StoreError, action: &str) -> StoreError {
    let StoreError::Sqlite(rusqlite::Error::SqliteFailure(code, Some(text))) = &error else {
        return error;
    };
    match code.extended_code {
        rusqlite::ffi::SQLITE_CONSTRAINT_UNIQUE | rusqlite::ffi::SQLITE_CONSTRAINT_PRIMARYKEY => {
            let columns = text.rsplit(": ").next().unwrap_or_default();
            let columns: Vec<&str> = columns
                .split(", ")
                .map(|column| column.rsplit('.').next().unwrap_or(column))
                .collect();
            let columns = columns.join(" and ");
            StoreError::conflict(format!(
                "{action}: another one has the same {columns}; choose another or use that one"
            ))
        }
        rusqlite::ffi::SQLITE_CONSTRAINT_FOREIGNKEY => StoreError::conflict(format!(
            "{action}: something that it refers to is not there, or something still refers to it"
        )),
        rusqlite::ffi::SQLITE_CONSTRAINT_CHECK | rusqlite::ffi::SQLITE_CONSTRAINT_TRIGGER => {
            StoreError::conflict(format!("{action}: against a rule of the state: {text}"))
        }
        _ => error,
    }
}

/// Who asks for a change.
#[derive(Clone, Debug)]
pub struct Actor {
    /// `user:anna`, `host:<id>`, `system` or `anonymous`.
    pub name: String,
    /// Where the request came from.
    pub address: Option<IpAddr>,
}

impl Actor {
    /// The management server itself.
    pub fn system() -> Self {
        let name = "system".into();
        Self {
            name,
            address: None,
        }
    }
}

/// What was changed, for the audit.
#[derive(Clone, Debug)]
pub struct Done<T> {
    /// What the caller gets.
    pub value: T,
    /// What was changed: kind and name or id.
    pub target: String,
    /// More, if there is more to say. Never a secret.
    pub detail: String,
}

impl<T> Done<T> {
    /// A change with nothing more to say.
    pub fn new(value: T, target: impl Into<String>) -> Self {
        let (target, detail) = (target.into(), String::new());
        Self {
            value,
            target,
            detail,
        }
    }

    /// The same with more to say.
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }
}

/// The state of a management server.
pub struct Store {
    path: PathBuf,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
    clock: Arc<dyn Clock>,
    _lock: File,
}

fn lock(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join(LOCK);
    let failed = |source| StoreError::File {
        path: path.clone(),
        source,
    };
    let mut options = File::options();
    options.create(true).write(true).truncate(false).mode(0o600);
    let file = options.open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse {
            path: folder.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

fn pragma(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // A name in double quotes is never a text: such a mistake is an error, not a comparison.
    connection.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_DQS_DML, false)?;
    connection.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_DQS_DDL, false)?;
    connection.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    Ok(())
}

impl Store {
    /// Opens the state in a data folder, brings it to this program's schema, and takes it: no other
    /// process can, until this value goes.
    pub fn open(folder: &Path, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let path = folder.join(FILE);
        if !path.is_file() {
            let path = folder.to_owned();
            return Err(StoreError::Missing { path });
        }
        Self::open_or_make(folder, clock)
    }

    /// The same, and makes an empty state where there is none.
    pub fn open_or_make(folder: &Path, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let held = lock(folder)?;
        let path = folder.join(FILE);
        // Made first with its permissions: SQLite gives them to its other files too.
        let mut options = File::options();
        options.create(true).append(true).mode(0o600);
        options.open(&path).map_err(|source| StoreError::File {
            path: path.clone(),
            source,
        })?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(&path, flags)?;
        pragma(&connection)?;
        check_version(&connection, &path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        migrate(&mut connection)?;
        Ok(Self {
            path,
            writer: Mutex::new(connection),
            readers: Mutex::new(Vec::new()),
            clock,
            _lock: held,
        })
    }

    /// The time, from the clock that all of the state's dates come from.
    pub fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// That clock.
    pub fn clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }

    /// Reads; sees one state throughout.
    pub fn read<T>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let kept = self.readers.lock().pop();
        let mut connection = match kept {
            Some(connection) => connection,
            None => {
                let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                let connection = Connection::open_with_flags(&self.path, flags)?;
                pragma(&connection)?;
                connection.pragma_update(None, "query_only", true)?;
                connection
            }
        };
        let outcome = connection
            .transaction()
            .map_err(StoreError::from)
            .and_then(|transaction| work(&transaction));
        let mut readers = self.readers.lock();
        if outcome.is_ok() && readers.len() < READERS {
            readers.push(connection);
        }
        outcome
    }

    /// Changes the state for somebody: what `work` does and the audit's line about it are one
    /// transaction. `action` is a verb and a noun, as `create site`.
    pub fn change<T>(
        &self,
        actor: &Actor,
        action: &str,
        work: impl FnOnce(&Transaction<'_>) -> Result<Done<T>, StoreError>,
    ) -> Result<T, StoreError> {
        let now_ms = self.now_ms();
        let outcome = self.record(|transaction| {
            let done = work(transaction)?;
            let line = Line {
                action,
                target: &done.target,
                outcome: "done",
                detail: &done.detail,
            };
            line.write(transaction, now_ms, actor)?;
            Ok(done.value)
        });
        outcome.map_err(|error| explained(error, action))
    }

    /// Writes what the server notes about itself (the progress of an execution, an alarm): no change
    /// that anybody asked for, so the audit is silent.
    pub fn record<T>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut connection = self.writer.lock();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let value = work(&transaction)?;
        fault::point("msa.before-commit");
        transaction.commit()?;
        fault::point("msa.after-commit");
        Ok(value)
    }

    /// Notes in the audit that something was refused.
    pub fn refused(
        &self,
        actor: &Actor,
        action: &str,
        target: &str,
        detail: &str,
    ) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        let outcome = "refused";
        let line = Line {
            action,
            target,
            outcome,
            detail,
        };
        self.record(|transaction| line.write(transaction, now_ms, actor))
    }

    /// Asks SQLite whether the database is whole: its findings, none if all is well.
    pub fn check(&self) -> Result<Vec<String>, StoreError> {
        self.read(|transaction| {
            let mut findings = Vec::new();
            let mut statement = transaction.prepare("PRAGMA integrity_check(20)")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let text: String = row.get(0)?;
                if text != "ok" {
                    findings.push(text);
                }
            }
            let mut statement = transaction.prepare("PRAGMA foreign_key_check")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let table: String = row.get(0)?;
                findings.push(format!("{table}: a row refers to one that is not there"));
            }
            Ok(findings)
        })
    }

    /// Writes a copy of the state, as of now, to a new file.
    pub fn copy_to(&self, path: &Path) -> Result<(), StoreError> {
        let connection = self.writer.lock();
        let target = path.to_str().ok_or_else(|| {
            StoreError::invalid("path", format!("{} is not UTF-8", path.display()))
        })?;
        connection.execute("VACUUM INTO ?1", [target])?;
        Ok(())
    }
}

struct Line<'a> {
    action: &'a str,
    target: &'a str,
    outcome: &'a str,
    detail: &'a str,
}

impl Line<'_> {
    fn write(
        &self,
        transaction: &Transaction<'_>,
        now_ms: i64,
        actor: &Actor,
    ) -> Result<(), StoreError> {
        let address = actor.address.map(|address| address.to_string());
        transaction.execute(
            "INSERT INTO audit (at_ms, actor, address, action, target, outcome, detail) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            rusqlite::params![
                now_ms,
                actor.name,
                address,
                self.action,
                self.target,
                self.outcome,
                self.detail
            ],
        )?;
        Ok(())
    }
}

fn version(connection: &Connection) -> Result<i64, StoreError> {
    Ok(connection.pragma_query_value(None, "user_version", |row| row.get(0))?)
}

/// Before anything is written: is this ours, and do we know all of it?
fn check_version(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let path = || path.to_owned();
    let foreign = |_| StoreError::Foreign { path: path() };
    let id: i64 = connection
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(foreign)?;
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(foreign)?;
    if id != i64::from(schema::APPLICATION_ID) && (id != 0 || tables != 0) {
        return Err(StoreError::Foreign { path: path() });
    }
    let found = version(connection)?;
    let known = schema::newest();
    if found < 0 || found > known as i64 {
        let path = path();
        return Err(StoreError::Newer { path, found, known });
    }
    Ok(())
}

/// Goes from the version that is there to the newest, each step in a transaction with its number.
fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let from = usize::try_from(version(connection)?).unwrap_or_default();
    for (index, step) in schema::MIGRATIONS.iter().enumerate().skip(from) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "application_id", schema::APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", index as i64 + 1)?;
        fault::point("msa.before-migration");
        transaction.commit()?;
        fault::point("msa.after-migration");
    }
    Ok(())
}
