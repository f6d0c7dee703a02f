//! The route of logins to vCenters.
//!
//! Invariant: a login goes in and never comes out again: no route shows it, no answer quotes it.

use super::extract::{Json, Path, blocking};
use super::gate::Caller;
use super::problem::Problem;
use crate::inventory::{self, Vcenter};
use crate::outside::{self, Login};
use crate::service::Msa;
use crate::store::Done;
use crate::text::{Account, Id, Secret};
use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// As whom this server logs in to a vCenter.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VcenterLogin {
    /// The user.
    pub user: Account,
    /// The password.
    pub password: Secret,
}

/// Sets as whom this server logs in to a vCenter. It is kept in a file of its own that nobody else may
/// read, and is not tried here: `preflight-system` does.
#[utoipa::path(put, path = "/vcenters/{id}/login", operation_id = "set_vcenter_login",
    tag = "inventory", params(("id" = Id, Path)), request_body = VcenterLogin,
    responses((status = 204)))]
pub async fn set(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
    Json(given): Json<VcenterLogin>,
) -> Result<StatusCode, Problem> {
    blocking(move || {
        let vcenter: Vcenter = msa.store.read(|t| inventory::get(t, id))?;
        let login = Login {
            user: given.user,
            password: given.password,
        };
        let kept = outside::keep_login(msa.data_dir(), id, &login);
        kept.map_err(|error| Problem::internal(&error))?;
        msa.store
            .change(&caller.actor(), "set vCenter login", |_| {
                let target = format!("vCenter {}", vcenter.name);
                Ok(Done::new((), target).with_detail(login.user.as_str()))
            })?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}
