//! A network that fails on request: real sockets on both sides of it.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing comes within this time: enough for anything that is not held back.
const SILENCE: Duration = Duration::from_millis(300);

/// An appliance that accepts on six ports, and a link before it.
struct Net {
    link: Child,
    folder: tempfile::TempDir,
    base: u16,
    accepted: Receiver<(u16, TcpStream)>,
}

fn six_in_a_row() -> Vec<TcpListener> {
    loop {
        let first = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let Some(last) = first.port().checked_add(5) else {
            continue;
        };
        let all: Result<Vec<_>, _> = (first.port()..=last)
            .map(|port| TcpListener::bind(("127.0.0.1", port)))
            .collect();
        if let Ok(all) = all {
            return all;
        }
    }
}

impl Net {
    fn new() -> Self {
        let (send, accepted) = channel();
        let listeners = six_in_a_row();
        let to = listeners[0].local_addr().unwrap();
        for (port, listener) in listeners.into_iter().enumerate() {
            let send = send.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    let _ = send.send((port as u16, stream));
                }
            });
        }
        let folder = tempfile::tempdir().unwrap();
        let mut link = Command::new(env!("CARGO_BIN_EXE_simhost"))
            .args(["link", "--to", &to.to_string(), "--control-socket"])
            .arg(folder.path().join("link.sock"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(link.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(line.strip_prefix("READY ").unwrap()).unwrap();
        let base = ready["port_base"].as_u64().unwrap() as u16;
        Self {
            link,
            folder,
            base,
            accepted,
        }
    }

    fn obey(&self, command: Value) -> Value {
        let stream = UnixStream::connect(self.folder.path().join("link.sock")).unwrap();
        writeln!(&mut &stream, "{command}").unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// A connection through a port: the host's end, the appliance's end.
    fn connect(&self, port: u16) -> (TcpStream, TcpStream) {
        let host = TcpStream::connect(("127.0.0.1", self.base + port)).unwrap();
        let (through, appliance) = self.accepted.recv_timeout(PATIENCE).unwrap();
        assert_eq!(through, port);
        for stream in [&host, &appliance] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        // It is known to the link before anything is asked of it.
        let deadline = Instant::now() + PATIENCE;
        let passes = |from: &TcpStream, to: &TcpStream| {
            (&mut &*from).write_all(b"x").unwrap();
            (&mut &*to).read_exact(&mut [0]).unwrap();
        };
        passes(&host, &appliance);
        passes(&appliance, &host);
        assert!(Instant::now() < deadline);
        (host, appliance)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.link.kill();
        let _ = self.link.wait();
    }
}

fn is_silent(stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    let error = (&mut &*stream).read(&mut [0]).map_err(|error| error.kind());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    matches!(error, Err(ErrorKind::WouldBlock))
}

/// The other side has ended it, in order or not.
fn is_ended(mut stream: &TcpStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0) | Err(_))
}

fn passes(mut from: &TcpStream, mut to: &TcpStream, data: &[u8]) -> Vec<u8> {
    let mut got = vec![0; data.len()];
    std::thread::scope(|scope| {
        scope.spawn(move || from.write_all(data).unwrap());
        to.read_exact(&mut got).unwrap();
    });
    got
}

#[test]
fn all_goes_through_on_each_of_six_ports() {
    let net = Net::new();
    let data: Vec<u8> = (0..1_000_000u32).map(|i| (i * 7) as u8).collect();
    for port in 0..6 {
        let (host, appliance) = net.connect(port);
        assert!(passes(&host, &appliance, &data) == data);
        assert!(passes(&appliance, &host, &data) == data);
        // An end in one direction leaves the other.
        host.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(is_ended(&appliance));
        assert!(passes(&appliance, &host, &data) == data);
    }
}

#[test]
fn a_cut_ends_all_and_refuses_until_it_is_healed() {
    let net = Net::new();
    let one = net.connect(0);
    let two = net.connect(5);
    let cut = net.obey(json!({"cmd": "cut"}));
    assert_eq!(cut["ended"], 2, "{cut}");
    for end in [&one.0, &one.1, &two.0, &two.1] {
        assert!(is_ended(end));
    }
    for port in 0..6 {
        let refused = TcpStream::connect(("127.0.0.1", net.base + port)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    net.obey(json!({"cmd": "heal"}));
    for port in 0..6 {
        let (host, appliance) = net.connect(port);
        assert_eq!(passes(&host, &appliance, b"again"), b"again");
    }
}

#[test]
fn half_open_holds_back_one_direction_and_closes_nothing() {
    let net = Net::new();
    let (host, appliance) = net.connect(1);
    net.obey(json!({"cmd": "half-open", "direction": "to-host"}));
    assert_eq!(passes(&host, &appliance, b"up"), b"up");
    (&appliance).write_all(b"down").unwrap();
    assert!(is_silent(&host));
    // Not even an end comes through.
    drop(appliance);
    assert!(is_silent(&host));
    net.obey(json!({"cmd": "heal"}));
    let mut late = Vec::new();
    (&host).read_to_end(&mut late).unwrap();
    assert_eq!(late, b"down", "what was held back goes on");
    let (host, appliance) = net.connect(1);
    net.obey(json!({"cmd": "half-open"}));
    drop(appliance);
    assert!(is_silent(&host), "an end came through");
    net.obey(json!({"cmd": "heal"}));
    assert!(is_ended(&host));
    net.obey(json!({"cmd": "half-open"}));
    let host = TcpStream::connect(("127.0.0.1", net.base)).unwrap();
    (&host).write_all(b"up").unwrap();
    let (_, appliance) = net.accepted.recv_timeout(PATIENCE).unwrap();
    assert!(is_silent(&appliance));
    // A cut ends what is held back too.
    net.obey(json!({"cmd": "cut"}));
    appliance.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(is_ended(&host) && is_ended(&appliance));
}

#[test]
fn slow_is_slow_in_rate_and_in_latency() {
    let net = Net::new();
    let (host, appliance) = net.connect(2);
    let time = |from: &TcpStream, to: &TcpStream, len: usize| {
        let begun = Instant::now();
        passes(from, to, &vec![1; len]);
        begun.elapsed().as_millis()
    };
    net.obey(json!({"cmd": "slow", "bytes_per_s": 1 << 20, "direction": "to-appliance"}));
    // The last chunk goes out when those before it are through.
    let took = time(&host, &appliance, 1 << 19);
    assert!(
        (450..20_000).contains(&took),
        "half a second of bytes took {took} ms"
    );
    net.obey(json!({"cmd": "slow", "latency_ms": 200}));
    let took = time(&appliance, &host, 10);
    assert!((200..20_000).contains(&took), "{took} ms");
    // A latency is no rate: what comes together goes together.
    let took = time(&host, &appliance, 2 << 20);
    assert!((200..10_000).contains(&took), "{took} ms");
    net.obey(json!({"cmd": "heal"}));
    assert!(time(&host, &appliance, 10) < 10_000);
}

#[test]
fn the_newest_or_the_oldest_is_dropped_first() {
    let net = Net::new();
    let all: Vec<_> = [0, 1, 1, 2].map(|port| net.connect(port)).into();
    let listed = net.obey(json!({"cmd": "status"}));
    assert_eq!(
        listed["connections"].as_array().unwrap().len(),
        4,
        "{listed}"
    );
    assert_eq!(listed["connections"][0]["to_host_bytes"], 1, "{listed}");
    for (command, gone) in [
        (json!({"cmd": "drop", "which": "newest"}), 3),
        (json!({"cmd": "drop", "which": "oldest", "port": 1}), 1),
        (json!({"cmd": "drop", "which": "oldest"}), 0),
    ] {
        let dropped = net.obey(command);
        assert_eq!(dropped["dropped"], gone + 1, "{dropped}");
        assert!(is_ended(&all[gone].0) && is_ended(&all[gone].1));
    }
    assert_eq!(passes(&all[2].0, &all[2].1, b"left"), b"left");
    let none = net.obey(json!({"cmd": "drop", "which": "oldest", "port": 0}));
    assert!(
        none["error"].as_str().unwrap().contains("no such"),
        "{none}"
    );
}

#[test]
fn one_byte_is_changed_where_it_was_asked_for() {
    let net = Net::new();
    let (host, appliance) = net.connect(3);
    let other = net.connect(4);
    net.obey(json!({
        "cmd": "corrupt", "direction": "to-appliance", "port": 3, "offset_bytes": 70_000, "mask": 0x81,
    }));
    let data = vec![0x0f; 100_000];
    assert!(
        passes(&appliance, &host, &data) == data,
        "the other direction"
    );
    assert!(passes(&other.0, &other.1, &data) == data, "another port");
    let got = passes(&host, &appliance, &data);
    let changed: Vec<usize> = (0..data.len()).filter(|i| got[*i] != data[*i]).collect();
    assert_eq!((changed, got[70_000]), (vec![70_000], 0x8e));
    assert!(passes(&host, &appliance, &data) == data, "once");
    let status = net.obey(json!({"cmd": "status"}));
    assert_eq!(status["rules"]["corrupted_bytes"], 1, "{status}");
}

#[test]
fn commands_that_cannot_be_obeyed_are_answered() {
    let net = Net::new();
    for (command, what) in [
        (json!({"cmd": "dance"}), "cmd is one of"),
        (json!({"cmd": "slow"}), "slow needs"),
        (json!({"cmd": "slow", "bytes_per_s": 0}), "slow needs"),
        (
            json!({"cmd": "half-open", "direction": "up"}),
            "direction `up`",
        ),
        (json!({"cmd": "drop", "which": "all"}), "newest or oldest"),
        (
            json!({"cmd": "drop", "which": "newest", "port": 6}),
            "0 to 5",
        ),
        (json!({"cmd": "corrupt"}), "`offset_bytes` is missing"),
        (
            json!({"cmd": "corrupt", "offset_bytes": 0, "mask": 0}),
            "1 to 255",
        ),
    ] {
        let answer = net.obey(command);
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.contains(what), "{what}: {answer}");
    }
    assert_eq!(net.obey(json!({"cmd": "status"}))["cut"], false);
}
