//! A client for a vCenter's VI-JSON interface.
//!
//! Invariant: a call that was answered with "not authenticated" had no effect and is made once more
//! after a login; nothing else is ever sent twice, so no task is started twice.

mod access;
mod fault;
mod filters;
mod inventory;
mod objects;
mod places;
mod wire;

use crate::model::Fault;
use crate::text::Moid;
use crate::trust::Trust;
use parking_lot::Mutex;
use reqwest::blocking::Response;
use serde_json::{Value, json};
use std::fmt;
use std::io::Read;
use std::time::Duration;
use wire::Ref;

/// The release of the interface that is asked for: the first with VI-JSON.
const RELEASE: &str = "8.0.1.0";
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// No call waits for work to be done: those are tasks.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// The longest answer.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
const SESSION: &str = "vmware-api-session-id";

/// Where a vCenter is, and as whom to speak to it.
#[derive(Clone)]
pub struct Login {
    /// `host` or `host:port`.
    pub address: String,
    /// The user.
    pub user: String,
    /// The user's password.
    pub password: String,
    /// Which server to believe.
    pub trust: Trust,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login({} at {})", self.user, self.address)
    }
}

/// The managed objects from which all others are found.
#[derive(Clone, Debug)]
struct Roots {
    session_manager: Ref,
    property_collector: Ref,
    root_folder: Ref,
    filter_manager: Option<Ref>,
    extension_manager: Option<Ref>,
    event_manager: Option<Ref>,
    authorization_manager: Option<Ref>,
    about: Value,
}

/// A vCenter over VI-JSON. It logs in at the first call, and again when its session has ended; out when
/// it is dropped. Not for threads of an asynchronous runtime: its calls block.
pub struct Client {
    http: reqwest::blocking::Client,
    login: Login,
    session: Mutex<Option<String>>,
    roots: Mutex<Option<Roots>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({:?})", self.login)
    }
}

/// Whatever is not one of the faults that are told apart.
fn other(what: impl fmt::Display) -> Fault {
    Fault::Other(what.to_string())
}

/// An error with what led to it: the outermost alone says little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

impl Client {
    /// A client; nothing is dialled yet.
    pub fn new(login: Login) -> Result<Self, Fault> {
        let tls = login.trust.client_config().map_err(other)?;
        let http = reqwest::blocking::Client::builder()
            .tls_backend_preconfigured(tls)
            .https_only(true)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_LIMIT)
            .timeout(ANSWER_LIMIT)
            .build()
            .map_err(|error| other(chain(&error)))?;
        let known = |c: char| c.is_ascii_alphanumeric() || ".:-[]".contains(c);
        if login.address.is_empty() || !login.address.chars().all(known) {
            return Err(other("the address is neither `host` nor `host:port`"));
        }
        Ok(Self {
            http,
            login,
            session: Mutex::default(),
            roots: Mutex::default(),
        })
    }

    fn send(&self, space: &str, path: &str, body: Option<&Value>) -> Result<Response, Fault> {
        let address = &self.login.address;
        let url = format!("https://{address}/sdk/{space}/{RELEASE}/{path}");
        let request = match body {
            Some(body) => self
                .http
                .post(url)
                .header("content-type", "application/json")
                .body(body.to_string()),
            None => self.http.get(url),
        };
        let request = match self.session.lock().as_deref() {
            Some(session) => request.header(SESSION, session),
            None => request,
        };
        request
            .send()
            .map_err(|error| other(format!("{address}: {}", chain(&error))))
    }

    /// An answer's document; nothing, if it has none.
    fn read(&self, path: &str, response: Response) -> Result<Value, Fault> {
        let at = format!("{}: {path}", self.login.address);
        let status = response.status();
        let mut bytes = Vec::new();
        let limited = &mut response.take(MAX_ANSWER_BYTES + 1);
        limited
            .read_to_end(&mut bytes)
            .map_err(|error| other(format!("{at}: {}", chain(&error))))?;
        if bytes.len() as u64 > MAX_ANSWER_BYTES {
            return Err(other(format!("{at}: over {MAX_ANSWER_BYTES} bytes")));
        }
        let value = match bytes.iter().all(u8::is_ascii_whitespace) {
            true => Ok(Value::Null),
            false => serde_json::from_slice(&bytes),
        };
        match (status.is_success(), value) {
            (true, Ok(value)) => Ok(value),
            (true, Err(error)) => Err(other(format!("{at}: no JSON: {error}"))),
            (false, Ok(value)) if value.get("_typeName").is_some() => Err(fault::of(&value)),
            (false, _) if status.as_u16() == 401 => Err(Fault::NotAuthenticated),
            (false, _) => Err(other(format!("{at}: HTTP status {status}"))),
        }
    }

    fn exchange(&self, space: &str, path: &str, body: Option<&Value>) -> Result<Value, Fault> {
        if self.session.lock().is_none() {
            self.log_in()?;
        }
        let response = self.send(space, path, body)?;
        match self.read(path, response) {
            Err(Fault::NotAuthenticated) => {
                self.log_in()?;
                self.read(path, self.send(space, path, body)?)
            }
            done => done,
        }
    }

    fn log_in(&self) -> Result<(), Fault> {
        *self.session.lock() = None;
        let roots = self.roots()?;
        let path = roots.session_manager.path("Login");
        let login = json!({"userName": self.login.user, "password": self.login.password});
        let response = self.send("vim25", &path, Some(&login))?;
        let session = response.headers().get(SESSION);
        let session = session.and_then(|value| Some(value.to_str().ok()?.to_owned()));
        self.read(&path, response)?;
        match session {
            Some(session) => *self.session.lock() = Some(session),
            None => return Err(other(format!("the login was answered without {SESSION}"))),
        }
        Ok(())
    }

    /// Known once for ever: they do not change.
    fn roots(&self) -> Result<Roots, Fault> {
        if let Some(roots) = self.roots.lock().clone() {
            return Ok(roots);
        }
        let path = "ServiceInstance/ServiceInstance/content";
        let content = self.read(path, self.send("vim25", path, None)?)?;
        let needed = |name: &str| {
            Ref::of(content.get(name).unwrap_or(&Value::Null))
                .map_err(|error| other(format!("{path}: {name}: {error}")))
        };
        let optional = |name: &str| content.get(name).and_then(|value| Ref::of(value).ok());
        let roots = Roots {
            session_manager: needed("sessionManager")?,
            property_collector: needed("propertyCollector")?,
            root_folder: needed("rootFolder")?,
            filter_manager: optional("ioFilterManager"),
            extension_manager: optional("extensionManager"),
            event_manager: optional("eventManager"),
            authorization_manager: optional("authorizationManager"),
            about: content.get("about").cloned().unwrap_or_default(),
        };
        *self.roots.lock() = Some(roots.clone());
        Ok(roots)
    }

    /// Calls a method of a managed object.
    fn call(&self, object: &Ref, method: &str, arguments: &Value) -> Result<Value, Fault> {
        self.exchange("vim25", &object.path(method), Some(arguments))
    }

    /// Reads a property of a managed object.
    fn get(&self, object: &Ref, property: &str) -> Result<Value, Fault> {
        self.exchange("vim25", &object.path(property), None)
    }

    /// Calls a method of the storage policies' own interface.
    fn call_policies(&self, method: &str, arguments: &Value) -> Result<Value, Fault> {
        let path = format!("PbmProfileProfileManager/ProfileManager/{method}");
        self.exchange("pbm", &path, Some(arguments))
    }

    /// A method that starts a task.
    fn start(
        &self,
        object: &Ref,
        method: &str,
        arguments: &Value,
    ) -> Result<crate::model::TaskId, Fault> {
        let answer = self.call(object, method, arguments)?;
        Ok(crate::model::TaskId(task_of(method, &answer)?))
    }
}

/// The task that an answer names.
fn task_of(method: &str, answer: &Value) -> Result<Moid, Fault> {
    match Ref::of(answer) {
        Ok(task) if task.kind == "Task" => Ok(task.id),
        Ok(other_kind) => Err(other(format!("{method}: a {} is no task", other_kind.kind))),
        Err(error) => Err(other(format!("{method}: {error}"))),
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.session.lock().is_some()
            && let Some(roots) = self.roots.lock().clone()
        {
            // vCenter ends sessions by itself too, after a while.
            let path = roots.session_manager.path("Logout");
            let _ = self.send("vim25", &path, Some(&json!({})));
        }
    }
}
