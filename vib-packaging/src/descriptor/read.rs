//! Takes a descriptor in: every value is checked, every finding says which element it is about.

use super::values::shown;
use super::{Checksum, Descriptor, ORDER, PayloadInfo, Scope, check_named};
use crate::ar;
use crate::finding::{Report, Rule};
use crate::payload::{Format, path_problem};
use crate::place::AcceptanceLevel;
use crate::xml::Element;
use std::collections::HashSet;

/// What the elements of a descriptor say; what is wrong goes into `report`.
pub(crate) fn read(file: &str, root: &Element, report: &mut Report) -> Descriptor {
    let mut scope = Scope { file, report };
    if root.name != "vib" || root.attribute("version") != Some("5.0") {
        let version = root.attribute("version").unwrap_or_default();
        scope.find(
            Rule::VibVersion,
            "",
            format!(
                "the root is `{}` of version {}",
                root.name.escape_default(),
                shown(version)
            ),
        );
    }
    scope.look_at_order(root);
    let kind = scope.needed(root, "type");
    if kind.as_deref().is_some_and(|kind| kind != "bootbank") {
        scope.find(
            Rule::Type,
            "type",
            format!("{} is no type", shown(&kind.unwrap_or_default())),
        );
    }
    let mut named = |name: &str, rule: Rule| {
        let value = scope.needed(root, name);
        if let Some(value) = &value {
            check_named(&mut scope, rule, name, value);
        }
        value.unwrap_or_default()
    };
    let (name, vendor) = (named("name", Rule::Name), named("vendor", Rule::Name));
    let version = named("version", Rule::Version);
    let summary = named("summary", Rule::Summary);
    let release_date = named("release-date", Rule::ReleaseDate);
    let description = scope.needed(root, "description").unwrap_or_default();
    let usual = Some(Rule::ElementUsual);
    let urls = scope.one(root, "urls", usual);
    let relationships = scope.one(root, "relationships", usual);
    let tags = scope.one(root, "software-tags", usual);
    let requires = scope.one(root, "system-requires", usual);
    let level = scope.needed(root, "acceptance-level");
    let acceptance_level = level.as_deref().and_then(AcceptanceLevel::parse);
    if let (Some(level), None) = (&level, acceptance_level) {
        scope.find(
            Rule::AcceptanceLevel,
            "acceptance-level",
            format!("{} is no level", shown(level)),
        );
    }
    if scope.boolean(root, "overlay", usual) == Some(true) {
        scope.find(Rule::Overlay, "overlay", "it says true");
    }
    let missing = Some(Rule::ElementMissing);
    Descriptor {
        name,
        version,
        vendor,
        summary,
        description,
        release_date,
        urls: urls.map(|urls| scope.urls(urls)).unwrap_or_default(),
        relationships: relationships
            .map(|all| scope.relationships(all))
            .unwrap_or_default(),
        tags: tags
            .iter()
            .flat_map(|tags| tags.all("tag"))
            .map(|tag| tag.text.trim().to_owned())
            .collect(),
        system_requires: requires
            .map(|all| scope.system_requires(all))
            .unwrap_or_default(),
        files: scope.files(root),
        // Whoever cannot say who vouches for it gets the strictest rules.
        acceptance_level: acceptance_level.unwrap_or(AcceptanceLevel::Community),
        live_install_allowed: scope
            .boolean(root, "live-install-allowed", missing)
            .unwrap_or(false),
        live_remove_allowed: scope
            .boolean(root, "live-remove-allowed", missing)
            .unwrap_or(false),
        cimom_restart: scope.boolean(root, "cimom-restart", usual).unwrap_or(false),
        stateless_ready: scope
            .boolean(root, "stateless-ready", usual)
            .unwrap_or(false),
        payloads: scope.payloads(root),
    }
}

impl Scope<'_> {
    fn needed(&mut self, root: &Element, name: &str) -> Option<String> {
        let found = self.one(root, name, Some(Rule::ElementMissing));
        found.map(|element| element.text.trim().to_owned())
    }

    fn look_at_order(&mut self, root: &Element) {
        let mut last = 0;
        for child in &root.children {
            match ORDER.iter().position(|name| *name == child.name) {
                None => self.find(
                    Rule::ElementUnknown,
                    &child.name,
                    "no package of version 5.0 has it",
                ),
                Some(at) if at < last => {
                    let before = ORDER.get(last).copied().unwrap_or_default();
                    self.find(
                        Rule::ElementOrder,
                        &child.name,
                        format!("it stands behind `{before}`"),
                    );
                }
                Some(at) => last = at,
            }
        }
    }

    fn files(&mut self, root: &Element) -> Vec<String> {
        let Some(list) = self.one(root, "file-list", Some(Rule::ElementMissing)) else {
            return Vec::new();
        };
        let mut seen = HashSet::new();
        let mut files = Vec::new();
        for (at, file) in list.all("file").enumerate() {
            let path = file.text.trim();
            let place = format!("file-list/file[{}]", at + 1);
            if let Some(problem) = path_problem(path) {
                self.find(
                    Rule::FileName,
                    &place,
                    format!("{}: {problem}", shown(path)),
                );
            } else if !seen.insert(path) {
                self.find(
                    Rule::FileName,
                    &place,
                    format!("{} is there twice", shown(path)),
                );
            }
            files.push(path.to_owned());
        }
        files
    }

    fn payloads(&mut self, root: &Element) -> Vec<PayloadInfo> {
        let Some(list) = self.one(root, "payloads", Some(Rule::ElementMissing)) else {
            return Vec::new();
        };
        let mut found: Vec<PayloadInfo> = Vec::new();
        for (at, payload) in list.all("payload").enumerate() {
            let place = format!("payloads/payload[{}]", at + 1);
            let name = payload.attribute("name").unwrap_or_default();
            let taken = found.iter().any(|other| other.name == name)
                || matches!(name, "descriptor.xml" | "sig.pkcs7");
            if !ar::name_is_good(name) || taken {
                self.find(
                    Rule::PayloadName,
                    &format!("{place}@name"),
                    format!("{} will not do", shown(name)),
                );
            }
            let kind = payload.attribute("type").unwrap_or_default();
            if Format::parse(kind).is_none() {
                self.find(
                    Rule::PayloadType,
                    &format!("{place}@type"),
                    format!("{} is unknown", shown(kind)),
                );
            }
            let size = payload.attribute("size").unwrap_or_default();
            let digits = !size.is_empty() && size.bytes().all(|b| b.is_ascii_digit());
            let size_bytes = if digits { size.parse().ok() } else { None };
            if size_bytes.is_none() {
                self.find(
                    Rule::PayloadSize,
                    &format!("{place}@size"),
                    format!("{} is no number", shown(size)),
                );
            }
            let sums = payload.all("checksum").enumerate();
            let checksums = sums
                .filter_map(|(n, sum)| self.checksum(sum, &format!("{place}/checksum[{}]", n + 1)))
                .collect();
            found.push(PayloadInfo {
                name: name.to_owned(),
                kind: kind.to_owned(),
                size_bytes: size_bytes.unwrap_or(0),
                checksums,
            });
            if let Some(info) = found.last() {
                self.look_at_checksums(info, &place);
            }
        }
        found
    }

    fn checksum(&mut self, sum: &Element, place: &str) -> Option<Checksum> {
        let algorithm = sum.attribute("checksum-type").unwrap_or_default();
        let process = sum.attribute("verify-process").unwrap_or_default();
        let hex = sum.text.trim().to_ascii_lowercase();
        let digits = match algorithm {
            "sha-256" => 64,
            "sha-1" => 40,
            _ => {
                self.find(
                    Rule::ChecksumFormat,
                    &format!("{place}@checksum-type"),
                    format!("{} is unknown", shown(algorithm)),
                );
                return None;
            }
        };
        if !matches!(process, "" | "gunzip") {
            self.find(
                Rule::ChecksumFormat,
                &format!("{place}@verify-process"),
                format!("{} is unknown", shown(process)),
            );
            return None;
        }
        if hex.len() != digits || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            self.find(
                Rule::ChecksumFormat,
                place,
                format!("{} is no {algorithm}", shown(&hex)),
            );
            return None;
        }
        Some(Checksum {
            algorithm: algorithm.to_owned(),
            unpacked: process == "gunzip",
            hex,
        })
    }

    fn look_at_checksums(&mut self, info: &PayloadInfo, place: &str) {
        let has = |algorithm: &str, unpacked: bool| {
            info.checksums
                .iter()
                .any(|sum| sum.algorithm == algorithm && sum.unpacked == unpacked)
        };
        if !has("sha-256", false) {
            self.find(
                Rule::ChecksumMissing,
                place,
                "it has no SHA-256 of its bytes as stored",
            );
        }
        if !has("sha-1", true) {
            self.find(
                Rule::ChecksumAge,
                place,
                "it has no SHA-1 of the unpacked payload",
            );
        }
        if !has("sha-256", true) {
            self.find(
                Rule::ChecksumAge,
                place,
                "it has no SHA-256 of the unpacked payload",
            );
        }
    }
}
