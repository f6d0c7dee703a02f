//! What the daemon's threads tell each other and the operator.

use crate::lane::{Lane, Stage};
use crate::pump::poke;
use filter_core::lane::layout::LaneState;
use filter_core::lane::sync::Ordering::Relaxed;
use filter_core::mapping::hex;
use filter_core::wire::PortRole;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// A reading of one lane.
#[derive(Clone, Debug)]
pub struct LaneStatus(Value);

impl LaneStatus {
    /// Reads a lane.
    pub fn of(lane: &Lane, role: PortRole) -> Self {
        let memory = lane.mapped.memory();
        let words = memory.producer();
        // Relaxed: figures for people.
        let state = LaneState::from_word(words.state.load(Relaxed));
        let id = lane.mapped.identity();
        Self(json!({
            "disk": hex(&id.disk_id),
            "vm": id.vm_name,
            "label": id.disk_label,
            "domain": id.domain,
            "state": state.map_or("unknown".into(), |s| format!("{s:?}").to_lowercase()),
            "epoch": words.attach_epoch.load(Relaxed),
            "published_seq": words.last_seq.load(Relaxed),
            "sent_seq": lane.consumer.sent().0,
            "durable_seq": lane.consumer.durable().0,
            "uploaded_seq": memory.consumer().uploaded_seq.load(Relaxed),
            "dirty_bytes": words.dirty_bytes.load(Relaxed),
            "backlog_bytes": lane.consumer.backlog_bytes(),
            "linked": lane.stage == Stage::Open,
            "fenced": matches!(lane.stage, Stage::Fenced(_)),
            "port_offset": role.offset(),
            "faults": lane.faults,
        }))
    }
}

#[derive(Default)]
struct PumpStatus {
    connected: bool,
    lanes: Vec<LaneStatus>,
}

/// Shared by all threads of the daemon.
pub struct Shared {
    /// The daemon is to stop.
    pub stopping: AtomicBool,
    /// Cuts whose positions were reported.
    pub cuts_reported: AtomicU64,
    /// Cuts that could not be taken.
    pub cuts_void: AtomicU64,
    /// Cuts for which completions were held.
    pub holds: AtomicU64,
    /// Those of them whose hold was over before the appliance ended it.
    pub holds_over: AtomicU64,
    /// The longest of them, in ns.
    pub longest_hold_ns: AtomicU64,
    pumps: Mutex<Vec<PumpStatus>>,
    pipes: Vec<File>,
}

impl Shared {
    /// `pipes`: the wake-up pipes, by port offset.
    pub fn new(pipes: Vec<File>) -> Self {
        let pumps = pipes.iter().map(|_| PumpStatus::default()).collect();
        Self {
            stopping: AtomicBool::new(false),
            cuts_reported: AtomicU64::new(0),
            cuts_void: AtomicU64::new(0),
            holds: AtomicU64::new(0),
            holds_over: AtomicU64::new(0),
            longest_hold_ns: AtomicU64::new(0),
            pumps: Mutex::new(pumps),
            pipes,
        }
    }

    /// Wakes a pump.
    pub fn wake_pump(&self, role: PortRole) {
        if let Some(pipe) = self.pipes.get(usize::from(role.offset())) {
            poke(pipe);
        }
    }

    /// Wakes every pump.
    pub fn wake_all(&self) {
        self.pipes.iter().for_each(poke);
    }

    /// A pump's reading of itself.
    pub fn tell(&self, role: PortRole, connected: bool, lanes: Vec<LaneStatus>) {
        if let Some(slot) = self.pumps.lock().get_mut(usize::from(role.offset())) {
            *slot = PumpStatus { connected, lanes };
        }
    }

    /// Everything, as one document.
    pub fn document(&self) -> Value {
        let pumps = self.pumps.lock();
        let lanes: Vec<&Value> = pumps
            .iter()
            .flat_map(|pump| pump.lanes.iter().map(|lane| &lane.0))
            .collect();
        let connected: Vec<bool> = pumps.iter().map(|pump| pump.connected).collect();
        json!({
            "lanes": lanes,
            "connected_ports": connected,
            // Relaxed: counters.
            "cuts_reported": self.cuts_reported.load(Relaxed),
            "cuts_void": self.cuts_void.load(Relaxed),
            "holds": self.holds.load(Relaxed),
            "holds_over": self.holds_over.load(Relaxed),
            "longest_hold_us": self.longest_hold_ns.load(Relaxed) / 1000,
        })
    }
}
