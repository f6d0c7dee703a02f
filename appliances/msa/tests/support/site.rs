//! A server's folder with a vCenter in it, and servers that come and go on it.

use super::fake::{self, World};
use msa::clock::{Clock, ManualClock};
use msa::executions::Engine;
use msa::executions::table::{self, Execution, NewExecution};
use msa::inventory::{self, NewVcenter, Vcenter};
use msa::outside::{self, Login};
use msa::store::{Actor, Done, Store};
use msa::{packages, service};
use rusqlite::params;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vib_packaging::{AcceptanceLevel, Builder, Format, Limits, component};

/// A package of a version, as small as can be.
pub fn vib(version: &str) -> Vec<u8> {
    let objects = component::Objects {
        library: b"a library".to_vec(),
        daemon: b"a daemon".to_vec(),
    };
    let level = AcceptanceLevel::Community;
    let builder = Builder {
        descriptor: component::descriptor(version, "2026-01-31T12:00:00+00:00", level),
        files: component::files(objects, version, component::Firewall::Outbound),
        payload: component::NAME.into(),
        format: Format::Vgz,
        limits: Limits::default(),
    };
    builder.build(None).unwrap().bytes().to_vec()
}

/// A folder as `init` makes it, with a vCenter and a login.
fn make_template() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::at(msa::clock::SystemClock.now_ms()));
    let folder = dir.path().join("msa");
    super::init(&folder);
    let store = Store::open(&folder, clock.clone()).unwrap();
    let new: NewVcenter = serde_json::from_value(json!({
        "name": "vc1", "address": "vc1.example.org", "port": 443, "fingerprint": null,
    }))
    .unwrap();
    let made = store.change(&Actor::system(), "create vCenter", |t| {
        let made: Vcenter = inventory::create(t, &new, clock.now_ms())?;
        Ok(Done::new(made.id, "vc1"))
    });
    let login = json!({"user": "jetdr@vsphere.local", "password": "vcenter secret"});
    let login: Login = serde_json::from_value(login).unwrap();
    outside::keep_login(&folder, made.unwrap(), &login).unwrap();
    dir
}

thread_local! {
    /// Made once, copied often; it goes with the test's thread.
    static TEMPLATE: tempfile::TempDir = make_template();
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

pub struct Site {
    pub dir: tempfile::TempDir,
    pub clock: Arc<ManualClock>,
    pub world: Arc<World>,
}

/// What runs on the folder just now.
pub struct Process {
    pub store: Arc<Store>,
    pub engine: Engine,
    world: Arc<World>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.world.forget_server();
    }
}

impl Site {
    pub fn new(hosts: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        TEMPLATE.with(|template| copy(template.path(), dir.path()));
        let clock = Arc::new(ManualClock::at(msa::clock::SystemClock.now_ms()));
        let world = World::new(hosts, clock.clone());
        Self { dir, clock, world }
    }

    /// The same with a package.
    pub fn with_package(hosts: usize) -> Self {
        let site = Self::new(hosts);
        site.start().upload(&site.folder(), "0.1.0-1");
        site
    }

    /// The same folder and the same vCenter once more, while no server runs: what becomes of the one is
    /// nothing to the other.
    pub fn copy(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(self.dir.path(), dir.path());
        let clock = Arc::new(ManualClock::at(self.clock.now_ms()));
        let state = self.world.state.lock().clone();
        let world = World::in_state(state, clock.clone());
        Self { dir, clock, world }
    }

    pub fn folder(&self) -> PathBuf {
        self.dir.path().join("msa")
    }

    pub fn start(&self) -> Process {
        let folder = self.folder();
        let store = Arc::new(Store::open(&folder, self.clock.clone()).unwrap());
        let outside = Arc::new(self.world.outside(&store, &folder));
        let registry = Arc::new(service::registry());
        let engine = Engine::new(store.clone(), registry, &folder).with_outside(outside);
        let world = self.world.clone();
        Process {
            store,
            engine,
            world,
        }
    }
}

impl Process {
    pub fn upload(&self, folder: &Path, version: &str) {
        let package = packages::take(folder, vib(version), self.store.now_ms()).unwrap();
        let done = self.store.change(&Actor::system(), "upload package", |t| {
            packages::insert(t, &package)?;
            Ok(Done::new((), version))
        });
        done.unwrap();
    }

    pub fn submit(&self, name: &str, kind: &str, parameters: &Value) -> Execution {
        let mut parameters = parameters.clone();
        let enrols = ["enable-cluster", "reconcile-cluster", "resolve-cluster"].contains(&kind);
        if enrols && parameters.get("enrol").is_none() {
            parameters["enrol"] = json!(true);
        }
        let asked = json!({"name": name, "kind": kind, "parameters": parameters});
        let new: NewExecution = serde_json::from_value(asked).unwrap();
        self.engine.submit(&Actor::system(), &new).unwrap()
    }

    /// Runs everything that is due.
    pub fn run(&self) {
        while let Some(mut active) = self.engine.take().unwrap() {
            self.engine.carry(&mut active).unwrap();
        }
    }

    pub fn get(&self, execution: &Execution) -> Execution {
        self.store.read(|t| table::get(t, execution.id)).unwrap()
    }

    pub fn output(&self, execution: &Execution) -> String {
        let lines = self
            .store
            .read(|t| table::lines(t, execution.id, 0, 1000))
            .unwrap();
        lines.into_iter().map(|line| line.text + "\n").collect()
    }

    /// Submits and runs; how it ended, its error and its output.
    pub fn done(&self, name: &str, kind: &str, parameters: &Value) -> (String, String, String) {
        let execution = self.submit(name, kind, parameters);
        self.run();
        let ended = self.get(&execution);
        let error = ended.error.unwrap_or_default();
        (ended.state.word().into(), error, self.output(&execution))
    }

    /// Submits and runs one that is to succeed; its output.
    pub fn succeeds(&self, name: &str, kind: &str, parameters: &Value) -> String {
        let (state, error, output) = self.done(name, kind, parameters);
        assert_eq!(state, "succeeded", "{error}\n{output}");
        output
    }

    fn texts(&self, sql: &str) -> Vec<String> {
        let read = self.store.read(|t| {
            let mut statement = t.prepare(sql)?;
            let rows = statement.query_map([], |row| row.get(0))?;
            Ok(rows.collect::<rusqlite::Result<Vec<String>>>()?)
        });
        read.unwrap()
    }

    /// `Gold enabled 0.1.0-1`
    pub fn clusters(&self) -> Vec<String> {
        self.texts(
            "SELECT clusters.name || ' ' || state || ' ' || coalesce(version, '-') FROM clusters \
             LEFT JOIN packages ON packages.id = package_id",
        )
    }

    /// `esx1 ready`, with the appliance if there is one.
    pub fn hosts(&self) -> Vec<String> {
        self.texts(
            "SELECT hosts.name || ' ' || state || coalesce(' ' || drvas.name, '') FROM hosts \
             LEFT JOIN drvas ON drvas.id = drva_id ORDER BY hosts.name",
        )
    }

    /// Every certificate in force lies on its host: none is left to one that lost it with the component.
    pub fn all_hold_theirs(&self, hint: &str) {
        let in_force = self.texts(
            "SELECT hosts.moid || ' ' || serial FROM certificates JOIN hosts ON hosts.id = entity_id \
             WHERE revoked_at_ms IS NULL ORDER BY hosts.moid",
        );
        let state = self.world.state.lock();
        let held = state.hosts.iter().filter_map(|(moid, host)| {
            let serial = host.certificate.as_ref()?;
            Some(format!("{moid} {serial}"))
        });
        let held: Vec<String> = held.collect();
        let lost: Vec<&String> = in_force.iter().filter(|one| !held.contains(one)).collect();
        assert!(lost.is_empty(), "{hint}: not on their hosts: {lost:?}");
    }

    /// What is wrong with hosts: `esx1: it has no certificate...`
    pub fn problems(&self) -> Vec<String> {
        self.texts(
            "SELECT name || ': ' || problem FROM hosts WHERE problem IS NOT NULL ORDER BY name",
        )
    }

    /// Hosts with a certificate in force.
    pub fn enrolled(&self) -> Vec<String> {
        self.texts(
            "SELECT hosts.name FROM certificates JOIN hosts ON hosts.id = entity_id \
             WHERE revoked_at_ms IS NULL ORDER BY hosts.name",
        )
    }

    pub fn certificates_in_force(&self) -> usize {
        let sql = "SELECT serial FROM certificates WHERE role = 'host' AND revoked_at_ms IS NULL";
        self.texts(sql).len()
    }

    pub fn open_alarms(&self) -> Vec<String> {
        self.texts("SELECT kind || ' ' || subject FROM alarms WHERE cleared_at_ms IS NULL")
    }

    pub fn tokens(&self) -> usize {
        self.texts("SELECT id FROM enrolments WHERE serial IS NULL")
            .len()
    }

    pub fn make_drva(&self, name: &str, port: u16) {
        let new = json!({"name": name, "address": "10.0.0.9", "port_base": port});
        let new: inventory::NewDrva = serde_json::from_value(new).unwrap();
        let now_ms = self.store.now_ms();
        let made = self
            .store
            .change(&Actor::system(), "create appliance", |t| {
                let _: inventory::Drva = inventory::create(t, &new, now_ms)?;
                Ok(Done::new((), name))
            });
        made.unwrap();
    }

    /// A protected machine in the state, and the filter on its disk.
    pub fn protect(&self, vm: &str) {
        self.world
            .state
            .lock()
            .vms
            .get_mut(vm)
            .unwrap()
            .insert(2000, true);
        let sql_site = "INSERT OR IGNORE INTO sites (id, name, store, created_at_ms) VALUES ('5f0e1c52-0000-4000-8000-000000000001', 's', '/s', 0)";
        let done = self.store.record(|t| {
            t.execute(sql_site, [])?;
            let drva: String = t.query_row("SELECT id FROM drvas LIMIT 1", [], |row| row.get(0))?;
            t.execute(
                "INSERT OR IGNORE INTO log_volumes (id, drva_id, name, path, capacity_bytes, created_at_ms) \
                 VALUES ('5f0e1c52-0000-4000-8000-000000000002', ?1, 'v', '/v', 67108864, 0)",
                [&drva],
            )?;
            t.execute(
                "INSERT OR IGNORE INTO domains (id, name, site_id, drva_id, log_volume_id, ack, created_at_ms) \
                 VALUES ('5f0e1c52-0000-4000-8000-000000000003', 'shop', '5f0e1c52-0000-4000-8000-000000000001', ?1, \
                 '5f0e1c52-0000-4000-8000-000000000002', 'host', 0)",
                [&drva],
            )?;
            t.execute(
                "INSERT INTO vms (id, cluster_id, moid, name, uuid, domain_id, state, created_at_ms) \
                 SELECT ?1, id, ?2, 'Web ' || ?2, ?1, '5f0e1c52-0000-4000-8000-000000000003', 'recoverable', 0 \
                 FROM clusters",
                params![uuid::Uuid::new_v4().to_string(), vm],
            )?;
            Ok(())
        });
        done.unwrap();
    }
}

pub fn cluster() -> Value {
    json!({"protected_cluster": fake::CLUSTER_NAME})
}
