//! Who the parts are to each other: identities in certificates, TLS 1.3 both ways, revocation.
//!
//! Every part has a certificate of the management server's authority. What a certificate says of its
//! holder is its [`Identity`]; [`config`] makes the two ends of a connection from certificate, key and
//! what is trusted; [`files`] reads those, [`folder`] says where they lie; [`reload`] follows them as they
//! are renewed and revoked. [`explain`](mod@explain) says why a connection was refused, [`validity`] until
//! when a certificate is valid; [`pem`] writes it.
//!
//! Invariant: a connection stands only between two parts whose certificates were issued by the same
//! authority, are valid now, are not on its revocation list and bear a role that this end asked for.
//! No session is ever resumed: each connection is judged anew.

pub mod config;
pub mod explain;
pub mod files;
pub mod folder;
pub mod identity;
pub mod pem;
pub mod reload;
pub mod validity;

pub use config::{Own, Peer, Peers, Trust, client_config, peer_of, server_config};
pub use explain::explain;
pub use folder::Folder;
pub use identity::{Identity, IdentityError, Role};
pub use reload::{ClientTls, Files, ServerTls};
pub use validity::validity_s;

use std::path::PathBuf;

/// Where the primitives come from. Hosts take ring, which needs no build tools; appliances aws-lc-rs.
pub mod provider {
    #[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
    use std::sync::Arc;

    /// For hosts.
    #[cfg(feature = "ring")]
    pub fn ring() -> Arc<rustls::crypto::CryptoProvider> {
        Arc::new(rustls::crypto::ring::default_provider())
    }

    /// For appliances.
    #[cfg(feature = "aws-lc-rs")]
    pub fn aws_lc_rs() -> Arc<rustls::crypto::CryptoProvider> {
        Arc::new(rustls::crypto::aws_lc_rs::default_provider())
    }
}

/// What can be wrong with the material of a connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is longer than any that this reads.
    #[error("{} has {len_bytes} bytes: no {what} is longer than {max_bytes}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// What was expected in it.
        what: &'static str,
        /// Its length.
        len_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// A file holds something else.
    #[error("{} holds no {what}: {why}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was expected in it.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Others may read a private key.
    #[error("{} may be read by others (mode {mode:o}): chmod 600 it, and have a new certificate issued if anybody did", path.display())]
    KeyIsOpen {
        /// The key's file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// What is trusted cannot be used.
    #[error("the authority's certificate or revocation list cannot be used: {0}")]
    Trust(String),
    /// Certificate and key of this end cannot be used.
    #[error("this end's certificate and key cannot be used together: {0}")]
    Own(rustls::Error),
    /// It is no certificate of the authority.
    #[error("the authority did not issue this certificate: {0}")]
    NotIssued(rustls::Error),
    /// The certificate is another kind of part's.
    #[error("the certificate is {own}'s, and this is a {wanted}: enrol this one")]
    WrongRole {
        /// Whose it is.
        own: Identity,
        /// What this part is.
        wanted: Role,
    },
    /// A certificate does not say who its holder is.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}
