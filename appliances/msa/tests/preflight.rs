//! Preflight: each fault that it documents is found, named, and said what to do about; nothing changes.
#![allow(clippy::unwrap_used)]

mod support;

use msa::clusters::preflight::FindingKind;
use msa::vcenter::{Connection, Extension};
use serde_json::{Value, json};
use support::fake::State;
use support::site::{Site, cluster};

/// Runs a preflight in a world that `spoil` has changed; its error and output.
fn found(kind: &str, parameters: &Value, spoil: impl FnOnce(&mut State)) -> (String, String) {
    let site = Site::with_package(3);
    spoil(&mut site.world.state.lock());
    let process = site.start();
    let (state, error, output) = process.done("look", kind, parameters);
    assert!(
        site.world.state.lock().asked.is_empty(),
        "it changed something"
    );
    assert!(process.clusters().is_empty() && process.hosts().is_empty());
    match state.as_str() {
        "succeeded" => (String::new(), output),
        "failed" => (error, output),
        other => panic!("{other}: {output}"),
    }
}

/// It finds just this, and the text names where.
fn finds(kind: FindingKind, parameters: &Value, names: &str, spoil: impl FnOnce(&mut State)) {
    let (error, output) = found("preflight-install", parameters, spoil);
    assert!(
        error.contains(&format!("[{kind}]")),
        "{kind}: {error}\n{output}"
    );
    assert!(
        output.contains(names),
        "{kind} does not say {names}: {output}"
    );
    let all = output.lines().filter(|line| line.ends_with(']')).count();
    assert_eq!(all, 1, "{kind} is not alone: {output}");
}

fn of(more: Value) -> Value {
    let mut all = cluster();
    for (key, value) in more.as_object().unwrap() {
        all[key] = value.clone();
    }
    all
}

#[test]
fn a_good_cluster_has_nothing() {
    let parameters = of(json!({
        "vm_name": "msa-1", "network": "management", "datastore": "fast", "cluster": "Gold",
    }));
    let (error, output) = found("preflight-install", &parameters, |_| {});
    assert_eq!(error, "", "{output}");
    assert!(output.contains("nothing found"), "{output}");
    let (error, output) = found("preflight-system", &json!({}), |_| {});
    assert_eq!(error, "", "{output}");
}

#[test]
fn names_and_numbers() {
    use FindingKind::*;
    finds(TooFewHosts, &cluster(), "Gold has 2 hosts", |state| {
        state.hosts.remove("host-3");
    });
    let parameters = json!({"protected_cluster": "Silver"});
    finds(
        ClusterUnknown,
        &parameters,
        "it has [Gold (domain-c1)]",
        |_| {},
    );
    finds(
        VmNameTaken,
        &of(json!({"vm_name": "Taken"})),
        "vm-9",
        |_| {},
    );
    let parameters = of(json!({"datastore": "slow"}));
    finds(DatastoreUnknown, &parameters, "it has [fast]", |_| {});
    let parameters = of(json!({"network": "dmz"}));
    finds(NetworkUnknown, &parameters, "it has [management]", |_| {});
    // Of the server's own cluster too.
    let parameters = of(json!({"network": "dmz", "cluster": "Gold"}));
    finds(NetworkUnknown, &parameters, "it has [management]", |_| {});
    finds(
        ClusterUnknown,
        &of(json!({"cluster": "Tin"})),
        "Tin",
        |_| {},
    );
}

fn plugin() -> Extension {
    Extension {
        key: "jetdr".into(),
        label: "jetdr".into(),
        company: "jetdr".into(),
        version: "0.1.0".parse().unwrap(),
        url: Some("https://old.example.org".into()),
    }
}

#[test]
fn the_plug_in_is_there_or_is_not() {
    finds(
        FindingKind::PluginPresent,
        &cluster(),
        "old.example.org",
        |state| state.plugin = Some(plugin()),
    );
    let (error, _) = found("preflight-uninstall", &cluster(), |_| {});
    assert!(error.contains("[plugin-absent]"), "{error}");
    let (error, _) = found("preflight-uninstall", &cluster(), |state| {
        state.plugin = Some(plugin());
    });
    assert_eq!(error, "");
    let (error, output) = found("preflight-uninstall", &cluster(), |state| {
        state.plugin = Some(plugin());
        state.drs_off = true;
        state.hosts.remove("host-1");
    });
    assert!(error.contains("[too-few-hosts]; 1 more"), "{error}");
    assert!(output.contains("[drs-off]"), "{output}");
}

#[test]
fn vcenter_itself() {
    use FindingKind::*;
    finds(VcenterTooOld, &cluster(), "6.5.0", |state| {
        state.version = "6.5.0".into();
    });
    finds(VcenterClock, &cluster(), "1001 ms", |state| {
        state.skew_ms = -1001
    });
    finds(
        VcenterUnreachable,
        &cluster(),
        "connection refused",
        |state| {
            state.is_down = true;
        },
    );
    for kind in ["preflight-system", "preflight-uninstall"] {
        let (error, _) = found(kind, &of_kind(kind), |state| state.is_down = true);
        assert!(error.contains("[vcenter-unreachable]"), "{error}");
    }
    // A second is no fault yet.
    let (error, _) = found("preflight-system", &json!({}), |state| state.skew_ms = 1000);
    assert_eq!(error, "");
}

fn of_kind(kind: &str) -> Value {
    match kind {
        "preflight-system" => json!({}),
        _ => cluster(),
    }
}

#[test]
fn hosts_one_by_one() {
    use FindingKind::*;
    let host = |spoil: fn(&mut support::fake::FakeHost)| {
        move |state: &mut State| spoil(state.hosts.get_mut("host-2").unwrap())
    };
    finds(
        HostUnreachable,
        &cluster(),
        "esx2",
        host(|one| one.connection = Connection::NotResponding),
    );
    finds(
        HostClock,
        &cluster(),
        "esx2: its clock is 1001 ms",
        host(|one| one.skew_ms = 1001),
    );
    finds(
        HostClock,
        &cluster(),
        "esx2",
        host(|one| one.skew_ms = -1001),
    );
    finds(CimOff, &cluster(), "esx2", host(|one| one.has_cim = false));
    finds(
        DnsMissing,
        &cluster(),
        "esx2 has no name server",
        host(|one| one.has_dns = false),
    );
    finds(
        DnsMissing,
        &cluster(),
        "`esx2.nowhere` does not resolve",
        host(|one| one.name = "esx2.nowhere".into()),
    );
    finds(
        VersionsMixed,
        &cluster(),
        "8.0.1: esx2; 8.0.2: esx1, esx3",
        host(|one| one.version = "8.0.1".into()),
    );
    // A second is no fault yet.
    let (error, _) = found(
        "preflight-install",
        &cluster(),
        host(|one| one.skew_ms = 1000),
    );
    assert_eq!(error, "");
}

#[test]
fn hosts_all_of_one_version_that_does_not_do() {
    use FindingKind::*;
    let all = |version: &'static str, build: u64| {
        move |state: &mut State| {
            for host in state.hosts.values_mut() {
                host.version = version.into();
                host.build = build;
            }
        }
    };
    let kinds = |version, build| {
        let (error, output) = found("preflight-install", &cluster(), all(version, build));
        let named = |kind: FindingKind| {
            let named =
                |line: &&str| line.starts_with("host ") && line.ends_with(&format!("[{kind}]"));
            output.lines().filter(named).count()
        };
        (error.is_empty(), named(HostTooOld), named(HostTooNew))
    };
    assert_eq!(kinds("6.7.0", 10_302_607), (false, 3, 0));
    // The package is for 7.0.0 or later, and below 9.0.0.
    assert_eq!(kinds("6.7.0", 10_302_608), (false, 3, 0));
    assert_eq!(kinds("7.0.0", 15_843_807), (true, 0, 0));
    assert_eq!(kinds("9.0.0", 1), (false, 0, 3));
}

#[test]
fn no_vcenter_or_no_login_is_said() {
    let site = Site::new(3);
    let process = site.start();
    let unknown = json!({"vcenter": "vc9"});
    let (_, error, _) = process.done("a", "preflight-system", &unknown);
    assert!(error.contains("known are [vc1]"), "{error}");
    std::fs::remove_dir_all(site.folder().join(msa::outside::VAULT)).unwrap();
    let (_, error, _) = process.done("b", "preflight-system", &json!({}));
    assert!(error.contains("no user of vCenter"), "{error}");
    let asked = json!({"name": "c", "kind": "preflight-install", "parameters": {"cluster": 7}});
    let asked = serde_json::from_value(asked).unwrap();
    let refused = process.engine.submit(&msa::store::Actor::system(), &asked);
    assert!(refused.unwrap_err().to_string().contains("parameters"));
}
