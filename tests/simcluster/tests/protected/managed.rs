//! A management server that is used by REST, and an appliance of it, for one simulated site.

use super::support::{LIMIT, PASSWORD, Site, USER};
use drva::appliance::{self, Appliance, Settings};
use drva::keeper::{Security, SecurityArgs};
use drva::log::LogOptions;
use enrol::http::{Client, Server};
use msa::clock::SystemClock;
use msa::connect::ViJson;
use msa::outside::{Outside, Patience};
use msa::service::{self, Msa, PasswordCost};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use sha2::Digest;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tls::{Folder, Role, Trust};

const OWN_PASSWORD: &str = "correct horse battery";
/// The ports that a host's ruleset opens.
const PORT_BASE: u16 = 32_873;

pub struct Managed {
    pub msa: Arc<Msa>,
    pub domain: String,
    port: u16,
    client: Client,
    server: Server,
    names: AtomicU32,
    drva: Option<(Arc<Appliance>, Vec<SocketAddr>)>,
    runtime: Option<tokio::runtime::Runtime>,
    engine: Option<std::thread::JoinHandle<()>>,
    _stop: tokio::sync::watch::Sender<bool>,
    dir: tempfile::TempDir,
}

impl Drop for Managed {
    fn drop(&mut self) {
        if let Some((drva, ports)) = self.drva.take() {
            drva.stop(&ports);
        }
        self.msa.engine.signals().stop();
        if let Some(engine) = self.engine.take() {
            let _ = engine.join();
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn init(dir: &Path) -> PathBuf {
    let folder = dir.join("msa");
    let password_file = dir.join("password");
    std::fs::write(&password_file, OWN_PASSWORD).unwrap();
    msa::run(&msa::Command::Init(msa::cli::InitArgs {
        data_dir: folder.clone(),
        names: vec!["127.0.0.1".parse().unwrap()],
        admin: "admin".parse().unwrap(),
        password_file,
    }))
    .unwrap();
    folder
}

/// An address of this machine that no other test's appliance has.
fn address() -> IpAddr {
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 93, high, low.max(1)).into()
}

fn id(made: &Value) -> String {
    made["id"].as_str().unwrap().to_owned()
}

impl Managed {
    /// A server that knows the site's vCenter; the cluster is enabled, hosts and appliance have certificates,
    /// the domain `shop` is there.
    pub fn new(site: &Site) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = init(dir.path());
        let mut outside = Outside::new(Box::new(ViJson));
        outside.resolves = Box::new(|_| true); // its hosts' names are in no DNS
        outside.patience = Patience {
            poll: Duration::from_millis(20),
            settle: LIMIT,
            undo: Duration::from_secs(60),
        };
        let cost = PasswordCost::default();
        let registry = service::registry();
        let msa = Msa::open_in(&folder, Arc::new(SystemClock), registry, cost, outside).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        msa.outside.set_base_url(format!("https://{address}"));
        let (stop, stopped) = tokio::sync::watch::channel(false);
        runtime.spawn(msa::rest::server::serve(listener, msa.clone(), stopped));
        let worker = msa.clone();
        let engine = std::thread::spawn(move || worker.engine.work());
        let server: Server = format!("https://{address}").parse().unwrap();
        let authority = tls::files::certificates(&folder.join("ca.pem")).unwrap();
        let trust = Trust::new(&authority, None).unwrap();
        let provider = tls::provider::ring();
        let config = tls::client_config(&provider, None, &trust, &[Role::Msa]).unwrap();
        let mut client = Client::new(server.clone(), Arc::new(config));
        let login = json!({"name": "admin", "password": OWN_PASSWORD});
        let answer = client.call("POST", "/login", Some(&login)).unwrap();
        client.token = Some(answer["token"].as_str().unwrap().into());
        let mut managed = Self {
            msa,
            domain: String::new(),
            port: address.port(),
            client,
            server,
            names: AtomicU32::new(0),
            drva: None,
            runtime: Some(runtime),
            engine: Some(engine),
            _stop: stop,
            dir,
        };
        managed.register(site);
        managed.set_up();
        managed
    }

    pub fn now_ms(&self) -> i64 {
        self.msa.store.now_ms()
    }

    /// Where containers lie.
    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = self.client.call(method, path, Some(body));
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    pub fn get(&self, path: &str) -> Value {
        self.client.call("GET", path, None).unwrap()
    }

    fn register(&self, site: &Site) {
        let pem = site.server.certificate.as_bytes();
        let certificate = CertificateDer::from_pem_slice(pem).unwrap();
        let digest = sha2::Sha256::digest(certificate.as_ref());
        let fingerprint: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let address = site.server.address;
        let vcenter = json!({"name": "vc1", "address": address.ip(), "port": address.port(),
            "fingerprint": fingerprint});
        let vcenter = id(&self.call("POST", "/vcenters", &vcenter));
        let login = json!({"user": USER, "password": PASSWORD});
        self.call("PUT", &format!("/vcenters/{vcenter}/login"), &login);
        let vib = site.packager.package_for("0.1.0-1", self.port, |_| {});
        let sent = self
            .client
            .send_bytes("POST", "/packages", "application/octet-stream", &vib);
        sent.unwrap();
    }

    fn token(&self, role: &str, id: &Value) -> String {
        let asked = json!({"role": role, "entity_id": id});
        let made = self.call("POST", "/enrolments", &asked);
        made["token"].as_str().unwrap().to_owned()
    }

    fn set_up(&mut self) {
        let drva = json!({"name": "dr", "address": address(), "port_base": PORT_BASE});
        let drva = self.call("POST", "/drvas", &drva)["id"].clone();
        let data_dir = self.dir.path().join("log");
        let volume = json!({"drva_id": drva, "name": "fast", "path": data_dir,
            "capacity_bytes": 1u64 << 30});
        let volume = self.call("POST", "/log-volumes", &volume)["id"].clone();
        let store = self.call(
            "POST",
            "/sites",
            &json!({"name": "box", "store": self.store()}),
        );
        let domain = json!({"name": "shop", "site_id": store["id"], "drva_id": drva,
            "log_volume_id": volume, "ack": "host"});
        self.domain = id(&self.call("POST", "/domains", &domain));
        self.start_drva(&data_dir, &drva);
        self.succeeds("enable-cluster", json!({"protected_cluster": "One"}));
        let hosts = self.get("/hosts?limit=200")["items"].clone();
        for host in hosts.as_array().unwrap() {
            assert_eq!((&host["state"], &host["drva_id"]), (&json!("ready"), &drva));
        }
    }

    fn start_drva(&mut self, data_dir: &Path, id: &Value) {
        let folder = Folder::at(self.dir.path().join("drva-tls"));
        folder.make().unwrap();
        let authority = self.msa.data_dir().join("ca.pem");
        std::fs::copy(authority, folder.authority()).unwrap();
        std::fs::write(folder.token(), self.token("drva", id)).unwrap();
        let args = SecurityArgs {
            tls_dir: Some(folder.path().to_owned()),
            msa: Some(self.server.clone()),
            msa_poll_s: 1,
            assignments: None,
            assign: None,
            insecure_plain_text: false,
        };
        let security = Security::new(&args, data_dir).unwrap();
        let (_, listeners) = appliance::bind(address(), PORT_BASE).unwrap();
        let drva = Appliance::open(Settings {
            name: "dr".into(),
            data_dir: data_dir.to_owned(),
            store: self.store().display().to_string(),
            store_options: Vec::new(),
            served: Vec::new(),
            cut_every: Duration::from_millis(250),
            log: LogOptions {
                segment_bytes: 4 << 20,
                max_bytes: 256 << 20,
            },
            part_bytes: 8 << 20,
            tls: security.tls.clone(),
            assignments: security.assignments.clone(),
        })
        .unwrap();
        security.keep(drva.clone()).unwrap();
        let ports: Vec<SocketAddr> = listeners
            .iter()
            .map(|(_, listener)| listener.local_addr().unwrap())
            .collect();
        drva.listen(listeners).unwrap();
        self.drva = Some((drva, ports));
    }

    /// Submits an execution, waits for its end, which is good; its output.
    pub fn succeeds(&self, kind: &str, parameters: Value) -> String {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        let asked = json!({"name": format!("e{number}"), "kind": kind, "parameters": parameters});
        let execution = id(&self.call("POST", "/executions", &asked));
        let since = Instant::now();
        loop {
            let now = self.get(&format!("/executions/{execution}"));
            if now["ended_at_ms"].is_i64() || now["state"] == "blocked" {
                let lines = self.get(&format!("/executions/{execution}/output?limit=200"));
                let lines = lines["items"].as_array().unwrap().iter();
                let output: Vec<&str> = lines.map(|line| line["text"].as_str().unwrap()).collect();
                let output = output.join("\n");
                assert_eq!(
                    now["state"], "succeeded",
                    "{kind}: {}\n{output}",
                    now["error"]
                );
                return output;
            }
            assert!(since.elapsed() < 2 * LIMIT, "{kind} does not end: {now}");
            std::thread::sleep(Duration::from_millis(20)); // poll of a server
        }
    }
}
