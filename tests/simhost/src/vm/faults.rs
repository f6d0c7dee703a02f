//! Faults on request, below the filter: failed writes, delays.
//!
//! Invariant: a fault strikes as often as it was asked for, not more.

use crate::nbd::engine::Kind;
use anyhow::{Context, bail};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Faults on request.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    delay_us: u64,
    writes: Vec<(u64, u64, Arc<AtomicU64>)>,
}

impl Faults {
    /// From the flags that name this disk: LABEL:OFFSET:LENGTH:COUNT.
    pub fn parse(label: &str, flags: &[String], delay_us: u64) -> anyhow::Result<Self> {
        let mut writes = Vec::new();
        for flag in flags {
            let parts: Vec<&str> = flag.split(':').collect();
            let [of, offset, len, count] = parts.as_slice() else {
                bail!("--fault-write {flag}: expected LABEL:OFFSET:LENGTH:COUNT");
            };
            let number = |text: &str| {
                text.parse::<u64>()
                    .with_context(|| format!("--fault-write {flag}: `{text}`"))
            };
            let (offset, len, count) = (number(offset)?, number(len)?, number(count)?);
            if offset.checked_add(len).is_none() {
                bail!("--fault-write {flag}: the range has no end");
            }
            if *of == label {
                writes.push((offset, len, Arc::new(AtomicU64::new(count))));
            }
        }
        Ok(Self { delay_us, writes })
    }

    /// Whether this I/O is to fail; delays it if asked to.
    pub fn strike(&self, kind: Kind, offset: u64, len: u64) -> bool {
        if self.delay_us > 0 {
            std::thread::sleep(Duration::from_micros(self.delay_us));
        }
        matches!(kind, Kind::Write | Kind::Zero | Kind::Unmap)
            && self.writes.iter().any(|(at, span, left)| {
                *at < offset + len
                    && offset < at + span
                    && left
                        .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1))
                        .is_ok()
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_as_often_as_asked() -> anyhow::Result<()> {
        let flags = ["a:4096:512:2".to_string(), "b:0:512:1".to_string()];
        let faults = Faults::parse("a", &flags, 0)?;
        assert!(
            !faults.strike(Kind::Write, 0, 4096),
            "it ends before the range"
        );
        assert!(!faults.strike(Kind::Read, 4096, 512));
        assert!(faults.strike(Kind::Write, 0, 4097));
        assert!(faults.strike(Kind::Zero, 4096, 512));
        assert!(!faults.strike(Kind::Write, 4096, 512), "the third time");
        for wrong in ["a", "a:1:2", "a:x:1:1", "a:18446744073709551615:1:1"] {
            assert!(Faults::parse("a", &[wrong.into()], 0).is_err(), "{wrong}");
        }
        Ok(())
    }
}
