//! How one seed differs from another: which faults strike and how often, how large the disks are, how
//! the guests write, how quick everything usually is.
//!
//! Invariant: a seed's habits hold for all of its first phase. Where every seed had the same mix most
//! states would be seldom met; where each leaves something out, and does something else much too often,
//! they are met in some.

use crate::faults::{STRIKES, Strike};
use crate::numbers::Numbers;
use crate::world::{MS, Pace, US};

/// What is usual in a seed.
#[derive(Clone, Debug)]
pub struct Habits {
    /// What strikes, with how often relative to the others.
    pub strikes: Vec<(Strike, u64)>,
    /// The most strikes of a burst.
    pub most_strikes: u64,
    /// The usual pace.
    pub pace: Pace,
    /// Units of a disk, at least and at most.
    pub units: (u64, u64),
    /// Of 1000 I/Os of a guest, how many are flushes.
    pub flushes: u64,
    /// Of 1000 writes of a guest, how many go to the disk's first units.
    pub hot: u64,
    /// How many units those are.
    pub hot_units: u64,
    /// Bursts may have many large writes.
    pub heavy: bool,
    /// I/Os that a guest has in flight on a disk, at most.
    pub depth: usize,
}

impl Habits {
    /// Of a seed.
    pub fn new(numbers: &mut Numbers) -> Self {
        let smallest = numbers.spread(20, 400);
        let sometimes = |numbers: &mut Numbers, most| match numbers.below(4) {
            0 => numbers.spread(100, most),
            _ => 100,
        };
        let pace = Pace {
            disk: sometimes(numbers, 1500),
            link: sometimes(numbers, 3000),
            log: sometimes(numbers, 3000),
            sidecar: sometimes(numbers, 3000),
        };
        Self {
            strikes: strikes(numbers),
            most_strikes: numbers.between(1, 6),
            pace,
            units: (smallest, smallest * numbers.between(1, 3)),
            flushes: numbers.pick(&[0, 5, 40, 40, 300]).unwrap_or(40),
            hot: numbers.pick(&[0, 0, 300, 900]).unwrap_or(0),
            hot_units: numbers.spread(4, 100),
            heavy: numbers.chance(150),
            depth: numbers.pick(&[2, 16, 16, 40]).unwrap_or(16),
        }
    }

    /// A burst of writes: the usual time between two of them in ns, of 1000 how many are large.
    pub fn burst(&self, numbers: &mut Numbers) -> (u64, u64) {
        match numbers.below(4) {
            0 if self.heavy => (300 * US, 300),
            1 if self.heavy => (MS, 100),
            0 => (500 * US, 5),
            _ => (numbers.spread(MS, 20 * MS), 15),
        }
    }
}

/// Each strike is left out, usual, or far too frequent.
fn strikes(numbers: &mut Numbers) -> Vec<(Strike, u64)> {
    let mut chosen: Vec<(Strike, u64)> = Vec::new();
    for (strike, usual) in STRIKES {
        let weight = match numbers.below(10) {
            0..=3 => 0,
            4..=7 => *usual,
            8 => usual * 4,
            _ => usual * 16,
        };
        if weight > 0 {
            chosen.push((*strike, weight));
        }
    }
    chosen
}
