//! What is administered: vCenters, clusters, hosts, appliances, log volumes, sites, domains, machines.
//!
//! Invariant: SQL is put together from the names below only; whatever a request brings is bound as a
//! value. What a new row refers to is looked for first, so that the answer can name what is missing.

use crate::certificates::{self, CertificateRole};
use crate::protection::hardware::Hardware;
use crate::store::StoreError;
use crate::text::{
    Address, FilePath, Fingerprint, Id, Label, Moid, Name, StoreUrl, VersionText, words,
};
use rusqlite::{OptionalExtension, Row, Transaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

words! {
    /// Whether the host component is on a cluster.
    ClusterState {
        /// It is not.
        Disabled = "disabled",
        /// It is being installed.
        Enabling = "enabling",
        /// It is.
        Enabled = "enabled",
        /// It is being removed.
        Disabling = "disabling",
    }
    /// Whether the host component is on a host.
    HostState {
        /// It is not.
        Absent = "absent",
        /// It is being installed.
        Installing = "installing",
        /// It is, and was verified.
        Ready = "ready",
        /// It could not be installed, or does not work.
        Failed = "failed",
        /// It is being removed.
        Removing = "removing",
    }
    /// Whether a virtual machine is protected.
    VmState {
        /// It is not.
        Unprotected = "unprotected",
        /// It is about to be.
        Initializing = "initializing",
        /// What it held before is sent.
        InitialSync = "initial_sync",
        /// It is, up to the newest cut.
        Recoverable = "recoverable",
        /// Changes are only tracked; the newest cut is getting older.
        Degraded = "degraded",
        /// It should be, and is not.
        Error = "error",
    }
    /// When a guest's write counts as done.
    Ack {
        /// When its disk has it.
        Host = "host",
        /// When the replication log has it too.
        Log = "log",
    }
}

/// Something of the inventory.
pub trait Entity: Serialize + ToSchema + Sized + Send + 'static {
    /// What is said to make one.
    type New: DeserializeOwned + Send + 'static;
    /// Its table.
    const TABLE: &'static str;
    /// What one of them is called.
    const WHAT: &'static str;
    /// What may refer to one: table, column, what it is called.
    const REFERRERS: &'static [(&'static str, &'static str, &'static str)];

    /// From a row of its table.
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self>;
    /// Its place in the order of creation.
    fn seq(&self) -> i64;
    /// Its name, for people.
    fn label(&self) -> String;
    /// Whether a new one may be; then makes it.
    fn insert(t: &Transaction<'_>, new: &Self::New, id: Id, now_ms: i64) -> Result<(), StoreError>;
    /// What is to be done before one goes.
    fn before_delete(_t: &Transaction<'_>, _id: Id, _now_ms: i64) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Makes one.
pub fn create<E: Entity>(t: &Transaction<'_>, new: &E::New, now_ms: i64) -> Result<E, StoreError> {
    let id = Id::random();
    E::insert(t, new, id, now_ms)?;
    get(t, id)
}

/// One of them.
pub fn get<E: Entity>(t: &Transaction<'_>, id: Id) -> Result<E, StoreError> {
    let sql = format!("SELECT * FROM {} WHERE id = ?1", E::TABLE);
    let found = t.prepare(&sql)?.query_row([id], E::from_row);
    found
        .optional()?
        .ok_or_else(|| StoreError::not_found(E::WHAT, id))
}

/// Those after `after`, in the order in which they were made.
pub fn list<E: Entity>(t: &Transaction<'_>, after: i64, limit: i64) -> Result<Vec<E>, StoreError> {
    let sql = format!(
        "SELECT * FROM {} WHERE seq > ?1 ORDER BY seq LIMIT ?2",
        E::TABLE
    );
    let mut statement = t.prepare(&sql)?;
    let rows = statement.query_map([after, limit], E::from_row)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Removes one that nothing refers to; gives what it was.
pub fn delete<E: Entity>(t: &Transaction<'_>, id: Id, now_ms: i64) -> Result<E, StoreError> {
    let gone: E = get(t, id)?;
    for (table, column, what) in E::REFERRERS {
        let sql = format!("SELECT count(*) FROM {table} WHERE {column} = ?1");
        let count: i64 = t.query_row(&sql, [id], |row| row.get(0))?;
        if count > 0 {
            return Err(StoreError::conflict(format!(
                "{} {} still has {count} of {what}: remove those first",
                E::WHAT,
                gone.label()
            )));
        }
    }
    E::before_delete(t, id, now_ms)?;
    let sql = format!("DELETE FROM {} WHERE id = ?1", E::TABLE);
    t.execute(&sql, [id])?;
    Ok(gone)
}

/// A reference of a new row must lead somewhere.
fn check_reference(
    t: &Transaction<'_>,
    field: &'static str,
    table: &str,
    id: Option<Id>,
) -> Result<(), StoreError> {
    let Some(id) = id else {
        return Ok(());
    };
    let sql = format!("SELECT count(*) FROM {table} WHERE id = ?1");
    let found: i64 = t.query_row(&sql, [id], |row| row.get(0))?;
    match found {
        0 => Err(StoreError::invalid(
            field,
            format!("none of the {table} has the id {id}: make it first, or correct the id"),
        )),
        _ => Ok(()),
    }
}

/// What the filter would refuse is refused here.
fn check_budget(
    field: &'static str,
    given: Option<i64>,
    takes: std::ops::RangeInclusive<i64>,
) -> Result<(), StoreError> {
    match given {
        Some(us) if !takes.contains(&us) => Err(StoreError::invalid(
            field,
            format!("takes {} to {}", takes.start(), takes.end()),
        )),
        _ => Ok(()),
    }
}

fn no_check<N>(_t: &Transaction<'_>, _new: &N) -> Result<(), StoreError> {
    Ok(())
}

fn nothing(_t: &Transaction<'_>, _id: Id, _now_ms: i64) -> Result<(), StoreError> {
    Ok(())
}

macro_rules! entity {
    (
        $(#[$about:meta])* $name:ident, $new:ident, $what:literal, $table:literal, label $label:ident;
        given { $( $(#[$of_given:meta])* $given:ident: $given_type:ty, )* }
        kept { $( $(#[$of_kept:meta])* $kept:ident: $kept_type:ty, )* }
        refers { $( $column:ident to $target:literal, )* }
        referred { $( ($by_table:literal, $by_column:literal, $by_what:literal), )* }
        check $check:expr;
        before_delete $before:expr;
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, Serialize, ToSchema)]
        pub struct $name {
            #[serde(skip)]
            seq: i64,
            /// Its id.
            pub id: Id,
            $( $(#[$of_given])* pub $given: $given_type, )*
            $( $(#[$of_kept])* pub $kept: $kept_type, )*
            /// Since when it is administered.
            pub created_at_ms: i64,
        }

        #[doc = concat!("What is said to make a new ", $what, ".")]
        #[derive(Clone, Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $new {
            $( $(#[$of_given])* pub $given: $given_type, )*
        }

        impl Entity for $name {
            type New = $new;
            const TABLE: &'static str = $table;
            const WHAT: &'static str = $what;
            const REFERRERS: &'static [(&'static str, &'static str, &'static str)] =
                &[$( ($by_table, $by_column, $by_what), )*];

            fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
                Ok(Self {
                    seq: row.get("seq")?,
                    id: row.get("id")?,
                    $( $given: row.get(stringify!($given))?, )*
                    $( $kept: row.get(stringify!($kept))?, )*
                    created_at_ms: row.get("created_at_ms")?,
                })
            }

            fn seq(&self) -> i64 {
                self.seq
            }

            fn label(&self) -> String {
                self.$label.to_string()
            }

            fn insert(
                t: &Transaction<'_>,
                new: &Self::New,
                id: Id,
                now_ms: i64,
            ) -> Result<(), StoreError> {
                $( check_reference(t, stringify!($column), $target, new.$column.into())?; )*
                ($check)(t, new)?;
                let columns = [$( stringify!($given), )*];
                let places: Vec<String> =
                    (0..columns.len()).map(|at| format!("?{}", at + 3)).collect();
                let sql = format!(
                    "INSERT INTO {} (id, created_at_ms, {}) VALUES (?1, ?2, {})",
                    $table,
                    columns.join(", "),
                    places.join(", ")
                );
                let values: &[&dyn rusqlite::ToSql] = &[&id, &now_ms, $( &new.$given, )*];
                t.prepare(&sql)?.execute(values)?;
                Ok(())
            }

            fn before_delete(t: &Transaction<'_>, id: Id, now_ms: i64) -> Result<(), StoreError> {
                ($before)(t, id, now_ms)
            }
        }
    };
}

entity! {
    /// A vCenter.
    Vcenter, NewVcenter, "vCenter", "vcenters", label name;
    given {
        /// Its name here.
        name: Name,
        /// Where it is.
        address: Address,
        /// Its HTTPS port, usually 443.
        port: u16,
        /// SHA-256 of the certificate that it is to show; without it, one that is valid for its name.
        fingerprint: Option<Fingerprint>,
    }
    kept {}
    refers {}
    referred { ("clusters", "vcenter_id", "its clusters"), }
    check no_check;
    before_delete nothing;
}

impl Vcenter {
    /// One that is in no state yet: for a look before it is registered.
    pub fn unregistered(
        name: Name,
        address: Address,
        port: u16,
        fingerprint: Option<Fingerprint>,
    ) -> Self {
        Self {
            seq: 0,
            id: Id::random(),
            name,
            address,
            port,
            fingerprint,
            created_at_ms: 0,
        }
    }
}

entity! {
    /// A cluster of a vCenter.
    Cluster, NewCluster, "cluster", "clusters", label name;
    given {
        /// Its vCenter.
        vcenter_id: Id,
        /// Its id there.
        moid: Moid,
        /// Its name there.
        name: Label,
    }
    kept {
        /// Whether the host component is on it.
        state: ClusterState,
        /// The package that was put on it.
        package_id: Option<Id>,
    }
    refers { vcenter_id to "vcenters", }
    referred {
        ("hosts", "cluster_id", "its hosts"),
        ("vms", "cluster_id", "its virtual machines"),
    }
    check no_check;
    before_delete |t: &Transaction<'_>, id: Id, _| {
        let cluster: Cluster = get(t, id)?;
        match cluster.state {
            ClusterState::Disabled => Ok(()),
            state => Err(StoreError::conflict(format!(
                "cluster {} is {state}: disable it first", cluster.name
            ))),
        }
    };
}

entity! {
    /// A host of a cluster.
    Host, NewHost, "host", "hosts", label name;
    given {
        /// Its cluster.
        cluster_id: Id,
        /// Its id in vCenter.
        moid: Moid,
        /// Its name in DNS, or its address.
        name: Address,
        /// The version of its hypervisor.
        version: Option<VersionText>,
        /// The appliance that it sends to.
        drva_id: Option<Id>,
    }
    kept {
        /// Whether the host component is on it.
        state: HostState,
        /// What is wrong, if it failed, and what to do.
        problem: Option<String>,
        /// The version of the host component that was found on it.
        component_version: Option<String>,
    }
    refers { cluster_id to "clusters", drva_id to "drvas", }
    referred { ("vms", "host_id", "its virtual machines"), }
    check no_check;
    before_delete |t: &Transaction<'_>, id: Id, now_ms: i64| {
        let host: Host = get(t, id)?;
        match host.state {
            HostState::Absent | HostState::Failed => {
                certificates::revoke_all(t, CertificateRole::Host, id, now_ms).map(|_| ())
            }
            state => Err(StoreError::conflict(format!(
                "host {} is {state}: disable its cluster first", host.name
            ))),
        }
    };
}

entity! {
    /// A storage site: where containers go.
    Site, NewSite, "site", "sites", label name;
    given {
        /// Its name.
        name: Name,
        /// Where.
        store: StoreUrl,
    }
    kept {}
    refers {}
    referred { ("domains", "site_id", "its domains"), }
    check no_check;
    before_delete nothing;
}

entity! {
    /// A DR appliance.
    Drva, NewDrva, "appliance", "drvas", label name;
    given {
        /// Its name.
        name: Name,
        /// Where it listens.
        address: Address,
        /// The first of its six ports, usually 32873.
        port_base: u16,
    }
    kept {}
    refers {}
    referred {
        ("hosts", "drva_id", "its hosts"),
        ("log_volumes", "drva_id", "its log volumes"),
        ("domains", "drva_id", "its domains"),
    }
    check no_check;
    before_delete |t: &Transaction<'_>, id: Id, now_ms: i64| {
        certificates::revoke_all(t, CertificateRole::Drva, id, now_ms).map(|_| ())
    };
}

entity! {
    /// A volume for replication logs.
    LogVolume, NewLogVolume, "log volume", "log_volumes", label name;
    given {
        /// The appliance that has it.
        drva_id: Id,
        /// Its name.
        name: Name,
        /// Its folder on that appliance.
        path: FilePath,
        /// How much of it may be used: 64 MiB to 64 TiB.
        capacity_bytes: i64,
    }
    kept {}
    refers { drva_id to "drvas", }
    referred { ("domains", "log_volume_id", "the domains whose log it holds"), }
    check |_: &Transaction<'_>, new: &NewLogVolume| {
        match new.capacity_bytes {
            67_108_864..=70_368_744_177_664 => Ok(()),
            _ => Err(StoreError::invalid("capacity_bytes", "takes 67108864 to 70368744177664")),
        }
    };
    before_delete nothing;
}

entity! {
    /// A protected domain: virtual machines that are protected together.
    Domain, NewDomain, "domain", "domains", label name;
    given {
        /// Its name, and its container's.
        name: Name,
        /// The site of its container.
        site_id: Id,
        /// The appliance that replicates it.
        drva_id: Id,
        /// The volume of that appliance that holds its log.
        log_volume_id: Id,
        /// When a guest's write counts as done.
        ack: Ack,
        /// How long a write may be deferred for want of room, in us (0 to 1000000); none: the filter's 5000.
        defer_budget_us: Option<i64>,
        /// With `ack` log: how long a write waits for the log, in us (1000 to 10000000); none: the filter's own.
        ack_budget_us: Option<i64>,
    }
    kept {}
    refers {
        site_id to "sites",
        drva_id to "drvas",
        log_volume_id to "log_volumes",
    }
    referred { ("vms", "domain_id", "its virtual machines"), }
    check |t: &Transaction<'_>, new: &NewDomain| {
        check_budget("defer_budget_us", new.defer_budget_us, 0..=1_000_000)?;
        check_budget("ack_budget_us", new.ack_budget_us, 1_000..=10_000_000)?;
        let volume: LogVolume = get(t, new.log_volume_id)?;
        if volume.drva_id == new.drva_id {
            return Ok(());
        }
        let why = format!("{} is a volume of another appliance: choose one of the domain's", volume.name);
        Err(StoreError::invalid("log_volume_id", why))
    };
    before_delete nothing;
}

entity! {
    /// A virtual machine.
    Vm, NewVm, "virtual machine", "vms", label name;
    given {
        /// Its cluster.
        cluster_id: Id,
        /// The host on which it is.
        host_id: Option<Id>,
        /// Its id in vCenter.
        moid: Moid,
        /// Its name there.
        name: Label,
        /// Its instance UUID there.
        uuid: Id,
    }
    kept {
        /// The domain in which it is protected.
        domain_id: Option<Id>,
        /// Whether it is protected.
        state: VmState,
        /// Why it is in this state, in words.
        reason: Option<String>,
        /// Since when it is in this state.
        state_since_ms: Option<i64>,
        /// The newest moment of which a cut is known that holds it: what can be recovered now.
        recoverable_at_ms: Option<i64>,
        /// An operator has paused its protection.
        is_paused: bool,
        /// Its vCenter does not list it any more.
        is_missing: bool,
        /// What vCenter says of its disks; none: vCenter was not asked yet.
        hardware: Option<Hardware>,
    }
    refers { cluster_id to "clusters", host_id to "hosts", }
    referred {}
    check |t: &Transaction<'_>, new: &NewVm| {
        let Some(host) = new.host_id else {
            return Ok(());
        };
        let host: Host = get(t, host)?;
        if host.cluster_id == new.cluster_id {
            return Ok(());
        }
        let why = format!("{} is a host of another cluster", host.name);
        Err(StoreError::invalid("host_id", why))
    };
    before_delete |t: &Transaction<'_>, id: Id, _| {
        let vm: Vm = get(t, id)?;
        match vm.state {
            VmState::Unprotected => Ok(()),
            state => Err(StoreError::conflict(format!(
                "virtual machine {} is {state}: end its protection first", vm.name
            ))),
        }
    };
}
