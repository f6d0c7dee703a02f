//! A simulated vCenter in a process of its own, and a place where a server is installed.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use super::support::{LIMIT, Part, jetdr, ok};
use enrol::http::{Client, Server};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Instant;

pub const USER: &str = "administrator@vsphere.local";
pub const SERVICE_USER: &str = "jetdr@vsphere.local";
const SERVICE_PASSWORD: &str = "a service password";
const DATE: &str = "2026-01-31T12:00:00Z";

/// A site of one cluster of three hosts.
pub struct Vcenter {
    site: Part,
    pub dir: tempfile::TempDir,
    address: SocketAddr,
    fingerprint: String,
    package: PathBuf,
    pub cluster: String,
    pub hosts: Vec<String>,
    roots: Vec<PathBuf>,
}

/// What an installation could have left behind.
#[derive(Debug, PartialEq)]
pub struct Seen {
    access: Value,
    extension: Value,
    machines: Vec<String>,
    roots: Vec<Vec<(PathBuf, u32, Vec<u8>)>>,
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

/// Library and daemon of this build, without what is for debuggers: packing that takes seconds.
fn objects(into: &Path) -> [PathBuf; 2] {
    let debug = Path::new(env!("CARGO_BIN_EXE_jetdr")).parent().unwrap();
    ["libvaio_shim.so", "iofilterd-jetdr"].map(|name| {
        let (from, to) = (debug.join(name), into.join(name));
        assert!(
            from.exists(),
            "no {}: cargo build -p vaio-shim -p filter-daemon",
            from.display()
        );
        ok(Command::new("strip").arg("-o").arg(&to).arg(&from).output());
        to
    })
}

fn key_pair(folder: &Path) -> [PathBuf; 2] {
    let made = [folder.join("key.pem"), folder.join("cert.pem")];
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30",
    ]);
    openssl.args(["-subj", "/CN=packager", "-addext"]);
    openssl.args(["keyUsage=critical,digitalSignature", "-addext"]);
    openssl.arg("extendedKeyUsage=codeSigning");
    ok(openssl
        .arg("-keyout")
        .arg(&made[0])
        .arg("-out")
        .arg(&made[1])
        .output());
    made
}

fn build(folder: &Path, out: &str, more: &[&str]) -> PathBuf {
    let [library, daemon] = objects(folder);
    let out = folder.join(out);
    let mut command = jetdr();
    command.args([
        "vib",
        "build",
        "--package-version",
        "0.1.0-1",
        "--date",
        DATE,
    ]);
    command.arg("--library").arg(library);
    command.arg("--daemon").arg(daemon);
    ok(command.arg("--out").arg(&out).args(more).output());
    out.join("JetDR_bootbank_jetdr_0.1.0-1.vib")
}

impl Vcenter {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("jd-")
            .tempdir_in("/dev/shm")
            .unwrap();
        let [key, certificate] = key_pair(dir.path());
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (key, certificate) = (text(&key), text(&certificate));
        let signed = ["--level", "partner", "--key", &key, "--cert", &certificate];
        let package = build(dir.path(), "signed", &signed);
        let folder = dir.path().join("s");
        let arguments = ["simcluster", "run", "--dir"].map(str::to_owned);
        let mut arguments = arguments.to_vec();
        arguments.extend([text(&folder), "--signers".into(), certificate]);
        let site = Part::start(&dir.path().join("site.log"), &arguments);
        let address = site.ready["address"].as_str().unwrap().parse().unwrap();
        let pem = std::fs::read(site.ready["ca"].as_str().unwrap()).unwrap();
        let der = CertificateDer::from_pem_slice(&pem).unwrap();
        let mut vcenter = Self {
            site,
            address,
            fingerprint: msa::secret::sha256(der.as_ref()),
            package,
            cluster: String::new(),
            hosts: Vec::new(),
            roots: Vec::new(),
            dir,
        };
        let made = vcenter.tell(&json!({"cmd": "add-cluster", "name": "One"}));
        vcenter.cluster = made["id"].as_str().unwrap().into();
        for number in 1..=3 {
            // A name that is an address resolves anywhere.
            let name = format!("192.0.2.{number}");
            let host = vcenter.tell(&json!({"cmd": "add-host", "name": name}));
            let id = host["id"].as_str().unwrap().to_owned();
            vcenter.tell(&json!({"cmd": "join", "host": id, "cluster": vcenter.cluster}));
            vcenter.roots.push(host["root"].as_str().unwrap().into());
            vcenter.hosts.push(id);
        }
        let user =
            json!({"cmd": "add-account", "name": SERVICE_USER, "password": SERVICE_PASSWORD});
        vcenter.tell(&user);
        vcenter
    }

    pub fn tell(&self, command: &Value) -> Value {
        let mut told = jetdr();
        told.args(["simcluster", "do", "--dir"]);
        told.arg(self.dir.path().join("s"));
        let answer = ok(told.arg(command.to_string()).output());
        serde_json::from_str(&answer).unwrap()
    }

    /// The names of the machines.
    pub fn machines(&self) -> Vec<String> {
        let status = self.tell(&json!({"cmd": "status"}));
        let all = status["vms"].as_array().unwrap().iter();
        all.map(|vm| vm["name"].as_str().unwrap().to_owned())
            .collect()
    }

    pub fn seen(&self) -> Seen {
        let extension = json!({"cmd": "extension", "key": "jetdr"});
        let roots = self.roots.iter();
        Seen {
            access: self.tell(&json!({"cmd": "access"})),
            extension: self.tell(&extension),
            machines: self.machines(),
            roots: roots
                .map(|root| simcluster::host::listing(root).unwrap())
                .collect(),
        }
    }

    /// Whether the daemon runs on all hosts.
    pub fn hosts_have_it(&self) -> bool {
        self.hosts.iter().all(|host| {
            let host = self.tell(&json!({"cmd": "host", "host": host}));
            host["services"]["iofilterd-jetdr"] == true
        })
    }

    /// One that hosts of level partner refuse.
    pub fn unsigned_package(&self) -> PathBuf {
        build(self.dir.path(), "unsigned", &[])
    }
}

impl Drop for Vcenter {
    fn drop(&mut self) {
        // In order, so that the hosts' processes end too.
        let mut kill = Command::new("kill");
        let _ = kill.arg(self.site.child.id().to_string()).status();
        let _ = self.site.child.wait();
    }
}

/// Where a server is to be.
pub struct Place {
    pub dir: PathBuf,
    pub port: u16,
    own: tempfile::TempDir,
    fields: Vec<String>,
}

impl Place {
    pub fn new(vcenter: &Vcenter) -> Self {
        let own = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        let write = |name: &str, text: &str| {
            let path = own.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (address, package) = (vcenter.address, vcenter.package.to_str().unwrap());
        let fields = [
            ("--protected-cluster", "One".to_owned()),
            ("--datastore", "datastore1".into()),
            ("--network", "VM Network".into()),
            ("--vm-name", "msa-1".into()),
            ("--host-name", "localhost".into()),
            ("--port", port.to_string()),
            ("--vcenter", address.ip().to_string()),
            ("--vcenter-port", address.port().to_string()),
            ("--vcenter-fingerprint", vcenter.fingerprint.clone()),
            ("--vcenter-user", USER.into()),
            ("--vcenter-password-file", write("vcenter", "simulated\n")),
            ("--service-user", SERVICE_USER.into()),
            (
                "--service-password-file",
                write("service", SERVICE_PASSWORD),
            ),
            ("--package", package.into()),
        ];
        let fields = fields.into_iter();
        Self {
            dir: own.path().join("jetdr"),
            port,
            fields: fields.flat_map(|(n, v)| [n.to_owned(), v]).collect(),
            own,
        }
    }

    /// A file with a text.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.own.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, first: &[&str], more: &[&str]) -> Vec<String> {
        let mut all: Vec<String> = first.iter().map(|word| (*word).to_owned()).collect();
        all.extend(["--dir".into(), self.dir.to_str().unwrap().into()]);
        let mut fields = self.fields.clone();
        for pair in more.chunks(2) {
            // What is given again replaces.
            match fields.iter().position(|name| name == pair[0]) {
                Some(at) => fields[at + 1] = pair[1].into(),
                None => fields.extend(pair.iter().map(|word| (*word).to_owned())),
            }
        }
        all.extend(fields);
        all
    }

    pub fn install(&self, more: &[&str]) -> Vec<String> {
        self.command(&["install", "--dhcp"], more)
    }

    pub fn install_static(&self, more: &[&str]) -> Vec<String> {
        self.command(&["install", "--static"], more)
    }

    pub fn uninstall(&self, more: &[&str]) -> Vec<String> {
        let password = self.own.path().join("vcenter");
        let dir = self.dir.to_str().unwrap();
        let all = ["uninstall", "--dir", dir, "--vcenter-password-file"];
        let password = [password.to_str().unwrap()];
        let all = all.iter().chain(&password).chain(more);
        all.map(|word| (*word).to_owned()).collect()
    }

    fn run(&self, command: &[String], fault: &str) -> Output {
        jetdr()
            .args(command)
            .env("JETDR_FAULT", fault)
            .output()
            .unwrap()
    }

    pub fn succeeds(&self, command: &[String]) -> String {
        let output = self.run(command, "");
        assert!(output.status.success(), "{command:?}: {}", said(&output));
        said(&output)
    }

    pub fn installs(&self, more: &[&str]) -> String {
        self.succeeds(&self.install(more))
    }

    pub fn uninstalls(&self, more: &[&str]) -> String {
        self.succeeds(&self.uninstall(more))
    }

    /// What it said, when it failed.
    pub fn refused(&self, command: &[String]) -> String {
        let output = self.run(command, "");
        assert_eq!(
            output.status.code(),
            Some(1),
            "{command:?}: {}",
            said(&output)
        );
        said(&output)
    }

    /// It dies just before the next step, and then just after it: what a killed command did is done again first.
    pub fn killed_around(&self, command: &[String], what: &str, step: usize) {
        let passing = if step == 0 { 1 } else { 2 };
        self.killed(command, &format!("{what}.before-step:{passing}"), step);
        self.killed(command, &format!("{what}.after-step"), step);
    }

    /// It dies at a fault's point.
    pub fn killed(&self, command: &[String], point: &str, step: usize) {
        let output = self.run(command, point);
        let signal = output.status.signal();
        assert_eq!(signal, Some(9), "{point}, step {step}: {}", said(&output));
    }

    fn pid(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.dir.join("msa.pid")).ok()?;
        let pid: u32 = text.trim().parse().ok()?;
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).into_owned();
        command.contains(self.dir.to_str().unwrap()).then_some(pid)
    }

    /// Whether its server runs.
    pub fn is_running(&self) -> bool {
        self.pid().is_some()
    }

    pub fn kill_server(&self) {
        let pid = self.pid().unwrap();
        let mut kill = Command::new("kill");
        ok(kill.arg("-KILL").arg(pid.to_string()).output());
        let since = Instant::now();
        while self.is_running() {
            assert!(since.elapsed() < LIMIT, "{pid} does not end");
            std::thread::yield_now();
        }
    }

    /// A session as the administrator who was made up.
    pub fn log_in(&self) -> Client {
        let authority = tls::files::certificates(&self.dir.join("msa/ca.pem")).unwrap();
        let trust = tls::Trust::new(&authority, None).unwrap();
        let provider = tls::provider::ring();
        let config = tls::client_config(&provider, None, &trust, &[tls::Role::Msa]).unwrap();
        let mut client = Client::new(Server::new("127.0.0.1", self.port), Arc::new(config));
        let password = std::fs::read_to_string(self.dir.join("admin-password")).unwrap();
        let login = json!({"name": "admin", "password": password.trim()});
        let token = client.call("POST", "/login", Some(&login)).unwrap();
        client.token = Some(token["token"].as_str().unwrap().into());
        client
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_running() {
            self.kill_server();
        }
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("msa.log"));
            eprintln!("{}", log.unwrap_or_default());
        }
    }
}

/// A name server that knows one name; it lives as long as the test.
pub fn name_server(name: &str, address: [u8; 4]) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    let length = u8::try_from(name.len()).unwrap();
    let known = [&[length], name.as_bytes(), &[0]].concat();
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((n, from)) = socket.recv_from(&mut question) {
            let mut answer = question[..n].to_vec();
            answer[2] |= 0x80;
            if question[12..n].starts_with(&known) {
                answer[7] = 1;
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(address);
            } else {
                answer[3] |= 3; // no such name
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    at
}
