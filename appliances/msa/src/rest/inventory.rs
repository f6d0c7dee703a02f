//! Routes of the inventory: the same four for each kind.
//!
//! Invariant: what is removed with its certificates is in the revocation list when the answer goes out.

use super::extract::{Json, Listed, Part, Path, blocking, with_store};
use super::gate::Caller;
use super::problem::Problem;
use crate::inventory::{self, Entity};
use crate::service::Msa;
use crate::store::Done;
use crate::text::Id;
use axum::http::StatusCode;
use std::sync::Arc;

async fn list_of<E: Entity>(msa: Arc<Msa>, part: Part) -> Result<axum::Json<Listed<E>>, Problem> {
    let items = with_store(move || {
        msa.store
            .read(|t| inventory::list::<E>(t, part.after, part.limit))
    });
    Ok(axum::Json(Listed::new(items.await?, part.limit, E::seq)))
}

async fn one_of<E: Entity>(msa: Arc<Msa>, id: Id) -> Result<axum::Json<E>, Problem> {
    let found = with_store(move || msa.store.read(|t| inventory::get::<E>(t, id)));
    Ok(axum::Json(found.await?))
}

async fn create_one<E: Entity>(
    msa: Arc<Msa>,
    caller: Caller,
    new: E::New,
) -> Result<(StatusCode, axum::Json<E>), Problem> {
    let made = with_store(move || {
        let now_ms = msa.store.now_ms();
        let action = format!("create {}", E::WHAT);
        msa.store.change(&caller.actor(), &action, |t| {
            let made: E = inventory::create(t, &new, now_ms)?;
            let target = format!("{} {}", E::WHAT, made.label());
            Ok(Done::new(made, target))
        })
    });
    Ok((StatusCode::CREATED, axum::Json(made.await?)))
}

async fn delete_one<E: Entity>(
    msa: Arc<Msa>,
    caller: Caller,
    id: Id,
) -> Result<StatusCode, Problem> {
    blocking(move || {
        let now_ms = msa.store.now_ms();
        let action = format!("delete {}", E::WHAT);
        msa.store.change(&caller.actor(), &action, |t| {
            let gone: E = inventory::delete(t, id, now_ms)?;
            let target = format!("{} {}", E::WHAT, gone.label());
            Ok(Done::new((), target))
        })?;
        msa.publish_revocations();
        Ok(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

macro_rules! routes {
    ($( $module:ident, $entity:ident, $new:ident, $path:literal, $one:literal,
        $list_id:literal, $get_id:literal, $create_id:literal, $delete_id:literal; )*) => { $(
        #[doc = concat!("Routes below `", $path, "`.")]
        pub mod $module {
            use super::*;
            use crate::inventory::{$entity, $new};
            use axum::Extension;
            use axum::extract::State;

            /// Those that there are.
            #[utoipa::path(get, path = $path, operation_id = $list_id, tag = "inventory",
                params(Part), responses((status = 200, body = Listed<$entity>)))]
            pub async fn list(
                State(msa): State<Arc<Msa>>,
                part: Part,
            ) -> Result<axum::Json<Listed<$entity>>, Problem> {
                list_of(msa, part).await
            }

            /// One of them.
            #[utoipa::path(get, path = $one, operation_id = $get_id, tag = "inventory",
                params(("id" = Id, Path)), responses((status = 200, body = $entity)))]
            pub async fn get(
                State(msa): State<Arc<Msa>>,
                Path(id): Path<Id>,
            ) -> Result<axum::Json<$entity>, Problem> {
                one_of(msa, id).await
            }

            /// Makes one.
            #[utoipa::path(post, path = $path, operation_id = $create_id, tag = "inventory",
                request_body = $new, responses((status = 201, body = $entity)))]
            pub async fn create(
                State(msa): State<Arc<Msa>>,
                Extension(caller): Extension<Caller>,
                Json(new): Json<$new>,
            ) -> Result<(StatusCode, axum::Json<$entity>), Problem> {
                create_one(msa, caller, new).await
            }

            /// Removes one that nothing refers to.
            #[utoipa::path(delete, path = $one, operation_id = $delete_id, tag = "inventory",
                params(("id" = Id, Path)), responses((status = 204)))]
            pub async fn delete(
                State(msa): State<Arc<Msa>>,
                Extension(caller): Extension<Caller>,
                Path(id): Path<Id>,
            ) -> Result<StatusCode, Problem> {
                delete_one::<$entity>(msa, caller, id).await
            }
        }
    )* };
}

routes! {
    vcenters, Vcenter, NewVcenter, "/vcenters", "/vcenters/{id}",
        "list_vcenters", "get_vcenter", "create_vcenter", "delete_vcenter";
    clusters, Cluster, NewCluster, "/clusters", "/clusters/{id}",
        "list_clusters", "get_cluster", "create_cluster", "delete_cluster";
    hosts, Host, NewHost, "/hosts", "/hosts/{id}",
        "list_hosts", "get_host", "create_host", "delete_host";
    sites, Site, NewSite, "/sites", "/sites/{id}",
        "list_sites", "get_site", "create_site", "delete_site";
    drvas, Drva, NewDrva, "/drvas", "/drvas/{id}",
        "list_drvas", "get_drva", "create_drva", "delete_drva";
    log_volumes, LogVolume, NewLogVolume, "/log-volumes", "/log-volumes/{id}",
        "list_log_volumes", "get_log_volume", "create_log_volume", "delete_log_volume";
    domains, Domain, NewDomain, "/domains", "/domains/{id}",
        "list_domains", "get_domain", "create_domain", "delete_domain";
    vms, Vm, NewVm, "/vms", "/vms/{id}",
        "list_vms", "get_vm", "create_vm", "delete_vm";
}
