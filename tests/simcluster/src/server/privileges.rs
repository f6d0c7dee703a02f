//! Which privilege a request takes, as vCenter's reference names it; of the IoFilterManager's, which are found
//! out while they run there, those that are named for the work on hosts.
//!
//! Invariant: what is not named here takes what changes nothing allows: to look.

/// What a method takes.
pub fn of(kind: &str, method: &str) -> &'static str {
    match (kind, method) {
        ("AuthorizationManager", "AddAuthorizationRole" | "RemoveAuthorizationRole") => {
            "Authorization.ModifyRoles"
        }
        ("AuthorizationManager", "SetEntityPermissions" | "RemoveEntityPermission") => {
            "Authorization.ModifyPermissions"
        }
        ("ExtensionManager", "RegisterExtension") => "Extension.Register",
        ("ExtensionManager", "UnregisterExtension") => "Extension.Unregister",
        ("Folder", "CreateVM_Task") => "VirtualMachine.Inventory.Create",
        ("HostSystem", "EnterMaintenanceMode_Task" | "ExitMaintenanceMode_Task") => {
            "Host.Config.Maintenance"
        }
        ("IoFilterManager", method) if method.ends_with("_Task") => "Host.Config.Patch",
        ("OptionManager", "UpdateOptions") => "Host.Config.AdvancedConfig",
        ("Task", "CancelTask") => "Global.CancelTask",
        ("VirtualMachine", "Destroy_Task") => "VirtualMachine.Inventory.Delete",
        ("VirtualMachine", "MigrateVM_Task") => "Resource.HotMigrate",
        ("VirtualMachine", "PowerOffVM_Task") => "VirtualMachine.Interact.PowerOff",
        ("VirtualMachine", "PowerOnVM_Task") => "VirtualMachine.Interact.PowerOn",
        ("VirtualMachine", "ReconfigVM_Task") => "VirtualMachine.Config.EditDevice",
        _ => LOOK,
    }
}

/// What a method of the storage policies' own interface takes.
pub fn of_policies(method: &str) -> &'static str {
    match method {
        "PbmCreate" | "PbmDelete" => "StorageProfile.Update",
        _ => "StorageProfile.View",
    }
}

/// What looking takes.
pub const LOOK: &str = "System.View";
