//! The simulated cluster as a program of its own.

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: simcluster::cli::Command,
}

fn main() -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("JETDR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .init();
    simcluster::cli::run(&Cli::parse().command)
}
