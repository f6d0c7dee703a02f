//! The management server installed and uninstalled by the command, against a simulated cluster: real processes,
//! a real package, a real server. Killed at each step, it goes on by the same command.
#![allow(clippy::unwrap_used)]

#[path = "install/place.rs"]
mod place;
mod support;

use place::{Place, SERVICE_USER, Vcenter, name_server};
use serde_json::json;

#[test]
fn an_installed_server_works_and_an_uninstalled_one_leaves_nothing() {
    let vcenter = Vcenter::new();
    let before = vcenter.seen();
    let place = Place::new(&vcenter);
    let output = place.installs(&[]);
    assert!(output.contains("3 of 3 hosts are ready"), "{output}");

    // What it made in vCenter.
    let access = vcenter.tell(&json!({"cmd": "access"}));
    let roles = access["roles"].as_array().unwrap();
    let role = roles.iter().find(|role| role["name"] == "jetdr").unwrap();
    let permissions = access["permissions"].as_array().unwrap();
    let given = permissions
        .iter()
        .find(|one| one["principal"] == SERVICE_USER);
    assert_eq!(given.unwrap()["roleId"], role["roleId"]);
    let extension = vcenter.tell(&json!({"cmd": "extension", "key": "jetdr"}));
    let url = format!("https://localhost:{}", place.port);
    assert_eq!(extension["extension"]["server"][0]["url"], url);
    assert_eq!(vcenter.machines(), ["msa-1"]);

    // The server is the one that says so, and its administrator is the one who was made up.
    let client = place.log_in();
    let me = client.call("GET", "/me", None).unwrap();
    assert_eq!(
        (&me["name"], &me["role"]),
        (&json!("admin"), &json!("admin"))
    );
    let clusters = client.call("GET", "/clusters", None).unwrap();
    assert_eq!(clusters["items"][0]["state"], "enabled");
    assert!(vcenter.hosts_have_it());
    let mode = std::os::unix::fs::PermissionsExt::mode;
    let kept = place.dir.join("admin-password").metadata().unwrap();
    assert_eq!(mode(&kept.permissions()) & 0o777, 0o600);

    // Again: nothing to do; and started again, if it does not run.
    let output = place.installs(&[]);
    assert!(output.contains("nothing to do"), "{output}");
    place.kill_server();
    let output = place.installs(&[]);
    assert!(output.contains("was started"), "{output}");
    place.log_in();
    let error = place.refused(&place.install(&["--min-hosts", "2"]));
    assert!(error.contains("with other fields"), "{error}");

    let output = place.uninstalls(&[]);
    assert!(output.contains("its ports are closed"), "{output}");
    assert_eq!(vcenter.seen(), before);
    assert!(!place.is_running());
    // Its state stays until it is told to go.
    assert!(place.dir.join("msa/msa.sqlite").exists());
    let error = place.refused(&place.install(&[]));
    assert!(error.contains("--purge"), "{error}");
    place.uninstalls(&["--purge"]);
    assert!(!place.dir.exists());
    let output = place.uninstalls(&["--purge"]);
    assert!(output.contains("nothing to do"), "{output}");
}

#[test]
fn killed_before_and_after_each_step_it_goes_on_and_so_does_the_way_back() {
    let vcenter = Vcenter::new();
    let before = vcenter.seen();
    let place = Place::new(&vcenter);
    let steps = 9;
    for step in 0..steps {
        place.killed_around(&place.install(&[]), "install", step);
    }
    let output = place.installs(&[]);
    assert!(output.contains("going on"), "{output}");
    assert!(vcenter.hosts_have_it());
    assert_eq!(vcenter.machines(), ["msa-1"]);
    place.log_in();
    for step in 0..steps {
        place.killed_around(&place.uninstall(&[]), "uninstall", step);
    }
    place.uninstalls(&["--purge"]);
    assert_eq!(vcenter.seen(), before);
    assert!(!place.is_running() && !place.dir.exists());
}

#[test]
fn a_killed_installation_is_taken_back_from_any_step() {
    let vcenter = Vcenter::new();
    let before = vcenter.seen();
    for step in 1..=9 {
        let place = Place::new(&vcenter);
        let point = format!("install.after-step:{step}");
        place.killed(&place.install(&[]), &point, step);
        let output = place.uninstalls(&[]);
        assert!(output.contains("all of it is taken back"), "{output}");
        assert_eq!(vcenter.seen(), before, "after step {step}");
        assert!(!place.is_running() && !place.dir.exists());
    }
}

#[test]
fn what_fails_is_taken_back_by_itself() {
    let vcenter = Vcenter::new();
    let before = vcenter.seen();
    // No user of this name: the third step.
    let place = Place::new(&vcenter);
    let error = place.refused(&place.install(&["--service-user", "nobody@vsphere.local"]));
    assert!(
        error.contains("giving nobody@vsphere.local the role jetdr"),
        "{error}"
    );
    assert!(error.contains("all of it is taken back"), "{error}");
    assert_eq!(vcenter.seen(), before);
    assert!(!place.dir.exists());

    // Hosts do not take an unsigned package: the last step. Nobody mends that while it is waited for.
    let unsigned = vcenter.unsigned_package();
    let unsigned = unsigned.to_str().unwrap();
    let error = place.refused(&place.install(&["--package", unsigned, "--timeout-s", "5"]));
    assert!(error.contains("enabling the cluster"), "{error}");
    assert!(error.contains("all of it is taken back"), "{error}");
    assert_eq!(vcenter.seen(), before);
    assert!(!place.is_running() && !place.dir.exists());

    // What cannot be taken back now is when the same command is given again.
    place.killed(&place.install(&[]), "install.before-step:3", 2);
    let wrong = place.file("wrong", "not the password");
    let wrong = wrong.to_str().unwrap();
    let error = place.refused(&place.install(&["--vcenter-password-file", wrong]));
    assert!(error.contains("does not take the login"), "{error}");
    assert!(place.dir.exists());
    place.uninstalls(&[]);
    assert_eq!(vcenter.seen(), before);
}

#[test]
fn all_that_is_wrong_is_told_before_anything_is_begun() {
    let vcenter = Vcenter::new();
    let place = Place::new(&vcenter);
    vcenter.tell(&json!({"cmd": "add-vm", "name": "taken", "host": vcenter.hosts[0], "disks": []}));
    let taken_port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken_port.local_addr().unwrap().port().to_string();
    let text = place.file("text", "no package");
    let text = text.to_str().unwrap();
    let before = vcenter.seen();
    for (more, name) in [
        (&["--protected-cluster", "Two"][..], "cluster-unknown"),
        (&["--cluster", "Two"], "cluster-unknown"),
        (&["--datastore", "other"], "datastore-unknown"),
        (&["--network", "other"], "network-unknown"),
        (&["--vm-name", "taken"], "vm-name-taken"),
        (&["--min-hosts", "4"], "too-few-hosts"),
        (&["--host-name", "no.such.name.invalid"], "dns-missing"),
        (&["--host-name", "192.0.2.7"], "address-absent"),
        (&["--port", &port], "port-taken"),
        (&["--package", text], "package"),
        (&["--package", "/no/such/package"], "package"),
        (&["--vcenter-password-file", text], "vcenter-unreachable"),
        (&["--vcenter-port", "1"], "vcenter-unreachable"),
        (&["--service-user", place::USER], "user-has-role"),
    ] {
        let error = place.refused(&place.install(more));
        assert!(error.contains(&format!("[{name}]")), "{more:?}: {error}");
        assert!(error.contains("nothing was begun"), "{more:?}: {error}");
        assert!(!place.dir.exists(), "{more:?}");
    }
    // Several at once are all told.
    let error = place.refused(&place.install(&["--datastore", "other", "--vm-name", "taken"]));
    for name in ["[datastore-unknown]", "[vm-name-taken]"] {
        assert!(error.contains(name), "{error}");
    }
    assert_eq!(vcenter.seen(), before);
    drop(taken_port);

    // What somebody else put there.
    std::fs::create_dir(&place.dir).unwrap();
    std::fs::write(place.dir.join("msa.log"), "somebody's").unwrap();
    let error = place.refused(&place.install(&[]));
    assert!(error.contains("[folder-taken]"), "{error}");
    assert!(place.dir.join("msa.log").exists());
    std::fs::remove_dir_all(&place.dir).unwrap();
    let host = &vcenter.hosts[1];
    vcenter.tell(&json!({"cmd": "set-host", "host": host, "clock_ahead_ms": 5000}));
    let error = place.refused(&place.install(&[]));
    assert!(error.contains("[host-clock]"), "{error}");
    vcenter.tell(&json!({"cmd": "set-host", "host": host, "clock_ahead_ms": 0}));

    // An installation that is there is found by the next one, wherever that is.
    let other = Place::new(&vcenter);
    place.installs(&[]);
    let error = other.refused(&other.install(&["--vm-name", "msa-2"]));
    for name in ["[plugin-present]", "[role-present]", "[user-has-role]"] {
        assert!(error.contains(name), "{error}");
    }
    // A cluster that cannot be left now is not touched.
    let cluster = &vcenter.cluster;
    vcenter.tell(&json!({"cmd": "set-drs", "cluster": cluster, "on": false}));
    let error = place.refused(&place.uninstall(&[]));
    assert!(error.contains("[drs-off]"), "{error}");
    assert!(vcenter.hosts_have_it() && place.is_running());
    vcenter.tell(&json!({"cmd": "set-drs", "cluster": cluster, "on": true}));
    place.uninstalls(&["--purge"]);
    assert_eq!(vcenter.seen(), before);
}

#[test]
fn a_static_address_is_checked_and_used() {
    let vcenter = Vcenter::new();
    let before = vcenter.seen();
    let place = Place::new(&vcenter);
    let right = name_server("localhost", [127, 0, 0, 1]).to_string();
    let elsewhere = name_server("localhost", [10, 0, 0, 7]).to_string();
    let install = |changes: &[(&str, &str)]| {
        let mut fields = vec![
            ("--ms-ip", "127.0.0.1"),
            ("--netmask", "24"),
            ("--gateway", "127.0.0.254"),
            ("--dns", right.as_str()),
        ];
        for (name, value) in changes {
            fields.retain(|(known, _)| known != name);
            fields.push((name, value));
        }
        let more: Vec<&str> = fields.iter().flat_map(|(n, v)| [*n, *v]).collect();
        place.install_static(&more)
    };
    for (change, name) in [
        (("--netmask", "32"), "netmask"),
        (("--ms-ip", "127.0.0.255"), "netmask"),
        (("--gateway", "127.0.1.254"), "gateway"),
        (("--ms-ip", "192.0.2.7"), "address-absent"),
        (("--dns", elsewhere.as_str()), "dns-wrong"),
    ] {
        let error = place.refused(&install(&[change]));
        assert!(error.contains(&format!("[{name}]")), "{change:?}: {error}");
        assert!(!place.dir.exists());
    }
    let mut by_ip = install(&[]);
    by_ip.push("--register-with-ip".into());
    let output = place.succeeds(&by_ip);
    let url = format!("https://127.0.0.1:{}", place.port);
    assert!(output.contains(&url), "{output}");
    let extension = vcenter.tell(&json!({"cmd": "extension", "key": "jetdr"}));
    assert_eq!(extension["extension"]["server"][0]["url"], url);
    place.log_in();
    place.uninstalls(&["--purge"]);
    assert_eq!(vcenter.seen(), before);
}
