//! The accepting end's certificate, key, authority and revocation list as files that change while it runs.
//!
//! Invariant: what is in force is always one whole, consistent set; a set that cannot be read or used
//! changes nothing, and says so. Connections that stand are not touched here: their owner asks
//! [`ServerTls::is_revoked`] after each change and ends those whose peer was revoked.

use crate::config::{Own, Peers, Trust, server_config};
use crate::{TlsError, files};
use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateRevocationListDer;
use std::path::PathBuf;
use std::sync::Arc;
use webpki::BorrowedCertRevocationList;

/// Where the material lies.
#[derive(Clone, Debug)]
pub struct Files {
    /// The authority's certificate, PEM.
    pub authority: PathBuf,
    /// This end's certificate, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM, readable by the owner only.
    pub key: PathBuf,
    /// The revocation list, DER. A file that is named must be there.
    pub revocation_list: Option<PathBuf>,
}

impl Files {
    /// Certificate and key.
    pub fn own(&self) -> Result<Own, TlsError> {
        Ok(Own {
            chain: files::certificates(&self.certificate)?,
            key: files::private_key(&self.key)?,
        })
    }

    /// Authority and revocation list.
    pub fn trust(&self) -> Result<Trust, TlsError> {
        let list = self.revocation_list.as_deref().map(files::revocation_list);
        Trust::new(&files::certificates(&self.authority)?, list.transpose()?)
    }
}

struct InForce {
    config: Arc<ServerConfig>,
    revoked: Option<CertificateRevocationListDer<'static>>,
}

/// What an accepting end takes its configuration from, connection by connection.
pub struct ServerTls {
    provider: Arc<CryptoProvider>,
    files: Files,
    peers: Peers,
    in_force: RwLock<InForce>,
}

impl ServerTls {
    /// Reads the files.
    pub fn load(
        provider: Arc<CryptoProvider>,
        files: Files,
        peers: Peers,
    ) -> Result<Self, TlsError> {
        let in_force = RwLock::new(read(&provider, &files, peers)?);
        Ok(Self {
            provider,
            files,
            peers,
            in_force,
        })
    }

    /// Reads them again. After an error the old set is still in force.
    pub fn reload(&self) -> Result<(), TlsError> {
        let fresh = read(&self.provider, &self.files, self.peers)?;
        *self.in_force.write() = fresh;
        Ok(())
    }

    /// For the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.in_force.read().config.clone()
    }

    /// Whether the list in force names this serial number, as [`crate::Peer::serial`] gives it.
    pub fn is_revoked(&self, serial: &[u8]) -> bool {
        let in_force = self.in_force.read();
        let Some(list) = &in_force.revoked else {
            return false;
        };
        // It was parsed when it was read; a list that no longer parses trusts nobody.
        BorrowedCertRevocationList::from_der(list)
            .map(webpki::CertRevocationList::from)
            .and_then(|list| list.find_serial(serial).map(|found| found.is_some()))
            .unwrap_or(true)
    }
}

fn read(provider: &Arc<CryptoProvider>, files: &Files, peers: Peers) -> Result<InForce, TlsError> {
    // Read once: what is asked of the list must be what handshakes are judged by.
    let list = files.revocation_list.as_deref();
    let revoked = list.map(files::revocation_list).transpose()?;
    let trust = Trust::new(&files::certificates(&files.authority)?, revoked.clone())?;
    let config = Arc::new(server_config(provider, &files.own()?, &trust, peers)?);
    Ok(InForce { config, revoked })
}
