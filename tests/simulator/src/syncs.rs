//! The syncs of open disks: what the core wants to be read, what becomes of it.
//!
//! Invariant: as in the filter library: the core decides what is read next and whether what was read is
//! published; a read holds, of each part of it, what the disk held at some time since it began.

use crate::guest::{HOUSEKEEPING_NS, Read, SYNC_RETRY_NS};
use crate::hasher::hashes_of;
use crate::storage::{UNIT_BYTES, bytes_of};
use crate::world::{Event, MS, US, World};
use filter_core::disk::sync::SyncStep;

/// Steps of the sync that one call takes.
const STEPS: usize = 8;

impl World {
    /// Lets the sync go on soon.
    pub fn arm_sync(&mut self, disk: usize, delay_ns: u64) {
        let of = self.run_of(disk);
        let armed = self.core(disk, |open, _| {
            std::mem::replace(&mut open.sync_armed, true)
        });
        if armed == Some(false) {
            self.after(delay_ns, Event::Sync(disk, of));
        }
    }

    /// The sync's timer.
    pub fn sync_timer(&mut self, disk: usize, of: u64) {
        if self.open_of(disk, of).is_some() {
            self.core(disk, |open, _| open.sync_armed = false);
            self.drive_sync(disk);
        }
    }

    pub(crate) fn drive_sync(&mut self, disk: usize) {
        let run = self.run_of(disk);
        for _ in 0..STEPS {
            let step = self.core(disk, |open, stamps| {
                open.core.tick();
                open.core.sync_step(stamps)
            });
            self.wake_pump(disk);
            match step {
                None | Some(SyncStep::Idle) => return,
                Some(SyncStep::Wait { after_ns, .. }) => {
                    if after_ns > 0 {
                        self.arm_sync(disk, after_ns);
                        return;
                    }
                    // Reads, completions and freed space call again.
                    let alone = self.disks.get(disk).is_some_and(|d| {
                        d.ios.is_empty() && d.open.as_ref().is_some_and(|o| o.reads.is_empty())
                    });
                    // An answer that does not come is looked for now and then.
                    self.arm_sync(disk, if alone { 200 * MS } else { SYNC_RETRY_NS });
                    return;
                }
                Some(SyncStep::Finished { .. }) => {
                    self.count("sync finished");
                    self.say(|| format!("disk {disk}: sync finished"));
                    return;
                }
                Some(SyncStep::Read {
                    ticket,
                    offset_bytes,
                    len_bytes,
                    ..
                }) => {
                    let first = (offset_bytes / UNIT_BYTES) as usize;
                    let units = first..first + (len_bytes / UNIT_BYTES) as usize;
                    let name = self.name();
                    if let Some(this) = self.disks.get_mut(disk)
                        && let Some(open) = &mut this.open
                    {
                        let early = this.storage.content().get(units.clone());
                        let early = early.unwrap_or_default().to_vec();
                        let read = Read {
                            ticket,
                            units,
                            early,
                        };
                        open.reads.insert(name, read);
                    }
                    let slow = self.pace.disk;
                    let delay = self.numbers.between(50 * US, 1500 * US) * slow / 100;
                    self.after(delay, Event::ReadBack(disk, run, name));
                }
            }
        }
        self.arm_sync(disk, 0);
    }

    /// The disk answers a read: each part of it as it was at some time since.
    pub fn read_back(&mut self, disk: usize, of: u64, name: u64) {
        let fails = self.numbers.chance(self.rates.read);
        let part = self.numbers.below(1001);
        let Some(this) = self.open_of(disk, of) else {
            return;
        };
        let read = this.open.as_mut().and_then(|open| open.reads.remove(&name));
        let Some(Read {
            ticket,
            units,
            mut early,
        }) = read
        else {
            return;
        };
        let late = early.len() * part as usize / 1000;
        let now = this.storage.content().get(units).unwrap_or_default();
        let fresh = now.get(late..).unwrap_or_default();
        early.truncate(late);
        early.extend_from_slice(fresh);
        let mut bytes = Vec::new();
        bytes_of(&early, &mut bytes);
        let data = (!fails).then_some(bytes.as_slice());
        let held = self.core(disk, |open, stamps| {
            let hashes = match data.filter(|_| open.core.wants_hashes()) {
                Some(data) => hashes_of(data),
                None => Vec::new(),
            };
            let before = open.core.counters().sync_held_bytes;
            open.core.sync_read_hashed(ticket, data, &hashes, stamps);
            open.core.counters().sync_held_bytes > before
        });
        if held == Some(true) {
            self.count("sync: the replica held a block");
        }
        if fails {
            self.count("fault: sync's read failed by its disk");
            self.arm_sync(disk, HOUSEKEEPING_NS);
        } else {
            self.drive_sync(disk);
        }
        self.wake_pump(disk);
    }
}
