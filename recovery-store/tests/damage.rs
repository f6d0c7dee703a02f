//! Whatever is done to the objects of a container is noticed, and the object is named.
#![allow(clippy::unwrap_used)]

mod support;

use recovery_store::{
    Container, CutSelector, CutWriter, StoreError, StoreUrl, VerifyReport, WriterOptions,
};
use std::path::{Path, PathBuf};
use support::{commit, disk, domain, feed, write};

fn part(dir: &Path, cut: u64, part: u32) -> PathBuf {
    dir.join(format!("t/0000000001/cuts/{cut:020}-{part:08}.jds"))
}

fn options() -> WriterOptions {
    WriterOptions {
        part_bytes: 64 << 10,
        block_bytes: 16 << 10,
        ..WriterOptions::default()
    }
}

/// Five cuts of one disk in a folder; the third has three parts or more.
async fn fill(dir: &Path) {
    let url = StoreUrl::parse(dir.to_str().unwrap(), &[]).expect("parses");
    let mut writer = CutWriter::open(&url, &domain(), options())
        .await
        .expect("opens");
    let disk = disk(1, 1 << 20);
    writer.set_disk(disk.clone()).expect("is new");
    let mut seq = 1;
    for cut in 1..=5u64 {
        let writes = if cut == 3 { 10 } else { 1 };
        for n in 0..writes {
            let mut record = write(seq, n * 32768, 32768, cut as u8);
            // Not compressible to nothing, so that there are data bytes to damage.
            let mut random = support::Random(seq);
            record.payload.fill_with(|| random.next() as u8);
            feed(&mut writer, disk.uuid, &[record]).await;
            seq += 1;
        }
        commit(&mut writer, (cut == 4).then_some("four")).await;
    }
    writer.close().await;
}

async fn open(dir: &Path) -> Container {
    let url = StoreUrl::parse(dir.to_str().unwrap(), &[]).expect("parses");
    Container::open(&url).await.expect("opens")
}

/// Damages a fresh container and verifies it.
async fn verify_after(damage: impl FnOnce(&Path)) -> (VerifyReport, Result<(), StoreError>) {
    let dir = tempfile::tempdir().expect("a folder");
    fill(dir.path()).await;
    assert!(
        part(dir.path(), 3, 3).exists(),
        "the third cut has three parts"
    );
    damage(dir.path());
    let container = open(dir.path()).await;
    let report = container.verify(|_| {}).await.expect("reads");
    let cut = container.select(&CutSelector::Number(4)).await;
    let view = match cut {
        Ok(cut) => container.view(&cut, None, |_, _| {}).await.map(|_| ()),
        Err(error) => Err(error),
    };
    (report, view)
}

fn expect_problem(report: &VerifyReport, object: &Path, what: &str) {
    let name = object.file_name().unwrap().to_str().unwrap();
    let found = report
        .problems
        .iter()
        .any(|problem| problem.object.ends_with(name) && problem.what.contains(what));
    assert!(found, "{name}: {what}: {:#?}", report.problems);
}

#[tokio::test]
async fn an_undamaged_container_is_good() {
    let (report, view) = verify_after(|dir| {
        // What an interrupted upload to a folder leaves behind is not an object.
        let mut name = part(dir, 6, 1).into_os_string();
        name.push("#1");
        std::fs::write(name, "half").unwrap();
    })
    .await;
    assert!(report.is_good(), "{:?}", report.problems);
    assert_eq!(report.cuts, 5);
    assert_eq!(report.open_parts, 0);
    view.expect("builds");
}

#[tokio::test]
async fn each_kind_of_damage_is_named() {
    // A part in the middle of a cut is missing.
    let (report, view) = verify_after(|dir| std::fs::remove_file(part(dir, 3, 2)).unwrap()).await;
    expect_problem(&report, &part(Path::new(""), 3, 2), "missing");
    assert_eq!(report.problem_count, 1, "{:#?}", report.problems);
    assert!(matches!(view, Err(StoreError::Missing { .. })), "{view:?}");

    // A whole cut is missing.
    let (report, view) = verify_after(|dir| std::fs::remove_file(part(dir, 2, 1)).unwrap()).await;
    expect_problem(&report, &part(Path::new(""), 2, 1), "missing");
    assert!(matches!(view, Err(StoreError::Missing { .. })), "{view:?}");

    // The part that commits a cut is missing.
    let mut last = 0;
    let (report, view) = verify_after(|dir| {
        last = (1..)
            .take_while(|n| part(dir, 3, *n).exists())
            .last()
            .unwrap();
        std::fs::remove_file(part(dir, 3, last)).unwrap();
    })
    .await;
    expect_problem(&report, &part(Path::new(""), 3, last), "missing");
    assert!(view.is_err(), "{view:?}");

    // Two objects are swapped.
    let (report, view) = verify_after(|dir| {
        std::fs::rename(part(dir, 1, 1), dir.join("x")).unwrap();
        std::fs::rename(part(dir, 2, 1), part(dir, 1, 1)).unwrap();
        std::fs::rename(dir.join("x"), part(dir, 2, 1)).unwrap();
    })
    .await;
    expect_problem(&report, &part(Path::new(""), 1, 1), "swapped or replayed");
    expect_problem(&report, &part(Path::new(""), 2, 1), "swapped or replayed");
    assert!(matches!(view, Err(StoreError::Identity { .. })), "{view:?}");

    // An old object is played again under a new name.
    let (report, _) = verify_after(|dir| {
        std::fs::copy(part(dir, 1, 1), part(dir, 4, 1)).unwrap();
    })
    .await;
    expect_problem(&report, &part(Path::new(""), 4, 1), "swapped or replayed");

    // The newest object is torn.
    let (report, _) = verify_after(|dir| {
        let bytes = std::fs::read(part(dir, 5, 1)).unwrap();
        std::fs::write(part(dir, 5, 1), &bytes[..bytes.len() / 2]).unwrap();
    })
    .await;
    expect_problem(&report, &part(Path::new(""), 5, 1), "footer");

    // The start of the chain is missing, or another.
    let timeline = |dir: &Path| dir.join("t/0000000001/timeline.json");
    let (report, view) = verify_after(|dir| std::fs::remove_file(timeline(dir)).unwrap()).await;
    expect_problem(&report, Path::new("timeline.json"), "missing");
    assert!(matches!(view, Err(StoreError::Missing { .. })), "{view:?}");
    let (report, view) = verify_after(|dir| {
        let text = std::fs::read_to_string(timeline(dir)).unwrap();
        std::fs::write(timeline(dir), text.replace("drva", "me")).unwrap();
    })
    .await;
    expect_problem(&report, &part(Path::new(""), 1, 1), "predecessor");
    assert!(matches!(view, Err(StoreError::Chain { .. })), "{view:?}");

    // A timeline that this version does not know.
    let (report, _) = verify_after(|dir| {
        std::fs::create_dir_all(dir.join("t/0000000002")).unwrap();
        std::fs::copy(timeline(dir), dir.join("t/0000000002/timeline.json")).unwrap();
    })
    .await;
    expect_problem(&report, Path::new("timeline.json"), "not verified");

    // A stranger is among them.
    let (report, _) = verify_after(|dir| {
        std::fs::write(dir.join("t/0000000001/cuts/notes.txt"), "hi").unwrap();
    })
    .await;
    expect_problem(&report, Path::new("notes.txt"), "not a part");
}

/// The same names and numbers from another history of the same domain: only the chain can tell.
#[tokio::test]
async fn an_object_of_another_history_breaks_the_chain() {
    let other = tempfile::tempdir().expect("a folder");
    fill(other.path()).await;
    let (report, view) = verify_after(|dir| {
        std::fs::copy(part(other.path(), 2, 1), part(dir, 2, 1)).unwrap();
    })
    .await;
    expect_problem(&report, &part(Path::new(""), 2, 1), "predecessor");
    expect_problem(&report, &part(Path::new(""), 3, 1), "predecessor");
    assert!(matches!(view, Err(StoreError::Chain { .. })), "{view:?}");
}

/// Every byte counts: each flipped bit of a part is found.
#[tokio::test]
async fn every_flipped_bit_is_found() {
    let dir = tempfile::tempdir().expect("a folder");
    fill(dir.path()).await;
    let path = part(dir.path(), 2, 1);
    let good = std::fs::read(&path).unwrap();
    let container = open(dir.path()).await;
    // All of header, index and footer; samples of the data.
    let data_end = good.len() - 400;
    let places = (0..128)
        .chain((128..data_end).step_by(997))
        .chain(data_end..good.len());
    for at in places {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).unwrap();
        let report = container.verify(|_| {}).await.expect("reads");
        let name = path.file_name().unwrap().to_str().unwrap();
        let named = report.problems.iter().any(|p| p.object.contains(name));
        assert!(named, "byte {at} of {}: {:?}", good.len(), report.problems);
    }
}

#[tokio::test]
async fn the_list_shows_damaged_cuts_and_the_rest() {
    let dir = tempfile::tempdir().expect("a folder");
    fill(dir.path()).await;
    std::fs::remove_file(part(dir.path(), 2, 1)).unwrap();
    std::fs::remove_file(part(dir.path(), 3, 1)).unwrap();
    std::fs::write(part(dir.path(), 5, 1), "rubbish").unwrap();
    let container = open(dir.path()).await;
    let cuts = container.cuts().await.expect("lists");
    let good: Vec<u64> = cuts
        .iter()
        .filter(|c| c.state.is_ok())
        .map(|c| c.cut)
        .collect();
    assert_eq!(good, [1, 4]);
    assert_eq!(cuts.len(), 5);
    let named = container
        .select(&CutSelector::Name("four".into()))
        .await
        .expect("is found");
    assert_eq!(named.cut, 4);
    let error = container
        .select(&CutSelector::Latest)
        .await
        .expect_err("damaged");
    assert!(error.to_string().contains('5'), "{error}");
    let error = container
        .select(&CutSelector::Number(77))
        .await
        .expect_err("is not there");
    assert!(error.to_string().contains("77"), "{error}");
}

#[tokio::test]
async fn other_containers_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let url = StoreUrl::parse(dir.path().to_str().unwrap(), &[]).expect("parses");
    let error = Container::open(&url).await.map(|_| ()).expect_err("empty");
    assert!(matches!(error, StoreError::NoContainer { .. }), "{error}");

    std::fs::write(dir.path().join("domain.json"), "{\"format\":\"other\"}").unwrap();
    for error in [
        Container::open(&url).await.map(|_| ()).expect_err("other"),
        CutWriter::open(&url, &domain(), options())
            .await
            .map(|_| ())
            .expect_err("other"),
    ] {
        assert!(matches!(error, StoreError::OtherFormat { .. }), "{error}");
    }

    let newer = "{\"format\":\"jetdr-container\",\"version\":2,\"anything\":[]}";
    std::fs::write(dir.path().join("domain.json"), newer).unwrap();
    let error = Container::open(&url).await.map(|_| ()).expect_err("newer");
    assert!(matches!(error, StoreError::NewerVersion { .. }), "{error}");

    let dir = tempfile::tempdir().expect("a folder");
    fill(dir.path()).await;
    let url = StoreUrl::parse(dir.path().to_str().unwrap(), &[]).expect("parses");
    let mut other = domain();
    other.uuid = uuid::Uuid::from_u128(0xdead);
    let error = CutWriter::open(&url, &other, options())
        .await
        .map(|_| ())
        .expect_err("another domain");
    assert!(matches!(error, StoreError::OtherDomain { .. }), "{error}");
}
