//! Which method of which object does what.

use super::{Answer, Request, Site, collector, policies, privileges};
use crate::refusal::Refusal;
use serde_json::{Value, json};

/// An argument that must be there.
pub(super) fn needed<'v>(arguments: &'v Value, name: &str) -> Result<&'v Value, Refusal> {
    match arguments.get(name) {
        None | Some(Value::Null) => Err(Refusal::argument(name, format!("`{name}` is missing"))),
        Some(value) => Ok(value),
    }
}

pub(super) fn text<'v>(arguments: &'v Value, name: &str) -> Result<&'v str, Refusal> {
    let value = needed(arguments, name)?.as_str();
    value.ok_or_else(|| Refusal::argument(name, format!("`{name}` is no text")))
}

/// A member of a document, by a path like `runtime.host`. None: it is unset.
pub(super) fn walk<'v>(document: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(document, |at, name| at.get(name))
}

/// Answers a request.
pub(super) fn answer(site: &Site, request: &Request) -> Result<Answer, Refusal> {
    let without = |document| Answer {
        document,
        session: None,
    };
    let world = &site.world;
    let arguments = request.arguments.as_ref();
    match (request.kind.as_str(), request.member.as_str(), arguments) {
        ("ServiceInstance", "content", None) => return Ok(without(world.content())),
        ("ServiceInstance", "CurrentTime", Some(_)) => {
            let now = jiff::Timestamp::now().to_string();
            return Ok(without(json!(now)));
        }
        ("SessionManager", "Login", Some(login)) => {
            let session = world.log_in(text(login, "userName")?, text(login, "password")?)?;
            let user = login.get("userName").cloned();
            return Ok(Answer {
                document: json!({"_typeName": "UserSession", "key": session, "userName": user}),
                session: Some(session),
            });
        }
        _ => {}
    }
    let session = request
        .session
        .as_deref()
        .filter(|id| world.has_session(id));
    let Some(session) = session else {
        return Err(Refusal::new(
            "NotAuthenticated",
            "The session is not authenticated.",
        ));
    };
    let Some(arguments) = arguments else {
        world.check(session, privileges::LOOK)?;
        let document = world.document(&request.kind, &request.id)?;
        let found = walk(&document, &request.member)
            .cloned()
            .unwrap_or_default();
        return Ok(without(found));
    };
    if request.space == "pbm" {
        world.check(session, privileges::of_policies(&request.member))?;
        return policies::call(world, &request.member, arguments).map(without);
    }
    if let ("SessionManager", "Logout") = (request.kind.as_str(), request.member.as_str()) {
        world.log_out(session);
        return Ok(without(Value::Null));
    }
    world.check(session, privileges::of(&request.kind, &request.member))?;
    call(site, request, arguments).map(without)
}

/// Roles, and who has them.
fn access(site: &Site, method: &str, arguments: &Value) -> Result<Value, Refusal> {
    let world = &site.world;
    let entity = || needed(arguments, "entity");
    let done = |done: Result<(), Refusal>| done.map(|()| Value::Null);
    match method {
        "AddAuthorizationRole" => {
            let privileges = arguments.get("privIds").unwrap_or(&Value::Null);
            world.add_role(text(arguments, "name")?, privileges)
        }
        "RemoveAuthorizationRole" => {
            let id = needed(arguments, "roleId")?.as_i64();
            let id = id.and_then(|id| i32::try_from(id).ok());
            let id = id.ok_or_else(|| Refusal::argument("roleId", "`roleId` is no number"))?;
            let fail_if_used = needed(arguments, "failIfUsed")?.as_bool() == Some(true);
            done(world.remove_role(id, fail_if_used))
        }
        "RetrieveEntityPermissions" => Ok(world.permissions()),
        "SetEntityPermissions" => {
            done(world.set_permissions(entity()?, needed(arguments, "permission")?))
        }
        "RemoveEntityPermission" => {
            done(world.remove_permission(entity()?, text(arguments, "user")?))
        }
        method => {
            let words = format!("AuthorizationManager has no method {method} here");
            Err(Refusal::new("MethodNotFound", words).with("method", json!(method)))
        }
    }
}

fn call(site: &Site, request: &Request, arguments: &Value) -> Result<Value, Refusal> {
    let (world, id) = (&site.world, request.id.as_str());
    let none = Value::Null;
    let optional = |name: &str| arguments.get(name).unwrap_or(&none);
    match (request.kind.as_str(), request.member.as_str()) {
        ("PropertyCollector", "RetrievePropertiesEx") => collector::retrieve(site, arguments),
        ("PropertyCollector", "ContinueRetrievePropertiesEx") => {
            site.pages.next(text(arguments, "token")?)
        }
        ("IoFilterManager", method) => filters(site, method, arguments),
        ("AuthorizationManager", method) => access(site, method, arguments),
        ("Folder", "CreateVM_Task") => world.create_vm(
            needed(arguments, "config")?,
            text(needed(arguments, "pool")?, "value")?,
        ),
        ("VirtualMachine", "Destroy_Task") => world.destroy_vm(id),
        ("Task", "CancelTask") => world.cancel_task(id).map(|()| Value::Null),
        ("HostSystem", "EnterMaintenanceMode_Task") => world.enter_maintenance(id),
        ("HostSystem", "ExitMaintenanceMode_Task") => world.exit_maintenance(id),
        ("HostDateTimeSystem", "QueryDateTime") => world.time_of(id),
        ("OptionManager", "UpdateOptions") => world
            .update_options(id, needed(arguments, "changedValue")?)
            .map(|()| Value::Null),
        ("OptionManager", "QueryOptions") => {
            world.options(id, arguments.get("name").and_then(Value::as_str))
        }
        ("VirtualMachine", "PowerOnVM_Task") => world.power(id, true),
        ("VirtualMachine", "PowerOffVM_Task") => world.power(id, false),
        ("VirtualMachine", "MigrateVM_Task") => {
            let host = optional("host").get("value").and_then(Value::as_str);
            world.migrate(id, host)
        }
        ("VirtualMachine", "ReconfigVM_Task") => world.reconfigure(id, needed(arguments, "spec")?),
        ("ExtensionManager", "FindExtension") => {
            let key = text(arguments, "extensionKey")?;
            Ok(world.extension(key).unwrap_or_default())
        }
        ("ExtensionManager", "RegisterExtension") => world
            .register_extension(needed(arguments, "extension")?)
            .map(|()| Value::Null),
        ("ExtensionManager", "UnregisterExtension") => world
            .unregister_extension(text(arguments, "extensionKey")?)
            .map(|()| Value::Null),
        ("EventManager", "QueryEvents") => Ok(world.events()),
        (kind, method) => {
            let words = format!("{kind} has no method {method} here");
            Err(Refusal::new("MethodNotFound", words).with("method", json!(method)))
        }
    }
}

fn filters(site: &Site, method: &str, arguments: &Value) -> Result<Value, Refusal> {
    let world = &site.world;
    let cluster = || needed(arguments, "compRes");
    let filter = || text(arguments, "filterId");
    let url = || text(arguments, "vibUrl");
    let trust = arguments.get("vibSslTrust").cloned().unwrap_or_default();
    match method {
        "InstallIoFilter_Task" => world.install_filter(cluster()?, url()?, &trust),
        "UninstallIoFilter_Task" => world.uninstall_filter(cluster()?, filter()?),
        "UpgradeIoFilter_Task" => world.upgrade_filter(cluster()?, filter()?, url()?, &trust),
        "QueryIoFilterInfo" => world.filters(cluster()?),
        "QueryIoFilterIssues" => world.filter_issues(cluster()?, filter()?),
        "QueryDisksUsingFilter" => world.disks_using(cluster()?, filter()?),
        "ResolveInstallationErrorsOnCluster_Task" => {
            world.resolve(Some(needed(arguments, "cluster")?), None, filter()?)
        }
        "ResolveInstallationErrorsOnHost_Task" => world.resolve(
            None,
            Some(text(needed(arguments, "host")?, "value")?),
            filter()?,
        ),
        method => {
            let words = format!("IoFilterManager has no method {method}");
            Err(Refusal::new("MethodNotFound", words).with("method", json!(method)))
        }
    }
}
