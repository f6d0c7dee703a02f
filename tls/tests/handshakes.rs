//! Two ends in memory: who is let in, who is refused, and why.
#![allow(clippy::unwrap_used)]

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use time::{Duration, OffsetDateTime};
use tls::{Files, Identity, Own, Peer, Peers, Role, ServerTls, Trust};
use uuid::Uuid;

const DATA_PATH: Peers = Peers::Only(&[Role::Host]);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate is made from.
struct Wanted {
    uris: Vec<String>,
    dns_name: String,
    serial: u64,
    /// Days from now.
    valid: (i64, i64),
    usages: Vec<ExtendedKeyUsagePurpose>,
}

fn wanted(role: Role, id: u128) -> Wanted {
    let identity = Identity::new(role, Uuid::from_u128(id));
    Wanted {
        uris: vec![identity.to_string()],
        dns_name: identity.dns_name(),
        serial: id as u64,
        valid: (-1, 1),
        usages: vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ],
    }
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "authority of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    fn issue(&self, wanted: &Wanted) -> Own {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![wanted.dns_name.clone()]).unwrap();
        for uri in &wanted.uris {
            let name = SanType::URI(uri.clone().try_into().unwrap());
            params.subject_alt_names.push(name);
        }
        params.serial_number = Some(SerialNumber::from(wanted.serial));
        params.not_before = OffsetDateTime::now_utc() + Duration::days(wanted.valid.0);
        params.not_after = OffsetDateTime::now_utc() + Duration::days(wanted.valid.1);
        params.extended_key_usages = wanted.usages.clone();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Own {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        }
    }

    fn revoke(&self, serials: &[u64]) -> CertificateRevocationListDer<'static> {
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: OffsetDateTime::now_utc(),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            // Long out of date: it is obeyed all the same.
            this_update: OffsetDateTime::now_utc() - Duration::days(30),
            next_update: OffsetDateTime::now_utc() - Duration::days(20),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().clone()
    }

    fn trust(&self, revoked: &[u64]) -> Trust {
        let list = self.revoke(revoked);
        Trust::new(std::slice::from_ref(&self.certificate), Some(list)).unwrap()
    }
}

/// Lets the two ends talk until both are done, or one of them gives its reason.
fn shake(
    client: ClientConfig,
    server: Arc<ServerConfig>,
    to: Identity,
) -> Result<(Peer, Option<Peer>), String> {
    let name = to.server_name().unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    for _ in 0..8 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server
                .process_new_packets()
                .map_err(|error| format!("server: {error}"))?;
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client
                .process_new_packets()
                .map_err(|error| format!("client: {error}"))?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    assert_eq!(
        client.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    let of_server = tls::peer_of(&client).unwrap().unwrap();
    Ok((of_server, tls::peer_of(&server).unwrap()))
}

fn drva() -> Identity {
    Identity::new(Role::Drva, Uuid::from_u128(100))
}

/// A host with certificate `own` dials a DR appliance that trusts `trust`.
fn dial(authority: &Authority, own: Option<&Own>, trust: &Trust) -> Result<Option<Peer>, String> {
    let server = authority.issue(&wanted(Role::Drva, 100));
    let server = tls::server_config(&provider(), &server, trust, DATA_PATH).unwrap();
    let mine = authority.trust(&[]);
    let client = tls::client_config(&provider(), own, &mine, &[Role::Drva]).unwrap();
    let (of_server, of_client) = shake(client, Arc::new(server), drva())?;
    assert_eq!(of_server.identity, drva());
    Ok(of_client)
}

#[test]
fn a_host_is_known_by_its_certificate() {
    let authority = Authority::new();
    let own = authority.issue(&wanted(Role::Host, 7));
    let peer = dial(&authority, Some(&own), &authority.trust(&[8]))
        .unwrap()
        .unwrap();
    assert_eq!(peer.identity, Identity::new(Role::Host, Uuid::from_u128(7)));
    assert_eq!(peer.serial, [7]);
    assert_eq!(peer.certificate, own.chain[0]);
}

#[test]
fn who_must_not_come_in_is_refused_with_the_reason() {
    let authority = Authority::new();
    let trust = authority.trust(&[66]);
    let refused = |own: Option<&Own>| dial(&authority, own, &trust).unwrap_err();

    let said = refused(None);
    assert!(said.contains("peer sent no certificates"), "{said}");

    let stranger = Authority::new().issue(&wanted(Role::Host, 7));
    let said = refused(Some(&stranger));
    assert!(
        said.starts_with("server: invalid peer certificate"),
        "{said}"
    );

    let revoked = authority.issue(&wanted(Role::Host, 66));
    let said = refused(Some(&revoked));
    assert!(said.contains("Revoked"), "{said}");

    let mut late = wanted(Role::Host, 7);
    late.valid = (-3, -1);
    let said = refused(Some(&authority.issue(&late)));
    assert!(said.contains("expired"), "{said}");

    let mut early = wanted(Role::Host, 7);
    early.valid = (1, 3);
    let said = refused(Some(&authority.issue(&early)));
    assert!(said.contains("not valid yet"), "{said}");

    let said = refused(Some(&authority.issue(&wanted(Role::Operator, 7))));
    assert!(
        said.contains("operator") && said.contains("is not host"),
        "{said}"
    );

    let mut nobody = wanted(Role::Host, 7);
    nobody.uris.clear();
    let said = refused(Some(&authority.issue(&nobody)));
    assert!(said.contains("names no part"), "{said}");

    let mut both = wanted(Role::Host, 7);
    both.uris
        .push(Identity::new(Role::Host, Uuid::from_u128(8)).to_string());
    let said = refused(Some(&authority.issue(&both)));
    assert!(said.contains("more than one part"), "{said}");

    let mut server_only = wanted(Role::Host, 7);
    server_only.usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let said = refused(Some(&authority.issue(&server_only)));
    assert!(
        said.starts_with("server: invalid peer certificate"),
        "{said}"
    );
}

#[test]
fn who_dials_refuses_another_server_too() {
    let authority = Authority::new();
    let own = authority.issue(&wanted(Role::Host, 7));
    let refused = |server: &Own, trust: &Trust| {
        let server =
            tls::server_config(&provider(), server, &authority.trust(&[]), DATA_PATH).unwrap();
        let client = tls::client_config(&provider(), Some(&own), trust, &[Role::Drva]).unwrap();
        shake(client, Arc::new(server), drva()).unwrap_err()
    };
    let trust = authority.trust(&[100]);
    let said = refused(&authority.issue(&wanted(Role::Drva, 100)), &trust);
    assert!(said.contains("Revoked"), "{said}");

    let trust = authority.trust(&[]);
    let said = refused(&authority.issue(&wanted(Role::Drva, 101)), &trust);
    assert!(
        said.starts_with("client: ") && said.contains("not valid for name"),
        "{said}"
    );

    // The right name, and another role.
    let mut disguised = wanted(Role::Host, 7);
    disguised.dns_name = drva().dns_name();
    let said = refused(&authority.issue(&disguised), &trust);
    assert!(said.contains("is not drva"), "{said}");

    let said = refused(&Authority::new().issue(&wanted(Role::Drva, 100)), &trust);
    assert!(
        said.starts_with("client: invalid peer certificate"),
        "{said}"
    );
}

#[test]
fn where_anyone_may_come_a_certificate_is_still_checked() {
    let authority = Authority::new();
    let peers = Peers::Anyone(&[Role::Operator]);
    let server = authority.issue(&wanted(Role::Drva, 100));
    let trust = authority.trust(&[66]);
    let server = Arc::new(tls::server_config(&provider(), &server, &trust, peers).unwrap());
    let dial = |own: Option<Own>| {
        let client = tls::client_config(&provider(), own.as_ref(), &trust, &[Role::Drva]).unwrap();
        shake(client, server.clone(), drva())
    };
    assert!(dial(None).unwrap().1.is_none());
    let operator = authority.issue(&wanted(Role::Operator, 7));
    let peer = dial(Some(operator)).unwrap().1.unwrap();
    assert_eq!(peer.identity.role, Role::Operator);
    assert!(dial(Some(authority.issue(&wanted(Role::Host, 7)))).is_err());
    assert!(dial(Some(authority.issue(&wanted(Role::Operator, 66)))).is_err());
}

/// A client that remembers sessions does not get back in with one after its certificate was revoked.
#[test]
fn no_session_outlives_a_verdict() {
    let authority = Authority::new();
    let own = authority.issue(&wanted(Role::Host, 7));
    let server = authority.issue(&wanted(Role::Drva, 100));
    let trust = authority.trust(&[]);
    let server = tls::server_config(&provider(), &server, &trust, DATA_PATH).unwrap();
    assert_eq!(server.send_tls13_tickets, 0);
    assert!(!server.session_storage.can_cache());
    let server = Arc::new(server);
    let mut client = tls::client_config(&provider(), Some(&own), &trust, &[Role::Drva]).unwrap();
    client.resumption = rustls::client::Resumption::in_memory_sessions(8);
    for _ in 0..2 {
        let client = Arc::new(client.clone());
        let mut connection = ClientConnection::new(client, drva().server_name().unwrap()).unwrap();
        let mut accepted = ServerConnection::new(server.clone()).unwrap();
        for _ in 0..8 {
            let mut bytes = Vec::new();
            while connection.wants_write() {
                connection.write_tls(&mut bytes).unwrap();
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                accepted.read_tls(&mut rest).unwrap();
                accepted.process_new_packets().unwrap();
            }
            let mut bytes = Vec::new();
            while accepted.wants_write() {
                accepted.write_tls(&mut bytes).unwrap();
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                connection.read_tls(&mut rest).unwrap();
                connection.process_new_packets().unwrap();
            }
        }
        assert_eq!(
            connection.handshake_kind(),
            Some(rustls::HandshakeKind::Full)
        );
    }
}

fn store(path: &Path, text: &[u8]) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn pem(label: &str, der: &[u8]) -> Vec<u8> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for chunk in der.chunks(3) {
        let mut word = [0; 3];
        word[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, word[0], word[1], word[2]]);
        for at in 0..4 {
            let six = (bits >> (18 - 6 * at)) & 63;
            let shown = if at <= chunk.len() {
                alphabet[six as usize]
            } else {
                b'='
            };
            text.push(shown.into());
        }
    }
    text.push_str(&format!("\n-----END {label}-----\n"));
    text.into_bytes()
}

#[test]
fn a_revocation_is_in_force_after_a_reload_and_a_bad_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files {
        authority: dir.path().join("ca.pem"),
        certificate: dir.path().join("own.pem"),
        key: dir.path().join("own.key"),
        revocation_list: Some(dir.path().join("crl.der")),
    };
    let list = dir.path().join("crl.der");
    let authority = Authority::new();
    let own = authority.issue(&wanted(Role::Drva, 100));
    store(
        &files.authority,
        &pem("CERTIFICATE", &authority.certificate),
    );
    store(&files.certificate, &pem("CERTIFICATE", &own.chain[0]));
    store(&files.key, &pem("PRIVATE KEY", own.key.secret_der()));
    store(&list, &authority.revoke(&[]));
    let server_files = files.clone();
    let server = ServerTls::load(provider(), files, Role::Drva, DATA_PATH).unwrap();
    let host = authority.issue(&wanted(Role::Host, 7));
    let dial = || {
        let trust = authority.trust(&[]);
        let client = tls::client_config(&provider(), Some(&host), &trust, &[Role::Drva]).unwrap();
        shake(client, server.config(), drva())
    };
    let peer = dial().unwrap().1.unwrap();
    assert!(!server.is_revoked(&peer.serial));

    // Another part's certificate in the folder: the role counts at each reading.
    let other = authority.issue(&wanted(Role::Host, 101));
    store(
        &server_files.certificate,
        &pem("CERTIFICATE", &other.chain[0]),
    );
    store(
        &server_files.key,
        &pem("PRIVATE KEY", other.key.secret_der()),
    );
    let said = server.reload().unwrap_err().to_string();
    assert!(said.contains("this is a drva"), "{said}");
    assert!(dial().is_ok());
    store(
        &server_files.certificate,
        &pem("CERTIFICATE", &own.chain[0]),
    );
    store(&server_files.key, &pem("PRIVATE KEY", own.key.secret_der()));

    store(&list, b"no list at all");
    let said = server.reload().unwrap_err().to_string();
    assert!(said.contains("crl.der"), "{said}");
    assert!(dial().is_ok() && !server.is_revoked(&peer.serial));

    store(&list, &authority.revoke(&[7]));
    server.reload().unwrap();
    assert!(server.is_revoked(&peer.serial));
    assert!(dial().unwrap_err().contains("Revoked"));

    // A list that another authority signed: nobody gets in by it.
    store(&list, &Authority::new().revoke(&[]));
    server.reload().unwrap();
    assert!(dial().is_err());
}
