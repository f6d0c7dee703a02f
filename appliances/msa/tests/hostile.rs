//! Who may not write, and what is not taken, over the real port: every route that changes something, every
//! text that it takes, every kind of bad package. Each is refused, is in the audit, and changes nothing.
#![allow(clippy::unwrap_used)]

mod support;
#[path = "../../../vib-packaging/tests/support/mod.rs"]
mod vibs;

use msa::clock::{DAY_MS, MINUTE_MS};
use msa::rest::gate::{Access, TABLE};
use msa::rest::openapi;
use msa::users::UserRole;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use support::{Client, Server};
use vibs::{TarHeader, package_of, tar};

const NO_ID: &str = "00000000-0000-4000-8000-000000000000";
/// The prefix of routes, as the audit names them.
const PREFIX: &str = "/api/v1";

/// How many rows each table has, but for those that say what was tried.
fn rows(server: &Server) -> BTreeMap<String, i64> {
    let read = server.msa.store.read(|t| {
        let mut names = t.prepare("SELECT name FROM sqlite_master WHERE type = 'table'")?;
        let names = names.query_map([], |row| row.get::<_, String>(0))?;
        let names: Vec<String> = names.collect::<rusqlite::Result<_>>()?;
        let count = |name: String| {
            let sql = format!("SELECT count(*) FROM \"{name}\"");
            let rows = t.query_row(&sql, [], |row| row.get(0))?;
            Ok((name, rows))
        };
        let counted: rusqlite::Result<BTreeMap<String, i64>> =
            names.into_iter().map(count).collect();
        Ok(counted?)
    });
    let mut rows = read.unwrap();
    rows.retain(|name, _| name != "audit" && !name.starts_with("sqlite_"));
    assert!(rows.len() > 10 && rows.contains_key("users"), "{rows:?}");
    rows
}

fn is_write(method: &str) -> bool {
    method != "GET"
}

/// The document of the interface: what a route takes.
struct Document(Value);

impl Document {
    fn read() -> Self {
        Self(serde_json::from_str(&openapi::text().unwrap()).unwrap())
    }

    fn resolved<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(path) => &self.0["components"]["schemas"][path.rsplit('/').next().unwrap()],
            None => schema,
        }
    }

    /// The fields of a route's JSON body.
    fn fields(&self, method: &str, path: &str) -> Option<&Map<String, Value>> {
        let operation = &self.0["paths"][path][method.to_lowercase()];
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        self.resolved(schema)["properties"].as_object()
    }

    /// Something of the right kind for a field.
    fn good(&self, schema: &Value) -> Value {
        let mut schema = self.resolved(schema);
        if let Some(one) = schema["oneOf"].as_array() {
            schema = self.resolved(one.last().unwrap());
        }
        if let Some(word) = schema["enum"].as_array().and_then(|words| words.first()) {
            return word.clone();
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => kinds.iter().find(|kind| *kind != "null").unwrap(),
            kind => kind,
        };
        match kind.as_str() {
            Some("integer") => schema.get("minimum").cloned().unwrap_or(json!(1)),
            Some("boolean") => json!(true),
            Some("array") => json!([]),
            Some("string") if schema["format"] == "uuid" => json!(NO_ID),
            Some("string") => json!("n"),
            _ => json!({}),
        }
    }

    fn body(&self, fields: &Map<String, Value>) -> Value {
        let body = fields
            .iter()
            .map(|(name, of)| (name.clone(), self.good(of)));
        Value::Object(body.collect())
    }

    fn takes_text(&self, schema: &Value) -> bool {
        let schema = self.resolved(schema);
        let one = schema["oneOf"].as_array().and_then(|one| one.last());
        let schema = one.map_or(schema, |one| self.resolved(one));
        match &schema["type"] {
            Value::Array(kinds) => kinds.iter().any(|kind| kind == "string"),
            kind => kind == "string",
        }
    }
}

/// One of each kind of entity, so that a write would find what it is to change.
fn populate(admin: &Client) -> BTreeMap<&'static str, String> {
    let host = admin.make_host("esx1");
    let drva = json!({"name": "dr1", "address": "10.0.0.1", "port_base": 32873});
    let drva = admin.make("/drvas", &drva);
    let site = admin.make("/sites", &json!({"name": "s1", "store": "/s1"}));
    let volume =
        json!({"drva_id": drva, "name": "v1", "path": "/v1", "capacity_bytes": 67_108_864});
    let volume = admin.make("/log-volumes", &volume);
    admin.enrol("host", &host);
    let certificates = admin.get("/certificates");
    let serial = certificates["items"][0]["serial"].as_str().unwrap();
    let vcenters = admin.get("/vcenters");
    let vcenter = vcenters["items"][0]["id"].as_str().unwrap();
    let clusters = admin.get("/clusters");
    let cluster = clusters["items"][0]["id"].as_str().unwrap();
    let users = admin.get("/users");
    let user = users["items"][0]["id"].as_str().unwrap();
    BTreeMap::from([
        ("hosts", host),
        ("drvas", drva),
        ("sites", site),
        ("log-volumes", volume),
        ("certificates", serial.to_owned()),
        ("vcenters", vcenter.to_owned()),
        ("clusters", cluster.to_owned()),
        ("users", user.to_owned()),
    ])
}

fn concrete(path: &str, known: &BTreeMap<&'static str, String>) -> String {
    let kind = path.split('/').nth(1).unwrap();
    let id = known.get(kind).map_or(NO_ID, String::as_str);
    path.replace("{id}", id)
        .replace("{serial}", id)
        .replace("{sha256}", &"0".repeat(64))
        .replace("{file}", "x.vib")
}

#[test]
fn a_viewer_writes_nowhere() {
    let server = Server::start();
    let admin = server.admin();
    let known = populate(&admin);
    let viewer = server.user("vera", "viewer");
    let document = Document::read();
    let before = rows(&server);
    let mut tried = 0;
    for (method, path, access) in TABLE {
        let more = matches!(access, Access::User(UserRole::Operator | UserRole::Admin));
        if !is_write(method) || !more {
            continue;
        }
        let body = document.fields(method, path);
        let body = body.map_or(Value::Null, |fields| document.body(fields));
        server.clock.advance_ms(MINUTE_MS);
        let at = concrete(path, &known);
        let (status, answer) = viewer.call(method, &at, &body);
        assert_eq!(status, 403, "{method} {at}: {answer}");
        let newest = &server.audit()[0];
        let action = format!("{method} {PREFIX}{path}");
        assert!(
            newest.starts_with("refused") && newest.contains(&action) && newest.contains("vera"),
            "{newest}"
        );
        tried += 1;
    }
    assert!(tried > 25, "{tried}");
    assert_eq!(rows(&server), before);
    // Somebody who may do it finds all of it as it was.
    for (kind, id) in &known {
        if *kind != "certificates" {
            admin.get(&format!("/{kind}/{id}"));
        }
    }
}

/// Texts that mean something to SQL, to a file system, to a shell, a terminal or a page.
const HOSTILE: [&str; 10] = [
    "'; DROP TABLE users; --",
    "x' OR '1'='1",
    "\"; DELETE FROM hosts; --",
    "../../etc/passwd",
    "/a/../../b",
    "a\u{0}b",
    "a\nb",
    "<script>alert(1)</script>",
    "$(id)`id`",
    "\u{1b}[31m",
];

/// Every text that any route takes in its body, whichever routes there are.
#[test]
fn no_text_of_any_body_reaches_further_than_its_field() {
    let server = Server::start();
    let admin = server.admin();
    let known = populate(&admin);
    let document = Document::read();
    let before = rows(&server);
    let mut tried = 0;
    for (method, path, access) in TABLE {
        let Some(fields) = document.fields(method, path) else {
            continue;
        };
        if !matches!(access, Access::User(_) | Access::Anyone) {
            continue;
        }
        // Whose right value no other field's fault is to hide.
        let at = concrete(path, &known);
        for (name, schema) in fields {
            // A password is any text, and only ever hashed; a reason any line, and only ever shown.
            let is_free = name.contains("password") || name == "reason";
            if !document.takes_text(schema) || is_free {
                continue;
            }
            for text in HOSTILE {
                if tried % 100 == 0 {
                    server.clock.advance_ms(MINUTE_MS);
                }
                let mut body = document.body(fields);
                body[name] = json!(text);
                let (status, answer) = admin.call(method, &at, &body);
                assert!(
                    (400..500).contains(&status),
                    "{method} {at} {name} {text:?}: {status} {answer}"
                );
                tried += 1;
            }
        }
    }
    assert!(tried > 300, "{tried}");
    assert_eq!(rows(&server), before);
    assert!(server.msa.store.check().unwrap().is_empty());
    let newest = &server.audit()[0];
    assert!(newest.starts_with("refused"), "{newest}");
}

/// Names that vCenter may well have are taken as names, and lead nowhere.
#[test]
fn what_an_execution_is_told_is_a_name_and_nothing_else() {
    let server = Server::start();
    let admin = server.admin();
    let kinds = ["preflight-install", "enable-cluster", "disable-cluster"];
    let users = rows(&server)["users"];
    for (number, text) in HOSTILE.iter().enumerate() {
        server.clock.advance_ms(MINUTE_MS);
        for field in [
            "protected_cluster",
            "vcenter",
            "drva",
            "package_version",
            "vm_name",
        ] {
            for kind in kinds {
                let mut parameters = json!({"protected_cluster": "One"});
                parameters[field] = json!(text);
                let name = format!("{kind}-{field}-{number}").replace('_', "-");
                let asked = json!({"name": name, "kind": kind, "parameters": parameters});
                let (status, answer) = admin.call("POST", "/executions", &asked);
                let is_plain = !text.chars().any(char::is_control);
                match status {
                    // With no vCenter it comes to nothing.
                    201 | 202 => assert!(is_plain, "{kind} {field} {text:?}"),
                    status => assert!((400..500).contains(&status), "{text:?}: {answer}"),
                }
            }
        }
    }
    server.msa.engine.signals().stop();
    assert_eq!(rows(&server)["users"], users);
    assert!(server.msa.store.check().unwrap().is_empty());
}

/// Ids, serials, checksums and file names stand in paths.
#[test]
fn no_path_leads_elsewhere() {
    let server = Server::start();
    let admin = server.admin();
    let before = rows(&server);
    let mut tried = 0;
    for (method, path, access) in TABLE {
        if !path.contains('{') || !matches!(access, Access::User(_) | Access::Anyone) {
            continue;
        }
        server.clock.advance_ms(MINUTE_MS);
        for text in [
            "..%2f..%2fca.key",
            "%2e%2e",
            "%27%3B%20DROP%20TABLE%20users",
            "1%20OR%201=1",
            "a%00b",
            "%ff",
        ] {
            let mut at = String::new();
            for part in path.split('/').skip(1) {
                at.push('/');
                at.push_str(if part.starts_with('{') { text } else { part });
            }
            let (status, answer) = admin.call(method, &at, &Value::Null);
            assert!(
                (400..500).contains(&status),
                "{method} {at}: {status} {answer}"
            );
            tried += 1;
        }
    }
    assert!(tried > 100, "{tried}");
    assert_eq!(rows(&server), before);
}

#[test]
fn a_token_that_is_over_is_refused_and_told() {
    let server = Server::start();
    let admin = server.admin();
    let viewer = server.user("vera", "viewer");
    viewer.get("/me");
    let host = admin.make_host("esx1");
    let asked = json!({"role": "host", "entity_id": host, "valid_minutes": 5});
    let token = admin.expect(201, "POST", "/enrolments", &asked);
    server.clock.advance_ms(5 * MINUTE_MS);
    let before = rows(&server);
    let (_, request) = support::request();
    let asked = json!({"token": token["token"], "request": request});
    assert_eq!(server.client().call("POST", "/enrol", &asked).0, 401);
    let newest = &server.audit()[0];
    assert!(
        newest.starts_with("refused") && newest.contains("/enrol") && newest.contains("not valid"),
        "{newest}"
    );
    assert!(!newest.contains(token["token"].as_str().unwrap()));
    assert_eq!(rows(&server), before);
    server.clock.advance_ms(400 * DAY_MS);
    assert_eq!(viewer.call("GET", "/me", &Value::Null).0, 401);
    let site = json!({"name": "s1", "store": "/s1"});
    assert_eq!(admin.call("POST", "/sites", &site).0, 401);
    let newest = &server.audit()[0];
    assert!(
        newest.starts_with("refused") && newest.contains("has expired"),
        "{newest}"
    );
    assert_eq!(rows(&server)["sites"], 0);
}

fn file(name: &'static str) -> TarHeader<'static> {
    TarHeader {
        name,
        ..TarHeader::default()
    }
}

fn with(header: TarHeader<'_>, data: &[u8]) -> Vec<u8> {
    let name = header.name.to_owned();
    package_of("tgz", &tar(&[(header, data)]), &[&name])
}

/// Packages whose checksums and descriptors are right, and whose payload is not.
#[test]
fn a_package_that_would_harm_a_host_is_not_taken() {
    let server = Server::start();
    let admin = server.admin();
    let zeros = vec![0; 64 << 20];
    let bomb = TarHeader {
        len_bytes: zeros.len() as u64,
        ..TarHeader::default()
    };
    let link = TarHeader {
        kind: b'2',
        link: "/etc/passwd",
        ..TarHeader::default()
    };
    let hard = TarHeader {
        kind: b'1',
        link: "/etc/passwd",
        ..TarHeader::default()
    };
    let kind = "Content-Type: application/octet-stream\r\n";
    let before = rows(&server);
    let packages = server.dir.path().join("msa/packages");
    let stored = || std::fs::read_dir(&packages).map_or(0, Iterator::count);
    let kept = stored();
    for (what, vib, why) in [
        ("a way out", with(file("opt/../../etc/passwd"), b""), ".."),
        ("a way out at once", with(file("../etc/passwd"), b""), ".."),
        (
            "from the root",
            with(file("/etc/passwd"), b""),
            "/etc/passwd",
        ),
        ("a symbolic link", with(link, b""), "link"),
        ("a hard link", with(hard, b""), "link"),
        ("a bomb", with(bomb, &zeros), "note"),
    ] {
        let sent = admin.try_send("POST", "/packages", kind, &vib).unwrap();
        let answer: Value = serde_json::from_slice(&sent.2).unwrap();
        assert_eq!(sent.0, 422, "{what}: {answer}");
        let said = answer["detail"].as_str().unwrap();
        assert!(
            said.contains("no host would take it") && said.contains(why),
            "{what}: {said}"
        );
        assert!(
            !said.contains("checksum"),
            "{what} for another reason: {said}"
        );
        let newest = &server.audit()[0];
        assert!(
            newest.starts_with("refused") && newest.contains("POST /api/v1/packages"),
            "{what}: {newest}"
        );
    }
    assert_eq!((rows(&server), stored()), (before, kept));
}
