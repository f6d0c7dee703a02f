//! Roles, who has them, and entries without disks, through the client and the simulated vCenter's port.
#![allow(clippy::unwrap_used)]

mod support;

use support::{PASSWORD, Site, USER, refused};
use vcenter::trust::Trust;
use vcenter::{Administration, Client, Fault, Login, Moid, NewVm, TaskState, Vcenter, VibTrust};

const NAME: &str = "jetdr@vsphere.local";

fn client(site: &Site, user: &str, password: &str) -> Client {
    let trust = Trust::authorities_of(site.server.certificate.as_bytes()).unwrap();
    Client::new(Login {
        address: site.server.address.to_string(),
        user: user.into(),
        password: password.into(),
        trust,
    })
    .unwrap()
}

#[test]
fn a_user_may_do_what_the_role_allows_and_nothing_else() {
    let site = Site::new(1);
    let admin = client(&site, USER, PASSWORD);
    site.world.add_account(NAME, "own").unwrap();
    let own = client(&site, NAME, "own");
    let filter = |client: &Client| {
        let trust = VibTrust::HostAuthorities;
        client.install_filter(&site.cluster, &site.url(), &trust)
    };
    // Without a role not even a look.
    assert_eq!(
        own.clusters(),
        Err(Fault::NoPermission("System.View".into()))
    );
    let looks = admin.add_role("looks", &[]).unwrap();
    admin.set_permission(NAME, looks).unwrap();
    assert_eq!(own.clusters().unwrap().len(), 1);
    assert_eq!(own.hosts(&site.cluster).unwrap().len(), 1);
    for (done, privilege) in [
        (filter(&own).map(drop), "Host.Config.Patch"),
        (
            own.add_role("more", &[]).map(drop),
            "Authorization.ModifyRoles",
        ),
        (
            own.set_permission(NAME, looks),
            "Authorization.ModifyPermissions",
        ),
        (own.unregister_extension("x"), "Extension.Unregister"),
        (own.policies().map(drop), "StorageProfile.View"),
    ] {
        assert_eq!(done, Err(Fault::NoPermission(privilege.into())));
    }
    // Another role replaces the first, within the same session.
    let patches = admin.add_role("patches", &["Host.Config.Patch"]).unwrap();
    admin.set_permission(NAME, patches).unwrap();
    site.succeeds(&filter(&own).unwrap());
    let roles = admin.roles().unwrap();
    let patches_role = roles.iter().find(|role| role.id == patches).unwrap();
    assert!(patches_role.privileges.contains(&"System.View".to_owned()));
    let permissions = admin.permissions().unwrap();
    let given: Vec<_> = permissions
        .iter()
        .filter(|one| one.principal == NAME)
        .collect();
    assert_eq!((given.len(), given[0].role), (1, patches));
    admin.remove_permission(NAME).unwrap();
    assert_eq!(refused(own.clusters()), "NoPermission");
}

#[test]
fn roles_and_permissions_are_refused_as_vcenter_does() {
    let site = Site::new(1);
    let admin = client(&site, USER, PASSWORD);
    site.world.add_account(NAME, "own").unwrap();
    let role = admin.add_role("jetdr", &["Host.Config.Patch"]).unwrap();
    assert_eq!(refused(admin.add_role("jetdr", &[])), "AlreadyExists");
    assert_eq!(
        refused(admin.add_role("x", &["No.Such"])),
        "InvalidArgument"
    );
    assert_eq!(refused(admin.set_permission("nobody", role)), "NotFound");
    assert_eq!(refused(admin.set_permission(NAME, 7)), "NotFound");
    assert_eq!(refused(admin.remove_permission(NAME)), "NotFound");
    admin.set_permission(NAME, role).unwrap();
    assert_eq!(refused(admin.remove_role(role)), "InvalidState");
    assert_eq!(refused(admin.remove_role(7)), "NotFound");
    assert_eq!(refused(admin.remove_role(-1)), "InvalidArgument");
    // The administrator stays one.
    assert_eq!(refused(admin.set_permission(USER, role)), "Other");
    admin.remove_permission(NAME).unwrap();
    admin.remove_role(role).unwrap();
    assert_eq!(admin.roles().unwrap().len(), 1);
}

#[test]
fn an_entry_is_made_once_and_deleted_while_it_is_off() {
    let site = Site::new(1);
    let admin = client(&site, USER, PASSWORD);
    let network = admin.networks(&site.cluster).unwrap().remove(0).moid;
    let new = NewVm {
        name: "msa-1".into(),
        cluster: site.cluster.clone(),
        datastore: "datastore1".into(),
        network: network.clone(),
        annotation: "whose it is".into(),
    };
    site.succeeds(&admin.create_vm(&new).unwrap());
    let found = admin.vms_named("msa-1").unwrap();
    assert_eq!(admin.annotation(&found[0]).unwrap(), "whose it is");
    let machines = admin.vms(&site.cluster).unwrap();
    let entry = machines.iter().find(|vm| vm.name == "msa-1").unwrap();
    assert!(entry.disks.is_empty() && !entry.is_powered_on);
    let again = admin.create_vm(&new).unwrap();
    assert_eq!(site.end(&again), TaskState::Error(Fault::AlreadyExists));
    for (wrong, fault) in [
        (
            NewVm {
                datastore: "other".into(),
                ..new.clone()
            },
            "Other",
        ),
        (
            NewVm {
                network: "network-7".parse().unwrap(),
                ..new.clone()
            },
            "NotFound",
        ),
        (
            NewVm {
                cluster: "domain-c99".parse().unwrap(),
                ..new.clone()
            },
            "NotFound",
        ),
    ] {
        assert_eq!(refused(admin.create_vm(&wrong)), fault, "{wrong:?}");
    }
    site.power(&found[0], true);
    let early = admin.destroy_vm(&found[0]).unwrap();
    assert!(site.fails(&early).contains("is on"));
    site.power(&found[0], false);
    site.succeeds(&admin.destroy_vm(&found[0]).unwrap());
    assert!(admin.vms_named("msa-1").unwrap().is_empty());
    let gone: Moid = found[0].clone();
    assert_eq!(refused(admin.destroy_vm(&gone)), "NotFound");
}
