//! A part's agent against the real server: enrolment by a token, renewal in time, the list.
#![allow(clippy::unwrap_used)]

mod support;

use enrol::{Agent, EnrolError};
use msa::clock::{Clock, DAY_MS};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;
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
    Agent::new(
        folder.clone(),
        Some(address),
        tls::Role::Host,
        Duration::from_secs(60),
    )
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
    assert!(!folder.token().exists() && !folder.asked().exists());
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
        enrol::steps::enrol(&folder, &address, &asked, None, &[tls::Role::Host]).unwrap();
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
    let tls = tls::ClientTls::load(
        provider,
        folder.files(),
        tls::Role::Host,
        &[tls::Role::Drva],
    )
    .unwrap();
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
    agent(&server, &folder).work(&mut |client| {
        client.call("GET", "/machine", None)?;
        fetched += 1;
        Ok(())
    });
    assert!(fetched == 1 && folder.has_identity());
}

/// What a host is invited by, and whether it was taken back.
#[derive(Clone, Default)]
struct Laid(Arc<Mutex<String>>);

impl enrol::Invitations for Laid {
    fn look(&mut self) -> std::io::Result<Option<String>> {
        let line = self.0.lock().clone();
        Ok((!line.is_empty()).then_some(line))
    }

    fn clear(&mut self) -> std::io::Result<()> {
        self.0.lock().clear();
        Ok(())
    }
}

fn token(admin: &Client, host: &str) -> String {
    let asked = json!({"role": "host", "entity_id": host});
    let made = admin.expect(201, "POST", "/enrolments", &asked);
    made["token"].as_str().unwrap().to_owned()
}

#[test]
fn an_invitation_is_taken_by_its_digest_and_only_without_a_certificate() {
    let server = Server::start();
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let folder = Folder::at(server.dir.path().join("invited"));
    folder.make().unwrap();
    let ca = std::fs::read(server.dir.path().join("msa/ca.pem")).unwrap();
    let invite = |digest: &str| {
        format!(
            "https://{} {digest} {}",
            server.address,
            token(&admin, &host)
        )
    };
    let laid = Laid::default();
    let agent = || {
        Agent::new(
            folder.clone(),
            None,
            tls::Role::Host,
            Duration::from_secs(60),
        )
        .with_invitations(Box::new(laid.clone()))
    };
    // Somebody else answers at the server's address, as far as this host can tell.
    *laid.0.lock() = invite(&msa::secret::sha256(b"another"));
    agent().work(&mut nothing_more);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert!(
        !laid.0.lock().is_empty(),
        "it stays for who looks for the fault"
    );
    *laid.0.lock() = invite(&msa::secret::sha256(&ca));
    agent().work(&mut nothing_more);
    assert!(laid.0.lock().is_empty(), "nobody need read it any more");
    assert!(folder.has_identity() && !folder.token().exists());
    assert_eq!(std::fs::read(folder.authority()).unwrap(), ca);
    // With a certificate in force it listens to nobody.
    let before = serial(&folder);
    *laid.0.lock() = invite(&msa::secret::sha256(&ca));
    agent().work(&mut nothing_more);
    assert!(serial(&folder) == before && !laid.0.lock().is_empty());
    // Revoked, it hears of that first, and then takes the next.
    let path = format!("/certificates/{}/revoke", msa::secret::hex(&before));
    admin.expect(204, "POST", &path, &json!({"reason": "set up anew"}));
    agent().work(&mut nothing_more);
    assert!(!enrol::steps::is_in_force(&folder));
    agent().work(&mut nothing_more);
    assert!(laid.0.lock().is_empty() && serial(&folder) != before);
    assert!(enrol::steps::is_in_force(&folder));
}

#[test]
fn the_list_and_the_documents_come_whatever_becomes_of_the_renewal() {
    let server = Server::start();
    let admin = server.admin();
    let (host, other) = (admin.make_host("esx1"), admin.make_host("esx2"));
    let folder = folder(&server);
    lay_token(&admin, &folder, &host);
    agent(&server, &folder).work(&mut nothing_more);
    let revoke = |serial: &str| {
        let path = format!("/certificates/{serial}/revoke");
        admin.expect(204, "POST", &path, &json!({"reason": "gone"}));
        msa::secret::unhex(serial).unwrap()
    };
    let listed = |number: &[u8]| {
        let list = std::fs::read(folder.revocation_list()).unwrap();
        tls::files::is_on_list(&list, number)
    };
    // A certificate that cannot be read cannot be renewed.
    let whole = std::fs::read(folder.identity()).unwrap();
    folder.write(&folder.identity(), b"damaged").unwrap();
    let number = revoke(&admin.enrol("host", &other).serial);
    agent(&server, &folder).work(&mut nothing_more);
    assert!(listed(&number));
    // Nor can a list that is damaged be gone by.
    folder.write(&folder.identity(), &whole).unwrap();
    folder.write(&folder.revocation_list(), b"damaged").unwrap();
    agent(&server, &folder).work(&mut nothing_more);
    assert!(listed(&number));
    // A token that is no use keeps nothing from being fetched.
    std::fs::write(folder.token(), "jde_00").unwrap();
    let mut fetched = 0;
    agent(&server, &folder).work(&mut |_| {
        fetched += 1;
        Ok(())
    });
    assert_eq!(fetched, 1);
    // Who is revoked itself learns it.
    let own = revoke(&msa::secret::hex(&serial(&folder)));
    agent(&server, &folder).work(&mut nothing_more);
    assert!(listed(&own));
}

#[test]
fn an_enrolment_changes_all_or_nothing_and_its_answer_may_be_lost() {
    let (server, before) = (Server::start(), Server::start());
    let admin = server.admin();
    let host = admin.make_host("esx1");
    let address = format!("https://{}", server.address).parse().unwrap();
    let ca = std::fs::read(server.dir.path().join("msa/ca.pem")).unwrap();
    // The folder is another authority's, with its list.
    let folder = folder(&before);
    let list = before
        .client()
        .try_send("GET", "/authority/revocation-list", "", b"");
    std::fs::write(folder.revocation_list(), list.unwrap().2).unwrap();
    let old = std::fs::read(folder.authority()).unwrap();
    let enrol = |token: &str, roles: &[tls::Role]| {
        enrol::steps::enrol(&folder, &address, token, Some(&ca), roles)
    };
    assert!(enrol("jde_00", &[tls::Role::Host]).is_err());
    let drva = token(&admin, &host);
    let said = enrol(&drva, &[tls::Role::Drva]).unwrap_err().to_string();
    assert!(said.contains("this is a drva"), "{said}");
    assert_eq!(std::fs::read(folder.authority()).unwrap(), old);
    assert!(!folder.has_identity());
    let token = token(&admin, &host);
    enrol(&token, &[tls::Role::Host]).unwrap();
    assert_eq!(std::fs::read(folder.authority()).unwrap(), ca);
    // As if it had ended before the answer came: the key is there, the certificate is not.
    let first = serial(&folder);
    let both = std::fs::read_to_string(folder.identity()).unwrap();
    let key = both
        .split_inclusive("-----END PRIVATE KEY-----\n")
        .next()
        .unwrap();
    folder.write(&folder.asked(), key.as_bytes()).unwrap();
    std::fs::remove_file(folder.identity()).unwrap();
    enrol(&token, &[tls::Role::Host]).unwrap();
    assert_eq!(serial(&folder), first);
    // With another key it does not do twice.
    assert!(enrol(&token, &[tls::Role::Host]).is_err());
}
