//! The oracle's own test: without a guard some seed fails, and with all of them none of the same does.
//! `make simulate-mutants` takes out every guard.

use filter_core::mutant::{self, Guard};
use simulator::many::run;

/// Seeds in which each of them must be found.
const SEEDS: std::ops::Range<u64> = 1..81;

/// One test: a guard is taken out for the whole process.
#[test]
fn a_seed_fails_without_a_guard() {
    let guards = [
        Guard::TouchCheck,
        Guard::ClearAfterPublish,
        Guard::DeferBudget,
        Guard::CommitAwaited,
        Guard::FullWhenChanged,
    ];
    for guard in guards {
        println!("{guard:?}, JETDR_SEED in {SEEDS:?}");
        mutant::take_out(guard);
        let total = run(SEEDS, 0, false, |_| {});
        mutant::put_back();
        let failed = total
            .failed
            .map(|outcome| (outcome.seed, outcome.violation));
        let (seed, what) = failed.unwrap_or_else(|| panic!("{guard:?} can be taken out unnoticed"));
        println!("  seed {seed}: {}", what.unwrap_or_default());
        let whole = run(seed..seed + 1, 1, false, |_| {});
        assert_eq!(whole.failed.and_then(|f| f.violation), None, "seed {seed}");
    }
}

#[test]
fn every_guard_is_listed_once() {
    assert!(mutant::ALL.len() < 64, "each has a bit of a word");
    for (number, (guard, what)) in mutant::ALL.iter().enumerate() {
        assert_eq!(
            *guard as usize,
            number + 1,
            "{guard:?} stands in another place than in `Guard`"
        );
        assert!(what.ends_with('.'), "{guard:?}: {what}");
    }
    for (guard, with, _) in mutant::BEHIND {
        assert!(!with.contains(guard), "{guard:?}");
    }
}
