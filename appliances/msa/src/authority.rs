//! The authority: the key that all certificates of a site come from.
//!
//! Invariant: its key is in one file that only its owner may read (0600), never in the database, a log or
//! an answer; what it signs bears one identity of the form that [`tls::Identity`] documents, whatever
//! the request for it asked for.

use crate::clock::{DAY_MS, MINUTE_MS};
use crate::secret;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams,
    CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData, RevocationReason,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use time::OffsetDateTime;
use tls::Identity;

/// The authority's certificate.
pub const CERTIFICATE: &str = "ca.pem";
/// Its key.
pub const KEY: &str = "ca.key";
/// Days for which the authority itself is valid.
pub const AUTHORITY_DAYS: i64 = 3650;
/// Days for which what it issues is valid.
pub const LEAF_DAYS: i64 = 90;
/// A clock that is behind by less than this still takes a new certificate.
const SKEW_MS: i64 = 5 * MINUTE_MS;
/// No request for a certificate is longer.
pub const MAX_CSR_BYTES: usize = 8 << 10;
/// When peers should have a newer revocation list; they obey an older one all the same.
const LIST_DAYS: i64 = 7;

/// What can be wrong with the authority or with what it is asked to sign.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Its files cannot be used.
    #[error(transparent)]
    Files(#[from] tls::TlsError),
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What it is asked to sign is no request for a certificate, or one that this does not sign.
    #[error(
        "the certificate signing request {0}: make a PKCS#10 request with a P-256, P-384 or Ed25519 key"
    )]
    Request(String),
    /// Its key and its certificate do not belong together.
    #[error("{} is not the key of {}: restore both from one backup", key.display(), certificate.display())]
    Mismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's.
        certificate: PathBuf,
    },
    /// Signing failed.
    #[error("cannot sign: {0}")]
    Sign(rcgen::Error),
    /// No random numbers.
    #[error(transparent)]
    Secret(#[from] secret::SecretError),
}

/// A certificate, new.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Its serial number, hexadecimal.
    pub serial: String,
    /// Whose it is.
    pub identity: Identity,
    /// SHA-256 of its public key.
    pub key_hash: String,
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// From when it is valid, but for the allowance for clocks.
    pub created_at_ms: i64,
    /// Until when.
    pub expires_at_ms: i64,
}

impl Issued {
    /// As PEM.
    pub fn pem(&self) -> String {
        tls::pem::encode("CERTIFICATE", &self.der)
    }
}

/// A certificate that is taken back.
#[derive(Clone, Debug)]
pub struct Revoked {
    /// Its serial number.
    pub serial: Vec<u8>,
    /// Since when.
    pub at_ms: i64,
}

/// A request for a certificate: only its key is taken from it.
pub struct Request {
    key: rcgen::PublicKey,
}

impl Request {
    /// Reads a PKCS#10 request in PEM; its signature shows that who asks has the key.
    pub fn parse(text: &str) -> Result<Self, AuthorityError> {
        let bad = |why: String| AuthorityError::Request(why);
        if text.len() > MAX_CSR_BYTES {
            return Err(bad(format!("has more than {MAX_CSR_BYTES} bytes")));
        }
        let parsed = CertificateSigningRequestParams::from_pem(text);
        let parsed = parsed.map_err(|error| bad(format!("cannot be read ({error})")))?;
        let taken = [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
        ];
        let algorithm = parsed.public_key.algorithm();
        if !taken.contains(&algorithm) {
            return Err(bad("has a key of another kind".into()));
        }
        Ok(Self {
            key: parsed.public_key,
        })
    }

    /// SHA-256 of its public key.
    pub fn key_hash(&self) -> String {
        secret::sha256(self.key.der_bytes())
    }
}

/// The authority, with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    expires_at_ms: i64,
}

fn time(at_ms: i64) -> OffsetDateTime {
    // Certificates count seconds.
    OffsetDateTime::from_unix_timestamp(at_ms.div_euclid(1000))
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// Writes a file that is there whole or not at all. Nobody else may read it.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), AuthorityError> {
    let failed = |source| AuthorityError::Write {
        path: path.to_owned(),
        source,
    };
    let partial = path.with_extension("partial");
    let _ = std::fs::remove_file(&partial);
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(&partial).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    std::fs::rename(&partial, path).map_err(failed)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(failed)
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "jetdr");
    name.push(DnType::CommonName, common);
    name
}

/// 16 random bytes that are a positive number in DER with no leading zeros.
fn new_serial() -> Result<[u8; 16], AuthorityError> {
    let mut bytes: [u8; 16] = secret::random()?;
    if let Some(first) = bytes.first_mut() {
        *first = *first & 0x7f | 0x40;
    }
    Ok(bytes)
}

impl Authority {
    /// Makes one and writes its files into a folder.
    pub fn make(folder: &Path, now_ms: i64) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256);
        let key = key.map_err(AuthorityError::Sign)?;
        let mut params = CertificateParams::default();
        let serial = new_serial()?;
        let short = secret::hex(serial.get(..4).unwrap_or_default());
        params.distinguished_name = name(&format!("jetdr authority {short}"));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = time(now_ms - SKEW_MS);
        params.not_after = time(now_ms + AUTHORITY_DAYS * DAY_MS);
        let certificate = params.self_signed(&key).map_err(AuthorityError::Sign)?;
        write_private(&folder.join(KEY), key.serialize_pem().as_bytes())?;
        write_private(&folder.join(CERTIFICATE), certificate.pem().as_bytes())?;
        Self::load(folder)
    }

    /// Reads it from a folder.
    pub fn load(folder: &Path) -> Result<Self, AuthorityError> {
        let (key_path, path) = (folder.join(KEY), folder.join(CERTIFICATE));
        let key = tls::files::private_key(&key_path)?;
        let mismatch = || AuthorityError::Mismatch {
            key: key_path.clone(),
            certificate: path.clone(),
        };
        let certificates = tls::files::certificates(&path)?;
        let certificate = certificates.into_iter().next().ok_or_else(mismatch)?;
        let key = KeyPair::try_from(&key).map_err(AuthorityError::Sign)?;
        let (spki, expires_at_ms) = public_key_and_end(&certificate).ok_or_else(mismatch)?;
        if spki != key.subject_public_key_info() {
            return Err(mismatch());
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(AuthorityError::Sign)?;
        Ok(Self {
            issuer,
            certificate,
            expires_at_ms,
        })
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The same, as PEM.
    pub fn certificate_pem(&self) -> String {
        tls::pem::encode("CERTIFICATE", &self.certificate)
    }

    /// Until when it is valid.
    pub fn expires_at_ms(&self) -> i64 {
        self.expires_at_ms
    }

    /// Signs a certificate for who asks with a key of theirs.
    pub fn issue(
        &self,
        identity: Identity,
        request: &Request,
        now_ms: i64,
    ) -> Result<Issued, AuthorityError> {
        self.sign(identity, &request.key, &[], now_ms)
    }

    /// Makes key and certificate of the management server: the key in PEM, and the certificate, which
    /// also bears the names by which people and programs reach it.
    pub fn issue_server(
        &self,
        identity: Identity,
        names: &[String],
        now_ms: i64,
    ) -> Result<(String, Issued), AuthorityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256);
        let key = key.map_err(AuthorityError::Sign)?;
        let issued = self.sign(identity, &key, names, now_ms)?;
        Ok((key.serialize_pem(), issued))
    }

    fn sign(
        &self,
        identity: Identity,
        key: &impl PublicKeyData,
        names: &[String],
        now_ms: i64,
    ) -> Result<Issued, AuthorityError> {
        let serial = new_serial()?;
        // Nothing outlives the authority.
        let expires_at_ms = (now_ms + LEAF_DAYS * DAY_MS).min(self.expires_at_ms);
        let mut params = CertificateParams::default();
        params.distinguished_name = name(&format!("{} {}", identity.role, identity.id));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.not_before = time(now_ms - SKEW_MS);
        params.not_after = time(expires_at_ms);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if identity.role.may_serve() {
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let text = |text: String| text.try_into().map_err(AuthorityError::Sign);
        params
            .subject_alt_names
            .push(SanType::URI(text(identity.to_string())?));
        params
            .subject_alt_names
            .push(SanType::DnsName(text(identity.dns_name())?));
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(text(name.clone())?),
            });
        }
        let signed = params
            .signed_by(key, &self.issuer)
            .map_err(AuthorityError::Sign)?;
        Ok(Issued {
            serial: secret::hex(&serial),
            identity,
            key_hash: secret::sha256(key.der_bytes()),
            der: signed.der().clone(),
            created_at_ms: now_ms,
            expires_at_ms,
        })
    }

    /// Signs the list of what is revoked, in DER.
    pub fn revocation_list(
        &self,
        revoked: &[Revoked],
        number: u64,
        now_ms: i64,
    ) -> Result<Vec<u8>, AuthorityError> {
        let revoked_certs = revoked.iter().map(|revoked| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&revoked.serial),
            revocation_time: time(revoked.at_ms),
            reason_code: Some(RevocationReason::Unspecified),
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: time(now_ms - SKEW_MS),
            next_update: time(now_ms + LIST_DAYS * DAY_MS),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params
            .signed_by(&self.issuer)
            .map_err(AuthorityError::Sign)?;
        Ok(list.der().to_vec())
    }
}

/// A certificate's public key (as `SubjectPublicKeyInfo`) and the end of its validity.
fn public_key_and_end(certificate: &CertificateDer<'_>) -> Option<(Vec<u8>, i64)> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let end = parsed.validity().not_after.timestamp();
    Some((parsed.public_key().raw.to_vec(), end.saturating_mul(1000)))
}

/// A certificate as PEM.
pub fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    tls::pem::encode("CERTIFICATE", certificate)
}
