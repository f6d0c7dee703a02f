//! The run folder's locks: who looks is told from who owns.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

fn folder() -> (tempfile::TempDir, RunFolder) {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    (dir, run)
}

#[test]
fn an_owner_is_seen_and_keeps_others_out() {
    let (_dir, run) = folder();
    let disk = [1; 16];
    assert!(!run.disk_is_open(&disk).unwrap());
    let lock = run.lock_disk(&disk).unwrap();
    assert!(lock.is_some());
    assert!(run.disk_is_open(&disk).unwrap());
    assert!(run.lock_disk(&disk).unwrap().is_none());
    drop(lock);
    assert!(!run.disk_is_open(&disk).unwrap());
    assert!(run.lock_disk(&disk).unwrap().is_some());
}

#[test]
fn looking_never_makes_an_open_fail() {
    let (_dir, run) = folder();
    let disk = [2; 16];
    drop(run.lock_disk(&disk).unwrap());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(SeqCst) {
                    run.disk_is_open(&disk).unwrap();
                }
            });
        }
        let refused = (0..2000)
            .filter(|_| run.lock_disk(&disk).unwrap().is_none())
            .count();
        done.store(true, SeqCst);
        assert_eq!(refused, 0);
    });
}

#[test]
fn who_looks_and_never_lets_go_is_waited_for_only_so_long() {
    let (_dir, run) = folder();
    let disk = [3; 16];
    drop(run.lock_disk(&disk).unwrap());
    let path = run.lanes_dir().join(format!("{}.lock", hex(&disk)));
    let stuck = File::options().write(true).open(path).unwrap();
    stuck.lock_shared().unwrap();
    let since = Instant::now();
    assert!(run.lock_disk(&disk).unwrap().is_none());
    assert!(since.elapsed() >= LOOK_LIMIT);
    drop(stuck);
    assert!(run.lock_disk(&disk).unwrap().is_some());
}
