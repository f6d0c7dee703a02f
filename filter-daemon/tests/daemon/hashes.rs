//! What a sync asks about blocks, and the news of a lane that is open.

use crate::appliance::{Peer, Ports};
use crate::vm::{DISK, Daemon, Host, Vm};
use crate::wait_for;
use filter_core::wire::{FrameKind, Message, PortRole};
use std::sync::atomic::Ordering::SeqCst;

fn role() -> PortRole {
    PortRole::of_disk(&DISK)
}

fn begin() -> (Host, Ports, Vm, Daemon, Peer) {
    let (host, ports) = (Host::new(), Ports::bind());
    let vm = host.vm(DISK);
    let daemon = Daemon::start(&host, ports.base);
    let peer = ports.greet(role());
    (host, ports, vm, daemon, peer)
}

impl Vm {
    /// Asks, as a sync does; the question's number.
    fn ask(&self, offset_bytes: u64, blocks: u32) -> u32 {
        let memory = self.lane.memory();
        let words = memory.producer();
        words.hash_offset.store(offset_bytes, SeqCst);
        words.hash_blocks.store(blocks, SeqCst);
        words.hash_ask.fetch_add(1, SeqCst) + 1
    }

    /// Waits for the answer to a question: the hashes as words.
    fn answer(&self, number: u32) -> Vec<[u64; 2]> {
        let memory = self.lane.memory();
        let words = memory.consumer();
        wait_for("an answer", || words.hash_answer.load(SeqCst) == number);
        let count = words.hash_count.load(SeqCst) as usize;
        let page = memory.hash_words().chunks(2).take(count);
        page.map(|pair| [pair[0].load(SeqCst), pair[1].load(SeqCst)])
            .collect()
    }
}

fn hash(number: u64) -> [u8; 16] {
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    hash[8..].copy_from_slice(&(!number).to_le_bytes());
    hash
}

impl Peer {
    fn expect_question(&mut self) -> (u32, u64, u32) {
        match self.message() {
            (
                channel,
                Message::HashRequest {
                    offset_bytes,
                    blocks,
                },
            ) => (channel, offset_bytes, blocks),
            (_, other) => panic!("{other:?} instead of a question"),
        }
    }

    fn tell(&mut self, channel: u32, offset_bytes: u64, numbers: &[u64]) {
        let hashes = numbers.iter().copied().map(hash).collect();
        let answer = Message::Hashes {
            offset_bytes,
            hashes,
        };
        self.send(&answer, channel);
    }
}

#[test]
fn a_question_follows_what_was_published_before_it() {
    let (_host, _ports, mut vm, _daemon, mut peer) = begin();
    let (channel, lane) = peer.expect_open();
    let last = (0..3).map(|_| vm.write(60_000).unwrap()).max().unwrap();
    let number = vm.ask(3 << 16, 256);
    let opened = Message::LaneOpened {
        durable_seq: 0,
        attach_epoch: lane.attach_epoch,
        full_base_seq: 0,
    };
    peer.send(&opened, channel);
    while !peer.data().contains(&last) {}
    assert_eq!(peer.expect_question(), (channel, 3 << 16, 256));
    let numbers: Vec<u64> = (1..=256).collect();
    peer.tell(channel, 3 << 16, &numbers);
    let expected: Vec<[u64; 2]> = numbers.iter().map(|n| [*n, !n]).collect();
    assert_eq!(vm.answer(number), expected);
    // The next one is another question, although it asks the same.
    let number = vm.ask(3 << 16, 256);
    assert_eq!(peer.expect_question(), (channel, 3 << 16, 256));
    peer.tell(channel, 3 << 16, &[]);
    assert!(vm.answer(number).is_empty());
}

/// An answer that comes late answers the question that it was for, and no other.
#[test]
fn an_answer_to_a_question_that_was_given_up_is_not_one_to_the_next() {
    let (_host, _ports, vm, _daemon, mut peer) = begin();
    let channel = peer.open(0);
    let first = vm.ask(0, 1);
    assert_eq!(peer.expect_question(), (channel, 0, 1));
    let second = vm.ask(0, 1);
    peer.tell(channel, 0, &[1]);
    assert_eq!(vm.answer(first), [[1, !1]]);
    assert_eq!(peer.expect_question(), (channel, 0, 1));
    peer.tell(channel, 0, &[2]);
    assert_eq!(vm.answer(second), [[2, !2]]);
}

#[test]
fn questions_that_nobody_can_answer_are_answered_with_none() {
    let (host, ports) = (Host::new(), Ports::bind());
    let vm = host.vm(DISK);
    let base = ports.base;
    drop(ports); // nobody is there
    let daemon = Daemon::start(&host, base);
    wait_for("the lane is known", || daemon.lane(&DISK).is_some());
    assert!(vm.answer(vm.ask(0, 1)).is_empty());
    drop(daemon);
    // One that was asked while no daemon lived; one that asks nonsense.
    let ports = Ports::bind();
    let number = vm.ask(1 << 16, 2);
    let _daemon = Daemon::start(&host, ports.base);
    assert!(vm.answer(number).is_empty());
    let mut peer = ports.greet(role());
    peer.open(0);
    for (offset_bytes, blocks) in [(0, 0), (0, 257), (1 << 15, 1), (1 << 63, 1)] {
        assert!(vm.answer(vm.ask(offset_bytes, blocks)).is_empty());
    }
    // One that is under way when the connection ends; the next one goes over the next connection.
    let number = vm.ask(0, 1);
    peer.expect_question();
    drop(peer);
    assert!(vm.answer(number).is_empty());
    let mut peer = ports.greet(role());
    let channel = peer.open(0);
    let number = vm.ask(0, 1);
    assert_eq!(peer.expect_question(), (channel, 0, 1));
    peer.tell(channel, 0, &[7]);
    assert_eq!(vm.answer(number), [[7, !7]]);
}

#[test]
fn hashes_that_nobody_asked_for_end_the_connection() {
    let (_host, ports, vm, daemon, mut peer) = begin();
    let channel = peer.open(0);
    peer.tell(channel, 0, &[1]);
    peer.wait_gone();
    assert_eq!(vm.lane.memory().consumer().hash_answer.load(SeqCst), 0);
    // Of another range; more than were asked for.
    for (offset_bytes, numbers) in [(1 << 16, vec![1]), (0, vec![1, 2])] {
        peer = ports.greet(role());
        let channel = peer.open(0);
        let number = vm.ask(0, 1);
        peer.expect_question();
        peer.tell(channel, offset_bytes, &numbers);
        peer.wait_gone();
        assert!(vm.answer(number).is_empty());
    }
    wait_for("it is said", || daemon.log().contains("nobody asked for"));
}

/// A disk that has grown is told on the channel that is open, before anything beyond its old end.
#[test]
fn a_disk_that_has_grown_is_told_before_what_lies_beyond() {
    let (_host, _ports, mut vm, _daemon, mut peer) = begin();
    let (channel, lane) = peer.expect_open();
    assert_eq!(lane.capacity_bytes, 1 << 30);
    let opened = |durable_seq| Message::LaneOpened {
        durable_seq,
        attach_epoch: 1,
        full_base_seq: 0,
    };
    peer.send(&opened(0), channel);
    let first = vm.push(512);
    assert_eq!(peer.data(), [first]);
    let memory = vm.lane.memory();
    for capacity_bytes in [3 << 30, 5 << 30] {
        memory
            .producer()
            .capacity_bytes
            .store(capacity_bytes, SeqCst);
        let last = vm.push(512);
        let (of, lane) = peer.expect_open();
        assert_eq!((of, lane.capacity_bytes), (channel, capacity_bytes));
        // The stream goes on, whatever the answer says: it is another one's.
        peer.send(&opened(0), channel);
        let frame = peer.frame().unwrap();
        assert_eq!(
            (frame.header.kind, frame.header.word),
            (FrameKind::Data, last)
        );
        peer.ack(channel, last);
    }
    // Nothing is written, and it is told all the same; so is the epoch of a VM that adopted the lane.
    memory.producer().capacity_bytes.store(7 << 30, SeqCst);
    assert_eq!(peer.expect_open().1.capacity_bytes, 7 << 30);
    memory.producer().attach_epoch.store(4, SeqCst);
    assert_eq!(peer.expect_open().1.attach_epoch, 4);
}
