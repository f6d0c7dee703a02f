//! The operation `selfcheck`: whether the server itself is well; changes nothing.
//!
//! Invariant: every finding names what is wrong, where, and what to do; all are in the output before
//! the execution fails.

use super::operation::{Context, Kind, Making, Operation, StepError};
use crate::authority;
use crate::clock::DAY_MS;
use crate::text::Address;
use serde::Deserialize;
use std::net::{IpAddr, ToSocketAddrs};
use std::path::PathBuf;

/// The kind `selfcheck`.
pub const KIND: Kind = Kind {
    about: "checks the server's state, its authority and certificate, and that the names of its vCenters, hosts and appliances resolve",
    for_admins: false,
    make,
};

/// An authority this close to its end is a finding: all certificates end with it.
const AUTHORITY_WARNING_MS: i64 = 365 * DAY_MS;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {}

struct SelfCheck {
    data_dir: PathBuf,
}

fn make(making: &Making<'_>) -> Result<Box<dyn Operation>, String> {
    let _: Parameters =
        serde_json::from_value(making.parameters.clone()).map_err(|error| error.to_string())?;
    let data_dir = making.data_dir.to_owned();
    Ok(Box::new(SelfCheck { data_dir }))
}

fn report(context: &Context, findings: &[String]) -> Result<(), StepError> {
    for finding in findings {
        context.log(finding)?;
    }
    match findings.first() {
        None => context.log("nothing found"),
        Some(first) if findings.len() == 1 => Err(StepError::failed(first)),
        Some(first) => Err(StepError::failed(format!(
            "{first}; {} more findings are in the output",
            findings.len() - 1
        ))),
    }
}

impl SelfCheck {
    fn authority(&self, context: &Context) -> Result<Vec<String>, StepError> {
        let now_ms = context.store.now_ms();
        let mut findings = Vec::new();
        match authority::Authority::load(&self.data_dir) {
            Err(error) => findings.push(error.to_string()),
            Ok(authority) => {
                if authority.expires_at_ms() - now_ms < AUTHORITY_WARNING_MS {
                    findings.push(format!(
                        "the authority's certificate ends in less than a year (at {} ms): plan a new authority and enrol all parts anew",
                        authority.expires_at_ms()
                    ));
                }
            }
        }
        Ok(findings)
    }

    fn names(&self, context: &Context) -> Result<Vec<String>, StepError> {
        let all: Vec<(String, Address)> = context.store.read(|t| {
            let mut statement = t.prepare(
                "SELECT 'vCenter ' || name, address FROM vcenters \
                 UNION ALL SELECT 'host ' || name, name FROM hosts \
                 UNION ALL SELECT 'appliance ' || name, address FROM drvas",
            )?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        })?;
        let mut findings = Vec::new();
        for (whose, name) in all {
            context.check()?;
            let name = name.as_str();
            if name.parse::<IpAddr>().is_err() && (name, 443).to_socket_addrs().is_err() {
                findings.push(format!(
                    "{whose}: `{name}` does not resolve here: enter it in DNS, or register the address"
                ));
            }
        }
        Ok(findings)
    }
}

impl Operation for SelfCheck {
    fn steps(&self) -> &'static [&'static str] {
        &["state", "authority", "names"]
    }

    fn run(&mut self, step: usize, context: &Context) -> Result<(), StepError> {
        context.check()?;
        let findings = match step {
            0 => context.store.check()?,
            1 => self.authority(context)?,
            _ => self.names(context)?,
        };
        report(context, &findings)
    }

    fn undo(&mut self, _step: usize, _context: &Context) -> Result<(), StepError> {
        Ok(())
    }
}
