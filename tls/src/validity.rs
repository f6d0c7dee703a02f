//! Until when a certificate is valid: what neither rustls nor webpki tells.
//!
//! Invariant: bytes that are no certificate give an error, never a wrong date: every length is checked
//! against what is left.

use crate::identity::IdentityError;
use rustls::pki_types::CertificateDer;

const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// The fields before the validity: serial number, algorithm, issuer.
const BEFORE: usize = 3;

fn bad(what: &str) -> IdentityError {
    IdentityError::Unreadable(format!("its {what} cannot be read"))
}

/// The next element of DER: its tag, its content, what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0..=0x7f => (usize::from(*first), rest),
        0x81..=0x83 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let len = bytes.iter().fold(0, |len, b| len << 8 | usize::from(*b));
            (len, rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(len)?;
    Some((*tag, content, rest))
}

fn sequence(der: &[u8]) -> Option<(&[u8], &[u8])> {
    match element(der)? {
        (SEQUENCE, content, rest) => Some((content, rest)),
        _ => None,
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar.
fn days(year: i64, month: i64, day: i64) -> i64 {
    // Years that begin in March: the leap day is then the last.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let of_years = 365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let of_months = (153 * month + 2) / 5;
    of_years + of_months + day - 1 - 719_468
}

/// A time as X.509 writes it, in seconds since 1970.
fn time(tag: u8, text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let digits = text.strip_suffix('Z')?;
    let (year, rest) = match (tag, digits.len()) {
        (UTC_TIME, 12) => {
            let (year, rest) = digits.split_at_checked(2)?;
            let year: i64 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        (GENERALIZED_TIME, 14) => {
            let (year, rest) = digits.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let two = |at: usize| -> Option<i64> { rest.get(at..at + 2)?.parse().ok() };
    let (month, day) = (two(0)?, two(2)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    Some(days(year, month, day) * 86_400 + two(4)? * 3600 + two(6)? * 60 + two(8)?)
}

fn find(certificate: &[u8]) -> Option<(i64, i64)> {
    let (certificate, _) = sequence(certificate)?;
    let (mut rest, _) = sequence(certificate)?;
    if let Some((VERSION, _, after)) = element(rest) {
        rest = after;
    }
    for _ in 0..BEFORE {
        rest = element(rest)?.2;
    }
    let (validity, _) = sequence(rest)?;
    let (tag, from, rest) = element(validity)?;
    let from = time(tag, from)?;
    let (tag, until, _) = element(rest)?;
    Some((from, time(tag, until)?))
}

/// From when until when a certificate is valid, in seconds since 1970.
pub fn validity_s(certificate: &CertificateDer<'_>) -> Result<(i64, i64), IdentityError> {
    find(certificate).ok_or_else(|| bad("validity"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rcgen::{CertificateParams, KeyPair};
    use time::{Duration, OffsetDateTime};

    #[test]
    fn it_is_what_the_certificate_was_made_with() {
        let key = KeyPair::generate().unwrap();
        for (year, days) in [(1999, 1), (2024, 60), (2026, 90), (2048, 700), (2051, 9000)] {
            let mut params = CertificateParams::default();
            params.not_before = rcgen::date_time_ymd(year, 2, 28) + Duration::seconds(86_399);
            params.not_after = params.not_before + Duration::days(days);
            let made = params.self_signed(&key).unwrap();
            let (from, until) = validity_s(made.der()).unwrap();
            assert_eq!(from, params.not_before.unix_timestamp(), "{year}");
            assert_eq!(until, params.not_after.unix_timestamp(), "{year} {days}");
            assert!(OffsetDateTime::from_unix_timestamp(until).is_ok());
        }
    }

    #[test]
    fn what_is_cut_off_or_changed_is_no_certificate() {
        let key = KeyPair::generate().unwrap();
        let made = CertificateParams::default().self_signed(&key).unwrap();
        let der = made.der().to_vec();
        for len in 0..100 {
            let cut = CertificateDer::from(der.get(..len).unwrap().to_vec());
            assert!(validity_s(&cut).is_err(), "{len}");
        }
        // Whatever is flipped, it gives an answer or an error, and does not panic.
        for at in 0..der.len() {
            let mut der = der.clone();
            der[at] ^= 0xff;
            let _ = validity_s(&CertificateDer::from(der));
        }
    }
}
