//! The container in Azure Blob, by its emulator: the same promises as in a folder.
#![allow(clippy::unwrap_used)]

#[path = "support/azurite.rs"]
mod azurite;
mod support;

use azurite::Azurite;
use recovery_store::{
    Container, CutMeta, CutSelector, CutWriter, RetryPolicy, StoreError, StoreUrl, WriterOptions,
};
use std::time::Duration;
use support::{Model, Random, commit, disk, domain, feed, random_record, read_disk};

fn options() -> WriterOptions {
    WriterOptions {
        part_bytes: 64 << 10,
        block_bytes: 16 << 10,
        retry: RetryPolicy {
            max_attempts: 2,
            first_wait: Duration::from_millis(1),
            max_wait: Duration::from_millis(1),
        },
        ..WriterOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_in_azure_blob_keeps_its_promises() {
    let azurite = Azurite::start();
    let url =
        StoreUrl::parse(&format!("{}/some/prefix", azurite.container("box")), &[]).expect("parses");
    let mut random = Random(7);
    let info = disk(1, 1 << 20);
    let mut model = Model::new(info.capacity_bytes);
    let mut at_cut = Vec::new();

    let mut seq = 0;
    for _ in 0..3 {
        // A restart before each cut.
        let mut writer = CutWriter::open(&url, &domain(), options())
            .await
            .expect("opens");
        writer.set_disk(info.clone()).expect("is known");
        for _ in 0..40 {
            seq += 1;
            let record = random_record(&mut random, seq, info.capacity_bytes);
            model.apply(&record);
            feed(&mut writer, info.uuid, &[record]).await;
        }
        commit(&mut writer, None).await;
        at_cut.push(model.clone());
        writer.close().await;
    }

    let container = Container::open(&url).await.expect("opens");
    let report = container.verify(|_| {}).await.expect("reads");
    assert!(report.is_good(), "{:?}", report.problems);
    assert!(report.objects > 3, "{report:?}");
    for (number, model) in (1..).zip(&at_cut) {
        let cut = container
            .select(&CutSelector::Number(number))
            .await
            .expect("is there");
        let view = container.view(&cut, None, |_, _| {}).await.expect("builds");
        let bytes = read_disk(&container, &view, &info).await;
        assert!(bytes == model.bytes, "cut {number}");
    }

    // Two writers: the second one's part is refused, as it would replace the first one's.
    let open = async || {
        let mut writer = CutWriter::open(&url, &domain(), options())
            .await
            .expect("opens");
        writer.set_disk(info.clone()).expect("is known");
        writer
    };
    let (mut first, mut second) = (open().await, open().await);
    feed(&mut first, info.uuid, &[support::write(seq + 1, 0, 512, 1)]).await;
    feed(
        &mut second,
        info.uuid,
        &[support::write(seq + 1, 0, 512, 2)],
    )
    .await;
    commit(&mut first, None).await;
    let meta = CutMeta {
        positions: [(info.uuid, seq + 1)].into(),
        ..CutMeta::default()
    };
    let error = second.commit(meta).await.expect_err("conflict");
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");

    // A blob container that is not there, and a store that is not there.
    let missing = StoreUrl::parse(
        &format!(
            "azure+http://127.0.0.1:{}/devstoreaccount1/nowhere",
            azurite.port
        ),
        &[],
    )
    .expect("parses");
    let error = CutWriter::open(&missing, &domain(), options())
        .await
        .map(|_| ())
        .expect_err("is not there");
    assert!(error.to_string().contains("nowhere"), "{error}");
    drop(azurite);
    let error = container.cuts().await.map(|_| ()).expect_err("is gone");
    assert!(matches!(error, StoreError::Store { .. }), "{error}");
}
