//! What an operation is, to the engine that runs it.
//!
//! Invariant: a step may be run again after it was cut off anywhere, and taken back wherever it was cut
//! off, also when it never began to change anything. The engine relies on that after each crash.

use crate::executions::table;
use crate::outside::Outside;
use crate::store::{Actor, Done, Store, StoreError};
use crate::text::Id;
use parking_lot::{Condvar, Mutex};
use rusqlite::Transaction;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The note that an execution's last word is said.
const COMMITTED: &str = "committed";

/// Why a step did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// It cannot be done; the text says what, where, and what to do.
    #[error("{0}")]
    Failed(String),
    /// It was asked to stop ([`Context::stop`]) and did.
    #[error("stopped")]
    Stopped,
    /// The server's own state failed it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl StepError {
    /// It cannot be done.
    pub fn failed(why: impl Into<String>) -> Self {
        Self::Failed(why.into())
    }
}

/// What is done with an operation that a restart of the server interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterRestart {
    /// The step that was begun is run again, then the rest.
    GoOn,
    /// What was begun or done is taken back.
    RollBack,
}

/// A piece of work in steps.
pub trait Operation: Send {
    /// The names of its steps, in order. They go into the journal: an operation whose steps differ from
    /// its journal's is not continued.
    fn steps(&self) -> &'static [&'static str];

    /// Does a step. It may have been begun before, by a process that died.
    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError>;

    /// Takes a step back that was begun or done. It may have been taken back before, in part or whole.
    fn undo(&mut self, step: usize, context: &Context) -> Result<(), StepError>;

    /// Whether a step is all or nothing by itself, and the last word: once it has begun, nobody cancels
    /// it and no time is over. It does not ask whether it should stop, and what it does it does by
    /// [`Context::commit`]: from then on it is done, whatever else fails.
    fn is_final(&self, _step: usize) -> bool {
        false
    }

    /// What becomes of it after a restart.
    fn after_restart(&self) -> AfterRestart {
        AfterRestart::GoOn
    }
}

/// Why a step should stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An operator cancelled it: it is taken back.
    Cancelled,
    /// Its time is over: it is taken back.
    TimedOut,
    /// The server stops: it goes on after the next start.
    Shutdown,
}

/// Wakes those who wait, and tells them whether the server stops.
#[derive(Default)]
pub struct Signals {
    stopping: AtomicBool,
    changes: Mutex<u64>,
    changed: Condvar,
}

impl Signals {
    /// Something changed: whoever waits looks again.
    pub fn wake(&self) {
        *self.changes.lock() += 1;
        self.changed.notify_all();
    }

    /// The server stops.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether it does.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// How often something changed.
    pub fn seen(&self) -> u64 {
        *self.changes.lock()
    }

    /// Waits until something has changed since `seen`, or for so long.
    pub fn wait(&self, seen: u64, at_most: Duration) {
        let mut changes = self.changes.lock();
        if *changes == seen && !self.is_stopping() {
            self.changed.wait_for(&mut changes, at_most);
        }
    }
}

/// What a step has to work with.
pub struct Context {
    /// The server's state.
    pub store: Arc<Store>,
    /// The world.
    pub outside: Arc<Outside>,
    /// The server's data folder.
    pub data_dir: PathBuf,
    /// The execution.
    pub id: Id,
    pub(crate) deadline_ms: Option<i64>,
    pub(crate) signals: Arc<Signals>,
}

impl Context {
    /// Whether the step should stop, and why. A step asks at least once a second.
    pub fn stop(&self) -> Option<Stop> {
        if self.signals.is_stopping() {
            return Some(Stop::Shutdown);
        }
        let now_ms = self.store.now_ms();
        if self
            .deadline_ms
            .is_some_and(|deadline_ms| now_ms >= deadline_ms)
        {
            return Some(Stop::TimedOut);
        }
        // While it is taken back nobody cancels it any more.
        self.deadline_ms?;
        let cancelled = self.store.read(|t| table::is_cancelled(t, self.id));
        matches!(cancelled, Ok(true)).then_some(Stop::Cancelled)
    }

    /// An error, if the step should stop.
    pub fn check(&self) -> Result<(), StepError> {
        match self.stop() {
            Some(_) => Err(StepError::Stopped),
            None => Ok(()),
        }
    }

    /// Waits; an error as soon as the step should stop.
    pub fn wait(&self, time: Duration) -> Result<(), StepError> {
        let until = Instant::now() + time;
        loop {
            let seen = self.signals.seen();
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.signals
                .wait(seen, left.min(Duration::from_millis(500)));
        }
    }

    /// What this execution noted under a key, maybe before a restart.
    pub fn noted(&self, key: &str) -> Result<Option<String>, StepError> {
        Ok(self.store.read(|t| table::noted(t, self.id, key))?)
    }

    /// Notes something that is needed after a restart too.
    pub fn note(&self, key: &str, value: &str) -> Result<(), StepError> {
        Ok(self.store.record(|t| table::note(t, self.id, key, value))?)
    }

    /// The last word of an execution, in its final step: what `work` changes, the lines of output that it
    /// gives and the note that it is done are one transaction.
    pub fn commit(
        &self,
        action: &str,
        work: impl FnOnce(&Transaction<'_>) -> Result<Done<Vec<String>>, StoreError>,
    ) -> Result<(), StepError> {
        let now_ms = self.store.now_ms();
        let done = self.store.change(&Actor::system(), action, |t| {
            let done = work(t)?;
            for line in &done.value {
                table::add_line(t, self.id, now_ms, line)?;
            }
            table::note(t, self.id, COMMITTED, "yes")?;
            Ok(Done::new((), done.target).with_detail(done.detail))
        });
        Ok(done?)
    }

    /// Adds a line to the execution's output.
    pub fn log(&self, text: impl AsRef<str>) -> Result<(), StepError> {
        let now_ms = self.store.now_ms();
        let noted = self
            .store
            .record(|t| table::add_line(t, self.id, now_ms, text.as_ref()));
        Ok(noted?)
    }
}

/// Whether an execution's last word is said.
pub fn is_committed(t: &Transaction<'_>, id: Id) -> Result<bool, StoreError> {
    Ok(table::noted(t, id, COMMITTED)?.is_some())
}

/// What an operation is made from.
pub struct Making<'a> {
    /// The execution's parameters.
    pub parameters: &'a Value,
    /// The execution's name.
    pub name: &'a str,
    /// The server's data folder.
    pub data_dir: &'a Path,
}

/// Makes an operation, or says which parameter is wrong and why.
pub type Make = fn(&Making<'_>) -> Result<Box<dyn Operation>, String>;

/// A kind of operation.
#[derive(Clone, Copy)]
pub struct Kind {
    /// What it does, for people.
    pub about: &'static str,
    /// Whether only administrators may ask for it.
    pub for_admins: bool,
    /// Makes one.
    pub make: Make,
}

/// The kinds that this server knows, by name.
pub type Registry = BTreeMap<&'static str, Kind>;
