//! Who a certificate's holder is: a role and an id, in the certificate's subject alternative names.
//!
//! As a URI, `jetdr://host/<uuid>`, for who reads the certificate; and as a DNS name,
//! `<uuid>.host.jetdr.internal`, which a client asks for, so that the ordinary check of a server's name
//! is the check of its identity.
//!
//! Invariant: a certificate has exactly one identity. One with none, or with two, is refused.

use rustls::pki_types::{CertificateDer, ServerName};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;
use webpki::EndEntityCert;

const SCHEME: &str = "jetdr://";
/// Reserved for private use: it never resolves in the public DNS, and need not resolve at all.
const DOMAIN: &str = "jetdr.internal";

/// What a part is to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The management server.
    Msa,
    /// The daemon of a host.
    Host,
    /// A DR appliance.
    Drva,
    /// A person, or a program of theirs; the id is the user's.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 4] = [Role::Msa, Role::Host, Role::Drva, Role::Operator];

    /// As it stands in a certificate.
    pub fn name(self) -> &'static str {
        match self {
            Role::Msa => "msa",
            Role::Host => "host",
            Role::Drva => "drva",
            Role::Operator => "operator",
        }
    }

    /// Whether its holder may be dialled. Either end of the data path may dial, so that only operators
    /// are never servers.
    pub fn may_serve(self) -> bool {
        self != Role::Operator
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let found = Role::ALL.into_iter().find(|role| role.name() == text);
        found.ok_or_else(|| IdentityError::Role(shown(text)))
    }
}

/// Who a certificate's holder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// What it is.
    pub role: Role,
    /// Which of them.
    pub id: Uuid,
}

/// Why a certificate does not say who its holder is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It is no X.509 certificate.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// It has no identity.
    #[error("the certificate names no part: it has no URI jetdr://<role>/<uuid>")]
    Missing,
    /// It has more than one.
    #[error("the certificate names more than one part: {0} and {1}")]
    Several(Identity, Identity),
    /// Not of the form `jetdr://<role>/<uuid>`.
    #[error("`{0}` is not of the form jetdr://<role>/<uuid>")]
    Form(String),
    /// A role that there is not.
    #[error("there is no role `{0}`: it is msa, host, drva or operator")]
    Role(String),
    /// Not an id.
    #[error("`{0}` is no uuid in lower case with hyphens")]
    Id(String),
}

/// Part of a foreign text that may stand in an error: short, and with nothing that a terminal obeys.
fn shown(text: &str) -> String {
    text.chars()
        .take(80)
        .map(|c| if c.is_control() { '.' } else { c })
        .collect()
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.role, self.id.as_hyphenated())
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(shown(uri));
        let rest = uri.strip_prefix(SCHEME).ok_or_else(form)?;
        let (role, id) = rest.split_once('/').ok_or_else(form)?;
        let role = role.parse()?;
        let bad_id = || IdentityError::Id(shown(id));
        let parsed = Uuid::try_parse(id).map_err(|_| bad_id())?;
        // One spelling only: else two texts would be one identity.
        if parsed.as_hyphenated().to_string() != id {
            return Err(bad_id());
        }
        Ok(Identity { role, id: parsed })
    }
}

impl Identity {
    /// An identity.
    pub fn new(role: Role, id: Uuid) -> Self {
        Self { role, id }
    }

    /// The name by which a client asks for it.
    pub fn dns_name(&self) -> String {
        format!("{}.{}.{DOMAIN}", self.id.as_hyphenated(), self.role)
    }

    /// The same, for rustls.
    pub fn server_name(&self) -> Result<ServerName<'static>, IdentityError> {
        let name = self.dns_name();
        ServerName::try_from(name.clone()).map_err(|_| IdentityError::Form(name))
    }

    /// Reads it from a certificate. Whether that is to be believed is not looked at here.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let parsed = parse(certificate)?;
        let mut found: Option<Identity> = None;
        for uri in parsed.valid_uri_names() {
            if !uri.starts_with(SCHEME) {
                continue;
            }
            let identity: Identity = uri.parse()?;
            if let Some(other) = found {
                return Err(IdentityError::Several(other, identity));
            }
            found = Some(identity);
        }
        found.ok_or(IdentityError::Missing)
    }
}

/// A certificate's serial number: big-endian bytes as they stand in it.
pub fn serial_of(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, IdentityError> {
    Ok(parse(certificate)?.serial().to_vec())
}

fn parse<'a>(certificate: &'a CertificateDer<'a>) -> Result<EndEntityCert<'a>, IdentityError> {
    EndEntityCert::try_from(certificate)
        .map_err(|error| IdentityError::Unreadable(error.to_string()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn there_and_back() {
        let id = Uuid::from_u128(7);
        for role in Role::ALL {
            let identity = Identity::new(role, id);
            assert_eq!(identity.to_string().parse(), Ok(identity));
            assert!(identity.server_name().is_ok());
        }
        let host = Identity::new(Role::Host, id);
        let text = "00000000-0000-0000-0000-000000000007";
        assert_eq!(host.to_string(), format!("jetdr://host/{text}"));
        assert_eq!(host.dns_name(), format!("{text}.host.jetdr.internal"));
    }

    #[test]
    fn other_spellings_are_refused() {
        let id = "0000000a-0000-0000-0000-000000000007";
        assert!(format!("jetdr://host/{id}").parse::<Identity>().is_ok());
        for text in [
            format!("jetdr://host/{}", id.to_uppercase()),
            format!("jetdr://host/{}", id.replace('-', "")),
            format!("jetdr://host/{{{id}}}"),
            format!("jetdr://host/{id}/"),
            format!("jetdr://host//{id}"),
            format!("jetdr://Host/{id}"),
            format!("jetdr://root/{id}"),
            format!("http://host/{id}"),
            "jetdr://host".into(),
            "jetdr://host/".into(),
            String::new(),
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
    }
}
