//! VIBs and offline bundles: build, sign, list, verify, unpack.
//!
//! A VIB is the package that an ESXi host installs: an `ar` of a descriptor, a signature and payloads
//! (`docs/vib.md`). This crate makes them from files, byte for byte the same each time, and reads any:
//! also ones that were not made here, and ones that somebody made to do harm.
//!
//! Invariant: there is one set of rules ([`Rule`]). What is made is looked at by the same code as what
//! comes from elsewhere, and nothing of a package is handed out before all of it was looked at.
//!
//! ```
//! use vib_packaging::{Limits, Policy, Trust, Vib};
//! let policy = Policy { trust: Trust::Unchecked, limits: Limits::default() };
//! let (vib, report) = Vib::examine("note.vib", b"no package".to_vec(), &policy);
//! assert!(vib.is_none() && !report.accepted(true));
//! ```
#![warn(missing_docs)]

mod ar;
mod builder;
mod bundle;
pub mod component;
mod descriptor;
mod digest;
mod finding;
mod gzip;
mod host;
mod limits;
mod payload;
mod place;
mod signature;
mod vib;
mod xml;

pub use builder::{BuildError, Builder, sign};
pub use bundle::{Bundle, BundleBuilder, BundleError};
pub use descriptor::{
    Checksum, Constraint, Descriptor, PayloadInfo, Relationships, SystemRequires,
};
pub use digest::sha256;
pub use finding::{Finding, Rejected, Report, Rule, Severity};
pub use host::{Direction, FirewallRule, Ruleset};
pub use limits::Limits;
pub use payload::{Entry, EntryKind, File, Format, KEPT};
pub use place::AcceptanceLevel;
pub use signature::{Anchors, BadCertificates, SignError, Signer, Trust};
pub use vib::{Policy, UnpackError, Vib};
