//! The management server and a simulated cluster, over VI-JSON and the server's real port: hosts fetch
//! the package from the server, and are enabled, upgraded and disabled by executions.
#![allow(clippy::unwrap_used)]

mod support;

use msa::clock::SystemClock;
use msa::connect::ViJson;
use msa::executions::table::{self, NewExecution};
use msa::outside::{Outside, Patience};
use msa::service::{self, Msa, PasswordCost};
use msa::store::Actor;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use support::{Site, server};

struct Managed {
    msa: Arc<Msa>,
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
            settle: Duration::from_secs(10),
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
            runtime: Some(runtime),
            _stop: stop,
            _dir: dir,
        };
        server::register(&managed.msa.store, managed.msa.data_dir(), site);
        managed.upload(site, "0.1.0-1");
        managed
    }

    fn upload(&self, site: &Site, version: &str) {
        server::upload(&self.msa.store, self.msa.data_dir(), site, version);
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
