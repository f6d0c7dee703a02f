//! Processes of a benchmark: pinned to cores, waited for by condition, ended with it.
//!
//! Invariant: a process that was started is ended when its [`Running`] is dropped, whatever failed;
//! only processes that were started here are ever signalled.

use anyhow::{Context, bail};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long a server may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long a process may take to stop before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Where the client and the server of a job run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Both on one core: no wake-up of another core.
    Together,
    /// One core each.
    Apart,
    /// Left to the scheduler.
    Free,
}

impl Placement {
    /// Its name in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Together => "one core",
            Self::Apart => "a core each",
            Self::Free => "unpinned",
        }
    }

    /// Core of the client.
    pub const fn client(self) -> Option<u32> {
        match self {
            Self::Together | Self::Apart => Some(0),
            Self::Free => None,
        }
    }

    /// Core of the server.
    pub const fn server(self) -> Option<u32> {
        match self {
            Self::Together => Some(0),
            Self::Apart => Some(1),
            Self::Free => None,
        }
    }
}

/// A command that will run on one core, or anywhere.
pub fn pinned(core: Option<u32>, program: impl AsRef<Path>) -> Command {
    let program = program.as_ref();
    let Some(core) = core else {
        return Command::new(program);
    };
    let mut command = Command::new("taskset");
    command.arg("-c").arg(core.to_string()).arg(program);
    command
}

/// Pins a process that runs already, all its threads.
pub fn pin(pid: u32, core: Option<u32>) -> anyhow::Result<()> {
    let cores = match core {
        Some(core) => core.to_string(),
        None => format!("0-{}", std::thread::available_parallelism()?.get() - 1),
    };
    let output = Command::new("taskset")
        .args(["-a", "-c", "-p", &cores, &pid.to_string()])
        .output()
        .context("run taskset")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(
        output.status.success(),
        "cannot pin process {pid} to {cores}: {text}"
    );
    Ok(())
}

/// Memory-backed folder, where the run folder of a host lies as well.
pub fn memory_folder() -> PathBuf {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        shm.to_owned()
    } else {
        std::env::temp_dir()
    }
}

/// Whether a program can be found.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Waits until `condition` gives something.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = condition()? {
            return Ok(found);
        }
        if started.elapsed() > limit {
            bail!("waited {} s for {what}", limit.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A process that is stopped with this value.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
}

/// What `/proc` counts processor time in, on every Linux.
const TICKS_PER_S: f64 = 100.0;

impl Running {
    /// Starts a process that says nothing when it is ready.
    pub fn start(name: &str, mut command: Command) -> anyhow::Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let child = child.with_context(|| format!("start {name}"))?;
        Ok(Self {
            child,
            name: name.to_owned(),
        })
    }

    /// Starts a process that prints `READY {json}` on its standard output; gives the JSON.
    pub fn start_ready(
        name: &str,
        mut command: Command,
    ) -> anyhow::Result<(Self, serde_json::Value)> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        // What it logs is wanted only when something is wrong.
        if std::env::var_os("BENCH_LOG").is_none() {
            command.stderr(Stdio::null());
        }
        let mut child = command.spawn().with_context(|| format!("start {name}"))?;
        let output = child.stdout.take().context("a piped standard output")?;
        let running = Self {
            child,
            name: name.to_owned(),
        };
        let (send, receive) = mpsc::channel();
        // Reads to the end, so that the process never blocks on a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some(json) = line.strip_prefix("READY ") {
                    let _ = send.send(json.to_owned());
                }
            }
        });
        let line = receive.recv_timeout(READY_LIMIT).with_context(|| {
            format!("{name} did not say READY: run with BENCH_LOG=1 to see its log")
        })?;
        let json = serde_json::from_str(&line).with_context(|| format!("READY line of {name}"))?;
        Ok((running, json))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error if it has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("{} has ended: {status}", self.name),
            None => Ok(()),
        }
    }

    fn stop(&mut self) {
        let terminate = Command::new("kill")
            .arg(self.child.id().to_string())
            .status();
        let ended = terminate.is_ok()
            && wait_for("the end", STOP_LIMIT, || Ok(self.child.try_wait()?)).is_ok();
        if !ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A process that has ended was waited for: its number may be another's by now.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.stop();
        }
    }
}

/// Resident memory of a process in bytes, with its part of what it shares.
pub fn resident_bytes(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    parse_resident(&text).with_context(|| format!("{path} has no line `Rss`"))
}

/// Seconds of processor time that a process has used.
pub fn processor_s(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let ticks = parse_ticks(&text).with_context(|| format!("{path} has no times"))?;
    Ok(ticks as f64 / TICKS_PER_S)
}

/// Ticks in user and in system mode. The name before them may hold anything, also blanks and brackets.
fn parse_ticks(text: &str) -> Option<u64> {
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    user.checked_add(system)
}

fn parse_resident(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read() {
        let line = "7 (a) b) S 1 7 7 0 -1 0 1 2 3 4 50 25 0 0 20 0 1 0";
        assert_eq!(parse_ticks(line), Some(75));
        assert_eq!(parse_ticks("7 (a) S 1"), None);
        assert!(processor_s(std::process::id()).is_ok());
    }

    #[test]
    fn resident_memory_is_read() {
        assert_eq!(
            parse_resident("x\nRss:            1024 kB\nPss: 3 kB\n"),
            Some(1 << 20)
        );
        assert_eq!(parse_resident("Rss: many kB\n"), None);
        assert!(resident_bytes(std::process::id()).expect("our own") > 1 << 16);
    }

    #[test]
    fn a_ready_process_is_found_and_stopped() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "echo noise; echo 'READY {\"port\": 7}'; exec cat /dev/zero",
        ]);
        let (running, json) = Running::start_ready("a server", command).expect("sh");
        assert_eq!(json["port"], 7);
        let proc = format!("/proc/{}", running.pid());
        assert!(Path::new(&proc).exists());
        drop(running);
        assert!(!Path::new(&proc).exists(), "it was waited for");
    }

    #[test]
    fn a_process_that_ends_too_early_is_an_error() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo wrong"]);
        let error = Running::start_ready("a server", command).expect_err("never ready");
        assert!(
            format!("{error:#}").contains("did not say READY"),
            "{error:#}"
        );
    }

    #[test]
    fn a_wait_has_an_end() {
        let limit = Duration::from_millis(1);
        let error = wait_for("rain", limit, || Ok(None::<()>)).expect_err("no rain");
        assert!(error.to_string().contains("rain"));
    }
}
