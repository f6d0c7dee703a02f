//! Faults on request, below the filter: writes that fail, are late or are torn, and a process that dies or
//! waits at a named point.
//!
//! Invariant: a fault strikes as often as it was asked for, not more; which of several strikes, and
//! what a torn write leaves, depends on the seed and on the order of the I/Os only.

use super::points::Point;
use anyhow::{Context, bail, ensure};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A torn write is torn between these.
const SECTOR_BYTES: u64 = 512;
/// Nobody waits longer for one I/O.
const MAX_DELAY_US: u64 = 600_000_000;

/// What is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Writes, zeros and trims of the disk, the guest's and the filter's own.
    Write,
    /// Reads of the disk.
    Read,
    /// Flushes of the disk.
    Flush,
    /// Each of the above.
    Any,
    /// Writes to sidecars.
    Sidecar,
}

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Act {
    Fail,
    Delay,
    Tear,
    TearKill,
}

/// A fault as it is asked for.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    what: What,
    #[serde(rename = "do")]
    act: Act,
    /// A disk's label; none: any.
    disk: Option<String>,
    #[serde(default)]
    offset_bytes: u64,
    /// None: to the end.
    len_bytes: Option<u64>,
    /// The first so many that it could strike go by.
    #[serde(default)]
    skip: u64,
    /// How often it strikes; none: always.
    count: Option<u64>,
    /// Of each I/O, 0 to 1.
    chance: Option<f64>,
    delay_us: Option<u64>,
}

struct Armed {
    id: u64,
    rule: Rule,
    struck: u64,
}

/// The process is to die or to wait at a point.
struct Stop {
    point: Point,
    disk: Option<String>,
    left: u64,
    /// Where it says that it is there, and waits; none: it dies.
    hold: Option<PathBuf>,
}

struct State {
    random: u64,
    next_id: u64,
    rules: Vec<Armed>,
    stops: Vec<Stop>,
}

/// The faults of a VM's process.
pub struct Faults {
    seed: u64,
    has_rules: AtomicBool,
    has_stops: AtomicBool,
    state: Mutex<State>,
}

/// What happens to one I/O.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Strike {
    /// Nothing.
    Pass,
    /// It fails, nothing of it is done.
    Fail,
    /// These parts of it (offsets within it) are done; then it fails, or the process dies.
    Tear {
        /// Whole sectors, in order.
        landed: Vec<Range<usize>>,
        /// The process dies.
        kill: bool,
    },
}

/// The end of a process that has no say in it.
pub fn die(why: &str) -> ! {
    tracing::error!("killed as asked for: {why}");
    let _ = signal_hook::low_level::raise(libc::SIGKILL);
    std::process::abort()
}

/// Says at a socket that a point is reached, and waits until the other end closes.
fn hold(point: Point, disk: &str, socket: &Path) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    let reached = json!({"pid": std::process::id(), "point": point.name(), "disk": disk});
    writeln!(stream, "{reached}")?;
    // Whatever comes is of no interest, up to the end.
    std::io::copy(&mut stream, &mut std::io::sink())?;
    Ok(())
}

fn next(random: &mut u64) -> u64 {
    *random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *random;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Some of the sectors of a write: with two or more, at least one and not all.
fn landed(random: &mut u64, len: u64) -> Vec<Range<usize>> {
    let sectors = len.div_ceil(SECTOR_BYTES).max(1);
    let mut has: Vec<bool> = (0..sectors).map(|_| next(random) & 1 == 1).collect();
    if sectors > 1 {
        let one = (next(random) % sectors) as usize;
        let other = (one + 1 + (next(random) % (sectors - 1)) as usize) % sectors as usize;
        if let Some(sector) = has.get_mut(one) {
            *sector = true;
        }
        if let Some(sector) = has.get_mut(other) {
            *sector = false;
        }
    }
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, _) in has.iter().enumerate().filter(|(_, has)| **has) {
        let from = at * SECTOR_BYTES as usize;
        let to = (from + SECTOR_BYTES as usize).min(len as usize);
        match runs.last_mut().filter(|run| run.end == from) {
            Some(run) => run.end = to,
            None => runs.push(from..to),
        }
    }
    runs
}

impl Rule {
    fn check(self) -> anyhow::Result<Self> {
        let len = self.len_bytes.unwrap_or_default();
        let end = self.offset_bytes.checked_add(len);
        ensure!(end.is_some(), "the fault's range has no end");
        if let Some(chance) = self.chance {
            ensure!(
                (0.0..=1.0).contains(&chance),
                "chance {chance} is not within 0 and 1"
            );
        }
        match (self.act, self.delay_us) {
            (Act::Delay, None) => bail!("a delay needs `delay_us`"),
            (Act::Delay, Some(us)) if us > MAX_DELAY_US => {
                bail!("a delay of {us} us is longer than {MAX_DELAY_US}")
            }
            (Act::Delay, _) => {}
            (_, Some(_)) => bail!("`delay_us` belongs to `do=delay`"),
            (Act::Tear | Act::TearKill, _) if !matches!(self.what, What::Write | What::Sidecar) => {
                bail!("only a write can be torn: what=write or what=sidecar")
            }
            _ => {}
        }
        Ok(self)
    }

    fn meets(&self, what: What, disk: &str, offset: u64, len: u64) -> bool {
        let of_kind = self.what == what || self.what == What::Any && what != What::Sidecar;
        let of_disk = self.disk.as_deref().is_none_or(|label| label == disk);
        let end = self
            .len_bytes
            .map_or(u64::MAX, |len| self.offset_bytes + len);
        let touches = what == What::Flush || self.offset_bytes < offset + len && offset < end;
        of_kind && of_disk && touches
    }
}

impl Faults {
    /// None yet.
    pub fn new(seed: Option<u64>) -> Self {
        let seed = seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u128() as u64);
        let state = State {
            random: seed,
            next_id: 1,
            rules: Vec::new(),
            stops: Vec::new(),
        };
        Self {
            seed,
            has_rules: AtomicBool::new(false),
            has_stops: AtomicBool::new(false),
            state: Mutex::new(state),
        }
    }

    /// All chance in it comes from this.
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// Adds a fault; its number.
    pub fn add(&self, asked: Value) -> anyhow::Result<u64> {
        let rule: Rule = serde_json::from_value(asked).context("this is no fault")?;
        let rule = rule.check()?;
        let mut state = self.state.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.rules.push(Armed {
            id,
            rule,
            struck: 0,
        });
        self.has_rules.store(true, Ordering::Relaxed); // read again under the lock
        Ok(id)
    }

    /// Adds a fault of a flag: KEY=VALUE,KEY=VALUE.
    pub fn add_flag(&self, flag: &str) -> anyhow::Result<u64> {
        let mut asked = Map::new();
        for pair in flag.split(',') {
            let (key, value) = pair
                .split_once('=')
                .with_context(|| format!("--fault {flag}: `{pair}` is not KEY=VALUE"))?;
            let number = serde_json::from_str::<serde_json::Number>(value);
            // A disk may be called `1`.
            let value = match number {
                Ok(number) if key != "disk" => Value::Number(number),
                _ => Value::String(value.into()),
            };
            asked.insert(key.into(), value);
        }
        self.add(asked.into())
            .with_context(|| format!("--fault {flag}"))
    }

    /// Adds failing writes of a flag: LABEL:OFFSET:LENGTH:COUNT.
    pub fn add_write_flag(&self, flag: &str) -> anyhow::Result<u64> {
        let parts: Vec<&str> = flag.split(':').collect();
        let [disk, offset, len, count] = parts.as_slice() else {
            bail!("--fault-write {flag}: expected LABEL:OFFSET:LENGTH:COUNT");
        };
        let number = |text: &str| {
            text.parse::<u64>()
                .with_context(|| format!("--fault-write {flag}: `{text}`"))
        };
        self.add(json!({
            "what": "write", "do": "fail", "disk": disk, "offset_bytes": number(offset)?,
            "len_bytes": number(len)?, "count": number(count)?,
        }))
        .with_context(|| format!("--fault-write {flag}"))
    }

    /// The process dies when it passes a point for the n-th time: POINT or POINT:N.
    pub fn kill_at(&self, text: &str, disk: Option<String>) -> anyhow::Result<()> {
        self.stop_at(text, disk, None)
    }

    /// The thread that passes a point for the n-th time (POINT or POINT:N) connects to a unix socket, says so
    /// in a line, and waits until the other end closes. If nobody listens there it goes on.
    pub fn hold_at(&self, text: &str, disk: Option<String>, socket: &str) -> anyhow::Result<()> {
        ensure!(!socket.is_empty(), "the path of a unix socket is missing");
        self.stop_at(text, disk, Some(socket.into()))
    }

    /// The same of a flag: `POINT[:N]=SOCKET`.
    pub fn hold_at_flag(&self, flag: &str) -> anyhow::Result<()> {
        let (point, socket) = flag
            .split_once('=')
            .with_context(|| format!("`{flag}`: expected POINT=SOCKET or POINT:N=SOCKET"))?;
        self.hold_at(point, None, socket)
    }

    fn stop_at(
        &self,
        text: &str,
        disk: Option<String>,
        hold: Option<PathBuf>,
    ) -> anyhow::Result<()> {
        let (name, nth) = match text.split_once(':') {
            None => (text, 1),
            Some((name, nth)) => {
                let nth = nth.parse().ok().filter(|n| *n > 0);
                let nth = nth.with_context(|| format!("`{text}`: expected POINT:N, N from 1"))?;
                (name, nth)
            }
        };
        let point = Point::named(name)?;
        self.state.lock().stops.push(Stop {
            point,
            disk,
            left: nth,
            hold,
        });
        self.has_stops.store(true, Ordering::Relaxed); // read again under the lock
        Ok(())
    }

    /// Takes a fault back, or all of them. How many.
    pub fn heal(&self, id: Option<u64>) -> usize {
        let mut state = self.state.lock();
        let before = state.rules.len() + state.stops.len();
        match id {
            Some(id) => state.rules.retain(|armed| armed.id != id),
            None => {
                state.rules.clear();
                state.stops.clear();
            }
        }
        before - state.rules.len() - state.stops.len()
    }

    /// What was asked for, and how often it struck.
    pub fn list(&self) -> Value {
        let state = self.state.lock();
        let rules: Vec<Value> = state
            .rules
            .iter()
            .map(|armed| json!({"id": armed.id, "fault": armed.rule, "struck": armed.struck}))
            .collect();
        let stops = |held: bool| -> Vec<Value> {
            let asked = state
                .stops
                .iter()
                .filter(|stop| stop.hold.is_some() == held);
            asked
                .map(|stop| {
                    let (point, disk, left) = (stop.point.name(), &stop.disk, stop.left);
                    json!({"point": point, "disk": disk, "left": left, "socket": stop.hold})
                })
                .collect()
        };
        json!({
            "seed": self.seed, "faults": rules, "kill_at": stops(false), "hold_at": stops(true),
        })
    }

    /// The process passes a point.
    pub fn pass(&self, point: Point, disk: &str) {
        if !self.has_stops.load(Ordering::Relaxed) {
            return;
        }
        let mut holds = Vec::new();
        {
            let mut state = self.state.lock();
            for stop in &mut state.stops {
                let is_meant = stop.disk.as_deref().is_none_or(|label| label == disk);
                if stop.point == point && is_meant && stop.left > 0 {
                    stop.left -= 1;
                    match &stop.hold {
                        _ if stop.left > 0 => {}
                        Some(socket) => holds.push(socket.clone()),
                        None => die(&format!("at {}, disk {disk}", point.name())),
                    }
                }
            }
        }
        // Without the lock: the others go on.
        for socket in holds {
            if let Err(error) = hold(point, disk, &socket) {
                tracing::warn!("not held at {}: {error}", point.name());
            }
        }
    }

    /// What happens to an I/O; delays it if asked to.
    pub fn strike(&self, what: What, disk: &str, offset: u64, len: u64) -> Strike {
        if !self.has_rules.load(Ordering::Relaxed) {
            return Strike::Pass;
        }
        let mut delay_us = 0;
        let mut strike = Strike::Pass;
        {
            let mut state = self.state.lock();
            let State { random, rules, .. } = &mut *state;
            for armed in rules.iter_mut() {
                let rule = &mut armed.rule;
                let is_over = strike != Strike::Pass && rule.act != Act::Delay;
                if is_over || rule.count == Some(0) || !rule.meets(what, disk, offset, len) {
                    continue;
                }
                let chance = (next(random) >> 11) as f64 / (1u64 << 53) as f64;
                if rule.chance.is_some_and(|limit| chance >= limit) {
                    continue;
                }
                if rule.skip > 0 {
                    rule.skip -= 1;
                    continue;
                }
                rule.count = rule.count.map(|left| left - 1);
                armed.struck += 1;
                match rule.act {
                    Act::Delay => delay_us += rule.delay_us.unwrap_or_default(),
                    Act::Fail => strike = Strike::Fail,
                    Act::Tear | Act::TearKill => {
                        strike = Strike::Tear {
                            landed: landed(random, len),
                            kill: rule.act == Act::TearKill,
                        }
                    }
                }
            }
        }
        if delay_us > 0 {
            std::thread::sleep(Duration::from_micros(delay_us));
        }
        strike
    }
}

#[cfg(test)]
#[path = "faults_tests.rs"]
mod tests;
