//! The simulated host as a program of its own, for its tests.

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: simhost::cli::Command,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    simhost::cli::run(&Cli::parse().command)
}
