//! `jetdr install` and `jetdr uninstall`: the management server on this machine, and all that it needs in
//! vCenter, made and removed.
//!
//! | module | does |
//! |---|---|
//! | `fields` | what an installation is told, and what is wrong with it by itself |
//! | `dns` | asks one name server for a name |
//! | `journal` | the folder, and how far the installation is |
//! | `steps` | the steps in order, and how each is taken back |
//! | `site` | what is put into vCenter |
//! | `server` | the server as a process of this machine |
//! | `rest` | the session with the server |
//!
//! Invariant: nothing is begun before all that can be seen to be wrong was looked for and told; what fails is taken
//! back by itself; what was killed is gone on with by the same command.

mod dns;
mod fields;
mod journal;
mod rest;
mod server;
mod site;
mod steps;

use anyhow::{Context, bail};
use fields::{Addressing, Fields, Wrong};
use journal::{Folder, Journal, Phase};
use msa::clusters::Link;
use msa::clusters::preflight::{self, Here, Wanted};
use msa::connect::ViJson;
use msa::outside::Outside;
use msa::packages::{self, Package};
use msa::text::{Account, Address, Fingerprint, Label, Name, Secret};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use steps::{Leaving, Work};

/// Where an installation lies, unless told otherwise.
const FOLDER: &str = "/var/lib/jetdr";

/// A name server: an address, with a port if it is not 53.
fn name_server(text: &str) -> Result<SocketAddr, String> {
    let alone = text.parse().map(|ip| SocketAddr::new(ip, 53));
    alone
        .or_else(|_| text.parse())
        .map_err(|_| format!("`{text}` is neither an address nor ADDRESS:PORT"))
}

/// What `install` takes.
#[derive(clap::Args, Clone, Debug)]
#[command(group(clap::ArgGroup::new("addressing").required(true).args(["dhcp", "static"])))]
pub struct InstallArgs {
    /// The server listens at the address of this machine to which its name resolves.
    #[arg(long)]
    dhcp: bool,
    /// It listens at --ms-ip.
    #[arg(id = "static", long = "static", requires_all = ["ms_ip", "netmask", "gateway", "dns"])]
    is_static: bool,
    /// The server's address, one of this machine.
    #[arg(long, requires = "static")]
    ms_ip: Option<Ipv4Addr>,
    /// The network of that address, in bits: 22, 24.
    #[arg(long, requires = "static")]
    netmask: Option<u8>,
    /// Where other networks are reached from there.
    #[arg(long, requires = "static")]
    gateway: Option<Ipv4Addr>,
    /// The name server that knows the server's name: ADDRESS or ADDRESS:PORT.
    #[arg(long, requires = "static", value_parser = name_server)]
    dns: Option<SocketAddr>,
    /// The server's full name in DNS.
    #[arg(long)]
    host_name: Address,
    /// The port at which it listens.
    #[arg(long, default_value_t = 8443)]
    port: u16,
    /// Register vCenter with the server by address, and the server with vCenter and hosts.
    #[arg(long)]
    register_with_ip: bool,
    /// The cluster whose machines are to be protected.
    #[arg(long)]
    protected_cluster: Label,
    /// The cluster of the server's entry; without it, the same.
    #[arg(long)]
    cluster: Option<Label>,
    /// That entry's datastore.
    #[arg(long)]
    datastore: Label,
    /// That entry's network.
    #[arg(long)]
    network: Label,
    /// That entry's name.
    #[arg(long)]
    vm_name: Label,
    #[command(flatten)]
    vcenter: VcenterArgs,
    /// A user of vCenter as whom the server is to work: it gets the role that is made. Users are made in vCenter's
    /// single sign-on.
    #[arg(long)]
    service_user: Account,
    /// The file with that user's password; `-` is standard input.
    #[arg(long)]
    service_password_file: PathBuf,
    /// The server's first administrator.
    #[arg(long, default_value = "admin")]
    admin: Name,
    /// The file with that administrator's password, 12 characters or more; without it one is made up, and kept in
    /// the file admin-password of --dir.
    #[arg(long)]
    password_file: Option<PathBuf>,
    /// The package for hosts: a signed VIB.
    #[arg(long)]
    package: PathBuf,
    /// The appliance of the hosts, once there is one.
    #[arg(long)]
    drva: Option<Name>,
    /// How many hosts the cluster has at least.
    #[arg(long)]
    min_hosts: Option<usize>,
    /// Seconds after which enabling the cluster is ended and taken back.
    #[arg(long, default_value_t = 1800)]
    timeout_s: u32,
    /// The installation's folder.
    #[arg(long, default_value = FOLDER)]
    dir: PathBuf,
}

/// vCenter, and its administrator.
#[derive(clap::Args, Clone, Debug)]
pub struct VcenterArgs {
    /// vCenter's name in DNS, or its address.
    #[arg(long)]
    vcenter: Address,
    /// Its port.
    #[arg(long, default_value_t = 443)]
    vcenter_port: u16,
    /// SHA-256 of its certificate; without it, the certificate must be one that this machine trusts.
    #[arg(long)]
    vcenter_fingerprint: Option<Fingerprint>,
    /// What the server calls it.
    #[arg(long, default_value = "vcenter")]
    vcenter_name: Name,
    /// A user who may make roles, give them and register plug-ins. It is not kept.
    #[arg(long)]
    vcenter_user: Account,
    /// The file with that user's password; `-` is standard input.
    #[arg(long)]
    vcenter_password_file: PathBuf,
}

/// What `uninstall` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct UninstallArgs {
    /// The installation's folder.
    #[arg(long, default_value = FOLDER)]
    dir: PathBuf,
    /// The file with the password of vCenter's user that was given at the installation; `-` is standard input.
    #[arg(long)]
    vcenter_password_file: PathBuf,
    /// The file with the server's administrator's password, if it is not the one that was made up.
    #[arg(long)]
    password_file: Option<PathBuf>,
    /// How many hosts each cluster has at least.
    #[arg(long)]
    min_hosts: Option<usize>,
    /// End the protection of disks that have it.
    #[arg(long)]
    detach: bool,
    /// Go on without hosts that vCenter does not reach.
    #[arg(long)]
    leave_unreachable: bool,
    /// Do not look first whether the clusters can be left.
    #[arg(long)]
    no_preflight: bool,
    /// Remove the folder too, with the server's state and its authority's key.
    #[arg(long)]
    purge: bool,
    /// Seconds after which disabling a cluster is ended and taken back.
    #[arg(long, default_value_t = 1800)]
    timeout_s: u32,
}

fn secret(path: &Path) -> anyhow::Result<Secret> {
    Secret::try_from(server::read_line(path)?)
        .with_context(|| format!("the password in {}", path.display()))
}

impl InstallArgs {
    fn fields(&self) -> anyhow::Result<Fields> {
        let addressing = match (self.ms_ip, self.netmask, self.gateway, self.dns) {
            (Some(ms_ip), Some(netmask), Some(gateway), Some(dns)) if self.is_static => {
                Addressing::Static {
                    ms_ip,
                    netmask,
                    gateway,
                    dns,
                }
            }
            _ => Addressing::Dhcp,
        };
        let protected_cluster = self.protected_cluster.clone();
        Ok(Fields {
            addressing,
            host_name: self.host_name.clone(),
            port: self.port,
            register_with_ip: self.register_with_ip,
            cluster: self.cluster.clone().unwrap_or(protected_cluster.clone()),
            protected_cluster,
            datastore: self.datastore.clone(),
            network: self.network.clone(),
            vm_name: self.vm_name.clone(),
            vcenter_name: self.vcenter.vcenter_name.clone(),
            vcenter: self.vcenter.vcenter.clone(),
            vcenter_port: self.vcenter.vcenter_port,
            fingerprint: self.vcenter.vcenter_fingerprint.clone(),
            vcenter_user: self.vcenter.vcenter_user.clone(),
            service_user: self.service_user.clone(),
            admin: self.admin.clone(),
            package: std::path::absolute(&self.package)?,
            drva: self.drva.clone(),
            min_hosts: self.min_hosts,
            timeout_s: self.timeout_s,
        })
    }
}

/// All that is wrong, before anything is begun.
fn look(
    folder: &Folder,
    fields: &Fields,
    password: &Secret,
    package: &Result<Package, String>,
) -> anyhow::Result<Vec<String>> {
    let mut all: Vec<String> = Vec::new();
    let mut find = |name, text| all.push(Wrong { name, text }.to_string());
    if !folder.is_empty()? {
        let text = format!(
            "{} is not empty: give a new or an empty folder by --dir",
            folder.path().display()
        );
        find("folder-taken", text);
    }
    if let Err(why) = package {
        find("package", why.clone());
    }
    for wrong in fields.look(folder.path()) {
        find(wrong.name, wrong.text);
    }
    let api = match site::connect(fields, password) {
        Ok(api) => api,
        Err(error) => {
            let why = "check --vcenter, --vcenter-fingerprint, the user and its password";
            find("vcenter-unreachable", format!("{error:#}: {why}"));
            return Ok(all);
        }
    };
    if site::role(&api)?.is_some() {
        let role = site::ROLE;
        let text =
            format!("vCenter has a role `{role}` already: remove it, if no other server needs it");
        find("role-present", text);
    }
    let user = fields.service_user.as_str();
    if site::has_role(&api, user)? {
        let text = format!(
            "{user} has a role on all of vCenter already, which would be replaced: take a user of its own for the server"
        );
        find("user-has-role", text);
    }
    let link = Link {
        vcenter: msa::inventory::Vcenter::unregistered(
            fields.vcenter_name.clone(),
            fields.vcenter_address()?,
            fields.vcenter_port,
            fields.fingerprint.clone(),
        ),
        api: Arc::new(api),
    };
    let outside = Outside::new(Box::new(ViJson));
    let since_1970 = || SystemTime::now().duration_since(UNIX_EPOCH);
    let now_ms = || since_1970().map_or(0, |time| i64::try_from(time.as_millis()).unwrap_or(0));
    let here = Here {
        now_ms: &now_ms,
        resolves: &outside.resolves,
    };
    let wanted = Wanted {
        cluster: fields.protected_cluster.as_str(),
        min_hosts: fields.min_hosts.unwrap_or(preflight::MIN_HOSTS),
        package: package.as_ref().ok(),
        datastore: Some(fields.datastore.as_str()),
        network: Some(fields.network.as_str()),
        vm_name: Some(fields.vm_name.as_str()),
        plugin: Some(false),
    };
    let names = [fields.host_name.as_str()];
    let own = fields.cluster.as_str();
    let found = preflight::install(here, &link, &names, &wanted, own)?;
    all.extend(found.iter().map(ToString::to_string));
    Ok(all)
}

/// Installs.
pub fn install(args: &InstallArgs) -> anyhow::Result<ExitCode> {
    fault::arm()?;
    let fields = args.fields()?;
    let folder = Folder::make(&args.dir)?;
    let known = folder.journal()?;
    let at = folder.path().display().to_string();
    match &known {
        Some(journal) if journal.phase == Phase::Installed => {
            return already(&folder, journal, &fields);
        }
        Some(journal) if [Phase::Uninstalling, Phase::Uninstalled].contains(&journal.phase) => {
            bail!(
                "{at} holds what an uninstallation left: end it by `jetdr uninstall --purge`, or give another --dir"
            );
        }
        Some(journal) if journal.fields != fields => bail!(
            "{at} holds an installation that was begun with other fields: give the same, or take it back by `jetdr uninstall`"
        ),
        _ => {}
    }
    let vcenter_password = secret(&args.vcenter.vcenter_password_file)?;
    let service_password = secret(&args.service_password_file)?;
    let bytes = std::fs::read(&fields.package)
        .with_context(|| format!("cannot read {}", fields.package.display()));
    let journal = match known {
        Some(journal) => {
            println!("going on with the installation in {at}");
            journal
        }
        None => {
            let package = match &bytes {
                Ok(bytes) => packages::look(bytes.clone(), 0).map_err(|error| error.to_string()),
                Err(error) => Err(format!("{error:#}: correct --package")),
            };
            let found = look(&folder, &fields, &vcenter_password, &package);
            if !matches!(&found, Ok(found) if found.is_empty()) {
                folder.release();
            }
            refuse(&found?)?;
            Journal::new(fields.clone())
        }
    };
    let mut work = Work {
        api: site::connect(&fields, &vcenter_password)?,
        folder,
        journal,
        password_file: args.password_file.clone(),
        service_password: Some(service_password),
        package: bytes?,
        leaving: Leaving {
            timeout_s: fields.timeout_s,
            ..Leaving::default()
        },
        exit: ExitCode::SUCCESS,
        session: None,
    };
    if work.journal.phase == Phase::Installing {
        match work.forward() {
            Ok(()) => return finish(work),
            Err(error) => {
                eprintln!("{error:#}: taking all of it back");
                work.journal.phase = Phase::TakingBack;
                work.journal.why = Some(format!("{error:#}"));
                work.folder.keep(&work.journal)?;
            }
        }
    }
    take_back(work)
}

/// Writes what is wrong; an error, if it is anything.
fn refuse(found: &[String]) -> anyhow::Result<()> {
    for one in found {
        println!("{one}");
    }
    match found {
        [] => Ok(()),
        [only] => bail!("nothing was begun: {only}"),
        [first, rest @ ..] => {
            bail!("nothing was begun: {first}; {} more above", rest.len())
        }
    }
}

/// All is done.
fn finish(mut work: Work) -> anyhow::Result<ExitCode> {
    work.journal.phase = Phase::Installed;
    work.folder.keep(&work.journal)?;
    tell(work.folder.path(), &work.journal.fields)?;
    Ok(work.exit)
}

fn tell(folder: &Path, fields: &Fields) -> anyhow::Result<()> {
    let process = server::running(folder).map_or(String::new(), |pid| format!(" (process {pid})"));
    println!("the management server runs at {}{process}", fields.url()?);
    let authority = folder.join(server::DATA).join(msa::authority::CERTIFICATE);
    println!("its authority: {}", authority.display());
    let kept = folder.join(server::PASSWORD);
    if kept.exists() {
        println!(
            "its administrator: {}, the password is in {}",
            fields.admin,
            kept.display()
        );
    }
    Ok(())
}

/// The same command again: the server is started, if it does not run.
fn already(folder: &Folder, journal: &Journal, fields: &Fields) -> anyhow::Result<ExitCode> {
    if &journal.fields != fields {
        bail!(
            "{} holds an installation with other fields: give another --dir, or uninstall it first",
            folder.path().display()
        );
    }
    if server::start(folder.path(), fields)? {
        println!("installed before: the server did not run, and was started");
    } else {
        println!("installed before: nothing to do");
    }
    tell(folder.path(), fields)?;
    Ok(ExitCode::SUCCESS)
}

fn take_back(mut work: Work) -> anyhow::Result<ExitCode> {
    let why = work.journal.why.clone().unwrap_or_default();
    if let Err(error) = work.back() {
        bail!(
            "{why}; not all of it could be taken back: {error:#}: remove the cause, and give the same command again"
        );
    }
    work.folder.remove()?;
    bail!("{why}; all of it is taken back");
}

/// Uninstalls.
pub fn uninstall(args: &UninstallArgs) -> anyhow::Result<ExitCode> {
    fault::arm()?;
    let nothing = || {
        println!(
            "no installation is in {}: nothing to do",
            args.dir.display()
        );
        Ok(ExitCode::SUCCESS)
    };
    if !args.dir.exists() {
        return nothing();
    }
    let folder = Folder::hold(&args.dir)?;
    let Some(journal) = folder.journal()? else {
        folder.release();
        return nothing();
    };
    if journal.phase == Phase::Uninstalled {
        return leave(folder, args.purge);
    }
    let password = secret(&args.vcenter_password_file)?;
    let mut work = Work {
        api: site::connect(&journal.fields, &password)?,
        folder,
        journal,
        password_file: args.password_file.clone(),
        service_password: None,
        package: Vec::new(),
        leaving: Leaving {
            detach: args.detach,
            leave_unreachable: args.leave_unreachable,
            timeout_s: args.timeout_s,
        },
        exit: ExitCode::SUCCESS,
        session: None,
    };
    match work.journal.phase {
        Phase::Installed => {
            if !args.no_preflight {
                preflight(&mut work, args.min_hosts)?;
            }
            work.journal.phase = Phase::Uninstalling;
        }
        Phase::Installing => {
            println!("the installation did not come to its end: all of it is taken back");
            work.journal.phase = Phase::TakingBack;
        }
        Phase::TakingBack | Phase::Uninstalling | Phase::Uninstalled => {}
    }
    work.folder.keep(&work.journal)?;
    if let Err(error) = work.back() {
        bail!("{error:#}: remove the cause, and give the same command again");
    }
    if work.journal.phase == Phase::TakingBack {
        work.folder.remove()?;
        println!("all of it is taken back");
        return Ok(ExitCode::SUCCESS);
    }
    work.journal.phase = Phase::Uninstalled;
    work.folder.keep(&work.journal)?;
    leave(work.folder, args.purge)
}

/// Looks whether the clusters can be left; an error, if not.
fn preflight(work: &mut Work, min_hosts: Option<usize>) -> anyhow::Result<()> {
    let client = work.session()?;
    let fields = &work.journal.fields;
    let mut clusters = rest::clusters(&client)?;
    if clusters.is_empty() {
        clusters.push(fields.protected_cluster.to_string());
    }
    for cluster in &clusters {
        let mut more = serde_json::Map::new();
        more.insert("vcenter".into(), serde_json::json!(fields.vcenter_name));
        if let Some(min_hosts) = min_hosts.or(fields.min_hosts) {
            more.insert("min_hosts".into(), serde_json::json!(min_hosts));
        }
        let wish = rest::Wish {
            prefix: "uninstall",
            kind: "preflight-uninstall",
            cluster,
            more,
            timeout_s: work.leaving.timeout_s,
        };
        rest::carry(&client, &wish).context("nothing was begun")?;
    }
    Ok(())
}

/// The folder stays, unless it is to go.
fn leave(folder: Folder, purge: bool) -> anyhow::Result<ExitCode> {
    if purge {
        folder.remove()?;
        println!("uninstalled; the folder is removed");
    } else {
        println!(
            "uninstalled; the server's state stays in {} until `jetdr uninstall --purge`",
            folder.path().display()
        );
    }
    Ok(ExitCode::SUCCESS)
}
