//! The paths of all payloads of a package: what one may look like, and that each is there once.

use super::{EntryKind, MAX_PATH};
use std::collections::HashMap;

/// What is wrong with a path, if anything is.
pub(crate) fn path_problem(path: &str) -> Option<String> {
    if path.is_empty() {
        return Some("the path is empty".into());
    }
    if path.starts_with('/') {
        return Some("the path begins with `/`".into());
    }
    if path.len() > MAX_PATH {
        return Some(format!("the path has {} characters", path.len()));
    }
    if !path
        .bytes()
        .all(|b| (b' '..=b'~').contains(&b) && b != b'\\')
    {
        return Some("the path has characters that are no printable ASCII".into());
    }
    match path
        .split('/')
        .find(|part| matches!(*part, "" | "." | ".."))
    {
        Some("") => Some("the path has an empty part".into()),
        Some(part) => Some(format!("the path has a part `{part}`")),
        None => None,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Taken {
    File,
    Folder,
    /// Only as the folder of something else.
    Parent,
}

/// The paths that were met.
#[derive(Default)]
pub(crate) struct Names {
    taken: HashMap<String, Taken>,
    count: usize,
}

impl Names {
    /// How many entries were met, the refused ones included.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Counts an entry that has no path of its own.
    pub(crate) fn skip(&mut self) {
        self.count += 1;
    }

    /// Takes a good path for an entry; says what is wrong if it is taken otherwise.
    pub(crate) fn take(&mut self, path: &str, kind: EntryKind) -> Option<String> {
        self.count += 1;
        let parents = path.match_indices('/').filter_map(|(at, _)| path.get(..at));
        let parents: Vec<&str> = parents.collect();
        if let Some(file) = parents
            .iter()
            .find(|parent| self.taken.get(**parent) == Some(&Taken::File))
        {
            return Some(format!("it lies below `{file}`, which is a file"));
        }
        let wanted = match kind {
            EntryKind::File => Taken::File,
            EntryKind::Folder => Taken::Folder,
        };
        match (self.taken.get(path), kind) {
            (None, _) | (Some(Taken::Parent), EntryKind::Folder) => {}
            (Some(Taken::Parent), EntryKind::File) => {
                return Some("it is a file, and a folder of other entries".into());
            }
            (Some(_), _) => return Some("the path is there twice".into()),
        }
        for parent in parents {
            self.taken.entry(parent.to_owned()).or_insert(Taken::Parent);
        }
        self.taken.insert(path.to_owned(), wanted);
        None
    }

    /// The files, in no order.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        let files = self
            .taken
            .iter()
            .filter(|(_, taken)| **taken == Taken::File);
        files.map(|(path, _)| path.as_str())
    }
}

/// The folders that hold `paths`, each once, before what it holds.
pub(super) fn folders<'p>(paths: impl Iterator<Item = &'p str>) -> Vec<&'p str> {
    let parents =
        paths.flat_map(|path| path.match_indices('/').filter_map(|(at, _)| path.get(..at)));
    let mut folders: Vec<&str> = parents.collect();
    folders.sort_unstable();
    folders.dedup();
    folders
}
