//! Packages, logins and clusters by REST: what an operator sends, what a host gets, what is never shown.
#![allow(clippy::unwrap_used)]

mod support;

use msa::clock::{Clock, ManualClock, SystemClock};
use msa::clusters::watch;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use support::fake::{FakeHost, World};
use support::site::vib;
use support::{Client, Server, wait_for};

const KIND: &str = "Content-Type: application/octet-stream\r\n";

fn upload(client: &Client, bytes: &[u8]) -> (u16, Value) {
    let (status, _, body) = client.try_send("POST", "/packages", KIND, bytes).unwrap();
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

#[test]
fn a_package_is_looked_at_and_served_as_it_came() {
    let server = Server::start();
    let admin = server.admin();
    let bytes = vib("0.1.0-1");
    let (status, package) = upload(&admin, &bytes);
    assert_eq!(status, 201, "{package}");
    assert_eq!(package["version"], "0.1.0-1");
    assert_eq!(
        (&package["host_from"], &package["host_below"]),
        (&json!("7.0.0"), &json!("9.0.0"))
    );
    // A host shows nothing, and gets the very bytes.
    let sha256 = package["sha256"].as_str().unwrap();
    let path = format!("/vib/{sha256}/{}", package["file_name"].as_str().unwrap());
    let get = |path: &str| server.client().try_send("GET", path, "", b"").unwrap();
    let (status, _, found) = get(&path);
    assert_eq!((status, found == bytes), (200, true));
    assert_eq!(get(&format!("/vib/{}/x.vib", "0".repeat(64))).0, 404);
    assert_eq!(get("/vib/..%2f..%2fca.key/x").0, 400);
    // The same again, and what no host would take.
    assert_eq!(upload(&admin, &bytes).0, 409);
    let mut damaged = vib("0.2.0-1");
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let (status, answer) = upload(&admin, &damaged);
    assert_eq!(status, 422, "{answer}");
    assert!(
        answer["detail"]
            .as_str()
            .unwrap()
            .contains("no host would take it"),
        "{answer}"
    );
    assert_eq!(upload(&admin, b"").0, 422);
    assert_eq!(
        upload(&server.user("olga", "operator"), &vib("0.3.0-1")).0,
        403
    );
    // What is damaged on disk goes to no host.
    let file = server
        .dir
        .path()
        .join("msa/packages")
        .join(format!("{sha256}.vib"));
    let mut stored = std::fs::read(&file).unwrap();
    stored[100] ^= 1;
    std::fs::write(&file, stored).unwrap();
    assert_eq!(get(&path).0, 500);
    let id = package["id"].as_str().unwrap();
    admin.expect(204, "DELETE", &format!("/packages/{id}"), &Value::Null);
    assert_eq!(get(&path).0, 404);
}

#[test]
fn a_login_goes_in_and_never_comes_out() {
    let server = Server::start();
    let admin = server.admin();
    let vcenter = json!({"name": "vc1", "address": "vc1.example.org", "port": 443});
    let id = admin.make("/vcenters", &vcenter);
    let login = json!({"user": "jetdr@vsphere.local", "password": "vcenter secret"});
    let path = format!("/vcenters/{id}/login");
    admin.expect(204, "PUT", &path, &login);
    let file = server
        .dir
        .path()
        .join("msa/vcenters")
        .join(format!("{id}.json"));
    let mode = std::fs::metadata(&file).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let shown = admin.get(&format!("/vcenters/{id}")).to_string();
    assert!(!shown.contains("secret") && !server.audit().concat().contains("secret"));
    let database = std::fs::read(server.dir.path().join("msa/msa.sqlite-wal")).unwrap_or_default();
    let has = |word: &[u8]| database.windows(word.len()).any(|part| part == word);
    assert!(!has(b"vcenter secret"));
    for bad in [
        json!({"user": "a b", "password": "x"}),
        json!({"user": "a", "password": ""}),
        json!({"user": "a", "password": "x\ny"}),
    ] {
        assert_eq!(admin.call("PUT", &path, &bad).0, 422, "{bad}");
    }
    let operator = server.user("olga", "operator");
    assert_eq!(operator.call("PUT", &path, &login).0, 403);
    // It goes with its vCenter.
    admin.expect(204, "DELETE", &format!("/vcenters/{id}"), &Value::Null);
    server.msa.housekeeping().unwrap();
    assert!(!file.exists());
}

fn ended(client: &Client, name: &str) -> Value {
    wait_for("the end of an execution", || {
        let all = client.get("/executions?limit=200");
        let all = all["items"].as_array()?.clone();
        let starts = |one: &Value| one["name"].as_str().unwrap().starts_with(name);
        let ours = all.into_iter().find(starts)?;
        ours["ended_at_ms"].is_i64().then_some(ours)
    })
}

/// All of it by REST; and hosts that come and go are noticed.
#[test]
fn a_cluster_by_rest_is_kept_in_step() {
    let clock = Arc::new(ManualClock::at(SystemClock.now_ms()));
    let world = World::new(3, clock.clone());
    let server = Server::in_world(&world, clock);
    world.serve(&server.msa.store, &server.dir.path().join("msa"));
    let admin = server.admin();
    upload(&admin, &vib("0.1.0-1"));
    let vcenter = json!({"name": "vc1", "address": "vc1.example.org", "port": 443});
    let id = admin.make("/vcenters", &vcenter);
    let login = json!({"user": "jetdr@vsphere.local", "password": "vcenter secret"});
    admin.expect(204, "PUT", &format!("/vcenters/{id}/login"), &login);
    let operator = server.user("olga", "operator");
    let asked = json!({"name": "enable1", "kind": "enable-cluster",
        "parameters": {"protected_cluster": "Gold", "enrol": true}});
    operator.expect(202, "POST", "/executions", &asked);
    let done = ended(&operator, "enable1");
    assert_eq!(done["state"], "succeeded", "{done}");
    let hosts = operator.get("/hosts");
    let host = &hosts["items"][0];
    assert_eq!(
        (&host["state"], &host["component_version"]),
        (&json!("ready"), &json!("0.1.0-1"))
    );
    assert_eq!(operator.get("/clusters")["items"][0]["state"], "enabled");
    // Nothing has changed: nothing is asked for.
    assert_eq!(watch::look(&server.msa).unwrap(), None);
    let mut joined = FakeHost::new("esx9");
    joined.installed = Some("0.1.0-1".into());
    {
        let mut state = world.state.lock();
        state.hosts.insert("host-9".into(), joined);
        state.hosts.remove("host-1");
    }
    assert_eq!(watch::look(&server.msa).unwrap().as_deref(), Some("Gold"));
    assert_eq!(ended(&operator, "reconcile")["state"], "succeeded");
    let names = || {
        let hosts = operator.get("/hosts");
        let hosts = hosts["items"].as_array().unwrap().clone();
        let name = |host: &Value| host["name"].as_str().unwrap().to_owned();
        hosts.iter().map(name).collect::<Vec<String>>()
    };
    // What joined is there at once; what is missed is not gone before it was missed for a while.
    assert_eq!(names(), ["esx1", "esx2", "esx3", "esx9"]);
    assert_eq!(watch::look(&server.msa).unwrap(), None);
    let alarms = || admin.get("/alarms").to_string();
    assert!(alarms().contains("host-not-listed"), "{}", alarms());
    server.clock.advance_ms(msa::clusters::rows::GONE_AFTER_MS);
    assert_eq!(watch::look(&server.msa).unwrap().as_deref(), Some("Gold"));
    wait_for("the end of the second reconciliation", || {
        let all = operator.get("/executions?limit=200");
        let all = all["items"].as_array()?.clone();
        let ours = all.iter().filter(|one| one["kind"] == "reconcile-cluster");
        let ended: Vec<_> = ours.filter(|one| one["state"] == "succeeded").collect();
        (ended.len() == 2).then_some(())
    });
    assert_eq!(names(), ["esx2", "esx3", "esx9"]);
    // The one that left may not speak any more, and the list says so.
    let revoked = admin
        .get("/certificates")
        .to_string()
        .matches("\"reason\":\"removed\"")
        .count();
    assert_eq!(revoked, 1);
    assert_eq!(watch::look(&server.msa).unwrap(), None);
    // A vCenter that lists no host at all is not believed, however long it does.
    let list_none = |is_unlisted: bool| {
        let mut state = world.state.lock();
        let mut hosts = state.hosts.values_mut();
        hosts
            .by_ref()
            .for_each(|host| host.is_unlisted = is_unlisted);
    };
    list_none(true);
    for _ in 0..3 {
        assert_eq!(watch::look(&server.msa).unwrap(), None);
        server.clock.advance_ms(msa::clusters::rows::GONE_AFTER_MS);
    }
    let said = alarms().matches("cluster-not-listed").count();
    assert_eq!((said, names().len()), (1, 3));
    list_none(false);
    assert_eq!(watch::look(&server.msa).unwrap(), None);
    // A vCenter that is away changes nothing, and is said.
    world.state.lock().is_down = true;
    let error = watch::look(&server.msa).unwrap_err().to_string();
    assert!(error.contains("looking at cluster Gold"), "{error}");
}
