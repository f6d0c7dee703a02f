//! The status socket: one JSON document a line in, one out.

use crate::appliance::Appliance;
use crate::documents::standing_word;
use crate::domain::{Domain, MAX_WANTED};
use crate::orders::{self, domain_of};
use filter_core::mapping::hex;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest command.
const MAX_LINE_BYTES: u64 = 64 * 1024;
/// Conversations at once.
const MAX_CONNECTIONS: usize = 64;
/// Longest name of a cut.
const MAX_CUT_NAME_BYTES: usize = 128;
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

fn domain_document(appliance: &Appliance, domain: &Domain) -> Value {
    let disks: Vec<Value> = domain
        .disks
        .read()
        .values()
        .map(|disk| {
            let (received, epoch, syncing) = disk.received();
            let (info, presence) = (disk.info.read(), disk.presence());
            json!({
                "uuid": info.uuid.to_string(),
                "vm": info.vm_name,
                "label": info.name,
                "capacity_bytes": info.capacity_bytes,
                "received_seq": received,
                "durable_seq": disk.durable_seq(),
                "uploaded_seq": disk.uploaded_seq(),
                "attach_epoch": epoch,
                "syncing": syncing,
                "connected": disk.is_attached(),
                "standing": standing_word(presence.standing),
                "host": presence.host_name(),
            })
        })
        .collect();
    let connected = appliance.connected_hosts();
    let hosts = domain.hosts().into_iter().map(|(id, name)| {
        let connected = connected.contains_key(&id);
        json!({"id": hex(&id), "name": name, "connected": connected})
    });
    let hosts: Vec<Value> = hosts.collect();
    let figures = &domain.figures;
    let (used, max, full, failing) = domain.log.usage();
    let (batches, entries) = domain.log.counts();
    let (newest, waiting, wanted) = {
        let cuts = domain.cuts.lock();
        (cuts.newest.clone(), cuts.closed.len(), cuts.wanted.len())
    };
    // Relaxed: figures.
    let figure = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    json!({
        "name": domain.name,
        "disks": disks,
        "hosts": hosts,
        "newest_cut": newest.map(|(number, name, time_ns)| {
            json!({"number": number, "name": name, "time_ns": time_ns})
        }),
        "cuts_waiting": waiting,
        "cuts_wanted": wanted,
        "cuts_closed": figure(&figures.cuts_closed),
        "cuts_void": figure(&figures.cuts_void),
        "cuts_held": figure(&figures.cuts_held),
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
        "alarms": alarms(domain),
    })
}

/// Asks for a cut and waits until the store holds it.
fn named_cut(appliance: &Appliance, command: &Value) -> Value {
    let Some(name) = command.get("name").and_then(Value::as_str) else {
        return json!({"error": "cut needs domain and name"});
    };
    let domain = match domain_of(appliance, command) {
        Ok(domain) => domain,
        Err(error) => return json!({"error": error}),
    };
    if name.is_empty() || name.len() > MAX_CUT_NAME_BYTES || name.contains(char::is_control) {
        let text = format!("a cut's name has 1 to {MAX_CUT_NAME_BYTES} bytes, none of control");
        return json!({"error": text});
    }
    let deadline = Instant::now() + CUT_LIMIT;
    let mut cuts = domain.cuts.lock();
    if cuts.wanted.len() >= MAX_WANTED {
        return json!({"error": format!("{MAX_WANTED} cuts are waited for already")});
    }
    // A name may be used again, and by several at once: only a cut that is begun after this request
    // answers it.
    let after = cuts.last_epoch;
    cuts.wanted.push_back(name.into());
    domain.cuts_changed.notify_all();
    loop {
        if let Some((number, time_ns)) = cuts.named_after(name, after) {
            return json!({"cut": number, "name": name, "time_ns": time_ns});
        }
        if Instant::now() >= deadline || domain.is_stopping() {
            if let Some(at) = cuts.wanted.iter().position(|wanted| wanted == name) {
                cuts.wanted.remove(at);
            }
            drop(cuts);
            let alarms = alarms(&domain).join("; ");
            return json!({"error": format!("no cut in time: {alarms}")});
        }
        domain.cuts_changed.wait_until(&mut cuts, deadline);
    }
}

/// What an operator should know of a domain.
pub(crate) fn alarms(domain: &Domain) -> Vec<String> {
    let mut alarms: Vec<String> = domain.alarms.lock().values().cloned().collect();
    let (used, _, full, failing) = domain.log.usage();
    let dir = domain.log.dir().display();
    if full {
        alarms.push(format!(
            "the log {dir} is full ({used} bytes): hosts wait until the store takes more"
        ));
    }
    if failing {
        alarms.push(format!("the log {dir} cannot be written: hosts wait"));
    }
    alarms
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
                .map(|domain| domain_document(appliance, domain))
                .collect();
            let unopened: Vec<Value> = appliance
                .unopened
                .all()
                .into_iter()
                .map(|(name, why)| json!({"name": name, "why": why}))
                .collect();
            json!({"name": appliance.name, "domains": domains, "unopened": unopened})
        }
        Some("cut") => named_cut(appliance, &command),
        Some("set-aside") => ordered(orders::set_aside(appliance, &command, true)),
        Some("take-back") => ordered(orders::set_aside(appliance, &command, false)),
        Some("forget-host") => ordered(orders::forget_host(appliance, &command)),
        _ => json!({"error": "cmd is one of status, cut, set-aside, take-back, forget-host"}),
    }
}

fn ordered(done: Result<Value, String>) -> Value {
    done.unwrap_or_else(|error| json!({"error": error}))
}

/// Answers one connection, line by line.
fn converse(stream: &UnixStream, appliance: &Appliance) -> std::io::Result<()> {
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        let read = (&mut reader).take(MAX_LINE_BYTES).read_line(&mut line)?;
        if read == 0 {
            return Ok(());
        }
        let whole = line.ends_with('\n');
        let document = if whole || read < MAX_LINE_BYTES as usize {
            answer(appliance, &line)
        } else {
            json!({"error": format!("a command has at most {MAX_LINE_BYTES} bytes")})
        };
        writeln!(&mut &*stream, "{document}")?;
        if !whole {
            return Ok(());
        }
    }
}

/// Listens at `path`. A socket that nobody serves any more is replaced; any other file is left alone.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            let text = "there is a file that is no socket: choose another path, or remove it";
            return Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, text));
        }
        match UnixStream::connect(path) {
            // The one answer that only a socket gives which nobody serves.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            Err(_) => {}
            Ok(_) => {
                let text = "another process serves this socket";
                return Err(std::io::Error::new(std::io::ErrorKind::AddrInUse, text));
            }
        }
    }
    UnixListener::bind(path)
}

/// Answers on a unix socket.
pub fn serve(path: &Path, appliance: Arc<Appliance>) -> std::io::Result<()> {
    let listener = listen(path)?;
    let talking = Arc::new(AtomicUsize::new(0));
    let run = move || {
        for stream in listener.incoming().flatten() {
            if talking.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
                talking.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            let (appliance, talking) = (appliance.clone(), talking.clone());
            std::thread::spawn(move || {
                // Whoever asked has gone: nothing to tell anybody.
                let _ = converse(&stream, &appliance);
                talking.fetch_sub(1, Ordering::AcqRel);
            });
        }
    };
    std::thread::Builder::new()
        .name("status".into())
        .spawn(run)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_a_socket_that_nobody_serves_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status");
        std::fs::write(&path, "somebody's").unwrap();
        let error = listen(&path).unwrap_err().to_string();
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
        std::fs::remove_file(&path).unwrap();
        let living = listen(&path).unwrap();
        let error = listen(&path).unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(living);
        listen(&path).unwrap();
    }
}
