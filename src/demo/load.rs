//! The demo's clients: real ones where they are installed, an own NBD client otherwise.

use super::find_program;
use anyhow::{Context, bail};
use simhost::nbd::client::{Client, Op};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Exports, and where on each the load writes: (label, offset, length).
const TARGETS: [(&str, u64, u64); 2] = [("data", 64 << 20, 64 << 20), ("scratch", 0, 64 << 20)];

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// Waits, but not longer than until Ctrl-C.
pub fn wait(time: Duration, stopping: &AtomicBool) {
    let until = Instant::now() + time;
    while Instant::now() < until && !stopping.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Copies a file onto the start of an export; returns which client did.
pub fn copy(image: &Path, socket: &Path, export: &str) -> anyhow::Result<&'static str> {
    let target = uri(socket, export);
    // qemu-img writes onto a larger target; nbdcopy wants it to be at least as large, as it is.
    let clients: [(&str, &str, Vec<&str>); 2] = [
        ("nbdcopy", "nbdcopy", vec![]),
        (
            "qemu-img",
            "qemu-img",
            vec!["convert", "-n", "-f", "raw", "-O", "raw"],
        ),
    ];
    for (name, program, arguments) in clients {
        let Some(program) = find_program(program) else {
            continue;
        };
        let copied = Command::new(program)
            .args(arguments)
            .arg(image)
            .arg(&target)
            .output()
            .with_context(|| format!("cannot run {name}"))?;
        if !copied.status.success() {
            bail!("{name}: {}", String::from_utf8_lossy(&copied.stderr));
        }
        return Ok(name);
    }
    let mut client = Client::connect_unix(socket, export)?;
    let bytes = std::fs::read(image)?;
    for (i, chunk) in bytes.chunks(256 << 10).enumerate() {
        client.call(&Op::Write(i as u64 * (256 << 10), chunk), false)?;
    }
    client.call(&Op::Flush, false)?;
    client.disconnect();
    Ok("the demo's own client (nbdcopy and qemu-img are not installed)")
}

fn fio(socket: &Path, dir: &Path, seconds: u64, verify: bool) -> Option<Vec<Command>> {
    let program = find_program("fio")?;
    let engines = Command::new(&program).arg("--enghelp").output().ok()?;
    if !String::from_utf8_lossy(&engines.stdout).contains("nbd") {
        return None;
    }
    let job = |(export, offset, len): (&str, u64, u64)| {
        let mut command = Command::new(&program);
        command
            .current_dir(dir)
            .args([
                "--ioengine=nbd",
                "--rw=randwrite",
                "--bs=4k",
                "--iodepth=8",
                "--name",
            ])
            .arg(export)
            .arg(format!("--uri={}", uri(socket, export)))
            .args([format!("--offset={offset}"), format!("--size={len}")])
            .args([
                "--verify_state_save=0",
                "--output-format=json",
                "--randseed=7",
            ]);
        if verify {
            // The whole region is written once in random order, then read back.
            command.args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"]);
        } else {
            command.args([format!("--runtime={seconds}"), "--time_based".into()]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        command
    };
    Some(TARGETS.into_iter().map(job).collect())
}

/// Bytes that a fio report says were written.
fn written(report: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(report);
    let start = text.find('{').unwrap_or(text.len());
    let json: serde_json::Value =
        serde_json::from_str(text.get(start..).unwrap_or_default()).unwrap_or_default();
    let jobs = json.get("jobs").and_then(|jobs| jobs.as_array());
    let bytes = |job: &serde_json::Value| job.get("write")?.get("io_bytes")?.as_u64();
    jobs.into_iter().flatten().filter_map(bytes).sum()
}

struct OwnLoad {
    threads: Vec<JoinHandle<()>>,
    bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

/// A load on both disks that runs until the server dies, or is ended.
pub enum Load {
    /// fio, one process for each disk.
    Fio(Vec<Child>),
    /// The demo's own client.
    Own(OwnLoadHandle),
}

/// The demo's own load.
pub struct OwnLoadHandle(OwnLoad);

impl Load {
    /// Starts it.
    pub fn start(socket: &Path, dir: &Path, seconds: u64) -> anyhow::Result<Self> {
        if let Some(commands) = fio(socket, dir, seconds, false) {
            let children: std::io::Result<Vec<Child>> = commands
                .into_iter()
                .map(|mut command| command.spawn())
                .collect();
            return Ok(Self::Fio(children.context("cannot start fio")?));
        }
        let (bytes, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let mut threads = Vec::new();
        for target in TARGETS {
            let (socket, bytes, stop) = (socket.to_owned(), bytes.clone(), stop.clone());
            threads.push(std::thread::spawn(move || {
                own_writes(&socket, target, &bytes, &stop)
            }));
        }
        Ok(Self::Own(OwnLoadHandle(OwnLoad {
            threads,
            bytes,
            stop,
        })))
    }

    /// Which client it is.
    pub const fn client(&self) -> &'static str {
        match self {
            Self::Fio(_) => "fio",
            Self::Own(_) => "the demo's own client (fio with its nbd engine is not installed)",
        }
    }

    /// Ends it; returns the bytes written, as far as they are known.
    pub fn end(&mut self) -> u64 {
        match self {
            Self::Fio(children) => {
                let mut bytes = 0;
                for child in children.drain(..) {
                    // The server is gone: fio ends by itself, and tells what it wrote.
                    if let Ok(output) = wait_or_kill(child) {
                        bytes += written(&output);
                    }
                }
                bytes
            }
            Self::Own(OwnLoadHandle(own)) => {
                own.stop.store(true, Ordering::Release);
                for thread in own.threads.drain(..) {
                    let _ = thread.join();
                }
                own.bytes.load(Ordering::Acquire)
            }
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

fn wait_or_kill(mut child: Child) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut stdout = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut out = Vec::new();
        if let Some(stdout) = &mut stdout {
            let _ = stdout.read_to_end(&mut out);
        }
        out
    });
    let deadline = Instant::now() + Duration::from_secs(5);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(reader.join().unwrap_or_default())
}

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn own_writes(
    socket: &Path,
    (export, offset, len): (&str, u64, u64),
    bytes: &AtomicU64,
    stop: &AtomicBool,
) {
    let Ok(mut client) = Client::connect_unix(socket, export) else {
        return;
    };
    let mut numbers = Numbers(offset | 0x9e37_79b9);
    let mut block = [0u8; 4096];
    while !stop.load(Ordering::Acquire) {
        let at = offset + numbers.next() % (len / 4096) * 4096;
        block
            .iter_mut()
            .for_each(|byte| *byte = numbers.next() as u8);
        while client.in_flight() >= 8 {
            match client.next_done() {
                Ok(done) if done.error == 0 => bytes.fetch_add(4096, Ordering::AcqRel),
                _ => return,
            };
        }
        if client.submit(&Op::Write(at, &block), false).is_err() {
            return;
        }
    }
}

/// Writes both regions once more and reads everything back; returns the bytes written.
pub fn verified(socket: &Path, dir: &Path, seconds: u64) -> anyhow::Result<u64> {
    if let Some(commands) = fio(socket, dir, seconds, true) {
        let children: std::io::Result<Vec<Child>> = commands
            .into_iter()
            .map(|mut command| command.spawn())
            .collect();
        let mut bytes = 0;
        for child in children.context("cannot start fio")? {
            let output = child.wait_with_output()?;
            if !output.status.success() {
                bail!(
                    "fio found a difference: {}",
                    String::from_utf8_lossy(&output.stdout)
                );
            }
            bytes += written(&output.stdout);
        }
        return Ok(bytes);
    }
    let mut bytes = 0;
    for (export, offset, len) in TARGETS {
        let mut client = Client::connect_unix(socket, export)?;
        let mut numbers = Numbers(7);
        let block: Vec<u8> = (0..1 << 20).map(|_| numbers.next() as u8).collect();
        for at in (offset..offset + len).step_by(block.len()) {
            client.call(&Op::Write(at, &block), false)?;
        }
        for at in (offset..offset + len).step_by(block.len()) {
            if client.call(&Op::Read(at, block.len() as u32), false)? != block {
                bail!("disk {export} does not read back at byte {at}");
            }
        }
        bytes += len;
        client.disconnect();
    }
    Ok(bytes)
}
