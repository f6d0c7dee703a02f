//! Snapshots of closed disks: content, sidecars and ids go back; a revert that was cut off is finished.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::disk::{OpenDisk, create as create_disk, open};

fn files(disk: &OpenDisk, path: &Path) -> anyhow::Result<()> {
    create(of(disk, path), 1)
}

fn of<'a>(disk: &'a OpenDisk, path: &'a Path) -> DiskFiles<'a> {
    DiskFiles {
        path,
        format: disk.format(),
        data: disk,
    }
}

fn fill(disk: &FlatFile, fill: u8) {
    disk.write_at(&[fill; 4096], 65536).unwrap();
}

fn content(disk: &FlatFile) -> u8 {
    let mut all = vec![0; 1 << 20];
    disk.read_at(&mut all, 0).unwrap();
    let data = &all[65536..65536 + 4096];
    assert!(data.iter().all(|b| *b == data[0]));
    assert!(all[..65536].iter().all(|b| *b == 0), "what was a hole");
    data[0]
}

fn note(path: &Path, fill: u8) {
    sidecar::overwrite(path, 7, &[fill; 4096]).unwrap();
}

#[test]
fn content_sidecars_and_ids_go_back() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["d.raw", "e.vmdk"] {
        let path = dir.path().join(name);
        let format = Format::of(&path);
        create_disk(&path, format, 1 << 20).unwrap();
        let disk = open(&path, None).unwrap();
        fill(&disk, 1);
        note(&path, 1);
        disk.closed().unwrap();
        let kept = disk.identity();
        files(&disk, &path).unwrap();
        drop(disk);
        let disk = open(&path, None).unwrap();
        fill(&disk, 2);
        disk.write_at(&[2; 4096], 0).unwrap();
        note(&path, 2);
        sidecar::overwrite(&path, 8, &[2; 4096]).unwrap();
        disk.closed().unwrap();
        revert(of(&disk, &path), 1, Revert::Closed).unwrap();
        drop(disk);
        let disk = open(&path, None).unwrap();
        assert_eq!(content(&disk), 1, "{name}");
        let sidecar_now = std::fs::read(sidecar::path_of(&path, 7)).unwrap();
        assert_eq!(sidecar_now, [1; 4096], "{name}");
        assert!(!sidecar::path_of(&path, 8).exists(), "made later");
        let now = disk.identity();
        assert_eq!(now.content_id_before, kept.content_id, "{name}");
        assert_eq!(now.disk_uuid, kept.disk_uuid, "{name}");
        consolidate(&path, None).unwrap();
        assert!(index(&path).unwrap().snapshots.is_empty());
    }
}

#[test]
fn a_revert_that_was_cut_off_is_finished_at_the_next_opening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.raw");
    create_disk(&path, Format::Raw, 1 << 20).unwrap();
    let disk = open(&path, None).unwrap();
    fill(&disk, 1);
    note(&path, 1);
    files(&disk, &path).unwrap();
    fill(&disk, 2);
    note(&path, 2);
    let mut begun = index(&path).unwrap();
    begun.reverting = Some(1);
    store(&path, &begun).unwrap();
    drop(disk);
    let disk = open(&path, None).unwrap();
    assert_eq!(content(&disk), 1);
    assert_eq!(index(&path).unwrap().reverting, None);
    let sidecar_now = std::fs::read(sidecar::path_of(&path, 7)).unwrap();
    assert_eq!(sidecar_now, [1; 4096]);
}

#[test]
fn a_revert_that_failed_on_its_way_is_finished_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.raw");
    create_disk(&path, Format::Raw, 1 << 20).unwrap();
    let disk = open(&path, None).unwrap();
    let kept = disk.identity().content_id;
    fill(&disk, 1);
    files(&disk, &path).unwrap();
    drop(disk);
    let disk = open(&path, None).unwrap();
    fill(&disk, 2);
    // A folder where a sidecar is expected: the data is back by then, the ids are not.
    let in_the_way = folder(&path).join("1/0000000000000009.vmfd");
    std::fs::create_dir(&in_the_way).unwrap();
    assert!(revert(of(&disk, &path), 1, Revert::Closed).is_err());
    drop(disk);
    let error = open(&path, None).unwrap_err().to_string();
    assert!(error.contains("cannot be finished"), "{error}");
    std::fs::remove_dir(&in_the_way).unwrap();
    let disk = open(&path, None).unwrap();
    assert_eq!(content(&disk), 1);
    assert_eq!(disk.identity().content_id_before, kept);
}

#[test]
fn a_chain_is_kept_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.raw");
    create_disk(&path, Format::Raw, 1 << 20).unwrap();
    let disk = open(&path, None).unwrap();
    for id in 1..=3 {
        fill(&disk, id);
        create(of(&disk, &path), id.into()).unwrap();
    }
    revert(of(&disk, &path), 1, Revert::Open).unwrap();
    assert_eq!(content(&disk), 1);
    fill(&disk, 4);
    create(of(&disk, &path), 4).unwrap();
    let parents = || {
        let index = index(&path).unwrap();
        let all = index.snapshots.iter().map(|s| (s.id, s.parent));
        (all.collect::<Vec<_>>(), index.current)
    };
    let chain = vec![(1, None), (2, Some(1)), (3, Some(2)), (4, Some(1))];
    assert_eq!(parents(), (chain, Some(4)));
    consolidate(&path, Some(1)).unwrap();
    let chain = vec![(2, None), (3, Some(2)), (4, None)];
    assert_eq!(parents(), (chain, Some(4)));
    revert(of(&disk, &path), 3, Revert::Open).unwrap();
    assert_eq!(content(&disk), 3);
    let error = revert(of(&disk, &path), 1, Revert::Open).unwrap_err();
    assert!(error.to_string().contains("[2, 3, 4]"), "{error}");
    disk.grow(2 << 20).unwrap();
    let error = revert(of(&disk, &path), 3, Revert::Open).unwrap_err();
    assert!(error.to_string().contains("never made smaller"), "{error}");
}
