//! The host's packages that this server gives to hosts: a row each, and a file in the data folder.
//!
//! Invariant: a file bears the checksum of its bytes as its name, and was looked at by the rules of
//! `vib-packaging` before its row was made; a row has its file from the moment it is there.

use crate::authority;
use crate::secret;
use crate::store::{Store, StoreError};
use crate::text::Id;
use rusqlite::{OptionalExtension, Row, Transaction, params};
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};
use utoipa::ToSchema;
use vib_packaging::{Descriptor, Limits, Policy, Trust, Vib};

/// The folder of packages in the data folder.
pub const FOLDER: &str = "packages";
/// No package is longer: the host's is about 1 MB.
pub const MAX_BYTES: usize = 64 << 20;

/// A package for hosts.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Package {
    #[serde(skip)]
    pub(crate) seq: i64,
    /// Its id.
    pub id: Id,
    /// Its name.
    pub name: String,
    /// Who made it.
    pub vendor: String,
    /// Its version, `<version>-<release>`.
    pub version: String,
    /// What its file is called where hosts get it.
    pub file_name: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Its length.
    pub length_bytes: i64,
    /// Its acceptance level.
    pub level: String,
    /// The oldest hypervisor that it is for.
    pub host_from: Option<String>,
    /// The hypervisor must be older than this.
    pub host_below: Option<String>,
    /// Since when it is here.
    pub created_at_ms: i64,
}

impl Package {
    /// The path at which hosts get it from this server.
    pub fn path(&self) -> String {
        format!("/vib/{}/{}", self.sha256, self.file_name)
    }

    /// How vCenter calls the filter in it.
    pub fn filter_id(&self) -> String {
        format!("{}_{}_{}", self.vendor, self.name, self.version)
    }
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<Package> {
    Ok(Package {
        seq: row.get("seq")?,
        id: row.get("id")?,
        name: row.get("name")?,
        vendor: row.get("vendor")?,
        version: row.get("version")?,
        file_name: row.get("file_name")?,
        sha256: row.get("sha256")?,
        length_bytes: row.get("length_bytes")?,
        level: row.get("level")?,
        host_from: row.get("host_from")?,
        host_below: row.get("host_below")?,
        created_at_ms: row.get("created_at_ms")?,
    })
}

/// Packages after `after`, in the order in which they came.
pub fn list(t: &Transaction<'_>, after: i64, limit: i64) -> Result<Vec<Package>, StoreError> {
    let mut statement = t.prepare("SELECT * FROM packages WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
    let rows = statement.query_map([after, limit], from_row)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// One of them.
pub fn get(t: &Transaction<'_>, id: Id) -> Result<Package, StoreError> {
    let sql = "SELECT * FROM packages WHERE id = ?1";
    let found = t.prepare(sql)?.query_row([id], from_row).optional()?;
    found.ok_or_else(|| StoreError::not_found("package", id))
}

/// The one that came last.
pub fn newest(t: &Transaction<'_>) -> Result<Option<Package>, StoreError> {
    let sql = "SELECT * FROM packages ORDER BY seq DESC LIMIT 1";
    Ok(t.prepare(sql)?.query_row([], from_row).optional()?)
}

/// The one of this version.
pub fn of_version(t: &Transaction<'_>, version: &str) -> Result<Option<Package>, StoreError> {
    let sql = "SELECT * FROM packages WHERE version = ?1 ORDER BY seq DESC LIMIT 1";
    Ok(t.prepare(sql)?.query_row([version], from_row).optional()?)
}

/// Removes one that is on no cluster. Its file goes with the next sweep.
pub fn delete(t: &Transaction<'_>, id: Id) -> Result<Package, StoreError> {
    let gone = get(t, id)?;
    let sql = "SELECT count(*) FROM clusters WHERE package_id = ?1";
    let used: i64 = t.query_row(sql, [id], |row| row.get(0))?;
    if used > 0 {
        return Err(StoreError::conflict(format!(
            "package {} is on {used} clusters: upgrade or disable those first",
            gone.version
        )));
    }
    t.execute("DELETE FROM packages WHERE id = ?1", [id])?;
    Ok(gone)
}

fn file(data_dir: &Path, sha256: &str) -> PathBuf {
    data_dir.join(FOLDER).join(format!("{sha256}.vib"))
}

/// A version bound of the hypervisor: what the package depends on with one of these relations.
fn bound(descriptor: &Descriptor, relations: &[&str]) -> Option<String> {
    let depends = descriptor.relationships.depends.iter();
    let mut bounds = depends.filter(|depends| depends.name == "esx-version");
    bounds.find_map(|depends| {
        let (relation, version) = depends.version.as_ref()?;
        relations
            .contains(&relation.as_str())
            .then(|| version.clone())
    })
}

fn is_plain(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=60).contains(&text.len()) && !text.starts_with('.') && text.chars().all(plain)
}

/// Looks at a package, and keeps nothing of it.
pub fn look(bytes: Vec<u8>, now_ms: i64) -> Result<Package, StoreError> {
    read(bytes, now_ms).map(|(package, _)| package)
}

fn read(bytes: Vec<u8>, now_ms: i64) -> Result<(Package, Vib), StoreError> {
    let refused = |why: String| StoreError::invalid("package", why);
    let policy = Policy {
        trust: Trust::Unchecked,
        limits: Limits::default(),
    };
    let length_bytes = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
    // With force: signature and level are each host's to judge, by its own anchors.
    let vib = Vib::open("package", bytes, &policy, true)
        .map_err(|rejected| refused(format!("no host would take it: {rejected}")))?;
    let descriptor = vib.descriptor();
    for text in [&descriptor.name, &descriptor.vendor, &descriptor.version] {
        if !is_plain(text) {
            let why = format!(
                "{text:?} is no plain name or version: build the package with letters, digits and . _ -"
            );
            return Err(refused(why));
        }
    }
    let package = Package {
        seq: 0,
        id: Id::random(),
        name: descriptor.name.clone(),
        vendor: descriptor.vendor.clone(),
        version: descriptor.version.clone(),
        file_name: format!("{}.vib", descriptor.id()),
        sha256: secret::sha256(vib.bytes()),
        length_bytes,
        level: descriptor.acceptance_level.name().to_owned(),
        host_from: bound(descriptor, &[">=", ">>"]),
        host_below: bound(descriptor, &["<<", "<="]),
        created_at_ms: now_ms,
    };
    Ok((package, vib))
}

/// Looks at a package and puts its bytes into the data folder. The row is the caller's to make.
pub fn take(data_dir: &Path, bytes: Vec<u8>, now_ms: i64) -> Result<Package, StoreError> {
    let (package, vib) = read(bytes, now_ms)?;
    let path = file(data_dir, &package.sha256);
    let failed = |source| StoreError::File {
        path: path.clone(),
        source,
    };
    std::fs::create_dir_all(data_dir.join(FOLDER)).map_err(failed)?;
    authority::write_private(&path, vib.bytes())
        .map_err(|error| failed(io::Error::other(error.to_string())))?;
    Ok(package)
}

/// Makes the row of a package that was taken.
pub fn insert(t: &Transaction<'_>, package: &Package) -> Result<(), StoreError> {
    t.execute(
        "INSERT INTO packages (id, name, vendor, version, file_name, sha256, length_bytes, level, \
         host_from, host_below, created_at_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        params![
            package.id,
            package.name,
            package.vendor,
            package.version,
            package.file_name,
            package.sha256,
            package.length_bytes,
            package.level,
            package.host_from,
            package.host_below,
            package.created_at_ms
        ],
    )?;
    Ok(())
}

/// The bytes of a package, checked against its checksum: what is damaged on disk goes to no host.
pub fn bytes(store: &Store, data_dir: &Path, sha256: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let known: i64 = store.read(|t| {
        let sql = "SELECT count(*) FROM packages WHERE sha256 = ?1";
        Ok(t.query_row(sql, [sha256], |row| row.get(0))?)
    })?;
    if known == 0 {
        return Ok(None);
    }
    let path = file(data_dir, sha256);
    let failed = |source| StoreError::File {
        path: path.clone(),
        source,
    };
    let bytes = std::fs::read(&path).map_err(failed)?;
    if secret::sha256(&bytes) != sha256 {
        let why = "its bytes are not those that were uploaded: upload the package again";
        return Err(failed(io::Error::other(why)));
    }
    Ok(Some(bytes))
}

/// Removes files that belong to no row: of uploads that were cut off, and of packages that went.
pub fn sweep(store: &Store, data_dir: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(data_dir.join(FOLDER)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let sha256 = name.to_str().and_then(|name| name.strip_suffix(".vib"));
        let known = store.read(|t| {
            let sql = "SELECT count(*) FROM packages WHERE sha256 = ?1";
            Ok(t.query_row(sql, [sha256], |row| row.get::<_, i64>(0))?)
        });
        // In doubt a file stays.
        if matches!(known, Ok(0)) && is_old(&entry) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// An upload that is under way has its file before its row.
fn is_old(entry: &std::fs::DirEntry) -> bool {
    let modified = entry.metadata().and_then(|found| found.modified());
    let age = modified.ok().and_then(|at| at.elapsed().ok());
    age.is_some_and(|age| age > std::time::Duration::from_secs(3600))
}
