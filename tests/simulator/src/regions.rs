//! The filter's region map at work: its writes to the sidecar, its flushes, and what a fence leads to.
//!
//! Invariant: as in the filter library: one step at a time for each disk, and the core is told of each
//! one's outcome only when it is durable, or was refused.

use crate::storage::SidecarFault;
use crate::world::{Event, MS, SECOND, US, World};
use filter_core::disk::intent::IntentStep;
use filter_core::mutant::{Guard, holds};
use filter_core::sidecar::{BLOCK_BYTES, HEADERS_BYTES, Sidecar};

/// A region is left alone for so long before its bit is cleared.
pub const QUIET_NS: u64 = 2 * SECOND;

/// A write of the map under way.
pub struct Writing {
    offset_bytes: u64,
    bytes: Box<[u8; BLOCK_BYTES]>,
}

impl World {
    /// The map is looked after now and then, as long as there is something in it.
    pub fn arm_regions(&mut self, disk: usize) {
        let of = self.run_of(disk);
        let armed = self.core(disk, |open, _| {
            std::mem::replace(&mut open.regions_armed, true)
        });
        if armed == Some(false) {
            self.within(QUIET_NS / 2, QUIET_NS, Event::Regions(disk, of));
        }
    }

    /// The map's time has come.
    pub fn regions_timer(&mut self, disk: usize, of: u64) {
        if self.open_of(disk, of).is_none() {
            return;
        }
        let wanted = self.core(disk, |open, _| {
            open.regions_armed = false;
            open.core.intent().map_or(0, |map| map.wanted_bytes())
        });
        self.drive_regions(disk);
        if wanted.unwrap_or(0) > 0 {
            self.arm_regions(disk);
        }
    }

    /// Goes on with the map.
    pub fn drive_regions(&mut self, disk: usize) {
        let (now, run) = (self.now, self.run_of(disk));
        let step = self.core(disk, |open, _| {
            if open.regions_work {
                return IntentStep::Idle;
            }
            let step = open.core.intent_step(now);
            open.regions_work = step != IntentStep::Idle;
            step
        });
        let slow = self.pace.sidecar;
        match step {
            None => {}
            Some(IntentStep::Idle) => self.tell_capacity(disk),
            Some(IntentStep::Flush) => {
                let delay = self.numbers.between(100 * US, 5 * MS);
                self.after(delay, Event::RegionsFlushed(disk, run));
            }
            Some(IntentStep::Write {
                offset_bytes,
                bytes,
            }) => {
                let writing = Writing {
                    offset_bytes,
                    bytes,
                };
                self.core(disk, |open, _| open.regions_write = Some(writing));
                let delay = self.numbers.between(50 * US, MS) * slow / 100;
                self.after(delay, Event::RegionsWritten(disk, run));
            }
        }
    }

    /// A write of the map has ended.
    pub fn regions_written(&mut self, disk: usize, of: u64) {
        let fails = self.numbers.chance(self.rates.sidecar);
        let torn = self.numbers.chance(500);
        if self.open_of(disk, of).is_none() {
            return;
        }
        let writing = self.core(disk, |open, _| open.regions_write.take());
        let Some(Some(writing)) = writing else { return };
        let fault = match (fails, torn) {
            (false, _) => None,
            (true, false) => Some(SidecarFault::Refused),
            (true, true) => Some(SidecarFault::Torn),
        };
        self.put_regions(disk, &writing, fault);
        self.core(disk, |open, _| {
            open.regions_work = false;
            open.core.intent_written(!fails);
        });
        if fails {
            self.count("fault: region map's write failed");
            self.after(50 * MS, Event::Regions(disk, of));
            return;
        }
        self.count("region map written");
        self.retry(disk, of);
        self.drive_regions(disk);
    }

    fn put_regions(&mut self, disk: usize, writing: &Writing, fault: Option<SidecarFault>) {
        if let Some(this) = self.disks.get_mut(disk) {
            let at = writing.offset_bytes;
            this.sidecar
                .write(at, &writing.bytes, fault, &mut self.numbers);
        }
    }

    /// The process is gone: a write of the map under way arrived, or did not; `power`: or in part.
    pub fn regions_cut_off(&mut self, disk: usize, power: bool) {
        let writing = self.core(disk, |open, _| open.regions_write.take());
        let Some(Some(writing)) = writing else { return };
        let fault = match self.numbers.below(3) {
            0 => None,
            1 => Some(SidecarFault::Refused),
            _ if power => Some(SidecarFault::Torn),
            _ => None,
        };
        self.count("fault: region map's write cut off");
        self.put_regions(disk, &writing, fault);
    }

    /// The flush that the map asked for has ended.
    pub fn regions_flushed(&mut self, disk: usize, of: u64) {
        let fails = self.numbers.chance(self.rates.write);
        let now = self.now;
        let Some(this) = self.open_of(disk, of) else {
            return;
        };
        if !fails && holds(Guard::IntentClearFlush) {
            this.storage.flush();
        }
        self.core(disk, |open, _| {
            open.regions_work = false;
            open.core.intent_flushed(!fails, now);
        });
        self.count("region map: flush");
        self.drive_regions(disk);
    }

    /// Writes the disk's capacity down once the map has the bits of a part that is new.
    fn tell_capacity(&mut self, disk: usize) {
        let known = self.core(disk, |open, _| {
            let capacity_bytes = open.core.capacity_bytes();
            (capacity_bytes, open.core.intent_pending(), open.header)
        });
        let Some((capacity_bytes, false, header)) = known else {
            return;
        };
        if header.capacity_bytes < capacity_bytes {
            self.save_header(disk, &header.grown(capacity_bytes));
        }
    }

    /// The header that the sidecar holds.
    pub fn header_of(&self, disk: usize) -> Option<Sidecar> {
        let raw = self.disks.get(disk)?.sidecar.raw();
        let headers = raw.first_chunk::<HEADERS_BYTES>()?;
        Sidecar::decode(headers).ok()
    }

    /// Writes a header without a fault.
    pub fn save_header(&mut self, disk: usize, header: &Sidecar) {
        if let Some(this) = self.disks.get_mut(disk) {
            let at = header.offset_bytes();
            this.sidecar
                .write(at, &header.encode(), None, &mut self.numbers);
            if let Some(open) = &mut this.open {
                open.header = *header;
            }
        }
    }

    /// If the appliance knows a newer epoch: somebody has attached since, or disk and sidecar were
    /// rolled back.
    pub fn look_at_fence(&mut self, disk: usize) {
        let fenced = self.core(disk, |open, _| {
            let memory = open.core.memory();
            let fenced = memory.consumer().fenced_epoch.load(super::guest::RELAXED);
            let ours = open.core.producer().attach_epoch();
            (fenced, ours, open.header)
        });
        // One that cannot be read tells nothing; it is read again.
        let (Some((fenced, ours, header)), Some(found)) = (fenced, self.header_of(disk)) else {
            return;
        };
        if fenced == 0
            || fenced < ours
            || found.attach_epoch != header.attach_epoch
            || !holds(Guard::RisesWhenRolledBack)
        {
            return;
        }
        let Ok(next) = header.risen(fenced) else {
            return;
        };
        self.save_header(disk, &next);
        self.core(disk, |open, _| {
            open.core.rise(next.attach_epoch, next.above_forgotten());
        });
        self.count("rolled back: epoch raised");
        self.say(|| {
            format!(
                "disk {disk}: rolled back, epoch raised to {}",
                next.attach_epoch
            )
        });
        self.drive_regions(disk);
        self.arm_sync(disk, MS);
        self.wake_pump(disk);
    }
}
