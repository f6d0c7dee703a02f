//! The commands.

use crate::control;
use crate::host;
use crate::server::Server;
use crate::world::{Options, World};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// The simulated cluster: a vCenter and its hosts.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Command {
    /// Run a site until Ctrl-C: a vCenter, to which hosts, clusters and machines are added by `do`.
    Run(RunArgs),
    /// Tell a running site something: a JSON document like {"cmd": "status"}.
    Do(DoArgs),
    /// A virtual machine's process; hosts start it.
    #[command(hide = true)]
    Vm(Box<simhost::vm::VmArgs>),
    /// Put the rulesets in a root in force; a host's `esxcli` calls it.
    #[command(hide = true)]
    FirewallRefresh(RefreshArgs),
    /// Define, set or remove an advanced option of a root; a host's `esxcli` calls it.
    #[command(hide = true)]
    HostOption(host::OptionArgs),
    /// Dial an address, as a process of a host.
    #[command(hide = true)]
    Probe(ProbeArgs),
    /// Listen on a port, as a process of a host: greets whoever comes, and ends.
    #[command(hide = true)]
    Greet(GreetArgs),
}

/// Run a site.
#[derive(clap::Args, Clone, Debug)]
pub struct RunArgs {
    /// Folder of all of it, new or empty. Sockets are in it: keep its path short.
    #[arg(long)]
    pub dir: PathBuf,
    /// Where vCenter listens; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// vCenter's user.
    #[arg(long, default_value = "administrator@vsphere.local")]
    pub user: String,
    /// The user's password.
    #[arg(long, default_value = "simulated", env = "SIMCLUSTER_PASSWORD")]
    pub password: String,
    /// Certificates (PEM) of whose signatures of packages hosts take.
    #[arg(long)]
    pub signers: Option<PathBuf>,
}

/// Tell a running site something.
#[derive(clap::Args, Clone, Debug)]
pub struct DoArgs {
    /// The site's folder.
    #[arg(long)]
    pub dir: PathBuf,
    /// The command.
    pub command: String,
}

/// Put rulesets in force.
#[derive(clap::Args, Clone, Debug)]
pub struct RefreshArgs {
    /// The root.
    pub root: PathBuf,
    /// What processes read.
    pub rules: PathBuf,
}

/// Dial an address.
#[derive(clap::Args, Clone, Debug)]
pub struct ProbeArgs {
    /// Address and port.
    pub to: SocketAddr,
}

/// Listen on a port.
#[derive(clap::Args, Clone, Debug)]
pub struct GreetArgs {
    /// The port; 0 takes a free one.
    pub port: u16,
}

/// The arguments with which this program was called before `run`: hosts call it with the same.
fn prefix() -> Vec<String> {
    let before = std::env::args().skip(1).take_while(|a| a != "run");
    before.collect()
}

/// Runs a command.
pub fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => site(args),
        Command::Do(args) => tell(args),
        Command::Vm(args) => simhost::vm::run(args),
        Command::FirewallRefresh(args) => host::refresh(&args.root, &args.rules),
        Command::HostOption(args) => host::option_command(args),
        Command::Probe(args) => {
            let stream = TcpStream::connect_timeout(&args.to, PROBE_LIMIT);
            let stream = stream.with_context(|| format!("cannot reach {}", args.to))?;
            println!("{}", stream.local_addr()?);
            Ok(())
        }
        Command::Greet(args) => greet(args.port),
    }
}

fn greet(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("{}", listener.local_addr()?);
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => return Ok(stream.write_all(b"hello\n")?),
            // Whom the firewall keeps out.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn site(args: &RunArgs) -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let signers = args
        .signers
        .as_ref()
        .map(|path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display())));
    let world = World::new(Options {
        folder: args.dir.clone(),
        program: std::env::current_exe().context("where is this program?")?,
        prefix: prefix(),
        signers: signers.transpose()?,
        user: args.user.clone(),
        password: args.password.clone(),
    })?;
    let server = Server::start(world.clone(), args.listen)?;
    let certificate = world.folder().join("ca.pem");
    std::fs::write(&certificate, &server.certificate)?;
    let control = control::Control::start(&world)?;
    let ready = json!({
        "pid": std::process::id(), "address": server.address.to_string(), "ca": certificate,
        "control_socket": control.path(), "user": args.user,
    });
    println!("READY {ready}");
    signals.forever().next();
    drop(server);
    world.stop();
    drop(control);
    Ok(())
}

fn tell(args: &DoArgs) -> anyhow::Result<()> {
    let command: Value =
        serde_json::from_str(&args.command).context("the command is no JSON document")?;
    let path = args.dir.join(control::SOCKET);
    let stream = UnixStream::connect(&path)
        .with_context(|| format!("no site runs at {}", args.dir.display()))?;
    writeln!(&stream, "{command}")?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line).context("the site ended")?;
    if let Some(error) = answer.get("error").and_then(Value::as_str) {
        bail!("{error}");
    }
    println!("{answer:#}");
    Ok(())
}
