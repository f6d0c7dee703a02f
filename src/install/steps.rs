//! The steps of an installation, in order, and how each is taken back.
//!
//! Invariant: each can be done again over what a killed try left of it, and taken back whether or not any of it
//! was done.

use super::journal::{Folder, Journal};
use super::{rest, server, site};
use anyhow::Context;
use enrol::http::Client;
use msa::text::Secret;
use serde_json::{Map, json};
use std::path::PathBuf;
use std::process::ExitCode;

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Entry,
    Role,
    Permission,
    Server,
    Start,
    Vcenter,
    Plugin,
    Package,
    Cluster,
}

/// All of them, with what they do and what taking them back does.
pub const STEPS: [(Step, &str, &str); 9] = [
    (
        Step::Entry,
        "making the machine's entry in vCenter",
        "deleting the machine's entry in vCenter",
    ),
    (
        Step::Role,
        "making the role in vCenter",
        "removing the role in vCenter",
    ),
    (
        Step::Permission,
        "giving the server's user the role",
        "taking the role from the server's user",
    ),
    (
        Step::Server,
        "making the server's folder",
        "leaving the server's folder",
    ),
    (Step::Start, "starting the server", "stopping the server"),
    (
        Step::Vcenter,
        "registering vCenter with the server",
        "removing vCenter from the server",
    ),
    (
        Step::Plugin,
        "registering the plug-in in vCenter",
        "taking the plug-in out of vCenter",
    ),
    (
        Step::Package,
        "giving the server the package",
        "leaving the package",
    ),
    (
        Step::Cluster,
        "enabling the cluster",
        "disabling the clusters",
    ),
];

/// What disabling is told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Leaving {
    pub detach: bool,
    pub leave_unreachable: bool,
    pub timeout_s: u32,
}

/// An installation that is worked on.
pub struct Work {
    pub folder: Folder,
    pub journal: Journal,
    /// vCenter, as its administrator.
    pub api: msa::vcenter::Client,
    /// The administrator's password, where one was given.
    pub password_file: Option<PathBuf>,
    /// The password of the server's user in vCenter; only an installation needs it.
    pub service_password: Option<Secret>,
    /// The package's bytes; only an installation needs them.
    pub package: Vec<u8>,
    pub leaving: Leaving,
    /// Whether hosts failed.
    pub exit: ExitCode,
    pub session: Option<Client>,
}

impl Work {
    /// The session with the server, which is started if it does not run.
    pub fn session(&mut self) -> anyhow::Result<Client> {
        if let Some(client) = &self.session {
            return Ok(client.clone());
        }
        let (folder, fields) = (self.folder.path(), &self.journal.fields);
        server::start(folder, fields)?;
        let password = server::password(folder, self.password_file.as_deref())?;
        let client = rest::log_in(folder, fields.listen()?, fields.admin.as_str(), &password)?;
        self.session = Some(client.clone());
        Ok(client)
    }

    /// Does a step.
    pub fn run(&mut self, step: Step) -> anyhow::Result<()> {
        let fields = self.journal.fields.clone();
        match step {
            Step::Entry => site::make_entry(&self.api, &self.journal),
            Step::Role => {
                self.journal.made.role = Some(site::make_role(&self.api)?);
                Ok(())
            }
            Step::Permission => {
                let role = self.journal.made.role;
                site::give_role(&self.api, fields.service_user.as_str(), role)
            }
            Step::Server => {
                let folder = self.folder.path();
                let password = server::password(folder, self.password_file.as_deref())?;
                server::make(folder, &fields, &password)
            }
            Step::Start => server::start(self.folder.path(), &fields).map(drop),
            Step::Vcenter => {
                let client = self.session()?;
                let new = json!({
                    "name": fields.vcenter_name, "address": fields.vcenter_address()?,
                    "port": fields.vcenter_port, "fingerprint": fields.fingerprint,
                });
                let password = self.service_password.as_ref();
                let password = password.context("no password of the server's user")?;
                let login = json!({"user": fields.service_user, "password": password});
                self.journal.made.vcenter = Some(rest::register(&client, &new, &login)?);
                Ok(())
            }
            Step::Plugin => site::register_plugin(&self.api, &fields),
            Step::Package => {
                let client = self.session()?;
                rest::upload(&client, &self.package)
            }
            Step::Cluster => {
                let client = self.session()?;
                let mut more = Map::new();
                more.insert("vcenter".into(), json!(fields.vcenter_name));
                if let Some(drva) = &fields.drva {
                    more.insert("drva".into(), json!(drva));
                }
                if let Some(min_hosts) = fields.min_hosts {
                    more.insert("min_hosts".into(), json!(min_hosts));
                }
                self.exit = rest::carry(
                    &client,
                    &rest::Wish {
                        prefix: "install",
                        kind: "enable-cluster",
                        cluster: fields.protected_cluster.as_str(),
                        more,
                        timeout_s: fields.timeout_s,
                    },
                )?;
                Ok(())
            }
        }
    }

    /// Takes a step back.
    pub fn undo(&mut self, step: Step) -> anyhow::Result<()> {
        let fields = self.journal.fields.clone();
        match step {
            Step::Entry => site::remove_entry(&self.api, &self.journal),
            Step::Role => site::remove_role(&self.api, self.journal.made.role),
            Step::Permission => {
                let role = self.journal.made.role;
                site::take_role(&self.api, fields.service_user.as_str(), role)
            }
            // The folder goes last, or stays: it is the caller's.
            Step::Server | Step::Package => Ok(()),
            Step::Start => {
                self.session = None;
                server::stop(self.folder.path())
            }
            Step::Vcenter => {
                let client = self.session()?;
                match &self.journal.made.vcenter {
                    Some(id) => rest::unregister(&client, id),
                    None => rest::unregister_named(&client, fields.vcenter_name.as_str()),
                }
            }
            Step::Plugin => site::unregister_plugin(&self.api, &fields),
            Step::Cluster => self.disable(),
        }
    }

    fn disable(&mut self) -> anyhow::Result<()> {
        let client = self.session()?;
        for cluster in rest::clusters(&client)? {
            let mut more = Map::new();
            more.insert("detach".into(), json!(self.leaving.detach));
            let leave = json!(self.leaving.leave_unreachable);
            more.insert("leave_unreachable".into(), leave);
            rest::carry(
                &client,
                &rest::Wish {
                    prefix: "uninstall",
                    kind: "disable-cluster",
                    cluster: &cluster,
                    more,
                    timeout_s: self.leaving.timeout_s,
                },
            )?;
        }
        Ok(())
    }

    /// Does all steps that are not done; an error says which one failed.
    pub fn forward(&mut self) -> anyhow::Result<()> {
        while let Some((step, about, _)) = STEPS.get(self.journal.done) {
            self.journal.begun = self.journal.done + 1;
            self.folder.keep(&self.journal)?;
            fault::point("install.before-step");
            println!("{about}");
            self.run(*step).with_context(|| (*about).to_owned())?;
            fault::point("install.after-step");
            self.journal.done = self.journal.begun;
            self.folder.keep(&self.journal)?;
        }
        Ok(())
    }

    /// Takes all steps back that were begun, the last one first.
    pub fn back(&mut self) -> anyhow::Result<()> {
        while let Some(last) = self.journal.begun.checked_sub(1) {
            let (step, _, about) = STEPS.get(last).context("the journal has too many steps")?;
            fault::point("uninstall.before-step");
            println!("{about}");
            self.undo(*step).with_context(|| (*about).to_owned())?;
            fault::point("uninstall.after-step");
            self.journal.begun = last;
            self.journal.done = last;
            self.folder.keep(&self.journal)?;
        }
        Ok(())
    }
}
