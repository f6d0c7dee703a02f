//! Whatever is written, each cut gives back exactly the bytes that the disks had at it.
#![allow(clippy::unwrap_used)]

mod support;

use object_store::memory::InMemory;
use recovery_store::{Container, CutSelector, CutView, CutWriter, WriterOptions};
use std::collections::BTreeMap;
use std::sync::Arc;
use support::{Model, Random, commit, disk, domain, random_record, read_disk};
use uuid::Uuid;

fn options() -> WriterOptions {
    WriterOptions {
        // Small, so that a cut has several parts and a part several blocks.
        part_bytes: 64 << 10,
        block_bytes: 8 << 10,
        ..WriterOptions::default()
    }
}

/// Random records of several disks, random cuts, restarts in between with records fed again.
async fn one_history(seed: u64) {
    eprintln!("seed {seed}");
    let mut random = Random(seed);
    let store = Arc::new(InMemory::new());
    let mut infos: Vec<_> = (0..3)
        .map(|n| disk(n, (1 + n as u64) * (96 << 10)))
        .collect();
    let mut models: Vec<Model> = infos.iter().map(|i| Model::new(i.capacity_bytes)).collect();
    let mut history: Vec<Vec<support::Rec>> = vec![Vec::new(); infos.len()];
    let mut at_cut: BTreeMap<u64, Vec<Model>> = BTreeMap::new();

    let open = || {
        let store = store.clone();
        async move { CutWriter::open_store(store, "memory", &domain(), options()).await }
    };
    let mut writer = open().await.expect("opens");
    for info in &infos {
        writer.set_disk(info.clone()).expect("is new");
    }
    for _ in 0..400 {
        match random.below(40) {
            0 | 1 if history.iter().all(|records| !records.is_empty()) => {
                let cut = commit(&mut writer, None).await;
                at_cut.insert(cut, models.clone());
            }
            2 => {
                // A crash: what was not uploaded is fed again, and some of what was.
                writer.close().await;
                writer = open().await.expect("opens again");
                for info in &infos {
                    writer.set_disk(info.clone()).expect("is known");
                }
                let uploaded = writer.uploaded_positions();
                for (info, records) in infos.iter().zip(&history) {
                    let from = uploaded.get(&info.uuid).map_or(0, |p| p.seq as usize);
                    let from = from - random.below(from as u64 + 1) as usize;
                    support::feed(&mut writer, info.uuid, &records[from..]).await;
                }
            }
            3 => {
                let which = random.below(infos.len() as u64) as usize;
                infos[which].capacity_bytes += 4096;
                models[which]
                    .bytes
                    .resize(infos[which].capacity_bytes as usize, 0);
                writer.set_disk(infos[which].clone()).expect("grows");
            }
            _ => {
                let which = random.below(infos.len() as u64) as usize;
                let seq = history[which].len() as u64 + 1;
                let record = random_record(&mut random, seq, infos[which].capacity_bytes);
                models[which].apply(&record);
                let uuid = infos[which].uuid;
                writer
                    .apply(uuid, &record.as_ref())
                    .await
                    .expect("is taken");
                history[which].push(record);
            }
        }
    }
    writer.settle().await.expect("settles");
    check(store, &at_cut, seed).await;
}

async fn check(store: Arc<InMemory>, at_cut: &BTreeMap<u64, Vec<Model>>, seed: u64) {
    let container = Container::open_store(store, "memory").await.expect("opens");
    let cuts = container.cuts().await.expect("lists");
    assert_eq!(cuts.len(), at_cut.len(), "seed {seed}");
    check_cuts(&container, at_cut, seed).await;
    let report = container.verify(|_| {}).await.expect("reads");
    assert!(report.is_good(), "seed {seed}: {:?}", report.problems);
    assert_eq!(report.cuts as usize, at_cut.len());
}

async fn check_cuts(container: &Container, at_cut: &BTreeMap<u64, Vec<Model>>, seed: u64) {
    let mut followed: Option<CutView> = None;
    for (cut, models) in at_cut {
        let info = container
            .select(&CutSelector::Number(*cut))
            .await
            .expect("is there");
        let view = container
            .view(&info, None, |_, _| {})
            .await
            .expect("builds");
        // From the view of the cut before, the same.
        let next = match followed.take() {
            Some(before) => container.follow(before, &info).await.expect("follows"),
            None => container
                .view(&info, None, |_, _| {})
                .await
                .expect("builds"),
        };
        assert_eq!(next.sha256, view.sha256, "seed {seed}, cut {cut}");
        assert_eq!(next.parts.len(), view.parts.len());
        for (uuid, map) in &view.extents {
            let known = next.extents(*uuid).expect("has the disk");
            assert!(map.iter().eq(known.iter()), "seed {seed}, cut {cut}");
        }
        followed = Some(next);
        assert_eq!(info.disks.len(), models.len());
        for (number, model) in models.iter().enumerate() {
            let uuid = Uuid::from_u128(0x100 + number as u128);
            let disk = info
                .disks
                .iter()
                .find(|d| d.uuid == uuid)
                .expect("is in it");
            assert_eq!(
                disk.capacity_bytes as usize,
                model.bytes.len(),
                "seed {seed}"
            );
            let bytes = read_disk(container, &view, disk).await;
            assert!(
                bytes == model.bytes,
                "seed {seed}: cut {cut}, disk {number}"
            );
        }
    }
}

#[test]
fn every_cut_gives_back_what_the_disks_held() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("starts");
    // JETDR_SEED repeats one history.
    let seeds = match std::env::var("JETDR_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => (0..60).collect::<Vec<u64>>(),
    };
    for seed in seeds {
        runtime.block_on(one_history(seed));
    }
}

/// An hour of cuts, one a second: listing, finding, building and verifying stay quick.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_cuts_are_no_trouble() {
    let store = Arc::new(InMemory::new());
    let mut writer = CutWriter::open_store(store.clone(), "memory", &domain(), options())
        .await
        .expect("opens");
    let info = disk(0, 1 << 20);
    writer.set_disk(info.clone()).expect("is new");
    let mut model = Model::new(info.capacity_bytes);
    for seq in 1..=3600 {
        let record = support::write(seq, seq % 256 * 4096, 4096, seq as u8);
        model.apply(&record);
        support::feed(&mut writer, info.uuid, &[record]).await;
        commit(&mut writer, None).await;
    }
    let at_cut = [(3600, vec![model])].into();
    let container = Container::open_store(store, "memory").await.expect("opens");
    assert_eq!(container.cuts().await.expect("lists").len(), 3600);
    check_cuts(&container, &at_cut, 0).await;
    let report = container.verify(|_| {}).await.expect("reads");
    assert!(report.is_good() && report.cuts == 3600, "{report:?}");
}
