//! The questions that a server asks of the vCenter in memory.

use super::{Api, CLUSTER, CLUSTER_NAME, FakeHost, FakeVm, State, Task, Work, id};
use msa::clock::Clock;
use msa::clusters::enrol::ENROLMENT_OPTION;
use msa::vcenter::*;

/// A cluster that is not enabled.
const OTHER_CLUSTER: &str = "domain-c2";

/// `.../vib/<checksum>/JetDR_bootbank_jetdr_<version>.vib`
fn filter_of(url: &str, operation: FilterOperation) -> ClusterFilter {
    let file = url.rsplit('/').next().unwrap();
    let version = file.rsplit('_').next().unwrap().trim_end_matches(".vib");
    ClusterFilter {
        id: format!("JetDR_jetdr_{version}"),
        name: "jetdr".into(),
        vendor: "JetDR".into(),
        version: version.into(),
        operation,
        vib_url: Some(url.into()),
    }
}

fn info(moid: &str, host: &FakeHost, now_ms: i64) -> HostInfo {
    let mut services = vec![HostService {
        key: "sfcbd-watchdog".into(),
        is_running: host.has_cim,
    }];
    let (mut rulesets, mut filters) = (Vec::new(), Vec::new());
    if let Some(version) = &host.installed {
        services.push(HostService {
            key: "iofilterd-jetdr".into(),
            is_running: !host.daemon_dies,
        });
        let rule = HostRule {
            is_inbound: false,
            ports: (32873, 32878),
        };
        rulesets.push(HostRuleset {
            key: "jetdr".into(),
            is_enabled: !host.keeps_firewall_shut,
            rules: vec![rule],
        });
        filters.push(HostFilter {
            id: format!("JetDR_jetdr_{version}"),
            name: "jetdr".into(),
            version: version.clone(),
            is_available: true,
        });
    }
    let is_there = host.connection == Connection::Connected;
    HostInfo {
        moid: id(moid),
        name: host.name.clone(),
        connection: host.connection,
        in_maintenance: false,
        version: host.version.parse().unwrap(),
        build: host.build,
        now_ms: is_there.then_some(now_ms + host.skew_ms),
        dns_servers: host
            .has_dns
            .then(|| "10.0.0.53".into())
            .into_iter()
            .collect(),
        services,
        rulesets,
        filters,
    }
}

fn unused<T>() -> Result<T, Fault> {
    Err(Fault::Other("this vCenter does not offer it".into()))
}

impl Vcenter for Api {
    fn about(&self) -> Result<About, Fault> {
        let now_ms = self.0.clock.now_ms();
        self.0.call("about", |state| {
            Ok(About {
                version: state.version.parse().unwrap(),
                build: "1".into(),
                instance_uuid: uuid::Uuid::nil(),
                now_ms: now_ms + state.skew_ms,
            })
        })
    }

    fn clusters(&self) -> Result<Vec<ClusterInfo>, Fault> {
        self.0.call("clusters", |state| {
            let mut all = vec![ClusterInfo {
                moid: id(CLUSTER),
                name: CLUSTER_NAME.into(),
                drs_enabled: !state.drs_off,
                hosts: state.hosts.keys().map(|host| id(host)).collect(),
                datastores: vec![id("datastore-1")],
            }];
            if state.machines.values().any(|vm| vm.is_elsewhere) {
                all.push(ClusterInfo {
                    moid: id(OTHER_CLUSTER),
                    name: "Silver".into(),
                    drs_enabled: true,
                    hosts: Vec::new(),
                    datastores: Vec::new(),
                });
            }
            Ok(all)
        })
    }

    fn hosts(&self, cluster: &Moid) -> Result<Vec<HostInfo>, Fault> {
        let now_ms = self.0.clock.now_ms();
        self.0.call("hosts", |state| {
            state.is_cluster(cluster)?;
            let hosts = state.hosts.iter();
            Ok(hosts.map(|(moid, host)| info(moid, host, now_ms)).collect())
        })
    }

    fn vms(&self, cluster: &Moid) -> Result<Vec<VmInfo>, Fault> {
        let is_other = cluster.as_str() == OTHER_CLUSTER;
        self.0.call("vms", |state| {
            let machines = state.machines.iter();
            let here = machines.filter(|(_, vm)| vm.is_elsewhere == is_other);
            Ok(here.map(|(moid, vm)| machine(moid, vm, state)).collect())
        })
    }

    fn vms_named(&self, name: &str) -> Result<Vec<Moid>, Fault> {
        self.0.call("vms named", |_| {
            Ok((name == "Taken").then(|| id("vm-9")).into_iter().collect())
        })
    }

    fn task(&self, task: &TaskId) -> Result<TaskState, Fault> {
        self.0.call("task", |state| {
            let at: usize = task.0.as_str().trim_start_matches("task-").parse().unwrap();
            Ok(state.tasks[at - 1].state.clone())
        })
    }

    fn cancel_task(&self, _task: &TaskId) -> Result<(), Fault> {
        unused()
    }

    fn events(&self) -> Result<Vec<Event>, Fault> {
        unused()
    }

    fn install_filter(&self, of: &Moid, url: &str, trust: &VibTrust) -> Result<TaskId, Fault> {
        assert!(matches!(trust, VibTrust::Pinned(pem) if !pem.contains("PRIVATE")));
        self.0.call("install", |state| {
            state.is_cluster(of)?;
            if state.filter.is_some() {
                return Err(Fault::AlreadyExists);
            }
            let filter = filter_of(url, FilterOperation::Install);
            state.asked.push(format!("install {}", filter.version));
            let version = filter.version.clone();
            state.filter = Some(filter);
            Ok(state.on_all(Some(version)))
        })
    }

    fn uninstall_filter(&self, of: &Moid, filter: &str) -> Result<TaskId, Fault> {
        self.0.call("uninstall", |state| {
            state.is_cluster(of)?;
            state.known(filter)?;
            let using = state.using();
            if !using.is_empty() {
                return Err(Fault::FilterInUse(using));
            }
            if state.drs_off {
                return Err(Fault::InvalidState("DRS is off".into()));
            }
            state.asked.push(format!("uninstall {filter}"));
            Ok(state.on_all(None))
        })
    }

    fn upgrade_filter(
        &self,
        of: &Moid,
        filter: &str,
        url: &str,
        _trust: &VibTrust,
    ) -> Result<TaskId, Fault> {
        self.0.call("upgrade", |state| {
            state.is_cluster(of)?;
            state.known(filter)?;
            let filter = filter_of(url, FilterOperation::Upgrade);
            state.asked.push(format!("upgrade to {}", filter.version));
            let version = filter.version.clone();
            state.filter = Some(filter);
            Ok(state.on_all(Some(version)))
        })
    }

    fn filters(&self, of: &Moid) -> Result<Vec<ClusterFilter>, Fault> {
        self.0.call("filters", |state| {
            state.is_cluster(of)?;
            Ok(state.filter.iter().cloned().collect())
        })
    }

    fn filter_issues(&self, _of: &Moid, filter: &str) -> Result<FilterIssues, Fault> {
        self.0.call("issues", |state| {
            state.known(filter)?;
            let issue = |(host, issue): (&String, &String)| HostIssue {
                host: id(host),
                issues: vec![issue.clone()],
            };
            Ok(FilterIssues {
                operation: FilterOperation::Install,
                hosts: state.issues.iter().map(issue).collect(),
            })
        })
    }

    fn disks_using(&self, _of: &Moid, filter: &str) -> Result<Vec<FilterDisk>, Fault> {
        self.0.call("disks", |state| {
            state.known(filter)?;
            Ok(state.using())
        })
    }

    fn resolve_on_cluster(&self, _of: &Moid, filter: &str) -> Result<TaskId, Fault> {
        self.0.call("resolve on cluster", |state| {
            state.known(filter)?;
            let version = state.filter.as_ref().map(|filter| filter.version.clone());
            Ok(state.on_all(version))
        })
    }

    fn resolve_on_host(&self, host: &Moid, filter: &str) -> Result<TaskId, Fault> {
        self.0.call("resolve on host", |state| {
            state.known(filter)?;
            let version = state.filter.as_ref().map(|filter| filter.version.clone());
            state.issues.remove(host.as_str());
            let left = vec![host.to_string()];
            Ok(state.begin(Work::Filter { to: version, left }))
        })
    }

    fn attach_filter(
        &self,
        vm: &Moid,
        keys: &[i32],
        filter: &FilterSource,
    ) -> Result<TaskId, Fault> {
        let (vm, keys) = (vm.to_string(), keys.to_vec());
        self.0.call("attach", |state| {
            if let FilterSource::Policy(policy) = filter {
                if !state.policies.contains_key(policy) {
                    return Err(Fault::InvalidArgument(policy.clone()));
                }
                state.policy_of.insert(vm.clone(), policy.clone());
            }
            if !state.machines.contains_key(&vm) {
                return Err(Fault::NotFound(vm));
            }
            state.asked.push(format!("attach {vm}"));
            Ok(state.begin(Work::Disks { vm, keys, on: true }))
        })
    }

    fn detach_filters(&self, vm: &Moid, keys: &[i32]) -> Result<TaskId, Fault> {
        let (vm, keys) = (vm.to_string(), keys.to_vec());
        self.0.call("detach", |state| {
            if !state.machines.contains_key(&vm) {
                return Err(Fault::NotFound(vm));
            }
            state.policy_of.remove(&vm);
            state.asked.push(format!("detach {vm}"));
            Ok(state.begin(Work::Disks {
                vm,
                keys,
                on: false,
            }))
        })
    }

    fn policies(&self) -> Result<Vec<Policy>, Fault> {
        self.0.call("policies", |state| {
            Ok(state.policies.keys().map(|name| policy(name)).collect())
        })
    }

    fn create_policy(
        &self,
        name: &str,
        filter: &str,
        properties: &[(String, String)],
    ) -> Result<Policy, Fault> {
        assert_eq!(filter, "jetdr");
        self.0.call("create policy", |state| {
            if state.policies.contains_key(name) {
                return Err(Fault::AlreadyExists);
            }
            state.policies.insert(name.into(), properties.to_vec());
            Ok(policy(name))
        })
    }

    fn delete_policy(&self, id: &str) -> Result<(), Fault> {
        self.0.call("delete policy", |state| {
            if state.policy_of.values().any(|one| one == id) {
                return Err(Fault::InvalidState("disks have it".into()));
            }
            let gone = state.policies.remove(id);
            gone.map(drop).ok_or_else(|| Fault::NotFound(id.into()))
        })
    }

    fn enter_maintenance(&self, _host: &Moid) -> Result<TaskId, Fault> {
        unused()
    }

    fn exit_maintenance(&self, _host: &Moid) -> Result<TaskId, Fault> {
        unused()
    }

    fn extension(&self, key: &str) -> Result<Option<Extension>, Fault> {
        self.0.call("extension", |state| {
            Ok(state.plugin.clone().filter(|one| one.key == key))
        })
    }

    fn register_extension(&self, extension: &Extension) -> Result<(), Fault> {
        self.0.call("register", |state| {
            state.plugin = Some(extension.clone());
            Ok(())
        })
    }

    fn unregister_extension(&self, key: &str) -> Result<(), Fault> {
        self.0
            .call("unregister", |state| match state.plugin.take() {
                Some(_) => Ok(()),
                None => Err(Fault::NotFound(key.into())),
            })
    }

    fn datastores(&self, _cluster: &Moid) -> Result<Vec<Named>, Fault> {
        named("datastore-1", "fast")
    }

    fn networks(&self, _cluster: &Moid) -> Result<Vec<Named>, Fault> {
        named("network-1", "management")
    }

    fn cluster_tasks(&self, _cluster: &Moid) -> Result<Vec<TaskId>, Fault> {
        self.0.call("cluster tasks", |state| {
            let open =
                |task: &Task| matches!(task.state, TaskState::Queued | TaskState::Running(_));
            let tasks = state.tasks.iter().enumerate();
            let open = tasks.filter(|(_, task)| open(task));
            Ok(open
                .map(|(at, _)| TaskId(id(&format!("task-{}", at + 1))))
                .collect())
        })
    }

    fn set_host_option(&self, host: &Moid, key: &str, value: &str) -> Result<(), Fault> {
        assert_eq!(key, ENROLMENT_OPTION);
        let enrols = self.0.call("set option", |state| {
            let Some(host) = state.hosts.get_mut(host.as_str()) else {
                return Err(Fault::NotFound(host.to_string()));
            };
            match value.is_empty() {
                true => drop(host.options.remove(key)),
                false => drop(host.options.insert(key.into(), value.into())),
            }
            Ok(host.enrols && host.installed.is_some() && !value.is_empty())
        })?;
        if enrols {
            self.0.enrol(value);
        }
        Ok(())
    }
}

/// Its id is its name here.
fn policy(name: &str) -> Policy {
    Policy {
        id: name.into(),
        name: name.into(),
    }
}

fn machine(moid: &str, vm: &FakeVm, state: &State) -> VmInfo {
    let disks = state.vms.get(moid).cloned().unwrap_or_default();
    let disk = |(key, has_filter): (i32, bool)| DiskInfo {
        key,
        label: format!("Hard disk {}", key - 1999),
        capacity_bytes: 8 << 20,
        is_shared: vm.is_shared,
        is_physical_rdm: vm.is_rdm,
        filters: has_filter.then(|| "jetdr".into()).into_iter().collect(),
        path: format!("[fast] {moid}/{key}.vmdk"),
    };
    VmInfo {
        moid: id(moid),
        name: vm.name.clone(),
        instance_uuid: vm.uuid,
        host: vm.host.as_deref().map(id),
        is_powered_on: vm.is_on,
        has_snapshots: vm.has_snapshots,
        disks: disks.into_iter().map(disk).collect(),
    }
}

fn named(moid: &str, name: &str) -> Result<Vec<Named>, Fault> {
    Ok(vec![Named {
        moid: id(moid),
        name: name.into(),
    }])
}
