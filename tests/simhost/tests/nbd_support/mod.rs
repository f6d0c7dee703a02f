//! An NBD server under test as a process of its own, the clients that it is tested with, and data that
//! can be told apart.
#![allow(clippy::unwrap_used, dead_code)]

pub mod raw;

use simhost::nbd::client::Client;
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A server of one disk, `disk`, on a unix socket and on TCP; killed when dropped.
pub struct Served {
    pub folder: tempfile::TempDir,
    pub disk: PathBuf,
    pub socket: PathBuf,
    pub tcp: String,
    child: Child,
}

/// Serves a sparse disk of this length.
pub fn serve(len_bytes: u64) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.img");
    std::fs::File::create_new(&disk)
        .unwrap()
        .set_len(len_bytes)
        .unwrap();
    serve_in(folder, disk)
}

/// Serves a disk of a folder.
pub fn serve_in(folder: tempfile::TempDir, disk: PathBuf) -> Served {
    let socket = folder.path().join("nbd.sock");
    let mut child = Command::new(env!("CARGO_BIN_EXE_simhost"))
        .args(["nbd", "--tcp", "127.0.0.1:0"])
        .arg("--disk")
        .arg(&disk)
        .arg("--socket")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = child.stdout.take().unwrap();
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    let mut served = Served {
        folder,
        disk,
        socket,
        tcp: String::new(),
        child,
    };
    let ready = line.strip_prefix("READY ").expect("the server starts");
    let ready: serde_json::Value = serde_json::from_str(ready).unwrap();
    served.tcp = ready["nbd_tcp"].as_str().unwrap().into();
    served
}

impl Served {
    /// The disk for a client: over the unix socket, and over TCP.
    pub fn uris(&self) -> [String; 2] {
        [self.unix_uri(), format!("nbd://{}/disk", self.tcp)]
    }

    pub fn unix_uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn client(&self) -> Client {
        Client::connect_unix(&self.socket, "disk").unwrap()
    }

    pub fn connect_unix(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn connect_tcp(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.tcp).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM; it must end well, and soon.
    pub fn terminate(&mut self, limit: Duration) {
        ok(Command::new("kill").arg(self.child.id().to_string()));
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the server does not stop");
            std::thread::sleep(Duration::from_millis(5)); // poll
        };
        assert!(status.success(), "{status}");
    }

    /// The same, and the socket's file is gone.
    pub fn stop(mut self) {
        self.terminate(PATIENCE);
        assert!(!self.socket.exists(), "the socket's file is left");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that must be there.
pub fn tool(name: &str) -> Command {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(name).exists()));
    assert!(
        found,
        "{name} is not installed: run scripts/bootstrap.sh test"
    );
    Command::new(name)
}

/// Runs it to its end; all that it said if it failed.
pub fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// Runs it; it must succeed. What it printed.
pub fn ok(command: &mut Command) -> String {
    let output = run(command);
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    let status = output.status;
    assert!(status.success(), "{command:?}: {status}\n{out}\n{err}");
    out
}

/// Bytes of which no two sectors are alike, other for another seed.
pub fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut all = Vec::with_capacity(len + 8);
    while all.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend_from_slice(&state.to_le_bytes());
    }
    all.truncate(len);
    all
}

/// Two files are the same, byte for byte.
pub fn assert_same(one: &Path, two: &Path) {
    let (a, b) = (std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
    assert_eq!(a.len(), b.len(), "{} {}", one.display(), two.display());
    let differs = a.iter().zip(&b).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{} {}", one.display(), two.display());
}

/// Waits until it is so.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2)); // poll
    }
}
