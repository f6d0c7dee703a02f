//! Users, roles, and who may do what.
//!
//! Invariant: the site's first user may do everything and cannot lose that; everybody else what the role on
//! the root folder allows, which is looked at for each request.

use super::World;
use crate::refusal::{Refusal, reference};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// The role of the site's first user.
const ADMIN: i32 = -1;
/// Where roles are given; elsewhere they cannot be.
const ROOT: &str = "group-d1";
/// Every role has these.
const ALWAYS: [&str; 3] = ["System.Anonymous", "System.Read", "System.View"];
/// The privileges that there are.
pub const PRIVILEGES: &[&str] = &[
    "Authorization.ModifyPermissions",
    "Authorization.ModifyRoles",
    "Datastore.AllocateSpace",
    "Extension.Register",
    "Extension.Unregister",
    "Global.CancelTask",
    "Host.Config.AdvancedConfig",
    "Host.Config.Maintenance",
    "Host.Config.Patch",
    "Network.Assign",
    "Resource.AssignVMToPool",
    "Resource.ColdMigrate",
    "Resource.HotMigrate",
    "StorageProfile.Update",
    "StorageProfile.View",
    "System.Anonymous",
    "System.Read",
    "System.View",
    "VirtualMachine.Config.EditDevice",
    "VirtualMachine.Interact.PowerOff",
    "VirtualMachine.Interact.PowerOn",
    "VirtualMachine.Inventory.Create",
    "VirtualMachine.Inventory.Delete",
];

#[derive(Clone, Debug)]
struct RoleEntry {
    name: String,
    privileges: BTreeSet<String>,
}

/// Users and what they may do.
#[derive(Debug, Default)]
pub(super) struct Access {
    /// Password by name; the first one is the administrator.
    accounts: BTreeMap<String, String>,
    administrator: String,
    roles: BTreeMap<i32, RoleEntry>,
    /// Role by user, on the root folder.
    permissions: BTreeMap<String, i32>,
    last_role: i32,
}

impl Access {
    pub(super) fn new(user: String, password: String) -> Self {
        Self {
            accounts: BTreeMap::from([(user.clone(), password)]),
            administrator: user,
            roles: BTreeMap::new(),
            permissions: BTreeMap::new(),
            last_role: 1000,
        }
    }

    pub(super) fn takes(&self, user: &str, password: &str) -> bool {
        self.accounts.get(user).is_some_and(|own| own == password)
    }

    /// Whether a user may do what takes this privilege.
    fn may(&self, user: &str, privilege: &str) -> bool {
        let role = self.permissions.get(user).and_then(|id| self.roles.get(id));
        user == self.administrator || role.is_some_and(|role| role.privileges.contains(privilege))
    }

    fn role(&self, id: i32) -> Result<&RoleEntry, Refusal> {
        let found = self.roles.get(&id);
        found.ok_or_else(|| Refusal::new("NotFound", format!("role {id}")))
    }

    fn role_list(&self) -> Value {
        let all = PRIVILEGES.iter().map(|name| (*name).to_owned()).collect();
        let admin = RoleEntry {
            name: "Admin".into(),
            privileges: all,
        };
        let role = |(id, role): (i32, &RoleEntry)| {
            json!({
                "_typeName": "AuthorizationRole", "roleId": id, "name": role.name,
                "system": id == ADMIN, "privilege": role.privileges,
            })
        };
        let own = self.roles.iter().map(|(id, entry)| role((*id, entry)));
        std::iter::once(role((ADMIN, &admin))).chain(own).collect()
    }
}

fn on_root(entity: &Value) -> Result<(), Refusal> {
    match entity.get("value").and_then(Value::as_str) {
        Some(ROOT) => Ok(()),
        _ => Err(Refusal::argument(
            "entity",
            "here roles are given on the root folder only",
        )),
    }
}

impl World {
    /// Makes a user, who may do nothing yet: what an administrator does in vCenter's single sign-on.
    pub fn add_account(&self, name: &str, password: &str) -> anyhow::Result<()> {
        let mut state = self.state.lock();
        if state.access.accounts.contains_key(name) {
            anyhow::bail!("a user `{name}` is there");
        }
        let accounts = &mut state.access.accounts;
        accounts.insert(name.to_owned(), password.to_owned());
        Ok(())
    }

    /// Refuses a session whose user may not do what takes this privilege.
    pub fn check(&self, session: &str, privilege: &str) -> Result<(), Refusal> {
        let state = self.state.lock();
        let user = state.sessions.get(session);
        if user.is_some_and(|user| state.access.may(user, privilege)) {
            return Ok(());
        }
        let words = format!("Permission to perform this operation was denied: {privilege}");
        Err(Refusal::new("NoPermission", words)
            .with("privilegeId", json!(privilege))
            .with("object", reference("Folder", ROOT)))
    }

    /// Roles, for whoever looks at the site.
    pub fn roles(&self) -> Value {
        self.state.lock().access.role_list()
    }

    /// `RetrieveEntityPermissions` of the root folder.
    pub fn permissions(&self) -> Value {
        let state = self.state.lock();
        let access = &state.access;
        let permission = |user: &String, role: i32| {
            json!({
                "_typeName": "Permission", "entity": reference("Folder", ROOT), "principal": user,
                "group": false, "roleId": role, "propagate": true,
            })
        };
        let first = std::iter::once(permission(&access.administrator, ADMIN));
        let others = access.permissions.iter();
        let others = others.map(|(user, role)| permission(user, *role));
        first.chain(others).collect()
    }

    /// `AddAuthorizationRole`.
    pub fn add_role(&self, name: &str, privileges: &Value) -> Result<Value, Refusal> {
        if name.is_empty() {
            return Err(Refusal::new("InvalidName", "a role has a name"));
        }
        let asked = privileges.as_array().cloned().unwrap_or_default();
        let mut all: BTreeSet<String> = ALWAYS.iter().map(|name| (*name).to_owned()).collect();
        for one in &asked {
            let known = PRIVILEGES.iter().find(|known| one.as_str() == Some(known));
            let known = known.ok_or_else(|| {
                Refusal::argument("privIds", format!("there is no privilege {one}"))
            })?;
            all.insert((*known).to_owned());
        }
        let mut state = self.state.lock();
        let access = &mut state.access;
        if name == "Admin" || access.roles.values().any(|role| role.name == name) {
            let words = format!("a role `{name}` is there");
            return Err(Refusal::new("AlreadyExists", words).with("name", json!(name)));
        }
        access.last_role += 1;
        let entry = RoleEntry {
            name: name.to_owned(),
            privileges: all,
        };
        let id = access.last_role;
        access.roles.insert(id, entry);
        Ok(json!(id))
    }

    /// `RemoveAuthorizationRole`.
    pub fn remove_role(&self, id: i32, fail_if_used: bool) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        let access = &mut state.access;
        if id == ADMIN {
            return Err(Refusal::argument("roleId", "vCenter's own roles stay"));
        }
        let name = access.role(id)?.name.clone();
        if fail_if_used && access.permissions.values().any(|role| *role == id) {
            return Err(Refusal::new("RemoveFailed", format!("{name} is used")));
        }
        access.permissions.retain(|_, role| *role != id);
        access.roles.remove(&id);
        Ok(())
    }

    /// `SetEntityPermissions`.
    pub fn set_permissions(&self, entity: &Value, permissions: &Value) -> Result<(), Refusal> {
        on_root(entity)?;
        let wrong = |what: &str| Refusal::argument("permission", what);
        let all = permissions.as_array().ok_or_else(|| wrong("no list"))?;
        let mut state = self.state.lock();
        for one in all {
            let user = one.get("principal").and_then(Value::as_str);
            let user = user.ok_or_else(|| wrong("it has no principal"))?;
            let role = one.get("roleId").and_then(Value::as_i64);
            let role = role.and_then(|id| i32::try_from(id).ok());
            let role = role.ok_or_else(|| wrong("it has no roleId"))?;
            if !state.access.accounts.contains_key(user) {
                let words = format!("there is no user {user}");
                return Err(Refusal::new("UserNotFound", words).with("principal", json!(user)));
            }
            if user == state.access.administrator {
                let words = "the last administrator stays one";
                return Err(Refusal::new("AuthMinimumAdminPermission", words));
            }
            state.access.role(role)?;
            state.access.permissions.insert(user.to_owned(), role);
        }
        Ok(())
    }

    /// `RemoveEntityPermission`.
    pub fn remove_permission(&self, entity: &Value, user: &str) -> Result<(), Refusal> {
        on_root(entity)?;
        let gone = self.state.lock().access.permissions.remove(user);
        gone.map(drop)
            .ok_or_else(|| Refusal::new("NotFound", format!("{user} has no role there")))
    }
}
