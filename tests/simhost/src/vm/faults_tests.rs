//! Faults: as often as asked, where asked, the same for the same seed.
#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn a_fault_strikes_as_often_as_asked() {
    let faults = Faults::new(Some(1));
    faults.add_write_flag("a:4096:512:2").unwrap();
    let strike = |what, disk, at, len| faults.strike(what, disk, at, len) != Strike::Pass;
    assert!(
        !strike(What::Write, "a", 0, 4096),
        "it ends before the range"
    );
    assert!(!strike(What::Write, "b", 4096, 512));
    assert!(!strike(What::Read, "a", 4096, 512));
    assert!(strike(What::Write, "a", 0, 4097));
    assert!(strike(What::Write, "a", 4096, 512));
    assert!(!strike(What::Write, "a", 4096, 512), "the third time");
    for wrong in ["a", "a:1:2", "a:x:1:1", "a:18446744073709551615:1:1"] {
        assert!(faults.add_write_flag(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn some_go_by_before_it_strikes() {
    let faults = Faults::new(Some(1));
    let id = faults
        .add_flag("what=sidecar,do=fail,skip=2,count=1")
        .unwrap();
    let struck: Vec<bool> = (0..5)
        .map(|_| faults.strike(What::Sidecar, "d", 0, 4096) == Strike::Fail)
        .collect();
    assert_eq!(struck, [false, false, true, false, false]);
    assert_eq!(faults.list()["faults"][0]["struck"], 1);
    assert_eq!((faults.heal(Some(id)), faults.heal(None)), (1, 0));
}

#[test]
fn chance_comes_from_the_seed() {
    let run = |seed| {
        let faults = Faults::new(Some(seed));
        faults.add_flag("what=write,do=fail,chance=0.25").unwrap();
        let struck = |_| faults.strike(What::Write, "d", 0, 512) == Strike::Fail;
        (0..1000).map(struck).collect::<Vec<bool>>()
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
    let often = run(5).iter().filter(|struck| **struck).count();
    assert!((180..320).contains(&often), "{often}");
}

#[test]
fn a_torn_write_lands_in_part() {
    let faults = Faults::new(Some(3));
    faults.add_flag("what=write,do=tear").unwrap();
    for sectors in 2..40u64 {
        let Strike::Tear { landed, kill } = faults.strike(What::Write, "d", 0, sectors * 512)
        else {
            panic!("not torn");
        };
        assert!(!kill);
        let bytes: usize = landed.iter().map(|run| run.end - run.start).sum();
        assert!(bytes > 0 && bytes < sectors as usize * 512, "{landed:?}");
        let whole = |run: &Range<usize>| (run.start | run.end).is_multiple_of(512);
        assert!(landed.iter().all(whole), "{landed:?}");
        assert!(landed.windows(2).all(|two| two[0].end < two[1].start));
    }
}

#[test]
fn what_is_no_fault_is_told() {
    let faults = Faults::new(None);
    for (wrong, what) in [
        ("write", "not KEY=VALUE"),
        ("what=wirte,do=fail", "unknown variant `wirte`"),
        ("what=write,do=explode", "unknown variant `explode`"),
        ("what=write,do=fail,often=3", "unknown field `often`"),
        ("what=write,do=delay", "needs `delay_us`"),
        ("what=write,do=fail,delay_us=3", "belongs to `do=delay`"),
        ("what=read,do=tear", "only a write"),
        ("what=write,do=fail,chance=2", "not within 0 and 1"),
        ("do=fail", "missing field `what`"),
    ] {
        let error = format!("{:#}", faults.add_flag(wrong).unwrap_err());
        assert!(error.contains(what) && error.contains(wrong), "{error}");
    }
    let error = faults.kill_at("io-strated", None).unwrap_err().to_string();
    assert!(error.contains("io-started"), "{error}");
    assert!(faults.kill_at("io-started:0", None).is_err());
    assert_eq!(faults.heal(None), 0);
}

#[test]
fn a_thread_that_is_held_goes_on_when_the_other_end_closes() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hold.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let faults = Faults::new(Some(1));
    let flag = format!("io-started:2={}", path.display());
    faults.hold_at_flag(&flag).unwrap();
    assert_eq!(faults.list()["hold_at"][0]["left"], 2);
    let order = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            faults.pass(Point::IoStarted, "a");
            faults.pass(Point::IoWritten, "a");
            order.lock().push("reached");
            faults.pass(Point::IoStarted, "a");
            order.lock().push("went on");
        });
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(said["point"], "io-started");
        assert_eq!(said["pid"], std::process::id());
        // The others are not held: it is one thread that waits.
        faults.pass(Point::IoStarted, "b");
        order.lock().push("let go");
        drop(stream);
    });
    assert_eq!(*order.lock(), ["reached", "let go", "went on"]);
    // Nobody listens any more: it goes on.
    drop(listener);
    faults.hold_at_flag(&flag).unwrap();
    faults.pass(Point::IoStarted, "a");
    faults.pass(Point::IoStarted, "a");
    for wrong in ["io-started", "io-started=", "io-started:0=x", "nowhere=x"] {
        assert!(faults.hold_at_flag(wrong).is_err(), "{wrong}");
    }
}
