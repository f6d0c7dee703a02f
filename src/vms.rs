//! The commands about machines: protect, pause, resume, unprotect, and how they stand.
//!
//! Invariant: a command that names several machines asks for them in one execution: all of it is done, or
//! none.

use crate::commands::{At, Given, Run, execute, text};
use anyhow::bail;
use enrol::http::Client;
use serde_json::Value;
use std::process::ExitCode;

/// What `protect-vm` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct ProtectVm {
    #[command(flatten)]
    run: Run,
    /// The domain.
    #[arg(long)]
    domain: String,
    /// A machine, by its name, instance UUID or id in vCenter; repeat it.
    #[arg(long = "vm", required = true)]
    vms: Vec<String>,
}

/// What `unprotect-vm` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct UnprotectVm {
    #[command(flatten)]
    run: Run,
    /// A machine, by its name, instance UUID or id in vCenter; repeat it.
    #[arg(long = "vm", required = true)]
    vms: Vec<String>,
    /// Wait so many seconds at most for a cut with everything that was written; 0: not at all.
    #[arg(long)]
    drain_s: Option<u64>,
}

/// What `pause-vm` and `resume-vm` take.
#[derive(clap::Args, Clone, Debug)]
pub struct OfVms {
    #[command(flatten)]
    run: Run,
    /// A machine, by its name, instance UUID or id in vCenter; repeat it.
    #[arg(long = "vm", required = true)]
    vms: Vec<String>,
}

/// What `protection` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Protection {
    #[command(flatten)]
    at: At,
    /// The domain; without it, all.
    #[arg(long)]
    domain: Option<String>,
    /// Print the server's documents instead, one a line.
    #[arg(long)]
    json: bool,
}

/// Protects machines.
pub fn protect(args: &ProtectVm) -> anyhow::Result<ExitCode> {
    let given = Given::new(&args.run)
        .of("domain", &args.domain)
        .of("vms", &args.vms);
    execute(&args.run, "protect-vms", given)
}

/// Ends the protection of machines.
pub fn unprotect(args: &UnprotectVm) -> anyhow::Result<ExitCode> {
    let given = Given::new(&args.run)
        .of("vms", &args.vms)
        .with("drain_s", &args.drain_s);
    execute(&args.run, "unprotect-vms", given)
}

/// Pauses the protection of machines.
pub fn pause(args: &OfVms) -> anyhow::Result<ExitCode> {
    let given = Given::new(&args.run).of("vms", &args.vms);
    execute(&args.run, "pause-vms", given)
}

/// Resumes it.
pub fn resume(args: &OfVms) -> anyhow::Result<ExitCode> {
    let given = Given::new(&args.run).of("vms", &args.vms);
    execute(&args.run, "resume-vms", given)
}

/// Brings the inventory in step with vCenter.
pub fn refresh(run: &Run) -> anyhow::Result<ExitCode> {
    execute(run, "refresh-inventory", Given::new(run))
}

/// Ids of the domains that are asked for.
fn domains(client: &Client, name: Option<&str>) -> anyhow::Result<Vec<String>> {
    let (mut found, mut after) = (Vec::new(), 0);
    loop {
        let part = client.call("GET", &format!("/domains?limit=200&after={after}"), None)?;
        let items = part.get("items").and_then(Value::as_array);
        for domain in items.into_iter().flatten() {
            if name.is_none_or(|name| name == text(domain, "name")) {
                found.push(text(domain, "id").to_owned());
            }
        }
        match part.get("next").and_then(Value::as_i64) {
            Some(next) => after = next,
            None => break,
        }
    }
    match (found.is_empty(), name) {
        (true, Some(name)) => bail!("the server has no domain {name}"),
        _ => Ok(found),
    }
}

fn age(of: &Value) -> String {
    match of.get("rpo_ms").and_then(Value::as_i64) {
        Some(ms) => format!("recoverable up to {}.{} s ago", ms / 1000, ms % 1000 / 100),
        None => "not recoverable".into(),
    }
}

/// How domains and their machines stand. The exit code is 2, if a machine is not recoverable.
pub fn show(args: &Protection) -> anyhow::Result<ExitCode> {
    let client = args.at.client()?;
    let mut all_well = true;
    for id in domains(&client, args.domain.as_deref())? {
        let domain = client.call("GET", &format!("/domains/{id}/protection"), None)?;
        let vms = domain.get("vms").and_then(Value::as_array);
        let vms: Vec<&Value> = vms.into_iter().flatten().collect();
        all_well &= vms.iter().all(|vm| text(vm, "state") == "recoverable");
        if args.json {
            println!("{domain}");
            continue;
        }
        println!("domain {}: {}", text(&domain, "name"), age(&domain));
        let alarms = domain.get("alarms").and_then(Value::as_array);
        for alarm in alarms.into_iter().flatten().filter_map(Value::as_str) {
            println!("  appliance {}: {alarm}", text(&domain, "appliance"));
        }
        for vm in vms {
            let (name, state) = (text(vm, "name"), text(vm, "state"));
            println!("  {name}: {state}, {}: {}", age(vm), text(vm, "reason"));
        }
    }
    Ok(match all_well {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(2),
    })
}
