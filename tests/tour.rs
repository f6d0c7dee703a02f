//! The tour: a cluster of four hosts with eight machines, whose guests write all the time. It is enabled and
//! protected; a machine moves, a host joins, one is booted, the component is upgraded, a machine is recovered;
//! and in the end nothing is left. Each step by `jetdr` or by REST, as an operator does it.
#![allow(clippy::unwrap_used)]

#[path = "tour/guests.rs"]
mod guests;
#[path = "install/place.rs"]
mod place;
mod support;

use enrol::http::Client;
use guests::Guest;
use place::{Place, Vcenter};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Instant;
use support::{LIMIT, Part, jetdr};

const PORT_BASE: u16 = 32_873;
const DISK_BYTES: u64 = 8 << 20;

/// An address of this machine that no other test's appliance has.
fn address() -> IpAddr {
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 94, high, low.max(1)).into()
}

/// A server that is installed, and an operator of it.
struct Tour {
    vcenter: Vcenter,
    place: Place,
    client: Client,
    token: PathBuf,
}

impl Tour {
    fn command(&self, name: &str, more: &[&str]) -> Output {
        let mut command = jetdr();
        command.arg(name).args(more);
        let url = format!("https://localhost:{}", self.place.port);
        command.env("JETDR_MSA", url);
        command.env("JETDR_CA", self.place.dir.join("msa/ca.pem"));
        command.env("JETDR_TOKEN_FILE", &self.token);
        command.output().unwrap()
    }

    fn does(&self, name: &str, more: &[&str]) -> String {
        let output = self.command(name, more);
        let said = place::said(&output);
        assert!(output.status.success(), "{name}: {said}");
        said
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let answer = self.client.call("POST", path, Some(body));
        answer.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            if since.elapsed() > 2 * LIMIT {
                let now = self.command("protection", &[]);
                panic!("not in time: {what}\n{}", place::said(&now));
            }
            std::thread::sleep(std::time::Duration::from_millis(100)); // poll of a server
        }
    }

    /// The domain's machines are recoverable, as of now or later.
    fn wait_recoverable(&self, domain: &Value) {
        let path = format!("/domains/{}/protection", domain["id"].as_str().unwrap());
        let now_ms = i64::try_from(now_ms()).unwrap();
        self.wait("all machines are recoverable", || {
            let seen = self.client.call("GET", &path, None).unwrap();
            let vms = seen["vms"].as_array().unwrap();
            let good = |vm: &Value| {
                let since_ms = vm["recoverable_at_ms"].as_i64();
                vm["state"] == "recoverable" && since_ms >= Some(now_ms)
            };
            (vms.len() == 8 && vms.iter().all(good)).then_some(())
        });
        let shown = self.does("protection", &["--domain", "shop"]);
        assert_eq!(shown.matches(": recoverable,").count(), 8, "{shown}");
    }

    /// Site, appliance with its certificate, log volume and domain. The appliance runs.
    fn domain(&self, folder: &Path) -> (Value, Part) {
        let drva = json!({"name": "dr", "address": address(), "port_base": PORT_BASE});
        let drva = self.post("/drvas", &drva);
        let (store, data) = (folder.join("store"), folder.join("drva"));
        let site = self.post("/sites", &json!({"name": "box", "store": store}));
        let volume = json!({"drva_id": drva["id"], "name": "fast", "path": data,
            "capacity_bytes": 1u64 << 30});
        let volume = self.post("/log-volumes", &volume);
        let domain = json!({"name": "shop", "site_id": site["id"], "drva_id": drva["id"],
            "log_volume_id": volume["id"], "ack": "host"});
        let domain = self.post("/domains", &domain);
        let asked = json!({"role": "drva", "entity_id": drva["id"]});
        let token = self.post("/enrolments", &asked)["token"].clone();
        let tls = folder.join("tls");
        std::fs::create_dir(&tls).unwrap();
        std::fs::copy(self.place.dir.join("msa/ca.pem"), tls.join("ca.pem")).unwrap();
        std::fs::write(tls.join("token"), token.as_str().unwrap()).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let arguments = [
            "drva".into(),
            "--msa".into(),
            format!("https://localhost:{}", self.place.port),
            "--msa-poll-s=1".into(),
            "--tls-dir".into(),
            text(&tls),
            "--listen".into(),
            address().to_string(),
            "--store".into(),
            text(&store),
            "--data-dir".into(),
            text(&data),
            "--log-max-bytes".into(),
            (1u64 << 30).to_string(),
            "--cut-interval-ms=500".into(),
        ];
        let part = Part::start(&folder.join("drva.log"), &arguments);
        (domain, part)
    }

    fn hosts_ready(&self, count: usize) {
        self.wait("all hosts are ready", || {
            let hosts = self.client.call("GET", "/hosts?limit=50", None).unwrap();
            let hosts = hosts["items"].as_array().unwrap();
            let good = hosts.iter().filter(|host| host["state"] == "ready");
            (good.filter(|host| host["drva_id"].is_string()).count() == count).then_some(())
        });
    }
}

fn now_ms() -> u128 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_millis()
}

/// The machine's disk as the store has it.
fn recovered(store: &Path, vm: &str, out: &Path) -> Vec<u8> {
    let mut command = jetdr();
    command.args(["rocva", "recover", "--disk", &format!("{vm}/disk0")]);
    command.arg("--from").arg(store).arg("--out").arg(out);
    support::ok(command.output());
    std::fs::read(support::find(out, "disk0.raw")).unwrap()
}

#[test]
fn a_cluster_is_protected_through_everything_and_then_is_as_before() {
    let mut vcenter = Vcenter::of(4);
    // In no cluster yet: made before the roots are looked at.
    let fifth = vcenter.new_host();
    let before = vcenter.seen();
    let place = Place::new(&vcenter);
    let package = |version| {
        let path = vcenter.package_for(version, place.port);
        path.to_str().unwrap().to_owned()
    };
    let (first, second) = (package("0.1.0-1"), package("0.2.0-1"));
    let mut guests: Vec<Guest> = (0..8)
        .map(|number| Guest::new(&vcenter, number, DISK_BYTES))
        .collect();

    // Install, enable.
    let output = place.installs(&["--package", &first, "--min-hosts", "4"]);
    assert!(output.contains("4 of 4 hosts are ready"), "{output}");
    assert!(vcenter.listings() != before.roots());
    let client = place.log_in();
    let token = place.file("token", client.token.as_deref().unwrap());
    let tour = Tour {
        vcenter,
        place,
        client,
        token,
    };
    let folder = tempfile::tempdir().unwrap();
    let (domain, mut drva) = tour.domain(folder.path());
    tour.does(
        "resolve-cluster",
        &["--protected-cluster", "One", "--drva", "dr"],
    );
    tour.hosts_ready(4);

    // Protect.
    let names: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    let mut all = vec!["--domain", "shop"];
    all.extend(names.iter().flat_map(|name| ["--vm", name.as_str()]));
    tour.does("protect-vm", &all);
    tour.wait_recoverable(&domain);
    let refused = tour.command("disable-cluster", &["--protected-cluster", "One"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        place::said(&refused).contains(&names[0]),
        "the machines are listed"
    );

    // A host joins, and a machine moves to it.
    tour.vcenter.joins(&fifth);
    tour.hosts_ready(5);
    guests[0].moves(&tour.vcenter, &fifth);
    tour.wait_recoverable(&domain);

    // A host is emptied and booted.
    let booted = tour.vcenter.hosts[1].clone();
    let tell = |command: &Value| {
        let answer = tour.vcenter.tell(command);
        assert!(
            answer["error"].is_null() && answer["state"] != "error",
            "{answer}"
        );
        answer
    };
    tell(&json!({"cmd": "maintenance", "host": booted, "on": true}));
    tell(&json!({"cmd": "reboot", "host": booted}));
    tell(&json!({"cmd": "maintenance", "host": booted, "on": false}));
    guests[1].moves(&tour.vcenter, &booted);
    tour.wait_recoverable(&domain);

    // Upgrade; the guests go on.
    tour.does("upload-package", &[&second]);
    let output = tour.does("upgrade-cluster", &["--protected-cluster", "One"]);
    assert!(output.contains("has version 0.2.0-1"), "{output}");
    tour.wait_recoverable(&domain);

    // One is recovered, as its disk is when its guest has stopped.
    guests[2].stops();
    tour.wait_recoverable(&domain);
    let disk = recovered(
        &folder.path().join("store/shop"),
        &names[2],
        &folder.path().join("out"),
    );
    assert!(disk == std::fs::read(guests[2].disk(&tour.vcenter)).unwrap());

    // Out of it again, the guests go on until the end.
    let vms: Vec<&str> = names.iter().flat_map(|name| ["--vm", name]).collect();
    tour.does("unprotect-vm", &vms);
    guests.iter_mut().for_each(Guest::goes_on);
    tour.place.uninstalls(&["--purge"]);
    guests.iter_mut().for_each(Guest::stops);
    drva.stop();
    let status = tour.vcenter.tell(&json!({"cmd": "status"}));
    assert_eq!(status["vms"].as_array().unwrap().len(), 8);
    tour.vcenter.is_as(&before);
    for host in &tour.vcenter.hosts {
        let to = format!("{}:{PORT_BASE}", address());
        let answer = tour
            .vcenter
            .tell(&json!({"cmd": "probe", "host": host, "to": to}));
        assert!(answer["refused"].is_string(), "{answer}");
    }
}
