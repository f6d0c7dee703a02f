//! The appliance as a whole: its ports, its domains, its hosts.
//!
//! Invariant: a domain is opened once, whoever asks first; every thread that it starts ends when it
//! stops.

use crate::assignments;
use crate::cut::{self, Answer};
use crate::domain::Domain;
use crate::hashes::Hasher;
use crate::identity;
use crate::log::{LogError, LogOptions};
use crate::outbox::Outbox;
use crate::presence::{Host, HostId};
use crate::session;
use crate::unopened::Unopened;
use crate::upload::Uploader;
use crossbeam::channel::{Receiver, Sender, bounded};
use filter_core::mapping::domain_name_is_valid;
use filter_core::wire::{Message, PortRole};
use parking_lot::Mutex;
use recovery_store::{StoreUrl, WriterOptions};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tls::{Peer, ServerTls};

/// Connections of an appliance, at most.
const MAX_CONNECTIONS: usize = 1024;
/// Domains of an appliance, at most.
const MAX_DOMAINS: usize = 64;

/// What an appliance is made with.
#[derive(Clone)]
pub struct Settings {
    /// For people.
    pub name: String,
    /// Logs and what else must last.
    pub data_dir: PathBuf,
    /// Where containers go: each domain's is this URL and its name.
    pub store: String,
    /// Options of the store.
    pub store_options: Vec<(String, String)>,
    /// The domains that hosts may open; empty: any.
    pub served: Vec<String>,
    /// Time between cuts.
    pub cut_every: Duration,
    /// The logs' sizes.
    pub log: LogOptions,
    /// Raw bytes of a part.
    pub part_bytes: usize,
    /// Whom it lets in; `None`: whoever connects.
    pub tls: Option<Arc<ServerTls>>,
    /// Who may speak for which machine.
    pub assignments: Arc<assignments::InForce>,
}

/// Why there is no such domain.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// Not a name.
    #[error("`{0}` is not a domain's name")]
    Name(String),
    /// Its log cannot be opened.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Its store's URL cannot be understood.
    #[error(transparent)]
    Store(#[from] recovery_store::StoreError),
    /// Not one of those that are served.
    #[error("domain `{0}` is not served here: see --domain")]
    NotServed(String),
    /// There are enough.
    #[error("this appliance serves at most {MAX_DOMAINS} domains")]
    TooMany,
    /// It was tried, and nothing has changed since.
    #[error("domain `{0}` is not served: {1}")]
    Unopened(String, String),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// Whoever takes a cut of a domain, and waits for what these hosts answer.
struct Waiter {
    domain: String,
    hosts: BTreeSet<HostId>,
    sender: Sender<(HostId, Answer)>,
}

/// A host whose control connection stands.
struct Connected {
    outbox: Arc<Outbox>,
    protocol: u16,
}

/// A connection that stands.
struct Standing {
    stream: TcpStream,
    /// Whose it is, by what certificate, and until when that is valid, in seconds since 1970.
    shown: Option<(tls::Identity, Vec<u8>, i64)>,
}

/// The place of a connection among those that there may be; free again whatever becomes of its thread.
struct Slot {
    appliance: Arc<Appliance>,
    id: u64,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.appliance.connections.lock().remove(&self.id);
    }
}

/// An appliance.
pub struct Appliance {
    /// Its lasting identity.
    pub id: [u8; 16],
    /// Changes at each start.
    pub incarnation: u64,
    /// For people.
    pub name: String,
    /// It stops.
    pub stopping: AtomicBool,
    /// Whom it lets in; `None`: whoever connects.
    pub tls: Option<Arc<ServerTls>>,
    /// Who may speak for which machine.
    pub assignments: Arc<assignments::InForce>,
    settings: Settings,
    domains: Mutex<BTreeMap<String, Arc<Domain>>>,
    /// Domains that it should serve and cannot.
    pub unopened: Unopened,
    threads: Mutex<Vec<JoinHandle<()>>>,
    hosts: Mutex<HashMap<HostId, Connected>>,
    waiters: Mutex<Vec<Waiter>>,
    connections: Mutex<HashMap<u64, Standing>>,
    runtime: tokio::runtime::Runtime,
}

impl Appliance {
    /// Opens the appliance and every domain that it has a log of.
    pub fn open(settings: Settings) -> anyhow::Result<Arc<Self>> {
        use anyhow::Context;
        let dir = settings.data_dir.clone();
        identity::make_folder(&dir.join("domains"))
            .with_context(|| format!("cannot make the data folder {}", dir.display()))?;
        let id = identity::lasting_id(&dir, "appliance-id")
            .with_context(|| format!("cannot read or make {}/appliance-id", dir.display()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .on_thread_start(crate::raw::yield_to_others)
            .build()?;
        let this = Arc::new(Self {
            id,
            incarnation: crate::domain::now_ns(),
            name: settings.name.clone(),
            stopping: AtomicBool::new(false),
            tls: settings.tls.clone(),
            assignments: settings.assignments.clone(),
            settings,
            domains: Mutex::default(),
            unopened: Unopened::default(),
            threads: Mutex::default(),
            hosts: Mutex::default(),
            waiters: Mutex::default(),
            connections: Mutex::default(),
            runtime,
        });
        this.check_store()?;
        for entry in std::fs::read_dir(dir.join("domains"))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            match this.domain(&name) {
                Ok(_) => {}
                // A folder of somebody else; a domain whose cuts another configuration uploads.
                Err(DomainError::Name(_)) => {}
                Err(error @ DomainError::NotServed(_)) => tracing::warn!("{error}: left alone"),
                // The others are served.
                Err(DomainError::Log(_)) => {}
                Err(error) => return Err(error).with_context(|| format!("domain {name}")),
            }
        }
        Ok(this)
    }

    fn url_of(&self, domain: &str) -> Result<StoreUrl, recovery_store::StoreError> {
        let base = self.settings.store.trim_end_matches('/');
        StoreUrl::parse(&format!("{base}/{domain}"), &self.settings.store_options)
    }

    /// A store that cannot be used is said at the start, not at the first cut.
    fn check_store(&self) -> anyhow::Result<()> {
        use anyhow::Context;
        let url = self.url_of("check").context("--store")?;
        if let Some(dir) = url.local_dir() {
            let parent = dir.parent().unwrap_or(dir);
            std::fs::create_dir_all(parent)
                .with_context(|| format!("--store: cannot make the folder {}", parent.display()))?;
            let probe = parent.join(format!(".probe-{}", std::process::id()));
            std::fs::write(&probe, b"probe")
                .and_then(|()| std::fs::remove_file(&probe))
                .with_context(|| format!("--store: cannot write in {}", parent.display()))?;
        }
        Ok(())
    }

    /// A domain, opened if it is not yet.
    pub fn domain(self: &Arc<Self>, name: &str) -> Result<Arc<Domain>, DomainError> {
        if !domain_name_is_valid(name) {
            return Err(DomainError::Name(name.into()));
        }
        let mut domains = self.domains.lock();
        if let Some(domain) = domains.get(name) {
            return Ok(domain.clone());
        }
        let served = &self.settings.served;
        if !served.is_empty() && !served.iter().any(|of| of == name) {
            return Err(DomainError::NotServed(name.into()));
        }
        if domains.len() >= MAX_DOMAINS {
            return Err(DomainError::TooMany);
        }
        let dir = self.settings.data_dir.join("domains").join(name);
        let log_dir = dir.join("log");
        if let Some(why) = self.unopened.still(name, &log_dir) {
            return Err(DomainError::Unopened(name.into(), why));
        }
        let url = self.url_of(name)?;
        let domain = Domain::open(name, &dir, self.settings.log)
            .inspect_err(|error| self.unopened.failed(name, &log_dir, error.to_string()))?;
        self.unopened.opened(name);
        let alarmed = domain.clone();
        let uploader = Uploader {
            domain: domain.clone(),
            url: url.clone(),
            options: WriterOptions {
                part_bytes: self.settings.part_bytes,
                owner: self.name.clone(),
                alarm: Some(Arc::new(move |alarm: &recovery_store::Alarm| {
                    alarmed.alarm("store", Some(format!("{alarm:?}")));
                })),
                ..WriterOptions::default()
            },
            runtime: self.runtime.handle().clone(),
        };
        let hasher = Hasher {
            domain: domain.clone(),
            url,
            runtime: self.runtime.handle().clone(),
        };
        let (this, of) = (self.clone(), domain.clone());
        let every = self.settings.cut_every;
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(run)
                .map_err(DomainError::Thread)
        };
        let mut threads = self.threads.lock();
        threads.push(spawn("upload", Box::new(move || uploader.run()))?);
        threads.push(spawn("hashes", Box::new(move || hasher.run()))?);
        threads.push(spawn(
            "cuts",
            Box::new(move || cut::run(&this, &of, every)),
        )?);
        domains.insert(name.into(), domain.clone());
        Ok(domain)
    }

    /// Where the container of a domain is, for people.
    pub fn store_of(&self, domain: &str) -> String {
        format!("{}/{domain}", self.settings.store.trim_end_matches('/'))
    }

    /// Brings all disks in step with the assignments.
    pub fn follow_assignments(&self) {
        for domain in self.domains() {
            let takes = |vm: &[u8; 16]| self.assignments.takes(&domain.name, vm);
            if let Err(error) = domain.follow(&takes) {
                let text = format!("what is assigned cannot be written down: {error}");
                domain.alarm("assignments", Some(text));
            } else {
                domain.alarm("assignments", None);
            }
        }
    }

    /// A domain that is open already.
    pub fn known_domain(&self, name: &str) -> Option<Arc<Domain>> {
        self.domains.lock().get(name).cloned()
    }

    /// Its id on the wire: its certificate's, where it has one.
    pub fn wire_id(&self) -> [u8; 16] {
        let certified = self.tls.as_ref().map(|tls| tls.own().id.into_bytes());
        certified.unwrap_or(self.id)
    }

    /// The handshake of a connection is done. `false`: meanwhile its peer was revoked.
    pub fn let_in(&self, connection: u64, peer: &Peer) -> bool {
        let until_s = tls::validity_s(&peer.certificate).map_or(0, |(_, until_s)| until_s);
        if let Some(standing) = self.connections.lock().get_mut(&connection) {
            standing.shown = Some((peer.identity, peer.serial.clone(), until_s));
        }
        // After it can be found: whoever revokes looks through them after the list is in force.
        let tls = self.tls.as_ref();
        tls.is_none_or(|tls| !tls.is_revoked(&peer.serial))
    }

    /// Ends the connections whose peer's certificate was revoked, or is valid no more.
    pub fn end_connections(&self, tls: &ServerTls) {
        let now_s = enrol::steps::now_s();
        // The list was parsed when it was read: to look a number up is quick, and the lock is soon free.
        for standing in self.connections.lock().values_mut() {
            let Some((identity, serial, until_s)) = &standing.shown else {
                continue;
            };
            let why = match (tls.is_revoked(serial), *until_s < now_s) {
                (true, _) => "was revoked",
                (false, true) => "has expired",
                (false, false) => continue,
            };
            tracing::warn!("a connection of {identity} is ended: its certificate {why}");
            let _ = standing.stream.shutdown(std::net::Shutdown::Both);
            standing.shown = None; // it is told once
        }
    }

    /// The domains.
    pub fn domains(&self) -> Vec<Arc<Domain>> {
        self.domains.lock().values().cloned().collect()
    }

    /// A host's control connection stands.
    pub fn host_joined(&self, host: &Host, protocol: u16, outbox: Arc<Outbox>) {
        let connected = Connected { outbox, protocol };
        self.hosts.lock().insert(host.id, connected);
    }

    /// The hosts whose control connection stands, and which protocol each speaks.
    pub fn connected_hosts(&self) -> BTreeMap<HostId, u16> {
        let hosts = self.hosts.lock();
        hosts
            .iter()
            .map(|(id, host)| (*id, host.protocol))
            .collect()
    }

    /// It is gone.
    pub fn host_left(&self, host: [u8; 16], outbox: &Arc<Outbox>) {
        let mut hosts = self.hosts.lock();
        if hosts
            .get(&host)
            .is_some_and(|known| Arc::ptr_eq(&known.outbox, outbox))
        {
            hosts.remove(&host);
        }
    }

    /// Sends on a host's control connection; `false`: there is none.
    pub fn send_to_host(&self, host: &[u8; 16], message: &Message) -> bool {
        match self.hosts.lock().get(host) {
            Some(host) => {
                host.outbox.send(message, 0);
                true
            }
            None => false,
        }
    }

    /// Whoever takes a cut of this domain waits for these hosts' answers here.
    pub fn expect_answers(
        &self,
        domain: &str,
        hosts: BTreeSet<HostId>,
    ) -> Receiver<(HostId, Answer)> {
        // A host answers a few times at most; what is left over when the cut is given up is dropped.
        let (sender, receiver) = bounded(16 + 4 * hosts.len());
        let mut waiters = self.waiters.lock();
        waiters.retain(|waiter| waiter.domain != domain);
        waiters.push(Waiter {
            domain: domain.into(),
            hosts,
            sender,
        });
        receiver
    }

    /// A host has answered about a cut.
    pub fn cut_answer(&self, domain: &str, host: HostId, answer: Answer) {
        let waiters = self.waiters.lock();
        let mut of_host = waiters.iter().filter(|waiter| waiter.hosts.contains(&host));
        if let Some(waiter) = of_host.find(|waiter| waiter.domain == domain) {
            let _ = waiter.sender.try_send((host, answer));
        }
    }

    /// A host cannot take a cut now. The frame does not name the domain: of one host's domains at
    /// most one request is answered so, and the others only lose a second.
    pub fn cut_refused(&self, host: HostId, current: u64, why: &str) {
        let waiters = self.waiters.lock();
        for waiter in waiters.iter().filter(|waiter| waiter.hosts.contains(&host)) {
            let answer = Answer::Void(current, why.into());
            let _ = waiter.sender.try_send((host, answer));
        }
    }

    /// Serves the six ports.
    pub fn listen(
        self: &Arc<Self>,
        listeners: Vec<(PortRole, TcpListener)>,
    ) -> std::io::Result<()> {
        for (role, listener) in listeners {
            let this = self.clone();
            let name = format!("port-{}", role.offset());
            let run = move || this.accept(role, &listener);
            let thread = std::thread::Builder::new().name(name).spawn(run)?;
            self.threads.lock().push(thread);
        }
        Ok(())
    }

    fn accept(self: &Arc<Self>, role: PortRole, listener: &TcpListener) {
        let mut next = u64::from(role.offset()) << 48;
        loop {
            let accepted = listener.accept();
            // pairs with the store of `stop`
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            let Ok((stream, peer)) = accepted else {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            let Ok(second) = stream.try_clone() else {
                continue;
            };
            next += 1;
            let id = next;
            {
                let mut connections = self.connections.lock();
                if connections.len() >= MAX_CONNECTIONS {
                    tracing::warn!("refused a connection of {peer}: {MAX_CONNECTIONS} are open");
                    continue;
                }
                let (stream, shown) = (second, None);
                connections.insert(id, Standing { stream, shown });
            }
            let slot = Slot {
                appliance: self.clone(),
                id,
            };
            let run = move || session::serve(&slot.appliance, role, &stream, slot.id);
            match std::thread::Builder::new()
                .name("session".into())
                .spawn(run)
            {
                Ok(thread) => {
                    let mut threads = self.threads.lock();
                    threads.retain(|thread| !thread.is_finished());
                    threads.push(thread);
                }
                Err(error) => tracing::warn!("refused a connection of {peer}: no thread: {error}"),
            }
        }
    }

    /// Stops everything; what was received and queued is made durable.
    pub fn stop(&self, ports: &[SocketAddr]) {
        self.stopping.store(true, Ordering::Release); // pairs with the loads
        for port in ports {
            drop(TcpStream::connect(port)); // wakes the acceptor
        }
        for standing in self.connections.lock().values() {
            let _ = standing.stream.shutdown(std::net::Shutdown::Both);
        }
        for domain in self.domains() {
            domain.close();
        }
        loop {
            let Some(thread) = self.threads.lock().pop() else {
                break;
            };
            let _ = thread.join();
        }
    }
}

/// Listens on six consecutive ports from `base` on; base 0 looks for six free ones.
pub fn bind(address: IpAddr, base: u16) -> anyhow::Result<(u16, Vec<(PortRole, TcpListener)>)> {
    let from = |base: u16| -> Result<Vec<(PortRole, TcpListener)>, (u16, std::io::Error)> {
        let mut listeners = Vec::new();
        for role in PortRole::ALL {
            let port = base.checked_add(role.offset());
            let port = port.ok_or((base, std::io::ErrorKind::InvalidInput.into()))?;
            let listener = TcpListener::bind((address, port)).map_err(|e| (port, e))?;
            listeners.push((role, listener));
        }
        Ok(listeners)
    };
    if base != 0 {
        let listeners = from(base).map_err(|(port, error)| {
            anyhow::anyhow!("cannot listen on {address} port {port}: {error}; is another appliance running, or choose another --port-base")
        })?;
        return Ok((base, listeners));
    }
    let mut candidate = 20_000 + (std::process::id() % 5_000) as u16 * 6;
    for _ in 0..2_000 {
        if let Ok(listeners) = from(candidate) {
            return Ok((candidate, listeners));
        }
        candidate = if candidate > 60_000 {
            20_000
        } else {
            candidate + 6
        };
    }
    anyhow::bail!("no six free consecutive ports on {address}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_connections_place_is_free_again_whatever_became_of_its_thread() {
        let dir = tempfile::tempdir().unwrap();
        let appliance = Appliance::open(Settings {
            name: "dr".into(),
            data_dir: dir.path().join("data"),
            store: dir.path().join("store").display().to_string(),
            store_options: Vec::new(),
            served: Vec::new(),
            cut_every: Duration::from_secs(1),
            log: LogOptions {
                segment_bytes: 4 << 20,
                max_bytes: 64 << 20,
            },
            part_bytes: 1 << 20,
            tls: None,
            assignments: Arc::new(assignments::InForce::any()),
        })
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for panics in [false, true] {
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let standing = Standing {
                stream,
                shown: None,
            };
            appliance.connections.lock().insert(7, standing);
            let slot = Slot {
                appliance: appliance.clone(),
                id: 7,
            };
            let thread = std::thread::spawn(move || {
                let _slot = slot;
                assert!(!panics, "as a defect would");
            });
            assert_eq!(thread.join().is_err(), panics);
            assert!(appliance.connections.lock().is_empty(), "{panics}");
        }
    }
}
