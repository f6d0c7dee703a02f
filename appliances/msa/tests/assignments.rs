//! Assignments: what operators decide is what machines are told, and nobody is told more.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use support::{Client, Server};

const NOTHING: Value = Value::Null;

/// An appliance with a domain, by names that end in `n`.
fn appliance(admin: &Client, n: u16) -> (String, String) {
    let drva =
        json!({"name": format!("dr{n}"), "address": format!("10.0.0.{n}"), "port_base": 32873});
    let drva = admin.make("/drvas", &drva);
    let site = json!({"name": format!("site{n}"), "store": format!("/store{n}")});
    let site = admin.make("/sites", &site);
    let volume =
        json!({"drva_id": drva, "name": "log", "path": "/log", "capacity_bytes": 67108864});
    let volume = admin.make("/log-volumes", &volume);
    let domain = json!({"name": format!("shop{n}"), "site_id": site, "drva_id": drva,
        "log_volume_id": volume, "ack": "host"});
    (drva, admin.make("/domains", &domain))
}

fn vm(admin: &Client, host: &str, name: &str) -> (String, String) {
    let cluster = admin.get(&format!("/hosts/{host}"))["cluster_id"].clone();
    let uuid = uuid::Uuid::new_v4().to_string();
    let vm =
        json!({"cluster_id": cluster, "moid": format!("vm-{name}"), "name": name, "uuid": uuid});
    (admin.make("/vms", &vm), uuid)
}

#[test]
fn an_appliance_is_told_of_its_own_domains_only() {
    let server = Server::start();
    let admin = server.admin();
    let (first, second) = (admin.make_host("esx1"), admin.make_host("esx2"));
    let (one, shop) = appliance(&admin, 1);
    let (two, bank) = appliance(&admin, 2);
    let (web, web_uuid) = vm(&admin, &first, "web");
    let (till, till_uuid) = vm(&admin, &second, "till");
    let machine = |id: &str| server.client().with_certificate(&admin.enrol("drva", id));
    let (dr1, dr2) = (machine(&one), machine(&two));
    let empty = dr1.get("/machine/assignments");
    assert_eq!(
        empty,
        json!({"clusters": [], "domains": [{"name": "shop1", "vms": []}]})
    );
    let into = |vm: &str, domain: Value| {
        admin.call(
            "PUT",
            &format!("/vms/{vm}/domain"),
            &json!({"domain_id": domain}),
        )
    };
    assert_eq!(into(&web, json!(shop)).1["state"], "initializing");
    assert_eq!(into(&till, json!(bank)).0, 200);
    let cluster = |host: &str| admin.get(&format!("/hosts/{host}"))["cluster_id"].clone();
    let told = dr1.get("/machine/assignments");
    assert_eq!(
        told,
        json!({
            "clusters": [{"id": cluster(&first), "hosts": [first]}],
            "domains": [{"name": "shop1", "vms": [{"uuid": web_uuid, "cluster": cluster(&first), "paused": false}]}],
        })
    );
    let other = dr2.get("/machine/assignments").to_string();
    assert!(
        other.contains(&till_uuid) && !other.contains(&web_uuid),
        "{other}"
    );
    // A host that joins may run the machine from now on.
    let joined = json!({"cluster_id": cluster(&first), "moid": "host-2", "name": "esx1b"});
    let joined = admin.make("/hosts", &joined);
    let told = dr1.get("/machine/assignments");
    assert_eq!(told["clusters"][0]["hosts"], json!([first, joined]));
    // A machine is in one domain at most, and leaves it.
    let (status, refused) = into(&web, json!(bank));
    assert!(
        status == 409 && refused["detail"].as_str().unwrap().contains("shop1"),
        "{refused}"
    );
    assert_eq!(into(&web, NOTHING).1["state"], "unprotected");
    assert_eq!(dr1.get("/machine/assignments"), empty);
    assert_eq!(into(&web, json!(web)).0, 404);
    let lines = server.audit();
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("done") && line.contains("assign domain"))
    );
}

#[test]
fn a_host_is_told_its_appliance_and_nobody_asks_for_another() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let (drva, _) = appliance(&admin, 1);
    let esx = server
        .client()
        .with_certificate(&admin.enrol("host", &host));
    let dr = server
        .client()
        .with_certificate(&admin.enrol("drva", &drva));
    assert_eq!(esx.call("GET", "/machine/appliance", &NOTHING).0, 404);
    let path = format!("/hosts/{host}/appliance");
    assert_eq!(admin.call("PUT", &path, &json!({"drva_id": host})).0, 404);
    admin.expect(200, "PUT", &path, &json!({"drva_id": drva}));
    let told = esx.get("/machine/appliance");
    assert_eq!(told["id"], drva);
    assert_eq!(
        (told["address"].as_str(), told["port_base"].as_u64()),
        (Some("10.0.0.1"), Some(32873))
    );
    // Each role its own; a user is no machine, and a machine decides nothing.
    assert_eq!(esx.call("GET", "/machine/assignments", &NOTHING).0, 403);
    assert_eq!(dr.call("GET", "/machine/appliance", &NOTHING).0, 403);
    assert_eq!(admin.call("GET", "/machine/assignments", &NOTHING).0, 401);
    assert_eq!(esx.call("PUT", &path, &json!({"drva_id": drva})).0, 403);
    let viewer = server.user("vera", "viewer");
    assert_eq!(viewer.call("PUT", &path, &json!({"drva_id": drva})).0, 403);
}
