//! Why a connection was refused, in words that say what to do.
//!
//! Invariant: what the other end says of us is told apart from what we say of it.

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// Why there is no connection with `peer`, "the appliance" or "the host".
pub fn explain(error: &Error, peer: &str) -> String {
    match error {
        Error::AlertReceived(alert) => refused_us(*alert, peer),
        Error::NoCertificatesPresented => format!("{peer} showed no certificate: enrol it"),
        Error::InvalidCertificate(error) => we_refuse(error, peer),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => format!(
            "{peer} does not speak TLS: it was started with --insecure-plain-text, or is no part of jetdr"
        ),
        other => format!("TLS with {peer} failed: {other}"),
    }
}

fn refused_us(alert: AlertDescription, peer: &str) -> String {
    let why = match alert {
        AlertDescription::CertificateRevoked => "it was revoked: enrol anew",
        AlertDescription::CertificateExpired => "it has expired, or a clock is wrong: enrol anew",
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "another authority issued it: enrol with the authority of this site"
        }
        AlertDescription::CertificateRequired => "none was shown: enrol",
        AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied
        | AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate => {
            "it is not one for this: the log of the other end says why"
        }
        AlertDescription::ProtocolVersion => {
            return format!("{peer} does not speak TLS 1.3");
        }
        other => return format!("{peer} ended the handshake: {other:?}"),
    };
    format!("{peer} refuses this end's certificate: {why}")
}

fn we_refuse(error: &CertificateError, peer: &str) -> String {
    let why = match error {
        CertificateError::Revoked => "it was revoked".into(),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired, or a clock is wrong".into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet: a clock is wrong".into()
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "another authority issued it".into()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "it is another's than the one that was dialled".into()
        }
        CertificateError::Other(other) => other.to_string(),
        other => format!("{other:?}"),
    };
    format!("the certificate of {peer} is refused: {why}")
}
