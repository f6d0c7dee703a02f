//! What a guest notices of a sync of its disk, and how fast the sync is.
//!
//! Invariant: the same guest is measured during the sync and after it, on the same disk, when
//! everything of the sync is stored; a run whose sync ended before the guest did is an error. Where
//! guest and VM share a core, with all that the filter does in the VM's process, daemon and appliance
//! have the other one.

use crate::Settings;
use crate::fio::{self, Job, Reached};
use crate::path::check_tools;
use crate::process::{Placement, pin, wait_for};
use crate::report::{Goal, Measurement};
use crate::stack::{Stack, Vm};
use anyhow::Context;
use std::time::{Duration, Instant};

const DISK_BYTES: u64 = 2 << 30;
/// The disks that the stack always has; these tests leave them alone.
const OTHER_BYTES: u64 = 16 << 20;
const MIB: f64 = 1048576.0;
const SYNC_LIMIT: Duration = Duration::from_secs(900);
/// A floor that nothing reaches: the sync does not yield.
const UNPACED: &str = "jetdr.sync-floor-bytes-s=1099511627776";

fn dirty_bytes(vm: &Vm) -> anyhow::Result<u64> {
    let status = vm.disk_status()?;
    status["dirty_bytes"].as_u64().context("no dirty_bytes")
}

fn wait_synced(vm: &Vm) -> anyhow::Result<()> {
    wait_for("the sync to end", SYNC_LIMIT, || {
        Ok((vm.disk_status()?["state"] == "streaming").then_some(()))
    })
}

#[derive(Default)]
struct Runs {
    during: Vec<Reached>,
    after: Vec<Reached>,
    /// MiB/s of the sync beside the guest.
    speed: Vec<f64>,
}

fn busy(
    settings: &Settings,
    job: Job,
    properties: &[&str],
    placement: Placement,
) -> anyhow::Result<Runs> {
    let mut runs = Runs::default();
    for _ in 0..settings.runs {
        let stack = Stack::start(settings, OTHER_BYTES)?;
        let vm = stack.add_vm(settings, "synced", DISK_BYTES, true, properties)?;
        let core = placement.client();
        if core.is_some() {
            stack.stand_apart()?;
            pin(vm.pid, core)?;
        }
        let go = || fio::run(job, &vm.uri, DISK_BYTES, settings.seconds, core);
        let (from, before) = (Instant::now(), dirty_bytes(&vm)?);
        runs.during.push(go()?);
        let left = dirty_bytes(&vm)?;
        let synced = before.saturating_sub(left) as f64 / MIB;
        runs.speed.push(synced / from.elapsed().as_secs_f64());
        // A sync that does not yield is soon over; then the figure is better than it deserves.
        anyhow::ensure!(
            left > 0 || properties.contains(&UNPACED),
            "the sync ended before the guest did"
        );
        wait_synced(&vm)?;
        stack.settle_all()?;
        runs.after.push(go()?);
        eprintln!(
            "{}: {:?} during, {:?} after, {} MiB left, in {:?}",
            job.name,
            runs.during.last(),
            runs.after.last(),
            left >> 20,
            from.elapsed()
        );
    }
    Ok(runs)
}

/// MiB/s of a sync of a disk that nobody uses.
fn idle(settings: &Settings) -> anyhow::Result<f64> {
    let stack = Stack::start(settings, OTHER_BYTES)?;
    let from = Instant::now();
    let vm = stack.add_vm(settings, "synced", DISK_BYTES, true, &[])?;
    // Filling the disk is not part of it.
    let filled = from.elapsed();
    let (from, before) = (Instant::now(), dirty_bytes(&vm)?);
    wait_synced(&vm)?;
    let seconds = from.elapsed().as_secs_f64();
    anyhow::ensure!(seconds > 0.1, "too fast to measure, filled in {filled:?}");
    Ok(before as f64 / MIB / seconds)
}

/// A guest during a sync beside itself without one, and the sync's speed.
fn beside(
    settings: &Settings,
    job: Job,
    name: &str,
    properties: &[&str],
    (placement, goal): (Placement, Option<Goal>),
) -> anyhow::Result<Vec<Measurement>> {
    let runs = busy(settings, job, properties, placement)?;
    let pick = |of: &[Reached], f: fn(&Reached) -> f64| of.iter().map(f).collect::<Vec<_>>();
    let line = |what: &str, figure: fn(&Reached) -> f64, goal| {
        let (during, after) = (pick(&runs.during, figure), pick(&runs.after, figure));
        let name = format!("{}, sync {name}: {what}", job.name);
        Measurement::compared("sync", name, "us", &during, "no sync", &after, goal)
    };
    let speed = format!("{}, sync {name}: its speed", job.name);
    Ok(vec![
        line("p50", |r| r.p50_us, None),
        line("p99", |r| r.p99_us, goal),
        Measurement::alone("sync", speed, "MiB/s", &runs.speed, None),
    ])
}

fn beside_nobody(settings: &Settings) -> anyhow::Result<Measurement> {
    let idle: Vec<_> = (0..settings.runs)
        .map(|_| idle(settings))
        .collect::<anyhow::Result<_>>()?;
    let name = "idle guest: the sync's speed";
    Ok(Measurement::alone("sync", name, "MiB/s", &idle, None))
}

/// What a p99 may rise to.
const GOAL: Option<Goal> = Some(Goal::RatioAtMost(1.2));

/// Guests of 2,000 I/Os per second, their disk synced meanwhile.
pub fn measure(settings: &Settings) -> anyhow::Result<Vec<Measurement>> {
    check_tools(&["fio"])?;
    let mut found = Vec::new();
    for job in [fio::PACED, fio::PACED_READS] {
        let together = "yielding, guest and VM on one core";
        let free = Placement::Free;
        found.extend(beside(settings, job, "yielding", &[], (free, GOAL))?);
        found.extend(beside(
            settings,
            job,
            together,
            &[],
            (Placement::Together, GOAL),
        )?);
        found.extend(beside(
            settings,
            job,
            "not yielding",
            &[UNPACED],
            (free, None),
        )?);
    }
    found.push(beside_nobody(settings)?);
    Ok(found)
}

/// The same as far as it is a figure of reliability: a sync yields.
pub fn measure_yielding(settings: &Settings) -> anyhow::Result<Vec<Measurement>> {
    check_tools(&["fio"])?;
    let mut found = Vec::new();
    for job in [fio::PACED, fio::PACED_READS] {
        let placement = Placement::Free;
        found.extend(beside(settings, job, "yielding", &[], (placement, GOAL))?);
    }
    found.push(beside_nobody(settings)?);
    Ok(found)
}
