//! Where the disks of a domain are, and what a cut can say of each.
//!
//! Invariant: a disk counts in a cut only at a position up to which all of its writes were received that
//! had completed when the cut was taken. So either the host that presented it last reports it, or it was
//! closed in order and cannot have been opened since: every host that ever had a disk of the domain was
//! asked, and reports it no more. Anything else makes the cut void, unless an operator has set the disk
//! aside: then it is not in the cut.

use crate::disk::Disk;
use filter_core::mutant::{Guard, holds};
use filter_core::wire::DiskReport;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A host's lasting identity.
pub type HostId = [u8; 16];

/// A host, as it said hello.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Its lasting identity.
    pub id: HostId,
    /// For people.
    pub name: String,
}

/// What is known of a disk that no host reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// It was presented, and not closed in order since: it may have been written since anything came.
    #[default]
    Open,
    /// It was closed in order, and everything that was published of it is here.
    Closed,
    /// An operator leaves it out of cuts until it is opened again.
    SetAside,
    /// Its machine is not to be replicated now, by the assignments: it was paused, or taken out of the domain.
    LeftOut,
    /// The same of a disk that had been closed in order.
    LeftOutClosed,
}

impl Standing {
    /// Whether cuts are made without it.
    pub const fn is_left_out(self) -> bool {
        matches!(self, Self::SetAside | Self::LeftOut | Self::LeftOutClosed)
    }

    /// Whether that is since its machine is not taken.
    pub const fn is_unassigned(self) -> bool {
        matches!(self, Self::LeftOut | Self::LeftOutClosed)
    }

    /// How it stands once its machine is taken (`takes`), or not taken any more. What an operator set aside
    /// stays so.
    #[must_use]
    pub const fn assigned(self, takes: bool) -> Self {
        match (self, takes) {
            (Self::Open, false) => Self::LeftOut,
            (Self::Closed, false) => Self::LeftOutClosed,
            (Self::LeftOut, true) => Self::Open,
            // Should it have been opened since, its host reports it, and it counts as that says.
            (Self::LeftOutClosed, true) => Self::Closed,
            (same, _) => same,
        }
    }
}

/// Where a disk is. Durable, with its description.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// How it stands.
    pub standing: Standing,
    /// The host that presented it last; zeros: not known.
    pub host: HostId,
    /// Every host that ever presented it, by name; an operator can have one forgotten.
    pub hosts: BTreeMap<HostId, String>,
}

impl Presence {
    /// The same, once this host has presented the disk. `again`: it is the opening that was presented
    /// last, which takes nothing back.
    #[must_use]
    pub fn presented(&self, host: &Host, again: bool) -> Self {
        let mut next = self.clone();
        if !(again && self.standing == Standing::SetAside) {
            next.standing = Standing::Open;
        }
        next.host = host.id;
        next.hosts.insert(host.id, host.name.clone());
        next
    }

    /// The name of the host that presented it last.
    pub fn host_name(&self) -> String {
        name_of(&self.hosts, &self.host)
    }
}

fn name_of(hosts: &BTreeMap<HostId, String>, host: &HostId) -> String {
    let known = hosts.get(host).filter(|name| !name.is_empty());
    known.cloned().unwrap_or_else(|| hex(host))
}

fn hex(id: &HostId) -> String {
    filter_core::mapping::hex(id)
}

/// What hosts reported of a domain's disks, host by host.
pub type Reports = BTreeMap<HostId, Vec<DiskReport>>;

/// Why a cut cannot be made out of what was reported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// A host serves a disk that it has not presented.
    #[error("a disk was opened on a host that has not yet presented it")]
    Unpresented,
    /// Two hosts have it, or another one than presented it last.
    #[error("disk {0} is being opened on another host")]
    Moving(String),
    /// Its stream does not hold every write.
    #[error("disk {0} tracks or syncs")]
    Incomplete(String),
    /// Nobody reports it, and it was not closed in order.
    #[error(
        "disk {disk} ({uuid}) was on host {host}, which does not report it, and was not closed in order: \
         what was written to it last may be missing. Open its VM again, or have it left out of cuts with \
         the command set-aside"
    )]
    Lost {
        /// The disk.
        disk: String,
        /// Its id.
        uuid: String,
        /// Where it was.
        host: String,
    },
    /// A disk that nobody has open may have been opened on a host that cannot be asked.
    #[error(
        "host {host} ({id}) cannot be asked, and disk {disk}, which no VM has open elsewhere, may have been \
         opened there. Start its daemon or mend its link; if the host has left for good, use the command \
         forget-host"
    )]
    Absent {
        /// The host.
        host: String,
        /// Its id.
        id: String,
        /// The disk.
        disk: String,
    },
}

/// What a cut is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assembled {
    /// Per disk its last record.
    pub positions: BTreeMap<[u8; 16], u64>,
    /// Disks that are set aside.
    pub left_out: BTreeSet<[u8; 16]>,
}

/// Every host that ever had a disk of the domain.
pub fn hosts_of(disks: &BTreeMap<[u8; 16], Arc<Disk>>) -> BTreeMap<HostId, String> {
    let all = disks.values().map(|disk| disk.presence().hosts);
    all.reduce(|mut all, more| {
        all.extend(more);
        all
    })
    .unwrap_or_default()
}

/// Where each disk of the domain stands in a cut that these hosts were asked for.
pub fn assemble(
    disks: &BTreeMap<[u8; 16], Arc<Disk>>,
    reports: &Reports,
) -> Result<Assembled, Missing> {
    let mut found: BTreeMap<[u8; 16], (HostId, DiskReport)> = BTreeMap::new();
    for (host, report) in reports
        .iter()
        .flat_map(|(h, all)| all.iter().map(move |r| (h, r)))
    {
        let disk = disks.get(&report.disk_id).ok_or(Missing::Unpresented)?;
        // Nobody presents what is not assigned: it moves unheard of, and is in no cut.
        if disk.presence().standing.is_unassigned() {
            continue;
        }
        let elsewhere = disk.presence().host != *host;
        if found.insert(report.disk_id, (*host, *report)).is_some() || elsewhere {
            return Err(Missing::Moving(disk.label()));
        }
    }
    let mut cut = Assembled::default();
    let mut unopened = None;
    for (id, disk) in disks {
        let presence = disk.presence();
        if presence.standing.is_left_out() {
            cut.left_out.insert(*id);
            continue;
        }
        let seq = match found.get(id) {
            Some((_, report)) if !report.complete => return Err(Missing::Incomplete(disk.label())),
            Some((_, report)) => {
                if !report.open {
                    unopened.get_or_insert(disk);
                }
                report.seq
            }
            None => {
                let closed = presence.standing == Standing::Closed && !disk.is_attached();
                if !closed && holds(Guard::LostDiskVoids) {
                    return Err(lost(disk, &presence));
                }
                unopened.get_or_insert(disk);
                disk.durable_seq()
            }
        };
        cut.positions.insert(*id, seq);
    }
    if let Some(disk) = unopened {
        let all = hosts_of(disks);
        let absent = all.keys().find(|host| !reports.contains_key(*host));
        if let Some(host) = absent.filter(|_| holds(Guard::AbsentHostVoids)) {
            return Err(Missing::Absent {
                host: name_of(&all, host),
                id: hex(host),
                disk: disk.label(),
            });
        }
    }
    Ok(cut)
}

fn lost(disk: &Disk, presence: &Presence) -> Missing {
    Missing::Lost {
        disk: disk.label(),
        uuid: disk.info.read().uuid.to_string(),
        host: presence.host_name(),
    }
}

#[cfg(test)]
#[path = "presence_tests.rs"]
mod tests;
