//! Enrolment, renewal, and what a part fetches with its certificate.
//!
//! Invariant: what is written into the folder was checked: the certificate belongs to the key that was
//! made for it, names one part, and its authority is the one that was trusted before.

use crate::http::{Client, HttpError, Server};
use crate::request::{NoKey, Request};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tls::{Folder, Identity, Own, Role, TlsError, Trust};

/// The server, to parts.
const SERVERS: &[Role] = &[Role::Msa];

/// Why a step was not taken. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The server.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The folder's files.
    #[error(transparent)]
    Files(#[from] TlsError),
    /// A key.
    #[error(transparent)]
    Key(#[from] NoKey),
    /// The answer lacks something.
    #[error("the management server's answer has no {0}")]
    Lacks(&'static str),
    /// The answer is about something else than what was asked for.
    #[error("the management server's answer does not fit: {0}")]
    Misfit(String),
}

/// Who a part is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identified {
    /// Role and id.
    pub identity: Identity,
    /// Until when, in seconds since 1970.
    pub until_s: i64,
}

/// Seconds since 1970.
pub fn now_s() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(now.unwrap_or_default().as_secs()).unwrap_or(i64::MAX)
}

/// Whether two thirds of a certificate's time are over.
pub fn is_renewal_due(from_s: i64, until_s: i64, now_s: i64) -> bool {
    now_s.saturating_sub(from_s) >= until_s.saturating_sub(from_s) / 3 * 2
}

fn client(folder: &Folder, server: &Server, own: Option<&Own>) -> Result<Client, EnrolError> {
    let authority = tls::files::certificates(&folder.authority())?;
    // Before the first list is there the server is believed without one: it issues the list.
    let list = folder.revocation_list();
    let list = list.exists().then(|| tls::files::revocation_list(&list));
    let trust = Trust::new(&authority, list.transpose()?)?;
    let config = tls::client_config(&tls::provider::ring(), own, &trust, SERVERS)?;
    Ok(Client::new(server.clone(), Arc::new(config)))
}

/// A client that shows the folder's certificate.
pub fn client_of(folder: &Folder, server: &Server) -> Result<Client, EnrolError> {
    client(folder, server, Some(&folder.files().own()?))
}

/// A client that shows no certificate, and trusts the authority in the folder.
pub fn client_without(folder: &Folder, server: &Server) -> Result<Client, EnrolError> {
    client(folder, server, None)
}

fn text<'a>(answer: &'a Value, field: &'static str) -> Result<&'a str, EnrolError> {
    let found = answer.get(field).and_then(Value::as_str);
    found.ok_or(EnrolError::Lacks(field))
}

/// Checks an answer with a certificate and writes it, with its key, into the folder.
fn keep(folder: &Folder, request: &Request, answer: &Value) -> Result<Identified, EnrolError> {
    let pem = text(answer, "certificate")?;
    let misfit = |why: String| EnrolError::Misfit(why);
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| misfit(format!("its certificate cannot be read ({error})")))?;
    let key = PrivateKeyDer::from_pem_slice(request.key_pem.as_bytes())
        .map_err(|error| misfit(format!("the key cannot be read ({error})")))?;
    let identity = Identity::of_certificate(&certificate).map_err(TlsError::Identity)?;
    let (_, until_s) = tls::validity_s(&certificate).map_err(TlsError::Identity)?;
    let own = Own {
        chain: vec![certificate],
        key,
    };
    // Fails if certificate and key do not belong together.
    let authority = tls::files::certificates(&folder.authority())?;
    let trust = Trust::new(&authority, None)?;
    tls::client_config(&tls::provider::ring(), Some(&own), &trust, SERVERS)?;
    let both = format!("{}{pem}", request.key_pem);
    folder.write(&folder.identity(), both.as_bytes())?;
    Ok(Identified { identity, until_s })
}

/// Gets the first certificate by a one-time token. The folder holds the authority's certificate
/// already: by it the server is known. Afterwards it holds the revocation list, too.
pub fn enrol(folder: &Folder, server: &Server, token: &str) -> Result<Identified, EnrolError> {
    let client = client_without(folder, server)?;
    let request = Request::make()?;
    // The list first: with a certificate and no list a part could not begin.
    fetch_list(folder, &client)?;
    let asked = json!({"token": token.trim(), "request": request.request_pem});
    let answer = client.call("POST", "/enrol", Some(&asked))?;
    keep(folder, &request, &answer)
}

/// Gets the next certificate by the present one, with a new key.
pub fn renew(folder: &Folder, server: &Server) -> Result<Identified, EnrolError> {
    let own = folder.files().own()?;
    let present = own.chain.first().ok_or(EnrolError::Lacks("certificate"))?;
    let present = Identity::of_certificate(present).map_err(TlsError::Identity)?;
    let client = client(folder, server, Some(&own))?;
    let request = Request::make()?;
    let asked = json!({"request": request.request_pem});
    let answer = client.call("POST", "/renew", Some(&asked))?;
    let named = text(&answer, "identity")?;
    if named != present.to_string() {
        let why = format!("it names {named}, and this is {present}");
        return Err(EnrolError::Misfit(why));
    }
    keep(folder, &request, &answer)
}

/// Fetches the revocation list; whether it is another than before.
pub fn fetch_list(folder: &Folder, client: &Client) -> Result<bool, EnrolError> {
    let path = folder.revocation_list();
    let list = client.send("GET", "/authority/revocation-list", None)?;
    if std::fs::read(&path).is_ok_and(|before| before == list) {
        return Ok(false);
    }
    tls::files::check_revocation_list(&list)
        .map_err(|why| EnrolError::Misfit(format!("its revocation list cannot be read ({why})")))?;
    folder.write(&path, &list)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn two_thirds_are_over_at_two_thirds() {
        let day = 86_400;
        assert!(!is_renewal_due(0, 90 * day, 60 * day - 1));
        assert!(is_renewal_due(0, 90 * day, 60 * day));
        assert!(is_renewal_due(0, 90 * day, 1000 * day));
        // A clock that is behind does not ask at once and for ever.
        assert!(!is_renewal_due(0, 90 * day, -5));
    }

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path().join("tls"));
        folder.make().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let authority = rcgen::CertificateParams::default()
            .self_signed(&key)
            .unwrap();
        folder
            .write(&folder.authority(), authority.pem().as_bytes())
            .unwrap();
        (dir, folder)
    }

    fn certificate_for(key_pem: &str, uris: &[&str]) -> String {
        let key = rcgen::KeyPair::from_pem(key_pem).unwrap();
        let mut params = rcgen::CertificateParams::default();
        for uri in uris {
            let name = rcgen::SanType::URI((*uri).try_into().unwrap());
            params.subject_alt_names.push(name);
        }
        params.self_signed(&key).unwrap().pem()
    }

    #[test]
    fn only_a_certificate_of_the_key_that_names_a_part_is_kept() {
        let (_dir, folder) = folder();
        let request = Request::make().unwrap();
        let other = Request::make().unwrap();
        let uri = "jetdr://host/00000000-0000-4000-8000-000000000007";
        for (key, uris) in [
            (&other, vec![uri]),
            (&request, vec![]),
            (&request, vec![uri, uri]),
        ] {
            let answer = json!({"certificate": certificate_for(&key.key_pem, &uris)});
            assert!(keep(&folder, &request, &answer).is_err(), "{uris:?}");
        }
        for answer in [
            json!({}),
            json!({"certificate": "x"}),
            json!({"certificate": 7}),
        ] {
            assert!(keep(&folder, &request, &answer).is_err(), "{answer}");
        }
        assert!(!folder.has_identity());
        let answer = json!({"certificate": certificate_for(&request.key_pem, &[uri])});
        let kept = keep(&folder, &request, &answer).unwrap();
        assert_eq!(kept.identity.to_string(), uri);
        let own = folder.files().own().unwrap();
        assert_eq!(own.chain.len(), 1);
    }
}
