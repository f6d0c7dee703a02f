//! Looks at a bundle: from the index to the metadata, from the metadata to the packages.

use super::{INDEX, METADATA, PRODUCT, RESPONSE, VENDOR_INDEX, path_of, zipped};
use crate::descriptor::{Scope, check_named};
use crate::digest::sha256;
use crate::finding::{Finding, Rejected, Report, Rule};
use crate::vib::{Policy, Vib};
use crate::xml::{self, Element};
use std::collections::{BTreeMap, BTreeSet};

type Files = BTreeMap<String, Vec<u8>>;

/// A bundle whose container could be read.
#[derive(Clone, Debug)]
pub struct Bundle {
    bytes: Vec<u8>,
    /// With the id that each bulletin has.
    bulletins: Vec<String>,
    vibs: Vec<Vib>,
    report: Report,
}

/// What is being looked at.
struct Look<'l> {
    name: &'l str,
    files: &'l Files,
    policy: &'l Policy<'l>,
    report: Report,
    used: BTreeSet<String>,
    bulletins: Vec<String>,
    vibs: Vec<Vib>,
}

impl Bundle {
    /// Looks at everything in a bundle; `name` stands in the findings. There is no [`Bundle`] if its
    /// container cannot be read; the report says why.
    pub fn examine(name: &str, bytes: Vec<u8>, policy: &Policy<'_>) -> (Option<Bundle>, Report) {
        let mut report = Report::default();
        let files = zipped::read(name, &bytes, &policy.limits, Rule::BundleZip, &mut report);
        let Some(files) = files else {
            return (None, report);
        };
        let mut look = Look {
            name,
            files: &files,
            policy,
            report,
            used: BTreeSet::new(),
            bulletins: Vec::new(),
            vibs: Vec::new(),
        };
        look.look_at_index();
        for path in files.keys().filter(|path| !look.used.contains(*path)) {
            let finding = Finding::new(Rule::BundleExtra, name, path.as_str(), "nothing names it");
            look.report.add(finding);
        }
        let report = look.report;
        let bundle = Bundle {
            bulletins: look.bulletins,
            vibs: look.vibs,
            report: report.clone(),
            bytes,
        };
        (Some(bundle), report)
    }

    /// The bundle, if a host would take it; see [`Vib::open`].
    pub fn open(
        name: &str,
        bytes: Vec<u8>,
        policy: &Policy<'_>,
        force: bool,
    ) -> Result<Bundle, Rejected> {
        let (bundle, report) = Bundle::examine(name, bytes, policy);
        let report = report.into_result(force)?;
        bundle.ok_or(Rejected { report, force })
    }

    /// The whole bundle.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Everything that was found when it was looked at.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The ids of its bulletins.
    pub fn bulletins(&self) -> &[String] {
        &self.bulletins
    }

    /// The packages that its metadata tells of.
    pub fn vibs(&self) -> &[Vib] {
        &self.vibs
    }
}

impl<'l> Look<'l> {
    fn find(&mut self, rule: Rule, file: &str, element: &str, problem: impl Into<String>) {
        let file = if file.is_empty() {
            self.name.to_owned()
        } else {
            format!("{}: {file}", self.name)
        };
        self.report.add(Finding::new(rule, &file, element, problem));
    }

    /// A file that something names.
    fn file(&mut self, path: &str, named_by: &str) -> Option<&'l [u8]> {
        let found = self.files.get(path);
        if found.is_none() {
            self.find(
                Rule::BundleMissing,
                "",
                path,
                format!("it is missing; {named_by} names it"),
            );
        }
        self.used.insert(path.to_owned());
        found.map(Vec::as_slice)
    }

    fn parse(&mut self, file: &str, bytes: &[u8], root: &str, rule: Rule) -> Option<Element> {
        let place = format!("{}: {file}", self.name);
        let limit = self.policy.limits.text_bytes;
        let element = xml::parse(&place, bytes, limit, Rule::XmlSyntax, &mut self.report)?;
        if element.name != root {
            self.find(
                rule,
                file,
                "",
                format!(
                    "the root is `{}`, not `{root}`",
                    element.name.escape_default()
                ),
            );
            return None;
        }
        Some(element)
    }

    fn look_at_index(&mut self) {
        let Some(bytes) = self.file(INDEX, "every bundle") else {
            return;
        };
        let Some(index) = self.parse(INDEX, bytes, "vendorList", Rule::BundleIndex) else {
            return;
        };
        if index.child("vendor").is_none() {
            self.find(Rule::BundleIndex, INDEX, "vendor", "it is missing");
        }
        for (at, vendor) in index.all("vendor").enumerate() {
            let place = format!("vendor[{}]", at + 1);
            let code = vendor.child_text("code").unwrap_or_default();
            if code.len() != 3 || !code.bytes().all(|b| b.is_ascii_alphanumeric()) {
                let problem = format!("`{}` is not three letters or digits", code.escape_default());
                self.find(Rule::BundleIndex, INDEX, &format!("{place}/code"), problem);
            }
            if vendor.child_text("name").is_none_or(str::is_empty) {
                self.find(
                    Rule::BundleIndex,
                    INDEX,
                    &format!("{place}/name"),
                    "it is missing",
                );
            }
            let file = vendor.child_text("indexfile").unwrap_or(VENDOR_INDEX);
            self.look_at_vendor_index(file, code);
        }
    }

    fn look_at_vendor_index(&mut self, file: &str, code: &str) {
        let Some(bytes) = self.file(file, INDEX) else {
            return;
        };
        let Some(list) = self.parse(file, bytes, "metaList", Rule::BundleIndex) else {
            return;
        };
        if list.child("metadata").is_none() {
            self.find(Rule::BundleIndex, file, "metadata", "it is missing");
        }
        let mut urls = BTreeSet::new();
        for (at, metadata) in list.all("metadata").enumerate() {
            let place = |what: &str| format!("metadata[{}]/{what}", at + 1);
            if metadata.child_text("productId") != Some(PRODUCT) {
                self.find(
                    Rule::BundleIndex,
                    file,
                    &place("productId"),
                    format!("it is not {PRODUCT}"),
                );
            }
            if metadata.child_text("version").is_none_or(str::is_empty) {
                self.find(Rule::BundleIndex, file, &place("version"), "it is missing");
            }
            urls.insert(metadata.child_text("url").unwrap_or(METADATA).to_owned());
        }
        for url in urls {
            if let Some(bytes) = self.file(&url, file) {
                self.look_at_metadata(&url, bytes, code);
            }
        }
    }

    fn look_at_metadata(&mut self, file: &str, bytes: &[u8], code: &str) {
        let place = format!("{}: {file}", self.name);
        let limits = self.policy.limits;
        let Some(inside) = zipped::read(
            &place,
            bytes,
            &limits,
            Rule::BundleMetadata,
            &mut self.report,
        ) else {
            return;
        };
        let response = format!("{file}: {RESPONSE}");
        let Some(bytes) = inside.get(RESPONSE) else {
            self.find(Rule::BundleMetadata, file, RESPONSE, "it is missing");
            return;
        };
        let Some(root) = self.parse(&response, bytes, "metadataResponse", Rule::BundleMetadata)
        else {
            return;
        };
        if root.child_text("version") != Some("3.0") {
            self.find(Rule::BundleMetadata, &response, "version", "it is not 3.0");
        }
        if root.child("bulletin").is_none() {
            self.find(Rule::BundleMetadata, &response, "bulletin", "it is missing");
        }
        for bulletin in root.all("bulletin") {
            self.look_at_bulletin(&response, bulletin, code, &inside);
        }
    }

    fn look_at_bulletin(&mut self, file: &str, bulletin: &Element, code: &str, inside: &Files) {
        let id = bulletin.child_text("id").unwrap_or_default();
        let place = |what: &str| format!("bulletin `{}`/{what}", id.escape_default());
        if id.is_empty() || !id.starts_with(code) {
            self.find(
                Rule::BundleMetadata,
                file,
                &place("id"),
                format!("it does not begin with the vendor's code `{code}`"),
            );
        }
        for name in ["vendor", "summary", "releaseType", "releaseDate"] {
            if bulletin.child_text(name).is_none_or(str::is_empty) {
                self.find(Rule::BundleMetadata, file, &place(name), "it is missing");
            }
        }
        let here = format!("{}: {file}", self.name);
        let mut scope = Scope {
            file: &here,
            report: &mut self.report,
        };
        check_named(
            &mut scope,
            Rule::ReleaseDate,
            &place("releaseDate"),
            bulletin.child_text("releaseDate").unwrap_or_default(),
        );
        let platforms = bulletin
            .child("platforms")
            .and_then(|all| all.child("softwarePlatform"));
        if platforms.is_none_or(|platform| platform.attribute("productLineID") != Some(PRODUCT)) {
            self.find(
                Rule::BundleMetadata,
                file,
                &place("platforms"),
                format!("no softwarePlatform of {PRODUCT}"),
            );
        }
        for name in ["componentNameSpec", "componentVersionSpec"] {
            if bulletin.child(name).is_none() {
                self.find(Rule::BundleComponent, file, &place(name), "it is missing");
            }
        }
        let copy = format!("bulletins/{id}.xml");
        let same = inside
            .get(&copy)
            .and_then(|bytes| self.parse(&copy, bytes, "bulletin", Rule::BundleMetadata));
        if same.as_ref() != Some(bulletin) {
            self.find(
                Rule::BundleMetadata,
                file,
                &copy,
                "it is missing, or another bulletin than in vmware.xml",
            );
        }
        self.bulletins.push(id.to_owned());
        let vibs = bulletin.child("vibList");
        if vibs.is_none_or(|list| list.child("vib").is_none()) {
            self.find(
                Rule::BundleMetadata,
                file,
                &place("vibList"),
                "it names no package",
            );
        }
        for vib in vibs.into_iter().flat_map(|list| list.all("vib")) {
            self.look_at_vib(file, vib, inside);
        }
    }

    fn look_at_vib(&mut self, file: &str, told: &Element, inside: &Files) {
        let text = |name: &str| told.child_text(name).unwrap_or_default();
        let id = text("vibID");
        let place = format!("vib `{}`", id.escape_default());
        let in_file = |name: &str| {
            told.child("vibFile")
                .and_then(|file| file.child_text(name))
                .unwrap_or_default()
        };
        let path = in_file("relativePath");
        let Some(bytes) = self.file(path, file) else {
            return;
        };
        let sum = sha256(bytes);
        let checksum = told
            .child("vibFile")
            .and_then(|file| file.child("checksum"));
        let checksum = checksum
            .and_then(|checksum| checksum.child_text("checksum"))
            .unwrap_or_default();
        if in_file("packedSize") != bytes.len().to_string() || checksum.to_ascii_lowercase() != sum
        {
            let problem = format!(
                "{path} has {} bytes and the SHA-256 {sum}, and the metadata says otherwise",
                bytes.len()
            );
            self.find(Rule::BundleVib, file, &place, problem);
        }
        let name = format!("{}: {path}", self.name);
        let (vib, report) = Vib::examine(&name, bytes.to_vec(), self.policy);
        report
            .findings
            .into_iter()
            .for_each(|finding| self.report.add(finding));
        let Some(vib) = vib else {
            return;
        };
        let descriptor = vib.descriptor().clone();
        let is = [
            descriptor.id(),
            descriptor.name.clone(),
            descriptor.version.clone(),
            descriptor.vendor.clone(),
        ];
        if is != [id, text("name"), text("version"), text("vendor")]
            || path != path_of(&descriptor.name, &descriptor.id())
        {
            let problem = format!(
                "{path} holds {}, and the metadata says otherwise",
                descriptor.id()
            );
            self.find(Rule::BundleVib, file, &place, problem);
        }
        let prefix = format!("vibs/{}-", descriptor.name);
        let of_copy = |bytes: &Vec<u8>| {
            let limit = self.policy.limits.text_bytes;
            let root = xml::parse("", bytes, limit, Rule::XmlSyntax, &mut Report::default())?;
            let told = [
                root.child_text("version"),
                root.child_text("vendor"),
                root.child_text("relative-path"),
                root.child_text("checksum"),
            ];
            let is = [
                Some(descriptor.version.as_str()),
                Some(descriptor.vendor.as_str()),
                Some(path),
                Some(sum.as_str()),
            ];
            Some(told == is)
        };
        let copies = inside.iter().filter(|(name, _)| name.starts_with(&prefix));
        if !copies
            .map(|(_, bytes)| of_copy(bytes))
            .any(|same| same == Some(true))
        {
            self.find(
                Rule::BundleMetadata,
                file,
                &place,
                format!("no {prefix}*.xml tells of this very file"),
            );
        }
        self.vibs.push(vib);
    }
}
