//! What is planned: bursts of writes with faults among them, long pauses in between, and at last a time in
//! which everything is well.
//!
//! Invariant: in the last phase nothing strikes any more, and the replica must become what the disks hold.

use crate::faults::ILLS;
use crate::guest::ProtectedDisk;
use crate::habits::Habits;
use crate::numbers::Numbers;
use crate::store::Mood;
use crate::world::{Event, HOUR, MS, Pace, SECOND, US, World};
use std::collections::BTreeMap;

/// How long it may take, once all is well, until every disk streams and the newest cut is what they hold.
pub const LIVENESS_LIMIT: u64 = 1800 * SECOND;

/// The longest pause between two bursts.
const LONGEST_PAUSE: u64 = 14 * 24 * HOUR;

/// Where the run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Anything may happen.
    Safety,
    /// All is well since then: the replica must become what the disks hold.
    Liveness(u64),
    /// It has.
    Over,
}

/// What is planned.
pub struct Plan {
    /// Where the run stands.
    pub phase: Phase,
    /// What is usual in this seed.
    pub habits: Habits,
    episodes: u64,
    /// The usual time between cuts.
    pub cut_interval: u64,
    /// What the appliance has acknowledged, disk by disk.
    pub acknowledged: BTreeMap<[u8; 16], u64>,
    /// Whether the log was not lost since the appliance started last.
    pub log_is_whole: bool,
    /// Its bytes were changed: it may be unreadable.
    pub log_damaged: bool,
    pub(crate) store: u64,
    /// When the guests stopped for good.
    pub(crate) still_since: u64,
}

impl Plan {
    /// A plan of a seed.
    pub fn new(numbers: &mut Numbers) -> Self {
        Self {
            phase: Phase::Safety,
            habits: Habits::new(numbers),
            episodes: numbers.between(4, 10),
            cut_interval: numbers.spread(100 * MS, 5 * SECOND),
            acknowledged: BTreeMap::new(),
            log_is_whole: true,
            log_damaged: false,
            store: 0,
            still_since: 0,
        }
    }
}

impl World {
    /// The plan goes on.
    pub fn plan_step(&mut self) {
        match self.plan.phase {
            Phase::Safety if self.plan.episodes == 0 => self.all_is_well(),
            Phase::Safety => {
                self.plan.episodes -= 1;
                self.episode();
            }
            Phase::Liveness(since) => {
                self.look_after_vms();
                if self.now > since + LIVENESS_LIMIT {
                    let text = self.what_is_missing();
                    self.violated(format!("not well again in time: {text}"));
                }
                self.after(SECOND, Event::Plan);
            }
            Phase::Over => {}
        }
    }

    /// A burst with faults, then a pause.
    fn episode(&mut self) {
        let burst = self.numbers.spread(20 * MS, 3 * SECOND);
        let (gap, large) = self.plan.habits.burst(&mut self.numbers);
        self.say(|| format!("episode: {} s of writes", burst as f64 / 1e9));
        for vm in 0..self.vms.len() {
            if let Some(vm) = self.vms.get_mut(vm) {
                (vm.gap_ns, vm.large) = (gap, large);
            }
            self.vm_busy(vm, burst);
        }
        let most = self.plan.habits.most_strikes;
        for _ in 0..self.numbers.between(0, most) {
            // The first writes after a pause meet what later ones do not.
            let at = match self.numbers.below(3) {
                0 => self.numbers.spread(10 * US, burst),
                _ => self.numbers.between(0, burst * 3 / 2),
            };
            self.plan_strike(at);
        }
        let pause = match self.numbers.below(3) {
            0 => self.numbers.spread(10 * MS, 10 * SECOND),
            1 => self.numbers.spread(SECOND, 600 * SECOND),
            _ => self.numbers.spread(600 * SECOND, LONGEST_PAUSE),
        };
        let end = burst + pause;
        self.after(end, Event::Plan);
        self.plan_trickle(burst, self.now + end);
    }

    fn plan_strike(&mut self, after_ns: u64) {
        let strikes = &self.plan.habits.strikes;
        let total = strikes.iter().map(|(_, weight)| weight).sum();
        let mut at = self.numbers.below(total);
        let chosen = strikes.iter().find(|(_, weight)| {
            let found = at < *weight;
            at = at.saturating_sub(*weight);
            found
        });
        if let Some((strike, _)) = chosen.copied() {
            self.after(after_ns, Event::Strike(strike));
        }
    }

    /// In a long pause the guests do a little now and then.
    fn plan_trickle(&mut self, after_ns: u64, until: u64) {
        let wait = after_ns + self.numbers.spread(SECOND, 12 * HOUR);
        if self.now + wait < until {
            self.after(wait, Event::Trickle(until));
        }
    }

    /// A guest does a little, and at times something strikes.
    pub fn trickle(&mut self, until: u64) {
        if self.plan.phase != Phase::Safety {
            return;
        }
        let vm = self.any_vm();
        if let Some(vm) = self.vms.get_mut(vm) {
            (vm.gap_ns, vm.large) = (10 * MS, 15);
        }
        let busy = self.numbers.spread(MS, 200 * MS);
        self.vm_busy(vm, busy);
        if self.numbers.chance(200) {
            let at = self.numbers.spread(10 * US, 10 * SECOND);
            self.plan_strike(at);
        }
        self.plan_trickle(busy, until);
    }

    /// The faults stop; everything that is down is started.
    fn all_is_well(&mut self) {
        self.say(|| "from here on all is well".into());
        self.plan.phase = Phase::Liveness(self.now);
        self.plan.habits.pace = Pace::USUAL;
        ILLS.iter().for_each(|ill| self.mended(*ill));
        self.store.set(Mood::default());
        self.plan.store += 1;
        for host in 0..self.hosts.len() {
            let cut = self.hosts.get(host).map_or(0, |h| h.cuts_of_link);
            self.link_up(host, cut);
            self.host_up(host);
        }
        self.after(0, Event::ServerStart);
        for vm in 0..self.vms.len() {
            if let Some(vm) = self.vms.get_mut(vm) {
                (vm.gap_ns, vm.large) = (2 * MS, 15);
            }
            self.vm_busy(vm, SECOND);
        }
        self.plan.still_since = self.now + SECOND;
        self.after(SECOND, Event::Plan);
    }

    /// VMs that are down are started where they were last.
    fn look_after_vms(&mut self) {
        for vm in 0..self.vms.len() {
            let still = self.vms.get(vm).filter(|vm| vm.moving.is_none());
            if still.is_some_and(|vm| !vm.runs) {
                self.after(0, Event::VmStart(vm));
            }
        }
    }

    fn what_is_missing(&mut self) -> String {
        let mut text = Vec::new();
        for (number, disk) in self.disks.iter_mut().enumerate() {
            let open = disk.open.as_mut();
            let state = open.map(|open| {
                let free = open.core.producer().free_bytes();
                let (core, held) = (&open.core, open.held.len());
                (
                    core.state(),
                    free,
                    held,
                    core.has_deferred(),
                    core.dirty_bytes(),
                )
            });
            text.push(format!("disk {number}: {state:?}"));
        }
        for host in &self.hosts {
            for served in host.daemon.iter().flat_map(|daemon| &daemon.lanes) {
                let lane = &served.lane;
                let at = (lane.stage, lane.moving_to, lane.consumer.restarting());
                text.push(format!("{}: {at:?}", lane.label()));
            }
        }
        text.push(format!("newest cut: {:?}", self.committed.last()));
        text.join("; ")
    }

    /// Whether nothing is left to do for the replica to be what the disks hold.
    pub fn is_still(&self) -> bool {
        let still =
            matches!(self.plan.phase, Phase::Liveness(_)) && self.now > self.plan.still_since;
        still
            && self
                .vms
                .iter()
                .all(|vm| vm.runs && !vm.stopping && vm.moving.is_none())
            && self.disks.iter().all(ProtectedDisk::is_quiet)
    }
}
