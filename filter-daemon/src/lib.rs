//! The host daemon: finds the lanes of a host, drains them, streams them to the DR appliance.
//!
//! The path of a record through it: [`pump`] takes it from its lane ([`lane`]) and hands it to the
//! kernel straight from the ring ([`transport`], [`raw`]); the appliance's acknowledgement comes back
//! through [`connection`] and frees the ring. [`dial`] makes connections, [`secure`] puts TLS over them,
//! [`keeper`] looks after certificates. [`control`] finds lanes, [`cut`] takes cuts, [`hashes`] passes on what a sync asks, [`status_socket`] tells how it all stands.
//!
//! Invariant: space in a ring is freed only when the appliance holds the records durably; whatever
//! happens to connections, everything else is sent again.

pub mod connection;
pub mod control;
pub mod cut;
pub mod dial;
pub mod hashes;
pub mod invited;
pub mod keeper;
pub mod lane;
pub mod pump;
pub mod raw;
pub mod secure;
pub mod status;
pub mod status_socket;
pub mod transport;

use anyhow::{Context, bail};
use connection::Identity;
use dial::Dialer;
use filter_core::mapping::RunFolder;
use filter_core::wire::{DEFAULT_PORT_BASE, PortRole};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use transport::TcpConnector;

/// The host daemon.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The host's run folder, shared with its VMs.
    #[arg(long)]
    pub run_dir: PathBuf,
    /// The DR appliance: a name or an address.
    #[arg(long, default_value = "127.0.0.1")]
    pub drva: String,
    /// The first of the appliance's six ports.
    #[arg(long, default_value_t = DEFAULT_PORT_BASE)]
    pub port_base: u16,
    /// Who this host is to the appliance.
    #[command(flatten)]
    pub security: keeper::SecurityArgs,
    /// This host's name, for people.
    #[arg(long, default_value = "host")]
    pub name: String,
    /// This host's lasting identity, 32 hex digits, instead of the one kept in a file. With a certificate
    /// neither counts: the host is who its certificate says.
    #[arg(long, value_parser = parse_host_id)]
    pub host_id: Option<HostId>,
    /// File that keeps this host's lasting identity, made if it is missing; by default `host-id` in the run
    /// folder. Give one that outlives a boot: by another identity a host is another host.
    #[arg(long)]
    pub host_id_file: Option<PathBuf>,
    /// How long completions of guests are held for a cut of a domain on several hosts at most, in ms.
    #[arg(long, default_value_t = 20)]
    pub cut_hold_ms: u64,
    /// Unix socket that answers each connection with one JSON document.
    #[arg(long)]
    pub status_socket: Option<PathBuf>,
    /// Print the ids of the disks that a process has open with the filter, a line each, and end.
    #[arg(long)]
    pub list_open_disks: bool,
    /// Print the points at which JETDR_FAULT can make this program die, wait or fail, and end.
    #[arg(long)]
    pub list_faults: bool,
}

/// A host's lasting identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostId(pub [u8; 16]);

fn parse_host_id(text: &str) -> Result<HostId, String> {
    let id = filter_core::mapping::parse_id(text);
    id.map(HostId)
        .ok_or_else(|| format!("`{text}` is not 32 hex digits"))
}

/// The host's lasting identity: made once, kept in a file. The file is there whole or not at all, also
/// after a crash of the host: an appliance would take another identity for another host.
fn host_id(path: &Path) -> anyhow::Result<[u8; 16]> {
    if !path.exists() {
        let mut id = [0u8; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        let folder = folder.unwrap_or(Path::new("."));
        let temporary = folder.join(".host-id");
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&temporary)?;
            file.write_all(filter_core::mapping::hex(&id).as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&temporary, path)?;
            std::fs::File::open(folder)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    filter_core::mapping::parse_id(&text)
        .with_context(|| format!("{} does not hold 32 hex digits: remove it", path.display()))
}

/// The ids of the disks that a process has open, in order: what stands in the way of a removal.
fn open_disks(run: &RunFolder) -> anyhow::Result<Vec<String>> {
    let folder = run.lanes_dir();
    let listed =
        std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut open = Vec::new();
    for entry in listed {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let id = name
            .strip_suffix(".lock")
            .and_then(filter_core::mapping::parse_id);
        if let Some(id) = id
            && run.disk_is_open(&id)?
        {
            open.push(filter_core::mapping::hex(&id));
        }
    }
    open.sort_unstable();
    Ok(open)
}

/// Runs until SIGTERM or SIGINT.
pub fn run(args: &Args) -> anyhow::Result<()> {
    fault::arm()?;
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let run = RunFolder::open(&args.run_dir)?;
    if args.list_open_disks {
        open_disks(&run)?.iter().for_each(|id| println!("{id}"));
        return Ok(());
    }
    let Some(_lock) = run.lock_daemon()? else {
        bail!(
            "another daemon serves {}: a host has one",
            args.run_dir.display()
        );
    };
    if !(1..=1000).contains(&args.cut_hold_ms) {
        bail!("--cut-hold-ms {}: it is from 1 to 1000", args.cut_hold_ms);
    }
    if args.port_base > u16::MAX - 5 {
        bail!(
            "--port-base {}: six ports from there on do not exist",
            args.port_base
        );
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let identity = Identity {
        host_id: match args.host_id {
            Some(HostId(id)) => id,
            None => {
                let in_run_folder = || run.path().join("host-id");
                host_id(&args.host_id_file.clone().unwrap_or_else(in_run_folder))?
            }
        },
        incarnation: now.as_nanos() as u64,
        name: args.name.clone(),
    };
    let tcp = TcpConnector {
        host: args.drva.clone(),
        port_base: args.port_base,
    };
    let mut security = keeper::Security::new(&args.security, tcp)?;
    let connector = security.connector.clone();
    let mut pipes = Vec::new();
    for role in PortRole::ALL {
        pipes.push(run.wake_reader(u32::from(role.offset()))?);
    }
    let shared = Arc::new(status::Shared::new(pipes));
    let channels: Vec<_> = PortRole::ALL
        .iter()
        .map(|_| crossbeam::channel::unbounded())
        .collect();
    let senders: Vec<_> = channels.iter().map(|(sender, _)| sender.clone()).collect();
    let dialer = |role| Dialer::new(role, connector.clone(), identity.clone(), shared.clone());
    // First of all: what stands in the way of the socket is better said before anything runs.
    let status = match &args.status_socket {
        Some(path) => Some(status_socket::StatusSocket::serve(path, shared.clone())?),
        None => None,
    };
    security.start()?;
    let mut threads = Vec::new();
    for (role, (_, orders)) in PortRole::ALL.into_iter().zip(channels) {
        if role == PortRole::Control {
            continue;
        }
        let pipe = run.wake_reader(u32::from(role.offset()))?;
        let channels = (orders, senders.clone());
        let pump = pump::Pump::new(role, dialer(role), channels, pipe, shared.clone());
        let name = format!("pump-{}", role.offset());
        threads.push(
            std::thread::Builder::new()
                .name(name)
                .spawn(move || pump.run())?,
        );
    }
    let hold = Duration::from_millis(args.cut_hold_ms);
    let control = control::Control::new(run, senders, shared.clone(), hold);
    let (thread, dialer) = (
        std::thread::Builder::new().name("control".into()),
        dialer(PortRole::Control),
    );
    threads.push(thread.spawn(move || control.run(dialer))?);
    let ready = serde_json::json!({
        "pid": std::process::id(),
        "drva": args.drva,
        "port_base": args.port_base,
        "status_socket": args.status_socket,
    });
    println!("READY {ready}");
    signals.forever().next();
    shared.stopping.store(true, Ordering::Release); // pairs with the threads' loads
    shared.wake_all();
    for thread in threads {
        let _ = thread.join();
    }
    if let Some(status) = status {
        status.stop();
    }
    Ok(())
}
