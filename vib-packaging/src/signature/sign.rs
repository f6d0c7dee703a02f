//! Makes the signature of a package.
//!
//! There are no signed attributes, so no time either: with an RSA key the same descriptor gets the same
//! bytes each time. ECDSA draws a number for each signature.

use super::chain::{BadCertificates, certificates};
use super::{DATA, LABEL, SHA_256, SIGNED_DATA, keys};
use crate::gzip;
use cms::cert::{CertificateChoices, IssuerAndSerialNumber};
use cms::content_info::{CmsVersion, ContentInfo};
use cms::signed_data::{
    CertificateSet, EncapsulatedContentInfo, SignedData, SignerIdentifier, SignerInfo, SignerInfos,
};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256,
    RsaKeyPair,
};
use x509_cert::Certificate;
use x509_cert::der::asn1::{Any, Null, OctetString, SetOfVec};
use x509_cert::der::{self, Encode};
use x509_cert::spki::AlgorithmIdentifierOwned;

/// Why a package cannot be signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// The certificates.
    #[error(transparent)]
    Certificates(#[from] BadCertificates),
    /// The key.
    #[error("{file}: {problem}")]
    Key {
        /// Its file.
        file: String,
        /// What is wrong, what to do.
        problem: String,
    },
    /// The structure around the signature.
    #[error("cannot make the PKCS#7 structure: {0}")]
    Structure(#[from] der::Error),
}

enum Key {
    Rsa(Box<RsaKeyPair>),
    P256(Box<EcdsaKeyPair>),
}

/// A key and its certificates.
pub struct Signer {
    key: Key,
    /// The signer's own first.
    certificates: Vec<Certificate>,
}

fn parse_key(file: &str, pem: &[u8]) -> Result<Key, SignError> {
    let bad = |problem: &str| SignError::Key {
        file: file.to_owned(),
        problem: problem.to_owned(),
    };
    let decoded = der::pem::decode_vec(pem);
    let (label, bytes) = decoded.map_err(|error| bad(&format!("it is no PEM block: {error}")))?;
    match label {
        "RSA PRIVATE KEY" => match RsaKeyPair::from_der(&bytes) {
            Ok(key) => Ok(Key::Rsa(Box::new(key))),
            Err(error) => Err(bad(&format!(
                "this RSA key is not taken ({error}): use one of 2048 to 4096 bits"
            ))),
        },
        "PRIVATE KEY" => {
            let random = SystemRandom::new();
            if let Ok(key) =
                EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &bytes, &random)
            {
                return Ok(Key::P256(Box::new(key)));
            }
            if EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, &bytes, &random).is_ok() {
                return Err(bad(
                    "a P-384 key signs with SHA-384, a package with SHA-256: use RSA or P-256",
                ));
            }
            match RsaKeyPair::from_pkcs8(&bytes) {
                Ok(key) => Ok(Key::Rsa(Box::new(key))),
                Err(error) => Err(bad(&format!(
                    "this key is not taken ({error}): use RSA of 2048 to 4096 bits, or P-256"
                ))),
            }
        }
        "ENCRYPTED PRIVATE KEY" => Err(bad(
            "the key is encrypted: `openssl pkcs8 -in KEY -out PLAIN` takes the password away",
        )),
        "EC PRIVATE KEY" => Err(bad(
            "make it PKCS#8: `openssl pkcs8 -topk8 -nocrypt -in KEY -out NEW`",
        )),
        other => Err(bad(&format!(
            "a PEM block `{}` is no private key",
            other.escape_default()
        ))),
    }
}

impl Signer {
    /// From a private key and the certificates, the signer's own first and then its issuers', in PEM.
    /// The files' names are for messages.
    pub fn from_pem(
        key: (&str, &[u8]),
        certificates_pem: (&str, &[u8]),
    ) -> Result<Signer, SignError> {
        let signer = Signer {
            key: parse_key(key.0, key.1)?,
            certificates: certificates(certificates_pem.0, certificates_pem.1)?,
        };
        let probe = signer.sign_raw(b"probe", key.0)?;
        let own = signer.own()?;
        let (key_info, kind) = (
            &own.tbs_certificate.subject_public_key_info,
            signer.algorithm()?.oid,
        );
        if keys::verify(key_info, &kind, b"probe", &probe).is_err() {
            return Err(SignError::Key {
                file: key.0.to_owned(),
                problem: format!(
                    "it does not belong to the first certificate of {}",
                    certificates_pem.0
                ),
            });
        }
        Ok(signer)
    }

    fn own(&self) -> Result<&Certificate, SignError> {
        // `certificates` gave at least one.
        Ok(self
            .certificates
            .first()
            .ok_or_else(|| der::Error::from(der::ErrorKind::Failed))?)
    }

    fn algorithm(&self) -> Result<AlgorithmIdentifierOwned, SignError> {
        Ok(match self.key {
            Key::Rsa(_) => AlgorithmIdentifierOwned {
                oid: keys::RSA,
                parameters: Some(Any::encode_from(&Null)?),
            },
            Key::P256(_) => AlgorithmIdentifierOwned {
                oid: keys::ECDSA_SHA_256,
                parameters: None,
            },
        })
    }

    fn sign_raw(&self, message: &[u8], file: &str) -> Result<Vec<u8>, SignError> {
        let random = SystemRandom::new();
        let signature = match &self.key {
            Key::Rsa(key) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature)
                    .map(|()| signature)
            }
            Key::P256(key) => key
                .sign(&random, message)
                .map(|signature| signature.as_ref().to_vec()),
        };
        signature.map_err(|_| SignError::Key {
            file: file.to_owned(),
            problem: "the key cannot sign".to_owned(),
        })
    }

    /// The bytes of `sig.pkcs7` for these bytes of `descriptor.xml`.
    pub fn sign(&self, descriptor: &[u8]) -> Result<Vec<u8>, SignError> {
        let sha_256 = AlgorithmIdentifierOwned {
            oid: SHA_256,
            parameters: Some(Any::encode_from(&Null)?),
        };
        let fields = &self.own()?.tbs_certificate;
        let info = SignerInfo {
            version: CmsVersion::V1,
            sid: SignerIdentifier::IssuerAndSerialNumber(IssuerAndSerialNumber {
                issuer: fields.issuer.clone(),
                serial_number: fields.serial_number.clone(),
            }),
            digest_alg: sha_256.clone(),
            signed_attrs: None,
            signature_algorithm: self.algorithm()?,
            signature: OctetString::new(self.sign_raw(descriptor, "the key")?)?,
            unsigned_attrs: None,
        };
        let choices = self
            .certificates
            .iter()
            .cloned()
            .map(CertificateChoices::Certificate);
        let data = SignedData {
            version: CmsVersion::V1,
            digest_algorithms: SetOfVec::try_from(vec![sha_256])?,
            encap_content_info: EncapsulatedContentInfo {
                econtent_type: DATA,
                econtent: None,
            },
            certificates: Some(CertificateSet(SetOfVec::try_from(
                choices.collect::<Vec<_>>(),
            )?)),
            crls: None,
            signer_infos: SignerInfos(SetOfVec::try_from(vec![info])?),
        };
        let content = ContentInfo {
            content_type: SIGNED_DATA,
            content: Any::encode_from(&data)?,
        };
        let pem = der::pem::encode_string(LABEL, der::pem::LineEnding::LF, &content.to_der()?)
            .map_err(der::Error::from)?;
        Ok(gzip::write(pem.as_bytes()))
    }
}
