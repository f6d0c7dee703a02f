//! The management server and a simulated cluster, over VI-JSON and the server's real port: hosts fetch
//! the package from the server, and are enabled, upgraded and disabled by executions.
#![allow(clippy::unwrap_used)]

mod support;

use msa::certificates::{self, CertificateRole};
use msa::clock::SystemClock;
use msa::connect::ViJson;
use msa::executions::table::{self, NewExecution};
use msa::inventory;
use msa::outside::{Outside, Patience};
use msa::service::{self, Msa, PasswordCost};
use msa::store::{Actor, Done};
use serde_json::json;
use std::collections::HashSet;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;
use support::{LIMIT, Site, server};
use tls::{Folder, Identity, Peers, Role, ServerTls};

/// The option by which hosts are invited.
const OPTION: &str = "UserVars.JetdrEnrolment";

struct Managed {
    msa: Arc<Msa>,
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
    _stop: tokio::sync::watch::Sender<bool>,
    _dir: tempfile::TempDir,
}

impl Drop for Managed {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Managed {
    /// A server that knows the site's vCenter by its fingerprint, and its package.
    fn new(site: &Site) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("msa");
        server::init(&folder);
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
        let managed = Self {
            msa,
            address,
            runtime: Some(runtime),
            _stop: stop,
            _dir: dir,
        };
        server::register(&managed.msa.store, managed.msa.data_dir(), site);
        managed.upload(site, "0.1.0-1");
        managed
    }

    fn upload(&self, site: &Site, version: &str) {
        let (msa, port) = (&self.msa, self.address.port());
        server::upload_for(&msa.store, msa.data_dir(), site, version, port);
    }

    /// Runs an execution; how it ended, and its output with its error.
    fn run(&self, name: &str, kind: &str) -> (String, String) {
        let parameters = json!({"protected_cluster": "One"});
        let asked = json!({"name": name, "kind": kind, "parameters": parameters});
        let new: NewExecution = serde_json::from_value(asked).unwrap();
        let execution = self.msa.engine.submit(&Actor::system(), &new).unwrap();
        while let Some(mut active) = self.msa.engine.take().unwrap() {
            self.msa.engine.carry(&mut active).unwrap();
        }
        let read = self.msa.store.read(|t| {
            let lines = table::lines(t, execution.id, 0, 1000)?;
            Ok((table::get(t, execution.id)?, lines))
        });
        let (ended, lines) = read.unwrap();
        let mut output: String = lines.into_iter().map(|line| line.text + "\n").collect();
        output.push_str(&ended.error.unwrap_or_default());
        (ended.state.word().into(), output)
    }

    /// An appliance with a certificate of its own, in a folder.
    fn appliance(&self, address: SocketAddr, dir: &std::path::Path) -> Folder {
        let store = &self.msa.store;
        let now_ms = store.now_ms();
        let new = json!({"name": "dr1", "address": address.ip(), "port_base": address.port()});
        let new: inventory::NewDrva = serde_json::from_value(new).unwrap();
        let mut token = None;
        let made = store.change(&Actor::system(), "create appliance", |t| {
            let made: inventory::Drva = inventory::create(t, &new, now_ms)?;
            let asked = certificates::make_token(t, CertificateRole::Drva, made.id, 5, now_ms);
            token = Some(asked.unwrap().token);
            Ok(Done::new((), "dr1"))
        });
        made.unwrap();
        let folder = Folder::at(dir);
        folder.make().unwrap();
        let ca = std::fs::read(self.msa.data_dir().join("ca.pem")).unwrap();
        let server = format!("https://{}", self.address).parse().unwrap();
        let token = token.unwrap();
        enrol::steps::enrol(&folder, &server, &token, Some(&ca), &[Role::Drva]).unwrap();
        folder
    }

    /// The numbers of the certificates that hosts have.
    fn host_serials(&self, site: &Site) -> Vec<Vec<u8>> {
        let own = |host: &String| {
            let folder = Folder::at(site.root(host).join("etc/config/jetdr/tls"));
            let own = folder.files().own().unwrap();
            tls::identity::serial_of(&own.chain[0]).unwrap()
        };
        site.hosts.iter().map(own).collect()
    }

    fn succeeds(&self, name: &str, kind: &str) -> String {
        let (state, output) = self.run(name, kind);
        assert_eq!(state, "succeeded", "{kind}: {output}");
        output
    }
}

#[test]
fn a_cluster_is_enabled_upgraded_and_disabled_and_nothing_is_left() {
    let site = Site::new(3);
    let managed = Managed::new(&site);
    managed.succeeds("look", "preflight-install");
    let before = site.listings();
    let output = managed.succeeds("enable", "enable-cluster");
    assert!(output.contains("3 of 3 hosts are ready"), "{output}");
    for host in &site.hosts {
        assert!(site.has_daemon(host));
    }
    managed.upload(&site, "0.2.0-1");
    let output = managed.succeeds("upgrade", "upgrade-cluster");
    assert!(
        output.contains("cluster One has version 0.2.0-1"),
        "{output}"
    );
    assert!(
        output.contains("host esx-3: package 0.2.0-1, daemon up"),
        "{output}"
    );
    let output = managed.succeeds("disable", "disable-cluster");
    assert!(output.contains("its ports are closed"), "{output}");
    assert_eq!(site.listings(), before);
}

/// Which hosts show their certificates at a listener, until so many have.
fn who_comes(listener: &TcpListener, tls: &ServerTls, hosts: usize) -> HashSet<Identity> {
    let mut came = HashSet::new();
    while came.len() < hosts {
        let (mut socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let mut connection = rustls::ServerConnection::new(tls.config()).unwrap();
        while connection.is_handshaking() {
            connection.complete_io(&mut socket).unwrap();
        }
        came.insert(tls::peer_of(&connection).unwrap().unwrap().identity);
    }
    came
}

#[test]
fn hosts_are_invited_get_certificates_and_lose_them_with_the_cluster() {
    let site = Site::new(3);
    let managed = Managed::new(&site);
    let number = std::process::id();
    let address = format!("127.31.{}.{}", number >> 8 & 255, number & 255);
    let listener = TcpListener::bind((address.as_str(), 32873)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let folder = managed.appliance(listener.local_addr().unwrap(), dir.path());
    let before = site.listings();
    let output = managed.succeeds("enable", "enable-cluster");
    assert!(
        output.contains("host esx-2 has its certificate"),
        "{output}"
    );
    // No host has a secret left where vCenter's users see it, nor a token.
    for host in &site.hosts {
        let options = site.world.host(host).unwrap().options();
        assert_eq!(options.get(OPTION).map(String::as_str), Some(""));
        let tls = Folder::at(site.root(host).join("etc/config/jetdr/tls"));
        assert!(!tls.token().exists() && !tls.asked().exists());
    }
    // Their daemons come to their appliance with these certificates.
    let provider = tls::provider::ring();
    let peers = Peers::Only(&[Role::Host]);
    let tls = ServerTls::load(provider, folder.files(), Role::Drva, peers).unwrap();
    let came = who_comes(&listener, &tls, 3);
    let rows = managed.msa.store.read(|t| {
        let mut query = t.prepare("SELECT id FROM hosts WHERE state = 'ready'")?;
        let ids = query.query_map([], |row| row.get::<_, msa::text::Id>(0))?;
        Ok(ids.collect::<Result<Vec<_>, _>>()?)
    });
    let rows = rows.unwrap().into_iter();
    let rows: HashSet<Identity> = rows.map(|id| Identity::new(Role::Host, id.0)).collect();
    assert_eq!(came, rows);
    let serials = managed.host_serials(&site);
    managed.succeeds("disable", "disable-cluster");
    let list = managed.msa.revocation_list().to_vec();
    for serial in &serials {
        assert!(tls::files::is_on_list(&list, serial));
    }
    assert_eq!(site.listings(), before);
    // Once more: new certificates.
    managed.succeeds("again", "enable-cluster");
    for serial in managed.host_serials(&site) {
        assert!(!serials.contains(&serial) && !tls::files::is_on_list(&list, &serial));
    }
}

#[test]
fn a_host_out_of_reach_and_a_wrong_clock_are_found() {
    let site = Site::new(3);
    let managed = Managed::new(&site);
    let host = site.world.host(&site.hosts[1]).unwrap();
    host.set(|settings| settings.clock_ahead_ms = 5000);
    let (state, output) = managed.run("clock", "enable-cluster");
    assert_eq!(state, "failed", "{output}");
    assert!(output.contains("host esx-2: its clock is"), "{output}");
    host.set(|settings| {
        settings.clock_ahead_ms = 0;
        settings.is_reachable = false;
    });
    let (_, output) = managed.run("away", "preflight-install");
    assert!(
        output.contains("esx-2: vCenter does not reach it"),
        "{output}"
    );
    assert!(output.contains("[host-unreachable]"), "{output}");
}
