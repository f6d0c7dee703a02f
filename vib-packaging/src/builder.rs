//! Makes packages. Whatever is made is looked at like a package from elsewhere before it is given out,
//! so there is one set of rules for both ways.
//!
//! Invariant: the same inputs give the same bytes: files go in by the order of their paths, times are
//! the release date, owners are root, and nothing of the machine gets in.

use crate::ar;
use crate::descriptor::{Checksum, Descriptor, PayloadInfo};
use crate::digest::{Digests, sha256};
use crate::finding::{Finding, Rejected, Report, Rule};
use crate::gzip;
use crate::limits::Limits;
use crate::payload::{self, File, Format, path_problem};
use crate::signature::{SignError, Signer, Trust};
use crate::vib::{DESCRIPTOR, Policy, SIGNATURE, Vib};

/// Why a package was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// It would break a rule that nothing gets past.
    #[error("{0}")]
    Rejected(Rejected),
    /// The signature.
    #[error(transparent)]
    Sign(#[from] SignError),
}

/// What a package is made from.
#[derive(Clone, Debug)]
pub struct Builder {
    /// What it says of itself; files and payloads are filled in.
    pub descriptor: Descriptor,
    /// What it installs, in any order.
    pub files: Vec<File>,
    /// The payload's name, at most 15 characters.
    pub payload: String,
    /// The payload's kind.
    pub format: Format,
    /// Limits that the package itself must keep.
    pub limits: Limits,
}

/// What cannot even be packed.
fn refuse_paths(name: &str, files: &[File]) -> Result<(), BuildError> {
    let mut report = Report::default();
    for file in files {
        if let Some(problem) = path_problem(&file.path) {
            let element = format!("file `{}`", file.path.escape_default());
            report.add(Finding::new(Rule::FileName, name, element, problem));
        }
    }
    let total: u64 = files.iter().map(|file| file.bytes.len() as u64).sum();
    if total > u64::from(u32::MAX) / 2 {
        report.add(Finding::new(
            Rule::UnpackedTooLarge,
            name,
            "",
            format!("its files have {total} bytes"),
        ));
    }
    let rejected = |report| {
        BuildError::Rejected(Rejected {
            report,
            force: true,
        })
    };
    report
        .into_result(true)
        .map(|_| ())
        .map_err(|error| rejected(error.report))
}

impl Builder {
    /// Makes the package. What only needs force is in its report.
    pub fn build(mut self, signer: Option<&Signer>) -> Result<Vib, BuildError> {
        let name = format!("{}.vib", self.descriptor.id());
        refuse_paths(&name, &self.files)?;
        self.files.sort_by(|a, b| a.path.cmp(&b.path));
        // A date that is none is a finding of the descriptor below.
        let released = self.descriptor.release_date.parse::<jiff::Timestamp>().ok();
        let mtime_s = released
            .and_then(|time| u64::try_from(time.as_second()).ok())
            .unwrap_or(0);
        let tar = payload::pack(self.format, &self.files, mtime_s);
        let stored = gzip::write(&tar);
        let mut digests = Digests::new();
        digests.update(&tar);
        let (sha1, sha256_unpacked) = digests.finish();
        let sum = |algorithm: &str, unpacked: bool, hex: String| Checksum {
            algorithm: algorithm.to_owned(),
            unpacked,
            hex,
        };
        self.descriptor.files = self.files.into_iter().map(|file| file.path).collect();
        self.descriptor.payloads = vec![PayloadInfo {
            name: self.payload.clone(),
            kind: self.format.name().to_owned(),
            size_bytes: stored.len() as u64,
            checksums: vec![
                sum("sha-256", false, sha256(&stored)),
                sum("sha-256", true, sha256_unpacked),
                sum("sha-1", true, sha1),
            ],
        }];
        let document = self.descriptor.document();
        if !ar::name_is_good(&self.payload) {
            let mut report = Report::default();
            let problem = format!("`{}` will not do", self.payload.escape_default());
            report.add(Finding::new(Rule::PayloadName, &name, "payload", problem));
            return Err(BuildError::Rejected(Rejected {
                report,
                force: true,
            }));
        }
        put_together(
            &name,
            document.as_bytes(),
            (&self.payload, &stored),
            signer,
            self.limits,
        )
    }
}

fn put_together(
    name: &str,
    document: &[u8],
    payload: (&str, &[u8]),
    signer: Option<&Signer>,
    limits: Limits,
) -> Result<Vib, BuildError> {
    let signature = signer
        .map(|signer| signer.sign(document))
        .transpose()?
        .unwrap_or_default();
    let bytes = ar::write(&[(DESCRIPTOR, document), (SIGNATURE, &signature), payload]);
    opened(name, bytes, limits)
}

fn opened(name: &str, bytes: Vec<u8>, limits: Limits) -> Result<Vib, BuildError> {
    let policy = Policy {
        trust: Trust::Unchecked,
        limits,
    };
    Vib::open(name, bytes, &policy, true).map_err(BuildError::Rejected)
}

/// The same package with another signature. Only the signature differs.
pub fn sign(name: &str, vib: &Vib, signer: &Signer) -> Result<Vib, BuildError> {
    let signature = signer.sign(vib.document())?;
    let mut members: Vec<(&str, &[u8])> =
        vec![(DESCRIPTOR, vib.document()), (SIGNATURE, &signature)];
    for (member, _) in vib
        .members()
        .filter(|(member, _)| !matches!(*member, DESCRIPTOR | SIGNATURE))
    {
        members.push((member, vib.content(member).unwrap_or_default()));
    }
    opened(name, ar::write(&members), Limits::default())
}
