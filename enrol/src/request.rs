//! A key, and the request (PKCS#10) for its certificate.
//!
//! Invariant: the request says nothing but the key and that its maker has it: who the holder is the
//! authority decides.

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, KeyPair,
};
use tls::pem;

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OBJECT: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
/// The request's attributes: there are none.
const ATTRIBUTES: u8 = 0xa0;

/// id-ecPublicKey, 1.2.840.10045.2.1.
const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
/// prime256v1, 1.2.840.10045.3.1.7.
const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// ecdsa-with-SHA256, 1.2.840.10045.4.3.2.
const ECDSA_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];

static ALGORITHM: &EcdsaSigningAlgorithm = &ECDSA_P256_SHA256_ASN1_SIGNING;

/// The system gave no random numbers, or the key cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot make a key: the system gives no random numbers")]
pub struct NoKey;

/// A key and the request for its certificate, both PEM.
#[derive(Clone)]
pub struct Request {
    /// PKCS#8.
    pub key_pem: String,
    /// PKCS#10.
    pub request_pem: String,
}

fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = vec![tag];
    let bytes = len.to_be_bytes();
    match len {
        0..0x80 => out.push(len as u8),
        0x80..0x100 => out.extend([0x81, len as u8]),
        // Nothing here comes near 64 KiB.
        _ => {
            out.push(0x82);
            out.extend_from_slice(bytes.last_chunk::<2>().unwrap_or(&[0, 0]));
        }
    }
    for part in parts {
        out.extend_from_slice(part);
    }
    out
}

impl Request {
    /// Makes a P-256 key and asks for its certificate.
    pub fn make() -> Result<Self, NoKey> {
        let made = EcdsaKeyPair::generate_pkcs8(ALGORITHM, &SystemRandom::new());
        Self::of_pkcs8(made.map_err(|_| NoKey)?.as_ref())
    }

    /// Asks for the certificate of a key that was made before: PKCS#8, DER.
    pub fn of_pkcs8(pkcs8: &[u8]) -> Result<Self, NoKey> {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(ALGORITHM, pkcs8, &random).map_err(|_| NoKey)?;
        let curve = element(
            SEQUENCE,
            &[
                &element(OBJECT, &[EC_PUBLIC_KEY]),
                &element(OBJECT, &[P256]),
            ],
        );
        let point = element(BIT_STRING, &[&[0], key.public_key().as_ref()]);
        let public_key = element(SEQUENCE, &[&curve, &point]);
        let nobody = element(SEQUENCE, &[]);
        let told = element(
            SEQUENCE,
            &[
                &element(INTEGER, &[&[0]]),
                &nobody,
                &public_key,
                &element(ATTRIBUTES, &[]),
            ],
        );
        let signature = key.sign(&random, &told).map_err(|_| NoKey)?;
        let algorithm = element(SEQUENCE, &[&element(OBJECT, &[ECDSA_SHA256])]);
        let signature = element(BIT_STRING, &[&[0], signature.as_ref()]);
        let request = element(SEQUENCE, &[&told, &algorithm, &signature]);
        Ok(Self {
            key_pem: pem::encode("PRIVATE KEY", pkcs8),
            request_pem: pem::encode("CERTIFICATE REQUEST", &request),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rcgen::PublicKeyData;
    use x509_parser::prelude::{FromDer, X509CertificationRequest};

    #[test]
    fn another_reader_takes_the_request_and_its_key() {
        let made = Request::make().unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(made.request_pem.as_bytes()).unwrap();
        let (rest, request) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        assert!(rest.is_empty());
        request.verify_signature().unwrap();
        let key = rcgen::KeyPair::from_pem(&made.key_pem).unwrap();
        let info = &request.certification_request_info;
        assert_eq!(info.subject_pki.raw, key.subject_public_key_info());
        rcgen::CertificateSigningRequestParams::from_pem(&made.request_pem).unwrap();
        assert_ne!(Request::make().unwrap().key_pem, made.key_pem);
    }

    #[test]
    fn lengths_are_those_of_der() {
        for (len, head) in [
            (0, vec![0x30, 0]),
            (127, vec![0x30, 127]),
            (128, vec![0x30, 0x81, 128]),
            (255, vec![0x30, 0x81, 255]),
            (256, vec![0x30, 0x82, 1, 0]),
        ] {
            let made = element(SEQUENCE, &[&vec![7; len]]);
            assert_eq!(made.len(), head.len() + len);
            assert!(made.starts_with(&head), "{len}");
        }
    }
}
