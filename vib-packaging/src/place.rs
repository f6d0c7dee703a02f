//! Acceptance levels, and where each allows files to go.
//!
//! The lists of community and partner are public; that a filter's own places belong to partner level
//! is this project's reading, since packages of that level ship filters (`docs/vib.md`).

use std::fmt;

/// Who vouches for a package, from the most to the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AcceptanceLevel {
    /// Tested by the host's maker.
    Certified,
    /// Tested by a partner, looked at by the host's maker.
    Accepted,
    /// Tested and signed by a partner.
    Partner,
    /// Nobody; the only level that needs no signature.
    Community,
}

impl AcceptanceLevel {
    /// All of them.
    pub const ALL: [AcceptanceLevel; 4] = [
        AcceptanceLevel::Certified,
        AcceptanceLevel::Accepted,
        AcceptanceLevel::Partner,
        AcceptanceLevel::Community,
    ];

    /// As a descriptor says it.
    pub fn name(self) -> &'static str {
        match self {
            AcceptanceLevel::Certified => "certified",
            AcceptanceLevel::Accepted => "accepted",
            AcceptanceLevel::Partner => "partner",
            AcceptanceLevel::Community => "community",
        }
    }

    /// The level of that name.
    pub fn parse(name: &str) -> Option<AcceptanceLevel> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    /// True if a file may go there at this level.
    pub fn allows(self, path: &str) -> bool {
        let below = |folders: &[&str]| folders.iter().any(|folder| path.starts_with(folder));
        match self {
            AcceptanceLevel::Certified | AcceptanceLevel::Accepted => true,
            AcceptanceLevel::Partner => below(COMMUNITY) || below(PARTNER),
            AcceptanceLevel::Community => below(COMMUNITY),
        }
    }
}

impl fmt::Display for AcceptanceLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for AcceptanceLevel {
    type Err = String;

    fn from_str(name: &str) -> Result<AcceptanceLevel, String> {
        let known = || "certified, accepted, partner, community";
        AcceptanceLevel::parse(name).ok_or_else(|| format!("`{name}` is none of {}", known()))
    }
}

const COMMUNITY: &[&str] = &[
    "etc/vmware/firewall/",
    "etc/vmware/service/",
    "etc/vmware/vm-support/",
    "etc/vmware/shutdown/shutdown.d/",
    "etc/cim/",
    "etc/config/",
    "opt/",
    "usr/lib/cim/",
    "usr/lib/hostprofiles/",
    "usr/lib/vmware/",
    "usr/libexec/jumpstart/plugins/",
    "var/lib/sfcb/registration/",
];

const PARTNER: &[&str] = &["etc/init.d/", "etc/shutdown.d/", "usr/lib64/vmware/plugin/"];
