//! Properties of many managed objects at once.

use super::wire::{Ref, flag, list, number, plain, text};
use super::{Client, other};
use crate::model::Fault;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// So many objects may go while they are read, before that is an error.
const MAX_GONE: usize = 64;
/// Pages of an answer.
const MAX_PAGES: usize = 10_000;

/// Properties of one object, by path.
#[derive(Clone, Debug)]
pub struct Object {
    pub of: Ref,
    properties: BTreeMap<String, Value>,
}

impl Object {
    /// A property; null if it is unset.
    pub fn get(&self, path: &str) -> &Value {
        self.properties.get(path).map_or(&Value::Null, plain)
    }

    pub fn text(&self, path: &str) -> Option<String> {
        self.get(path).as_str().map(str::to_owned)
    }

    /// A text that must be there.
    pub fn needed(&self, path: &str) -> Result<String, Fault> {
        self.text(path)
            .ok_or_else(|| other(format!("{} has no `{path}`", self.of.id)))
    }

    pub fn flag(&self, path: &str) -> bool {
        self.get(path).as_bool().unwrap_or(false)
    }

    /// What is wrong with a property, and whose it is.
    pub fn bad(&self, path: &str, error: impl std::fmt::Display) -> Fault {
        other(format!("{}: {path}: {error}", self.of.id))
    }
}

impl Client {
    /// Reads properties of objects of one type, in any number. Those that are gone meanwhile are left out.
    pub(super) fn objects(
        &self,
        kind: &str,
        of: &[Ref],
        paths: &[&str],
    ) -> Result<Vec<Object>, Fault> {
        let mut wanted = of.to_vec();
        for _ in 0..=MAX_GONE {
            if wanted.is_empty() {
                return Ok(Vec::new());
            }
            match self.try_objects(kind, &wanted, paths) {
                Err(Fault::NotFound(gone)) => {
                    let before = wanted.len();
                    wanted.retain(|one| one.id.as_str() != gone);
                    if wanted.len() == before {
                        return Err(Fault::NotFound(gone));
                    }
                }
                done => return done,
            }
        }
        Err(other(format!(
            "over {MAX_GONE} objects went while they were read"
        )))
    }

    fn try_objects(&self, kind: &str, of: &[Ref], paths: &[&str]) -> Result<Vec<Object>, Fault> {
        let collector = self.roots()?.property_collector;
        let objects: Vec<Value> = of
            .iter()
            .map(|one| json!({"_typeName": "ObjectSpec", "obj": one.to_json()}))
            .collect();
        let properties = json!({"_typeName": "PropertySpec", "type": kind, "pathSet": paths});
        let spec = json!({
            "_typeName": "PropertyFilterSpec", "propSet": [properties], "objectSet": objects,
        });
        let first = json!({"specSet": [spec], "options": {"_typeName": "RetrieveOptions"}});
        let mut page = self.call(&collector, "RetrievePropertiesEx", &first)?;
        let mut found = Vec::new();
        for _ in 0..MAX_PAGES {
            for object in list(page.get("objects").unwrap_or(&Value::Null)).map_err(other)? {
                found.push(read(object)?);
            }
            let Some(token) = text(&page, "token") else {
                return Ok(found);
            };
            let next = json!({"token": token});
            page = self.call(&collector, "ContinueRetrievePropertiesEx", &next)?;
        }
        Err(other(format!("an answer of over {MAX_PAGES} pages")))
    }
}

fn read(object: &Value) -> Result<Object, Fault> {
    let of = Ref::of(plain(object).get("obj").unwrap_or(&Value::Null)).map_err(other)?;
    let set = plain(object).get("propSet").unwrap_or(&Value::Null);
    let mut properties = BTreeMap::new();
    for property in list(set).map_err(other)? {
        let value = plain(property).get("val").cloned().unwrap_or_default();
        properties.insert(super::wire::needed(property, "name")?, value);
    }
    Ok(Object { of, properties })
}

/// `deviceInfo.label`, `capacityInBytes` and the like of a virtual disk.
pub fn disk_of(device: &Value) -> Option<crate::model::DiskInfo> {
    let device = plain(device);
    if text(device, "_typeName")? != "VirtualDisk" {
        return None;
    }
    let backing = device.get("backing").map_or(&Value::Null, plain);
    let sharing = text(backing, "sharing").unwrap_or_default();
    let mode = text(backing, "compatibilityMode").unwrap_or_default();
    let filters = list(device.get("iofilter").unwrap_or(&Value::Null)).unwrap_or_default();
    // A capacity in bytes is there since 5.5; before, in KiB.
    let in_kib = number(device, "capacityInKB").map(|kib| kib.saturating_mul(1024));
    let capacity = number(device, "capacityInBytes").or(in_kib)?;
    Some(crate::model::DiskInfo {
        key: i32::try_from(number(device, "key")?).ok()?,
        label: device
            .get("deviceInfo")
            .and_then(|info| text(info, "label"))
            .unwrap_or_default(),
        capacity_bytes: u64::try_from(capacity).ok()?,
        is_shared: sharing == "sharingMultiWriter",
        is_physical_rdm: mode == "physicalMode",
        filters: filters
            .iter()
            .filter_map(|name| Some(plain(name).as_str()?.to_owned()))
            .collect(),
        path: text(backing, "fileName").unwrap_or_default(),
    })
}

/// A ruleset of a host's firewall.
pub fn ruleset_of(value: &Value) -> Option<crate::model::HostRuleset> {
    let rules = list(plain(value).get("rule").unwrap_or(&Value::Null)).ok()?;
    let rule = |rule: &Value| {
        let first = u16::try_from(number(rule, "port")?).ok()?;
        let last = number(rule, "endPort").and_then(|port| u16::try_from(port).ok());
        Some(crate::model::HostRule {
            is_inbound: text(rule, "direction")? == "inbound",
            ports: (first, last.unwrap_or(first)),
        })
    };
    Some(crate::model::HostRuleset {
        key: text(value, "key")?,
        is_enabled: flag(value, "enabled"),
        rules: rules.iter().filter_map(rule).collect(),
    })
}
