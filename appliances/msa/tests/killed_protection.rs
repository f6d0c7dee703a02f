//! The server dies at every question to vCenter and at every action of the journal while machines are
//! protected and unprotected, and is started again: it goes on or goes back, never half.
#![allow(clippy::unwrap_used)]

mod support;

use msa::executions::plan::Action;
use msa::executions::table::Execution;
use msa::store::Actor;
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use support::fake::When;
use support::guarded::{begin, states};
use support::site::{Process, Site};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Protect,
    Unprotect,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Protect => "protect-vms",
            Kind::Unprotect => "unprotect-vms",
        }
    }

    fn parameters(self) -> Value {
        match self {
            Kind::Protect => json!({"domain": "shop", "vms": ["vm-1", "vm-2"]}),
            Kind::Unprotect => json!({"vms": ["vm-1", "vm-2"]}),
        }
    }

    fn begin(self) -> (Site, Execution) {
        let (site, process, _) = begin();
        if self == Kind::Unprotect {
            process.succeeds("before", "protect-vms", &Kind::Protect.parameters());
        }
        let execution = process.submit("killed", self.name(), &self.parameters());
        drop(process);
        (site, execution)
    }
}

/// All of both machines is protected, or nothing of either: in vCenter and in the state.
fn is_whole(site: &Site, process: &Process, protected: bool, hint: &str) {
    site.world.report();
    let state = site.world.state.lock();
    let on: Vec<bool> = state
        .vms
        .values()
        .flat_map(|disks| disks.values().copied())
        .collect();
    assert_eq!(on, vec![protected; 2], "{hint}");
    assert_eq!(state.policies.len(), usize::from(protected), "{hint}");
    assert_eq!(state.policy_of.len(), 2 * usize::from(protected), "{hint}");
    drop(state);
    let word = if protected {
        "recoverable"
    } else {
        "unprotected"
    };
    let expected = ["Web vm-1", "Web vm-2"].map(|vm| format!("{vm} {word}"));
    let found = states(process);
    assert!(
        found == expected || (!protected && found.is_empty()),
        "{hint}: {found:?}"
    );
    assert!(process.open_alarms().is_empty(), "{hint}");
    let damage = process.store.check().unwrap();
    assert!(damage.is_empty(), "{hint}: {damage:?}");
}

/// Starts a server on what a dead one left, lets it end, and looks.
fn look(kind: Kind, site: &Site, execution: &Execution, hint: &str, cancelled: bool) {
    site.world.calm();
    let process = site.start();
    if cancelled {
        // It may have come to its end.
        let _ = process.engine.cancel(&Actor::system(), execution.id);
    }
    process.run();
    let ended = process.get(execution);
    let hint = format!("{hint}\n{}", process.output(execution));
    let is_protect = kind == Kind::Protect;
    match ended.state.word() {
        "succeeded" => is_whole(site, &process, is_protect, &hint),
        "cancelled" if cancelled => is_whole(site, &process, !is_protect, &hint),
        other => panic!("{hint}: {other}: {:?}", ended.error),
    }
}

fn quietly() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string();
        if !text.contains("a crash on request") {
            eprintln!("{text}");
        }
    }));
}

fn dies_at_call(kind: Kind, nth: usize, when: When, cancelled: bool) -> bool {
    let (site, execution) = kind.begin();
    site.world.crash_at(nth, when);
    let process = site.start();
    let died = catch_unwind(AssertUnwindSafe(|| process.run())).is_err();
    drop(process);
    let hint = format!("{kind:?} died {when:?} call {nth}, cancelled: {cancelled}");
    look(kind, &site, &execution, &hint, cancelled);
    died
}

fn dies_at_action(kind: Kind, nth: usize, after: bool, cancelled: bool) -> bool {
    let (site, execution) = kind.begin();
    let process = site.start();
    let mut active = process.engine.take().unwrap().unwrap();
    let mut has_died = false;
    for at in 0.. {
        let action = process.engine.next(&mut active).unwrap();
        if at == nth && !after {
            has_died = true;
            break;
        }
        let is_last = matches!(action, Action::Finish(_));
        let came = process.engine.perform(&mut active, action);
        if at == nth {
            has_died = true;
            break;
        }
        assert_eq!(process.engine.note(&mut active, came).unwrap(), !is_last);
        if is_last {
            break;
        }
    }
    drop((active, process));
    let hint = format!("{kind:?} died at action {nth}, after: {after}, cancelled: {cancelled}");
    look(kind, &site, &execution, &hint, cancelled);
    has_died
}

fn at_every_call(kind: Kind) {
    quietly();
    for (when, cancelled) in [
        (When::Before, false),
        (When::After, false),
        (When::After, true),
    ] {
        let deaths = (0..)
            .take_while(|nth| dies_at_call(kind, *nth, when, cancelled))
            .count();
        println!("{kind:?} {when:?} {cancelled}: {deaths} deaths");
        assert!(deaths >= 6, "{kind:?}: {deaths} calls only");
    }
}

#[test]
fn protecting_at_every_call() {
    at_every_call(Kind::Protect);
}

#[test]
fn unprotecting_at_every_call() {
    at_every_call(Kind::Unprotect);
}

#[test]
fn at_every_action_of_the_journal() {
    quietly();
    for kind in [Kind::Protect, Kind::Unprotect] {
        for (after, cancelled) in [(false, false), (true, false), (false, true), (true, true)] {
            let deaths = (0..)
                .take_while(|nth| dies_at_action(kind, *nth, after, cancelled))
                .count();
            assert!(deaths >= 9, "{kind:?}: {deaths} actions only");
        }
    }
}
