//! Routes of protection: what appliances report, and how machines and domains stand.

use super::assignments::id_of;
use super::extract::{Json, Path, with_store};
use super::gate::Caller;
use super::problem::Problem;
use crate::protection::report::Report;
use crate::protection::states;
use crate::protection::view::{self, DomainView};
use crate::service::Msa;
use crate::text::Id;
use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use std::sync::Arc;

/// What the appliance that calls knows of its domains now.
#[utoipa::path(put, path = "/machine/report", operation_id = "put_report", tag = "protection",
    request_body = Report, responses((status = 204)))]
pub async fn report(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(report): Json<Report>,
) -> Result<StatusCode, Problem> {
    let id = id_of(&caller)?;
    let taken = with_store(move || {
        let now_ms = msa.store.now_ms();
        msa.store.record(|t| states::take(t, id, &report, now_ms))
    });
    taken.await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How a domain stands: its machines, what can be recovered, what its appliance said last.
#[utoipa::path(get, path = "/domains/{id}/protection", operation_id = "get_domain_protection",
    tag = "protection", params(("id" = Id, Path)), responses((status = 200, body = DomainView)))]
pub async fn domain(
    State(msa): State<Arc<Msa>>,
    Path(id): Path<Id>,
) -> Result<axum::Json<DomainView>, Problem> {
    let found = with_store(move || {
        let now_ms = msa.store.now_ms();
        msa.store.read(|t| view::domain(t, id, now_ms))
    });
    Ok(axum::Json(found.await?))
}
