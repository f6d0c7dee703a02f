//! The network between a daemon and its appliance, as a thing that can break: `jetdr simhost link`, and
//! what is asked of it.

use super::Part;
use super::site::ask;
use serde_json::{Value, json};
use std::path::PathBuf;

/// A running link; it ends with its value.
pub struct Link {
    _process: Part,
    socket: PathBuf,
    /// The first of its ports.
    pub port_base: u64,
    _folder: tempfile::TempDir,
}

impl Link {
    /// Before an appliance on this machine.
    pub fn before(appliance_port_base: u64) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("jd-link-")
            .tempdir_in("/dev/shm")
            .unwrap();
        let socket = folder.path().join("link.sock");
        let arguments = [
            "simhost".to_string(),
            "link".into(),
            format!("--to=127.0.0.1:{appliance_port_base}"),
            format!("--control-socket={}", socket.display()),
        ];
        let process = Part::start(&folder.path().join("log"), &arguments);
        let port_base = process.ready["port_base"].as_u64().unwrap();
        Self {
            _process: process,
            socket,
            port_base,
            _folder: folder,
        }
    }

    fn tell(&self, command: &Value) {
        let answer = ask(&self.socket, command);
        assert!(answer["error"].is_null(), "{command}: {answer}");
    }

    /// Connections end, and new ones are refused.
    pub fn cut(&self) {
        self.tell(&json!({"cmd": "cut"}));
    }

    /// Connections stay, and nothing comes through.
    pub fn half_open(&self) {
        self.tell(&json!({"cmd": "half-open"}));
    }

    /// Everything goes through again.
    pub fn heal(&self) {
        self.tell(&json!({"cmd": "heal"}));
    }
}
