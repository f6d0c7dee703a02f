//! What can be wrong with a package: the rules, how grave each is, and the findings of a look at one.
//!
//! Invariant: every rule that is checked anywhere is in the table of this file, with what to do about
//! it; `tests/rules.rs` breaks each of them once.

use std::fmt;

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// A host takes it as it is; it is not how such packages are made.
    Advice,
    /// A host takes it only when it is told to look neither at signatures nor at acceptance levels.
    NeedsForce,
    /// Nothing gets it past a check.
    Refused,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Advice => "advice",
            Severity::NeedsForce => "needs force",
            Severity::Refused => "refused",
        })
    }
}

macro_rules! rules {
    ($($variant:ident, $name:literal, $severity:ident, $remedy:literal;)*) => {
        /// A rule that a package may break.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs, reason = "the table below says each in words")]
        pub enum Rule { $($variant,)* }

        impl Rule {
            /// Every rule.
            pub const ALL: &[Rule] = &[$(Rule::$variant,)*];

            /// Its lasting name, as it stands behind each finding.
            pub fn name(self) -> &'static str {
                match self { $(Rule::$variant => $name,)* }
            }

            /// How grave it is to break it.
            pub fn severity(self) -> Severity {
                match self { $(Rule::$variant => Severity::$severity,)* }
            }

            /// What to do about it.
            pub fn remedy(self) -> &'static str {
                match self { $(Rule::$variant => $remedy,)* }
            }
        }
    };
}

rules! {
    // The container.
    ArMagic, "ar-magic", Refused, "this is no VIB: fetch or build it again";
    ArHeader, "ar-header", Refused, "the file is damaged: fetch or build it again";
    ArLength, "ar-length", Refused, "the file is cut off or damaged: fetch or build it again";
    ArTrailing, "ar-trailing", Refused, "the file is damaged or was added to: fetch or build it again";
    ArName, "ar-name", Refused, "give each member a name of its own, of 1 to 15 letters, digits, `.`, `_` or `-`";
    ArOrder, "ar-order", Refused, "put descriptor.xml first, sig.pkcs7 second, the payloads after them";
    ArFields, "ar-fields", Advice, "write names without `/`, and zero as time, owner, group and mode";
    TooLarge, "too-large", Refused, "a package for a host is smaller than that; if it must be so large, raise the limit";
    // The descriptor, as XML.
    XmlSyntax, "xml-syntax", Refused, "correct the XML";
    VibVersion, "vib-version", Refused, "write <vib version=\"5.0\">";
    ElementMissing, "element-missing", Refused, "add the element";
    ElementTwice, "element-twice", Refused, "keep one of them";
    ElementUnknown, "element-unknown", Advice, "leave it out, or check its name";
    ElementUsual, "element-usual", Advice, "every package has it: add it";
    ElementOrder, "element-order", Advice, "put the elements in the usual order";
    // The descriptor's values.
    Type, "type", Refused, "write `bootbank`";
    Name, "name", Refused, "use 1 to 35 of 0-9, A-Z, a-z, `_`, `.`, `-`";
    Version, "version", Refused, "write <version>-<release>, at most 35 characters, each part beginning with a digit";
    Summary, "summary", Refused, "write one line of 1 to 80 characters";
    ReleaseDate, "release-date", Refused, "write an ISO date and time with offset, as 2026-01-31T12:00:00+00:00";
    UrlKey, "url-key", Refused, "give each address a key of 1 to 20 characters";
    Relation, "relation", Refused, "write constraint@name, and @version with @relation, one of << <= = >= >>";
    SystemRequires, "system-requires", Refused, "write true or false for maintenance mode, @vendor for hwplatform, and @productLineID embeddedEsx for softwarePlatform";
    Boolean, "boolean", Refused, "write true or false";
    Overlay, "overlay", Refused, "write false: a package may not cover files of another";
    AcceptanceLevel, "acceptance-level", Refused, "write one of certified, accepted, partner, community";
    FileName, "file-name", Refused, "name a file below the root: no leading `/`, no `.` or `..`, at most 99 printable ASCII characters, each file once";
    // Payloads, as the descriptor tells of them.
    PayloadName, "payload-name", Refused, "give each payload a name of its own, of 1 to 15 letters, digits, `.`, `_` or `-`";
    PayloadType, "payload-type", Refused, "write `tgz` or `vgz`: nothing else can be looked into here";
    PayloadMissing, "payload-missing", Refused, "add the member, or take the payload out of the descriptor";
    PayloadExtra, "payload-extra", Refused, "declare the payload in the descriptor, or take the member out";
    PayloadSize, "payload-size", Refused, "write the number of bytes of the member; a signed descriptor cannot be changed: fetch or build it again";
    ChecksumMissing, "checksum-missing", Refused, "add the SHA-256 of the payload as it is stored";
    ChecksumAge, "checksum-age", Advice, "add the checksums of the unpacked payload: SHA-1 for hosts before 8.0, SHA-256 from there on";
    ChecksumFormat, "checksum-format", Refused, "write checksum-type sha-256 (64 hex digits) or sha-1 (40), verify-process gunzip or none";
    ChecksumWrong, "checksum-wrong", Refused, "the payload is damaged or was changed: fetch or build it again";
    // Payloads, inside.
    Gzip, "gzip", Refused, "the payload is damaged: fetch or build it again";
    Bomb, "bomb", Refused, "no payload shrinks so well: do not install it";
    UnpackedTooLarge, "unpacked-too-large", Refused, "a host's memory is not made for that; if it must be so large, raise the limit";
    TooManyEntries, "too-many-entries", Refused, "pack fewer files; if there must be so many, raise the limit";
    TarHeader, "tar-header", Refused, "pack the payload again, as an ordinary ustar (tgz) or visor tar (vgz)";
    TarLength, "tar-length", Refused, "the payload is cut off, or its lengths lie: build it again";
    TarTrailing, "tar-trailing", Refused, "the payload was added to: build it again";
    EntryKind, "entry-kind", Refused, "pack regular files and folders only";
    EntryPath, "entry-path", Refused, "name entries below the root: no leading `/`, no `.` or `..`, at most 99 printable ASCII characters";
    EntryTwice, "entry-twice", Refused, "pack each path once, as a file or as a folder";
    EntryMode, "entry-mode", Refused, "take set-user-id, set-group-id and the right of everybody to write away";
    EntryModeUsual, "entry-mode-usual", Advice, "ship programs with 0555, data with 0444, kept configuration with the sticky bit";
    FileUnlisted, "file-unlisted", Refused, "name the file in file-list";
    FileAbsent, "file-absent", Refused, "pack the file, or take it out of file-list";
    Place, "place", NeedsForce, "put the file into a folder that its acceptance level allows, or raise the level and sign";
    // The signature.
    SignatureMissing, "signature-missing", NeedsForce, "sign it (`jetdr vib sign`), or make it acceptance level community";
    SignatureFormat, "signature-format", Refused, "sign it again: gzip of a PEM block PKCS7, one signer, SHA-256, the signer's certificate inside";
    SignatureWrong, "signature-wrong", Refused, "the descriptor was changed after it was signed: do not install it, fetch it again";
    SignatureChain, "signature-chain", NeedsForce, "sign with a key whose certificate leads to a trusted one, or trust its issuer (--ca)";
    SignatureTime, "signature-time", NeedsForce, "sign it again with a certificate that is in force";
    // Files for the host.
    Firewall, "firewall", Refused, "write ConfigRoot/service/{id, rule/{direction, protocol, porttype, port}, enabled, required}";
    InitScript, "init-script", Refused, "begin it with `#!`, add a line `# chkconfig: on <start> <stop>`, and make it executable";
    // The offline bundle.
    BundleZip, "bundle-zip", Refused, "the bundle is damaged: fetch or build it again";
    BundlePath, "bundle-path", Refused, "name entries below the bundle's root, each once, without `..`";
    BundleMissing, "bundle-missing", Refused, "add the file to the bundle: index.xml, vendor-index.xml, metadata.zip, and what they name";
    BundleIndex, "bundle-index", Refused, "correct index.xml or vendor-index.xml";
    BundleMetadata, "bundle-metadata", Refused, "correct metadata.zip: vmware.xml, bulletins/ and vibs/ tell of the same VIBs";
    BundleVib, "bundle-vib", Refused, "the metadata tells of another VIB than the bundle holds: build the bundle again";
    BundleComponent, "bundle-component", Advice, "give the bulletin a componentNameSpec and a componentVersionSpec: hosts from 7.0 on install components";
    BundleExtra, "bundle-extra", Advice, "leave out what the indexes do not name";
}

/// One thing that is wrong: which file, which element of it, what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The rule that is broken.
    pub rule: Rule,
    /// The file: a package, or `package: member`.
    pub file: String,
    /// The element, entry or field in it; may be empty.
    pub element: String,
    /// What is wrong with it.
    pub problem: String,
}

impl Finding {
    pub(crate) fn new(
        rule: Rule,
        file: &str,
        element: impl Into<String>,
        problem: impl Into<String>,
    ) -> Finding {
        Finding {
            rule,
            file: file.to_owned(),
            element: element.into(),
            problem: problem.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file)?;
        if !self.element.is_empty() {
            write!(f, "{}: ", self.element)?;
        }
        let (problem, remedy) = (&self.problem, self.rule.remedy());
        write!(f, "{problem}; {remedy} [{}]", self.rule.name())
    }
}

/// All findings of a look at a package, in the order of the package's bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What was found.
    pub findings: Vec<Finding>,
}

/// More than that nobody reads, and a hostile package could otherwise fill memory with them.
const MAX_FINDINGS: usize = 1000;

impl Report {
    pub(crate) fn add(&mut self, finding: Finding) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }

    /// The gravest severity, or none if nothing was found.
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|f| f.rule.severity()).max()
    }

    /// True if a host would take the package; `force`: one that was told to look neither at
    /// signatures nor at acceptance levels.
    pub fn accepted(&self, force: bool) -> bool {
        let worst = self.worst().unwrap_or(Severity::Advice);
        worst
            <= if force {
                Severity::NeedsForce
            } else {
                Severity::Advice
            }
    }

    /// `Ok` if a host would take the package, else all that stands in the way.
    pub fn into_result(self, force: bool) -> Result<Report, Rejected> {
        if self.accepted(force) {
            Ok(self)
        } else {
            Err(Rejected {
                report: self,
                force,
            })
        }
    }
}

/// A package that is not taken.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Rejected {
    /// All findings, also those that would have been let pass.
    pub report: Report,
    /// Whether it was looked at with force.
    pub force: bool,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = if self.force {
            Severity::NeedsForce
        } else {
            Severity::Advice
        };
        let grave = self
            .report
            .findings
            .iter()
            .filter(|found| found.rule.severity() > limit);
        for (index, finding) in grave.enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{finding}")?;
        }
        Ok(())
    }
}
