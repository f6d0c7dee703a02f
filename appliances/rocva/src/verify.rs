//! `verify`: everything in a container is read, and what is wrong is printed, object by object.

use crate::VerifyArgs;
use crate::progress::{Progress, Unit, bytes};
use recovery_store::{Container, VerifyReport};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Serialize)]
struct Verdict<'a> {
    ok: bool,
    #[serde(flatten)]
    report: &'a VerifyReport,
}

pub(crate) async fn run(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let container = Container::open(&args.store.url()?).await?;
    let stage = Progress::for_people(args.json).stage("verifying", 0, Unit::Bytes);
    let report = container
        .verify(|state| stage.set(state.bytes, state.of_bytes))
        .await?;
    stage.finish();
    if args.json {
        let verdict = Verdict {
            ok: report.is_good(),
            report: &report,
        };
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        for problem in &report.problems {
            println!("{}: {}", problem.object, problem.what);
        }
        println!(
            "{}: {} object(s), {} stored, {} of data, {} cut(s), {} part(s) of an open cut; {}",
            args.store.from,
            report.objects,
            bytes(report.stored_bytes),
            bytes(report.raw_bytes),
            report.cuts,
            report.open_parts,
            match report.problem_count {
                0 => "good".to_owned(),
                count => format!("{count} PROBLEM(S)"),
            }
        );
    }
    Ok(if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
