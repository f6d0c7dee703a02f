//! Clusters are enabled, kept in step, upgraded and disabled: what becomes of each host, and of those
//! that fail.
#![allow(clippy::unwrap_used)]

mod support;

use msa::vcenter::Connection;
use serde_json::{Value, json};
use support::fake::{FakeHost, State};
use support::site::{Process, Site, cluster};

fn with(more: Value) -> Value {
    let mut all = cluster();
    for (key, value) in more.as_object().unwrap() {
        all[key] = value.clone();
    }
    all
}

/// The versions on the hosts, `-` for none.
fn installed(site: &Site) -> Vec<String> {
    let state = site.world.state.lock();
    let of = |host: &FakeHost| host.installed.clone().unwrap_or("-".into());
    state.hosts.values().map(of).collect()
}

fn asked(site: &Site) -> Vec<String> {
    std::mem::take(&mut site.world.state.lock().asked)
}

fn enabled(hosts: usize) -> (Site, Process) {
    let site = Site::with_package(hosts);
    let process = site.start();
    process.make_drva("drva1", 32873);
    process.succeeds("enable", "enable-cluster", &cluster());
    asked(&site);
    (site, process)
}

fn host<T>(site: &Site, name: &str, work: impl FnOnce(&mut FakeHost) -> T) -> T {
    let mut state = site.world.state.lock();
    let found = state.hosts.values_mut().find(|host| host.name == name);
    work(found.unwrap())
}

#[test]
fn a_cluster_is_enabled_and_once_more_changes_nothing() {
    let site = Site::with_package(4);
    let process = site.start();
    process.make_drva("drva1", 32873);
    process.make_drva("drva2", 42873);
    let output = process.succeeds("enable", "enable-cluster", &cluster());
    assert_eq!(installed(&site), vec!["0.1.0-1"; 4]);
    assert_eq!(process.clusters(), ["Gold enabled 0.1.0-1"]);
    // Each appliance has its share.
    let expected = [
        "esx1 ready drva1",
        "esx2 ready drva2",
        "esx3 ready drva1",
        "esx4 ready drva2",
    ];
    assert_eq!(process.hosts(), expected);
    assert_eq!(process.enrolled(), ["esx1", "esx2", "esx3", "esx4"]);
    let options = |state: &State| state.hosts.values().any(|host| !host.options.is_empty());
    assert!(
        !options(&site.world.state.lock()),
        "a token stays on a host"
    );
    assert_eq!((process.tokens(), process.open_alarms().len()), (0, 0));
    assert!(
        output.contains("host esx3: package 0.1.0-1, daemon up"),
        "{output}"
    );
    assert!(output.contains("4 of 4 hosts are ready"), "{output}");
    assert_eq!(asked(&site), ["install 0.1.0-1"]);
    process.succeeds("again", "enable-cluster", &cluster());
    assert_eq!(asked(&site), Vec::<String>::new());
    assert_eq!(process.hosts(), expected);
    assert_eq!(process.certificates_in_force(), 4);
}

#[test]
fn nothing_is_begun_on_a_cluster_that_does_not_do() {
    let site = Site::with_package(4);
    host(&site, "esx2", |host| host.skew_ms = 5000);
    let process = site.start();
    let (state, error, _) = process.done("a", "enable-cluster", &cluster());
    assert_eq!(state, "failed");
    assert!(error.contains("host esx2: its clock is 5000 ms"), "{error}");
    assert!(asked(&site).is_empty() && process.clusters().is_empty());
    // A filter that somebody else put there is not taken over.
    host(&site, "esx2", |host| host.skew_ms = 0);
    let other = Site::with_package(4);
    other
        .start()
        .succeeds("other", "enable-cluster", &cluster());
    site.world.state.lock().filter = other.world.state.lock().filter.clone();
    let (_, error, _) = process.done("b", "enable-cluster", &cluster());
    assert!(error.contains("[filter-present]"), "{error}");
    // Without a package there is nothing to give.
    let bare = Site::new(3);
    let (_, error, _) = bare.start().done("c", "enable-cluster", &cluster());
    assert!(error.contains("no package for hosts"), "{error}");
    // And what is not enabled is neither reconciled nor upgraded.
    for kind in ["reconcile-cluster", "resolve-cluster", "upgrade-cluster"] {
        let name = kind.replace('-', "");
        let (_, error, _) = process.done(&name, kind, &cluster());
        assert!(error.contains("is not enabled"), "{kind}: {error}");
    }
}

type Spoil = fn(&mut FakeHost);

#[test]
fn a_host_that_fails_is_named_and_resolved_and_the_others_stay() {
    let spoils: [(&str, Spoil, Spoil, &str); 4] = [
        (
            "refuses",
            |host| host.refuses = Some("the VIB cannot be downloaded".into()),
            |host| host.refuses = None,
            "the VIB cannot be downloaded",
        ),
        (
            "daemon",
            |host| host.daemon_dies = true,
            |host| host.daemon_dies = false,
            "its daemon does not run",
        ),
        (
            "firewall",
            |host| host.keeps_firewall_shut = true,
            |host| host.keeps_firewall_shut = false,
            "does not open ports 32873-32878",
        ),
        (
            "enrolment",
            |host| host.enrols = false,
            |host| host.enrols = true,
            "has not asked for a certificate",
        ),
    ];
    for (name, spoil, mend, says) in spoils {
        let site = Site::with_package(4);
        host(&site, "esx3", spoil);
        let process = site.start();
        process.make_drva("d", 32873);
        let output = process.succeeds("enable", "enable-cluster", &cluster());
        assert!(output.contains("host esx3 FAILED"), "{name}: {output}");
        assert!(output.contains(says), "{name}: {output}");
        assert!(
            output.contains("3 of 4 hosts are ready"),
            "{name}: {output}"
        );
        let expected = [
            "esx1 ready d",
            "esx2 ready d",
            "esx3 failed",
            "esx4 ready d",
        ];
        assert_eq!(process.hosts(), expected, "{name}");
        assert_eq!(process.open_alarms(), ["host-not-ready esx3"], "{name}");
        assert_eq!(process.enrolled(), ["esx1", "esx2", "esx4"], "{name}");
        host(&site, "esx3", mend);
        let output = process.succeeds("resolve", "resolve-cluster", &cluster());
        assert!(
            output.contains("4 of 4 hosts are ready"),
            "{name}: {output}"
        );
        assert_eq!(process.hosts()[2], "esx3 ready d", "{name}: {output}");
        assert!(process.open_alarms().is_empty(), "{name}");
        assert_eq!(process.certificates_in_force(), 4, "{name}");
    }
}

#[test]
fn if_every_host_fails_nothing_is_left() {
    let spoils: [Spoil; 3] = [
        |host| host.daemon_dies = true,
        |host| host.enrols = false,
        |host| host.skew_ms = 999, // no fault: all of this one is well
    ];
    for (at, spoil) in spoils.into_iter().enumerate() {
        let site = Site::with_package(3);
        site.world.state.lock().hosts.values_mut().for_each(spoil);
        let process = site.start();
        let (state, error, output) = process.done("enable", "enable-cluster", &cluster());
        if at == 2 {
            assert_eq!(state, "succeeded", "{error}");
            continue;
        }
        assert_eq!(state, "failed", "{output}");
        assert!(error.contains("no host could be"), "{error}");
        assert_eq!(installed(&site), vec!["-"; 3]);
        assert!(site.world.state.lock().filter.is_none());
        assert_eq!(process.clusters(), ["Gold disabled -"]);
        assert_eq!(
            process.hosts(),
            ["esx1 absent", "esx2 absent", "esx3 absent"]
        );
        assert_eq!((process.certificates_in_force(), process.tokens()), (0, 0));
        assert!(process.open_alarms().is_empty());
    }
}

#[test]
fn hosts_join_and_leave() {
    let (site, process) = enabled(4);
    let mut joined = FakeHost::new("esx9");
    joined.installed = Some("0.1.0-1".into()); // vCenter installs on hosts that join
    {
        let mut state = site.world.state.lock();
        state.hosts.insert("host-9".into(), joined);
        state.hosts.insert("host-8".into(), FakeHost::new("esx8")); // and sometimes does not
        state.hosts.remove("host-2");
    }
    let output = process.succeeds("keep", "reconcile-cluster", &cluster());
    let expected = ["esx1", "esx3", "esx4", "esx8", "esx9"];
    // What vCenter does not list once is not taken for gone.
    assert_eq!(
        process.enrolled(),
        ["esx1", "esx2", "esx3", "esx4", "esx8", "esx9"]
    );
    assert_eq!(process.open_alarms(), ["host-not-listed esx2"]);
    assert!(
        output.contains("host esx2: vCenter does not list it"),
        "{output}"
    );
    assert!(
        output.contains("host esx8: asking vCenter to try again"),
        "{output}"
    );
    process.succeeds("soon", "reconcile-cluster", &cluster());
    assert_eq!(process.certificates_in_force(), 6, "it was asked too soon");
    site.clock.advance_ms(msa::clusters::rows::GONE_AFTER_MS);
    let output = process.succeeds("once", "reconcile-cluster", &cluster());
    assert!(output.contains("host esx2 left the cluster"), "{output}");
    assert_eq!(process.enrolled(), expected, "{output}");
    assert!(process.open_alarms().is_empty());
    assert_eq!(
        process.hosts(),
        expected.map(|name| format!("{name} ready drva1"))
    );
    assert_eq!(installed(&site), vec!["0.1.0-1"; 5]);
    assert!(output.contains("5 of 5 hosts are ready"), "{output}");
    assert_eq!(
        process.certificates_in_force(),
        5,
        "one that left may still speak"
    );
}

#[test]
fn disabling_leaves_nothing() {
    let (site, process) = enabled(4);
    let output = process.succeeds("disable", "disable-cluster", &cluster());
    assert_eq!(installed(&site), vec!["-"; 4]);
    assert_eq!(process.clusters(), ["Gold disabled -"]);
    assert_eq!(
        process.hosts(),
        ["esx1 absent", "esx2 absent", "esx3 absent", "esx4 absent"]
    );
    assert_eq!((process.certificates_in_force(), process.tokens()), (0, 0));
    assert!(
        output.contains("free of the component; its ports are closed"),
        "{output}"
    );
    let output = process.succeeds("again", "disable-cluster", &cluster());
    assert!(output.contains("is not enabled: nothing to do"), "{output}");
    // And it can be enabled anew.
    process.succeeds("anew", "enable-cluster", &cluster());
    assert_eq!(process.certificates_in_force(), 4);
}

#[test]
fn protected_disks_are_listed_and_keep_a_cluster_enabled_unless_detached() {
    let (site, process) = enabled(4);
    process.protect("vm-1");
    process.protect("vm-2");
    let (state, error, output) = process.done("disable", "disable-cluster", &cluster());
    assert_eq!(state, "failed");
    assert!(
        error.contains("2 disks of cluster Gold are protected"),
        "{error}"
    );
    assert!(
        error.contains("Web vm-1, Web vm-2, vm-1 disk 2000"),
        "{error}"
    );
    assert!(
        output.contains("machine vm-2 disk 2000 has the filter"),
        "{output}"
    );
    assert!(asked(&site).is_empty());
    assert_eq!(process.clusters(), ["Gold enabled 0.1.0-1"]);
    process.succeeds("detach", "disable-cluster", &with(json!({"detach": true})));
    assert_eq!(
        asked(&site),
        [
            "detach vm-1",
            "detach vm-2",
            "uninstall JetDR_jetdr_0.1.0-1"
        ]
    );
    assert_eq!(installed(&site), vec!["-"; 4]);
    assert_eq!(process.clusters(), ["Gold disabled -"]);
}

#[test]
fn a_disabling_that_fails_is_taken_back() {
    let (site, process) = enabled(4);
    process.protect("vm-1");
    host(&site, "esx3", |host| {
        host.refuses = Some("machines cannot be moved away".into())
    });
    let detach = with(json!({"detach": true}));
    let (state, error, output) = process.done("disable", "disable-cluster", &detach);
    assert_eq!(state, "failed", "{output}");
    assert!(error.contains("esx3: the filter"), "{error}");
    assert_eq!(installed(&site), vec!["0.1.0-1"; 4], "{output}");
    assert!(
        site.world.state.lock().vms["vm-1"][&2000],
        "its protection is gone"
    );
    assert_eq!(process.clusters(), ["Gold enabled 0.1.0-1"]);
    // Those that had lost the component have no certificate any more; the one that kept it has.
    let expected = [
        "esx1 failed drva1",
        "esx2 failed drva1",
        "esx3 ready drva1",
        "esx4 failed drva1",
    ];
    assert_eq!(process.hosts(), expected);
    assert_eq!(process.enrolled(), ["esx3"]);
    process.all_hold_theirs("after the undo");
    assert!(process.problems()[0].contains("and its certificate with it"));
    assert_eq!(process.open_alarms().len(), 3);
    assert!(
        output.contains("host esx1: it had lost the component"),
        "{output}"
    );
    let output = process.succeeds("resolve", "resolve-cluster", &cluster());
    assert!(output.contains("4 of 4 hosts are ready"), "{output}");
    assert_eq!(process.certificates_in_force(), 4);
    process.all_hold_theirs("after resolving");
    assert!(process.open_alarms().is_empty());
    // DRS is looked at before anything is begun.
    site.world.state.lock().drs_off = true;
    asked(&site);
    let (_, error, _) = process.done("drs", "disable-cluster", &detach);
    assert!(error.contains("[drs-off]"), "{error}");
    assert!(asked(&site).is_empty());
}

#[test]
fn a_dead_host_is_left_only_if_that_is_said() {
    let (site, process) = enabled(4);
    host(&site, "esx2", |host| {
        host.connection = Connection::NotResponding
    });
    let (state, error, _) = process.done("a", "disable-cluster", &cluster());
    assert_eq!(state, "failed");
    assert!(error.contains("[host-unreachable]"), "{error}");
    assert!(asked(&site).is_empty());
    let leave = with(json!({"leave_unreachable": true}));
    let output = process.succeeds("b", "disable-cluster", &leave);
    assert!(
        output.contains("host esx2: vCenter does not reach it"),
        "{output}"
    );
    assert_eq!(installed(&site), ["-", "0.1.0-1", "-", "-"]);
    assert_eq!(process.clusters(), ["Gold disabled -"]);
    assert_eq!(process.certificates_in_force(), 0);
}

#[test]
fn an_upgrade_names_each_host_and_keeps_protection() {
    let (site, process) = enabled(4);
    process.protect("vm-1");
    process.upload(&site.folder(), "0.2.0-1");
    let output = process.succeeds("upgrade", "upgrade-cluster", &cluster());
    assert_eq!(installed(&site), vec!["0.2.0-1"; 4]);
    assert_eq!(process.clusters(), ["Gold enabled 0.2.0-1"]);
    for host in ["esx1", "esx2", "esx3", "esx4"] {
        assert!(
            output.contains(&format!("host {host}: has version 0.2.0-1")),
            "{output}"
        );
    }
    assert!(site.world.state.lock().vms["vm-1"][&2000]);
    assert_eq!(
        process.certificates_in_force(),
        4,
        "hosts stay who they are"
    );
    // To a version that is not here; and a package in use is not removed.
    let (_, error, _) = process.done(
        "x",
        "upgrade-cluster",
        &with(json!({"package_version": "9.9"})),
    );
    assert!(error.contains("no package of version 9.9"), "{error}");
    let gone = process.store.record(|t| {
        let package = msa::packages::of_version(t, "0.2.0-1")?.unwrap();
        msa::packages::delete(t, package.id)
    });
    assert!(gone.unwrap_err().to_string().contains("is on 1 clusters"));
}

#[test]
fn an_upgrade_that_fails_on_some_or_on_all() {
    let (site, process) = enabled(4);
    process.upload(&site.folder(), "0.2.0-1");
    host(&site, "esx3", |host| {
        host.refuses = Some("no maintenance mode".into())
    });
    let output = process.succeeds("some", "upgrade-cluster", &cluster());
    assert!(
        output.contains("host esx3 FAILED: vCenter: no maintenance mode"),
        "{output}"
    );
    assert_eq!(
        installed(&site),
        ["0.2.0-1", "0.2.0-1", "0.1.0-1", "0.2.0-1"]
    );
    assert_eq!(process.hosts()[2], "esx3 failed drva1");
    host(&site, "esx3", |host| host.refuses = None);
    process.succeeds("resolve", "resolve-cluster", &cluster());
    assert_eq!(installed(&site), vec!["0.2.0-1"; 4]);
    assert!(process.open_alarms().is_empty());
    // One that no host can run is taken back everywhere.
    process.upload(&site.folder(), "0.3.0-1");
    let dies = |dies: bool| {
        let mut state = site.world.state.lock();
        state
            .hosts
            .values_mut()
            .for_each(|host| host.daemon_dies = dies);
    };
    dies(true);
    let (state, error, _) = process.done("all", "upgrade-cluster", &cluster());
    assert_eq!(state, "failed");
    assert!(error.contains("no host could be upgraded"), "{error}");
    assert_eq!(installed(&site), vec!["0.2.0-1"; 4]);
    assert_eq!(process.clusters(), ["Gold enabled 0.2.0-1"]);
}

#[test]
fn what_is_left_blocked_is_said() {
    let site = Site::with_package(3);
    site.world
        .state
        .lock()
        .hosts
        .values_mut()
        .for_each(|host| host.daemon_dies = true);
    site.world.state.lock().drs_off = true; // so that it can be installed, and not removed
    let process = site.start();
    let (state, error, _) = process.done("enable", "enable-cluster", &cluster());
    assert_eq!(state, "blocked");
    assert!(
        error.contains("cannot be taken back: removing the filter"),
        "{error}"
    );
    assert!(process.open_alarms()[0].starts_with("execution-blocked"));
    site.world.state.lock().drs_off = false;
    let execution = process
        .store
        .read(|t| msa::executions::table::list(t, 0, 1))
        .unwrap();
    let system = msa::store::Actor::system();
    process.engine.retry(&system, execution[0].id).unwrap();
    process.run();
    assert_eq!(process.get(&execution[0]).state.word(), "failed");
    assert_eq!(installed(&site), vec!["-"; 3]);
    assert!(process.open_alarms().is_empty());
}
