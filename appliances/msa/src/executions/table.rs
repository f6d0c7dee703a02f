//! The queue, the journal and the output of executions, as tables.
//!
//! Invariant: at most one execution has been started and has not ended (the schema keeps it too); its
//! steps are in the journal from the moment it is started.

use super::plan::Direction;
use crate::clock::DAY_MS;
use crate::store::StoreError;
use crate::text::{ExecutionName, Id, KindName, words};
use rusqlite::{OptionalExtension, Row, Transaction, params};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// The output of one execution ends here: a step that loops must not fill the disk.
pub const MAX_LINES: i64 = 10_000;
const MAX_LINE_CHARS: usize = 2000;

words! {
    /// Where an execution stands.
    State {
        /// Waits for its turn.
        Queued = "queued",
        /// Its steps are done one after the other.
        Running = "running",
        /// Its steps are taken back.
        RollingBack = "rolling_back",
        /// A step can be neither done nor taken back: an operator has to look. The queue stands.
        Blocked = "blocked",
        /// All of it is done.
        Succeeded = "succeeded",
        /// A step failed; all of it was taken back.
        Failed = "failed",
        /// An operator ended it; all of it was taken back.
        Cancelled = "cancelled",
        /// Its time was over; all of it was taken back.
        TimedOut = "timed_out",
        /// It was blocked, and an operator gave it up: some of it may be left.
        Abandoned = "abandoned",
    }
    /// Why an execution is taken back.
    Outcome {
        /// A step failed.
        Failed = "failed",
        /// An operator wanted it.
        Cancelled = "cancelled",
        /// Its time was over.
        TimedOut = "timed_out",
    }
    /// Where a step stands.
    StepState {
        /// Nothing of it was done.
        Pending = "pending",
        /// Some or all of it may have been done.
        Begun = "begun",
        /// All of it was done.
        Done = "done",
        /// All of it was taken back.
        Undone = "undone",
    }
}

impl Outcome {
    /// The state in which it ends.
    pub fn state(self) -> State {
        match self {
            Outcome::Failed => State::Failed,
            Outcome::Cancelled => State::Cancelled,
            Outcome::TimedOut => State::TimedOut,
        }
    }
}

/// What an operator asks for.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewExecution {
    /// Its name, not yet taken.
    pub name: ExecutionName,
    /// What is to be done: one of the kinds of `GET /api/v1/execution-kinds`.
    pub kind: KindName,
    /// What the kind takes; an object.
    #[serde(default = "empty_object")]
    pub parameters: Value,
    /// Seconds after its start at which it is ended and taken back.
    #[serde(default = "default_timeout_s")]
    #[schema(minimum = 1, maximum = 604800)]
    pub timeout_s: i64,
    /// Days for which its output is kept after its end.
    #[serde(default = "default_retention_days")]
    #[schema(minimum = 1, maximum = 3650)]
    pub retention_days: i64,
}

fn empty_object() -> Value {
    Value::Object(serde_json::Map::new())
}

fn default_timeout_s() -> i64 {
    1800
}

fn default_retention_days() -> i64 {
    60
}

/// A step of an execution.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// Where it stands.
    pub state: StepState,
}

/// An execution.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Execution {
    #[serde(skip)]
    pub(crate) seq: i64,
    /// Its id.
    pub id: Id,
    /// Its name.
    pub name: ExecutionName,
    /// What it does.
    pub kind: String,
    /// What it was given.
    pub parameters: Value,
    /// Where it stands.
    pub state: State,
    /// Why it is, or was, taken back.
    pub outcome: Option<Outcome>,
    /// What went wrong, and what to do.
    pub error: Option<String>,
    /// Whose it is.
    pub created_by: String,
    /// Seconds that it may take.
    pub timeout_s: i64,
    /// Days for which its output is kept.
    pub retention_days: i64,
    /// When it was submitted.
    pub created_at_ms: i64,
    /// When it was first started.
    pub started_at_ms: Option<i64>,
    /// When it ended.
    pub ended_at_ms: Option<i64>,
    /// How often it was started: more than once, if the server was restarted meanwhile.
    pub starts: i64,
    /// Its steps; none before it was started.
    pub steps: Vec<Step>,
}

impl Execution {
    /// Which way it goes.
    pub fn direction(&self) -> Direction {
        self.outcome.map_or(Direction::Forward, Direction::Back)
    }

    /// Its steps' states.
    pub fn step_states(&self) -> Vec<StepState> {
        self.steps.iter().map(|step| step.state).collect()
    }

    /// When its time is over.
    pub fn deadline_ms(&self) -> Option<i64> {
        let started = self.started_at_ms?;
        Some(started.saturating_add(self.timeout_s.saturating_mul(1000)))
    }
}

/// A line of an execution's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct OutputLine {
    /// Its place: the lines after it are asked for with `after`.
    pub seq: i64,
    /// When.
    pub at_ms: i64,
    /// What.
    pub text: String,
}

const COLUMNS: &str = "seq, id, name, kind, parameters, state, outcome, error, created_by, timeout_s, \
     retention_days, created_at_ms, started_at_ms, ended_at_ms, starts";

fn from_row(row: &Row<'_>) -> rusqlite::Result<Execution> {
    let parameters: String = row.get("parameters")?;
    Ok(Execution {
        seq: row.get("seq")?,
        id: row.get("id")?,
        name: row.get("name")?,
        kind: row.get("kind")?,
        // The schema lets nothing in that is not JSON.
        parameters: serde_json::from_str(&parameters).unwrap_or_default(),
        state: row.get("state")?,
        outcome: row.get("outcome")?,
        error: row.get("error")?,
        created_by: row.get("created_by")?,
        timeout_s: row.get("timeout_s")?,
        retention_days: row.get("retention_days")?,
        created_at_ms: row.get("created_at_ms")?,
        started_at_ms: row.get("started_at_ms")?,
        ended_at_ms: row.get("ended_at_ms")?,
        starts: row.get("starts")?,
        steps: Vec::new(),
    })
}

fn with_steps(t: &Transaction<'_>, mut execution: Execution) -> Result<Execution, StoreError> {
    let mut statement =
        t.prepare("SELECT name, state FROM execution_steps WHERE execution_id = ?1 ORDER BY step")?;
    let steps = statement.query_map([execution.id], |row| {
        let (name, state) = (row.get(0)?, row.get(1)?);
        Ok(Step { name, state })
    })?;
    execution.steps = steps.collect::<rusqlite::Result<_>>()?;
    Ok(execution)
}

/// Puts an execution at the end of the queue.
pub fn submit(
    t: &Transaction<'_>,
    new: &NewExecution,
    created_by: &str,
    now_ms: i64,
) -> Result<Execution, StoreError> {
    if !(1..=604_800).contains(&new.timeout_s) {
        return Err(StoreError::invalid(
            "timeout_s",
            "takes 1 to 604800 (a week)",
        ));
    }
    if !(1..=3650).contains(&new.retention_days) {
        return Err(StoreError::invalid("retention_days", "takes 1 to 3650"));
    }
    let id = Id::random();
    t.execute(
        "INSERT INTO executions (id, name, kind, parameters, created_by, timeout_s, retention_days, \
         created_at_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        params![
            id,
            new.name,
            new.kind,
            new.parameters.to_string(),
            created_by,
            new.timeout_s,
            new.retention_days,
            now_ms
        ],
    )?;
    get(t, id)
}

/// One execution.
pub fn get(t: &Transaction<'_>, id: Id) -> Result<Execution, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM executions WHERE id = ?1");
    let found = t.prepare(&sql)?.query_row([id], from_row).optional()?;
    let found = found.ok_or_else(|| StoreError::not_found("execution", id))?;
    with_steps(t, found)
}

/// Executions after `after`, in the order in which they were submitted.
pub fn list(t: &Transaction<'_>, after: i64, limit: i64) -> Result<Vec<Execution>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM executions WHERE seq > ?1 ORDER BY seq LIMIT ?2");
    let mut statement = t.prepare(&sql)?;
    let rows = statement.query_map([after, limit], from_row)?;
    let rows: Vec<Execution> = rows.collect::<rusqlite::Result<_>>()?;
    rows.into_iter().map(|row| with_steps(t, row)).collect()
}

/// The execution that is under way, else the first of the queue.
pub fn due(t: &Transaction<'_>) -> Result<Option<Execution>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM executions \
         WHERE state IN ('queued', 'running', 'rolling_back', 'blocked') \
         ORDER BY state = 'queued', seq LIMIT 1"
    );
    let found = t.prepare(&sql)?.query_row([], from_row).optional()?;
    found.map(|found| with_steps(t, found)).transpose()
}

/// Starts it, or starts it again after the server was restarted.
pub fn start(
    t: &Transaction<'_>,
    execution: &Execution,
    steps: &[&str],
    now_ms: i64,
) -> Result<(), StoreError> {
    t.execute(
        "UPDATE executions SET starts = starts + 1, \
         state = CASE state WHEN 'queued' THEN 'running' ELSE state END, \
         started_at_ms = coalesce(started_at_ms, ?2) WHERE id = ?1",
        params![execution.id, now_ms],
    )?;
    if execution.state == State::Queued {
        for (step, name) in steps.iter().enumerate() {
            t.execute(
                "INSERT INTO execution_steps (execution_id, step, name, state) \
                 VALUES (?1, ?2, ?3, 'pending')",
                params![execution.id, step as i64, name],
            )?;
        }
    }
    Ok(())
}

/// Notes where a step stands.
pub fn set_step(
    t: &Transaction<'_>,
    id: Id,
    step: usize,
    state: StepState,
) -> Result<(), StoreError> {
    let changed = t.execute(
        "UPDATE execution_steps SET state = ?3 WHERE execution_id = ?1 AND step = ?2",
        params![id, step as i64, state],
    )?;
    match changed {
        1 => Ok(()),
        _ => Err(StoreError::not_found("step of execution", id)),
    }
}

/// Turns it round: from now on it is taken back. The first reason stays.
pub fn turn_back(
    t: &Transaction<'_>,
    id: Id,
    outcome: Outcome,
    error: &str,
) -> Result<(), StoreError> {
    t.execute(
        "UPDATE executions SET state = 'rolling_back', outcome = ?2, error = ?3 \
         WHERE id = ?1 AND outcome IS NULL AND state = 'running'",
        params![id, outcome, error],
    )?;
    Ok(())
}

/// It can go neither on nor back.
pub fn block(t: &Transaction<'_>, id: Id, error: &str) -> Result<(), StoreError> {
    t.execute(
        "UPDATE executions SET state = 'blocked', error = ?2 WHERE id = ?1",
        params![id, error],
    )?;
    Ok(())
}

/// It is over.
pub fn finish(t: &Transaction<'_>, id: Id, state: State, now_ms: i64) -> Result<(), StoreError> {
    t.execute(
        "UPDATE executions SET state = ?2, ended_at_ms = ?3 WHERE id = ?1",
        params![id, state, now_ms],
    )?;
    Ok(())
}

/// An operator wants it to end. One that waits ends at once; true: it did.
pub fn cancel(t: &Transaction<'_>, id: Id, now_ms: i64) -> Result<bool, StoreError> {
    match get(t, id)?.state {
        State::Queued => {
            t.execute(
                "UPDATE executions SET outcome = 'cancelled', cancel = 1 WHERE id = ?1",
                [id],
            )?;
            finish(t, id, State::Cancelled, now_ms)?;
            Ok(true)
        }
        State::Running => {
            t.execute("UPDATE executions SET cancel = 1 WHERE id = ?1", [id])?;
            Ok(false)
        }
        state => Err(StoreError::conflict(format!(
            "execution {id} is {state}: only one that waits or runs can be cancelled"
        ))),
    }
}

/// Lets a blocked one try again, or gives it up.
pub fn unblock(t: &Transaction<'_>, id: Id, give_up: bool, now_ms: i64) -> Result<(), StoreError> {
    let execution = get(t, id)?;
    if execution.state != State::Blocked {
        return Err(StoreError::conflict(format!(
            "execution {id} is {}: only a blocked one is retried or abandoned",
            execution.state
        )));
    }
    if give_up {
        return finish(t, id, State::Abandoned, now_ms);
    }
    let state = match execution.outcome {
        Some(_) => State::RollingBack,
        None => State::Running,
    };
    t.execute(
        "UPDATE executions SET state = ?2 WHERE id = ?1",
        params![id, state],
    )?;
    Ok(())
}

/// Whether somebody wants it to end.
pub fn is_cancelled(t: &Transaction<'_>, id: Id) -> Result<bool, StoreError> {
    let mut statement = t.prepare("SELECT cancel FROM executions WHERE id = ?1")?;
    let found: Option<bool> = statement.query_row([id], |row| row.get(0)).optional()?;
    Ok(found.unwrap_or(false))
}

/// Adds a line to its output, cut to size. Beyond the limit there is one last line that says so.
pub fn add_line(t: &Transaction<'_>, id: Id, at_ms: i64, text: &str) -> Result<(), StoreError> {
    let mut count = t.prepare("SELECT count(*) FROM execution_lines WHERE execution_id = ?1")?;
    let lines: i64 = count.query_row([id], |row| row.get(0))?;
    if lines >= MAX_LINES {
        return Ok(());
    }
    let mut line: String = text
        .chars()
        .take(MAX_LINE_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if lines + 1 == MAX_LINES {
        line = format!("the output ends here: {MAX_LINES} lines");
    }
    let mut insert =
        t.prepare("INSERT INTO execution_lines (execution_id, at_ms, text) VALUES (?1, ?2, ?3)")?;
    insert.execute(params![id, at_ms, line])?;
    Ok(())
}

/// Lines of its output after `after`.
pub fn lines(
    t: &Transaction<'_>,
    id: Id,
    after: i64,
    limit: i64,
) -> Result<Vec<OutputLine>, StoreError> {
    let mut statement = t.prepare(
        "SELECT seq, at_ms, text FROM execution_lines \
         WHERE execution_id = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3",
    )?;
    let rows = statement.query_map(params![id, after, limit], |row| {
        let (seq, at_ms, text) = (row.get(0)?, row.get(1)?, row.get(2)?);
        Ok(OutputLine { seq, at_ms, text })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Forgets executions whose retention is over; says how many.
pub fn purge(t: &Transaction<'_>, now_ms: i64) -> Result<usize, StoreError> {
    let sql = "DELETE FROM executions \
               WHERE ended_at_ms IS NOT NULL AND ended_at_ms + retention_days * ?2 < ?1";
    Ok(t.execute(sql, params![now_ms, DAY_MS])?)
}

/// What an execution noted for itself, to know it after a restart.
pub fn noted(t: &Transaction<'_>, id: Id, key: &str) -> Result<Option<String>, StoreError> {
    let sql = "SELECT value FROM execution_notes WHERE execution_id = ?1 AND key = ?2";
    Ok(t.prepare(sql)?
        .query_row(params![id, key], |row| row.get(0))
        .optional()?)
}

/// Notes something for the execution itself; a note of the same key is replaced.
pub fn note(t: &Transaction<'_>, id: Id, key: &str, value: &str) -> Result<(), StoreError> {
    t.execute(
        "INSERT INTO execution_notes (execution_id, key, value) VALUES (?1, ?2, ?3) \
         ON CONFLICT (execution_id, key) DO UPDATE SET value = excluded.value",
        params![id, key, value],
    )?;
    Ok(())
}
