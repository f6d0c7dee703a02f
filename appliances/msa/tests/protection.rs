//! Machines are protected, paused, resumed and unprotected: what stands in the way, what is taken back, and
//! what is made in vCenter.
#![allow(clippy::unwrap_used)]

mod support;

use msa::clock::MINUTE_MS;
use msa::inventory::{Drva, VmState};
use serde_json::{Value, json};
use support::appliance::Stand;
use support::fake::FakeVm;
use support::guarded::{Reporting, begin, create, domain, stand, states, vms};
use support::site::{Process, Site};

fn shop(vms: &[&str]) -> Value {
    json!({"domain": "shop", "vms": vms})
}

fn asked(site: &Site) -> Vec<String> {
    std::mem::take(&mut site.world.state.lock().asked)
}

/// Nothing is protected, in vCenter or here.
fn is_bare(site: &Site, process: &Process, hint: &str) {
    let state = site.world.state.lock();
    let on = state.vms.values().flat_map(|disks| disks.values());
    assert!(on.clone().all(|on| !on), "{hint}: a disk has the filter");
    assert!(state.policies.is_empty(), "{hint}: {:?}", state.policies);
    drop(state);
    for vm in vms(process) {
        assert_eq!(vm.state, VmState::Unprotected, "{hint}");
        assert!(vm.domain_id.is_none() && vm.reason.is_none(), "{hint}");
        assert!(vm.recoverable_at_ms.is_none() && !vm.is_paused, "{hint}");
    }
}

#[test]
fn two_machines_are_protected_and_unprotected_and_the_policy_goes_with_the_last() {
    let (site, process, domain) = begin();
    let output = process.succeeds("one", "protect-vms", &shop(&["Web vm-1"]));
    assert!(
        output.contains("machine Web vm-1 is recoverable"),
        "{output}"
    );
    let policy = format!("jetdr shop {}", domain.id);
    let properties = site.world.state.lock().policies[&policy].clone();
    let expected = [
        ("jetdr.domain", "shop"),
        ("jetdr.ack", "log"),
        ("jetdr.defer-budget-us", "4000"),
    ];
    assert_eq!(
        properties,
        expected.map(|(key, value)| (key.to_owned(), value.to_owned()))
    );
    assert_eq!(
        states(&process),
        ["Web vm-1 recoverable", "Web vm-2 unprotected"]
    );
    let uuid = FakeVm::new("vm-2").uuid.to_string();
    process.succeeds("two", "protect-vms", &shop(&[&uuid, "vm-2"]));
    assert_eq!(asked(&site), ["attach vm-1", "attach vm-2"]);
    // Once more changes nothing.
    let output = process.succeeds("again", "protect-vms", &shop(&["vm-1", "vm-2"]));
    assert!(output.contains("already: nothing to do"), "{output}");
    assert!(asked(&site).is_empty());
    let output = process.succeeds("end", "unprotect-vms", &json!({"vms": ["vm-1"]}));
    assert!(
        output.contains("a cut holds what was written until now"),
        "{output}"
    );
    assert_eq!(
        states(&process),
        ["Web vm-1 unprotected", "Web vm-2 recoverable"]
    );
    assert!(site.world.state.lock().policies.contains_key(&policy));
    process.succeeds("last", "unprotect-vms", &json!({"vms": ["vm-2"]}));
    is_bare(&site, &process, "at the end");
    let (state, error, _) = process.done("none", "unprotect-vms", &json!({"vms": ["vm-2"]}));
    assert!(
        state == "failed" && error.contains("is not protected"),
        "{error}"
    );
}

type Spoil = fn(&Site, &Process);

fn vm(site: &Site, change: impl FnOnce(&mut FakeVm)) {
    change(site.world.state.lock().machines.get_mut("vm-1").unwrap());
}

fn sql(process: &Process, text: &str) {
    let done = process.store.record(|t| Ok(t.execute(text, []).map(drop)?));
    done.unwrap();
}

#[test]
fn each_thing_in_the_way_is_found_alone_and_nothing_is_begun() {
    let cases: [(&str, Spoil); 13] = [
        ("vm-unknown", |site, _| {
            drop(site.world.state.lock().machines.remove("vm-1"));
        }),
        ("vm-ambiguous", |site, _| {
            let mut state = site.world.state.lock();
            state.machines.get_mut("vm-2").unwrap().name = "Web vm-1".into();
        }),
        ("cluster-not-enabled", |site, _| {
            vm(site, |vm| vm.is_elsewhere = true)
        }),
        ("host-not-ready", |site, _| vm(site, |vm| vm.host = None)),
        ("host-not-ready", |_, process| {
            sql(
                process,
                "UPDATE hosts SET state = 'failed', problem = 'its daemon does not run' WHERE moid = 'host-1'",
            );
        }),
        ("host-appliance", |_, process| {
            let other = json!({"name": "other", "address": "10.0.0.8", "port_base": 32873});
            let other: Drva = create(process, other);
            let text = format!(
                "UPDATE hosts SET drva_id = '{}' WHERE moid = 'host-1'",
                other.id
            );
            sql(process, &text);
        }),
        ("already-protected", |_, process| {
            let drva: Vec<Drva> = process
                .store
                .read(|t| msa::inventory::list(t, 0, 10))
                .unwrap();
            domain(process, drva[0].id, "bank");
            process.succeeds(
                "other",
                "protect-vms",
                &json!({"domain": "bank", "vms": ["vm-1"]}),
            );
        }),
        ("no-disks", |site, _| {
            site.world.state.lock().vms.get_mut("vm-1").unwrap().clear();
        }),
        ("shared-disk", |site, _| vm(site, |vm| vm.is_shared = true)),
        ("physical-rdm", |site, _| vm(site, |vm| vm.is_rdm = true)),
        ("has-snapshots", |site, _| {
            vm(site, |vm| vm.has_snapshots = true)
        }),
        ("filter-present", |site, _| {
            let mut state = site.world.state.lock();
            state.vms.get_mut("vm-1").unwrap().insert(2000, true);
        }),
        ("appliance-not-enrolled", |_, process| {
            sql(
                process,
                "UPDATE certificates SET revoked_at_ms = 1, reason = 'r' WHERE role = 'drva'",
            );
        }),
    ];
    for (name, spoil) in cases {
        let (site, process, _) = begin();
        spoil(&site, &process);
        asked(&site);
        let (state, error, _) = process.done("p", "protect-vms", &shop(&["Web vm-1"]));
        assert_eq!(state, "failed", "{name}");
        assert!(error.contains(&format!("[{name}]")), "{name}: {error}");
        assert_eq!(error.matches('[').count(), 1, "{name} alone: {error}");
        assert!(asked(&site).is_empty(), "{name}");
    }
}

#[test]
fn all_that_is_in_the_way_is_said_at_once() {
    let (site, process, _) = begin();
    vm(&site, |vm| {
        vm.has_snapshots = true;
        vm.is_rdm = true;
        vm.is_shared = true;
    });
    *site.world.appliance.lock() = None;
    site.clock.advance_ms(5 * MINUTE_MS);
    let wanted = shop(&["vm-1", "nobody"]);
    let (state, error, _) = process.done("p", "protect-vms", &wanted);
    assert_eq!(state, "failed");
    for name in [
        "has-snapshots",
        "physical-rdm",
        "shared-disk",
        "vm-unknown",
        "appliance-silent",
    ] {
        assert!(error.contains(&format!("[{name}]")), "{name}: {error}");
    }
    is_bare(&site, &process, "refused");
    let (state, error, _) = process.done(
        "q",
        "protect-vms",
        &json!({"domain": "no", "vms": ["vm-1"]}),
    );
    assert!(
        state == "failed" && error.contains("there are [shop]"),
        "{error}"
    );
}

#[test]
fn what_cannot_be_finished_is_taken_back_and_who_was_protected_stays() {
    let (site, process, _) = begin();
    process.succeeds("first", "protect-vms", &shop(&["vm-1"]));
    // The filter cannot be put on the second one.
    let why = "the datastore is read-only".to_owned();
    site.world
        .state
        .lock()
        .refuses_filter
        .insert("vm-2".into(), why);
    let (state, error, _) = process.done("p", "protect-vms", &shop(&["vm-2"]));
    assert!(state == "failed" && error.contains("read-only"), "{error}");
    assert_eq!(
        states(&process),
        ["Web vm-1 recoverable", "Web vm-2 unprotected"]
    );
    assert_eq!(site.world.state.lock().policies.len(), 1);
    process.succeeds("end", "unprotect-vms", &json!({"vms": ["vm-1"]}));
    // No host ever presents the disks.
    site.world.state.lock().refuses_filter.clear();
    stand(&site, Stand::Unpresented);
    let (state, error, _) = process.done("q", "protect-vms", &shop(&["vm-1", "vm-2"]));
    assert_eq!(state, "failed");
    assert!(
        error.contains("machine Web vm-1 is initializing"),
        "{error}"
    );
    is_bare(&site, &process, "taken back");
    // One that is off is protected when it starts.
    vm(&site, |vm| vm.is_on = false);
    let output = process.succeeds("off", "protect-vms", &shop(&["vm-1"]));
    assert!(output.contains("is off"), "{output}");
    site.world.report();
    let all = vms(&process);
    assert_eq!(all[0].state, VmState::Initializing);
    assert!(all[0].reason.as_deref().unwrap().contains("it is off"));
}

#[test]
fn paused_machines_are_told_to_the_appliance_and_come_back() {
    let (site, process, _) = begin();
    process.succeeds("p", "protect-vms", &shop(&["vm-1", "vm-2"]));
    let one = json!({"vms": ["vm-1"]});
    // An appliance that does not say that it does so: taken back.
    *site.world.appliance.lock() = None;
    let (state, error, _) = process.done("silent", "pause-vms", &one);
    assert!(
        state == "failed" && error.contains("is it running"),
        "{error}"
    );
    assert!(!vms(&process)[0].is_paused);
    let drva: Vec<Drva> = process
        .store
        .read(|t| msa::inventory::list(t, 0, 10))
        .unwrap();
    *site.world.appliance.lock() = Some(support::appliance::Appliance::new(drva[0].id));
    let reporting = Reporting::of(&site.world);
    process.succeeds("pause", "pause-vms", &one);
    let output = process.succeeds("again", "pause-vms", &one);
    assert!(output.contains("is paused already"), "{output}");
    assert_eq!(
        states(&process),
        ["Web vm-1 degraded", "Web vm-2 recoverable"]
    );
    process.succeeds("resume", "resume-vms", &one);
    drop(reporting);
    site.world.report();
    assert_eq!(
        states(&process),
        ["Web vm-1 recoverable", "Web vm-2 recoverable"]
    );
}

#[test]
fn the_inventory_follows_vcenter_and_keeps_what_is_protected() {
    let (site, process, _) = begin();
    process.succeeds("r", "refresh-inventory", &json!({}));
    let all = vms(&process);
    assert_eq!(
        states(&process),
        ["Web vm-1 unprotected", "Web vm-2 unprotected"]
    );
    let hardware = all[0].hardware.as_ref().unwrap();
    assert_eq!(hardware.disks[0].label, "Hard disk 1");
    assert!(hardware.is_powered_on && all[0].host_id.is_some());
    process.succeeds("p", "protect-vms", &shop(&["vm-1"]));
    {
        let mut state = site.world.state.lock();
        state.machines.clear();
        let mut new = FakeVm::new("vm-3");
        new.name = "a \"new\"; one".into();
        new.host = Some("host-2".into());
        state.machines.insert("vm-3".into(), new);
    }
    let output = process.succeeds("r2", "refresh-inventory", &json!({}));
    assert!(
        output.contains("1 are new, 1 are gone, 1 protected ones are missing"),
        "{output}"
    );
    let all = vms(&process);
    assert_eq!(all.len(), 2);
    assert!(all[0].is_missing && all[0].domain_id.is_some());
    assert_eq!(all[1].name.as_str(), "a _new__ one");
    site.world.report();
    assert_eq!(vms(&process)[0].state, VmState::Error);
    let alarms = process.open_alarms();
    assert!(
        alarms.iter().any(|one| one.starts_with("vm-missing")),
        "{alarms:?}"
    );
    assert!(
        alarms.iter().any(|one| one.starts_with("vm-error")),
        "{alarms:?}"
    );
    // It is there again, under another id.
    let mut back = FakeVm::new("vm-1");
    back.host = Some("host-3".into());
    site.world.state.lock().machines.insert("vm-9".into(), back);
    let disks = site.world.state.lock().vms["vm-1"].clone();
    site.world.state.lock().vms.insert("vm-9".into(), disks);
    process.succeeds("r3", "refresh-inventory", &json!({}));
    let vm = vms(&process).remove(0);
    assert_eq!((vm.moid.as_str(), vm.is_missing), ("vm-9", false));
    site.world.report();
    assert!(
        process.open_alarms().is_empty(),
        "{:?}",
        process.open_alarms()
    );
}

#[test]
fn states_follow_what_is_reported_and_alarms_come_in_time() {
    let (site, process, _) = begin();
    process.succeeds("p", "protect-vms", &shop(&["vm-1"]));
    let of = || vms(&process).remove(0);
    let settle = || {
        let now_ms = process.store.now_ms();
        let done = process
            .store
            .record(|t| msa::protection::states::settle_all(t, now_ms));
        done.unwrap();
    };
    let alarms = || process.open_alarms();
    let cut_at_ms = of().recoverable_at_ms.unwrap();
    assert_eq!(
        (of().state, cut_at_ms),
        (VmState::Recoverable, process.store.now_ms())
    );
    // The host is gone: tracked, and after five minutes somebody is told.
    stand(&site, Stand::Lost);
    assert_eq!(of().state, VmState::Degraded);
    assert!(of().reason.unwrap().contains("no host sends Hard disk 1"));
    assert_eq!(of().recoverable_at_ms, Some(cut_at_ms), "it stays");
    for _ in 0..6 {
        assert!(alarms().is_empty(), "{:?}", alarms());
        site.clock.advance_ms(MINUTE_MS - 1);
        site.world.report();
    }
    assert!(alarms()[0].starts_with("vm-degraded"), "{:?}", alarms());
    stand(&site, Stand::Syncing);
    assert_eq!(of().state, VmState::Degraded);
    stand(&site, Stand::Cut);
    assert_eq!(of().state, VmState::Recoverable);
    assert!(alarms().is_empty(), "{:?}", alarms());
    // Newer records than an old cut holds.
    site.world.appliance.lock().as_mut().unwrap().cut_age_ms = 61_000;
    site.world.report();
    assert_eq!(of().state, VmState::Degraded);
    assert!(of().reason.unwrap().contains("the newest cut was 61 s old"));
    site.world.appliance.lock().as_mut().unwrap().cut_age_ms = 0;
    site.world.report();
    // Its log was lost with all that the appliance knew.
    stand(&site, Stand::Unpresented);
    assert_eq!(of().state, VmState::Error);
    stand(&site, Stand::Cut);
    // Nobody reports: not before three reports did not come.
    *site.world.appliance.lock() = None;
    site.clock.advance_ms(59_000);
    settle();
    assert_eq!(of().state, VmState::Recoverable);
    site.clock.advance_ms(1_000);
    settle();
    assert_eq!(of().state, VmState::Error);
    assert!(of().reason.unwrap().contains("was not heard of for 60 s"));
    let mut kinds: Vec<String> = alarms()
        .iter()
        .map(|one| one.split(' ').next().unwrap().to_owned())
        .collect();
    kinds.sort();
    assert_eq!(kinds, ["appliance-silent", "vm-error"]);
    settle();
    assert_eq!(alarms().len(), 2, "said once");
}

#[test]
fn before_the_first_cut_a_machine_is_not_called_recoverable() {
    let (site, process, _) = begin();
    stand(&site, Stand::Syncing);
    process.succeeds("p", "protect-vms", &shop(&["vm-1"]));
    assert_eq!(states(&process)[0], "Web vm-1 initial_sync");
    stand(&site, Stand::Lost);
    assert_eq!(states(&process)[0], "Web vm-1 initial_sync");
    assert!(vms(&process)[0].recoverable_at_ms.is_none());
    // A disk that vCenter knows of and nobody has presented.
    site.world
        .state
        .lock()
        .vms
        .get_mut("vm-1")
        .unwrap()
        .insert(2001, false);
    process.succeeds("r", "refresh-inventory", &json!({}));
    stand(&site, Stand::Cut);
    let vm = vms(&process).remove(0);
    assert_eq!(vm.state, VmState::Initializing);
    assert!(vm.recoverable_at_ms.is_none());
    assert!(
        vm.reason
            .unwrap()
            .contains("has not presented 1 of its disks")
    );
}

#[test]
fn an_appliance_that_works_elsewhere_is_named_with_both_places() {
    let (site, process, _) = begin();
    assert!(process.open_alarms().is_empty());
    site.world.appliance.lock().as_mut().unwrap().store = Some("elsewhere".into());
    site.world.report();
    assert_eq!(process.open_alarms(), ["domain-placement shop"]);
    site.world.appliance.lock().as_mut().unwrap().store = None;
    site.world.report();
    assert!(process.open_alarms().is_empty());
}
