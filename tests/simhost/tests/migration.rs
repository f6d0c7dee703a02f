//! A running VM moves between two hosts; its guest does not notice.
#![allow(clippy::unwrap_used)]

mod host_process;

use host_process::{Host, PATIENCE};
use serde_json::{Value, json};
use simhost::nbd::client::{Client, Op};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// Two hosts that share a folder of disks.
struct Pair {
    hosts: [Host; 2],
    shared: tempfile::TempDir,
    library: PathBuf,
}

impl Pair {
    fn new() -> Self {
        let shared = tempfile::tempdir().unwrap();
        let library = conformance::compile_filter("eventfilter", shared.path()).unwrap();
        Self {
            hosts: [Host::start(), Host::start()],
            shared,
            library,
        }
    }

    /// Starts the VM at the first host.
    fn start(&self, more: &[&str]) -> Value {
        let disk = self.shared.path().join("disk0.img");
        if !disk.exists() {
            let file = std::fs::File::create(&disk).unwrap();
            file.set_len(32 << 20).unwrap();
        }
        let mut args = vec![
            format!("--disk=disk0={}", disk.display()),
            format!("--filter-lib={}", self.library.display()),
            format!("--property=event.log={}", self.log().display()),
        ];
        args.extend(more.iter().map(|arg| arg.to_string()));
        let ready = self.hosts[0].obey(&json!({"cmd": "start", "vm": "vm", "args": args}));
        assert!(ready["pid"].is_u64(), "{ready}");
        ready
    }

    fn log(&self) -> PathBuf {
        self.shared.path().join("log")
    }

    fn socket(&self) -> PathBuf {
        self.hosts[0].folder.path().join("nbd/vm.sock")
    }

    fn client(&self) -> Client {
        Client::connect_unix(&self.socket(), "disk0").unwrap()
    }

    fn migrate(&self, from: usize, more: Value) -> Value {
        let to = self.hosts[1 - from].folder.path().join("host.sock");
        let mut command = json!({"cmd": "migrate", "vm": "vm", "to": to});
        for (key, value) in more.as_object().into_iter().flatten() {
            command[key] = value.clone();
        }
        self.hosts[from].obey(&command)
    }

    fn runs_at(&self, host: usize) -> bool {
        let listed = self.hosts[host].obey(&json!({"cmd": "list"}));
        let runs = |vm: &Value| vm["running"] == true;
        listed["vms"].as_array().unwrap().iter().any(runs)
    }

    /// Waits until the VM runs at exactly these hosts.
    fn wait_until_at(&self, expected: [bool; 2]) {
        let deadline = Instant::now() + PATIENCE;
        while [0, 1].map(|host| self.runs_at(host)) != expected {
            assert!(Instant::now() < deadline, "it does not run at {expected:?}");
            std::thread::sleep(std::time::Duration::from_millis(5)); // poll
        }
    }

    /// What the filter was told; the host must not have erred.
    fn told(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.log()).unwrap();
        assert!(!text.contains("BROKEN"), "{text}");
        text.lines()
            .map(|line| line.replacen("disk0 ", "", 1))
            .collect()
    }
}

/// fio, which verifies what it wrote; killed with the test.
struct Fio(Child);

impl Fio {
    fn start(folder: &Path, socket: &Path, more: &[&str]) -> Self {
        let mut fio = Command::new("fio");
        fio.current_dir(folder);
        // A job that is a process of its own would outlive fio.
        fio.args(["--name=m", "--thread", "--ioengine=nbd", "--rw=randwrite"]);
        fio.args([
            "--size=24M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
        ]);
        fio.args([
            "--verify_backlog=64",
            "--time_based",
            "--runtime=6",
            "--fsync=64",
        ]);
        fio.args(more);
        fio.arg(format!(
            "--uri=nbd+unix:///disk0?socket={}",
            socket.display()
        ));
        fio.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self(fio.spawn().unwrap())
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    fn finish(mut self) {
        use std::io::Read;
        let status = self.0.wait().unwrap();
        let mut text = String::new();
        self.0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert!(status.success(), "the guest saw an error: {text}");
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn fio_goes_on_through_migrations_back_and_forth() {
    for more in [
        ["--bs=4k", "--iodepth=16"],
        ["--bsrange=512-1m", "--iodepth=4"],
    ] {
        let pair = Pair::new();
        pair.start(&["--property=event.hold=1"]);
        let mut fio = Fio::start(pair.shared.path(), &pair.socket(), &more);
        let mut at = 0;
        let mut stuns = Vec::new();
        while fio.runs() && stuns.len() < 12 {
            let moved = pair.migrate(at, json!({}));
            assert_eq!(moved["migrated"], true, "{moved}");
            assert_eq!(moved["end"]["verdict"], "clean", "{moved}");
            stuns.push(moved["stun_us"].as_u64().unwrap());
            at = 1 - at;
        }
        println!(
            "{more:?}: {} migrations, stuns in us: {stuns:?}",
            stuns.len()
        );
        assert!(stuns.len() >= 4, "fio ended early");
        fio.finish();
        pair.wait_until_at([at == 0, at == 1]);
        let told = pair.told();
        let opens: Vec<&String> = told
            .iter()
            .filter(|line| line.starts_with("open"))
            .collect();
        assert_eq!(opens.len(), stuns.len() + 1);
        let word = |line: &str, key: &str| {
            let mut words = line.split(' ').filter_map(|word| word.strip_prefix(key));
            words.next().unwrap().to_string()
        };
        for (nr, two) in opens.windows(2).enumerate() {
            assert_eq!(
                word(two[1], "nr="),
                (nr + 2).to_string(),
                "its state came along"
            );
            assert_eq!(word(two[1], "migrated="), "1");
            assert_eq!(word(two[1], "before="), word(two[0], "id="));
        }
        let life = ["migrate-prepare", "stun", "migrate-handoff", "close how=2"];
        let end = told
            .iter()
            .position(|line| line.starts_with("close"))
            .unwrap();
        assert_eq!(told[1..=end], life);
        let after = [told[end + 1].as_str(), "migrate-arrived"];
        assert_eq!(told[end + 1..end + 3], after);
        let stopped = pair.hosts[at].obey(&json!({"cmd": "stop", "vm": "vm"}));
        assert_eq!(stopped["verdict"], "clean", "{stopped}");
        assert!(
            !pair.socket().exists(),
            "the socket's file goes with the VM"
        );
    }
}

/// A request of which a part has come, one that waits behind, a connection that says nothing, new ones.
#[test]
fn a_connection_moves_in_the_middle_of_a_request() {
    use std::io::{Read, Write};
    let pair = Pair::new();
    let tcp = pair.start(&["--nbd-tcp=127.0.0.1:0"])["nbd_tcp"]
        .as_str()
        .unwrap()
        .to_string();
    let mut idle = pair.client();
    for is_tcp in [false, true] {
        let mut stream: Box<dyn Both> = if is_tcp {
            let stream = std::net::TcpStream::connect(&tcp).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            Box::new(stream)
        } else {
            let stream = std::os::unix::net::UnixStream::connect(pair.socket()).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            Box::new(stream)
        };
        // The old handshake: simple replies.
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(b"IHAVEOPT").unwrap();
        stream.write_all(&[0, 0, 0, 1, 0, 0, 0, 5]).unwrap();
        stream.write_all(b"disk0").unwrap();
        let mut export = [0; 10];
        stream.read_exact(&mut export).unwrap();
        let request = |command: u16, cookie: u64, offset: u64, len: u32| {
            let mut raw = 0x2560_9513u32.to_be_bytes().to_vec();
            raw.extend_from_slice(&[0, 0]);
            raw.extend_from_slice(&command.to_be_bytes());
            raw.extend_from_slice(&cookie.to_be_bytes());
            raw.extend_from_slice(&offset.to_be_bytes());
            raw.extend_from_slice(&len.to_be_bytes());
            raw
        };
        let mut at = usize::from(!pair.runs_at(0));
        let reply = |stream: &mut Box<dyn Both>| {
            let mut reply = [0; 16];
            stream.read_exact(&mut reply).unwrap();
            let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
            (error, u64::from_be_bytes(reply[8..].try_into().unwrap()))
        };
        // A write, one that is refused (beyond the end), both cut at several places.
        for (cookie, offset, error) in [(1, 0, 0), (2, 1 << 40, 28)] {
            let mut raw = request(1, cookie, offset, 1 << 20);
            raw.extend_from_slice(&[cookie as u8; 1 << 20]);
            let mut sent = 0;
            for cut in [1, 27, 28, 29, 5000, 700_000] {
                stream.write_all(&raw[sent..cut]).unwrap();
                sent = cut;
                let moved = pair.migrate(at, json!({}));
                assert_eq!(moved["migrated"], true, "{moved}");
                at = 1 - at;
            }
            stream.write_all(&raw[sent..]).unwrap();
            assert_eq!(reply(&mut stream), (error, cookie));
        }
        let data = idle.call(&Op::Read((1 << 20) - 512, 512), false).unwrap();
        assert_eq!(data, [1; 512]);
        // Whoever comes now finds the same socket.
        pair.client()
            .call(&Op::Write(0, &[0; 4096]), false)
            .unwrap();
        stream.write_all(&request(2, 0, 0, 0)).unwrap();
    }
    pair.told();
}

trait Both: std::io::Read + std::io::Write {}
impl<T: std::io::Read + std::io::Write> Both for T {}

#[test]
fn a_migration_that_does_not_happen_leaves_the_guest_where_it_is() {
    for (cancel_at, refuse, calls) in [
        ("prepared", "", &["migrate-prepare", "migrate-cancel"][..]),
        (
            "stunned",
            "",
            &["migrate-prepare", "stun", "migrate-cancel", "unstun"],
        ),
        (
            "handoff",
            "",
            &[
                "migrate-prepare",
                "stun",
                "migrate-handoff",
                "migrate-cancel",
                "unstun",
            ],
        ),
        ("", "migrate-prepare", &["migrate-prepare"]),
        ("", "stun", &["migrate-prepare", "stun", "migrate-cancel"]),
        (
            "",
            "migrate-handoff",
            &[
                "migrate-prepare",
                "stun",
                "migrate-handoff",
                "migrate-cancel",
                "unstun",
            ],
        ),
        ("never", "", &["migrate-prepare", "migrate-cancel"]),
    ] {
        let pair = Pair::new();
        pair.start(&[&format!("--property=event.refuse={refuse}")]);
        let mut client = pair.client();
        client.call(&Op::Write(0, &[1; 512]), false).unwrap();
        let more = match cancel_at {
            "" => json!({}),
            at => json!({"cancel_at": at}),
        };
        let answer = pair.migrate(0, more);
        let error = answer["error"].as_str().unwrap();
        let why = ["cancelled", "refuses", "is one of prepared"];
        assert!(why.iter().any(|why| error.contains(why)), "{answer}");
        assert_eq!(client.call(&Op::Read(0, 512), false).unwrap(), [1; 512]);
        pair.wait_until_at([true, false]);
        let told = pair.told();
        assert_eq!(told[1..], *calls, "{cancel_at}{refuse}");
        if refuse.is_empty() {
            // The next one may come.
            let moved = pair.migrate(0, json!({}));
            assert_eq!(moved["migrated"], true, "{moved}");
            assert_eq!(client.call(&Op::Read(0, 512), false).unwrap(), [1; 512]);
        }
    }
}

#[test]
fn a_filter_that_knows_no_migration_is_not_moved() {
    let mut pair = Pair::new();
    pair.library = conformance::compile_filter("passfilter", pair.shared.path()).unwrap();
    pair.start(&[]);
    let answer = pair.migrate(0, json!({}));
    let error = answer["error"].as_str().unwrap();
    assert!(error.contains("has no `migrate`"), "{answer}");
    let nobody = pair.hosts[0].obey(&json!({"cmd": "migrate", "vm": "other", "to": "x"}));
    assert!(
        nobody["error"].as_str().unwrap().contains("no VM `other`"),
        "{nobody}"
    );
    pair.wait_until_at([true, false]);
}

/// Where the VM runs when one side was killed at a point.
#[derive(Clone, Copy, Debug, PartialEq)]
enum After {
    Source,
    Destination,
    Nowhere,
}

#[test]
fn a_side_that_dies_leaves_the_vm_on_one_host_or_none() {
    use After::{Destination, Nowhere, Source};
    for (point, after) in [
        ("migrate-out-prepared", Nowhere),
        ("migrate-out-stunned", Nowhere),
        ("migrate-out-handoff", Nowhere),
        ("migrate-out-closed", Nowhere),
        ("migrate-out-sent", Destination),
        ("migrate-out-go", Destination),
        ("migrate-in-waiting", Source),
        ("migrate-in-received", Source),
        ("migrate-in-opened", Source),
        ("migrate-in-arrived", Nowhere),
    ] {
        let pair = Pair::new();
        pair.start(&[&format!("--kill-at={point}")]);
        let mut client = pair.client();
        client.call(&Op::Write(0, &[7; 4096]), true).unwrap();
        let answer = pair.migrate(0, json!({}));
        pair.wait_until_at([after == Source, after == Destination]);
        if after == Nowhere {
            // It starts again, at either host.
            assert!(client.call(&Op::Read(0, 512), false).is_err(), "{point}");
            let (host, socket) = match point {
                "migrate-in-arrived" => (1, pair.hosts[1].folder.path().join("nbd/vm.sock")),
                _ => (0, pair.socket()),
            };
            let again = pair.hosts[host].obey(&json!({"cmd": "restart", "vm": "vm"}));
            assert!(again["pid"].is_u64(), "{point}: {again}");
            client = Client::connect_unix(&socket, "disk0").unwrap();
        } else {
            // The guest has not noticed.
            assert!(answer["error"].is_string(), "{point}: {answer}");
        }
        let data = client.call(&Op::Read(0, 4096), false).unwrap();
        assert_eq!(data, [7; 4096], "{point}");
        client.call(&Op::Write(0, &[8; 4096]), true).unwrap();
        pair.told();
    }
}
