//! The recovery appliance: turns a cut of a container back into disks.
//!
//! A thin shell around `recovery_store`: `recover` writes disks, `verify` reads everything and says
//! what is wrong, `list` shows the cuts. Invariant: a file under its final name is complete; what is
//! unfinished has another name and is taken up again by the next run.
#![warn(missing_docs)]

mod list;
mod output;
mod plan;
mod progress;
mod recover;
mod verify;
mod vmdk;

pub use plan::file_stem;
pub use progress::Progress;
pub use recover::{Format, RecoverReport, RecoverRequest, RecoveredDisk, recover};

use anyhow::Context;
use clap::{Args as ClapArgs, Subcommand};
use recovery_store::{CutSelector, StoreUrl};
use std::path::PathBuf;
use std::process::ExitCode;

/// The command line of the recovery appliance.
#[derive(ClapArgs, Debug, Clone)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the recovery appliance does.
#[derive(Subcommand, Debug, Clone)]
pub enum Command {
    /// Write the disks of a cut as files
    Recover(RecoverArgs),
    /// Read everything in a container and say what is wrong with it
    Verify(VerifyArgs),
    /// Show the cuts of a container
    List(ListArgs),
}

/// Where the container is.
#[derive(ClapArgs, Debug, Clone)]
pub struct StoreArgs {
    /// The container: DIR, file:///DIR, az://CONTAINER[/PREFIX], azure+http://HOST:PORT/ACCOUNT/CONTAINER or s3://BUCKET[/PREFIX]
    #[arg(long, value_name = "URL")]
    pub from: String,
    /// An option of the store, such as account=..., key=... or region=...; else AZURE_STORAGE_* or AWS_* from the environment
    #[arg(long = "store-opt", value_name = "KEY=VALUE")]
    pub store_opt: Vec<String>,
}

impl StoreArgs {
    /// The parsed location.
    pub fn url(&self) -> anyhow::Result<StoreUrl> {
        let options: Result<Vec<_>, _> = self
            .store_opt
            .iter()
            .map(|option| StoreUrl::parse_option(option))
            .collect();
        Ok(StoreUrl::parse(&self.from, &options?)?)
    }
}

/// `recover`
#[derive(ClapArgs, Debug, Clone)]
pub struct RecoverArgs {
    /// The container.
    #[command(flatten)]
    pub store: StoreArgs,
    /// The folder for the disks; made if it is not there
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The cut: its number, its name, or `latest`
    #[arg(long, value_name = "N|NAME|latest", default_value = "latest")]
    pub cut: String,
    /// Only these disks, by name, VM/NAME or UUID; else all
    #[arg(long = "disk", value_name = "NAME|UUID")]
    pub disks: Vec<String>,
    /// The form of the disks
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub format: Format,
    /// Replace files that are there
    #[arg(long)]
    pub force: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `verify`
#[derive(ClapArgs, Debug, Clone)]
pub struct VerifyArgs {
    /// The container.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `list`
#[derive(ClapArgs, Debug, Clone)]
pub struct ListArgs {
    /// The container.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Does what the command line says. The exit code is not 0 if a container that was verified is bad.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(async {
        match args.command {
            Command::Recover(args) => recover_command(args).await,
            Command::Verify(args) => verify::run(args).await,
            Command::List(args) => list::run(args).await,
        }
    })
}

async fn recover_command(args: RecoverArgs) -> anyhow::Result<ExitCode> {
    let progress = Progress::for_people(args.json);
    let cut = match args.cut.parse::<CutSelector>() {
        Ok(cut) => cut,
        Err(never) => match never {},
    };
    let request = RecoverRequest {
        from: args.store.url()?,
        out: args.out,
        cut,
        disks: args.disks,
        format: args.format,
        force: args.force,
    };
    let report = recover(&request, &progress).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        for disk in &report.disks {
            println!(
                "recovered {} of {} ({}, {} of data) to {}",
                disk.name,
                disk.vm_name,
                progress::bytes(disk.capacity_bytes),
                progress::bytes(disk.data_bytes),
                disk.path.display()
            );
        }
        let name = match &report.cut_name {
            Some(name) => format!(" ({name:?})"),
            None => String::new(),
        };
        println!(
            "cut {}{name} of {}: {} disk(s) in {:.1} s",
            report.cut,
            list::time(report.cut_time_ns),
            report.disks.len(),
            report.seconds
        );
    }
    Ok(ExitCode::SUCCESS)
}
