//! Runs executions: asks [`plan`] what comes next, does it, notes it in the journal.
//!
//! Invariants: between two notes nothing is remembered that a restart would need: an engine that is
//! thrown away at any moment, and a new one on the same state, end where one alone would have. What an
//! operation's final step has committed is never run again, and never taken back.

use super::operation::{
    self, AfterRestart, Context, Making, Operation, Registry, Signals, StepError, Stop,
};
use super::plan::{self, Action, Direction};
use super::table::{self, Execution, NewExecution, Outcome, State, StepState};
use crate::alarms;
use crate::outside::Outside;
use crate::store::{Actor, Done, Store, StoreError};
use crate::text::Id;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// An undo that fails is tried so often before an operator has to look.
const UNDO_TRIES: u32 = 3;
const UNDO_PAUSE: Duration = Duration::from_millis(200);
/// How often an idle engine looks at the clock.
const IDLE: Duration = Duration::from_secs(60);
/// The alarm of a blocked execution.
pub const BLOCKED_ALARM: &str = "execution-blocked";

/// Takes executions from the queue, one at a time.
pub struct Engine {
    store: Arc<Store>,
    registry: Arc<Registry>,
    data_dir: PathBuf,
    outside: Arc<Outside>,
    signals: Arc<Signals>,
}

/// An execution in the hands of an engine.
pub struct Active {
    /// As the journal had it.
    pub execution: Execution,
    operation: Box<dyn Operation>,
    context: Context,
}

/// What came of an action.
#[derive(Debug)]
pub enum Came {
    /// It was done; to be noted.
    Of(Action),
    /// The step failed, or stopped.
    Error(Action, StepError),
}

impl Engine {
    /// An engine on this state; nothing runs before [`Engine::work`].
    pub fn new(store: Arc<Store>, registry: Arc<Registry>, data_dir: &Path) -> Self {
        Self {
            store,
            registry,
            data_dir: data_dir.to_owned(),
            outside: Arc::default(),
            signals: Arc::default(),
        }
    }

    /// The same with a way to vCenters.
    pub fn with_outside(mut self, outside: Arc<Outside>) -> Self {
        self.outside = outside;
        self
    }

    /// Wakes it, and tells it to stop.
    pub fn signals(&self) -> Arc<Signals> {
        self.signals.clone()
    }

    /// The kinds that it knows.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    fn make(
        &self,
        kind: &str,
        name: &str,
        parameters: &serde_json::Value,
    ) -> Result<Box<dyn Operation>, StoreError> {
        let Some(known) = self.registry.get(kind) else {
            let known: Vec<&str> = self.registry.keys().copied().collect();
            let why = format!("there is no kind `{kind}`: known are {}", known.join(", "));
            return Err(StoreError::invalid("kind", why));
        };
        let data_dir = &self.data_dir;
        let making = Making {
            parameters,
            name,
            data_dir,
        };
        (known.make)(&making).map_err(|why| StoreError::invalid("parameters", why))
    }

    /// Puts an execution at the end of the queue. Parameters that its kind does not take are refused.
    pub fn submit(&self, actor: &Actor, new: &NewExecution) -> Result<Execution, StoreError> {
        self.make(new.kind.as_str(), new.name.as_str(), &new.parameters)?;
        let submitted = self.store.change(actor, "submit execution", |t| {
            let execution = table::submit(t, new, &actor.name, self.store.now_ms())?;
            let target = format!("execution {}", execution.name);
            let detail = format!("{} {}", execution.kind, execution.parameters);
            Ok(Done::new(execution, target).with_detail(detail))
        })?;
        self.signals.wake();
        Ok(submitted)
    }

    /// Ends one that waits or runs.
    pub fn cancel(&self, actor: &Actor, id: Id) -> Result<Execution, StoreError> {
        self.change(actor, "cancel execution", id, |t, now_ms| {
            table::cancel(t, id, now_ms).map(|_| ())
        })
    }

    /// Lets a blocked one try again.
    pub fn retry(&self, actor: &Actor, id: Id) -> Result<Execution, StoreError> {
        self.change(actor, "retry execution", id, |t, now_ms| {
            table::unblock(t, id, false, now_ms)?;
            alarms::clear(t, BLOCKED_ALARM, &id.to_string(), now_ms)
        })
    }

    /// Gives a blocked one up: what it left is left.
    pub fn abandon(&self, actor: &Actor, id: Id) -> Result<Execution, StoreError> {
        self.change(actor, "abandon execution", id, |t, now_ms| {
            table::unblock(t, id, true, now_ms)?;
            alarms::clear(t, BLOCKED_ALARM, &id.to_string(), now_ms)
        })
    }

    fn change(
        &self,
        actor: &Actor,
        action: &str,
        id: Id,
        work: impl FnOnce(&rusqlite::Transaction<'_>, i64) -> Result<(), StoreError>,
    ) -> Result<Execution, StoreError> {
        let now_ms = self.store.now_ms();
        let changed = self.store.change(actor, action, |t| {
            work(t, now_ms)?;
            let execution = table::get(t, id)?;
            let target = format!("execution {}", execution.name);
            Ok(Done::new(execution, target))
        })?;
        self.signals.wake();
        Ok(changed)
    }

    /// Takes what is due: what a restart interrupted, else the first that waits. Nothing, if nothing
    /// is due or a blocked one stands before it.
    pub fn take(&self) -> Result<Option<Active>, StoreError> {
        let Some(due) = self.store.read(table::due)? else {
            return Ok(None);
        };
        if due.state == State::Blocked {
            return Ok(None);
        }
        let now_ms = self.store.now_ms();
        let operation = match self.make(&due.kind, due.name.as_str(), &due.parameters) {
            Ok(operation) => operation,
            // It was taken by a program that knew it: that one is to finish it.
            Err(error) => {
                self.block(due.id, &format!("this server cannot continue it: {error}"))?;
                return Ok(None);
            }
        };
        let names: Vec<&str> = due.steps.iter().map(|step| step.name.as_str()).collect();
        if due.state != State::Queued && names != operation.steps() {
            let why = "this server's version of it has other steps than the one that began it: \
                       finish it with the earlier version, or abandon it and look what is left";
            self.block(due.id, why)?;
            return Ok(None);
        }
        let again = due.starts > 0;
        self.store.record(|t| {
            table::start(t, &due, operation.steps(), now_ms)?;
            if again {
                let text =
                    "it is started again: the server was restarted, or an operator retried it";
                table::add_line(t, due.id, now_ms, text)?;
                let goes_back = operation.after_restart() == AfterRestart::RollBack;
                if goes_back && !operation::is_committed(t, due.id)? {
                    table::turn_back(t, due.id, Outcome::Failed, text)?;
                }
            }
            Ok(())
        })?;
        let execution = self.store.read(|t| table::get(t, due.id))?;
        let context = self.context(&execution);
        Ok(Some(Active {
            execution,
            operation,
            context,
        }))
    }

    fn context(&self, execution: &Execution) -> Context {
        let forward = execution.direction() == Direction::Forward;
        Context {
            store: self.store.clone(),
            outside: self.outside.clone(),
            data_dir: self.data_dir.clone(),
            id: execution.id,
            // What is taken back takes the time that it takes.
            deadline_ms: execution.deadline_ms().filter(|_| forward),
            signals: self.signals.clone(),
        }
    }

    /// What is to be done now. Turns it round first, if somebody cancelled it or its time is over.
    pub fn next(&self, active: &mut Active) -> Result<Action, StoreError> {
        let id = active.execution.id;
        if active.execution.direction() == Direction::Forward {
            let all_done = |execution: &Execution| {
                execution
                    .step_states()
                    .iter()
                    .all(|step| *step == StepState::Done)
            };
            let steps = active.execution.step_states();
            let begun = steps.iter().rposition(|step| *step != StepState::Pending);
            let is_final = begun.is_some_and(|step| active.operation.is_final(step));
            let turned = match active.context.stop() {
                // What is done is done: nobody is served by taking it back now.
                _ if is_final || all_done(&active.execution) => None,
                Some(Stop::Cancelled) => Some((Outcome::Cancelled, "cancelled by an operator")),
                Some(Stop::TimedOut) => Some((Outcome::TimedOut, "its time is over")),
                Some(Stop::Shutdown) | None => None,
            };
            if let Some((outcome, why)) = turned {
                self.turn_back(id, outcome, why)?;
                active.execution = self.store.read(|t| table::get(t, id))?;
                active.context = self.context(&active.execution);
            }
        }
        let steps = active.execution.step_states();
        Ok(plan::next(active.execution.direction(), &steps))
    }

    /// Does it. Nothing is noted yet.
    pub fn perform(&self, active: &mut Active, action: Action) -> Came {
        let done = match action {
            Action::Run(step) => match self.is_committed(active, step) {
                // A process that died did it, and nobody need be asked again.
                Ok(true) => Ok(()),
                Ok(false) => active.operation.run(step, &active.context),
                Err(error) => Err(error.into()),
            },
            Action::Undo(step) => active.operation.undo(step, &active.context),
            Action::Begin(_) | Action::Finish(_) => Ok(()),
        };
        match done {
            Ok(()) => Came::Of(action),
            Err(error) => Came::Error(action, error),
        }
    }

    /// Whether a step is the final one and has said its last word.
    fn is_committed(&self, active: &Active, step: usize) -> Result<bool, StoreError> {
        let id = active.execution.id;
        Ok(active.operation.is_final(step)
            && self.store.read(|t| operation::is_committed(t, id))?)
    }

    /// Notes what came of it; false: this execution needs nothing more, now.
    pub fn note(&self, active: &mut Active, came: Came) -> Result<bool, StoreError> {
        let id = active.execution.id;
        let more = match came {
            Came::Of(Action::Begin(step)) => {
                self.set_step(active, step, StepState::Begun, "begins")
            }
            Came::Of(Action::Run(step)) => self.set_step(active, step, StepState::Done, "is done"),
            Came::Of(Action::Undo(step)) => {
                self.set_step(active, step, StepState::Undone, "is taken back")
            }
            Came::Of(Action::Finish(state)) => {
                let now_ms = self.store.now_ms();
                self.store.record(|t| {
                    table::add_line(t, id, now_ms, state.word())?;
                    table::finish(t, id, state, now_ms)
                })?;
                Ok(false)
            }
            Came::Error(action, error) => self.note_error(active, action, &error),
        }?;
        active.execution = self.store.read(|t| table::get(t, id))?;
        active.context = self.context(&active.execution);
        Ok(more)
    }

    fn note_error(
        &self,
        active: &Active,
        action: Action,
        error: &StepError,
    ) -> Result<bool, StoreError> {
        let id = active.execution.id;
        let name = |step: usize| {
            let step = active.execution.steps.get(step);
            step.map_or_else(String::new, |step| step.name.clone())
        };
        match (action, error) {
            // The next start goes on from the journal, which says "begun".
            (_, StepError::Stopped) if self.signals.is_stopping() => Ok(false),
            // Why it stopped is looked at again before the next action.
            (Action::Run(_), StepError::Stopped) if active.context.stop().is_some() => Ok(true),
            // It is done: whatever it could not say after that changes nothing.
            (Action::Run(step), error) if self.is_committed(active, step)? => {
                tracing::warn!(execution = %id, step, "committed, and then: {error}");
                self.set_step(active, step, StepState::Done, "is done")
            }
            (Action::Run(step), error) => {
                let text = format!("step `{}`: {error}", name(step));
                self.turn_back(id, Outcome::Failed, &text)?;
                Ok(true)
            }
            (Action::Undo(step), error) => {
                let step = name(step);
                let text = format!("step `{step}` cannot be taken back: {error}");
                self.block(id, &text)?;
                Ok(false)
            }
            (Action::Begin(_) | Action::Finish(_), _) => Ok(false),
        }
    }

    fn set_step(
        &self,
        active: &Active,
        step: usize,
        state: StepState,
        what: &str,
    ) -> Result<bool, StoreError> {
        let id = active.execution.id;
        let name = active.execution.steps.get(step);
        let name = name.map_or("", |step| step.name.as_str());
        let now_ms = self.store.now_ms();
        self.store.record(|t| {
            table::set_step(t, id, step, state)?;
            table::add_line(t, id, now_ms, &format!("step `{name}` {what}"))
        })?;
        Ok(true)
    }

    fn turn_back(&self, id: Id, outcome: Outcome, why: &str) -> Result<(), StoreError> {
        let now_ms = self.store.now_ms();
        self.store.record(|t| {
            table::turn_back(t, id, outcome, why)?;
            table::add_line(
                t,
                id,
                now_ms,
                &format!("{why}: what was done is taken back"),
            )
        })
    }

    fn block(&self, id: Id, why: &str) -> Result<(), StoreError> {
        tracing::error!(execution = %id, "blocked: {why}");
        let now_ms = self.store.now_ms();
        self.store.record(|t| {
            table::block(t, id, why)?;
            table::add_line(t, id, now_ms, &format!("blocked: {why}"))?;
            let text = format!("execution {id} is blocked and the queue stands: {why}. Remove the cause and retry it, or abandon it and look what is left");
            alarms::raise(t, alarms::Severity::Critical, BLOCKED_ALARM, &id.to_string(), &text, now_ms)
        })
    }

    /// Carries one execution as far as it goes.
    pub fn carry(&self, active: &mut Active) -> Result<(), StoreError> {
        let mut undo_tries = 0;
        loop {
            let action = self.next(active)?;
            fault::point("msa.execution.before-action");
            let came = self.perform(active, action);
            fault::point("msa.execution.after-action");
            if let Came::Error(Action::Undo(step), error) = &came
                && !self.signals.is_stopping()
            {
                undo_tries += 1;
                if undo_tries < UNDO_TRIES {
                    tracing::warn!(execution = %active.execution.id, step, "cannot be taken back: {error}; trying again");
                    self.signals.wait(self.signals.seen(), UNDO_PAUSE);
                    continue;
                }
            }
            undo_tries = 0;
            if !self.note(active, came)? || self.signals.is_stopping() {
                return Ok(());
            }
        }
    }

    /// Runs what is due until the server stops.
    pub fn work(&self) {
        while !self.signals.is_stopping() {
            let seen = self.signals.seen();
            let carried = self.take().and_then(|active| match active {
                Some(mut active) => self.carry(&mut active).map(|()| true),
                None => Ok(false),
            });
            match carried {
                Ok(true) => {}
                Ok(false) => self.signals.wait(seen, IDLE),
                // The state cannot be written: nothing is lost, and it is tried again.
                Err(error) => {
                    tracing::error!("executions stand: {error}");
                    self.signals.wait(seen, Duration::from_secs(5));
                }
            }
        }
    }
}
