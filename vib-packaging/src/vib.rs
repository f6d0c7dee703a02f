//! A package as a whole: everything in it is looked at before anything of it is handed out.
//!
//! Invariant: [`Vib::unpack`] hands out only what [`Vib::examine`] has checked, from the very bytes that
//! were checked, and nothing at all of a package that is not accepted.

use crate::ar::{self, Member};
use crate::descriptor::{self, Descriptor, PayloadInfo};
use crate::digest::{Digests, sha256};
use crate::finding::{Finding, Rejected, Report, Rule};
use crate::gzip;
use crate::host;
use crate::limits::Limits;
use crate::payload::{self, Entry, EntryKind, Format, Names, Walk};
use crate::place::AcceptanceLevel;
use crate::signature::{self, Trust};
use crate::xml;
use std::collections::HashSet;
use std::io::{self, Read};

pub(crate) const DESCRIPTOR: &str = "descriptor.xml";
pub(crate) const SIGNATURE: &str = "sig.pkcs7";

/// How a package is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'t> {
    /// Whose signatures count.
    pub trust: Trust<'t>,
    /// How much it may make its reader do.
    pub limits: Limits,
}

/// A package whose container and descriptor could be read.
#[derive(Clone, Debug)]
pub struct Vib {
    name: String,
    bytes: Vec<u8>,
    members: Vec<Member>,
    descriptor: Descriptor,
    entries: Vec<Entry>,
    signer: Option<String>,
    report: Report,
    limits: Limits,
}

/// Why a package was not unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// It is not accepted; nothing was handed out.
    #[error("{0}")]
    Rejected(Rejected),
    /// Whoever took the entries failed.
    #[error("cannot write {path}: {source}")]
    Sink {
        /// The entry.
        path: String,
        /// Its reason.
        source: io::Error,
    },
}

/// Computes checksums of what is read through it.
struct Tee<'a> {
    inner: gzip::Reader<'a>,
    digests: Digests,
}

impl Read for Tee<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(into)?;
        self.digests.update(into.get(..count).unwrap_or_default());
        Ok(count)
    }
}

impl Vib {
    /// Looks at everything in a package; `name` stands in the findings. There is no [`Vib`] if its
    /// container or its descriptor cannot be read; the report says why.
    pub fn examine(name: &str, bytes: Vec<u8>, policy: &Policy<'_>) -> (Option<Vib>, Report) {
        let mut report = Report::default();
        let limits = policy.limits;
        if bytes.len() as u64 > limits.vib_bytes {
            let problem = format!("it has {} bytes, over {}", bytes.len(), limits.vib_bytes);
            report.add(Finding::new(Rule::TooLarge, name, "", problem));
            return (None, report);
        }
        let Some(members) = ar::read(name, &bytes, limits.members, &mut report) else {
            return (None, report);
        };
        look_at_order(name, &members, &mut report);
        let content = |wanted: &str| {
            let member = members.iter().find(|member| member.name == wanted);
            member.and_then(|member| bytes.get(member.bytes.clone()))
        };
        let Some(document) = content(DESCRIPTOR) else {
            return (None, report);
        };
        let file = format!("{name}: {DESCRIPTOR}");
        let root = xml::parse(
            &file,
            document,
            limits.text_bytes,
            Rule::XmlSyntax,
            &mut report,
        );
        let Some(root) = root else {
            return (None, report);
        };
        let descriptor = descriptor::read(&file, &root, &mut report);
        let file = format!("{name}: {SIGNATURE}");
        let signer = match content(SIGNATURE).unwrap_or_default() {
            [] if descriptor.acceptance_level == AcceptanceLevel::Community => None,
            [] => {
                let problem = format!(
                    "it is empty, and the acceptance level is {}",
                    descriptor.acceptance_level
                );
                report.add(Finding::new(Rule::SignatureMissing, &file, "", problem));
                None
            }
            stored => {
                signature::check(&file, stored, document, &policy.trust, &limits, &mut report)
            }
        };
        let mut vib = Vib {
            name: name.to_owned(),
            members,
            descriptor,
            entries: Vec::new(),
            signer,
            report,
            limits,
            bytes,
        };
        vib.look_into_payloads();
        vib.look_at_files();
        let report = vib.report.clone();
        (Some(vib), report)
    }

    /// The package, if a host would take it; `force`: one that was told to look neither at signatures
    /// nor at acceptance levels.
    pub fn open(
        name: &str,
        bytes: Vec<u8>,
        policy: &Policy<'_>,
        force: bool,
    ) -> Result<Vib, Rejected> {
        let (vib, report) = Vib::examine(name, bytes, policy);
        let report = report.into_result(force)?;
        // Without a container or a descriptor there is a finding that nothing gets past.
        vib.ok_or(Rejected { report, force })
    }

    /// What it says of itself.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Everything that was found when it was looked at.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Who signed it, if the signature is intact.
    pub fn signer(&self) -> Option<&str> {
        self.signer.as_deref()
    }

    /// Its good entries, in the order of its payloads.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The whole package.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of `descriptor.xml`.
    pub fn document(&self) -> &[u8] {
        self.content(DESCRIPTOR).unwrap_or_default()
    }

    /// The members with their lengths in bytes, in order.
    pub fn members(&self) -> impl Iterator<Item = (&str, usize)> {
        self.members
            .iter()
            .map(|member| (member.name.as_str(), member.bytes.len()))
    }

    /// The stored bytes of a member.
    pub fn content(&self, name: &str) -> Option<&[u8]> {
        let member = self.members.iter().find(|member| member.name == name)?;
        self.bytes.get(member.bytes.clone())
    }

    /// Hands every entry to `sink`, folders before what is in them if the package lists them so. A
    /// file's bytes are read from the second argument; what is left unread is skipped.
    pub fn unpack(
        &self,
        force: bool,
        mut sink: impl FnMut(&Entry, &mut dyn Read) -> io::Result<()>,
    ) -> Result<(), UnpackError> {
        self.report
            .clone()
            .into_result(force)
            .map_err(UnpackError::Rejected)?;
        let mut failed = None;
        let (mut names, mut report) = (Names::default(), Report::default());
        let mut left_bytes = self.limits.unpacked_bytes;
        for info in &self.descriptor.payloads {
            let (Some(format), Some(stored)) =
                (Format::parse(&info.kind), self.content(&info.name))
            else {
                continue;
            };
            let mut stream = gzip::Reader::new(stored, left_bytes, &self.limits);
            let mut walk = Walk {
                file: format!("{}: {}", self.name, info.name),
                names: &mut names,
                report: &mut report,
                max_entries: self.limits.entries,
            };
            let mut visit = |entry: &Entry, body: &mut dyn Read| {
                sink(entry, body).map_err(|source| {
                    let stand_in = io::Error::from(source.kind());
                    failed = Some((entry.path.clone(), source));
                    stand_in
                })
            };
            let walked = payload::walk(format, &mut stream, &mut walk, &mut visit);
            if let Some((path, source)) = failed {
                return Err(UnpackError::Sink { path, source });
            }
            if let Err(broken) = walked {
                // It was read to its end before: memory does not change its mind.
                report.add(Finding::new(
                    broken.rule,
                    &self.name,
                    broken.element,
                    broken.problem,
                ));
                return Err(UnpackError::Rejected(Rejected { report, force }));
            }
            left_bytes = left_bytes.saturating_sub(stream.unpacked_bytes());
        }
        Ok(())
    }

    fn look_into_payloads(&mut self) {
        let declared: HashSet<&str> = self
            .descriptor
            .payloads
            .iter()
            .map(|info| info.name.as_str())
            .collect();
        for member in &self.members {
            if !matches!(member.name.as_str(), DESCRIPTOR | SIGNATURE)
                && !declared.contains(member.name.as_str())
            {
                let problem = "the descriptor does not tell of this member";
                self.report.add(Finding::new(
                    Rule::PayloadExtra,
                    &self.name,
                    member.name.as_str(),
                    problem,
                ));
            }
        }
        let mut names = Names::default();
        let mut left_bytes = self.limits.unpacked_bytes;
        for (at, info) in self.descriptor.payloads.clone().iter().enumerate() {
            let element = format!("payloads/payload[{}]", at + 1);
            let member = self
                .members
                .iter()
                .find(|member| member.name == info.name)
                .cloned();
            let Some(member) =
                member.filter(|member| !matches!(member.name.as_str(), DESCRIPTOR | SIGNATURE))
            else {
                let file = format!("{}: {DESCRIPTOR}", self.name);
                let problem = format!("there is no member `{}`", info.name.escape_default());
                self.report
                    .add(Finding::new(Rule::PayloadMissing, &file, element, problem));
                continue;
            };
            let used = self.look_into(info, &member, &element, &mut names, left_bytes);
            left_bytes = left_bytes.saturating_sub(used);
        }
        self.look_at_file_list(&names);
    }

    /// How many bytes it unpacked to.
    fn look_into(
        &mut self,
        info: &PayloadInfo,
        member: &Member,
        element: &str,
        names: &mut Names,
        left_bytes: u64,
    ) -> u64 {
        let stored = self.bytes.get(member.bytes.clone()).unwrap_or_default();
        let descriptor = format!("{}: {DESCRIPTOR}", self.name);
        let file = format!("{}: {}", self.name, info.name);
        let report = &mut self.report;
        if info.size_bytes != stored.len() as u64 {
            let problem = format!(
                "it says {}, and the member has {} bytes",
                info.size_bytes,
                stored.len()
            );
            report.add(Finding::new(
                Rule::PayloadSize,
                &descriptor,
                format!("{element}@size"),
                problem,
            ));
        }
        let compare = |algorithm: &str, unpacked: bool, is: &str, report: &mut Report| {
            let same = |sum: &&descriptor::Checksum| {
                sum.algorithm == algorithm && sum.unpacked == unpacked
            };
            for sum in info
                .checksums
                .iter()
                .filter(same)
                .filter(|sum| sum.hex != is)
            {
                let what = if unpacked { "unpacked " } else { "" };
                let problem = format!("the {what}payload's {algorithm} is {is}, not {}", sum.hex);
                report.add(Finding::new(
                    Rule::ChecksumWrong,
                    &descriptor,
                    format!("{element}/checksum"),
                    problem,
                ));
            }
        };
        compare("sha-256", false, &sha256(stored), report);
        let Some(format) = Format::parse(&info.kind) else {
            return 0; // the descriptor's finding says so
        };
        let mut tee = Tee {
            inner: gzip::Reader::new(stored, left_bytes, &self.limits),
            digests: Digests::new(),
        };
        let mut of_host = Report::default();
        let entries = &mut self.entries;
        let mut visit = |entry: &Entry, body: &mut dyn Read| {
            host::look_at(&file, entry, body, &mut of_host)?;
            entries.push(entry.clone());
            Ok(())
        };
        let mut walk = Walk {
            file: file.clone(),
            names,
            report,
            max_entries: self.limits.entries,
        };
        let walked = payload::walk(format, &mut tee, &mut walk, &mut visit);
        let used = tee.inner.unpacked_bytes();
        match walked {
            Ok(()) => {
                let (sha1, sha256) = tee.digests.finish();
                compare("sha-1", true, &sha1, report);
                compare("sha-256", true, &sha256, report);
            }
            Err(broken) => {
                let (rule, problem) = tee.inner.broken().unwrap_or((broken.rule, broken.problem));
                report.add(Finding::new(rule, &file, broken.element, problem));
            }
        }
        of_host
            .findings
            .into_iter()
            .for_each(|finding| report.add(finding));
        used
    }

    fn look_at_file_list(&mut self, names: &Names) {
        let listed: HashSet<&str> = self.descriptor.files.iter().map(String::as_str).collect();
        let packed: HashSet<&str> = names.files().collect();
        let file = format!("{}: {DESCRIPTOR}", self.name);
        let mut find = |rule: Rule, path: &str, problem: &str| {
            let problem = format!("`{}` {problem}", path.escape_default());
            self.report
                .add(Finding::new(rule, &file, "file-list", problem));
        };
        // In an order that does not change from run to run.
        let mut unlisted: Vec<&&str> = packed.difference(&listed).collect();
        unlisted.sort_unstable();
        for path in unlisted {
            find(
                Rule::FileUnlisted,
                path,
                "is in a payload and not in the list",
            );
        }
        let mut absent: Vec<&&str> = listed.difference(&packed).collect();
        absent.sort_unstable();
        for path in absent {
            find(Rule::FileAbsent, path, "is in the list and in no payload");
        }
    }

    fn look_at_files(&mut self) {
        let level = self.descriptor.acceptance_level;
        let wrong = self
            .entries
            .iter()
            .filter(|entry| entry.kind == EntryKind::File && !level.allows(&entry.path));
        for entry in wrong {
            let problem = format!("a package of level {level} may not put a file there");
            let element = format!("entry `{}`", entry.path);
            self.report
                .add(Finding::new(Rule::Place, &self.name, element, problem));
        }
    }
}

fn look_at_order(name: &str, members: &[Member], report: &mut Report) {
    for (at, wanted) in [DESCRIPTOR, SIGNATURE].into_iter().enumerate() {
        match members.iter().position(|member| member.name == wanted) {
            Some(is) if is == at => {}
            Some(is) => {
                let problem = format!("it is member {}, not {}", is + 1, at + 1);
                report.add(Finding::new(Rule::ArOrder, name, wanted, problem));
            }
            None => report.add(Finding::new(Rule::ArOrder, name, wanted, "it is missing")),
        }
    }
}
