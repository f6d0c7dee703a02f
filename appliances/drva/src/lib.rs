//! The DR appliance: receives the records of its hosts, logs them durably, writes them to an object
//! store as consistent cuts.
//!
//! The path of a record through it: [`session`] reads it from a connection, [`disk`] admits it,
//! [`log`] makes it durable (then it is acknowledged), [`upload`] reads it from the log and feeds the
//! container; [`cut`] decides where one cut ends and the next begins, by
//! what [`presence`] knows of the disks. [`hashes`] tells a sync what need
//! not be sent. [`report`] is what the management server is told. [`keeper`] and [`assignments`] say who is let in, and for what; [`link`] is TLS.
//!
//! Invariant: it never drops and never grows without bound: a slow store fills the log, a slow log
//! fills its queue, a full queue stops the connections, full connections fill the lanes.

pub mod appliance;
pub mod assignments;
pub mod cut;
pub mod disk;
pub mod documents;
pub mod domain;
pub mod follow;
pub mod gate;
pub mod hashes;
pub mod identity;
pub mod keeper;
pub mod link;
pub mod log;
pub mod orders;
pub mod outbox;
pub mod presence;
pub mod raw;
pub mod report;
pub mod session;
pub mod status;
pub mod touched;
pub mod unopened;
pub mod upload;

use anyhow::{Context, bail};
use appliance::{Appliance, Settings};
use filter_core::wire::DEFAULT_PORT_BASE;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// The DR appliance.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Folder of the replication logs: fast, durable storage.
    #[arg(long)]
    pub data_dir: PathBuf,
    /// Where containers go, one per domain: a folder, az://..., s3://...
    #[arg(long)]
    pub store: String,
    /// An option of the store: KEY=VALUE.
    #[arg(long = "store-opt")]
    pub store_options: Vec<String>,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub listen: IpAddr,
    /// The first of six consecutive ports; 0 looks for free ones.
    #[arg(long, default_value_t = DEFAULT_PORT_BASE)]
    pub port_base: u16,
    /// Who it is, and whom it lets in.
    #[command(flatten)]
    pub security: keeper::SecurityArgs,
    /// A domain that hosts may open; repeat it. Without it any is made when a host asks for it.
    #[arg(long = "domain")]
    pub domains: Vec<String>,
    /// Time between cuts, in ms.
    #[arg(long, default_value_t = 1000)]
    pub cut_interval_ms: u64,
    /// Most bytes of one domain's log.
    #[arg(long, default_value_t = 4 << 30)]
    pub log_max_bytes: u64,
    /// Bytes of a log's segment.
    #[arg(long, default_value_t = 64 << 20)]
    pub segment_bytes: u64,
    /// Data bytes after which a part is uploaded.
    #[arg(long, default_value_t = 8 << 20)]
    pub part_bytes: usize,
    /// Unix socket for commands, one JSON document a line: status, cut, set-aside, take-back, forget-host.
    #[arg(long)]
    pub status_socket: Option<PathBuf>,
    /// This appliance's name, for people.
    #[arg(long, default_value = "drva")]
    pub name: String,
    /// Print the points at which JETDR_FAULT can make this program die, wait or fail, and end.
    #[arg(long)]
    pub list_faults: bool,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(args: &Args) -> anyhow::Result<()> {
    fault::arm()?;
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    if args.cut_interval_ms < 20 {
        bail!(
            "--cut-interval-ms {}: the shortest is 20",
            args.cut_interval_ms
        );
    }
    if args.segment_bytes < 4 << 20 {
        bail!(
            "--segment-bytes {}: the smallest is 4194304",
            args.segment_bytes
        );
    }
    let mut store_options = Vec::new();
    for option in &args.store_options {
        store_options.push(recovery_store::StoreUrl::parse_option(option)?);
    }
    let security = keeper::Security::new(&args.security, &args.data_dir)?;
    let (base, listeners) = appliance::bind(args.listen, args.port_base)?;
    let appliance = Appliance::open(Settings {
        name: args.name.clone(),
        data_dir: args.data_dir.clone(),
        store: args.store.clone(),
        store_options,
        served: args.domains.clone(),
        cut_every: Duration::from_millis(args.cut_interval_ms),
        log: log::LogOptions {
            segment_bytes: args.segment_bytes,
            max_bytes: args.log_max_bytes,
        },
        part_bytes: args.part_bytes,
        tls: security.tls.clone(),
        assignments: security.assignments.clone(),
    })?;
    security.keep(appliance.clone())?;
    let mut ports: Vec<SocketAddr> = Vec::new();
    for (_, listener) in &listeners {
        ports.push(listener.local_addr()?);
    }
    appliance.listen(listeners)?;
    if let Some(path) = &args.status_socket {
        status::serve(path, appliance.clone())
            .with_context(|| format!("cannot listen on {}", path.display()))?;
    }
    let numbers: Vec<u16> = ports.iter().map(SocketAddr::port).collect();
    let ready = serde_json::json!({
        "pid": std::process::id(),
        "port_base": base,
        "ports": numbers,
        "status_socket": args.status_socket,
    });
    println!("READY {ready}");
    signals.forever().next();
    appliance.stop(&ports);
    if let Some(path) = &args.status_socket {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}
