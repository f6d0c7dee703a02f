//! Lanes for the tests of this crate, and seeded numbers.

pub use super::heap::HeapLane;
use super::layout::{Geometry, Identity};

impl HeapLane {
    /// A fresh lane for a disk.
    pub fn new(capacity_bytes: u64, ring_bytes: u64, base_seq: u64) -> Self {
        let identity = Identity {
            geometry: Geometry::for_disk(capacity_bytes, ring_bytes).unwrap(),
            disk_id: [1; 16],
            vm_id: [2; 16],
            boot_id: [3; 16],
            base_seq,
            domain: "finance".into(),
            vm_name: "db-1".into(),
            disk_label: "data".into(),
        };
        Self::create(&identity, capacity_bytes).unwrap()
    }
}

/// Numbers that follow from a seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// A number from `first` to `last`, both included.
    pub fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Bytes without a pattern.
pub fn noise(len: usize) -> Vec<u8> {
    let mut numbers = Numbers::new(7);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&numbers.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Runs `body` with `count` seeds (or as many as JETDR_SEEDS says), or with the one in JETDR_SEED. The
/// seed is printed before each.
pub fn with_seeds(count: u64, body: impl Fn(u64)) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let count = number("JETDR_SEEDS").unwrap_or(count);
    let given = number("JETDR_SEED");
    let seeds = given.map_or(1..count + 1, |seed| seed..seed + 1);
    for seed in seeds {
        println!("JETDR_SEED={seed}");
        body(seed);
    }
}
