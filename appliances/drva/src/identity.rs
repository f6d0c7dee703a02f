//! Lasting identities: an id that is made once, kept in a file, and never lost to a crash.
//!
//! Invariant: once `lasting_id` has returned an id, it returns the same one for ever: the file is
//! whole and on stable storage before anybody learns of it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use uuid::Uuid;

/// Makes a folder with those above it, each durable in the one that holds it.
pub fn make_folder(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = match dir.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    make_folder(parent)?;
    match std::fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    File::open(parent)?.sync_all()
}

/// The id in the file `name` of a folder: 32 hex digits. Made if the file is missing.
pub fn lasting_id(dir: &Path, name: &str) -> io::Result<[u8; 16]> {
    let path = dir.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            return filter_core::mapping::parse_id(&text).ok_or_else(|| {
                let text = "it does not hold 32 hex digits";
                io::Error::new(io::ErrorKind::InvalidData, text)
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    make_folder(dir)?;
    fault::check("drva.state-file")?;
    let id = Uuid::new_v4();
    let new = dir.join(format!("{name}.new"));
    let mut file = File::create(&new)?;
    file.write_all(id.simple().to_string().as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, &path)?;
    File::open(dir)?.sync_all()?;
    Ok(id.into_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_id_lasts_and_a_malformed_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        let id = lasting_id(&deep, "id").unwrap();
        assert_eq!(lasting_id(&deep, "id").unwrap(), id);
        assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 1);
        // What a crash of a program without care leaves: an empty file. It is never taken for none.
        std::fs::write(deep.join("id"), "").unwrap();
        let error = lasting_id(&deep, "id").unwrap_err();
        assert!(error.to_string().contains("32 hex digits"), "{error}");
    }
}
