//! Executions: what an operator lets the server do, by name, one at a time, in the order submitted.
//!
//! [`operation`] says what an operation is: steps that may be done twice and taken back. [`plan`]
//! decides what comes next from the journal alone; [`engine`] does it and notes it; [`table`] is the
//! journal and the queue. [`backup`] and [`selfcheck`] are the operations that there are.
//!
//! Invariant: whenever the process dies, what the journal says is enough to go on or to roll back: a
//! step is noted as begun before it does anything, and as done after it has done all.

pub mod backup;
pub mod engine;
pub mod operation;
pub mod plan;
pub mod selfcheck;
pub mod table;

pub use engine::Engine;
pub use operation::{AfterRestart, Context, Kind, Operation, Registry, StepError};
