//! The server dies at every step of enabling, upgrading and disabling a cluster, also before and after
//! each question to vCenter, and is started again: the operation goes on or goes back, never half.
#![allow(clippy::unwrap_used)]

mod support;

use msa::executions::plan::Action;
use msa::executions::table::Execution;
use msa::store::Actor;
use serde_json::{Value, json};
use std::cell::OnceCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use support::fake::{FakeHost, When};
use support::site::{Process, Site, cluster};

const OLD: &str = "0.1.0-1";
const NEW: &str = "0.2.0-1";

/// Where a cluster can be as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whole {
    Disabled,
    Enabled(&'static str),
}

struct Case {
    kind: &'static str,
    from: Whole,
    to: Whole,
}

const CASES: [Case; 3] = [
    Case {
        kind: "enable-cluster",
        from: Whole::Disabled,
        to: Whole::Enabled(OLD),
    },
    Case {
        kind: "upgrade-cluster",
        from: Whole::Enabled(OLD),
        to: Whole::Enabled(NEW),
    },
    Case {
        kind: "disable-cluster",
        from: Whole::Enabled(OLD),
        to: Whole::Disabled,
    },
];

impl Case {
    fn parameters(&self) -> Value {
        let mut all = cluster();
        if self.kind == "disable-cluster" {
            all["detach"] = json!(true);
        }
        all
    }

    /// A cluster to begin with, and the execution that is due: made once, copied often.
    fn begin(&self) -> (Site, Execution) {
        // Of the test's thread, so that its folder goes with it.
        thread_local! {
            static BEGUN: [OnceCell<(Site, Execution)>; 3] = const { [const { OnceCell::new() }; 3] };
        }
        let at = CASES.iter().position(|case| case.kind == self.kind);
        BEGUN.with(|begun| {
            let (site, execution) = begun[at.unwrap()].get_or_init(|| self.make());
            (site.copy(), execution.clone())
        })
    }

    fn make(&self) -> (Site, Execution) {
        let site = Site::with_package(3);
        let process = site.start();
        process.make_drva("drva1", 32873);
        if self.from != Whole::Disabled {
            process.succeeds("before", "enable-cluster", &cluster());
            process.protect("vm-1");
        }
        if self.kind == "upgrade-cluster" {
            process.upload(&site.folder(), NEW);
        }
        let execution = process.submit("killed", self.kind, &self.parameters());
        drop(process);
        (site, execution)
    }

    /// Everything is as `whole` says: in vCenter, on the hosts, in the state.
    fn is(&self, whole: Whole, site: &Site, process: &Process, hint: &str) {
        let state = site.world.state.lock();
        let installed: Vec<_> = state
            .hosts
            .values()
            .map(|host| host.installed.clone())
            .collect();
        let filter = state.filter.as_ref().map(|filter| filter.version.clone());
        let options = |host: &FakeHost| !host.options.is_empty();
        assert!(
            !state.hosts.values().any(options),
            "{hint}: a token is left"
        );
        let is_protected = state.vms["vm-1"][&2000];
        drop(state);
        let (clusters, hosts) = (process.clusters(), process.hosts());
        match whole {
            Whole::Enabled(version) => {
                assert_eq!(installed, vec![Some(version.to_owned()); 3], "{hint}");
                assert_eq!(filter.as_deref(), Some(version), "{hint}");
                assert_eq!(clusters, [format!("Gold enabled {version}")], "{hint}");
                let ready = ["esx1 ready drva1", "esx2 ready drva1", "esx3 ready drva1"];
                assert_eq!(hosts, ready, "{hint}");
                assert_eq!(process.certificates_in_force(), 3, "{hint}");
                assert_eq!(is_protected, self.from != Whole::Disabled, "{hint}");
            }
            Whole::Disabled => {
                assert_eq!(installed, vec![None; 3], "{hint}");
                assert_eq!(filter, None, "{hint}");
                assert!(
                    clusters.is_empty() || clusters == ["Gold disabled -"],
                    "{hint}: {clusters:?}"
                );
                let is_bare = |host: &String| host.ends_with(" absent");
                assert!(hosts.iter().all(is_bare), "{hint}: {hosts:?}");
                assert_eq!(process.certificates_in_force(), 0, "{hint}");
                assert!(!is_protected, "{hint}");
            }
        }
        process.all_hold_theirs(hint);
        assert_eq!(process.tokens(), 0, "{hint}");
        assert!(process.open_alarms().is_empty(), "{hint}");
        let damage = process.store.check().unwrap();
        assert!(damage.is_empty(), "{hint}: {damage:?}");
    }

    /// A disabling that was taken back names the hosts that lost their certificates meanwhile, and these
    /// alone; resolving mends them.
    fn names_what_lost_it(&self, process: &Process, hint: &str) {
        process.all_hold_theirs(hint);
        if self.kind != "disable-cluster" {
            return;
        }
        let enrolled = process.enrolled();
        let lost = |name: &&str| !enrolled.iter().any(|one| one == name);
        let lost: Vec<&str> = ["esx1", "esx2", "esx3"].into_iter().filter(lost).collect();
        let alarms = lost.iter().map(|name| format!("host-not-ready {name}"));
        let mut open = process.open_alarms();
        open.sort();
        assert_eq!(open, alarms.collect::<Vec<_>>(), "{hint}");
        let failed = process.hosts();
        let failed = failed.iter().filter(|host| host.contains(" failed"));
        let failed: Vec<&str> = failed.filter_map(|host| host.split(' ').next()).collect();
        assert_eq!(failed, lost, "{hint}");
        process.succeeds("resolve", "resolve-cluster", &cluster());
    }

    /// Starts a server on what a dead one left, lets it end, and looks.
    fn look(&self, site: &Site, execution: &Execution, hint: &str, cancelled: bool) {
        site.world.calm();
        let process = site.start();
        if cancelled {
            // It may have come to its end.
            let _ = process.engine.cancel(&Actor::system(), execution.id);
        }
        process.run();
        let ended = process.get(execution);
        let hint = format!("{hint}\n{}", process.output(execution));
        match ended.state.word() {
            "succeeded" => self.is(self.to, site, &process, &hint),
            "cancelled" if cancelled => {
                self.names_what_lost_it(&process, &hint);
                self.is(self.from, site, &process, &hint);
            }
            other => panic!("{hint}: {other}: {:?}", ended.error),
        }
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

/// Dies at the n-th call of vCenter; false: there were fewer.
fn dies_at_call(case: &Case, nth: usize, when: When, cancelled: bool) -> bool {
    let (site, execution) = case.begin();
    site.world.crash_at(nth, when);
    let process = site.start();
    let died = catch_unwind(AssertUnwindSafe(|| process.run())).is_err();
    drop(process);
    let hint = format!(
        "{} died {when:?} call {nth}, cancelled: {cancelled}",
        case.kind
    );
    case.look(&site, &execution, &hint, cancelled);
    died
}

/// Dies at the n-th action of the journal, before it or before it is noted.
fn dies_at_action(case: &Case, nth: usize, after: bool, cancelled: bool) -> bool {
    let (site, execution) = case.begin();
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
    let hint = format!(
        "{} died at action {nth}, after: {after}, cancelled: {cancelled}",
        case.kind
    );
    case.look(&site, &execution, &hint, cancelled);
    has_died
}

fn at_every_call(case: &Case) {
    quietly();
    for (when, cancelled) in [
        (When::Before, false),
        (When::After, false),
        (When::After, true),
    ] {
        let deaths = (0..)
            .take_while(|nth| dies_at_call(case, *nth, when, cancelled))
            .count();
        println!("{} {when:?} {cancelled}: {deaths} deaths", case.kind);
        assert!(deaths >= 10, "{}: {deaths} calls only", case.kind);
    }
}

#[test]
fn enabling_at_every_call() {
    at_every_call(&CASES[0]);
}

#[test]
fn upgrading_at_every_call() {
    at_every_call(&CASES[1]);
}

#[test]
fn disabling_at_every_call() {
    at_every_call(&CASES[2]);
}

#[test]
fn at_every_action_of_the_journal() {
    quietly();
    for case in &CASES {
        for (after, cancelled) in [(false, false), (true, false), (false, true), (true, true)] {
            let dies = |nth: &usize| dies_at_action(case, *nth, after, cancelled);
            let deaths = (0..).take_while(dies).count();
            // Begin and run of each step, and the end.
            assert!(deaths >= 9, "{}: {deaths} actions only", case.kind);
        }
    }
}

/// Several deaths one after the other, on the way there and on the way back.
#[test]
fn death_upon_death() {
    quietly();
    let mut numbers = support::Numbers(support::seed());
    for round in 0..12 {
        let case = &CASES[numbers.below(3) as usize];
        let (site, execution) = case.begin();
        let mut cancelled = false;
        for _ in 0..1 + numbers.below(4) {
            let when = [When::Before, When::After][numbers.below(2) as usize];
            site.world.crash_at(numbers.below(14) as usize, when);
            let process = site.start();
            let _ = catch_unwind(AssertUnwindSafe(|| process.run()));
            if numbers.below(3) == 0 {
                cancelled |= process
                    .engine
                    .cancel(&Actor::system(), execution.id)
                    .is_ok();
            }
        }
        case.look(
            &site,
            &execution,
            &format!("{} round {round}", case.kind),
            cancelled,
        );
    }
}
