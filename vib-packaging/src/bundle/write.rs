//! Makes a bundle; what is made is read again before it is given out.

use super::{
    Bundle, BundleBuilder, BundleError, INDEX, METADATA, PRODUCT, RESPONSE, VENDOR_INDEX, path_of,
    zipped,
};
use crate::digest::sha256;
use crate::limits::Limits;
use crate::signature::Trust;
use crate::vib::{Policy, Vib};
use crate::xml::Element;

impl BundleBuilder {
    /// Makes the bundle. What only needs force is in the report that comes with it.
    pub fn build(&self) -> Result<Bundle, BundleError> {
        // A date that is none is a finding below.
        let time = self
            .release_date
            .parse()
            .unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let vendor_index = self.vendor_index().document(true).into_bytes();
        let bulletin = self.bulletin();
        let response = Element::new("metadataResponse").holding([
            Element::text("version", "3.0"),
            Element::text("timestamp", self.release_date.as_str()),
            bulletin.clone(),
        ]);
        let mut metadata = vec![
            (RESPONSE.to_owned(), response.document(true).into_bytes()),
            (VENDOR_INDEX.to_owned(), vendor_index.clone()),
            (
                format!("bulletins/{}.xml", self.id()),
                bulletin.document(true).into_bytes(),
            ),
        ];
        metadata.extend(
            self.vibs
                .iter()
                .map(|vib| (copy_name(vib), copy(vib).document(true).into_bytes())),
        );
        let mut files = vec![
            (INDEX.to_owned(), self.index().document(true).into_bytes()),
            (VENDOR_INDEX.to_owned(), vendor_index),
            (METADATA.to_owned(), zipped::write(&metadata, time)?),
        ];
        files.extend(
            self.vibs
                .iter()
                .map(|vib| (relative_path(vib), vib.bytes().to_vec())),
        );
        let bytes = zipped::write(&files, time)?;
        let policy = Policy {
            trust: Trust::Unchecked,
            limits: Limits::default(),
        };
        let name = format!("{}.zip", self.id());
        Bundle::open(&name, bytes, &policy, true).map_err(BundleError::Rejected)
    }

    /// The bulletin's id: `<name>_<version>`.
    pub fn id(&self) -> String {
        format!("{}_{}", self.name, self.version)
    }

    fn index(&self) -> Element {
        let content = Element::new("content").holding([
            Element::text("name", "VMware ESXi"),
            Element::text("type", "http://www.vmware.com/depotmanagement/esx"),
        ]);
        let vendor = Element::new("vendor").holding([
            Element::text("name", self.vendor.as_str()),
            Element::text("code", self.vendor_code.as_str()),
            Element::text("indexfile", VENDOR_INDEX),
            Element::new("patchUrl"),
            Element::new("relativePath"),
            content,
        ]);
        Element::new("vendorList").holding([vendor])
    }

    fn vendor_index(&self) -> Element {
        let metadata = |version: &String| {
            Element::new("metadata").holding([
                Element::text("productId", PRODUCT),
                Element::text("version", version.as_str()),
                Element::new("locale"),
                Element::text("url", METADATA),
                Element::text(
                    "channelName",
                    format!("{} {}", self.title, version.trim_end_matches(".*")),
                ),
            ])
        };
        Element::new("metaList").holding(self.platforms.iter().map(metadata))
    }

    fn bulletin(&self) -> Element {
        let text = |name: &str, value: &str| Element::text(name, value);
        let platform = |version: &String| {
            Element::new("softwarePlatform")
                .with("version", version.as_str())
                .with("locale", "")
                .with("productLineID", PRODUCT)
        };
        Element::new("bulletin").holding([
            text("id", &self.id()),
            text("vendor", &self.vendor),
            text("summary", &self.summary),
            text("severity", "general"),
            text("category", "enhancement"),
            text("urgency", "important"),
            text("releaseType", "extension"),
            text("description", &self.description),
            text("kbUrl", &self.kb_url),
            text("contact", &self.contact),
            Element::new("componentNameSpec")
                .with("name", self.name.as_str())
                .with("uiString", self.title.as_str()),
            Element::new("componentVersionSpec")
                .with("version", self.version.as_str())
                .with("uiString", self.version.as_str()),
            text("releaseDate", &self.release_date),
            Element::new("platforms").holding(self.platforms.iter().map(platform)),
            Element::new("vibList").holding(self.vibs.iter().map(told)),
        ])
    }
}

fn relative_path(vib: &Vib) -> String {
    path_of(&vib.descriptor().name, &vib.descriptor().id())
}

fn copy_name(vib: &Vib) -> String {
    let digest = sha256(vib.bytes());
    let digits = u32::from_str_radix(digest.get(..8).unwrap_or_default(), 16).unwrap_or(0);
    format!("vibs/{}-{digits}.xml", vib.descriptor().name)
}

/// A package as `vmware.xml` tells of it.
fn told(vib: &Vib) -> Element {
    let descriptor = vib.descriptor();
    let (install, remove) = descriptor.system_requires.maintenance_mode;
    let mode = Element::text("maintenanceMode", (install || remove).to_string())
        .with("install", install.to_string())
        .with("remove", remove.to_string());
    let tags = descriptor
        .tags
        .iter()
        .map(|tag| Element::text("tag", tag.as_str()));
    let checksum = Element::new("checksum").holding([
        Element::text("checksumType", "sha-256"),
        Element::text("checksum", sha256(vib.bytes())),
    ]);
    Element::new("vib").holding([
        Element::text("vibVersion", "1.4.5"),
        Element::text("vibID", descriptor.id()),
        Element::text("name", descriptor.name.as_str()),
        Element::text("version", descriptor.version.as_str()),
        Element::text("vendor", descriptor.vendor.as_str()),
        Element::text("vibType", "bootbank"),
        Element::text("summary", descriptor.summary.as_str()),
        Element::new("systemReqs").holding([mode]),
        descriptor.relationships.element(),
        Element::new("postInstall").holding([
            Element::text("rebootRequired", "false"),
            Element::text("hostdRestart", "false"),
        ]),
        Element::new("softwareTags").holding(tags),
        Element::new("vibFile").holding([
            Element::new("sourceUrl"),
            Element::text("relativePath", relative_path(vib)),
            Element::text("packedSize", vib.bytes().len().to_string()),
            checksum,
        ]),
    ])
}

/// The descriptor as `vibs/` holds it.
fn copy(vib: &Vib) -> Element {
    let sum = Element::text("checksum", sha256(vib.bytes())).with("checksum-type", "sha-256");
    vib.descriptor().element().holding([
        Element::text("relative-path", relative_path(vib)),
        Element::text("packed-size", vib.bytes().len().to_string()),
        sum,
    ])
}
