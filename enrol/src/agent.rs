//! What a running part does about its certificate, when it is due.
//!
//! Invariant: whatever fails, what was in force stays, and is tried again; the same failure is told
//! once. A part that has no certificate yet waits for a token, or for its certificate, to be laid into
//! its folder.

use crate::http::{Client, HttpError, Server};
use crate::steps::{self, EnrolError};
use std::time::{Duration, Instant};
use tls::folder::Stamp;
use tls::{Folder, Identity};

/// After a failure it is tried again after this, then ever later, up to the usual time.
const FIRST_RETRY: Duration = Duration::from_secs(2);

/// What a part asks the server for besides: its own documents, with its certificate.
pub type Fetch<'a> = &'a mut dyn FnMut(&Client) -> Result<(), EnrolError>;

/// Takes the steps that are due.
pub struct Agent {
    folder: Folder,
    server: Option<Server>,
    every: Duration,
    due: Instant,
    retry: Duration,
    last_problem: String,
    stamp: Option<Stamp>,
}

impl Agent {
    /// For a part's folder; without a server, neither here nor in the folder, the folder's files are
    /// followed, and nothing is fetched.
    pub fn new(folder: Folder, server: Option<Server>, every: Duration) -> Self {
        Self {
            folder,
            server,
            every,
            due: Instant::now(),
            retry: FIRST_RETRY,
            last_problem: String::new(),
            stamp: None,
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Says something that is wrong, if it is news.
    pub fn problem(&mut self, text: String) {
        if self.last_problem != text {
            tracing::warn!("{text}");
            self.last_problem = text;
        }
    }

    /// Whether the folder's files have changed since the last time this was asked, and all that a
    /// connection needs is there. True the first time.
    pub fn has_changed(&mut self) -> bool {
        let stamp = self.folder.stamp();
        if self.stamp.as_ref() == Some(&stamp) {
            return false;
        }
        let is_first = self.stamp.is_none();
        self.stamp = Some(stamp);
        // Its coming is what is waited for.
        let waits = is_first && !self.folder.has_identity();
        if waits {
            let path = self.folder.path().display();
            tracing::warn!(
                "{path} holds no certificate yet: nobody is spoken to before it does; enrol, or lay a token there"
            );
        }
        self.folder.has_identity()
    }

    /// Takes the steps that are due now. It may take as long as the server takes to answer.
    pub fn work(&mut self, fetch: Fetch<'_>) {
        let Some(server) = self.server.clone().or_else(|| self.laid()) else {
            return;
        };
        // A token that is laid there is not left to wait.
        let token = self.folder.token().exists() && self.retry == FIRST_RETRY;
        if Instant::now() < self.due && !token {
            return;
        }
        match self.steps(&server, fetch) {
            Ok(()) => {
                if !self.last_problem.is_empty() {
                    tracing::info!("the management server at {server} answers again");
                    self.last_problem.clear();
                }
                self.retry = FIRST_RETRY;
                self.due = Instant::now() + self.every;
            }
            Err(error) => {
                self.problem(error.to_string());
                self.due = Instant::now() + self.retry;
                self.retry = (self.retry * 2).min(self.every.max(FIRST_RETRY));
            }
        }
    }

    /// The server's address, from the folder.
    fn laid(&mut self) -> Option<Server> {
        let path = self.folder.msa();
        let text = std::fs::read_to_string(&path).ok()?;
        match text.trim().parse() {
            Ok(server) => Some(server),
            Err(why) => {
                self.problem(format!("{}: {why}", path.display()));
                None
            }
        }
    }

    fn steps(&mut self, server: &Server, fetch: Fetch<'_>) -> Result<(), EnrolError> {
        if self.folder.token().exists() {
            self.enrol(server)?;
        }
        if !self.folder.has_identity() {
            return Ok(());
        }
        self.renew(server)?;
        let client = steps::client_of(&self.folder, server)?;
        steps::fetch_list(&self.folder, &client)?;
        fetch(&client)
    }

    fn enrol(&mut self, server: &Server) -> Result<(), EnrolError> {
        let path = self.folder.token();
        let failed = |source| {
            let path = path.clone();
            EnrolError::Files(tls::TlsError::Read { path, source })
        };
        let token = std::fs::read_to_string(&path).map_err(failed)?;
        let enrolled = steps::enrol(&self.folder, server, &token);
        if let Err(EnrolError::Http(HttpError::Refused { status: 401, .. })) = &enrolled {
            // It will not do the next time either; a new one is laid in its place.
            let _ = std::fs::rename(&path, path.with_extension("refused"));
        }
        let identified = enrolled?;
        std::fs::remove_file(&path).map_err(failed)?;
        tracing::info!("enrolled as {}", identified.identity);
        Ok(())
    }

    fn renew(&mut self, server: &Server) -> Result<(), EnrolError> {
        let own = self.folder.files().own()?;
        let Some(certificate) = own.chain.first() else {
            return Ok(());
        };
        let unreadable = tls::TlsError::Identity;
        let (from_s, until_s) = tls::validity_s(certificate).map_err(unreadable)?;
        if !steps::is_renewal_due(from_s, until_s, steps::now_s()) {
            return Ok(());
        }
        let identity = Identity::of_certificate(certificate).map_err(unreadable)?;
        steps::renew(&self.folder, server)?;
        tracing::info!("the certificate of {identity} is renewed");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_change_of_the_files_is_noticed_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path());
        let mut agent = Agent::new(folder.clone(), None, Duration::from_secs(1));
        assert!(!agent.has_changed(), "there is nothing yet");
        folder.write(&folder.authority(), b"a").unwrap();
        assert!(!agent.has_changed(), "there is no certificate yet");
        folder.write(&folder.identity(), b"i").unwrap();
        assert!(agent.has_changed());
        assert!(!agent.has_changed());
        folder.write(&folder.revocation_list(), b"r").unwrap();
        assert!(agent.has_changed());
        assert!(!agent.has_changed());
        // What was there at the start counts as new.
        let mut agent = Agent::new(folder, None, Duration::from_secs(1));
        assert!(agent.has_changed());
    }

    #[test]
    fn nobody_who_does_not_answer_is_asked_in_a_loop() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path());
        // A port that nobody serves.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let server = Server::new("127.0.0.1", port);
        let mut agent = Agent::new(folder.clone(), Some(server), Duration::from_secs(60));
        folder.write(&folder.token(), b"jde_1").unwrap();
        let mut fetched = 0;
        for _ in 0..1000 {
            agent.work(&mut |_| {
                fetched += 1;
                Ok(())
            });
        }
        assert_eq!(fetched, 0);
        assert!(!agent.last_problem.is_empty());
        assert!(agent.retry > FIRST_RETRY && agent.due > Instant::now());
        assert!(folder.token().exists(), "it is kept until it was used");
    }
}
