//! A guest that remembers: it writes blocks over NBD, each with its place and a version, and knows of every
//! block what was acknowledged and what may be on the way.
//!
//! Invariant: a block read back is one of the versions from the last acknowledged one to the last issued
//! one, whole. A guest whose host dies goes on with the same memory afterwards.

use crate::support::Numbers;
use simhost::nbd::client::{Client, Op};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;

#[derive(Clone, Copy, Default)]
struct Known {
    acknowledged: u64,
    issued: u64,
}

/// What a guest remembers between two lives of its host.
pub struct Memory {
    blocks: Vec<Known>,
    numbers: Numbers,
    version: u64,
    /// Writes that were acknowledged.
    pub writes: u64,
    /// The longest that a write took.
    pub slowest: Duration,
}

impl Memory {
    /// Of a disk of zeros.
    pub fn new(capacity_bytes: u64, seed: u64) -> Self {
        Self {
            blocks: vec![Known::default(); capacity_bytes as usize / BLOCK],
            numbers: Numbers(seed | 1),
            version: 0,
            writes: 0,
            slowest: Duration::ZERO,
        }
    }
}

fn content(block: usize, version: u64) -> Vec<u8> {
    let mut numbers = Numbers(version ^ ((block as u64) << 32) ^ 0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(BLOCK);
    bytes.extend((block as u64).to_le_bytes());
    bytes.extend(version.to_le_bytes());
    while bytes.len() < BLOCK {
        bytes.extend(numbers.next().to_le_bytes());
    }
    bytes
}

/// A guest at work.
pub struct Witness {
    thread: JoinHandle<(Memory, Result<(), String>)>,
    stop: Arc<AtomicBool>,
}

impl Witness {
    /// Reads everything back, then writes until it is stopped or its host dies.
    pub fn start(socket: PathBuf, export: &'static str, mut memory: Memory) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            let ended = live(&socket, export, &mut memory, &stopping);
            (memory, ended)
        });
        Self { thread, stop }
    }

    /// Stops it; an error of its disk is a failure.
    pub fn finish(self) -> Memory {
        self.stop.store(true, Ordering::Release); // pairs with the load in `live`
        let (memory, ended) = self.thread.join().unwrap();
        if let Err(error) = ended {
            panic!("the guest saw an error: {error}");
        }
        memory
    }

    /// Its host was killed: an error is what a dead host looks like.
    pub fn buried(self) -> Memory {
        self.stop.store(true, Ordering::Release); // pairs with the load in `live`
        self.thread.join().unwrap().0
    }
}

/// Reads everything back and compares it with what is remembered. Which version was on the way when a
/// host died, and came through, is known from then on.
fn verify(client: &mut Client, memory: &mut Memory) -> Result<(), String> {
    let per_read = 64;
    for (chunk, known) in memory.blocks.chunks_mut(per_read).enumerate() {
        let (first, len) = (chunk * per_read, known.len() * BLOCK);
        let bytes = client
            .call(&Op::Read((first * BLOCK) as u64, len as u32), false)
            .map_err(|error| error.to_string())?;
        for (i, (known, bytes)) in known.iter_mut().zip(bytes.chunks(BLOCK)).enumerate() {
            let block = first + i;
            let version = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
            let possible = version == known.acknowledged || version == known.issued;
            let whole = match version {
                0 => bytes.iter().all(|byte| *byte == 0),
                _ => bytes == content(block, version),
            };
            assert!(
                possible && whole,
                "block {block} holds version {version} (whole: {whole}), acknowledged {}, issued {}",
                known.acknowledged,
                known.issued
            );
            *known = Known {
                acknowledged: version,
                issued: version,
            };
        }
    }
    Ok(())
}

fn live(
    socket: &std::path::Path,
    export: &str,
    memory: &mut Memory,
    stop: &AtomicBool,
) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let mut client = Client::connect_unix(socket, export).map_err(text)?;
    verify(&mut client, memory)?;
    // pairs with the stores of `finish` and `buried`
    while !stop.load(Ordering::Acquire) {
        let block = (memory.numbers.next() >> 20) as usize % memory.blocks.len();
        memory.version += 1;
        let version = memory.version;
        memory.blocks[block].issued = version;
        let since = Instant::now();
        let bytes = content(block, version);
        let op = Op::Write((block * BLOCK) as u64, &bytes);
        client.call(&op, false).map_err(text)?;
        memory.slowest = memory.slowest.max(since.elapsed());
        memory.blocks[block].acknowledged = version;
        memory.writes += 1;
        std::thread::sleep(Duration::from_micros(500)); // time under test: the pace of the load
    }
    verify(&mut client, memory)?;
    client.disconnect();
    Ok(())
}
