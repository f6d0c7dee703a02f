//! The management server as a whole: what its routes and its housekeeping share.
//!
//! Invariant: what is revoked in the state is in the revocation list that the server itself obeys and
//! gives away, from the moment the change is answered; should the list not get written, the state is
//! still asked at every request.

use crate::authority::{self, Authority, AuthorityError};
use crate::certificates::{self, EnrolError};
use crate::clock::{Clock, DAY_MS};
use crate::clusters::{disable, enable, preflight, upgrade};
use crate::executions::{Engine, Registry, backup, selfcheck, table};
use crate::login::Limiter;
use crate::outside::{self, Outside};
use crate::packages;
use crate::protection::{machines, pause, protect, unprotect};
use crate::rest::gate::Refusals;
use crate::secret::{Passwords, SecretError};
use crate::store::{Store, StoreError};
use crate::text::Id;
use parking_lot::{Mutex, RwLock};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tls::{Files, Identity, Peers, Role, ServerTls, TlsError};

/// The server's certificate and key, in one file so that they change together.
pub const SERVER_PEM: &str = "server.pem";
/// The revocation list.
pub const LIST: &str = "revoked.der";
/// The server's certificate is renewed when less than this is left of it.
const RENEW_MS: i64 = authority::LEAF_DAYS * DAY_MS / 3;
/// Who may show a certificate here.
const PEERS: Peers = Peers::Anyone(&[Role::Host, Role::Drva, Role::Operator]);

/// What can be wrong with the server as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The state.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// Certificates.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Secrets.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A file of the data folder.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The state lacks what `init` writes.
    #[error(
        "the state has no `{0}`: it was not made by `jetdr msa init`, or is damaged; restore a backup"
    )]
    Incomplete(&'static str),
}

/// What passwords cost.
#[derive(Clone, Copy, Debug)]
pub struct PasswordCost {
    /// Memory for each check.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
}

impl Default for PasswordCost {
    fn default() -> Self {
        Self {
            memory_kib: 19_456,
            passes: 2,
        }
    }
}

/// The management server.
pub struct Msa {
    /// Its state.
    pub store: Arc<Store>,
    /// Its authority.
    pub authority: Authority,
    /// What runs executions.
    pub engine: Engine,
    /// How passwords are kept.
    pub passwords: Passwords,
    /// One check of a password at a time: they are made to be dear.
    pub password_turn: Mutex<()>,
    /// Who failed to log in too often.
    pub limiter: Limiter,
    /// Refusals on their way to the audit.
    pub refusals: Refusals,
    /// Its end of connections.
    pub tls: ServerTls,
    /// The world of its operations.
    pub outside: Arc<Outside>,
    list: RwLock<Arc<Vec<u8>>>,
    publishing: Mutex<()>,
    data_dir: PathBuf,
}

/// The kinds of executions that the product knows.
pub fn registry() -> Registry {
    Registry::from([
        ("backup", backup::KIND),
        ("selfcheck", selfcheck::KIND),
        ("preflight-system", preflight::SYSTEM),
        ("preflight-install", preflight::INSTALL),
        ("preflight-uninstall", preflight::UNINSTALL),
        ("enable-cluster", enable::ENABLE),
        ("reconcile-cluster", enable::RECONCILE),
        ("resolve-cluster", enable::RESOLVE),
        ("upgrade-cluster", upgrade::KIND),
        ("disable-cluster", disable::KIND),
        ("refresh-inventory", machines::KIND),
        ("protect-vms", protect::KIND),
        ("unprotect-vms", unprotect::KIND),
        ("pause-vms", pause::PAUSE),
        ("resume-vms", pause::RESUME),
    ])
}

/// What `init` wrote about the server itself.
fn meta(store: &Store, key: &'static str) -> Result<String, ServiceError> {
    let found: Option<String> = store.read(|t| {
        use rusqlite::OptionalExtension;
        let sql = "SELECT value FROM meta WHERE key = ?1";
        Ok(t.query_row(sql, [key], |row| row.get(0)).optional()?)
    })?;
    found.ok_or(ServiceError::Incomplete(key))
}

/// Issues a certificate for the server itself and puts it where it is read.
pub fn issue_server(
    store: &Store,
    authority: &Authority,
    data_dir: &Path,
) -> Result<(), ServiceError> {
    let id = meta(store, "server_id")?;
    let id = uuid::Uuid::try_parse(&id).map_err(|_| ServiceError::Incomplete("server_id"))?;
    let names = meta(store, "server_names")?;
    let names: Vec<String> = names.split(',').map(str::to_owned).collect();
    let identity = Identity::new(Role::Msa, id);
    let (key, issued) = authority.issue_server(identity, &names, store.now_ms())?;
    store.record(|t| certificates::keep(t, &issued))?;
    let text = format!("{key}{}", issued.pem());
    authority::write_private(&data_dir.join(SERVER_PEM), text.as_bytes())?;
    Ok(())
}

/// Signs the revocation list anew and puts it where it is read.
pub fn write_list(
    store: &Store,
    authority: &Authority,
    data_dir: &Path,
) -> Result<Vec<u8>, ServiceError> {
    let now_ms = store.now_ms();
    let mut made: Result<Vec<u8>, EnrolError> = Ok(Vec::new());
    store.record(|t| {
        made = certificates::revocation_list(t, authority, now_ms);
        Ok(())
    })?;
    let list = made?;
    authority::write_private(&data_dir.join(LIST), &list)?;
    Ok(list)
}

impl Msa {
    /// Opens the server whose data folder this is.
    pub fn open(
        data_dir: &Path,
        clock: Arc<dyn Clock>,
        registry: Registry,
        cost: PasswordCost,
    ) -> Result<Arc<Self>, ServiceError> {
        Self::open_in(data_dir, clock, registry, cost, Outside::default())
    }

    /// The same, with a way to vCenters.
    pub fn open_in(
        data_dir: &Path,
        clock: Arc<dyn Clock>,
        registry: Registry,
        cost: PasswordCost,
        outside: Outside,
    ) -> Result<Arc<Self>, ServiceError> {
        let outside = Arc::new(outside);
        let store = Arc::new(Store::open(data_dir, clock)?);
        let authority = Authority::load(data_dir)?;
        if !data_dir.join(SERVER_PEM).is_file() {
            issue_server(&store, &authority, data_dir)?;
        }
        let list = write_list(&store, &authority, data_dir)?;
        let server = data_dir.join(SERVER_PEM);
        let files = Files {
            authority: data_dir.join(authority::CERTIFICATE),
            certificate: server.clone(),
            key: server,
            revocation_list: Some(data_dir.join(LIST)),
        };
        let tls = ServerTls::load(tls::provider::aws_lc_rs(), files, Role::Msa, PEERS)?;
        let msa = Arc::new(Self {
            engine: Engine::new(store.clone(), Arc::new(registry), data_dir)
                .with_outside(outside.clone()),
            passwords: Passwords::new(cost.memory_kib, cost.passes)?,
            password_turn: Mutex::default(),
            limiter: Limiter::default(),
            refusals: Refusals::default(),
            list: RwLock::new(Arc::new(list)),
            publishing: Mutex::default(),
            data_dir: data_dir.to_owned(),
            tls,
            authority,
            store,
            outside,
        });
        let weak = Arc::downgrade(&msa);
        msa.outside.on_revocation(Box::new(move || {
            if let Some(msa) = weak.upgrade() {
                msa.publish_revocations();
            }
        }));
        msa.housekeeping()?;
        Ok(msa)
    }

    /// The revocation list in force, DER.
    pub fn revocation_list(&self) -> Arc<Vec<u8>> {
        self.list.read().clone()
    }

    /// After something was revoked. A failure is logged: the state is asked at each request anyway.
    pub fn publish_revocations(&self) {
        // One at a time: an older list must not replace a newer one.
        let _turn = self.publishing.lock();
        let published = write_list(&self.store, &self.authority, &self.data_dir).and_then(|list| {
            *self.list.write() = Arc::new(list);
            Ok(self.tls.reload()?)
        });
        if let Err(error) = published {
            tracing::error!("the revocation list is not up to date: {error}");
        }
    }

    /// What is due once an hour: old executions go, the list is signed anew, the server's certificate
    /// is renewed in time.
    pub fn housekeeping(&self) -> Result<(), ServiceError> {
        let now_ms = self.store.now_ms();
        let gone = self.store.record(|t| table::purge(t, now_ms))?;
        if gone > 0 {
            tracing::info!(gone, "executions whose retention is over are forgotten");
        }
        if self.server_expires_at_ms()? - now_ms < RENEW_MS {
            issue_server(&self.store, &self.authority, &self.data_dir)?;
            tracing::info!("the server's certificate is renewed");
        }
        self.publish_revocations();
        self.sweep()
    }

    /// Files whose rows are gone go too.
    fn sweep(&self) -> Result<(), ServiceError> {
        let vcenters = self.store.read(|t| {
            let mut statement = t.prepare("SELECT id FROM vcenters")?;
            let rows = statement.query_map([], |row| row.get(0))?;
            Ok(rows.collect::<rusqlite::Result<Vec<Id>>>()?)
        })?;
        let file = |name: &str| self.data_dir.join(name);
        outside::sweep_logins(&self.data_dir, &vcenters).map_err(|source| ServiceError::File {
            path: file(outside::VAULT),
            source,
        })?;
        packages::sweep(&self.store, &self.data_dir).map_err(|source| ServiceError::File {
            path: file(packages::FOLDER),
            source,
        })
    }

    /// The server's data folder.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Until when the newest certificate of the server itself is valid.
    pub fn server_expires_at_ms(&self) -> Result<i64, ServiceError> {
        let found: Option<i64> = self.store.read(|t| {
            let sql = "SELECT max(expires_at_ms) FROM certificates \
                       WHERE role = 'msa' AND revoked_at_ms IS NULL";
            Ok(t.query_row(sql, [], |row| row.get(0))?)
        })?;
        // None: it was revoked; a new one is due.
        Ok(found.unwrap_or(0))
    }

    /// The names by which people and machines reach the server.
    pub fn names(&self) -> Result<Vec<String>, ServiceError> {
        let names = meta(&self.store, "server_names")?;
        Ok(names.split(',').map(str::to_owned).collect())
    }

    /// The server's own id, which is in its certificate.
    pub fn id(&self) -> Result<Id, ServiceError> {
        let id = meta(&self.store, "server_id")?;
        let id = uuid::Uuid::try_parse(&id).map_err(|_| ServiceError::Incomplete("server_id"))?;
        Ok(Id(id))
    }
}
