//! `descriptor.xml`: what a package says of itself.
//!
//! [`read()`] takes a descriptor in and says which rules it breaks, [`write`](Descriptor::document) puts
//! one out; what is put out is read again before anybody gets it.

mod read;
mod values;

pub(crate) use read::read;
pub(crate) use values::{Scope, check_named};

use crate::place::AcceptanceLevel;
use crate::xml::Element;

/// How the elements of a descriptor follow each other.
pub(crate) const ORDER: [&str; 19] = [
    "type",
    "name",
    "version",
    "vendor",
    "summary",
    "description",
    "release-date",
    "urls",
    "relationships",
    "software-tags",
    "system-requires",
    "file-list",
    "acceptance-level",
    "live-install-allowed",
    "live-remove-allowed",
    "cimom-restart",
    "stateless-ready",
    "overlay",
    "payloads",
];

/// A relation to another package or to an interface of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constraint {
    /// The other's name.
    pub name: String,
    /// Relation (`<<`, `<=`, `=`, `>=`, `>>`) and version, if it is not about every version.
    pub version: Option<(String, String)>,
}

/// The relations of a package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relationships {
    /// What must be there.
    pub depends: Vec<Constraint>,
    /// What must not be there.
    pub conflicts: Vec<Constraint>,
    /// What it takes the place of.
    pub replaces: Vec<Constraint>,
    /// What it stands for: name and version.
    pub provides: Vec<(String, Option<String>)>,
    /// What it goes together with.
    pub compatible_with: Vec<Constraint>,
}

/// What a host must be for the package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SystemRequires {
    /// Whether it must be in maintenance mode: at installation, at removal.
    pub maintenance_mode: (bool, bool),
    /// Attributes of each `hwplatform`.
    pub hardware: Vec<Vec<(String, String)>>,
    /// Of each `softwarePlatform`: version, locale, product line.
    pub software: Vec<(String, String, String)>,
}

/// A checksum of a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// `sha-256` or `sha-1`.
    pub algorithm: String,
    /// Of the unpacked payload (`verify-process="gunzip"`) instead of the stored bytes.
    pub unpacked: bool,
    /// Lower-case hex digits.
    pub hex: String,
}

/// A payload as the descriptor tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadInfo {
    /// The member's name.
    pub name: String,
    /// `tgz`, `vgz`, or one that cannot be looked into here.
    pub kind: String,
    /// Bytes as stored.
    pub size_bytes: u64,
    /// Its checksums.
    pub checksums: Vec<Checksum>,
}

/// What a package says of itself. A descriptor that was read from a bad package holds what could be
/// told; the report says what could not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Name; the vendor is no part of it.
    pub name: String,
    /// `<version>-<release>`.
    pub version: String,
    /// Vendor.
    pub vendor: String,
    /// One line.
    pub summary: String,
    /// Text.
    pub description: String,
    /// ISO date and time with offset.
    pub release_date: String,
    /// Keys and addresses.
    pub urls: Vec<(String, String)>,
    /// Relations.
    pub relationships: Relationships,
    /// Tags.
    pub tags: Vec<String>,
    /// What a host must be.
    pub system_requires: SystemRequires,
    /// Every file that it installs, below the root.
    pub files: Vec<String>,
    /// Who vouches for it.
    pub acceptance_level: AcceptanceLevel,
    /// May be installed on a running host.
    pub live_install_allowed: bool,
    /// May be removed from a running host.
    pub live_remove_allowed: bool,
    /// The CIM broker is to be started anew.
    pub cimom_restart: bool,
    /// Works on a host without a disk of its own.
    pub stateless_ready: bool,
    /// Payloads, in the order of the members.
    pub payloads: Vec<PayloadInfo>,
}

impl Descriptor {
    /// `<vendor>_<type>_<name>_<version>`.
    pub fn id(&self) -> String {
        format!("{}_bootbank_{}_{}", self.vendor, self.name, self.version)
    }

    /// The descriptor as a document: the same for the same values.
    pub fn document(&self) -> String {
        self.element().document(false)
    }

    /// The descriptor as the metadata of a bundle wants it, with more at its end.
    pub(crate) fn element(&self) -> Element {
        let flag = |name: &str, value: bool| Element::text(name, value.to_string());
        let urls = self
            .urls
            .iter()
            .map(|(key, url)| Element::text("url", url.as_str()).with("key", key.as_str()));
        let tags = self
            .tags
            .iter()
            .map(|tag| Element::text("tag", tag.as_str()));
        let files = self
            .files
            .iter()
            .map(|path| Element::text("file", path.as_str()));
        Element::new("vib").with("version", "5.0").holding([
            Element::text("type", "bootbank"),
            Element::text("name", self.name.as_str()),
            Element::text("version", self.version.as_str()),
            Element::text("vendor", self.vendor.as_str()),
            Element::text("summary", self.summary.as_str()),
            Element::text("description", self.description.as_str()),
            Element::text("release-date", self.release_date.as_str()),
            Element::new("urls").holding(urls),
            self.relationships.element(),
            Element::new("software-tags").holding(tags),
            self.system_requires.element(),
            Element::new("file-list").holding(files),
            Element::text("acceptance-level", self.acceptance_level.name()),
            flag("live-install-allowed", self.live_install_allowed),
            flag("live-remove-allowed", self.live_remove_allowed),
            flag("cimom-restart", self.cimom_restart),
            flag("stateless-ready", self.stateless_ready),
            flag("overlay", false),
            Element::new("payloads").holding(self.payloads.iter().map(PayloadInfo::element)),
        ])
    }
}

impl Relationships {
    pub(crate) fn element(&self) -> Element {
        let constraints = |name: &str, list: &[Constraint]| {
            let one = |constraint: &Constraint| {
                let element = Element::new("constraint").with("name", constraint.name.as_str());
                match &constraint.version {
                    Some((relation, version)) => element
                        .with("relation", relation.as_str())
                        .with("version", version.as_str()),
                    None => element,
                }
            };
            Element::new(name).holding(list.iter().map(one))
        };
        let provides = self.provides.iter().map(|(name, version)| {
            let element = Element::new("provide").with("name", name.as_str());
            match version {
                Some(version) => element.with("version", version.as_str()),
                None => element,
            }
        });
        Element::new("relationships").holding([
            constraints("depends", &self.depends),
            constraints("conflicts", &self.conflicts),
            constraints("replaces", &self.replaces),
            Element::new("provides").holding(provides),
            constraints("compatibleWith", &self.compatible_with),
        ])
    }
}

impl SystemRequires {
    pub(crate) fn element(&self) -> Element {
        let (install, remove) = self.maintenance_mode;
        let mode = Element::text("maintenance-mode", (install || remove).to_string())
            .with("on-install", install.to_string())
            .with("on-remove", remove.to_string());
        let hardware = self.hardware.iter().map(|attributes| {
            let element = Element::new("hwplatform");
            let add = |element: Element, (name, value): &(String, String)| {
                element.with(name, value.as_str())
            };
            attributes.iter().fold(element, add)
        });
        let software = self.software.iter().map(|(version, locale, line)| {
            Element::new("softwarePlatform")
                .with("version", version.as_str())
                .with("locale", locale.as_str())
                .with("productLineID", line.as_str())
        });
        Element::new("system-requires")
            .holding([mode])
            .holding(hardware)
            .holding(software)
    }
}

impl PayloadInfo {
    fn element(&self) -> Element {
        let sums = self.checksums.iter().map(|sum| {
            let element = Element::text("checksum", sum.hex.as_str())
                .with("checksum-type", sum.algorithm.as_str());
            if sum.unpacked {
                element.with("verify-process", "gunzip")
            } else {
                element
            }
        });
        Element::new("payload")
            .with("name", self.name.as_str())
            .with("type", self.kind.as_str())
            .with("size", self.size_bytes.to_string())
            .holding(sums)
    }
}
