//! `jetdr`, the operator's command: starts the parts one by one, protects a disk, shows the whole.

mod commands;
mod demo;
mod install;
mod parts;
mod protect;
mod vib;
mod vms;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Continuous data protection for virtual machines.
#[derive(Parser)]
#[command(name = "jetdr", version = env!("JETDR_VERSION"), about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show all of it: protect a VM of two disks, kill it under load, recover, compare.
    Demo(demo::Args),
    /// Protect an existing raw disk: serve it over NBD, replicated to a folder or an object store.
    Protect(protect::Args),
    /// The DR appliance: receives, logs durably, writes cuts to the object store.
    Drva(drva::Args),
    /// The host daemon: streams the lanes of this host to a DR appliance.
    Filterd(filter_daemon::Args),
    /// The management server: state, certificates, REST, executions.
    Msa {
        #[command(subcommand)]
        command: msa::Command,
    },
    /// Get the certificate of a host, an appliance or a user by an enrolment token.
    Enrol(enrol::command::Args),
    /// The recovery appliance: list, verify, recover.
    Rocva(rocva::Args),
    /// The host's package: build, bundle, inspect, verify, sign.
    Vib {
        #[command(subcommand)]
        command: vib::Command,
    },
    /// Install the management server on this machine, and what it needs in vCenter; enable a cluster.
    Install(Box<install::InstallArgs>),
    /// Remove the management server that was installed here, from all clusters and from vCenter.
    Uninstall(install::UninstallArgs),
    /// Look whether clusters can be protected; changes nothing.
    Preflight {
        #[command(subcommand)]
        command: commands::Preflight,
    },
    /// Install the host component on a cluster.
    EnableCluster(commands::EnableCluster),
    /// Remove it from a cluster.
    DisableCluster(commands::DisableCluster),
    /// Put another version of it on an enabled cluster, host by host.
    UpgradeCluster(commands::UpgradeCluster),
    /// Try the hosts of an enabled cluster again that failed.
    ResolveCluster(commands::ResolveCluster),
    /// Bring the machines that the management server knows in step with vCenter.
    RefreshInventory(commands::Run),
    /// Protect machines of enabled clusters in a domain.
    ProtectVm(vms::ProtectVm),
    /// Pause the protection of machines: changes are tracked, nothing is sent.
    PauseVm(vms::OfVms),
    /// Resume it: what changed meanwhile is sent.
    ResumeVm(vms::OfVms),
    /// End the protection of machines; what is in the store stays.
    UnprotectVm(vms::UnprotectVm),
    /// Show how domains and their machines stand, and what can be recovered.
    Protection(vms::Protection),
    /// Give the management server a package for hosts.
    UploadPackage(commands::UploadPackage),
    /// The simulated host.
    Simhost {
        #[command(subcommand)]
        command: simhost::cli::Command,
    },
    /// The simulated cluster: a vCenter and its hosts.
    Simcluster {
        #[command(subcommand)]
        command: simcluster::cli::Command,
    },
}

fn main() -> ExitCode {
    if fault::listed_on_request() {
        return ExitCode::SUCCESS;
    }
    let filter = tracing_subscriber::EnvFilter::try_from_env("JETDR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .with_ansi(colour)
        .with_target(false)
        .init();
    let outcome = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Protect(args) => protect::run(&args),
        Command::Drva(args) => drva::run(&args),
        Command::Filterd(args) => filter_daemon::run(&args),
        Command::Msa { command } => msa::run(&command),
        Command::Enrol(args) => enrol::command::run(&args),
        Command::Rocva(args) => return recovery(args),
        Command::Install(args) => return coded(install::install(&args)),
        Command::Uninstall(args) => return coded(install::uninstall(&args)),
        Command::Preflight { command } => return coded(commands::preflight(&command)),
        Command::EnableCluster(args) => return coded(commands::enable(&args)),
        Command::DisableCluster(args) => return coded(commands::disable(&args)),
        Command::UpgradeCluster(args) => return coded(commands::upgrade(&args)),
        Command::ResolveCluster(args) => return coded(commands::resolve(&args)),
        Command::UploadPackage(args) => commands::upload(&args),
        Command::ProtectVm(args) => return coded(vms::protect(&args)),
        Command::UnprotectVm(args) => return coded(vms::unprotect(&args)),
        Command::PauseVm(args) => return coded(vms::pause(&args)),
        Command::ResumeVm(args) => return coded(vms::resume(&args)),
        Command::RefreshInventory(run) => return coded(vms::refresh(&run)),
        Command::Protection(args) => return coded(vms::show(&args)),
        Command::Vib { command } => return coded(vib::run(command)),
        Command::Simhost { command } => simhost::cli::run(&command),
        Command::Simcluster { command } => simcluster::cli::run(&command),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("jetdr: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The recovery appliance tells by its exit code what it found.
fn recovery(args: rocva::Args) -> ExitCode {
    coded(rocva::run(args))
}

/// A command whose exit code says more than whether it failed.
fn coded(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("jetdr: {error:#}");
        ExitCode::FAILURE
    })
}
