//! Figures of the recovery from a broken link and from a crashed host, measured on real processes. In a
//! test run they are small and only have to hold; `make figures` prints them at the size of
//! `docs/reliability-figures.md`.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::link::Link;
use support::{Numbers, Stack, client, ok, seed};

const MIB: u64 = 1 << 20;

/// Rows of the table: figure, value, what it stands beside, their ratio; on the console, and in the file
/// that `JETDR_FIGURES_TABLE` names.
fn note(rows: &[[String; 4]]) {
    let mut text = String::new();
    for [figure, value, beside, ratio] in rows {
        text += &format!("| {figure} | {value} | {beside} | {ratio} |\n");
    }
    print!("{text}");
    if let Some(path) = std::env::var_os("JETDR_FIGURES_TABLE") {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path);
        file.unwrap().write_all(text.as_bytes()).unwrap();
    }
}

/// What of a sync was sent, beside what had been written.
fn ratio(sent: u64, written: u64) -> String {
    format!("{:.1}", sent as f64 / written as f64)
}

/// A size for `make figures`, another one for a test run.
fn full_or(full: u64, short: u64) -> u64 {
    if std::env::var_os("JETDR_FIGURES").is_some() {
        full
    } else {
        short
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / MIB as f64)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
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

/// fio that writes blocks at random places of the first `range` bytes.
fn fio(stack: &Stack, range: u64, block: &str) -> Command {
    let mut fio = client("fio");
    fio.arg("--thread").current_dir(stack.dir.path());
    fio.args(["--name=f", "--ioengine=nbd", "--rw=randwrite"]);
    fio.arg(format!("--bs={block}"));
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
    let (rate, range) = (1000, full_or(128, 16) * MIB);
    let mut load = fio(&stack, range, "4k");
    load.args(["--time_based", "--runtime=600"]);
    let mut load = Load(load.arg(format!("--rate_iops={rate}")).spawn().unwrap());
    let before = figure(&stack, "published_seq");
    stack.wait("the load streams", |s| {
        figure(s, "published_seq") > before + 500
    });
    link.cut();
    let since = Instant::now();
    stack.wait("the disk tracks", |s| {
        s.vm_status()["disks"][0]["state"] == "tracking"
    });
    let tracking_after = since.elapsed();
    std::thread::sleep(away.saturating_sub(since.elapsed())); // time under test: the link is away
    let (dirty, received_before) = (figure(&stack, "dirty_bytes"), received(&stack));
    let synced_before = figure(&stack, "synced_bytes");
    link.heal();
    let since = Instant::now();
    stack.wait("the disk streams", |s| {
        s.vm_status()["disks"][0]["state"] == "streaming"
    });
    let streaming = since.elapsed();
    let came = received(&stack) - received_before;
    let synced = figure(&stack, "synced_bytes") - synced_before;
    assert!(
        load.0.try_wait().unwrap().is_none(),
        "the guest saw an error"
    );
    let deferred_ns = stack.vm_status()["host_deferred_max_ns"].as_u64().unwrap();
    let written = rate * away.as_secs() * 4096;
    let load_of = format!("{rate} random writes of 4 KiB/s on {}", mib(range));
    let row = |figure: &str, value: String, beside: String, ratio: String| {
        [
            format!("link cut, {load_of}: {figure}"),
            value,
            beside,
            ratio,
        ]
    };
    note(&[
        row(
            "tracking after",
            seconds(tracking_after),
            String::new(),
            String::new(),
        ),
        row(
            "dirty",
            mib(dirty),
            format!("{} written", mib(written)),
            ratio(dirty, written),
        ),
        row(
            "streaming again after",
            seconds(streaming),
            format!("{} away", seconds(away)),
            format!("{:.2}", streaming.as_secs_f64() / away.as_secs_f64()),
        ),
        row(
            "synced",
            mib(synced),
            format!("{} dirty", mib(dirty)),
            ratio(synced, dirty),
        ),
        row(
            "received until then",
            mib(came),
            String::new(),
            String::new(),
        ),
        row(
            "longest deferral",
            format!("{:.1} ms", deferred_ns as f64 / 1e6),
            "budget 5 ms".into(),
            String::new(),
        ),
    ]);
    print_pace(&stack);
    drop(load);
    stack.recover_and_compare("after");
}

/// What the syncs' pace was at their ends.
fn print_pace(stack: &Stack) {
    let log = std::fs::read_to_string(stack.log("vm")).unwrap_or_default();
    let ends = log
        .lines()
        .filter(|line| line.contains("its pace at the end"));
    ends.for_each(|line| println!("{line}"));
}

/// Writes, crashes, boots; what was sent again.
fn crash_after(stack: &mut Stack, what: &str, block: &str, range: u64, written: u64) {
    // All regions are durable and quiet: from here on the writes count.
    stack.wait("no region is in doubt", |s| figure(s, "intent_bytes") == 0);
    ok(fio(stack, range, block)
        .arg(format!("--io_size={written}"))
        .output());
    stack.reboot();
    let before = received(stack);
    let since = Instant::now();
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    let took = since.elapsed();
    let (sent, held) = (figure(stack, "synced_bytes"), figure(stack, "held_bytes"));
    let came = received(stack) - before;
    assert!(sent + held <= range, "{sent} and {held} bytes were synced");
    let row = |figure: &str, value: String, beside: String, ratio: String| {
        let name = format!("host crash, {what} on {}: {figure}", mib(range));
        [name, value, beside, ratio]
    };
    let beside = format!("{} written", mib(written));
    note(&[
        row(
            "looked at again",
            mib(sent + held),
            beside.clone(),
            ratio(sent + held, written),
        ),
        row(
            "sent again",
            mib(sent),
            beside.clone(),
            ratio(sent, written),
        ),
        row("received again", mib(came), beside, ratio(came, written)),
        row(
            "streaming after the boot",
            seconds(took),
            String::new(),
            String::new(),
        ),
    ]);
    print_pace(stack);
}

#[test]
fn a_host_crashes_and_sends_what_may_differ() {
    let disk = full_or(1024, 64) * MIB;
    let (mut stack, _link) = stack(disk);
    let (range, written) = (disk / 8, disk / 64);
    crash_after(&mut stack, "random writes of 4 KiB", "4k", range, written);
    stack.recover_and_compare("scattered");
    crash_after(&mut stack, "random writes of 1 MiB", "1m", range, written);
    stack.recover_and_compare("pieces");
}
