//! The VI-JSON client against the simulated vCenter: what it reads, and each refusal.
#![allow(clippy::unwrap_used)]

mod support;

use simcluster::{DiskSpec, MachineSpec};
use support::{PASSWORD, Site, USER, client_of, refused};
use vcenter::trust::Trust;
use vcenter::{Client, Connection, Extension, Fault, Login, Moid, Vcenter, VibTrust};

#[test]
fn what_is_read_is_what_is_there() {
    let site = Site::new(2);
    let about = site.client.about().unwrap();
    assert_eq!(about.version.as_str(), "8.0.3");
    let now_ms = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as i64;
    assert!((now_ms - about.now_ms).abs() < 60_000);
    let other = site.world.add_cluster("Two", false).unwrap();
    let clusters = site.client.clusters().unwrap();
    let names: Vec<(&str, bool, usize)> = clusters
        .iter()
        .map(|one| (one.name.as_str(), one.drs_enabled, one.hosts.len()))
        .collect();
    assert_eq!(names, [("One", true, 2), ("Two", false, 0)]);
    assert_eq!(clusters[0].datastores.len(), 1);
    assert!(
        site.client
            .hosts(&other.parse().unwrap())
            .unwrap()
            .is_empty()
    );
    // What preflight asks of hosts.
    let first = site.world.host(&site.hosts[0]).unwrap();
    first.set(|settings| {
        settings.clock_ahead_ms = 5000;
        settings.is_cim_running = false;
        settings.dns_servers.clear();
        settings.version = "7.0.3".into();
        settings.build = 17;
    });
    let hosts = site.client.hosts(&site.cluster).unwrap();
    let about = site.client.about().unwrap();
    let ahead = |host: &vcenter::HostInfo| host.now_ms.unwrap() - about.now_ms;
    assert!(
        (3000..8000).contains(&ahead(&hosts[0])),
        "{}",
        ahead(&hosts[0])
    );
    assert!(ahead(&hosts[1]).abs() < 2000);
    assert_eq!((hosts[0].version.as_str(), hosts[0].build), ("7.0.3", 17));
    assert!(!hosts[0].is_cim_running() && hosts[1].is_cim_running());
    assert!(hosts[0].dns_servers.is_empty() && !hosts[1].dns_servers.is_empty());
    assert!(
        hosts[1]
            .rulesets
            .iter()
            .any(|one| one.key == "httpClient" && one.is_enabled)
    );
    first.set(|settings| settings.is_reachable = false);
    site.world.set_disconnected(&site.hosts[1], true).unwrap();
    let hosts = site.client.hosts(&site.cluster).unwrap();
    assert_eq!(hosts[0].connection, Connection::NotResponding);
    assert_eq!(
        (hosts[1].connection, hosts[1].now_ms),
        (Connection::Disconnected, None)
    );
    let nobody = "domain-c999".parse().unwrap();
    assert_eq!(refused(site.client.hosts(&nobody)), "NotFound");
    assert_eq!(refused(site.client.vms(&nobody)), "NotFound");
}

#[test]
fn machines_are_read_in_any_number_and_with_what_forbids_protection() {
    let site = Site::new(1);
    for number in 0..40 {
        site.vm(&format!("vm{number}"), &site.hosts[0], 0);
    }
    let disk = |shared, physical_rdm| DiskSpec {
        bytes: 4 << 20,
        shared,
        physical_rdm,
    };
    let spec = MachineSpec {
        name: "odd".into(),
        host: site.hosts[0].clone(),
        disks: vec![disk(false, false), disk(true, false), disk(false, true)],
        snapshots: true,
    };
    let odd: Moid = site.world.add_vm(&spec).unwrap().parse().unwrap();
    let vms = site.client.vms(&site.cluster).unwrap();
    assert_eq!(vms.len(), 41, "pages of an answer are missing");
    let found = vms.iter().find(|vm| vm.moid == odd).unwrap();
    assert!(found.has_snapshots && !found.is_powered_on);
    assert_eq!(
        found.host.as_ref().map(Moid::as_str),
        Some(site.hosts[0].as_str())
    );
    let disks: Vec<(i32, u64, bool, bool)> = found
        .disks
        .iter()
        .map(|d| (d.key, d.capacity_bytes, d.is_shared, d.is_physical_rdm))
        .collect();
    let bytes = 4 << 20;
    assert_eq!(
        disks,
        [
            (2000, bytes, false, false),
            (2001, bytes, true, false),
            (2002, bytes, false, true)
        ]
    );
    assert_eq!(site.client.vms_named("odd").unwrap(), [odd]);
    assert!(site.client.vms_named("none").unwrap().is_empty());
}

#[test]
fn each_method_declares_its_faults() {
    let site = Site::new(1);
    let (client, cluster) = (&site.client, &site.cluster);
    let trust = VibTrust::HostAuthorities;
    let alone = site.host("esx-alone", |_| {});
    let alone: Moid = alone.parse().unwrap();
    let nobody: Moid = "domain-c999".parse().unwrap();
    assert_eq!(
        refused(client.install_filter(&nobody, &site.url(), &trust)),
        "NotFound"
    );
    assert_eq!(refused(client.uninstall_filter(cluster, "x")), "NotFound");
    assert_eq!(
        refused(client.upgrade_filter(cluster, "x", &site.url(), &trust)),
        "NotFound"
    );
    assert_eq!(refused(client.filter_issues(cluster, "x")), "NotFound");
    assert_eq!(refused(client.disks_using(cluster, "x")), "NotFound");
    assert_eq!(refused(client.resolve_on_cluster(cluster, "x")), "NotFound");
    assert_eq!(refused(client.resolve_on_host(&alone, "x")), "NotFound");
    assert_eq!(
        refused(client.resolve_on_host(&site.hosts[0].parse().unwrap(), "x")),
        "NotFound"
    );
    assert!(
        client.filters(cluster).unwrap().is_empty(),
        "nothing is an empty list"
    );
    site.install();
    site.world.set_drs(cluster.as_str(), false).unwrap();
    assert_eq!(
        refused(client.uninstall_filter(cluster, support::FILTER)),
        "InvalidState"
    );
    let bad = VibTrust::Pinned("no certificate".into());
    site.world.set_drs(cluster.as_str(), true).unwrap();
    let task = client.uninstall_filter(cluster, support::FILTER).unwrap();
    site.succeeds(&task);
    let task = client
        .install_filter(cluster, &site.web.tls_url("/jetdr.vib"), &bad)
        .unwrap();
    site.fails(&task);
    let host = "host-999".parse().unwrap();
    assert_eq!(refused(client.enter_maintenance(&host)), "NotFound");
    assert_eq!(refused(client.exit_maintenance(&host)), "NotFound");
    // A single host is no cluster. The client asks for clusters only, so it is asked by hand.
    let single = serde_json::json!({"type": "ComputeResource", "value": format!("alone-{alone}")});
    let answer = site
        .world
        .install_filter(&single, &site.url(), &serde_json::Value::Null);
    let document = answer.unwrap_err().document();
    assert_eq!(document["_typeName"], "InvalidArgument");
}

#[test]
fn extensions_come_and_go() {
    let site = Site::new(0);
    let extension = Extension {
        key: "com.example.jetdr".into(),
        label: "jetdr".into(),
        company: "jetdr".into(),
        version: "0.1.0".parse().unwrap(),
        url: Some("https://msa.example.org".into()),
    };
    assert_eq!(site.client.extension(&extension.key).unwrap(), None);
    assert_eq!(
        refused(site.client.unregister_extension(&extension.key)),
        "NotFound"
    );
    site.client.register_extension(&extension).unwrap();
    assert_eq!(
        site.client.extension(&extension.key).unwrap(),
        Some(extension.clone())
    );
    assert_eq!(
        refused(site.client.register_extension(&extension)),
        "InvalidArgument"
    );
    site.client.unregister_extension(&extension.key).unwrap();
    assert_eq!(site.client.extension(&extension.key).unwrap(), None);
}

#[test]
fn who_may_not_is_told_and_a_session_that_ended_is_begun_again() {
    let site = Site::new(0);
    assert_eq!(
        refused(client_of(&site.server, "wrong").clusters()),
        "NotAuthenticated"
    );
    site.client.clusters().unwrap();
    site.world.end_sessions();
    assert_eq!(site.client.clusters().unwrap().len(), 1);
    // Without a session nothing but what is needed to get one.
    let trust = Trust::authorities_of(site.server.certificate.as_bytes()).unwrap();
    let web = reqwest::blocking::Client::builder()
        .tls_backend_preconfigured(trust.client_config().unwrap())
        .build()
        .unwrap();
    let get = |path: &str| {
        let url = format!("https://{}/sdk/vim25/8.0.1.0/{path}", site.server.address);
        let answer = web.get(url).send().unwrap();
        (answer.status().as_u16(), answer.text().unwrap())
    };
    assert_eq!(get("ServiceInstance/ServiceInstance/content").0, 200);
    let (status, text) = get("Folder/group-d1/childEntity");
    assert!(
        status == 500 && text.contains("NotAuthenticated"),
        "{status} {text}"
    );
    // Another server's certificate, or none of an authority that is trusted.
    let other = support::web::Web::start();
    let trusts = [
        Trust::authorities_of(other.certificate.as_bytes()).unwrap(),
        Trust::pinned_to(other.certificate.as_bytes()).unwrap(),
    ];
    for trust in trusts {
        let client = Client::new(Login {
            address: site.server.address.to_string(),
            user: USER.into(),
            password: PASSWORD.into(),
            trust,
        });
        let fault = client.unwrap().clusters().unwrap_err();
        let Fault::Other(words) = fault else {
            panic!("{fault:?}")
        };
        assert!(words.contains("certificate"), "{words}");
    }
    let pinned = Client::new(Login {
        address: site.server.address.to_string(),
        user: USER.into(),
        password: PASSWORD.into(),
        trust: Trust::pinned_to(site.server.certificate.as_bytes()).unwrap(),
    });
    assert_eq!(pinned.unwrap().clusters().unwrap().len(), 1);
    for bad in ["", "a b", "host/path", "host?x"] {
        let login = Login {
            address: bad.into(),
            user: USER.into(),
            password: PASSWORD.into(),
            trust: Trust::pinned_to(site.server.certificate.as_bytes()).unwrap(),
        };
        assert!(Client::new(login).is_err(), "{bad}");
    }
    assert!(Trust::authorities_of(b"").is_err() && Trust::pinned_to(b"x").is_err());
}

/// What the client has no methods for yet is asked as it would ask.
#[test]
fn options_networks_and_recent_tasks_are_there() {
    let site = Site::new(1);
    let host = site.world.host(&site.hosts[0]).unwrap();
    let before = site.listing(&site.hosts[0]);
    let document = site.world.document("HostSystem", &site.hosts[0]).unwrap();
    let manager = &document["configManager"]["advancedOption"]["value"];
    let manager = manager.as_str().unwrap();
    let set = |value: &str| {
        let value = serde_json::json!({"_typeName": "string", "_value": value});
        let change = serde_json::json!([{"key": "UserVars.Token", "value": value}]);
        site.world.update_options(manager, &change)
    };
    let esxcli = |words: &str| {
        let mut esxcli = std::process::Command::new(site.root(&site.hosts[0]).join("bin/esxcli"));
        esxcli.args(["system", "settings", "advanced"]);
        let output = esxcli.args(words.split(' ')).output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let shown = || esxcli("list -o /UserVars/Token").1;
    assert_eq!(shown(), "");
    // As on a host: what nobody defined is not there.
    let refused = set("too early").unwrap_err();
    assert!(
        format!("{refused:?}").contains("InvalidName"),
        "{refused:?}"
    );
    assert!(!esxcli("set -d -o /UserVars/Token").0 && !esxcli("remove -o Token").0);
    assert!(esxcli("add -o Token -t string -d words").0 && !esxcli("add -o Token -t string").0);
    assert!(shown().ends_with("String Value: \n"), "{}", shown());
    set("first word's").unwrap();
    assert!(
        shown().ends_with("String Value: first word's\n"),
        "{}",
        shown()
    );
    assert!(site.world.options(manager, Some("UserVars.Other")).is_err());
    assert!(set("two\nlines").is_err());
    assert!(esxcli("set -d -o /UserVars/Token").0);
    assert!(shown().ends_with("String Value: \n"), "{}", shown());
    assert!(esxcli("remove -o Token").0);
    assert!(shown().is_empty() && before == site.listing(&site.hosts[0]));
    host.set(|settings| settings.is_reachable = false);
    assert!(set("nobody hears").is_err());
    host.set(|settings| settings.is_reachable = true);
    site.install();
    let cluster = || {
        let id = site.cluster.as_str();
        site.world.document("ClusterComputeResource", id).unwrap()
    };
    assert_eq!(cluster()["recentTask"].as_array().unwrap().len(), 1);
    let network = &cluster()["network"][0];
    let (kind, id) = (
        network["type"].as_str().unwrap(),
        network["value"].as_str().unwrap(),
    );
    assert_eq!(site.world.document(kind, id).unwrap()["name"], "VM Network");
}
