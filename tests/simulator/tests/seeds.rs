//! Short runs, as tests like any other. `make simulate` runs more.

use simulator::many::run;
use simulator::run::seed;

/// JETDR_SEED repeats one seed; JETDR_SEEDS says how many.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// What does not happen in every thousand seeds.
const RARE: &[&str] = &["move: given up, I/O did not end", "revert: refused"];

#[test]
fn no_seed_violates_a_promise() {
    let (first, count) = match number("JETDR_SEED") {
        Some(seed) => (seed, 1),
        None => (1, number("JETDR_SEEDS").unwrap_or(1000)),
    };
    println!("JETDR_SEED from {first}, {count} of them");
    let total = run(first..first + count, 0, false, |_| {});
    println!("{total}");
    if let Some(failed) = total.failed {
        let what = failed.violation.unwrap_or_default();
        panic!("JETDR_SEED={}: {what}", failed.seed);
    }
    if count >= 1000 {
        let never = total.never();
        let never: Vec<_> = never.iter().filter(|kind| !RARE.contains(*kind)).collect();
        assert!(never.is_empty(), "these never happened: {never:?}");
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    let (one, two) = (seed(7, false), seed(7, false));
    assert_eq!(one.simulated_ns, two.simulated_ns);
    assert_eq!(one.events, two.events);
    assert_eq!(one.counts, two.counts);
}
