//! An appliance that reports what it would see of the machines of the vCenter in memory.

use super::fake::State;
use msa::assignments;
use msa::protection::report::{Report, ReportedDisk, ReportedDomain, ReportedLog, ReportedVm};
use msa::protection::states;
use msa::store::Store;
use msa::text::Id;

/// How the disks of its machines stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    /// Their hosts present none.
    Unpresented,
    Syncing,
    /// Cuts hold them.
    Cut,
    /// Their host's connection is gone.
    Lost,
}

#[derive(Clone, Debug)]
pub struct Appliance {
    pub id: Id,
    pub stand: Stand,
    /// Its containers lie elsewhere than they should.
    pub store: Option<String>,
    /// How far back its newest cut lies.
    pub cut_age_ms: i64,
}

impl Appliance {
    pub fn new(id: Id) -> Self {
        Self {
            id,
            stand: Stand::Cut,
            store: None,
            cut_age_ms: 0,
        }
    }

    fn disk(&self, key: i32, is_paused: bool, now_ms: i64) -> ReportedDisk {
        let standing = if is_paused { "left-out" } else { "open" };
        ReportedDisk {
            uuid: Id(uuid::Uuid::from_u128(key as u128)),
            label: format!("Hard disk {}", key - 1999),
            capacity_bytes: 8 << 20,
            host: "esx1".into(),
            is_connected: !is_paused && self.stand != Stand::Lost,
            is_syncing: self.stand == Stand::Syncing,
            standing: standing.into(),
            is_complete: Some(true),
            received_seq: 7,
            cut_at_ms: (self.stand == Stand::Cut).then_some(now_ms - self.cut_age_ms),
            is_current: self.cut_age_ms == 0,
        }
    }

    /// What it would say: of each machine that it was assigned and whose disks have the filter.
    pub fn says(&self, store: &Store, state: &State) -> Report {
        let now_ms = store.now_ms();
        let known = store
            .read(|t| assignments::of_appliance(t, self.id))
            .unwrap();
        let domain = |domain: assignments::AssignedDomain| {
            let vm = |vm: assignments::AssignedVm| {
                let moid = state.machines.iter().find(|(_, of)| of.uuid == vm.uuid.0);
                let disks = moid.and_then(|(moid, _)| state.vms.get(moid));
                let disks = disks.into_iter().flatten().filter(|(_, on)| **on);
                let disks = disks.map(|(key, _)| self.disk(*key, vm.paused, now_ms));
                let disks = disks.filter(|_| self.stand != Stand::Unpresented).collect();
                let uuid = vm.uuid;
                ReportedVm { uuid, disks }
            };
            ReportedDomain {
                vms: domain.vms.into_iter().map(vm).collect(),
                store: format!(
                    "/srv/{}/{}",
                    self.store.as_deref().unwrap_or(&domain.name),
                    domain.name
                ),
                log: ReportedLog {
                    path: format!("/log/{}/domains/{}/log", domain.name, domain.name),
                    used_bytes: 1,
                    max_bytes: 1 << 30,
                    is_full: false,
                    is_failing: false,
                },
                name: domain.name,
                newest_cut_at_ms: None,
                alarms: Vec::new(),
            }
        };
        Report {
            every_s: 15,
            domains: known.domains.into_iter().map(domain).collect(),
        }
    }

    pub fn report(&self, store: &Store, state: &State) {
        let said = self.says(store, state);
        let now_ms = store.now_ms();
        store
            .record(|t| states::take(t, self.id, &said, now_ms))
            .unwrap();
    }
}
