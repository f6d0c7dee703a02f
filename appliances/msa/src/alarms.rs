//! What is wrong now, and what has happened.
//!
//! Invariant: an alarm is open for as long as its cause lasts, and only once for one cause and subject.

use crate::store::StoreError;
use crate::text::{Id, words};
use rusqlite::{Row, Transaction, params};
use serde::Serialize;
use utoipa::ToSchema;

/// Events beyond this many are forgotten, the oldest first.
const MAX_EVENTS: i64 = 100_000;

words! {
    /// How bad it is.
    Severity {
        /// Something will go wrong if nothing is done.
        Warning = "warning",
        /// Something does not work.
        Critical = "critical",
    }
}

/// Something is, or was, wrong.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Alarm {
    #[serde(skip)]
    pub(crate) seq: i64,
    /// Its id.
    pub id: Id,
    /// How bad it is.
    pub severity: Severity,
    /// What kind of thing is wrong.
    pub kind: String,
    /// With what.
    pub subject: String,
    /// What is wrong, and what to do.
    pub text: String,
    /// Since when.
    pub raised_at_ms: i64,
    /// When somebody said that they know.
    pub acknowledged_at_ms: Option<i64>,
    /// Until when.
    pub cleared_at_ms: Option<i64>,
}

/// Something happened.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Event {
    /// Its place in the order of events.
    pub seq: i64,
    /// When.
    pub at_ms: i64,
    /// What kind of thing.
    pub kind: String,
    /// To what.
    pub subject: String,
    /// What.
    pub text: String,
}

/// Opens an alarm; one that is open already gets the new text.
pub fn raise(
    t: &Transaction<'_>,
    severity: Severity,
    kind: &str,
    subject: &str,
    text: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    t.execute(
        "INSERT INTO alarms (id, severity, kind, subject, text, raised_at_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6) \
         ON CONFLICT (kind, subject) WHERE cleared_at_ms IS NULL \
         DO UPDATE SET text = excluded.text, severity = excluded.severity",
        params![Id::random(), severity, kind, subject, text, now_ms],
    )?;
    event(t, kind, subject, text, now_ms)
}

/// Whether it is open.
pub fn is_open(t: &Transaction<'_>, kind: &str, subject: &str) -> Result<bool, StoreError> {
    let sql = "SELECT count(*) FROM alarms \
               WHERE kind = ?1 AND subject = ?2 AND cleared_at_ms IS NULL";
    let open: i64 = t.query_row(sql, [kind, subject], |row| row.get(0))?;
    Ok(open > 0)
}

/// Its cause is gone. No alarm of it: nothing happens.
pub fn clear(
    t: &Transaction<'_>,
    kind: &str,
    subject: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    let cleared = t.execute(
        "UPDATE alarms SET cleared_at_ms = ?3 \
         WHERE kind = ?1 AND subject = ?2 AND cleared_at_ms IS NULL",
        params![kind, subject, now_ms],
    )?;
    match cleared {
        0 => Ok(()),
        _ => event(t, kind, subject, "over", now_ms),
    }
}

/// Notes that something happened.
pub fn event(
    t: &Transaction<'_>,
    kind: &str,
    subject: &str,
    text: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    t.execute(
        "INSERT INTO events (at_ms, kind, subject, text) VALUES (?1, ?2, ?3, ?4)",
        params![now_ms, kind, subject, text],
    )?;
    t.execute(
        "DELETE FROM events WHERE seq <= ?1",
        [t.last_insert_rowid() - MAX_EVENTS],
    )?;
    Ok(())
}

fn alarm(row: &Row<'_>) -> rusqlite::Result<Alarm> {
    Ok(Alarm {
        seq: row.get("seq")?,
        id: row.get("id")?,
        severity: row.get("severity")?,
        kind: row.get("kind")?,
        subject: row.get("subject")?,
        text: row.get("text")?,
        raised_at_ms: row.get("raised_at_ms")?,
        acknowledged_at_ms: row.get("acknowledged_at_ms")?,
        cleared_at_ms: row.get("cleared_at_ms")?,
    })
}

/// Alarms after `after`, in the order in which they were raised.
pub fn list(t: &Transaction<'_>, after: i64, limit: i64) -> Result<Vec<Alarm>, StoreError> {
    let mut statement = t.prepare("SELECT * FROM alarms WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
    let rows = statement.query_map([after, limit], alarm)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Somebody knows of it.
pub fn acknowledge(t: &Transaction<'_>, id: Id, now_ms: i64) -> Result<(), StoreError> {
    let changed = t.execute(
        "UPDATE alarms SET acknowledged_at_ms = coalesce(acknowledged_at_ms, ?2) WHERE id = ?1",
        params![id, now_ms],
    )?;
    match changed {
        0 => Err(StoreError::not_found("alarm", id)),
        _ => Ok(()),
    }
}

/// Events after `after`, in their order.
pub fn events(t: &Transaction<'_>, after: i64, limit: i64) -> Result<Vec<Event>, StoreError> {
    let mut statement = t.prepare(
        "SELECT seq, at_ms, kind, subject, text FROM events WHERE seq > ?1 ORDER BY seq LIMIT ?2",
    )?;
    let rows = statement.query_map([after, limit], |row| {
        Ok(Event {
            seq: row.get(0)?,
            at_ms: row.get(1)?,
            kind: row.get(2)?,
            subject: row.get(3)?,
            text: row.get(4)?,
        })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}
