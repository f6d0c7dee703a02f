//! The storage policy of a domain in a vCenter: by it the filter comes onto disks, with what the domain
//! asks of it.
//!
//! Invariant: a domain has one policy in each vCenter, known by its name, which holds the domain's id; it
//! goes with the domain's last machine there. Policies of anybody else are not touched.

use crate::clusters::{Link, refused};
use crate::executions::StepError;
use crate::inventory::Domain;
use crate::vcenter::{Fault, Policy};
use vib_packaging::component;

/// The filter's properties, by the names that it understands (docs/protection.md).
pub fn properties(domain: &Domain) -> Vec<(String, String)> {
    let mut all = vec![
        ("jetdr.domain".to_owned(), domain.name.to_string()),
        ("jetdr.ack".to_owned(), domain.ack.word().to_owned()),
    ];
    let budgets = [
        ("jetdr.defer-budget-us", domain.defer_budget_us),
        ("jetdr.ack-budget-us", domain.ack_budget_us),
    ];
    for (name, us) in budgets {
        all.extend(us.map(|us| (name.to_owned(), us.to_string())));
    }
    all
}

/// The name of a domain's policy.
pub fn name(domain: &Domain) -> String {
    format!("jetdr {} {}", domain.name, domain.id)
}

fn find(link: &Link, domain: &Domain) -> Result<Option<Policy>, StepError> {
    let all = link
        .api
        .policies()
        .map_err(refused("asking for storage policies"))?;
    let name = name(domain);
    Ok(all.into_iter().find(|policy| policy.name == name))
}

/// The domain's policy; made, if it is not there. True: it was made just now.
pub fn ensure(link: &Link, domain: &Domain) -> Result<(Policy, bool), StepError> {
    if let Some(known) = find(link, domain)? {
        return Ok((known, false));
    }
    let made = link
        .api
        .create_policy(&name(domain), component::NAME, &properties(domain));
    match made {
        Ok(policy) => Ok((policy, true)),
        // Made meanwhile; by whom else than this server, its name says.
        Err(Fault::AlreadyExists) => match find(link, domain)? {
            Some(known) => Ok((known, false)),
            None => Err(StepError::failed(format!(
                "vCenter {} has a policy {} and does not list it",
                link.vcenter.name,
                name(domain)
            ))),
        },
        Err(fault) => Err(refused("making the domain's storage policy")(fault)),
    }
}

/// What became of a policy that was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It is gone, or was not there.
    Gone,
    /// Disks have it still.
    InUse,
}

/// Removes the domain's policy, unless disks have it.
pub fn remove(link: &Link, domain: &Domain) -> Result<Removed, StepError> {
    let Some(known) = find(link, domain)? else {
        return Ok(Removed::Gone);
    };
    match link.api.delete_policy(&known.id) {
        Ok(()) | Err(Fault::NotFound(_)) => Ok(Removed::Gone),
        Err(Fault::InvalidState(_)) => Ok(Removed::InUse),
        Err(fault) => Err(refused("deleting the domain's storage policy")(fault)),
    }
}
