//! The whole path: what a guest notices of its protection, how fast data becomes durable, and what
//! it costs in memory.
//!
//! Invariant: the run with the filter and the run without it alternate, in the same placement, and
//! no run starts before the run before it is durable and stored.

use crate::Settings;
use crate::fio::{self, Job, Reached};
use crate::process::{Placement, Running, is_installed, resident_bytes, wait_for};
use crate::report::{Goal, Measurement};
use crate::stack::{Speak, Stack};
use anyhow::Context;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const DISK_BYTES: u64 = 256 << 20;
/// Written once, front to back, for the throughput.
const FILL_BYTES: u64 = 1 << 30;
const MIB: f64 = 1048576.0;
const NO_FILTER: &str = "no filter";
/// How long iperf3 may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);

/// What the filter should keep of each job's unprotected figure: more than QEMU's mirror keeps of
/// its own.
const JOBS: [(Job, Goal); 5] = [
    (fio::DEPTH_1, Goal::RatioAtLeast(0.75)),
    (fio::DEPTH_16, Goal::RatioAtLeast(0.55)),
    (fio::MIXED, Goal::RatioAtLeast(0.76)),
    (fio::SEQUENTIAL, Goal::RatioAtLeast(0.61)),
    (fio::PACED, Goal::RatioAtMost(1.5)),
];

pub(crate) fn check_tools(programs: &[&str]) -> anyhow::Result<()> {
    for program in programs {
        anyhow::ensure!(
            is_installed(program),
            "{program} is not installed: scripts/bootstrap.sh bench"
        );
    }
    Ok(())
}

/// The runs of one job in one placement.
#[derive(Default)]
struct Runs {
    with: Vec<Reached>,
    without: Vec<Reached>,
    /// Seconds from the end of the load until all of it was durable.
    behind: Vec<f64>,
    /// How often the disk fell back to tracking during the load.
    fallbacks: Vec<f64>,
}

fn alternate(
    stack: &Stack,
    settings: &Settings,
    job: Job,
    placement: Placement,
) -> anyhow::Result<Runs> {
    let mut runs = Runs::default();
    let go = |uri: &str| fio::run(job, uri, DISK_BYTES, settings.seconds, placement.client());
    for _ in 0..settings.runs {
        runs.without.push(go(&stack.bare.uri)?);
        let before = stack.tracking_count()?;
        runs.with.push(go(&stack.protected.uri)?);
        runs.fallbacks
            .push((stack.tracking_count()? - before) as f64);
        let ended = Instant::now();
        stack.wait_durable()?;
        runs.behind.push(ended.elapsed().as_secs_f64());
        stack.settle()?;
    }
    Ok(runs)
}

fn compared(job: Job, goal: Goal, placement: Placement, runs: &Runs) -> Vec<Measurement> {
    let pick = |figure: fn(&Reached) -> f64| {
        let of = |runs: &[Reached]| -> Vec<f64> { runs.iter().map(figure).collect() };
        (of(&runs.with), of(&runs.without))
    };
    let name = |what: &str| format!("{}{what}, {}", job.name, placement.name());
    let line = |what, unit, figure, goal| {
        let (with, without) = pick(figure);
        Measurement::compared("filter", name(what), unit, &with, NO_FILTER, &without, goal)
    };
    let paced = job.paced_per_second.is_some();
    let (rate_goal, latency_goal) = if paced {
        (None, Some(goal))
    } else {
        (Some(goal), None)
    };
    vec![
        line("", "IOPS", |r| r.per_second, rate_goal),
        line(": p99", "us", |r| r.p99_us, latency_goal),
        Measurement::alone("filter", name(": durable after"), "s", &runs.behind, None),
        Measurement::alone(
            "filter",
            name(": fell back to tracking"),
            "times",
            &runs.fallbacks,
            None,
        ),
    ]
}

/// fio with and without the filter, and the memory of the VM's process.
pub fn measure_filter(settings: &Settings) -> anyhow::Result<Vec<Measurement>> {
    check_tools(&["fio", "taskset"])?;
    let stack = Stack::start(settings, DISK_BYTES)?;
    let mut found = Vec::new();
    for (job, goal) in JOBS {
        for placement in [Placement::Together, Placement::Apart, Placement::Free] {
            if placement == Placement::Together && job != fio::DEPTH_1 {
                continue; // many under way, on one core: nothing but that core is measured
            }
            stack.place(placement)?;
            let runs = alternate(&stack, settings, job, placement)?;
            found.extend(compared(job, goal, placement, &runs));
        }
    }
    found.push(memory(&stack)?);
    Ok(found)
}

/// Both processes served the same jobs: what differs is the filter's.
fn memory(stack: &Stack) -> anyhow::Result<Measurement> {
    let with = resident_bytes(stack.protected.pid)? as f64 / MIB;
    let without = resident_bytes(stack.bare.pid)? as f64 / MIB;
    let goal = Some(Goal::ValueAtMost(16.0));
    Ok(Measurement::alone(
        "memory",
        "a disk's filter, in the VM's process",
        "MiB",
        &[with - without],
        goal,
    ))
}

/// MB/s of a stream through TCP on the loopback, the most that any path could reach.
fn iperf3(seconds: u32) -> anyhow::Result<f64> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut command = Command::new("iperf3");
    command.args(["-s", "-B", "127.0.0.1", "-p", &port.to_string()]);
    let mut server = Running::start("iperf3", command)?;
    wait_for("iperf3 to listen", LISTEN_LIMIT, || {
        server.check()?;
        Ok(TcpStream::connect(("127.0.0.1", port)).ok())
    })?;
    let output = Command::new("iperf3")
        .args([
            "-c",
            "127.0.0.1",
            "-J",
            "-p",
            &port.to_string(),
            "-t",
            &seconds.to_string(),
        ])
        .stdin(Stdio::null())
        .output()
        .context("start iperf3")?;
    let json: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("read iperf3's JSON")?;
    let bits = json["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3: {}", json["error"]))? / 8e6)
}

/// What a pass over the disk came to.
pub(crate) struct Filled {
    /// From the first byte that the guest sends to the last one's durable ack.
    pub(crate) mb_per_second: f64,
    /// Processor time of daemon and appliance meanwhile.
    pub(crate) cpu_s: f64,
}

/// One pass over the disk.
pub(crate) fn fill(settings: &Settings, speak: &Speak) -> anyhow::Result<Filled> {
    let stack = Stack::speaking(settings, FILL_BYTES, speak)?;
    let before_s = stack.processor_s()?;
    let started = Instant::now();
    fio::fill(&stack.protected.uri, FILL_BYTES)?;
    stack.wait_durable()?;
    Ok(Filled {
        mb_per_second: FILL_BYTES as f64 / 1e6 / started.elapsed().as_secs_f64(),
        cpu_s: stack.processor_s()? - before_s,
    })
}

/// From the guest to the durable ack, beside iperf3.
pub fn measure_throughput(settings: &Settings) -> anyhow::Result<Vec<Measurement>> {
    check_tools(&["fio", "iperf3"])?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..settings.runs {
        theirs.push(iperf3(settings.seconds)?);
        ours.push(fill(settings, &Speak::plain())?.mb_per_second);
    }
    let name = "1 GiB in a row, guest to durable ack";
    let beside = "iperf3 loopback";
    Ok(vec![Measurement::compared(
        "throughput",
        name,
        "MB/s",
        &ours,
        beside,
        &theirs,
        None,
    )])
}
