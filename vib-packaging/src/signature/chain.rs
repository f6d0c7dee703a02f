//! Who a signer is: the way from its certificate to one that is trusted.
//!
//! Invariant: a chain counts only if each certificate's signature holds, each issuer may issue, all are
//! in force, and none has a critical extension that is not understood here.

use super::{Problem, keys};
use crate::finding::Rule;
use std::time::{SystemTime, UNIX_EPOCH};
use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::pkix::{BasicConstraints, ExtendedKeyUsage, KeyUsage};

const BASIC_CONSTRAINTS: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.19");
const KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.15");
const EXTENDED_KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37");
const CODE_SIGNING: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.3");
const ANY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37.0");
const MAX_CHAIN: usize = 8;

/// Certificates that are trusted.
#[derive(Clone, Debug, Default)]
pub struct Anchors(Vec<Certificate>);

/// Why a file of certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: no certificates in PEM can be read from it: {problem}")]
pub struct BadCertificates {
    file: String,
    problem: String,
}

impl Anchors {
    /// The certificates of a PEM file; `file` is its name, for messages.
    pub fn from_pem(file: &str, pem: &[u8]) -> Result<Anchors, BadCertificates> {
        certificates(file, pem).map(Anchors)
    }
}

pub(super) fn certificates(file: &str, pem: &[u8]) -> Result<Vec<Certificate>, BadCertificates> {
    let bad = |problem: String| BadCertificates {
        file: file.to_owned(),
        problem,
    };
    match Certificate::load_pem_chain(pem) {
        Ok(found) if found.is_empty() => Err(bad("there is none".into())),
        Ok(found) => Ok(found),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// Whom a reader trusts.
#[derive(Clone, Copy, Debug)]
pub enum Trust<'t> {
    /// The signer is not looked at: only whether the signature is intact.
    Unchecked,
    /// A signer must lead to one of these, at that time (seconds since 1970), or now.
    Anchors(&'t Anchors, Option<u64>),
}

fn bad_chain(problem: impl Into<String>) -> Problem {
    (Rule::SignatureChain, problem.into())
}

fn name(certificate: &Certificate) -> String {
    let subject = certificate.tbs_certificate.subject.to_string();
    subject.escape_debug().take(200).collect()
}

fn extension<'c, E: Decode<'c>>(
    certificate: &'c Certificate,
    id: ObjectIdentifier,
) -> Result<Option<E>, Problem> {
    let mut found = certificate
        .tbs_certificate
        .extensions
        .iter()
        .flatten()
        .filter(|extension| extension.extn_id == id);
    match (found.next(), found.next()) {
        (None, _) => Ok(None),
        (Some(extension), None) => {
            let decoded = E::from_der(extension.extn_value.as_bytes());
            decoded.map(Some).map_err(|error| {
                bad_chain(format!("extension {id} of {}: {error}", name(certificate)))
            })
        }
        _ => Err(bad_chain(format!(
            "extension {id} of {} is there twice",
            name(certificate)
        ))),
    }
}

fn nothing_unknown(certificate: &Certificate) -> Result<(), Problem> {
    let known = [BASIC_CONSTRAINTS, KEY_USAGE, EXTENDED_KEY_USAGE];
    let extensions = certificate.tbs_certificate.extensions.iter().flatten();
    match extensions
        .filter(|extension| extension.critical)
        .find(|extension| !known.contains(&extension.extn_id))
    {
        Some(extension) => Err(bad_chain(format!(
            "{} has the critical extension {}, which is not understood",
            name(certificate),
            extension.extn_id
        ))),
        None => Ok(()),
    }
}

fn may_sign(certificate: &Certificate) -> Result<(), Problem> {
    let usage: Option<KeyUsage> = extension(certificate, KEY_USAGE)?;
    let purposes: Option<ExtendedKeyUsage> = extension(certificate, EXTENDED_KEY_USAGE)?;
    let purpose = |id: &ObjectIdentifier| *id == CODE_SIGNING || *id == ANY_USAGE;
    if usage.is_some_and(|usage| !usage.digital_signature())
        || purposes.is_some_and(|ids| !ids.0.iter().any(purpose))
    {
        return Err(bad_chain(format!(
            "the certificate of {} is not one for signing code",
            name(certificate)
        )));
    }
    Ok(())
}

/// `below`: how many issuers stand between this one and the signer.
fn may_issue(certificate: &Certificate, below: usize) -> Result<(), Problem> {
    let constraints: Option<BasicConstraints> = extension(certificate, BASIC_CONSTRAINTS)?;
    let usage: Option<KeyUsage> = extension(certificate, KEY_USAGE)?;
    let long_enough = |limit: Option<u8>| limit.is_none_or(|limit| below <= usize::from(limit));
    let issues = constraints
        .is_some_and(|constraints| constraints.ca && long_enough(constraints.path_len_constraint));
    if !issues || usage.is_some_and(|usage| !usage.key_cert_sign()) {
        return Err(bad_chain(format!(
            "{} may not issue this certificate",
            name(certificate)
        )));
    }
    Ok(())
}

fn in_force(certificate: &Certificate, now_s: u64) -> Result<(), Problem> {
    let validity = &certificate.tbs_certificate.validity;
    let from = validity.not_before.to_unix_duration().as_secs();
    let until = validity.not_after.to_unix_duration().as_secs();
    if (from..=until).contains(&now_s) {
        return Ok(());
    }
    let time = |s: u64| {
        jiff::Timestamp::from_second(i64::try_from(s).unwrap_or(i64::MAX))
            .map_or("?".into(), |t| t.to_string())
    };
    let problem = format!(
        "the certificate of {} is in force from {} to {}",
        name(certificate),
        time(from),
        time(until)
    );
    Err((Rule::SignatureTime, problem))
}

fn issued(certificate: &Certificate, issuer: &Certificate) -> bool {
    if certificate.tbs_certificate.issuer != issuer.tbs_certificate.subject {
        return false;
    }
    let (Ok(message), Some(signature)) = (
        certificate.tbs_certificate.to_der(),
        certificate.signature.as_bytes(),
    ) else {
        return false;
    };
    let key = &issuer.tbs_certificate.subject_public_key_info;
    keys::verify(
        key,
        &certificate.signature_algorithm.oid,
        &message,
        signature,
    )
    .is_ok()
}

fn walk(
    signer: &Certificate,
    others: &[Certificate],
    anchors: &[Certificate],
    now_s: u64,
) -> Result<(), Problem> {
    may_sign(signer)?;
    let mut certificate = signer;
    for below in 0..MAX_CHAIN {
        nothing_unknown(certificate)?;
        in_force(certificate, now_s)?;
        if anchors.contains(certificate) {
            return Ok(());
        }
        let anchor = anchors.iter().find(|anchor| issued(certificate, anchor));
        let issuer = anchor.or_else(|| {
            others
                .iter()
                .find(|other| *other != certificate && issued(certificate, other))
        });
        let Some(issuer) = issuer else {
            return Err(bad_chain(format!(
                "{} leads to no trusted certificate",
                name(signer)
            )));
        };
        may_issue(issuer, below)?;
        certificate = issuer;
    }
    Err(bad_chain(format!(
        "{} leads to no trusted certificate within {MAX_CHAIN} steps",
        name(signer)
    )))
}

/// What stands between the signer and trust.
pub(super) fn check(
    signer: &Certificate,
    others: &[Certificate],
    trust: &Trust<'_>,
) -> Option<Problem> {
    let Trust::Anchors(Anchors(anchors), at_s) = trust else {
        return None;
    };
    let now_s = at_s.unwrap_or_else(|| {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_secs())
    });
    walk(signer, others, anchors, now_s).err()
}
