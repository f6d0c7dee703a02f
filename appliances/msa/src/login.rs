//! How often somebody may fail to log in.
//!
//! Invariant: memory is bounded; a name that somebody else tries to guess is not locked for its owner,
//! who comes from another address, until very many failures.

use crate::clock::MINUTE_MS;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Failures are counted over this time.
pub const WINDOW_MS: i64 = 15 * MINUTE_MS;
/// Failures of one name from one address.
pub const PER_PAIR: u32 = 5;
/// Failures from one address.
pub const PER_ADDRESS: u32 = 30;
/// Failures of one name from anywhere.
pub const PER_NAME: u32 = 200;
/// More are not remembered: the oldest go.
const MAX_KEYS: usize = 20_000;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Pair(String, IpAddr),
    Address(IpAddr),
    Name(String),
}

impl Key {
    fn limit(&self) -> u32 {
        match self {
            Key::Pair(..) => PER_PAIR,
            Key::Address(_) => PER_ADDRESS,
            Key::Name(_) => PER_NAME,
        }
    }
}

#[derive(Clone, Copy)]
struct Failures {
    since_ms: i64,
    count: u32,
}

/// Counts failures, and says who has to wait.
#[derive(Default)]
pub struct Limiter(Mutex<BTreeMap<Key, Failures>>);

fn keys(name: &str, address: IpAddr) -> [Key; 3] {
    // Names are the same whatever their case.
    let name = name.to_ascii_lowercase();
    [
        Key::Pair(name.clone(), address),
        Key::Address(address),
        Key::Name(name),
    ]
}

/// Forgets a tenth at once: looking for the oldest at each try would be slow.
fn forget_oldest(failures: &mut BTreeMap<Key, Failures>) {
    let mut since: Vec<i64> = failures.values().map(|of| of.since_ms).collect();
    since.sort_unstable();
    let limit_ms = since.get(since.len() / 10).copied().unwrap_or(i64::MIN);
    failures.retain(|_, of| of.since_ms > limit_ms);
}

impl Limiter {
    /// Counts a try as a failure before it is looked at, so that many at once are not all let through.
    /// An error: how many ms to wait.
    pub fn try_once(&self, name: &str, address: IpAddr, now_ms: i64) -> Result<(), i64> {
        let mut failures = self.0.lock();
        let keys = keys(name, address);
        let wait_ms = |key: &Key| {
            let of = failures.get(key)?;
            let left = of.since_ms + WINDOW_MS - now_ms;
            (of.count >= key.limit() && left > 0).then_some(left)
        };
        if let Some(left) = keys.iter().filter_map(wait_ms).max() {
            return Err(left);
        }
        for key in keys {
            let of = failures.entry(key).or_insert(Failures {
                since_ms: now_ms,
                count: 0,
            });
            if now_ms - of.since_ms >= WINDOW_MS {
                *of = Failures {
                    since_ms: now_ms,
                    count: 0,
                };
            }
            of.count += 1;
        }
        if failures.len() > MAX_KEYS {
            failures.retain(|_, of| now_ms - of.since_ms < WINDOW_MS);
        }
        if failures.len() > MAX_KEYS {
            forget_oldest(&mut failures);
        }
        Ok(())
    }

    /// It was none: the counts are taken back, and the name starts anew from this address.
    pub fn succeeded(&self, name: &str, address: IpAddr) {
        let mut failures = self.0.lock();
        for key in keys(name, address) {
            match key {
                Key::Pair(..) => drop(failures.remove(&key)),
                _ => {
                    if let Some(of) = failures.get_mut(&key) {
                        of.count = of.count.saturating_sub(1);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const THERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn five_failures_and_a_name_waits_at_that_address_only() {
        let limiter = Limiter::default();
        for at in 0..PER_PAIR {
            assert_eq!(limiter.try_once("anna", HERE, i64::from(at)), Ok(()));
        }
        assert_eq!(limiter.try_once("ANNA", HERE, 1000), Err(WINDOW_MS - 1000));
        assert_eq!(limiter.try_once("anna", THERE, 1000), Ok(()));
        assert_eq!(limiter.try_once("bert", HERE, 1000), Ok(()));
        assert_eq!(limiter.try_once("anna", HERE, WINDOW_MS - 1), Err(1));
        assert_eq!(limiter.try_once("anna", HERE, WINDOW_MS), Ok(()));
    }

    #[test]
    fn a_success_starts_anew() {
        let limiter = Limiter::default();
        for _ in 0..100 {
            assert_eq!(limiter.try_once("anna", HERE, 0), Ok(()));
            limiter.succeeded("anna", HERE);
        }
    }

    #[test]
    fn many_names_from_one_address_and_one_name_from_many() {
        let limiter = Limiter::default();
        let tried = (0..100).filter(|at| limiter.try_once(&format!("n{at}"), HERE, 0).is_ok());
        assert_eq!(tried.count(), PER_ADDRESS as usize);
        let limiter = Limiter::default();
        let address = |at: u32| IpAddr::V4(std::net::Ipv4Addr::from(at));
        let tried = (0..1000).filter(|at| limiter.try_once("anna", address(*at), 0).is_ok());
        assert_eq!(tried.count(), PER_NAME as usize);
    }

    #[test]
    fn memory_is_bounded() {
        let limiter = Limiter::default();
        for at in 0..MAX_KEYS as u32 {
            let address = IpAddr::V4(std::net::Ipv4Addr::from(at));
            let _ = limiter.try_once(&format!("n{at}"), address, i64::from(at));
        }
        assert!(limiter.0.lock().len() <= MAX_KEYS);
    }
}
