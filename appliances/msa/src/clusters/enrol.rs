//! How hosts get their certificates: each a token of its own, by an option of the host.
//!
//! Invariant: which hosts may have got a token is noted before any does, so that all of it can be taken
//! back; and no option stays on a host that vCenter reaches.

use super::enable::Enable;
use super::verify::{Verdict, Verdicts};
use super::{Link, Site, moid, needed, note, noted, rows};
use crate::certificates::{self, CertificateRole, EnrolError};
use crate::executions::{Context, StepError};
use crate::inventory::Host;
use crate::secret;
use crate::store::{Actor, Done, StoreError};
use crate::text::Id;
use crate::vcenter::{Fault, Moid};
use std::collections::BTreeSet;
use std::time::Instant;

/// The option of a host by which its daemon learns how to enrol.
pub const ENROLMENT_OPTION: &str = "UserVars.JetdrEnrolment";

impl Enable {
    pub(super) fn enrol(&self, context: &Context) -> Result<(), StepError> {
        let site = self.site(context)?;
        let mut waiting = Vec::new();
        let mut tried: BTreeSet<Id> = noted(context, "enrolled")?.unwrap_or_default();
        for host in self.good_hosts(context, &site)? {
            context.check()?;
            let now_ms = context.store.now_ms();
            if context
                .store
                .read(|t| rows::is_enrolled(t, host.id, now_ms))?
            {
                // It had its certificate before the server died, and its option still.
                if tried.contains(&host.id) {
                    withdraw(context, &site.link, &host)?;
                }
                continue;
            }
            // Noted before it is done: what is taken back is every host that may have got a token.
            tried.insert(host.id);
            note(context, "enrolled", &tried)?;
            match invite(context, &site.link, &host) {
                Ok(()) => waiting.push(host),
                Err(why) => self.spoil(context, &host, &why)?,
            }
        }
        let since = Instant::now();
        while !waiting.is_empty() && since.elapsed() < context.outside.patience.settle {
            let now_ms = context.store.now_ms();
            let mut left = Vec::new();
            for host in waiting {
                match context
                    .store
                    .read(|t| rows::is_enrolled(t, host.id, now_ms))?
                {
                    true => {
                        context.log(format!("host {} has its certificate", host.name))?;
                        withdraw(context, &site.link, &host)?;
                    }
                    false => left.push(host),
                }
            }
            waiting = left;
            if !waiting.is_empty() {
                context.wait(context.outside.patience.poll)?;
            }
        }
        for host in waiting {
            withdraw(context, &site.link, &host)?;
            let why = "its daemon has not asked for a certificate: its log says why (does its firewall open this server's port? `jetdr vib build --msa-port`); then resolve";
            self.spoil(context, &host, why)?;
        }
        self.still_any_good(context, &site)
    }

    /// A host that was good so far is not.
    fn spoil(&self, context: &Context, host: &Host, why: &str) -> Result<(), StepError> {
        context.log(format!("host {} FAILED: {why}", host.name))?;
        let mut verdicts: Verdicts = needed(context, "verdicts")?;
        verdicts.insert(host.moid.to_string(), Verdict::Bad(why.into()));
        note(context, "verdicts", &verdicts)
    }

    fn still_any_good(&self, context: &Context, site: &Site) -> Result<(), StepError> {
        let verdicts: Verdicts = needed(context, "verdicts")?;
        let bad = verdicts.values().find_map(|verdict| match verdict {
            Verdict::Bad(why) => Some(why.clone()),
            Verdict::Good => None,
        });
        let is_any_good = verdicts.values().any(|verdict| *verdict == Verdict::Good);
        match bad {
            Some(why) if !is_any_good && !site.plan.was_enabled => Err(StepError::failed(format!(
                "no host could be enrolled; of the first: {why}"
            ))),
            _ => Ok(()),
        }
    }

    pub(super) fn undo_enrol(&self, context: &Context) -> Result<(), StepError> {
        let tried: BTreeSet<Id> = noted(context, "enrolled")?.unwrap_or_default();
        if tried.is_empty() {
            return Ok(());
        }
        let site = self.site(context)?;
        let hosts = context.store.read(|t| match site.row() {
            Some(cluster) => rows::hosts(t, cluster.id),
            None => Ok(Vec::new()),
        })?;
        for host in hosts.iter().filter(|host| tried.contains(&host.id)) {
            withdraw(context, &site.link, host)?;
            let now_ms = context.store.now_ms();
            context
                .store
                .record(|t| rows::disenrol(t, host.id, now_ms))?;
        }
        context.outside.revoked();
        Ok(())
    }
}

/// Gives a host's daemon a token of its own, by an option of the host.
fn invite(context: &Context, link: &Link, host: &Host) -> Result<(), String> {
    let base = context
        .outside
        .base_url()
        .ok_or("this server does not know its own address")?;
    let now_ms = context.store.now_ms();
    let mut made = None;
    let minutes = certificates::TOKEN_MINUTES;
    let stored = context
        .store
        .change(&Actor::system(), "create enrolment", |t| {
            // One token at a time: an earlier one was lost with the server that made it.
            t.execute("DELETE FROM enrolments WHERE entity_id = ?1", [host.id])?;
            match certificates::make_token(t, CertificateRole::Host, host.id, minutes, now_ms) {
                Ok(token) => made = Some(token),
                Err(EnrolError::Store(error)) => return Err(error),
                Err(error) => return Err(StoreError::conflict(error.to_string())),
            }
            Ok(Done::new((), format!("host {}", host.name)))
        });
    stored.map_err(|error| error.to_string())?;
    let token = made.ok_or("no token was made")?;
    let authority =
        crate::authority::Authority::load(&context.data_dir).map_err(|error| error.to_string())?;
    let pin = secret::sha256(authority.certificate_pem().as_bytes());
    let value = format!("{base} {pin} {}", token.token);
    let moid: Moid = Moid::try_from(&host.moid).map_err(|error| error.to_string())?;
    link.api
        .set_host_option(&moid, ENROLMENT_OPTION, &value)
        .map_err(|fault| {
            format!("its option {ENROLMENT_OPTION} cannot be set: {fault}; then resolve")
        })
}

/// Takes the option away: a used token is of no use, and nothing is left on the host.
fn withdraw(context: &Context, link: &Link, host: &Host) -> Result<(), StepError> {
    match link
        .api
        .set_host_option(&moid(&host.moid)?, ENROLMENT_OPTION, "")
    {
        Ok(()) | Err(Fault::NotFound(_)) => Ok(()),
        Err(fault) => context.log(format!(
            "host {}: its option {ENROLMENT_OPTION} stays ({fault}); its token ends within the hour",
            host.name
        )),
    }
}
