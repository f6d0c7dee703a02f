//! A domain whose VMs run on several hosts: each cut is one that all of them could have stopped at, and no
//! guest waits for it for longer than it may. Without the hold of completions the first cuts are torn already.
#![allow(clippy::unwrap_used)]

mod support;

use filter_core::lane::ring;
use filter_core::mapping::{RunFolder, monotonic_ns};
use serde_json::{Value, json};
use simhost::nbd::client::{Client, Op};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::site::Site;
use support::{DOMAIN, Stack, find, ok, seed};

const DISK: u64 = 4 << 20;
const BLOCK: usize = 4096;
/// Pairs of guests, one of each pair on each host.
const PAIRS: usize = 2;
/// Blocks that a pair writes to, round and round.
const SLOTS: u64 = 16;
/// Where the load writes, which depends on nobody.
const LOAD_AT: u64 = 1 << 20;
/// How long a completion is held at most.
const HOLD_US: u64 = 20_000;

/// Two hosts, each with a VM of one disk.
fn two_vms() -> Site {
    seed();
    let site = Site::running(&[("disk0.raw", DISK), ("disk1.raw", DISK)]);
    for (host, (label, path)) in site.hosts.iter().zip(&site.stack.disks) {
        let args = [
            format!("--disk={label}={}", path.display()),
            format!("--domain={DOMAIN}"),
        ];
        let started = host.obey(&json!({"cmd": "start", "vm": "vm", "args": args}));
        assert!(started["pid"].is_u64(), "{started}");
    }
    (0..2).for_each(|host| site.settle(host));
    site
}

fn guest_of(site: &Site, host: usize) -> Client {
    let label = format!("disk{host}");
    Client::connect_unix(&site.nbd_socket(host), &label).unwrap()
}

fn place(pair: usize, number: u64) -> u64 {
    (pair as u64 * SLOTS + number % SLOTS) * BLOCK as u64
}

/// Waits until the appliance has nearly everything: a lane that fills makes its disk track, and then there is
/// no cut.
fn keep_up(site: &Site) {
    let behind = |host: &support::site::Host| {
        let disk = host.disk();
        let seq = |name: &str| disk[name].as_u64().unwrap();
        seq("published_seq").saturating_sub(seq("durable_seq"))
    };
    site.wait("the appliance keeps up", |site| {
        site.hosts.iter().all(|host| behind(host) < 256)
    });
}

/// Writes 1, 2, 3 and so on to the first disk, and each to the second one as soon as it is done on the first.
/// Between them, large writes on which nothing depends.
fn depend(site: &Site, pair: usize, stop: &AtomicBool) -> u64 {
    let mut guests = [guest_of(site, 0), guest_of(site, 1)];
    let large = vec![0x5a; 64 * 1024];
    let mut number = 0;
    while !stop.load(Ordering::Acquire) {
        number += 1;
        let block = u64::to_le_bytes(number).repeat(BLOCK / 8);
        for guest in &mut guests {
            let write = Op::Write(place(pair, number), &block);
            guest.call(&write, false).unwrap();
        }
        if number % 32 == 0 {
            let offset = LOAD_AT + (pair as u64 * 16 + number / 32 % 16) * large.len() as u64;
            for guest in &mut guests {
                guest.call(&Op::Write(offset, &large), false).unwrap();
            }
        }
        if number % 128 == 0 {
            keep_up(site);
        }
    }
    number
}

/// The newest write of a pair that a disk holds; every slot must hold the newest one of its own up to that.
fn newest(disk: &[u8], pair: usize, what: &str) -> u64 {
    let at = |slot: u64| {
        let from = place(pair, slot) as usize;
        let word = |at: usize| u64::from_le_bytes(disk[at..at + 8].try_into().unwrap());
        let (first, last) = (word(from), word(from + BLOCK - 8));
        assert_eq!(first, last, "{what}: slot {slot} is torn");
        first
    };
    let slots: Vec<u64> = (0..SLOTS).map(at).collect();
    let newest = slots.iter().copied().max().unwrap_or(0);
    for (slot, held) in (0..).zip(&slots) {
        let back = (newest % SLOTS + SLOTS - slot) % SLOTS;
        let expected = newest.saturating_sub(back);
        assert_eq!(*held, expected, "{what}: slot {slot} of {slots:?}");
    }
    newest
}

fn status(site: &Site, figure: &str) -> u64 {
    site.stack.domain()[figure].as_u64().unwrap()
}

/// Recovers a cut and looks whether each pair could have stopped there.
fn check(site: &Site, cut: u64) {
    let out: PathBuf = site.stack.dir.path().join(format!("cut-{cut}"));
    let (number, folder) = (cut.to_string(), out.display().to_string());
    ok(Ok(site
        .stack
        .rocva(&["recover", "--cut", &number, "--out", &folder])));
    let disks = ["disk0.raw", "disk1.raw"].map(|name| std::fs::read(find(&out, name)).unwrap());
    std::fs::remove_dir_all(&out).unwrap();
    for pair in 0..PAIRS {
        let what = format!("cut {cut}, pair {pair}");
        let first = newest(&disks[0], pair, &format!("{what}, first host"));
        let second = newest(&disks[1], pair, &format!("{what}, second host"));
        assert!(
            second <= first && first <= second + 1,
            "{what}: the second host has written {second}, the first {first}"
        );
    }
}

#[test]
fn cuts_over_two_hosts_hold_what_their_writes_rely_on() {
    let site = two_vms();
    let before = (status(&site, "cuts_void"), status(&site, "cuts_held"));
    let first_cut = status(&site, "cuts_closed");
    let stop = AtomicBool::new(false);
    let since = Instant::now();
    let written: u64 = std::thread::scope(|scope| {
        let (site, stop) = (&site, &stop);
        let pairs = (0..PAIRS).map(|pair| scope.spawn(move || depend(site, pair, stop)));
        let pairs: Vec<_> = pairs.collect();
        site.wait("cuts enough", |site| {
            let enough = status(site, "cuts_closed") >= first_cut + 20;
            enough || since.elapsed() > Duration::from_secs(20)
        });
        stop.store(true, Ordering::Release);
        pairs.into_iter().map(|pair| pair.join().unwrap()).sum()
    });
    let took = since.elapsed().as_secs_f64();
    let void = status(&site, "cuts_void") - before.0;
    let held = status(&site, "cuts_held") - before.1;
    let longest = |host: &support::site::Host| {
        let longest = host.daemon_status()["longest_hold_us"].as_u64();
        longest.unwrap()
    };
    let longest_us = site.hosts.iter().map(longest).max().unwrap();
    let listing = ok(Ok(site.stack.rocva(&["list", "--json"])));
    let listing: Value = serde_json::from_str(&listing).unwrap();
    let cuts = listing["cuts"].as_array().unwrap();
    let both = |cut: &&Value| {
        cut["disks"]
            .as_array()
            .is_some_and(|disks| disks.len() == 2)
    };
    let cuts: Vec<u64> = cuts
        .iter()
        .filter(both)
        .map(|cut| cut["cut"].as_u64().unwrap())
        .collect();
    println!(
        "{written} pairs of writes in {took:.1} s; {held} cuts held completions, {void} void, {} to check; \
         longest hold {longest_us} us",
        cuts.len()
    );
    assert!(cuts.len() >= 3, "{cuts:?}");
    assert!(longest_us <= HOLD_US, "{longest_us} us");
    cuts.iter().for_each(|cut| check(&site, *cut));
}

/// What the page says is honoured by the filter, and its own limit holds against any page.
#[test]
fn a_completion_is_held_until_it_is_released_and_never_for_long() {
    let stack = Stack::running(&[("d0.raw", DISK)]);
    stack.settle();
    let page = RunFolder::open(stack.run.path()).unwrap();
    let page = page.cut_page(DOMAIN).unwrap();
    let mut guest = Client::connect_unix(&stack.nbd_socket(), "d0").unwrap();
    let mut write = || {
        let since = Instant::now();
        guest.call(&Op::Write(0, &[7; BLOCK]), false).unwrap();
        since.elapsed()
    };
    write();
    // Until its deadline.
    let until_ns = monotonic_ns() + 10_000_000;
    ring::hold_begin(page.hold(), until_ns);
    write();
    assert!(monotonic_ns() >= until_ns);
    // By the filter's own limit: a daemon that is gone, or mad.
    ring::hold_begin(page.hold(), u64::MAX);
    let took = write();
    assert!(took >= Duration::from_micros(HOLD_US), "{took:?}");
    // Reads go on.
    let mut other = Client::connect_unix(&stack.nbd_socket(), "d0").unwrap();
    std::thread::scope(|scope| {
        let held = scope.spawn(&mut write);
        other.call(&Op::Read(0, BLOCK as u32), false).unwrap();
        ring::hold_end(page.hold());
        held.join().unwrap();
    });
    let vm = stack.vm_status();
    assert_eq!(vm["contract_violations"], 0, "{vm}");
    assert!(vm["disks"][0]["held_count"].as_u64().unwrap() >= 2, "{vm}");
}
