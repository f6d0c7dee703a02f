//! Enrolment, renewal, and what a part fetches with its certificate.
//!
//! Invariant: what is written into the folder was checked: the certificate belongs to the key that was
//! made for it, names one part, of a role that this is, and the authority that was trusted before issued it.
//! What is in force is replaced when all that replaces it is there.

use crate::http::{Client, HttpError, Server};
use crate::request::{NoKey, Request};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
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

/// The folder's revocation list; none, if there is none, or if it is not this authority's.
fn list_of(
    folder: &Folder,
    authority: &[CertificateDer<'static>],
) -> Result<Option<CertificateRevocationListDer<'static>>, TlsError> {
    let path = folder.revocation_list();
    if !path.exists() {
        return Ok(None);
    }
    let list = tls::files::revocation_list(&path)?;
    let is_ours = Trust::new(authority, None)?.issues(&list);
    Ok(is_ours.then_some(list))
}

fn client(folder: &Folder, server: &Server, own: Option<&Own>) -> Result<Client, EnrolError> {
    let authority = tls::files::certificates(&folder.authority())?;
    let list = list_of(folder, &authority)?;
    client_with(&authority, list, server, own)
}

/// Before the first list is there the server is believed without one: it issues the list.
fn client_with(
    authority: &[CertificateDer<'static>],
    list: Option<CertificateRevocationListDer<'static>>,
    server: &Server,
    own: Option<&Own>,
) -> Result<Client, EnrolError> {
    let trust = Trust::new(authority, list)?;
    let config = tls::client_config(&tls::provider::ring(), own, &trust, SERVERS)?;
    Ok(Client::new(server.clone(), Arc::new(config)))
}

/// A client that shows the folder's certificate.
pub fn client_of(folder: &Folder, server: &Server) -> Result<Client, EnrolError> {
    client(folder, server, Some(&folder.files().own()?))
}

fn text<'a>(answer: &'a Value, field: &'static str) -> Result<&'a str, EnrolError> {
    let found = answer.get(field).and_then(Value::as_str);
    found.ok_or(EnrolError::Lacks(field))
}

/// What a certificate must be to be kept.
struct Wanted<'a> {
    /// Who issued it.
    authority: &'a [CertificateDer<'static>],
    /// The roles that its holder may have.
    roles: &'a [Role],
}

/// Checks an answer with a certificate; gives what `identity.pem` is to hold, and whose it is.
fn check(
    request: &Request,
    answer: &Value,
    wanted: &Wanted<'_>,
) -> Result<(String, Identified), EnrolError> {
    let pem = text(answer, "certificate")?;
    let misfit = |why: String| EnrolError::Misfit(why);
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| misfit(format!("its certificate cannot be read ({error})")))?;
    let key = PrivateKeyDer::from_pem_slice(request.key_pem.as_bytes())
        .map_err(|error| misfit(format!("the key cannot be read ({error})")))?;
    let identity = Identity::of_certificate(&certificate).map_err(TlsError::Identity)?;
    if !wanted.roles.contains(&identity.role) {
        let roles: Vec<&str> = wanted.roles.iter().map(|role| role.name()).collect();
        let roles = roles.join(" or ");
        return Err(misfit(format!(
            "it names {identity}, and this is a {roles}: its token was made for another"
        )));
    }
    let (from_s, until_s) = tls::validity_s(&certificate).map_err(TlsError::Identity)?;
    let own = Own {
        chain: vec![certificate],
        key,
    };
    let trust = Trust::new(wanted.authority, None)?;
    let provider = tls::provider::ring();
    // A clock that is wrong here is no reason to throw the certificate away.
    let at_s = now_s().clamp(from_s, until_s.max(from_s));
    let at = UnixTime::since_unix_epoch(Duration::from_secs(at_s.try_into().unwrap_or(0)));
    trust.check_issued(&provider, &own.chain, at)?;
    // Fails if certificate and key do not belong together.
    tls::client_config(&provider, Some(&own), &trust, SERVERS)?;
    let identified = Identified { identity, until_s };
    Ok((format!("{}{pem}", request.key_pem), identified))
}

/// The key for which a certificate is asked. It lies in the folder until the certificate does: if this part
/// ends in between, the token does again with the same key, and with no other.
fn asked(folder: &Folder) -> Result<Request, EnrolError> {
    let path = folder.asked();
    if path.exists() {
        let kept = tls::files::private_key(&path)?;
        if let Ok(request) = Request::of_pkcs8(kept.secret_der()) {
            return Ok(request);
        }
    }
    let request = Request::make()?;
    folder.write(&path, request.key_pem.as_bytes())?;
    Ok(request)
}

/// Gets a certificate by a one-time token. `authority`: the authority's certificate in PEM, by which the
/// server is known; `None`: the folder's. Nothing that is in force is replaced before all of it is there;
/// afterwards the folder holds authority, list and certificate.
pub fn enrol(
    folder: &Folder,
    server: &Server,
    token: &str,
    authority: Option<&[u8]>,
    roles: &[Role],
) -> Result<Identified, EnrolError> {
    let trusted = match authority {
        Some(pem) => tls::files::certificates_of(pem, "the authority's certificate")?,
        None => tls::files::certificates(&folder.authority())?,
    };
    let known = list_of(folder, &trusted)?;
    // The list first: with a certificate and no list a part could not begin.
    let before = client_with(&trusted, known, server, None)?;
    let list = checked_list(&before, &trusted)?;
    let request = asked(folder)?;
    let asked = json!({"token": token.trim(), "request": request.request_pem});
    let client = client_with(&trusted, Some(list.clone().into()), server, None)?;
    let answer = client.call("POST", "/enrol", Some(&asked))?;
    let wanted = Wanted {
        authority: &trusted,
        roles,
    };
    let (both, identified) = check(&request, &answer, &wanted)?;
    if let Some(pem) = authority {
        folder.write(&folder.authority(), pem)?;
    }
    folder.write(&folder.revocation_list(), &list)?;
    folder.write(&folder.identity(), both.as_bytes())?;
    let _ = std::fs::remove_file(folder.asked()); // the key lies beside its certificate now
    Ok(identified)
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
    let wanted = Wanted {
        authority: &tls::files::certificates(&folder.authority())?,
        roles: &[present.role],
    };
    let (both, identified) = check(&request, &answer, &wanted)?;
    if identified.identity != present {
        let why = format!("it names {}, and this is {present}", identified.identity);
        return Err(EnrolError::Misfit(why));
    }
    folder.write(&folder.identity(), both.as_bytes())?;
    Ok(identified)
}

fn checked_list(
    client: &Client,
    authority: &[CertificateDer<'static>],
) -> Result<Vec<u8>, EnrolError> {
    let list = client.send("GET", "/authority/revocation-list", None)?;
    tls::files::check_revocation_list(&list)
        .map_err(|why| EnrolError::Misfit(format!("its revocation list cannot be read ({why})")))?;
    match Trust::new(authority, None)?.issues(&list) {
        true => Ok(list),
        // It would keep this part from speaking to anybody.
        false => Err(EnrolError::Misfit(
            "its revocation list is another authority's".into(),
        )),
    }
}

/// Fetches the revocation list; whether it is another than before. No certificate is shown: who has none
/// that is in force needs the list all the more.
pub fn fetch_list(folder: &Folder, server: &Server) -> Result<bool, EnrolError> {
    let authority = tls::files::certificates(&folder.authority())?;
    // One that is damaged is replaced.
    let known = list_of(folder, &authority).unwrap_or_else(|error| {
        tracing::warn!("{error}: it is fetched anew");
        None
    });
    let client = client_with(&authority, known, server, None)?;
    let list = checked_list(&client, &authority)?;
    let path = folder.revocation_list();
    if std::fs::read(&path).is_ok_and(|before| before == list) {
        return Ok(false);
    }
    folder.write(&path, &list)?;
    Ok(true)
}

/// Whether a part's certificate can be used, by what lies in its folder: it is there, its time is not over,
/// and the list does not name it.
pub fn is_in_force(folder: &Folder) -> bool {
    let judge = || -> Result<bool, TlsError> {
        let own = folder.files().own()?;
        let certificate = own.chain.first().ok_or(tls::IdentityError::Missing)?;
        let (_, until_s) = tls::validity_s(certificate)?;
        let list = tls::files::revocation_list(&folder.revocation_list())?;
        let serial = tls::identity::serial_of(certificate)?;
        Ok(until_s > now_s() && !tls::files::is_on_list(&list, &serial))
    };
    judge().unwrap_or(false)
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

    struct Issuer(
        rcgen::Issuer<'static, rcgen::KeyPair>,
        Vec<CertificateDer<'static>>,
    );

    impl Issuer {
        fn new() -> Self {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::default();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            let der = params.self_signed(&key).unwrap().der().clone();
            Self(rcgen::Issuer::new(params, key), vec![der])
        }

        /// An answer with a certificate for a key.
        fn answer(&self, key_pem: &str, uris: &[&str]) -> Value {
            let key = rcgen::KeyPair::from_pem(key_pem).unwrap();
            let mut params = rcgen::CertificateParams::default();
            for uri in uris {
                let name = rcgen::SanType::URI((*uri).try_into().unwrap());
                params.subject_alt_names.push(name);
            }
            let certificate = params.signed_by(&key, &self.0).unwrap();
            json!({"certificate": certificate.pem()})
        }
    }

    const URI: &str = "jetdr://host/00000000-0000-4000-8000-000000000007";

    #[test]
    fn only_a_certificate_of_this_key_authority_and_role_is_kept() {
        let (ours, other) = (Issuer::new(), Issuer::new());
        let (request, another) = (Request::make().unwrap(), Request::make().unwrap());
        let wanted = Wanted {
            authority: &ours.1,
            roles: &[Role::Host],
        };
        let refused = |answer: &Value| {
            let refused = check(&request, answer, &wanted).err();
            refused.unwrap().to_string()
        };
        refused(&ours.answer(&another.key_pem, &[URI]));
        refused(&ours.answer(&request.key_pem, &[]));
        refused(&ours.answer(&request.key_pem, &[URI, URI]));
        for answer in [
            json!({}),
            json!({"certificate": "x"}),
            json!({"certificate": 7}),
        ] {
            refused(&answer);
        }
        let said = refused(&other.answer(&request.key_pem, &[URI]));
        assert!(said.contains("did not issue"), "{said}");
        let drva = URI.replace("host", "drva");
        let said = refused(&ours.answer(&request.key_pem, &[&drva]));
        assert!(said.contains("this is a host"), "{said}");
        let answer = ours.answer(&request.key_pem, &[URI]);
        let (both, kept) = check(&request, &answer, &wanted).unwrap();
        assert_eq!(kept.identity.to_string(), URI);
        assert!(both.contains("PRIVATE KEY") && both.contains("CERTIFICATE"));
    }

    #[test]
    fn the_key_that_is_asked_for_is_the_same_until_its_certificate_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path());
        let first = asked(&folder).unwrap();
        assert_eq!(asked(&folder).unwrap().key_pem, first.key_pem);
        // One that is damaged is no reason to stop.
        folder
            .write(
                &folder.asked(),
                b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            )
            .unwrap();
        assert_ne!(asked(&folder).unwrap().key_pem, first.key_pem);
    }
}
