//! A VM process under test: started, waited for until it is ready, stopped, its end looked at.
#![allow(clippy::unwrap_used, dead_code)]

use simhost::nbd::client::Client;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A VM process and its folder.
pub struct Vm {
    pub child: Child,
    pub folder: tempfile::TempDir,
    pub socket: PathBuf,
    log: Receiver<String>,
}

/// How it ended.
pub struct End {
    pub code: Option<i32>,
    pub log: String,
}

/// Starts a VM with one disk of 4 MiB, `disk0`, under this filter.
pub fn start(library: &Path, more: &[&str]) -> Vm {
    start_in(tempfile::tempdir().unwrap(), library, more)
}

/// The same in a folder of an earlier one.
pub fn start_in(folder: tempfile::TempDir, library: &Path, more: &[&str]) -> Vm {
    let (mut vm, line) = try_start_in(folder, library, more);
    if !line.starts_with("READY ") {
        let _ = vm.child.kill();
        panic!("the VM is not ready: {line}\n{}", vm.end().log);
    }
    vm
}

/// The same, with the line that it printed; none if it ended.
pub fn try_start_in(folder: tempfile::TempDir, library: &Path, more: &[&str]) -> (Vm, String) {
    let disk = folder.path().join("disk0.img");
    if !disk.exists() {
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(4 << 20)
            .unwrap();
    }
    let socket = folder.path().join("nbd.sock");
    let mut child = Command::new(env!("CARGO_BIN_EXE_simhost"))
        .args(["vm", "--name", "test"])
        .arg(format!("--disk=disk0={}", disk.display()))
        .arg(format!("--run-dir={}", folder.path().join("run").display()))
        .arg(format!("--nbd-socket={}", socket.display()))
        .arg(format!(
            "--control-socket={}",
            folder.path().join("control.sock").display()
        ))
        .arg(format!("--filter-lib={}", library.display()))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let (send, log) = channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        let _ = send.send(text);
    });
    let stdout = child.stdout.take().unwrap();
    let (send, ready) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = BufReader::new(stdout).read_line(&mut line);
        let _ = send.send(line);
    });
    let vm = Vm {
        child,
        folder,
        socket,
        log,
    };
    let line = ready.recv_timeout(PATIENCE).unwrap_or_default();
    (vm, line)
}

/// A command on the control socket.
pub fn command(vm: &Vm, command: &str) -> serde_json::Value {
    command_of(&vm.folder.path().join("control.sock"), command)
}

/// A command on any control socket; Null: it hung up without an answer.
pub fn command_of(socket: &Path, command: &str) -> serde_json::Value {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(&mut &stream, "{command}").unwrap();
    let mut line = String::new();
    let _ = BufReader::new(&stream).read_line(&mut line);
    serde_json::from_str(&line).unwrap_or_default()
}

impl Vm {
    pub fn client(&self) -> Client {
        Client::connect_unix(&self.socket, "disk0").unwrap()
    }

    /// SIGTERM, and how it ended.
    pub fn stop(&mut self) -> End {
        self.signal("TERM");
        self.end()
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Waits for its end; killed if that takes too long.
    pub fn end(&mut self) -> End {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    let _ = self.child.kill();
                    break self.child.wait().unwrap();
                }
                None => std::thread::sleep(Duration::from_millis(5)), // poll
            }
        };
        End {
            code: status.code(),
            log: self.log.recv_timeout(PATIENCE).unwrap_or_default(),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
