//! Which server is believed to be the one that was meant.
//!
//! Invariant: a configuration that is handed out checks the server's certificate and that the server
//! holds its key; there is no setting that checks nothing.

use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, RootCertStore};
use std::sync::Arc;
use tls::config::Anybody;

/// Whom to believe.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Who has a certificate of one of these authorities, for the name that is dialled.
    Authorities(Vec<CertificateDer<'static>>),
    /// Who has just this certificate, whatever names and dates stand in it.
    Pinned(CertificateDer<'static>),
    /// Who has the certificate whose SHA-256 this is, whatever names and dates stand in it.
    Fingerprint([u8; 32]),
}

/// Why there is no configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The text is no certificate.
    #[error("no PEM certificate: {0}")]
    Pem(String),
    /// A certificate cannot be trusted.
    #[error("cannot trust the certificate: {0}")]
    Certificate(String),
}

impl Trust {
    /// Trusts the authorities in a PEM text; at least one.
    pub fn authorities_of(pem: &[u8]) -> Result<Self, TrustError> {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let all = all.map_err(|error| TrustError::Pem(error.to_string()))?;
        if all.is_empty() {
            return Err(TrustError::Pem("the text holds none".into()));
        }
        Ok(Self::Authorities(all))
    }

    /// Trusts just the certificate in a PEM text.
    pub fn pinned_to(pem: &[u8]) -> Result<Self, TrustError> {
        let one = CertificateDer::from_pem_slice(pem);
        Ok(Self::Pinned(
            one.map_err(|error| TrustError::Pem(error.to_string()))?,
        ))
    }

    /// A configuration for connections, TLS 1.2 and 1.3.
    pub fn client_config(&self) -> Result<ClientConfig, TrustError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let of = |error: rustls::Error| TrustError::Certificate(error.to_string());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(of)?;
        let fingerprint = match self {
            Self::Authorities(authorities) => {
                let mut roots = RootCertStore::empty();
                for one in authorities {
                    roots.add(one.clone()).map_err(of)?;
                }
                return Ok(builder.with_root_certificates(roots).with_no_client_auth());
            }
            Self::Pinned(certificate) => sha256(certificate),
            Self::Fingerprint(fingerprint) => *fingerprint,
        };
        let verifier = Pinned {
            fingerprint,
            inner: Anybody::new(provider),
        };
        Ok(builder
            .dangerous() // the verifier takes one certificate and no other
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth())
    }
}

fn sha256(certificate: &CertificateDer<'_>) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(certificate.as_ref()).into()
}

/// Takes one certificate: the one with this SHA-256.
#[derive(Debug)]
struct Pinned {
    fingerprint: [u8; 32],
    inner: Arc<Anybody>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if sha256(end_entity) == self.fingerprint {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        ))
    }

    tls::delegate_signatures!(inner);
}
