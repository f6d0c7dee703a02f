//! What the rulesets in a root open.
//!
//! Invariant: a port is open while a ruleset in the root that is in force opens it; a ruleset that cannot
//! be read opens nothing. The rules in force are replaced as a whole, so no process sees half of them.

use super::Host;
use anyhow::Context;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use vib_packaging::{Direction, Report, Ruleset};

const FOLDER: &str = "etc/vmware/firewall";

/// The rulesets in a root, in the order of their files' names.
pub fn rulesets(root: &Path) -> Vec<Ruleset> {
    let entries = fs::read_dir(root.join(FOLDER));
    let entries = entries.into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| end == "xml"));
    paths.sort();
    let mut all = Vec::new();
    for path in paths {
        let name = path.display().to_string();
        let mut report = Report::default();
        let found = fs::read(&path).map(|bytes| Ruleset::parse(&name, &bytes, &mut report));
        match found {
            Ok(found) if report.findings.is_empty() => all.extend(found),
            Ok(_) => tracing::warn!("the ruleset is not taken: {:?}", report.findings),
            Err(error) => tracing::warn!("{name}: {error}"),
        }
    }
    all
}

/// Puts the rulesets of a root in force: `rules` is what its processes read.
pub fn refresh(root: &Path, rules: &Path) -> anyhow::Result<()> {
    let mut text = String::new();
    for ruleset in rulesets(root).iter().filter(|ruleset| ruleset.enabled) {
        // A port of the other end's choice says nothing about where a connection goes.
        for rule in ruleset.rules.iter().filter(|rule| !rule.source_ports) {
            let way = match rule.direction {
                Direction::Inbound => "in",
                Direction::Outbound => "out",
            };
            let protocol = if rule.udp { "udp" } else { "tcp" };
            writeln!(text, "{way} {protocol} {} {}", rule.ports.0, rule.ports.1)?;
        }
    }
    let new = rules.with_extension("new");
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, rules))
        .with_context(|| format!("cannot write {}", rules.display()))
}

impl Host {
    pub(super) fn rules_path(&self) -> PathBuf {
        self.folder.join("firewall.rules")
    }

    /// The rulesets in the root.
    pub fn rulesets(&self) -> Vec<Ruleset> {
        rulesets(&self.root())
    }

    /// Puts them in force.
    pub fn refresh_firewall(&self) -> anyhow::Result<()> {
        refresh(&self.root(), &self.rules_path())
    }
}
