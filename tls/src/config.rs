//! The two ends of a connection: from certificate, key, what is trusted, and who may be at the other end.
//!
//! Invariant: TLS 1.3 only; nothing is resumed, no early data; the other end's certificate is checked by
//! rustls's own verifiers, revocation included, and then for its role, before the handshake is done.

use crate::TlsError;
use crate::identity::{Identity, IdentityError, Role, serial_of};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName,
    OtherError, RootCertStore, ServerConfig, SignatureScheme,
};
use std::sync::Arc;

/// Certificate and key of this end.
#[derive(Debug)]
pub struct Own {
    /// The certificate, then what leads to the authority, if anything stands between.
    pub chain: Vec<CertificateDer<'static>>,
    /// The certificate's key.
    pub key: PrivateKeyDer<'static>,
}

impl Clone for Own {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

/// What is trusted.
#[derive(Clone, Debug)]
pub struct Trust {
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
}

impl Trust {
    /// Trusts what this authority issued and did not take back. A list beyond its date is still
    /// obeyed: replication must go on while the management server is away.
    pub fn new(
        authority: &[CertificateDer<'static>],
        crl: Option<CertificateRevocationListDer<'static>>,
    ) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in authority {
            roots
                .add(certificate.clone())
                .map_err(|error| TlsError::Trust(error.to_string()))?;
        }
        Ok(Self {
            roots: Arc::new(roots),
            crls: crl.into_iter().collect(),
        })
    }

    /// Whether a revocation list bears the name of this authority. Its signature is checked at handshakes.
    pub fn issues(&self, list: &[u8]) -> bool {
        let Ok(list) = webpki::OwnedCertRevocationList::from_der(list) else {
            return false;
        };
        let list = webpki::CertRevocationList::from(list);
        let mut roots = self.roots.roots.iter();
        roots.any(|root| root.subject.as_ref() == list.issuer())
    }

    /// Whether the authority issued a certificate, for one who dials. `at`: the time that counts.
    pub fn check_issued(
        &self,
        provider: &Arc<CryptoProvider>,
        chain: &[CertificateDer<'static>],
        at: UnixTime,
    ) -> Result<(), TlsError> {
        let (first, rest) = chain.split_first().ok_or(IdentityError::Missing)?;
        let roots = self.roots.clone();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .with_crls(self.crls.clone())
            .build()
            .map_err(|error| TlsError::Trust(error.to_string()))?;
        let verified = verifier.verify_client_cert(first, rest, at);
        verified.map(drop).map_err(TlsError::NotIssued)
    }
}

/// Who may be at the other end of a connection that this end accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Only who has a certificate with one of these roles.
    Only(&'static [Role]),
    /// Those, and who has no certificate. A certificate that is shown is always checked.
    Anyone(&'static [Role]),
}

/// The end that accepts.
pub fn server_config(
    provider: &Arc<CryptoProvider>,
    own: &Own,
    trust: &Trust,
    peers: Peers,
) -> Result<ServerConfig, TlsError> {
    let roots = trust.roots.clone();
    let mut builder = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .with_crls(trust.crls.clone());
    let roles = match peers {
        Peers::Only(roles) => roles,
        Peers::Anyone(roles) => {
            builder = builder.allow_unauthenticated();
            roles
        }
    };
    let inner = builder
        .build()
        .map_err(|error| TlsError::Trust(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Own)?
        .with_client_cert_verifier(Arc::new(ClientOfRole { inner, roles }))
        .with_single_cert(own.chain.clone(), own.key.clone_key())
        .map_err(TlsError::Own)?;
    // A resumed session would bring an old verdict with it, from before the certificate was revoked.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// The end that dials. `own` may be missing where the other end takes `Peers::Anyone`. The name to
/// dial by is [`Identity::server_name`], or the name that a person was given.
pub fn client_config(
    provider: &Arc<CryptoProvider>,
    own: Option<&Own>,
    trust: &Trust,
    servers: &'static [Role],
) -> Result<ClientConfig, TlsError> {
    let roots = trust.roots.clone();
    let inner = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
        .with_crls(trust.crls.clone())
        .build()
        .map_err(|error| TlsError::Trust(error.to_string()))?;
    let roles = servers;
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Own)?
        .dangerous() // only in name: the verifier below adds to the standard one
        .with_custom_certificate_verifier(Arc::new(ServerOfRole { inner, roles }));
    let mut config = match own {
        Some(own) => builder
            .with_client_auth_cert(own.chain.clone(), own.key.clone_key())
            .map_err(TlsError::Own)?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct Peer {
    /// What its certificate says.
    pub identity: Identity,
    /// The certificate's serial number, big-endian.
    pub serial: Vec<u8>,
    /// The certificate.
    pub certificate: CertificateDer<'static>,
}

/// Who is at the other end of a connection whose handshake is done; nothing, if it has no certificate.
pub fn peer_of(connection: &CommonState) -> Result<Option<Peer>, IdentityError> {
    let certificates = connection.peer_certificates().unwrap_or_default();
    let Some(certificate) = certificates.first() else {
        return Ok(None);
    };
    Ok(Some(Peer {
        identity: Identity::of_certificate(certificate)?,
        serial: serial_of(certificate)?,
        certificate: certificate.clone().into_owned(),
    }))
}

/// A role that was not asked for.
#[derive(Debug)]
struct WrongRole(String);

impl std::fmt::Display for WrongRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongRole {}

fn check_role(certificate: &CertificateDer<'_>, roles: &[Role]) -> Result<(), rustls::Error> {
    let why = match Identity::of_certificate(certificate) {
        Ok(identity) if roles.contains(&identity.role) => return Ok(()),
        Ok(identity) => {
            let wanted: Vec<&str> = roles.iter().map(|role| role.name()).collect();
            format!("{identity} is not {}", wanted.join(" or "))
        }
        Err(error) => error.to_string(),
    };
    let other = OtherError(Arc::new(WrongRole(why)));
    Err(CertificateError::Other(other).into())
}

/// In a verifier that wraps another: the checks of signatures, which are the other's. `$inner` is the field
/// that holds it (an `Arc`).
#[macro_export]
macro_rules! delegate_signatures {
    ($inner:ident) => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &rustls::pki_types::CertificateDer<'_>,
            signature: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            self.$inner
                .verify_tls12_signature(message, certificate, signature)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &rustls::pki_types::CertificateDer<'_>,
            signature: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            self.$inner
                .verify_tls13_signature(message, certificate, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.$inner.supported_verify_schemes()
        }
    };
}

/// Asks for nothing but that the other end holds the key of the certificate that it shows.
#[derive(Debug)]
pub struct Anybody(Arc<CryptoProvider>);

impl Anybody {
    /// With these primitives.
    pub fn new(provider: Arc<CryptoProvider>) -> Arc<Self> {
        Arc::new(Self(provider))
    }
}

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// For what is believed by its content (a digest that was told another way), whoever sends it.
pub fn unverified_client_config(provider: &Arc<CryptoProvider>) -> Result<ClientConfig, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Own)?
        .dangerous()
        .with_custom_certificate_verifier(Anybody::new(provider.clone()))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(config)
}

#[derive(Debug)]
struct ClientOfRole {
    inner: Arc<dyn ClientCertVerifier>,
    roles: &'static [Role],
}

impl ClientCertVerifier for ClientOfRole {
    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .inner
            .verify_client_cert(end_entity, intermediates, now)?;
        check_role(end_entity, self.roles)?;
        Ok(verified)
    }

    crate::delegate_signatures!(inner);
}

#[derive(Debug)]
struct ServerOfRole {
    inner: Arc<WebPkiServerVerifier>,
    roles: &'static [Role],
}

impl ServerCertVerifier for ServerOfRole {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.inner.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        check_role(end_entity, self.roles)?;
        Ok(verified)
    }

    crate::delegate_signatures!(inner);
}
