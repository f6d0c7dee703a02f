//! Routes of packages for hosts: upload, look, remove; and the files, where hosts fetch them.
//!
//! Invariant: a file goes out only under the checksum of its bytes, checked as it goes.

use super::extract::{Listed, Part, Path, blocking, with_store};
use super::gate::Caller;
use super::problem::Problem;
use crate::packages::{self, Package};
use crate::service::Msa;
use crate::store::Done;
use crate::text::{Fingerprint, Id, Name};
use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use std::sync::Arc;

/// Packages, in the order in which they came.
#[utoipa::path(get, path = "/packages", operation_id = "list_packages", tag = "packages",
    params(Part), responses((status = 200, body = Listed<Package>)))]
pub async fn list(
    State(msa): State<Arc<Msa>>,
    part: Part,
) -> Result<axum::Json<Listed<Package>>, Problem> {
    let items = with_store(move || {
        msa.store
            .read(|t| packages::list(t, part.after, part.limit))
    });
    let listed = Listed::new(items.await?, part.limit, |package| package.seq);
    Ok(axum::Json(listed))
}

/// One of them.
#[utoipa::path(get, path = "/packages/{id}", operation_id = "get_package", tag = "packages",
    params(("id" = Id, Path)), responses((status = 200, body = Package)))]
pub async fn get(
    State(msa): State<Arc<Msa>>,
    Path(id): Path<Id>,
) -> Result<axum::Json<Package>, Problem> {
    let found = with_store(move || msa.store.read(|t| packages::get(t, id)));
    Ok(axum::Json(found.await?))
}

/// Takes a VIB, at most 64 MiB: its bytes are the body. It is looked at whole; one that no host would
/// take is refused with everything that is wrong with it.
#[utoipa::path(post, path = "/packages", operation_id = "upload_package", tag = "packages",
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 201, body = Package)))]
pub async fn upload(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<(StatusCode, axum::Json<Package>), Problem> {
    let made = with_store(move || {
        let package = packages::take(msa.data_dir(), body.to_vec(), msa.store.now_ms())?;
        msa.store.change(&caller.actor(), "upload package", |t| {
            packages::insert(t, &package)?;
            let target = format!("package {}", package.filter_id());
            let sha256 = package.sha256.clone();
            Ok(Done::new(package, target).with_detail(sha256))
        })
    });
    Ok((StatusCode::CREATED, axum::Json(made.await?)))
}

/// Removes one that is on no cluster.
#[utoipa::path(delete, path = "/packages/{id}", operation_id = "delete_package", tag = "packages",
    params(("id" = Id, Path)), responses((status = 204)))]
pub async fn delete(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
) -> Result<StatusCode, Problem> {
    with_store(move || {
        msa.store.change(&caller.actor(), "delete package", |t| {
            let gone = packages::delete(t, id)?;
            Ok(Done::new((), format!("package {}", gone.filter_id())))
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A package's file, for hosts. The name in the path is for their logs.
#[utoipa::path(get, path = "/vib/{sha256}/{file}", operation_id = "get_vib", tag = "packages",
    params(("sha256" = Fingerprint, Path), ("file" = Name, Path)),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>)))]
pub async fn file(
    State(msa): State<Arc<Msa>>,
    Path(place): Path<(Fingerprint, Name)>,
) -> Result<impl IntoResponse, Problem> {
    let (sha256, _) = place;
    let found = blocking(move || {
        Ok(packages::bytes(
            &msa.store,
            msa.data_dir(),
            sha256.as_str(),
        )?)
    });
    let found = found.await?;
    let absent = || {
        Problem::new(
            StatusCode::NOT_FOUND,
            "there is no package of this checksum",
        )
    };
    let bytes = found.ok_or_else(absent)?;
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, bytes))
}
