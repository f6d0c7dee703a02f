//! What operations need besides the state: vCenters, name resolution, and how hosts reach this server.
//!
//! Invariant: all of the world that an operation sees goes through here, so that a test can be that world.

use crate::inventory;
use crate::text::{Account, Address, Fingerprint, Id, Secret};
use crate::vcenter::{Fault, Vcenter};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The folder of the users and passwords of vCenters, a file each: no secret is in the database.
pub const VAULT: &str = "vcenters";

/// Where a vCenter is, and as whom this server logs in.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its address.
    pub address: Address,
    /// Its port.
    pub port: u16,
    /// SHA-256 of the certificate that it is to show; without it, one that is valid for its name.
    pub fingerprint: Option<Fingerprint>,
    /// The user.
    pub login: Login,
}

/// As whom this server logs in to a vCenter.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// The user.
    pub user: Account,
    /// The password.
    pub password: Secret,
}

/// Makes connections to vCenters.
pub trait Connect: Send + Sync {
    /// Logs in.
    fn connect(&self, place: &Place) -> Result<Arc<dyn Vcenter>, Fault>;
}

/// For a server that has no way to a vCenter.
pub struct NoConnect;

impl Connect for NoConnect {
    fn connect(&self, _place: &Place) -> Result<Arc<dyn Vcenter>, Fault> {
        Err(Fault::Other(
            "this server was built without a client of vCenter".into(),
        ))
    }
}

/// Whether a name resolves.
pub type Resolves = Box<dyn Fn(&str) -> bool + Send + Sync>;

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Between two questions about the same thing.
    pub poll: Duration,
    /// A host's daemon may take so long to be up, and to enrol.
    pub settle: Duration,
    /// What is taken back may take so long.
    pub undo: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            poll: Duration::from_secs(1),
            settle: Duration::from_secs(60),
            undo: Duration::from_secs(1800),
        }
    }
}

/// The world of operations.
pub struct Outside {
    /// The way to vCenters.
    pub connect: Box<dyn Connect>,
    /// Whether a name resolves here.
    pub resolves: Resolves,
    /// How long things take.
    pub patience: Patience,
    base_url: OnceLock<String>,
    revoked: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

fn resolves(name: &str) -> bool {
    name.parse::<IpAddr>().is_ok() || (name, 443).to_socket_addrs().is_ok()
}

impl Outside {
    /// The world through this way to vCenters, with this machine's name resolution.
    pub fn new(connect: Box<dyn Connect>) -> Self {
        Self {
            connect,
            resolves: Box::new(resolves),
            patience: Patience::default(),
            base_url: OnceLock::new(),
            revoked: OnceLock::new(),
        }
    }

    /// Says once where hosts reach this server: `https://<name>:<port>`.
    pub fn set_base_url(&self, url: String) {
        // A second word about it changes nothing: hosts have the first.
        let _ = self.base_url.set(url);
    }

    /// Where hosts reach this server.
    pub fn base_url(&self) -> Option<&str> {
        self.base_url.get().map(String::as_str)
    }

    /// Says once what is to be done when certificates were revoked.
    pub fn on_revocation(&self, work: Box<dyn Fn() + Send + Sync>) {
        let _ = self.revoked.set(work);
    }

    /// Certificates were revoked: the list is to be signed anew.
    pub fn revoked(&self) {
        if let Some(work) = self.revoked.get() {
            work();
        }
    }

    /// Logs in to a vCenter of the inventory.
    pub fn vcenter(
        &self,
        data_dir: &Path,
        vcenter: &inventory::Vcenter,
    ) -> Result<Arc<dyn Vcenter>, Fault> {
        let login = login(data_dir, vcenter.id).map_err(Fault::Other)?;
        self.connect.connect(&Place {
            address: vcenter.address.clone(),
            port: vcenter.port,
            fingerprint: vcenter.fingerprint.clone(),
            login,
        })
    }
}

impl Default for Outside {
    fn default() -> Self {
        Self::new(Box::new(NoConnect))
    }
}

fn login_file(data_dir: &Path, vcenter: Id) -> PathBuf {
    data_dir.join(VAULT).join(format!("{vcenter}.json"))
}

/// As whom this server logs in there; else why it cannot.
pub fn login(data_dir: &Path, vcenter: Id) -> Result<Login, String> {
    let path = login_file(data_dir, vcenter);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(format!(
                "no user of vCenter {vcenter} is known here: PUT /api/v1/vcenters/{vcenter}/login"
            ));
        }
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        // What is wrong with it may quote it: only the place is said.
        format!(
            "{} is damaged at line {}: set the login of vCenter {vcenter} again",
            path.display(),
            error.line()
        )
    })
}

/// Keeps the user and password of a vCenter in a file that nobody else may read.
pub fn keep_login(data_dir: &Path, vcenter: Id, login: &Login) -> Result<(), String> {
    use std::os::unix::fs::DirBuilderExt;
    let folder = data_dir.join(VAULT);
    let made = std::fs::DirBuilder::new().mode(0o700).create(&folder);
    if let Err(error) = made
        && error.kind() != std::io::ErrorKind::AlreadyExists
    {
        return Err(format!("cannot make {}: {error}", folder.display()));
    }
    let bytes = serde_json::to_vec(login).map_err(|error| error.to_string())?;
    crate::authority::write_private(&login_file(data_dir, vcenter), &bytes)
        .map_err(|error| error.to_string())
}

/// Removes the logins of vCenters that are not administered any more.
pub fn sweep_logins(data_dir: &Path, known: &[Id]) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(data_dir.join(VAULT)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        let known = known.iter().any(|id| path == login_file(data_dir, *id));
        if !known {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}
