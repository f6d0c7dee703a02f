//! `list`: the cuts of a container, for people or for machines.

use crate::ListArgs;
use comfy_table::{Table, presets};
use recovery_store::{Container, CutEntry, CutInfo};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Serialize)]
struct Listing<'a> {
    domain: uuid::Uuid,
    domain_name: &'a str,
    cuts: Vec<&'a CutInfo>,
    damaged: Vec<Damaged<'a>>,
}

#[derive(Serialize)]
struct Damaged<'a> {
    cut: u64,
    what: &'a str,
}

/// A time for people: RFC 3339, in UTC, to the millisecond.
pub(crate) fn time(time_ns: u64) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(time_ns)) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => format!("{time_ns} ns"),
    }
}

pub(crate) async fn run(args: ListArgs) -> anyhow::Result<ExitCode> {
    let container = Container::open(&args.store.url()?).await?;
    let cuts = container.cuts().await?;
    if args.json {
        let listing = Listing {
            domain: container.domain().uuid,
            domain_name: &container.domain().name,
            cuts: cuts.iter().filter_map(|c| c.state.as_ref().ok()).collect(),
            damaged: cuts
                .iter()
                .filter_map(|entry| {
                    entry.state.as_ref().err().map(|what| Damaged {
                        cut: entry.cut,
                        what,
                    })
                })
                .collect(),
        };
        println!("{}", serde_json::to_string_pretty(&listing)?);
    } else {
        println!(
            "domain {} ({})",
            container.domain().name,
            container.domain().uuid
        );
        println!("{}", table(&cuts));
    }
    Ok(ExitCode::SUCCESS)
}

fn table(cuts: &[CutEntry]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["cut", "time", "name", "records", "data", "stored", "disks"]);
    for entry in cuts {
        match &entry.state {
            Ok(info) => {
                let disks: Vec<String> = info
                    .disks
                    .iter()
                    .map(|disk| format!("{}/{}", disk.vm_name, disk.name))
                    .collect();
                table.add_row([
                    info.cut.to_string(),
                    time(info.time_ns),
                    info.name.clone().unwrap_or_default(),
                    info.records.to_string(),
                    crate::progress::bytes(info.raw_bytes),
                    crate::progress::bytes(info.stored_bytes),
                    disks.join(" "),
                ]);
            }
            Err(what) => {
                table.add_row([entry.cut.to_string(), format!("DAMAGED: {what}")]);
            }
        }
    }
    table
}
