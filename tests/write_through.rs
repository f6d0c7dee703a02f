//! `jetdr.ack = log` with real processes: what the guest was told is done survives the loss of the
//! host, and an appliance that stands still delays a write once, within the budget.
#![allow(clippy::unwrap_used)]

mod support;

use drva::log::format::{Entries, EntryKind};
use drva::log::reader::{read_body, read_header};
use drva::log::segment;
use filter_core::record::{RecordIter, RecordKind};
use serde_json::json;
use simhost::nbd::client::{Client, Op};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use support::{LIMIT, Numbers, Stack, ok, seed};

const DISK_BYTES: usize = 8 << 20;
const BLOCK: usize = 4096;
const FALLBACK: u64 = 0x20;

fn stack(budget_us: u64) -> Stack {
    let mut stack = Stack::new(&[("d0.raw", DISK_BYTES as u64)]);
    let budget = format!("--property=jetdr.ack-budget-us={budget_us}");
    stack
        .vm_more
        .extend(["--property=jetdr.ack=log".into(), budget]);
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    stack
}

fn connect(stack: &Stack) -> Client {
    Client::connect_unix(&stack.nbd_socket(), "d0").unwrap()
}

/// What write `number` of a block puts there.
fn content(block: usize, number: u64) -> Vec<u8> {
    let word = (block as u64) << 40 | number;
    word.to_le_bytes().repeat(BLOCK / 8)
}

fn has_fallen_back(stack: &Stack) -> bool {
    let alarms = stack.vm_status()["disks"][0]["alarms"].as_u64().unwrap();
    alarms & FALLBACK != 0
}

/// Writes now and then (to the last block, which the tests leave alone) until completions wait.
fn until_through(stack: &Stack, client: &mut Client) {
    let at = (DISK_BYTES - BLOCK) as u64;
    stack.wait("completions wait for the log", |stack| {
        client.call(&Op::Write(at, &[9; BLOCK]), false).unwrap();
        !has_fallen_back(stack)
    });
}

fn folder_of_segments(dir: &Path) -> Option<PathBuf> {
    if !segment::list(dir).unwrap().is_empty() {
        return Some(dir.to_owned());
    }
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    let folders = entries.map(|entry| entry.path()).filter(|p| p.is_dir());
    folders.into_iter().find_map(|dir| folder_of_segments(&dir))
}

/// The disk as the appliance's log alone tells it.
fn disk_of_log(dir: &Path) -> Vec<u8> {
    let dir = folder_of_segments(dir).unwrap();
    let mut disk = vec![0; DISK_BYTES];
    for first in segment::list(&dir).unwrap() {
        let file = File::open(segment::path_of(&dir, first)).unwrap();
        let (mut at, mut number) = (0, first);
        while let Ok((header, _)) = read_header(&file, at) {
            if header.number != number {
                break; // of an earlier use of the file
            }
            let Ok(body) = read_body(&file, at, &header) else {
                break; // torn: never acknowledged
            };
            for entry in Entries::new(&body, number).map(Result::unwrap) {
                if entry.kind == EntryKind::Run {
                    apply(&mut disk, entry.content);
                }
            }
            at += header.span_bytes();
            number += 1;
        }
    }
    disk
}

fn apply(disk: &mut [u8], run: &[u8]) {
    for record in RecordIter::new(run) {
        let record = record.unwrap();
        let (at, end) = (
            record.header.offset_bytes as usize,
            record.header.end_bytes() as usize,
        );
        match record.header.kind {
            RecordKind::Write | RecordKind::Sync => disk[at..end].copy_from_slice(record.payload),
            RecordKind::Zero | RecordKind::Unmap => disk[at..end].fill(0),
            RecordKind::Void | RecordKind::Pad => {}
        }
    }
}

/// Everything of the host and the appliance is killed in the middle of a load, and the host's memory
/// and disk are gone: each write that the guest was told is done stands in the appliance's log.
#[test]
fn what_the_guest_was_told_is_done_is_in_the_log_after_everything_was_killed() {
    let mut numbers = Numbers(seed());
    for round in 0..3 {
        let mut stack = stack(5_000_000);
        let mut client = connect(&stack);
        until_through(&stack, &mut client);
        // By block: the last number that was told to be done, and one that may be on its way.
        let mut told: HashMap<usize, u64> = HashMap::new();
        let mut on_the_way: HashMap<u64, (usize, u64)> = HashMap::new();
        let blocks = DISK_BYTES / BLOCK - 1;
        let writes = 200 + numbers.next() % 800;
        for number in 1..=writes {
            while on_the_way.len() >= 8 {
                let done = client.next_done().unwrap();
                assert_eq!(done.error, 0);
                let (block, number) = on_the_way.remove(&done.cookie).unwrap();
                told.insert(block, number);
            }
            let block = (numbers.next() % blocks as u64) as usize;
            if on_the_way.values().all(|(busy, _)| *busy != block) {
                let data = content(block, number);
                let op = Op::Write((block * BLOCK) as u64, &data);
                on_the_way.insert(client.submit(&op, false).unwrap(), (block, number));
            }
        }
        assert!(!has_fallen_back(&stack), "nothing was shown");
        let held = stack.vm_status()["disks"][0]["held_count"].as_u64();
        stack.vm.as_mut().unwrap().kill();
        stack.daemon.as_mut().unwrap().kill();
        stack.drva.as_mut().unwrap().kill();
        let disk = disk_of_log(&stack.dir.path().join("data"));
        for (block, number) in &told {
            let found = &disk[block * BLOCK..(block + 1) * BLOCK];
            let newer = on_the_way.values().find(|(busy, _)| busy == block);
            let newer = newer.is_some_and(|(_, newer)| found == content(*block, *newer));
            let there = found == content(*block, *number) || newer;
            assert!(
                there,
                "round {round}: write {number} of block {block} was told, and is lost"
            );
        }
        assert!(told.len() > 100 && held.unwrap() > 100, "{held:?}");
    }
}

fn signal(stack: &Stack, signal: &str) {
    let drva = stack.drva.as_ref().unwrap().child.id().to_string();
    ok(Command::new("kill").arg(signal).arg(drva).output());
}

#[test]
fn an_appliance_that_stands_still_delays_a_write_once_and_is_trusted_again_later() {
    let stack = stack(50_000);
    let mut client = connect(&stack);
    until_through(&stack, &mut client);
    signal(&stack, "-STOP");
    let mut longest = Duration::ZERO;
    for i in 0..50 {
        let from = Instant::now();
        client
            .call(&Op::Write(i * 4096, &[1; 4096]), false)
            .unwrap();
        longest = longest.max(from.elapsed());
    }
    let status = stack.vm_status();
    println!("longest {longest:?}; {status}");
    assert!(has_fallen_back(&stack));
    assert!(
        longest >= Duration::from_millis(40),
        "nothing was held: {longest:?}"
    );
    // 50 ms is the budget; the rest is for a machine that is busy with other tests.
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    let log = std::fs::read_to_string(stack.log("vm")).unwrap();
    assert!(log.contains("an acknowledgement took longer"), "{log}");

    signal(&stack, "-CONT");
    let from = Instant::now();
    until_through(&stack, &mut client);
    assert!(from.elapsed() < LIMIT);
    let log = std::fs::read_to_string(stack.log("vm")).unwrap();
    assert!(log.contains("wait for the appliance's log again"), "{log}");
    stack.assert_contract();
    drop(client);
    stack.recover_and_compare("after");
}

/// A stop in order while completions are held: none is forgotten, and the VM ends.
#[test]
fn a_drain_and_a_stop_leave_nothing_held() {
    let mut stack = stack(2_000_000);
    let mut client = connect(&stack);
    until_through(&stack, &mut client);
    signal(&stack, "-STOP");
    for i in 0..16 {
        let op = Op::Write(i * 4096, &[3; 4096]);
        client.submit(&op, false).unwrap();
    }
    stack.wait("completions are held", |stack| {
        stack.vm_status()["disks"][0]["held_count"]
            .as_u64()
            .unwrap()
            >= 16
    });
    let drained = stack.command("vm.sock", &json!({"cmd": "drain", "timeout_ms": 10}));
    assert_eq!(drained["drained"], false, "{drained}");
    signal(&stack, "-CONT");
    for _ in 0..16 {
        assert_eq!(client.next_done().unwrap().error, 0);
    }
    stack.assert_contract();
    drop(client);
    stack.vm.as_mut().unwrap().stop();
}

/// A client that goes away while its completions are held takes nothing along.
#[test]
fn a_client_that_leaves_while_completions_are_held_breaks_nothing() {
    let mut stack = stack(3_000_000);
    let mut client = connect(&stack);
    until_through(&stack, &mut client);
    signal(&stack, "-STOP");
    for i in 0..4 {
        let op = Op::Write(i * 4096, &[4; 4096]);
        client.submit(&op, false).unwrap();
    }
    stack.wait("completions are held", |stack| {
        stack.vm_status()["disks"][0]["held_count"]
            .as_u64()
            .unwrap()
            >= 4
    });
    drop(client);
    signal(&stack, "-CONT");
    let mut client = connect(&stack);
    client.call(&Op::Write(0, &[5; 4096]), false).unwrap();
    stack.assert_contract();
    drop(client);
    stack.vm.as_mut().unwrap().stop();
}
