//! The client as an [`Administration`]: roles, who has them, and a machine's entry in the inventory.
//!
//! Invariant: a role is given on the root folder and reaches all below it; nobody else's is touched.

use super::wire::{Ref, flag, list, needed, number, plain, text};
use super::{Client, other};
use crate::api::Administration;
use crate::model::{Fault, NewVm, Permission, Role, TaskId};
use crate::text::Moid;
use serde_json::{Value, json};

/// So many folders may lie between a cluster and its datacenter.
const MAX_DEPTH: usize = 32;

fn role_of(value: &Value) -> Result<Role, Fault> {
    let privileges = plain(value).get("privilege").unwrap_or(&Value::Null);
    let privileges = list(privileges).map_err(other)?;
    Ok(Role {
        id: id_of(value)?,
        name: needed(value, "name")?,
        privileges: privileges
            .iter()
            .filter_map(|one| Some(plain(one).as_str()?.to_owned()))
            .collect(),
    })
}

fn id_of(value: &Value) -> Result<i32, Fault> {
    let id = number(value, "roleId").and_then(|id| i32::try_from(id).ok());
    id.ok_or_else(|| other("a role without `roleId`"))
}

impl Client {
    fn authorization_manager(&self) -> Result<Ref, Fault> {
        let found = self.roots()?.authorization_manager;
        found.ok_or_else(|| other("this server has no AuthorizationManager"))
    }

    /// The folder of machines in the datacenter of a cluster.
    fn vm_folder(&self, cluster: &Ref) -> Result<Ref, Fault> {
        let mut at = cluster.clone();
        for _ in 0..MAX_DEPTH {
            let parent = self.get(&at, "parent")?;
            at = Ref::of(&parent).map_err(|error| other(format!("{}: parent: {error}", at.id)))?;
            if at.kind == "Datacenter" {
                let folder = self.get(&at, "vmFolder")?;
                return Ref::of(&folder).map_err(|error| other(format!("vmFolder: {error}")));
            }
        }
        Err(other(format!("{} lies in no datacenter", cluster.id)))
    }

    /// The network's card. One of a distributed switch is not made: what it is joined by is not known here.
    fn card(&self, cluster: &Ref, network: &Moid) -> Result<Option<Value>, Fault> {
        let all = self.get(cluster, "network")?;
        let all = super::wire::refs(&all).map_err(other)?;
        let Some(found) = all.into_iter().find(|one| &one.id == network) else {
            return Err(Fault::NotFound(network.to_string()));
        };
        if found.kind != "Network" {
            return Ok(None);
        }
        let name = self.get(&found, "name")?;
        let backing = json!({
            "_typeName": "VirtualEthernetCardNetworkBackingInfo",
            "deviceName": plain(&name), "network": found.to_json(),
        });
        let device = json!({"_typeName": "VirtualVmxnet3", "key": -1, "backing": backing});
        Ok(Some(json!({
            "_typeName": "VirtualDeviceConfigSpec", "operation": "add", "device": device,
        })))
    }
}

impl Administration for Client {
    fn roles(&self) -> Result<Vec<Role>, Fault> {
        let manager = self.authorization_manager()?;
        let roles = self.get(&manager, "roleList")?;
        list(&roles).map_err(other)?.iter().map(role_of).collect()
    }

    fn add_role(&self, name: &str, privileges: &[&str]) -> Result<i32, Fault> {
        let manager = self.authorization_manager()?;
        let arguments = json!({"name": name, "privIds": privileges});
        let made = self.call(&manager, "AddAuthorizationRole", &arguments)?;
        let id = plain(&made).as_i64().and_then(|id| i32::try_from(id).ok());
        id.ok_or_else(|| other("AddAuthorizationRole: the answer is no number"))
    }

    fn remove_role(&self, role: i32) -> Result<(), Fault> {
        let manager = self.authorization_manager()?;
        let arguments = json!({"roleId": role, "failIfUsed": true});
        self.call(&manager, "RemoveAuthorizationRole", &arguments)
            .map(drop)
    }

    fn permissions(&self) -> Result<Vec<Permission>, Fault> {
        let manager = self.authorization_manager()?;
        let root = self.roots()?.root_folder;
        let arguments = json!({"entity": root.to_json(), "inherited": false});
        let found = self.call(&manager, "RetrieveEntityPermissions", &arguments)?;
        let permission = |value: &Value| {
            Ok(Permission {
                principal: needed(value, "principal")?,
                is_group: flag(value, "group"),
                role: id_of(value)?,
            })
        };
        list(&found)
            .map_err(other)?
            .iter()
            .map(permission)
            .collect()
    }

    fn set_permission(&self, user: &str, role: i32) -> Result<(), Fault> {
        let manager = self.authorization_manager()?;
        let root = self.roots()?.root_folder;
        let permission = json!({
            "_typeName": "Permission", "principal": user, "group": false, "roleId": role,
            "propagate": true,
        });
        let arguments = json!({"entity": root.to_json(), "permission": [permission]});
        self.call(&manager, "SetEntityPermissions", &arguments)
            .map(drop)
    }

    fn remove_permission(&self, user: &str) -> Result<(), Fault> {
        let manager = self.authorization_manager()?;
        let root = self.roots()?.root_folder;
        let arguments = json!({"entity": root.to_json(), "user": user, "isGroup": false});
        self.call(&manager, "RemoveEntityPermission", &arguments)
            .map(drop)
    }

    fn create_vm(&self, new: &NewVm) -> Result<TaskId, Fault> {
        let cluster = Ref::new("ClusterComputeResource", &new.cluster);
        let folder = self.vm_folder(&cluster)?;
        let pool = self.get(&cluster, "resourcePool")?;
        let pool = Ref::of(&pool).map_err(|error| other(format!("resourcePool: {error}")))?;
        let cards: Vec<Value> = self.card(&cluster, &new.network)?.into_iter().collect();
        let files = format!("[{}]", new.datastore);
        let config = json!({
            "_typeName": "VirtualMachineConfigSpec", "name": new.name,
            "annotation": new.annotation, "guestId": "otherGuest64", "numCPUs": 1, "memoryMB": 64,
            "files": {"_typeName": "VirtualMachineFileInfo", "vmPathName": files},
            "deviceChange": cards,
        });
        let arguments = json!({"config": config, "pool": pool.to_json()});
        self.start(&folder, "CreateVM_Task", &arguments)
    }

    fn annotation(&self, vm: &Moid) -> Result<String, Fault> {
        let config = self.get(&Ref::new("VirtualMachine", vm), "config")?;
        Ok(text(&config, "annotation").unwrap_or_default())
    }

    fn destroy_vm(&self, vm: &Moid) -> Result<TaskId, Fault> {
        self.start(&Ref::new("VirtualMachine", vm), "Destroy_Task", &json!({}))
    }
}
