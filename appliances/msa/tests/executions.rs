//! Executions: whatever dies, wherever, they go on or go back, and are never left half done.
//!
//! The operation of these tests builds a tower of files in a folder: each step makes two, so that a
//! step can be cut off in its middle.
#![allow(clippy::unwrap_used)]

mod support;

use msa::alarms;
use msa::clock::{Clock, DAY_MS, ManualClock};
use msa::executions::engine::{Active, BLOCKED_ALARM};
use msa::executions::operation::{Making, Stop};
use msa::executions::plan::Action;
use msa::executions::table::{self, Execution, NewExecution, State, StepState};
use msa::executions::{AfterRestart, Context, Engine, Kind, Operation, Registry, StepError};
use msa::store::{Actor, Store};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const STEPS: usize = 4;

struct Tower {
    folder: PathBuf,
    /// This step fails, after its first file.
    fails_at: Option<u64>,
    rolls_back: bool,
    waits: bool,
}

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    let given = making.parameters;
    if given.get("bad").is_some() {
        return Err("bad: takes nothing of the kind".into());
    }
    Ok(Box::new(Tower {
        folder: making.data_dir.join("towers").join(making.name),
        fails_at: given.get("fails_at").and_then(Value::as_u64),
        rolls_back: given.get("rolls_back").is_some(),
        waits: given.get("waits").is_some(),
    }))
}

impl Tower {
    /// What a test laid into the data folder to make something go wrong.
    fn is_asked(&self, what: &str) -> bool {
        self.folder.parent().unwrap().with_file_name(what).exists()
    }

    fn file(&self, step: usize, which: &str) -> PathBuf {
        self.folder.join(format!("{step}{which}"))
    }
}

impl Operation for Tower {
    fn steps(&self) -> &'static [&'static str] {
        &["ground", "first", "second", "roof"]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        context.log(format!("building {step}"))?;
        fs::create_dir_all(&self.folder).unwrap();
        // Each step stands on the one before.
        assert!(step == 0 || self.file(step - 1, "b").exists());
        fs::write(self.file(step, "a"), "").unwrap();
        assert!(!self.is_asked("crash-in-run"), "a crash on request");
        if self.fails_at == Some(step as u64) {
            return Err(StepError::failed("the ground is soft: dry it first"));
        }
        if self.waits && step == 1 {
            context.wait(support::LIMIT)?;
        }
        fs::write(self.file(step, "b"), "").unwrap();
        Ok(())
    }

    fn undo(&mut self, step: usize, _context: &Context) -> Result<(), StepError> {
        if self.is_asked("undo-fails") {
            return Err(StepError::failed("the crane is broken: mend it"));
        }
        // Nothing stands on what is taken away.
        assert!(!self.file(step + 1, "a").exists());
        let _ = fs::remove_file(self.file(step, "b"));
        assert!(!self.is_asked("crash-in-undo"), "a crash on request");
        let _ = fs::remove_file(self.file(step, "a"));
        Ok(())
    }

    fn after_restart(&self) -> AfterRestart {
        match self.rolls_back {
            true => AfterRestart::RollBack,
            false => AfterRestart::GoOn,
        }
    }
}

fn registry() -> Registry {
    let kind = Kind {
        about: "builds a tower",
        for_admins: false,
        make,
    };
    Registry::from([("tower", kind)])
}

/// A data folder, and whatever process looks after it just now.
struct Site {
    dir: tempfile::TempDir,
    clock: Arc<ManualClock>,
}

struct Process {
    store: Arc<Store>,
    engine: Engine,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(1_000_000));
        Self { dir, clock }
    }

    fn start(&self) -> Process {
        let store = Store::open_or_make(self.dir.path(), self.clock.clone()).unwrap();
        let store = Arc::new(store);
        let engine = Engine::new(store.clone(), Arc::new(registry()), self.dir.path());
        Process { store, engine }
    }

    fn ask(&self, what: &str, asked: bool) {
        let path = self.dir.path().join(what);
        match asked {
            true => fs::write(path, "").unwrap(),
            false => drop(fs::remove_file(path)),
        }
    }

    fn files(&self, name: &str) -> BTreeSet<String> {
        let Ok(entries) = fs::read_dir(self.dir.path().join("towers").join(name)) else {
            return BTreeSet::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }
}

fn new(name: &str, parameters: Value) -> NewExecution {
    let asked = json!({"name": name, "kind": "tower", "parameters": parameters, "timeout_s": 60});
    serde_json::from_value(asked).unwrap()
}

impl Process {
    fn submit(&self, name: &str, parameters: Value) -> Execution {
        let submitted = self.engine.submit(&Actor::system(), &new(name, parameters));
        submitted.unwrap()
    }

    fn get(&self, execution: &Execution) -> Execution {
        self.store.read(|t| table::get(t, execution.id)).unwrap()
    }

    /// Runs everything that is due.
    fn run(&self) {
        while let Some(mut active) = self.engine.take().unwrap() {
            self.engine.carry(&mut active).unwrap();
        }
    }

    fn output(&self, execution: &Execution) -> String {
        let lines = self
            .store
            .read(|t| table::lines(t, execution.id, 0, 1000))
            .unwrap();
        lines.into_iter().map(|line| line.text + "\n").collect()
    }
}

fn whole() -> BTreeSet<String> {
    let files = (0..STEPS).flat_map(|step| [format!("{step}a"), format!("{step}b")]);
    files.collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crash {
    BeforeAction,
    /// In the middle of a step's work, or of its undoing.
    InAction,
    BeforeNote,
}

/// Carries an execution and dies at its n-th action; `None`: it came to its end before that.
fn crash_at(site: &Site, nth: usize, how: Crash) -> Option<()> {
    let process = site.start();
    let mut active: Active = process.engine.take().unwrap()?;
    for at in 0.. {
        let action = process.engine.next(&mut active).unwrap();
        if at == nth && how == Crash::BeforeAction {
            return Some(());
        }
        if at == nth && how == Crash::InAction {
            let asked = match action {
                Action::Run(_) => "crash-in-run",
                Action::Undo(_) => "crash-in-undo",
                _ => return Some(()),
            };
            site.ask(asked, true);
            let engine =
                std::panic::AssertUnwindSafe(|| process.engine.perform(&mut active, action));
            assert!(std::panic::catch_unwind(engine).is_err());
            site.ask(asked, false);
            return Some(());
        }
        let came = process.engine.perform(&mut active, action);
        if at == nth {
            return Some(());
        }
        if !process.engine.note(&mut active, came).unwrap() {
            return None;
        }
    }
    None
}

fn never_half(site: &Site, execution: &Execution, hint: &str) -> State {
    let process = site.start();
    process.run();
    let ended = process.get(execution);
    let name = execution.name.as_str();
    let files = site.files(name);
    let steps = ended.step_states();
    match ended.state {
        State::Succeeded => {
            assert_eq!(files, whole(), "{hint}");
            assert!(
                steps.iter().all(|step| *step == StepState::Done),
                "{hint}: {steps:?}"
            );
        }
        State::Failed | State::Cancelled | State::TimedOut => {
            assert_eq!(files, BTreeSet::new(), "{hint}");
            let open = |step: &StepState| matches!(step, StepState::Begun | StepState::Done);
            assert!(!steps.iter().any(open), "{hint}: {steps:?}");
        }
        other => panic!("{hint}: {other}"),
    }
    ended.state
}

/// Every place at which a process can die, alone; for one that succeeds, one that fails, and one that
/// is taken back by a restart.
#[test]
fn a_crash_anywhere_leaves_nothing_half_done() {
    std::panic::set_hook(Box::new(|_| {})); // the crashes are on request
    for (parameters, expected) in [
        (json!({}), State::Succeeded),
        (json!({"fails_at": 2}), State::Failed),
        (json!({"rolls_back": true}), State::Failed),
    ] {
        for how in [Crash::BeforeAction, Crash::InAction, Crash::BeforeNote] {
            let mut crashes = 0;
            for nth in 0.. {
                let site = Site::new();
                let execution = site.start().submit("tower", parameters.clone());
                let hint = format!("{parameters} {how:?} at action {nth}");
                let crashed = crash_at(&site, nth, how);
                let ended = never_half(&site, &execution, &hint);
                if crashed.is_none() {
                    break;
                }
                crashes += 1;
                assert_eq!(ended, expected, "{hint}");
            }
            // Begin and run of each step, and the end; or back from the third.
            assert!(crashes >= 2 * STEPS, "{crashes} crashes only");
        }
    }
}

/// Several crashes one after the other, and operators who cancel in between.
#[test]
fn crashes_upon_crashes() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut numbers = support::Numbers(support::seed());
    for round in 0..40 {
        let site = Site::new();
        let parameters = match numbers.below(3) {
            0 => json!({}),
            1 => json!({"fails_at": numbers.below(STEPS as u64)}),
            _ => json!({"rolls_back": true}),
        };
        let execution = site.start().submit("tower", parameters);
        for _ in 0..numbers.below(6) {
            let how = [Crash::BeforeAction, Crash::InAction, Crash::BeforeNote];
            let how = how[numbers.below(3) as usize];
            if crash_at(&site, numbers.below(5) as usize, how).is_none() {
                break;
            }
            if numbers.below(8) == 0 {
                let _ = site.start().engine.cancel(&Actor::system(), execution.id);
            }
        }
        never_half(&site, &execution, &format!("round {round}"));
    }
}

#[test]
fn one_at_a_time_in_the_order_submitted_and_names_are_taken_once() {
    let site = Site::new();
    let process = site.start();
    let all: Vec<Execution> = ["c", "a", "b"]
        .map(|name| process.submit(name, json!({})))
        .into();
    let taken = process
        .engine
        .submit(&Actor::system(), &new("A", json!({})));
    assert!(
        taken
            .unwrap_err()
            .to_string()
            .contains("another one has the same name")
    );
    let bad = process
        .engine
        .submit(&Actor::system(), &new("d", json!({"bad": 1})));
    assert!(
        bad.unwrap_err()
            .to_string()
            .contains("takes nothing of the kind")
    );
    for expected in &all {
        let mut active = process.engine.take().unwrap().unwrap();
        assert_eq!(active.execution.id, expected.id);
        // While it runs, it is what is due.
        let running = process.store.read(table::due).unwrap().unwrap();
        assert_eq!((running.id, running.state), (expected.id, State::Running));
        process.engine.carry(&mut active).unwrap();
        let ended = process.get(expected);
        assert_eq!(ended.state, State::Succeeded);
        assert_eq!(ended.starts, 1);
    }
    assert!(process.engine.take().unwrap().is_none());
    let said = process.output(&all[0]);
    assert!(
        said.contains("step `ground` begins\nbuilding 0\nstep `ground` is done"),
        "{said}"
    );
    assert!(said.ends_with("succeeded\n"), "{said}");
}

#[test]
fn what_fails_is_taken_back_and_says_why() {
    let site = Site::new();
    let process = site.start();
    let execution = process.submit("soft", json!({"fails_at": 2}));
    process.run();
    let ended = process.get(&execution);
    assert_eq!(ended.state, State::Failed);
    assert_eq!(
        ended.error.as_deref(),
        Some("step `second`: the ground is soft: dry it first")
    );
    assert_eq!(site.files("soft"), BTreeSet::new());
}

#[test]
fn one_that_waits_is_cancelled_at_once_and_never_runs() {
    let site = Site::new();
    let process = site.start();
    let execution = process.submit("waiting", json!({}));
    let cancelled = process
        .engine
        .cancel(&Actor::system(), execution.id)
        .unwrap();
    assert_eq!(cancelled.state, State::Cancelled);
    process.run();
    assert_eq!(site.files("waiting"), BTreeSet::new());
    let again = process
        .engine
        .cancel(&Actor::system(), execution.id)
        .unwrap_err();
    assert!(again.to_string().contains("is cancelled"), "{again}");
}

/// Starts an execution that waits in its second step, lets `end` end it, gives how it ended.
fn ended_while_it_runs(end: impl FnOnce(&Site, &Process, &Execution)) -> (State, BTreeSet<String>) {
    let site = Site::new();
    let process = Arc::new(site.start());
    let execution = process.submit("slow", json!({"waits": true}));
    let worker = process.clone();
    let running = std::thread::spawn(move || worker.run());
    support::wait_for("the second step", || {
        site.files("slow").contains("1a").then_some(())
    });
    // Status and output can be read meanwhile.
    assert_eq!(process.get(&execution).state, State::Running);
    assert!(process.output(&execution).contains("building 1"));
    end(&site, &process, &execution);
    running.join().unwrap();
    (process.get(&execution).state, site.files("slow"))
}

#[test]
fn one_that_runs_is_cancelled_and_taken_back() {
    let (state, files) = ended_while_it_runs(|_, process, execution| {
        process
            .engine
            .cancel(&Actor::system(), execution.id)
            .unwrap();
    });
    assert_eq!((state, files), (State::Cancelled, BTreeSet::new()));
}

#[test]
fn one_whose_time_is_over_is_taken_back() {
    let (state, files) = ended_while_it_runs(|site, process, _| {
        site.clock.advance_ms(60_000);
        process.engine.signals().wake();
    });
    assert_eq!((state, files), (State::TimedOut, BTreeSet::new()));
}

#[test]
fn a_server_that_stops_leaves_it_to_the_next_start() {
    let site = Site::new();
    let process = site.start();
    let execution = process.submit("slow", json!({"waits": true}));
    let signals = process.engine.signals();
    let worker = std::thread::spawn(move || {
        process.engine.work();
        process
    });
    support::wait_for("the second step", || {
        site.files("slow").contains("1a").then_some(())
    });
    signals.stop();
    let process = worker.join().unwrap();
    let left = process.get(&execution);
    assert_eq!(left.state, State::Running);
    assert_eq!(left.steps[1].state, StepState::Begun);
    drop(process);
    // The next start goes on, and is cancelled, since it would wait again.
    let process = site.start();
    process
        .engine
        .cancel(&Actor::system(), execution.id)
        .unwrap();
    process.run();
    let ended = process.get(&execution);
    assert_eq!((ended.state, ended.starts), (State::Cancelled, 2));
    assert!(process.output(&execution).contains("it is started again"));
}

/// What can be neither done nor taken back is never passed over in silence.
#[test]
fn a_blocked_one_stops_the_queue_until_an_operator_decides() {
    for gives_up in [false, true] {
        let site = Site::new();
        let process = site.start();
        let blocked = process.submit("stuck", json!({"fails_at": 1}));
        let next = process.submit("next", json!({}));
        site.ask("undo-fails", true);
        process.run();
        let state = process.get(&blocked);
        assert_eq!(state.state, State::Blocked);
        let said = state.error.unwrap();
        assert!(
            said.contains("`first` cannot be taken back: the crane is broken"),
            "{said}"
        );
        let open = process.store.read(|t| alarms::list(t, 0, 10)).unwrap();
        assert_eq!((open.len(), open[0].kind.as_str()), (1, BLOCKED_ALARM));
        assert!(open[0].text.contains("retry it, or abandon it"));
        assert_eq!(process.get(&next).state, State::Queued, "the queue went on");
        site.ask("undo-fails", false);
        let decided = match gives_up {
            true => process
                .engine
                .abandon(&Actor::system(), blocked.id)
                .unwrap(),
            false => process.engine.retry(&Actor::system(), blocked.id).unwrap(),
        };
        assert_eq!(decided.state == State::Abandoned, gives_up);
        process.run();
        let (ended, left) = (process.get(&blocked).state, site.files("stuck"));
        match gives_up {
            true => assert!(ended == State::Abandoned && !left.is_empty()),
            false => assert!(ended == State::Failed && left.is_empty()),
        }
        let open = process.store.read(|t| alarms::list(t, 0, 10)).unwrap();
        assert!(open[0].cleared_at_ms.is_some());
        assert_eq!(process.get(&next).state, State::Succeeded);
    }
}

/// A program that lacks the kind, or has other steps, does not guess.
#[test]
fn an_unknown_kind_blocks() {
    let site = Site::new();
    let execution = site.start().submit("tower", json!({}));
    crash_at(&site, 3, Crash::BeforeNote).unwrap();
    let store = Store::open(site.dir.path(), site.clock.clone()).unwrap();
    let engine = Engine::new(Arc::new(store), Arc::new(Registry::new()), site.dir.path());
    assert!(engine.take().unwrap().is_none());
    drop(engine);
    let process = site.start();
    let found = process.get(&execution);
    assert_eq!(found.state, State::Blocked);
    assert!(found.error.unwrap().contains("there is no kind `tower`"));
    process
        .engine
        .retry(&Actor::system(), execution.id)
        .unwrap();
    drop(process);
    assert_eq!(never_half(&site, &execution, "retried"), State::Succeeded);
}

#[test]
fn the_output_is_kept_for_its_time_and_is_bounded() {
    let site = Site::new();
    let process = site.start();
    let execution = process.submit("tower", json!({}));
    process.run();
    process
        .store
        .record(|t| {
            for at in 0..2 * table::MAX_LINES {
                table::add_line(t, execution.id, 1, &format!("line {at}\u{1b}[31m"))?;
            }
            Ok(())
        })
        .unwrap();
    let last = |process: &Process| {
        let lines = process
            .store
            .read(|t| table::lines(t, execution.id, 0, i64::MAX));
        lines.unwrap()
    };
    let lines = last(&process);
    assert_eq!(lines.len() as i64, table::MAX_LINES);
    assert!(lines.last().unwrap().text.contains("the output ends here"));
    assert!(!lines.iter().any(|line| line.text.contains('\u{1b}')));
    let purge = |process: &Process| {
        let now_ms = site.clock.now_ms();
        process.store.record(|t| table::purge(t, now_ms)).unwrap()
    };
    site.clock.advance_ms(60 * DAY_MS);
    assert_eq!(purge(&process), 0);
    site.clock.advance_ms(1);
    assert_eq!(purge(&process), 1);
    assert!(process.store.read(|t| table::get(t, execution.id)).is_err());
    assert!(last(&process).is_empty());
}

/// A step that asks is told why it should stop; one that undoes is not disturbed.
#[test]
fn a_step_is_told_why_it_should_stop() {
    assert_ne!(Stop::Cancelled, Stop::TimedOut);
    let site = Site::new();
    let process = site.start();
    process.submit("tower", json!({}));
    let mut active = process.engine.take().unwrap().unwrap();
    let signals = process.engine.signals();
    let seen = signals.seen();
    signals.wake();
    // Something changed since: no wait.
    signals.wait(seen, Duration::from_secs(3600));
    process.engine.carry(&mut active).unwrap();
}

/// Paths of the real operation: the product's own `backup`.
#[test]
fn backups_are_whole_or_not_there() {
    let site = Site::new();
    let store = Arc::new(Store::open_or_make(site.dir.path(), site.clock.clone()).unwrap());
    let registry = Arc::new(msa::service::registry());
    let engine = Engine::new(store.clone(), registry, site.dir.path());
    let asked = json!({"name": "nightly", "kind": "backup"});
    let new: NewExecution = serde_json::from_value(asked).unwrap();
    engine.submit(&Actor::system(), &new).unwrap();
    let mut active = engine.take().unwrap().unwrap();
    engine.carry(&mut active).unwrap();
    let backups = site.dir.path().join("backups");
    let copy = backups.join("nightly.sqlite");
    assert_eq!(fs::read_dir(&backups).unwrap().count(), 1);
    // A server can be started on it.
    let elsewhere = tempfile::tempdir().unwrap();
    fs::copy(&copy, elsewhere.path().join(Path::new(msa::store::FILE))).unwrap();
    let restored = Store::open(elsewhere.path(), site.clock.clone()).unwrap();
    assert_eq!(restored.check().unwrap(), Vec::<String>::new());
    let names = restored.read(|t| table::list(t, 0, 10)).unwrap();
    assert_eq!(names[0].name.as_str(), "nightly");
}
