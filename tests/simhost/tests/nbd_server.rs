//! The NBD server as a library, with engines that hold, answer from other threads, and panic: who
//! misbehaves harms itself only, and nothing of it is left behind.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use nbd_support::raw::{self, Raw};
use nbd_support::{PATIENCE, bytes, wait_until};
use simhost::disk::{DiskError, Extent};
use simhost::nbd::budget::Limits;
use simhost::nbd::client::{Client, Op};
use simhost::nbd::connection::Connection;
use simhost::nbd::engine::{Engine, Io, Kind};
use simhost::nbd::server::{Exports, Listen, Server};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const KIB: u32 = 1 << 10;
/// Long enough for what must not happen to happen.
const WHILE: Duration = Duration::from_millis(200);

/// A server in this process.
struct Local {
    server: Server,
    folder: tempfile::TempDir,
}

fn start(engine: Arc<dyn Engine>, limits: Limits) -> Local {
    let folder = tempfile::tempdir().unwrap();
    let listens = [
        Listen::Unix(folder.path().join("s.sock")),
        Listen::Tcp(([127, 0, 0, 1], 0).into()),
    ];
    let exports = Exports::new(vec![("disk".into(), engine)]);
    let server = Server::start_with(&listens, exports, limits).unwrap();
    Local { server, folder }
}

impl Local {
    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("s.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn tcp(&self) -> String {
        let address = self
            .server
            .addresses()
            .iter()
            .find_map(|listen| match listen {
                Listen::Tcp(address) => Some(address.to_string()),
                Listen::Unix(_) => None,
            });
        address.unwrap()
    }

    fn client(&self) -> Client {
        Client::connect_unix(&self.folder.path().join("s.sock"), "disk").unwrap()
    }

    /// Stops it; that must not take long.
    fn stop(mut self) {
        let (send, stopped) = channel();
        std::thread::spawn(move || {
            self.server.stop();
            send.send(()).unwrap();
        });
        stopped.recv_timeout(PATIENCE).expect("stop hangs");
    }
}

type Waiting = Vec<Box<Io>>;

/// Keeps requests until it is told to answer them.
#[derive(Default)]
struct Holding {
    held: Mutex<Waiting>,
    changed: Condvar,
}

impl Holding {
    fn held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    fn wait_for(&self, count: usize) {
        wait_until("the requests are held", || self.held() >= count);
    }

    /// No more than these come.
    fn assert_stays(&self, count: usize) {
        let held = self.held.lock().unwrap();
        let more = |held: &mut Waiting| held.len() <= count;
        let (held, waited) = self.changed.wait_timeout_while(held, WHILE, more).unwrap();
        assert!(waited.timed_out(), "{} are under way", held.len());
        assert_eq!(held.len(), count);
    }

    fn answer(&self, count: usize) {
        let answered: Waiting = self.held.lock().unwrap().drain(..count).collect();
        answered.into_iter().for_each(|io| io.complete(0));
    }
}

impl Engine for Holding {
    fn capacity_bytes(&self) -> u64 {
        1 << 30
    }

    fn submit(&self, io: Box<Io>) {
        self.held.lock().unwrap().push(io);
        self.changed.notify_all();
    }

    fn extents(&self, _: u64, len_bytes: u64, _: usize) -> Result<Vec<Extent>, DiskError> {
        Ok(vec![Extent {
            len_bytes,
            hole: false,
        }])
    }

    fn disconnected(&self, _: &Arc<Connection>) {
        self.held.lock().unwrap().clear();
    }
}

fn small() -> Limits {
    Limits {
        handshake: PATIENCE,
        linger: Duration::from_millis(400),
        connections: 8,
        requests: 64,
        connection_bytes: 1 << 20,
        own_bytes: 64 << 10,
        shared_bytes: 1 << 20,
    }
}

/// A handshake is soon over.
fn hasty() -> Limits {
    Limits {
        handshake: Duration::from_millis(400),
        ..small()
    }
}

/// A thread that sends writes of one length, and tells when it is done.
fn writes(mut raw: Raw, count: u64, len: u32) -> Receiver<Raw> {
    let (send, sent) = channel();
    std::thread::spawn(move || {
        for cookie in 0..count {
            raw.request(raw::WRITE, 0, cookie, 0, len);
            raw.send(&vec![1; len as usize]);
        }
        let _ = send.send(raw);
    });
    sent
}

#[test]
fn data_under_way_is_bounded_and_waits() {
    let engine = Arc::new(Holding::default());
    let limits = Limits {
        shared_bytes: 1 << 30,
        ..small()
    };
    let local = start(engine.clone(), limits);
    let sent = writes(Raw::transmitting(local.stream(), true), 12, 256 * KIB);
    engine.wait_for(4);
    engine.assert_stays(4);
    for answered in 0..8 {
        engine.answer(1);
        engine.wait_for(4);
        if answered == 0 {
            engine.assert_stays(4);
        }
    }
    engine.answer(4);
    let mut raw = sent.recv_timeout(PATIENCE).unwrap();
    for cookie in 0..12 {
        assert_eq!(raw.reply(0).0, cookie);
    }
    // One that is longer than the bound is served by itself.
    let sent = writes(raw, 1, 2 << 20);
    engine.wait_for(1);
    engine.answer(1);
    assert_eq!(sent.recv_timeout(PATIENCE).unwrap().reply(0).1, 0);
    local.stop();
}

#[test]
fn requests_under_way_are_bounded() {
    let engine = Arc::new(Holding::default());
    let local = start(engine.clone(), small());
    let mut raw = Raw::transmitting(local.stream(), true);
    for cookie in 0..65 {
        raw.request(raw::TRIM, 0, cookie, 0, 512);
    }
    engine.wait_for(64);
    engine.assert_stays(64);
    engine.answer(64);
    engine.wait_for(1);
    engine.answer(1);
    for cookie in 0..65 {
        assert_eq!(raw.reply(0).0, cookie);
    }
    local.stop();
}

#[test]
fn what_all_share_is_bounded_and_each_has_its_own() {
    let engine = Arc::new(Holding::default());
    let limits = Limits {
        shared_bytes: 256 << 10,
        ..small()
    };
    let local = start(engine.clone(), limits);
    // Its own 64 KiB, and all that is shared.
    let greedy = writes(Raw::transmitting(local.stream(), true), 6, 64 * KIB);
    engine.wait_for(5);
    engine.assert_stays(5);
    // Another one has its own, and may always begin one, however long it is.
    let small = writes(Raw::transmitting(local.stream(), true), 2, 64 * KIB);
    engine.wait_for(6);
    let large = writes(Raw::transmitting(local.stream(), true), 1, 512 * KIB);
    engine.wait_for(7);
    engine.assert_stays(7);
    // What one gives back another gets.
    engine.answer(7);
    engine.wait_for(2);
    engine.answer(2);
    let all = [(greedy, 6), (small, 2), (large, 1)].map(|(sent, count)| {
        let mut raw = sent.recv_timeout(PATIENCE).unwrap();
        for cookie in 0..count {
            assert_eq!(raw.reply(0), (cookie, 0, Vec::new()));
        }
        raw
    });
    // Nothing was lost on the way, and who is idle keeps nothing: the same once more.
    let greedy = writes(Raw::transmitting(local.stream(), true), 6, 64 * KIB);
    engine.wait_for(5);
    engine.assert_stays(5);
    drop((greedy, all));
    local.stop();
}

/// Answers reads from one thread for all connections, as a host does for held I/O.
struct FromElsewhere {
    jobs: Mutex<Sender<Box<Io>>>,
    taken: AtomicUsize,
}

fn pattern(offset: u64, data: &mut [u8]) {
    data.copy_from_slice(&bytes(data.len(), offset + 1));
}

fn from_elsewhere() -> Arc<FromElsewhere> {
    let (send, jobs) = channel::<Box<Io>>();
    std::thread::spawn(move || {
        for mut io in jobs {
            let offset = io.offset_bytes;
            if io.kind == Kind::Read {
                pattern(offset, io.data_mut());
            }
            io.complete(0);
        }
    });
    Arc::new(FromElsewhere {
        jobs: Mutex::new(send),
        taken: AtomicUsize::new(0),
    })
}

impl Engine for FromElsewhere {
    fn capacity_bytes(&self) -> u64 {
        1 << 30
    }

    fn submit(&self, io: Box<Io>) {
        self.taken.fetch_add(1, Ordering::SeqCst);
        let _ = self.jobs.lock().unwrap().send(io);
    }

    fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<Extent>, DiskError> {
        Ok(Vec::new())
    }
}

#[test]
fn who_takes_no_replies_harms_only_itself() {
    const COUNT: u64 = 400;
    let engine = from_elsewhere();
    let local = start(engine.clone(), small());
    // In one piece: a socket takes few small ones that nobody reads.
    let request = |cookie| raw::request(raw::READ, 0, cookie, cookie * 4096, 64 * KIB);
    let reads: Vec<u8> = (0..COUNT).flat_map(request).collect();
    for structured in [true, false] {
        let taken = engine.taken.load(Ordering::SeqCst);
        let mut deaf = Raw::transmitting(local.stream(), structured);
        deaf.send(&reads);
        // Sixteen fit, and what the socket took.
        wait_until("it is served", || {
            engine.taken.load(Ordering::SeqCst) >= taken + 16
        });
        let mut good = local.client();
        for i in 0..100 {
            let data = good.call(&Op::Read(i * 512, 4096), false).unwrap();
            assert!(data == bytes(4096, i * 512 + 1));
        }
        let taken = engine.taken.load(Ordering::SeqCst) - taken - 100;
        assert!(taken < 100, "{taken} of its requests were taken");
        good.disconnect();
        // It listens again: nothing was lost, nothing mixed up.
        let mut seen = vec![false; COUNT as usize];
        for _ in 0..COUNT {
            let (cookie, error, data) = deaf.reply(64 << 10);
            assert_eq!(error, 0);
            assert!(data == bytes(64 << 10, cookie * 4096 + 1), "reply {cookie}");
            assert!(!std::mem::replace(&mut seen[cookie as usize], true));
        }
    }
    // One that never listens again does not keep the server.
    let mut deaf = Raw::transmitting(local.stream(), true);
    deaf.send(&reads);
    local.stop();
    drop(deaf);
}

/// Reads of one length, some at a time; every reply is what it should be.
fn read_from_elsewhere(client: &mut Client, count: u64, len: u32, depth: usize) {
    let mut offsets = std::collections::HashMap::new();
    let check = |client: &mut Client, offsets: &std::collections::HashMap<u64, u64>| {
        let done = client.next_done().unwrap();
        let expected = bytes(len as usize, offsets[&done.cookie] + 1);
        assert!(done.data == expected, "{len} bytes, {depth} at a time");
    };
    for i in 0..count {
        let cookie = client.submit(&Op::Read(i, len), false).unwrap();
        offsets.insert(cookie, i);
        if client.in_flight() >= depth {
            check(client, &offsets);
        }
    }
    while client.in_flight() > 0 {
        check(client, &offsets);
    }
}

#[test]
fn replies_from_elsewhere_come_whole() {
    let local = start(from_elsewhere(), Limits::default());
    let mut tcp = Client::connect_tcp(&local.tcp(), "disk").unwrap();
    let mut unix = local.client();
    for client in [&mut tcp, &mut unix] {
        read_from_elsewhere(client, 5000, 512, 64);
        // Few and long ones: often the reading thread finds nothing while one is being sent.
        for depth in 1..=4 {
            read_from_elsewhere(client, 500, 96 * KIB, depth);
        }
        // More than a socket takes at once.
        read_from_elsewhere(client, 50, 1024 * KIB, 4);
    }
    local.stop();
}

#[test]
fn a_farewell_without_taking_the_replies_gives_the_slot_back() {
    let local = start(from_elsewhere(), small());
    let mut deaf = Raw::transmitting(local.stream(), true);
    for cookie in 0..16 {
        deaf.request(raw::READ, 0, cookie, 0, 64 * KIB);
    }
    deaf.request(raw::DISC, 0, 0, 0, 0);
    wait_until("its slot is free", || local.server.connections() == 0);
    drop(deaf);
    local.stop();
}

/// Panics where it is told to.
struct Panicking(&'static str);

impl Panicking {
    fn at(&self, place: &str) {
        assert!(self.0 != place, "a panic under test");
    }
}

impl Engine for Panicking {
    fn capacity_bytes(&self) -> u64 {
        self.at("capacity");
        1 << 20
    }

    fn submit(&self, io: Box<Io>) {
        if self.0 == "keep" {
            std::mem::forget(io);
            self.at("keep");
            return;
        }
        self.at("submit");
        io.complete(0);
    }

    fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<Extent>, DiskError> {
        Ok(Vec::new())
    }

    fn disconnected(&self, _: &Arc<Connection>) {
        self.at("disconnected");
    }
}

#[test]
fn an_engine_that_panics_takes_no_slot_with_it() {
    for place in ["capacity", "submit", "keep", "disconnected"] {
        let limits = Limits {
            connections: 2,
            ..small()
        };
        let local = start(Arc::new(Panicking(place)), limits);
        for round in 0..4 {
            wait_until("a slot is free", || local.server.connections() < 2);
            let mut raw = Raw::haggling(local.stream());
            raw.option(raw::OPT_GO, &raw::go("disk"));
            if place != "capacity" {
                while raw.option_reply().1 != raw::REP_ACK {}
                raw.request(raw::WRITE, 0, round, 0, 512);
                raw.send(&[1; 512]);
                if place != "keep" {
                    let (cookie, error, _) = raw.reply(0);
                    let failed = place == "submit";
                    assert_eq!((cookie, error != 0), (round, failed), "{place}");
                }
            }
            if place == "disconnected" {
                raw.request(raw::DISC, 0, 0, 0, 0);
            }
            raw.assert_ended();
        }
        wait_until("all slots are free", || local.server.connections() == 0);
        local.stop();
    }
}

#[test]
fn a_handshake_byte_by_byte_comes_to_an_end() {
    let local = start(from_elsewhere(), hasty());
    let mut slow = local.stream();
    let since = Instant::now();
    let head = [0, 0, 0x77, 0x77, 0, 0, 16, 0]; // 4096 bytes follow
    let all = [&[0, 0, 0, 3][..], raw::OPT_MAGIC, &head, &[0; 4096]].concat();
    let sent = all.iter().take_while(|byte| {
        std::thread::sleep(Duration::from_millis(20)); // time under test
        slow.write_all(&[**byte]).is_ok()
    });
    let sent = sent.count();
    assert!(sent < 1000, "{sent} bytes in {:?}", since.elapsed());
    wait_until("its slot is free", || local.server.connections() == 0);
    local.stop();
}

#[test]
fn a_handshake_without_taking_the_answers_comes_to_an_end() {
    let local = start(from_elsewhere(), hasty());
    let mut deaf = local.stream();
    deaf.write_all(&[0, 0, 0, 3]).unwrap();
    let option = [&raw::OPT_MAGIC[..], &[0, 0, 0x77, 0x77, 0, 0, 0, 0]].concat();
    let since = Instant::now();
    while deaf.write_all(&option).is_ok() {
        assert!(since.elapsed() < PATIENCE, "it is still listened to");
    }
    wait_until("its slot is free", || local.server.connections() == 0);
    local.stop();
}

#[test]
fn the_limit_ends_with_the_handshake() {
    let limit = Duration::from_secs(1);
    let limits = Limits {
        handshake: limit,
        ..small()
    };
    let local = start(from_elsewhere(), limits);
    let mut client = local.client();
    std::thread::sleep(limit + WHILE); // time under test
    client.call(&Op::Flush, false).unwrap();
    local.stop();
}

#[test]
fn connections_of_all_listeners_are_told_apart() {
    let local = start(from_elsewhere(), small());
    let mut tcp = Client::connect_tcp(&local.tcp(), "disk").unwrap();
    let unix = local.client();
    wait_until("both are there", || local.server.connections() == 2);
    unix.disconnect();
    wait_until("one is gone", || local.server.connections() == 1);
    tcp.call(&Op::Flush, false).unwrap();
    // The one that is left is ended by stop, which waits for its thread.
    local.stop();
    assert!(tcp.call(&Op::Flush, false).is_err());
}

#[test]
fn too_many_connections_are_refused_until_one_goes() {
    let local = start(from_elsewhere(), small());
    let clients: Vec<Client> = (0..8).map(|_| local.client()).collect();
    let mut refused = local.stream();
    let mut said = Vec::new();
    refused.read_to_end(&mut said).unwrap();
    assert!(said.is_empty(), "{said:?}");
    drop(clients);
    wait_until("their slots are free", || local.server.connections() == 0);
    local.client().call(&Op::Flush, false).unwrap();
    local.stop();
}

/// Notes what it is asked for.
#[derive(Default)]
struct Noting(Mutex<Vec<(Kind, bool, bool, bool)>>);

impl Engine for Noting {
    fn capacity_bytes(&self) -> u64 {
        1 << 20
    }

    fn submit(&self, io: Box<Io>) {
        let noted = (io.kind, io.fua, io.may_unmap, io.must_be_fast);
        self.0.lock().unwrap().push(noted);
        io.complete(0);
    }

    fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<Extent>, DiskError> {
        Ok(Vec::new())
    }
}

#[test]
fn flags_reach_the_engine_and_only_what_it_has_is_offered() {
    let engine = Arc::new(Noting::default());
    let local = start(engine.clone(), small());
    let mut raw = Raw::haggling(local.stream());
    raw.option(raw::OPT_GO, &raw::go("disk"));
    let (_, kind, export) = raw.option_reply();
    assert_eq!((kind, export.len()), (raw::REP_INFO, 12));
    let flags = u16::from_be_bytes([export[10], export[11]]);
    assert_eq!(flags & 1 << 11, 0, "this engine has no fast zeros");
    assert_eq!(
        flags & 1 << 7,
        0,
        "not fragmented, without structured replies"
    );
    while raw.option_reply().1 != raw::REP_ACK {}
    let (fua, no_hole, fast) = (1, 2, 16);
    assert_eq!(raw.error_of(raw::ZERO, fast, 0, 512), raw::EINVAL);
    assert_eq!(raw.error_of(raw::ZERO, fua | no_hole, 0, 512), 0);
    assert_eq!(raw.error_of(raw::ZERO, 0, 0, 512), 0);
    assert_eq!(raw.error_of(raw::TRIM, fua, 0, 512), 0);
    assert_eq!(raw.error_of(raw::FLUSH, 0, 0, 0), 0);
    raw.request(raw::WRITE, fua, 1, 0, 512);
    raw.send(&[0; 512]);
    assert_eq!(raw.reply(0).1, 0);
    assert_eq!(
        *engine.0.lock().unwrap(),
        [
            (Kind::Zero, true, false, false),
            (Kind::Zero, false, true, false),
            (Kind::Unmap, true, true, false),
            (Kind::Flush, false, true, false),
            (Kind::Write, true, true, false),
        ]
    );
    local.stop();
}
