//! Properties of many objects at once: the part of a PropertyCollector that names its objects.
//!
//! Invariant: a page's token is good once.

use super::Site;
use super::methods::{needed, text, walk};
use crate::refusal::{Refusal, reference};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Objects in a page: few, so that pages are seen to work.
const PAGE: usize = 16;
/// Answers that nobody has read to their end.
const MAX_OPEN: usize = 256;

/// The rest of answers.
#[derive(Debug, Default)]
pub struct Pages(Mutex<BTreeMap<String, Vec<Value>>>);

impl Pages {
    fn page(&self, mut objects: Vec<Value>) -> Value {
        let rest = objects.split_off(objects.len().min(PAGE));
        let mut page = json!({"_typeName": "RetrieveResult", "objects": objects});
        if !rest.is_empty() {
            let token = uuid::Uuid::new_v4().simple().to_string();
            page["token"] = json!(token);
            let mut open = self.0.lock();
            if open.len() >= MAX_OPEN {
                open.clear();
            }
            open.insert(token, rest);
        }
        page
    }

    /// The next page of an answer.
    pub fn next(&self, token: &str) -> Result<Value, Refusal> {
        let rest = self.0.lock().remove(token);
        let rest = rest.ok_or_else(|| Refusal::argument("token", "no such page"))?;
        Ok(self.page(rest))
    }
}

/// `RetrievePropertiesEx`.
pub fn retrieve(site: &Site, arguments: &Value) -> Result<Value, Refusal> {
    let list = |value: &Value, name: &str| {
        let list = needed(value, name)?.as_array().cloned();
        list.ok_or_else(|| Refusal::argument(name, format!("`{name}` is no list")))
    };
    let mut found = Vec::new();
    for spec in list(arguments, "specSet")? {
        let wanted = list(&spec, "propSet")?;
        for object in list(&spec, "objectSet")? {
            let of = needed(&object, "obj")?;
            let (kind, id) = (text(of, "type")?, text(of, "value")?);
            let document = site.world.document(kind, id)?;
            let mut properties = Vec::new();
            for set in wanted
                .iter()
                .filter(|set| set.get("type") == of.get("type"))
            {
                for path in list(set, "pathSet")? {
                    let path = path.as_str().unwrap_or_default();
                    if let Some(value) = walk(&document, path) {
                        properties.push(json!({
                            "_typeName": "DynamicProperty", "name": path, "val": boxed(value),
                        }));
                    }
                }
            }
            found.push(json!({
                "_typeName": "ObjectContent", "obj": reference(kind, id), "propSet": properties,
            }));
        }
    }
    Ok(site.pages.page(found))
}

/// A value of any type says which: objects do by themselves, others in a box.
fn boxed(value: &Value) -> Value {
    let kind = match value {
        Value::String(_) => "string",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "long",
        Value::Array(all) => {
            let of = all.first().and_then(|one| one.get("_typeName")?.as_str());
            let of = of.unwrap_or("String");
            return json!({"_typeName": format!("ArrayOf{of}"), "_value": value});
        }
        Value::Object(_) | Value::Null => return value.clone(),
    };
    json!({"_typeName": kind, "_value": value})
}
