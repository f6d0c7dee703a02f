//! A vCenter in memory. It outlives the servers that use it, works on its tasks while it is asked
//! things, and can make a server die at any call: before the call did anything, or after all of it.

mod api;

use msa::authority::{Authority, Request};
use msa::certificates;
use msa::clock::ManualClock;

use msa::outside::{Connect, Outside, Patience, Place};
use msa::store::{Actor, Done, Store};
use msa::vcenter::*;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub const CLUSTER: &str = "domain-c1";
pub const CLUSTER_NAME: &str = "Gold";

/// A host, as its vCenter has it, and what goes wrong with it.
#[derive(Clone, Debug)]
pub struct FakeHost {
    pub name: String,
    pub version: String,
    pub build: u64,
    pub connection: Connection,
    pub skew_ms: i64,
    pub has_cim: bool,
    pub has_dns: bool,
    /// The version of the component on it.
    pub installed: Option<String>,
    /// Why the component cannot be put on it, or taken off it.
    pub refuses: Option<String>,
    pub daemon_dies: bool,
    pub keeps_firewall_shut: bool,
    pub enrols: bool,
    pub options: BTreeMap<String, String>,
}

impl FakeHost {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            version: "8.0.2".into(),
            build: 22_380_479,
            connection: Connection::Connected,
            skew_ms: 0,
            has_cim: true,
            has_dns: true,
            installed: None,
            refuses: None,
            daemon_dies: false,
            keeps_firewall_shut: false,
            enrols: true,
            options: BTreeMap::new(),
        }
    }
}

/// A machine, as its vCenter has it. Its disks are in [`State::vms`].
#[derive(Clone, Debug)]
pub struct FakeVm {
    pub name: String,
    pub uuid: uuid::Uuid,
    pub host: Option<String>,
    pub is_on: bool,
    pub has_snapshots: bool,
    pub is_shared: bool,
    pub is_rdm: bool,
    /// It is in another cluster.
    pub is_elsewhere: bool,
}

impl FakeVm {
    /// `vm-1`, on the first host.
    pub fn new(moid: &str) -> Self {
        let number = moid.trim_start_matches("vm-").parse().unwrap_or(0);
        Self {
            name: format!("Web {moid}"),
            uuid: uuid::Uuid::from_u128(0xfa4e << 64 | number),
            host: Some("host-1".into()),
            is_on: true,
            has_snapshots: false,
            is_shared: false,
            is_rdm: false,
            is_elsewhere: false,
        }
    }
}

#[derive(Clone, Debug)]
enum Work {
    Filter {
        to: Option<String>,
        left: Vec<String>,
    },
    Disks {
        vm: String,
        keys: Vec<i32>,
        on: bool,
    },
}

#[derive(Clone, Debug)]
struct Task {
    work: Work,
    state: TaskState,
}

#[derive(Default)]
pub struct State {
    pub version: String,
    pub skew_ms: i64,
    pub is_down: bool,
    pub drs_off: bool,
    pub hosts: BTreeMap<String, FakeHost>,
    pub filter: Option<ClusterFilter>,
    pub issues: BTreeMap<String, String>,
    /// Machines with the keys of their disks, and whether the filter is on them.
    pub vms: BTreeMap<String, BTreeMap<i32, bool>>,
    /// More of those machines.
    pub machines: BTreeMap<String, FakeVm>,
    /// Storage policies, with their properties.
    pub policies: BTreeMap<String, Vec<(String, String)>>,
    /// Which policy a machine's disks have.
    pub policy_of: BTreeMap<String, String>,
    /// Machines on whose disks no filter can be put.
    pub refuses_filter: BTreeMap<String, String>,
    pub plugin: Option<Extension>,
    tasks: Vec<Task>,
    /// Calls that change something, in order.
    pub asked: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

pub struct World {
    pub state: Mutex<State>,
    clock: Arc<ManualClock>,
    crash: Mutex<Option<(usize, When)>>,
    /// The state and folder of the server that hosts can reach now.
    server: Mutex<Option<(Arc<Store>, PathBuf)>>,
    /// The appliance that reports what it would see, if one does.
    pub appliance: Mutex<Option<super::appliance::Appliance>>,
}

/// A session with it.
pub struct Api(Arc<World>);

pub struct Way(pub Arc<World>);

impl Connect for Way {
    fn connect(&self, place: &Place) -> Result<Arc<dyn Vcenter>, Fault> {
        if place.login.password.expose() != "vcenter secret" {
            return Err(Fault::NotAuthenticated);
        }
        Ok(Arc::new(Api(self.0.clone())))
    }
}

fn id(text: &str) -> Moid {
    text.parse().unwrap()
}

impl World {
    /// One cluster of this many good hosts, and two machines.
    pub fn new(hosts: usize, clock: Arc<ManualClock>) -> Arc<Self> {
        let hosts =
            (1..=hosts).map(|at| (format!("host-{at}"), FakeHost::new(&format!("esx{at}"))));
        let vms = ["vm-1", "vm-2"].map(|vm| (vm.to_owned(), BTreeMap::from([(2000, false)])));
        let state = State {
            version: "8.0.2".into(),
            hosts: hosts.collect(),
            machines: vms
                .iter()
                .map(|(vm, _)| (vm.clone(), FakeVm::new(vm)))
                .collect(),
            vms: vms.into(),
            ..State::default()
        };
        Arc::new(Self {
            state: Mutex::new(state),
            clock,
            crash: Mutex::default(),
            server: Mutex::default(),
            appliance: Mutex::default(),
        })
    }

    /// What a server has to see of it.
    pub fn outside(self: &Arc<Self>, store: &Arc<Store>, dir: &std::path::Path) -> Outside {
        *self.server.lock() = Some((store.clone(), dir.to_owned()));
        self.outside_alone()
    }

    pub fn outside_alone(self: &Arc<Self>) -> Outside {
        let mut outside = Outside::new(Box::new(Way(self.clone())));
        outside.resolves = Box::new(|name| !name.contains("nowhere"));
        outside.patience = Patience {
            poll: Duration::from_millis(1),
            settle: Duration::from_millis(40),
            undo: Duration::from_secs(20),
        };
        outside.set_base_url("https://127.0.0.1:8443".into());
        outside
    }

    pub fn serve(&self, store: &Arc<Store>, dir: &std::path::Path) {
        *self.server.lock() = Some((store.clone(), dir.to_owned()));
    }

    pub fn forget_server(&self) {
        *self.server.lock() = None;
    }

    /// Makes the server die at its n-th call from now.
    pub fn crash_at(&self, calls: usize, when: When) {
        *self.crash.lock() = Some((calls, when));
    }

    /// Nobody dies any more; true: nobody has.
    pub fn calm(&self) -> bool {
        self.crash.lock().take().is_some()
    }

    /// A call: vCenter works on while it is asked, then does what the call says.
    fn call<T>(
        &self,
        what: &str,
        work: impl FnOnce(&mut State) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let now = {
            let mut crash = self.crash.lock();
            match crash.as_mut() {
                Some((0, when)) => {
                    let when = *when;
                    *crash = None;
                    Some(when)
                }
                Some((left, _)) => {
                    *left -= 1;
                    None
                }
                None => None,
            }
        };
        assert!(
            now != Some(When::Before),
            "a crash on request before {what}"
        );
        let mut state = self.state.lock();
        if state.is_down {
            return Err(Fault::Other("connection refused".into()));
        }
        state.step();
        let done = work(&mut state);
        drop(state);
        self.report();
        assert!(now != Some(When::After), "a crash on request after {what}");
        done
    }
}

impl State {
    /// Each open task comes one host, or its machine, further.
    fn step(&mut self) {
        for at in 0..self.tasks.len() {
            let mut task = self.tasks[at].clone();
            if matches!(task.state, TaskState::Success | TaskState::Error(_)) {
                continue;
            }
            match &mut task.work {
                Work::Filter { to, left } => match left.pop() {
                    Some(host) => self.change_host(&host, to.clone()),
                    None => task.state = self.end_filter(to.is_none()),
                },
                Work::Disks { vm, on: true, .. } if self.refuses_filter.contains_key(vm) => {
                    let why = self.refuses_filter[vm].clone();
                    self.policy_of.remove(vm);
                    task.state = TaskState::Error(Fault::InvalidState(why));
                }
                Work::Disks { vm, keys, on } => {
                    let disks = self.vms.get_mut(vm).unwrap();
                    for key in keys {
                        disks.insert(*key, *on);
                    }
                    task.state = TaskState::Success;
                }
            }
            self.tasks[at] = task;
        }
    }

    fn end_filter(&mut self, removed: bool) -> TaskState {
        if !self.issues.is_empty() {
            return TaskState::Error(Fault::Other("some hosts failed".into()));
        }
        if removed {
            self.filter = None;
        }
        TaskState::Success
    }

    fn change_host(&mut self, id: &str, to: Option<String>) {
        let Some(host) = self.hosts.get_mut(id) else {
            return;
        };
        let why = match host.connection {
            Connection::Connected => host.refuses.clone(),
            _ => Some("the host cannot be reached".into()),
        };
        match why {
            Some(why) => drop(self.issues.insert(id.into(), why)),
            None => {
                host.installed = to;
                self.issues.remove(id);
            }
        }
    }

    fn begin(&mut self, work: Work) -> TaskId {
        self.tasks.push(Task {
            work,
            state: TaskState::Queued,
        });
        TaskId(id(&format!("task-{}", self.tasks.len())))
    }

    fn on_all(&mut self, to: Option<String>) -> TaskId {
        self.issues.clear();
        let left = self.hosts.keys().rev().cloned().collect();
        self.begin(Work::Filter { to, left })
    }

    fn known(&self, filter: &str) -> Result<(), Fault> {
        match &self.filter {
            Some(known) if known.id == filter => Ok(()),
            _ => Err(Fault::NotFound(filter.into())),
        }
    }

    fn is_cluster(&self, cluster: &Moid) -> Result<(), Fault> {
        match cluster.as_str() == CLUSTER {
            true => Ok(()),
            false => Err(Fault::NotFound(cluster.to_string())),
        }
    }

    fn using(&self) -> Vec<FilterDisk> {
        let all = self.vms.iter().flat_map(|(vm, disks)| {
            let on = disks.iter().filter(|(_, on)| **on);
            on.map(|(key, _)| FilterDisk {
                vm: id(vm),
                disk_key: *key,
            })
        });
        all.collect()
    }
}

impl World {
    /// What an appliance does all the time: it tells the server how its machines stand.
    pub fn report(&self) {
        let Some((store, _)) = self.server.lock().clone() else {
            return;
        };
        let appliance = self.appliance.lock();
        if let Some(appliance) = appliance.as_ref() {
            appliance.report(&store, &self.state.lock());
        }
    }

    /// What the daemon of a host does with the option: asks for its certificate.
    fn enrol(&self, option: &str) {
        let Some((store, dir)) = self.server.lock().clone() else {
            return;
        };
        let words: Vec<&str> = option.split(' ').collect();
        assert!(
            words[0].starts_with("https://") && words[1].len() == 64,
            "{option}"
        );
        let (_, request) = super::request();
        let request = Request::parse(&request).unwrap();
        let authority = Authority::load(&dir).unwrap();
        let now_ms = store.now_ms();
        let done = store.change(&Actor::system(), "enrol", |t| {
            certificates::enrol(t, &authority, words[2], &request, now_ms).unwrap();
            Ok(Done::new((), "a host"))
        });
        done.unwrap();
    }
}
