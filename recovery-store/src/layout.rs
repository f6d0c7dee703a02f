//! The names of a container's objects, and its two small JSON documents.
//!
//! Invariant: zero-padded numbers, so that the order of names is the order of time; a name parses to
//! exactly one part and prints back to itself.

use crate::error::{FormatError, StoreError};
use crate::format::Sha256Hash;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The `format` of `domain.json`.
pub const CONTAINER_FORMAT: &str = "jetdr-container";
/// The version that is written, and the newest that is read.
pub const CONTAINER_VERSION: u64 = 1;
/// Name of the container's identity.
pub(crate) const DOMAIN_OBJECT: &str = "domain.json";
/// The largest JSON document that is read.
pub(crate) const MAX_JSON_BYTES: u64 = 1 << 20;
/// The timeline that a new container starts with.
pub(crate) const FIRST_TIMELINE: u32 = 1;

/// Who a domain is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainInfo {
    /// The domain.
    pub uuid: Uuid,
    /// Its name, for people.
    pub name: String,
}

impl DomainInfo {
    /// A domain of this id and name.
    pub fn new(uuid: Uuid, name: impl Into<String>) -> Self {
        Self {
            uuid,
            name: name.into(),
        }
    }
}

/// `t/<timeline>/timeline.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineInfo {
    /// Its number, from 1.
    pub timeline: u32,
    /// The domain.
    pub domain: Uuid,
    /// The timeline and cut that it branched from; absent in the first.
    pub parent: Option<ParentCut>,
    /// Who created it, for people.
    pub owner: String,
    /// Fencing generation: a higher one takes over.
    pub generation: u64,
    /// When, ns since 1970.
    pub created_ns: u64,
}

/// Where a timeline branched off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentCut {
    /// The parent timeline.
    pub timeline: u32,
    /// The parent's cut.
    pub cut: u64,
}

#[derive(Serialize, Deserialize)]
struct DomainDocument {
    format: String,
    version: u64,
    domain: Uuid,
    #[serde(default)]
    name: String,
    #[serde(default)]
    created_ns: u64,
}

/// The bytes of `domain.json`.
pub(crate) fn encode_domain(domain: &DomainInfo, created_ns: u64) -> Result<Vec<u8>, FormatError> {
    to_json(&DomainDocument {
        format: CONTAINER_FORMAT.into(),
        version: CONTAINER_VERSION,
        domain: domain.uuid,
        name: domain.name.clone(),
        created_ns,
    })
}

pub(crate) fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>, FormatError> {
    let mut out =
        serde_json::to_vec_pretty(value).map_err(|error| FormatError::Json(error.to_string()))?;
    out.push(b'\n');
    Ok(out)
}

/// Reads `domain.json`; tells another format and a newer version from damage.
pub(crate) fn decode_domain(bytes: &[u8], location: &str) -> Result<DomainInfo, StoreError> {
    let other = |found: String| StoreError::OtherFormat {
        location: location.to_owned(),
        found,
    };
    let value: serde_json::Value = serde_json::from_slice(bytes)
        .map_err(|error| other(format!("{DOMAIN_OBJECT} is not JSON ({error})")))?;
    // Format and version first: the rest of a newer document may look different.
    match value.get("format").and_then(|format| format.as_str()) {
        Some(CONTAINER_FORMAT) => {}
        Some(format) => return Err(other(format!("`format` is {format:?}"))),
        None => return Err(other(format!("{DOMAIN_OBJECT} names no `format`"))),
    }
    match value.get("version").and_then(|version| version.as_u64()) {
        Some(CONTAINER_VERSION) => {}
        Some(found) if found > CONTAINER_VERSION => {
            return Err(StoreError::NewerVersion {
                location: location.to_owned(),
                found,
                supported: CONTAINER_VERSION,
            });
        }
        found => return Err(other(format!("`version` is {found:?}"))),
    }
    let document: DomainDocument = serde_json::from_value(value)
        .map_err(|error| StoreError::format(DOMAIN_OBJECT, FormatError::Json(error.to_string())))?;
    Ok(DomainInfo::new(document.domain, document.name))
}

/// The name of a timeline's document.
pub(crate) fn timeline_object(timeline: u32) -> String {
    format!("t/{timeline:010}/timeline.json")
}

/// The folder of a timeline's parts.
pub(crate) fn cuts_folder(timeline: u32) -> String {
    format!("t/{timeline:010}/cuts")
}

/// Which part an object is, by its name. Ordered as the chain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartName {
    /// The timeline, from 1.
    pub timeline: u32,
    /// The cut, from 1.
    pub cut: u64,
    /// The part of the cut, from 1.
    pub part: u32,
}

impl std::fmt::Display for PartName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let folder = cuts_folder(self.timeline);
        write!(f, "{folder}/{:020}-{:08}.jds", self.cut, self.part)
    }
}

impl PartName {
    /// Reads the last component of an object's name, such as `<20 digits>-<8 digits>.jds`.
    pub fn parse_file(timeline: u32, file: &str) -> Option<Self> {
        let (cut, part) = file.strip_suffix(".jds")?.split_once('-')?;
        let digits =
            |text: &str, len| text.len() == len && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(cut, 20) || !digits(part, 8) {
            return None;
        }
        let name = Self {
            timeline,
            cut: cut.parse().ok()?,
            part: part.parse().ok()?,
        };
        (name.cut > 0 && name.part > 0).then_some(name)
    }

    /// The part before this one, if it is in the same cut.
    pub(crate) fn before_in_cut(self) -> Option<Self> {
        (self.part > 1).then(|| Self {
            part: self.part - 1,
            ..self
        })
    }
}

/// A short form of a hash, for messages.
pub(crate) fn short(hash: &Sha256Hash) -> String {
    crate::codec::hex(hash.get(..8).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_as_numbers_and_parse_back() {
        let name = |cut, part| PartName {
            timeline: 1,
            cut,
            part,
        };
        let text = name(9, 2).to_string();
        assert_eq!(text, "t/0000000001/cuts/00000000000000000009-00000002.jds");
        assert!(text < name(10, 1).to_string());
        assert!(text < name(9, 10).to_string());
        let file = text.rsplit('/').next().expect("a file name");
        assert_eq!(PartName::parse_file(1, file), Some(name(9, 2)));
        for bad in [
            "9-2.jds",
            "00000000000000000000-00000001.jds",
            "00000000000000000001-00000000.jds",
            "00000000000000000001-00000001.jdx",
            "99999999999999999999-00000001.jds",
            "+0000000000000000001-00000001.jds",
        ] {
            assert_eq!(PartName::parse_file(1, bad), None, "{bad}");
        }
    }

    #[test]
    fn domain_documents_of_others_are_told_apart() {
        let domain = DomainInfo::new(Uuid::from_u128(7), "x");
        let bytes = encode_domain(&domain, 5).expect("encodes");
        assert_eq!(decode_domain(&bytes, "here").expect("decodes"), domain);
        let text = String::from_utf8(bytes).expect("is text");
        let newer = text.replace("\"version\": 1", "\"version\": 9");
        let error = decode_domain(newer.as_bytes(), "here").expect_err("newer");
        assert!(
            matches!(error, StoreError::NewerVersion { found: 9, .. }),
            "{error}"
        );
        let other = text.replace(CONTAINER_FORMAT, "something-else");
        let error = decode_domain(other.as_bytes(), "here").expect_err("other");
        assert!(matches!(error, StoreError::OtherFormat { .. }), "{error}");
        let error = decode_domain(b"\x89PNG", "here").expect_err("binary");
        assert!(matches!(error, StoreError::OtherFormat { .. }), "{error}");
    }

    #[test]
    fn no_bytes_make_the_document_reader_panic() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let _ = decode_domain(bytes, "fuzz");
            if let Ok(text) = std::str::from_utf8(bytes)
                && let Some(name) = PartName::parse_file(1, text)
            {
                assert!(name.to_string().ends_with(text));
            }
        });
    }
}
