//! What an installation puts into vCenter: the machine's entry, the role, who has it, the plug-in's entry.
//!
//! Invariant: what is removed is what this installation made: an entry by its note, a plug-in by its address.

use super::fields::Fields;
use super::journal::Journal;
use anyhow::{Context, bail};
use msa::clusters::{PLUGIN, PRIVILEGES};
use msa::connect::ViJson;
use msa::outside::{Login, Place};
use msa::text::Secret;
use msa::vcenter::{
    Administration, Client, Extension, Fault, Moid, NewVm, TaskId, TaskState, Vcenter,
};
use std::time::{Duration, Instant};

/// The role's name in vCenter.
pub const ROLE: &str = "jetdr";
/// A task about an entry takes no longer.
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(200);

/// A session with vCenter as its administrator.
pub fn connect(fields: &Fields, password: &Secret) -> anyhow::Result<Client> {
    let client = ViJson::client(&Place {
        address: fields.vcenter_address()?,
        port: fields.vcenter_port,
        fingerprint: fields.fingerprint.clone(),
        login: Login {
            user: fields.vcenter_user.clone(),
            password: password.clone(),
        },
    })?;
    client
        .clusters()
        .with_context(|| format!("vCenter {}, as {}", fields.vcenter, fields.vcenter_user))?;
    Ok(client)
}

fn wait(api: &dyn Vcenter, task: &TaskId, what: &str) -> anyhow::Result<Result<(), Fault>> {
    let since = Instant::now();
    loop {
        match api.task(task) {
            Ok(TaskState::Success) => return Ok(Ok(())),
            Ok(TaskState::Error(fault)) => return Ok(Err(fault)),
            // It ended so long ago that it is forgotten: what it did is looked for.
            Err(Fault::NotFound(_)) => return Ok(Ok(())),
            Ok(TaskState::Queued | TaskState::Running(_)) => {}
            Err(fault) => return Err(fault).with_context(|| what.to_owned()),
        }
        if since.elapsed() > LIMIT {
            bail!("{what}: vCenter's task {task} does not end");
        }
        std::thread::sleep(POLL);
    }
}

/// What is noted with the entry, so that it is known again.
fn mark(journal: &Journal) -> String {
    format!("jetdr installation {}", journal.id)
}

/// The entry that this installation made.
fn entry(api: &Client, journal: &Journal) -> anyhow::Result<Option<Moid>> {
    let name = journal.fields.vm_name.as_str();
    for vm in api.vms_named(name)? {
        match api.annotation(&vm) {
            Ok(note) if note.contains(&mark(journal)) => return Ok(Some(vm)),
            Ok(_) | Err(Fault::NotFound(_)) => {}
            Err(fault) => return Err(fault.into()),
        }
    }
    Ok(None)
}

/// Makes the machine's entry, unless it is there.
pub fn make_entry(api: &Client, journal: &Journal) -> anyhow::Result<()> {
    if entry(api, journal)?.is_some() {
        return Ok(());
    }
    let fields = &journal.fields;
    let clusters = api.clusters()?;
    let cluster = clusters
        .iter()
        .find(|one| one.name == fields.cluster.as_str());
    let cluster = cluster.with_context(|| format!("vCenter has no cluster {}", fields.cluster))?;
    let networks = api.networks(&cluster.moid)?;
    let network = networks
        .into_iter()
        .find(|one| one.name == fields.network.as_str());
    let network = network.with_context(|| format!("vCenter has no network {}", fields.network))?;
    let new = NewVm {
        name: fields.vm_name.to_string(),
        cluster: cluster.moid.clone(),
        datastore: fields.datastore.to_string(),
        network: network.moid,
        annotation: format!(
            "{}: this entry keeps the server's name; the server runs at {}",
            mark(journal),
            fields.url()?
        ),
    };
    let what = format!("making the entry {}", new.name);
    let task = api.create_vm(&new).with_context(|| what.clone())?;
    wait(api, &task, &what)?.with_context(|| what)
}

/// Deletes the machine's entry, if it is there.
pub fn remove_entry(api: &Client, journal: &Journal) -> anyhow::Result<()> {
    let Some(vm) = entry(api, journal)? else {
        return Ok(());
    };
    let what = format!("deleting the entry {}", journal.fields.vm_name);
    let task = match api.destroy_vm(&vm) {
        Err(Fault::NotFound(_)) => return Ok(()),
        asked => asked.with_context(|| what.clone())?,
    };
    match wait(api, &task, &what)? {
        Err(Fault::NotFound(_)) => Ok(()),
        done => done.with_context(|| what),
    }
}

/// The role's id, if there is one of its name.
pub fn role(api: &Client) -> anyhow::Result<Option<i32>> {
    let all = api.roles().context("asking for roles")?;
    Ok(all.iter().find(|one| one.name == ROLE).map(|one| one.id))
}

/// Makes the role, unless it is there: before the installation began it was not.
pub fn make_role(api: &Client) -> anyhow::Result<i32> {
    match role(api)? {
        Some(id) => Ok(id),
        None => api.add_role(ROLE, &PRIVILEGES).context("making the role"),
    }
}

/// Removes the role, if it is there.
pub fn remove_role(api: &Client, made: Option<i32>) -> anyhow::Result<()> {
    // Killed before its id was noted: it is known by its name.
    let Some(id) = made.or(role(api)?) else {
        return Ok(());
    };
    match api.remove_role(id) {
        Ok(()) | Err(Fault::NotFound(_)) => Ok(()),
        Err(fault) => Err(fault).context(format!(
            "removing the role {ROLE}: take it from those who have it besides, then try again"
        )),
    }
}

/// Gives the server's user the role.
pub fn give_role(api: &Client, user: &str, role: Option<i32>) -> anyhow::Result<()> {
    let role = role.context("the journal has no role")?;
    api.set_permission(user, role)
        .with_context(|| format!("giving {user} the role {ROLE}"))
}

/// Takes the role from the server's user; another that the user has meanwhile stays.
pub fn take_role(api: &Client, user: &str, made: Option<i32>) -> anyhow::Result<()> {
    let Some(role) = made else {
        return Ok(());
    };
    let all = api.permissions().context("asking who has which role")?;
    let has = all
        .iter()
        .any(|one| one.principal == user && one.role == role);
    if !has {
        return Ok(());
    }
    match api.remove_permission(user) {
        Ok(()) | Err(Fault::NotFound(_)) => Ok(()),
        Err(fault) => Err(fault).with_context(|| format!("taking the role {ROLE} from {user}")),
    }
}

/// Whether a user has any role on all of the inventory: it would be replaced.
pub fn has_role(api: &Client, user: &str) -> anyhow::Result<bool> {
    let all = api.permissions().context("asking who has which role")?;
    Ok(all
        .iter()
        .any(|one| one.principal.eq_ignore_ascii_case(user)))
}

/// Registers the plug-in's entry, unless it is there with this server's address.
pub fn register_plugin(api: &Client, fields: &Fields) -> anyhow::Result<()> {
    let url = fields.url()?;
    match api.extension(PLUGIN).context("asking for plug-ins")? {
        Some(found) if found.url.as_deref() == Some(&url) => return Ok(()),
        Some(found) => bail!(
            "vCenter has the plug-in {PLUGIN} of another server, at {}: uninstall that one first",
            found.url.as_deref().unwrap_or("an unknown address")
        ),
        None => {}
    }
    let extension = Extension {
        key: PLUGIN.into(),
        label: "jetdr".into(),
        company: "JetDR".into(),
        version: env!("CARGO_PKG_VERSION").parse()?,
        url: Some(url),
    };
    api.register_extension(&extension)
        .context("registering the plug-in")
}

/// Takes the plug-in's entry out, if it is this server's.
pub fn unregister_plugin(api: &Client, fields: &Fields) -> anyhow::Result<()> {
    let url = fields.url()?;
    match api.extension(PLUGIN).context("asking for plug-ins")? {
        Some(found) if found.url.as_deref() == Some(&url) => {}
        Some(found) => {
            println!(
                "the plug-in {PLUGIN} in vCenter is another server's, at {}: it stays",
                found.url.as_deref().unwrap_or("an unknown address")
            );
            return Ok(());
        }
        None => return Ok(()),
    }
    match api.unregister_extension(PLUGIN) {
        Ok(()) | Err(Fault::NotFound(_)) => Ok(()),
        Err(fault) => Err(fault).context("taking the plug-in out"),
    }
}
