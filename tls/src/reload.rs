//! An end's certificate, key, authority and revocation list as files that change while it runs.
//!
//! Invariant: what is in force is always one whole, consistent set; a set that cannot be read or used
//! changes nothing, and says so; a certificate of another role than this end's is no set. Connections that stand are not touched here: their owner asks
//! `is_revoked` after each change and ends those whose peer was revoked.

use crate::config::{Own, Peers, Trust, client_config, server_config};
use crate::identity::{Identity, Role};
use crate::{TlsError, files};
use parking_lot::RwLock;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateRevocationListDer;
use rustls::{ClientConfig, ServerConfig};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use webpki::{CertRevocationList, OwnedCertRevocationList};

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

/// What is in force, with the end's configuration.
struct InForce<C> {
    config: Arc<C>,
    own: Identity,
    /// Parsed once: it is asked for each connection again and again.
    revoked: Option<CertRevocationList<'static>>,
}

impl<C> InForce<C> {
    fn is_revoked(&self, serial: &[u8]) -> bool {
        // A list that cannot be searched trusts nobody.
        self.revoked.as_ref().is_some_and(|list| {
            list.find_serial(serial)
                .map_or(true, |found| found.is_some())
        })
    }
}

fn parsed(
    files: &Files,
    list: &CertificateRevocationListDer<'_>,
) -> Result<CertRevocationList<'static>, TlsError> {
    let parsed = OwnedCertRevocationList::from_der(list);
    let parsed = parsed.map_err(|error| TlsError::Content {
        path: files.revocation_list.clone().unwrap_or_default(),
        what: "certificate revocation list in DER",
        why: error.to_string(),
    })?;
    Ok(parsed.into())
}

fn read<C>(
    files: &Files,
    role: Role,
    make: impl FnOnce(&Own, &Trust) -> Result<C, TlsError>,
) -> Result<InForce<C>, TlsError> {
    // Read once: what is asked of the list must be what handshakes are judged by.
    let list = files.revocation_list.as_deref();
    let revoked = list.map(files::revocation_list).transpose()?;
    let trust = Trust::new(&files::certificates(&files.authority)?, revoked.clone())?;
    let own = files.own()?;
    let config = Arc::new(make(&own, &trust)?);
    let own = own
        .chain
        .first()
        .ok_or(crate::IdentityError::Missing)
        .and_then(Identity::of_certificate)?;
    if own.role != role {
        return Err(TlsError::WrongRole { own, wanted: role });
    }
    let revoked = revoked.map(|list| parsed(files, &list)).transpose()?;
    Ok(InForce {
        config,
        own,
        revoked,
    })
}

/// What an accepting end takes its configuration from, connection by connection.
pub struct ServerTls {
    provider: Arc<CryptoProvider>,
    files: Files,
    role: Role,
    peers: Peers,
    in_force: RwLock<InForce<ServerConfig>>,
}

impl ServerTls {
    /// Reads the files; this end's certificate bears this role.
    pub fn load(
        provider: Arc<CryptoProvider>,
        files: Files,
        role: Role,
        peers: Peers,
    ) -> Result<Self, TlsError> {
        let read = read(&files, role, |own, trust| {
            server_config(&provider, own, trust, peers)
        })?;
        Ok(Self {
            provider,
            files,
            role,
            peers,
            in_force: RwLock::new(read),
        })
    }

    /// Reads them again. After an error the old set is still in force.
    pub fn reload(&self) -> Result<(), TlsError> {
        let fresh = read(&self.files, self.role, |own, trust| {
            server_config(&self.provider, own, trust, self.peers)
        })?;
        *self.in_force.write() = fresh;
        Ok(())
    }

    /// For the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.in_force.read().config.clone()
    }

    /// Who this end is.
    pub fn own(&self) -> Identity {
        self.in_force.read().own
    }

    /// Whether the list in force names this serial number, as [`crate::Peer::serial`] gives it.
    pub fn is_revoked(&self, serial: &[u8]) -> bool {
        self.in_force.read().is_revoked(serial)
    }
}

/// What a dialling end takes its configuration from, connection by connection.
pub struct ClientTls {
    provider: Arc<CryptoProvider>,
    files: Files,
    role: Role,
    servers: &'static [Role],
    in_force: RwLock<InForce<ClientConfig>>,
    version: AtomicU64,
}

impl ClientTls {
    /// Reads the files; this end's certificate bears `role`, and who is dialled one of `servers`.
    pub fn load(
        provider: Arc<CryptoProvider>,
        files: Files,
        role: Role,
        servers: &'static [Role],
    ) -> Result<Self, TlsError> {
        let read = read(&files, role, |own, trust| {
            client_config(&provider, Some(own), trust, servers)
        })?;
        Ok(Self {
            provider,
            files,
            role,
            servers,
            in_force: RwLock::new(read),
            version: AtomicU64::new(0),
        })
    }

    /// Reads them again. After an error the old set is still in force.
    pub fn reload(&self) -> Result<(), TlsError> {
        let fresh = read(&self.files, self.role, |own, trust| {
            client_config(&self.provider, Some(own), trust, self.servers)
        })?;
        *self.in_force.write() = fresh;
        self.version.fetch_add(1, Ordering::Release); // pairs with the load in `version`
        Ok(())
    }

    /// For the next connection: who this end is, and how it dials.
    pub fn config(&self) -> (Identity, Arc<ClientConfig>) {
        let in_force = self.in_force.read();
        (in_force.own, in_force.config.clone())
    }

    /// How often the files were read again: when it changes, ask [`Self::is_revoked`] again.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire) // pairs with the add in `reload`
    }

    /// Whether the list in force names this serial number, as [`crate::Peer::serial`] gives it.
    pub fn is_revoked(&self, serial: &[u8]) -> bool {
        self.in_force.read().is_revoked(serial)
    }
}
