//! What an operator gets wrong, and what a stranger sends: a clear error, and nothing is lost.
#![allow(clippy::unwrap_used)]

mod support;

use filter_core::wire::{ErrorCode, FRAME_HEADER_BYTES, FrameHeader, Hello, Message, PeerRole};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use support::{Part, Stack};

#[test]
fn a_port_that_is_taken() {
    let mut stack = Stack::new(&[]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    stack.port_base = u64::from(taken.local_addr().unwrap().port());
    let said = Part::try_start(&stack.log("drva"), &stack.drva_arguments())
        .err()
        .unwrap();
    assert!(said.contains("cannot listen on 127.0.0.1 port"), "{said}");
    assert!(said.contains("--port-base"), "{said}");
}

#[test]
fn a_store_that_cannot_be_written() {
    let mut stack = Stack::new(&[]);
    stack.store = "/proc/jetdr".into();
    let said = Part::try_start(&stack.log("drva"), &stack.drva_arguments())
        .err()
        .unwrap();
    assert!(
        said.contains("--store") && said.contains("/proc/jetdr"),
        "{said}"
    );
}

#[test]
fn a_container_of_another_format() {
    let mut stack = Stack::new(&[("d0.raw", 4 << 20)]);
    let container = stack.dir.path().join("store").join(support::DOMAIN);
    std::fs::create_dir_all(&container).unwrap();
    std::fs::write(
        container.join("domain.json"),
        br#"{"format":"something else"}"#,
    )
    .unwrap();
    let listed = stack.rocva(&["list"]);
    assert!(!listed.status.success());
    let said = String::from_utf8_lossy(&listed.stderr).into_owned();
    assert!(said.contains("another format"), "{said}");
    // The appliance raises an alarm, writes nothing there, and keeps what comes in its log.
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    stack.wait("an alarm about the store", |stack| {
        stack.domain()["alarms"]
            .to_string()
            .contains("another format")
    });
    stack.settle();
    assert!(stack.domain()["records"].as_u64().unwrap() > 0);
    assert_eq!(std::fs::read_dir(&container).unwrap().count(), 1);
}

/// Sends bytes to a port and returns the error that comes back.
fn refused(port: u64, send: &[u8]) -> (ErrorCode, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
    stream.set_read_timeout(Some(support::LIMIT)).unwrap();
    let _ = stream.write_all(send);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let mut rest = &all[..];
    while let Some((head, after)) = rest.split_first_chunk::<FRAME_HEADER_BYTES>() {
        let header = FrameHeader::decode(head).unwrap();
        let (body, after) = after.split_at(header.body_len as usize);
        if let Message::Error { code, text, .. } = Message::decode(&header, body).unwrap() {
            return (code, text);
        }
        rest = after;
    }
    panic!("no error came for {send:?}");
}

fn hello(newest: u16, port_offset: u8) -> Vec<u8> {
    let hello = Hello {
        oldest: newest,
        newest,
        role: PeerRole::Daemon,
        port_offset,
        peer_id: [1; 16],
        incarnation: 1,
        name: "test".into(),
    };
    Message::Hello(hello).encode(0)
}

#[test]
fn strangers_are_answered_and_harm_nobody() {
    let stack = Stack::running(&[("d0.raw", 8 << 20)]);
    let port = stack.port_base + 1;
    let (code, text) = refused(port, b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: y\r\n\r\n");
    assert_eq!(code, ErrorCode::Malformed);
    assert!(text.contains("not a jetdr peer"), "{text}");
    let (code, text) = refused(port, &hello(99, 1));
    assert_eq!(code, ErrorCode::Version);
    assert!(text.contains("99"), "{text}");
    let (_, text) = refused(port, &hello(1, 3));
    assert!(text.contains("port"), "{text}");
    // A frame that announces 4 GiB.
    let mut frame = FrameHeader::data(1, 1, u32::MAX).encode();
    let (_, text) = refused(port, &[hello(1, 1), frame.to_vec()].concat());
    assert!(text.contains("announces"), "{text}");
    frame[9] ^= 1;
    let (_, text) = refused(port, &[hello(1, 1), frame.to_vec()].concat());
    assert!(text.contains("corrupt"), "{text}");
    // A data frame on a channel that was never opened is dropped; the connection goes on.
    let mut stream = TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
    stream.write_all(&hello(1, 1)).unwrap();
    stream
        .write_all(&FrameHeader::data(77, 1, 0).encode())
        .unwrap();
    stream
        .write_all(
            &Message::Heartbeat {
                clock_ns: 5,
                answer: false,
            }
            .encode(0),
        )
        .unwrap();
    let mut answers = [0u8; FRAME_HEADER_BYTES];
    stream.read_exact(&mut answers).unwrap();
    drop(stream);
    stack.recover_and_compare("strangers");
}

#[test]
fn unknown_names_are_told() {
    let stack = Stack::running(&[("d0.raw", 4 << 20)]);
    stack.settle();
    stack.cut("only");
    let out = stack.dir.path().join("none").display().to_string();
    for arguments in [
        ["recover", "--cut", "nothing", "--out", &out].as_slice(),
        &[
            "recover", "--cut", "only", "--disk", "nodisk", "--out", &out,
        ],
    ] {
        let refused = stack.rocva(arguments);
        assert!(!refused.status.success());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            said.contains("nothing") || said.contains("nodisk"),
            "{said}"
        );
    }
}

#[test]
fn a_second_daemon_is_kept_out() {
    let stack = Stack::running(&[("d0.raw", 4 << 20)]);
    let run = stack.run.path().display().to_string();
    let arguments = ["filterd", "--run-dir", &run].map(String::from);
    let said = Part::try_start(&stack.log("second"), &arguments)
        .err()
        .unwrap();
    assert!(said.contains("another daemon"), "{said}");
}
