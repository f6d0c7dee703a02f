//! The kill matrix: each part of the product is killed or taken away in each state of a disk, under
//! verified loads; in the end guests, disks, store and cuts agree, and no guest was held up.
//!
//! A test run takes one cell of each row, chosen by the commit; `make chaos` takes all.
#![allow(clippy::unwrap_used)]

#[path = "../recovery-store/tests/support/azurite.rs"]
mod azurite;
#[path = "chaos/cell.rs"]
mod cell;
#[path = "chaos/load.rs"]
mod load;
#[path = "chaos/migrating.rs"]
mod migrating;
#[path = "chaos/store.rs"]
mod store;
mod support;
#[path = "chaos/witness.rs"]
mod witness;

use std::io::Write;

/// What goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Vm,
    Daemon,
    Appliance,
    Host,
    Store,
    Link,
}

/// When it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Streaming,
    Tracking,
    Syncing,
    Attaching,
    /// The VM is on its way to another host, at a point of the source; the victim is there.
    MigratingOut,
    /// The same at the destination.
    MigratingIn,
}

const VICTIMS: [Victim; 6] = [
    Victim::Vm,
    Victim::Daemon,
    Victim::Appliance,
    Victim::Host,
    Victim::Store,
    Victim::Link,
];
const STATES: [State; 7] = [
    State::Idle,
    State::Streaming,
    State::Tracking,
    State::Syncing,
    State::Attaching,
    State::MigratingOut,
    State::MigratingIn,
];

impl State {
    const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Streaming => "streaming",
            Self::Tracking => "tracking",
            Self::Syncing => "syncing",
            Self::Attaching => "attaching",
            Self::MigratingOut => "migrating, source",
            Self::MigratingIn => "migrating, destination",
        }
    }
}

/// JETDR_SEED, or a number that is the commit's own.
fn seed() -> u64 {
    let given = std::env::var("JETDR_SEED").ok();
    let given = given.and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let mut git = std::process::Command::new("git");
        git.args(["-c", "safe.directory=*", "rev-parse", "--short=8", "HEAD"]);
        let commit = git.output().map(|output| output.stdout).unwrap_or_default();
        let commit = String::from_utf8_lossy(&commit).trim().to_string();
        u64::from_str_radix(&commit, 16).unwrap_or(7)
    });
    println!("JETDR_SEED={seed}");
    seed
}

/// Runs a cell and notes its row: on the console, and in the file that `JETDR_CHAOS_TABLE` names.
fn run(victim: Victim, state: State, seed: u64) {
    println!("{victim:?} while {state:?}, seed {seed}");
    let outcome = match state {
        State::MigratingOut | State::MigratingIn => migrating::run(victim, state, seed),
        _ => cell::run(victim, state, seed),
    };
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let row = format!(
        "| {} | {} | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} |",
        format!("{victim:?}").to_lowercase(),
        state.name(),
        outcome.note,
        outcome.writes,
        ms(outcome.deferred_max),
        ms(outcome.allowed),
        ms(outcome.slowest_write),
        outcome.took.as_secs_f64(),
    );
    println!("{row}");
    if let Some(path) = std::env::var_os("JETDR_CHAOS_TABLE") {
        let mut table = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        writeln!(table, "{row}").unwrap();
    }
}

/// One state of a row, or all of them for a number of rounds.
fn row(victim: Victim) {
    let seed = seed();
    let rounds = std::env::var("JETDR_CHAOS_ROUNDS").ok();
    let Some(rounds) = rounds.and_then(|text| text.parse::<u64>().ok()) else {
        let at = VICTIMS.iter().position(|known| *known == victim).unwrap();
        return run(victim, STATES[(seed as usize + at) % STATES.len()], seed);
    };
    for round in 0..rounds {
        for state in STATES {
            run(victim, state, seed + round);
        }
    }
}

#[test]
fn a_vm_is_killed() {
    row(Victim::Vm);
}

#[test]
fn a_daemon_is_killed() {
    row(Victim::Daemon);
}

#[test]
fn an_appliance_is_killed() {
    row(Victim::Appliance);
}

#[test]
fn a_host_crashes() {
    row(Victim::Host);
}

#[test]
fn a_store_goes_away_and_comes_back() {
    row(Victim::Store);
}

#[test]
fn a_link_breaks() {
    row(Victim::Link);
}
