//! A part's agent against the real server: enrolment by a token, renewal in time, the list.
#![allow(clippy::unwrap_used)]

mod support;

use enrol::{Agent, EnrolError};
use msa::clock::{Clock, DAY_MS};
use serde_json::{Value, json};
use std::time::Duration;
use support::{Client, Server};
use tls::Folder;

fn folder(server: &Server) -> Folder {
    let folder = Folder::at(server.dir.path().join("part"));
    folder.make().unwrap();
    std::fs::copy(server.dir.path().join("msa/ca.pem"), folder.authority()).unwrap();
    folder
}

fn lay_token(admin: &Client, folder: &Folder, host: &str) {
    let asked = json!({"role": "host", "entity_id": host});
    let made = admin.expect(201, "POST", "/enrolments", &asked);
    std::fs::write(folder.token(), made["token"].as_str().unwrap()).unwrap();
}

/// An agent for which everything is due.
fn agent(server: &Server, folder: &Folder) -> Agent {
    let address = format!("https://{}", server.address).parse().unwrap();
    Agent::new(folder.clone(), Some(address), Duration::from_secs(60))
}

fn serial(folder: &Folder) -> Vec<u8> {
    let own = folder.files().own().unwrap();
    tls::identity::serial_of(&own.chain[0]).unwrap()
}

fn nothing_more(_: &enrol::http::Client) -> Result<(), EnrolError> {
    Ok(())
}

#[test]
fn a_token_that_is_laid_there_is_used_once() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let folder = folder(&server);
    lay_token(&admin, &folder, &host);
    let mut agent = agent(&server, &folder);
    agent.work(&mut nothing_more);
    assert!(!folder.token().exists() && agent.has_changed() && !agent.has_changed());
    let own = folder.files().own().unwrap();
    let identity = tls::Identity::of_certificate(&own.chain[0]).unwrap();
    assert_eq!(identity.to_string(), format!("jetdr://host/{host}"));
    assert!(folder.revocation_list().exists());
    // One that does not do is put aside, and what was there stays.
    let before = serial(&folder);
    std::fs::write(folder.token(), "jde_00").unwrap();
    agent.work(&mut nothing_more);
    assert!(!folder.token().exists() && folder.token().with_extension("refused").exists());
    assert_eq!(serial(&folder), before);
    // A new one takes the place of what is there.
    lay_token(&admin, &folder, &host);
    let mut agent = self::agent(&server, &folder);
    agent.work(&mut nothing_more);
    assert_ne!(serial(&folder), before);
}

#[test]
fn a_certificate_is_renewed_when_two_thirds_of_its_time_are_over() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let folder = folder(&server);
    // The certificate's times are the server's; the agent goes by this machine's clock.
    for (days_ago, renewed) in [(59, false), (61, true)] {
        lay_token(&admin, &folder, &host);
        server.clock.advance_ms(-days_ago * DAY_MS);
        let asked = std::fs::read_to_string(folder.token()).unwrap();
        let address = format!("https://{}", server.address).parse().unwrap();
        enrol::steps::enrol(&folder, &address, &asked).unwrap();
        std::fs::remove_file(folder.token()).unwrap();
        server.clock.advance_ms(days_ago * DAY_MS);
        let before = serial(&folder);
        agent(&server, &folder).work(&mut nothing_more);
        assert_eq!(serial(&folder) != before, renewed, "{days_ago} days");
    }
    let (_, until_s) = tls::validity_s(&folder.files().own().unwrap().chain[0]).unwrap();
    assert!(until_s * 1000 - server.clock.now_ms() > 89 * DAY_MS);
}

#[test]
fn the_list_is_followed_and_who_is_on_it_is_told() {
    let server = Server::start();
    let admin = server.admin();
    let (host, other) = (admin.make_host("esx1"), admin.make_host("esx2"));
    let folder = folder(&server);
    lay_token(&admin, &folder, &host);
    agent(&server, &folder).work(&mut nothing_more);
    let other = admin.enrol("host", &other);
    let provider = tls::provider::ring();
    let tls = tls::ClientTls::load(provider, folder.files(), &[tls::Role::Drva]).unwrap();
    let revoke = |serial: &str| {
        let path = format!("/certificates/{serial}/revoke");
        admin.expect(204, "POST", &path, &json!({"reason": "gone"}));
    };
    revoke(&other.serial);
    let number = msa::secret::unhex(&other.serial).unwrap();
    assert!(!tls.is_revoked(&number));
    let mut fetched = 0;
    agent(&server, &folder).work(&mut |client| {
        fetched += 1;
        let told: Value = client.call("GET", "/machine", None)?;
        assert_eq!(told["identity"], format!("jetdr://host/{host}"));
        Ok(())
    });
    let before = tls.version();
    tls.reload().unwrap();
    assert!(fetched == 1 && tls.is_revoked(&number) && tls.version() != before);
    // Who is revoked itself gets nothing more, and keeps what it has.
    revoke(&msa::secret::hex(&serial(&folder)));
    agent(&server, &folder).work(&mut |_| {
        fetched += 1;
        Ok(())
    });
    assert!(fetched == 1 && folder.has_identity());
}
