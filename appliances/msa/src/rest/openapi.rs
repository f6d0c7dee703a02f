//! The OpenAPI document, made from the handlers and the gate's table.
//!
//! Invariant: `docs/msa-openapi.json` is what this makes: a test compares them.

use super::gate::{Access, TABLE};
use super::problem::Problem;
use super::{
    assignments, executions, inventory, logins, notices, packages, people, pki, protection,
};
use axum::response::IntoResponse;
use serde::Serialize;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{Modify, OpenApi, ToSchema};

/// What this server is.
#[derive(Serialize, ToSchema)]
pub struct Version {
    /// `jetdr management server`.
    pub product: String,
    /// Its version.
    pub version: String,
}

/// What this server is.
#[utoipa::path(get, path = "/version", operation_id = "get_version", tag = "server",
    responses((status = 200, body = Version)))]
pub async fn version() -> axum::Json<Version> {
    axum::Json(Version {
        product: "jetdr management server".into(),
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", operation_id = "get_openapi", tag = "server",
    responses((status = 200, body = Object)))]
pub async fn document() -> impl IntoResponse {
    axum::Json(Api::openapi())
}

/// The document's source.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "jetdr management server",
        description = "Refusals are problem documents (RFC 9457). `x-access` says who may call."
    ),
    servers((url = "/api/v1")),
    components(schemas(Problem)),
    paths(
        version, document,
        people::login, people::logout, people::me, people::change_password,
        people::tokens, people::create_token, people::delete_token,
        people::users, people::user, people::create_user, people::update_user,
        people::delete_user,
        pki::authority, pki::revocation_list, pki::create_enrolment, pki::enrol, pki::renew,
        pki::machine, pki::certificates, pki::revoke,
        assignments::of_appliance, assignments::of_host, assignments::set_appliance,
        assignments::set_domain, protection::report, protection::domain,
        executions::kinds, executions::list, executions::submit, executions::get,
        executions::output, executions::cancel, executions::retry, executions::abandon,
        logins::set, packages::list, packages::get, packages::upload, packages::delete,
        packages::file,
        notices::alarms, notices::acknowledge, notices::events, notices::audit,
        inventory::vcenters::list, inventory::vcenters::get, inventory::vcenters::create,
        inventory::vcenters::delete,
        inventory::clusters::list, inventory::clusters::get, inventory::clusters::create,
        inventory::clusters::delete,
        inventory::hosts::list, inventory::hosts::get, inventory::hosts::create,
        inventory::hosts::delete,
        inventory::sites::list, inventory::sites::get, inventory::sites::create,
        inventory::sites::delete,
        inventory::drvas::list, inventory::drvas::get, inventory::drvas::create,
        inventory::drvas::delete,
        inventory::log_volumes::list, inventory::log_volumes::get,
        inventory::log_volumes::create, inventory::log_volumes::delete,
        inventory::domains::list, inventory::domains::get, inventory::domains::create,
        inventory::domains::delete,
        inventory::vms::list, inventory::vms::get, inventory::vms::create,
        inventory::vms::delete,
    ),
    modifiers(&Finish)
)]
pub struct Api;

/// What is the same for all operations.
struct Finish;

impl Modify for Finish {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("token", SecurityScheme::Http(bearer));
        for (method, path, access) in TABLE {
            let Some(item) = document.paths.paths.get_mut(*path) else {
                continue;
            };
            let operation = match *method {
                "GET" => &mut item.get,
                "POST" => &mut item.post,
                "PUT" => &mut item.put,
                "PATCH" => &mut item.patch,
                _ => &mut item.delete,
            };
            if let Some(operation) = operation {
                finish(operation, *access);
            }
        }
    }
}

fn finish(operation: &mut Operation, access: Access) {
    let schema = Ref::from_schema_name("Problem");
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let problem = ResponseBuilder::new()
        .description("Refused: what, where, and what to do")
        .content("application/problem+json", content)
        .build();
    let responses = &mut operation.responses.responses;
    for response in responses.values_mut() {
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            response.description = "Done".into();
        }
    }
    responses.insert("default".into(), RefOr::T(problem));
    let says = utoipa::openapi::extensions::Extensions::builder().add("x-access", access.word());
    operation.extensions = Some(says.build());
    if matches!(access, Access::User(_)) {
        let none: [String; 0] = [];
        operation.security = Some(vec![SecurityRequirement::new("token", none)]);
    }
}

/// The document as it is committed.
pub fn text() -> Result<String, serde_json::Error> {
    let mut text = Api::openapi().to_pretty_json()?;
    text.push('\n');
    Ok(text)
}
