//! Values of VI-JSON: references to managed objects, and values that say their own type.
//!
//! Invariant: nothing is taken for granted of a value from outside; each reader says what it expected.

use crate::model::Fault;
use crate::text::Moid;
use serde_json::{Value, json};

/// What a reader expected and did not find.
pub type Expected = String;

/// A reference to a managed object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ref {
    pub kind: String,
    pub id: Moid,
}

impl Ref {
    pub fn new(kind: &str, id: &Moid) -> Self {
        Self {
            kind: kind.to_owned(),
            id: id.clone(),
        }
    }

    pub fn of(value: &Value) -> Result<Self, Expected> {
        let value = plain(value);
        let text = |name: &str| {
            let text = value.get(name).and_then(Value::as_str);
            text.ok_or_else(|| format!("a reference without `{name}`"))
        };
        let kind = text("type")?;
        if kind.is_empty() || !kind.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err("a reference to a type with another name than letters".into());
        }
        let id = text("value")?.parse();
        Ok(Self {
            kind: kind.to_owned(),
            id: id.map_err(|error| format!("a reference: {error}"))?,
        })
    }

    pub fn to_json(&self) -> Value {
        json!({
            "_typeName": "ManagedObjectReference", "type": self.kind, "value": self.id.as_str(),
        })
    }

    /// The path of a method or a property.
    pub fn path(&self, member: &str) -> String {
        format!("{}/{}/{member}", self.kind, self.id)
    }
}

/// The value itself, where it comes boxed with its type's name.
pub fn plain(value: &Value) -> &Value {
    value.get("_value").unwrap_or(value)
}

/// A list; nothing is an empty one.
pub fn list(value: &Value) -> Result<&[Value], Expected> {
    match plain(value) {
        Value::Array(all) => Ok(all),
        Value::Null => Ok(&[]),
        _ => Err("no list".into()),
    }
}

/// References in a list.
pub fn refs(value: &Value) -> Result<Vec<Ref>, Expected> {
    list(value)?.iter().map(Ref::of).collect()
}

/// A member's text; none if it is not there.
pub fn text(value: &Value, name: &str) -> Option<String> {
    let text = plain(plain(value).get(name)?).as_str()?;
    Some(text.to_owned())
}

/// A member's text that must be there.
pub fn needed(value: &Value, name: &str) -> Result<String, Fault> {
    text(value, name).ok_or_else(|| Fault::Other(format!("an answer without `{name}`")))
}

/// A member's truth; none is false.
pub fn flag(value: &Value, name: &str) -> bool {
    let found = plain(value).get(name).map(plain);
    found.and_then(Value::as_bool).unwrap_or(false)
}

/// A member's number.
pub fn number(value: &Value, name: &str) -> Option<i64> {
    plain(plain(value).get(name)?).as_i64()
}

/// A time in ms since 1970.
pub fn time_ms(value: &Value) -> Option<i64> {
    let text = plain(value).as_str()?;
    let time: jiff::Timestamp = text.parse().ok()?;
    Some(time.as_millisecond())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_boxed_and_plain_and_hostile_ones_are_not() {
        let plain_one = json!({"type": "HostSystem", "value": "host-1"});
        let boxed = json!({"_typeName": "ManagedObjectReference", "_value": plain_one});
        for value in [&plain_one, &boxed] {
            assert_eq!(
                Ref::of(value).unwrap().path("name"),
                "HostSystem/host-1/name"
            );
        }
        for bad in [
            json!(null),
            json!({"type": "HostSystem"}),
            json!({"type": "Host/../X", "value": "host-1"}),
            json!({"type": "HostSystem", "value": "../../x"}),
            json!({"type": "HostSystem", "value": 7}),
        ] {
            assert!(Ref::of(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn nothing_is_an_empty_list() {
        assert!(list(&Value::Null).unwrap().is_empty());
        assert!(
            list(&json!({"_typeName": "ArrayOfString", "_value": []}))
                .unwrap()
                .is_empty()
        );
        assert!(list(&json!("x")).is_err());
    }

    #[test]
    fn times_with_and_without_fractions() {
        assert_eq!(time_ms(&json!("1970-01-01T00:00:01.5Z")), Some(1500));
        assert_eq!(time_ms(&json!("1970-01-01T01:00:00+01:00")), Some(0));
        assert_eq!(time_ms(&json!("yesterday")), None);
    }
}
