//! The kill matrix: each part of the product is killed or taken away in each state of a disk, under
//! verified loads; in the end guests, disks, store and cuts agree, and no guest was held up.
//!
//! A test run takes one cell of each row, chosen by the commit; `make chaos` takes all.
#![allow(clippy::unwrap_used)]

#[path = "chaos/cell.rs"]
mod cell;
mod support;
#[path = "chaos/witness.rs"]
mod witness;

use cell::{STATES, State, VICTIMS, Victim};
use std::io::Write;

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
    let outcome = cell::run(victim, state, seed);
    let row = format!(
        "{:<10} {:<10} {:>8} {:>10.1} {:>10.1} {:>10.1} {:>7.1}",
        format!("{victim:?}").to_lowercase(),
        format!("{state:?}").to_lowercase(),
        outcome.writes,
        outcome.deferred_max.as_secs_f64() * 1e3,
        outcome.allowed.as_secs_f64() * 1e3,
        outcome.slowest_write.as_secs_f64() * 1e3,
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
