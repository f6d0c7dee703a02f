//! Telling people how far it is: bars on a terminal, plain lines otherwise, nothing for machines.
//!
//! Invariant: nothing is written to stdout, which belongs to the result.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A bar, redrawn in place.
    Bar,
    /// A line at each tenth.
    Lines,
    /// Nothing.
    Silent,
}

impl Progress {
    /// A bar if stderr is a terminal, else lines; nothing if the result is for a machine.
    pub fn for_people(json: bool) -> Self {
        match (json, std::io::stderr().is_terminal()) {
            (true, _) => Self::Silent,
            (false, true) => Self::Bar,
            (false, false) => Self::Lines,
        }
    }

    /// Starts a stage of `total` steps or bytes.
    pub(crate) fn stage(self, what: impl Into<String>, total: u64, unit: Unit) -> Stage {
        let what = what.into();
        let bar = (self == Self::Bar).then(|| {
            let template = match unit {
                Unit::Bytes => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
                Unit::Objects => "{msg} [{bar:30}] {pos}/{len} objects {eta}",
            };
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            bar.set_style(style.progress_chars("=> "));
            bar.set_message(what.clone());
            bar
        });
        Stage {
            what,
            total: AtomicU64::new(total),
            done: AtomicU64::new(0),
            told: AtomicU64::new(0),
            unit,
            bar,
            lines: self == Self::Lines,
        }
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    Objects,
}

/// One stage of the work.
pub(crate) struct Stage {
    what: String,
    total: AtomicU64,
    done: AtomicU64,
    told: AtomicU64,
    unit: Unit,
    bar: Option<ProgressBar>,
    lines: bool,
}

impl Stage {
    /// More is done.
    pub(crate) fn add(&self, amount: u64) {
        let done = self.done.fetch_add(amount, Ordering::Relaxed) + amount;
        self.show(done, self.total.load(Ordering::Relaxed));
    }

    /// So much is done, of so much.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        self.show(done, total);
    }

    fn show(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
        let tenth = (done * 10).checked_div(total).unwrap_or(10);
        if self.lines && self.told.fetch_max(tenth, Ordering::Relaxed) < tenth {
            let (done, total) = match self.unit {
                Unit::Bytes => (bytes(done), bytes(total)),
                Unit::Objects => (done.to_string(), format!("{total} objects")),
            };
            eprintln!("{}: {done} of {total}", self.what);
        }
    }

    /// The stage is over.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A length for people.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}
