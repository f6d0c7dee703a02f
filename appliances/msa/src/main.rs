//! The management server as a program of its own.

use clap::Parser;

#[derive(Parser)]
#[command(version, about = "jetdr's management server")]
struct Cli {
    #[command(subcommand)]
    command: msa::Command,
}

fn main() -> anyhow::Result<()> {
    if fault::listed_on_request() {
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    msa::run(&Cli::parse().command)
}
