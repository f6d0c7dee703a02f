//! The host daemon: finds the lanes of a host, drains them, streams them to the DR appliance.
//!
//! The path of a record through it: [`pump`] takes it from its lane ([`lane`]) and hands it to the
//! kernel straight from the ring ([`raw`]); the appliance's acknowledgement comes back through
//! [`connection`] and frees the ring. [`control`] finds lanes and takes cuts.
//!
//! Invariant: space in a ring is freed only when the appliance holds the records durably; whatever
//! happens to connections, everything else is sent again.

pub mod connection;
pub mod control;
pub mod lane;
pub mod pump;
pub mod raw;
pub mod status;

use anyhow::{Context, bail};
use connection::{Connector, Identity, TcpConnector};
use filter_core::mapping::RunFolder;
use filter_core::wire::{DEFAULT_PORT_BASE, PortRole};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

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
    /// This host's name, for people.
    #[arg(long, default_value = "host")]
    pub name: String,
    /// Unix socket that answers each connection with one JSON document.
    #[arg(long)]
    pub status_socket: Option<PathBuf>,
}

/// The host's lasting identity: made once, kept in the run folder.
fn host_id(run: &RunFolder) -> anyhow::Result<[u8; 16]> {
    let path = run.path().join("host-id");
    if !path.exists() {
        let mut id = [0u8; 16];
        use std::io::Read;
        std::fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
        std::fs::write(&path, filter_core::mapping::hex(&id))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let text = std::fs::read_to_string(&path)?;
    filter_core::mapping::parse_id(&text)
        .with_context(|| format!("{} does not hold 32 hex digits: remove it", path.display()))
}

fn serve_status(path: &Path, shared: Arc<status::Shared>) -> anyhow::Result<()> {
    if path.exists() && UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::thread::Builder::new()
        .name("status".into())
        .spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = writeln!(stream, "{}", shared.document());
            }
        })?;
    Ok(())
}

/// Runs until SIGTERM or SIGINT.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let run = RunFolder::open(&args.run_dir)?;
    let Some(_lock) = run.lock_daemon()? else {
        bail!(
            "another daemon serves {}: a host has one",
            args.run_dir.display()
        );
    };
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
        host_id: host_id(&run)?,
        incarnation: now.as_nanos() as u64,
        name: args.name.clone(),
    };
    let connector: Arc<dyn Connector> = Arc::new(TcpConnector {
        host: args.drva.clone(),
        port_base: args.port_base,
    });
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
    let mut threads = Vec::new();
    for (role, (_, orders)) in PortRole::ALL.into_iter().zip(channels) {
        if role == PortRole::Control {
            continue;
        }
        let pipe = run.wake_reader(u32::from(role.offset()))?;
        let channels = (orders, senders.clone());
        let (connector, identity) = (connector.clone(), identity.clone());
        let pump = pump::Pump::new(role, connector, identity, channels, pipe, shared.clone());
        let name = format!("pump-{}", role.offset());
        threads.push(
            std::thread::Builder::new()
                .name(name)
                .spawn(move || pump.run())?,
        );
    }
    if let Some(path) = &args.status_socket {
        serve_status(path, shared.clone())?;
    }
    let control = control::Control::new(run, connector, identity, senders, shared.clone());
    let thread = std::thread::Builder::new().name("control".into());
    threads.push(thread.spawn(move || control.run())?);
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
    if let Some(path) = &args.status_socket {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}
