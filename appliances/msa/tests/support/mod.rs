//! A management server in this process, and a client that speaks to it over its real port.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use msa::clock::{Clock, ManualClock, SystemClock};
use msa::executions::Registry;
use msa::outside::Outside;
use msa::rest::server;
use msa::service::{self, Msa, PasswordCost};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tls::{Own, Role, Trust};

pub mod appliance;
pub mod fake;
pub mod guarded;
pub mod site;

pub const LIMIT: Duration = Duration::from_secs(60);
pub const PASSWORD: &str = "correct horse battery";
/// Other users of tests get this one.
pub const OTHER_PASSWORD: &str = "another long password";

/// The test's numbers: the seed is printed, and can be given by JETDR_SEED.
pub fn seed() -> u64 {
    let seed = std::env::var("JETDR_SEED").ok();
    let seed = seed.and_then(|text| text.parse().ok()).unwrap_or(7);
    println!("JETDR_SEED={seed}");
    seed
}

/// Numbers that are the same for the same seed.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Makes a server's folder, as an operator would.
pub fn init(dir: &Path) {
    let password_file = dir.with_extension("password");
    std::fs::write(&password_file, PASSWORD).unwrap();
    let args = msa::cli::InitArgs {
        data_dir: dir.to_owned(),
        names: vec!["127.0.0.1".parse().unwrap(), "localhost".parse().unwrap()],
        admin: "admin".parse().unwrap(),
        password_file,
    };
    msa::run(&msa::Command::Init(args)).unwrap();
}

pub struct Server {
    pub msa: Arc<Msa>,
    pub clock: Arc<ManualClock>,
    pub address: SocketAddr,
    pub dir: tempfile::TempDir,
    stop: tokio::sync::watch::Sender<bool>,
    runtime: Option<tokio::runtime::Runtime>,
    engine: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    pub fn start() -> Self {
        Self::with(service::registry())
    }

    pub fn with(registry: Registry) -> Self {
        let clock = Arc::new(ManualClock::at(SystemClock.now_ms()));
        Self::built(registry, clock, Outside::default())
    }

    /// A server that sees a vCenter in memory.
    pub fn in_world(world: &Arc<fake::World>, clock: Arc<ManualClock>) -> Self {
        Self::built(service::registry(), clock, world.outside_alone())
    }

    fn built(registry: Registry, clock: Arc<ManualClock>, outside: Outside) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("msa");
        init(&folder);
        let cost = PasswordCost::default();
        let msa = Msa::open_in(&folder, clock.clone(), registry, cost, outside).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
        let listener = listener.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::watch::channel(false);
        runtime.spawn(server::serve(listener, msa.clone(), stopped));
        let worker = msa.clone();
        let engine = std::thread::spawn(move || worker.engine.work());
        Self {
            msa,
            clock,
            address,
            dir,
            stop,
            runtime: Some(runtime),
            engine: Some(engine),
        }
    }

    pub fn client(&self) -> Client {
        Client::of(self.address, &self.dir.path().join("msa").join("ca.pem"))
    }

    /// A client with the administrator's token.
    pub fn admin(&self) -> Client {
        self.client().logged_in("admin", PASSWORD)
    }

    /// A client with the token of a new user.
    pub fn user(&self, name: &str, role: &str) -> Client {
        let user = json!({"name": name, "role": role, "password": OTHER_PASSWORD});
        self.admin().expect(201, "POST", "/users", &user);
        self.client().logged_in(name, OTHER_PASSWORD)
    }

    /// The newest lines of the audit, newest first.
    pub fn audit(&self) -> Vec<String> {
        let read = self.msa.store.read(|t| {
            let mut statement = t.prepare(
                "SELECT outcome || ' ' || actor || ' ' || action || ' ' || target || ' ' || detail \
                 FROM audit ORDER BY seq DESC LIMIT 500",
            )?;
            let rows = statement.query_map([], |row| row.get(0))?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        });
        read.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        self.msa.engine.signals().stop();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        if let Some(engine) = self.engine.take() {
            let _ = engine.join();
        }
    }
}

/// A key and its certificate, as a machine or a person has them.
#[derive(Clone)]
pub struct Holder {
    pub own: Own,
    pub serial: String,
}

/// A request for a certificate, and its key.
pub fn request() -> (rcgen::KeyPair, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["evil.example".into()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pem = params.serialize_request(&key).unwrap().pem().unwrap();
    (key, pem)
}

impl Holder {
    pub fn new(key: &rcgen::KeyPair, certificate_pem: &str) -> Self {
        use rustls::pki_types::pem::PemObject;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).unwrap();
        let serial = tls::identity::serial_of(&certificate).unwrap();
        let own = Own {
            chain: vec![certificate],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        };
        Self {
            own,
            serial: msa::secret::hex(&serial),
        }
    }
}

/// One request a connection, as simple as can be.
#[derive(Clone)]
pub struct Client {
    address: SocketAddr,
    trust: Trust,
    pub token: Option<String>,
    pub holder: Option<Holder>,
}

impl Client {
    pub fn of(address: SocketAddr, authority: &Path) -> Self {
        let authority = tls::files::certificates(authority).unwrap();
        Self {
            address,
            trust: Trust::new(&authority, None).unwrap(),
            token: None,
            holder: None,
        }
    }

    pub fn logged_in(mut self, name: &str, password: &str) -> Self {
        let login = json!({"name": name, "password": password});
        let answer = self.expect(200, "POST", "/login", &login);
        self.token = Some(answer["token"].as_str().unwrap().to_owned());
        self
    }

    pub fn with_certificate(mut self, holder: &Holder) -> Self {
        self.holder = Some(holder.clone());
        self.token = None;
        self
    }

    /// Sends a request; an error, if no answer came (the handshake was refused, the process died).
    pub fn try_send(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> std::io::Result<(u16, String, Vec<u8>)> {
        let own = self.holder.as_ref().map(|holder| &holder.own);
        let provider = tls::provider::aws_lc_rs();
        let config = tls::client_config(&provider, own, &self.trust, &[Role::Msa]).unwrap();
        let name = rustls::pki_types::ServerName::from(self.address.ip());
        let connection = rustls::ClientConnection::new(Arc::new(config), name);
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut stream = rustls::StreamOwned::new(connection.unwrap(), stream);
        let token = self.token.as_ref();
        let token = token.map_or(String::new(), |t| format!("Authorization: Bearer {t}\r\n"));
        let head = format!(
            "{method} /api/v1{path} HTTP/1.1\r\nHost: msa\r\nConnection: close\r\n\
             Content-Length: {}\r\n{token}{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        // A server that has said no need not read the rest.
        let _ = stream.write_all(body);
        let mut all = Vec::new();
        let read = stream.read_to_end(&mut all);
        let end = all.windows(4).position(|four| four == b"\r\n\r\n");
        let Some(end) = end else {
            read?;
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        };
        let head = String::from_utf8_lossy(&all[..end]).into_owned();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Ok((status, head.to_ascii_lowercase(), all[end + 4..].to_vec()))
    }

    pub fn try_call(
        &self,
        method: &str,
        path: &str,
        body: &Value,
    ) -> std::io::Result<(u16, Value)> {
        let (headers, body) = match body {
            Value::Null => ("", Vec::new()),
            body => (
                "Content-Type: application/json\r\n",
                body.to_string().into_bytes(),
            ),
        };
        let (status, head, body) = self.try_send(method, path, headers, &body)?;
        let value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        if status >= 400 {
            assert!(head.contains("application/problem+json"), "{head}\n{value}");
            let detail = value["detail"].as_str().unwrap();
            assert!(!detail.is_empty() && value["status"] == status, "{value}");
        }
        Ok((status, value))
    }

    pub fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        self.try_call(method, path, body).unwrap()
    }

    pub fn expect(&self, status: u16, method: &str, path: &str, body: &Value) -> Value {
        let (found, value) = self.call(method, path, body);
        assert_eq!(found, status, "{method} {path} {body}: {value}");
        value
    }

    pub fn get(&self, path: &str) -> Value {
        self.expect(200, "GET", path, &Value::Null)
    }

    /// Makes something; its id.
    pub fn make(&self, path: &str, body: &Value) -> String {
        let made = self.expect(201, "POST", path, body);
        made["id"].as_str().unwrap().to_owned()
    }

    /// A certificate for a host, an appliance or a user: by a token that this client may make.
    pub fn enrol(&self, role: &str, id: &str) -> Holder {
        let asked = json!({"role": role, "entity_id": id});
        let token = self.expect(201, "POST", "/enrolments", &asked);
        let (key, request) = request();
        let asked = json!({"token": token["token"], "request": request});
        let answer = self.expect(201, "POST", "/enrol", &asked);
        Holder::new(&key, answer["certificate"].as_str().unwrap())
    }

    /// A host in a cluster in a vCenter; its id.
    pub fn make_host(&self, name: &str) -> String {
        let vcenter = json!({"name": format!("vc-{name}"), "address": format!("vc-{name}"),
            "port": 443});
        let vcenter = self.make("/vcenters", &vcenter);
        let cluster = json!({"vcenter_id": vcenter, "moid": "domain-c1", "name": "One"});
        let cluster = self.make("/clusters", &cluster);
        let host = json!({"cluster_id": cluster, "moid": "host-1", "name": name});
        self.make("/hosts", &host)
    }
}

/// Asks again until there is something.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let since = std::time::Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(since.elapsed() < LIMIT, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(20)); // poll
    }
}
