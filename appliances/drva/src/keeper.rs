//! Who this appliance is, whom it lets in, and for what: the flags, and the thread that keeps it true.
//!
//! Invariant: without being told so in so many words, nothing is taken in plain text, and no host may speak
//! for a machine that was not assigned. Whoever is let in no more is cut off, also where a connection stands.

use crate::appliance::Appliance;
use crate::assignments::{self, Assignments, InForce};
use crate::identity::make_folder;
use crate::report;
use anyhow::{Context, bail};
use enrol::http::Client;
use enrol::{Agent, EnrolError, Server};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tls::{Folder, Peers, Role, ServerTls, TlsError};

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
    agent: Option<Agent>,
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
        let tls = ServerTls::load(provider, folder.files(), PEERS)?;
        let own = tls.own();
        if own.role != Role::Drva {
            let wanted = Role::Drva;
            return Err(TlsError::WrongRole { own, wanted }.into());
        }
        let mut agent = Agent::new(folder, args.msa.clone(), every);
        agent.has_changed(); // what is there now was just read
        Ok(Self {
            tls: Some(Arc::new(tls)),
            assignments: Arc::new(initial(&source)?),
            agent: Some(agent),
            source,
            every_s: args.msa_poll_s,
        })
    }

    /// Starts the thread that looks after it. It ends with the process: a request to the server may be
    /// under way.
    pub fn keep(self, appliance: Arc<Appliance>) -> std::io::Result<()> {
        let (Some(tls), Some(agent)) = (self.tls, self.agent) else {
            return Ok(());
        };
        let keeper = Keeper {
            tls,
            assignments: self.assignments,
            agent,
            source: self.source,
            every_s: self.every_s,
            seen: None,
            appliance,
        };
        let thread = std::thread::Builder::new().name("keeper".into());
        thread.spawn(move || keeper.run()).map(drop)
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
    let enrolled = enrol::steps::enrol(folder, msa, &token).context("cannot enrol")?;
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

struct Keeper {
    tls: Arc<ServerTls>,
    assignments: Arc<InForce>,
    agent: Agent,
    source: Source,
    /// How often the management server is asked, and told.
    every_s: u64,
    /// The version of an operator's file that was read last.
    seen: Option<(u64, std::time::SystemTime)>,
    appliance: Arc<Appliance>,
}

impl Keeper {
    fn run(mut self) {
        while !self.appliance.stopping.load(Ordering::Acquire) {
            let Self {
                agent,
                assignments,
                source,
                every_s,
                appliance,
                ..
            } = &mut self;
            agent.work(&mut |client| match source {
                Source::Msa(path) => {
                    fetch(client, path, assignments)?;
                    // What it tells is how the disks stand by these assignments.
                    appliance.follow_assignments();
                    let said = report::document(appliance, *every_s);
                    client
                        .call("PUT", "/machine/report", Some(&said))
                        .map(drop)?;
                    Ok(())
                }
                _ => Ok(()),
            });
            self.follow_certificates();
            self.follow_file();
            self.appliance.follow_assignments();
            self.appliance.end_connections(&self.tls);
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn follow_certificates(&mut self) {
        if !self.agent.has_changed() {
            return;
        }
        match self.tls.reload() {
            Ok(()) => tracing::info!("certificates have changed: the new ones are in force"),
            Err(error) => {
                let text = format!("certificates are not taken, the old ones stay: {error}");
                self.agent.problem(text);
            }
        }
    }

    /// Takes an operator's file when it has changed.
    fn follow_file(&mut self) {
        let Source::File(path) = &self.source else {
            return;
        };
        let found = std::fs::metadata(path).and_then(|found| Ok((found.len(), found.modified()?)));
        let Ok(found) = found else {
            return; // What was read last stays.
        };
        if self.seen.replace(found) == Some(found) {
            return;
        }
        match assignments::read(path) {
            Ok(Some(read)) => told(&self.assignments, read),
            Ok(None) => {}
            Err(error) => {
                let text = format!("assignments are not taken, the old ones stay: {error:#}");
                self.agent.problem(text);
            }
        }
    }
}

fn told(in_force: &InForce, fresh: Assignments) {
    if in_force.set(fresh) {
        tracing::info!("the assignments have changed");
    }
}

/// Asks the management server, and keeps what it says before it counts.
fn fetch(client: &Client, path: &Path, in_force: &InForce) -> Result<(), EnrolError> {
    let document = client.call("GET", "/machine/assignments", None)?;
    let misfit = |error: assignments::Malformed| EnrolError::Misfit(error.to_string());
    let fresh = Assignments::parse(&document).map_err(misfit)?;
    let text = document.to_string();
    if !std::fs::read(path).is_ok_and(|kept| kept == text.as_bytes()) {
        let folder = path.parent().unwrap_or(Path::new("."));
        let written = make_folder(folder).map_err(|source| TlsError::Write {
            path: path.to_owned(),
            source,
        });
        written.and_then(|()| Folder::at(folder).write(path, text.as_bytes()))?;
    }
    told(in_force, fresh);
    Ok(())
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
