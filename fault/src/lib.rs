//! Faults on request: named points at which a test can make a process die, wait or fail.
//!
//! Invariant: unless the environment asks for faults, a point costs one relaxed load and does nothing;
//! a request that cannot be understood ends the process at its start, so that no test believes in a
//! fault that never comes.
//!
//! `JETDR_FAULT` holds requests, separated by commas:
//!
//! | Request | What happens |
//! |---|---|
//! | `point` or `point:n` | the process dies (SIGKILL) at the first or n-th passing |
//! | `point=delay:ms` | each passing waits |
//! | `point=error` or `point=error:n` | each passing, or each of the first n, fails; where that means something |
//! | `trace` | each point that is passed is named once on standard error |

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// The variable that holds the requests.
pub const VARIABLE: &str = "JETDR_FAULT";

/// A place in a program that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Its name: the program, and what it is about to do or has just done.
    pub name: &'static str,
    /// What has happened when it is passed.
    pub about: &'static str,
    /// Whether it can fail with an error.
    pub fails: bool,
}

const fn point_of(name: &'static str, about: &'static str) -> Point {
    let fails = false;
    Point { name, about, fails }
}

const fn failing(name: &'static str, about: &'static str) -> Point {
    let fails = true;
    Point { name, about, fails }
}

/// All of them.
pub const POINTS: &[Point] = &[
    point_of(
        "daemon.after-take",
        "records were taken from a lane, nothing of them is sent",
    ),
    point_of("daemon.mid-frame", "half of a frame of records is sent"),
    point_of(
        "daemon.before-release",
        "an acknowledgement is here, its space is not yet freed",
    ),
    point_of(
        "daemon.after-fenced",
        "the appliance refused a lane for its epoch, the filter is told",
    ),
    point_of(
        "daemon.after-bump",
        "a cut's epoch is raised (completions are held, if it is one of several hosts), the appliance is not told",
    ),
    point_of(
        "drva.after-receive",
        "a frame of records is read, nothing of it is admitted",
    ),
    failing(
        "drva.log.before-write",
        "a batch of the log is made, nothing of it is written",
    ),
    point_of("drva.log.after-write", "a batch is durable, nobody is told"),
    failing(
        "drva.log.allocate",
        "a segment's file is made, its space is not allocated (fails with ENOSPC)",
    ),
    point_of(
        "drva.log.segment-made",
        "a segment is made, nothing is in it",
    ),
    point_of("drva.log.segment-deleted", "a segment's file is removed"),
    failing("drva.state-file", "a lasting id is to be written"),
    point_of(
        "drva.before-cut-logged",
        "a cut is closed, the log does not have it",
    ),
    point_of(
        "drva.after-cut-logged",
        "a cut is closed and queued for the log",
    ),
    point_of(
        "drva.hashes-read",
        "blocks that a sync asked about are read, the answer is not made",
    ),
    point_of(
        "drva.before-commit",
        "all records of a cut are fed, it is to be committed",
    ),
    point_of(
        "drva.after-commit",
        "a cut is in the store, nothing here knows",
    ),
    point_of(
        "install.before-step",
        "the journal says that a step is begun, nothing of it is done",
    ),
    point_of(
        "install.after-step",
        "a step is done, the journal does not say so",
    ),
    point_of(
        "uninstall.before-step",
        "a step is to be taken back, nothing of that is done",
    ),
    point_of(
        "uninstall.after-step",
        "a step is taken back, the journal does not say so",
    ),
    point_of(
        "msa.before-commit",
        "a change of the state is made, it is not committed",
    ),
    point_of(
        "msa.after-commit",
        "a change of the state is durable, nobody is told",
    ),
    point_of(
        "msa.before-migration",
        "a step to a newer schema is made, it is not committed",
    ),
    point_of("msa.after-migration", "a step to a newer schema is durable"),
    point_of(
        "msa.execution.before-action",
        "what comes next in an execution is decided, nothing of it is done",
    ),
    point_of(
        "msa.execution.after-action",
        "an action of an execution is done, it is not in the journal",
    ),
    failing(
        "store.before-put",
        "an object is made, nothing of it is in the store",
    ),
    point_of(
        "store.after-put",
        "an object is in the store, nobody is told",
    ),
];

/// What is wrong with a request.
#[derive(Debug, PartialEq, Eq)]
pub enum BadRequest {
    /// No such point.
    Unknown(String),
    /// An action that is none.
    Action(String),
    /// The point cannot fail with an error.
    NoError(String),
}

impl std::fmt::Display for BadRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unknown(name) => write!(
                f,
                "{VARIABLE}: there is no point `{name}`; --list-faults names them all"
            ),
            Self::Action(text) => write!(
                f,
                "{VARIABLE}: `{text}` is not understood: use POINT, POINT:N, POINT=delay:MS, \
                 POINT=error, POINT=error:N or trace"
            ),
            Self::NoError(name) => write!(
                f,
                "{VARIABLE}: `{name}` cannot fail with an error; --list-faults tells which can"
            ),
        }
    }
}

impl std::error::Error for BadRequest {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// At the n-th passing.
    Kill(u64),
    Delay(Duration),
    /// The first n passings.
    Error(u64),
}

#[derive(Debug)]
struct Request {
    point: &'static str,
    action: Action,
    passed: AtomicU64,
}

#[derive(Debug, Default)]
struct Plan {
    requests: Vec<Request>,
    trace: bool,
    traced: Mutex<BTreeSet<String>>,
}

impl Plan {
    fn parse(text: &str) -> Result<Self, BadRequest> {
        let mut plan = Self::default();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            if part == "trace" {
                plan.trace = true;
                continue;
            }
            let bad = || BadRequest::Action(part.into());
            let number = |text: &str| match text.parse::<u64>() {
                Ok(number) if number > 0 => Ok(number),
                _ => Err(bad()),
            };
            let (name, action) = match part.split_once('=') {
                Some((name, "error")) => (name, Action::Error(u64::MAX)),
                Some((name, action)) => match action.split_once(':') {
                    Some(("error", n)) => (name, Action::Error(number(n)?)),
                    Some(("delay", ms)) => {
                        (name, Action::Delay(Duration::from_millis(number(ms)?)))
                    }
                    _ => return Err(bad()),
                },
                None => match part.split_once(':') {
                    Some((name, n)) => (name, Action::Kill(number(n)?)),
                    None => (part, Action::Kill(1)),
                },
            };
            let known = POINTS.iter().find(|point| point.name == name);
            let known = known.ok_or_else(|| BadRequest::Unknown(name.into()))?;
            if matches!(action, Action::Error(_)) && !known.fails {
                return Err(BadRequest::NoError(name.into()));
            }
            plan.requests.push(Request {
                point: known.name,
                action,
                passed: AtomicU64::new(0),
            });
        }
        Ok(plan)
    }

    fn passes(&self, name: &str) -> io::Result<()> {
        if self.trace {
            let mut traced = self.traced.lock().unwrap_or_else(PoisonError::into_inner);
            if traced.insert(name.into()) {
                let known = POINTS.iter().any(|point| point.name == name);
                let what = if known { "passed" } else { "not listed" };
                eprintln!("fault point {what}: {name}");
            }
        }
        for request in self.requests.iter().filter(|of| of.point == name) {
            let passed = request.passed.fetch_add(1, Ordering::Relaxed) + 1; // a count
            match request.action {
                Action::Kill(at) if passed == at => die(name),
                Action::Kill(_) => {}
                Action::Delay(time) => std::thread::sleep(time),
                Action::Error(first) if passed <= first => {
                    return Err(io::Error::other(format!("fault on request at {name}")));
                }
                Action::Error(_) => {}
            }
        }
        Ok(())
    }
}

/// Ends the process as a crash does: nothing is flushed, nobody is told.
fn die(name: &str) -> ! {
    eprintln!("fault point {name}: killed on request");
    let _ = signal_hook::low_level::raise(9); // SIGKILL
    std::process::abort()
}

static ARMED: AtomicBool = AtomicBool::new(false);
static PLAN: OnceLock<Plan> = OnceLock::new();

/// Reads the requests of the environment. To be called once, before anything else is done.
pub fn arm() -> Result<(), BadRequest> {
    let text = std::env::var(VARIABLE).unwrap_or_default();
    if text.is_empty() {
        return Ok(());
    }
    let plan = Plan::parse(&text)?;
    let _ = PLAN.set(plan);
    ARMED.store(true, Ordering::Release); // pairs with nothing: the plan is behind a lock of its own
    Ok(())
}

fn plan() -> Option<&'static Plan> {
    if ARMED.load(Ordering::Relaxed) {
        PLAN.get()
    } else {
        None
    }
}

/// This point is passed.
pub fn point(name: &str) {
    if let Some(plan) = plan() {
        // A request for an error is refused for points that are passed here.
        let _ = plan.passes(name);
    }
}

/// This point is passed; it may have been asked to fail.
pub fn check(name: &str) -> io::Result<()> {
    plan().map_or(Ok(()), |plan| plan.passes(name))
}

/// Whether anything is asked of this point: where it takes some preparation to pass it.
pub fn is_asked_for(name: &str) -> bool {
    plan().is_some_and(|plan| plan.trace || plan.requests.iter().any(|of| of.point == name))
}

/// The points, one a line.
pub fn list() -> String {
    let width = POINTS.iter().map(|point| point.name.len()).max();
    let mut text = String::new();
    for point in POINTS {
        let error = if point.fails { " [can fail]" } else { "" };
        let (name, about, width) = (point.name, point.about, width.unwrap_or(0));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:width$}  {about}{error}");
    }
    text
}

/// If `--list-faults` is among the program's arguments: prints the points, and says so.
pub fn listed_on_request() -> bool {
    let asked = std::env::args_os().any(|arg| arg == "--list-faults");
    if asked {
        print!("{}", list());
    }
    asked
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn requests_are_understood_or_refused_by_name() {
        let plan = Plan::parse("store.before-put=error:2, drva.log.after-write:3,trace").unwrap();
        assert!(plan.trace);
        let actions: Vec<_> = plan
            .requests
            .iter()
            .map(|of| (of.point, of.action))
            .collect();
        let expected = [
            ("store.before-put", Action::Error(2)),
            ("drva.log.after-write", Action::Kill(3)),
        ];
        assert_eq!(actions, expected);
        let delay = Plan::parse("daemon.after-take=delay:5").unwrap();
        let time = Duration::from_millis(5);
        assert_eq!(delay.requests.first().unwrap().action, Action::Delay(time));
        for (text, bad) in [
            (
                "drva.log.befor-write",
                BadRequest::Unknown("drva.log.befor-write".into()),
            ),
            (
                "daemon.after-take=error",
                BadRequest::NoError("daemon.after-take".into()),
            ),
            (
                "daemon.after-take=explode",
                BadRequest::Action("daemon.after-take=explode".into()),
            ),
            (
                "daemon.after-take:0",
                BadRequest::Action("daemon.after-take:0".into()),
            ),
            (
                "store.before-put=error:x",
                BadRequest::Action("store.before-put=error:x".into()),
            ),
        ] {
            assert_eq!(Plan::parse(text).unwrap_err(), bad);
        }
    }

    #[test]
    fn an_error_comes_as_often_as_was_asked_for_and_at_its_point_only() {
        let plan = Plan::parse("store.before-put=error:2").unwrap();
        assert!(plan.passes("store.after-put").is_ok());
        let passings: Vec<bool> = (0..4)
            .map(|_| plan.passes("store.before-put").is_err())
            .collect();
        assert_eq!(passings, [true, true, false, false]);
    }

    #[test]
    fn names_are_listed_once_and_in_order_of_their_program() {
        let names: BTreeSet<&str> = POINTS.iter().map(|point| point.name).collect();
        assert_eq!(names.len(), POINTS.len());
        assert_eq!(list().lines().count(), POINTS.len());
        // Nobody has asked for anything.
        point("no such point");
        assert!(check("drva.state-file").is_ok());
        assert!(!is_asked_for("drva.state-file"));
    }
}
