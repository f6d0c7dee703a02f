//! `jetdr protect`: the smallest real use. Serves an existing raw disk over NBD, replicated; all parts
//! start and stop with it.

use crate::parts::{Stack, path_flag, run_folder};
use anyhow::{Context, bail};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Protect an existing raw disk: serve it over NBD, replicated to a folder or an object store.
#[derive(clap::Args)]
pub struct Args {
    /// The disk: a raw file (or a flat VMDK).
    disk: PathBuf,
    /// Where the container goes: a folder, az://..., s3://...
    #[arg(long)]
    to: String,
    /// An option of the store: KEY=VALUE.
    #[arg(long = "store-opt")]
    store_options: Vec<String>,
    /// Unix socket of the NBD server; by default one in the state folder.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// TCP address of the NBD server as well; port 0 takes a free one.
    #[arg(long)]
    tcp: Option<SocketAddr>,
    /// Folder of the replication log and the parts' logs; by default `<disk>.jetdr` beside the disk.
    #[arg(long)]
    state: Option<PathBuf>,
    /// Name of the protected domain; by default the disk's name.
    #[arg(long)]
    domain: Option<String>,
    /// Print one JSON document a second instead of a line for people.
    #[arg(long)]
    json: bool,
}

/// A name that a domain may have.
fn domain_of(disk: &Path) -> String {
    let stem = disk.file_stem().unwrap_or_default().to_string_lossy();
    let fit = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '-'
        }
    };
    let name: String = stem.chars().map(fit).take(80).collect();
    let name = name.trim_start_matches('.').to_string();
    if name.is_empty() { "disk".into() } else { name }
}

fn line(disk: &Value, domain: &Value) -> String {
    let number = |value: &Value, key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
    let state = disk.get("state").and_then(Value::as_str).unwrap_or("?");
    let behind = number(disk, "published_seq").saturating_sub(number(disk, "durable_seq"));
    let cut = domain.get("newest_cut").filter(|cut| !cut.is_null());
    let cut = cut.map_or("none yet".into(), |cut| number(cut, "number").to_string());
    let alarms: Vec<&str> = domain
        .get("alarms")
        .and_then(Value::as_array)
        .map(|alarms| alarms.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let alarms = if alarms.is_empty() {
        String::new()
    } else {
        format!("; {}", alarms.join("; "))
    };
    format!(
        "{state}; {behind} records not yet durable; {} MiB received; newest cut {cut}{alarms}",
        number(domain, "received_bytes") >> 20
    )
}

/// Runs until Ctrl-C.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let disk = args.disk.canonicalize();
    let disk = disk.with_context(|| format!("cannot find the disk {}", args.disk.display()))?;
    let default = format!(
        "{}.jetdr",
        disk.file_name().unwrap_or_default().to_string_lossy()
    );
    let state = args
        .state
        .clone()
        .unwrap_or_else(|| disk.with_file_name(default));
    std::fs::create_dir_all(&state)
        .with_context(|| format!("cannot make the state folder {}", state.display()))?;
    let domain = args.domain.clone().unwrap_or_else(|| domain_of(&disk));
    let socket = args
        .socket
        .clone()
        .unwrap_or_else(|| state.join("nbd.sock"));
    if socket.as_os_str().len() > 100 {
        bail!("the path of the socket is too long: give a shorter one with --socket");
    }
    let store = store_of(&args.to)?;
    let run = run_folder()?;
    let mut vm = vec!["--disk".to_string(), format!("disk={}", disk.display())];
    vm.extend([
        "--name".into(),
        domain.clone(),
        "--domain".into(),
        domain.clone(),
    ]);
    vm.extend(path_flag("--nbd-socket", &socket));
    if let Some(tcp) = args.tcp {
        vm.extend(["--nbd-tcp".into(), tcp.to_string()]);
    }
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM] {
        signal_hook::flag::register(signal, stopping.clone())?;
    }
    let mut stack = Stack::start(run.path(), &state, &store, &args.store_options, &vm)?;
    eprintln!("protected: {}", disk.display());
    eprintln!("  connect: nbd+unix:///disk?socket={}", socket.display());
    let tcp = stack
        .vm
        .as_ref()
        .and_then(|vm| vm.ready.get("nbd_tcp"))
        .and_then(Value::as_str);
    if let Some(tcp) = tcp {
        eprintln!("  or:      nbd://{tcp}/disk");
    }
    eprintln!("  recover: jetdr rocva recover --from {store}/{domain} --out DIR");
    eprintln!("  stop:    Ctrl-C (waits until everything is in the store)");
    let mut told = Instant::now();
    while !stopping.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(100));
        let vm_gone = stack.vm.as_mut().is_none_or(|vm| !vm.is_running());
        if vm_gone {
            let log = stack
                .vm
                .as_ref()
                .map(|vm| vm.log_tail())
                .unwrap_or_default();
            bail!("the disk's server ended:\n  {log}");
        }
        if told.elapsed() >= Duration::from_secs(1) {
            told = Instant::now();
            report(&stack, &domain, args.json);
        }
    }
    eprintln!("\nstopping: waiting until everything is in the store");
    stack.settle(Duration::from_secs(60))?;
    let cut = stack.cut(&domain, "stopped")?;
    stack.stop()?;
    eprintln!("stopped; cut {cut} (`stopped`) holds the disk as it is");
    Ok(())
}

fn report(stack: &Stack, domain: &str, json: bool) {
    let Ok(disks) = stack.disks() else { return };
    let Some(disk) = disks.first() else { return };
    let status = stack.domain(domain).unwrap_or(Value::Null);
    if json {
        println!("{}", serde_json::json!({"disk": disk, "domain": status}));
    } else if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        eprint!("\r\x1b[K{}", line(disk, &status));
    } else {
        eprintln!("{}", line(disk, &status));
    }
}

/// A folder is made absolute, since the parts may run elsewhere; other URLs stay.
pub fn store_of(to: &str) -> anyhow::Result<String> {
    if to.contains("://") {
        return Ok(to.trim_end_matches('/').into());
    }
    std::fs::create_dir_all(to).with_context(|| format!("cannot make the folder {to}"))?;
    Ok(Path::new(to).canonicalize()?.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::domain_of;
    use std::path::Path;

    #[test]
    fn names() {
        for (path, name) in [
            ("/a/web 1.raw", "web-1"),
            ("disk", "disk"),
            ("/x/...", "disk"),
        ] {
            assert_eq!(domain_of(Path::new(path)), name, "{path}");
        }
    }
}
