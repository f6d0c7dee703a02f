//! The demo's closing table.

use super::Findings;
use comfy_table::Table;
use serde_json::Value;

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

fn figure(value: &Value, path: &[&str]) -> u64 {
    let found = path.iter().try_fold(value, |value, key| value.get(key));
    found.and_then(Value::as_u64).unwrap_or(0)
}

/// Prints it: for people, or as one JSON document.
pub fn print(findings: &Findings, json: bool) {
    let domain = &findings.domain;
    let received = figure(domain, &["received_bytes"]);
    let stored = figure(domain, &["stored_bytes"]);
    let lag = |which: &str, of: &str| figure(domain, &[which, of]);
    if json {
        let disks: Vec<Value> = findings
            .disks
            .iter()
            .map(|(label, difference)| {
                serde_json::json!({"label": label, "first_difference": difference})
            })
            .collect();
        let document = serde_json::json!({
            "written_bytes": findings.written_bytes,
            "replicated_bytes": received,
            "stored_bytes": stored,
            "lag_durable_p50_us": lag("lag_durable", "p50_us"),
            "lag_durable_p99_us": lag("lag_durable", "p99_us"),
            "lag_cut_p50_us": lag("lag_committed", "p50_us"),
            "lag_cut_p99_us": lag("lag_committed", "p99_us"),
            "deferred_max_ns": findings.deferred_max_ns,
            "cut": findings.cut,
            "cuts_closed": figure(domain, &["cuts_closed"]),
            "disks": disks,
            "fsck_clean": findings.fsck.as_ref().map(Result::is_ok),
            "client": findings.client,
            "seconds": findings.seconds,
            "good": findings.good(),
        });
        println!("{document}");
        return;
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    let ms = |us: u64| format!("{:.1} ms", us as f64 / 1000.0);
    let mut row = |what: &str, value: String| {
        table.add_row(vec![what.to_string(), value]);
    };
    row("written by clients", mib(findings.written_bytes));
    row("replicated (with headers and syncs)", mib(received));
    row("stored (compressed, overwrites folded)", mib(stored));
    let (p50, p99) = (lag("lag_durable", "p50_us"), lag("lag_durable", "p99_us"));
    row(
        "lag to the durable log, p50 / p99",
        format!("{} / {}", ms(p50), ms(p99)),
    );
    let (p50, p99) = (
        lag("lag_committed", "p50_us"),
        lag("lag_committed", "p99_us"),
    );
    row(
        "cut to the store, p50 / p99",
        format!("{} / {}", ms(p50), ms(p99)),
    );
    row(
        "longest write held back",
        ms(findings.deferred_max_ns / 1000),
    );
    let closed = figure(domain, &["cuts_closed"]);
    row(
        "cut recovered",
        format!("{} (`demo-end`), of {closed} closed", findings.cut),
    );
    for (label, difference) in &findings.disks {
        let verdict = difference.map_or("equal, byte for byte".to_string(), |at| {
            format!("DIFFERS from byte {at} on")
        });
        row(&format!("disk `{label}`, recovered"), verdict);
    }
    row(
        "file system in the recovered disk",
        match &findings.fsck {
            Some(Ok(())) => "clean (e2fsck -fn)".into(),
            Some(Err(said)) => format!("NOT CLEAN: {said}"),
            None => "not checked: e2fsck or mke2fs is not installed".into(),
        },
    );
    row("load", findings.client.into());
    row("time", format!("{:.1} s", findings.seconds));
    row(
        "verdict",
        if findings.good() {
            "GOOD".into()
        } else {
            "BAD".into()
        },
    );
    println!("{table}");
}
