//! Packages on hosts, by vCenter's IoFilterManager over VI-JSON: what lies in the roots, which processes run,
//! which ports are open.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use support::{FILTER, Site, refused};
use vcenter::{Fault, FilterOperation, TaskState, Vcenter, VibTrust};

/// A listener on a port that the package opens; not every one need be free.
fn open_port() -> TcpListener {
    let mut ports = 32873..=32878;
    ports
        .find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok())
        .expect("all of 32873 to 32878 are taken on this machine")
}

#[test]
fn a_filter_comes_to_each_host_and_leaves_nothing_behind() {
    let site = Site::new(3);
    let before = site.listings();
    let listener = open_port();
    let port = listener.local_addr().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = closed.local_addr().unwrap();
    for host in &site.hosts {
        let refused = site.probe(host, port).unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
    }
    site.install();
    let found = site.client.filters(&site.cluster).unwrap();
    assert_eq!((found.len(), found[0].id.as_str()), (1, FILTER));
    assert_eq!(found[0].operation, FilterOperation::Install);
    assert_eq!(found[0].vib_url.as_deref(), Some(site.url().as_str()));
    let hosts = site.client.hosts(&site.cluster).unwrap();
    for (id, seen) in site.hosts.iter().zip(&hosts) {
        let host = site.world.host(id).unwrap();
        let library = host.library("jetdr").unwrap();
        assert_eq!(
            library.metadata().unwrap().permissions().mode() & 0o7777,
            0o555
        );
        assert!(site.has_daemon(id));
        // As vCenter tells it.
        assert_eq!(
            (seen.filters[0].id.as_str(), seen.filters[0].is_available),
            (FILTER, true)
        );
        let runs = |key: &str| seen.services.iter().any(|s| s.key == key && s.is_running);
        assert!(runs("iofilterd-jetdr"), "{:?}", seen.services);
        let rules = seen.rulesets.iter().find(|one| one.key == "jetdr").unwrap();
        assert_eq!(
            (rules.is_enabled, rules.rules[0].ports),
            (true, (32873, 32878))
        );
        assert!(!rules.rules[0].is_inbound);
        // Its connections come from its own address, and go to no other port.
        let from = site.probe(id, port).unwrap();
        assert!(from.starts_with(&format!("{}:", host.address)), "{from}");
        assert!(site.probe(id, closed).unwrap_err().contains("refused"));
    }
    // Each host fetched it itself; vCenter looked what it is.
    let visitors = site.web.visitors("/jetdr.vib");
    for id in &site.hosts {
        let address = IpAddr::V4(site.world.host(id).unwrap().address);
        assert!(visitors.contains(&address), "{visitors:?}");
    }
    let again = site
        .client
        .install_filter(&site.cluster, &site.url(), &VibTrust::HostAuthorities);
    assert_eq!(again.unwrap_err(), Fault::AlreadyExists);
    let task = site.client.uninstall_filter(&site.cluster, FILTER).unwrap();
    site.succeeds(&task);
    assert!(site.client.filters(&site.cluster).unwrap().is_empty());
    for (host, before) in site.hosts.iter().zip(&before) {
        assert_same(before, &site.listing(host));
        assert!(!site.has_daemon(host));
        assert!(site.probe(host, port).unwrap_err().contains("refused"));
    }
}

fn assert_same(before: &support::Listing, after: &support::Listing) {
    let names = |all: &support::Listing| {
        let names = all.iter().map(|(path, mode, _)| (path.clone(), *mode));
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(before), names(after));
    for (was, is) in before.iter().zip(after) {
        assert!(was == is, "{} differs", is.0.display());
    }
}

#[test]
fn what_a_host_does_not_take_is_told_of_each_and_changes_none() {
    let site = Site::new(2);
    let good = site.web.get("/jetdr.vib");
    let mut damaged = good.clone();
    let at = damaged.len() - 2000;
    damaged[at] ^= 1;
    let stranger = support::Packager::new();
    let package = |change: &dyn Fn(&mut vib_packaging::Descriptor)| {
        site.packager
            .package_as("0.1.0-1", |descriptor| change(descriptor))
    };
    let needs = |name: &str, version: Option<(&str, &str)>| vib_packaging::Constraint {
        name: name.into(),
        version: version.map(|(relation, version)| (relation.into(), version.into())),
    };
    let community = |d: &mut vib_packaging::Descriptor| {
        d.acceptance_level = vib_packaging::AcceptanceLevel::Community;
    };
    let unsigned = {
        let mut builder = vib_packaging::Builder {
            descriptor: vib_packaging::component::descriptor(
                "0.1.0-1",
                "2026-01-31T12:00:00Z",
                vib_packaging::AcceptanceLevel::Partner,
            ),
            files: Vec::new(),
            payload: "jetdr".into(),
            format: vib_packaging::Format::Tgz,
            limits: vib_packaging::Limits::default(),
        };
        builder.files.push(vib_packaging::File {
            path: "opt/jetdr/note".into(),
            mode: 0o444,
            bytes: b"note".to_vec(),
        });
        builder.build(None).unwrap().bytes().to_vec()
    };
    let cases = [
        ("damaged", damaged, "checksum-wrong"),
        ("stranger", stranger.package("0.1.0-1"), "signature-chain"),
        ("unsigned", unsigned, "signature-missing"),
        ("nothing", b"no package".to_vec(), "ar-magic"),
        ("community", package(&community), "community"),
        (
            "future",
            package(&|d| {
                d.relationships
                    .depends
                    .push(needs("esx-version", Some((">=", "99.0"))))
            }),
            "it needs esx-version >= 99.0",
        ),
        (
            "alone",
            package(&|d| d.relationships.conflicts.push(needs("uwglibc64", None))),
            "it cannot be beside uwglibc64",
        ),
    ];
    let before = site.listings();
    for (name, bytes, told) in cases {
        let path = format!("/{name}.vib");
        site.web.put(&path, bytes);
        check_refused(
            &site,
            &site.web.url(&path),
            &VibTrust::HostAuthorities,
            told,
        );
        for (host, before) in site.hosts.iter().zip(&before) {
            assert_same(before, &site.listing(host));
        }
    }
    let url = site.web.url("/none.vib");
    check_refused(&site, &url, &VibTrust::HostAuthorities, "404");
    let gone = "http://127.0.0.1:9/none.vib";
    check_refused(
        &site,
        gone,
        &VibTrust::HostAuthorities,
        "cannot fetch the VIB from http://127.0.0.1:9/",
    );
    // Nothing of all that is in the way of a good one.
    site.install();
}

fn check_refused(site: &Site, url: &str, trust: &VibTrust, told: &str) {
    let task = site
        .client
        .install_filter(&site.cluster, url, trust)
        .unwrap();
    let words = site.fails(&task);
    assert!(words.contains("2 of 2 hosts"), "{words}");
    let filters = site.client.filters(&site.cluster).unwrap();
    let filter = filters
        .iter()
        .find(|one| one.vib_url.as_deref() == Some(url));
    let issues = site.issues(&filter.unwrap().id);
    assert_eq!(issues.len(), 2, "{issues:?}");
    for (host, words) in issues {
        assert!(
            site.hosts.contains(&host) && words.contains(told),
            "{told}: {words}"
        );
    }
}

#[test]
fn a_host_believes_only_the_server_that_it_was_told() {
    let site = Site::new(2);
    let url = site.web.tls_url("/jetdr.vib");
    check_refused(
        &site,
        &url,
        &VibTrust::HostAuthorities,
        "cannot fetch the VIB",
    );
    let other = support::web::Web::start();
    let wrong = VibTrust::Pinned(other.certificate);
    check_refused(&site, &url, &wrong, "cannot fetch the VIB");
    let right = VibTrust::Pinned(site.web.certificate.clone());
    let task = site
        .client
        .install_filter(&site.cluster, &url, &right)
        .unwrap();
    site.succeeds(&task);
    let task = site.client.uninstall_filter(&site.cluster, FILTER).unwrap();
    site.succeeds(&task);
    let task = site
        .client
        .install_filter(&site.cluster, &url, &VibTrust::Anybody)
        .unwrap();
    site.succeeds(&task);
    // An authority that the host trusts by itself.
    let task = site.client.uninstall_filter(&site.cluster, FILTER).unwrap();
    site.succeeds(&task);
    for host in &site.hosts {
        let store = site.root(host).join("etc/vmware/ssl/castore.pem");
        std::fs::write(store, &site.web.certificate).unwrap();
    }
    let task = site.start_install(&url);
    site.succeeds(&task);
}

#[test]
fn a_host_that_failed_is_named_and_resolved_alone() {
    let site = Site::new(3);
    let second = site.world.host(&site.hosts[1]).unwrap();
    second.set(|settings| settings.is_reachable = false);
    let task = site.start_install(&site.url());
    let words = site.fails(&task);
    assert!(words.contains("1 of 3 hosts"), "{words}");
    let issues = site.issues(FILTER);
    assert_eq!(
        issues,
        [(
            site.hosts[1].clone(),
            "the host does not respond".to_owned()
        )]
    );
    assert!(site.has_daemon(&site.hosts[0]) && site.has_daemon(&site.hosts[2]));
    assert!(
        site.world
            .host(&site.hosts[1])
            .unwrap()
            .library("jetdr")
            .is_none()
    );
    let on_cluster = || {
        site.client
            .resolve_on_cluster(&site.cluster, FILTER)
            .unwrap()
    };
    site.fails(&on_cluster());
    second.set(|settings| settings.is_reachable = true);
    let host = site.hosts[1].parse().unwrap();
    let task = site.client.resolve_on_host(&host, FILTER).unwrap();
    site.succeeds(&task);
    assert!(site.has_daemon(&site.hosts[1]));
    assert!(site.issues(FILTER).is_empty());
    site.succeeds(&on_cluster());
}

#[test]
fn a_script_that_fails_leaves_the_root_as_it_was() {
    let site = Site::new(1);
    let root = site.root(&site.hosts[0]);
    // The daemon's log cannot be made.
    std::fs::create_dir(root.join("var/log/iofilterd-jetdr.log")).unwrap();
    let before = site.listing(&site.hosts[0]);
    let task = site.start_install(&site.url());
    site.fails(&task);
    let issues = site.issues(FILTER);
    assert!(issues[0].1.contains("the init script"), "{issues:?}");
    assert_same(&before, &site.listing(&site.hosts[0]));
    std::fs::remove_dir(root.join("var/log/iofilterd-jetdr.log")).unwrap();
    let task = site
        .client
        .resolve_on_cluster(&site.cluster, FILTER)
        .unwrap();
    site.succeeds(&task);
    assert!(site.has_daemon(&site.hosts[0]));
}

#[test]
fn a_package_that_wants_maintenance_or_a_boot_gets_it() {
    let site = Site::new(2);
    let package = site.packager.package_as("0.1.0-1", |descriptor| {
        descriptor.system_requires.maintenance_mode = (true, true);
    });
    site.web.put("/jetdr.vib", package);
    // A machine without the filter moves out of the way, too.
    let vm = site.vm("plain", &site.hosts[0], 1);
    site.power(&vm, true);
    site.world.set_drs(site.cluster.as_str(), false).unwrap();
    let task = site.start_install(&site.url());
    site.fails(&task);
    let issues = site.issues(FILTER);
    assert_eq!(issues.len(), 1, "{issues:?}");
    assert!(
        issues[0].1.contains("cannot be evacuated: DRS is off"),
        "{issues:?}"
    );
    site.world.set_drs(site.cluster.as_str(), true).unwrap();
    let task = site
        .client
        .resolve_on_cluster(&site.cluster, FILTER)
        .unwrap();
    site.succeeds(&task);
    assert_eq!(site.host_of(&vm), site.hosts[1]);
    let none_stays = site.client.hosts(&site.cluster).unwrap();
    assert!(none_stays.iter().all(|host| !host.in_maintenance));
    // One that counts after a boot only.
    let site = Site::new(1);
    let package = site.packager.package_as("0.1.0-1", |descriptor| {
        descriptor.live_install_allowed = false
    });
    site.web.put("/jetdr.vib", package);
    let task = site.start_install(&site.url());
    site.fails(&task);
    let host = &site.hosts[0];
    assert!(
        site.issues(FILTER)[0]
            .1
            .contains("must be rebooted to install")
    );
    assert!(site.world.host(host).unwrap().library("jetdr").is_none());
    site.world.reboot(host, false).unwrap();
    assert!(site.has_daemon(host));
    let task = site
        .client
        .resolve_on_cluster(&site.cluster, FILTER)
        .unwrap();
    site.succeeds(&task);
}

#[test]
fn a_host_that_joins_gets_the_filter_and_one_that_leaves_loses_it() {
    let site = Site::new(2);
    site.install();
    let new = site.host("esx-new", |_| {});
    let before = site.listing(&new);
    site.join(&new);
    assert!(site.has_daemon(&new));
    assert_eq!(site.client.hosts(&site.cluster).unwrap().len(), 3);
    assert!(
        site.world.leave(&new).is_err(),
        "it is not in maintenance mode"
    );
    let id = new.parse().unwrap();
    let task = site.client.enter_maintenance(&id).unwrap();
    site.succeeds(&task);
    let task = site.world.leave(&new).unwrap();
    let end = simcluster::control::wait(&site.world, &task);
    assert_eq!(end["state"], "success", "{end}");
    assert_same(&before, &site.listing(&new));
    assert!(site.has_daemon(&site.hosts[0]));
    // One that joins while it is not reached is an issue, and the rest stays.
    let late = site.host("esx-late", |_| {});
    let host = site.world.host(&late).unwrap();
    host.set(|settings| settings.is_reachable = false);
    site.join(&late);
    assert_eq!(site.issues(FILTER).len(), 1);
    host.set(|settings| settings.is_reachable = true);
    let task = site
        .client
        .resolve_on_cluster(&site.cluster, FILTER)
        .unwrap();
    site.succeeds(&task);
    assert!(site.has_daemon(&late));
}

#[test]
fn a_boot_starts_the_daemon_and_a_stateless_one_installs_anew() {
    let site = Site::new(1);
    let stateless = site.host("esx-pxe", |spec| spec.stateless = true);
    site.join(&stateless);
    site.install();
    let kept = site.root(&site.hosts[0]).join("etc/config/jetdr/host-id");
    let id = std::fs::read(&kept).unwrap();
    for is_crash in [false, true] {
        site.world.reboot(&site.hosts[0], is_crash).unwrap();
        assert!(site.has_daemon(&site.hosts[0]));
        assert_eq!(std::fs::read(&kept).unwrap(), id, "it is another host now");
    }
    let mark = site.root(&stateless).join("etc/mark");
    std::fs::write(&mark, "gone with the boot").unwrap();
    let task = site.world.reboot(&stateless, true).unwrap().unwrap();
    let end = simcluster::control::wait(&site.world, &task);
    assert_eq!(end["state"], "success", "{end}");
    assert!(!mark.exists());
    assert!(site.has_daemon(&stateless));
    assert!(site.issues(FILTER).is_empty());
}

#[test]
fn tasks_are_queued_run_and_are_cancelled() {
    let site = Site::new(2);
    let first = site.world.host(&site.hosts[0]).unwrap();
    first.set(|settings| settings.is_held = true);
    let install = site.start_install(&site.url());
    site.wait("the task runs", || {
        let state = site.client.task(&install).unwrap();
        matches!(state, TaskState::Running(Some(_))).then_some(())
    });
    // One at a time.
    let resolve = site
        .client
        .resolve_on_cluster(&site.cluster, FILTER)
        .unwrap();
    assert_eq!(site.client.task(&resolve).unwrap(), TaskState::Queued);
    site.client.cancel_task(&install).unwrap();
    site.client.cancel_task(&resolve).unwrap();
    first.set(|settings| settings.is_held = false);
    // What was begun comes to its end, nothing more is begun.
    let words = site.fails(&install);
    assert!(words.contains("cancelled"), "{words}");
    site.fails(&resolve);
    assert!(site.has_daemon(&site.hosts[0]) && !site.has_daemon(&site.hosts[1]));
    let issues = site.issues(FILTER);
    assert_eq!(
        (issues.len(), &issues[0].0),
        (1, &site.hosts[1]),
        "{issues:?}"
    );
    assert_eq!(refused(site.client.cancel_task(&install)), "InvalidState");
    site.world.forget_tasks();
    assert_eq!(refused(site.client.task(&install)), "NotFound");
}

#[test]
fn who_dials_a_host_gets_in_only_where_a_ruleset_opens() {
    let site = Site::new(1);
    let host = site.world.host(&site.hosts[0]).unwrap();
    let mut command = host.own_command(&["greet", "0"]);
    let mut greeter = command
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(greeter.stdout.take().unwrap()).lines();
    let at: std::net::SocketAddr = lines.next().unwrap().unwrap().parse().unwrap();
    assert_eq!(
        at.ip(),
        IpAddr::V4(host.address),
        "it listens for others too"
    );
    let dial = || {
        let mut said = String::new();
        let read = TcpStream::connect(at).and_then(|mut s| s.read_to_string(&mut said));
        read.map(|_| said)
    };
    let kept_out = dial();
    assert!(kept_out.is_err(), "{kept_out:?}");
    let ruleset = vib_packaging::Ruleset {
        id: "greeter".into(),
        rules: vec![vib_packaging::FirewallRule {
            direction: vib_packaging::Direction::Inbound,
            udp: false,
            source_ports: false,
            ports: (at.port(), at.port()),
        }],
        enabled: true,
        required: false,
    };
    let path = host.root().join("etc/vmware/firewall/greeter.xml");
    let disabled = vib_packaging::Ruleset {
        enabled: false,
        ..ruleset.clone()
    };
    std::fs::write(&path, disabled.document()).unwrap();
    host.refresh_firewall().unwrap();
    assert!(dial().is_err(), "a ruleset that is not in force opens");
    std::fs::write(&path, ruleset.document()).unwrap();
    host.refresh_firewall().unwrap();
    assert_eq!(dial().unwrap(), "hello\n");
    assert!(greeter.wait().unwrap().success());
}
