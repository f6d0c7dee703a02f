//! REST over a real port: who may do what, what is refused and how, what the audit says of it.
#![allow(clippy::unwrap_used)]

mod support;

use msa::clock::{DAY_MS, HOUR_MS};
use msa::login::{PER_PAIR, WINDOW_MS};
use msa::rest::gate::{Access, TABLE};
use msa::rest::{MAX_BODY_BYTES, openapi};
use msa::users::UserRole;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use support::{OTHER_PASSWORD, PASSWORD, Server};

const NOTHING: Value = Value::Null;
const NO_ID: &str = "00000000-0000-4000-8000-000000000000";

/// Something to send to each route, so that only the caller can be what is wrong.
fn body_for(method: &str, path: &str) -> Value {
    match (method, path) {
        ("GET" | "DELETE", _) => NOTHING,
        _ => json!({"nothing": "of the kind"}),
    }
}

/// Every route with every kind of caller: the table is what holds.
#[test]
fn every_route_is_open_to_whom_the_table_says() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let machine = server
        .client()
        .with_certificate(&admin.enrol("host", &host));
    let drva = json!({"name": "dr", "address": "10.0.0.1", "port_base": 32873});
    let drva = admin.make("/drvas", &drva);
    let appliance = server
        .client()
        .with_certificate(&admin.enrol("drva", &drva));
    let callers = [
        ("anonymous", server.client()),
        ("host", machine),
        ("drva", appliance),
        ("viewer", server.user("vera", "viewer")),
        ("operator", server.user("olga", "operator")),
        ("admin", server.admin()),
    ];
    let rank = |role: UserRole| match role {
        UserRole::Viewer => 3,
        UserRole::Operator => 4,
        UserRole::Admin => 5,
    };
    for (method, path, access) in TABLE {
        let concrete = path.replace("{id}", NO_ID).replace("{serial}", "abcd");
        // The caller's own token would be gone.
        if *path == "/logout" {
            continue;
        }
        for (at, (name, client)) in callers.iter().enumerate() {
            let (status, answer) = client.call(method, &concrete, &body_for(method, path));
            let may = match access {
                Access::Anyone => true,
                Access::Machine | Access::Certificate => matches!(*name, "host" | "drva"),
                Access::MachineOf(role) => *name == role.name(),
                Access::User(role) => at >= rank(*role),
            };
            let refused = status == 401 || status == 403;
            assert_eq!(!refused, may, "{name} {method} {path}: {status} {answer}");
            assert!(status < 500, "{name} {method} {path}: {status} {answer}");
        }
    }
    let (status, _) = server.client().call("GET", "/nowhere", &NOTHING);
    assert_eq!(status, 404);
    let (status, _) = server.admin().call("PUT", "/sites", &json!({}));
    assert_eq!(status, 405);
}

/// Document, table and committed file say the same.
#[test]
fn the_openapi_document_is_complete_and_committed() {
    let document: Value = serde_json::from_str(&openapi::text().unwrap()).unwrap();
    let mut documented = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let access = operation["x-access"].as_str();
            let access =
                access.unwrap_or_else(|| panic!("{method} {path} is in no row of the table"));
            documented.insert((method.to_uppercase(), path.clone(), access.to_owned()));
        }
    }
    // Two types of one name would be one schema, and the second be lost.
    let schemas = &document["components"]["schemas"];
    for (name, schema) in schemas.as_object().unwrap() {
        for word in schema["enum"].as_array().into_iter().flatten() {
            let word = word.as_str().unwrap();
            assert_eq!(
                word,
                word.to_lowercase(),
                "{name}: not the words that are sent"
            );
        }
        let fields = schema["properties"].as_object();
        for (field, of) in fields.into_iter().flatten() {
            let Some(of) = of["$ref"].as_str() else {
                continue;
            };
            let target = &schemas[of.rsplit('/').next().unwrap()];
            let is_object = target["properties"].is_object();
            let is_meant = of.ends_with("/ReportedLog");
            assert!(
                !is_object || is_meant,
                "{name}.{field} is {of}, an object: is that meant?"
            );
        }
    }
    let table = TABLE.iter().map(|(method, path, access)| {
        (
            (*method).to_owned(),
            (*path).to_owned(),
            access.word().to_owned(),
        )
    });
    let table: BTreeSet<_> = table.collect();
    assert_eq!(documented, table);
    let committed =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/msa-openapi.json");
    let committed = std::fs::read_to_string(committed).unwrap_or_default();
    assert!(
        committed == openapi::text().unwrap(),
        "docs/msa-openapi.json is not what the program says: make openapi"
    );
    let server = Server::start();
    assert_eq!(server.client().get("/openapi.json"), document);
}

/// Every field that takes a text, with texts that mean something elsewhere: refused, and no trace left.
#[test]
fn injections_are_refused_in_every_field() {
    let server = Server::start();
    let admin = server.admin();
    let id = NO_ID;
    let bodies = [
        (
            "/vcenters",
            json!({"name": "n", "address": "a", "port": 443, "fingerprint": "0".repeat(64)}),
        ),
        (
            "/clusters",
            json!({"vcenter_id": id, "moid": "m", "name": "n"}),
        ),
        (
            "/hosts",
            json!({"cluster_id": id, "moid": "m", "name": "n", "version": "8", "drva_id": id}),
        ),
        ("/sites", json!({"name": "n", "store": "/s"})),
        (
            "/drvas",
            json!({"name": "n", "address": "a", "port_base": 1}),
        ),
        (
            "/log-volumes",
            json!({"drva_id": id, "name": "n", "path": "/p", "capacity_bytes": 67108864}),
        ),
        (
            "/domains",
            json!({"name": "n", "site_id": id, "drva_id": id, "log_volume_id": id, "ack": "host"}),
        ),
        (
            "/vms",
            json!({"cluster_id": id, "host_id": id, "moid": "m", "name": "n", "uuid": id}),
        ),
        (
            "/users",
            json!({"name": "n", "role": "viewer", "password": OTHER_PASSWORD}),
        ),
        ("/tokens", json!({"name": "n", "days": 1})),
        ("/enrolments", json!({"role": "host", "entity_id": id})),
        ("/executions", json!({"name": "n", "kind": "selfcheck"})),
        ("/login", json!({"name": "admin", "password": PASSWORD})),
    ];
    let hostile = [
        "'; DROP TABLE users; --",
        "x' OR '1'='1",
        "../../etc/passwd",
        "/a/../../b",
        "a\u{0}b",
        "a\nb",
        "<script>alert(1)</script>",
        "`id`",
        "$(id)\"",
        "\u{1b}[31m",
        "",
    ];
    let counts = || {
        let tables = [
            "vcenters",
            "sites",
            "drvas",
            "users",
            "tokens",
            "enrolments",
            "executions",
            "vms",
        ];
        let read = server.msa.store.read(|t| {
            let count = |table: &&str| {
                t.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| {
                    row.get::<_, i64>(0)
                })
            };
            Ok(tables
                .iter()
                .map(count)
                .collect::<rusqlite::Result<Vec<_>>>()?)
        });
        read.unwrap()
    };
    let before = counts();
    let mut tried = 0;
    for (path, body) in &bodies {
        for field in body.as_object().unwrap().keys() {
            if !body[field].is_string() || field == "password" {
                continue;
            }
            for text in hostile {
                let mut sent = body.clone();
                sent[field] = json!(text);
                let (status, answer) = admin.call("POST", path, &sent);
                assert!(
                    (400..500).contains(&status),
                    "{path} {field} {text:?}: {status} {answer}"
                );
                tried += 1;
            }
        }
        let mut sent = body.clone();
        sent["unknown"] = json!(1);
        let (status, answer) = admin.call("POST", path, &sent);
        assert_eq!(status, 422, "{path}: {answer}");
        assert!(
            answer["detail"].as_str().unwrap().contains("unknown"),
            "{answer}"
        );
    }
    assert!(tried > 200, "{tried}");
    for text in ["%27%3B--", "..%2f..%2fetc", "1%20OR%201=1"] {
        for path in ["sites", "executions", "users"] {
            let (status, _) = admin.call("GET", &format!("/{path}/{text}"), &NOTHING);
            assert_eq!(status, 400);
        }
        for query in [
            format!("after={text}"),
            format!("limit={text}"),
            format!("x={text}"),
        ] {
            let (status, _) = admin.call("GET", &format!("/sites?{query}"), &NOTHING);
            assert_eq!(status, 400);
        }
    }
    assert_eq!(counts(), before);
    assert!(server.msa.store.check().unwrap().is_empty());
}

#[test]
fn bodies_are_bounded_and_understood() {
    let server = Server::start();
    let admin = server.admin();
    let json = "Content-Type: application/json\r\n";
    let send =
        |headers: &str, body: &[u8]| admin.try_send("POST", "/sites", headers, body).unwrap().0;
    assert_eq!(send(json, &vec![b' '; MAX_BODY_BYTES + 1]), 413);
    assert_eq!(send("", b"{}"), 415);
    assert_eq!(send(json, b"{"), 400);
    assert_eq!(send(json, b"\xff\xfe"), 400);
    assert_eq!(send(json, "[".repeat(60_000).as_bytes()), 422);
    let deep = format!(
        r#"{{"name":"x","kind":"selfcheck","parameters":{}"#,
        "[".repeat(60_000)
    );
    let deep = admin
        .try_send("POST", "/executions", json, deep.as_bytes())
        .unwrap()
        .0;
    assert_eq!(deep, 400);
    assert_eq!(send(json, br#"{"name":"a","name":"b","store":"/s"}"#), 422);
    assert_eq!(send("Authorization: Basic YTpi\r\n", b"{}"), 401);
}

#[test]
fn lists_come_in_parts() {
    let server = Server::start();
    let admin = server.admin();
    for at in 0..7 {
        admin.make(
            "/sites",
            &json!({"name": format!("s{at}"), "store": format!("/s{at}")}),
        );
    }
    let (mut names, mut after) = (Vec::new(), 0);
    loop {
        let part = admin.get(&format!("/sites?limit=3&after={after}"));
        let items = part["items"].as_array().unwrap();
        assert!(items.len() <= 3);
        names.extend(
            items
                .iter()
                .map(|item| item["name"].as_str().unwrap().to_owned()),
        );
        match part["next"].as_i64() {
            Some(next) => after = next,
            None => break,
        }
    }
    assert_eq!(names, (0..7).map(|at| format!("s{at}")).collect::<Vec<_>>());
    for query in ["limit=0", "limit=201", "after=-1", "limit=x", "offset=1"] {
        let (status, _) = admin.call("GET", &format!("/sites?{query}"), &NOTHING);
        assert_eq!(status, 400, "{query}");
    }
}

#[test]
fn references_lead_somewhere_and_hold() {
    let server = Server::start();
    let admin = server.admin();
    let (status, answer) = admin.call(
        "POST",
        "/clusters",
        &json!({"vcenter_id": NO_ID, "moid": "m", "name": "n"}),
    );
    assert_eq!(
        (status, answer["field"].as_str()),
        (422, Some("vcenter_id")),
        "{answer}"
    );
    let host = admin.make_host("esx1");
    let vcenter = admin.get("/vcenters")["items"][0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let (status, answer) = admin.call("DELETE", &format!("/vcenters/{vcenter}"), &NOTHING);
    let detail = answer["detail"].as_str().unwrap();
    assert!(
        status == 409 && detail.contains("still has 1 of its clusters"),
        "{answer}"
    );
    let drva =
        |name: &str, port: u16| json!({"name": name, "address": "10.0.0.1", "port_base": port});
    let (one, two) = (
        admin.make("/drvas", &drva("a", 1000)),
        admin.make("/drvas", &drva("b", 2000)),
    );
    let volume = json!({"drva_id": one, "name": "v", "path": "/logs", "capacity_bytes": 67108864});
    let volume = admin.make("/log-volumes", &volume);
    let site = admin.make("/sites", &json!({"name": "s", "store": "az://account/box"}));
    let domain = |drva: &str| {
        json!({"name": "shop", "site_id": site, "drva_id": drva,
        "log_volume_id": volume, "ack": "log"})
    };
    let (status, answer) = admin.call("POST", "/domains", &domain(&two));
    assert_eq!(
        (status, answer["field"].as_str()),
        (422, Some("log_volume_id")),
        "{answer}"
    );
    let domain = admin.make("/domains", &domain(&one));
    let (status, _) = admin.call("DELETE", &format!("/drvas/{one}"), &NOTHING);
    assert_eq!(status, 409);
    admin.expect(204, "DELETE", &format!("/domains/{domain}"), &NOTHING);
    let cluster = admin.get(&format!("/hosts/{host}"))["cluster_id"].clone();
    let vm = json!({"cluster_id": cluster, "host_id": host, "moid": "vm-1", "name": "Web 1", "uuid": NO_ID});
    let vm = admin.make("/vms", &vm);
    assert_eq!(admin.get(&format!("/vms/{vm}"))["state"], "unprotected");
    let (status, _) = admin.call("DELETE", &format!("/hosts/{host}"), &NOTHING);
    assert_eq!(status, 409);
}

#[test]
fn every_change_and_every_refusal_is_in_the_audit() {
    let server = Server::start();
    let admin = server.admin();
    let newest = || server.audit().remove(0);
    let site = admin.make("/sites", &json!({"name": "s", "store": "/s"}));
    assert_eq!(newest(), "done user:admin create site site s ");
    admin.call("POST", "/sites", &json!({"name": "s", "store": "/t"}));
    let line = newest();
    assert!(
        line.starts_with("refused user:admin POST /api/v1/sites  409 create site:"),
        "{line}"
    );
    admin.expect(204, "DELETE", &format!("/sites/{site}"), &NOTHING);
    assert_eq!(newest(), "done user:admin delete site site s ");
    let viewer = server.user("vera", "viewer");
    assert_eq!(newest(), "done user:vera log in user vera ");
    viewer.call("POST", "/sites", &json!({"name": "x", "store": "/x"}));
    let line = newest();
    assert!(
        line.starts_with("refused user:vera POST /api/v1/sites  403 this takes the role operator"),
        "{line}"
    );
    server.client().call("GET", "/users", &NOTHING);
    assert!(newest().starts_with("refused anonymous GET /api/v1/users  401"));
    server.client().call(
        "POST",
        "/login",
        &json!({"name": "admin", "password": OTHER_PASSWORD}),
    );
    assert!(newest().starts_with("refused anonymous POST /api/v1/login  401"));
    let all = admin.get("/audit?limit=200").to_string();
    assert!(all.contains("127.0.0.1"));
    // A flood fills no disk: the number is noted.
    let before = server.audit().len();
    for _ in 0..150 {
        server.client().call("GET", "/users", &NOTHING);
    }
    let lines = server.audit().len() - before;
    assert!((100..=120).contains(&lines), "{lines}");
    server.clock.advance_ms(msa::clock::MINUTE_MS);
    server.client().call("GET", "/users", &NOTHING);
    assert!(
        newest().contains("refusals before this one are not listed"),
        "{}",
        newest()
    );
    for secret in [
        PASSWORD,
        OTHER_PASSWORD,
        admin.token.as_ref().unwrap(),
        "$argon2",
    ] {
        assert!(!server.audit().concat().contains(secret));
    }
}

#[test]
fn log_ins_are_limited_by_the_clock() {
    let server = Server::start();
    let wrong = json!({"name": "admin", "password": OTHER_PASSWORD});
    let right = json!({"name": "admin", "password": PASSWORD});
    let client = server.client();
    for _ in 0..PER_PAIR {
        assert_eq!(client.call("POST", "/login", &wrong).0, 401);
    }
    // Now not even the right one.
    let body = right.to_string();
    let json = "Content-Type: application/json\r\n";
    let (status, head, _) = client
        .try_send("POST", "/login", json, body.as_bytes())
        .unwrap();
    assert_eq!(status, 429);
    assert!(head.contains("retry-after: 901"), "{head}");
    server.clock.advance_ms(WINDOW_MS - 1);
    assert_eq!(client.call("POST", "/login", &right).0, 429);
    server.clock.advance_ms(1);
    assert_eq!(client.call("POST", "/login", &right).0, 200);
    // Who is not there is refused in the same words.
    let nobody = json!({"name": "nobody", "password": OTHER_PASSWORD});
    let (one, two) = (
        client.call("POST", "/login", &nobody),
        client.call("POST", "/login", &wrong),
    );
    assert_eq!(one, two);
}

#[test]
fn tokens_end() {
    let server = Server::start();
    let admin = server.admin();
    let viewer = server.user("vera", "viewer");
    let me = viewer.get("/me");
    assert_eq!(me["role"], "viewer");
    let dead = |client: &support::Client| client.call("GET", "/me", &NOTHING).0 == 401;
    // By logging out.
    let second = server.client().logged_in("vera", OTHER_PASSWORD);
    second.expect(204, "POST", "/logout", &NOTHING);
    assert!(dead(&second) && !dead(&viewer));
    // For a program: with its days.
    let made = viewer.expect(201, "POST", "/tokens", &json!({"name": "ci", "days": 2}));
    let mut program = viewer.clone();
    program.token = Some(made["token"].as_str().unwrap().into());
    assert!(
        viewer
            .call("POST", "/tokens", &json!({"name": "ci", "days": 366}))
            .0
            == 422
    );
    // Log-ins last twelve hours.
    server.clock.advance_ms(12 * HOUR_MS);
    assert!(dead(&viewer) && !dead(&program));
    server.clock.advance_ms(2 * DAY_MS);
    assert!(dead(&program));
    // By another password, and by being disabled or removed.
    let admin = {
        let _ = admin;
        server.admin()
    };
    let id = me["id"].as_str().unwrap();
    let path = format!("/users/{id}");
    for change in [
        json!({"password": "yet another password"}),
        json!({"disabled": true}),
    ] {
        admin.expect(
            200,
            "PATCH",
            &path,
            &json!({"disabled": false, "password": OTHER_PASSWORD}),
        );
        let client = server.client().logged_in("vera", OTHER_PASSWORD);
        admin.expect(200, "PATCH", &path, &change);
        assert!(dead(&client), "{change}");
    }
    admin.expect(
        200,
        "PATCH",
        &path,
        &json!({"disabled": false, "password": OTHER_PASSWORD}),
    );
    let client = server.client().logged_in("vera", OTHER_PASSWORD);
    let change = json!({"old": "not the password at all", "new": PASSWORD});
    assert_eq!(client.call("PUT", "/me/password", &change).0, 403);
    admin.expect(204, "DELETE", &path, &NOTHING);
    assert!(dead(&client));
    // Nothing of a token is in the state but its hash.
    let database = std::fs::read(server.dir.path().join("msa/msa.sqlite")).unwrap();
    let wal = std::fs::read(server.dir.path().join("msa/msa.sqlite-wal")).unwrap_or_default();
    let token = client.token.unwrap();
    let has = |bytes: &[u8]| {
        bytes
            .windows(token.len())
            .any(|part| part == token.as_bytes())
    };
    assert!(!has(&database) && !has(&wal));
}

#[test]
fn an_administrator_is_always_left() {
    let server = Server::start();
    let admin = server.admin();
    let me = admin.get("/me")["id"].as_str().unwrap().to_owned();
    let path = format!("/users/{me}");
    for (method, body) in [
        ("DELETE", NOTHING),
        ("PATCH", json!({"role": "viewer"})),
        ("PATCH", json!({"disabled": true})),
    ] {
        let (status, answer) = admin.call(method, &path, &body);
        assert_eq!(status, 409, "{answer}");
        assert!(
            answer["detail"]
                .as_str()
                .unwrap()
                .contains("no administrator would be left")
        );
    }
    assert_eq!(admin.get("/me")["role"], "admin");
}

#[test]
fn an_execution_by_rest() {
    let server = Server::start();
    let operator = server.user("olga", "operator");
    let asked = json!({"name": "check1", "kind": "selfcheck"});
    let id = operator.expect(202, "POST", "/executions", &asked)["id"].clone();
    let path = format!("/executions/{}", id.as_str().unwrap());
    let ended = support::wait_for("the end of the check", || {
        let execution = operator.get(&path);
        execution["ended_at_ms"].is_i64().then_some(execution)
    });
    assert_eq!(ended["state"], "succeeded", "{ended}");
    let output = operator.get(&format!("{path}/output?limit=200"));
    assert!(output.to_string().contains("nothing found"), "{output}");
    let asked = json!({"name": "b1", "kind": "backup"});
    assert_eq!(operator.call("POST", "/executions", &asked).0, 403);
    let asked = json!({"name": "b1", "kind": "nonsense"});
    let (status, answer) = operator.call("POST", "/executions", &asked);
    assert_eq!(status, 422);
    assert!(
        answer["detail"]
            .as_str()
            .unwrap()
            .contains("known are backup, disable-cluster")
    );
    for (field, value) in [
        ("timeout_s", 0),
        ("timeout_s", 604_801),
        ("retention_days", 0),
    ] {
        let mut asked = json!({"name": "x", "kind": "selfcheck"});
        asked[field] = json!(value);
        assert_eq!(operator.call("POST", "/executions", &asked).0, 422);
    }
}
