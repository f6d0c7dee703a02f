//! The management server as a process that is killed (SIGKILL) again and again while it enables and disables
//! a simulated cluster over VI-JSON, and is started again: what it was asked for is done in the end, wholly.
//!
//! Each life of the process dies a little later than the one before it, so that all of an operation is cut
//! off somewhere, and nearly all of it several times. vCenter and hosts go on meanwhile.
#![allow(clippy::unwrap_used)]

mod support;

use msa::clock::{DAY_MS, SystemClock};
use msa::executions::Engine;
use msa::executions::table::{self, Execution, NewExecution};
use msa::service;
use msa::store::{Actor, Done, Store};
use msa::text::Id;
use msa::users;
use reqwest::blocking::Client;
use serde_json::{Value, json};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use support::{Site, server};
use vcenter::trust::Trust;

const HOSTS: [&str; 2] = ["10.7.0.1", "10.7.0.2"];
/// More than any operation here needs.
const MAX_LIVES: usize = 60;
/// The state is written so often, at least, before a server that starts has begun to work.
const WRITES_AT_START: usize = 3;

struct Killed {
    site: Site,
    folder: PathBuf,
    token: String,
    client: Client,
    port: u16,
    _dir: tempfile::TempDir,
}

/// A port that is free now.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn program() -> PathBuf {
    let own = Path::new(env!("CARGO_BIN_EXE_simcluster"));
    let path = own.with_file_name("msa");
    assert!(path.exists(), "{}: cargo build -p msa", path.display());
    path
}

impl Killed {
    fn new() -> Self {
        let site = Site::of(&HOSTS.map(str::to_owned));
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("msa");
        server::init(&folder);
        let store = Store::open(&folder, Arc::new(SystemClock)).unwrap();
        server::register(&store, &folder, &site);
        server::upload(&store, &folder, &site, "0.1.0-1");
        // A token that is there already: looking changes nothing, so that no write is counted but the work's.
        let now_ms = store.now_ms();
        let made = store.change(&Actor::system(), "create token", |t| {
            let admin = "admin".parse().unwrap();
            let (admin, _) = users::by_name(t, &admin)?.unwrap();
            let (_, token) = users::create_token(t, admin.id, "test", DAY_MS, now_ms)?;
            Ok(Done::new(token, "admin"))
        });
        let authority = std::fs::read(folder.join("ca.pem")).unwrap();
        let trust = Trust::authorities_of(&authority).unwrap();
        let client = Client::builder()
            .tls_backend_preconfigured(trust.client_config().unwrap())
            .no_proxy()
            .timeout(Duration::from_secs(10))
            .build();
        Self {
            site,
            folder,
            token: made.unwrap(),
            client: client.unwrap(),
            port: free_port(),
            _dir: dir,
        }
    }

    fn store(&self) -> Arc<Store> {
        Arc::new(Store::open(&self.folder, Arc::new(SystemClock)).unwrap())
    }

    fn submit(&self, kind: &str) -> Execution {
        let store = self.store();
        let engine = Engine::new(store, Arc::new(service::registry()), &self.folder);
        let mut parameters = json!({"protected_cluster": "One"});
        if kind == "enable-cluster" {
            parameters["min_hosts"] = json!(HOSTS.len());
            parameters["enrol"] = json!(false);
        }
        let name = kind.replace('-', "");
        let asked = json!({"name": name, "kind": kind, "parameters": parameters});
        let asked: NewExecution = serde_json::from_value(asked).unwrap();
        engine.submit(&Actor::system(), &asked).unwrap()
    }

    fn start(&self, fault: &str) -> Child {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.with_extension("log"));
        Command::new(program())
            .args(["run", "--watch-seconds", "0", "--listen"])
            .arg(format!("127.0.0.1:{}", self.port))
            .arg("--data-dir")
            .arg(&self.folder)
            .env("JETDR_FAULT", fault)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap()
    }

    /// Whether the server says that an execution has ended; nothing, if it does not answer.
    fn has_ended(&self, id: Id) -> Option<bool> {
        let url = format!("https://127.0.0.1:{}/api/v1/executions/{id}", self.port);
        let answer = self.client.get(url).bearer_auth(&self.token).send().ok()?;
        let text = answer.error_for_status().ok()?.text().ok()?;
        let execution: Value = serde_json::from_str(&text).unwrap();
        assert_ne!(execution["state"], "blocked", "{execution}");
        Some(execution["ended_at_ms"].is_i64())
    }

    /// One life of the server; true: it was killed, false: the work was done before.
    fn live(&self, id: Id, fault: &str) -> bool {
        let mut child = self.start(fault);
        let killed = self.site.wait("a death, or the end of the work", || {
            if let Some(status) = child.try_wait().unwrap() {
                let log = std::fs::read_to_string(self.folder.with_extension("log"));
                assert_eq!(status.signal(), Some(9), "{status}: {}", log.unwrap());
                return Some(true);
            }
            self.has_ended(id)?.then_some(false)
        });
        let _ = child.kill(); // it may be dead
        child.wait().unwrap();
        killed
    }

    /// Lets servers die at `fault`, one after the other, until the work is done; how many died.
    fn do_over(&self, kind: &str, fault: &dyn Fn(usize) -> String) -> usize {
        let execution = self.submit(kind);
        let lives = 1..MAX_LIVES;
        let deaths = lives.take_while(|life| self.live(execution.id, &fault(*life)));
        let deaths = deaths.count();
        let store = self.store();
        let read = store.read(|t| {
            let lines = table::lines(t, execution.id, 0, 1000)?;
            Ok((table::get(t, execution.id)?, lines))
        });
        let (ended, lines) = read.unwrap();
        let output: String = lines.into_iter().map(|line| line.text + "\n").collect();
        assert_eq!(ended.state.word(), "succeeded", "{kind}: {output}");
        assert_eq!(store.check().unwrap(), Vec::<String>::new());
        println!("{kind}, {}: {deaths} deaths", fault(1));
        deaths
    }

    fn hosts(&self) -> Vec<String> {
        let read = self.store().read(|t| {
            let hosts: Vec<msa::inventory::Host> = msa::inventory::list(t, 0, 99)?;
            Ok(hosts)
        });
        let hosts = read.unwrap().into_iter();
        hosts
            .map(|host| format!("{} {}", host.name, host.state))
            .collect()
    }

    /// A cluster is enabled and disabled under deaths at one point; at least so many each time.
    fn comes_and_goes(&self, fault: &dyn Fn(usize) -> String, at_least: usize) {
        let before = self.site.listings();
        let deaths = self.do_over("enable-cluster", fault);
        assert!(deaths >= at_least, "{deaths} deaths only");
        assert_eq!(self.hosts(), HOSTS.map(|name| format!("{name} ready")));
        for host in &self.site.hosts {
            assert!(self.site.has_daemon(host));
        }
        let deaths = self.do_over("disable-cluster", fault);
        assert!(deaths >= at_least, "{deaths} deaths only");
        assert_eq!(self.hosts(), HOSTS.map(|name| format!("{name} absent")));
        assert!(self.site.listings() == before, "something stays on a host");
    }
}

/// Each life does what comes next, and dies before what comes after that.
#[test]
fn before_each_action() {
    let fault = |_| "msa.execution.before-action:2".to_owned();
    Killed::new().comes_and_goes(&fault, 9);
}

/// Each life does again what the one before it did and could not note, does one more and cannot note it.
#[test]
fn after_each_action() {
    let fault = |_| "msa.execution.after-action:2".to_owned();
    Killed::new().comes_and_goes(&fault, 9);
}

/// Each life writes a little more of its state than the one before it.
#[test]
fn before_writes_of_the_state() {
    let fault = |life| format!("msa.before-commit:{}", WRITES_AT_START + 2 * life);
    Killed::new().comes_and_goes(&fault, 4);
}

#[test]
fn after_writes_of_the_state() {
    let fault = |life| format!("msa.after-commit:{}", WRITES_AT_START + 2 * life);
    Killed::new().comes_and_goes(&fault, 4);
}
