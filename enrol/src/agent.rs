//! What a running part does about its certificate, when it is due.
//!
//! Invariant: whatever fails, what was in force stays, and is tried again; each matter is tried whether or not
//! the others succeed, and the same failure is told once. A part that has no certificate yet waits for a
//! token, an invitation, or its certificate, to be laid there.

use crate::follow::Problems;
use crate::http::{Client, HttpError, Server};
use crate::invitation::{Invitation, Invitations};
use crate::steps::{self, EnrolError};
use std::time::{Duration, Instant};
use tls::{Folder, Identity, Role};

/// After a failure it is tried again after this, then ever later, up to the usual time.
const FIRST_RETRY: Duration = Duration::from_secs(2);
/// How often it is looked for an invitation, while there is no certificate that is in force.
const INVITATION_EVERY: Duration = Duration::from_secs(5);

/// What a part asks the server for besides: its own documents, with its certificate.
pub type Fetch<'a> = &'a mut dyn FnMut(&Client) -> Result<(), EnrolError>;

/// Takes the steps that are due.
pub struct Agent {
    folder: Folder,
    server: Option<Server>,
    /// What this part is: certificates of other parts are not taken.
    role: Role,
    every: Duration,
    due: Instant,
    retry: Duration,
    /// The server said that the certificate is not in force.
    is_disowned: bool,
    invitations: Option<Box<dyn Invitations>>,
    invitation_due: Instant,
    /// The invitation that was accepted last: it does not do twice.
    accepted: Option<Invitation>,
    problems: Problems,
}

impl Agent {
    /// For a part's folder; without a server, neither here nor in the folder, nothing is fetched.
    pub fn new(folder: Folder, server: Option<Server>, role: Role, every: Duration) -> Self {
        Self {
            folder,
            server,
            role,
            every,
            due: Instant::now(),
            retry: FIRST_RETRY,
            is_disowned: false,
            invitations: None,
            invitation_due: Instant::now(),
            accepted: None,
            problems: Problems::default(),
        }
    }

    /// Looks for invitations there, too.
    pub fn with_invitations(mut self, invitations: Box<dyn Invitations>) -> Self {
        self.invitations = Some(invitations);
        self
    }

    /// Takes the steps that are due now. It may take as long as the server takes to answer.
    pub fn work(&mut self, fetch: Fetch<'_>) {
        self.look_for_invitation();
        let Some(server) = self.server.clone().or_else(|| self.laid()) else {
            return;
        };
        // A token that is laid there is not left to wait.
        let token = self.folder.token().exists() && self.retry == FIRST_RETRY;
        if Instant::now() < self.due && !token {
            return;
        }
        if self.steps(&server, fetch) {
            self.retry = FIRST_RETRY;
            self.due = Instant::now() + self.every;
        } else {
            self.due = Instant::now() + self.retry;
            self.retry = (self.retry * 2).min(self.every.max(FIRST_RETRY));
        }
    }

    /// The server's address, from the folder.
    fn laid(&mut self) -> Option<Server> {
        let path = self.folder.msa();
        let text = std::fs::read_to_string(&path).ok()?;
        match text.trim().parse() {
            Ok(server) => Some(server),
            Err(why) => {
                let text = format!("{}: {why}", path.display());
                self.problems.tell("the management server's address", text);
                None
            }
        }
    }

    /// Takes each step, whatever the others come to. Whether all succeeded.
    fn steps(&mut self, server: &Server, fetch: Fetch<'_>) -> bool {
        let mut is_well = true;
        let enrolled = match self.folder.token().exists() {
            true => self.enrol(server),
            false => Ok(()),
        };
        is_well &= self.note("enrolment", &enrolled);
        if !self.folder.has_identity() {
            return is_well;
        }
        let renewed = self.renew(server);
        is_well &= self.note("renewal of the certificate", &renewed);
        let list = steps::fetch_list(&self.folder, server).map(drop);
        is_well &= self.note("the revocation list", &list);
        let fetched = steps::client_of(&self.folder, server).and_then(|client| fetch(&client));
        self.is_disowned = matches!(
            &fetched,
            Err(EnrolError::Http(HttpError::Refused { status: 401, .. }))
        );
        is_well & self.note("what the management server has for this part", &fetched)
    }

    fn note(&mut self, about: &'static str, outcome: &Result<(), EnrolError>) -> bool {
        match outcome {
            Ok(()) => self.problems.solved(about),
            Err(error) => self.problems.tell(about, error.to_string()),
        }
        outcome.is_ok()
    }

    /// Looks for an invitation, while there is no certificate that is in force.
    fn look_for_invitation(&mut self) {
        let Some(invitations) = &mut self.invitations else {
            return;
        };
        if Instant::now() < self.invitation_due {
            return;
        }
        self.invitation_due = Instant::now() + INVITATION_EVERY;
        if self.folder.token().exists() || (!self.is_disowned && steps::is_in_force(&self.folder)) {
            return;
        }
        const ABOUT: &str = "the invitation";
        let line = match invitations.look() {
            Ok(Some(line)) => line,
            Ok(None) => return self.problems.solved(ABOUT),
            Err(error) => {
                let text = format!("the host's invitation cannot be read: {error}");
                return self.problems.tell(ABOUT, text);
            }
        };
        let invitation = match Invitation::parse(&line) {
            Ok(invitation) if self.accepted.as_ref() == Some(&invitation) => return,
            Ok(invitation) => invitation,
            // Not the line itself: it may hold a token.
            Err(why) => {
                let text = format!("the host's invitation cannot be read: {why}");
                return self.problems.tell(ABOUT, text);
            }
        };
        if let Err(error) = invitation.accept(&self.folder) {
            return self.problems.tell(ABOUT, error.to_string());
        }
        tracing::info!("invited by {invitation:?}: enrolling");
        self.problems.solved(ABOUT);
        self.accepted = Some(invitation);
        // It lies in the folder now, where only this part reads it.
        if let Err(error) = invitations.clear() {
            tracing::warn!("the host's invitation stays where it was: {error}");
        }
        (self.due, self.retry) = (Instant::now(), FIRST_RETRY);
    }

    fn enrol(&mut self, server: &Server) -> Result<(), EnrolError> {
        let path = self.folder.token();
        let failed = |source| {
            let path = path.clone();
            EnrolError::Files(tls::TlsError::Read { path, source })
        };
        let token = std::fs::read_to_string(&path).map_err(failed)?;
        let enrolled = steps::enrol(&self.folder, server, &token, None, &[self.role]);
        if let Err(EnrolError::Http(HttpError::Refused { status: 401, .. })) = &enrolled {
            // It will not do the next time either; a new one is laid in its place.
            let _ = std::fs::rename(&path, path.with_extension("refused"));
        }
        let identified = enrolled?;
        std::fs::remove_file(&path).map_err(failed)?;
        self.is_disowned = false;
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
    use parking_lot::Mutex;
    use std::io;
    use std::sync::Arc;

    /// A port that nobody serves.
    fn nobody() -> Server {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Server::new("127.0.0.1", listener.local_addr().unwrap().port())
    }

    #[test]
    fn nobody_who_does_not_answer_is_asked_in_a_loop() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path());
        let every = Duration::from_secs(60);
        let mut agent = Agent::new(folder.clone(), Some(nobody()), Role::Host, every);
        folder.write(&folder.token(), b"jde_1").unwrap();
        let mut fetched = 0;
        for _ in 0..1000 {
            agent.work(&mut |_| {
                fetched += 1;
                Ok(())
            });
        }
        assert_eq!(fetched, 0);
        assert!(!agent.problems.is_empty());
        assert!(agent.retry > FIRST_RETRY && agent.due > Instant::now());
        assert!(folder.token().exists(), "it is kept until it was used");
    }

    struct Scripted(Arc<Mutex<(usize, String)>>);

    impl Invitations for Scripted {
        fn look(&mut self) -> io::Result<Option<String>> {
            let mut state = self.0.lock();
            state.0 += 1;
            Ok(Some(state.1.clone()))
        }
        fn clear(&mut self) -> io::Result<()> {
            self.0.lock().1.clear();
            Ok(())
        }
    }

    #[test]
    fn an_invitation_that_is_no_use_is_told_without_its_token_and_not_asked_for_in_a_loop() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path());
        let said = Arc::new(Mutex::new((0, "jde_secret".to_owned())));
        let mut agent = Agent::new(folder.clone(), None, Role::Host, Duration::from_secs(60))
            .with_invitations(Box::new(Scripted(said.clone())));
        for _ in 0..100 {
            agent.work(&mut |_| Ok(()));
        }
        assert_eq!(said.lock().0, 1, "in its time");
        let told = agent.problems.of("the invitation").unwrap().to_owned();
        assert!(
            told.contains("write: ") && !told.contains("jde_secret"),
            "{told}"
        );
        // One by a server that does not answer leaves nothing in the folder, and stays.
        said.lock().1 = format!("{} {} jde_secret", nobody(), "00".repeat(32));
        agent.invitation_due = Instant::now();
        agent.work(&mut |_| Ok(()));
        let told = agent.problems.of("the invitation").unwrap();
        assert!(told.contains("cannot be reached"), "{told}");
        assert!(!folder.authority().exists() && !folder.token().exists());
        assert!(!said.lock().1.is_empty());
        // While a token lies there it is that one's turn.
        folder.write(&folder.token(), b"jde_1").unwrap();
        agent.invitation_due = Instant::now();
        agent.work(&mut |_| Ok(()));
        assert_eq!(said.lock().0, 2);
    }
}
