//! `simulator`: runs seeds until one violates a promise, and says how to see it.

use clap::Parser;
use filter_core::mutant;
use simulator::many::{Total, run};
use std::process::ExitCode;

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
    /// Takes these guards out, for all seeds.
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// List the guards: name, what it does, and if it stands behind others, which and why (by tabs).
    #[arg(long)]
    guards: bool,
    /// Print nothing but the first violation.
    #[arg(long)]
    brief: bool,
    /// Print the total so far after each so many seeds; 0: never.
    #[arg(long, default_value_t = 0)]
    every: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.guards {
        for (guard, what) in mutant::ALL {
            let behind = mutant::BEHIND.iter().find(|(of, ..)| of == guard);
            let names = behind.map_or(Vec::new(), |(_, with, _)| {
                with.iter().map(|with| format!("{with:?}")).collect()
            });
            let why = behind.map_or("", |(.., why)| why);
            println!("{guard:?}\t{what}\t{}\t{why}", names.join(","));
        }
        return ExitCode::SUCCESS;
    }
    if let Err(error) = take_out(&args.without) {
        eprintln!("{error}");
        return ExitCode::from(2);
    }
    // A panic in the product is a violation of its seed: the thread that meets it says which.
    if !args.trace {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let seeds = args.first_seed..args.first_seed.saturating_add(args.seeds);
    let total = run(seeds, args.jobs, args.trace, |total| {
        if args.every > 0 && total.seeds.is_multiple_of(args.every) {
            println!("{total}");
        }
    });
    if !args.brief {
        print(&total);
    }
    let Some(outcome) = total.failed else {
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

fn print(total: &Total) {
    println!("{total}");
    for (what, count) in &total.counts {
        println!("  {count:>10}  {what}");
    }
    for kind in total.never() {
        println!("  NEVER       {kind}");
    }
}

fn take_out(names: &[String]) -> Result<(), String> {
    for name in names {
        let mut all = mutant::ALL.iter().map(|(guard, _)| *guard);
        let found = all.find(|guard| format!("{guard:?}") == *name);
        mutant::take_out(found.ok_or_else(|| format!("there is no guard `{name}`"))?);
    }
    Ok(())
}
