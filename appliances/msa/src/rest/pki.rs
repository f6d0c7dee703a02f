//! Routes of the authority: its certificate and revocation list, enrolment, renewal, revocation.

use super::extract::{Json, Listed, Part, Path, blocking, with_store};
use super::gate::{Caller, Who};
use super::problem::Problem;
use crate::authority::Request;
use crate::certificates::{self, Certificate, CertificateRole, EnrolError, Enrolment};
use crate::service::Msa;
use crate::store::{Actor, Done, StoreError};
use crate::text::{Id, Reason, Serial};
use axum::Extension;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use utoipa::ToSchema;

/// The authority's certificate, PEM: what every part trusts.
#[utoipa::path(get, path = "/authority", operation_id = "get_authority", tag = "certificates",
    responses((status = 200, content_type = "application/x-pem-file", body = String)))]
pub async fn authority(State(msa): State<Arc<Msa>>) -> impl IntoResponse {
    let kind = [(header::CONTENT_TYPE, "application/x-pem-file")];
    (kind, msa.authority.certificate_pem())
}

/// What is revoked and has not expired, DER.
#[utoipa::path(get, path = "/authority/revocation-list", operation_id = "get_revocation_list",
    tag = "certificates",
    responses((status = 200, content_type = "application/pkix-crl", body = Vec<u8>)))]
pub async fn revocation_list(State(msa): State<Arc<Msa>>) -> impl IntoResponse {
    let kind = [(header::CONTENT_TYPE, "application/pkix-crl")];
    (kind, msa.revocation_list().to_vec())
}

/// What is said to make an enrolment token.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewEnrolment {
    /// Whom it is for: host, drva or operator.
    pub role: CertificateRole,
    /// Which host, appliance or user.
    pub entity_id: Id,
    /// For how long it can be used.
    #[serde(default = "default_minutes")]
    #[schema(minimum = 1, maximum = 1440)]
    pub valid_minutes: i64,
}

fn default_minutes() -> i64 {
    certificates::TOKEN_MINUTES
}

/// Runs a change whose errors are more than the state's.
fn change<T>(
    msa: &Msa,
    actor: &Actor,
    action: &str,
    work: impl FnOnce(&rusqlite::Transaction<'_>) -> Result<Done<T>, EnrolError>,
) -> Result<T, EnrolError> {
    let mut other = None;
    let outcome = msa.store.change(actor, action, |t| {
        work(t).map_err(|error| match error {
            EnrolError::Store(error) => error,
            error => {
                // Whatever error ends the transaction; which one it was is told below.
                let text = error.to_string();
                other = Some(error);
                StoreError::conflict(text)
            }
        })
    });
    match other {
        Some(error) => Err(error),
        None => Ok(outcome?),
    }
}

/// Makes a token by which a host, an appliance or a user gets a first certificate. A token for a user
/// other than oneself takes the role admin: it lets its holder do what that user may.
#[utoipa::path(post, path = "/enrolments", operation_id = "create_enrolment",
    tag = "certificates", request_body = NewEnrolment,
    responses((status = 201, body = Enrolment)))]
pub async fn create_enrolment(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(new): Json<NewEnrolment>,
) -> Result<(StatusCode, axum::Json<Enrolment>), Problem> {
    let own = caller.user()?.id == new.entity_id;
    if new.role == CertificateRole::Operator && !own && !caller.is_admin() {
        return Err(Problem::forbidden(
            "entity_id: a token for another user takes the role admin",
        ));
    }
    let made = blocking(move || {
        let now_ms = msa.store.now_ms();
        let made = change(&msa, &caller.actor(), "create enrolment", |t| {
            let (role, id) = (new.role, new.entity_id);
            let made = certificates::make_token(t, role, id, new.valid_minutes, now_ms)?;
            Ok(Done::new(made, format!("{role} {id}")))
        });
        Ok(made?)
    });
    Ok((StatusCode::CREATED, axum::Json(made.await?)))
}

/// What is sent for a first certificate.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Enrol {
    /// The token.
    #[schema(max_length = 128)]
    pub token: String,
    /// A PKCS#10 request in PEM; only its key is used.
    #[schema(max_length = 8192)]
    pub request: String,
}

/// A certificate, for whom it was made.
#[derive(Serialize, ToSchema)]
pub struct Enrolled {
    /// Who its holder is now: `jetdr://<role>/<uuid>`.
    pub identity: String,
    /// The certificate, PEM.
    pub certificate: String,
    /// The authority's certificate, PEM.
    pub authority: String,
}

fn enrolled(msa: &Msa, identity: tls::Identity, certificate: &CertificateDer<'_>) -> Enrolled {
    Enrolled {
        identity: identity.to_string(),
        certificate: crate::authority::certificate_pem(certificate),
        authority: msa.authority.certificate_pem(),
    }
}

fn parse(request: &str) -> Result<Request, Problem> {
    Request::parse(request).map_err(|error| {
        let mut problem = Problem::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string());
        problem.field = Some("request".into());
        problem
    })
}

/// Gives a certificate for a token. With the same token and key the answer can be asked for again.
#[utoipa::path(post, path = "/enrol", operation_id = "enrol", tag = "certificates",
    request_body = Enrol, responses((status = 201, body = Enrolled)))]
pub async fn enrol(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(asked): Json<Enrol>,
) -> Result<(StatusCode, axum::Json<Enrolled>), Problem> {
    let request = parse(&asked.request)?;
    let answer = blocking(move || {
        let now_ms = msa.store.now_ms();
        let (identity, certificate) = change(&msa, &caller.actor(), "enrol", |t| {
            let (identity, certificate) =
                certificates::enrol(t, &msa.authority, &asked.token, &request, now_ms)?;
            let target = identity.to_string();
            Ok(Done::new((identity, certificate), target))
        })?;
        Ok(enrolled(&msa, identity, &certificate))
    });
    Ok((StatusCode::CREATED, axum::Json(answer.await?)))
}

/// What is sent for the next certificate.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Renew {
    /// A PKCS#10 request in PEM, of a new key or the same; only its key is used.
    #[schema(max_length = 8192)]
    pub request: String,
}

/// Gives the next certificate to the holder of the one shown. That one stays valid; all earlier ones of
/// the same holder are revoked.
#[utoipa::path(post, path = "/renew", operation_id = "renew", tag = "certificates",
    request_body = Renew, responses((status = 201, body = Enrolled)))]
pub async fn renew(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(asked): Json<Renew>,
) -> Result<(StatusCode, axum::Json<Enrolled>), Problem> {
    let request = parse(&asked.request)?;
    let answer = blocking(move || {
        let now_ms = msa.store.now_ms();
        let (identity, serial) = caller.certificate()?;
        let certificate = change(&msa, &caller.actor(), "renew certificate", |t| {
            let authority = &msa.authority;
            let made = certificates::renew(t, authority, identity, serial, &request, now_ms)?;
            Ok(Done::new(made, identity.to_string()))
        })?;
        msa.publish_revocations();
        Ok(enrolled(&msa, identity, &certificate))
    });
    Ok((StatusCode::CREATED, axum::Json(answer.await?)))
}

/// What a machine is told about itself.
#[derive(Serialize, ToSchema)]
pub struct Machine {
    /// Who it is: `jetdr://<role>/<uuid>`.
    pub identity: String,
    /// The server's time, to compare clocks with.
    pub now_ms: i64,
}

/// Who a machine is to this server.
#[utoipa::path(get, path = "/machine", operation_id = "get_machine", tag = "certificates",
    responses((status = 200, body = Machine)))]
pub async fn machine(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
) -> Result<axum::Json<Machine>, Problem> {
    let Who::Machine(identity) = caller.who else {
        return Err(Problem::forbidden("this is for machines"));
    };
    Ok(axum::Json(Machine {
        identity: identity.to_string(),
        now_ms: msa.store.now_ms(),
    }))
}

/// Certificates, in the order in which they were issued.
#[utoipa::path(get, path = "/certificates", operation_id = "list_certificates",
    tag = "certificates", params(Part),
    responses((status = 200, body = Listed<Certificate>)))]
pub async fn certificates(
    State(msa): State<Arc<Msa>>,
    part: Part,
) -> Result<axum::Json<Listed<Certificate>>, Problem> {
    let items = with_store(move || {
        msa.store
            .read(|t| certificates::list(t, part.after, part.limit))
    });
    let listed = Listed::new(items.await?, part.limit, |certificate| certificate.seq);
    Ok(axum::Json(listed))
}

/// Why a certificate is taken back.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Revocation {
    /// In a person's words.
    pub reason: Reason,
}

/// Takes a certificate back, for good.
#[utoipa::path(post, path = "/certificates/{serial}/revoke", operation_id = "revoke_certificate",
    tag = "certificates", params(("serial" = Serial, Path)), request_body = Revocation,
    responses((status = 204)))]
pub async fn revoke(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(serial): Path<Serial>,
    Json(revocation): Json<Revocation>,
) -> Result<StatusCode, Problem> {
    blocking(move || {
        let now_ms = msa.store.now_ms();
        msa.store
            .change(&caller.actor(), "revoke certificate", |t| {
                let whose = certificates::revoke(t, &serial, &revocation.reason, now_ms)?;
                let target = format!("certificate {serial} of {whose}");
                Ok(Done::new((), target).with_detail(revocation.reason.as_str()))
            })?;
        msa.publish_revocations();
        Ok(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
