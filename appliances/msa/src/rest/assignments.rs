//! Routes of assignments: what machines are told, and what operators decide.

use super::extract::{Json, Path, with_store};
use super::gate::{Caller, Who};
use super::problem::Problem;
use crate::assignments::{self, Assignments};
use crate::inventory::{Drva, Host, Vm};
use crate::service::Msa;
use crate::store::Done;
use crate::text::Id;
use axum::Extension;
use axum::extract::State;
use serde::Deserialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// The machine's id. The gate lets only machines of the route's role through.
pub(super) fn id_of(caller: &Caller) -> Result<Id, Problem> {
    match &caller.who {
        Who::Machine(identity) => Ok(Id(identity.id)),
        _ => Err(Problem::forbidden("this is for machines")),
    }
}

/// What the appliance that asks takes, and from whom.
#[utoipa::path(get, path = "/machine/assignments", operation_id = "get_assignments",
    tag = "assignments", responses((status = 200, body = Assignments)))]
pub async fn of_appliance(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
) -> Result<axum::Json<Assignments>, Problem> {
    let id = id_of(&caller)?;
    let found = with_store(move || msa.store.read(|t| assignments::of_appliance(t, id)));
    Ok(axum::Json(found.await?))
}

/// The appliance to which the host that asks sends; 404: it has none.
#[utoipa::path(get, path = "/machine/appliance", operation_id = "get_own_appliance",
    tag = "assignments", responses((status = 200, body = Drva)))]
pub async fn of_host(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
) -> Result<axum::Json<Drva>, Problem> {
    let id = id_of(&caller)?;
    let found = with_store(move || msa.store.read(|t| assignments::of_host(t, id)));
    Ok(axum::Json(found.await?))
}

/// Which appliance.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ApplianceOfHost {
    /// The appliance; none: the host keeps the one that it was told last, until it is told another.
    pub drva_id: Option<Id>,
}

/// Gives a host its appliance.
#[utoipa::path(put, path = "/hosts/{id}/appliance", operation_id = "set_host_appliance",
    tag = "assignments", params(("id" = Id, Path)), request_body = ApplianceOfHost,
    responses((status = 200, body = Host)))]
pub async fn set_appliance(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
    Json(asked): Json<ApplianceOfHost>,
) -> Result<axum::Json<Host>, Problem> {
    let set = with_store(move || {
        msa.store.change(&caller.actor(), "assign appliance", |t| {
            let host = assignments::set_appliance(t, id, asked.drva_id)?;
            let target = format!("host {}", host.name);
            let drva = asked.drva_id.map_or("none".into(), |id| id.to_string());
            Ok(Done::new(host, target).with_detail(format!("appliance {drva}")))
        })
    });
    Ok(axum::Json(set.await?))
}

/// Which domain.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DomainOfVm {
    /// The domain; none: no host may speak for the machine any more.
    pub domain_id: Option<Id>,
}

/// Assigns a virtual machine to a domain: the appliance of that takes it from the hosts of its cluster.
#[utoipa::path(put, path = "/vms/{id}/domain", operation_id = "set_vm_domain",
    tag = "assignments", params(("id" = Id, Path)), request_body = DomainOfVm,
    responses((status = 200, body = Vm)))]
pub async fn set_domain(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
    Json(asked): Json<DomainOfVm>,
) -> Result<axum::Json<Vm>, Problem> {
    let set = with_store(move || {
        let now_ms = msa.store.now_ms();
        msa.store.change(&caller.actor(), "assign domain", |t| {
            let vm = assignments::set_domain(t, id, asked.domain_id, now_ms)?;
            let target = format!("virtual machine {}", vm.name);
            let domain = asked.domain_id.map_or("none".into(), |id| id.to_string());
            Ok(Done::new(vm, target).with_detail(format!("domain {domain}")))
        })
    });
    Ok(axum::Json(set.await?))
}
