//! Completions held until the log has the write, for the budget at most; the way back.

use super::{Ack, AckConfig, AckEvent, CALM_NS, Standing};
use crate::lane::test_lane::{Numbers, with_seeds};
use std::collections::{HashMap, VecDeque};

const MS: u64 = 1_000_000;
const BUDGET_NS: u64 = 50 * MS;
const CONFIG: AckConfig = AckConfig {
    log: true,
    budget_ns: BUDGET_NS,
};

fn at(now_ns: u64, durable_seq: u64) -> Standing {
    Standing {
        streaming: true,
        beginnings: 0,
        durable_seq,
        now_ns,
    }
}

fn out(ack: &mut Ack<u32>, standing: Standing) -> Vec<u32> {
    let mut out = Vec::new();
    ack.poll(standing, |what| out.push(what));
    out
}

#[test]
fn a_completion_waits_for_its_own_seq() {
    let mut ack = Ack::new(CONFIG);
    assert!(!ack.done(1, Some(5), at(MS, 5)), "durable already");
    assert!(!ack.wants_poll());
    assert!(ack.done(2, Some(7), at(MS, 5)));
    assert!(ack.done(3, Some(6), at(2 * MS, 5)), "out of order");
    assert!(ack.wants_poll());
    assert_eq!(out(&mut ack, at(3 * MS, 5)), []);
    assert_eq!(out(&mut ack, at(4 * MS, 6)), [3]);
    assert_eq!(out(&mut ack, at(5 * MS, 9)), [2]);
    assert!(!ack.wants_poll());
    assert_eq!((ack.held_count(), ack.held_max_ns()), (2, 4 * MS));
    assert_eq!(ack.take_event(), None);
}

/// Streaming before and after: only the count of beginnings tells that what was held was given up meanwhile.
#[test]
fn nothing_that_a_stream_gave_up_is_told_with_the_log() {
    let anew = |now_ns, durable_seq| Standing {
        beginnings: 1,
        ..at(now_ns, durable_seq)
    };
    for by_write in [false, true] {
        let mut ack = Ack::new(CONFIG);
        assert!(ack.done(1, Some(7), at(MS, 5)));
        if by_write {
            assert!(!ack.done(2, Some(12), anew(2 * MS, 9)), "fallen back");
        }
        assert_eq!(out(&mut ack, anew(3 * MS, 9)), [1]);
        assert_eq!(ack.take_event(), Some(AckEvent::NotStreaming));
        assert!(ack.has_fallen_back());
    }
    // Nothing was held: nothing is lost by it.
    let mut ack = Ack::new(CONFIG);
    assert!(ack.done(1, Some(12), anew(MS, 9)));
    assert_eq!(out(&mut ack, anew(2 * MS, 12)), [1]);
    assert!(!ack.has_fallen_back());
}

#[test]
fn without_write_through_nothing_is_held() {
    let mut ack = Ack::new(AckConfig::default());
    assert!(!ack.done(1, Some(5), at(MS, 0)));
    let tracking = Standing {
        streaming: false,
        ..at(MS, 0)
    };
    assert!(!ack.done(1, None, tracking));
    assert_eq!(out(&mut ack, tracking), []);
    assert!(!ack.has_fallen_back() && ack.take_event().is_none());
}

#[test]
fn the_budget_ends_and_all_go_on() {
    let mut ack = Ack::new(CONFIG);
    assert!(ack.done(1, Some(5), at(0, 0)));
    assert!(ack.done(2, Some(6), at(BUDGET_NS - 1, 0)));
    assert_eq!(out(&mut ack, at(BUDGET_NS - 1, 0)), []);
    assert_eq!(out(&mut ack, at(BUDGET_NS, 0)), [1, 2]);
    assert!(ack.has_fallen_back());
    assert_eq!(ack.take_event(), Some(AckEvent::TooSlow));
    assert!(
        !ack.done(3, Some(7), at(BUDGET_NS, 0)),
        "nothing is held now"
    );
    assert_eq!(ack.take_event(), None, "told once");
}

/// In time, although looked at late: no reason to fall back.
#[test]
fn a_late_look_at_what_is_durable_is_not_a_slow_acknowledgement() {
    let mut ack = Ack::new(CONFIG);
    assert!(ack.done(1, Some(5), at(0, 0)));
    assert_eq!(out(&mut ack, at(2 * BUDGET_NS, 5)), [1]);
    assert!(!ack.has_fallen_back());
}

#[test]
fn a_disk_that_tracks_or_syncs_has_fallen_back() {
    let mut ack = Ack::new(CONFIG);
    assert!(ack.done(1, Some(5), at(0, 0)));
    let not_streaming = Standing {
        streaming: false,
        ..at(MS, 0)
    };
    assert!(!ack.done(2, Some(6), not_streaming));
    assert_eq!(out(&mut ack, not_streaming), [1]);
    assert_eq!(ack.take_event(), Some(AckEvent::NotStreaming));
    let mut marked = Ack::new(CONFIG);
    assert!(!marked.done(1, None, at(0, 0)));
    assert!(marked.has_fallen_back());
}

#[test]
fn an_aborted_completion_is_forgotten() {
    let mut ack = Ack::new(CONFIG);
    assert!(ack.done(1, Some(5), at(0, 0)) && ack.done(2, Some(6), at(0, 0)));
    assert!(ack.forget(1));
    assert!(!ack.forget(1));
    assert_eq!(out(&mut ack, at(MS, 9)), [2]);
    assert!(ack.done(3, Some(10), at(MS, 9)));
    let mut all = Vec::new();
    ack.release_all(|what| all.push(what));
    assert_eq!(all, [3]);
    assert!(!ack.wants_poll());
}

fn fallen() -> (Ack<u32>, u64) {
    let mut ack = Ack::new(CONFIG);
    assert!(ack.done(0, Some(1), at(0, 0)));
    assert_eq!(out(&mut ack, at(BUDGET_NS, 0)), [0]);
    ack.take_event();
    (ack, BUDGET_NS)
}

/// Writes every 10 ms from `from_ns` on, each durable after `lag_ns`; when it was back, if it was.
fn until_back(ack: &mut Ack<u32>, from_ns: u64, for_ns: u64, lag_ns: u64) -> Option<u64> {
    let mut on_the_way = VecDeque::new();
    let (mut seq, mut durable) = (from_ns, from_ns);
    for now_ns in (from_ns..from_ns + for_ns).step_by(MS as usize) {
        if (now_ns - from_ns).is_multiple_of(10 * MS) {
            seq += 1;
            assert!(!ack.done(0, Some(seq), at(now_ns, durable)));
            on_the_way.push_back((now_ns + lag_ns, seq));
        }
        while on_the_way.front().is_some_and(|(when, _)| *when <= now_ns) {
            durable = on_the_way.pop_front().map_or(durable, |(_, seq)| seq);
        }
        out(ack, at(now_ns, durable));
        if !ack.has_fallen_back() {
            assert_eq!(ack.take_event(), Some(AckEvent::Back));
            return Some(now_ns - from_ns);
        }
    }
    None
}

#[test]
fn it_comes_back_after_a_calm_second() {
    let (mut ack, now_ns) = fallen();
    let took_ns = until_back(&mut ack, now_ns, 10 * CALM_NS, 5 * MS);
    assert!(
        took_ns.is_some_and(|ns| (CALM_NS..CALM_NS + 20 * MS).contains(&ns)),
        "{took_ns:?}"
    );
    assert!(
        ack.done(9, Some(u64::MAX / 2), at(now_ns + 2 * CALM_NS, 0)),
        "held again"
    );
}

#[test]
fn it_does_not_come_back_while_acknowledgements_are_slow_or_missing() {
    let (mut ack, now_ns) = fallen();
    assert_eq!(until_back(&mut ack, now_ns, 10 * CALM_NS, 40 * MS), None);
    // Nothing durable at all: it stops polling, so that no timer runs for nothing.
    assert_eq!(
        until_back(&mut ack, 20 * CALM_NS, 10 * CALM_NS, u64::MAX / 4),
        None
    );
    assert!(!ack.wants_poll());
}

#[test]
fn it_does_not_come_back_without_evidence() {
    let (mut ack, now_ns) = fallen();
    for second in 1..100 {
        assert_eq!(out(&mut ack, at(now_ns + second * CALM_NS, 1)), []);
    }
    assert!(ack.has_fallen_back(), "no write, so nothing is known");
}

/// A link that is good for a second and bad for a moment: each time it is trusted later.
#[test]
fn a_line_that_comes_and_goes_is_trusted_later_each_time() {
    let (mut ack, mut now_ns) = fallen();
    let mut last_ns = 0;
    for round in 0..9 {
        let took_ns = until_back(&mut ack, now_ns, 100 * CALM_NS, MS);
        let Some(took_ns) = took_ns else {
            panic!("never back in round {round}");
        };
        assert!(
            took_ns >= (last_ns * 3 / 2).min(64 * CALM_NS),
            "{last_ns} {took_ns}"
        );
        last_ns = took_ns;
        now_ns += took_ns + MS;
        assert!(ack.done(1, Some(u64::MAX / 2), at(now_ns, 0)));
        now_ns += BUDGET_NS;
        assert_eq!(out(&mut ack, at(now_ns, 0)), [1]);
        assert_eq!(ack.take_event(), Some(AckEvent::TooSlow));
    }
    // Good for more than a minute: trusted as at first.
    until_back(&mut ack, now_ns, 100 * CALM_NS, MS).expect("back");
    now_ns += 200 * CALM_NS;
    assert!(ack.done(1, Some(u64::MAX / 2), at(now_ns, 0)));
    assert_eq!(out(&mut ack, at(now_ns + BUDGET_NS, 0)), [1]);
    let took_ns = until_back(&mut ack, now_ns + BUDGET_NS, 10 * CALM_NS, MS);
    assert!(took_ns.is_some_and(|ns| ns < 2 * CALM_NS), "{took_ns:?}");
}

/// Whatever the line does: each held completion goes on exactly once, not before its write is
/// durable unless the disk has fallen back, and never after the budget and a poll.
#[test]
fn at_random_each_goes_on_once_and_in_time() {
    with_seeds(50, |seed| {
        let mut numbers = Numbers::new(seed);
        let mut ack = Ack::new(CONFIG);
        let mut held: HashMap<u32, (u64, u64)> = HashMap::new();
        let (mut now_ns, mut seq, mut durable, mut id) = (1, 0u64, 0u64, 0u32);
        let (mut fell, mut came_back) = (0, 0);
        let mut lag = 3;
        for _ in 0..20_000 {
            now_ns += numbers.between(1, MS);
            if numbers.chance(1) && numbers.chance(5) {
                lag = numbers.pick(&[1, 3, 10, 1000]);
            }
            if numbers.below(lag) == 0 {
                durable = numbers.between(durable, seq);
            }
            if numbers.chance(30) {
                seq += numbers.between(1, 3);
                id += 1;
                if ack.done(id, Some(seq), at(now_ns, durable)) {
                    held.insert(id, (seq, now_ns));
                }
            }
            if numbers.chance(2) && !held.is_empty() {
                let some = *held.keys().min().unwrap_or(&0);
                assert!(ack.forget(some));
                held.remove(&some);
            }
            let mut gone = Vec::new();
            ack.poll(at(now_ns, durable), |what| gone.push(what));
            for what in gone {
                let (its, _) = held.remove(&what).expect("once, and only what was held");
                assert!(its <= durable || ack.has_fallen_back());
            }
            for (its, since_ns) in held.values() {
                assert!(*its > durable, "durable and still held");
                assert!(now_ns - since_ns < BUDGET_NS, "beyond the budget");
            }
            match ack.take_event() {
                Some(AckEvent::Back) => came_back += 1,
                Some(_) => fell += 1,
                None => {}
            }
        }
        println!("fell back {fell}, came back {came_back}");
        assert!(came_back <= fell && fell <= came_back + 1);
    });
}
