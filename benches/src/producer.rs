//! What the lane adds to a copy: one 4 KiB write published, beside memcpy + CRC32C of the same bytes.
//!
//! Invariant: both move the same bytes from the same sources in the same order into memory of the
//! same kind and length; the consumer's part is done between the timed stretches, so the ring never
//! fills and only the producer's own work is counted.

use crate::map::PlainMap;
use crate::process::memory_folder;
use crate::report::{Goal, Measurement};
use anyhow::Context;
use filter_core::lane::consumer::Consumer;
use filter_core::lane::layout::{DEFAULT_RING_BYTES, Geometry, Identity};
use filter_core::lane::producer::{Draft, Producer, Source, Stamps};
use filter_core::lane::sync::{AtomicU32, AtomicU64};
use filter_core::mapping::{MappedLane, RunFolder};
use filter_core::position::Durable;
use filter_core::record::RecordKind;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of one write.
const WRITE_BYTES: usize = 4096;
/// Writes between two looks of the consumer: a quarter of the ring at most.
const STRETCH: usize = 256;
/// Sources larger than the caches that are near.
const COLD_BYTES: usize = 64 << 20;
const DISK_BYTES: u64 = 1 << 30;

/// The guest's buffers.
struct Sources {
    bytes: Vec<u8>,
    next: usize,
}

impl Sources {
    fn new(len_bytes: usize) -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let words = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        });
        let bytes = words
            .take(len_bytes / 8)
            .flat_map(u64::to_le_bytes)
            .collect();
        Self { bytes, next: 0 }
    }

    /// The next buffer. A stride of 769 pages visits all of a power of two, and no prefetcher knows
    /// the way.
    fn next(&mut self) -> (u64, &[u8]) {
        let pages = self.bytes.len() / WRITE_BYTES;
        self.next = (self.next + 769) % pages;
        let at = self.next * WRITE_BYTES;
        (
            at as u64,
            self.bytes.get(at..at + WRITE_BYTES).unwrap_or_default(),
        )
    }
}

/// A lane with both of its sides in this process.
struct Lane {
    producer: Producer,
    consumer: Consumer,
    stamp: AtomicU64,
    cut_epoch: AtomicU32,
    _mapped: MappedLane,
}

impl Lane {
    fn new(folder: &Path) -> anyhow::Result<Self> {
        let run = RunFolder::open(folder)?;
        let identity = Identity {
            geometry: Geometry::for_disk(DISK_BYTES, DEFAULT_RING_BYTES)?,
            disk_id: [1; 16],
            vm_id: [2; 16],
            boot_id: [3; 16],
            base_seq: 1,
            domain: "bench".to_owned(),
            vm_name: "bench".to_owned(),
            disk_label: "disk".to_owned(),
        };
        let mapped = MappedLane::create(&run, &identity, DISK_BYTES)?;
        let memory = mapped.memory();
        Ok(Self {
            producer: Producer::new(memory, 1, 0, 1),
            consumer: Consumer::attach(memory),
            stamp: AtomicU64::new(0),
            cut_epoch: AtomicU32::new(1),
            _mapped: mapped,
        })
    }

    fn stretch(&mut self, sources: &mut Sources) -> anyhow::Result<Duration> {
        let started = Instant::now();
        for _ in 0..STRETCH {
            let (offset_bytes, bytes) = sources.next();
            let pieces = [Source::from_slice(bytes)];
            let draft = Draft {
                kind: RecordKind::Write,
                offset_bytes,
                len_bytes: WRITE_BYTES as u64,
                sources: &pieces,
            };
            // The clock is the shell's: what is measured is reserve, copy, CRC and publish.
            let stamps = Stamps {
                stamp: &self.stamp,
                cut_epoch: &self.cut_epoch,
                time_ns: 1,
            };
            // The consumer is awake: nobody to wake.
            let _ = black_box(self.producer.publish(&draft, &stamps)?);
        }
        let took = started.elapsed();
        while let Some(run) = self.consumer.take(1 << 20)? {
            anyhow::ensure!(
                self.consumer.release(Durable(run.last_seq)),
                "the lane lost count"
            );
        }
        Ok(took)
    }
}

/// The same bytes without a lane.
struct Plain {
    map: PlainMap,
    at: usize,
}

impl Plain {
    fn stretch(&mut self, sources: &mut Sources) -> Duration {
        let started = Instant::now();
        for _ in 0..STRETCH {
            let (_, bytes) = sources.next();
            let target = self.map.bytes_mut();
            if self.at + WRITE_BYTES > target.len() {
                self.at = 0;
            }
            if let Some(target) = target.get_mut(self.at..self.at + WRITE_BYTES) {
                target.copy_from_slice(bytes);
                black_box(crc32c::crc32c(target));
            }
            self.at += WRITE_BYTES;
        }
        started.elapsed()
    }
}

fn nanoseconds_per_write(took: Duration, stretches: usize) -> f64 {
    took.as_nanos() as f64 / (stretches * STRETCH) as f64
}

/// Measures hot and cold sources, `runs` pairs of `writes` writes each.
pub fn measure(runs: usize, writes: usize) -> anyhow::Result<Vec<Measurement>> {
    let folder = tempfile::Builder::new()
        .prefix("jetdr-bench-")
        .tempdir_in(memory_folder())
        .context("make the run folder of the producer's benchmark")?;
    let mut lane = Lane::new(folder.path())?;
    let ring_bytes = usize::try_from(DEFAULT_RING_BYTES)?;
    let mut plain = Plain {
        map: PlainMap::new(folder.path(), ring_bytes)?,
        at: 0,
    };
    let stretches = writes.div_ceil(STRETCH).max(1);
    let mut found = Vec::new();
    for (name, len_bytes) in [("source hot", WRITE_BYTES), ("source cold", COLD_BYTES)] {
        // One set each: a shared one would leave the second of a pair with warm sources.
        let (mut for_lane, mut for_plain) = (Sources::new(len_bytes), Sources::new(len_bytes));
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for run in 0..=runs {
            let (mut lane_took, mut plain_took) = (Duration::ZERO, Duration::ZERO);
            for _ in 0..stretches {
                plain_took += plain.stretch(&mut for_plain);
            }
            for _ in 0..stretches {
                lane_took += lane.stretch(&mut for_lane)?;
            }
            if run > 0 {
                // The first pair only warms up.
                ours.push(nanoseconds_per_write(lane_took, stretches));
                theirs.push(nanoseconds_per_write(plain_took, stretches));
            }
        }
        found.push(Measurement::compared(
            "producer",
            format!("4 KiB write, {name}"),
            "ns",
            &ours,
            "memcpy + crc32c",
            &theirs,
            Some(Goal::RatioAtMost(1.3)),
        ));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_move_bytes() {
        let found = measure(1, STRETCH * 40).expect("a lane in memory");
        assert_eq!(found.len(), 2);
        assert!(
            found
                .iter()
                .all(|m| m.value > 0.0 && m.ratio.is_some_and(|ratio| ratio > 0.0))
        );
    }

    #[test]
    fn cold_sources_visit_every_page() {
        let mut sources = Sources::new(64 * WRITE_BYTES);
        let mut seen: Vec<u64> = (0..64).map(|_| sources.next().0).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 64);
    }
}
