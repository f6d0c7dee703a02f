//! The way to a real vCenter: the VI-JSON client of the crate `vcenter`, told whom to believe.
//!
//! Invariant: a server is believed by the fingerprint that was registered, or by an authority that this
//! machine trusts; never without either.

use crate::outside::{Connect, Place};
use crate::secret;
use crate::vcenter::trust::Trust;
use crate::vcenter::{Client, Fault, Login, Vcenter};
use std::sync::Arc;

/// Where this machine keeps the authorities that it trusts, unless `SSL_CERT_FILE` says so.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Speaks VI-JSON.
pub struct ViJson;

fn authorities() -> Result<Trust, String> {
    let path = std::env::var_os("SSL_CERT_FILE").unwrap_or_else(|| AUTHORITIES.into());
    let failed = |error: &dyn std::fmt::Display| {
        format!(
            "no authorities to believe a vCenter by ({}: {error}): register its certificate's fingerprint",
            path.display()
        )
    };
    let pem = std::fs::read(&path).map_err(|error| failed(&error))?;
    Trust::authorities_of(&pem).map_err(|error| failed(&error))
}

impl ViJson {
    /// The client for a vCenter; nothing is dialled yet.
    pub fn client(place: &Place) -> Result<Client, Fault> {
        let trust = match &place.fingerprint {
            Some(fingerprint) => {
                let bytes = secret::unhex(fingerprint.as_str()).unwrap_or_default();
                let bytes: Result<[u8; 32], _> = bytes.try_into();
                Trust::Fingerprint(
                    bytes.map_err(|_| Fault::Other("the fingerprint has no 32 bytes".into()))?,
                )
            }
            None => authorities().map_err(Fault::Other)?,
        };
        let host = match place.address.as_str() {
            address if address.contains(':') => format!("[{address}]"),
            address => address.to_owned(),
        };
        Client::new(Login {
            address: format!("{host}:{}", place.port),
            user: place.login.user.to_string(),
            password: place.login.password.expose().to_owned(),
            trust,
        })
    }
}

impl Connect for ViJson {
    fn connect(&self, place: &Place) -> Result<Arc<dyn Vcenter>, Fault> {
        Ok(Arc::new(Self::client(place)?))
    }
}
