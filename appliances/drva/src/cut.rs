//! Cuts: asked for every second, closed when every disk has all of its records.
//!
//! Invariant: a cut is closed only if each disk of the domain has a position that holds every write
//! (see [`crate::presence`]), is durable up to it and is consistent at it; otherwise it is void, and
//! counted. The last closed one stays as it is. If a host that was not asked presents a disk meanwhile,
//! the cut is void: epochs order the records of those that were asked only. If disks are on several
//! hosts, all of them hold completions from before their epoch moves until every epoch has moved.

use crate::appliance::Appliance;
use crate::disk::beginnings;
use crate::domain::{Asked, CloseError, ClosedCut, Domain, now_ns};
use crate::presence::{HostId, Reports, assemble};
use crossbeam::channel::Receiver;
use filter_core::wire::{DiskReport, Message};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long the hosts may take to answer, and a log to hold the positions.
const LIMIT: Duration = Duration::from_secs(5);
/// The protocol from which on a host reports disk by disk, also that it has none.
const REPORTS: u16 = 2;

/// How long hosts may take to say that they hold completions: none holds them for longer by far.
const HOLD_LIMIT: Duration = Duration::from_secs(2);

/// What a host answered to a request for a cut.
pub enum Answer {
    /// It holds completions and has moved its epoch to this one.
    Held(u32),
    /// How its disks stand below this epoch.
    Report(u32, Vec<DiskReport>),
    /// No cut now; the host's current epoch, if that is why.
    Void(u64, String),
}

/// Takes cuts of a domain until the appliance stops.
pub fn run(appliance: &Appliance, domain: &Arc<Domain>, every: Duration) {
    let mut taken = BTreeMap::new();
    while !domain.is_stopping() {
        let next = Instant::now() + every;
        let mut is_void = false;
        if wanted(domain, &taken) {
            match take(appliance, domain) {
                Ok(positions) => {
                    taken = positions;
                    domain.alarm("cut", None);
                }
                Err(why) => {
                    is_void = true;
                    domain.cuts.lock().outstanding = None;
                    domain.cuts_changed.notify_all();
                    domain.figures.cuts_void.fetch_add(1, Ordering::Relaxed); // a figure
                    domain.alarm("cut", Some(format!("no new cut: {why}")));
                }
            }
        }
        let mut cuts = domain.cuts.lock();
        // Somebody who asks is answered at once, but not by one try after the other while a disk syncs.
        while (is_void || cuts.wanted.is_empty()) && Instant::now() < next && !domain.is_stopping()
        {
            domain.cuts_changed.wait_until(&mut cuts, next);
        }
    }
}

/// Whether there is anything to cut: records since the last one, or somebody asks.
fn wanted(domain: &Domain, taken: &BTreeMap<[u8; 16], u64>) -> bool {
    if !domain.cuts.lock().wanted.is_empty() {
        return true;
    }
    let disks = domain.disks.read();
    !disks.is_empty()
        && disks.iter().any(|(id, disk)| {
            let received = disk.received().0;
            received > 0 && taken.get(id).copied().unwrap_or(0) < received
        })
}

/// The hosts that have disks of the domain attached.
fn attached(domain: &Domain) -> BTreeSet<HostId> {
    let disks = domain.disks.read();
    let attached = disks.values().filter(|disk| disk.is_attached());
    attached.map(|disk| disk.presence().host).collect()
}

/// Whom to ask: every host that can say which disks it has, if only that it has none; older ones only
/// if they have any. And whether completions are to be held: disks are on several hosts.
fn whom_to_ask(appliance: &Appliance, domain: &Domain) -> Result<(BTreeSet<HostId>, bool), String> {
    let attached = attached(domain);
    let connected = appliance.connected_hosts();
    if attached.iter().any(|host| !connected.contains_key(host)) {
        return Err("the control connection of a host that has its disks is down".into());
    }
    let hold = attached.len() > 1;
    let too_old = |host: &HostId| connected.get(host).is_none_or(|speaks| *speaks < REPORTS);
    if hold && attached.iter().any(too_old) {
        let why = "its disks are on several hosts, and a daemon of one is too old for that";
        return Err(why.into());
    }
    // Who may not speak for the domain is not asked, unless it could once: then it may have its disks.
    let once = domain.hosts();
    let may = |host: &HostId| {
        once.contains_key(host) || appliance.assignments.has_host(host, &domain.name)
    };
    let asked = connected.into_iter().filter(|(host, _)| may(host));
    let asked = asked.filter(|(host, protocol)| *protocol >= REPORTS || attached.contains(host));
    let asked: BTreeSet<HostId> = asked.map(|(host, _)| host).collect();
    if asked.is_empty() {
        return Err("no host of the domain is connected".into());
    }
    Ok((asked, hold))
}

/// A cut that was begun.
struct Begun {
    epoch: u32,
    hosts: BTreeSet<HostId>,
    /// Completions are held on all of them while it is taken.
    hold: bool,
    name: Option<String>,
    /// How many waited for that name.
    waiters: usize,
    /// How often each disk's stream had begun anew.
    beginnings: BTreeMap<[u8; 16], u64>,
}

/// Decides on the epoch of a new cut, and on its name. From here on the upload feeds only what is
/// stamped below it, and a disk that another host presents makes it void.
fn begin(appliance: &Appliance, domain: &Domain) -> Result<Begun, String> {
    let (hosts, hold) = whom_to_ask(appliance, domain)?;
    let beginnings = beginnings(&domain.disks.read());
    let begun = {
        let mut cuts = domain.cuts.lock();
        let epoch = cuts.last_epoch.checked_add(1);
        let epoch = epoch.ok_or("the cut epochs are used up")?;
        cuts.last_epoch = epoch;
        cuts.outstanding = Some(Asked {
            epoch,
            hosts: hosts.clone(),
            void: false,
        });
        // A name that is asked for later is for the next cut: this one may lack what was written until
        // then.
        let name = cuts.wanted.front().cloned();
        let of_name = |of: &&String| Some(*of) == name.as_ref();
        let waiters = cuts.wanted.iter().filter(of_name).count();
        Begun {
            epoch,
            hosts,
            hold,
            name,
            waiters,
            beginnings,
        }
    };
    // Looked at again: who attached before there was a cut to make void is seen here.
    if !attached(domain).is_subset(&begun.hosts) {
        return Err(CloseError::Moved.to_string());
    }
    Ok(begun)
}

fn take(appliance: &Appliance, domain: &Arc<Domain>) -> Result<BTreeMap<[u8; 16], u64>, String> {
    for disk in domain.disks.read().values() {
        if disk.received().2 && !disk.presence().standing.is_left_out() {
            return Err(format!("disk {} is syncing", disk.label()));
        }
    }
    let begun = begin(appliance, domain)?;
    let answers = appliance.expect_answers(&domain.name, begun.hosts.clone());
    // Before the request: what was completed by this time is in the cut.
    let time_ns = now_ns();
    let reports = ask(appliance, domain, &begun, &answers)?;
    for report in reports.values().flatten() {
        if let Some(disk) = domain.disk(&report.disk_id) {
            disk.told_complete(report.complete);
        }
    }
    let assembled = assemble(&domain.disks.read(), &reports).map_err(|e| e.to_string())?;
    let open = reports.values();
    // A disk that is not in the cut may be open wherever it likes.
    let is_open = |disk: &DiskReport| disk.open && !assembled.left_out.contains(&disk.disk_id);
    let open = open.filter(|disks| disks.iter().any(is_open));
    if open.count() > 1 && !begun.hold {
        return Err("a disk was opened on another host meanwhile".into());
    }
    let positions = assembled.positions;
    if positions.is_empty() {
        return Err("no disk is in it".into());
    }
    wait_and_check(domain, &positions, &begun.beginnings)?;
    let uuids = |id: &[u8; 16]| Uuid::from_bytes(*id);
    let cut = ClosedCut {
        epoch: begun.epoch,
        time_ns,
        name: begun.name.clone(),
        positions: positions
            .iter()
            .map(|(id, seq)| (uuids(id), *seq))
            .collect(),
        left_out: assembled.left_out.iter().map(uuids).collect(),
    };
    domain.close_cut(cut).map_err(|e| e.to_string())?;
    if let Some(name) = &begun.name {
        domain.cuts.lock().served(name, begun.waiters);
    }
    Ok(positions)
}

/// Asks the hosts for their reports; if the cut is one of several hosts, with completions held until all
/// have moved their epoch.
fn ask(
    appliance: &Appliance,
    domain: &Domain,
    begun: &Begun,
    answers: &Receiver<(HostId, Answer)>,
) -> Result<Reports, String> {
    let (epoch, name) = (begun.epoch, || domain.name.clone());
    let send = |message: &Message| {
        let sent = begun.hosts.iter();
        let sent = sent.map(|host| appliance.send_to_host(host, message));
        sent.fold(true, |all, one| all & one)
    };
    let down = || "a host's control connection is down".to_owned();
    if !begun.hold {
        let domain_name = name();
        let request = Message::CutRequest {
            epoch,
            domain: domain_name,
        };
        if !send(&request) {
            return Err(down());
        }
        return collect(domain, begun, answers);
    }
    domain.figures.cuts_held.fetch_add(1, Ordering::Relaxed); // a figure
    let hold = Message::CutHold {
        epoch,
        domain: name(),
    };
    let held = match send(&hold) {
        true => all_hold(domain, begun, answers),
        false => Err(down()),
    };
    // Whatever has become of it: nobody holds anything for longer than must be.
    let release = Message::CutRelease {
        epoch,
        domain: name(),
    };
    let released = send(&release);
    held?;
    match released {
        true => collect(domain, begun, answers),
        false => Err(down()),
    }
}

/// Waits until every host holds completions and has moved its epoch.
fn all_hold(
    domain: &Domain,
    begun: &Begun,
    answers: &Receiver<(HostId, Answer)>,
) -> Result<(), String> {
    let deadline = Instant::now() + HOLD_LIMIT;
    let mut held = BTreeSet::new();
    while held.len() < begun.hosts.len() {
        match answers.recv_deadline(deadline) {
            Ok((host, Answer::Held(of))) if of == begun.epoch => {
                held.insert(host);
            }
            Ok((_, Answer::Held(_) | Answer::Report(..))) => {} // of an earlier request
            Ok((_, Answer::Void(current, why))) => return Err(refused(domain, current, why)),
            Err(_) => return Err("a host did not answer in time".into()),
        }
    }
    Ok(())
}

/// A host cannot take the cut, perhaps since its epoch is further already: the next one is above it.
fn refused(domain: &Domain, current: u64, why: String) -> String {
    let mut cuts = domain.cuts.lock();
    cuts.last_epoch = cuts.last_epoch.max(u32::try_from(current).unwrap_or(0));
    why
}

/// Waits for every host's report.
fn collect(
    domain: &Domain,
    begun: &Begun,
    answers: &Receiver<(HostId, Answer)>,
) -> Result<Reports, String> {
    let deadline = Instant::now() + LIMIT;
    let mut reports = Reports::new();
    while reports.len() < begun.hosts.len() {
        match answers.recv_deadline(deadline) {
            Ok((host, Answer::Report(of, disks))) if of == begun.epoch => {
                reports.insert(host, disks);
            }
            Ok((_, Answer::Report(..) | Answer::Held(_))) => {} // of an earlier request
            Ok((_, Answer::Void(current, why))) => return Err(refused(domain, current, why)),
            Err(_) => return Err("a host did not answer in time".into()),
        }
    }
    Ok(reports)
}

/// Waits until the log holds everything up to the positions, and looks whether a cut may end there.
fn wait_and_check(
    domain: &Domain,
    positions: &BTreeMap<[u8; 16], u64>,
    beginnings: &BTreeMap<[u8; 16], u64>,
) -> Result<(), String> {
    if !domain.wait_durable(positions, LIMIT) {
        let moved = domain
            .cuts
            .lock()
            .outstanding
            .as_ref()
            .is_some_and(|of| of.void);
        let late = "the log did not reach the positions in time".to_owned();
        return Err(if moved {
            CloseError::Moved.to_string()
        } else {
            late
        });
    }
    for (id, seq) in positions {
        let disk = domain.disk(id).ok_or("a position of an unknown disk")?;
        if !disk.is_of(beginnings.get(id).copied().unwrap_or(0), *seq) {
            return Err(format!(
                "disk {} began its stream anew before it had come to its position",
                disk.label()
            ));
        }
        if !disk.consistent_at(*seq) {
            return Err(format!("disk {} was syncing at its position", disk.label()));
        }
    }
    Ok(())
}
