//! What no good client sends: each is answered or cut off, and the next client is served as before.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use nbd_support::raw::{self, Raw};
use nbd_support::{PATIENCE, Served, bytes, serve};
use simhost::nbd::client::Op;
use std::os::unix::net::UnixStream;

const LEN: u64 = 8 << 20;

/// A good client reads back what it writes; and the server does not grow.
fn assert_serves(served: &Served) {
    let mut client = served.client();
    let data = bytes(64 << 10, 9);
    client
        .call(&Op::Write(LEN - (64 << 10), &data), true)
        .unwrap();
    let back = client.call(&Op::Read(LEN - (64 << 10), 64 << 10), false);
    assert!(back.unwrap() == data);
    client.disconnect();
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: u64 = peak
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(kib < 256 << 10, "the server took {kib} KiB");
}

/// Each over both kinds of sockets.
fn with_each(act: impl Fn(&Served, &dyn Fn() -> Box<dyn raw::Socket>)) {
    let served = serve(LEN);
    let unix = || Box::new(served.connect_unix()) as Box<dyn raw::Socket>;
    let tcp = || Box::new(served.connect_tcp()) as Box<dyn raw::Socket>;
    for connect in [&unix as &dyn Fn() -> Box<dyn raw::Socket>, &tcp] {
        act(&served, connect);
        assert_serves(&served);
    }
    served.stop();
}

#[test]
fn handshakes_that_are_none_are_cut_off() {
    with_each(|_, connect| {
        let mut flags = Raw::greeted(connect());
        flags.send(&0xffff_ffffu32.to_be_bytes());
        flags.assert_ended();

        let mut magic = Raw::haggling(connect());
        magic.send(b"GET / HTTP/1.1\r\n\r\n");
        magic.assert_ended();

        let mut unknown = Raw::haggling(connect());
        unknown.option(raw::OPT_EXPORT_NAME, b"none");
        unknown.assert_ended();

        // Gone within the hello, within an option's head, and within its data.
        drop(connect());
        let mut head = Raw::haggling(connect());
        head.send(&raw::OPT_MAGIC[..5]);
        drop(head);
        let mut data = Raw::haggling(connect());
        data.option_head(raw::OPT_GO, 100);
        data.send(&[0; 10]);
        drop(data);
    });
}

#[test]
fn options_that_cannot_be_are_answered() {
    with_each(|_, connect| {
        let mut raw = Raw::haggling(connect());
        let answer = |raw: &mut Raw, option: u32, data: &[u8]| {
            raw.option(option, data);
            let (about, kind, text) = raw.option_reply();
            assert_eq!(about, option);
            (kind, String::from_utf8_lossy(&text).into_owned())
        };
        assert_eq!(answer(&mut raw, 0x1234, b"what").0, raw::ERR_UNSUP);
        assert_eq!(answer(&mut raw, 5, &[]).0, raw::ERR_UNSUP, "TLS");
        let (kind, text) = answer(&mut raw, raw::OPT_GO, &raw::go("none"));
        assert_eq!(kind, raw::ERR_UNKNOWN);
        assert!(text.contains("none"), "{text}");
        for malformed in [
            &[][..],
            &[0xff; 6],
            &[0, 0, 0, 9, b'd', 0, 0],
            &[0, 0, 0, 0, 0xff, 0xff],
            &[0, 0, 0, 1, 0xff, 0, 0],
        ] {
            let (kind, _) = answer(&mut raw, raw::OPT_GO, malformed);
            assert_eq!(kind, raw::ERR_INVALID, "{malformed:?}");
        }
        // Structured replies take no data, and contexts need them.
        assert_eq!(
            answer(&mut raw, raw::OPT_STRUCTURED, b"x").0,
            raw::ERR_INVALID
        );
        let context = [&4u32.to_be_bytes()[..], b"disk", &[0, 0, 0, 0]].concat();
        let (kind, _) = answer(&mut raw, raw::OPT_SET_META, &context);
        assert_eq!(kind, raw::ERR_INVALID);
        // It was told off, not hung up on.
        raw.option(raw::OPT_GO, &raw::go("disk"));
        while raw.option_reply().1 != raw::REP_ACK {}
        assert_eq!(raw.error_of(raw::FLUSH, 0, 0, 0), 0);
    });
}

#[test]
fn an_option_of_4_gib_is_refused_unread() {
    with_each(|_, connect| {
        for option in [raw::OPT_GO, raw::OPT_LIST, 0x1234] {
            let mut raw = Raw::haggling(connect());
            raw.option_head(option, u32::MAX);
            let (about, kind, text) = raw.option_reply();
            assert_eq!((about, kind), (option, raw::ERR_TOO_BIG));
            assert!(String::from_utf8_lossy(&text).contains("4294967295"));
            raw.assert_ended();
        }
    });
}

#[test]
fn requests_that_cannot_be_are_answered() {
    with_each(|_, connect| {
        for structured in [false, true] {
            let mut raw = Raw::transmitting(connect(), structured);
            let max = u32::MAX;
            for (command, flags, offset, len, error) in [
                // Beyond the end: just, by far, and past what a number can hold.
                (raw::READ, 0, LEN - 512, 1024, raw::EINVAL),
                (raw::READ, 0, LEN, 512, raw::EINVAL),
                (raw::READ, 0, u64::MAX - 511, 1024, raw::EINVAL),
                (raw::TRIM, 0, LEN - 512, 1024, raw::EINVAL),
                (raw::CACHE, 0, LEN - 512, 1024, raw::EINVAL),
                (raw::ZERO, 0, LEN - 512, 1024, raw::ENOSPC),
                (raw::ZERO, 0, 0, max, raw::ENOSPC),
                (raw::TRIM, 0, 0, max, raw::EINVAL),
                (raw::BLOCK_STATUS, 0, 0, max, raw::EINVAL),
                (raw::READ, 0, 0, max, raw::EOVERFLOW),
                // Nothing at all.
                (raw::READ, 0, 0, 0, raw::EINVAL),
                (raw::WRITE, 0, 0, 0, raw::EINVAL),
                (raw::TRIM, 0, 0, 0, raw::EINVAL),
                (raw::ZERO, 0, 0, 0, raw::EINVAL),
                // Commands that are none, or were not agreed on.
                (8, 0, 0, 512, raw::EINVAL),
                (0xffff, 0, 0, 512, raw::EINVAL),
                (raw::BLOCK_STATUS, 0, 0, 512, raw::EINVAL),
                // Flags that are none, or of another command.
                (raw::READ, 0x8000, 0, 512, raw::EINVAL),
                (raw::READ, 16, 0, 512, raw::EINVAL),
                (raw::TRIM, 2, 0, 512, raw::EINVAL),
                (raw::FLUSH, 8, 0, 0, raw::EINVAL),
            ] {
                let what = format!("command {command}, flags {flags:#x}, {offset} + {len}");
                assert_eq!(raw.error_of(command, flags, offset, len), error, "{what}");
            }
            let not_fragmented = raw.error_of(raw::READ, 4, 0, 512);
            assert_eq!(not_fragmented, if structured { 0 } else { raw::EINVAL });
            // A refused write's payload is skipped: the place in the stream is right.
            for (flags, offset) in [(0, LEN - 512), (0x4000, 0)] {
                raw.request(raw::WRITE, flags, 5, offset, 100_000);
                raw.send(&bytes(100_000, 1));
                let (cookie, error, _) = raw.reply(0);
                assert_eq!(cookie, 5);
                assert_eq!(error, if flags == 0 { raw::ENOSPC } else { raw::EINVAL });
            }
            assert_eq!(raw.error_of(raw::FLUSH, 0, 0, 0), 0);
            raw.request(raw::READ, 0, 6, LEN - 512, 512);
            let (cookie, error, data) = raw.reply(512);
            assert_eq!((cookie, error, data.len()), (6, 0, 512));
        }
    });
}

#[test]
fn a_write_of_4_gib_is_answered_and_cut_off() {
    with_each(|_, connect| {
        for structured in [false, true] {
            let mut raw = Raw::transmitting(connect(), structured);
            raw.request(raw::WRITE, 0, 3, 0, u32::MAX);
            let (cookie, error, _) = raw.reply(0);
            assert_eq!((cookie, error), (3, raw::EOVERFLOW));
            raw.assert_ended();
        }
    });
}

#[test]
fn who_loses_its_place_is_cut_off() {
    with_each(|_, connect| {
        let mut raw = Raw::transmitting(connect(), true);
        raw.send(&[0x55; 28]);
        raw.assert_ended();
    });
}

#[test]
fn who_leaves_within_a_request_writes_nothing() {
    with_each(|served, connect| {
        let before = std::fs::read(&served.disk).unwrap();
        // Within the header.
        let mut header = Raw::transmitting(connect(), false);
        header.send(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1, 0, 0]);
        drop(header);
        // Within payloads: of a small write, a large one, and one that is refused.
        for (offset, len, sent) in [(0, 4096, 100), (0, 4 << 20, 3 << 20), (LEN, 4096, 10)] {
            let mut payload = Raw::transmitting(connect(), true);
            payload.request(raw::WRITE, 0, 1, offset, len);
            payload.send(&bytes(sent, 2));
            drop(payload);
        }
        // Whoever only stops sending and goes on reading is hung up on.
        let stream = served.connect_unix();
        let writing = stream.try_clone().unwrap();
        let mut half = Raw::transmitting(stream, false);
        half.request(raw::WRITE, 0, 1, 0, 4096);
        half.send(&bytes(100, 2));
        writing.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        half.stream.read_to_end(&mut rest).unwrap();
        assert!(
            std::fs::read(&served.disk).unwrap() == before,
            "half a write"
        );
    });
}

#[test]
fn replies_that_nobody_waits_for() {
    let served = serve(LEN);
    for structured in [false, true] {
        let mut raw = Raw::transmitting(served.connect_unix(), structured);
        for cookie in 0..64 {
            raw.request(raw::READ, 0, cookie, 0, 1 << 20);
        }
        drop(raw);
        // And with a good-bye, after which the replies are not taken either.
        let mut raw = Raw::transmitting(served.connect_unix(), structured);
        for cookie in 0..4 {
            raw.request(raw::READ, 0, cookie, 0, 1 << 20);
        }
        raw.request(raw::DISC, 0, 9, 0, 0);
        drop(raw);
        assert_serves(&served);
    }
    served.stop();
}

#[test]
fn fast_zero_is_fast_or_refused() {
    // Memory file systems punch holes, and have no other quick zeros: no hole means writing.
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        panic!("/dev/shm is missing: a memory file system is needed there");
    };
    let disk = folder.path().join("disk.img");
    std::fs::write(&disk, bytes(1 << 20, 4)).unwrap();
    let before = std::fs::read(&disk).unwrap();
    let served = nbd_support::serve_in(folder, disk);
    let mut raw = Raw::transmitting(served.connect_unix(), true);
    let (no_hole, fast) = (2, 16);
    assert_eq!(
        raw.error_of(raw::ZERO, no_hole | fast, 0, 65536),
        raw::ENOTSUP
    );
    assert!(
        std::fs::read(&served.disk).unwrap() == before,
        "written all the same"
    );
    assert_eq!(raw.error_of(raw::ZERO, fast, 0, 65536), 0);
    assert_eq!(raw.error_of(raw::ZERO, no_hole, 65536, 65536), 0);
    let after = std::fs::read(&served.disk).unwrap();
    assert!(after[..131_072].iter().all(|byte| *byte == 0));
    assert!(after[131_072..] == before[131_072..]);
    served.stop();
}

#[test]
fn a_disk_in_the_place_of_the_socket_is_not_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, other) = (folder.path().join("a.img"), folder.path().join("b.img"));
    for path in [&disk, &other] {
        std::fs::write(path, bytes(4096, 1)).unwrap();
    }
    let simhost = || std::process::Command::new(env!("CARGO_BIN_EXE_simhost"));
    let mut nbd = simhost();
    nbd.arg("nbd")
        .arg("--disk")
        .arg(&disk)
        .arg("--socket")
        .arg(&other);
    let mut host = simhost();
    host.arg("host")
        .arg("--run-dir")
        .arg(folder.path().join("run"));
    host.arg("--nbd-dir").arg(folder.path().join("nbd"));
    host.arg("--control-socket").arg(&other);
    for mut command in [nbd, host] {
        let refused = nbd_support::run(&mut command);
        assert!(!refused.status.success());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            said.contains("b.img") && said.contains("no socket"),
            "{said}"
        );
        assert_eq!(std::fs::read(&other).unwrap(), bytes(4096, 1));
    }
}

#[test]
fn stop_needs_no_socket_file_and_leaves_other_files() {
    let served = serve(LEN);
    let idle = UnixStream::connect(&served.socket).unwrap();
    std::fs::remove_file(&served.socket).unwrap();
    served.stop();
    drop(idle);
    let served = serve(LEN);
    let client = served.client();
    let moved = served.at("moved.sock");
    std::fs::rename(&served.socket, &moved).unwrap();
    std::fs::write(&served.socket, b"another's").unwrap();
    let socket = served.socket.clone();
    let mut end = served;
    end.terminate(PATIENCE);
    assert_eq!(std::fs::read(&socket).unwrap(), b"another's");
    drop(client);
}
