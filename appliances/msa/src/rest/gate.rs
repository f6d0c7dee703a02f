//! Who may do what: the one table, and the gate in front of every route.
//!
//! Invariant: a route that is not in the table is closed. A caller who shows a token or a certificate
//! that is not in force is refused, even where anybody may come. Every refusal is in the audit, but for
//! floods of them, of which the number is.

use super::extract::blocking;
use super::problem::Problem;
use crate::certificates;
use crate::clock::MINUTE_MS;
use crate::secret;
use crate::service::Msa;
use crate::store::Actor;
use crate::text::Id;
use crate::users::{self, User, UserRole};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tls::{Identity, Peer, Role};

/// No request takes longer.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// Refusals that are written to the audit in a minute; more are counted.
const REFUSALS_A_MINUTE: u32 = 120;

/// Who may call a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Whoever reaches the port.
    Anyone,
    /// A host or an appliance, by its certificate.
    Machine,
    /// A machine of this role.
    MachineOf(Role),
    /// Whoever has a certificate: those, and users.
    Certificate,
    /// A user of at least this role.
    User(UserRole),
}

impl Access {
    /// As the OpenAPI document says it.
    pub fn word(self) -> &'static str {
        match self {
            Access::Anyone => "anyone",
            Access::Machine => "machine",
            Access::MachineOf(role) => role.name(),
            Access::Certificate => "certificate",
            Access::User(role) => role.word(),
        }
    }
}

const VIEWER: Access = Access::User(UserRole::Viewer);
const OPERATOR: Access = Access::User(UserRole::Operator);
const ADMIN: Access = Access::User(UserRole::Admin);

/// Every route, and who may call it. Paths are below `/api/v1`.
pub const TABLE: &[(&str, &str, Access)] = &[
    ("GET", "/version", Access::Anyone),
    ("GET", "/openapi.json", Access::Anyone),
    ("GET", "/authority", Access::Anyone),
    ("GET", "/authority/revocation-list", Access::Anyone),
    ("POST", "/login", Access::Anyone),
    ("POST", "/enrol", Access::Anyone),
    ("POST", "/renew", Access::Certificate),
    ("GET", "/machine", Access::Machine),
    ("GET", "/machine/appliance", Access::MachineOf(Role::Host)),
    ("GET", "/machine/assignments", Access::MachineOf(Role::Drva)),
    ("PUT", "/machine/report", Access::MachineOf(Role::Drva)),
    ("GET", "/domains/{id}/protection", VIEWER),
    ("PUT", "/hosts/{id}/appliance", OPERATOR),
    ("PUT", "/vms/{id}/domain", OPERATOR),
    ("POST", "/logout", VIEWER),
    ("GET", "/me", VIEWER),
    ("PUT", "/me/password", VIEWER),
    ("GET", "/tokens", VIEWER),
    ("POST", "/tokens", VIEWER),
    ("DELETE", "/tokens/{id}", VIEWER),
    ("GET", "/users", ADMIN),
    ("POST", "/users", ADMIN),
    ("GET", "/users/{id}", ADMIN),
    ("PATCH", "/users/{id}", ADMIN),
    ("DELETE", "/users/{id}", ADMIN),
    ("GET", "/vcenters", VIEWER),
    ("POST", "/vcenters", OPERATOR),
    ("GET", "/vcenters/{id}", VIEWER),
    ("DELETE", "/vcenters/{id}", OPERATOR),
    ("GET", "/clusters", VIEWER),
    ("POST", "/clusters", OPERATOR),
    ("GET", "/clusters/{id}", VIEWER),
    ("DELETE", "/clusters/{id}", OPERATOR),
    ("GET", "/hosts", VIEWER),
    ("POST", "/hosts", OPERATOR),
    ("GET", "/hosts/{id}", VIEWER),
    ("DELETE", "/hosts/{id}", OPERATOR),
    ("GET", "/sites", VIEWER),
    ("POST", "/sites", OPERATOR),
    ("GET", "/sites/{id}", VIEWER),
    ("DELETE", "/sites/{id}", OPERATOR),
    ("GET", "/drvas", VIEWER),
    ("POST", "/drvas", OPERATOR),
    ("GET", "/drvas/{id}", VIEWER),
    ("DELETE", "/drvas/{id}", OPERATOR),
    ("GET", "/log-volumes", VIEWER),
    ("POST", "/log-volumes", OPERATOR),
    ("GET", "/log-volumes/{id}", VIEWER),
    ("DELETE", "/log-volumes/{id}", OPERATOR),
    ("GET", "/domains", VIEWER),
    ("POST", "/domains", OPERATOR),
    ("GET", "/domains/{id}", VIEWER),
    ("DELETE", "/domains/{id}", OPERATOR),
    ("GET", "/vms", VIEWER),
    ("POST", "/vms", OPERATOR),
    ("GET", "/vms/{id}", VIEWER),
    ("DELETE", "/vms/{id}", OPERATOR),
    ("PUT", "/vcenters/{id}/login", ADMIN),
    ("GET", "/packages", VIEWER),
    ("POST", "/packages", ADMIN),
    ("GET", "/packages/{id}", VIEWER),
    ("DELETE", "/packages/{id}", ADMIN),
    ("GET", "/vib/{sha256}/{file}", Access::Anyone),
    ("GET", "/execution-kinds", VIEWER),
    ("GET", "/executions", VIEWER),
    ("POST", "/executions", OPERATOR),
    ("GET", "/executions/{id}", VIEWER),
    ("GET", "/executions/{id}/output", VIEWER),
    ("POST", "/executions/{id}/cancel", OPERATOR),
    ("POST", "/executions/{id}/retry", OPERATOR),
    ("POST", "/executions/{id}/abandon", ADMIN),
    ("GET", "/alarms", VIEWER),
    ("POST", "/alarms/{id}/acknowledge", OPERATOR),
    ("GET", "/events", VIEWER),
    ("GET", "/audit", ADMIN),
    ("GET", "/certificates", VIEWER),
    ("POST", "/certificates/{serial}/revoke", OPERATOR),
    ("POST", "/enrolments", OPERATOR),
];

/// Who may call this route; nobody, if it is not in the table.
pub fn access_of(method: &Method, path: &str) -> Option<Access> {
    let path = path.strip_prefix(super::PREFIX)?;
    // What may be read may be asked for without its body.
    let method = match method {
        &Method::HEAD => "GET",
        method => method.as_str(),
    };
    let found = TABLE.iter().find(|row| row.0 == method && row.1 == path);
    found.map(|row| row.2)
}

/// The connection on which a request came.
#[derive(Clone, Debug)]
pub struct Connection {
    /// From where.
    pub address: IpAddr,
    /// By whom, if a certificate was shown.
    pub peer: Option<Arc<Peer>>,
}

/// Who calls.
#[derive(Clone, Debug)]
pub enum Who {
    /// Nobody showed anything.
    Anonymous,
    /// A user, with the token by which they are known, if it is one.
    User(User, Option<Id>),
    /// A host or an appliance.
    Machine(Identity),
}

/// Who calls, and from where.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who.
    pub who: Who,
    /// From where.
    pub address: IpAddr,
    /// The serial number of the certificate shown.
    pub serial: Option<String>,
}

impl Caller {
    /// For the audit.
    pub fn actor(&self) -> Actor {
        let name = match &self.who {
            Who::Anonymous => "anonymous".into(),
            Who::User(user, _) => format!("user:{}", user.name),
            Who::Machine(identity) => format!("{}:{}", identity.role, identity.id),
        };
        let address = Some(self.address);
        Actor { name, address }
    }

    /// The user; a problem, if it is none. The gate lets none through where there must be one.
    pub fn user(&self) -> Result<&User, Problem> {
        match &self.who {
            Who::User(user, _) => Ok(user),
            _ => Err(Problem::forbidden("only a user may do this")),
        }
    }

    /// Whether this is an administrator.
    pub fn is_admin(&self) -> bool {
        matches!(&self.who, Who::User(user, _) if user.role == UserRole::Admin)
    }

    /// Whose certificate was shown, and its serial number.
    pub fn certificate(&self) -> Result<(Identity, &str), Problem> {
        let identity = match &self.who {
            Who::Machine(identity) => *identity,
            Who::User(user, None) => Identity::new(Role::Operator, user.id.0),
            _ => return Err(Problem::unauthorized("a client certificate is needed here")),
        };
        match &self.serial {
            Some(serial) => Ok((identity, serial)),
            None => Err(Problem::unauthorized("a client certificate is needed here")),
        }
    }
}

fn bearer(request: &Request) -> Result<Option<String>, Problem> {
    let mut values = request.headers().get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Problem::unauthorized(
            "the header Authorization is there twice: send it once",
        ));
    }
    let token = value
        .to_str()
        .ok()
        .and_then(|text| text.strip_prefix("Bearer "));
    match token {
        Some(token) if token.len() <= 128 => Ok(Some(token.trim().into())),
        _ => Err(Problem::unauthorized(
            "the header Authorization: takes `Bearer` and a token; log in to get one",
        )),
    }
}

/// Who calls. What is shown must be in force.
fn identify(msa: &Msa, connection: &Connection, token: Option<&str>) -> Result<Caller, Problem> {
    let address = connection.address;
    let serial = connection
        .peer
        .as_ref()
        .map(|peer| secret::hex(&peer.serial));
    let caller = |who| Caller {
        who,
        address,
        serial: serial.clone(),
    };
    let now_ms = msa.store.now_ms();
    if let (Some(peer), Some(serial)) = (&connection.peer, &serial) {
        let in_force = msa
            .store
            .read(|t| certificates::is_in_force(t, serial, peer.identity))?;
        if !in_force {
            return Err(Problem::unauthorized(
                "the certificate shown was revoked, or is unknown here: enrol anew",
            ));
        }
    }
    if let Some(token) = token {
        let found = msa.store.read(|t| users::by_token(t, token, now_ms))?;
        let (user, id) = found.ok_or_else(|| {
            Problem::unauthorized("the token is unknown or has expired: log in again")
        })?;
        return Ok(caller(Who::User(user, Some(id))));
    }
    let Some(peer) = &connection.peer else {
        return Ok(caller(Who::Anonymous));
    };
    match peer.identity.role {
        Role::Host | Role::Drva => Ok(caller(Who::Machine(peer.identity))),
        Role::Operator => {
            let id = Id(peer.identity.id);
            let user = msa.store.read(|t| users::by_certificate(t, id))?;
            let user = user.ok_or_else(|| {
                Problem::unauthorized("the user of this certificate is gone or disabled")
            })?;
            Ok(caller(Who::User(user, None)))
        }
        Role::Msa => Err(Problem::forbidden(
            "a management server does not call another",
        )),
    }
}

/// Whether who calls may.
fn allow(caller: &Caller, access: Access) -> Result<(), Problem> {
    match (access, &caller.who) {
        (Access::Anyone, _) => Ok(()),
        (Access::User(needed), Who::User(user, _)) if user.role.includes(needed) => Ok(()),
        (Access::User(needed), Who::User(user, _)) => Err(Problem::forbidden(format!(
            "this takes the role {needed}, {} is {}: ask an administrator",
            user.name, user.role
        ))),
        (Access::User(_), Who::Machine(_)) => Err(Problem::forbidden(
            "this is for users, and the certificate shown is a machine's",
        )),
        (Access::User(_), Who::Anonymous) => Err(Problem::unauthorized(
            "this takes a user: log in and send the token as `Authorization: Bearer`",
        )),
        (Access::Machine, Who::Machine(_)) => Ok(()),
        (Access::MachineOf(role), Who::Machine(identity)) if identity.role == role => Ok(()),
        (Access::MachineOf(role), Who::Machine(identity)) => Err(Problem::forbidden(format!(
            "this takes the certificate of a {role}, and that of a {} was shown",
            identity.role
        ))),
        (Access::Certificate, Who::Machine(_) | Who::User(_, None)) => Ok(()),
        (Access::Machine | Access::MachineOf(_) | Access::Certificate, _) => Err(
            Problem::unauthorized("this takes the client certificate of a machine: enrol first"),
        ),
    }
}

/// Before and after every request.
pub async fn gate(State(msa): State<Arc<Msa>>, mut request: Request, next: Next) -> Response {
    let connection = request.extensions().get::<Connection>().cloned();
    let Some(connection) = connection else {
        return Problem::internal(&"a request came by no connection").into_response();
    };
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map(|path| path.as_str().to_owned());
    let route = route.unwrap_or_default();
    let anonymous = Caller {
        who: Who::Anonymous,
        address: connection.address,
        serial: None,
    };
    let token = bearer(&request);
    let (state, from) = (msa.clone(), connection.clone());
    let access = access_of(&method, &route);
    let checked = blocking(move || {
        let caller = identify(&state, &from, token?.as_deref())?;
        let closed = || {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path takes other methods: see /api/v1/openapi.json",
            )
        };
        let allowed = access
            .ok_or_else(closed)
            .and_then(|access| allow(&caller, access));
        Ok((caller, allowed))
    });
    let (caller, response) = match checked.await {
        Err(problem) => (anonymous, problem.into_response()),
        Ok((caller, Err(problem))) => (caller, problem.into_response()),
        Ok((caller, Ok(()))) => {
            request.extensions_mut().insert(caller.clone());
            let answered = tokio::time::timeout(REQUEST_LIMIT, next.run(request)).await;
            let late = Problem::new(
                StatusCode::REQUEST_TIMEOUT,
                "the request took longer than 30 s: send it again, in one piece",
            );
            (caller, answered.unwrap_or_else(|_| late.into_response()))
        }
    };
    let problem = response.extensions().get::<Problem>().cloned();
    let Some(problem) = problem.filter(|_| counts_as_refusal(&method, response.status())) else {
        return response;
    };
    let noted = blocking(move || {
        msa.refusals.note(
            &msa,
            &caller.actor(),
            &format!("{method} {route}"),
            &problem,
        );
        Ok(())
    });
    let _ = noted.await;
    response
}

/// Reads that ask for something that is not there are no refusals; everything else is.
fn counts_as_refusal(method: &Method, status: StatusCode) -> bool {
    let may_not = matches!(status.as_u16(), 401 | 403 | 429);
    let changes = !matches!(method, &Method::GET | &Method::HEAD);
    may_not || (changes && status.is_client_error())
}

/// Writes refusals to the audit, at a bounded rate.
#[derive(Default)]
pub struct Refusals(Mutex<Minute>);

#[derive(Default)]
struct Minute {
    since_ms: i64,
    written: u32,
    left_out: u64,
}

impl Refusals {
    fn note(&self, msa: &Msa, actor: &Actor, action: &str, problem: &Problem) {
        let now_ms = msa.store.now_ms();
        let left_out = {
            let mut minute = self.0.lock();
            if now_ms - minute.since_ms >= MINUTE_MS {
                *minute = Minute {
                    since_ms: now_ms,
                    written: 0,
                    left_out: minute.left_out,
                };
            }
            if minute.written >= REFUSALS_A_MINUTE {
                minute.left_out += 1;
                return;
            }
            minute.written += 1;
            std::mem::take(&mut minute.left_out)
        };
        let mut detail = format!("{} {}", problem.status, problem.detail);
        if left_out > 0 {
            detail.push_str(&format!(
                " ({left_out} refusals before this one are not listed)"
            ));
        }
        if let Err(error) = msa.store.refused(actor, action, "", &detail) {
            tracing::error!("a refusal is not in the audit: {error}");
        }
    }
}
