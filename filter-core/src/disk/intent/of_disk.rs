//! The region map as a part of its disk: what the shell calls.
//!
//! Invariant: after each write of the map the lane tells how far it has come, before anything that relies on
//! it is published.

use super::super::{Disk, Relaxed};
use super::{Intent, IntentStep, Progress};
use crate::lane::opening;
use crate::sidecar::BLOCK_BYTES;

impl Disk {
    /// Whether changes or a new stream wait for the sidecar: call [`Disk::intent_step`] soon.
    pub fn intent_pending(&self) -> bool {
        self.intent.as_ref().is_some_and(Intent::is_pending)
    }

    /// The region map, for figures.
    pub const fn intent(&self) -> Option<&Intent> {
        self.intent.as_ref()
    }

    /// Whether [`Disk::intent_step`] would have something to do.
    pub fn intent_due(&self, now_ns: u64) -> bool {
        self.intent
            .as_ref()
            .is_some_and(|intent| intent.is_due(now_ns))
    }

    /// What is to be done for the region map next. `now_ns`: a monotonic clock.
    pub fn intent_step(&mut self, now_ns: u64) -> IntentStep {
        self.with_progress(now_ns, Intent::step)
            .unwrap_or(IntentStep::Idle)
    }

    /// The sidecar was replaced by an older state of itself: every bit is written anew.
    pub fn intent_replaced(&mut self) {
        if let Some(intent) = &mut self.intent {
            intent.want_all();
            intent.durable.fill(0);
        }
    }

    /// The write that a step asked for has ended; `ok`: it is durable.
    pub fn intent_written(&mut self, ok: bool) {
        if let Some(intent) = &mut self.intent {
            intent.written(ok);
            if !intent.is_pending() {
                self.memory().producer().intent_late.store(0, Relaxed); // read after this process died
            }
        }
        self.tell_generation();
    }

    /// Tells the lane how far the map has come, before what relies on it is published.
    pub(in crate::disk) fn tell_generation(&self) {
        if let Some(intent) = &self.intent {
            let (told, durable) = intent.generations();
            opening::raise(self.memory(), self.producer.attach_epoch(), told, durable);
        }
    }

    /// The flush that a step asked for has ended.
    pub fn intent_flushed(&mut self, ok: bool, now_ns: u64) {
        self.with_progress(now_ns, |intent, progress| intent.flushed(ok, progress));
    }

    /// When nothing else works on the map: writes every block that waits. Ends at the first error.
    pub fn intent_write_all<E>(
        &mut self,
        write: impl FnMut(u64, &[u8; BLOCK_BYTES]) -> Result<(), E>,
    ) -> Result<(), E> {
        let written = self
            .intent
            .as_mut()
            .map_or(Ok(()), |intent| intent.write_all(write));
        self.tell_generation();
        written
    }

    /// Before the disk is closed for good, flushed below: if all of it is durable downstream no bit is
    /// needed any more. Take the steps that follow until there are none.
    pub fn intent_close(&mut self) {
        let durable_seq = self.durable_seq();
        if self.is_settled()
            && durable_seq == self.producer.published().seq()
            && let Some(intent) = &mut self.intent
        {
            intent.want_none(durable_seq);
        }
    }

    fn with_progress<R>(
        &mut self,
        now_ns: u64,
        act: impl FnOnce(&mut Intent, &Progress<'_>) -> R,
    ) -> Option<R> {
        let (dirty, inflight) = (self.dirty, &self.inflight);
        let progress = Progress {
            now_ns,
            published_seq: self.producer.published().seq(),
            durable_seq: self.durable_seq(),
            busy: &|offset, len| dirty.any(offset, len) || inflight.overlaps(offset, len),
        };
        self.intent.as_mut().map(|intent| act(intent, &progress))
    }

    /// The last seq that is durable downstream, as the consumer says; never more than was published.
    pub(in crate::disk) fn durable_seq(&self) -> u64 {
        let said = self.memory().consumer().durable_seq.load(Relaxed); // stored before the head it frees
        if said > self.producer.published().seq() {
            0
        } else {
            said
        }
    }
}
