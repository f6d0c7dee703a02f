//! Routes of executions: submit, look, read the output while it grows, cancel, retry, give up.

use super::extract::{Json, Listed, Part, Path, with_store};
use super::gate::Caller;
use super::problem::Problem;
use crate::executions::table::{self, Execution, NewExecution, OutputLine};
use crate::service::Msa;
use crate::text::Id;
use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// A kind of execution.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExecutionKind {
    /// What to ask for.
    pub kind: String,
    /// What it does.
    pub about: String,
    /// Whether only administrators may ask for it.
    pub for_admins: bool,
}

/// What this server can do by execution.
#[utoipa::path(get, path = "/execution-kinds", operation_id = "list_execution_kinds",
    tag = "executions", responses((status = 200, body = Vec<ExecutionKind>)))]
pub async fn kinds(State(msa): State<Arc<Msa>>) -> axum::Json<Vec<ExecutionKind>> {
    let known = msa.engine.registry().iter();
    let kinds = known.map(|(kind, of)| ExecutionKind {
        kind: (*kind).into(),
        about: of.about.into(),
        for_admins: of.for_admins,
    });
    axum::Json(kinds.collect())
}

/// Executions, in the order in which they were submitted.
#[utoipa::path(get, path = "/executions", operation_id = "list_executions", tag = "executions",
    params(Part), responses((status = 200, body = Listed<Execution>)))]
pub async fn list(
    State(msa): State<Arc<Msa>>,
    part: Part,
) -> Result<axum::Json<Listed<Execution>>, Problem> {
    let items = with_store(move || msa.store.read(|t| table::list(t, part.after, part.limit)));
    let listed = Listed::new(items.await?, part.limit, |execution| execution.seq);
    Ok(axum::Json(listed))
}

/// Puts one at the end of the queue.
#[utoipa::path(post, path = "/executions", operation_id = "submit_execution", tag = "executions",
    request_body = NewExecution, responses((status = 202, body = Execution)))]
pub async fn submit(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(new): Json<NewExecution>,
) -> Result<(StatusCode, axum::Json<Execution>), Problem> {
    let kind = msa.engine.registry().get(new.kind.as_str());
    if kind.is_some_and(|kind| kind.for_admins) && !caller.is_admin() {
        return Err(Problem::forbidden(format!(
            "an execution of kind {} takes the role admin",
            new.kind
        )));
    }
    let submitted = with_store(move || msa.engine.submit(&caller.actor(), &new));
    Ok((StatusCode::ACCEPTED, axum::Json(submitted.await?)))
}

/// Where one stands.
#[utoipa::path(get, path = "/executions/{id}", operation_id = "get_execution", tag = "executions",
    params(("id" = Id, Path)), responses((status = 200, body = Execution)))]
pub async fn get(
    State(msa): State<Arc<Msa>>,
    Path(id): Path<Id>,
) -> Result<axum::Json<Execution>, Problem> {
    let found = with_store(move || msa.store.read(|t| table::get(t, id)));
    Ok(axum::Json(found.await?))
}

/// Its output, also while it grows.
#[utoipa::path(get, path = "/executions/{id}/output", operation_id = "get_execution_output",
    tag = "executions", params(("id" = Id, Path), Part),
    responses((status = 200, body = Listed<OutputLine>)))]
pub async fn output(
    State(msa): State<Arc<Msa>>,
    Path(id): Path<Id>,
    part: Part,
) -> Result<axum::Json<Listed<OutputLine>>, Problem> {
    let lines = with_store(move || {
        msa.store.read(|t| {
            table::get(t, id)?;
            table::lines(t, id, part.after, part.limit)
        })
    });
    let listed = Listed::new(lines.await?, part.limit, |line| line.seq);
    Ok(axum::Json(listed))
}

/// Ends one that waits or runs; what it did is taken back.
#[utoipa::path(post, path = "/executions/{id}/cancel", operation_id = "cancel_execution",
    tag = "executions", params(("id" = Id, Path)), responses((status = 202, body = Execution)))]
pub async fn cancel(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
) -> Result<(StatusCode, axum::Json<Execution>), Problem> {
    let changed = with_store(move || msa.engine.cancel(&caller.actor(), id));
    Ok((StatusCode::ACCEPTED, axum::Json(changed.await?)))
}

/// Lets a blocked one try again.
#[utoipa::path(post, path = "/executions/{id}/retry", operation_id = "retry_execution",
    tag = "executions", params(("id" = Id, Path)), responses((status = 202, body = Execution)))]
pub async fn retry(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
) -> Result<(StatusCode, axum::Json<Execution>), Problem> {
    let changed = with_store(move || msa.engine.retry(&caller.actor(), id));
    Ok((StatusCode::ACCEPTED, axum::Json(changed.await?)))
}

/// Gives a blocked one up: what it left is left.
#[utoipa::path(post, path = "/executions/{id}/abandon", operation_id = "abandon_execution",
    tag = "executions", params(("id" = Id, Path)), responses((status = 202, body = Execution)))]
pub async fn abandon(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
) -> Result<(StatusCode, axum::Json<Execution>), Problem> {
    let changed = with_store(move || msa.engine.abandon(&caller.actor(), id));
    Ok((StatusCode::ACCEPTED, axum::Json(changed.await?)))
}
