//! The store of a cell, as a thing that goes away and comes back: a folder, or an Azure Blob service behind
//! a network.
//!
//! Invariant: what was acknowledged is there again when the store comes back.

use crate::azurite::Azurite;
use crate::support::Stack;
use crate::support::link::Link;

/// Where the objects are.
pub enum Store {
    Folder(String),
    Azure {
        service: Azurite,
        folder: tempfile::TempDir,
        link: Link,
    },
}

impl Store {
    /// The folder that a stack has.
    pub fn folder(stack: &Stack) -> Self {
        Self::Folder(stack.store.clone())
    }

    /// An Azure Blob service, which the stack uses from now on.
    pub fn azure(stack: &mut Stack) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let service = Azurite::lasting(folder.path(), 0);
        let link = Link::before(service.port.into());
        let location = service.container("chaos");
        let through = |port: u64| format!(":{port}/");
        stack.store = location.replace(&through(service.port.into()), &through(link.port_base));
        Self::Azure {
            service,
            folder,
            link,
        }
    }

    /// From now on nothing can be stored.
    pub fn goes(&mut self) {
        match self {
            // A file in the folder's place makes that nobody begins another one there.
            Self::Folder(path) => {
                std::fs::rename(&*path, format!("{path}.away")).unwrap();
                std::fs::write(path, "no folder").unwrap();
            }
            // The network first: what the service does in its last moment nobody is told.
            Self::Azure { service, link, .. } => {
                link.cut();
                service.kill_saved();
            }
        }
    }

    /// It is there again, with all that it held.
    pub fn comes(&mut self) {
        match self {
            Self::Folder(path) => {
                std::fs::remove_file(&*path).unwrap();
                std::fs::rename(format!("{path}.away"), path).unwrap();
            }
            Self::Azure {
                service,
                folder,
                link,
            } => {
                *service = Azurite::lasting(folder.path(), service.port);
                link.heal();
            }
        }
    }

    /// For a table.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Folder(_) => "a folder",
            Self::Azure { .. } => "Azure Blob",
        }
    }
}
