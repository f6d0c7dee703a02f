//! A site in this process, a client that speaks to it over its real port, packages, and a web server.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

pub mod server;
pub mod web;

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use simcluster::host::listing;
use simcluster::{DiskSpec, HostSpec, MachineSpec, Options, Server, World};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vcenter::trust::Trust;
use vcenter::{Client, Fault, Login, Moid, TaskId, TaskState, Vcenter};
use vib_packaging::component::{self, Firewall, Objects};
use vib_packaging::{AcceptanceLevel, Builder, Format, Limits, Signer};
use web::Web;

pub const LIMIT: Duration = Duration::from_secs(60);
pub const USER: &str = "administrator@vsphere.local";
pub const PASSWORD: &str = "simulated";
pub const FILTER: &str = "JetDR_jetdr_0.1.0-1";
const DATE: &str = "2026-01-31T12:00:00Z";

/// Library and daemon as a host gets them (`make host-objects`), or this build's own.
fn objects() -> Objects {
    let debug = Path::new(env!("CARGO_BIN_EXE_simcluster"))
        .parent()
        .unwrap();
    let shipped = debug.parent().unwrap().join("host-objects");
    let (library, daemon) = match shipped.join("iofilterd-jetdr").exists() {
        true => (
            shipped.join("libvmiof-disk-jetdr.so"),
            shipped.join("iofilterd-jetdr"),
        ),
        false => (debug.join("libvaio_shim.so"), debug.join("iofilterd-jetdr")),
    };
    let read = |path: &Path| {
        let folder = tempfile::tempdir().unwrap();
        let small = folder.path().join("stripped");
        // Most of what is built for tests is for debuggers; packing that takes seconds.
        let mut strip = Command::new("strip");
        let strip = strip.arg("-o").arg(&small).arg(path).output();
        let is_small = strip.is_ok_and(|output| output.status.success());
        let from = if is_small { &small } else { path };
        std::fs::read(from).unwrap_or_else(|error| {
            panic!(
                "{}: {error}: cargo build -p vaio-shim -p filter-daemon",
                path.display()
            )
        })
    };
    Objects {
        library: read(&library),
        daemon: read(&daemon),
    }
}

/// Somebody who signs packages: key and certificate in PEM.
pub struct Packager {
    key: String,
    pub certificate: String,
}

impl Packager {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
        let certificate = params.self_signed(&key).unwrap();
        Self {
            key: key.serialize_pem(),
            certificate: certificate.pem(),
        }
    }

    /// The project's package. `change`: of what it says of itself.
    pub fn package_as(
        &self,
        version: &str,
        change: impl FnOnce(&mut vib_packaging::Descriptor),
    ) -> Vec<u8> {
        self.package_for(version, component::MSA_PORT, change)
    }

    /// The same, for a management server at this port.
    pub fn package_for(
        &self,
        version: &str,
        msa_port: u16,
        change: impl FnOnce(&mut vib_packaging::Descriptor),
    ) -> Vec<u8> {
        let mut descriptor = component::descriptor(version, DATE, AcceptanceLevel::Partner);
        change(&mut descriptor);
        let builder = Builder {
            descriptor,
            files: component::files_for(objects(), version, Firewall::Outbound, msa_port),
            payload: "jetdr".into(),
            format: Format::Vgz,
            limits: Limits::default(),
        };
        let signer = Signer::from_pem(
            ("key", self.key.as_bytes()),
            ("cert", self.certificate.as_bytes()),
        );
        let vib = builder.build(Some(&signer.unwrap())).unwrap();
        vib.bytes().to_vec()
    }

    pub fn package(&self, version: &str) -> Vec<u8> {
        self.package_as(version, |_| {})
    }
}

/// What lies in a root.
pub type Listing = Vec<(PathBuf, u32, Vec<u8>)>;

pub struct Site {
    pub client: Client,
    pub server: Server,
    pub world: Arc<World>,
    pub web: Web,
    pub packager: Packager,
    pub cluster: Moid,
    pub hosts: Vec<String>,
    pub dir: tempfile::TempDir,
}

impl Site {
    /// A cluster `One` of so many hosts; the package is at `/jetdr.vib`.
    pub fn new(hosts: usize) -> Self {
        let names = (1..=hosts).map(|number| format!("esx-{number}"));
        Self::of(&names.collect::<Vec<_>>())
    }

    /// The same with hosts of these names.
    pub fn of(hosts: &[String]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("jd-")
            .tempdir_in("/dev/shm")
            .unwrap();
        let packager = Packager::new();
        let world = World::new(Options {
            folder: dir.path().join("s"),
            program: env!("CARGO_BIN_EXE_simcluster").into(),
            prefix: Vec::new(),
            signers: Some(packager.certificate.clone().into_bytes()),
            user: USER.into(),
            password: PASSWORD.into(),
        })
        .unwrap();
        let server = Server::start(world.clone(), "127.0.0.1:0".parse().unwrap()).unwrap();
        let cluster: Moid = world.add_cluster("One", true).unwrap().parse().unwrap();
        let client = client_of(&server, PASSWORD);
        let mut site = Self {
            client,
            server,
            world,
            web: Web::start(),
            packager,
            cluster,
            hosts: Vec::new(),
            dir,
        };
        for name in hosts {
            let host = site.host(name, |_| {});
            site.join(&host);
            site.hosts.push(host);
        }
        let package = site.packager.package("0.1.0-1");
        site.web.put("/jetdr.vib", package);
        site
    }

    /// Makes a host that is in no cluster.
    pub fn host(&self, name: &str, change: impl FnOnce(&mut HostSpec)) -> String {
        let mut spec = HostSpec {
            name: name.into(),
            ..HostSpec::default()
        };
        change(&mut spec);
        self.world.add_host(&spec).unwrap()
    }

    pub fn join(&self, host: &str) {
        let task = self.world.join(host, self.cluster.as_str()).unwrap();
        assert_eq!(
            simcluster::control::wait(&self.world, &task)["state"],
            "success"
        );
    }

    pub fn url(&self) -> String {
        self.web.url("/jetdr.vib")
    }

    /// Installs the package, which succeeds.
    pub fn install(&self) {
        let task = self.start_install(&self.url());
        self.succeeds(&task);
    }

    pub fn start_install(&self, url: &str) -> TaskId {
        let trust = vcenter::VibTrust::HostAuthorities;
        self.client
            .install_filter(&self.cluster, url, &trust)
            .unwrap()
    }

    pub fn root(&self, host: &str) -> PathBuf {
        self.world.host(host).unwrap().root()
    }

    /// What lies in a host's root; logs are none of a package's business while it is there.
    pub fn listing(&self, host: &str) -> Listing {
        listing(&self.root(host)).unwrap()
    }

    pub fn listings(&self) -> Vec<Listing> {
        self.hosts.iter().map(|host| self.listing(host)).collect()
    }

    /// Waits for a task's end.
    pub fn end(&self, task: &TaskId) -> TaskState {
        self.wait("a task's end", || match self.client.task(task).unwrap() {
            TaskState::Queued | TaskState::Running(_) => None,
            end => Some(end),
        })
    }

    pub fn succeeds(&self, task: &TaskId) {
        let end = self.end(task);
        assert_eq!(
            end,
            TaskState::Success,
            "{:?}",
            self.client.filter_issues(&self.cluster, FILTER)
        );
    }

    /// Its words.
    pub fn fails(&self, task: &TaskId) -> String {
        match self.end(task) {
            TaskState::Error(fault) => fault.to_string(),
            end => panic!("{end:?}"),
        }
    }

    pub fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(since.elapsed() < LIMIT, "not in time: {what}");
            std::thread::sleep(Duration::from_millis(5)); // poll of a server
        }
    }

    /// What is wrong with the filter, host by host.
    pub fn issues(&self, filter: &str) -> Vec<(String, String)> {
        let issues = self.client.filter_issues(&self.cluster, filter).unwrap();
        let words = |one: vcenter::HostIssue| (one.host.to_string(), one.issues.join("; "));
        issues.hosts.into_iter().map(words).collect()
    }

    /// Whether the daemon runs on a host, by its init script.
    pub fn has_daemon(&self, host: &str) -> bool {
        let host = self.world.host(host).unwrap();
        host.script("iofilterd-jetdr", &["status"])
            .is_ok_and(|output| output.status.success())
    }

    /// A connection of a process of a host: from where it came, or how it was refused.
    pub fn probe(&self, host: &str, to: std::net::SocketAddr) -> Result<String, String> {
        let host = self.world.host(host).unwrap();
        let output = host
            .own_command(&["probe", &to.to_string()])
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr)),
        }
    }

    /// A machine of so many disks of 8 MiB, on a host.
    pub fn vm(&self, name: &str, host: &str, disks: usize) -> Moid {
        let disk = DiskSpec {
            bytes: 8 << 20,
            shared: false,
            physical_rdm: false,
        };
        let spec = MachineSpec {
            name: name.into(),
            host: host.into(),
            disks: vec![disk; disks],
            snapshots: false,
        };
        self.world.add_vm(&spec).unwrap().parse().unwrap()
    }

    /// Powers a machine on or off.
    pub fn power(&self, vm: &Moid, is_on: bool) {
        let task = self.world.power(vm.as_str(), is_on).unwrap();
        let end = simcluster::control::wait(&self.world, &task);
        assert_eq!(end["state"], "success", "{end}");
    }

    /// The host that a machine is on.
    pub fn host_of(&self, vm: &Moid) -> String {
        self.world.machine(vm.as_str()).unwrap().host
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.world.stop();
        if std::thread::panicking() {
            for entry in walk(self.dir.path())
                .into_iter()
                .filter(|path| path.extension().is_some_and(|end| end == "log"))
            {
                let text = std::fs::read_to_string(&entry).unwrap_or_default();
                eprintln!("--- {}\n{text}", entry.display());
            }
        }
    }
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let Ok(all) = std::fs::read_dir(folder) else {
        return vec![folder.to_owned()];
    };
    all.flatten()
        .flat_map(|entry| walk(&entry.path()))
        .collect()
}

pub fn client_of(server: &Server, password: &str) -> Client {
    let trust = Trust::authorities_of(server.certificate.as_bytes()).unwrap();
    Client::new(Login {
        address: server.address.to_string(),
        user: USER.into(),
        password: password.into(),
        trust,
    })
    .unwrap()
}

/// A fault without its words.
pub fn kind(fault: &Fault) -> &'static str {
    match fault {
        Fault::InvalidArgument(_) => "InvalidArgument",
        Fault::AlreadyExists => "AlreadyExists",
        Fault::NotFound(_) => "NotFound",
        Fault::FilterInUse(_) => "FilterInUse",
        Fault::InvalidState(_) => "InvalidState",
        Fault::NotAuthenticated => "NotAuthenticated",
        Fault::NoPermission(_) => "NoPermission",
        Fault::Other(_) => "Other",
    }
}

pub fn refused<T: std::fmt::Debug>(answer: Result<T, Fault>) -> &'static str {
    kind(&answer.unwrap_err())
}
