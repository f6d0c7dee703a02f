//! The folder in which a part keeps what it needs for its connections.
//!
//! | File | Holds |
//! |---|---|
//! | `ca.pem` | the authority's certificate |
//! | `identity.pem` | this part's private key and certificate, in one file so that they change together; 0600 |
//! | `revoked.der` | the authority's revocation list |
//! | `token` | an enrolment token, until it was used |
//! | `asked.pem` | the key for which a certificate is being asked, until it has come; 0600 |
//! | `msa` | where the management server is, for a part that was not started with its address |
//!
//! Invariant: a file is there whole or not at all, also after a crash; none but its owner may read them.
//! If the folder has the sticky bit, by which a host marks what it keeps over a boot, the files have it too.

use crate::{Files, TlsError};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Kept over a boot.
const STICKY: u32 = 0o1000;

/// What tells one version of a file from another. A change of its mode alone counts: a key that others may
/// read is refused until it is theirs no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    device_and_inode: (u64, u64),
    len_bytes: u64,
    mode: u32,
    modified: (i64, i64),
    /// Also set when the times are set back.
    changed: (i64, i64),
}

/// What tells one version of a folder's files from another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stamp(Vec<Option<FileStamp>>);

/// A part's folder.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// At this path; it need not be there yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The authority's certificate.
    pub fn authority(&self) -> PathBuf {
        self.0.join("ca.pem")
    }

    /// Key and certificate.
    pub fn identity(&self) -> PathBuf {
        self.0.join("identity.pem")
    }

    /// The revocation list.
    pub fn revocation_list(&self) -> PathBuf {
        self.0.join("revoked.der")
    }

    /// The enrolment token.
    pub fn token(&self) -> PathBuf {
        self.0.join("token")
    }

    /// The key for which a certificate is being asked.
    pub fn asked(&self) -> PathBuf {
        self.0.join("asked.pem")
    }

    /// The management server's address.
    pub fn msa(&self) -> PathBuf {
        self.0.join("msa")
    }

    /// Where a connection's material lies. All of it must be there: a list that is missing would be no
    /// list, and nobody's certificate revoked.
    pub fn files(&self) -> Files {
        Files {
            authority: self.authority(),
            certificate: self.identity(),
            key: self.identity(),
            revocation_list: Some(self.revocation_list()),
        }
    }

    /// Whether this part has a certificate.
    pub fn has_identity(&self) -> bool {
        self.identity().exists()
    }

    /// Which versions of the files are there.
    pub fn stamp(&self) -> Stamp {
        let of = |path: PathBuf| {
            let found = std::fs::metadata(path).ok()?;
            Some(FileStamp {
                device_and_inode: (found.dev(), found.ino()),
                len_bytes: found.len(),
                mode: found.mode(),
                modified: (found.mtime(), found.mtime_nsec()),
                changed: (found.ctime(), found.ctime_nsec()),
            })
        };
        let files = [
            self.authority(),
            self.identity(),
            self.revocation_list(),
            self.token(),
            self.msa(),
        ];
        Stamp(files.map(of).into())
    }

    /// Makes the folder; whoever may not look into it cannot read what is in it.
    pub fn make(&self) -> Result<(), TlsError> {
        let mut builder = std::fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&self.0);
        made.map_err(|source| self.failed(&self.0, source))
    }

    fn failed(&self, path: &Path, source: std::io::Error) -> TlsError {
        TlsError::Write {
            path: path.to_owned(),
            source,
        }
    }

    /// Writes one of the files.
    pub fn write(&self, path: &Path, content: &[u8]) -> Result<(), TlsError> {
        let partial = path.with_extension("partial");
        let write = || {
            let _ = std::fs::remove_file(&partial);
            let mut options = File::options();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&partial)?;
            file.write_all(content)?;
            let sticky = std::fs::metadata(&self.0)?.mode() & STICKY;
            file.set_permissions(std::fs::Permissions::from_mode(0o600 | sticky))?;
            file.sync_all()?;
            std::fs::rename(&partial, path)?;
            File::open(&self.0)?.sync_all()
        };
        write().map_err(|source| self.failed(path, source))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_written_is_its_owners_and_shows_in_the_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path().join("a/tls"));
        folder.make().unwrap();
        folder.make().unwrap();
        let before = folder.stamp();
        assert!(!folder.has_identity());
        for content in ["one", "two"] {
            folder
                .write(&folder.identity(), content.as_bytes())
                .unwrap();
            assert_eq!(std::fs::read_to_string(folder.identity()).unwrap(), content);
        }
        assert!(folder.has_identity() && folder.stamp() != before);
        // Its mode alone, and its content with the times set back.
        let before = folder.stamp();
        let open = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(folder.identity(), open).unwrap();
        assert_ne!(folder.stamp(), before);
        std::fs::set_permissions(folder.identity(), std::fs::Permissions::from_mode(0o600))
            .unwrap();
        let (before, modified) = (
            folder.stamp(),
            folder.identity().metadata().unwrap().modified(),
        );
        std::fs::write(folder.identity(), "owt").unwrap();
        let file = File::options().write(true).open(folder.identity()).unwrap();
        file.set_modified(modified.unwrap()).unwrap();
        assert_ne!(folder.stamp(), before);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&folder.identity()), 0o600);
        assert_eq!(mode(folder.path()), 0o700);
        let kept = std::fs::Permissions::from_mode(0o1700);
        std::fs::set_permissions(folder.path(), kept).unwrap();
        folder.write(&folder.identity(), b"three").unwrap();
        assert_eq!(mode(&folder.identity()), 0o1600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
