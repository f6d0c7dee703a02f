//! A host under test: started, commanded, stopped.
#![allow(clippy::unwrap_used, dead_code)]

use serde_json::{Value, json};
use simhost::nbd::client::Client;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A host process and its folder.
pub struct Host {
    pub child: Child,
    pub stdout: BufReader<ChildStdout>,
    pub folder: tempfile::TempDir,
}

impl Host {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut child = Command::new(env!("CARGO_BIN_EXE_simhost"))
            .arg("host")
            .arg("--run-dir")
            .arg(at("run"))
            .arg("--nbd-dir")
            .arg(at("nbd"))
            .arg("--control-socket")
            .arg(at("host.sock"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert!(line.starts_with("READY "), "{line}");
        Self {
            child,
            stdout,
            folder,
        }
    }

    pub fn obey(&self, command: &Value) -> Value {
        let stream = UnixStream::connect(self.folder.path().join("host.sock")).unwrap();
        stream.set_read_timeout(Some(2 * PATIENCE)).unwrap();
        writeln!(&mut &stream, "{command}").unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn start_vm(&self, name: &str, library: &Path, more: &[&str]) -> Value {
        let disk = self.folder.path().join(format!("{name}.img"));
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&disk);
        file.unwrap().set_len(1 << 20).unwrap();
        let mut args = vec![
            format!("--disk=disk0={}", disk.display()),
            format!("--filter-lib={}", library.display()),
        ];
        args.extend(more.iter().map(|a| a.to_string()));
        self.obey(&json!({"cmd": "start", "vm": name, "args": args}))
    }

    pub fn client(&self, vm: &str) -> Client {
        let socket = self.folder.path().join("nbd").join(format!("{vm}.sock"));
        Client::connect_unix(&socket, "disk0").unwrap()
    }

    pub fn next_event(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        serde_json::from_str(line.strip_prefix("EVENT ").unwrap()).unwrap()
    }

    pub fn stop(&mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(&pid).status().unwrap().success());
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the host does not stop");
            std::thread::sleep(Duration::from_millis(5)); // poll
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its VMs are processes of their own: they end with the test too.
        if let Ok(stream) = UnixStream::connect(self.folder.path().join("host.sock")) {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
            let _ = writeln!(&mut &stream, "{}", json!({"cmd": "reboot"}));
            let _ = BufReader::new(&stream).read_line(&mut String::new());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
