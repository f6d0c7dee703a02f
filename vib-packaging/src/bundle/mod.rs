//! The offline bundle (depot): a zip with VIBs, an index, and metadata that tells of the VIBs once more.
//!
//! ```text
//! index.xml            vendors, and which index each has
//! vendor-index.xml     where the metadata for which hosts is
//! metadata.zip         vmware.xml, vendor-index.xml, bulletins/<id>.xml, vibs/<name>-<digits>.xml
//! vib20/<name>/<id>.vib
//! ```
//!
//! Invariant: a bundle is good only if everything that its metadata says of a VIB is so, and each VIB
//! is good by itself.

mod read;
mod write;
mod zipped;

pub use read::Bundle;

use crate::vib::Vib;

pub(crate) const INDEX: &str = "index.xml";
pub(crate) const VENDOR_INDEX: &str = "vendor-index.xml";
pub(crate) const METADATA: &str = "metadata.zip";
pub(crate) const RESPONSE: &str = "vmware.xml";
pub(crate) const PRODUCT: &str = "embeddedEsx";

/// Why a bundle was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// It would break a rule that nothing gets past.
    #[error("{0}")]
    Rejected(crate::Rejected),
    /// The container.
    #[error("cannot write the zip: {0}")]
    Zip(#[from] zip::result::ZipError),
}

/// What a bundle is made from: one component of one or more packages.
#[derive(Clone, Debug)]
pub struct BundleBuilder {
    /// The component's name for machines; begins with the vendor code.
    pub name: String,
    /// Its name for people.
    pub title: String,
    /// Its version, as that of a package.
    pub version: String,
    /// The vendor.
    pub vendor: String,
    /// Three letters or digits.
    pub vendor_code: String,
    /// One line.
    pub summary: String,
    /// Text.
    pub description: String,
    /// Where to read more.
    pub kb_url: String,
    /// Whom to ask.
    pub contact: String,
    /// ISO date and time with offset; all times in the bundle.
    pub release_date: String,
    /// Versions of hosts, as `7.*`.
    pub platforms: Vec<String>,
    /// The packages.
    pub vibs: Vec<Vib>,
}

/// Where a package lies in a bundle.
pub(crate) fn path_of(name: &str, id: &str) -> String {
    format!("vib20/{name}/{id}.vib")
}
