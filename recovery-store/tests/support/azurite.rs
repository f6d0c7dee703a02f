//! A running Azure Blob emulator of a test's own, ended with it.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Azurite, on a port of its own.
pub struct Azurite {
    process: Child,
    /// Its port.
    pub port: u16,
    /// What it says after it listens.
    said: mpsc::Receiver<String>,
}

/// Of the repository, whichever of its packages runs the test.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|above| above.join("tests/azurite"))
        .find(|folder| folder.join("package.json").exists())
        .expect("tests/azurite is in the repository")
}

/// The emulator's program: installed beside its `package.json`, or in the root of the repository.
fn program() -> PathBuf {
    let places = [folder(), folder().join("../..")];
    let programs = places.map(|place| place.join("node_modules/.bin/azurite-blob"));
    programs
        .into_iter()
        .find(|program| program.exists())
        .expect(
            "Azurite is not installed: run `npm ci` in tests/azurite (scripts/bootstrap.sh does)",
        )
}

/// Waits for a line that holds a text.
fn wait_for(said: &mpsc::Receiver<String>, text: &str) -> Option<String> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = said.recv_timeout(left).ok()?;
        if line.contains(text) {
            return Some(line);
        }
    }
}

impl Azurite {
    /// Starts it, in memory, and waits until it listens.
    pub fn start() -> Self {
        Self::start_with(&["--inMemoryPersistence", "--blobPort", "0"])
    }

    /// The same on a folder, which it finds again; port 0 takes a free one.
    pub fn lasting(folder: &Path, port: u16) -> Self {
        let (folder, port) = (folder.display().to_string(), port.to_string());
        Self::start_with(&["--location", &folder, "--blobPort", &port])
    }

    fn start_with(arguments: &[&str]) -> Self {
        let mut process = Command::new(program())
            .args(arguments)
            .args(["--skipApiVersionCheck", "--disableTelemetry", "--silent"])
            .current_dir(std::env::temp_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts Azurite");
        let stdout = process.stdout.take().expect("is piped");
        let (tell, said) = mpsc::channel();
        // Read to the end, so that it is never stopped by a full pipe.
        std::thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            lines.for_each(|line| drop(tell.send(line)));
        });
        let listens = "successfully listens on http://127.0.0.1:";
        let found = wait_for(&said, listens);
        let port = found.and_then(|line| line.rsplit(':').next()?.trim().parse().ok());
        let Some(port) = port else {
            let _ = process.kill();
            let mut text = String::new();
            if let Some(mut stderr) = process.stderr.take() {
                let _ = stderr.read_to_string(&mut text);
            }
            let _ = process.wait();
            panic!("Azurite does not listen: {text}");
        };
        Self {
            process,
            port,
            said,
        }
    }

    /// Kills it once it has saved what it holds: unlike a store, it forgets the last seconds otherwise.
    pub fn kill_saved(&mut self) {
        let id = self.process.id().to_string();
        let asked = Command::new("kill").args(["-TERM", &id]).status();
        assert!(asked.expect("starts kill").success());
        let closed = wait_for(&self.said, "successfully closed");
        assert!(closed.is_some(), "Azurite does not close");
        // Requests that nobody answers any more may keep the process.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Makes a blob container and gives its location.
    pub fn container(&self, name: &str) -> String {
        let done = Command::new("node")
            .arg(folder().join("create-container.mjs"))
            .arg(self.port.to_string())
            .arg(name)
            .status()
            .expect("starts node");
        assert!(done.success(), "the blob container {name} was not made");
        format!(
            "azure+http://127.0.0.1:{}/devstoreaccount1/{name}",
            self.port
        )
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
