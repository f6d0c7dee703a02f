//! Who this appliance is, whom it lets in, and for what: the flags, and the threads that keep it true.
//!
//! Invariant: without being told so in so many words, nothing is taken in plain text, and no host may speak
//! for a machine that was not assigned. Whoever is let in no more is cut off, also where a connection stands,
//! and however long the management server takes to answer: it is asked on a thread of its own.

use crate::appliance::Appliance;
use crate::assignments::{self, Assignments, InForce};
use crate::identity::make_folder;
use crate::report;
use anyhow::{Context, bail};
use enrol::follow::{Follower, Problems};
use enrol::{Agent, EnrolError, Server, documents};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tls::{Folder, Peers, Role, ServerTls};

/// How often files and connections are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The assignments as the management server gave them last.
const KEPT_FILE: &str = "assignments.json";
/// Who may connect.
const PEERS: Peers = Peers::Only(&[Role::Host]);

/// Whom every host may speak for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Assign {
    /// Any host for any machine, in any domain that is served.
    Any,
}

/// How this end shows who it is, and whom it lets in.
#[derive(clap::Args, Clone, Debug)]
pub struct SecurityArgs {
    /// Folder with this appliance's key and certificate (identity.pem), the authority's certificate (ca.pem)
    /// and revocation list (revoked.der). A token that is laid there is used to enrol, with --msa.
    #[arg(long)]
    pub tls_dir: Option<PathBuf>,
    /// The management server, https://NAME:PORT: assigns, renews the certificate, has the revocation list.
    #[arg(long, requires = "tls_dir", conflicts_with_all = ["assignments", "assign"])]
    pub msa: Option<Server>,
    /// How often the management server is asked, in seconds.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub msa_poll_s: u64,
    /// File with the assignments, where there is no management server; a change is taken while it runs.
    #[arg(long, requires = "tls_dir", conflicts_with = "assign")]
    pub assignments: Option<PathBuf>,
    /// Let every host with a certificate speak for every virtual machine.
    #[arg(long, requires = "tls_dir")]
    pub assign: Option<Assign>,
    /// Take everything in plain text, from whoever connects: for one machine, or for tests.
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_value_t = false, default_missing_value = "true", conflicts_with_all = ["tls_dir", "msa", "assignments", "assign"])]
    pub insecure_plain_text: bool,
}

/// Where assignments come from.
enum Source {
    /// From nowhere: they never change.
    Fixed,
    /// A file that an operator writes.
    File(PathBuf),
    /// The management server; kept in this file.
    Msa(PathBuf),
}

/// What decides who is let in, and for what.
pub struct Security {
    /// `None`: plain text.
    pub tls: Option<Arc<ServerTls>>,
    /// Who may speak for which machine.
    pub assignments: Arc<InForce>,
    /// Asks the management server, and follows the folder.
    agent: Option<(Agent, Follower)>,
    source: Source,
    every_s: u64,
}

impl Security {
    /// As the flags say.
    pub fn new(args: &SecurityArgs, data_dir: &Path) -> anyhow::Result<Self> {
        let Some(dir) = &args.tls_dir else {
            if !args.insecure_plain_text {
                bail!(
                    "nothing says whom to let in: give --tls-dir with this appliance's certificate (`jetdr enrol` gets one), or --insecure-plain-text"
                );
            }
            tracing::warn!(
                "--insecure-plain-text: who reaches the ports reads, and writes, what they like"
            );
            return Ok(Self {
                tls: None,
                assignments: Arc::new(InForce::any()),
                agent: None,
                source: Source::Fixed,
                every_s: args.msa_poll_s,
            });
        };
        let source = match (&args.msa, &args.assignments, args.assign) {
            (Some(_), _, _) => Source::Msa(data_dir.join(KEPT_FILE)),
            (None, Some(file), _) => Source::File(file.clone()),
            (None, None, Some(Assign::Any)) => Source::Fixed,
            (None, None, None) => bail!(
                "nothing says which host may speak for which machine: give --msa, --assignments FILE, or --assign any"
            ),
        };
        let folder = Folder::at(dir);
        folder.make()?;
        let every = Duration::from_secs(args.msa_poll_s);
        if !folder.has_identity() {
            first_certificate(&folder, args.msa.as_ref())?;
        }
        let provider = tls::provider::aws_lc_rs();
        let tls = ServerTls::load(provider, folder.files(), Role::Drva, PEERS)?;
        if matches!(source, Source::Msa(_)) {
            make_folder(data_dir)?;
        }
        let follower = Follower::new(folder.clone());
        let agent = Agent::new(folder, args.msa.clone(), Role::Drva, every);
        Ok(Self {
            tls: Some(Arc::new(tls)),
            assignments: Arc::new(initial(&source)?),
            agent: Some((agent, follower)),
            source,
            every_s: args.msa_poll_s,
        })
    }

    /// Starts the threads that look after it. They end with the process: a request to the server may be
    /// under way.
    pub fn keep(self, appliance: Arc<Appliance>) -> std::io::Result<()> {
        let (Some(tls), Some((agent, follower))) = (self.tls, self.agent) else {
            return Ok(());
        };
        let (assignments, file) = (self.assignments.clone(), self.source.kept());
        let of = appliance.clone();
        let every_s = self.every_s;
        let asker = move || ask(agent, every_s, file.as_deref(), &assignments, &of);
        let thread = std::thread::Builder::new().name("enrolment".into());
        thread.spawn(asker).map(drop)?;
        let keeper = Keeper {
            tls,
            assignments: self.assignments,
            follower,
            source: self.source,
            seen: None,
            problems: Problems::default(),
            appliance,
        };
        let thread = std::thread::Builder::new().name("keeper".into());
        thread.spawn(move || keeper.run()).map(drop)
    }
}

impl Source {
    /// The file in which the management server's assignments are kept.
    fn kept(&self) -> Option<PathBuf> {
        match self {
            Self::Msa(path) => Some(path.clone()),
            Self::Fixed | Self::File(_) => None,
        }
    }
}

/// The first certificate, by a token that lies in the folder.
fn first_certificate(folder: &Folder, msa: Option<&Server>) -> anyhow::Result<()> {
    let (Some(msa), true) = (msa, folder.token().exists()) else {
        bail!(
            "{} holds no certificate: `jetdr enrol --tls-dir` gets one, or lay ca.pem and a token there and give --msa",
            folder.path().display()
        );
    };
    let token = std::fs::read_to_string(folder.token())?;
    let enrolled = enrol::steps::enrol(folder, msa, &token, None, &[Role::Drva]);
    let enrolled = enrolled.context("cannot enrol")?;
    std::fs::remove_file(folder.token())?;
    tracing::info!("enrolled as {}", enrolled.identity);
    Ok(())
}

fn initial(source: &Source) -> anyhow::Result<InForce> {
    let in_force = match source {
        Source::Fixed => return Ok(InForce::any()),
        Source::File(_) | Source::Msa(_) => InForce::none(),
    };
    match source {
        Source::File(path) => {
            let read = assignments::read(path)?;
            let missing = || format!("assignments {}: there is no such file", path.display());
            in_force.set(read.with_context(missing)?);
        }
        Source::Msa(path) => match assignments::read(path)? {
            Some(kept) => {
                in_force.set(kept);
            }
            None => tracing::info!("no assignments yet: the management server has them"),
        },
        Source::Fixed => {}
    }
    Ok(in_force)
}

/// Asks the management server, when it is due, and tells it how the disks stand by what it said.
fn ask(
    mut agent: Agent,
    every_s: u64,
    kept: Option<&Path>,
    in_force: &InForce,
    appliance: &Appliance,
) {
    while !appliance.stopping.load(Ordering::Acquire) {
        agent.work(&mut |client| {
            let Some(path) = kept else {
                return Ok(());
            };
            let fresh = documents::fetch(client, "/machine/assignments", path, |document| {
                let misfit = |error: assignments::Malformed| EnrolError::Misfit(error.to_string());
                Assignments::parse(document).map_err(misfit)
            })?;
            told(in_force, fresh.ok_or(EnrolError::Lacks("assignments"))?);
            appliance.follow_assignments();
            let said = report::document(appliance, every_s);
            client.call("PUT", "/machine/report", Some(&said))?;
            Ok(())
        });
        std::thread::sleep(LOOK_EVERY);
    }
}

struct Keeper {
    tls: Arc<ServerTls>,
    assignments: Arc<InForce>,
    follower: Follower,
    source: Source,
    /// The version of an operator's file that was taken last.
    seen: Option<(u64, std::time::SystemTime)>,
    problems: Problems,
    appliance: Arc<Appliance>,
}

const ASSIGNMENTS: &str = "assignments";

impl Keeper {
    fn run(mut self) {
        while !self.appliance.stopping.load(Ordering::Acquire) {
            let tls = &self.tls;
            self.follower.follow(|_| tls.reload());
            self.follow_file();
            self.appliance.follow_assignments();
            self.appliance.end_connections(&self.tls);
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Takes an operator's file when it has changed. Until it can be read, what was taken last stays.
    fn follow_file(&mut self) {
        let Source::File(path) = &self.source else {
            return;
        };
        let found = std::fs::metadata(path).and_then(|found| Ok((found.len(), found.modified()?)));
        if found.as_ref().is_ok_and(|found| self.seen == Some(*found)) {
            return;
        }
        let why = match (assignments::read(path), found) {
            (Ok(Some(read)), Ok(found)) => {
                self.seen = Some(found);
                self.problems.solved(ASSIGNMENTS);
                return told(&self.assignments, read);
            }
            (Ok(_), Err(error)) => format!("{}: {error}", path.display()),
            (Ok(None), Ok(_)) => format!("{} is gone", path.display()),
            (Err(error), _) => format!("{error:#}"),
        };
        let text = format!("assignments are not taken, the old ones stay: {why}");
        self.problems.tell(ASSIGNMENTS, text);
    }
}

fn told(in_force: &InForce, fresh: Assignments) {
    if in_force.set(fresh) {
        tracing::info!("the assignments have changed");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn args() -> SecurityArgs {
        SecurityArgs {
            tls_dir: None,
            msa: None,
            msa_poll_s: 15,
            assignments: None,
            assign: None,
            insecure_plain_text: false,
        }
    }

    #[test]
    fn nobody_is_let_in_unless_it_is_said_who() {
        let dir = tempfile::tempdir().unwrap();
        let said = |args: &SecurityArgs| {
            let made = Security::new(args, dir.path());
            made.err().map(|error| format!("{error:#}"))
        };
        let refused = said(&args()).unwrap();
        assert!(refused.contains("--tls-dir") && refused.contains("--insecure-plain-text"));
        let mut secure = args();
        secure.tls_dir = Some(dir.path().join("tls"));
        let refused = said(&secure).unwrap();
        assert!(
            refused.contains("--msa") && refused.contains("--assign any"),
            "{refused}"
        );
        secure.assign = Some(Assign::Any);
        let refused = said(&secure).unwrap();
        assert!(refused.contains("holds no certificate"), "{refused}");
        let mut plain = args();
        plain.insecure_plain_text = true;
        assert_eq!(said(&plain), None);
    }
}
