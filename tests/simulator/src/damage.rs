//! Bytes that are not what was written: in lanes, in sidecars, in the appliance's log, in the store.
//!
//! Invariant: what is damaged is one of two copies, or guarded by a checksum, or a word that its reader
//! checks; so it is noticed, or does no harm. Not damaged are words that nobody could check: the dirty map, the
//! in-flight table, states and figures of a lane.
//!
//! The store is damaged in a copy of it, when all else is over: nothing writes an object twice, so there is
//! nothing that could mend it.

use crate::check::{Archive, Recovered};
use crate::faults::Strike;
use crate::guest::RELAXED;
use crate::world::{Event, MS, SECOND, World};
use filter_core::sidecar::BLOCK_BYTES;
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use recovery_store::Container;
use std::sync::Arc;

/// Bytes of a header in the sidecar that mean something.
const HEADER_BYTES: u64 = 92;
/// Cuts that are recovered from a damaged container.
const TRIED: usize = 5;

impl World {
    /// Something is damaged.
    pub(crate) fn damage(&mut self, strike: Strike) {
        match strike {
            Strike::DamageSidecar => self.damage_sidecar(),
            Strike::DamageLane => self.damage_lane(),
            _ => self.damage_log(),
        }
    }

    /// A copy of the header, or of the region map, or both copies; with or without an end that has the
    /// sidecar read again.
    fn damage_sidecar(&mut self) {
        let disk = self.numbers.below(self.disks.len() as u64) as usize;
        let blocks: &[u64] = match self.numbers.below(6) {
            0 => &[0],
            1 => &[1],
            2 => &[0, 1],
            3 => &[2],
            4 => &[3],
            _ => &[2, 3],
        };
        for block in blocks {
            let len = if *block < 2 {
                HEADER_BYTES
            } else {
                BLOCK_BYTES as u64
            };
            let at = block * BLOCK_BYTES as u64 + self.numbers.below(len);
            let mask = 1 << self.numbers.below(8);
            if let Some(this) = self.disks.get_mut(disk) {
                this.spoiled = true;
                this.sidecar.flip(at, mask);
            }
        }
        self.say(|| format!("disk {disk}: blocks {blocks:?} of its sidecar are damaged"));
        let vm = self.disks.get(disk).map_or(0, |disk| disk.vm);
        let host = self.vms.get(vm).map_or(0, |vm| vm.host);
        match self.numbers.below(3) {
            0 => {}
            1 => self.break_while_moving(vm, host, 4),
            _ => self.break_while_moving(vm, host, 0),
        }
    }

    /// A byte of the ring, or a bit of a word that the other side checks.
    fn damage_lane(&mut self) {
        let lanes = self.hosts.iter().flat_map(|host| &host.lanes);
        let lanes: Vec<_> = lanes.map(|(disk, lane)| (*disk, lane.clone())).collect();
        let at = self.numbers.below(lanes.len() as u64) as usize;
        let Some((disk, lane)) = lanes.get(at) else {
            return;
        };
        let memory = lane.memory();
        let bit = self.numbers.below(64);
        let (tail, head) = (&memory.producer().tail, &memory.consumer().head);
        let what = self.numbers.below(6);
        match what {
            0 => tail.store(tail.load(RELAXED) ^ 1 << bit, RELAXED),
            1 => head.store(head.load(RELAXED) ^ 1 << bit, RELAXED),
            _ => {
                // Where it hurts: what was published and is not yet free.
                let ring_bytes = memory.geometry().ring_bytes;
                let (from, to) = (head.load(RELAXED), tail.load(RELAXED));
                let len = to.checked_sub(from).filter(|len| *len > 0);
                let len = len.unwrap_or(ring_bytes).min(ring_bytes);
                let at = from.wrapping_add(self.numbers.below(len)) % ring_bytes;
                lane.flip(at, 1 << (bit % 8));
            }
        }
        self.say(|| format!("disk {disk}: its lane is damaged ({what})"));
    }

    /// A byte of the log: where a restart, or the upload, will meet it.
    fn damage_log(&mut self) {
        let dies = self.numbers.chance(600);
        if dies {
            self.server_gone();
        }
        let (random, bit) = (self.numbers.any(), self.numbers.below(8));
        let Some(place) = self.volume.damage(random, 1 << bit) else {
            if dies {
                self.within(20 * MS, 60 * SECOND, Event::ServerStart);
            }
            return;
        };
        self.say(|| format!("the log is damaged at {place:?}"));
        self.plan.log_damaged = true;
        // What it held at its end may look like a write that was cut off.
        self.plan.log_is_whole = false;
        self.through.log_lost();
        if dies {
            self.within(20 * MS, 60 * SECOND, Event::ServerStart);
        }
    }

    /// The appliance cannot read its log. An operator does what the message says: puts the log aside, and
    /// starts the appliance with a new one.
    pub(crate) fn log_put_aside(&mut self, why: &str) {
        if !self.plan.log_damaged {
            return self.violated(format!("the log cannot be read: {why}"));
        }
        self.count("log: damage named");
        self.say(|| format!("the log is put aside: {why}"));
        self.server_gone();
        self.volume.lose();
        self.plan.log_damaged = false;
        self.plan.log_is_whole = false;
        self.within(SECOND, 60 * SECOND, Event::ServerStart);
    }
}

/// Damages an object of a copy of the store: verifying names it; each cut is recovered as it was, or
/// refused, and not refused if it does not need the object.
pub async fn damage_store(world: &mut World) {
    match try_damage(world).await {
        Ok(()) => {}
        Err(error) => world.violated(format!("a damaged store: {error}")),
    }
}

async fn try_damage(world: &mut World) -> Result<(), String> {
    let good = world.objects.clone();
    let bad = Arc::new(good.fork());
    let text = |error: object_store::Error| error.to_string();
    let listed: Vec<_> = good.list(None).try_collect().await.map_err(text)?;
    let mut names: Vec<Path> = listed.into_iter().map(|meta| meta.location).collect();
    names.sort();
    let at = world.numbers.below(names.len() as u64) as usize;
    let Some(name) = names.get(at).cloned() else {
        return Ok(());
    };
    spoil(world, &bad, &names, at).await?;
    world.count("damage: a store's object");
    world.say(|| format!("damaged in the store: {name}"));
    let object = name.to_string();
    let opened = Container::open_store(bad.clone(), "damaged").await;
    let container = match opened {
        Ok(container) => container,
        // Without the domain's own object nothing can be said of the rest.
        Err(error) if object == "domain.json" || error.to_string().contains(&object) => {
            world.count("damage: the container was refused");
            return Ok(());
        }
        Err(error) => return Err(format!("{object} is damaged, and opening says: {error}")),
    };
    let report = container.verify(|_| {}).await;
    let report = report.map_err(|error| format!("verify: {error}"))?;
    // One without a checksum of its own is found out by the object that names its hash.
    let of_next = format!("hash of its predecessor {object}");
    if !report
        .problems
        .iter()
        .any(|problem| problem.object == object || problem.what.contains(&of_next))
    {
        // Of the domain's own object a name for people has no checksum; nothing else may be so.
        if object != "domain.json" {
            let problems = report.problems;
            return Err(format!("{object} is damaged, verifying says {problems:?}"));
        }
        world.count("damage: a name for people");
    }
    let all = world.committed.len();
    for turn in 0..TRIED.min(all) {
        // The oldest, the newest, and some between.
        let which = match turn {
            0 => 0,
            1 => all - 1,
            _ => world.numbers.below(all as u64) as usize,
        };
        let Some((number, _)) = world.committed.get(which).copied() else {
            continue;
        };
        let right = recovered(good.clone(), number).await?;
        match recovered(bad.clone(), number).await {
            Ok(found) if found == right => world.count("damage: a cut was recovered as it was"),
            Ok(_) => return Err(format!("{object} is damaged: cut {number} is another one")),
            Err(error) => {
                let needed = cut_of(&object).is_none_or(|cut| cut <= number);
                if !needed {
                    return Err(format!(
                        "{object} is damaged, which cut {number} does not need: {error}"
                    ));
                }
                world.count("damage: a cut was refused");
            }
        }
    }
    Ok(())
}

async fn spoil(world: &mut World, bad: &InMemory, names: &[Path], at: usize) -> Result<(), String> {
    let text = |error: object_store::Error| error.to_string();
    let name = names.get(at).ok_or("no object")?;
    let read = bad.get(name).await.map_err(text)?;
    let mut bytes = read.bytes().await.map_err(text)?.to_vec();
    match world.numbers.below(4) {
        0 => bytes.truncate(world.numbers.below(bytes.len() as u64) as usize),
        1 if names.len() > 3 && at + 1 < names.len() => {
            // Another object in its place.
            let other = names.get(at + 1).ok_or("no object")?;
            let read = bad.get(other).await.map_err(text)?;
            bytes = read.bytes().await.map_err(text)?.to_vec();
        }
        _ => {
            let at = world.numbers.below(bytes.len() as u64) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << world.numbers.below(8);
            }
        }
    }
    bad.put(name, PutPayload::from(bytes)).await.map_err(text)?;
    Ok(())
}

/// The cut that an object belongs to, by its name.
fn cut_of(object: &str) -> Option<u64> {
    let (_, name) = object.rsplit_once("cuts/")?;
    name.split_once('-')?.0.parse().ok()
}

async fn recovered(objects: Arc<InMemory>, number: u64) -> Result<Recovered, String> {
    let mut archive = Archive::new(objects);
    let found = archive.find(number).await?;
    let (container, info) = found.ok_or("the cut is not there")?;
    archive.recover(&container, &info).await
}
