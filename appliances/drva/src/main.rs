//! The DR appliance as a program of its own.

use clap::Parser;

#[derive(Parser)]
#[command(version, about = "jetdr's DR appliance")]
struct Cli {
    #[command(flatten)]
    args: drva::Args,
}

fn main() -> anyhow::Result<()> {
    if fault::listed_on_request() {
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    drva::run(&Cli::parse().args)
}
