//! Stores and logs that fail, fill up, and come back.
#![allow(clippy::unwrap_used, missing_docs)]

mod scripted;

use filter_core::wire::PortRole;
use scripted::{
    DOMAIN, Disk, Drva, Link, Site, answer_cut, cut_now, next_request, refuse_cut, request_now,
};
use serde_json::json;
use std::net::TcpListener;
use std::time::Duration;

const DATA: PortRole = PortRole::Data(0);

/// A store that can be taken away, for root too: its folder becomes a file.
fn take_store_away(site: &Site) {
    let store = site.store().join(DOMAIN);
    if store.exists() {
        std::fs::rename(&store, site.dir.path().join("away")).unwrap();
    }
    std::fs::write(&store, "not a folder").unwrap();
}

fn bring_store_back(site: &Site) {
    let store = site.store().join(DOMAIN);
    std::fs::remove_file(&store).unwrap();
    let away = site.dir.path().join("away");
    if away.exists() {
        std::fs::rename(away, store).unwrap();
    }
}

fn begin(drva: &Drva, disk: &mut Disk) -> Link {
    let mut link = drva.connect(DATA);
    link.open(1, disk).unwrap();
    let records = disk.begin();
    link.records(1, &records);
    link.wait_durable(1, disk.seq);
    link
}

#[test]
fn a_store_that_is_away_delays_cuts_and_loses_nothing() {
    let site = Site::new(&["--cut-interval-ms", "50"]);
    let mut drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut disks = [Disk::new(1)];
    let mut link = begin(&drva, &mut disks[0]);
    cut_now(&drva, &mut control, &mut disks, "before");
    take_store_away(&site);
    for i in 0..30u64 {
        let record = disks[0].write(i * 4096, 4096, 3 + i as u8);
        link.records(1, &[record]);
    }
    // Durable all the same: the log has it.
    link.wait_durable(1, disks[0].seq);
    let epoch = next_request(&mut control);
    answer_cut(&mut control, &mut disks, epoch);
    drva.wait_until("alarmed", |status| {
        status["alarms"].to_string().contains("upload") && status["cuts_waiting"] == 1
    });
    // Across a restart, too.
    drva.kill();
    let mut drva = site.start();
    bring_store_back(&site);
    drva.wait_until("caught up", |status| {
        status["newest_cut"].is_object() && status["cuts_waiting"] == 0
    });
    drva.stop(Duration::from_secs(20));
    let (_, recovered) = site.recover();
    assert!(recovered[&disks[0].uuid] == disks[0].model.bytes, "differs");
}

/// A store that takes requests and never answers is the worst: what waits for it must not keep the
/// appliance from stopping. What was acknowledged is in the log.
#[test]
fn sigterm_does_not_wait_for_a_store_that_hangs() {
    let hole = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("endpoint=http://{}", hole.local_addr().unwrap());
    let mut site = Site::new(&[
        "--store-opt",
        &endpoint,
        "--store-opt",
        "allow_http=true",
        "--store-opt",
        "access_key_id=x",
        "--store-opt",
        "secret_access_key=x",
        "--store-opt",
        "region=x",
    ]);
    site.other_store = Some("s3://bucket/jetdr".into());
    let mut drva = site.start();
    let mut disk = Disk::new(1);
    let _link = begin(&drva, &mut disk);
    // The upload waits for an answer from here on.
    let (_request, _) = hole.accept().unwrap();
    drva.stop(Duration::from_secs(15));
    let mut drva = site.start();
    assert_eq!(drva.connect(DATA).open(1, &disk), Ok(2));
    drva.kill();
}

/// Log of two small segments, to fill it quickly.
const SMALL: [&str; 6] = [
    "--segment-bytes",
    "4194304",
    "--log-max-bytes",
    "12582912",
    "--cut-interval-ms",
    "50",
];

/// With the store away the log fills; then whoever looks is answered, a host that comes again gets its
/// lane, and when the store is back everything goes on by itself.
#[test]
fn a_full_log_keeps_answering_and_goes_on() {
    let site = Site::new(&SMALL);
    let mut drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut disks = [Disk::new(1)];
    let link = begin(&drva, &mut disks[0]);
    cut_now(&drva, &mut control, &mut disks, "before");
    take_store_away(&site);
    let records: Vec<_> = (0..600u64)
        .map(|i| disks[0].write(65536 * (i % 8), 65536, i as u8))
        .collect();
    let sender = {
        let mut link = Link {
            stream: link.stream.try_clone().unwrap(),
        };
        let records = records.clone();
        std::thread::spawn(move || {
            link.records(1, &records);
        })
    };
    let status = drva.wait_until("full", |status| status["log"]["full"] == json!(true));
    assert!(
        status["alarms"].to_string().contains("is full"),
        "{status:#}"
    );
    // The same host comes again over another connection while the first one is stuck.
    let mut again = drva.connect(DATA);
    let durable = again.open(1, &disks[0]).unwrap();
    assert!(durable > 0 && durable < disks[0].seq);
    bring_store_back(&site);
    let rest: Vec<_> = records
        .into_iter()
        .filter(|record| record.header.seq > durable)
        .collect();
    again.records(1, &rest);
    again.wait_durable(1, disks[0].seq);
    sender.join().unwrap();
    cut_now(&drva, &mut control, &mut disks, "after");
    drva.stop(Duration::from_secs(20));
    let (_, recovered) = site.recover();
    assert!(recovered[&disks[0].uuid] == disks[0].model.bytes, "differs");
}

/// A guest that writes one place for ever fills no part, and without cuts no part is finished by one: the
/// log must not stay full for that.
#[test]
fn without_cuts_the_log_does_not_stay_full() {
    let site = Site::new(&SMALL);
    let drva = site.start();
    let mut disks = [Disk::new(1)];
    let mut link = begin(&drva, &mut disks[0]);
    let records: Vec<_> = (0..900u64)
        .map(|i| disks[0].write(0, 65536, i as u8))
        .collect();
    let mut sender = Link {
        stream: link.stream.try_clone().unwrap(),
    };
    let sender = std::thread::spawn(move || sender.records(1, &records));
    link.wait_durable(1, disks[0].seq);
    sender.join().unwrap();
}

/// Records of the epoch of a cut that came to nothing belong to the next: they were held back, and the
/// next cut needs them.
#[test]
fn records_held_for_a_void_cut_go_into_the_next() {
    let site = Site::new(&["--cut-interval-ms", "20"]);
    let mut drva = site.start();
    let mut control = drva.connect(PortRole::Control);
    let mut disks = [Disk::new(1)];
    let mut link = begin(&drva, &mut disks[0]);
    let command = json!({"cmd": "cut", "domain": DOMAIN, "name": "wanted"});
    let answer = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| drva.ask(&command));
        let mut round = 0;
        while !waiter.is_finished() {
            let Some(epoch) = request_now(&mut control) else {
                std::thread::yield_now();
                continue;
            };
            round += 1;
            if round > 20 {
                answer_cut(&mut control, &mut disks, epoch);
                continue;
            }
            // The request is out: what the guest writes now is of the new epoch, and is held back.
            disks[0].cut_epoch = epoch;
            let record = disks[0].write(4096, 4096, round);
            link.records(1, &[record]);
            link.wait_durable(1, disks[0].seq);
            // As somebody waits for a cut, the next one is asked for at once.
            refuse_cut(&mut control, epoch);
        }
        waiter.join().unwrap()
    });
    assert!(answer["cut"].is_u64(), "{answer}");
    drva.stop(Duration::from_secs(20));
    let (_, recovered) = site.recover();
    assert!(recovered[&disks[0].uuid] == disks[0].model.bytes, "differs");
}
