//! The parts as processes: started, waited for, stopped, killed, talked to.
//!
//! Invariant: a part that was started is stopped when its handle goes, whatever happened in between.

use anyhow::{Context, bail};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a part may take to be ready, and to stop.
const LIMIT: Duration = Duration::from_secs(30);

/// A running part.
pub struct Part {
    child: Child,
    name: &'static str,
    log: PathBuf,
    /// What it printed when it was ready.
    pub ready: Value,
}

/// The last lines of a log, for an error.
fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n  ")
}

impl Part {
    /// Starts `jetdr <arguments>` and waits until it says that it is ready. Its log goes to a file in
    /// `dir`.
    pub fn start(name: &'static str, dir: &Path, arguments: &[String]) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let open = File::options().create(true).append(true).open(&log);
        let errors = open.with_context(|| format!("cannot write {}", log.display()))?;
        let program = std::env::current_exe().context("where is this program?")?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            // A group of its own: Ctrl-C is for this process, which stops the parts in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let stdout = child.stdout.take().context("its output is piped")?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(json) = line.strip_prefix("READY ") {
                    let _ = sender.send(json.to_string());
                }
            }
        });
        let mut part = Self {
            child,
            name,
            log,
            ready: Value::Null,
        };
        match receiver.recv_timeout(LIMIT) {
            Ok(json) => part.ready = serde_json::from_str(&json)?,
            Err(_) => {
                let _ = part.child.kill();
                let status = part.child.wait();
                let status = status.map_or("gone".to_string(), |status| status.to_string());
                bail!("{name} did not start ({status}):\n  {}", tail(&part.log));
            }
        }
        Ok(part)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it with SIGKILL.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.child
            .kill()
            .with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// Stops it in order; an error if it says that something went wrong.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let status = self.end()?;
        if !status.success() {
            bail!("{} ended with {status}:\n  {}", self.name, tail(&self.log));
        }
        Ok(())
    }

    fn end(&mut self) -> anyhow::Result<std::process::ExitStatus> {
        terminate(self.child.id());
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if since.elapsed() > LIMIT {
                self.child.kill()?;
                return Ok(self.child.wait()?);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.end();
        }
    }
}

/// Sends SIGTERM to a process whose id is known to be its own: a child that was not waited for, or one that was
/// just looked at.
pub(crate) fn terminate(pid: u32) {
    // SAFETY: a plain call; an id that is nobody's any more makes it fail, and nothing else.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
}

/// Sends one command to a part's socket and returns its answer.
pub fn command(socket: &Path, command: &Value, limit: Duration) -> anyhow::Result<Value> {
    let what = || format!("cannot talk to {}", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(what)?;
    stream.set_read_timeout(Some(limit))?;
    writeln!(stream, "{command}").with_context(what)?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .with_context(what)?;
    let answer: Value = serde_json::from_str(&line).with_context(what)?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => bail!("{error}"),
        None => Ok(answer),
    }
}

/// A folder for lanes and sockets: in memory where that is possible, since a lane is memory.
pub fn run_folder() -> anyhow::Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let mut builder = tempfile::Builder::new();
    builder.prefix("jetdr-");
    let made = if memory.is_dir() {
        builder.tempdir_in(memory)
    } else {
        builder.tempdir()
    };
    made.or_else(|_| builder.tempdir())
        .context("cannot make a folder for the lanes")
}

/// `--key value` for a path.
pub fn path_flag(key: &str, path: &Path) -> [String; 2] {
    [key.into(), path.display().to_string()]
}

/// The three parts that replicate a VM's disks, on one machine.
pub struct Stack {
    /// The VM's process.
    pub vm: Option<Part>,
    /// The host daemon.
    pub daemon: Part,
    /// The DR appliance.
    pub drva: Part,
    /// The appliance's commands.
    pub drva_socket: PathBuf,
    /// The VM's commands.
    pub vm_socket: PathBuf,
    vm_arguments: Vec<String>,
    logs: PathBuf,
}

impl Stack {
    /// Starts them: `run` holds lanes and sockets, `state` the replication log and the parts' logs.
    pub fn start(
        run: &Path,
        state: &Path,
        store: &str,
        store_options: &[String],
        vm: &[String],
    ) -> anyhow::Result<Self> {
        let drva_socket = run.join("drva.sock");
        let vm_socket = run.join("vm-control.sock");
        let mut drva = vec!["drva".to_string()];
        drva.extend(path_flag("--data-dir", &state.join("drva")));
        drva.extend([
            "--store".into(),
            store.into(),
            "--port-base".into(),
            "0".into(),
            // All of it is one machine's, on its loopback.
            "--insecure-plain-text".into(),
        ]);
        drva.extend(path_flag("--status-socket", &drva_socket));
        for option in store_options {
            drva.extend(["--store-opt".into(), option.clone()]);
        }
        let drva = Part::start("drva", state, &drva)?;
        let base = drva
            .ready
            .get("port_base")
            .and_then(Value::as_u64)
            .unwrap_or(0);
        let mut daemon = vec![
            "filterd".to_string(),
            "--port-base".into(),
            base.to_string(),
            "--insecure-plain-text".into(),
        ];
        daemon.extend(path_flag("--run-dir", run));
        let daemon = Part::start("filterd", state, &daemon)?;
        let mut vm_arguments = vec!["simhost".to_string(), "vm".into()];
        vm_arguments.extend(path_flag("--run-dir", run));
        vm_arguments.extend(path_flag("--control-socket", &vm_socket));
        vm_arguments.extend(vm.iter().cloned());
        let logs = state.to_owned();
        let mut stack = Self {
            vm: None,
            daemon,
            drva,
            drva_socket,
            vm_socket,
            vm_arguments,
            logs,
        };
        stack.start_vm()?;
        Ok(stack)
    }

    /// Starts the VM's process (again).
    pub fn start_vm(&mut self) -> anyhow::Result<()> {
        self.vm = Some(Part::start("vm", &self.logs, &self.vm_arguments)?);
        Ok(())
    }

    /// What the appliance says of a domain.
    pub fn domain(&self, name: &str) -> anyhow::Result<Value> {
        let status = serde_json::json!({"cmd": "status"});
        let answer = command(&self.drva_socket, &status, LIMIT)?;
        let domains = answer.get("domains").and_then(Value::as_array);
        let found = domains
            .into_iter()
            .flatten()
            .find(|d| d.get("name").is_some_and(|n| n == name));
        found
            .cloned()
            .with_context(|| format!("the appliance does not know domain {name} yet"))
    }

    /// What the VM's process says of its disks.
    pub fn disks(&self) -> anyhow::Result<Vec<Value>> {
        let status = serde_json::json!({"cmd": "status"});
        let answer = command(&self.vm_socket, &status, LIMIT)?;
        Ok(answer
            .get("disks")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default())
    }

    /// Waits until every disk streams and all that was written is durable at the appliance.
    pub fn settle(&self, limit: Duration) -> anyhow::Result<()> {
        let since = Instant::now();
        loop {
            let disks = self.disks()?;
            let settled = disks.iter().all(|disk| {
                disk.get("state").is_some_and(|state| state == "streaming")
                    && disk.get("published_seq") == disk.get("durable_seq")
            });
            if settled {
                return Ok(());
            }
            if since.elapsed() > limit {
                let disks = serde_json::to_string(&disks)?;
                bail!("the disks do not come to rest: {disks}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Takes a named cut and waits until the store holds it; returns its number.
    pub fn cut(&self, domain: &str, name: &str) -> anyhow::Result<u64> {
        let request = serde_json::json!({"cmd": "cut", "domain": domain, "name": name});
        let answer = command(&self.drva_socket, &request, Duration::from_secs(90))?;
        answer
            .get("cut")
            .and_then(Value::as_u64)
            .context("the appliance named no cut")
    }

    /// Stops them in order.
    pub fn stop(mut self) -> anyhow::Result<()> {
        if let Some(vm) = self.vm.take() {
            vm.stop()?;
        }
        self.daemon.stop()?;
        self.drva.stop()
    }
}
