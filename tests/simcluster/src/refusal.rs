//! How the simulated vCenter says no: a fault's type, its words, its members.

use serde_json::{Map, Value, json};

/// A fault as VI-JSON tells it.
#[derive(Clone, Debug)]
pub struct Refusal {
    kind: &'static str,
    words: String,
    members: Map<String, Value>,
}

impl Refusal {
    /// A fault of a type, in words.
    pub fn new(kind: &'static str, words: impl Into<String>) -> Self {
        Self {
            kind,
            words: words.into(),
            members: Map::new(),
        }
    }

    /// With a member.
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.members.insert(name.to_owned(), value);
        self
    }

    /// An argument is wrong.
    pub fn argument(name: &str, words: impl Into<String>) -> Self {
        Self::new("InvalidArgument", words).with("invalidProperty", json!(name))
    }

    /// Not in this state.
    pub fn state(words: impl Into<String>) -> Self {
        Self::new("InvalidState", words)
    }

    /// No such object.
    pub fn no_object(kind: &str, id: &str) -> Self {
        Self::new("ManagedObjectNotFound", format!("there is no {kind} {id}"))
            .with("obj", reference(kind, id))
    }

    /// Its words.
    pub fn words(&self) -> &str {
        &self.words
    }

    /// The fault as an answer's document.
    pub fn document(&self) -> Value {
        let message = json!({
            "_typeName": "LocalizableMessage", "key": "simcluster", "message": self.words,
        });
        let mut all = self.members.clone();
        all.insert("_typeName".into(), json!(self.kind));
        all.insert("faultMessage".into(), json!([message]));
        Value::Object(all)
    }

    /// The fault inside another document.
    pub fn localized(&self) -> Value {
        json!({
            "_typeName": "LocalizedMethodFault", "fault": self.document(),
            "localizedMessage": self.words,
        })
    }
}

/// What failed on a host, or in this program.
impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self::new("SystemError", format!("{error:#}")).with("reason", json!(format!("{error:#}")))
    }
}

/// A reference to a managed object.
pub fn reference(kind: &str, id: &str) -> Value {
    json!({"_typeName": "ManagedObjectReference", "type": kind, "value": id})
}
