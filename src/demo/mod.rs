//! `jetdr demo`: the whole path, once, on real input, with a kill in the middle.
//!
//! Invariant: the verdict is computed from the disks and from what was recovered out of the store
//! alone; nothing here knows what the answer should be. Whatever happens, all processes and files
//! that it made are gone when it ends.

mod load;
mod table;

use crate::parts::{Part, Stack, path_flag, run_folder};
use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Show all of it: protect a VM of two disks, kill it under load, recover, compare.
#[derive(clap::Args)]
pub struct Args {
    /// Where the disks, the log and the store go; by default a temporary folder.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Seconds of load before the kill, and again after it.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Keep the folder, and say where it is.
    #[arg(long)]
    keep: bool,
    /// Print the closing table as one JSON document.
    #[arg(long)]
    json: bool,
}

const DOMAIN: &str = "demo";
const IMAGE_BYTES: u64 = 64 << 20;
/// The first disk: the file system's image, then room for the load.
const DATA_BYTES: u64 = 128 << 20;
/// The second disk: load only.
const SCRATCH_BYTES: u64 = 64 << 20;
/// Real files that are put into the image, at most.
const FILES_BYTES: u64 = 24 << 20;

/// Says what is being done, with a spinner on a terminal and plain lines otherwise.
struct Steps {
    bar: Option<ProgressBar>,
    quiet: bool,
    since: Instant,
}

impl Steps {
    fn new(quiet: bool) -> Self {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr()) && !quiet;
        let bar = terminal.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self {
            bar,
            quiet,
            since: Instant::now(),
        }
    }

    fn begin(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(what.to_string()),
            None if !self.quiet => eprintln!("  ... {what}"),
            None => {}
        }
    }

    fn done(&self, what: &str) {
        let line = format!("{:6.1} s  {what}", self.since.elapsed().as_secs_f64());
        match &self.bar {
            Some(bar) => bar.println(line),
            None if !self.quiet => eprintln!("{line}"),
            None => {}
        }
    }
}

/// Finds a program as a shell would, and in the folders for administration.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(more)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// Copies real files of this machine's documentation until there are enough.
fn gather(from: &Path, to: &Path, left: &mut u64) {
    let Ok(entries) = std::fs::read_dir(from) else {
        return;
    };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            if std::fs::create_dir(&target).is_ok() {
                gather(&entry.path(), &target, left);
            }
        } else if kind.is_file()
            && let Ok(len) = entry.metadata().map(|meta| meta.len())
            && len <= *left
            && std::fs::copy(entry.path(), &target).is_ok()
        {
            *left -= len;
        }
    }
}

/// Makes an ext4 image of real files, without root.
fn make_image(dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    let Some(mke2fs) = find_program("mke2fs") else {
        return Ok(None);
    };
    let files = dir.join("files");
    std::fs::create_dir_all(&files)?;
    let mut left = FILES_BYTES;
    for from in [
        "/usr/share/doc",
        "/usr/share/common-licenses",
        "/usr/include",
    ] {
        let to = files.join(Path::new(from).file_name().unwrap_or_default());
        if Path::new(from).is_dir() && std::fs::create_dir(&to).is_ok() {
            gather(Path::new(from), &to, &mut left);
        }
    }
    let image = dir.join("image.ext4");
    File::create(&image)?.set_len(IMAGE_BYTES)?;
    let made = Command::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4", "-L", "jetdr-demo", "-d"])
        .arg(&files)
        .arg(&image)
        .output()
        .context("cannot run mke2fs")?;
    if !made.status.success() {
        bail!("mke2fs: {}", String::from_utf8_lossy(&made.stderr));
    }
    std::fs::remove_dir_all(&files)?;
    Ok(Some(image))
}

/// The first byte in which two files differ; `None`: they are the same.
fn first_difference(a: &Path, b: &Path) -> anyhow::Result<Option<u64>> {
    let (left, right) = (File::open(a)?, File::open(b)?);
    let (len, other) = (left.metadata()?.len(), right.metadata()?.len());
    if len != other {
        return Ok(Some(len.min(other)));
    }
    let (mut x, mut y) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
    let mut at = 0;
    while at < len {
        let step = (len - at).min(1 << 20) as usize;
        let (x, y) = (
            x.get_mut(..step).unwrap_or_default(),
            y.get_mut(..step).unwrap_or_default(),
        );
        left.read_exact_at(x, at)?;
        right.read_exact_at(y, at)?;
        if let Some(i) = x.iter().zip(y.iter()).position(|(x, y)| x != y) {
            return Ok(Some(at + i as u64));
        }
        at += step as u64;
    }
    Ok(None)
}

/// What the demo found.
pub struct Findings {
    /// Bytes that clients wrote.
    pub written_bytes: u64,
    /// What the appliance says of the domain at the end.
    pub domain: Value,
    /// The cut that was recovered.
    pub cut: u64,
    /// Per disk: label, and the first byte that differs.
    pub disks: Vec<(String, Option<u64>)>,
    /// What e2fsck said of the recovered file system; `None`: it is not installed.
    pub fsck: Option<Result<(), String>>,
    /// Longest time that a write was held for replication, in ns.
    pub deferred_max_ns: u64,
    /// Which client made the load.
    pub client: &'static str,
    /// Seconds in all.
    pub seconds: f64,
}

impl Findings {
    /// Whether everything is as it should be.
    pub fn good(&self) -> bool {
        self.disks
            .iter()
            .all(|(_, difference)| difference.is_none())
            && !matches!(self.fsck, Some(Err(_)))
    }
}

/// Runs the demo.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("jetdr-demo-");
    let dir = match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir)?;
            builder.tempdir_in(dir)
        }
        None => builder.tempdir(),
    };
    let dir = dir.context("cannot make a folder for the demo")?;
    let run = run_folder()?;
    // Ctrl-C becomes an error at the next step, so that everything is cleaned up.
    let stopping = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    signal_hook::flag::register(libc::SIGINT, stopping.clone())?;
    signal_hook::flag::register(libc::SIGTERM, stopping.clone())?;
    let findings = show(args, dir.path(), run.path(), &stopping);
    if args.keep {
        eprintln!("kept: {}", dir.keep().display());
    }
    drop(run);
    let findings = findings?;
    table::print(&findings, args.json);
    if findings.good() {
        Ok(())
    } else {
        bail!("what was recovered is not what was written")
    }
}

fn show(
    args: &Args,
    dir: &Path,
    run: &Path,
    stopping: &std::sync::atomic::AtomicBool,
) -> anyhow::Result<Findings> {
    let check = || {
        if stopping.load(std::sync::atomic::Ordering::Acquire) {
            bail!("interrupted");
        }
        Ok(())
    };
    let steps = Steps::new(args.json);
    let store = dir.join("store");
    let socket = run.join("nbd.sock");
    let disks = [("data", DATA_BYTES), ("scratch", SCRATCH_BYTES)];
    let mut vm = vec![
        "--name".to_string(),
        "demo-vm".into(),
        "--domain".into(),
        DOMAIN.into(),
    ];
    for (label, bytes) in disks {
        let path = dir.join(format!("{label}.raw"));
        File::create(&path)?.set_len(bytes)?;
        vm.extend(["--disk".into(), format!("{label}={}", path.display())]);
    }
    vm.extend(path_flag("--nbd-socket", &socket));

    steps.begin("starting the appliance, the host daemon and a VM of two disks");
    let mut stack = Stack::start(run, dir, &store.display().to_string(), &[], &vm)?;
    let pid = stack.vm.as_ref().map_or(0, Part::pid);
    steps.done(&format!(
        "an appliance, a host daemon and a VM (process {pid}) of two disks run"
    ));

    steps.begin("copying an ext4 image of real files onto the first disk");
    let mut written_bytes = 0;
    match make_image(dir)? {
        Some(image) => {
            let client = load::copy(&image, &socket, "data")?;
            written_bytes += IMAGE_BYTES;
            steps.done(&format!(
                "{client} copied an ext4 image of real files onto disk `data`"
            ));
            std::fs::remove_file(&image)?;
        }
        None => steps.done("mke2fs is not installed: no file system in this run"),
    }
    check()?;

    steps.begin("random writes on both disks, then SIGKILL");
    let mut writers = load::Load::start(&socket, dir, args.seconds * 4)?;
    let client = writers.client();
    load::wait(Duration::from_secs(args.seconds), stopping);
    check()?;
    let Some(vm) = stack.vm.take() else {
        bail!("the VM is gone")
    };
    vm.kill()?;
    written_bytes += writers.end();
    steps.done(&format!(
        "{client} wrote at random to both disks; the VM was killed in the middle"
    ));

    steps.begin("restarting the VM, more random writes, verified");
    stack.start_vm()?;
    written_bytes += load::verified(&socket, dir, args.seconds)?;
    steps.done(&format!("the VM is back; {client} wrote and verified more"));
    check()?;

    steps.begin("waiting until the store has it all");
    stack.settle(Duration::from_secs(60))?;
    let deferred_max_ns = stack
        .disks()?
        .iter()
        .filter_map(|disk| disk.get("deferred_ns_max").and_then(Value::as_u64))
        .max()
        .unwrap_or(0);
    let cut = stack.cut(DOMAIN, "demo-end")?;
    let domain = stack.domain(DOMAIN)?;
    stack.stop()?;
    steps.done(&format!("cut {cut} is in the store; all parts are stopped"));

    steps.begin("recovering both disks from the store alone");
    let recovered = dir.join("recovered");
    recover(&store.join(DOMAIN), &recovered)?;
    let files = recovered_files(&recovered)?;
    let mut compared = Vec::new();
    for (label, _) in disks {
        let name = format!("{label}.raw");
        let file = files
            .iter()
            .find(|path| path.to_string_lossy().ends_with(&name));
        let file = file.with_context(|| format!("no recovered file for disk {label}"))?;
        compared.push((label.to_string(), first_difference(&dir.join(&name), file)?));
    }
    steps.done("both disks are recovered and compared byte for byte");
    let data = files
        .iter()
        .find(|path| path.to_string_lossy().ends_with("data.raw"));
    let fsck = match (find_program("e2fsck"), data) {
        (Some(e2fsck), Some(data)) if written_bytes >= IMAGE_BYTES => {
            let checked = Command::new(e2fsck).arg("-fn").arg(data).output()?;
            let said = String::from_utf8_lossy(&checked.stdout).into_owned();
            Some(if checked.status.success() {
                Ok(())
            } else {
                Err(said)
            })
        }
        _ => None,
    };
    let seconds = steps.since.elapsed().as_secs_f64();
    let disks = compared;
    Ok(Findings {
        written_bytes,
        domain,
        cut,
        disks,
        fsck,
        deferred_max_ns,
        client,
        seconds,
    })
}

fn recover(container: &Path, out: &Path) -> anyhow::Result<()> {
    let recovered = Command::new(std::env::current_exe()?)
        .args(["rocva", "recover", "--cut", "demo-end", "--from"])
        .arg(container)
        .arg("--out")
        .arg(out)
        .output()?;
    if !recovered.status.success() {
        bail!("recover: {}", String::from_utf8_lossy(&recovered.stderr));
    }
    Ok(())
}

fn recovered_files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(recovered_files(&entry.path())?);
        } else {
            files.push(entry.path());
        }
    }
    Ok(files)
}
