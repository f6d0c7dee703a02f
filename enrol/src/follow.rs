//! Follows a part's folder: what changes there is taken as soon as all of it can be used.
//!
//! Invariant: a set of files counts as seen only when it was taken: one that could not be read is tried again
//! until it can be. What is wrong is told once.

use std::collections::BTreeMap;
use tls::folder::Stamp;
use tls::{Folder, TlsError};

/// What is wrong now, by what it is about; each is told once.
#[derive(Debug, Default)]
pub struct Problems(BTreeMap<&'static str, String>);

impl Problems {
    /// Says what is wrong with something, if it is news.
    pub fn tell(&mut self, about: &'static str, text: String) {
        // Several things that fail for one reason are one message.
        let is_news = !self.0.values().any(|told| *told == text);
        if is_news {
            tracing::warn!("{text}");
        }
        self.0.insert(about, text);
    }

    /// Nothing is wrong with it any more.
    pub fn solved(&mut self, about: &'static str) {
        if self.0.remove(about).is_some() {
            tracing::info!("{about}: all is well again");
        }
    }

    /// What is wrong with something.
    pub fn of(&self, about: &'static str) -> Option<&str> {
        self.0.get(about).map(String::as_str)
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Follows a folder.
#[derive(Debug)]
pub struct Follower {
    folder: Folder,
    taken: Option<Stamp>,
    is_waiting: bool,
    /// What is wrong.
    pub problems: Problems,
}

impl Follower {
    /// Nothing was taken yet.
    pub fn new(folder: Folder) -> Self {
        Self {
            folder,
            taken: None,
            is_waiting: false,
            problems: Problems::default(),
        }
    }

    /// If the files have changed since they were taken, and a certificate is there, takes them.
    /// Whether it did.
    pub fn follow(&mut self, take: impl FnOnce(&Folder) -> Result<(), TlsError>) -> bool {
        // Before they are read: what changes meanwhile is seen the next time.
        let stamp = self.folder.stamp();
        if self.taken.as_ref() == Some(&stamp) {
            return false;
        }
        let path = self.folder.path().display();
        if !self.folder.has_identity() {
            // Its coming is what is waited for.
            if !std::mem::replace(&mut self.is_waiting, true) {
                tracing::warn!(
                    "{path} holds no certificate yet: nobody is spoken to before it does; enrol, or lay a token there"
                );
            }
            return false;
        }
        match take(&self.folder) {
            Ok(()) => {
                self.taken = Some(stamp);
                self.problems.solved(CERTIFICATES);
                tracing::info!("the certificates of {path} are in force");
                true
            }
            Err(error) => {
                let text = format!(
                    "the certificates of {path} are not taken, and what was in force stays: {error}"
                );
                self.problems.tell(CERTIFICATES, text);
                false
            }
        }
    }
}

const CERTIFICATES: &str = "certificates";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn bad() -> TlsError {
        TlsError::Trust("not yet".into())
    }

    #[test]
    fn a_change_is_taken_once_and_what_cannot_be_taken_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path());
        let mut follower = Follower::new(folder.clone());
        assert!(!follower.follow(|_| Ok(())), "there is nothing yet");
        folder.write(&folder.authority(), b"a").unwrap();
        assert!(!follower.follow(|_| Ok(())), "there is no certificate yet");
        folder.write(&folder.identity(), b"i").unwrap();
        for _ in 0..2 {
            assert!(!follower.follow(|_| Err(bad())), "it was not taken");
            assert!(follower.problems.of(CERTIFICATES).is_some());
        }
        assert!(follower.follow(|_| Ok(())), "without any change");
        assert!(follower.problems.is_empty());
        assert!(!follower.follow(|_| Ok(())), "nothing is new");
        folder.write(&folder.revocation_list(), b"r").unwrap();
        assert!(follower.follow(|_| Ok(())));
        // A mode is a change: a key that was open to others is no more.
        let mode = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(folder.identity(), mode).unwrap();
        assert!(!follower.follow(|_| Err(bad())));
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(folder.identity(), mode).unwrap();
        assert!(follower.follow(|_| Ok(())));
    }

    #[test]
    fn one_reason_is_told_once_and_each_matter_has_its_own() {
        let mut problems = Problems::default();
        problems.tell("renewal", "away".into());
        problems.tell("list", "away".into());
        problems.solved("renewal");
        assert!(problems.of("renewal").is_none() && problems.of("list") == Some("away"));
        problems.solved("list");
        assert!(problems.is_empty());
    }
}
