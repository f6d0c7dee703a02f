//! The run commands: each asks the management server for an execution and shows its output while it runs.
//!
//! Invariant: the exit code is 0 only if all of it was done: 1, if the execution failed or was refused;
//! 2, if it came to its end and some hosts failed. A command that is interrupted leaves the execution
//! running: it goes on in the server.

use anyhow::{Context, bail};
use enrol::http::{Client, Server};
use serde_json::{Map, Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Between two looks at the output.
const POLL: Duration = Duration::from_millis(500);
/// The server may be away for so long while an execution is followed: it may be restarted.
const PATIENCE: Duration = Duration::from_secs(120);

/// Which server, and as whom.
#[derive(clap::Args, Clone, Debug)]
pub struct At {
    /// The management server: https://NAME:PORT.
    #[arg(long, env = "JETDR_MSA")]
    msa: Server,
    /// The server's authority, PEM: its `ca.pem`.
    #[arg(long, env = "JETDR_CA")]
    ca: PathBuf,
    /// The file with a token of `/login` or `/tokens`; `-` is standard input.
    #[arg(long, env = "JETDR_TOKEN_FILE")]
    token_file: PathBuf,
}

/// The common fields of run commands.
#[derive(clap::Args, Clone, Debug)]
pub struct Run {
    #[command(flatten)]
    at: At,
    /// The execution's name, letters and digits; made from the time, if it is not given.
    #[arg(long)]
    execution_name: Option<String>,
    /// Seconds after which it is ended and taken back.
    #[arg(long, default_value_t = 1800)]
    timeout_s: u32,
    /// Days for which its output is kept.
    #[arg(long, default_value_t = 60)]
    retention_days: u32,
    /// Do not wait for its end.
    #[arg(long)]
    no_wait: bool,
    /// The vCenter's name in the server, if there are several.
    #[arg(long)]
    vcenter: Option<String>,
}

/// What is looked at.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Preflight {
    /// vCenter, its version and clock, names in DNS.
    System(Run),
    /// Whether a cluster can be protected.
    Install(PreflightInstall),
    /// Whether the component can be removed from a cluster.
    Uninstall(PreflightUninstall),
}

/// What `preflight install` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct PreflightInstall {
    #[command(flatten)]
    run: Run,
    /// The cluster whose machines are to be protected.
    #[arg(long)]
    protected_cluster: String,
    /// The cluster of the server's own machine; without it, the same.
    #[arg(long)]
    cluster: Option<String>,
    /// That machine's network.
    #[arg(long)]
    network: Option<String>,
    /// That machine's datastore.
    #[arg(long)]
    datastore: Option<String>,
    /// That machine's name.
    #[arg(long)]
    vm_name: Option<String>,
    /// How many hosts the cluster has at least.
    #[arg(long)]
    min_hosts: Option<u32>,
}

/// What `preflight uninstall` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct PreflightUninstall {
    #[command(flatten)]
    run: Run,
    /// The cluster.
    #[arg(long)]
    protected_cluster: String,
    /// How many hosts the cluster has at least.
    #[arg(long)]
    min_hosts: Option<u32>,
}

/// What `enable-cluster` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct EnableCluster {
    #[command(flatten)]
    run: Run,
    /// The cluster's name in vCenter.
    #[arg(long)]
    protected_cluster: String,
    /// The package's version; without it, the one that was uploaded last.
    #[arg(long)]
    package_version: Option<String>,
    /// The appliance of its hosts; without it, the one with the fewest hosts.
    #[arg(long)]
    drva: Option<String>,
    /// How many hosts the cluster has at least.
    #[arg(long)]
    min_hosts: Option<u32>,
    /// Do not invite hosts to get their certificates: tokens are laid into each host's folder by hand.
    #[arg(long)]
    no_enrol: bool,
}

/// What `disable-cluster` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct DisableCluster {
    #[command(flatten)]
    run: Run,
    /// The cluster's name in vCenter.
    #[arg(long)]
    protected_cluster: String,
    /// End the protection of disks that have it.
    #[arg(long)]
    detach: bool,
    /// Go on without hosts that vCenter does not reach.
    #[arg(long)]
    leave_unreachable: bool,
}

/// What `upgrade-cluster` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct UpgradeCluster {
    #[command(flatten)]
    run: Run,
    /// The cluster's name in vCenter.
    #[arg(long)]
    protected_cluster: String,
    /// The package's version; without it, the one that was uploaded last.
    #[arg(long)]
    package_version: Option<String>,
}

/// What `resolve-cluster` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct ResolveCluster {
    #[command(flatten)]
    run: Run,
    /// The cluster's name in vCenter.
    #[arg(long)]
    protected_cluster: String,
    /// The appliance of hosts that have none.
    #[arg(long)]
    drva: Option<String>,
    /// Do not invite hosts to get their certificates: tokens are laid into each host's folder by hand.
    #[arg(long)]
    no_enrol: bool,
}

/// What `upload-package` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct UploadPackage {
    #[command(flatten)]
    at: At,
    /// The VIB.
    vib: PathBuf,
}

fn read_token(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let what = || format!("cannot read the token from {}", path.display());
    if path.as_os_str() == "-" {
        std::io::stdin().take(4096).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(4096).read_to_string(&mut text))
    }
    .with_context(what)?;
    let line = text.lines().next().unwrap_or_default().trim().to_owned();
    if line.is_empty() || !line.chars().all(|c| c.is_ascii_graphic()) {
        bail!("{} holds no token on its first line", path.display());
    }
    Ok(line)
}

impl At {
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        let authority = tls::files::certificates(&self.ca)?;
        let trust = tls::Trust::new(&authority, None)?;
        let provider = tls::provider::ring();
        let config = tls::client_config(&provider, None, &trust, &[tls::Role::Msa])?;
        let mut client = Client::new(self.msa.clone(), Arc::new(config));
        client.token = Some(read_token(&self.token_file)?);
        Ok(client)
    }
}

/// What was given, by the server's names for it.
pub(crate) struct Given(Map<String, Value>);

impl Given {
    pub(crate) fn new(run: &Run) -> Self {
        Self(Map::new()).with("vcenter", &run.vcenter)
    }

    pub(crate) fn with(mut self, name: &str, value: &Option<impl serde::Serialize>) -> Self {
        if let Some(value) = value {
            self.0.insert(name.into(), json!(value));
        }
        self
    }

    pub(crate) fn of(self, name: &str, value: impl serde::Serialize) -> Self {
        self.with(name, &Some(value))
    }
}

/// Looks.
pub fn preflight(command: &Preflight) -> anyhow::Result<ExitCode> {
    match command {
        Preflight::System(run) => execute(run, "preflight-system", Given::new(run)),
        Preflight::Install(args) => {
            let given = Given::new(&args.run)
                .of("protected_cluster", &args.protected_cluster)
                .with("cluster", &args.cluster)
                .with("network", &args.network)
                .with("datastore", &args.datastore)
                .with("vm_name", &args.vm_name)
                .with("min_hosts", &args.min_hosts);
            execute(&args.run, "preflight-install", given)
        }
        Preflight::Uninstall(args) => {
            let given = Given::new(&args.run)
                .of("protected_cluster", &args.protected_cluster)
                .with("min_hosts", &args.min_hosts);
            execute(&args.run, "preflight-uninstall", given)
        }
    }
}

/// Enables a cluster.
pub fn enable(args: &EnableCluster) -> anyhow::Result<ExitCode> {
    let given = Given::new(&args.run)
        .of("protected_cluster", &args.protected_cluster)
        .with("package_version", &args.package_version)
        .with("drva", &args.drva)
        .with("min_hosts", &args.min_hosts)
        .of("enrol", !args.no_enrol);
    execute(&args.run, "enable-cluster", given)
}

/// Disables a cluster.
pub fn disable(args: &DisableCluster) -> anyhow::Result<ExitCode> {
    let given = Given::new(&args.run)
        .of("protected_cluster", &args.protected_cluster)
        .of("detach", args.detach)
        .of("leave_unreachable", args.leave_unreachable);
    execute(&args.run, "disable-cluster", given)
}

/// Upgrades a cluster.
pub fn upgrade(args: &UpgradeCluster) -> anyhow::Result<ExitCode> {
    let given = Given::new(&args.run)
        .of("protected_cluster", &args.protected_cluster)
        .with("package_version", &args.package_version);
    execute(&args.run, "upgrade-cluster", given)
}

/// Tries hosts again.
pub fn resolve(args: &ResolveCluster) -> anyhow::Result<ExitCode> {
    let given = Given::new(&args.run)
        .of("protected_cluster", &args.protected_cluster)
        .with("drva", &args.drva)
        .of("enrol", !args.no_enrol);
    execute(&args.run, "resolve-cluster", given)
}

/// Uploads a package.
pub fn upload(args: &UploadPackage) -> anyhow::Result<()> {
    let bytes =
        std::fs::read(&args.vib).with_context(|| format!("cannot read {}", args.vib.display()))?;
    let client = args.at.client()?;
    let kind = "application/octet-stream";
    let answer = client.send_bytes("POST", "/packages", kind, &bytes)?;
    let package: Value = serde_json::from_slice(&answer)?;
    println!("{}", serde_json::to_string_pretty(&package)?);
    Ok(())
}

/// A member's text; empty, if there is none.
pub(crate) fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

pub(crate) fn execute(run: &Run, kind: &str, given: Given) -> anyhow::Result<ExitCode> {
    let client = run.at.client()?;
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let plain: String = kind.chars().filter(|c| *c != '-').collect();
    let made = format!("{plain}{}", since_1970.as_millis());
    let name = run.execution_name.as_deref().unwrap_or(&made);
    let asked = json!({
        "name": name, "kind": kind, "parameters": given.0,
        "timeout_s": run.timeout_s, "retention_days": run.retention_days,
    });
    let submitted = client.call("POST", "/executions", Some(&asked))?;
    let id = text(&submitted, "id").to_owned();
    println!("execution {name} ({id})");
    if run.no_wait {
        return Ok(ExitCode::SUCCESS);
    }
    let ended = follow(&client, &id)?;
    match text(&ended, "state") {
        "succeeded" => failed_hosts(&client, kind),
        "blocked" => {
            bail!(
                "execution {name} is blocked: {}; remove the cause, then retry it (POST /api/v1/executions/{id}/retry)",
                text(&ended, "error")
            )
        }
        state => bail!("execution {name} is {state}: {}", text(&ended, "error")),
    }
}

/// Shows the output as it grows; the execution when it has ended, or stands.
pub(crate) fn follow(client: &Client, id: &str) -> anyhow::Result<Value> {
    let mut after = 0;
    let mut silent_since = None;
    loop {
        match look(client, id, &mut after) {
            Ok(Some(ended)) => return Ok(ended),
            Ok(None) => silent_since = None,
            Err(error) => {
                let refused = error.downcast_ref::<enrol::HttpError>();
                if matches!(refused, Some(enrol::HttpError::Refused { status, .. }) if *status < 500)
                {
                    return Err(error);
                }
                let since = *silent_since.get_or_insert_with(std::time::Instant::now);
                if since.elapsed() > PATIENCE {
                    return Err(error.context("the execution goes on in the server"));
                }
            }
        }
        std::thread::sleep(POLL);
    }
}

fn look(client: &Client, id: &str, after: &mut i64) -> anyhow::Result<Option<Value>> {
    // Before the output: what has ended has said all.
    let execution = client.call("GET", &format!("/executions/{id}"), None)?;
    loop {
        let path = format!("/executions/{id}/output?limit=200&after={after}");
        let part = client.call("GET", &path, None)?;
        let lines = part.get("items").and_then(Value::as_array);
        for line in lines.into_iter().flatten() {
            println!("{}", text(line, "text"));
            *after = line.get("seq").and_then(Value::as_i64).unwrap_or(*after);
        }
        if part.get("next").is_none_or(Value::is_null) {
            break;
        }
    }
    let has_ended = execution.get("ended_at_ms").is_some_and(Value::is_i64);
    Ok((has_ended || text(&execution, "state") == "blocked").then_some(execution))
}

/// Hosts that failed are named, and the exit code says so.
pub(crate) fn failed_hosts(client: &Client, kind: &str) -> anyhow::Result<ExitCode> {
    if !["enable-cluster", "upgrade-cluster", "resolve-cluster"].contains(&kind) {
        return Ok(ExitCode::SUCCESS);
    }
    let (mut after, mut failed) = (0, 0);
    loop {
        let part = client.call("GET", &format!("/hosts?limit=200&after={after}"), None)?;
        let hosts = part.get("items").and_then(Value::as_array);
        for host in hosts.into_iter().flatten() {
            if text(host, "state") == "failed" {
                eprintln!(
                    "host {} failed: {}",
                    text(host, "name"),
                    text(host, "problem")
                );
                failed += 1;
            }
        }
        match part.get("next").and_then(Value::as_i64) {
            Some(next) => after = next,
            None => break,
        }
    }
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(2),
    })
}
