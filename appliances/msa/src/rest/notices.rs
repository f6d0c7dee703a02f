//! Routes of alarms, events and the audit.

use super::extract::{Listed, Part, Path, with_store};
use super::gate::Caller;
use super::problem::Problem;
use crate::alarms::{self, Alarm, Event};
use crate::service::Msa;
use crate::store::{Done, StoreError};
use crate::text::Id;
use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// Alarms, open and over.
#[utoipa::path(get, path = "/alarms", operation_id = "list_alarms", tag = "notices",
    params(Part), responses((status = 200, body = Listed<Alarm>)))]
pub async fn alarms(
    State(msa): State<Arc<Msa>>,
    part: Part,
) -> Result<axum::Json<Listed<Alarm>>, Problem> {
    let items = with_store(move || msa.store.read(|t| alarms::list(t, part.after, part.limit)));
    let listed = Listed::new(items.await?, part.limit, |alarm| alarm.seq);
    Ok(axum::Json(listed))
}

/// Says that somebody knows of it.
#[utoipa::path(post, path = "/alarms/{id}/acknowledge", operation_id = "acknowledge_alarm",
    tag = "notices", params(("id" = Id, Path)), responses((status = 204)))]
pub async fn acknowledge(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
) -> Result<StatusCode, Problem> {
    with_store(move || {
        let now_ms = msa.store.now_ms();
        msa.store.change(&caller.actor(), "acknowledge alarm", |t| {
            alarms::acknowledge(t, id, now_ms)?;
            Ok(Done::new((), format!("alarm {id}")))
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What has happened.
#[utoipa::path(get, path = "/events", operation_id = "list_events", tag = "notices",
    params(Part), responses((status = 200, body = Listed<Event>)))]
pub async fn events(
    State(msa): State<Arc<Msa>>,
    part: Part,
) -> Result<axum::Json<Listed<Event>>, Problem> {
    let items = with_store(move || {
        msa.store
            .read(|t| alarms::events(t, part.after, part.limit))
    });
    let listed = Listed::new(items.await?, part.limit, |event| event.seq);
    Ok(axum::Json(listed))
}

/// A line of the audit.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AuditLine {
    /// Its place.
    pub seq: i64,
    /// When.
    pub at_ms: i64,
    /// Who.
    pub actor: String,
    /// From where.
    pub address: Option<String>,
    /// What was asked for.
    pub action: String,
    /// Of what.
    pub target: String,
    /// `done` or `refused`.
    pub outcome: String,
    /// More.
    pub detail: String,
}

/// Every change, and every refusal.
#[utoipa::path(get, path = "/audit", operation_id = "list_audit", tag = "notices",
    params(Part), responses((status = 200, body = Listed<AuditLine>)))]
pub async fn audit(
    State(msa): State<Arc<Msa>>,
    part: Part,
) -> Result<axum::Json<Listed<AuditLine>>, Problem> {
    let items = with_store(move || {
        msa.store.read(|t| {
            let mut statement = t
                .prepare("SELECT * FROM audit WHERE seq > ?1 ORDER BY seq LIMIT ?2")
                .map_err(StoreError::from)?;
            let rows = statement.query_map([part.after, part.limit], |row| {
                Ok(AuditLine {
                    seq: row.get("seq")?,
                    at_ms: row.get("at_ms")?,
                    actor: row.get("actor")?,
                    address: row.get("address")?,
                    action: row.get("action")?,
                    target: row.get("target")?,
                    outcome: row.get("outcome")?,
                    detail: row.get("detail")?,
                })
            })?;
            Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?)
        })
    });
    let listed = Listed::new(items.await?, part.limit, |line| line.seq);
    Ok(axum::Json(listed))
}
