//! A running Azure Blob emulator of a test's own, ended with it.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Azurite, in memory, on a port of its own.
pub struct Azurite {
    process: Child,
    /// Its port.
    pub port: u16,
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

impl Azurite {
    /// Starts it and waits until it listens.
    pub fn start() -> Self {
        let mut process = Command::new(program())
            .args(["--inMemoryPersistence", "--skipApiVersionCheck"])
            .args(["--disableTelemetry", "--silent", "--blobPort", "0"])
            .current_dir(std::env::temp_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts Azurite");
        let stdout = process.stdout.take().expect("is piped");
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            let port = lines.by_ref().find_map(|line| {
                let (_, port) = line.split_once("successfully listens on http://127.0.0.1:")?;
                port.trim().parse::<u16>().ok()
            });
            let _ = tell.send(port);
            // Read on, so that it is never stopped by a full pipe.
            lines.for_each(drop);
        });
        match told.recv_timeout(Duration::from_secs(120)) {
            Ok(Some(port)) => Self { process, port },
            other => {
                let _ = process.kill();
                let mut text = String::new();
                if let Some(mut stderr) = process.stderr.take() {
                    let _ = stderr.read_to_string(&mut text);
                }
                let _ = process.wait();
                panic!("Azurite does not listen ({other:?}): {text}");
            }
        }
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
