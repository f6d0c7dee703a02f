//! Certificates, keys and revocation lists as files.
//!
//! Invariant: a private key that others may read is refused; a file is never read beyond its limit; an
//! error names the file and what was expected in it.

use crate::TlsError;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A chain has a few certificates of about 1 KiB.
const MAX_PEM_BYTES: u64 = 256 << 10;
/// About 40 bytes for each revoked certificate that has not expired.
const MAX_CRL_BYTES: u64 = 16 << 20;

/// Reads at most `max_bytes` of a file.
fn read(path: &Path, what: &'static str, max_bytes: u64) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    // One more than the limit, so that what is too long shows.
    file.take(max_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > max_bytes {
        return Err(TlsError::TooLong {
            path: path.to_owned(),
            what,
            len_bytes: bytes.len() as u64,
            max_bytes,
        });
    }
    Ok(bytes)
}

fn content(path: &Path, what: &'static str, why: impl ToString) -> TlsError {
    TlsError::Content {
        path: path.to_owned(),
        what,
        why: why.to_string(),
    }
}

/// The certificates of a PEM file, at least one.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let what = "certificate in PEM";
    let bytes = read(path, what, MAX_PEM_BYTES)?;
    all_of(&bytes, path, what)
}

fn all_of(
    pem: &[u8],
    path: &Path,
    what: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| content(path, what, error))?;
    if all.is_empty() {
        return Err(content(path, what, "there is none"));
    }
    Ok(all)
}

/// The certificates of a PEM text, at least one. `name`: what an error calls it.
pub fn certificates_of(pem: &[u8], name: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    all_of(pem, Path::new(name), "certificate in PEM")
}

/// The private key of a PEM file that only its owner may read.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let what = "private key in PEM";
    let metadata = std::fs::metadata(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let path = path.to_owned();
        return Err(TlsError::KeyIsOpen { path, mode });
    }
    let bytes = read(path, what, MAX_PEM_BYTES)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| content(path, what, error))
}

/// A revocation list in DER. Its signature is checked at each handshake, with the certificate's.
pub fn revocation_list(path: &Path) -> Result<CertificateRevocationListDer<'static>, TlsError> {
    let what = "certificate revocation list in DER";
    let bytes = read(path, what, MAX_CRL_BYTES)?;
    // Parsed here so that a damaged file is told with its name.
    check_revocation_list(&bytes).map_err(|error| content(path, what, error))?;
    Ok(bytes.into())
}

/// Whether these bytes are a revocation list, and if not, why.
pub fn check_revocation_list(der: &[u8]) -> Result<(), String> {
    let parsed = webpki::BorrowedCertRevocationList::from_der(der);
    parsed.map(drop).map_err(|error| error.to_string())
}

/// Whether a revocation list names a serial number; one that cannot be read names everybody.
pub fn is_on_list(der: &[u8], serial: &[u8]) -> bool {
    webpki::BorrowedCertRevocationList::from_der(der)
        .map(webpki::CertRevocationList::from)
        .and_then(|list| list.find_serial(serial).map(|found| found.is_some()))
        .unwrap_or(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_error_names_the_file_and_what_was_expected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("thing.pem");
        let said = certificates(&path).unwrap_err().to_string();
        assert!(
            said.contains("cannot read") && said.contains("thing.pem"),
            "{said}"
        );
        std::fs::write(&path, "hello").unwrap();
        let said = certificates(&path).unwrap_err().to_string();
        assert!(said.contains("thing.pem holds no certificate"), "{said}");
        let said = revocation_list(&path).unwrap_err().to_string();
        assert!(
            said.contains("holds no certificate revocation list"),
            "{said}"
        );
        std::fs::write(&path, vec![b'x'; MAX_PEM_BYTES as usize + 1]).unwrap();
        let said = certificates(&path).unwrap_err().to_string();
        assert!(
            said.contains("no certificate in PEM is longer than"),
            "{said}"
        );
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.key");
        let key = rcgen::KeyPair::generate().unwrap();
        std::fs::write(&path, key.serialize_pem()).unwrap();
        for (mode, fine) in [(0o640, false), (0o604, false), (0o600, true), (0o400, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let read = private_key(&path);
            assert_eq!(read.is_ok(), fine, "mode {mode:o}: {:?}", read.err());
        }
    }
}
