//! The process of one VM: it loads the filter, opens its disks and serves each over NBD.
//!
//! | file | holds |
//! |---|---|
//! | this one | start, control, stop |
//! | `load` | dlopen and the table of services |
//! | `handoff` | a VM that moves to another host |
//! | `hostdisk` | a disk under the filter: its life |
//! | `pipeline` | an I/O of it: down, up, held, given up |
//! | `below` | what lies below the filter |
//! | `events` | snapshots, copies, growth |
//! | `faults` | writes that fail, are late, are torn, on request |
//! | `points` | where the process can be killed |
//! | `services` | the functions behind the table |
//! | `requests` | the filter's own I/O |
//! | `tasks` | timers, work, threads for I/O |
//! | `sidecar` | the files beside a disk |

mod below;
mod control;
mod events;
mod faults;
mod handoff;
mod hostdisk;
mod load;
mod pipeline;
mod points;
mod requests;
mod services;
pub(crate) mod sidecar;
mod tasks;

use crate::abi;
use crate::disk::{self, Format};
use crate::nbd::engine::{DiskEngine, Engine};
use crate::nbd::handover;
use crate::nbd::server::{Exports, Listen, Server};
use crate::raw;
use crate::socket::UnixSocket;
use anyhow::{Context, bail};
use faults::Faults;
use hostdisk::{DiskSetup, HostDisk};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a VM that is to come is waited for.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(60);

/// The process of one VM.
#[derive(clap::Args, Clone, Debug)]
pub struct VmArgs {
    /// The VM's name.
    #[arg(long, default_value = "vm")]
    pub name: String,
    /// The VM's id (made from the name if it is not given).
    #[arg(long)]
    pub uuid: Option<uuid::Uuid>,
    /// A disk: LABEL=PATH, with `,format=raw` or `,format=vmdk` if the name does not tell.
    #[arg(long = "disk", required = true)]
    pub disks: Vec<String>,
    /// The host's run folder, shared with the filter daemon.
    #[arg(long)]
    pub run_dir: PathBuf,
    /// The protected domain.
    #[arg(long, default_value = "default")]
    pub domain: String,
    /// Unix socket of the NBD server; every disk is an export named by its label.
    #[arg(long)]
    pub nbd_socket: Option<PathBuf>,
    /// TCP address of the NBD server; port 0 takes a free one.
    #[arg(long)]
    pub nbd_tcp: Option<SocketAddr>,
    /// The filter library. By default: the environment's JETDR_FILTER_LIB, or the one beside this
    /// program.
    #[arg(long)]
    pub filter_lib: Option<PathBuf>,
    /// Serve the disks without the filter.
    #[arg(long)]
    pub no_filter: bool,
    /// A property for the filter: KEY=VALUE.
    #[arg(long = "property")]
    pub properties: Vec<String>,
    /// Unix socket for commands, one JSON document a line: status, drain, grow, snapshot, revert,
    /// consolidate, snapshots, clone, fault, faults, heal, kill-at, hold-at; docs/faults.md has them all.
    #[arg(long)]
    pub control_socket: Option<PathBuf>,
    /// Fail writes that touch a range, some times: LABEL:OFFSET:LENGTH:COUNT.
    #[arg(long = "fault-write")]
    pub fault_writes: Vec<String>,
    /// A fault: KEY=VALUE,... with what=write|read|flush|any|sidecar, do=fail|delay|tear|tear-kill, and
    /// if wanted disk=LABEL, offset_bytes=, len_bytes=, skip=, count=, chance= (0 to 1), delay_us=.
    #[arg(long = "fault")]
    pub faults: Vec<String>,
    /// Kill the process when it passes a point for the n-th time: POINT or POINT:N.
    #[arg(long = "kill-at")]
    pub kill_at: Vec<String>,
    /// Wait when a point is passed for the n-th time: POINT=SOCKET or POINT:N=SOCKET. The process says so on
    /// that unix socket, and goes on when the other end closes.
    #[arg(long = "hold-at")]
    pub hold_at: Vec<String>,
    /// Seed of all chance in the faults; by default a new one, which is printed.
    #[arg(long)]
    pub fault_seed: Option<u64>,
    /// Completed writes that no flush covered are lost when the host has a power cut.
    #[arg(long)]
    pub volatile_cache: bool,
    /// Unix socket on which a VM of another host comes: its disks are opened, and its clients served, when
    /// it has come.
    #[arg(long, conflicts_with_all = ["nbd_socket"])]
    pub incoming: Option<PathBuf>,
    /// End at once when the filter breaks the contract, not only with a failure at the end.
    #[arg(long)]
    pub strict: bool,
    /// Delay every disk I/O by this many microseconds.
    #[arg(long, default_value_t = 0)]
    pub fault_delay_us: u64,
}

/// The label, the path and the format of a `--disk`.
pub(crate) fn parse_disk(text: &str) -> anyhow::Result<(String, PathBuf, Option<Format>)> {
    let (label, rest) = text
        .split_once('=')
        .with_context(|| format!("--disk {text}: expected LABEL=PATH"))?;
    let (path, format) = match rest.rsplit_once(",format=") {
        None => (rest, None),
        Some((path, "raw")) => (path, Some(Format::Raw)),
        Some((path, "vmdk")) => (path, Some(Format::Vmdk)),
        Some((_, other)) => bail!("--disk {text}: format `{other}` is neither raw nor vmdk"),
    };
    if label.is_empty() || path.is_empty() {
        bail!("--disk {text}: expected LABEL=PATH");
    }
    Ok((label.into(), path.into(), format))
}

/// The faults that the flags ask for.
fn faults_of(args: &VmArgs) -> anyhow::Result<Arc<faults::Faults>> {
    let faults = faults::Faults::new(args.fault_seed);
    for flag in &args.fault_writes {
        faults.add_write_flag(flag)?;
    }
    for flag in &args.faults {
        faults.add_flag(flag)?;
    }
    for flag in &args.kill_at {
        faults.kill_at(flag, None).context("--kill-at")?;
    }
    for flag in &args.hold_at {
        faults.hold_at_flag(flag).context("--hold-at")?;
    }
    if args.fault_delay_us > 0 {
        faults.add_flag(&format!(
            "what=any,do=delay,delay_us={}",
            args.fault_delay_us
        ))?;
    }
    Ok(Arc::new(faults))
}

/// An id that stays the same for the same name.
fn id_from_name(name: &str) -> uuid::Uuid {
    let mut bytes = [0u8; 16];
    for (i, byte) in name.bytes().enumerate() {
        let at = i % 16;
        if let Some(slot) = bytes.get_mut(at) {
            *slot = slot.wrapping_mul(31).wrapping_add(byte).rotate_left(3);
        }
    }
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

struct Vm {
    /// Of all disks, in order.
    labels: Vec<String>,
    disks: Vec<Arc<HostDisk>>,
    /// Served without the filter.
    plain: Vec<Arc<DiskEngine>>,
    contract: Arc<crate::contract::Contract>,
    faults: Arc<faults::Faults>,
    /// The filter is told of one thing at a time.
    events: parking_lot::Mutex<control::Doing>,
    server: parking_lot::Mutex<Option<Server>>,
}

impl Vm {
    /// The clients go on after a pause.
    fn resume(&self) {
        if let Some(server) = self.server.lock().as_mut() {
            server.resume();
        }
    }
}

/// Exports by label.
type Named = Vec<(String, Arc<dyn Engine>)>;

/// A VM without disks yet.
fn new_vm(args: &VmArgs) -> anyhow::Result<Vm> {
    let stops = args.kill_at.len() + args.hold_at.len();
    let asked = !(args.faults.is_empty() && args.fault_writes.is_empty()) || stops > 0;
    if args.no_filter && (asked || args.volatile_cache || args.fault_delay_us > 0) {
        bail!("faults strike below the filter: they cannot be had with --no-filter");
    }
    let labels: anyhow::Result<Vec<String>> = args
        .disks
        .iter()
        .map(|text| Ok(parse_disk(text)?.0))
        .collect();
    Ok(Vm {
        labels: labels?,
        disks: Vec::new(),
        plain: Vec::new(),
        contract: Arc::new(crate::contract::Contract::new(args.strict)),
        faults: faults_of(args)?,
        events: parking_lot::Mutex::default(),
        server: parking_lot::Mutex::default(),
    })
}

/// What is needed to open disks under the filter: got before, so that a migration waits for nothing.
struct Ready {
    library: load::Filter,
    tasks: Arc<tasks::Tasks>,
    setups: Vec<DiskSetup>,
}

fn ready(args: &VmArgs, faults: &Arc<Faults>) -> anyhow::Result<Ready> {
    let library = load::load(args.filter_lib.as_deref())?;
    let tasks = Arc::new(tasks::Tasks::start()?);
    let uuid = args.uuid.unwrap_or_else(|| id_from_name(&args.name));
    let mut properties = vec![("jetdr.domain".to_string(), args.domain.clone())];
    for text in &args.properties {
        let (key, value) = text
            .split_once('=')
            .with_context(|| format!("--property {text}: expected KEY=VALUE"))?;
        properties.push((key.into(), value.into()));
    }
    std::fs::create_dir_all(&args.run_dir)
        .with_context(|| format!("cannot make the run folder {}", args.run_dir.display()))?;
    let mut setups: Vec<DiskSetup> = Vec::new();
    for text in &args.disks {
        let (label, path, format) = parse_disk(text)?;
        if setups.iter().any(|known| known.label == label) {
            bail!("two disks are labelled `{label}`");
        }
        setups.push(DiskSetup {
            format: format.unwrap_or(Format::of(&path)),
            label,
            path,
            vm_name: args.name.clone(),
            vm_uuid: *uuid.as_bytes(),
            run_dir: args.run_dir.clone(),
            properties: properties.clone(),
            volatile_cache: args.volatile_cache,
            migrated: args.incoming.is_some(),
            faults: faults.clone(),
        });
    }
    Ok(Ready {
        library,
        tasks,
        setups,
    })
}

impl Ready {
    /// All disks, or none.
    fn open(
        &self,
        contract: &Arc<crate::contract::Contract>,
    ) -> anyhow::Result<Vec<Arc<HostDisk>>> {
        let mut disks: Vec<Arc<HostDisk>> = Vec::new();
        for setup in &self.setups {
            let (tasks, contract) = (self.tasks.clone(), contract.clone());
            match HostDisk::open(self.library, tasks, contract, setup.clone()) {
                Ok(disk) => disks.push(disk),
                Err(error) => {
                    disks
                        .iter()
                        .for_each(|disk| disk.close(abi::JIO_CLOSE_CLEAN));
                    return Err(error);
                }
            }
        }
        Ok(disks)
    }
}

fn exports_of(disks: &[Arc<HostDisk>]) -> Named {
    let exports = disks.iter().map(|disk| {
        let engine: Arc<dyn Engine> = Arc::new(pipeline::FilterEngine(disk.clone()));
        (disk.setup.label.clone(), engine)
    });
    exports.collect()
}

/// Opens the disks without the filter.
fn open_plain(args: &VmArgs) -> anyhow::Result<(Vec<Arc<DiskEngine>>, Named)> {
    let (mut plain, mut exports) = (Vec::new(), Named::new());
    for text in &args.disks {
        let (label, path, format) = parse_disk(text)?;
        let engine = Arc::new(DiskEngine(disk::open(&path, format)?));
        exports.push((label, engine.clone()));
        plain.push(engine);
    }
    Ok((plain, exports))
}

/// Opens the disks, and serves them where the flags say.
fn start(args: &VmArgs, listens: &[Listen], mut vm: Vm) -> anyhow::Result<Vm> {
    let exports = if args.no_filter {
        let (plain, exports) = open_plain(args)?;
        vm.plain = plain;
        exports
    } else {
        vm.disks = ready(args, &vm.faults)?.open(&vm.contract)?;
        exports_of(&vm.disks)
    };
    vm.server = Some(Server::start(listens, Exports::new(exports))?).into();
    Ok(vm)
}

/// Waits for the VM to come from another host, and goes on with it. The source waits for a word on the
/// link that is given back.
fn arrive(args: &VmArgs, at: &Path, mut vm: Vm) -> anyhow::Result<(Vm, UnixStream)> {
    let mut ready = match args.no_filter {
        true => None,
        false => Some(ready(args, &vm.faults)?),
    };
    let socket = UnixSocket::bind(at)?;
    let waiting = serde_json::json!({"pid": std::process::id(), "incoming": at});
    println!("WAITING {waiting}");
    let (_never, other) = UnixStream::pair()?;
    let come = raw::wait_for_either(socket.as_fd(), other.as_fd(), Some(ARRIVAL_LIMIT))?;
    if !come.0 {
        bail!("no VM came to {}", at.display());
    }
    let link = socket.accept()?;
    let migrated = handoff::welcome(&link, &vm.labels, ready.is_some(), &vm.faults)?;
    for setup in ready.iter_mut().flat_map(|ready| &mut ready.setups) {
        setup.migrated = migrated;
    }
    let received = handover::take_over(&link).context("the source ended before it handed over")?;
    vm.faults.pass(points::Point::InReceived, "");
    let opened = match &ready {
        Some(ready) => ready.open(&vm.contract).map(|disks| {
            let exports = exports_of(&disks);
            (disks, Vec::new(), exports)
        }),
        None => open_plain(args).map(|(plain, exports)| (Vec::new(), plain, exports)),
    };
    let mut exports = Named::new();
    let arrived = opened.map(|(disks, plain, named)| {
        exports = named;
        handoff::Arrived {
            disks,
            plain,
            migrated,
        }
    });
    if !handoff::opened(&link, &arrived) {
        bail!(
            arrived
                .err()
                .unwrap_or_else(|| anyhow::anyhow!("the migration did not happen"))
        );
    }
    let arrived = arrived?;
    (vm.disks, vm.plain) = (arrived.disks, arrived.plain);
    vm.server = Some(received.serve(Exports::new(exports))?).into();
    Ok((vm, link))
}

/// Runs until SIGTERM or SIGINT.
pub fn run(args: &VmArgs) -> anyhow::Result<()> {
    let mut listens = Vec::new();
    if let Some(path) = &args.nbd_socket {
        listens.push(Listen::Unix(path.clone()));
    }
    if let Some(address) = args.nbd_tcp {
        listens.push(Listen::Tcp(address));
    }
    if listens.is_empty() && args.incoming.is_none() {
        bail!("nobody could reach the disks: give --nbd-socket or --nbd-tcp");
    }
    let vm = new_vm(args)?;
    let (vm, source) = match &args.incoming {
        Some(at) => arrive(args, at, vm).map(|(vm, link)| (vm, Some(link)))?,
        None => (start(args, &listens, vm)?, None),
    };
    let vm = Arc::new(vm);
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let control = match &args.control_socket {
        Some(path) => Some(control::Control::start(path, vm.clone())?),
        None => None,
    };
    if let Some(source) = source {
        // Now it can be asked here as well; if the source has ended nobody waits for it.
        let _ = handover::send(&source, &serde_json::json!("running"));
    }
    let addresses = match vm.server.lock().as_ref() {
        Some(server) => server.addresses().to_vec(),
        None => Vec::new(),
    };
    let tcp = addresses.iter().find_map(|listen| match listen {
        Listen::Tcp(address) => Some(address.to_string()),
        Listen::Unix(_) => None,
    });
    let unix = addresses.iter().find_map(|listen| match listen {
        Listen::Unix(path) => Some(path),
        Listen::Tcp(_) => None,
    });
    let labels: Vec<String> = args
        .disks
        .iter()
        .filter_map(|text| Some(parse_disk(text).ok()?.0))
        .collect();
    let ready = serde_json::json!({
        "pid": std::process::id(),
        "nbd_socket": unix,
        "nbd_tcp": tcp,
        "exports": labels,
        "control_socket": args.control_socket,
        "fault_seed": vm.faults.seed(),
    });
    println!("READY {ready}");
    signals.forever().next();
    // What has begun ends first; if the VM moved away this process ends with it.
    let _last = vm.events.lock();
    if let Some(server) = vm.server.lock().as_mut() {
        server.stop();
    }
    drop(control);
    for disk in &vm.disks {
        disk.close(abi::JIO_CLOSE_CLEAN);
    }
    for engine in &vm.plain {
        engine.0.closed()?;
    }
    let deferred_max_ns = vm
        .contract
        .deferred_max_ns
        .load(std::sync::atomic::Ordering::Relaxed); // a figure
    tracing::info!(
        "VM {} stopped; {} contract violations, longest deferral {} us",
        args.name,
        vm.contract.violations(),
        deferred_max_ns / 1000
    );
    match vm.contract.violations() {
        0 => Ok(()),
        n => {
            tracing::error!("the filter violated the contract {n} times; see above");
            // An exit code of its own: whoever started the VM can tell this from any other failure.
            std::process::exit(crate::contract::EXIT_VIOLATION)
        }
    }
}
