//! The commands of the simulated host.

use crate::disk::Format;
use crate::nbd::engine::{DiskEngine, Engine};
use crate::nbd::server::{Exports, Listen, Server};
use anyhow::bail;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// The simulated host, part by part.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Command {
    /// Run a host: it starts, kills and stops VMs on command, each a process of its own.
    Host(crate::host::HostArgs),
    /// Run one VM: load the filter, open its disks, serve them over NBD.
    Vm(Box<crate::vm::VmArgs>),
    /// Serve a disk over NBD, without any filter.
    Nbd(NbdArgs),
    /// Make a disk of zeros.
    Create(CreateArgs),
    /// Snapshots of a disk that nobody has open.
    Snapshot(SnapshotArgs),
    /// A network between a daemon and an appliance that can be made to fail.
    Link(crate::link::LinkArgs),
}

/// Snapshots of a disk that nobody has open: its content, sidecars and ids.
#[derive(clap::Args, Clone, Debug)]
pub struct SnapshotArgs {
    /// What to do.
    #[arg(value_enum)]
    pub what: SnapshotDo,
    /// The disk; `.vmdk` is a descriptor, any other name raw.
    #[arg(long)]
    pub disk: PathBuf,
    /// Which snapshot: needed for `revert`; `consolidate` forgets all without it.
    #[arg(long)]
    pub id: Option<u64>,
}

/// What to do with snapshots.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum SnapshotDo {
    /// Keep the disk as it is now.
    Create,
    /// Put the disk back as it was: content, sidecars and ids.
    Revert,
    /// Forget snapshots; the disk stays as it is.
    Consolidate,
    /// List them.
    List,
}

/// Serve a disk over NBD, without any filter.
#[derive(clap::Args, Clone, Debug)]
pub struct NbdArgs {
    /// The disk.
    #[arg(long)]
    pub disk: PathBuf,
    /// Unix socket to listen on.
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// TCP address to listen on; port 0 takes a free one.
    #[arg(long)]
    pub tcp: Option<SocketAddr>,
}

/// Make a disk of zeros.
#[derive(clap::Args, Clone, Debug)]
pub struct CreateArgs {
    /// The disk's file; `.vmdk` makes a descriptor and a flat extent.
    pub path: PathBuf,
    /// Capacity in bytes; K, M, G and T are understood.
    pub capacity: String,
}

/// A number of bytes with an optional K, M, G or T (powers of 1024).
pub fn parse_bytes(text: &str) -> anyhow::Result<u64> {
    let (digits, shift) = match text.trim().to_ascii_uppercase() {
        t if t.ends_with('K') => (t, 10),
        t if t.ends_with('M') => (t, 20),
        t if t.ends_with('G') => (t, 30),
        t if t.ends_with('T') => (t, 40),
        t => (t, 0),
    };
    let number: u64 = match digits.trim_end_matches(['K', 'M', 'G', 'T']).parse() {
        Ok(number) => number,
        Err(_) => bail!("`{text}` is not a number of bytes (such as 65536, 64K, 10G)"),
    };
    match number
        .checked_shl(shift)
        .filter(|bytes| bytes >> shift == number)
    {
        Some(bytes) => Ok(bytes),
        None => bail!("`{text}` is more than can be addressed"),
    }
}

/// Runs a command.
pub fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Host(args) => crate::host::run(args),
        Command::Vm(args) => crate::vm::run(args),
        Command::Nbd(args) => nbd(args),
        Command::Link(args) => crate::link::run(args),
        Command::Snapshot(args) => snapshot(args),
        Command::Create(args) => {
            let format = Format::of(&args.path);
            crate::disk::create(&args.path, format, parse_bytes(&args.capacity)?)?;
            Ok(())
        }
    }
}

/// On files, while nobody else has the disk. This is no opening: the ids stay, or go back.
fn snapshot(args: &SnapshotArgs) -> anyhow::Result<()> {
    use crate::snapshot::{self, DiskFiles, Revert};
    let format = Format::of(&args.disk);
    let data = crate::disk::open_file(&args.disk, format)?;
    data.lock()?;
    let disk = DiskFiles {
        path: &args.disk,
        format,
        data: &data,
    };
    snapshot::finish_revert(disk)?;
    crate::disk::undo::settle(&args.disk, &data)?;
    let known = snapshot::index(&args.disk)?;
    match args.what {
        SnapshotDo::Create => {
            let next = known
                .snapshots
                .iter()
                .fold(1, |next, one| next.max(one.id + 1));
            snapshot::create(disk, args.id.unwrap_or(next))?;
        }
        SnapshotDo::Revert => match args.id {
            Some(id) => snapshot::revert(disk, id, Revert::Closed)?,
            None => bail!("--id is missing: which snapshot"),
        },
        SnapshotDo::Consolidate => snapshot::consolidate(&args.disk, args.id)?,
        SnapshotDo::List => {}
    }
    println!("{}", serde_json::to_string(&snapshot::index(&args.disk)?)?);
    Ok(())
}

fn nbd(args: &NbdArgs) -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let mut listens = Vec::new();
    listens.extend(args.socket.clone().map(Listen::Unix));
    listens.extend(args.tcp.map(Listen::Tcp));
    if listens.is_empty() {
        bail!("nobody could reach the disk: give --socket or --tcp");
    }
    let disk = Arc::new(DiskEngine(crate::disk::open(&args.disk, None)?));
    let engine: Arc<dyn Engine> = disk.clone();
    let mut server = Server::start(&listens, Exports::new(vec![("disk".into(), engine)]))?;
    let tcp = server.addresses().iter().find_map(|listen| match listen {
        Listen::Tcp(address) => Some(address.to_string()),
        Listen::Unix(_) => None,
    });
    let ready = serde_json::json!({
        "pid": std::process::id(), "nbd_socket": args.socket, "nbd_tcp": tcp,
    });
    println!("READY {ready}");
    signals.forever().next();
    server.stop();
    disk.0.closed()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn bytes() {
        for (text, bytes) in [
            ("512", 512),
            ("64K", 65536),
            ("10g", 10 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_bytes(text).ok(), Some(bytes));
        }
        for text in ["", "K", "x", "-1", "99999999999T"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
