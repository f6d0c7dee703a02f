//! A cluster that is enabled, an appliance with a certificate that reports, and a domain of it.

use super::appliance::{Appliance, Stand};
use super::fake::World;
use super::site::{Process, Site, cluster};
use msa::authority::{Authority, Request};
use msa::certificates::{self, CertificateRole};
use msa::inventory::{self, Domain, Drva, Entity, LogVolume, Site as StorageSite, Vm};
use msa::store::{Actor, Done};
use msa::text::Id;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub fn create<E: Entity>(process: &Process, new: Value) -> E {
    let new: E::New = serde_json::from_value(new).unwrap();
    let now_ms = process.store.now_ms();
    let made = process.store.change(&Actor::system(), "create", |t| {
        Ok(Done::new(inventory::create::<E>(t, &new, now_ms)?, "it"))
    });
    made.unwrap()
}

/// Gives an appliance its certificate.
pub fn enrol(site: &Site, process: &Process, drva: Id) {
    let (_, request) = super::request();
    let request = Request::parse(&request).unwrap();
    let authority = Authority::load(&site.folder()).unwrap();
    let now_ms = process.store.now_ms();
    let done = process.store.change(&Actor::system(), "enrol", |t| {
        let role = CertificateRole::Drva;
        let token = certificates::make_token(t, role, drva, 60, now_ms).unwrap();
        certificates::enrol(t, &authority, &token.token, &request, now_ms).unwrap();
        Ok(Done::new((), "an appliance"))
    });
    done.unwrap();
}

/// A domain of this name on an appliance.
pub fn domain(process: &Process, drva: Id, name: &str) -> Domain {
    let site = json!({"name": format!("site-{name}"), "store": format!("/srv/{name}")});
    let site: StorageSite = create(process, site);
    let volume = json!({"drva_id": drva, "name": format!("log-{name}"),
        "path": format!("/log/{name}"), "capacity_bytes": 1u64 << 30});
    let volume: LogVolume = create(process, volume);
    create(
        process,
        json!({"name": name, "site_id": site.id, "drva_id": drva,
        "log_volume_id": volume.id, "ack": "log", "defer_budget_us": 4000, "ack_budget_us": null}),
    )
}

/// The cluster is enabled, the domain `shop` is there, its appliance reports.
pub fn begin() -> (Site, Process, Domain) {
    let site = Site::with_package(3);
    let process = site.start();
    let drva: Drva = create(
        &process,
        json!({"name": "drva1", "address": "10.0.0.9", "port_base": 32873}),
    );
    process.succeeds("enable", "enable-cluster", &cluster());
    enrol(&site, &process, drva.id);
    let shop = domain(&process, drva.id, "shop");
    *site.world.appliance.lock() = Some(Appliance::new(drva.id));
    site.world.report();
    site.world.state.lock().asked.clear();
    (site, process, shop)
}

pub fn stand(site: &Site, stand: Stand) {
    site.world.appliance.lock().as_mut().unwrap().stand = stand;
    site.world.report();
}

pub fn vms(process: &Process) -> Vec<Vm> {
    process
        .store
        .read(|t| inventory::list::<Vm>(t, 0, 1000))
        .unwrap()
}

/// `Web vm-1 recoverable`
pub fn states(process: &Process) -> Vec<String> {
    let all = vms(process);
    let words = all.iter().map(|vm| format!("{} {}", vm.name, vm.state));
    words.collect()
}

/// An appliance that reports while it is there: an operation may wait for what it says.
pub struct Reporting {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Reporting {
    pub fn of(world: &Arc<World>) -> Self {
        let stop: Arc<AtomicBool> = Arc::default();
        let (world, stopped) = (world.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                world.report();
                std::thread::sleep(Duration::from_millis(2)); // time under test: its interval
            }
        });
        let thread = Some(thread);
        Self { stop, thread }
    }
}

impl Drop for Reporting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
