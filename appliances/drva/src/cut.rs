//! Cuts: asked for every second, closed when every disk has all of its records.
//!
//! Invariant: a cut is closed only if each disk of the domain has a position, is durable up to it and
//! is consistent at it; otherwise it is void, and counted. The last closed one stays as it is. If any
//! other host than the one that was asked presents a disk meanwhile, the cut is void: epochs order the
//! records of one host only.

use crate::appliance::Appliance;
use crate::domain::{Asked, CloseError, ClosedCut, Domain, now_ns};
use filter_core::wire::Message;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a host may take to answer, and a log to hold the positions.
const LIMIT: Duration = Duration::from_secs(5);

/// What a host answered to a request for a cut.
pub enum Answer {
    /// The positions of its disks.
    Positions(u32, Vec<([u8; 16], u64)>),
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

/// The one host whose disks are attached.
fn host_of(domain: &Domain) -> Result<[u8; 16], String> {
    let disks = domain.disks.read();
    let attached = disks.values().filter(|disk| disk.is_attached());
    let hosts: HashSet<[u8; 16]> = attached.map(|disk| *disk.host.lock()).collect();
    match hosts.len() {
        0 => Err("no host of the domain is connected".into()),
        1 => Ok(hosts.into_iter().next().unwrap_or_default()),
        n => Err(format!(
            "its disks are on {n} hosts; cuts over several hosts are not built yet"
        )),
    }
}

/// Decides on the epoch of a new cut, and on its name. From here on the upload feeds only what is
/// stamped below it, and a disk that another host presents makes it void.
fn begin(domain: &Domain) -> Result<([u8; 16], u32, Option<String>), String> {
    let host = host_of(domain)?;
    let (epoch, name) = {
        let mut cuts = domain.cuts.lock();
        cuts.last_epoch = cuts
            .last_epoch
            .checked_add(1)
            .ok_or("the cut epochs are used up")?;
        cuts.outstanding = Some(Asked {
            epoch: cuts.last_epoch,
            host,
            void: false,
        });
        // A name that is asked for later is for the next cut: this one may lack what was written until
        // then.
        (cuts.last_epoch, cuts.wanted.front().cloned())
    };
    // Looked at again: who attached before there was a cut to make void is seen here.
    if host_of(domain)? != host {
        return Err(CloseError::Moved.to_string());
    }
    Ok((host, epoch, name))
}

fn take(appliance: &Appliance, domain: &Arc<Domain>) -> Result<BTreeMap<[u8; 16], u64>, String> {
    for disk in domain.disks.read().values() {
        if disk.received().2 {
            let info = disk.info.read();
            return Err(format!("disk {}/{} is syncing", info.vm_name, info.name));
        }
    }
    let (host, epoch, name) = begin(domain)?;
    let answers = appliance.expect_answers(&domain.name, host);
    let request = Message::CutRequest {
        epoch,
        domain: domain.name.clone(),
    };
    // Before the request: what was completed by this time is in the cut.
    let time_ns = now_ns();
    if !appliance.send_to_host(&host, &request) {
        return Err("the host's control connection is down".into());
    }
    let deadline = Instant::now() + LIMIT;
    let reported = loop {
        match answers.recv_deadline(deadline) {
            Ok(Answer::Positions(of, positions)) if of == epoch => break positions,
            Ok(Answer::Positions(..)) => {} // of an earlier request
            Ok(Answer::Void(current, why)) => {
                let mut cuts = domain.cuts.lock();
                cuts.last_epoch = cuts.last_epoch.max(u32::try_from(current).unwrap_or(0));
                return Err(why);
            }
            Err(_) => return Err("the host did not answer in time".into()),
        }
    };
    let mut positions: BTreeMap<[u8; 16], u64> = reported.into_iter().collect();
    for (id, disk) in domain.disks.read().iter() {
        if positions.contains_key(id) {
            continue;
        }
        // A disk that its host does not serve any more: it stands where it stood.
        if disk.is_attached() {
            return Err(format!(
                "the host reported no position of disk {}",
                disk.info.read().name
            ));
        }
        positions.insert(*id, disk.durable_seq());
    }
    if !domain.wait_durable(&positions, LIMIT) {
        let moved = domain.cuts.lock().outstanding.is_some_and(|of| of.void);
        let late = "the log did not reach the positions in time".to_owned();
        return Err(if moved {
            CloseError::Moved.to_string()
        } else {
            late
        });
    }
    let mut out = BTreeMap::new();
    for (id, seq) in &positions {
        let disk = domain.disk(id).ok_or("a position of an unknown disk")?;
        if !disk.consistent_at(*seq) {
            return Err(format!(
                "disk {} was syncing at its position",
                disk.info.read().name
            ));
        }
        out.insert(Uuid::from_bytes(*id), *seq);
    }
    let cut = ClosedCut {
        epoch,
        time_ns,
        name: name.clone(),
        positions: out,
    };
    domain.close_cut(cut).map_err(|e| e.to_string())?;
    let mut cuts = domain.cuts.lock();
    if let Some(at) = cuts
        .wanted
        .iter()
        .position(|wanted| Some(wanted) == name.as_ref())
    {
        cuts.wanted.remove(at);
    }
    Ok(positions)
}
