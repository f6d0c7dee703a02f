//! Files that a host reads itself: firewall rulesets and init scripts.

use crate::descriptor::Scope;
use crate::finding::{Report, Rule};
use crate::payload::{Entry, EntryKind};
use crate::xml::{self, Element};
use std::io::{self, Read};

const FIREWALL: &str = "etc/vmware/firewall/";
const INIT: &str = "etc/init.d/";
/// No such file is as large; a larger one is not read.
const MAX_BYTES: u64 = 64 << 10;

/// Which way a connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the host.
    Inbound,
    /// From the host.
    Outbound,
}

/// One rule of a ruleset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirewallRule {
    /// Which way.
    pub direction: Direction,
    /// UDP instead of TCP.
    pub udp: bool,
    /// The ports are the other end's (`src`) instead of the listener's (`dst`).
    pub source_ports: bool,
    /// First and last port.
    pub ports: (u16, u16),
}

/// A ruleset, as a file below `etc/vmware/firewall/` holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// Its name.
    pub id: String,
    /// Its rules.
    pub rules: Vec<FirewallRule>,
    /// In force.
    pub enabled: bool,
    /// Cannot be switched off.
    pub required: bool,
}

impl Ruleset {
    /// The document that holds this ruleset alone.
    pub fn document(&self) -> String {
        let rules = self.rules.iter().enumerate().map(|(at, rule)| {
            let direction = match rule.direction {
                Direction::Inbound => "inbound",
                Direction::Outbound => "outbound",
            };
            let (first, last) = rule.ports;
            let port = if first == last {
                Element::text("port", first.to_string())
            } else {
                let ends = [("begin", first), ("end", last)];
                Element::new("port")
                    .holding(ends.map(|(name, port)| Element::text(name, port.to_string())))
            };
            Element::new("rule")
                .with("id", format!("{at:04}"))
                .holding([
                    Element::text("direction", direction),
                    Element::text("protocol", if rule.udp { "udp" } else { "tcp" }),
                    Element::text("porttype", if rule.source_ports { "src" } else { "dst" }),
                    port,
                ])
        });
        let service = Element::new("service")
            .with("id", "0000")
            .holding([Element::text("id", self.id.as_str())])
            .holding(rules)
            .holding([
                Element::text("enabled", self.enabled.to_string()),
                Element::text("required", self.required.to_string()),
            ]);
        Element::new("ConfigRoot")
            .holding([service])
            .document(false)
    }

    /// The rulesets of a file; what is wrong goes into `report`.
    pub fn parse(file: &str, bytes: &[u8], report: &mut Report) -> Vec<Ruleset> {
        let Some(root) = xml::parse(file, bytes, MAX_BYTES, Rule::Firewall, report) else {
            return Vec::new();
        };
        let mut scope = Scope { file, report };
        if root.name != "ConfigRoot" || root.child("service").is_none() {
            scope.find(Rule::Firewall, "", "it holds no ConfigRoot/service");
        }
        root.all("service")
            .enumerate()
            .map(|(at, service)| ruleset(&mut scope, service, at + 1))
            .collect()
    }
}

fn port(text: Option<&str>) -> Option<u16> {
    text?.trim().parse().ok().filter(|port| *port > 0)
}

fn ports(rule: &Element) -> Option<(u16, u16)> {
    let element = rule.child("port")?;
    let ports = match (element.child_text("begin"), element.child_text("end")) {
        (None, None) => {
            let only = port(Some(&element.text))?;
            (only, only)
        }
        (begin, end) => (port(begin)?, port(end)?),
    };
    (ports.0 <= ports.1).then_some(ports)
}

fn ruleset(scope: &mut Scope<'_>, service: &Element, number: usize) -> Ruleset {
    let place = |what: &str| format!("service[{number}]/{what}");
    let id = service.child_text("id").unwrap_or_default().to_owned();
    if id.is_empty() || service.attribute("id").is_none() {
        scope.find(Rule::Firewall, &place("id"), "the service has no id");
    }
    let mut flag = |name: &str| {
        let value = service.child_text(name).and_then(|text| text.parse().ok());
        if value.is_none() {
            scope.find(Rule::Firewall, &place(name), "it is neither true nor false");
        }
        value.unwrap_or(false)
    };
    let (enabled, required) = (flag("enabled"), flag("required"));
    let mut rules = Vec::new();
    for (at, rule) in service.all("rule").enumerate() {
        let place = place(&format!("rule[{}]", at + 1));
        let direction = match rule.child_text("direction") {
            Some("inbound") => Some(Direction::Inbound),
            Some("outbound") => Some(Direction::Outbound),
            _ => None,
        };
        let choice = |name: &str, no: &str, yes: &str| match rule.child_text(name) {
            Some(text) if text == no => Some(false),
            Some(text) if text == yes => Some(true),
            _ => None,
        };
        let (udp, source) = (
            choice("protocol", "tcp", "udp"),
            choice("porttype", "dst", "src"),
        );
        match (direction, udp, source, ports(rule)) {
            (Some(direction), Some(udp), Some(source_ports), Some(ports)) => {
                rules.push(FirewallRule {
                    direction,
                    udp,
                    source_ports,
                    ports,
                })
            }
            (direction, udp, source, _) => {
                let wrong = match (direction, udp, source) {
                    (None, ..) => "direction is neither inbound nor outbound",
                    (_, None, _) => "protocol is neither tcp nor udp",
                    (_, _, None) => "porttype is neither src nor dst",
                    _ => "port is neither a number from 1 to 65535 nor a range of them",
                };
                scope.find(Rule::Firewall, &place, wrong);
            }
        }
    }
    Ruleset {
        id,
        rules,
        enabled,
        required,
    }
}

/// Looks at an entry that the host reads itself; the bytes of others are left alone.
pub(crate) fn look_at(
    file: &str,
    entry: &Entry,
    body: &mut dyn Read,
    report: &mut Report,
) -> io::Result<()> {
    let rule = match entry.path.as_str() {
        path if path.starts_with(FIREWALL) && path.ends_with(".xml") => Rule::Firewall,
        path if path.starts_with(INIT) => Rule::InitScript,
        _ => return Ok(()),
    };
    if entry.kind != EntryKind::File {
        return Ok(());
    }
    let place = format!("{file}: {}", entry.path);
    let mut scope = Scope {
        file: &place,
        report,
    };
    if entry.len_bytes > MAX_BYTES {
        scope.find(
            rule,
            "",
            format!("it has {} bytes, over {MAX_BYTES}", entry.len_bytes),
        );
        return Ok(());
    }
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes)?;
    if rule == Rule::Firewall {
        Ruleset::parse(&place, &bytes, scope.report);
    } else {
        look_at_script(&mut scope, &bytes, entry.mode);
    }
    Ok(())
}

fn look_at_script(scope: &mut Scope<'_>, bytes: &[u8], mode: u32) {
    if !bytes.starts_with(b"#!") {
        scope.find(Rule::InitScript, "line 1", "it does not begin with `#!`");
    }
    let is_header = |line: &[u8]| {
        let words: Vec<&[u8]> = line
            .split(|b| *b == b' ')
            .filter(|word| !word.is_empty())
            .collect();
        matches!(words.as_slice(), [b"#", b"chkconfig:", b"on" | b"off", start, stop]
            if [start, stop].iter().all(|word| word.iter().all(u8::is_ascii_digit)))
    };
    if !bytes.split(|b| *b == b'\n').any(is_header) {
        scope.find(
            Rule::InitScript,
            "",
            "it has no line `# chkconfig: on <start> <stop>`",
        );
    }
    if mode & 0o111 == 0 {
        scope.find(
            Rule::InitScript,
            "",
            format!("with mode {mode:04o} it cannot be run"),
        );
    }
}
