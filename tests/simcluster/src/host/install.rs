//! Packages into a root, and out of it.
//!
//! Invariant: a root holds a package wholly or not at all. What was made for a package is listed before it
//! is made, so a failure, also one of this process, takes back just that; what was there before stays, byte
//! for byte.

use super::{Host, said};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use vcenter::VibTrust;
use vib_packaging::{Constraint, EntryKind, KEPT, Limits, Policy, Trust, Vib};

/// Why a host did not do what was asked of its packages.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// vCenter does not reach the host.
    #[error("the host does not respond")]
    NotResponding,
    /// The package cannot be fetched.
    #[error("the host cannot fetch the VIB from {0}: {1}")]
    UrlUnreachable(String, String),
    /// It is not taken.
    #[error("the host does not take the VIB: {0}")]
    InvalidVib(String),
    /// It needs other packages or another host, or a file of it is in the way of another.
    #[error("the VIB does not go with the host: {0}")]
    Unfit(String),
    /// The host must be in maintenance mode for it.
    #[error("the host must be in maintenance mode")]
    MaintenanceNeeded,
    /// It counts only after a boot.
    #[error("the host must be rebooted to {0} {1}")]
    RebootNeeded(&'static str, String),
    /// Running machines stand in the way of maintenance mode.
    #[error("the host's virtual machines cannot be evacuated: {0}")]
    NotEvacuated(String),
    /// Its init script failed.
    #[error("the init script: {0}")]
    Script(String),
    /// The host itself failed.
    #[error("the host failed: {0}")]
    Failed(String),
}

impl From<io::Error> for HostError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<anyhow::Error> for HostError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(format!("{error:#}"))
    }
}

/// What a package waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Waits {
    /// Nothing: it is installed.
    Not,
    /// A boot installs it.
    ToInstall,
    /// A boot removes it.
    ToRemove,
}

/// A package in a root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// `<vendor>_<type>_<name>_<version>`.
    pub vib_id: String,
    /// Its vendor.
    pub vendor: String,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// One line about it.
    pub summary: String,
    /// ISO date and time.
    pub release_date: String,
    /// Its removal needs maintenance mode.
    pub removal_needs_maintenance: bool,
    /// It can go without a boot.
    pub goes_live: bool,
    /// What it waits for.
    pub waits: Waits,
    /// All of it is there, and its daemon was started.
    is_whole: bool,
    /// Folders and files that were made for it, in order.
    made: Vec<String>,
}

impl Package {
    /// `<VENDOR>_<name>_<version>`: the filter's id.
    pub fn filter_id(&self) -> String {
        format!("{}_{}_{}", self.vendor, self.name, self.version)
    }

    fn of(vib: &Vib, waits: Waits) -> Self {
        let about = vib.descriptor();
        Self {
            vib_id: about.id(),
            vendor: about.vendor.clone(),
            name: about.name.clone(),
            version: about.version.clone(),
            summary: about.summary.clone(),
            release_date: about.release_date.clone(),
            removal_needs_maintenance: about.system_requires.maintenance_mode.1,
            goes_live: about.live_remove_allowed,
            waits,
            is_whole: false,
            made: Vec::new(),
        }
    }
}

/// Numbers in a version, in order: `8.0.2-1` is 8, 0, 2, 1.
fn numbers(version: &str) -> Vec<u64> {
    let parts = version.split(['.', '-']);
    parts.map(|part| part.parse().unwrap_or(0)).collect()
}

/// Whether a version is in a relation with another.
fn is_in_relation(version: &str, relation: &str, other: &str) -> bool {
    let (left, right) = (numbers(version), numbers(other));
    match relation {
        "<<" => left < right,
        "<=" => left <= right,
        "=" => left == right,
        ">=" => left >= right,
        ">>" => left > right,
        _ => false,
    }
}

impl Host {
    fn record_folder(&self) -> PathBuf {
        self.folder.join("packages")
    }

    fn record(&self, name: &str) -> PathBuf {
        self.record_folder().join(format!("{name}.json"))
    }

    pub(super) fn forget_packages(&self) -> io::Result<()> {
        let folder = self.record_folder();
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(folder)
    }

    /// The packages in the root, and those that wait for a boot.
    pub fn packages(&self) -> Vec<Package> {
        let entries = fs::read_dir(self.record_folder());
        let paths = entries.into_iter().flatten().flatten().map(|e| e.path());
        let is_record = |path: &PathBuf| path.extension().is_some_and(|end| end == "json");
        let read = |path: PathBuf| serde_json::from_slice(&fs::read(path).ok()?).ok();
        let mut all: Vec<Package> = paths.filter(is_record).filter_map(read).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The package of a filter, if it is installed.
    pub fn package(&self, name: &str) -> Option<Package> {
        self.packages()
            .into_iter()
            .find(|package| package.name == name)
    }

    fn write_record(&self, package: &Package) -> anyhow::Result<()> {
        let path = self.record(&package.name);
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(package)?)?;
        fs::rename(&new, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Installs the package at a URL, or takes it in place of an older one of its name. Installing what is
    /// there already does nothing.
    pub fn install(
        &self,
        url: &str,
        trust: &VibTrust,
        in_maintenance: bool,
    ) -> Result<Package, HostError> {
        self.wait_until_let_go();
        let _one = self.work.lock();
        let settings = self.settings();
        if !settings.is_reachable {
            return Err(HostError::NotResponding);
        }
        let vib = self.open_vib(url, self.fetch(url, trust)?)?;
        let about = vib.descriptor();
        self.look_at_relations(&vib)?;
        let old = self.package(&about.name);
        if let Some(old) = old.as_ref().filter(|old| old.vib_id == about.id()) {
            match old.waits {
                Waits::Not if old.is_whole => return Ok(old.clone()),
                Waits::Not => {}
                Waits::ToInstall => return Err(reboot("install", old)),
                Waits::ToRemove => {}
            }
        }
        let needs = about.system_requires.maintenance_mode;
        if (needs.0 || (needs.1 && old.is_some())) && !in_maintenance {
            return Err(HostError::MaintenanceNeeded);
        }
        let mut package = Package::of(&vib, Waits::Not);
        if !about.live_install_allowed {
            package.waits = Waits::ToInstall;
            fs::write(
                self.record(&package.name).with_extension("vib"),
                vib.bytes(),
            )?;
            self.write_record(&package)?;
            return Err(reboot("install", &package));
        }
        match old {
            Some(old) => self.replace(&old, &vib, package),
            None => self.put(&vib, package),
        }
    }

    fn open_vib(&self, url: &str, bytes: Vec<u8>) -> Result<Vib, HostError> {
        let settings = self.settings();
        let trust = match &self.tools.signers {
            Some(signers) if !settings.is_forced => Trust::Anchors(signers, None),
            _ => Trust::Unchecked,
        };
        let policy = Policy {
            trust,
            limits: Limits::default(),
        };
        let name = url.rsplit('/').next().unwrap_or(url);
        let invalid = |error: String| HostError::InvalidVib(error);
        let vib = Vib::open(name, bytes, &policy, settings.is_forced)
            .map_err(|error| invalid(error.to_string()))?;
        let level = vib.descriptor().acceptance_level;
        // From the most trusted to the least, so a higher value is a lower level.
        if level > settings.level && !settings.is_forced {
            return Err(invalid(format!(
                "its acceptance level is {level}, and the host takes {} and above",
                settings.level
            )));
        }
        if vib.signer().is_none() && level < vib_packaging::AcceptanceLevel::Community {
            if settings.is_forced {
                return Ok(vib);
            }
            return Err(invalid("nobody signed it".into()));
        }
        if !settings.is_forced
            && self.tools.signers.is_none()
            && level < vib_packaging::AcceptanceLevel::Community
        {
            return Err(invalid("the host trusts no signer of packages".into()));
        }
        Ok(vib)
    }

    /// What it depends on is there, what it conflicts with is not.
    fn look_at_relations(&self, vib: &Vib) -> Result<(), HostError> {
        let about = vib.descriptor();
        let version = self.settings().version;
        let mut there = vec![
            ("esx-version".to_owned(), version.clone()),
            ("uwglibc64".to_owned(), version),
        ];
        let others = self.packages().into_iter().filter(|p| p.name != about.name);
        there.extend(others.map(|package| (package.name, package.version)));
        let meets = |constraint: &Constraint| {
            there.iter().any(|(name, version)| {
                *name == constraint.name
                    && constraint
                        .version
                        .as_ref()
                        .is_none_or(|(relation, other)| is_in_relation(version, relation, other))
            })
        };
        let words = |constraint: &Constraint| match &constraint.version {
            Some((relation, version)) => format!("{} {relation} {version}", constraint.name),
            None => constraint.name.clone(),
        };
        let relations = &about.relationships;
        if let Some(missing) = relations.depends.iter().find(|one| !meets(one)) {
            return Err(HostError::Unfit(format!("it needs {}", words(missing))));
        }
        match relations.conflicts.iter().find(|one| meets(one)) {
            Some(there) => Err(HostError::Unfit(format!(
                "it cannot be beside {}",
                words(there)
            ))),
            None => Ok(()),
        }
    }

    /// Puts a new package into the root and starts it; on a failure all of it goes again.
    fn put(&self, vib: &Vib, mut package: Package) -> Result<Package, HostError> {
        let done = self
            .lay(vib, &mut package, &[])
            .and_then(|()| self.start_package(&mut package, &["start", "install"]));
        if let Err(error) = done {
            let _ = self.run_script(&package, &["stop", "remove"]);
            self.take_out(&package)?;
            return Err(error);
        }
        Ok(package)
    }

    /// Stops the old one, lays the new one over it, starts that: configuration and lanes stay.
    fn replace(
        &self,
        old: &Package,
        vib: &Vib,
        mut package: Package,
    ) -> Result<Package, HostError> {
        self.run_script(old, &["stop", "upgrade"])?;
        // What the old one made, and what it kept, is now the new one's to take away.
        package.made = old.made.clone();
        let of_new: Vec<&str> = vib.entries().iter().map(|e| e.path.as_str()).collect();
        let gone = old.made.iter().filter(|path| {
            let file = self.root().join(path);
            file.is_file() && !of_new.contains(&path.as_str())
        });
        for path in gone {
            fs::remove_file(self.root().join(path))?;
        }
        package.made.retain(|path| self.root().join(path).exists());
        let kept = package.made.clone();
        self.lay(vib, &mut package, &kept)?;
        self.start_package(&mut package, &["start", "upgrade"])?;
        Ok(package)
    }

    /// Unpacks. `replaced`: files that the package may overwrite; of these, configuration is kept.
    fn lay(&self, vib: &Vib, package: &mut Package, replaced: &[String]) -> Result<(), HostError> {
        let root = self.root();
        let mut all: Vec<(String, EntryKind)> = Vec::new();
        for entry in vib.entries() {
            let parents = entry
                .path
                .match_indices('/')
                .map(|(at, _)| &entry.path[..at]);
            all.extend(parents.map(|path| (path.to_owned(), EntryKind::Folder)));
            all.push((entry.path.clone(), entry.kind));
        }
        let record = format!("var/db/esximg/vibs/{}.xml", package.name);
        all.push((record.clone(), EntryKind::File));
        for (path, kind) in &all {
            let at = root.join(path);
            let known = package.made.contains(path);
            match (at.exists(), kind) {
                (true, EntryKind::Folder) if at.is_dir() => {}
                (true, _) if !replaced.contains(path) && !known => {
                    return Err(HostError::Unfit(format!("{path} is there already")));
                }
                _ if !known => package.made.push(path.clone()),
                _ => {}
            }
        }
        // Known before it is made: whoever takes it back looks here.
        self.write_record(package)?;
        let write = |entry: &vib_packaging::Entry, body: &mut dyn io::Read| {
            let path = root.join(&entry.path);
            if entry.kind == EntryKind::Folder {
                return fs::create_dir_all(path);
            }
            if entry.mode & KEPT != 0 && path.exists() {
                return Ok(());
            }
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let new = path.with_extension("installing");
            let mut file = fs::File::create_new(&new)?;
            io::copy(body, &mut file)?;
            fs::set_permissions(&new, fs::Permissions::from_mode(entry.mode))?;
            // A process that has the old one open keeps it.
            fs::rename(&new, &path)
        };
        vib.unpack(self.settings().is_forced, write)
            .map_err(|error| HostError::Failed(error.to_string()))?;
        fs::write(root.join(record), vib.document())?;
        Ok(())
    }

    fn start_package(&self, package: &mut Package, verb: &[&str]) -> Result<(), HostError> {
        self.refresh_firewall()?;
        self.mark_boot(package)?;
        self.run_script(package, verb)?;
        package.is_whole = true;
        Ok(self.write_record(package)?)
    }

    /// The framework's word to filters which boot this is; in the run folder, so a removal takes it along.
    pub(super) fn mark_boot(&self, package: &Package) -> anyhow::Result<()> {
        if package.waits == Waits::ToInstall {
            return Ok(());
        }
        let folder = self.run_folder(&package.name);
        fs::create_dir_all(&folder)?;
        let path = folder.join("boot-id");
        if !path.exists() {
            fs::write(&path, format!("{}\n", uuid::Uuid::new_v4().simple()))?;
        }
        Ok(())
    }

    /// The run folder of a filter.
    pub fn run_folder(&self, filter: &str) -> PathBuf {
        self.root().join("var/run").join(filter)
    }

    /// The library of a filter, if it is there.
    pub fn library(&self, filter: &str) -> Option<PathBuf> {
        let name = format!("usr/lib64/vmware/plugin/libvmiof-disk-{filter}.so");
        Some(self.root().join(name)).filter(|path| path.exists())
    }

    fn run_script(&self, package: &Package, verb: &[&str]) -> Result<(), HostError> {
        let name = format!("iofilterd-{}", package.name);
        if !self.root().join("etc/init.d").join(&name).exists() {
            return Ok(());
        }
        let output = self.script(&name, verb)?;
        match output.status.success() {
            true => Ok(()),
            false => Err(HostError::Script(format!(
                "{name} {}: {}",
                verb.join(" "),
                said(&output)
            ))),
        }
    }

    /// Takes everything away that was made for a package.
    fn take_out(&self, package: &Package) -> Result<(), HostError> {
        let root = self.root();
        for path in package.made.iter().rev().map(|path| root.join(path)) {
            let removed = match fs::symlink_metadata(&path) {
                // Not empty: something else came into it.
                Ok(about) if about.is_dir() => fs::remove_dir(&path).or(Ok(())),
                Ok(_) => fs::remove_file(&path),
                Err(_) => Ok(()),
            };
            removed.map_err(|error| {
                HostError::Failed(format!("cannot remove {}: {error}", path.display()))
            })?;
            let _ = fs::remove_file(path.with_extension("installing"));
        }
        let _ = fs::remove_file(self.record(&package.name).with_extension("vib"));
        fs::remove_file(self.record(&package.name))?;
        self.refresh_firewall()?;
        Ok(())
    }

    /// Removes a filter's package. One that is not there is removed.
    pub fn uninstall(&self, name: &str, in_maintenance: bool) -> Result<(), HostError> {
        self.wait_until_let_go();
        let _one = self.work.lock();
        if !self.settings().is_reachable {
            return Err(HostError::NotResponding);
        }
        let Some(mut package) = self.package(name) else {
            return Ok(());
        };
        if package.waits == Waits::ToInstall {
            return self.take_out(&package);
        }
        if package.removal_needs_maintenance && !in_maintenance {
            return Err(HostError::MaintenanceNeeded);
        }
        if !package.goes_live {
            package.waits = Waits::ToRemove;
            self.write_record(&package)?;
            return Err(reboot("remove", &package));
        }
        self.run_script(&package, &["stop", "remove"])?;
        let run_folder = self.run_folder(name);
        if run_folder.exists() {
            fs::remove_dir_all(run_folder)?;
        }
        self.take_out(&package)
    }

    /// At a boot: what waited for it is done.
    pub(super) fn settle_packages(&self) -> anyhow::Result<()> {
        for mut package in self.packages() {
            match package.waits {
                Waits::Not => {}
                Waits::ToRemove => self.take_out(&package)?,
                Waits::ToInstall => {
                    let staged = self.record(&package.name).with_extension("vib");
                    let vib = self.open_vib(&package.vib_id, fs::read(&staged)?)?;
                    package.waits = Waits::Not;
                    self.lay(&vib, &mut package, &[])?;
                    package.is_whole = true; // the boot starts what the root holds
                    self.write_record(&package)?;
                    fs::remove_file(staged)?;
                }
            }
        }
        Ok(())
    }
}

fn reboot(what: &'static str, package: &Package) -> HostError {
    HostError::RebootNeeded(what, package.vib_id.clone())
}

/// What lies below a root, for comparing: paths, kinds and modes, contents of files.
pub fn listing(root: &Path) -> io::Result<Vec<(PathBuf, u32, Vec<u8>)>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let about = fs::symlink_metadata(&path)?;
            let bytes = match about.is_file() {
                true => fs::read(&path)?,
                false => Vec::new(),
            };
            if about.is_dir() {
                folders.push(path.clone());
            }
            let relative = path.strip_prefix(root).unwrap_or(&path).to_owned();
            found.push((relative, about.permissions().mode(), bytes));
        }
    }
    found.sort();
    Ok(found)
}
