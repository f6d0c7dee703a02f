//! Figures of the recovery from a broken link and from a crashed host, measured on real processes. In a
//! test run they are small and only have to hold; `make figures` prints them at the size of
//! `docs/reliability-figures.md`.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::link::{Link, Weather};
use support::{Numbers, Stack, client, ok, seed};

const MIB: u64 = 1 << 20;

/// A size for `make figures`, another one for a test run.
fn full_or(full: u64, short: u64) -> u64 {
    if std::env::var_os("JETDR_FIGURES").is_some() {
        full
    } else {
        short
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// A stack whose disk holds data on three quarters; the daemon reaches the appliance over a link.
fn stack(disk_bytes: u64) -> (Stack, Link) {
    let mut stack = Stack::new(&[("d0.raw", disk_bytes)]);
    let mut numbers = Numbers(seed() | 1);
    let words = disk_bytes / 4 * 3 / 8;
    let bytes: Vec<u8> = (0..words)
        .flat_map(|_| numbers.next().to_le_bytes())
        .collect();
    let file = std::fs::File::options()
        .write(true)
        .open(&stack.disks[0].1)
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    stack.start_drva();
    let link = Link::before(stack.port_base);
    stack.daemon_port_base = Some(link.port_base);
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    (stack, link)
}

fn figure(stack: &Stack, name: &str) -> u64 {
    stack.vm_status()["disks"][0][name].as_u64().unwrap()
}

fn received(stack: &Stack) -> u64 {
    stack.domain()["received_bytes"].as_u64().unwrap()
}

/// fio that writes 4 KiB at random places of the first `range` bytes.
fn fio(stack: &Stack, range: u64) -> Command {
    let mut fio = client("fio");
    fio.arg("--thread").current_dir(stack.dir.path());
    fio.args(["--name=f", "--ioengine=nbd", "--rw=randwrite", "--bs=4k"]);
    fio.args(["--iodepth=4", "--randseed=7", "--norandommap"]);
    fio.arg(format!("--size={range}"));
    fio.arg(format!("--uri={}", stack.uri("d0")));
    fio.stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    fio
}

/// Ended with the test, however that ends.
struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_link_is_away_under_load_and_comes_back() {
    let away = Duration::from_secs(full_or(60, 1));
    let (stack, link) = stack(full_or(512, 64) * MIB);
    let rate = 1000;
    let mut load = fio(&stack, full_or(128, 16) * MIB);
    load.args(["--time_based", "--runtime=600"]);
    let mut load = Load(load.arg(format!("--rate_iops={rate}")).spawn().unwrap());
    let before = figure(&stack, "published_seq");
    stack.wait("the load streams", |s| {
        figure(s, "published_seq") > before + 500
    });
    link.set(Weather::Cut);
    let since = Instant::now();
    stack.wait("the disk tracks", |s| {
        s.vm_status()["disks"][0]["state"] == "tracking"
    });
    let tracking_after = since.elapsed();
    std::thread::sleep(away.saturating_sub(since.elapsed())); // time under test: the link is away
    let (dirty, received_before) = (figure(&stack, "dirty_bytes"), received(&stack));
    link.set(Weather::Fine);
    let since = Instant::now();
    stack.wait("the disk streams", |s| {
        s.vm_status()["disks"][0]["state"] == "streaming"
    });
    let streaming = since.elapsed();
    let came = received(&stack) - received_before;
    assert!(
        load.0.try_wait().unwrap().is_none(),
        "the guest saw an error"
    );
    let deferred_ns = stack.vm_status()["host_deferred_max_ns"].as_u64().unwrap();
    println!(
        "link away {:.1} s, {rate} writes/s of 4 KiB on {} MiB: tracking after {:.1} s; back: {:.1} MiB dirty, \
         streaming after {:.2} s, {:.1} MiB received until then; longest deferral {:.1} ms",
        away.as_secs_f64(),
        full_or(128, 16),
        tracking_after.as_secs_f64(),
        mib(dirty),
        streaming.as_secs_f64(),
        mib(came),
        deferred_ns as f64 / 1e6
    );
    drop(load);
    stack.recover_and_compare("after");
}

#[test]
fn a_host_crashes_and_sends_what_may_differ() {
    let disk = full_or(1024, 64) * MIB;
    let (mut stack, _link) = stack(disk);
    // All regions are durable and quiet: from here on the writes count.
    stack.wait("no region is in doubt", |s| figure(s, "intent_bytes") == 0);
    let (range, written) = (disk / 8, disk / 64);
    ok(fio(&stack, range)
        .arg(format!("--io_size={written}"))
        .output());
    stack.reboot();
    let before = received(&stack);
    let since = Instant::now();
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    let took = since.elapsed();
    let (synced, came) = (figure(&stack, "synced_bytes"), received(&stack) - before);
    println!(
        "host crash, disk of {} MiB: {:.1} MiB written at random on {} MiB since the last clean point; \
         {:.1} MiB looked at, {:.1} MiB received, streaming {:.2} s after the boot",
        disk / MIB,
        mib(written),
        range / MIB,
        mib(synced),
        mib(came),
        took.as_secs_f64()
    );
    assert!(synced <= range, "{synced} bytes were synced");
    stack.recover_and_compare("after");
}
