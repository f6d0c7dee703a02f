//! Datastores, networks and tasks of a cluster, and options of a host.

use super::wire::{Ref, refs};
use super::{Client, other};
use crate::model::{Fault, Named, TaskId};
use crate::text::Moid;
use serde_json::json;

impl Client {
    /// What a cluster's property refers to, of whatever type, with its name.
    pub(super) fn read_named(&self, cluster: &Moid, property: &str) -> Result<Vec<Named>, Fault> {
        let cluster = Ref::new("ClusterComputeResource", cluster);
        let found = refs(&self.get(&cluster, property)?)
            .map_err(|error| other(format!("{}: {property}: {error}", cluster.id)))?;
        let named = |one: Ref| {
            let name = self.get(&one, "name")?;
            let name = super::wire::plain(&name).as_str().map(str::to_owned);
            let name = name.ok_or_else(|| other(format!("{} has no `name`", one.id)))?;
            Ok(Named { moid: one.id, name })
        };
        found.into_iter().map(named).collect()
    }

    pub(super) fn read_open_tasks(&self, cluster: &Moid) -> Result<Vec<TaskId>, Fault> {
        let cluster = Ref::new("ClusterComputeResource", cluster);
        let recent = refs(&self.get(&cluster, "recentTask")?)
            .map_err(|error| other(format!("{}: recentTask: {error}", cluster.id)))?;
        let tasks = self.objects("Task", &recent, &["info.state"])?;
        let is_open =
            |state: Option<String>| matches!(state.as_deref(), Some("queued" | "running"));
        let open = tasks
            .into_iter()
            .filter(|task| is_open(task.text("info.state")));
        Ok(open.map(|task| TaskId(task.of.id)).collect())
    }

    pub(super) fn update_option(&self, host: &Moid, key: &str, value: &str) -> Result<(), Fault> {
        let host = Ref::new("HostSystem", host);
        let paths = ["configManager.advancedOption"];
        let objects = self.objects("HostSystem", std::slice::from_ref(&host), &paths)?;
        let found = objects.first().map(|object| Ref::of(object.get(paths[0])));
        let Some(Ok(options)) = found else {
            return Err(other(format!("{} has no options", host.id)));
        };
        let text = json!({"_typeName": "string", "_value": value});
        let change = json!({"_typeName": "OptionValue", "key": key, "value": text});
        self.call(
            &options,
            "UpdateOptions",
            &json!({"changedValue": [change]}),
        )
        .map(drop)
    }
}
