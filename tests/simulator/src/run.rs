//! One seed, from its beginning to its end.
//!
//! Invariant: the upload's tasks and the events share one clock; whatever is due first happens first.

use crate::check::{Archive, Recovered, verify};
use crate::damage::damage_store;
use crate::guest::{ProtectedDisk, Vm};
use crate::host::Host;
use crate::plan::Phase;
use crate::storage::{Disk as Storage, Sidecar as Stored};
use crate::upload::Post;
use crate::world::{Event, HOUR, MS, World};
use filter_core::lane::sync::AtomicU64;
use filter_core::sidecar::Sidecar;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use tokio::time::Instant;

/// What a seed came to.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Simulated time, in ns.
    pub simulated_ns: u64,
    /// Events that happened.
    pub events: u64,
    /// What was violated.
    pub violation: Option<String>,
    /// Counts of what happened.
    pub counts: BTreeMap<&'static str, u64>,
    /// The longest time that a guest's write was held, in ns.
    pub longest_held_ns: u64,
}

/// Runs a seed.
pub fn seed(seed: u64, trace: bool) -> Outcome {
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime needs nothing that can be missing");
        let tasks = tokio::task::LocalSet::new();
        tasks.block_on(&runtime, go(World::new(seed, trace)))
    }));
    ran.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        let text = text.unwrap_or_default();
        Outcome {
            seed,
            violation: Some(format!("panic: {text}")),
            ..Outcome::default()
        }
    })
}

fn begin(world: &mut World) {
    for number in 0..2 {
        world.hosts.push(Host::new(number));
        world.after(0, Event::DaemonStart(number));
    }
    let vms = world.numbers.between(1, 2) as usize;
    for vm in 0..vms {
        let mut disks = Vec::new();
        for _ in 0..world.numbers.between(1, 2) {
            // Not always whole blocks of the dirty map.
            let (least, most) = world.plan.habits.units;
            let units = world.numbers.between(least, most) as usize;
            let disk = world.oracle.add(units);
            let id = [disk as u8 + 1; 16];
            let first = Sidecar::new(id, 1);
            let mut sidecar = Stored::new(first.total_bytes());
            let (at, block) = (first.offset_bytes(), first.encode());
            sidecar.write(at, &block, None, &mut world.numbers);
            world.disks.push(ProtectedDisk {
                vm,
                id,
                storage: Storage::new(units),
                sidecar,
                content_id: 1,
                handed: None,
                spoiled: false,
                copy: None,
                opened_on: None,
                open: None,
                ios: BTreeMap::new(),
            });
            disks.push(disk);
        }
        let ack_budget_ns = world.some_ack_budget();
        world.vms.push(Vm {
            id: [vm as u8 + 1; 16],
            host: 0,
            run: 0,
            runs: false,
            stopping: false,
            disks,
            stamp: AtomicU64::new(0).into(),
            busy_until: 0,
            gap_ns: MS,
            large: 0,
            died: 0,
            paused: false,
            reverting: None,
            moving: None,
            ack_budget_ns,
        });
        world.after(MS, Event::VmStart(vm));
    }
    world.after(0, Event::ServerStart);
    world.after(100 * MS, Event::Plan);
}

async fn go(mut world: World) -> Outcome {
    begin(&mut world);
    let base = Instant::now();
    let mut archive = Archive::new(world.objects.clone());
    let mut newest: Option<Recovered> = None;
    while world.violation.is_none() && world.plan.phase != Phase::Over {
        take_posts(&mut world, &mut archive, &mut newest).await;
        if world.is_still() && newest.as_ref().is_some_and(|cut| is_all(&world, cut)) {
            world.plan.phase = Phase::Over;
            break;
        }
        let Some(at) = world.next_at() else {
            world.violated("nothing is left to happen");
            break;
        };
        let busy = world.server.as_ref().is_some_and(|server| {
            let shared = server.shared.borrow();
            shared.busy || shared.answers() || !shared.posts.is_empty()
        });
        if busy {
            let now = base + Duration::from_nanos(world.now);
            let behind = now.saturating_duration_since(Instant::now());
            if behind > Duration::from_millis(1) {
                tokio::time::advance(behind).await;
            }
            let due = base + Duration::from_nanos(at);
            if due > Instant::now() {
                tokio::select! {
                    biased;
                    () = world.told.notified() => {
                        let now = base.elapsed().as_nanos() as u64;
                        world.now = world.now.max(now.min(at));
                        continue;
                    }
                    () = tokio::time::sleep_until(due) => {} // virtual: the clock is paused
                }
            } else {
                tokio::task::yield_now().await;
            }
        }
        if let Some(event) = world.pop() {
            let dies = world.server.is_some();
            world.happen(event);
            if dies && world.server.is_none() {
                // What was aborted goes before anything else happens.
                for _ in 0..4 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    // What was written once is read often: not in every run.
    if world.violation.is_none() && world.seed.is_multiple_of(4) {
        look_at_store(&mut world).await;
    }
    if world.violation.is_none() && world.numbers.chance(300) {
        damage_store(&mut world).await;
    }
    for (what, count) in world.store.counts() {
        *world.counts.entry(what).or_default() += count;
    }
    Outcome {
        seed: world.seed,
        simulated_ns: world.now,
        events: world.events,
        violation: world.violation,
        counts: world.counts,
        longest_held_ns: world.longest_held_ns,
    }
}

/// Takes what the upload has told.
async fn take_posts(world: &mut World, archive: &mut Archive, newest: &mut Option<Recovered>) {
    let Some(server) = &world.server else { return };
    let posts = std::mem::take(&mut server.shared.borrow_mut().posts);
    for post in posts {
        match post {
            Post::Committed(number, epoch) => {
                world.say(|| format!("the store holds cut {number} of epoch {epoch}"));
                look_at_cuts(world, archive, newest, number).await;
                if world
                    .committed
                    .last()
                    .is_none_or(|(last, _)| *last < number)
                {
                    world.violated(format!(
                        "cut {number} was committed, and is not in the store"
                    ));
                }
            }
            Post::Void(epoch, why) => {
                world.count("cut: refused by the container");
                world.say(|| format!("the container refuses the cut of epoch {epoch}: {why}"));
            }
            Post::Told => world.log_has_room(),
            Post::Answered(how) => {
                world.count(how);
                world.flush_outboxes();
            }
            Post::Failed(why) => {
                world.count("upload: store failed");
                world.say(|| format!("upload: {why}"));
            }
            Post::Behind => world.count("upload: a record that the store is ahead of"),
            Post::Unreadable(why) => world.log_put_aside(&why),
            Post::Broken(why) => world.violated(format!("upload: {why}")),
        }
    }
}

/// Checks the cuts that have come into the store.
async fn look_at_cuts(
    world: &mut World,
    archive: &mut Archive,
    newest: &mut Option<Recovered>,
    told: u64,
) {
    loop {
        let next = world.committed.last().map_or(1, |(last, _)| last + 1);
        if next > told {
            return; // what was not told of yet is looked at when it is
        }
        let found = match archive.find(next).await {
            Ok(Some(found)) => found,
            Ok(None) => return,
            Err(error) => return world.violated(format!("cut {next} cannot be read: {error}")),
        };
        let (container, info) = found;
        let cut = match archive.recover(&container, &info).await {
            Ok(cut) => cut,
            Err(error) => {
                return world.violated(format!("cut {next} cannot be recovered: {error}"));
            }
        };
        let after = world.asked.get(&info.cut_epoch).copied().unwrap_or(0);
        world.committed.push((next, info.cut_epoch));
        world.count("cut: in the store");
        let parts: Vec<(Recovered, u64)> = match world.blind.contains(&info.cut_epoch) {
            false => vec![(cut.clone(), after)],
            true => by_vm(world, &cut, info.cut_epoch),
        };
        for (mut part, after) in parts {
            part.retain(|(disk, _)| !world.lost_sight.contains(disk));
            if let Err(error) = world.oracle.check(&part, after) {
                world.violated(format!("cut {next} is not consistent: {error}"));
            }
        }
        *newest = Some(cut);
    }
}

/// In the end every object of the store is in order, and the newest cut is what the disks hold.
async fn look_at_store(world: &mut World) {
    let newest = world.committed.last().map_or(0, |(number, _)| *number);
    match verify(world.objects.clone(), newest).await {
        Ok(cut) if is_all(world, &cut) => {}
        Ok(_) => world.violated(format!("cut {newest}, read once more, is not what it was")),
        Err(error) => world.violated(format!("the store in the end: {error}")),
    }
}

/// A cut, VM by VM, each with the moment that it must not be before.
fn by_vm(world: &World, cut: &Recovered, epoch: u32) -> Vec<(Recovered, u64)> {
    let of = |vm: usize| -> Recovered {
        let mine = cut.iter().filter(|(disk, _)| {
            let disk = world.disks.get(*disk);
            disk.is_some_and(|disk| disk.vm == vm)
        });
        mine.cloned().collect()
    };
    let parts = (0..world.vms.len()).map(of);
    let with_floor = |part: Recovered| {
        let disks = part.iter().map(|(disk, _)| *disk);
        let floor = world.through.floor(epoch, disks);
        (part, floor)
    };
    parts.map(with_floor).collect()
}

/// Whether a cut is what all disks hold, as far as their content is judged.
fn is_all(world: &World, cut: &Recovered) -> bool {
    cut.len() == world.disks.len()
        && cut.iter().all(|(number, units)| {
            let disk = world.disks.get(*number);
            world.lost_sight.contains(number)
                || disk.is_some_and(|disk| disk.storage.content() == units.as_slice())
        })
}

/// Simulated hours.
pub fn hours(simulated_ns: u64) -> f64 {
    simulated_ns as f64 / HOUR as f64
}
