//! A network between a host's daemon and an appliance that can be made to fail: a TCP proxy for the six
//! consecutive ports.
//!
//! Invariant: what goes through comes out in order and unchanged but for the faults that were asked for, each
//! of them as often as asked. A port that is cut refuses connections, and stays bound meanwhile. What a stop in one
//! direction holds back goes on when it is healed, as after a network that was away.
//!
//! Commands come over a unix socket, one JSON document a line, one answer a line: `cut`, `slow`, `half-open`,
//! `heal`, `drop`, `corrupt`, `status`.

mod pump;

use crate::raw;
use crate::socket::{TcpSocket, UnixSocket};
use anyhow::{Context, bail, ensure};
use parking_lot::Mutex;
use pump::{BOTH, Corruption, Direction, Pump, Rules};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A daemon and its appliance talk on so many consecutive ports.
const PORTS: u16 = 6;
/// Tries to find so many free ones in a row.
const TRIES: u32 = 200;
/// How long a connection to the appliance may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Most connections at once.
const MAX_CONNECTIONS: usize = 1024;

/// A network that can be made to fail.
#[derive(clap::Args, Clone, Debug)]
pub struct LinkArgs {
    /// The appliance: HOST:PORT of its first port.
    #[arg(long)]
    pub to: String,
    /// First port to listen on; 0 finds six free ones in a row.
    #[arg(long, default_value_t = 0)]
    pub port_base: u16,
    /// Address to listen on.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub bind: IpAddr,
    /// Unix socket for commands, one JSON document a line: cut, slow, half-open, heal, drop, corrupt, status.
    #[arg(long)]
    pub control_socket: PathBuf,
}

/// A connection through the link.
struct Through {
    id: u64,
    port: u16,
    client: TcpStream,
    server: TcpStream,
    pumps: [Arc<Pump>; 2],
}

impl Through {
    /// Both ends see it at once.
    fn end(&self) {
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
        self.pumps.iter().for_each(|pump| pump.end());
    }

    fn is_over(&self) -> bool {
        self.pumps.iter().all(|pump| pump.is_over())
    }
}

#[derive(Default)]
struct State {
    is_cut: bool,
    next_id: u64,
    through: Vec<Through>,
}

struct Link {
    to: SocketAddr,
    rules: Arc<Rules>,
    listeners: Vec<TcpSocket>,
    state: Mutex<State>,
}

/// Six sockets in a row.
fn listen(bind: IpAddr, base: u16) -> anyhow::Result<Vec<TcpSocket>> {
    let all = |base: u16| -> anyhow::Result<Vec<TcpSocket>> {
        let last = base.checked_add(PORTS - 1);
        ensure!(last.is_some(), "there are no {PORTS} ports from {base} on");
        let ports = base..base + PORTS;
        let bound = ports.map(|port| TcpSocket::bind(SocketAddr::new(bind, port)));
        Ok(bound.collect::<Result<_, _>>()?)
    };
    if base != 0 {
        return all(base);
    }
    for _ in 0..TRIES {
        // The kernel names a free one; whether the next five are free too is tried.
        let first = TcpSocket::bind(SocketAddr::new(bind, 0))?.address().port();
        if let Ok(found) = all(first) {
            return Ok(found);
        }
    }
    bail!("{TRIES} times there were no {PORTS} free ports in a row")
}

impl Link {
    fn accept(self: &Arc<Self>, index: usize) {
        let Some(listener) = self.listeners.get(index) else {
            return;
        };
        loop {
            match listener.accept() {
                Ok(client) => {
                    let this = self.clone();
                    std::thread::spawn(move || {
                        if let Err(error) = this.connect(client, index as u16) {
                            tracing::warn!("link: {error:#}");
                        }
                    });
                }
                // Cut: it does not listen. Whoever heals it makes it listen again.
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn connect(&self, client: TcpStream, index: u16) -> anyhow::Result<()> {
        let mut to = self.to;
        to.set_port(to.port() + index);
        let server = TcpStream::connect_timeout(&to, CONNECT_LIMIT)
            .with_context(|| format!("cannot reach the appliance at {to}"))?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let mut state = self.state.lock();
        state.through.retain(|through| !through.is_over());
        if state.is_cut || state.through.len() >= MAX_CONNECTIONS {
            return Ok(()); // both are dropped
        }
        state.next_id += 1;
        let up = Pump::start(&client, &server, Direction::ToAppliance, index, &self.rules)?;
        let down = Pump::start(&server, &client, Direction::ToHost, index, &self.rules)?;
        let id = state.next_id;
        state.through.push(Through {
            id,
            port: index,
            client,
            server,
            pumps: [up, down],
        });
        Ok(())
    }

    /// No connection is left, and none is taken.
    fn cut(&self) -> Value {
        let mut state = self.state.lock();
        state.is_cut = true;
        for listener in &self.listeners {
            listener.wake();
        }
        let ended = state.through.iter().filter(|t| !t.is_over()).count();
        state.through.drain(..).for_each(|through| through.end());
        json!({"ended": ended})
    }

    /// As it was before all faults.
    fn heal(&self) -> anyhow::Result<Value> {
        let mut state = self.state.lock();
        if std::mem::take(&mut state.is_cut) {
            for listener in &self.listeners {
                raw::listen_again(listener.as_fd()).context("cannot listen again")?;
            }
        }
        self.rules.heal();
        Ok(json!({"healed": true}))
    }

    fn drop_one(&self, command: &Value) -> anyhow::Result<Value> {
        let newest = match command.get("which").and_then(Value::as_str) {
            Some("newest") => true,
            Some("oldest") => false,
            _ => bail!("`which` is newest or oldest"),
        };
        let port = port_of(command)?;
        let mut state = self.state.lock();
        state.through.retain(|through| !through.is_over());
        let meant = |through: &Through| port.is_none_or(|port| through.port == port);
        let found = if newest {
            state.through.iter().rposition(meant)
        } else {
            state.through.iter().position(meant)
        };
        let through = state
            .through
            .remove(found.context("there is no such connection")?);
        through.end();
        Ok(json!({"dropped": through.id, "port": through.port}))
    }

    fn status(&self) -> Value {
        let mut state = self.state.lock();
        state.through.retain(|through| !through.is_over());
        let all = state.through.iter().map(|through| {
            let [up, down] = through.pumps.each_ref().map(|pump| pump.passed_bytes());
            json!({
                "id": through.id, "port": through.port, "to_appliance_bytes": up, "to_host_bytes": down,
            })
        });
        let connections: Vec<Value> = all.collect();
        json!({"cut": state.is_cut, "connections": connections, "rules": self.rules.to_json()})
    }

    fn obey(&self, command: &Value) -> anyhow::Result<Value> {
        let number = |key: &str| command.get(key).and_then(Value::as_u64);
        match command.get("cmd").and_then(Value::as_str) {
            Some("cut") => Ok(self.cut()),
            Some("heal") => self.heal(),
            Some("slow") => {
                let (rate, latency_ms) = (number("bytes_per_s"), number("latency_ms"));
                ensure!(
                    rate.or(latency_ms).is_some() && rate != Some(0),
                    "slow needs `bytes_per_s` (from 1) or `latency_ms`"
                );
                self.rules.slow(directions(command)?, rate, latency_ms);
                Ok(json!({"slow": true}))
            }
            Some("half-open") => {
                self.rules.stop(directions(command)?);
                Ok(json!({"half_open": true}))
            }
            Some("drop") => self.drop_one(command),
            Some("corrupt") => {
                let mask = number("mask").unwrap_or(0x01);
                ensure!((1..=255).contains(&mask), "`mask` is 1 to 255");
                self.rules.corrupt(Corruption {
                    directions: directions(command)?.to_vec(),
                    port: port_of(command)?,
                    after_bytes: number("offset_bytes").context("`offset_bytes` is missing")?,
                    mask: mask as u8,
                });
                Ok(json!({"armed": true}))
            }
            Some("status") => Ok(self.status()),
            _ => bail!("cmd is one of cut, slow, half-open, heal, drop, corrupt, status"),
        }
    }
}

/// `port`: 0 to 5, or none.
fn port_of(command: &Value) -> anyhow::Result<Option<u16>> {
    let Some(port) = command.get("port") else {
        return Ok(None);
    };
    let known = port.as_u64().filter(|port| *port < u64::from(PORTS));
    let known = known.with_context(|| format!("`port` is 0 to {}", PORTS - 1))?;
    Ok(Some(known as u16))
}

/// `direction`: both if there is none.
fn directions(command: &Value) -> anyhow::Result<&'static [Direction]> {
    match command.get("direction").and_then(Value::as_str) {
        None | Some("both") => Ok(&BOTH),
        Some("to-appliance") => Ok(&[Direction::ToAppliance]),
        Some("to-host") => Ok(&[Direction::ToHost]),
        Some(other) => bail!("direction `{other}` is none of to-appliance, to-host, both"),
    }
}

fn serve(stream: &UnixStream, link: &Link) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let answer = match serde_json::from_str(&line) {
            Ok(command) => link.obey(&command),
            Err(error) => Err(anyhow::anyhow!("not a JSON document: {error}")),
        };
        let answer = answer.unwrap_or_else(|error| json!({"error": format!("{error:#}")}));
        if writeln!(&mut &*stream, "{answer}").is_err() {
            return;
        }
    }
}

/// Runs until SIGTERM or SIGINT.
pub fn run(args: &LinkArgs) -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let to = args.to.to_socket_addrs();
    let to = to.ok().and_then(|mut found| found.next());
    let to = to.with_context(|| format!("--to {}: expected HOST:PORT", args.to))?;
    ensure!(
        to.port().checked_add(PORTS - 1).is_some(),
        "--to {to}: there are no {PORTS} ports from there on"
    );
    let listeners = listen(args.bind, args.port_base)?;
    let base = listeners.first().map(|first| first.address().port());
    let link = Arc::new(Link {
        to,
        rules: Arc::default(),
        listeners,
        state: Mutex::default(),
    });
    for index in 0..link.listeners.len() {
        let of = link.clone();
        std::thread::spawn(move || of.accept(index));
    }
    let socket = Arc::new(UnixSocket::bind(&args.control_socket)?);
    let (of, listener) = (link.clone(), socket.clone());
    let acceptor = std::thread::spawn(move || {
        while let Ok(stream) = listener.accept() {
            let of = of.clone();
            std::thread::spawn(move || serve(&stream, &of));
        }
    });
    let ready = json!({
        "pid": std::process::id(), "port_base": base, "to": to.to_string(),
        "control_socket": args.control_socket,
    });
    println!("READY {ready}");
    signals.forever().next();
    link.cut();
    socket.wake();
    drop(socket);
    let _ = acceptor.join(); // it lets go of the socket, and with that the file goes
    Ok(())
}
