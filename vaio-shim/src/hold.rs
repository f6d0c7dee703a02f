//! Completions that wait: in write-through until the appliance's log has their write, and while a cut over
//! several hosts is taken until every host has raised its epoch.
//!
//! Invariant: a completion that is held stands in one of the core's lists until it is handed back with
//! io_release, or given up by io_abort, once; while one is there a timer runs. So none is held longer
//! than its budget, and after a defect none at all. One that waited for the log goes on through the hold of
//! a cut, if there is one.

use crate::drive::from_userdata;
use crate::host::Level;
use crate::instance::{Core, Replicated};
use crate::{abi, guard};
use core::ffi::c_void;
use filter_core::disk::ack::{AckEvent, Standing};
use filter_core::lane::layout::LaneState;
use filter_core::lane::ring;
use filter_core::lane::sync::Ordering::Relaxed;
use filter_core::mapping::monotonic_ns;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

/// How soon held completions are looked at again.
pub const ACK_POLL_NS: u64 = 200_000;
/// The same for those that wait for a cut.
pub const CUT_POLL_NS: u64 = 200_000;

/// What is left to do without the lock.
#[must_use]
pub struct AckRest {
    event: Option<AckEvent>,
    arm: bool,
    arm_cut: bool,
}

impl Replicated {
    fn standing(&self, core: &mut Core) -> Standing {
        let durable = core.disk.memory().consumer().durable_seq.load(Relaxed); // a number that only grows
        let published = core.disk.producer().published().seq();
        Standing {
            streaming: core.disk.state() == LaneState::Streaming,
            beginnings: core.disk.beginnings(),
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

    /// Until when completions are held for a cut, and the present moment of the same clock.
    fn cut_moments(&self) -> (u64, u64) {
        match ring::hold_until(self.cut.hold()) {
            0 => (0, 0),
            until_ns => (until_ns, monotonic_ns()),
        }
    }

    /// A write has come back from the disk; `true`: its completion is held for a cut.
    pub(crate) fn hold_for_cut(&self, core: &mut Core, io: *mut abi::jio_io) -> bool {
        let (until_ns, now_ns) = self.cut_moments();
        core.cut_hold.done(io, until_ns, now_ns)
    }

    /// Hands back what needs to wait no longer.
    pub(crate) fn look_at_held(&self, core: &mut Core) -> AckRest {
        if core.ack.is_on() {
            let standing = self.standing(core);
            let (until_ns, now_ns) = self.cut_moments();
            let Core { ack, cut_hold, .. } = core;
            if self.failed.load(SeqCst) {
                ack.release_all(|io| self.release(io));
            } else {
                ack.poll(standing, |io| {
                    if !cut_hold.done(io, until_ns, now_ns) {
                        self.release(io);
                    }
                });
            }
        }
        self.look_at_cut_hold(core);
        AckRest {
            event: core.ack.take_event(),
            arm: core.ack.wants_poll() && !std::mem::replace(&mut core.ack_armed, true),
            arm_cut: core.cut_hold.wants_poll() && !std::mem::replace(&mut core.cut_armed, true),
        }
    }

    /// Hands back what the cut needs no longer, or what has waited for too long: then it says so first.
    fn look_at_cut_hold(&self, core: &mut Core) {
        if !core.cut_hold.wants_poll() {
            return;
        }
        let until_ns = ring::hold_until(self.cut.hold());
        let now_ns = monotonic_ns();
        let Core { disk, cut_hold, .. } = core;
        cut_hold.poll(until_ns, now_ns, |io| {
            if now_ns < until_ns {
                disk.tear_cut();
            }
            self.release(io);
        });
    }

    fn release(&self, io: *mut abi::jio_io) {
        self.host.io_release(self.handle, io);
    }

    /// Hands back everything that is held.
    pub(crate) fn release_all(&self, core: &mut Core) {
        let Core {
            disk,
            ack,
            cut_hold,
            ..
        } = core;
        ack.release_all(|io| self.release(io));
        cut_hold.release_all(|io| {
            disk.tear_cut();
            self.release(io);
        });
    }

    /// The same, for who does not hold the lock.
    pub(crate) fn release_completions(&self) {
        self.release_all(&mut self.core.lock());
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
        if rest.arm_cut && !self.arm(CUT_POLL_NS, cut_task) {
            let mut core = self.core.lock();
            core.cut_armed = false;
            self.release_all(&mut core);
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

/// Callback of the host. Looks at completions that are held for a cut.
pub unsafe extern "C" fn cut_task(userdata: *mut c_void) {
    // SAFETY: the userdata of `arm`, called once.
    let this = unsafe { from_userdata(userdata) };
    guard::disk(&this, "completions held for a cut", || {
        let rest = {
            let mut core = this.core.lock();
            core.cut_armed = false;
            this.look_at_held(&mut core)
        };
        this.after_look(rest);
    });
    this.call_ended();
}
