//! Write-through: completions that wait until the appliance's log has their write.
//!
//! Invariant: a completion that is held stands in the core's list until it is handed back with
//! io_release, or given up by io_abort, once; while one is there a timer runs. So none is held longer
//! than the budget, and after a defect none at all.

use crate::drive::from_userdata;
use crate::host::Level;
use crate::instance::{Core, Replicated};
use crate::{abi, guard};
use core::ffi::c_void;
use filter_core::disk::ack::{AckEvent, Standing};
use filter_core::lane::layout::LaneState;
use filter_core::lane::sync::Ordering::Relaxed;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

/// How soon held completions are looked at again.
pub const ACK_POLL_NS: u64 = 200_000;

/// What is left to do without the lock.
#[must_use]
pub struct AckRest {
    event: Option<AckEvent>,
    arm: bool,
}

impl Replicated {
    fn standing(&self, core: &mut Core) -> Standing {
        let durable = core.disk.memory().consumer().durable_seq.load(Relaxed); // a number that only grows
        let published = core.disk.producer().published().seq();
        Standing {
            streaming: core.disk.state() == LaneState::Streaming,
            // A word of another process: what was never published cannot be durable.
            durable_seq: if durable <= published { durable } else { 0 },
            now_ns: self.host.now_mono_ns(),
        }
    }

    /// A write has come back from the disk; `true`: its completion is held.
    pub(crate) fn hold(&self, core: &mut Core, io: *mut abi::jio_io, seq: Option<u64>) -> bool {
        core.ack.is_on() && {
            let standing = self.standing(core);
            core.ack.done(io, seq, standing)
        }
    }

    /// Hands back what needs to wait no longer.
    pub(crate) fn look_at_held(&self, core: &mut Core) -> AckRest {
        if core.ack.is_on() {
            let standing = self.standing(core);
            if self.failed.load(SeqCst) {
                core.ack.release_all(|io| self.release(io));
            } else {
                core.ack.poll(standing, |io| self.release(io));
            }
        }
        AckRest {
            event: core.ack.take_event(),
            arm: core.ack.wants_poll() && !std::mem::replace(&mut core.ack_armed, true),
        }
    }

    fn release(&self, io: *mut abi::jio_io) {
        self.host.io_release(self.handle, io);
    }

    /// Hands back everything that is held.
    pub(crate) fn release_completions(&self) {
        self.core.lock().ack.release_all(|io| self.release(io));
    }

    /// What `look_at_held` left to do.
    pub(crate) fn after_look(self: &Arc<Self>, rest: AckRest) {
        if rest.arm && !self.arm(ACK_POLL_NS, ack_task) {
            // No timer to be had: holding would have no end.
            let mut core = self.core.lock();
            core.ack_armed = false;
            let now_ns = self.host.now_mono_ns();
            core.ack.give_up(now_ns, |io| self.release(io));
        }
        match rest.event {
            Some(AckEvent::TooSlow) => self.host.event(
                self.handle,
                Level::Warn,
                5,
                "an acknowledgement took longer than jetdr.ack-budget-us: completions do not wait for it until it is quick again",
            ),
            Some(AckEvent::NotStreaming) => self.host.event(
                self.handle,
                Level::Warn,
                5,
                "completions do not wait for the appliance's log while the disk tracks or syncs",
            ),
            Some(AckEvent::Back) => {
                let text = "completions wait for the appliance's log again";
                self.host.event(self.handle, Level::Info, 6, text);
            }
            None => {}
        }
    }
}

/// Callback of the host. Looks at held completions.
pub unsafe extern "C" fn ack_task(userdata: *mut c_void) {
    // SAFETY: the userdata of `arm`, called once.
    let this = unsafe { from_userdata(userdata) };
    guard::disk(&this, "held completions", || {
        let rest = {
            let mut core = this.core.lock();
            core.ack_armed = false;
            this.look_at_held(&mut core)
        };
        this.after_look(rest);
    });
    this.call_ended();
}
