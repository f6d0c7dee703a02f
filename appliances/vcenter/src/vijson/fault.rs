//! vCenter's faults.
//!
//! Invariant: a fault is told by its type's name alone; its words are for people.

use super::wire::{Ref, list, number, plain, text};
use crate::model::{Fault, FilterDisk};
use serde_json::Value;

/// Types below `InvalidState` that a method here may end with.
const INVALID_STATE: [&str; 7] = [
    "InvalidState",
    "InvalidPowerState",
    "InvalidHostState",
    "InvalidHostConnectionState",
    "TaskInProgress",
    "DrsDisabledOnVm",
    "RemoveFailed",
];

/// The words of a fault: what was added for people, else what its members say.
fn words(value: &Value) -> String {
    let messages = value.get("faultMessage").map(list);
    let messages = messages.and_then(Result::ok).unwrap_or_default();
    let messages: Vec<String> = messages.iter().filter_map(|m| text(m, "message")).collect();
    if !messages.is_empty() {
        return messages.join("; ");
    }
    let names = [
        "localizedMessage",
        "reason",
        "invalidProperty",
        "name",
        "privilegeId",
    ];
    let found = names.iter().find_map(|name| text(value, name));
    found.unwrap_or_default()
}

/// The fault of a document that says its type.
pub fn of(value: &Value) -> Fault {
    of_with_words(value, &words(value))
}

fn of_with_words(value: &Value, words: &str) -> Fault {
    let value = plain(value);
    let kind = text(value, "_typeName").unwrap_or_default();
    match kind.as_str() {
        "InvalidArgument" => Fault::InvalidArgument(words.to_owned()),
        "AlreadyExists" | "DuplicateName" | "PbmDuplicateName" => Fault::AlreadyExists,
        "NotFound" => Fault::NotFound(words.to_owned()),
        "UserNotFound" => {
            let user = text(value, "principal").unwrap_or(words.to_owned());
            Fault::NotFound(format!("the user {user}"))
        }
        "ManagedObjectNotFound" => {
            let object = value.get("obj").and_then(|obj| Ref::of(obj).ok());
            Fault::NotFound(object.map_or(words.to_owned(), |object| object.id.to_string()))
        }
        "FilterInUse" => Fault::FilterInUse(disks(value.get("disk").unwrap_or(&Value::Null))),
        "NotAuthenticated" | "InvalidLogin" => Fault::NotAuthenticated,
        "NoPermission" => {
            Fault::NoPermission(text(value, "privilegeId").unwrap_or(words.to_owned()))
        }
        kind if INVALID_STATE.contains(&kind) => Fault::InvalidState(match words {
            "" => kind.to_owned(),
            words => words.to_owned(),
        }),
        kind => Fault::Other(format!("{kind}: {words}")),
    }
}

/// The fault in a task's or an issue's localised form.
pub fn localized(value: &Value) -> Fault {
    let value = plain(value);
    let fault = value.get("fault").unwrap_or(&Value::Null);
    match text(value, "localizedMessage") {
        Some(words) if !words.is_empty() => of_with_words(fault, &words),
        _ => of(fault),
    }
}

/// Disks in a list; one that cannot be read is left out: the others must still be told.
pub fn disks(value: &Value) -> Vec<FilterDisk> {
    let all = list(value).unwrap_or_default();
    let read = |disk: &Value| {
        let vm = Ref::of(plain(disk).get("vm")?).ok()?.id;
        let disk_key = i32::try_from(number(disk, "diskId")?).ok()?;
        Some(FilterDisk { vm, disk_key })
    };
    all.iter().filter_map(read).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_fault_is_told_by_its_type() {
        let message = json!([{"key": "k", "message": "because"}]);
        let fault = |kind: &str| of(&json!({"_typeName": kind, "faultMessage": message}));
        let because = || "because".to_owned();
        assert_eq!(fault("InvalidArgument"), Fault::InvalidArgument(because()));
        assert_eq!(fault("AlreadyExists"), Fault::AlreadyExists);
        assert_eq!(fault("NotFound"), Fault::NotFound(because()));
        assert_eq!(fault("InvalidState"), Fault::InvalidState(because()));
        assert_eq!(fault("InvalidPowerState"), Fault::InvalidState(because()));
        assert_eq!(fault("NotAuthenticated"), Fault::NotAuthenticated);
        assert_eq!(fault("InvalidLogin"), Fault::NotAuthenticated);
        assert_eq!(fault("NoPermission"), Fault::NoPermission(because()));
        // Its words are not looked at.
        let other = of(&json!({"_typeName": "SystemError", "reason": "AlreadyExists"}));
        assert_eq!(other, Fault::Other("SystemError: AlreadyExists".into()));
        assert_eq!(of(&json!(null)), Fault::Other(": ".into()));
    }

    #[test]
    fn disks_in_use_are_listed() {
        let vm = json!({"type": "VirtualMachine", "value": "vm-7"});
        let list = json!([{"vm": vm, "diskId": 2000}, {"diskId": 1}]);
        let fault = of(&json!({"_typeName": "FilterInUse", "disk": list}));
        let Fault::FilterInUse(disks) = fault else {
            panic!("{fault:?}");
        };
        assert_eq!((disks.len(), disks[0].disk_key), (1, 2000));
        let missing = json!({"_typeName": "ManagedObjectNotFound", "obj": {"type": "Task", "value": "task-1"}});
        assert_eq!(of(&missing), Fault::NotFound("task-1".into()));
    }
}
