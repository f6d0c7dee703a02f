//! A lane as the daemon holds it: its consumer, its channel, where it stands with the appliance.
//!
//! Invariant: records are taken only while the channel is open; after any doubt the lane is rewound
//! to what is durable, so that everything else is sent again.

use filter_core::lane::consumer::{Consumer, LaneFault, Run};
use filter_core::lane::layout::LaneState;
use filter_core::lane::sync::Ordering::Relaxed;
use filter_core::mapping::MappedLane;
use filter_core::position::Durable;
use filter_core::session::{Resume, resume};
use filter_core::wire::{OpenLane, PortRole};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a lane stands with the appliance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// To be opened, not before this moment.
    Closed(Option<Instant>),
    /// OPEN_LANE is under way.
    Opening,
    /// Records flow.
    Open,
    /// A newer epoch has attached elsewhere: silent until this lane's own epoch changes.
    Fenced(u32),
}

/// A lane that this daemon serves.
pub struct Lane {
    /// Keeps it mapped.
    pub mapped: Arc<MappedLane>,
    /// Tells a replaced file from the one that is mapped.
    pub inode: u64,
    /// The consumer's side.
    pub consumer: Consumer,
    /// Its channel on the present connection.
    pub channel: u32,
    /// Where it stands.
    pub stage: Stage,
    /// It is to be handed to this port once everything sent is durable.
    pub moving_to: Option<PortRole>,
    /// The seq that was refused as corrupt last.
    pub corrupt_seq: u64,
    /// Faults found in it since the daemon knows it.
    pub faults: u64,
}

impl Lane {
    /// Takes over a lane that was found.
    pub fn new(mapped: Arc<MappedLane>, inode: u64) -> Self {
        let consumer = Consumer::attach(mapped.memory());
        Self {
            mapped,
            inode,
            consumer,
            channel: 0,
            stage: Stage::Closed(None),
            moving_to: None,
            corrupt_seq: 0,
            faults: 0,
        }
    }

    /// The disk.
    pub fn disk_id(&self) -> [u8; 16] {
        self.mapped.identity().disk_id
    }

    /// For messages.
    pub fn label(&self) -> String {
        let id = self.mapped.identity();
        format!("{}/{}", id.vm_name, id.disk_label)
    }

    /// The port that a lane found in this state belongs to.
    pub fn home(mapped: &MappedLane) -> PortRole {
        let state = mapped.memory().producer().state.load(Relaxed); // routing only
        match LaneState::from_word(state) {
            Some(LaneState::Streaming | LaneState::Closed) => {
                PortRole::of_disk(&mapped.identity().disk_id)
            }
            _ => PortRole::Bulk,
        }
    }

    fn attach_epoch(&self) -> u32 {
        self.mapped.memory().producer().attach_epoch.load(Relaxed) // checked by the appliance
    }

    /// What OPEN_LANE says of it.
    pub fn open_message(&self) -> OpenLane {
        let id = self.mapped.identity();
        let memory = self.mapped.memory();
        let words = memory.producer();
        OpenLane {
            disk_id: id.disk_id,
            vm_id: id.vm_id,
            attach_epoch: self.attach_epoch(),
            durable_seq: self.consumer.durable().0,
            capacity_bytes: words.capacity_bytes.load(Relaxed), // a figure
            starts_at_base: self.consumer.next_is_base(),
            domain: id.domain.clone(),
            vm_name: id.vm_name.clone(),
            disk_label: id.disk_label.clone(),
        }
    }

    /// The connection is gone, or the channel: everything not durable will be sent again.
    pub fn closed(&mut self, wait: Option<Duration>) {
        self.stage = Stage::Closed(wait.map(|wait| Instant::now() + wait));
        self.moving_to = None;
        if let Err(fault) = self.consumer.rewind() {
            self.restart(&fault);
        }
    }

    /// The lane's content cannot be used: the filter is asked to start the stream anew.
    pub fn restart(&mut self, fault: &LaneFault) {
        self.faults += 1;
        tracing::error!(
            "lane {}: {fault}; the disk is to be synced anew",
            self.label()
        );
        self.consumer.request_restart(self.consumer.durable().0);
    }

    /// The appliance has answered OPEN_LANE.
    pub fn opened(&mut self, appliance_durable: u64) {
        self.stage = Stage::Open;
        let published = self.mapped.memory().producer().last_seq.load(Relaxed); // told before the tail
        let published = published.max(self.consumer.durable().0);
        let base = self.consumer.next_is_base();
        let decision = resume(self.consumer.durable(), published, base, appliance_durable);
        match decision {
            Resume::After(durable) => {
                if let Err(fault) = self.consumer.resume_after(durable) {
                    self.restart(&fault);
                }
            }
            Resume::AtBase => {}
            Resume::Restart { above_seq } => {
                if !self.consumer.restarting() {
                    tracing::warn!(
                        "lane {}: the appliance stands at {appliance_durable}, the lane begins after \
                         {}: the disk is to be synced anew",
                        self.label(),
                        self.consumer.durable().0
                    );
                    self.consumer.request_restart(above_seq);
                }
            }
        }
    }

    /// The next records to send.
    pub fn take(&mut self, max_bytes: usize) -> Option<Run> {
        if self.stage != Stage::Open || self.moving_to.is_some() {
            return None;
        }
        match self.consumer.take(max_bytes) {
            Ok(run) => run,
            Err(fault) => {
                self.restart(&fault);
                None
            }
        }
    }

    /// The appliance has acknowledged; `false`: more than was sent.
    pub fn acknowledged(&mut self, durable: u64, uploaded: u64) -> bool {
        self.consumer.set_uploaded(uploaded);
        self.consumer.release(Durable(durable))
    }

    /// Everything taken is durable.
    pub fn is_settled(&self) -> bool {
        self.consumer.sent().0 == self.consumer.durable().0
    }

    /// A fenced lane whose epoch has changed since may try again.
    pub fn look_at_fence(&mut self) {
        if let Stage::Fenced(epoch) = self.stage
            && self.attach_epoch() != epoch
        {
            self.stage = Stage::Closed(None);
        }
    }

    /// The appliance says that a newer epoch has attached.
    pub fn fenced(&mut self) {
        self.closed(None);
        self.stage = Stage::Fenced(self.attach_epoch());
    }
}
