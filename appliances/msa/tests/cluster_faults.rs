//! What clusters must not lose, and must not pretend to have: certificates of hosts that lost the component,
//! hosts that vCenter does not list, disks that were detached, a last step that was committed.
#![allow(clippy::unwrap_used)]

mod support;

use msa::clusters::rows;
use msa::executions::engine::Came;
use msa::executions::plan::Action;
use msa::vcenter::FilterSource;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use support::fake::FakeHost;
use support::site::{Process, Site, cluster};

fn with(more: Value) -> Value {
    let mut all = cluster();
    for (key, value) in more.as_object().unwrap() {
        all[key] = value.clone();
    }
    all
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

/// A host that works and has no certificate is not passed off as one that is protected.
#[test]
fn a_host_without_a_certificate_says_so() {
    let site = Site::with_package(3);
    let process = site.start();
    process.make_drva("drva1", 32873);
    let by_hand = with(json!({"enrol": false}));
    let output = process.succeeds("enable", "enable-cluster", &by_hand);
    assert!(
        output.contains("3 of 3 hosts are ready; 3 of these without a certificate"),
        "{output}"
    );
    assert_eq!(process.hosts()[0], "esx1 ready drva1");
    let problems = process.problems();
    assert_eq!(problems.len(), 3);
    assert!(
        problems[0].contains("it has no certificate"),
        "{problems:?}"
    );
    let alarms = process.open_alarms();
    assert_eq!(alarms[0], "host-without-certificate esx1");
    // Hosts get theirs, and it is not said any more; one loses it, and it is said again.
    process.succeeds("resolve", "resolve-cluster", &cluster());
    assert_eq!(
        (process.problems().len(), process.open_alarms().len()),
        (0, 0)
    );
    let settle = || {
        let now_ms = process.store.now_ms();
        let done = process.store.record(|t| {
            let clusters: Vec<msa::inventory::Cluster> = msa::inventory::list(t, 0, 9)?;
            rows::settle_certificates(t, clusters[0].id, now_ms)
        });
        done.unwrap();
    };
    settle();
    assert!(process.problems().is_empty());
    let revoked = process.store.record(|t| {
        let sql = "UPDATE certificates SET revoked_at_ms = 1, reason = 'x' \
                   WHERE entity_id = (SELECT id FROM hosts WHERE name = 'esx2')";
        Ok(t.execute(sql, [])?)
    });
    assert_eq!(revoked.unwrap(), 1);
    settle();
    assert!(process.problems()[0].starts_with("esx2: it has no certificate"));
    assert_eq!(process.open_alarms(), ["host-without-certificate esx2"]);
}

/// A host that was set up anew under its id has no certificate, whatever the state has.
#[test]
fn a_host_that_lost_the_filter_gets_a_new_certificate() {
    let (site, process) = enabled(3);
    host(&site, "esx2", |host| {
        host.installed = None;
        host.certificate = None;
    });
    let output = process.succeeds("resolve", "resolve-cluster", &cluster());
    assert!(
        output.contains("host esx2: the filter is gone from it"),
        "{output}"
    );
    assert_eq!(process.certificates_in_force(), 3);
    process.all_hold_theirs("after resolving");
    assert!(process.hosts()[1].contains("esx2 ready"), "{output}");
    // One that does not come for a new one has none.
    host(&site, "esx2", |host| {
        host.installed = None;
        host.certificate = None;
        host.enrols = false;
    });
    process.succeeds("again", "resolve-cluster", &cluster());
    assert_eq!(process.enrolled(), ["esx1", "esx3"]);
    assert_eq!(process.open_alarms(), ["host-not-ready esx2"]);
}

fn list_none(site: &Site, is_unlisted: bool) {
    let mut state = site.world.state.lock();
    let mut hosts = state.hosts.values_mut();
    hosts
        .by_ref()
        .for_each(|host| host.is_unlisted = is_unlisted);
}

#[test]
fn a_vcenter_that_lists_no_hosts_takes_nothing_from_any() {
    let (site, process) = enabled(3);
    list_none(&site, true);
    for kind in ["reconcile-cluster", "resolve-cluster", "disable-cluster"] {
        let name = kind.replace('-', "");
        let (state, error, output) = process.done(&name, kind, &cluster());
        assert_eq!(state, "failed", "{kind}: {output}");
        assert!(
            error.contains("vCenter lists no host in it"),
            "{kind}: {error}"
        );
        assert_eq!(process.certificates_in_force(), 3, "{kind}");
        assert_eq!(process.clusters(), ["Gold enabled 0.1.0-1"], "{kind}");
    }
    assert_eq!(
        process.open_alarms(),
        ["cluster-not-listed Gold (domain-c1)"]
    );
    list_none(&site, false);
    process.succeeds("back", "reconcile-cluster", &cluster());
    assert!(process.open_alarms().is_empty());
    assert_eq!(process.hosts().len(), 3);
    process.all_hold_theirs("after it was listed again");
    // A host that is missed, and listed again before it is looked at once more.
    for name in ["missed", "missed2"] {
        host(&site, "esx2", |host| host.is_unlisted = true);
        process.succeeds(name, "reconcile-cluster", &cluster());
        assert_eq!(process.open_alarms(), ["host-not-listed esx2"]);
        site.clock.advance_ms(rows::GONE_AFTER_MS);
        host(&site, "esx2", |host| host.is_unlisted = false);
        process.succeeds(&format!("{name}back"), "reconcile-cluster", &cluster());
        assert!(process.open_alarms().is_empty());
    }
    assert_eq!(process.certificates_in_force(), 3);
    // An upgrade takes nothing from a host that is not listed, however often.
    process.upload(&site.folder(), "0.2.0-1");
    host(&site, "esx2", |host| host.is_unlisted = true);
    process.succeeds("missed3", "reconcile-cluster", &cluster());
    site.clock.advance_ms(rows::GONE_AFTER_MS);
    process.succeeds("upgrade", "upgrade-cluster", &cluster());
    assert_eq!(process.certificates_in_force(), 3);
    // What is not listed keeps a cluster from being disabled, unless that is said.
    let (_, error, _) = process.done("disable", "disable-cluster", &cluster());
    assert!(
        error.contains("esx2: vCenter does not list it in the cluster any more"),
        "{error}"
    );
    process.succeeds(
        "leave",
        "disable-cluster",
        &with(json!({"leave_unreachable": true})),
    );
    assert_eq!(process.certificates_in_force(), 0);
    assert!(process.open_alarms().is_empty());
}

#[test]
fn a_cluster_is_meant_by_its_id_where_two_have_one_name() {
    let (site, process) = enabled(3);
    let others = BTreeMap::from([("domain-c7".to_owned(), "Gold".to_owned())]);
    site.world.state.lock().others = others;
    for kind in [
        "enable-cluster",
        "resolve-cluster",
        "upgrade-cluster",
        "disable-cluster",
    ] {
        let name = kind.replace('-', "");
        let (state, error, _) = process.done(&name, kind, &cluster());
        assert_eq!(state, "failed", "{kind}");
        assert!(
            error.contains("several clusters `Gold`: Gold (domain-c7), Gold (domain-c1)"),
            "{kind}: {error}"
        );
        assert!(error.contains("[cluster-ambiguous]"), "{kind}: {error}");
    }
    assert!(asked(&site).is_empty());
    let by_id = json!({"protected_cluster": "domain-c1"});
    for kind in ["resolve-cluster", "disable-cluster", "enable-cluster"] {
        process.succeeds(&format!("{}2", kind.replace('-', "")), kind, &by_id);
    }
    assert_eq!(process.clusters(), ["Gold enabled 0.1.0-1"]);
    assert_eq!(
        asked(&site),
        ["uninstall JetDR_jetdr_0.1.0-1", "install 0.1.0-1"]
    );
}

/// What was begun on several disks is given back on all of them, also if only some were left when it went
/// on after a restart.
#[test]
fn what_was_detached_before_a_restart_is_given_back_too() {
    let (site, process) = enabled(3);
    process.protect("vm-1");
    site.world
        .state
        .lock()
        .vms
        .get_mut("vm-1")
        .unwrap()
        .insert(2001, true);
    host(&site, "esx1", |host| {
        host.refuses = Some("no maintenance mode".into())
    });
    let policy = |id: &str| FilterSource::Policy(id.into());
    {
        let mut state = site.world.state.lock();
        state.policies.insert("gold".into(), Vec::new());
        for (key, id) in [(2000, "gold"), (2001, "deleted")] {
            state.sources.insert(("vm-1".into(), key), policy(id));
        }
    }
    let detach = with(json!({"detach": true}));
    let execution = process.submit("disable", "disable-cluster", &detach);
    let mut active = process.engine.take().unwrap().unwrap();
    // The server dies when one of the two disks is off, and the step is not noted as done.
    while process.engine.next(&mut active).unwrap() != Action::Run(2) {
        let action = process.engine.next(&mut active).unwrap();
        let came = process.engine.perform(&mut active, action);
        process.engine.note(&mut active, came).unwrap();
    }
    assert!(matches!(
        process.engine.perform(&mut active, Action::Run(2)),
        Came::Of(_)
    ));
    drop((active, process));
    site.world
        .state
        .lock()
        .vms
        .get_mut("vm-1")
        .unwrap()
        .insert(2001, true);
    let process = site.start();
    process.run();
    assert_eq!(process.get(&execution).state.word(), "failed");
    let state = site.world.state.lock();
    assert_eq!(
        state.vms["vm-1"],
        BTreeMap::from([(2000, true), (2001, true)])
    );
    // Each by what it had; where that is gone, with the domain that the state knows.
    assert_eq!(state.sources[&("vm-1".into(), 2000)], policy("gold"));
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let alone = FilterSource::Filter {
        name: "jetdr".into(),
        properties: vec![pair("jetdr.domain", "shop"), pair("jetdr.ack", "host")],
    };
    assert_eq!(state.sources[&("vm-1".into(), 2001)], alone);
}

/// The last step is done by a process that dies right then; the next one cannot ask vCenter anything.
#[test]
fn what_was_committed_needs_nobody_any_more() {
    let cases = [
        (
            "enable-cluster",
            "Gold enabled 0.1.0-1",
            "3 of 3 hosts are ready",
        ),
        (
            "upgrade-cluster",
            "Gold enabled 0.2.0-1",
            "cluster Gold has version 0.2.0-1",
        ),
        ("disable-cluster", "Gold disabled -", "is disabled"),
    ];
    for (kind, expected, says) in cases {
        let (site, process) = match kind {
            "enable-cluster" => {
                let site = Site::with_package(3);
                let process = site.start();
                (site, process)
            }
            _ => enabled(3),
        };
        if kind == "upgrade-cluster" {
            process.upload(&site.folder(), "0.2.0-1");
        }
        let execution = process.submit("killed", kind, &cluster());
        let mut active = process.engine.take().unwrap().unwrap();
        let last = active.execution.steps.len() - 1;
        loop {
            let action = process.engine.next(&mut active).unwrap();
            let came = process.engine.perform(&mut active, action);
            if action == Action::Run(last) {
                assert!(matches!(came, Came::Of(_)), "{kind}: {came:?}");
                break;
            }
            process.engine.note(&mut active, came).unwrap();
        }
        drop((active, process));
        site.world.state.lock().is_down = true;
        let process = site.start();
        // Nor does anybody cancel it any more.
        process
            .engine
            .cancel(&msa::store::Actor::system(), execution.id)
            .unwrap();
        process.run();
        let ended = process.get(&execution);
        let output = process.output(&execution);
        assert_eq!(ended.state.word(), "succeeded", "{kind}: {output}");
        assert_eq!(process.clusters(), [expected], "{kind}");
        assert_eq!(output.matches(says).count(), 1, "{kind}: {output}");
    }
}
