//! `simulator`: runs seeds until one violates a promise, and says how to see it.

use clap::Parser;
use simulator::faults::KINDS;
use simulator::run::{Outcome, hours, seed};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// The whole system in one thread and in virtual time, with faults of all kinds.
#[derive(Parser)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first_seed: u64,
    /// Print what happens (one seed, please).
    #[arg(long)]
    trace: bool,
    /// Threads, each with seeds of its own; 0: one a core.
    #[arg(long, default_value_t = 0)]
    jobs: usize,
    /// Takes this guard out (needs a build with the feature `mutants`).
    #[arg(long)]
    without: Option<String>,
    /// List the guards.
    #[arg(long)]
    guards: bool,
    /// Print nothing but the first violation.
    #[arg(long)]
    brief: bool,
}

#[derive(Default)]
struct Total {
    seeds: u64,
    simulated_ns: u64,
    longest_held_ns: u64,
    counts: BTreeMap<&'static str, u64>,
    failed: Option<Outcome>,
}

impl Total {
    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        self.simulated_ns += outcome.simulated_ns;
        self.longest_held_ns = self.longest_held_ns.max(outcome.longest_held_ns);
        for (what, count) in &outcome.counts {
            *self.counts.entry(what).or_default() += count;
        }
        let first = self.failed.as_ref().is_none_or(|f| outcome.seed < f.seed);
        if outcome.violation.is_some() && first {
            self.failed = Some(outcome);
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.guards {
        for (guard, what) in filter_core::mutant::ALL {
            println!("{guard:?}\t{what}");
        }
        return ExitCode::SUCCESS;
    }
    if let Err(error) = take_out(args.without.as_deref()) {
        eprintln!("{error}");
        return ExitCode::from(2);
    }
    // A panic in the product is a violation of its seed: the thread that meets it says which.
    std::panic::set_hook(Box::new(|_| {}));
    let began = Instant::now();
    let total = run(&args);
    let failed = total.failed.clone();
    if !args.brief {
        print(&total, began.elapsed().as_secs_f64());
    }
    let Some(outcome) = failed else {
        return ExitCode::SUCCESS;
    };
    let what = outcome.violation.unwrap_or_default();
    if args.brief {
        println!("{}\t{what}", outcome.seed);
    } else {
        println!("\nseed {} violates: {what}", outcome.seed);
        println!(
            "see it: target/release/simulator --seeds 1 --first-seed {} --trace",
            outcome.seed
        );
    }
    ExitCode::FAILURE
}

fn run(args: &Args) -> Total {
    let jobs = match args.jobs {
        _ if args.trace => 1,
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        jobs => jobs,
    };
    let next = AtomicU64::new(args.first_seed);
    let end = args.first_seed.saturating_add(args.seeds);
    let failed = AtomicBool::new(false);
    let total = Mutex::new(Total::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while !failed.load(Relaxed) {
                    let number = next.fetch_add(1, Relaxed);
                    if number >= end {
                        return;
                    }
                    let outcome = seed(number, args.trace);
                    failed.fetch_or(outcome.violation.is_some(), Relaxed);
                    if let Ok(mut total) = total.lock() {
                        total.add(outcome);
                    }
                }
            });
        }
    });
    total.into_inner().unwrap_or_default()
}

fn print(total: &Total, seconds: f64) {
    println!(
        "{} seeds, {:.0} simulated hours in {seconds:.1} s: {:.1} seeds/s; longest hold {:.2} ms",
        total.seeds,
        hours(total.simulated_ns),
        total.seeds as f64 / seconds,
        total.longest_held_ns as f64 / 1e6,
    );
    for (what, count) in &total.counts {
        println!("  {count:>10}  {what}");
    }
    for kind in KINDS {
        if total.counts.get(kind).copied().unwrap_or(0) == 0 {
            println!("  NEVER       {kind}");
        }
    }
}

#[cfg(feature = "mutants")]
fn take_out(name: Option<&str>) -> Result<(), String> {
    use filter_core::mutant;
    let Some(name) = name else { return Ok(()) };
    let mut all = mutant::ALL.iter().map(|(guard, _)| *guard);
    let found = all.find(|guard| format!("{guard:?}") == name);
    let guard = found.ok_or_else(|| format!("there is no guard `{name}`"))?;
    mutant::take_out(Some(guard));
    Ok(())
}

#[cfg(not(feature = "mutants"))]
fn take_out(name: Option<&str>) -> Result<(), String> {
    match name {
        None => Ok(()),
        Some(_) => {
            Err("no guard can be taken out of this build: see `make simulate-mutants`".into())
        }
    }
}
