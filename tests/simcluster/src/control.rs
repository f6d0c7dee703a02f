//! Commands over a unix socket: one JSON document a line, one answer a line. What an operator, a cable or a
//! power failure does to a real site.
//!
//! Invariant: a command that cannot be understood is answered with what was expected, and does nothing.

use crate::host::Host;
use crate::world::{HostSpec, MachineSpec, World};
use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use simhost::socket::UnixSocket;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The socket's name in the site's folder.
pub const SOCKET: &str = "control.sock";
const MAX_COMMAND_BYTES: u64 = 4 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What the site is told.
#[derive(Debug, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
enum Command {
    Status,
    AddCluster {
        name: String,
        #[serde(default = "yes")]
        drs: bool,
    },
    SetDrs {
        cluster: String,
        on: bool,
    },
    AddHost(HostSpec),
    Join {
        host: String,
        cluster: String,
    },
    Leave {
        host: String,
    },
    Reboot {
        host: String,
        #[serde(default)]
        crash: bool,
    },
    SetHost(Change),
    Host {
        host: String,
    },
    AddVm(MachineSpec),
    Vm {
        vm: String,
    },
    /// A command to a machine's own process.
    Ask {
        vm: String,
        what: Value,
    },
    Crash {
        vm: String,
    },
    SetSnapshots {
        vm: String,
        on: bool,
    },
    /// An init script of a host.
    Service {
        host: String,
        name: String,
        verb: String,
    },
    /// A file below a host's root.
    WriteFile {
        host: String,
        path: PathBuf,
        text: String,
    },
    /// A connection from a process of a host.
    Probe {
        host: String,
        to: String,
    },
    /// A user of vCenter, who may do nothing yet.
    AddAccount {
        name: String,
        password: String,
    },
    /// Roles, and who has them.
    Access,
    /// The plug-in's entry with this key.
    Extension {
        key: String,
    },
    EndSessions,
    ForgetTasks,
}

const fn yes() -> bool {
    true
}

/// What changes of a host; the rest stays.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    host: String,
    reachable: Option<bool>,
    disconnected: Option<bool>,
    clock_ahead_ms: Option<i64>,
    cim: Option<bool>,
    dns: Option<Vec<String>>,
    version: Option<String>,
    build: Option<u64>,
    force: Option<bool>,
    hold: Option<bool>,
}

/// The listening socket.
#[derive(Debug)]
pub struct Control {
    socket: Arc<UnixSocket>,
    stopping: Arc<AtomicBool>,
    path: PathBuf,
}

impl Control {
    /// Listens in the site's folder.
    pub fn start(world: &Arc<World>) -> anyhow::Result<Self> {
        let path = world.folder().join(SOCKET);
        let socket = Arc::new(UnixSocket::bind(&path)?);
        let stopping = Arc::new(AtomicBool::new(false));
        let (listener, stop, world) = (socket.clone(), stopping.clone(), world.clone());
        std::thread::spawn(move || {
            while let Ok(stream) = listener.accept() {
                if stop.load(Ordering::Acquire) {
                    return; // pairs with the store in drop
                }
                let world = world.clone();
                std::thread::spawn(move || serve(&stream, &world));
            }
        });
        Ok(Self {
            socket,
            stopping,
            path,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release); // pairs with the loop's load
        self.socket.wake();
    }
}

fn serve(stream: &UnixStream, world: &Arc<World>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        match (&mut reader).take(MAX_COMMAND_BYTES).read_line(&mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let answer = match serde_json::from_str(&line) {
            Ok(command) => obey(world, command),
            Err(error) => Err(anyhow::anyhow!("not a command: {error}")),
        };
        let answer = answer.unwrap_or_else(|error| json!({"error": format!("{error:#}")}));
        if writeln!(&mut &*stream, "{answer}").is_err() {
            return;
        }
    }
}

/// Waits for the end of a task.
pub fn wait(world: &World, task: &Value) -> Value {
    loop {
        match world.task_end(task) {
            Some(Ok(())) => return json!({"task": task, "state": "success"}),
            Some(Err(why)) => return json!({"task": task, "state": "error", "why": why}),
            None => std::thread::sleep(LOOK_EVERY),
        }
    }
}

fn about(host: &Host) -> Value {
    let services = host
        .services()
        .into_iter()
        .collect::<std::collections::BTreeMap<_, _>>();
    let packages: Vec<String> = host.packages().into_iter().map(|p| p.filter_id()).collect();
    json!({
        "id": host.id, "name": host.name, "address": host.address, "root": host.root(),
        "services": services, "filters": packages, "running": host.running(),
    })
}

fn obey(world: &Arc<World>, command: Command) -> anyhow::Result<Value> {
    match command {
        Command::Status => Ok(world.overview()),
        Command::AddCluster { name, drs } => Ok(json!({"id": world.add_cluster(&name, drs)?})),
        Command::SetDrs { cluster, on } => world.set_drs(&cluster, on).map(|()| json!({})),
        Command::AddHost(spec) => {
            let id = world.add_host(&spec)?;
            Ok(about(&*world.host(&id)?))
        }
        Command::Join { host, cluster } => Ok(wait(world, &world.join(&host, &cluster)?)),
        Command::Leave { host } => Ok(wait(world, &world.leave(&host)?)),
        Command::Reboot { host, crash } => match world.reboot(&host, crash)? {
            Some(task) => Ok(wait(world, &task)),
            None => Ok(json!({})),
        },
        Command::SetHost(change) => set_host(world, change).map(|()| json!({})),
        Command::Host { host } => Ok(about(&*world.host(&host)?)),
        Command::AddVm(spec) => Ok(json!({"id": world.add_vm(&spec)?})),
        Command::Vm { vm } => {
            let vm = world.machine(&vm)?;
            let socket = world.guest_socket(&vm.name);
            Ok(json!({
                "name": vm.name, "host": vm.host, "disks": vm.disks, "nbd_socket": socket,
            }))
        }
        Command::Ask { vm, what } => {
            let vm = world.machine(&vm)?;
            world.host(&vm.host)?.ask_machine(&vm.name, &what)
        }
        Command::Crash { vm } => {
            let vm = world.machine(&vm)?;
            world.host(&vm.host)?.power_off(&vm.name, true);
            Ok(json!({}))
        }
        Command::SetSnapshots { vm, on } => world.set_snapshots(&vm, on).map(|()| json!({})),
        Command::Service { host, name, verb } => service(&*world.host(&host)?, &name, &verb),
        Command::WriteFile { host, path, text } => {
            write_file(&*world.host(&host)?, &path, &text).map(|()| json!({}))
        }
        Command::Probe { host, to } => {
            let output = world.host(&host)?.own_command(&["probe", &to]).output()?;
            let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
            Ok(match output.status.success() {
                true => json!({"from": said(&output.stdout)}),
                false => json!({"refused": said(&output.stderr)}),
            })
        }
        Command::AddAccount { name, password } => {
            world.add_account(&name, &password).map(|()| json!({}))
        }
        Command::Access => Ok(json!({
            "roles": world.roles(), "permissions": world.permissions(),
        })),
        Command::Extension { key } => Ok(json!({"extension": world.extension(&key)})),
        Command::EndSessions => {
            world.end_sessions();
            Ok(json!({}))
        }
        Command::ForgetTasks => {
            world.forget_tasks();
            Ok(json!({}))
        }
    }
}

fn set_host(world: &Arc<World>, change: Change) -> anyhow::Result<()> {
    let host = world.host(&change.host)?;
    host.set(|settings| {
        fn put<T>(at: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *at = value;
            }
        }
        put(&mut settings.is_reachable, change.reachable);
        put(&mut settings.clock_ahead_ms, change.clock_ahead_ms);
        put(&mut settings.is_cim_running, change.cim);
        put(&mut settings.dns_servers, change.dns);
        put(&mut settings.version, change.version);
        put(&mut settings.build, change.build);
        put(&mut settings.is_forced, change.force);
        put(&mut settings.is_held, change.hold);
    });
    match change.disconnected {
        Some(is) => world.set_disconnected(&change.host, is),
        None => Ok(()),
    }
}

fn service(host: &Host, name: &str, verb: &str) -> anyhow::Result<Value> {
    if !host.services().iter().any(|(known, _)| known == name) {
        bail!("{} has no service {name}", host.name);
    }
    let words: Vec<&str> = verb.split(' ').collect();
    let output = host
        .script(name, &words)
        .context("cannot run the init script")?;
    Ok(json!({
        "code": output.status.code(), "out": String::from_utf8_lossy(&output.stdout),
        "err": String::from_utf8_lossy(&output.stderr),
    }))
}

fn write_file(host: &Host, path: &Path, text: &str) -> anyhow::Result<()> {
    if !path
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        bail!("{} is no path below the root", path.display());
    }
    let path = host.root().join(path);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    host.refresh_firewall()
}
