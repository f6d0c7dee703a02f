//! Where an I/O stands between host and filter.
//!
//! Invariant: it moves only along these arrows, each by one compare-and-swap, so of several threads
//! that try exactly one wins; whoever asks for another move is refused.
//!
//! ```text
//! Starting --PASS--> Down --io_done PASS--> Ended
//!    |                 |----io_done DEFER--> Held --io_release--> Ended
//!    |                 \----(io_release before DEFER was returned)--> Released --> Ended
//!    |--DEFER--> Deferred --io_continue--> Down
//!    |               \-----io_complete--> Ended
//!    |--(before DEFER was returned) io_continue--> Continued --> Down
//!    |                              io_complete--> Completed --> Ended
//!    \--COMPLETE, FAIL--> Ended
//!
//! Deferred --io_abort begins--> Aborting --JIO_OK--> Ended, else back to Deferred
//! Held ------io_abort begins--> Aborting --JIO_OK--> Ended, else back to Held
//!    (answered meanwhile: Continued, Completed or Released, and on from there)
//! ```

use std::sync::atomic::{AtomicU8, Ordering};

/// Where an I/O stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum IoState {
    /// `io_start` is running.
    Starting,
    /// The filter continued it while `io_start` or `io_abort` ran.
    Continued,
    /// The filter completed it while `io_start` or `io_abort` ran.
    Completed,
    /// The filter holds it.
    Deferred,
    /// It is with the layers below, or its `io_done` is running.
    Down,
    /// The filter holds its completion.
    Held,
    /// The filter released the completion while `io_done` or `io_abort` ran.
    Released,
    /// It is deferred, and its `io_abort` is running.
    AbortingDeferred,
    /// Its completion is held, and its `io_abort` is running.
    AbortingHeld,
    /// The filter has nothing to do with it any more.
    Ended,
}

const STATES: [IoState; 10] = [
    IoState::Starting,
    IoState::Continued,
    IoState::Completed,
    IoState::Deferred,
    IoState::Down,
    IoState::Held,
    IoState::Released,
    IoState::AbortingDeferred,
    IoState::AbortingHeld,
    IoState::Ended,
];

/// An answer of the filter to an I/O that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// `io_continue`
    Continue,
    /// `io_complete`
    Complete,
    /// `io_release`
    Release,
}

/// What follows from an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// The I/O is now the caller's to carry on with.
    Take,
    /// The thread that is inside the filter with it carries on.
    Left,
    /// It may not be answered like this, in the state that is named.
    Refused(IoState),
}

/// The state of one I/O.
#[derive(Debug)]
pub struct IoCell(AtomicU8);

impl Default for IoCell {
    fn default() -> Self {
        Self(AtomicU8::new(IoState::Ended as u8))
    }
}

impl IoCell {
    /// The state now.
    pub fn get(&self) -> IoState {
        let raw = self.0.load(Ordering::Acquire);
        STATES.get(raw as usize).copied().unwrap_or(IoState::Ended)
    }

    /// Begins a new I/O, or ends one that is nobody else's.
    pub fn set(&self, to: IoState) {
        self.0.store(to as u8, Ordering::Release);
    }

    /// Moves from `from` to `to`; `false`: it stands elsewhere.
    pub fn step(&self, from: IoState, to: IoState) -> bool {
        let (from, to) = (from as u8, to as u8);
        self.0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// The filter answers.
    pub fn answer(&self, answer: Answer) -> Answered {
        use IoState as S;
        // The usual move, then those of an answer that overtakes a call of the filter.
        let (usual, early) = match answer {
            Answer::Continue => ((S::Deferred, S::Down), S::Continued),
            Answer::Complete => ((S::Deferred, S::Ended), S::Completed),
            Answer::Release => ((S::Held, S::Ended), S::Released),
        };
        let overtaken = match answer {
            Answer::Continue | Answer::Complete => [S::Starting, S::AbortingDeferred],
            Answer::Release => [S::Down, S::AbortingHeld],
        };
        // Twice: between two looks it may move from one of these states to another.
        for _ in 0..2 {
            if self.step(usual.0, usual.1) {
                return Answered::Take;
            }
            if overtaken.iter().any(|from| self.step(*from, early)) {
                return Answered::Left;
            }
        }
        Answered::Refused(self.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWERS: [Answer; 3] = [Answer::Continue, Answer::Complete, Answer::Release];

    /// Every state meets every answer: what is not an arrow of the picture is refused, and changes
    /// nothing.
    #[test]
    fn only_the_arrows_can_be_walked() {
        use IoState as S;
        let arrows = [
            (S::Starting, Answer::Continue, Answered::Left, S::Continued),
            (S::Starting, Answer::Complete, Answered::Left, S::Completed),
            (S::Deferred, Answer::Continue, Answered::Take, S::Down),
            (S::Deferred, Answer::Complete, Answered::Take, S::Ended),
            (S::Down, Answer::Release, Answered::Left, S::Released),
            (S::Held, Answer::Release, Answered::Take, S::Ended),
            (
                S::AbortingDeferred,
                Answer::Continue,
                Answered::Left,
                S::Continued,
            ),
            (
                S::AbortingDeferred,
                Answer::Complete,
                Answered::Left,
                S::Completed,
            ),
            (
                S::AbortingHeld,
                Answer::Release,
                Answered::Left,
                S::Released,
            ),
        ];
        let mut refused = 0;
        for state in STATES {
            for answer in ANSWERS {
                let cell = IoCell::default();
                cell.set(state);
                let got = cell.answer(answer);
                match arrows.iter().find(|(s, a, ..)| (*s, *a) == (state, answer)) {
                    Some((_, _, expected, to)) => {
                        assert_eq!((got, cell.get()), (*expected, *to), "{state:?} {answer:?}");
                    }
                    None => {
                        refused += 1;
                        assert_eq!(got, Answered::Refused(state), "{state:?} {answer:?}");
                        assert_eq!(cell.get(), state);
                    }
                }
            }
        }
        assert_eq!(refused, STATES.len() * ANSWERS.len() - arrows.len());
    }

    #[test]
    fn a_second_answer_finds_it_gone() {
        let cell = IoCell::default();
        cell.set(IoState::Deferred);
        assert_eq!(cell.answer(Answer::Complete), Answered::Take);
        let second = cell.answer(Answer::Complete);
        assert_eq!(second, Answered::Refused(IoState::Ended));
    }
}
