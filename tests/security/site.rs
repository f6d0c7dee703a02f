//! A management server, and what it knows: two clusters with a host each, one appliance, one domain.

use super::support::{DOMAIN, LIMIT, Part, Stack, flag, jetdr, ok};
use enrol::http::{Client, Server};
use enrol::request::Request;
use msa::authority::{self, Authority};
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tls::{Folder, Identity, Own, Role, Trust};

const PASSWORD: &str = "correct horse battery";

pub struct Site {
    // Dropped before the folder that it lies in.
    pub msa: Option<Part>,
    pub server: Server,
    pub client: Client,
    pub drva: String,
    pub domain: String,
    /// A host of each cluster.
    pub hosts: [String; 2],
    pub clusters: [String; 2],
    pub port_base: u64,
    pub dir: tempfile::TempDir,
}

/// Six free ports. Another test may take them meanwhile: then the appliance says so.
fn free_ports() -> u64 {
    let first = 33_000 + u64::from(std::process::id() % 4_500) * 6;
    let is_free = |base: &u64| {
        let all: Result<Vec<_>, _> = (*base..base + 6)
            .map(|port| TcpListener::bind(("127.0.0.1", port as u16)))
            .collect();
        all.is_ok()
    };
    let candidates = (0..500).map(|n| 33_000 + (first + n * 6 - 33_000) % 27_000);
    candidates.into_iter().find(is_free).expect("free ports")
}

impl Site {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("msa");
        let password = dir.path().join("password");
        std::fs::write(&password, PASSWORD).unwrap();
        let mut init = jetdr();
        init.args(["msa", "init", "--name", "127.0.0.1"]);
        init.args(flag("--data-dir", &folder));
        ok(init.args(flag("--password-file", &password)).output());
        let msa = Self::run_msa(dir.path(), "127.0.0.1:0");
        let address = msa.ready["address"].as_str().unwrap();
        let server: Server = format!("https://{address}").parse().unwrap();
        let authority = tls::files::certificates(&folder.join("ca.pem")).unwrap();
        let trust = Trust::new(&authority, None).unwrap();
        let provider = tls::provider::ring();
        let config = tls::client_config(&provider, None, &trust, &[Role::Msa]).unwrap();
        let mut client = Client::new(server.clone(), Arc::new(config));
        let login = json!({"name": "admin", "password": PASSWORD});
        let answer = client.call("POST", "/login", Some(&login)).unwrap();
        client.token = Some(answer["token"].as_str().unwrap().into());
        let port_base = free_ports();
        let make = |path: &str, body: Value| {
            let made = client.call("POST", path, Some(&body)).unwrap();
            made["id"].as_str().unwrap().to_owned()
        };
        let vcenter = make(
            "/vcenters",
            json!({"name": "vc", "address": "vc", "port": 443}),
        );
        let clusters = ["c1", "c2"].map(|name| {
            let cluster =
                json!({"vcenter_id": vcenter, "moid": format!("domain-{name}"), "name": name});
            make("/clusters", cluster)
        });
        let drva = json!({"name": "dr", "address": "127.0.0.1", "port_base": port_base});
        let drva = make("/drvas", drva);
        let store = make("/sites", json!({"name": "store", "store": "/store"}));
        let volume =
            json!({"drva_id": drva, "name": "log", "path": "/log", "capacity_bytes": 1u64 << 30});
        let volume = make("/log-volumes", volume);
        let domain = json!({"name": DOMAIN, "site_id": store, "drva_id": drva,
            "log_volume_id": volume, "ack": "host"});
        let domain = make("/domains", domain);
        let hosts = [0, 1].map(|at: usize| {
            let host = json!({"cluster_id": clusters[at], "moid": "host-1",
                "name": format!("esx{at}"), "drva_id": drva});
            make("/hosts", host)
        });
        Self {
            msa: Some(msa),
            server,
            drva,
            domain,
            hosts,
            clusters,
            port_base,
            client,
            dir,
        }
    }

    fn run_msa(dir: &Path, listen: &str) -> Part {
        let mut arguments = vec!["msa".to_string(), "run".into()];
        arguments.extend(flag("--data-dir", &dir.join("msa")));
        arguments.extend(["--listen".into(), listen.into()]);
        Part::start(&dir.join("msa.log"), &arguments)
    }

    /// Starts the server again, where it was.
    pub fn restart_msa(&mut self) {
        let listen = self.server.to_string();
        let listen = listen.strip_prefix("https://").unwrap();
        self.msa = Some(Self::run_msa(self.dir.path(), listen));
    }

    pub fn call(&self, method: &str, path: &str, body: Value) -> Value {
        let body = (!body.is_null()).then_some(&body);
        let answer = self.client.call(method, path, body);
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// A machine in a cluster, assigned to the domain; its UUID and its id.
    pub fn assigned_vm(&self, cluster: usize, name: &str) -> (String, String) {
        let uuid = uuid::Uuid::new_v4().to_string();
        let vm = json!({"cluster_id": self.clusters[cluster], "moid": format!("vm-{name}"),
            "name": name, "uuid": uuid});
        let id = self.call("POST", "/vms", vm)["id"]
            .as_str()
            .unwrap()
            .to_owned();
        self.assign(&id, json!(self.domain));
        (uuid, id)
    }

    pub fn assign(&self, vm: &str, domain: Value) {
        let path = format!("/vms/{vm}/domain");
        self.call("PUT", &path, json!({"domain_id": domain}));
    }

    pub fn token(&self, role: &str, id: &str) -> String {
        let asked = json!({"role": role, "entity_id": id});
        let made = self.call("POST", "/enrolments", asked);
        made["token"].as_str().unwrap().to_owned()
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("msa/ca.pem")
    }

    /// Enrols as an operator does; the folder.
    pub fn enrol(&self, role: &str, id: &str) -> Folder {
        let folder = Folder::at(self.dir.path().join(format!("tls-{role}-{id}")));
        let token = self.dir.path().join(format!("token-{id}"));
        std::fs::write(&token, self.token(role, id)).unwrap();
        let mut enrol = jetdr();
        enrol.args(["enrol", "--msa", &self.server.to_string()]);
        enrol.args(flag("--token-file", &token));
        enrol.args(flag("--ca", &self.ca()));
        let said = ok(enrol.args(flag("--tls-dir", folder.path())).output());
        assert!(said.contains(&format!("jetdr://{role}/{id}")), "{said}");
        folder
    }

    /// A folder in which only lies what a host is given to begin with.
    pub fn prepared(&self, host: usize) -> Folder {
        let folder = Folder::at(self.dir.path().join(format!("tls-prepared-{host}")));
        folder.make().unwrap();
        std::fs::copy(self.ca(), folder.authority()).unwrap();
        std::fs::write(folder.msa(), self.server.to_string()).unwrap();
        std::fs::write(folder.token(), self.token("host", &self.hosts[host])).unwrap();
        folder
    }

    /// What a daemon is started with.
    pub fn daemon_security(&self, folder: &Folder) -> Vec<String> {
        let mut more: Vec<String> = flag("--tls-dir", folder.path()).into();
        more.push("--msa-poll-s=1".into());
        more
    }

    /// Folders and disks of one host whose daemon and appliance speak by certificates.
    pub fn stack(&self, folder: &Folder, vm: &str) -> Stack {
        let mut stack = Stack::new(&[("d0.raw", 16 << 20)]);
        stack.port_base = self.port_base;
        stack.daemon_security = self.daemon_security(folder);
        stack.vm_more.extend(["--uuid".into(), vm.into()]);
        stack
    }

    /// The same, with the appliance running.
    pub fn stack_with_drva(&self, folder: &Folder, vm: &str) -> Stack {
        let mut stack = self.stack(folder, vm);
        let own = self.enrol("drva", &self.drva);
        stack.drva_security = flag("--tls-dir", own.path()).into();
        let msa = format!("--msa={}", self.server);
        stack.drva_security.extend([msa, "--msa-poll-s=1".into()]);
        stack.start_drva();
        stack
    }

    /// The authority itself, to issue what it would never issue.
    pub fn authority(&self) -> Authority {
        Authority::load(&self.dir.path().join("msa")).unwrap()
    }
}

/// Milliseconds since 1970, so many days from now.
pub fn in_days(days: i64) -> i64 {
    enrol::steps::now_s() * 1000 + days * 86_400_000
}

/// A key with a certificate of an authority, issued at a time.
pub fn issue(authority: &Authority, identity: Identity, at_ms: i64) -> (Own, String) {
    use rustls::pki_types::PrivateKeyDer;
    use rustls::pki_types::pem::PemObject;
    let made = Request::make().unwrap();
    let request = authority::Request::parse(&made.request_pem).unwrap();
    let issued = authority.issue(identity, &request, at_ms).unwrap();
    let own = Own {
        chain: vec![issued.der.clone()],
        key: PrivateKeyDer::from_pem_slice(made.key_pem.as_bytes()).unwrap(),
    };
    (own, format!("{}{}", made.key_pem, issued.pem()))
}

/// Waits until a log says something more often than before.
pub fn wait_said(log: &Path, what: &str, before: usize) {
    wait(&format!("{} says `{what}`", log.display()), || {
        said(log, what) > before
    });
}

/// How often a log says something.
pub fn said(log: &Path, what: &str) -> usize {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.matches(what).count()
}

pub fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(since.elapsed() < LIMIT, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10)); // poll of another process
    }
}
