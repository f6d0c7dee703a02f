//! What comes next in an execution: decided from its journal alone.
//!
//! Invariant: forwards, a step begins only when all before it are done; backwards, a step is taken back
//! only when all after it are; and an execution ends only with all steps done, or with none.

use super::table::{Outcome, State, StepState};

/// Which way an execution goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To its end.
    Forward,
    /// Back to where nothing of it was done, and why.
    Back(Outcome),
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Note that a step is begun.
    Begin(usize),
    /// Do a step that is noted as begun.
    Run(usize),
    /// Take a step back.
    Undo(usize),
    /// It is over.
    Finish(State),
}

/// What is to be done now.
pub fn next(direction: Direction, steps: &[StepState]) -> Action {
    match direction {
        Direction::Forward => {
            let first = steps.iter().position(|step| *step != StepState::Done);
            match first.map(|at| (at, steps.get(at))) {
                None => Action::Finish(State::Succeeded),
                Some((at, Some(StepState::Begun))) => Action::Run(at),
                Some((at, _)) => Action::Begin(at),
            }
        }
        Direction::Back(outcome) => {
            let open = |step: &StepState| matches!(step, StepState::Begun | StepState::Done);
            match steps.iter().rposition(open) {
                Some(at) => Action::Undo(at),
                None => Action::Finish(outcome.state()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use StepState::{Begun, Done, Pending, Undone};

    #[test]
    fn forwards_in_order_backwards_in_reverse() {
        let forward = |steps: &[StepState]| next(Direction::Forward, steps);
        assert_eq!(forward(&[Pending, Pending]), Action::Begin(0));
        assert_eq!(forward(&[Begun, Pending]), Action::Run(0));
        assert_eq!(forward(&[Done, Pending]), Action::Begin(1));
        assert_eq!(forward(&[Done, Begun]), Action::Run(1));
        assert_eq!(forward(&[Done, Done]), Action::Finish(State::Succeeded));
        assert_eq!(forward(&[]), Action::Finish(State::Succeeded));
        let back = |steps: &[StepState]| next(Direction::Back(Outcome::Failed), steps);
        assert_eq!(back(&[Done, Begun, Pending]), Action::Undo(1));
        assert_eq!(back(&[Done, Undone, Pending]), Action::Undo(0));
        assert_eq!(
            back(&[Undone, Undone, Pending]),
            Action::Finish(State::Failed)
        );
        assert_eq!(back(&[]), Action::Finish(State::Failed));
    }
}
