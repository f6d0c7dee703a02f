//! Certificates: enrolment, renewal, revocation, and what the port lets in.
#![allow(clippy::unwrap_used)]

mod support;

use msa::authority::{Authority, Request};
use msa::clock::{Clock, DAY_MS, MINUTE_MS, SystemClock};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use support::{Client, Holder, Server, request};
use tls::{Identity, Role};

const NOTHING: Value = Value::Null;

fn token(client: &Client, role: &str, id: &str) -> String {
    let asked = json!({"role": role, "entity_id": id});
    let answer = client.expect(201, "POST", "/enrolments", &asked);
    answer["token"].as_str().unwrap().to_owned()
}

#[test]
fn a_token_gives_one_key_a_certificate_of_its_host() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let token = token(&admin, "host", &host);
    let (key, csr) = request();
    let stranger = server.client();
    let asked = json!({"token": token, "request": csr});
    let answer = stranger.expect(201, "POST", "/enrol", &asked);
    assert_eq!(answer["identity"], format!("jetdr://host/{host}"));
    // Nothing of what the request asked for is in it: no name, no authority.
    let holder = Holder::new(&key, answer["certificate"].as_str().unwrap());
    let identity = Identity::of_certificate(&holder.own.chain[0]).unwrap();
    assert_eq!(identity, Identity::new(Role::Host, host.parse().unwrap()));
    let text = String::from_utf8_lossy(&holder.own.chain[0]).into_owned();
    assert!(!text.contains("evil.example") && text.contains(&identity.dns_name()));
    let machine = stranger.with_certificate(&holder);
    assert_eq!(machine.get("/machine")["identity"], identity.to_string());
    // A lost answer: the same key gets the same certificate; another key nothing.
    let again = server.client().expect(201, "POST", "/enrol", &asked);
    assert_eq!(again["certificate"], answer["certificate"]);
    let other = json!({"token": token, "request": request().1});
    assert_eq!(server.client().call("POST", "/enrol", &other).0, 401);
    assert_eq!(
        server
            .msa
            .store
            .read(|t| msa::certificates::list(t, 0, 99))
            .unwrap()
            .len(),
        2
    );
}

#[test]
fn tokens_expire_and_are_for_those_who_are_there() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let asked =
        |id: &str, minutes: i64| json!({"role": "host", "entity_id": id, "valid_minutes": minutes});
    for minutes in [0, 1441] {
        assert_eq!(
            admin.call("POST", "/enrolments", &asked(&host, minutes)).0,
            422
        );
    }
    let nobody = "00000000-0000-4000-8000-000000000000";
    assert_eq!(admin.call("POST", "/enrolments", &asked(nobody, 5)).0, 404);
    let msa = json!({"role": "msa", "entity_id": host});
    assert_eq!(admin.call("POST", "/enrolments", &msa).0, 422);
    let enrol = |token: &Value| {
        let asked = json!({"token": token, "request": request().1});
        server.client().call("POST", "/enrol", &asked).0
    };
    let made = admin.expect(201, "POST", "/enrolments", &asked(&host, 5));
    server.clock.advance_ms(5 * MINUTE_MS);
    assert_eq!(enrol(&made["token"]), 401);
    assert_eq!(enrol(&json!("jde_00")), 401);
    // Who is removed takes the tokens along.
    let made = admin.expect(201, "POST", "/enrolments", &asked(&host, 5));
    admin.expect(204, "DELETE", &format!("/hosts/{host}"), &NOTHING);
    assert_eq!(enrol(&made["token"]), 401);
    // Only hashes are kept.
    let kept = server.msa.store.read(|t| {
        Ok(t.query_row(
            "SELECT count(*) FROM enrolments WHERE hash LIKE 'jde%'",
            [],
            |row| row.get::<_, i64>(0),
        )?)
    });
    assert_eq!(kept.unwrap(), 0);
}

#[test]
fn requests_that_are_none_are_refused() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let token = token(&admin, "host", &host);
    let good = request().1;
    // A flipped bit: the signature does not fit any more.
    let mut lines: Vec<String> = good.lines().map(str::to_owned).collect();
    let middle = lines.len() / 2;
    let swapped = if lines[middle].starts_with('A') {
        "B"
    } else {
        "A"
    };
    lines[middle].replace_range(0..1, swapped);
    let damaged = lines.join("\n");
    for bad in [
        "",
        "hello",
        &damaged,
        &"x".repeat(9000),
        &good.replace("REQUEST", "NOTHING"),
    ] {
        let asked = json!({"token": token, "request": bad});
        let (status, answer) = server.client().call("POST", "/enrol", &asked);
        let harmless = bad.contains("NOTHING") && status == 201;
        assert!(
            status == 422 && answer["field"] == "request" || harmless,
            "{answer}"
        );
    }
    // The token was not used up by that, but for one that got through whatever its label.
    assert!(Request::parse(&good).is_ok());
}

#[test]
fn a_certificate_is_renewed_with_the_one_before_and_older_ones_end() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let first = admin.enrol("host", &host);
    let renew = |with: &Holder| {
        let (key, csr) = request();
        let client = server.client().with_certificate(with);
        let (status, answer) = client
            .try_call("POST", "/renew", &json!({"request": csr}))
            .unwrap();
        (
            status,
            answer["certificate"]
                .as_str()
                .map(|pem| Holder::new(&key, pem)),
        )
    };
    let second = renew(&first).1.unwrap();
    // Should the answer have been lost: the first still gets another, and the lost one ends.
    let third = renew(&first).1.unwrap();
    assert!(
        server
            .client()
            .with_certificate(&second)
            .try_call("GET", "/machine", &NOTHING)
            .is_err()
    );
    let fourth = renew(&third).1.unwrap();
    assert!(
        server
            .client()
            .with_certificate(&first)
            .try_call("GET", "/machine", &NOTHING)
            .is_err()
    );
    for holder in [&third, &fourth] {
        server.client().with_certificate(holder).get("/machine");
    }
    assert!(
        server
            .msa
            .tls
            .is_revoked(&msa::secret::unhex(&first.serial).unwrap())
    );
}

#[test]
fn a_revoked_certificate_is_refused_at_the_port_and_in_the_list() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let holder = admin.enrol("host", &host);
    let machine = server.client().with_certificate(&holder);
    machine.get("/machine");
    let path = format!("/certificates/{}/revoke", holder.serial);
    admin.expect(204, "POST", &path, &json!({"reason": "host was stolen"}));
    let refused = machine.try_call("GET", "/machine", &NOTHING).unwrap_err();
    assert!(refused.to_string().contains("Revoked"), "{refused}");
    let (status, answer) = admin.call("POST", &path, &json!({"reason": "again"}));
    assert!(
        status == 409
            && answer["detail"]
                .as_str()
                .unwrap()
                .contains("is revoked already")
    );
    // What peers are given says the same.
    let (_, _, list) = server
        .client()
        .try_send("GET", "/authority/revocation-list", "", &[])
        .unwrap();
    let file = server.dir.path().join("list.der");
    std::fs::write(&file, &list).unwrap();
    let list = tls::files::revocation_list(&file).unwrap();
    let ca = server.dir.path().join("msa/ca.pem");
    let trust = tls::Trust::new(&tls::files::certificates(&ca).unwrap(), Some(list)).unwrap();
    let provider = tls::provider::aws_lc_rs();
    tls::server_config(
        &provider,
        &holder.own,
        &trust,
        tls::Peers::Only(&[Role::Host]),
    )
    .unwrap();
    // Removing somebody revokes all that they have.
    let drva = json!({"name": "d", "address": "10.0.0.1", "port_base": 32873});
    let drva = admin.make("/drvas", &drva);
    let appliance = server
        .client()
        .with_certificate(&admin.enrol("drva", &drva));
    appliance.get("/machine");
    admin.expect(204, "DELETE", &format!("/drvas/{drva}"), &NOTHING);
    assert!(appliance.try_call("GET", "/machine", &NOTHING).is_err());
}

/// The list may be late, a connection may stand: the state is asked at every request.
#[test]
fn the_state_is_asked_even_where_the_list_is_not_up_to_date() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let holder = admin.enrol("host", &host);
    let machine = server.client().with_certificate(&holder);
    machine.get("/machine");
    let serial = holder.serial.parse().unwrap();
    let reason = "late".parse().unwrap();
    let revoke = server
        .msa
        .store
        .record(|t| msa::certificates::revoke(t, &serial, &reason, 1));
    revoke.unwrap();
    let (status, answer) = machine.call("GET", "/machine", &NOTHING);
    assert_eq!(status, 401, "{answer}");
    assert_eq!(machine.call("GET", "/version", &NOTHING).0, 401);
}

#[test]
fn an_operator_with_a_certificate_is_its_user() {
    let server = Server::start();
    let operator = server.user("olga", "operator");
    let me = operator.get("/me")["id"].as_str().unwrap().to_owned();
    let holder = operator.enrol("operator", &me);
    let by_certificate = server.client().with_certificate(&holder);
    assert_eq!(by_certificate.get("/me")["name"], "olga");
    by_certificate.make("/sites", &json!({"name": "s", "store": "/s"}));
    assert_eq!(by_certificate.call("GET", "/users", &NOTHING).0, 403);
    assert_eq!(by_certificate.call("GET", "/machine", &NOTHING).0, 401);
    // A token for somebody else would be a way to become them.
    let admin = server.admin();
    let boss = admin.get("/me")["id"].as_str().unwrap().to_owned();
    let asked = json!({"role": "operator", "entity_id": boss});
    assert_eq!(operator.call("POST", "/enrolments", &asked).0, 403);
    admin.expect(
        200,
        "PATCH",
        &format!("/users/{me}"),
        &json!({"disabled": true}),
    );
    assert_eq!(by_certificate.call("GET", "/me", &NOTHING).0, 401);
}

/// A certificate of another authority, and one that this authority issued and does not know.
#[test]
fn strangers_do_not_get_in() {
    let server = Server::start();
    let admin = server.admin();
    let host: uuid::Uuid = admin.make_host("esx1").parse().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let other = Authority::make(elsewhere.path(), SystemClock.now_ms()).unwrap();
    let issue = |authority: &Authority, identity: Identity| {
        let (key, csr) = request();
        let request = Request::parse(&csr).unwrap();
        let issued = authority
            .issue(identity, &request, SystemClock.now_ms())
            .unwrap();
        Holder::new(&key, &issued.pem())
    };
    let call = |holder: &Holder| {
        server
            .client()
            .with_certificate(holder)
            .try_call("GET", "/machine", &NOTHING)
    };
    let identity = Identity::new(Role::Host, host);
    assert!(call(&issue(&other, identity)).is_err());
    // As after a restore of an old backup: unknown is not in force.
    assert_eq!(
        call(&issue(&server.msa.authority, identity)).unwrap().0,
        401
    );
    // Another management server's certificate: its role is not let in at all.
    assert!(
        call(&issue(
            &server.msa.authority,
            Identity::new(Role::Msa, host)
        ))
        .is_err()
    );
}

#[test]
fn the_key_is_its_owners_and_in_no_other_place() {
    let server = Server::start();
    let folder = server.dir.path().join("msa");
    for name in [
        "ca.key",
        "server.pem",
        "msa.sqlite",
        "msa.sqlite-wal",
        "revoked.der",
    ] {
        let mode = std::fs::metadata(folder.join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0, "{name}");
    }
    let mode = std::fs::metadata(&folder).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0);
    let key = std::fs::read_to_string(folder.join("ca.key")).unwrap();
    let line = key.lines().nth(1).unwrap();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let found = bytes
            .windows(line.len())
            .any(|part| part == line.as_bytes());
        assert_eq!(found, path.ends_with("ca.key"), "{}", path.display());
    }
    std::fs::set_permissions(
        folder.join("ca.key"),
        std::fs::Permissions::from_mode(0o640),
    )
    .unwrap();
    let said = Authority::load(&folder).err().unwrap().to_string();
    assert!(said.contains("may be read by others"), "{said}");
    std::fs::set_permissions(
        folder.join("ca.key"),
        std::fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    // The key of another authority is noticed.
    let elsewhere = tempfile::tempdir().unwrap();
    Authority::make(elsewhere.path(), SystemClock.now_ms()).unwrap();
    std::fs::copy(folder.join("ca.pem"), elsewhere.path().join("ca.pem")).unwrap();
    let said = Authority::load(elsewhere.path()).err().unwrap().to_string();
    assert!(said.contains("restore both from one backup"), "{said}");
}

#[test]
fn the_servers_own_certificate_is_renewed_in_time() {
    let server = Server::start();
    let pem = || std::fs::read(server.dir.path().join("msa/server.pem")).unwrap();
    let before = pem();
    server.clock.advance_ms(59 * DAY_MS);
    server.msa.housekeeping().unwrap();
    assert_eq!(pem(), before);
    server.clock.advance_ms(2 * DAY_MS);
    server.msa.housekeeping().unwrap();
    assert_ne!(pem(), before);
    let left_ms = server.msa.server_expires_at_ms().unwrap() - server.clock.now_ms();
    assert!(left_ms > 89 * DAY_MS);
}
