//! A machine whose guest writes all the time: fio, which verifies what it wrote.
#![allow(clippy::unwrap_used)]

use super::place::Vcenter;
use super::support::{LIMIT, client};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Instant;

pub struct Guest {
    pub name: String,
    id: String,
    fio: Option<Child>,
    report: PathBuf,
    /// Bytes of the disk that fio leaves alone: here the test looks whether the disk answers.
    uri: String,
}

impl Guest {
    /// A machine with a disk, powered on, on one of the hosts of the cluster.
    pub fn new(vcenter: &Vcenter, number: usize, bytes: u64) -> Self {
        let name = format!("vm-{number}");
        let host = &vcenter.hosts[number % 4];
        let spec =
            json!({"cmd": "add-vm", "name": name, "host": host, "disks": [{"bytes": bytes}]});
        let id = vcenter.tell(&spec)["id"].as_str().unwrap().to_owned();
        let end = vcenter.tell(&json!({"cmd": "power", "vm": id, "on": true}));
        assert_eq!(end["state"], "success", "{end}");
        let vm = vcenter.tell(&json!({"cmd": "vm", "vm": id}));
        let socket = vm["nbd_socket"].as_str().unwrap();
        let uri = format!("nbd+unix:///disk0?socket={socket}");
        let report = vcenter.dir.path().join(format!("{name}.json"));
        let mut fio = client("fio");
        fio.args([
            "--name=guest",
            "--thread",
            "--ioengine=nbd",
            "--rw=randwrite",
        ]);
        fio.args(["--bs=4k", "--iodepth=2", "--rate_iops=40", "--time_based"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]);
        fio.args(["--runtime=3600", "--output-format=json"]);
        fio.arg(format!("--size={}", bytes - (1 << 20)));
        fio.arg(format!("--output={}", report.display()));
        fio.arg(format!("--uri={uri}"));
        fio.stdin(Stdio::null()).stdout(Stdio::null());
        let mut guest = Self {
            name,
            id,
            fio: Some(fio.spawn().unwrap()),
            report,
            uri,
        };
        guest.goes_on();
        guest
    }

    /// It has met no error, and its disk answers.
    pub fn goes_on(&mut self) {
        if let Some(fio) = &mut self.fio {
            assert!(
                fio.try_wait().unwrap().is_none(),
                "{}: fio ended",
                self.name
            );
        }
        let mut look = client("qemu-io");
        let last = "read 7M 4k";
        look.args(["-r", "-f", "raw", "-c", last, &self.uri]);
        super::support::ok(look.output());
    }

    /// It moves to a host, and runs there.
    pub fn moves(&mut self, vcenter: &Vcenter, host: &str) {
        let migrate = json!({"cmd": "migrate", "vm": self.id, "host": host});
        let end = vcenter.tell(&migrate);
        assert_eq!(end["state"], "success", "{end}");
        let vm = vcenter.tell(&json!({"cmd": "vm", "vm": self.id}));
        assert_eq!(vm["host"], host);
        self.goes_on();
    }

    /// The guest ends; it has never met an error.
    pub fn stops(&mut self) {
        let Some(mut fio) = self.fio.take() else {
            return;
        };
        let mut kill = std::process::Command::new("kill");
        super::support::ok(kill.arg("-INT").arg(fio.id().to_string()).output());
        let since = Instant::now();
        while fio.try_wait().unwrap().is_none() {
            assert!(since.elapsed() < LIMIT, "{}: fio does not end", self.name);
            std::thread::sleep(std::time::Duration::from_millis(20)); // poll of a process
        }
        let report = std::fs::read_to_string(&self.report).unwrap();
        // Words about the signal come before the document.
        let from = report.find('{').unwrap();
        let report: Value = serde_json::from_str(&report[from..]).unwrap();
        let job = &report["jobs"][0];
        assert_eq!(job["error"], 0, "{}: {job}", self.name);
        assert!(job["write"]["total_ios"].as_u64().unwrap() > 100, "{job}");
    }

    /// The file of its disk.
    pub fn disk(&self, vcenter: &Vcenter) -> PathBuf {
        let vm = vcenter.tell(&json!({"cmd": "vm", "vm": self.id}));
        vm["disks"]["disk0"].as_str().unwrap().into()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(fio) = &mut self.fio {
            let _ = fio.kill();
            let _ = fio.wait();
        }
    }
}
