//! `sig.pkcs7`: gzip of a PEM block with a detached PKCS#7 signature over the descriptor's exact bytes.
//!
//! Invariant: a signature counts as intact only if the one signer's certificate is inside, the digest
//! is SHA-256, and the signature over these very bytes verifies with that certificate's key. Who the
//! signer is, [`chain`] decides.

mod chain;
mod keys;
mod sign;

pub use chain::{Anchors, BadCertificates, Trust};
pub use sign::{SignError, Signer};

use crate::digest::sha256_raw;
use crate::finding::{Finding, Report, Rule};
use crate::gzip;
use crate::limits::Limits;
use cms::cert::CertificateChoices;
use cms::content_info::ContentInfo;
use cms::signed_data::{SignedData, SignerIdentifier, SignerInfo};
use std::io::Read;
use x509_cert::Certificate;
use x509_cert::der::asn1::{ObjectIdentifier, OctetString};
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::pkix::SubjectKeyIdentifier;

const SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
const DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.1");
const SHA_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");
const CONTENT_TYPE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.3");
const MESSAGE_DIGEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.4");
const SUBJECT_KEY_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.14");
/// The label of the PEM block. Readers of CMS know it too.
const LABEL: &str = "PKCS7";

/// A problem of a signature: the rule it breaks, and how.
type Problem = (Rule, String);

fn malformed(problem: impl Into<String>) -> Problem {
    (Rule::SignatureFormat, problem.into())
}

/// Who signed, if the signature is intact; what is wrong goes into `report`.
pub(crate) fn check(
    file: &str,
    stored: &[u8],
    signed: &[u8],
    trust: &Trust<'_>,
    limits: &Limits,
    report: &mut Report,
) -> Option<String> {
    let mut find = |(rule, problem): Problem| report.add(Finding::new(rule, file, "", problem));
    let pem = match unpack(stored, limits) {
        Ok(pem) => pem,
        Err(problem) => {
            find(problem);
            return None;
        }
    };
    let (signer, others) = match check_intact(&pem, signed) {
        Ok(found) => found,
        Err(problem) => {
            find(problem);
            return None;
        }
    };
    if let Some(problem) = chain::check(&signer, &others, trust) {
        find(problem);
    }
    Some(signer.tbs_certificate.subject.to_string())
}

fn unpack(stored: &[u8], limits: &Limits) -> Result<Vec<u8>, Problem> {
    let mut reader = gzip::Reader::new(stored, limits.text_bytes, limits);
    let mut pem = Vec::new();
    match reader.read_to_end(&mut pem) {
        Ok(_) => Ok(pem),
        Err(error) => Err(malformed(error.to_string())),
    }
}

/// The signer's certificate and those that came with it, if the signature is one over `signed`.
fn check_intact(pem: &[u8], signed: &[u8]) -> Result<(Certificate, Vec<Certificate>), Problem> {
    let (label, der) = x509_cert::der::pem::decode_vec(pem)
        .map_err(|error| malformed(format!("it is no PEM block: {error}")))?;
    if label != LABEL && label != "CMS" {
        return Err(malformed(format!(
            "the PEM block is labelled `{}`",
            label.escape_default()
        )));
    }
    let data = signed_data(&der)?;
    if data.encap_content_info.econtent.is_some() {
        return Err(malformed(
            "it brings contents of its own: it is not detached",
        ));
    }
    let mut signers = data.signer_infos.0.iter();
    let (Some(signer), None) = (signers.next(), signers.next()) else {
        return Err(malformed("it has not exactly one signer"));
    };
    if signer.digest_alg.oid != SHA_256 {
        return Err(malformed(format!(
            "its digest is {}, not SHA-256",
            signer.digest_alg.oid
        )));
    }
    let mut certificates = Vec::new();
    for choice in data.certificates.iter().flat_map(|set| set.0.iter()) {
        if let CertificateChoices::Certificate(certificate) = choice {
            certificates.push(certificate.clone());
        }
    }
    let is_signer = |certificate: &Certificate| names(&signer.sid, certificate);
    let certificate = certificates
        .iter()
        .find(|certificate| is_signer(certificate))
        .cloned();
    let certificate =
        certificate.ok_or_else(|| malformed("the signer's certificate is not inside"))?;
    let message = message_of(signer, &data, signed)?;
    let key = &certificate.tbs_certificate.subject_public_key_info;
    let message = message.as_deref().unwrap_or(signed);
    keys::verify(
        key,
        &signer.signature_algorithm.oid,
        message,
        signer.signature.as_bytes(),
    )
    .map_err(|error| error.of_signature())?;
    Ok((certificate, certificates))
}

fn signed_data(der: &[u8]) -> Result<SignedData, Problem> {
    let info = ContentInfo::from_der(der)
        .map_err(|error| malformed(format!("it is no PKCS#7: {error}")))?;
    if info.content_type != SIGNED_DATA {
        return Err(malformed(format!(
            "its content is {}, not signed data",
            info.content_type
        )));
    }
    let decoded = info.content.decode_as::<SignedData>();
    decoded.map_err(|error| malformed(format!("its signed data cannot be read: {error}")))
}

fn names(id: &SignerIdentifier, certificate: &Certificate) -> bool {
    let fields = &certificate.tbs_certificate;
    match id {
        SignerIdentifier::IssuerAndSerialNumber(id) => {
            id.issuer == fields.issuer && id.serial_number == fields.serial_number
        }
        SignerIdentifier::SubjectKeyIdentifier(id) => {
            let extensions = fields.extensions.iter().flatten();
            let mut ids = extensions.filter(|extension| extension.extn_id == SUBJECT_KEY_ID);
            ids.any(|extension| {
                SubjectKeyIdentifier::from_der(extension.extn_value.as_bytes())
                    .is_ok_and(|own| own == *id)
            })
        }
    }
}

/// What was signed: with signed attributes those, which must hold the digest of `signed`; `None`
/// stands for `signed` itself.
fn message_of(
    signer: &SignerInfo,
    data: &SignedData,
    signed: &[u8],
) -> Result<Option<Vec<u8>>, Problem> {
    let Some(attributes) = &signer.signed_attrs else {
        return Ok(None);
    };
    let value = |wanted: ObjectIdentifier| {
        let mut found = attributes
            .iter()
            .filter(|attribute| attribute.oid == wanted);
        match (found.next(), found.next()) {
            (Some(attribute), None) if attribute.values.len() == 1 => attribute.values.get(0),
            _ => None,
        }
    };
    let content = value(CONTENT_TYPE).and_then(|value| value.decode_as::<ObjectIdentifier>().ok());
    if content != Some(data.encap_content_info.econtent_type) {
        return Err(malformed(
            "its signed attributes name another type of content",
        ));
    }
    let digest = value(MESSAGE_DIGEST).and_then(|value| value.decode_as::<OctetString>().ok());
    let digest = digest.ok_or_else(|| malformed("its signed attributes hold no digest"))?;
    if digest.as_bytes() != sha256_raw(signed) {
        return Err((
            Rule::SignatureWrong,
            "it is over other bytes than those of descriptor.xml".into(),
        ));
    }
    let der = attributes
        .to_der()
        .map_err(|error| malformed(format!("its signed attributes: {error}")))?;
    Ok(Some(der))
}
