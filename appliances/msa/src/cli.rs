//! `jetdr msa`: making a server, running it, printing its OpenAPI document.
//!
//! Invariant: `init` leaves a whole server or nothing; a password is never an argument, since other
//! users of the machine see those.

use crate::authority::Authority;
use crate::clock::SystemClock;
use crate::clusters::watch;
use crate::connect::ViJson;
use crate::outside::Outside;
use crate::protection::{machines, states};
use crate::rest::{openapi, server};
use crate::secret::Passwords;
use crate::service::{self, Msa, PasswordCost};
use crate::store::{Actor, Done, Store};
use crate::text::{Address, Id, Name, Password};
use crate::users::{self, UserRole};
use anyhow::{Context, bail};
use std::fs::{self, File};
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Housekeeping is due so often.
const HOUSEKEEPING: Duration = Duration::from_secs(3600);
/// The states of machines are looked at so often, whether or not anything is reported.
const JUDGE_EVERY: Duration = Duration::from_secs(5);
/// After a start nobody is called silent before it could have reported.
const JUDGE_GRACE: Duration = Duration::from_secs(60);
/// A step of an execution may take so long to notice that the server stops.
const ENGINE_STOP_LIMIT: Duration = Duration::from_secs(10);

/// The management server.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Command {
    /// Make a server: its state, its authority, its first administrator.
    Init(InitArgs),
    /// Run it until SIGTERM or SIGINT.
    Run(RunArgs),
    /// Print the OpenAPI document of its REST interface.
    Openapi,
}

/// What `init` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct InitArgs {
    /// The server's folder; it is made, and must not be there or be empty.
    #[arg(long)]
    pub data_dir: PathBuf,
    /// A name or address by which people and machines reach the server; repeat it.
    #[arg(long = "name", required = true)]
    pub names: Vec<Address>,
    /// The first administrator's name.
    #[arg(long, default_value = "admin")]
    pub admin: Name,
    /// The file with that administrator's password: one line, 12 characters or more; `-` is standard
    /// input.
    #[arg(long)]
    pub password_file: PathBuf,
}

/// What `run` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct RunArgs {
    /// The server's folder, made by `init`.
    #[arg(long)]
    pub data_dir: PathBuf,
    /// Where to listen; port 0 is a free one.
    #[arg(long, default_value = "127.0.0.1:8443")]
    pub listen: SocketAddr,
    /// Where hosts reach this server, `https://<name>:<port>`; without it, its first name and the port on
    /// which it listens.
    #[arg(long)]
    pub public_url: Option<String>,
    /// Seconds between two looks at the hosts of enabled clusters; 0: none.
    #[arg(long, default_value_t = 30)]
    pub watch_seconds: u64,
    /// A file to which it writes its process id once the folder is its own: one line. It stays when it ends.
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    /// Print the points at which JETDR_FAULT can make this program die, wait or fail, and end.
    #[arg(long)]
    pub list_faults: bool,
}

/// Does what the command says.
pub fn run(command: &Command) -> anyhow::Result<()> {
    fault::arm()?;
    match command {
        Command::Init(args) => init(args),
        Command::Run(args) => serve(args),
        Command::Openapi => {
            print!("{}", openapi::text()?);
            Ok(())
        }
    }
}

/// The first line of a file, or of standard input.
fn read_password(path: &Path) -> anyhow::Result<Password> {
    let mut text = String::new();
    let what = || format!("cannot read the password from {}", path.display());
    if path == Path::new("-") {
        std::io::stdin().take(4096).read_to_string(&mut text)
    } else {
        File::open(path).and_then(|file| file.take(4096).read_to_string(&mut text))
    }
    .with_context(what)?;
    let line = text.lines().next().unwrap_or_default().to_owned();
    Password::try_from(line).with_context(what)
}

fn is_free(folder: &Path) -> anyhow::Result<bool> {
    match fs::read_dir(folder) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error).with_context(|| format!("cannot look into {}", folder.display())),
    }
}

fn init(args: &InitArgs) -> anyhow::Result<()> {
    let folder = &args.data_dir;
    let password = read_password(&args.password_file)?;
    make_server(folder, &args.names, &args.admin, &password)?;
    println!(
        "made {}: administrator {}, authority {}",
        folder.display(),
        args.admin,
        folder.join(crate::authority::CERTIFICATE).display()
    );
    Ok(())
}

/// Makes a server in a new or empty folder: all of it in a folder beside that one, which gets its name last.
/// The first of `names` is the one by which hosts reach it, unless `run` is told another.
pub fn make_server(
    folder: &Path,
    names: &[Address],
    admin: &Name,
    password: &Password,
) -> anyhow::Result<()> {
    if !is_free(folder)? {
        bail!(
            "{} is not empty: nothing was changed. `jetdr msa run` runs a server that is there; choose another --data-dir for a new one",
            folder.display()
        );
    }
    let absolute = std::path::absolute(folder)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        bail!(
            "--data-dir {} cannot be made: give a folder below /",
            folder.display()
        );
    };
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let partial = parent.join(format!(".{}.partial", name.to_string_lossy()));
    // Of an earlier try that was cut off; it never was a server.
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&partial)
        .with_context(|| format!("cannot make {}", partial.display()))?;
    make(&partial, names, admin, password)?;
    fs::rename(&partial, &absolute).with_context(|| {
        format!(
            "cannot rename {} to {}",
            partial.display(),
            folder.display()
        )
    })?;
    File::open(parent).and_then(|parent| parent.sync_all())?;
    Ok(())
}

fn make(folder: &Path, names: &[Address], admin: &Name, password: &Password) -> anyhow::Result<()> {
    let cost = PasswordCost::default();
    let hash = Passwords::new(cost.memory_kib, cost.passes)?.hash(password)?;
    let store = Store::open_or_make(folder, Arc::new(SystemClock))?;
    let now_ms = store.now_ms();
    let authority = Authority::make(folder, now_ms)?;
    let names: Vec<&str> = names.iter().map(Address::as_str).collect();
    let names = names.join(",");
    store.change(&Actor::system(), "init", |t| {
        let sql = "INSERT INTO meta (key, value) VALUES ('server_id', ?1), ('server_names', ?2)";
        t.execute(sql, rusqlite::params![Id::random(), names])?;
        users::create(t, admin, UserRole::Admin, &hash, now_ms)?;
        Ok(Done::new((), format!("user {admin}")))
    })?;
    service::issue_server(&store, &authority, folder)?;
    service::write_list(&store, &authority, folder)?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// Where hosts reach this server.
fn base_url(msa: &Msa, given: Option<&str>, listening: SocketAddr) -> anyhow::Result<String> {
    let Some(given) = given else {
        let names = msa.names()?;
        let name = names.first().map_or("localhost", String::as_str);
        return Ok(match name.parse::<std::net::IpAddr>() {
            Ok(ip) => format!("https://{}", SocketAddr::new(ip, listening.port())),
            Err(_) => format!("https://{name}:{}", listening.port()),
        });
    };
    let known = |c: char| c.is_ascii_alphanumeric() || ".:-[]".contains(c);
    let rest = given
        .strip_prefix("https://")
        .map(|rest| rest.trim_end_matches('/'));
    match rest.filter(|rest| !rest.is_empty() && rest.chars().all(known)) {
        Some(rest) => Ok(format!("https://{rest}")),
        None => bail!("--public-url {given} is not of the form https://<name>:<port>"),
    }
}

/// Looks at the hosts of enabled clusters from time to time.
fn watch(runtime: &tokio::runtime::Runtime, msa: &Arc<Msa>, every: Duration) {
    if every.is_zero() {
        return;
    }
    let msa = msa.clone();
    runtime.spawn(async move {
        let mut due = tokio::time::interval(every);
        // What failed is said once, not at every look.
        let mut said = String::new();
        loop {
            due.tick().await;
            let msa = msa.clone();
            let looked = tokio::task::spawn_blocking(move || {
                let asked = watch::look(&msa)?;
                machines::look(&msa)?;
                Ok::<_, watch::WatchError>(asked)
            })
            .await;
            match looked {
                Ok(Ok(Some(cluster))) => tracing::info!("the hosts of cluster {cluster} changed"),
                Ok(Ok(None)) => said.clear(),
                Ok(Err(error)) if error.to_string() != said => {
                    tracing::warn!("{error}");
                    said = error.to_string();
                }
                _ => {}
            }
        }
    });
}

/// Notices what is not said: an appliance that does not report, a machine that stays degraded.
fn judge(runtime: &tokio::runtime::Runtime, msa: &Arc<Msa>) {
    let msa = msa.clone();
    runtime.spawn(async move {
        let first = tokio::time::Instant::now() + JUDGE_GRACE;
        let mut due = tokio::time::interval_at(first, JUDGE_EVERY);
        loop {
            due.tick().await;
            let msa = msa.clone();
            let judged = tokio::task::spawn_blocking(move || {
                let now_ms = msa.store.now_ms();
                msa.store.record(|t| states::settle_all(t, now_ms))
            });
            if let Ok(Err(error)) = judged.await {
                tracing::error!("the states of machines: {error}");
            }
        }
    });
}

fn serve(args: &RunArgs) -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let mode = fs::metadata(&args.data_dir).map(|found| found.permissions().mode() & 0o777);
    if mode.is_ok_and(|mode| mode & 0o077 != 0) {
        tracing::warn!(
            "{} may be read by others: chmod 700 it",
            args.data_dir.display()
        );
    }
    let registry = service::registry();
    let clock = Arc::new(SystemClock);
    let outside = Outside::new(Box::new(ViJson));
    let cost = PasswordCost::default();
    let msa = Msa::open_in(&args.data_dir, clock, registry, cost, outside)?;
    if let Some(path) = &args.pid_file {
        let line = format!("{}\n", std::process::id());
        crate::authority::write_private(path, line.as_bytes())?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind(args.listen))
        .with_context(|| format!("cannot listen on {}: choose another --listen", args.listen))?;
    let base_url = base_url(&msa, args.public_url.as_deref(), listener.local_addr()?)?;
    tracing::info!("hosts fetch packages from {base_url}");
    msa.outside.set_base_url(base_url);
    let ready = serde_json::json!({
        "pid": std::process::id(),
        "address": listener.local_addr()?,
        "authority": args.data_dir.join(crate::authority::CERTIFICATE),
        "id": msa.id()?,
    });
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let serving = runtime.spawn(server::serve(listener, msa.clone(), stopped));
    let (ended, engine_ended) = std::sync::mpsc::channel();
    let worker = msa.clone();
    std::thread::Builder::new()
        .name("executions".into())
        .spawn(move || {
            worker.engine.work();
            let _ = ended.send(());
        })?;
    let housekeeper = msa.clone();
    runtime.spawn(async move {
        let mut due = tokio::time::interval(HOUSEKEEPING);
        due.tick().await; // at once: the start has just done it
        loop {
            due.tick().await;
            let msa = housekeeper.clone();
            let done = tokio::task::spawn_blocking(move || msa.housekeeping()).await;
            if let Ok(Err(error)) = done {
                tracing::error!("housekeeping: {error}");
            }
        }
    });
    watch(&runtime, &msa, Duration::from_secs(args.watch_seconds));
    judge(&runtime, &msa);
    println!("READY {ready}");
    signals.forever().next();
    let _ = stop.send(true);
    msa.engine.signals().stop();
    let _ = runtime.block_on(serving);
    if engine_ended.recv_timeout(ENGINE_STOP_LIMIT).is_err() {
        // As safe as a kill: the next start goes on from the journal.
        tracing::warn!("an execution's step does not stop: it is cut off");
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(())
}
