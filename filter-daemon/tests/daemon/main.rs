//! The daemon as a process, between a real lane and a scripted appliance.
//!
//! Nothing here waits without a deadline, every port and folder is the test's own, and what is random
//! prints its seed (`JETDR_SEED` sets it).
#![allow(clippy::unwrap_used)]

mod appliance;
mod bases;
mod cuts;
mod delivery;
mod faults;
mod hashes;
mod hostile;
mod process;
mod refusals;
mod vm;

use std::time::{Duration, Instant};

/// What must happen, happens within this time, also on a machine that has much else to do.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `done` says so; `what` names what did not happen.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2)); // poll
    }
}

/// Numbers that look random and follow from a seed.
pub struct Numbers(pub u64);

impl Numbers {
    /// From `JETDR_SEED`, or `default`; says which.
    pub fn seeded(default: u64) -> Self {
        let seed = std::env::var("JETDR_SEED").ok();
        let seed = seed.and_then(|text| text.parse().ok()).unwrap_or(default);
        println!("JETDR_SEED={seed}");
        Self(seed | 1)
    }

    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
