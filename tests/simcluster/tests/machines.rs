//! Virtual machines of the simulated cluster: their guests go on through whatever the cluster does with them.
#![allow(clippy::unwrap_used)]

mod support;

use simhost::nbd::client::{Client as Guest, Op};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use support::{FILTER, Site, refused};
use vcenter::{Fault, FilterSource, Moid, Vcenter, VibTrust};

/// A guest that writes a block after the other, and reads each back. It ends with an error if one fails.
struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

const BLOCK_BYTES: u32 = 4096;
const BLOCKS: u64 = 1024;

impl Load {
    fn start(socket: &Path) -> Self {
        let mut guest = Guest::connect_unix(socket, "disk0").unwrap();
        let (stop, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (until, count) = (stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            for number in 1.. {
                if until.load(Ordering::Relaxed) {
                    break;
                }
                let at = number % BLOCKS * u64::from(BLOCK_BYTES);
                let block = [number as u8; BLOCK_BYTES as usize];
                guest.call(&Op::Write(at, &block), false)?;
                let read = guest.call(&Op::Read(at, BLOCK_BYTES), false)?;
                if read != block {
                    return Err(std::io::Error::other(format!("block {number} differs")));
                }
                count.store(number, Ordering::Relaxed);
            }
            guest.call(&Op::Flush, false)?;
            guest.disconnect();
            Ok(())
        });
        Self {
            stop,
            written,
            thread: Some(thread),
        }
    }

    /// Waits until it has come further.
    fn goes_on(&self, site: &Site) {
        let from = self.written.load(Ordering::Relaxed);
        site.wait("the guest goes on", || {
            let is = self.written.load(Ordering::Relaxed);
            let thread = self.thread.as_ref().unwrap();
            assert!(!thread.is_finished(), "the guest's connection failed");
            (is > from + 8).then_some(())
        });
    }

    /// The number of its last block.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap().unwrap();
        self.written.load(Ordering::Relaxed)
    }
}

fn attach(site: &Site, vm: &Moid) -> FilterSource {
    let filter = FilterSource::Filter {
        name: "jetdr".into(),
        properties: vec![("jetdr.domain".into(), "shop".into())],
    };
    let task = site.client.attach_filter(vm, &[2000], &filter).unwrap();
    site.succeeds(&task);
    filter
}

/// Sidecars beside a machine's disks.
fn sidecars(site: &Site, vm: &Moid) -> usize {
    let disks = site.world.machine(vm.as_str()).unwrap().disks;
    let folder = disks["disk0"].parent().unwrap();
    let files = std::fs::read_dir(folder).unwrap().flatten();
    files
        .filter(|file| file.path().extension().is_some_and(|end| end == "vmfd"))
        .count()
}

/// What the machine's process says of its disk.
fn state(site: &Site, vm: &Moid) -> serde_json::Value {
    let machine = site.world.machine(vm.as_str()).unwrap();
    let host = site.world.host(&machine.host).unwrap();
    let status = host
        .ask_machine(&machine.name, &serde_json::json!({"cmd": "status"}))
        .unwrap();
    assert_eq!(status["contract_violations"], 0, "{status}");
    status["disks"][0]["state"].clone()
}

#[test]
fn a_guest_goes_on_while_its_disk_comes_under_the_filter_moves_and_leaves_it() {
    let site = Site::new(2);
    let before = site.listings();
    site.install();
    let vm = site.vm("web", &site.hosts[0], 1);
    site.power(&vm, true);
    let load = Load::start(&site.world.guest_socket("web"));
    load.goes_on(&site);
    // Without the filter it can be moved too.
    let move_to = |host: &str| {
        let task = site.world.migrate(vm.as_str(), Some(host)).unwrap();
        let end = simcluster::control::wait(&site.world, &task);
        assert_eq!(end["state"], "success", "{end}");
        load.goes_on(&site);
        assert_eq!(site.host_of(&vm), host);
    };
    move_to(&site.hosts[1]);
    assert_eq!(state(&site, &vm), serde_json::Value::Null);
    attach(&site, &vm);
    load.goes_on(&site);
    assert!(state(&site, &vm).is_string(), "the filter has the disk");
    assert_eq!(sidecars(&site, &vm), 1);
    let seen = site.client.vms(&site.cluster).unwrap();
    assert_eq!(
        (seen[0].is_powered_on, seen[0].disks[0].filters.as_slice()),
        (true, &["jetdr".to_owned()][..])
    );
    move_to(&site.hosts[0]);
    assert!(state(&site, &vm).is_string());
    // In use.
    let disks = site.client.disks_using(&site.cluster, FILTER).unwrap();
    assert_eq!(
        (&disks[0].vm, disks[0].disk_key, disks.len()),
        (&vm, 2000, 1)
    );
    let refused = site
        .client
        .uninstall_filter(&site.cluster, FILTER)
        .unwrap_err();
    assert_eq!(refused, Fault::FilterInUse(disks));
    let task = site.client.detach_filters(&vm, &[2000]).unwrap();
    site.succeeds(&task);
    load.goes_on(&site);
    assert_eq!(
        (state(&site, &vm), sidecars(&site, &vm)),
        (serde_json::Value::Null, 0)
    );
    assert!(
        site.client
            .disks_using(&site.cluster, FILTER)
            .unwrap()
            .is_empty()
    );
    // The removal needs maintenance mode on each host: the machine moves out of the way and back.
    let task = site.client.uninstall_filter(&site.cluster, FILTER).unwrap();
    site.succeeds(&task);
    load.goes_on(&site);
    let last = load.end();
    site.power(&vm, false);
    for (host, before) in site.hosts.iter().zip(&before) {
        assert!(
            *before == site.listing(host),
            "something of the filter stays on {host}"
        );
    }
    let disks = site.world.machine(vm.as_str()).unwrap().disks;
    let disk = std::fs::read(&disks["disk0"]).unwrap();
    let at = (last % BLOCKS * u64::from(BLOCK_BYTES)) as usize;
    assert_eq!(
        disk[at], last as u8,
        "the disk lacks the guest's last write"
    );
}

#[test]
fn an_upgrade_rolls_over_the_hosts_while_the_guest_goes_on() {
    let site = Site::new(2);
    site.install();
    let vm = site.vm("db", &site.hosts[0], 1);
    site.power(&vm, true);
    attach(&site, &vm);
    let load = Load::start(&site.world.guest_socket("db"));
    load.goes_on(&site);
    let host_id = |host: &str| std::fs::read(site.root(host).join("etc/config/jetdr/host-id"));
    let ids: Vec<Vec<u8>> = site.hosts.iter().map(|h| host_id(h).unwrap()).collect();
    let config = site
        .root(&site.hosts[0])
        .join("etc/config/jetdr/iofilterd.conf");
    std::fs::write(&config, "name = kept\n").unwrap();
    site.web.put("/new.vib", site.packager.package("0.2.0-1"));
    let upgrade = |id: &str| {
        let trust = VibTrust::HostAuthorities;
        let url = site.web.url("/new.vib");
        site.client.upgrade_filter(&site.cluster, id, &url, &trust)
    };
    assert_eq!(refused(upgrade("JetDR_other_1-1")), "NotFound");
    site.world.set_drs(site.cluster.as_str(), false).unwrap();
    assert_eq!(refused(upgrade(FILTER)), "InvalidState");
    site.world.set_drs(site.cluster.as_str(), true).unwrap();
    let task = upgrade(FILTER).unwrap();
    site.succeeds(&task);
    load.goes_on(&site);
    load.end();
    assert!(state(&site, &vm).is_string());
    let filters = site.client.filters(&site.cluster).unwrap();
    assert_eq!(filters[0].id, "JetDR_jetdr_0.2.0-1");
    for (host, id) in site.hosts.iter().zip(ids) {
        assert!(site.has_daemon(host));
        assert_eq!(host_id(host).unwrap(), id);
        let packages = site.world.host(host).unwrap().packages();
        assert_eq!(
            (packages.len(), packages[0].version.as_str()),
            (1, "0.2.0-1")
        );
    }
    assert_eq!(std::fs::read_to_string(&config).unwrap(), "name = kept\n");
    // A new daemon that does not start is told of the host, and started when the reason is gone.
    site.web.put("/new.vib", site.packager.package("0.3.0-1"));
    std::fs::write(&config, "nonsense\n").unwrap();
    let task = upgrade("JetDR_jetdr_0.2.0-1").unwrap();
    site.fails(&task);
    let issues = site.issues("JetDR_jetdr_0.3.0-1");
    assert_eq!(
        (issues.len(), &issues[0].0),
        (1, &site.hosts[0]),
        "{issues:?}"
    );
    assert!(issues[0].1.contains("write NAME = VALUE"), "{issues:?}");
    assert!(!site.has_daemon(&site.hosts[0]) && site.has_daemon(&site.hosts[1]));
    std::fs::write(&config, "name = kept\n").unwrap();
    let task = site
        .client
        .resolve_on_cluster(&site.cluster, "JetDR_jetdr_0.3.0-1")
        .unwrap();
    site.succeeds(&task);
    assert!(site.has_daemon(&site.hosts[0]));
    // Another filter's package is none of this one.
    let other = site
        .packager
        .package_as("0.1.0-1", |d| d.name = "other".into());
    site.web.put("/new.vib", other);
    assert_eq!(refused(upgrade("JetDR_jetdr_0.3.0-1")), "InvalidArgument");
}

#[test]
fn maintenance_mode_moves_what_runs_and_only_where_it_can() {
    let site = Site::new(3);
    site.install();
    let vms: Vec<Moid> = (0..2)
        .map(|number| {
            let vm = site.vm(&format!("vm{number}"), &site.hosts[0], 1);
            site.power(&vm, true);
            attach(&site, &vm);
            vm
        })
        .collect();
    let host: Moid = site.hosts[0].parse().unwrap();
    site.world.set_drs(site.cluster.as_str(), false).unwrap();
    let task = site.client.enter_maintenance(&host).unwrap();
    let words = site.fails(&task);
    assert!(words.contains("DRS is off"), "{words}");
    site.world.set_drs(site.cluster.as_str(), true).unwrap();
    let task = site.client.enter_maintenance(&host).unwrap();
    site.succeeds(&task);
    // One each: where the fewest run.
    let mut on: Vec<String> = vms.iter().map(|vm| site.host_of(vm)).collect();
    on.sort();
    assert_eq!(on, site.hosts[1..]);
    let hosts = site.client.hosts(&site.cluster).unwrap();
    assert!(hosts[0].in_maintenance && !hosts[1].in_maintenance);
    // Nobody is left who could take them.
    let bare = site.world.host(&site.hosts[2]).unwrap();
    bare.set(|settings| settings.is_reachable = false);
    let task = site
        .client
        .enter_maintenance(&site.hosts[1].parse().unwrap())
        .unwrap();
    let words = site.fails(&task);
    assert!(
        words.contains("does not respond") && words.contains("maintenance mode"),
        "{words}"
    );
    bare.set(|settings| settings.is_reachable = true);
    let task = site.client.exit_maintenance(&host).unwrap();
    site.succeeds(&task);
    let events = site.client.events().unwrap();
    let count = |kind: &str| events.iter().filter(|event| event.kind == kind).count();
    assert!(
        count("VmMigratedEvent") >= 2 && count("EnteredMaintenanceModeEvent") == 1,
        "{events:?}"
    );
    assert!(events.windows(2).all(|pair| pair[0].key < pair[1].key));
}

#[test]
fn a_filter_is_put_on_disks_by_a_policy_and_not_where_it_cannot_be() {
    let site = Site::new(1);
    let vm = site.vm("two", &site.hosts[0], 2);
    let filter = FilterSource::Filter {
        name: "jetdr".into(),
        properties: Vec::new(),
    };
    let attach = |keys: &[i32], filter: &FilterSource| site.client.attach_filter(&vm, keys, filter);
    assert_eq!(
        refused(attach(&[2000, 2001], &filter)),
        "InvalidArgument",
        "it is not installed"
    );
    site.install();
    assert_eq!(
        refused(attach(&[2000, 2007], &filter)),
        "InvalidArgument",
        "no such disk"
    );
    assert_eq!(
        refused(attach(&[2000], &filter)),
        "InvalidArgument",
        "not all disks"
    );
    let nowhere = FilterSource::Policy("no-such-policy".into());
    assert_eq!(refused(attach(&[2000, 2001], &nowhere)), "InvalidArgument");
    let unknown = "vm-9999".parse().unwrap();
    assert_eq!(
        refused(site.client.attach_filter(&unknown, &[2000], &filter)),
        "NotFound"
    );
    let properties = [("jetdr.domain".to_owned(), "shop".to_owned())];
    let policy = site
        .client
        .create_policy("Gold", "jetdr", &properties)
        .unwrap();
    assert_eq!(
        site.client.policies().unwrap(),
        std::slice::from_ref(&policy)
    );
    assert_eq!(
        refused(site.client.create_policy("Gold", "jetdr", &[])),
        "AlreadyExists"
    );
    let by_policy = FilterSource::Policy(policy.id.clone());
    site.world.set_snapshots(vm.as_str(), true).unwrap();
    let task = attach(&[2000, 2001], &by_policy).unwrap();
    assert!(site.fails(&task).contains("snapshots"));
    assert!(site.client.vms(&site.cluster).unwrap()[0].has_snapshots);
    site.world.set_snapshots(vm.as_str(), false).unwrap();
    let task = attach(&[2000, 2001], &by_policy).unwrap();
    site.succeeds(&task);
    assert_eq!(
        site.client
            .disks_using(&site.cluster, FILTER)
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        refused(site.client.delete_policy(&policy.id)),
        "InvalidState"
    );
    // It runs with the policy's filter, and with its properties.
    site.power(&vm, true);
    assert!(state(&site, &vm).is_string());
    let task = site.client.detach_filters(&vm, &[2000, 2001]).unwrap();
    site.succeeds(&task);
    site.client.delete_policy(&policy.id).unwrap();
    assert_eq!(refused(site.client.delete_policy(&policy.id)), "NotFound");
}
