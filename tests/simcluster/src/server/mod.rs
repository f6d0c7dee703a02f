//! The simulated vCenter's port: TLS, HTTP/1.1, VI-JSON.
//!
//! | module | does |
//! |---|---|
//! | `collector` | properties of many objects at once |
//! | `methods` | which method of which object does what |
//! | `policies` | the storage policies' own interface |
//! | `privileges` | which privilege a request takes |
//!
//! Invariant: who has no session gets `NotAuthenticated`, but for what is needed to get one; what cannot be
//! understood is refused as `InvalidArgument` or `ManagedObjectNotFound`, never with a closed connection.

mod collector;
mod methods;
mod policies;
mod privileges;

use crate::refusal::Refusal;
use crate::world::World;
use anyhow::Context;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

const SESSION: &str = "vmware-api-session-id";
const LIMIT: Duration = Duration::from_secs(30);
const MAX_BODY_BYTES: usize = 8 << 20;

/// A running server.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its certificate, which is its own authority: PEM.
    pub certificate: String,
    runtime: Option<tokio::runtime::Runtime>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Server({})", self.address)
    }
}

struct Site {
    world: Arc<World>,
    pages: collector::Pages,
}

impl Server {
    /// Serves a site on an address; port 0 takes a free one.
    pub fn start(world: Arc<World>, listen: SocketAddr) -> anyhow::Result<Self> {
        let names = vec![listen.ip().to_string(), "localhost".into()];
        let made = rcgen::generate_simple_self_signed(names)?;
        let certificate = made.cert.pem();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der());
        let key = key.map_err(|error| anyhow::anyhow!("the server's key: {error}"))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)?;
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let listener = runtime
            .block_on(TcpListener::bind(listen))
            .with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr()?;
        let site = Arc::new(Site {
            world,
            pages: collector::Pages::default(),
        });
        let router = Router::new()
            .route(
                "/sdk/{space}/{release}/{kind}/{id}/{member}",
                axum::routing::get(answer).post(answer),
            )
            .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES))
            .with_state(site);
        runtime.spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        tokio::spawn(connection(stream, acceptor.clone(), router.clone()));
                    }
                    Err(error) => {
                        tracing::warn!("cannot accept a connection: {error}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        });
        Ok(Self {
            address,
            certificate,
            runtime: Some(runtime),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, router: Router) {
    let Ok(Ok(stream)) = tokio::time::timeout(LIMIT, acceptor.accept(stream)).await else {
        return; // whoever dialled has heard why
    };
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(LIMIT);
    let service = TowerToHyperService::new(router);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!("a connection ended: {error}");
    }
}

/// What is asked: `POST` a method, `GET` a property.
#[derive(Debug)]
struct Request {
    space: String,
    kind: String,
    id: String,
    member: String,
    /// Of a method.
    arguments: Option<Value>,
    session: Option<String>,
}

/// An answer's document, and the session that was made.
struct Answer {
    document: Value,
    session: Option<String>,
}

async fn answer(
    State(site): State<Arc<Site>>,
    Path((space, _release, kind, id, member)): Path<(String, String, String, String, String)>,
    method: Method,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let arguments = match (method == Method::POST, body.is_empty()) {
        (false, _) => Ok(None),
        (true, true) => Ok(Some(Value::Null)),
        (true, false) => serde_json::from_slice(&body).map(Some),
    };
    let arguments = match arguments {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&Refusal::argument("body", format!("no JSON: {error}"))),
    };
    let session = headers.get(SESSION).and_then(|value| value.to_str().ok());
    let request = Request {
        space,
        kind,
        id,
        member,
        arguments,
        session: session.map(str::to_owned),
    };
    // Answers look into folders and processes.
    let answered = tokio::task::spawn_blocking(move || methods::answer(&site, &request)).await;
    match answered {
        Ok(Ok(answer)) => tell(answer),
        Ok(Err(refusal)) => refuse(&refusal),
        Err(error) => refuse(&Refusal::new("SystemError", error.to_string())),
    }
}

fn tell(answer: Answer) -> Response {
    let mut response = match answer.document {
        Value::Null => StatusCode::NO_CONTENT.into_response(),
        document => {
            let json = [(header::CONTENT_TYPE, "application/json")];
            (StatusCode::OK, json, document.to_string()).into_response()
        }
    };
    let session = answer.session.and_then(|session| session.parse().ok());
    if let Some(session) = session {
        response.headers_mut().insert(SESSION, session);
    }
    response
}

fn refuse(refusal: &Refusal) -> Response {
    let json = [(header::CONTENT_TYPE, "application/json")];
    let document = refusal.document().to_string();
    (StatusCode::INTERNAL_SERVER_ERROR, json, document).into_response()
}
