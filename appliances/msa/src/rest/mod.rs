//! The operator's and the machines' interface: REST under `/api/v1`, over TLS 1.3.
//!
//! [`server`] accepts connections, [`gate`] says who may do what, [`extract`] and [`problem`] are the
//! two ends of every handler; the others are the handlers, by subject.
//!
//! Invariant: a route, its documentation and its row in the gate's table are there together: a test
//! compares them.

pub mod assignments;
pub mod executions;
pub mod extract;
pub mod gate;
pub mod inventory;
pub mod logins;
pub mod notices;
pub mod openapi;
pub mod packages;
pub mod people;
pub mod pki;
pub mod problem;
pub mod protection;
pub mod server;

use crate::service::Msa;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::routing::{delete, get, post, put};
use problem::Problem;
use std::sync::Arc;

/// What every path begins with.
pub const PREFIX: &str = "/api/v1";
/// No report of an appliance is longer: 500 disks.
pub const MAX_REPORT_BYTES: usize = 1 << 20;
/// No other body is longer.
pub const MAX_BODY_BYTES: usize = 64 << 10;

macro_rules! inventory_routes {
    ($router:expr, $( $module:ident at $path:literal, )*) => {
        $router $(
            .route($path, get(inventory::$module::list).post(inventory::$module::create))
            .route(concat!($path, "/{id}"),
                get(inventory::$module::get).delete(inventory::$module::delete))
        )*
    };
}

/// All routes, behind the gate.
pub fn router(msa: Arc<Msa>) -> Router {
    let routes = Router::new()
        .route("/version", get(openapi::version))
        .route("/openapi.json", get(openapi::document))
        .route("/authority", get(pki::authority))
        .route("/authority/revocation-list", get(pki::revocation_list))
        .route("/login", post(people::login))
        .route("/logout", post(people::logout))
        .route("/me", get(people::me))
        .route("/me/password", put(people::change_password))
        .route("/tokens", get(people::tokens).post(people::create_token))
        .route("/tokens/{id}", delete(people::delete_token))
        .route("/users", get(people::users).post(people::create_user))
        .route(
            "/users/{id}",
            get(people::user)
                .patch(people::update_user)
                .delete(people::delete_user),
        )
        .route("/enrolments", post(pki::create_enrolment))
        .route("/enrol", post(pki::enrol))
        .route("/renew", post(pki::renew))
        .route("/machine", get(pki::machine))
        .route("/machine/appliance", get(assignments::of_host))
        .route("/machine/assignments", get(assignments::of_appliance))
        .route(
            "/machine/report",
            put(protection::report).layer(DefaultBodyLimit::max(MAX_REPORT_BYTES)),
        )
        .route("/domains/{id}/protection", get(protection::domain))
        .route("/hosts/{id}/appliance", put(assignments::set_appliance))
        .route("/vms/{id}/domain", put(assignments::set_domain))
        .route("/certificates", get(pki::certificates))
        .route("/certificates/{serial}/revoke", post(pki::revoke))
        .route("/execution-kinds", get(executions::kinds))
        .route(
            "/executions",
            get(executions::list).post(executions::submit),
        )
        .route("/executions/{id}", get(executions::get))
        .route("/executions/{id}/output", get(executions::output))
        .route("/executions/{id}/cancel", post(executions::cancel))
        .route("/executions/{id}/retry", post(executions::retry))
        .route("/executions/{id}/abandon", post(executions::abandon))
        .route("/vcenters/{id}/login", put(logins::set))
        .route(
            "/packages",
            get(packages::list)
                .post(packages::upload)
                .layer(DefaultBodyLimit::max(crate::packages::MAX_BYTES)),
        )
        .route(
            "/packages/{id}",
            get(packages::get).delete(packages::delete),
        )
        .route("/vib/{sha256}/{file}", get(packages::file))
        .route("/alarms", get(notices::alarms))
        .route("/alarms/{id}/acknowledge", post(notices::acknowledge))
        .route("/events", get(notices::events))
        .route("/audit", get(notices::audit));
    let routes = inventory_routes!(
        routes,
        vcenters at "/vcenters",
        clusters at "/clusters",
        hosts at "/hosts",
        sites at "/sites",
        drvas at "/drvas",
        log_volumes at "/log-volumes",
        domains at "/domains",
        vms at "/vms",
    );
    let gated = axum::middleware::from_fn_with_state(msa.clone(), gate::gate);
    Router::new()
        .nest(PREFIX, routes)
        .route_layer(gated)
        .fallback(|| async {
            Problem::new(
                StatusCode::NOT_FOUND,
                "there is no such path: see /api/v1/openapi.json",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(msa)
}
