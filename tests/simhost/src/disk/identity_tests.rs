//! Ids of disks: what changes them, and what does not.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::disk::{OpenDisk, create, open};
use std::os::unix::fs::FileExt;

fn both() -> (tempfile::TempDir, [PathBuf; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["d.raw", "d.vmdk"].map(|name| dir.path().join(name));
    for path in &paths {
        create(path, Format::of(path), 1 << 20).unwrap();
    }
    (dir, paths)
}

fn opening(path: &Path) -> Identity {
    let disk = open(path, None).unwrap();
    let identity = disk.identity();
    disk.closed().unwrap();
    identity
}

/// The file with the data.
fn data_of(path: &Path) -> PathBuf {
    match Format::of(path) {
        Format::Raw => path.to_owned(),
        Format::Vmdk => vmdk::flat_path(path),
    }
}

#[test]
fn every_opening_has_another_content_id_and_knows_the_last() {
    let (_dir, paths) = both();
    for path in &paths {
        let first = opening(path);
        let second = opening(path);
        assert_ne!(first.content_id, 0);
        assert_ne!(first.content_id, first.content_id_before);
        assert_ne!(first.content_id, second.content_id);
        assert_eq!(second.content_id_before, first.content_id);
        assert_eq!(second.disk_uuid, first.disk_uuid);
    }
}

#[test]
fn after_an_unclean_end_the_id_counts_alone() {
    let (_dir, paths) = both();
    for path in &paths {
        let killed = open(path, None).unwrap();
        let identity = killed.identity();
        killed.write_at(&[7; 512], 0).unwrap();
        drop(killed); // without `closed`, as by a kill
        assert_eq!(opening(path).content_id_before, identity.content_id);
    }
}

#[test]
fn a_raw_disk_that_another_program_wrote_is_noticed() {
    let (_dir, [path, _]) = both();
    let first = opening(&path);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[1; 512], 4096).unwrap();
    drop(file);
    let second = opening(&path);
    assert_ne!(second.content_id_before, first.content_id);
    assert_ne!(second.content_id_before, 0);
    assert_eq!(second.disk_uuid, first.disk_uuid);
    assert_eq!(opening(&path).content_id_before, second.content_id);
}

/// In memory closing takes no time: the foreign write comes in the tick of the disk's own last one.
#[test]
fn a_write_in_the_tick_of_the_close_is_noticed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("d.raw");
    create(&path, Format::Raw, 1 << 20).unwrap();
    for round in 0..100 {
        let disk = open(&path, None).unwrap();
        disk.write_at(&[round; 512], 0).unwrap();
        disk.closed().unwrap();
        let of_ours = disk.identity().content_id;
        drop(disk);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[round; 512], 4096).unwrap();
        drop(file);
        let next = opening(&path);
        assert_ne!(next.content_id_before, of_ours, "round {round}");
    }
}

#[test]
fn a_damaged_record_is_a_disk_seen_for_the_first_time() {
    let (_dir, [path, _]) = both();
    let first = opening(&path);
    std::fs::write(record_path(&path), "{\"content_id\":").unwrap();
    let second = opening(&path);
    assert!(![0, first.content_id].contains(&second.content_id_before));
}

#[test]
fn a_copy_has_another_uuid_and_a_moved_disk_keeps_its_own() {
    let (dir, [path, _]) = both();
    let first = opening(&path);
    let copy = dir.path().join("copy.raw");
    std::fs::copy(&path, &copy).unwrap();
    std::fs::copy(record_path(&path), record_path(&copy)).unwrap();
    let copied = opening(&copy);
    assert_ne!(copied.disk_uuid, first.disk_uuid);
    assert_ne!(copied.content_id_before, first.content_id, "another inode");
    let moved = dir.path().join("moved.raw");
    std::fs::rename(&path, &moved).unwrap();
    std::fs::rename(record_path(&path), record_path(&moved)).unwrap();
    let after = opening(&moved);
    assert_eq!(after.disk_uuid, first.disk_uuid);
    assert_eq!(after.content_id_before, first.content_id);
}

#[test]
fn a_vmdk_without_a_uuid_gets_one_and_keeps_it() {
    let (_dir, [_, path]) = both();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("ddb.uuid"), "made at create");
    let without: Vec<&str> = text.lines().filter(|l| !l.contains("ddb.uuid")).collect();
    std::fs::write(&path, without.join("\n") + "\n").unwrap();
    let first = opening(&path);
    assert_ne!(first.disk_uuid, [0; 16]);
    assert_eq!(opening(&path).disk_uuid, first.disk_uuid);
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.matches("ddb.uuid").count(), 1, "{text}");
    assert_eq!(text.matches("CID=").count(), 2, "CID and parentCID: {text}");
}

#[test]
fn a_disk_is_open_for_writing_once() {
    let (_dir, paths) = both();
    for path in &paths {
        let first: OpenDisk = open(path, None).unwrap();
        let before = first.identity();
        let error = open(path, None).unwrap_err().to_string();
        assert!(error.contains("another process has it open"), "{error}");
        assert!(error.contains(&*data_of(path).to_string_lossy()), "{error}");
        first.closed().unwrap();
        drop(first);
        // What was refused was no opening.
        assert_eq!(opening(path).content_id_before, before.content_id);
    }
}
