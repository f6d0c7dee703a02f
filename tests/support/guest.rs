//! A booted guest: a Debian kernel in QEMU whose disk is an NBD export, and what it says on its console.
//!
//! Invariant: every line of the console is kept with the time at which it was read, so a report that was
//! read before some moment was true before it. The guest ends with its value, however that goes.

use super::{LIMIT, client};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Instant, SystemTime};

/// The guest's first process, and what it says.
const INIT: &str = include_str!("../guest/init");

/// The host's clock, in ns since 1970: the one that stamps cuts.
pub fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap().as_nanos() as u64
}

/// A file that `scripts/guest.sh` made.
fn made(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(target);
    let path = path.join("guest").join(name);
    assert!(
        path.exists(),
        "{} is missing: run scripts/bootstrap.sh test",
        path.display()
    );
    path
}

/// One file in the format of an initramfs ("newc").
fn cpio_entry(out: &mut Vec<u8>, name: &str, mode: usize, content: &[u8]) {
    let (len, name_len) = (content.len(), name.len() + 1);
    let fields = [1, mode, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0];
    let fields = fields.map(|field: usize| format!("{field:08x}"));
    out.extend(b"070701");
    out.extend(fields.concat().bytes());
    out.extend(name.bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(content);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The initramfs: what the script made, and the first process.
fn initramfs(to: &Path) {
    let mut bytes = std::fs::read(made("base.cpio")).unwrap();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    cpio_entry(&mut bytes, "init", 0o100_755, INIT.as_bytes());
    cpio_entry(&mut bytes, "TRAILER!!!", 0, &[]);
    std::fs::write(to, bytes).unwrap();
}

/// What a name may hold after a power cut: the hash of the last write that was reported done, or of
/// one that had been announced after it.
#[derive(Default, Debug)]
pub struct Expected {
    /// Whether a DONE was reported.
    pub done: bool,
    /// Hashes, by the order of their announcement.
    pub hashes: Vec<String>,
}

/// By name.
pub type Files = BTreeMap<String, Expected>;

#[derive(Default)]
struct Said {
    lines: Vec<(u64, String)>,
    ended: bool,
}

/// A running guest.
pub struct Guest {
    qemu: Child,
    said: Arc<(Mutex<Said>, Condvar)>,
}

impl Guest {
    /// Boots a guest in a mode of its first process, with one disk: a URI of an export, or a raw file.
    /// `dir` is for its files.
    pub fn boot(dir: &Path, mode: &str, disk: &str) -> Self {
        let initrd = dir.join(format!("initramfs-{mode}"));
        initramfs(&initrd);
        let accel = std::env::var("JETDR_QEMU_ACCEL").unwrap_or_else(|_| "tcg".into());
        let log = dir.join("qemu.log");
        let log = File::options().create(true).append(true).open(log).unwrap();
        let mut qemu = client("qemu-system-x86_64");
        qemu.args(["-M", &format!("pc,accel={accel}"), "-m", "192", "-smp", "1"]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        qemu.args(["-no-reboot", "-serial", "stdio", "-kernel"]);
        qemu.arg(made("vmlinuz")).arg("-initrd").arg(initrd);
        let line = format!("console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off mode={mode}");
        qemu.args(["-append", &line, "-device", "virtio-blk-pci,drive=d"]);
        let drive =
            format!("id=d,if=none,format=raw,cache=none,aio=threads,discard=unmap,file={disk}");
        qemu.args(["-drive", &drive]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        qemu.stderr(log);
        let mut qemu = qemu.spawn().unwrap();
        let said = Arc::new((Mutex::new(Said::default()), Condvar::new()));
        let (console, tell) = (qemu.stdout.take().unwrap(), said.clone());
        std::thread::spawn(move || {
            let mut lines = BufReader::new(console).split(b'\n').map_while(Result::ok);
            // What was read is true from before now on: the time is taken first.
            lines.by_ref().for_each(|line| {
                let line = String::from_utf8_lossy(&line).trim().to_string();
                tell.0.lock().unwrap().lines.push((now_ns(), line));
                tell.1.notify_all();
            });
            tell.0.lock().unwrap().ended = true;
            tell.1.notify_all();
        });
        Self { qemu, said }
    }

    /// Waits until what the guest has said holds something; its lines so far come with it.
    fn wait(&self, what: &str, mut holds: impl FnMut(&[(u64, String)]) -> bool) {
        let deadline = Instant::now() + LIMIT;
        let mut said = self.said.0.lock().unwrap();
        while !holds(&said.lines) {
            let failed = said.lines.iter().any(|(_, line)| line.contains("FAILED"));
            let left = deadline.saturating_duration_since(Instant::now());
            if said.ended || failed || left.is_zero() {
                let end: Vec<_> = said.lines.iter().rev().take(30).rev().cloned().collect();
                drop(said);
                panic!("the guest did not say: {what}; its last lines: {end:#?}");
            }
            said = self.said.1.wait_timeout(said, left).unwrap().0;
        }
    }

    /// Waits for a line.
    pub fn wait_for_line(&self, line: &str) {
        self.wait(line, |lines| lines.iter().any(|(_, said)| said == line));
    }

    /// How many files were reported as synced.
    pub fn done(&self) -> usize {
        let said = self.said.0.lock().unwrap();
        let done = said
            .lines
            .iter()
            .filter(|(_, line)| line.starts_with("DONE "));
        done.count()
    }

    /// Waits until this many more files were reported as synced.
    pub fn wait_for_files(&self, more: usize) {
        let goal = self.done() + more;
        let is_done = |lines: &[(u64, String)]| {
            let done = lines.iter().filter(|(_, line)| line.starts_with("DONE "));
            done.count() >= goal
        };
        self.wait(&format!("{goal} files are synced"), is_done);
    }

    /// What the files may hold in a state of the disk from a moment at which `at_ns` had passed.
    /// Whatever was announced later may be there as well.
    pub fn expected(&self, at_ns: u64) -> Files {
        let mut files = Files::new();
        for (read_ns, line) in &self.said.0.lock().unwrap().lines {
            let mut words = line.split(' ');
            let (Some(word), Some(name), Some(hash)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let file = files.entry(name.to_string()).or_default();
            match word {
                "WILL" => file.hashes.push(hash.into()),
                "DONE" if *read_ns < at_ns => {
                    let at = file.hashes.iter().position(|known| known == hash);
                    file.hashes.drain(..at.unwrap());
                    file.done = true;
                }
                _ => {}
            }
        }
        files
    }

    /// What a guest in the mode `check` found, by name.
    pub fn held(&self) -> BTreeMap<String, String> {
        self.wait_for_line("CHECKED");
        let said = self.said.0.lock().unwrap();
        let held = said.lines.iter().filter_map(|(_, line)| {
            let (name, hash) = line.strip_prefix("HELD ")?.split_once(' ')?;
            Some((name.to_string(), hash.to_string()))
        });
        held.collect()
    }

    /// Takes its power away.
    pub fn cut_power(&mut self) {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }

    /// Waits until it has switched itself off.
    pub fn wait_for_end(&mut self) {
        let deadline = Instant::now() + LIMIT;
        let mut said = self.said.0.lock().unwrap();
        while !said.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the guest does not end");
            said = self.said.1.wait_timeout(said, left).unwrap().0;
        }
        drop(said);
        assert!(self.qemu.wait().unwrap().success());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Compares what was held with what was to be expected; gives the number of files that had to be there.
pub fn compare(what: &str, expected: &Files, held: &BTreeMap<String, String>) -> usize {
    let mut whole = 0;
    for (name, file) in expected {
        match held.get(name) {
            Some(hash) => {
                let known = file.hashes.contains(hash);
                assert!(known, "{what}: {name} holds {hash}, expected {file:?}");
                whole += usize::from(file.done);
            }
            None => assert!(!file.done, "{what}: {name} was synced and is gone"),
        }
    }
    let unknown: Vec<_> = held
        .keys()
        .filter(|name| !expected.contains_key(*name))
        .collect();
    assert!(unknown.is_empty(), "{what}: {unknown:?} were never written");
    whole
}
