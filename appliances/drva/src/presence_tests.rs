#![allow(clippy::unwrap_used)]
use super::*;
use filter_core::session::Attach;
use recovery_store::DiskInfo;
use uuid::Uuid;

const A: HostId = [0xa; 16];
const B: HostId = [0xb; 16];

fn host(id: HostId) -> Host {
    let name = if id == A { "a" } else { "b" };
    let name = name.into();
    Host { id, name }
}

type Disks = BTreeMap<[u8; 16], Arc<Disk>>;

/// A domain of disks, each with the hosts that presented it, the last one last, and how it stands.
fn disks(all: &[(u8, &[HostId], Standing)]) -> Disks {
    let disk = |(id, hosts, standing): &(u8, &[HostId], Standing)| {
        let info = DiskInfo {
            uuid: Uuid::from_bytes([*id; 16]),
            vm_uuid: Uuid::from_u128(6),
            vm_name: "vm".into(),
            name: format!("disk{id}"),
            capacity_bytes: 1 << 20,
        };
        let mut presence = Presence::default();
        for id in *hosts {
            presence = presence.presented(&host(*id), false);
        }
        presence.standing = *standing;
        let state = crate::log::DiskState {
            last_seq: 7,
            ..crate::log::DiskState::default()
        };
        let disk = Disk::restored(info, &state, Attach::default(), presence, None);
        ([*id; 16], Arc::new(disk))
    };
    all.iter().map(disk).collect()
}

const OPEN: (bool, bool) = (true, true);
const SHUT: (bool, bool) = (false, true);
const SYNCS: (bool, bool) = (true, false);

/// What a host says: disk, and whether it is open and complete.
type Says<'a> = (HostId, &'a [(u8, (bool, bool))]);

fn reports(all: &[Says]) -> Reports {
    let report = |(id, (open, complete)): &(u8, (bool, bool))| DiskReport {
        disk_id: [*id; 16],
        seq: 9,
        open: *open,
        complete: *complete,
    };
    let of = |(host, disks): &Says| (*host, disks.iter().map(report).collect());
    all.iter().map(of).collect()
}

#[test]
fn a_disk_counts_where_its_host_says_it_is() {
    let disks = disks(&[(1, &[A], Standing::Open), (2, &[B, A], Standing::Open)]);
    let said = reports(&[(A, &[(1, OPEN), (2, OPEN)])]);
    let cut = assemble(&disks, &said).unwrap();
    assert_eq!(cut.positions, BTreeMap::from([([1; 16], 9), ([2; 16], 9)]));
    assert!(cut.left_out.is_empty());
}

#[test]
fn a_disk_that_was_not_closed_in_order_and_that_nobody_reports_voids_the_cut() {
    let disks = disks(&[(1, &[A], Standing::Open), (2, &[A], Standing::Open)]);
    let lost = assemble(&disks, &reports(&[(A, &[(1, OPEN)])])).unwrap_err();
    let text = lost.to_string();
    assert!(matches!(lost, Missing::Lost { .. }), "{text}");
    for part in ["vm/disk2", "host a", "set-aside", "02020202-"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_disk_that_was_closed_in_order_stands_where_it_stood() {
    let disks = disks(&[(1, &[A], Standing::Open), (2, &[A], Standing::Closed)]);
    let cut = assemble(&disks, &reports(&[(A, &[(1, OPEN)])])).unwrap();
    assert_eq!(cut.positions[&[2; 16]], 7);
}

#[test]
fn a_disk_that_nobody_has_open_may_be_open_on_a_host_that_is_not_there() {
    let all: &[(u8, &[HostId], Standing)] =
        &[(1, &[B, A], Standing::Open), (2, &[A], Standing::Open)];
    let said = |of| reports(&[(A, &[(1, OPEN), (2, of)])]);
    // While both are open at A nothing can be open at B.
    assert!(assemble(&disks(all), &said(OPEN)).is_ok());
    let absent = assemble(&disks(all), &said(SHUT)).unwrap_err();
    let text = absent.to_string();
    assert!(matches!(absent, Missing::Absent { .. }), "{text}");
    for part in ["host b", "vm/disk2", "forget-host"] {
        assert!(text.contains(part), "{text}");
    }
    // Nor is one that was closed in order known to be closed still.
    let closed = disks(&[(1, &[B, A], Standing::Open), (2, &[A], Standing::Closed)]);
    let one = reports(&[(A, &[(1, OPEN)])]);
    let absent = assemble(&closed, &one).unwrap_err();
    assert!(matches!(absent, Missing::Absent { .. }), "{absent}");
    // B says that it has none.
    let both = reports(&[(A, &[(1, OPEN), (2, SHUT)]), (B, &[])]);
    assert!(assemble(&disks(all), &both).is_ok());
}

#[test]
fn a_disk_that_is_between_two_hosts_voids_the_cut() {
    let disks = disks(&[(1, &[A], Standing::Open)]);
    let moving = Missing::Moving("vm/disk1".into());
    let both = reports(&[(A, &[(1, SHUT)]), (B, &[(1, OPEN)])]);
    assert_eq!(assemble(&disks, &both), Err(moving.clone()));
    let other = reports(&[(A, &[]), (B, &[(1, OPEN)])]);
    assert_eq!(assemble(&disks, &other), Err(moving));
    let unknown = reports(&[(A, &[(1, OPEN), (2, OPEN)])]);
    assert_eq!(assemble(&disks, &unknown), Err(Missing::Unpresented));
}

#[test]
fn a_disk_that_is_set_aside_is_not_in_the_cut_and_not_waited_for() {
    let disks = disks(&[(1, &[A], Standing::Open), (2, &[A], Standing::SetAside)]);
    for said in [
        reports(&[(A, &[(1, OPEN)])]),
        reports(&[(A, &[(1, OPEN), (2, SYNCS)])]),
    ] {
        let cut = assemble(&disks, &said).unwrap();
        assert_eq!(cut.positions, BTreeMap::from([([1; 16], 9)]));
        assert_eq!(cut.left_out, BTreeSet::from([[2; 16]]));
    }
    let syncs = reports(&[(A, &[(1, SYNCS)])]);
    let incomplete = Missing::Incomplete("vm/disk1".into());
    assert_eq!(assemble(&disks, &syncs), Err(incomplete));
}

#[test]
fn only_another_opening_takes_a_disk_back() {
    let mut presence = Presence::default().presented(&host(A), false);
    presence.standing = Standing::SetAside;
    assert_eq!(
        presence.presented(&host(A), true).standing,
        Standing::SetAside
    );
    let taken = presence.presented(&host(B), false);
    assert_eq!((taken.standing, taken.host), (Standing::Open, B));
    assert_eq!(taken.hosts.len(), 2);
}

/// A machine that is not taken is in no cut, and comes back as it stood; what an operator set aside stays so.
#[test]
fn what_is_not_assigned_is_left_out_and_comes_back_as_it_stood() {
    use Standing::{Closed, LeftOut, LeftOutClosed, Open, SetAside};
    for (before, without, again) in [
        (Open, LeftOut, Open),
        (Closed, LeftOutClosed, Closed),
        (SetAside, SetAside, SetAside),
    ] {
        assert_eq!(before.assigned(true), before);
        assert_eq!(before.assigned(false), without);
        assert_eq!(without.assigned(false), without);
        assert_eq!(without.assigned(true), again);
        assert!(without.is_left_out() && (before == SetAside || !before.is_left_out()));
    }
}

/// A paused machine runs on, and moves, unheard of: the others' cuts do not wait for it. What an operator set
/// aside was presented by somebody, and must not be elsewhere.
#[test]
fn a_disk_that_is_not_assigned_may_be_anywhere_and_the_cut_is_made_without_it() {
    let said = reports(&[(A, &[(1, OPEN)]), (B, &[(2, SYNCS)])]);
    let all = disks(&[(1, &[A], Standing::Open), (2, &[A], Standing::LeftOut)]);
    let cut = assemble(&all, &said).unwrap();
    assert_eq!(cut.positions, BTreeMap::from([([1; 16], 9)]));
    assert_eq!(cut.left_out, BTreeSet::from([[2; 16]]));
    let all = disks(&[(1, &[A], Standing::Open), (2, &[A], Standing::SetAside)]);
    assert!(matches!(assemble(&all, &said), Err(Missing::Moving(_))));
}
