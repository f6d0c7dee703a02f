//! Public keys: which signatures are taken, and whether one holds.

use super::Problem;
use crate::finding::Rule;
use ring::signature as algorithms;
use ring::signature::{UnparsedPublicKey, VerificationAlgorithm};
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

pub(super) const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const RSA_SHA_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");
const RSA_SHA_384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12");
const RSA_SHA_512: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.13");
pub(super) const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
pub(super) const ECDSA_SHA_256: ObjectIdentifier =
    ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
const ECDSA_SHA_384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
const P_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P_384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");

/// Why a signature does not count.
pub(super) enum Failure {
    /// A kind of key or signature that is not taken.
    Kind(String),
    /// It does not hold; also a key that is too short.
    Wrong,
}

impl Failure {
    /// As a problem of a package's own signature.
    pub(super) fn of_signature(self) -> Problem {
        match self {
            Failure::Kind(kind) => (Rule::SignatureFormat, kind),
            Failure::Wrong => {
                let problem = "it does not hold for descriptor.xml with the signer's key (RSA keys of under 2048 bits never do)";
                (Rule::SignatureWrong, problem.into())
            }
        }
    }
}

/// `Ok` if `signature` is one over `message` with `key`. The OID `kind` of a PKCS#7 signer may name the
/// key's kind alone; the digest is SHA-256 then.
pub(super) fn verify(
    key: &SubjectPublicKeyInfoOwned,
    kind: &ObjectIdentifier,
    message: &[u8],
    signature: &[u8],
) -> Result<(), Failure> {
    let curve = || {
        let parameters = key.algorithm.parameters.as_ref();
        parameters.and_then(|parameters| parameters.decode_as::<ObjectIdentifier>().ok())
    };
    let algorithm: Option<&'static dyn VerificationAlgorithm> = if key.algorithm.oid == RSA {
        match *kind {
            RSA | RSA_SHA_256 => Some(&algorithms::RSA_PKCS1_2048_8192_SHA256),
            RSA_SHA_384 => Some(&algorithms::RSA_PKCS1_2048_8192_SHA384),
            RSA_SHA_512 => Some(&algorithms::RSA_PKCS1_2048_8192_SHA512),
            _ => None,
        }
    } else if key.algorithm.oid == EC {
        match (*kind, curve()) {
            (ECDSA_SHA_256, Some(P_256)) => Some(&algorithms::ECDSA_P256_SHA256_ASN1),
            (ECDSA_SHA_384, Some(P_256)) => Some(&algorithms::ECDSA_P256_SHA384_ASN1),
            (ECDSA_SHA_256, Some(P_384)) => Some(&algorithms::ECDSA_P384_SHA256_ASN1),
            (ECDSA_SHA_384, Some(P_384)) => Some(&algorithms::ECDSA_P384_SHA384_ASN1),
            _ => None,
        }
    } else {
        None
    };
    let unknown = || {
        Failure::Kind(format!(
            "a signature of kind {kind} with a key of kind {} is not taken",
            key.algorithm.oid
        ))
    };
    let algorithm = algorithm.ok_or_else(unknown)?;
    let key = UnparsedPublicKey::new(algorithm, key.subject_public_key.raw_bytes());
    key.verify(message, signature).map_err(|_| Failure::Wrong)
}
