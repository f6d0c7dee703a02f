//! Who this host is to its appliance, and who that is: the flags, and the threads that keep it true.
//!
//! Invariant: without being told so in so many words, nothing is sent in plain text. Without a
//! certificate or an appliance the daemon runs, serves its lanes' questions, and waits. The folder is followed
//! however long the management server takes to answer: that is asked on a thread of its own.

use crate::invited::HostOption;
use crate::secure::{InForce, Target, TlsConnector};
use crate::transport::{Connector, TcpConnector};
use anyhow::{Context, bail};
use enrol::http::Client;
use enrol::{Agent, EnrolError, Follower, Server, documents};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tls::{Folder, Identity, Role};
use uuid::Uuid;

/// How often the folder is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The appliance as the management server told it last: known again after a start without the server.
const APPLIANCE_FILE: &str = "appliance.json";

/// How this end shows who it is, and knows who the appliance is.
#[derive(clap::Args, Clone, Debug)]
pub struct SecurityArgs {
    /// Folder with this host's key and certificate (identity.pem), the authority's certificate (ca.pem) and
    /// revocation list (revoked.der). A token that is laid there is used to enrol, with --msa.
    #[arg(long)]
    pub tls_dir: Option<PathBuf>,
    /// The appliance's id, which its certificate must bear. Left out, the management server says which
    /// appliance this host has, and where it is.
    #[arg(long, requires = "tls_dir")]
    pub drva_id: Option<Uuid>,
    /// The management server, https://NAME:PORT: renews the certificate, has the revocation list.
    #[arg(long, requires = "tls_dir")]
    pub msa: Option<Server>,
    /// How often the management server is asked, in seconds.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub msa_poll_s: u64,
    /// The host's own command for its options (esxcli): an invitation that the management server lays there is
    /// used to enrol while this host has no certificate that is in force.
    #[arg(long, requires = "tls_dir")]
    pub esxcli: Option<PathBuf>,
    /// Send everything in plain text, to whoever answers: for one machine, or for tests.
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_value_t = false, default_missing_value = "true", conflicts_with_all = ["tls_dir", "drva_id", "msa", "esxcli"])]
    pub insecure_plain_text: bool,
}

/// What makes the connections, and keeps what they rest on up to date.
pub struct Security {
    /// Makes connections.
    pub connector: Arc<dyn Connector>,
    keeper: Option<Keeper>,
}

impl Security {
    /// As the flags say; `tcp` is the appliance that they name.
    pub fn new(args: &SecurityArgs, tcp: TcpConnector) -> anyhow::Result<Self> {
        let Some(dir) = &args.tls_dir else {
            if !args.insecure_plain_text {
                bail!(
                    "nothing says how to speak to the appliance: give --tls-dir with this host's certificate (`jetdr enrol` gets one), or --insecure-plain-text"
                );
            }
            tracing::warn!(
                "--insecure-plain-text: who reaches the network reads and changes what is sent"
            );
            return Ok(Self {
                connector: Arc::new(tcp),
                keeper: None,
            });
        };
        let folder = Folder::at(dir);
        folder.make()?;
        let fixed = args.drva_id.map(|id| Target {
            tcp,
            identity: Identity::new(Role::Drva, id),
        });
        let asks = fixed.is_none();
        let target = match fixed {
            Some(target) => Some(target),
            None => remembered(&folder)?,
        };
        if target.is_none() {
            tracing::warn!(
                "no appliance is known yet: the management server says which it is (--msa), or --drva and --drva-id do"
            );
        }
        let in_force = InForce::new(target);
        let every = Duration::from_secs(args.msa_poll_s);
        let mut agent = Agent::new(folder.clone(), args.msa.clone(), Role::Host, every);
        if let Some(esxcli) = &args.esxcli {
            agent = agent.with_invitations(Box::new(HostOption::by(esxcli)));
        }
        let mut keeper = Keeper {
            agent,
            follower: Follower::new(folder.clone()),
            folder,
            in_force: in_force.clone(),
            asks,
        };
        // What is there counts from the first connection on; what is wrong with it is told.
        keeper.follower.follow(|folder| in_force.load(folder));
        Ok(Self {
            connector: Arc::new(TlsConnector(in_force)),
            keeper: Some(keeper),
        })
    }

    /// Starts the threads. They end with the process: a request to the server may be under way.
    pub fn start(&mut self) -> std::io::Result<()> {
        let Some(keeper) = self.keeper.take() else {
            return Ok(());
        };
        let Keeper {
            mut agent,
            mut follower,
            folder,
            in_force,
            asks,
        } = keeper;
        let known = in_force.clone();
        let thread = std::thread::Builder::new().name("enrolment".into());
        let asker = thread.spawn(move || {
            loop {
                agent.work(&mut |client| match asks {
                    true => ask_appliance(client, &folder, &known),
                    false => Ok(()),
                });
                std::thread::sleep(LOOK_EVERY);
            }
        });
        asker.map(drop)?;
        let thread = std::thread::Builder::new().name("keeper".into());
        let keeper = thread.spawn(move || {
            loop {
                follower.follow(|folder| in_force.load(folder));
                std::thread::sleep(LOOK_EVERY);
            }
        });
        keeper.map(drop)
    }
}

struct Keeper {
    agent: Agent,
    follower: Follower,
    folder: Folder,
    in_force: Arc<InForce>,
    /// The management server says which appliance it is.
    asks: bool,
}

/// The appliance as a document of the management server names it.
fn parse(document: &Value) -> Option<Target> {
    let id = document.get("id")?.as_str()?.parse().ok()?;
    let address = document.get("address")?.as_str()?;
    let port_base = u16::try_from(document.get("port_base")?.as_u64()?).ok()?;
    let fits = !address.is_empty() && (1..=u16::MAX - 5).contains(&port_base);
    fits.then(|| Target {
        tcp: TcpConnector {
            host: address.into(),
            port_base,
        },
        identity: Identity::new(Role::Drva, id),
    })
}

fn remembered(folder: &Folder) -> anyhow::Result<Option<Target>> {
    let path = folder.path().join(APPLIANCE_FILE);
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let document = serde_json::from_slice(&bytes).ok();
    let target = document.as_ref().and_then(parse);
    let damaged = || format!("{} is damaged: remove it", path.display());
    Ok(Some(target.with_context(damaged)?))
}

fn ask_appliance(client: &Client, folder: &Folder, in_force: &InForce) -> Result<(), EnrolError> {
    let file = folder.path().join(APPLIANCE_FILE);
    let named = documents::fetch(client, "/machine/appliance", &file, |document| {
        parse(document).ok_or(EnrolError::Lacks(
            "id, address and port_base of an appliance",
        ))
    })?;
    // None yet: what it had before stays, and replication goes on until another is named.
    let Some(target) = named.filter(|named| in_force.target().as_ref() != Some(named)) else {
        return Ok(());
    };
    tracing::info!(
        "this host's appliance is {} at {}",
        target.identity,
        target.tcp.host
    );
    in_force.set_target(target);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use filter_core::wire::PortRole;
    use serde_json::json;

    fn args() -> SecurityArgs {
        SecurityArgs {
            tls_dir: None,
            drva_id: None,
            msa: None,
            msa_poll_s: 15,
            esxcli: None,
            insecure_plain_text: false,
        }
    }

    fn tcp() -> TcpConnector {
        TcpConnector {
            host: "127.0.0.1".into(),
            port_base: 1,
        }
    }

    #[test]
    fn nothing_is_sent_in_plain_text_unless_that_is_said() {
        let refused = Security::new(&args(), tcp()).err().unwrap().to_string();
        assert!(refused.contains("--tls-dir") && refused.contains("--insecure-plain-text"));
        let mut plain = args();
        plain.insecure_plain_text = true;
        assert!(Security::new(&plain, tcp()).is_ok());
        // A host as it was installed: nothing is known yet, and nobody is spoken to.
        let dir = tempfile::tempdir().unwrap();
        let mut secure = args();
        secure.tls_dir = Some(dir.path().join("tls"));
        let connect = |args: &SecurityArgs| {
            let made = Security::new(args, tcp()).unwrap();
            let limit = Duration::from_secs(1);
            let refused = made.connector.connect(PortRole::Control, limit);
            refused.err().unwrap().to_string()
        };
        assert!(connect(&secure).contains("no certificate yet"));
        secure.drva_id = Some(Uuid::nil());
        assert!(connect(&secure).contains("no certificate yet"));
    }

    #[test]
    fn an_appliance_is_remembered_and_a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::at(dir.path());
        assert_eq!(remembered(&folder).unwrap(), None);
        let path = dir.path().join(APPLIANCE_FILE);
        let id = Uuid::from_u128(7);
        let told = json!({"id": id, "address": "dr.example.org", "port_base": 32873});
        std::fs::write(&path, told.to_string()).unwrap();
        let known = remembered(&folder).unwrap().unwrap();
        assert_eq!(known.identity, Identity::new(Role::Drva, id));
        assert_eq!(
            (known.tcp.host.as_str(), known.tcp.port_base),
            ("dr.example.org", 32873)
        );
        for bad in [
            "",
            "{}",
            r#"{"id":"7","address":"a","port_base":1}"#,
            &told.to_string().replace("32873", "65531"),
            &told.to_string().replace("dr.example.org", ""),
        ] {
            std::fs::write(&path, bad).unwrap();
            let said = remembered(&folder).unwrap_err().to_string();
            assert!(said.contains(APPLIANCE_FILE), "{bad}: {said}");
        }
    }
}
