//! A short run, as a test like any other. `make simulate` runs more.

use simulator::run::{hours, seed};

/// JETDR_SEED repeats one seed; JETDR_SEEDS says how many.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn no_seed_violates_a_promise() {
    let (first, count) = match number("JETDR_SEED") {
        Some(seed) => (seed, 1),
        None => (1, number("JETDR_SEEDS").unwrap_or(40)),
    };
    let mut simulated_ns = 0;
    for number in first..first + count {
        println!("JETDR_SEED={number}");
        let outcome = seed(number, false);
        simulated_ns += outcome.simulated_ns;
        assert_eq!(outcome.violation, None, "seed {number}");
    }
    println!("{:.0} simulated hours", hours(simulated_ns));
}

#[test]
fn a_seed_gives_the_same_run_again() {
    let (one, two) = (seed(7, false), seed(7, false));
    assert_eq!(one.simulated_ns, two.simulated_ns);
    assert_eq!(one.counts, two.counts);
}
