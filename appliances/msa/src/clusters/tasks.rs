//! Waiting for what vCenter does.
//!
//! Invariant: nothing new is asked for while vCenter still works on something about the cluster, so that
//! an execution that goes on after a restart never does a thing twice at the same time.

use super::{Link, refused};
use crate::executions::{Context, StepError};
use crate::vcenter::{Fault, Moid, TaskId, TaskState};
use std::time::{Duration, Instant};

/// What is done between two questions about a task.
pub type Tick<'a> = &'a mut dyn FnMut() -> Result<(), StepError>;

/// How a task ended.
pub type Ended = Result<(), Fault>;

/// Waits for the end of a task; `limit`: an error after that long. While vCenter does not answer, it is
/// asked again: the task goes on without us.
pub fn wait_for(
    context: &Context,
    link: &Link,
    task: &TaskId,
    limit: Option<Duration>,
    tick: Tick<'_>,
) -> Result<Ended, StepError> {
    let since = Instant::now();
    let mut is_silent = false;
    loop {
        match link.api.task(task) {
            Ok(TaskState::Success) => return Ok(Ok(())),
            Ok(TaskState::Error(fault)) => return Ok(Err(fault)),
            Ok(TaskState::Queued | TaskState::Running(_)) => is_silent = false,
            // Forgotten: it ended. What it did is looked at by whoever asked for it.
            Err(Fault::NotFound(_)) => return Ok(Ok(())),
            Err(fault @ (Fault::NotAuthenticated | Fault::NoPermission(_))) => {
                return Err(refused("asking how the task stands")(fault));
            }
            Err(fault) => {
                if !is_silent {
                    context.log(format!("{fault}: asking again until it answers"))?;
                }
                is_silent = true;
            }
        }
        tick()?;
        if limit.is_some_and(|limit| since.elapsed() > limit) {
            return Err(StepError::failed(format!(
                "vCenter still works on task {} after {} s: look at it there",
                task.0,
                since.elapsed().as_secs()
            )));
        }
        context.wait(context.outside.patience.poll)?;
    }
}

/// Waits for whatever vCenter still does with the cluster.
pub fn settle(
    context: &Context,
    link: &Link,
    cluster: &Moid,
    limit: Option<Duration>,
) -> Result<(), StepError> {
    let open = link
        .api
        .cluster_tasks(cluster)
        .map_err(refused("asking for the cluster's tasks"))?;
    for task in open {
        context.log(format!("waiting for task {} of vCenter", task.0))?;
        // How it ended is seen in what it did.
        let _ = wait_for(context, link, &task, limit, &mut || Ok(()))?;
    }
    Ok(())
}
