//! Tasks and events.
//!
//! Invariant: a task's state only goes forward (queued, running, then success or error), and what it did is
//! done before it says success.

use super::{State, World};
use crate::refusal::{Refusal, reference};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;

/// Events that are kept.
const MAX_EVENTS: usize = 1000;
/// An object's tasks that it still names.
const MAX_RECENT: usize = 10;

#[derive(Clone, Debug)]
enum Standing {
    Queued,
    Running(u8),
    Success(Value),
    Error(Refusal),
}

/// A task.
#[derive(Clone, Debug)]
pub(super) struct Task {
    number: u64,
    name: String,
    entity: Value,
    is_cancelled: bool,
    standing: Standing,
    queued_at: String,
}

impl Task {
    /// Whether it is about an object.
    pub(super) fn is_about(&self, id: &str) -> bool {
        self.entity.get("value").and_then(Value::as_str) == Some(id)
    }
}

/// Something that happened.
#[derive(Clone, Debug)]
pub(super) struct Event {
    key: u64,
    kind: &'static str,
    at: String,
    message: String,
}

/// A task, for whoever works on it.
#[derive(Clone, Debug)]
pub struct Work {
    world: Arc<World>,
    id: String,
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

impl State {
    /// The last tasks about an object.
    pub(super) fn recent_tasks(&self, entity: &str) -> Vec<&String> {
        let mut found: Vec<(&String, u64)> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.is_about(entity))
            .map(|(id, task)| (id, task.number))
            .collect();
        found.sort_by_key(|(_, number)| *number);
        let old = found.len().saturating_sub(MAX_RECENT);
        found.into_iter().skip(old).map(|(id, _)| id).collect()
    }

    pub(super) fn happened(&mut self, kind: &'static str, message: String) {
        tracing::info!("{kind}: {message}");
        let event = Event {
            key: self.next(),
            kind,
            at: now(),
            message,
        };
        self.events.push(event);
        if self.events.len() > MAX_EVENTS {
            self.events.remove(0);
        }
    }
}

impl Work {
    /// How far it is.
    pub fn progress(&self, done: usize, of: usize) {
        let percent = (done * 100).checked_div(of).unwrap_or(100).min(100);
        let percent = u8::try_from(percent).unwrap_or(100);
        self.change(|task| task.standing = Standing::Running(percent));
    }

    /// Whether somebody asked for its end.
    pub fn is_cancelled(&self) -> bool {
        let state = self.world.state.lock();
        state
            .tasks
            .get(&self.id)
            .is_some_and(|task| task.is_cancelled)
    }

    fn change(&self, change: impl FnOnce(&mut Task)) {
        if let Some(task) = self.world.state.lock().tasks.get_mut(&self.id) {
            change(task);
        }
    }
}

impl World {
    /// Starts a task; its reference. It runs when it has all the locks.
    pub(super) fn start(
        self: &Arc<Self>,
        name: &str,
        entity: Value,
        locks: Vec<Arc<Mutex<()>>>,
        job: impl FnOnce(&Work) -> Result<Value, Refusal> + Send + 'static,
    ) -> Value {
        let id = {
            let mut state = self.state.lock();
            let number = state.next();
            let id = format!("task-{number}");
            let task = Task {
                number,
                name: name.to_owned(),
                entity,
                is_cancelled: false,
                standing: Standing::Queued,
                queued_at: now(),
            };
            state.tasks.insert(id.clone(), task);
            id
        };
        let work = Work {
            world: self.clone(),
            id: id.clone(),
        };
        let name = name.to_owned();
        std::thread::spawn(move || {
            let _held: Vec<_> = locks.iter().map(|lock| lock.lock()).collect();
            let done = match work.is_cancelled() {
                true => Err(cancelled()),
                false => {
                    work.change(|task| task.standing = Standing::Running(0));
                    job(&work)
                }
            };
            if let Err(refusal) = &done {
                tracing::info!("{name}: {}", refusal.words());
            }
            work.change(|task| {
                task.standing = match done {
                    Ok(result) => Standing::Success(result),
                    Err(refusal) => Standing::Error(refusal),
                }
            });
        });
        reference("Task", &id)
    }

    /// Asks for the end of a task.
    pub fn cancel_task(&self, id: &str) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        let task = state.tasks.get_mut(id);
        let task = task.ok_or_else(|| Refusal::no_object("Task", id))?;
        match task.standing {
            Standing::Queued | Standing::Running(_) => {
                task.is_cancelled = true;
                Ok(())
            }
            Standing::Success(_) | Standing::Error(_) => Err(Refusal::state("the task has ended")),
        }
    }

    /// Forgets the tasks that have ended, as a vCenter does after a while.
    pub fn forget_tasks(&self) {
        let ended =
            |task: &Task| matches!(task.standing, Standing::Success(_) | Standing::Error(_));
        self.state.lock().tasks.retain(|_, task| !ended(task));
    }

    /// The events, oldest first.
    pub fn events(&self) -> Value {
        let state = self.state.lock();
        let event = |event: &Event| {
            json!({
                "_typeName": event.kind, "key": event.key, "chainId": event.key,
                "createdTime": event.at, "userName": "", "fullFormattedMessage": event.message,
            })
        };
        Value::Array(state.events.iter().map(event).collect())
    }
}

pub(super) fn cancelled() -> Refusal {
    Refusal::new("RequestCanceled", "the task was cancelled")
}

/// A task's `info`.
pub(super) fn info(id: &str, task: &Task) -> Value {
    let mut info = json!({
        "_typeName": "TaskInfo", "key": id, "task": reference("Task", id), "name": task.name,
        "descriptionId": task.name, "entity": task.entity, "cancelled": task.is_cancelled,
        "cancelable": true, "queueTime": task.queued_at, "eventChainId": 0,
        "reason": {"_typeName": "TaskReasonUser", "userName": ""},
    });
    let (state, more) = match &task.standing {
        Standing::Queued => ("queued", None),
        Standing::Running(percent) => ("running", Some(("progress", json!(percent)))),
        Standing::Success(Value::Null) => ("success", None),
        Standing::Success(result) => ("success", Some(("result", result.clone()))),
        Standing::Error(refusal) => ("error", Some(("error", refusal.localized()))),
    };
    if let Some(info) = info.as_object_mut() {
        info.insert("state".into(), json!(state));
        if let Some((name, value)) = more {
            info.insert(name.into(), value);
        }
    }
    info
}
