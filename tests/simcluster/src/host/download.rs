//! How a host fetches a package.
//!
//! Invariant: what is handed on came whole, from a server that the host was told to believe, and is no
//! larger than a reader of packages takes.

use super::{Host, HostError};
use reqwest::blocking::Client;
use rustls::{ClientConfig, RootCertStore};
use std::io::Read;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use vcenter::VibTrust;
use vcenter::trust::Trust;
use vib_packaging::Limits;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const WHOLE_LIMIT: Duration = Duration::from_secs(60);

/// `authorities`: PEM, may be empty: then nobody is believed.
fn config(trust: &VibTrust, authorities: &[u8]) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let of = |error: rustls::Error| error.to_string();
    let believe_nobody = || {
        let builder = ClientConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().map_err(of)?;
        Ok(builder
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth())
    };
    let trust = match trust {
        VibTrust::HostAuthorities if authorities.trim_ascii().is_empty() => {
            return believe_nobody();
        }
        VibTrust::HostAuthorities => Trust::authorities_of(authorities),
        VibTrust::Pinned(pem) => Trust::pinned_to(pem.as_bytes()),
        VibTrust::Anybody => {
            let mut config = believe_nobody()?;
            let anybody = tls::config::Anybody::new(provider.clone());
            config.dangerous().set_certificate_verifier(anybody);
            return Ok(config);
        }
    };
    trust
        .and_then(|trust| trust.client_config())
        .map_err(|error| error.to_string())
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// Fetches a package, from an address of one's own.
pub fn fetch(
    url: &str,
    trust: &VibTrust,
    authorities: &[u8],
    from: Option<IpAddr>,
) -> Result<Vec<u8>, String> {
    let client = Client::builder()
        .tls_backend_preconfigured(config(trust, authorities)?)
        .no_proxy()
        .local_address(from)
        .connect_timeout(CONNECT_LIMIT)
        .timeout(WHOLE_LIMIT)
        .build()
        .map_err(|error| chain(&error))?;
    let answer = client.get(url).send().map_err(|error| chain(&error))?;
    if !answer.status().is_success() {
        return Err(format!("HTTP status {}", answer.status()));
    }
    let limit = Limits::default().vib_bytes;
    let mut bytes = Vec::new();
    let mut limited = answer.take(limit + 1);
    limited
        .read_to_end(&mut bytes)
        .map_err(|error| chain(&error))?;
    if bytes.len() as u64 > limit {
        return Err(format!("it has over {limit} bytes"));
    }
    Ok(bytes)
}

impl Host {
    pub(super) fn fetch(&self, url: &str, trust: &VibTrust) -> Result<Vec<u8>, HostError> {
        let authorities = std::fs::read(self.root().join("etc/vmware/ssl/castore.pem"));
        let from = Some(IpAddr::V4(self.address));
        fetch(url, trust, &authorities.unwrap_or_default(), from)
            .map_err(|why| HostError::UrlUnreachable(url.to_owned(), why))
    }
}
