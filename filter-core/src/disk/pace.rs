//! The pace of a sync that yields to the guest: its reads are spaced so that the guest's latency
//! rises by little.
//!
//! Invariant: while the guest is busy, the sync's rate is raised only on evidence that at most one
//! I/O in a hundred takes longer than the quiet 99th percentile by more than the tolerance, and is cut
//! as soon as there is evidence of the contrary. It never falls below the floor, so a sync ends.
//!
//! There are two witnesses, and the worse one decides:
//!
//! - *the guest's I/Os*, from where they reach the filter to their completion: the disk below, and
//!   the filter's lock;
//! - *timers*: how late one is that has nothing to do with the sync. An I/O that waits for a core, since
//!   the sync's own work (or the daemon's) has it, waits before the filter sees it, and a timer waits as
//!   long. It counts against the sync from where such a wait would lift a usual I/O over the limit.
//!
//! The sync's time is cut into phases:
//!
//! | phase | the sync | what is counted | ends |
//! |---|---|---|---|
//! | quiet | pauses | the baselines: what is met without it | enough I/Os seen, at most a second |
//! | busy | reads at its rate | what is beyond the baselines' limits | half a second and enough I/Os seen |
//! | idle | reads as fast as it may | nothing | the guest's next I/O |
//!
//! The first moments of a phase are not counted: they still belong to the phase before. What is old
//! counts for less, and a guest that has become quicker at once replaces the baseline. There is
//! no clock here: the caller says what time it is.

use super::latency::{Histogram, Latencies, Span, bucket_of, lowest_ns};

const MS: u64 = 1_000_000;
/// Not counted at the beginning of a phase.
const SETTLE_NS: u64 = 30 * MS;
/// A guest without an I/O for this long is idle.
const IDLE_NS: u64 = 500 * MS;
/// A quiet phase sees this many I/Os, or ends after `QUIET_MAX_NS`.
const QUIET_SAMPLES: u64 = 100;
/// The first one, which has no other to stand on, sees more.
const QUIET_SAMPLES_FIRST: u64 = 400;
const QUIET_MIN_NS: u64 = 100 * MS;
const QUIET_MAX_NS: u64 = 1000 * MS;
const BUSY_MIN_NS: u64 = 500 * MS;
const BUSY_MAX_NS: u64 = 4000 * MS;
/// I/Os that the baseline stands on before anything is decided by it.
const BASELINE_SAMPLES: u64 = 30;
/// From here on the baseline's older half counts half.
const BASELINE_MOST: u64 = 2000;
/// I/Os that a rise needs.
const RISE_SAMPLES: u64 = 200;
/// I/Os after which a rate that calls for neither rise nor cut is looked at afresh.
const HOLD_SAMPLES: u64 = 2000;
/// How often counters are looked at.
const LOOK_NS: u64 = 10 * MS;
/// A late timer is made up for by at most this much.
const SLACK_NS: u64 = 2 * MS;
/// How soon to ask again during a pause.
const PAUSE_POLL_NS: u64 = 5 * MS;
/// How often a timer is to be looked at, while [`Pace::watches`].
pub const PROBE_NS: u64 = 2_500_000;
/// As good as no limit.
const MOST_BYTES_S: u64 = 1 << 40;

/// Choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaceConfig {
    /// The sync is never slower than this for the guest's sake, in bytes per second.
    pub floor_bytes_s: u64,
    /// The sync is never faster than this, in bytes per second.
    pub max_bytes_s: u64,
    /// What the 99th percentile may rise by, in percent. Below the promise (20), since a bucket is
    /// 3 % wide and a wrong step takes a moment to be seen.
    pub tolerance_percent: u64,
}

impl Default for PaceConfig {
    fn default() -> Self {
        Self {
            floor_bytes_s: 4 << 20,
            max_bytes_s: MOST_BYTES_S,
            tolerance_percent: 15,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nobody watches: nothing is limited.
    Off,
    Quiet,
    Busy,
    Idle,
}

/// What a baseline allows.
#[derive(Clone, Copy, Debug)]
struct Limit {
    /// The highest bucket that is still within the tolerance.
    bucket: usize,
    /// Of the baseline, those above it.
    without: u64,
}

/// What a look at a witness calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// More than chance is beyond the limit.
    Cut,
    /// Not enough seen, or neither good nor bad.
    Wait,
    /// Neither good nor bad for so long that it is looked at afresh.
    Afresh,
    /// Good enough.
    Rise,
}

/// One witness: what it met without the sync, and what since a moment.
#[derive(Debug, Default)]
struct Witness {
    span: Span,
    baseline: Histogram,
    limit: Option<Limit>,
}

impl Witness {
    /// What was seen since the span began goes into the baseline, and what is old counts for less.
    fn learn(&mut self, met: &Latencies) {
        if self.baseline.total() >= BASELINE_MOST {
            self.baseline.halve();
        }
        self.baseline.merge(self.span.look(met));
    }

    fn forget(&mut self) {
        self.baseline.clear();
        self.limit = None;
    }

    fn allow(&mut self, most_ns: u64) {
        let bucket = bucket_of(most_ns);
        self.limit = Some(Limit {
            bucket,
            without: self.baseline.above(bucket),
        });
    }

    /// The quantile's shortest latency, in ns.
    fn baseline_ns(&self, permille: u64) -> Option<u64> {
        self.baseline.quantile(permille).map(lowest_ns)
    }

    fn known(&self) -> bool {
        self.baseline.total() >= BASELINE_SAMPLES
    }

    /// What was seen since the span began.
    fn verdict(&mut self, met: &Latencies) -> Verdict {
        let Some(limit) = self.limit.filter(|_| self.known()) else {
            return Verdict::Wait;
        };
        let seen = self.span.look(met);
        let (total, slow) = (seen.total(), seen.above(limit.bucket));
        let of_itself = |total: u64| total * limit.without / self.baseline.total();
        // Half of what is allowed, so that what a rise overdoes is made up for; or what the
        // guest has of itself.
        let few = (total / 200).max(of_itself(total));
        let most = total.max(RISE_SAMPLES);
        if slow > by_chance((most / 100).max(of_itself(most))) {
            Verdict::Cut
        } else if total >= RISE_SAMPLES && slow <= few {
            Verdict::Rise
        } else if total >= HOLD_SAMPLES {
            Verdict::Afresh
        } else {
            Verdict::Wait
        }
    }
}

/// What the disk's filter met since it was opened.
#[derive(Debug, Default)]
pub struct Met {
    /// How long the guest's I/Os took.
    pub ios: Latencies,
    /// How late timers were that were to run every [`PROBE_NS`]; empty without such timers.
    pub timers: Latencies,
}

/// Figures, for status and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PaceFigures {
    /// What the sync may read while the guest is busy, in bytes per second.
    pub rate_bytes_s: u64,
    /// The guest's 99th percentile without the sync, in ns; 0 if not known.
    pub quiet_p99_ns: u64,
    /// How late a timer usually is without the sync, in ns; 0 if not known.
    pub quiet_late_ns: u64,
    /// Times that the rate was cut.
    pub cuts: u64,
}

impl core::fmt::Display for PaceFigures {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (rate, p99_us) = (self.rate_bytes_s >> 20, self.quiet_p99_ns / 1000);
        let (late_us, cuts) = (self.quiet_late_ns / 1000, self.cuts);
        write!(
            f,
            "{rate} MiB/s for a busy guest, whose quiet p99 is {p99_us} us where timers are {late_us} us late; {cuts} cuts"
        )
    }
}

/// The pace of one disk's sync.
#[derive(Debug)]
pub struct Pace {
    config: PaceConfig,
    phase: Phase,
    now_ns: u64,
    phase_since_ns: u64,
    /// The phase's first moments are over: `span` counts.
    counting: bool,
    looked_ns: u64,
    ios: Witness,
    timers: Witness,
    rate_bytes_s: u64,
    /// How long the busy phase is to be, and the floor in it.
    busy_ns: u64,
    floor_now_bytes_s: u64,
    /// No cut yet: rises double.
    first_rise: bool,
    /// The rate made the sync wait since the last decision: a rise would change something.
    held_back: bool,
    next_ns: u64,
    last_count: u32,
    active_ns: u64,
    cuts: u64,
}

/// As many may be above the limit by chance where this many are expected: a standard deviation more, and one.
const fn by_chance(expected: u64) -> u64 {
    expected + expected.isqrt() + 1
}

/// Whether the guest's own latency has changed: of a hundred I/Os not a quarter reaches the median.
fn is_quicker(seen: &Histogram, baseline: &Histogram) -> bool {
    let median = baseline.quantile(500).unwrap_or(0);
    let reach = seen.above(median.saturating_sub(1));
    median > 0 && seen.total() >= QUIET_SAMPLES && reach < seen.total() / 4
}

impl Pace {
    /// A pace that nobody watches yet.
    pub fn new(config: PaceConfig) -> Self {
        let max_bytes_s = config.max_bytes_s.clamp(1, MOST_BYTES_S);
        let floor_bytes_s = config.floor_bytes_s.clamp(1, max_bytes_s);
        let config = PaceConfig {
            floor_bytes_s,
            max_bytes_s,
            ..config
        };
        Self {
            config,
            phase: Phase::Off,
            now_ns: 0,
            phase_since_ns: 0,
            counting: false,
            looked_ns: 0,
            ios: Witness::default(),
            timers: Witness::default(),
            rate_bytes_s: floor_bytes_s,
            busy_ns: BUSY_MIN_NS,
            floor_now_bytes_s: floor_bytes_s,
            first_rise: true,
            held_back: false,
            next_ns: 0,
            last_count: 0,
            active_ns: 0,
            cuts: 0,
        }
    }

    /// Figures.
    pub fn figures(&self) -> PaceFigures {
        PaceFigures {
            rate_bytes_s: self.rate_bytes_s,
            quiet_p99_ns: self.ios.baseline_ns(990).unwrap_or(0),
            quiet_late_ns: self.timers.baseline_ns(500).unwrap_or(0),
            cuts: self.cuts,
        }
    }

    /// The sync is over: the next one begins with a look at the guest. The baseline stays.
    pub fn stop(&mut self) {
        self.phase = Phase::Off;
    }

    /// Whether it wants to know how late timers are: one is to run every [`PROBE_NS`].
    pub const fn watches(&self) -> bool {
        matches!(self.phase, Phase::Quiet | Phase::Busy)
    }

    /// Looks at what the guest's I/Os and the timers met. Call it before each [`Pace::take`].
    pub fn observe(&mut self, now_ns: u64, met: &Met) {
        self.now_ns = self.now_ns.max(now_ns);
        let count = met.ios.count();
        let moved = count != self.last_count;
        self.last_count = count;
        if self.phase == Phase::Off {
            self.active_ns = self.now_ns;
            self.enter(Phase::Quiet, met);
            return;
        }
        if moved {
            self.active_ns = self.now_ns;
        }
        if self.phase == Phase::Idle {
            if moved {
                // The first of its I/Os have met full speed: make up for it.
                self.slow_down();
                let known = self.ios.known();
                self.enter(if known { Phase::Busy } else { Phase::Quiet }, met);
            }
            return;
        }
        if self.now_ns - self.active_ns >= IDLE_NS {
            self.enter(Phase::Idle, met);
            return;
        }
        let in_phase_ns = self.now_ns - self.phase_since_ns;
        if !self.counting {
            if self.now_ns - self.looked_ns >= SETTLE_NS {
                self.counting = true;
                self.begin(met);
            }
            return;
        }
        if self.now_ns - self.looked_ns >= LOOK_NS {
            self.looked_ns = self.now_ns;
            if self.phase == Phase::Quiet {
                self.look_quiet(in_phase_ns, met);
            } else {
                self.look_busy(in_phase_ns, met);
            }
        }
    }

    fn enter(&mut self, phase: Phase, met: &Met) {
        self.phase = phase;
        self.phase_since_ns = self.now_ns;
        self.next_ns = self.now_ns;
        self.held_back = false;
        self.last_count = met.ios.count();
        self.settle();
    }

    /// What comes next still belongs to what was before.
    fn settle(&mut self) {
        self.counting = false;
        self.looked_ns = self.now_ns;
    }

    /// Both witnesses count from now on.
    fn begin(&mut self, met: &Met) {
        self.ios.span.begin(&met.ios);
        self.timers.span.begin(&met.timers);
    }

    fn look_quiet(&mut self, in_phase_ns: u64, met: &Met) {
        let seen = self.ios.span.look(&met.ios);
        let wanted = if self.ios.baseline.total() < QUIET_SAMPLES_FIRST {
            QUIET_SAMPLES_FIRST
        } else {
            QUIET_SAMPLES
        };
        let timed = self.timers.span.look(&met.timers).total();
        let enough = seen.total() >= wanted
            && in_phase_ns >= QUIET_MIN_NS
            && (timed == 0 || self.timers.baseline.total() + timed >= 2 * BASELINE_SAMPLES);
        if !enough && in_phase_ns < QUIET_MAX_NS {
            return;
        }
        if is_quicker(seen, &self.ios.baseline) {
            // The old tail would excuse too much for a long time.
            self.ios.forget();
            self.timers.forget();
        }
        self.ios.learn(&met.ios);
        self.timers.learn(&met.timers);
        self.allow();
        // The floor holds on average: what the pause took from it comes on top until the next one.
        self.busy_ns = BUSY_MIN_NS.max(2 * in_phase_ns);
        self.floor_now_bytes_s = self.config.floor_bytes_s
            + (u128::from(self.config.floor_bytes_s) * u128::from(in_phase_ns)
                / u128::from(self.busy_ns)) as u64;
        self.enter(Phase::Busy, met);
    }

    /// Sets the limits by the baselines.
    fn allow(&mut self) {
        let Some(p99_ns) = self.ios.baseline_ns(990) else {
            return;
        };
        let most_ns = p99_ns / 100 * (100 + self.config.tolerance_percent);
        self.ios.allow(most_ns);
        let usual = (self.ios.baseline_ns(500), self.timers.baseline_ns(500));
        if let (Some(io_ns), Some(timer_ns)) = usual {
            // What a usual I/O may have to wait without being a slow one.
            let wait_ns = most_ns.saturating_sub(io_ns);
            self.timers.allow(timer_ns + wait_ns);
        }
    }

    fn look_busy(&mut self, in_phase_ns: u64, met: &Met) {
        let seen = self.ios.span.look(&met.ios);
        let total = seen.total();
        if is_quicker(seen, &self.ios.baseline) {
            return self.enter(Phase::Quiet, met);
        }
        let mut verdict = self.ios.verdict(&met.ios);
        if self.timers.known() {
            verdict = verdict.min(self.timers.verdict(&met.timers));
        }
        match verdict {
            Verdict::Cut => {
                self.cut();
                self.settle();
            }
            Verdict::Rise => {
                if self.held_back {
                    self.rise();
                }
                self.begin(met);
            }
            Verdict::Afresh => self.begin(met),
            Verdict::Wait => {}
        }
        let enough = total >= QUIET_SAMPLES && in_phase_ns >= self.busy_ns;
        if enough || in_phase_ns >= BUSY_MAX_NS {
            self.enter(Phase::Quiet, met);
        }
    }

    fn slow_down(&mut self) {
        let to = self.rate_bytes_s / 3 * 2;
        self.rate_bytes_s = to.max(self.config.floor_bytes_s);
    }

    fn cut(&mut self) {
        self.slow_down();
        if self.first_rise {
            // What was good before it was doubled, and a little less.
            self.slow_down();
        }
        self.first_rise = false;
        self.cuts += 1;
    }

    fn rise(&mut self) {
        let by = if self.first_rise {
            self.rate_bytes_s
        } else {
            self.rate_bytes_s / 8
        };
        self.rate_bytes_s = (self.rate_bytes_s + by).min(self.config.max_bytes_s);
        self.held_back = false;
    }

    /// Whether the sync may read `bytes` now; if not, how long to wait before asking again, in ns.
    pub fn take(&mut self, bytes: u64) -> Result<(), u64> {
        let rate_bytes_s = match self.phase {
            Phase::Off => return Ok(()),
            Phase::Quiet => return Err(PAUSE_POLL_NS),
            Phase::Busy => self.rate_bytes_s.max(self.floor_now_bytes_s),
            Phase::Idle => self.config.max_bytes_s,
        };
        if self.now_ns < self.next_ns {
            self.held_back = true;
            return Err((self.next_ns - self.now_ns).min(PAUSE_POLL_NS));
        }
        let takes_ns = u128::from(bytes) * 1_000_000_000 / u128::from(rate_bytes_s);
        let from_ns = self.next_ns.max(self.now_ns.saturating_sub(SLACK_NS));
        self.next_ns = from_ns + u64::try_from(takes_ns).unwrap_or(u64::MAX / 2);
        Ok(())
    }
}

#[cfg(test)]
#[path = "pace_tests.rs"]
mod tests;
