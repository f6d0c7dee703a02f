//! The writer's rules: what it takes, what it refuses, and what it does when the store fails.
#![allow(clippy::unwrap_used)]

mod support;

use filter_core::record::RecordKind;
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};
use recovery_store::{
    Alarm, Container, CutMeta, CutSelector, CutWriter, Fed, RetryPolicy, StoreError, StoreUrl,
    WriterOptions,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::flaky::{Fault, Flaky};
use support::{
    Model, commit, disk, domain, feed, read_disk, rec, stream_base, sync_begin, sync_end, write,
};

fn options() -> WriterOptions {
    WriterOptions {
        part_bytes: 64 << 10,
        block_bytes: 16 << 10,
        retry: RetryPolicy {
            max_attempts: 4,
            first_wait: Duration::from_millis(1),
            max_wait: Duration::from_millis(2),
        },
        ..WriterOptions::default()
    }
}

async fn writer_on(store: Arc<dyn ObjectStore>) -> CutWriter {
    let mut writer = CutWriter::open_store(store, "test", &domain(), options())
        .await
        .expect("opens");
    writer.set_disk(disk(1, 1 << 20)).expect("is taken");
    writer
}

/// A write that does not compress, so that a part fills up.
fn noise(seq: u64, offset_bytes: u64, len: u32) -> support::Rec {
    let mut record = write(seq, offset_bytes, len, 1);
    let mut random = support::Random(seq);
    record.payload.fill_with(|| random.next() as u8);
    record
}

#[tokio::test]
async fn records_come_in_order_and_only_once() {
    let mut writer = writer_on(Arc::new(InMemory::new())).await;
    let uuid = disk(1, 0).uuid;
    assert_eq!(
        writer.feed(uuid, &write(1, 0, 512, 1).as_ref()).unwrap(),
        Fed::Taken
    );
    assert_eq!(
        writer.feed(uuid, &write(1, 0, 512, 9).as_ref()).unwrap(),
        Fed::Old
    );
    let gap = writer.feed(uuid, &write(3, 0, 512, 1).as_ref());
    assert!(
        matches!(
            gap,
            Err(StoreError::SeqGap {
                expected: 2,
                got: 3,
                ..
            })
        ),
        "{gap:?}"
    );
    let unknown = writer.feed(uuid::Uuid::nil(), &write(1, 0, 512, 1).as_ref());
    assert!(
        matches!(unknown, Err(StoreError::UnknownDisk(_))),
        "{unknown:?}"
    );

    let mut newer = write(2, 0, 512, 1);
    newer.header.attach_epoch = 5;
    writer.feed(uuid, &newer.as_ref()).expect("a newer owner");
    let stale = writer.feed(uuid, &write(3, 0, 512, 1).as_ref());
    assert!(
        matches!(
            stale,
            Err(StoreError::StaleEpoch {
                got: 1,
                have: 5,
                ..
            })
        ),
        "{stale:?}"
    );

    // A fresh lane may jump forward, and only with its marker.
    let mut base = stream_base(100);
    base.header.attach_epoch = 6;
    writer.feed(uuid, &base.as_ref()).expect("jumps");
    assert_eq!(writer.fed_positions()[&uuid].seq, 100);
}

#[tokio::test]
async fn a_cut_closes_only_over_what_was_fed() {
    let mut writer = writer_on(Arc::new(InMemory::new())).await;
    let uuid = disk(1, 0).uuid;
    let refuses = async |writer: &mut CutWriter, seq: Option<u64>, why: &str| {
        let meta = CutMeta {
            positions: seq.map(|seq| (uuid, seq)).into_iter().collect(),
            ..CutMeta::default()
        };
        let error = writer.commit(meta).await.expect_err("refused");
        assert!(error.to_string().contains(why), "{error}");
    };
    refuses(&mut writer, Some(0), "no content").await;
    feed(
        &mut writer,
        uuid,
        &[write(1, 0, 512, 1), write(2, 0, 512, 2)],
    )
    .await;
    refuses(&mut writer, Some(1), "wants 1").await;
    refuses(&mut writer, Some(3), "wants 3").await;
    refuses(&mut writer, None, "no position").await;
    feed(&mut writer, uuid, &[sync_begin(3)]).await;
    refuses(&mut writer, Some(3), "sync").await;
    feed(&mut writer, uuid, &[sync_end(4)]).await;
    // A refusal changed nothing.
    assert_eq!(commit(&mut writer, None).await, 1);
    // A disk that has no content yet does not hold up the others; one that left neither.
    writer.set_disk(disk(2, 4096)).expect("is new");
    assert_eq!(commit(&mut writer, None).await, 2);
    feed(&mut writer, disk(2, 0).uuid, &[write(1, 0, 512, 1)]).await;
    refuses(&mut writer, Some(4), "no position").await;
    writer.remove_disk(disk(2, 0).uuid);
    assert_eq!(commit(&mut writer, None).await, 3);
}

#[tokio::test]
async fn a_capacity_only_grows() {
    let store = Arc::new(InMemory::new());
    let mut writer = writer_on(store.clone()).await;
    let uuid = disk(1, 0).uuid;
    let error = writer.set_disk(disk(1, 512)).expect_err("shrinks");
    assert!(error.to_string().contains("shrink"), "{error}");
    feed(&mut writer, uuid, &[write(1, 0, 512, 1)]).await;
    commit(&mut writer, None).await;
    writer.set_disk(disk(1, 2 << 20)).expect("grows");
    feed(&mut writer, uuid, &[write(2, (2 << 20) - 512, 512, 7)]).await;
    commit(&mut writer, None).await;
    // A record beyond the known end: the disk has grown before its description came.
    feed(&mut writer, uuid, &[write(3, 2 << 20, 512, 8)]).await;
    commit(&mut writer, None).await;

    let container = Container::open_store(store, "test").await.expect("opens");
    for (cut, capacity) in [(1, 1 << 20), (2, 2 << 20), (3, (2 << 20) + 512)] {
        let info = container
            .select(&CutSelector::Number(cut))
            .await
            .expect("is there");
        assert_eq!(info.disks[0].capacity_bytes, capacity);
        let view = container
            .view(&info, None, |_, _| {})
            .await
            .expect("builds");
        let bytes = read_disk(&container, &view, &info.disks[0]).await;
        assert_eq!(bytes.last(), Some(&[0, 0, 7, 8][cut as usize]));
    }
}

#[tokio::test]
async fn only_what_survives_is_stored() {
    let store = Arc::new(InMemory::new());
    let mut writer = writer_on(store).await;
    let uuid = disk(1, 0).uuid;
    for seq in 1..=2000 {
        feed(&mut writer, uuid, &[noise(seq, (seq % 4) * 4096, 4096)]).await;
    }
    // Zeros, as data, as ZERO and as UNMAP, cost no data.
    let zeros = rec(2001, RecordKind::Write, 64 << 10, 65536, vec![0; 65536]);
    feed(
        &mut writer,
        uuid,
        &[
            zeros,
            rec(2002, RecordKind::Unmap, 1 << 19, 1 << 18, Vec::new()),
        ],
    )
    .await;
    commit(&mut writer, None).await;
    let stats = writer.stats();
    assert_eq!(stats.fed_bytes, 2000 * 4096 + 65536);
    assert_eq!(stats.raw_bytes, 4 * 4096, "{stats:?}");
    assert_eq!(stats.parts, 1, "{stats:?}");
    assert!(stats.stored_bytes < 4 * 4096 + 2048, "{stats:?}");
}

#[tokio::test]
async fn a_restart_goes_on_after_the_uploaded_parts() {
    let store = Arc::new(InMemory::new());
    let uuid = disk(1, 0).uuid;
    let mut model = Model::new(1 << 20);
    let mut records = vec![sync_begin(1)];
    records.extend((2..=8).map(|seq| noise(seq, (seq % 5) * 32768, 32768)));
    for record in &records {
        model.apply(record);
    }

    let mut writer = writer_on(store.clone()).await;
    feed(&mut writer, uuid, &records).await;
    writer.close().await;

    // Parts without a commit are there, but no cut is.
    let container = Container::open_store(store.clone(), "test")
        .await
        .expect("opens");
    assert!(container.cuts().await.expect("lists").is_empty());
    let error = container
        .select(&CutSelector::Latest)
        .await
        .expect_err("no cut");
    assert!(error.to_string().contains("no cut yet"), "{error}");
    let report = container.verify(|_| {}).await.expect("reads");
    assert!(report.is_good() && report.open_parts >= 3, "{report:?}");

    let mut writer = writer_on(store.clone()).await;
    let position = writer.uploaded_positions()[&uuid];
    assert!(position.seq >= 5 && position.seq < 8, "{position:?}");
    assert!(position.sync_open, "the sync is still under way");
    assert_eq!(writer.fed_positions()[&uuid], position);
    feed(&mut writer, uuid, &records).await;
    feed(&mut writer, uuid, &[sync_end(9)]).await;
    assert_eq!(commit(&mut writer, Some("after")).await, 1);
    assert!(!writer.uploaded_positions()[&uuid].sync_open);
    writer.close().await;

    let mut writer = writer_on(store.clone()).await;
    assert_eq!(writer.open_cut(), 2);
    assert!(!writer.has_changes());
    feed(&mut writer, uuid, &[write(10, 0, 512, 3)]).await;
    assert_eq!(commit(&mut writer, None).await, 2);

    let report = container.verify(|_| {}).await.expect("reads");
    assert!(report.is_good(), "{:?}", report.problems);
    let cut = container
        .select(&CutSelector::Name("after".into()))
        .await
        .expect("is there");
    let view = container.view(&cut, None, |_, _| {}).await.expect("builds");
    let bytes = read_disk(&container, &view, &cut.disks[0]).await;
    assert!(bytes == model.bytes);
}

#[tokio::test]
async fn a_store_that_fails_now_and_then_is_tried_again() {
    let store = Arc::new(Flaky::default());
    let alarms: Arc<Mutex<Vec<Alarm>>> = Arc::default();
    let heard = alarms.clone();
    let mut with_alarm = options();
    with_alarm.alarm = Some(Arc::new(move |alarm| {
        heard.lock().unwrap().push(alarm.clone());
    }));
    let mut writer = CutWriter::open_store(store.clone(), "test", &domain(), with_alarm)
        .await
        .expect("opens");
    writer.set_disk(disk(1, 1 << 20)).expect("is new");
    let uuid = disk(1, 0).uuid;
    store.plan([Fault::Busy, Fault::Busy, Fault::AnswerLost]);
    feed(&mut writer, uuid, &[write(1, 0, 4096, 1)]).await;
    assert_eq!(commit(&mut writer, None).await, 1);
    let told = std::mem::take(&mut *alarms.lock().unwrap());
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told.iter().all(|alarm| alarm.next_try.is_some()));

    // For good: the writer gives up, says so, and takes nothing more.
    store.plan([Fault::Busy; 4]);
    feed(&mut writer, uuid, &[write(2, 0, 4096, 2)]).await;
    let meta = |seq| CutMeta {
        positions: [(uuid, seq)].into(),
        ..CutMeta::default()
    };
    let error = writer.commit(meta(2)).await.expect_err("gives up");
    assert!(
        matches!(error, StoreError::Upload { attempts: 4, .. }),
        "{error}"
    );
    assert!(alarms.lock().unwrap().last().unwrap().next_try.is_none());
    let error = writer
        .feed(uuid, &write(3, 0, 512, 1).as_ref())
        .expect_err("stopped");
    assert!(matches!(error, StoreError::Poisoned(_)), "{error}");
    assert_eq!(
        writer.uploaded_positions()[&uuid].seq,
        1,
        "what failed is not uploaded"
    );
    writer.close().await;

    // Refused: no use in trying again.
    let mut writer = writer_on(store.clone()).await;
    store.plan([Fault::Denied]);
    feed(&mut writer, uuid, &[write(2, 0, 4096, 2)]).await;
    let error = writer.commit(meta(2)).await.expect_err("refused");
    assert!(
        matches!(error, StoreError::Upload { attempts: 1, .. }),
        "{error}"
    );
    writer.close().await;

    let mut writer = writer_on(store.clone()).await;
    feed(&mut writer, uuid, &[write(2, 0, 4096, 2)]).await;
    assert_eq!(commit(&mut writer, None).await, 2);
    let container = Container::open_store(store, "test").await.expect("opens");
    assert!(container.verify(|_| {}).await.expect("reads").is_good());
}

#[tokio::test]
async fn two_writers_do_not_overwrite_each_other() {
    let store = Arc::new(InMemory::new());
    let uuid = disk(1, 0).uuid;
    let mut first = writer_on(store.clone()).await;
    let mut second = writer_on(store.clone()).await;
    feed(&mut first, uuid, &[write(1, 0, 512, 1)]).await;
    feed(&mut second, uuid, &[write(1, 0, 512, 2)]).await;
    commit(&mut first, None).await;
    let meta = CutMeta {
        positions: [(uuid, 1)].into(),
        ..CutMeta::default()
    };
    let error = second.commit(meta).await.expect_err("conflict");
    let StoreError::Conflict {
        object,
        ours,
        theirs,
    } = &error
    else {
        panic!("{error}");
    };
    assert!(object.ends_with("-00000001.jds"));
    assert_ne!(ours, theirs);
    let container = Container::open_store(store, "test").await.expect("opens");
    let cut = container
        .select(&CutSelector::Latest)
        .await
        .expect("is there");
    let view = container.view(&cut, None, |_, _| {}).await.expect("builds");
    let bytes = read_disk(&container, &view, &cut.disks[0]).await;
    assert_eq!(bytes[0], 1, "the first writer's bytes stand");
}

#[tokio::test]
async fn a_store_that_cannot_be_written_is_a_clear_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("file");
    std::fs::write(&file, "not a folder").unwrap();
    let below = file.join("container");
    for place in [&file, &below] {
        let url = StoreUrl::parse(place.to_str().unwrap(), &[]).expect("parses");
        let error = CutWriter::open(&url, &domain(), options())
            .await
            .map(|_| ())
            .expect_err("cannot be written");
        let text = error.to_string();
        assert!(text.contains(place.to_str().unwrap()), "{text}");
    }
    // A name is taken by something that cannot be replaced.
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("domain.json")).unwrap();
    let url = StoreUrl::parse(root.to_str().unwrap(), &[]).expect("parses");
    let error = CutWriter::open(&url, &domain(), options())
        .await
        .map(|_| ())
        .expect_err("domain.json is a folder");
    assert!(error.to_string().contains("domain.json"), "{error}");
}

#[tokio::test]
async fn a_store_that_goes_away_does_not_harm_what_is_there() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path().join("container");
    let url = StoreUrl::parse(root.to_str().unwrap(), &[]).expect("parses");
    let mut writer = CutWriter::open(&url, &domain(), options())
        .await
        .expect("opens");
    writer.set_disk(disk(1, 1 << 20)).expect("is new");
    let uuid = disk(1, 0).uuid;
    feed(&mut writer, uuid, &[write(1, 0, 512, 1)]).await;
    commit(&mut writer, None).await;
    // The folder of the parts becomes a file.
    let cuts = root.join("t/0000000001/cuts");
    std::fs::rename(&cuts, root.join("aside")).unwrap();
    std::fs::write(&cuts, "").unwrap();
    feed(&mut writer, uuid, &[write(2, 0, 512, 2)]).await;
    let meta = CutMeta {
        positions: [(uuid, 2)].into(),
        ..CutMeta::default()
    };
    let error = writer.commit(meta).await.expect_err("cannot be written");
    assert!(matches!(error, StoreError::Upload { .. }), "{error}");
    assert_eq!(writer.uploaded_positions()[&uuid].seq, 1);
    writer.close().await;
    std::fs::remove_file(&cuts).unwrap();
    std::fs::rename(root.join("aside"), &cuts).unwrap();
    let mut writer = CutWriter::open(&url, &domain(), options())
        .await
        .expect("opens");
    feed(&mut writer, uuid, &[write(2, 0, 512, 2)]).await;
    assert_eq!(commit(&mut writer, None).await, 2);
    let container = Container::open(&url).await.expect("opens");
    assert!(container.verify(|_| {}).await.expect("reads").is_good());
}

#[tokio::test]
async fn nothing_is_ever_overwritten() {
    let store = Arc::new(InMemory::new());
    let mut writer = writer_on(store.clone()).await;
    let uuid = disk(1, 0).uuid;
    feed(&mut writer, uuid, &[write(1, 0, 512, 1)]).await;
    let path =
        object_store::path::Path::from("t/0000000001/cuts/00000000000000000001-00000001.jds");
    store.put(&path, "something else".into()).await.unwrap();
    let meta = CutMeta {
        positions: [(uuid, 1)].into(),
        ..CutMeta::default()
    };
    let error = writer.commit(meta).await.expect_err("conflict");
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    let bytes = store.get(&path).await.unwrap().bytes().await.unwrap();
    assert_eq!(&bytes[..], b"something else");
}

/// A caller who stops waiting for a commit does not know whether the cut is there: nor does the writer.
#[tokio::test]
async fn a_commit_that_was_not_awaited_ends_the_writer() {
    let store = Arc::new(Flaky::default());
    let mut slow = options();
    slow.retry.first_wait = Duration::from_secs(3600);
    slow.retry.max_wait = slow.retry.first_wait;
    let mut writer = CutWriter::open_store(store.clone(), "test", &domain(), slow)
        .await
        .expect("opens");
    writer.set_disk(disk(1, 1 << 20)).expect("is new");
    let uuid = disk(1, 0).uuid;
    feed(&mut writer, uuid, &[write(1, 0, 512, 1)]).await;
    store.plan([Fault::Busy]);
    let meta = CutMeta {
        positions: [(uuid, 1)].into(),
        ..CutMeta::default()
    };
    let commit_it = writer.commit(meta);
    let waited = tokio::time::timeout(Duration::from_millis(50), commit_it).await;
    assert!(waited.is_err(), "the store does not answer for an hour");
    let error = writer
        .feed(uuid, &write(2, 0, 512, 1).as_ref())
        .expect_err("stopped");
    assert!(matches!(error, StoreError::Poisoned(_)), "{error}");
    drop(writer);
    let mut writer = writer_on(store).await;
    feed(&mut writer, uuid, &[write(1, 0, 512, 1)]).await;
    assert_eq!(commit(&mut writer, None).await, 1);
}
