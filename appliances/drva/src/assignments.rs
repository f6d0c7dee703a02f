//! Which hosts may speak for which virtual machines: the assignments.
//!
//! A machine is assigned to a domain, and belongs to a cluster. Every host of its cluster may speak for it,
//! since it may run on each of them at any moment; which of them has it now the attach epoch decides. The
//! domains are those of this appliance.
//!
//! Invariant: with assignments, who is not named may do nothing. They change as a whole, and what was
//! allowed before is asked again. They are kept, so that a start needs nobody else.

use anyhow::{Context, bail};
use filter_core::mapping::domain_name_is_valid;
use parking_lot::RwLock;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// The longest document that is read.
const MAX_BYTES: u64 = 16 << 20;

/// An id on the wire.
type Id = [u8; 16];

/// What a document says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assignments {
    /// Of each domain its machines, and of each the hosts that may speak for it.
    domains: BTreeMap<String, BTreeMap<Id, Arc<BTreeSet<Id>>>>,
    /// Machines of them whose protection is paused.
    paused: BTreeSet<Id>,
}

/// What is wrong with a document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {what}")]
pub struct Malformed {
    at: String,
    what: &'static str,
}

fn malformed(at: impl Into<String>, what: &'static str) -> Malformed {
    let at = at.into();
    Malformed { at, what }
}

fn text<'a>(value: &'a Value, at: &str, field: &'static str) -> Result<&'a str, Malformed> {
    let found = value.get(field).and_then(Value::as_str);
    found.ok_or_else(|| malformed(at, field).needs_text())
}

fn list<'a>(value: &'a Value, at: &str, field: &'static str) -> Result<&'a [Value], Malformed> {
    let found = value.get(field).and_then(Value::as_array);
    let found = found.ok_or_else(|| malformed(at, field).needs_list())?;
    Ok(found)
}

impl Malformed {
    fn needs_text(self) -> Self {
        malformed(
            format!("{}.{}", self.at, self.what),
            "a text is needed here",
        )
    }
    fn needs_list(self) -> Self {
        malformed(
            format!("{}.{}", self.at, self.what),
            "a list is needed here",
        )
    }
}

fn id(text: &str, at: &str) -> Result<Id, Malformed> {
    let parsed = Uuid::try_parse(text).map_err(|_| malformed(at, "a uuid is needed here"))?;
    Ok(parsed.into_bytes())
}

impl Assignments {
    /// Reads a document (docs/protocol.md).
    pub fn parse(document: &Value) -> Result<Self, Malformed> {
        let mut clusters = BTreeMap::new();
        for (number, cluster) in list(document, "document", "clusters")?.iter().enumerate() {
            let at = format!("clusters[{number}]");
            let mut hosts = BTreeSet::new();
            for host in list(cluster, &at, "hosts")? {
                let host = host.as_str().unwrap_or_default();
                hosts.insert(id(host, &format!("{at}.hosts"))?);
            }
            let cluster = id(text(cluster, &at, "id")?, &format!("{at}.id"))?;
            if clusters.insert(cluster, Arc::new(hosts)).is_some() {
                return Err(malformed(at, "this cluster is there twice"));
            }
        }
        let mut domains = BTreeMap::new();
        let (mut everywhere, mut paused) = (BTreeSet::new(), BTreeSet::new());
        for (number, domain) in list(document, "document", "domains")?.iter().enumerate() {
            let at = format!("domains[{number}]");
            let name = text(domain, &at, "name")?;
            if !domain_name_is_valid(name) {
                return Err(malformed(format!("{at}.name"), "this is no domain's name"));
            }
            let mut vms = BTreeMap::new();
            for vm in list(domain, &at, "vms")? {
                let at = format!("{at}.vms");
                let cluster = id(text(vm, &at, "cluster")?, &format!("{at}.cluster"))?;
                let hosts = clusters.get(&cluster).cloned();
                let hosts = hosts
                    .ok_or_else(|| malformed(at.clone(), "its cluster is not in the document"))?;
                let is_paused = match vm.get("paused") {
                    None => false,
                    Some(Value::Bool(is_paused)) => *is_paused,
                    Some(_) => {
                        return Err(malformed(
                            format!("{at}.paused"),
                            "true or false is needed here",
                        ));
                    }
                };
                let vm = id(text(vm, &at, "uuid")?, &format!("{at}.uuid"))?;
                if is_paused {
                    paused.insert(vm);
                }
                if !everywhere.insert(vm) {
                    return Err(malformed(at, "a machine is there twice"));
                }
                vms.insert(vm, hosts);
            }
            if domains.insert(name.to_owned(), vms).is_some() {
                return Err(malformed(at, "this domain is there twice"));
            }
        }
        Ok(Self { domains, paused })
    }

    /// Whether a host may speak for a machine in a domain; if not, why.
    fn judge(&self, host: &Id, domain: &str, vm: &Id) -> Result<(), String> {
        let of = |id: &Id| Uuid::from_bytes(*id);
        let Some(vms) = self.domains.get(domain) else {
            return Err(format!(
                "domain `{domain}` is not assigned to this appliance"
            ));
        };
        let Some(hosts) = vms.get(vm) else {
            let vm = of(vm);
            return Err(format!("VM {vm} is not assigned to domain `{domain}`"));
        };
        if hosts.contains(host) {
            return match self.paused.contains(vm) {
                false => Ok(()),
                true => Err(format!("the protection of VM {} is paused", of(vm))),
            };
        }
        let (host, vm) = (of(host), of(vm));
        Err(format!(
            "host {host} may not speak for VM {vm}: it is no host of its cluster"
        ))
    }

    fn takes(&self, domain: &str, vm: &Id) -> bool {
        let vms = self.domains.get(domain);
        vms.is_some_and(|vms| vms.contains_key(vm)) && !self.paused.contains(vm)
    }

    fn has_host(&self, host: &Id, domain: &str) -> bool {
        let vms = self.domains.get(domain).into_iter().flatten();
        vms.into_iter().any(|(_, hosts)| hosts.contains(host))
    }
}

/// What is in force.
#[derive(Clone, Debug)]
enum Rule {
    /// Every host may speak for every machine.
    Any,
    /// As the document says.
    As(Arc<Assignments>),
}

/// The assignments in force.
#[derive(Debug)]
pub struct InForce {
    rule: RwLock<Rule>,
    version: AtomicU64,
}

impl InForce {
    /// Every host may speak for every machine.
    pub fn any() -> Self {
        Self::new(Rule::Any)
    }

    /// Nobody may do anything, before assignments have come.
    pub fn none() -> Self {
        Self::new(Rule::As(Arc::default()))
    }

    fn new(rule: Rule) -> Self {
        let (rule, version) = (RwLock::new(rule), AtomicU64::new(0));
        Self { rule, version }
    }

    /// Others; whether that changes anything.
    pub fn set(&self, assignments: Assignments) -> bool {
        let mut rule = self.rule.write();
        if matches!(&*rule, Rule::As(known) if **known == assignments) {
            return false;
        }
        *rule = Rule::As(Arc::new(assignments));
        self.version.fetch_add(1, Ordering::Release); // pairs with the load in `version`
        true
    }

    /// Changes with the assignments: then what was allowed is to be asked again.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire) // pairs with the add in `set`
    }

    /// Whether a host may speak for a machine in a domain; if not, why.
    pub fn judge(&self, host: &Id, domain: &str, vm: &Id) -> Result<(), String> {
        match &*self.rule.read() {
            Rule::Any => Ok(()),
            Rule::As(assignments) => assignments.judge(host, domain, vm),
        }
    }

    /// Whether a machine is taken in a domain; not one that is paused, or not assigned.
    pub fn takes(&self, domain: &str, vm: &Id) -> bool {
        match &*self.rule.read() {
            Rule::Any => true,
            Rule::As(assignments) => assignments.takes(domain, vm),
        }
    }

    /// Whether a host may speak for any machine of a domain.
    pub fn has_host(&self, host: &Id, domain: &str) -> bool {
        match &*self.rule.read() {
            Rule::Any => true,
            Rule::As(assignments) => assignments.has_host(host, domain),
        }
    }
}

/// Reads a document from a file; `None`: there is no such file.
pub fn read(path: &Path) -> anyhow::Result<Option<Assignments>> {
    let what = || format!("assignments {}", path.display());
    let len_bytes = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        found => found.with_context(what)?.len(),
    };
    if len_bytes > MAX_BYTES {
        bail!("{}: {len_bytes} bytes are more than {MAX_BYTES}", what());
    }
    let bytes = std::fs::read(path).with_context(what)?;
    let document: Value = serde_json::from_slice(&bytes).with_context(what)?;
    Ok(Some(Assignments::parse(&document).with_context(what)?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn name(number: u128) -> String {
        Uuid::from_u128(number).to_string()
    }

    fn wire(number: u128) -> Id {
        number.to_be_bytes()
    }

    /// Two clusters: hosts 11 and 12 in the first, 21 in the second; VMs 101 in the first, 201 in the other.
    fn document() -> Value {
        json!({
            "clusters": [
                {"id": name(1), "hosts": [name(11), name(12)]},
                {"id": name(2), "hosts": [name(21)]},
            ],
            "domains": [
                {"name": "shop", "vms": [{"uuid": name(101), "cluster": name(1), "paused": false}]},
                {"name": "bank", "vms": [{"uuid": name(201), "cluster": name(2)}]},
                {"name": "empty", "vms": []},
            ],
        })
    }

    #[test]
    fn every_host_of_a_machines_cluster_may_speak_for_it_and_nobody_else() {
        let in_force = InForce::none();
        let refused = in_force.judge(&wire(11), "shop", &wire(101)).unwrap_err();
        assert!(
            refused.contains("is not assigned to this appliance"),
            "{refused}"
        );
        assert!(in_force.set(Assignments::parse(&document()).unwrap()));
        assert!(
            !in_force.set(Assignments::parse(&document()).unwrap()),
            "nothing new"
        );
        for host in [11, 12] {
            in_force.judge(&wire(host), "shop", &wire(101)).unwrap();
            assert!(in_force.has_host(&wire(host), "shop"));
            assert!(!in_force.has_host(&wire(host), "bank"));
        }
        for (host, domain, vm, why) in [
            (21, "shop", 101, "no host of its cluster"),
            (99, "shop", 101, "no host of its cluster"),
            (21, "shop", 201, "is not assigned to domain"),
            (11, "bank", 101, "is not assigned to domain"),
            (11, "empty", 101, "is not assigned to domain"),
            (11, "other", 101, "is not assigned to this appliance"),
        ] {
            let refused = in_force.judge(&wire(host), domain, &wire(vm)).unwrap_err();
            assert!(refused.contains(why), "{host} {domain} {vm}: {refused}");
        }
        // Nobody speaks for a machine that is paused, and the domain's hosts stay its hosts.
        let before = in_force.version();
        let mut paused = document();
        paused["domains"][0]["vms"][0]["paused"] = json!(true);
        assert!(in_force.takes("shop", &wire(101)));
        assert!(in_force.set(Assignments::parse(&paused).unwrap()));
        assert_ne!(in_force.version(), before);
        let refused = in_force.judge(&wire(11), "shop", &wire(101)).unwrap_err();
        assert!(refused.contains("is paused"), "{refused}");
        assert!(!in_force.takes("shop", &wire(101)) && !in_force.takes("shop", &wire(201)));
        assert!(in_force.takes("bank", &wire(201)) && in_force.has_host(&wire(11), "shop"));
        let before = in_force.version();
        assert!(in_force.set(Assignments::default()));
        assert_ne!(in_force.version(), before);
        assert!(in_force.judge(&wire(11), "shop", &wire(101)).is_err());
        InForce::any().judge(&wire(99), "shop", &wire(7)).unwrap();
    }

    #[test]
    fn a_document_that_cannot_be_meant_is_refused_with_its_place() {
        let change = |pointer: &str, value: Value| {
            let mut document = document();
            *document.pointer_mut(pointer).unwrap() = value;
            Assignments::parse(&document).unwrap_err().to_string()
        };
        for (pointer, value, place) in [
            ("/clusters", json!(7), "document.clusters"),
            ("/domains", json!({}), "document.domains"),
            ("/clusters/0/hosts/1", json!("esx2"), "clusters[0].hosts"),
            ("/clusters/0/hosts/1", json!(null), "clusters[0].hosts"),
            ("/clusters/1/id", json!(name(1)), "clusters[1]"),
            ("/domains/0/name", json!("../x"), "domains[0].name"),
            ("/domains/1/name", json!("shop"), "domains[1]"),
            ("/domains/0/vms/0/cluster", json!(name(3)), "domains[0].vms"),
            ("/domains/0/vms/0/uuid", json!("x"), "domains[0].vms.uuid"),
            ("/domains/0/vms/0/uuid", json!(name(201)), "domains[1].vms"),
            ("/domains/0/vms/0", json!([]), "domains[0].vms.cluster"),
            ("/domains/0/vms/0/paused", json!(1), "domains[0].vms.paused"),
        ] {
            let said = change(pointer, value.clone());
            assert!(said.starts_with(place), "{pointer} = {value}: {said}");
        }
        assert!(Assignments::parse(&json!(null)).is_err());
    }

    #[test]
    fn a_file_is_read_whole_or_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("assignments.json");
        assert_eq!(read(&path).unwrap(), None);
        std::fs::write(&path, document().to_string()).unwrap();
        assert_eq!(
            read(&path).unwrap(),
            Some(Assignments::parse(&document()).unwrap())
        );
        std::fs::write(&path, &document().to_string()[..50]).unwrap();
        let said = format!("{:#}", read(&path).unwrap_err());
        assert!(said.contains("assignments.json"), "{said}");
    }
}
