//! One direction of one connection: reads, holds back what is to be late, writes.
//!
//! Invariant: bytes come out in the order in which they came in; the queue between is bounded, so that who
//! is slow makes the sender wait, as a network does.

use crossbeam::channel::{Receiver, Sender, bounded};
use parking_lot::{Condvar, Mutex};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Read at once; small, so that a slow link is slow evenly.
const CHUNK_BYTES: usize = 16 * 1024;
/// Chunks on their way: as much as fits into a long, thin line.
const CHUNKS: usize = 256;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the daemon to the appliance.
    ToAppliance,
    /// Back.
    ToHost,
}

/// Both.
pub const BOTH: [Direction; 2] = [Direction::ToAppliance, Direction::ToHost];

/// A byte that is to be changed, once.
#[derive(Clone, Debug, Serialize)]
pub struct Corruption {
    /// In one of these directions.
    pub directions: Vec<Direction>,
    /// On this port (0 is the first), or on any.
    pub port: Option<u16>,
    /// When so many more bytes have passed there.
    pub after_bytes: u64,
    /// Its bits that change.
    pub mask: u8,
}

#[derive(Clone, Debug, Default, Serialize)]
struct Of {
    bytes_per_s: Option<u64>,
    latency_ms: u64,
    is_stopped: bool,
}

#[derive(Debug, Default)]
struct Faults {
    of: [Of; 2],
    corruptions: Vec<Corruption>,
    corrupted: u64,
}

/// What is asked of all pumps of a link.
#[derive(Debug, Default)]
pub struct Rules {
    faults: Mutex<Faults>,
    changed: Condvar,
}

impl Rules {
    fn change(&self, directions: &[Direction], change: impl Fn(&mut Of)) {
        let mut faults = self.faults.lock();
        for direction in directions {
            if let Some(of) = faults.of.get_mut(*direction as usize) {
                change(of);
            }
        }
        self.changed.notify_all();
    }

    /// At most so many bytes in a second and connection, each so much later.
    pub fn slow(&self, directions: &[Direction], rate: Option<u64>, latency_ms: Option<u64>) {
        self.change(directions, |of| {
            of.bytes_per_s = rate;
            of.latency_ms = latency_ms.unwrap_or_default();
        });
    }

    /// Nothing goes on, nothing is closed.
    pub fn stop(&self, directions: &[Direction]) {
        self.change(directions, |of| of.is_stopped = true);
    }

    /// A byte is to change.
    pub fn corrupt(&self, corruption: Corruption) {
        self.faults.lock().corruptions.push(corruption);
    }

    /// None of it any more.
    pub fn heal(&self) {
        let mut faults = self.faults.lock();
        faults.of = Default::default();
        faults.corruptions.clear();
        self.changed.notify_all();
    }

    /// For people.
    pub fn to_json(&self) -> Value {
        let faults = self.faults.lock();
        let [up, down] = &faults.of;
        json!({
            "to_appliance": up, "to_host": down,
            "corruptions": faults.corruptions, "corrupted_bytes": faults.corrupted,
        })
    }

    fn spoil(&self, direction: Direction, port: u16, chunk: &mut [u8]) {
        let mut faults = self.faults.lock();
        let mut struck = 0;
        faults.corruptions.retain_mut(|wanted| {
            let is_here = wanted.directions.contains(&direction);
            if !is_here || wanted.port.is_some_and(|other| other != port) {
                return true;
            }
            let byte = usize::try_from(wanted.after_bytes).ok();
            match byte.and_then(|at| chunk.get_mut(at)) {
                Some(byte) => {
                    *byte ^= wanted.mask;
                    struck += 1;
                    false
                }
                None => {
                    wanted.after_bytes -= chunk.len() as u64;
                    true
                }
            }
        });
        faults.corrupted += struck;
    }
}

type Chunk = (Instant, Vec<u8>);

/// One direction of a connection.
#[derive(Debug)]
pub struct Pump {
    direction: Direction,
    port: u16,
    rules: Arc<Rules>,
    passed: AtomicU64,
    is_ended: AtomicBool,
    is_over: AtomicBool,
}

impl Pump {
    /// Starts it.
    pub fn start(
        from: &TcpStream,
        to: &TcpStream,
        direction: Direction,
        port: u16,
        rules: &Arc<Rules>,
    ) -> std::io::Result<Arc<Self>> {
        let pump = Arc::new(Self {
            direction,
            port,
            rules: rules.clone(),
            passed: AtomicU64::new(0),
            is_ended: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
        });
        let (send, receive) = bounded(CHUNKS);
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        let thread = || std::thread::Builder::new().name("link".into());
        thread().spawn(move || take_in(from, &send))?;
        let of = pump.clone();
        thread().spawn(move || of.give_out(to, &receive))?;
        Ok(pump)
    }

    /// Gives up, wherever it waits.
    pub fn end(&self) {
        self.is_ended.store(true, Ordering::Release); // pairs with the loads below
        let _faults = self.rules.faults.lock();
        self.rules.changed.notify_all();
    }

    /// Nothing goes this way any more.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire) // pairs with the store at the end
    }

    /// Bytes that went out.
    pub fn passed_bytes(&self) -> u64 {
        self.passed.load(Ordering::Relaxed) // a figure
    }

    /// Waits until a chunk may go out. `false`: it never may.
    fn wait(&self, came: Instant, len: usize, free_at: &mut Instant) -> bool {
        let mut faults = self.rules.faults.lock();
        loop {
            if self.is_ended.load(Ordering::Acquire) {
                return false; // pairs with the store in `end`
            }
            let Some(of) = faults.of.get(self.direction as usize) else {
                return false;
            };
            if of.is_stopped {
                self.rules.changed.wait(&mut faults);
                continue;
            }
            let now = Instant::now();
            let due = (came + Duration::from_millis(of.latency_ms)).max(match of.bytes_per_s {
                Some(_) => *free_at,
                None => now,
            });
            if due <= now {
                // What was not used before is not saved up.
                let rate = of.bytes_per_s.map_or(f64::INFINITY, |rate| rate as f64);
                *free_at = (*free_at).max(now) + Duration::from_secs_f64(len as f64 / rate);
                return true;
            }
            self.rules.changed.wait_until(&mut faults, due);
        }
    }

    fn give_out(&self, mut to: TcpStream, from: &Receiver<Chunk>) {
        let mut free_at = Instant::now();
        let mut is_whole = true;
        for (came, mut chunk) in from {
            if !self.wait(came, chunk.len(), &mut free_at) {
                is_whole = false;
                break;
            }
            self.rules.spoil(self.direction, self.port, &mut chunk);
            if to.write_all(&chunk).is_err() {
                is_whole = false;
                break;
            }
            self.passed.fetch_add(chunk.len() as u64, Ordering::Relaxed); // a figure
        }
        // An end goes through like all else: not while the direction is stopped.
        if is_whole {
            self.wait(Instant::now(), 0, &mut free_at);
        }
        let _ = to.shutdown(if is_whole {
            Shutdown::Write
        } else {
            Shutdown::Both
        });
        self.is_over.store(true, Ordering::Release); // pairs with `is_over`
    }
}

fn take_in(mut from: TcpStream, to: &Sender<Chunk>) {
    loop {
        let mut chunk = vec![0; CHUNK_BYTES];
        match from.read(&mut chunk) {
            Ok(0) => return,
            Ok(len) => {
                chunk.truncate(len);
                if to.send((Instant::now(), chunk)).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
