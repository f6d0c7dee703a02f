//! The status socket: one JSON document a line in, one out.

use crate::appliance::Appliance;
use crate::domain::Domain;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Longest wait for a named cut.
const CUT_LIMIT: Duration = Duration::from_secs(60);

fn spread(histogram: &Histogram<u64>) -> Value {
    json!({
        "count": histogram.len(),
        "p50_us": histogram.value_at_quantile(0.5),
        "p99_us": histogram.value_at_quantile(0.99),
        "max_us": histogram.max(),
    })
}

fn domain_document(domain: &Domain) -> Value {
    let disks: Vec<Value> = domain
        .disks
        .read()
        .values()
        .map(|disk| {
            let (received, epoch, syncing) = disk.received();
            let info = disk.info.read();
            json!({
                "uuid": info.uuid.to_string(),
                "vm": info.vm_name,
                "label": info.name,
                "capacity_bytes": info.capacity_bytes,
                "received_seq": received,
                "durable_seq": disk.durable.load(Ordering::Acquire),
                "uploaded_seq": disk.uploaded.load(Ordering::Acquire),
                "attach_epoch": epoch,
                "syncing": syncing,
                "connected": disk.route.lock().is_some(),
            })
        })
        .collect();
    let figures = &domain.figures;
    let (used, max, full, failing) = domain.log.usage();
    let (batches, entries) = domain.log.counts();
    let (newest, waiting) = {
        let cuts = domain.cuts.lock();
        (cuts.newest.clone(), cuts.closed.len())
    };
    // Relaxed: figures.
    let figure = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    json!({
        "name": domain.name,
        "disks": disks,
        "newest_cut": newest.map(|(number, name, time_ns)| {
            json!({"number": number, "name": name, "time_ns": time_ns})
        }),
        "cuts_waiting": waiting,
        "cuts_closed": figure(&figures.cuts_closed),
        "cuts_void": figure(&figures.cuts_void),
        "log": {
            "used_bytes": used, "max_bytes": max, "full": full, "failing": failing,
            "batches": batches, "entries": entries,
        },
        "received_bytes": figure(&figures.received_bytes),
        "records": figure(&figures.records),
        "duplicates": figure(&figures.duplicates),
        "stored_bytes": figure(&figures.stored_bytes),
        "lag_durable": spread(&figures.durable_lag_us.lock()),
        "lag_committed": spread(&figures.commit_us.lock()),
        "alarms": domain.alarms.lock().values().cloned().collect::<Vec<_>>(),
    })
}

/// Asks for a cut and waits until the store holds it.
fn named_cut(appliance: &Appliance, command: &Value) -> Value {
    let text = |key: &str| command.get(key).and_then(Value::as_str);
    let (Some(of), Some(name)) = (text("domain"), text("name")) else {
        return json!({"error": "cut needs domain and name"});
    };
    let Some(domain) = appliance
        .domains()
        .into_iter()
        .find(|domain| domain.name == of)
    else {
        return json!({"error": format!("there is no domain `{of}`")});
    };
    let deadline = Instant::now() + CUT_LIMIT;
    let mut cuts = domain.cuts.lock();
    cuts.wanted.push_back(name.into());
    domain.cuts_changed.notify_all();
    loop {
        if let Some((number, Some(newest), time_ns)) = &cuts.newest
            && newest == name
        {
            return json!({"cut": number, "name": name, "time_ns": time_ns});
        }
        if Instant::now() >= deadline || domain.stopping.load(Ordering::Acquire) {
            cuts.wanted.retain(|wanted| wanted != name);
            drop(cuts);
            let alarms: Vec<String> = domain.alarms.lock().values().cloned().collect();
            return json!({"error": format!("no cut in time: {}", alarms.join("; "))});
        }
        domain.cuts_changed.wait_until(&mut cuts, deadline);
    }
}

fn answer(appliance: &Appliance, line: &str) -> Value {
    let command: Value = match serde_json::from_str(line) {
        Ok(command) => command,
        Err(error) => return json!({"error": format!("not a JSON document: {error}")}),
    };
    match command.get("cmd").and_then(Value::as_str) {
        Some("status") => {
            let domains: Vec<Value> = appliance
                .domains()
                .iter()
                .map(|domain| domain_document(domain))
                .collect();
            json!({"name": appliance.name, "domains": domains})
        }
        Some("cut") => named_cut(appliance, &command),
        _ => json!({"error": "cmd is one of status, cut"}),
    }
}

/// Answers on a unix socket.
pub fn serve(path: &Path, appliance: Arc<Appliance>) -> std::io::Result<()> {
    if path.exists() && UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    let run = move || {
        for stream in listener.incoming().flatten() {
            let appliance = appliance.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(&stream).lines().map_while(Result::ok) {
                    if writeln!(&mut &stream, "{}", answer(&appliance, &line)).is_err() {
                        return;
                    }
                }
            });
        }
    };
    std::thread::Builder::new()
        .name("status".into())
        .spawn(run)?;
    Ok(())
}
