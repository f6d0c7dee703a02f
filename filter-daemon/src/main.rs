//! The host daemon as a program of its own, as a host installs it.

use clap::Parser;

#[derive(Parser)]
#[command(
    version,
    about = "jetdr's host daemon: streams the lanes of this host to a DR appliance"
)]
struct Cli {
    #[command(flatten)]
    args: filter_daemon::Args,
}

fn main() -> anyhow::Result<()> {
    if fault::listed_on_request() {
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    filter_daemon::run(&Cli::parse().args)
}
