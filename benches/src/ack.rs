//! What write-through costs: the same guest with `ack = log` and with `ack = host`.
//!
//! Invariant: the runs alternate, on disks of the same length under the same filter; a run in which
//! write-through was given up is an error.

use crate::Settings;
use crate::fio::{self, Reached};
use crate::path::check_tools;
use crate::process::wait_for;
use crate::report::Measurement;
use crate::stack::{Stack, Vm};
use anyhow::Context;
use std::time::Duration;

const DISK_BYTES: u64 = 256 << 20;
/// The alarm that write-through was given up (include/iofilter.h).
const FALLBACK: u64 = 0x20;

fn has_fallen_back(vm: &Vm) -> anyhow::Result<bool> {
    let alarms = vm.disk_status()?["alarms"].as_u64().context("no alarms")?;
    Ok(alarms & FALLBACK != 0)
}

/// fio with each of the two; the log and the store on the machine's disk.
pub fn measure(settings: &Settings) -> anyhow::Result<Vec<Measurement>> {
    check_tools(&["fio"])?;
    let stack = Stack::start(settings, DISK_BYTES)?;
    let properties = ["jetdr.ack=log", "jetdr.ack-budget-us=1000000"];
    let through = stack.add_vm(settings, "through", DISK_BYTES, false, &properties)?;
    wait_for("write-through", Duration::from_secs(60), || {
        fio::run(fio::PACED, &through.uri, DISK_BYTES, 2, None)?;
        Ok((!has_fallen_back(&through)?).then_some(()))
    })?;
    let mut found = Vec::new();
    for job in [fio::PACED, fio::DEPTH_1, fio::DEPTH_16] {
        let (mut log, mut host) = (Vec::new(), Vec::new());
        for _ in 0..settings.runs {
            let go = |vm: &Vm| fio::run(job, &vm.uri, DISK_BYTES, settings.seconds, None);
            host.push(go(&stack.protected)?);
            stack.settle_all()?;
            log.push(go(&through)?);
            anyhow::ensure!(!has_fallen_back(&through)?, "write-through was given up");
            stack.settle_all()?;
        }
        let pick = |of: &[Reached], f: fn(&Reached) -> f64| of.iter().map(f).collect::<Vec<_>>();
        let line = |what: &str, unit, figure: fn(&Reached) -> f64| {
            let (log, host) = (pick(&log, figure), pick(&host, figure));
            let name = format!("{}, ack = log: {what}", job.name);
            Measurement::compared("ack", name, unit, &log, "ack = host", &host, None)
        };
        found.push(line("IOPS", "IOPS", |r| r.per_second));
        found.push(line("p50", "us", |r| r.p50_us));
        found.push(line("p99", "us", |r| r.p99_us));
    }
    Ok(found)
}
