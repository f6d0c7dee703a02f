//! `bench`: runs the benchmarks, prints one table at the end, or JSON with `JSON=1`.

use benches::report::{Measurement, Report};
use benches::{Settings, ack, nbd_alone, path, producer, secure, sync};
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

/// Benchmarks of jetdr, each with its peer beside it.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Only these groups.
    #[arg(value_parser = GROUPS)]
    groups: Vec<String>,
    /// Runs of each side, interleaved; the median is shown.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,
    /// Seconds of each run.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// One short run of everything: shows that it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// The command that is measured; by default the one beside this program.
    #[arg(long, env = "JETDR")]
    jetdr: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Print rows of a table in Markdown: what was measured, the value, what it stands beside, their ratio.
    #[arg(long, conflicts_with = "json")]
    rows: bool,
}

/// The last is a part of `sync`: only on request.
const GROUPS: [&str; 8] = [
    "producer",
    "nbd",
    "filter",
    "throughput",
    "sync",
    "ack",
    "tls",
    "yield",
];

/// Writes of one run of the producer, per second of a run of the others.
const PRODUCER_WRITES_PER_SECOND: usize = 500_000;

impl Cli {
    fn settings(&self) -> anyhow::Result<Settings> {
        let beside = std::env::current_exe()?.with_file_name("jetdr");
        let (runs, seconds) = if self.quick {
            (1, 1)
        } else {
            (self.runs as usize, self.seconds)
        };
        Ok(Settings {
            runs,
            seconds,
            jetdr: self.jetdr.clone().unwrap_or(beside),
        })
    }

    /// `make bench JSON=1` sets the variable; an empty one or 0 is none.
    fn wants_json(&self) -> bool {
        self.json || std::env::var("JSON").is_ok_and(|value| !value.is_empty() && value != "0")
    }
}

fn measure(group: &str, settings: &Settings) -> anyhow::Result<Vec<Measurement>> {
    match group {
        "producer" => {
            // Its runs are short: more of them cost nothing and calm the median.
            let writes = PRODUCER_WRITES_PER_SECOND * settings.seconds as usize;
            producer::measure(settings.runs * 3, writes)
        }
        "nbd" => nbd_alone::measure(settings),
        "filter" => path::measure_filter(settings),
        "throughput" => path::measure_throughput(settings),
        "sync" => sync::measure(settings),
        "ack" => ack::measure(settings),
        "tls" => secure::measure(settings),
        "yield" => sync::measure_yielding(settings),
        _ => anyhow::bail!("there is no group `{group}`"),
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let settings = cli.settings()?;
    let mut report = Report::new();
    let chosen = |group: &str| match cli.groups.as_slice() {
        [] => group != "yield",
        groups => groups.iter().any(|of| of == group),
    };
    for group in GROUPS.into_iter().filter(|group| chosen(group)) {
        eprintln!(
            "measuring {group} ({} runs of {} s a job)",
            settings.runs, settings.seconds
        );
        match measure(group, &settings) {
            Ok(found) => report.measurements.extend(found),
            // The other groups are worth showing all the same.
            Err(error) => report.skipped.push(format!("{group}: {error:#}")),
        }
    }
    if cli.wants_json() {
        println!("{}", report.to_json()?);
    } else if cli.rows {
        print!("{}", report.to_rows());
    } else {
        println!("{}", report.to_table());
    }
    Ok(if report.skipped.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
