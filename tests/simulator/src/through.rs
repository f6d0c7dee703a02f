//! Write-through (`jetdr.ack=log`): completions that wait for the appliance's log, and what a guest may
//! rely on once it was told.
//!
//! Invariant: as in the filter library's `hold`: a completion that is held is handed out once, by a look
//! that is planned while one is held. What the appliance's log holds is read from the records that its
//! volume made durable, not from what anybody says of them.

use crate::guest::{Io, Open, RELAXED};
use crate::oracle::Moment;
use crate::world::{Event, MS, US, World};
use filter_core::disk::ack::{Ack, AckConfig, AckEvent, Standing};
use filter_core::disk::cut_hold::{CUT_HOLD_NS, CutHold};
use filter_core::lane::layout::LaneState;
use std::collections::BTreeMap;
use std::ops::Range;

/// How soon held completions are looked at again.
const POLL_NS: u64 = 200 * US;
/// Records of one disk that are remembered as logged: a guest is told of the newest ones only.
const REMEMBERED: usize = 4096;

/// A write that the disk has done and the guest was not told of.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// Its units.
    pub units: Range<usize>,
    issued: Moment,
    since_ns: u64,
    seq: Option<u64>,
}

/// The completions of one open disk.
pub struct Completions {
    ack: Ack<u64>,
    budget_ns: u64,
    armed: bool,
    waiting: BTreeMap<u64, Waiting>,
    /// What a cut over several hosts holds.
    cut_hold: CutHold<u64>,
    /// Those completions, with whether the guest is told because the log has the write, and since when.
    cut_held: BTreeMap<u64, (Waiting, bool, u64)>,
}

impl Completions {
    /// Of a disk whose completions wait at most so long for the appliance's log; 0: they do not.
    pub const fn new(budget_ns: u64) -> Self {
        let ack = Ack::new(AckConfig {
            log: budget_ns > 0,
            // As in the filter library: the last look comes before the budget ends.
            budget_ns: budget_ns.saturating_sub(2 * POLL_NS),
        });
        Self {
            ack,
            budget_ns,
            armed: false,
            waiting: BTreeMap::new(),
            cut_hold: CutHold::new(CUT_HOLD_NS),
            cut_held: BTreeMap::new(),
        }
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.cut_held.is_empty()
    }

    /// Whether a write that is held overlaps these units: the guest does not know that it is done.
    pub fn overlaps(&self, units: &Range<usize>) -> bool {
        let for_cut = self.cut_held.values().map(|(io, ..)| io);
        let mut held = self.waiting.values().chain(for_cut);
        held.any(|io| io.units.start < units.end && units.start < io.units.end)
    }
}

/// What the appliance's log was seen to hold, and what guests rely on because of it.
#[derive(Default)]
pub struct Through {
    /// Per disk: seq, and where in the disk the record ends, in bytes.
    logged: BTreeMap<[u8; 16], BTreeMap<u64, u64>>,
    /// Per disk: when the newest write was issued that a guest was told is in the log.
    promised: BTreeMap<usize, Moment>,
    /// The same when a cut was asked for, by the cut's epoch.
    asked: BTreeMap<u32, BTreeMap<usize, Moment>>,
}

impl Through {
    /// The log is gone, or lost what it held: a guest may rely on nothing of before.
    pub fn log_lost(&mut self) {
        self.promised.clear();
        self.asked.clear();
    }

    /// A cut is asked for.
    pub fn cut_asked(&mut self, epoch: u32) {
        self.asked.insert(epoch, self.promised.clone());
    }

    /// What a cut must hold of disks whatever became of their host: it is right at this moment or a
    /// later one.
    pub fn floor(&self, epoch: u32, disks: impl Iterator<Item = usize>) -> Moment {
        let asked = self.asked.get(&epoch);
        let of = |disk| asked.and_then(|asked| asked.get(&disk)).copied();
        disks.filter_map(of).max().unwrap_or(0)
    }

    fn holds(&self, disk: &[u8; 16], seq: u64, end_bytes: u64) -> bool {
        self.logged.get(disk).and_then(|of| of.get(&seq)) == Some(&end_bytes)
    }
}

fn standing(open: &mut Open, now_ns: u64) -> Standing {
    let published = open.core.producer().published().seq();
    let durable = open.core.memory().consumer().durable_seq.load(RELAXED);
    Standing {
        streaming: open.core.state() == LaneState::Streaming,
        beginnings: open.core.beginnings(),
        durable_seq: if durable <= published { durable } else { 0 },
        now_ns,
    }
}

impl World {
    /// The longest that a completion may wait for the log: some VMs ask for it, most do not. 0: not.
    pub fn some_ack_budget(&mut self) -> u64 {
        match self.numbers.chance(350) {
            true => self.numbers.spread(2 * MS, 100 * MS),
            false => 0,
        }
    }

    /// A write has come back from its disk, which has it: the guest is told now or later.
    pub fn came_back(&mut self, disk: usize, name: u64, io: &Io, seq: Option<u64>) {
        let now = self.now;
        let waiting = Waiting {
            units: io.units.clone(),
            issued: io.issued,
            since_ns: now,
            seq,
        };
        let held = self.core(disk, |open, _| {
            let standing = standing(open, now);
            let completions = &mut open.completions;
            let held = completions.ack.is_on() && completions.ack.done(name, seq, standing);
            if held {
                completions.waiting.insert(name, waiting.clone());
            }
            (held, completions.relies())
        });
        match held {
            Some((true, _)) => self.count("ack: held"),
            Some((false, relies)) => self.goes_up(disk, name, waiting, relies),
            None => {}
        }
        self.look_at_completions(disk);
    }

    /// Tells the guest what needs to wait no longer.
    pub fn look_at_completions(&mut self, disk: usize) {
        let (now, run) = (self.now, self.run_of(disk));
        let looked = self.core(disk, |open, _| {
            let standing = standing(open, now);
            let completions = &mut open.completions;
            if !completions.ack.is_on() {
                return None;
            }
            let mut out = Vec::new();
            completions.ack.poll(standing, |name| out.push(name));
            let event = completions.ack.take_event();
            let arm =
                completions.ack.wants_poll() && !std::mem::replace(&mut completions.armed, true);
            let waiting = &mut completions.waiting;
            let out = out
                .iter()
                .filter_map(|name| Some((*name, waiting.remove(name)?)));
            Some((out.collect::<Vec<_>>(), event, arm, completions.relies()))
        });
        let Some(Some((out, event, arm, relies))) = looked else {
            return;
        };
        if arm {
            self.after(POLL_NS, Event::Completions(disk, run));
        }
        for (name, io) in out {
            self.goes_up(disk, name, io, relies);
        }
        match event {
            Some(AckEvent::TooSlow) => self.count("ack: fell back, too slow"),
            Some(AckEvent::NotStreaming) => self.count("ack: fell back, not streaming"),
            Some(AckEvent::Back) => self.count("ack: held again"),
            None => {}
        }
        self.stop_if_idle(disk);
    }

    /// The timer of held completions.
    pub fn completions_timer(&mut self, disk: usize, of: u64) {
        if self.open_of(disk, of).is_some() {
            self.core(disk, |open, _| open.completions.armed = false);
            self.look_at_completions(disk);
        }
    }

    /// The VM is stunned: everything that is held goes up.
    pub fn release_completions(&mut self, disk: usize) {
        let out = self.core(disk, |open, _| {
            let completions = &mut open.completions;
            completions.ack.release_all(|_| {});
            if completions.cut_hold.release_all(|_| {}) {
                open.core.tear_cut();
            }
            let for_cut = std::mem::take(&mut completions.cut_held).into_values();
            let out = std::mem::take(&mut completions.waiting).into_values();
            out.chain(for_cut.map(|(io, ..)| io)).collect::<Vec<_>>()
        });
        for io in out.unwrap_or_default() {
            self.tell_guest(disk, &io, false);
        }
    }

    /// A completion need not wait for the log any more; perhaps for a cut.
    fn goes_up(&mut self, disk: usize, name: u64, io: Waiting, relies: bool) {
        let budget_ns = self.core(disk, |open, _| open.completions.budget_ns);
        let waited_ns = self.now - io.since_ns;
        self.longest_acked_ns = self.longest_acked_ns.max(waited_ns);
        if waited_ns > budget_ns.unwrap_or(0) {
            let ms = waited_ns as f64 / 1e6;
            self.violated(format!("a completion waited for {ms} ms for the log"));
        }
        let (now, until) = (self.now, self.hold_until(disk));
        let held = self.core(disk, |open, _| {
            let completions = &mut open.completions;
            let held = completions.cut_hold.done(name, until, now);
            if held {
                completions.cut_held.insert(name, (io.clone(), relies, now));
            }
            held
        });
        match held {
            Some(true) => self.count("cut: completion held"),
            _ => self.tell_guest(disk, &io, relies),
        }
    }

    /// Until when completions of a disk are held for a cut.
    fn hold_until(&self, disk: usize) -> u64 {
        let vm = self.disks.get(disk).and_then(|disk| self.vms.get(disk.vm));
        let host = vm.and_then(|vm| self.hosts.get(vm.host));
        host.map_or(0, |host| host.hold_until)
    }

    /// Completions of a host's VMs that were held for a cut go on, those for which it is time.
    pub fn look_at_cut_holds(&mut self, host: usize) {
        let now = self.now;
        for disk in 0..self.disks.len() {
            let vm = self.disks.get(disk).and_then(|disk| self.vms.get(disk.vm));
            if vm.is_none_or(|vm| vm.host != host || !vm.runs) {
                continue;
            }
            let until = self.hold_until(disk);
            let told = self.core(disk, |open, _| {
                let completions = &mut open.completions;
                let mut names = Vec::new();
                if completions
                    .cut_hold
                    .poll(until, now, |name| names.push(name))
                {
                    open.core.tear_cut();
                }
                let held = &mut completions.cut_held;
                let told = names.iter().filter_map(|name| held.remove(name));
                told.collect::<Vec<_>>()
            });
            for (io, relies, since_ns) in told.unwrap_or_default() {
                let held_ns = now - since_ns;
                self.longest_cut_hold_ns = self.longest_cut_hold_ns.max(held_ns);
                if held_ns > CUT_HOLD_NS {
                    let ms = held_ns as f64 / 1e6;
                    self.violated(format!("a completion was held for {ms} ms for a cut"));
                }
                self.tell_guest(disk, &io, relies);
            }
            self.stop_if_idle(disk);
        }
    }

    fn tell_guest(&mut self, disk: usize, io: &Waiting, relies: bool) {
        self.oracle.complete(disk, io.units.clone(), io.issued);
        if !relies {
            return;
        }
        self.count("ack: told with the log");
        let Some(id) = self.disks.get(disk).map(|disk| disk.id) else {
            return;
        };
        let end_bytes = io.units.end as u64 * crate::storage::UNIT_BYTES;
        let there = io
            .seq
            .is_some_and(|seq| self.through.holds(&id, seq, end_bytes));
        if !there {
            let (seq, units) = (io.seq, &io.units);
            return self.violated(format!(
                "disk {disk}: a guest was told that its write of units {units:?} (record {seq:?}) \
                 is in the log, which does not hold it"
            ));
        }
        let promised = self.through.promised.entry(disk).or_default();
        *promised = (*promised).max(io.issued);
    }

    /// The log's write under way is durable: what is in it can be relied on.
    pub(crate) fn note_logged(&mut self) {
        let Some(server) = &self.server else { return };
        let shared = server.shared.borrow();
        for (disk, header) in shared.domain.log.records_under_way() {
            let logged = self.through.logged.entry(disk).or_default();
            logged.insert(header.seq, header.end_bytes());
            if logged.len() > REMEMBERED {
                logged.pop_first();
            }
        }
    }
}

impl Completions {
    /// Whether what the guest is told now it is told because the log has it.
    const fn relies(&self) -> bool {
        self.ack.is_on() && !self.ack.has_fallen_back()
    }
}
