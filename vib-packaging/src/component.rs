//! The project's own package: the filter, its daemon, and what a host needs around them.
//!
//! Invariant: the list of files is complete here; the folder `host/` holds those that are the same for
//! every build. Each place is one of the public ones of `docs/vib.md`.

use crate::descriptor::{Constraint, Descriptor, Relationships, SystemRequires};
use crate::host::{Direction, FirewallRule, Ruleset};
use crate::payload::{File, KEPT};
use crate::place::AcceptanceLevel;
use crate::xml::Element;

/// The component's name, and its package's.
pub const NAME: &str = "jetdr";
/// The vendor of its package.
pub const VENDOR: &str = "JetDR";
/// The vendor's code in a bundle.
pub const VENDOR_CODE: &str = "jet";
/// Control, four times data, bulk.
pub const PORTS: (u16, u16) = (32873, 32878);

/// The management server's, if the site does not say another.
pub const MSA_PORT: u16 = 8443;

const LIBRARY: &str = "usr/lib64/vmware/plugin/libvmiof-disk-jetdr.so";
const PROGRAM: &str = "opt/jetdr/bin/iofilterd-jetdr";
const INIT: &str = "etc/init.d/iofilterd-jetdr";
const PROGRAM_MODE: u32 = 0o555;
const DATA_MODE: u32 = 0o444;

/// What is built for a host.
#[derive(Clone, Debug)]
pub struct Objects {
    /// The filter library.
    pub library: Vec<u8>,
    /// The daemon.
    pub daemon: Vec<u8>,
}

/// Which way the ports of [`PORTS`] are opened: the host dials unless a site wants it otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Firewall {
    /// The host dials the appliance.
    #[default]
    Outbound,
    /// The appliance dials the host.
    Inbound,
    /// Either.
    Both,
}

impl std::str::FromStr for Firewall {
    type Err = String;

    fn from_str(text: &str) -> Result<Firewall, String> {
        match text {
            "outbound" => Ok(Firewall::Outbound),
            "inbound" => Ok(Firewall::Inbound),
            "both" => Ok(Firewall::Both),
            _ => Err(format!("`{text}` is none of outbound, inbound, both")),
        }
    }
}

/// The ruleset of the package: the appliance's ports, and the way to the management server, which only the
/// host dials.
pub fn ruleset(firewall: Firewall, msa_port: u16) -> Ruleset {
    let rule = |direction: Direction, ports: (u16, u16)| FirewallRule {
        direction,
        udp: false,
        source_ports: false,
        ports,
    };
    let directions = match firewall {
        Firewall::Outbound => vec![Direction::Outbound],
        Firewall::Inbound => vec![Direction::Inbound],
        Firewall::Both => vec![Direction::Outbound, Direction::Inbound],
    };
    let mut rules: Vec<FirewallRule> = directions
        .into_iter()
        .map(|direction| rule(direction, PORTS))
        .collect();
    rules.push(rule(Direction::Outbound, (msa_port, msa_port)));
    Ruleset {
        id: NAME.to_owned(),
        rules,
        enabled: true,
        required: false,
    }
}

/// What the filter is, for whoever looks for it on a host. The names are this project's own.
fn filter_config(version: &str) -> String {
    Element::new("filter")
        .holding([
            Element::text("name", NAME),
            Element::text("vendor", VENDOR),
            Element::text("version", version),
            Element::text("class", "replication"),
            Element::text("library", format!("/{LIBRARY}")),
            Element::text("daemon", format!("/{PROGRAM}")),
            Element::text("runFolder", "/var/run/jetdr"),
        ])
        .document(true)
}

/// Everything that the package installs, for a management server at its usual port.
pub fn files(objects: Objects, version: &str, firewall: Firewall) -> Vec<File> {
    files_for(objects, version, firewall, MSA_PORT)
}

/// The same for a management server at this port.
pub fn files_for(objects: Objects, version: &str, firewall: Firewall, msa_port: u16) -> Vec<File> {
    let file = |path: &str, mode: u32, bytes: Vec<u8>| File {
        path: path.to_owned(),
        mode,
        bytes,
    };
    let data = |path: &str, bytes: &[u8]| file(path, DATA_MODE, bytes.to_vec());
    vec![
        file(LIBRARY, PROGRAM_MODE, objects.library),
        file(PROGRAM, PROGRAM_MODE, objects.daemon),
        file(
            INIT,
            PROGRAM_MODE,
            include_bytes!("../host/iofilterd-jetdr").to_vec(),
        ),
        file(
            "etc/shutdown.d/iofilterd-jetdr",
            PROGRAM_MODE,
            include_bytes!("../host/shutdown").to_vec(),
        ),
        file(
            "etc/config/jetdr/iofilterd.conf",
            KEPT | 0o644,
            include_bytes!("../host/iofilterd.conf").to_vec(),
        ),
        data(
            "etc/vmware/firewall/jetdr.xml",
            ruleset(firewall, msa_port).document().as_bytes(),
        ),
        data(
            "etc/vmware/vm-support/jetdr.mfx",
            include_bytes!("../host/jetdr.mfx"),
        ),
        data(
            "usr/lib/vmware/vmiof/disk/jetdr-config.xml",
            filter_config(version).as_bytes(),
        ),
        data(
            "usr/lib/vmware/iofilter/server/catalogs/en/vmiof-disk-jetdr.vmsg",
            include_bytes!("../host/catalog.vmsg"),
        ),
    ]
}

/// What the package says of itself. `version`: `<version>-<release>`; `release_date`: ISO date and time
/// with offset.
pub fn descriptor(version: &str, release_date: &str, level: AcceptanceLevel) -> Descriptor {
    let constraint = |name: &str, version: Option<(&str, &str)>| Constraint {
        name: name.to_owned(),
        version: version.map(|(relation, version)| (relation.to_owned(), version.to_owned())),
    };
    Descriptor {
        name: NAME.to_owned(),
        version: version.to_owned(),
        vendor: VENDOR.to_owned(),
        summary: "jetdr: continuous data protection, the I/O filter of a host".to_owned(),
        description:
            "Captures every write of protected virtual disks and streams it to a DR appliance."
                .to_owned(),
        release_date: release_date.to_owned(),
        urls: Vec::new(),
        relationships: Relationships {
            depends: vec![
                constraint("uwglibc64", None),
                constraint("esx-version", Some((">=", "7.0.0"))),
                constraint("esx-version", Some(("<<", "9.0.0"))),
            ],
            ..Relationships::default()
        },
        tags: Vec::new(),
        system_requires: SystemRequires {
            // Disks must be free of the filter before it goes: their VMs are moved away first.
            maintenance_mode: (false, true),
            ..SystemRequires::default()
        },
        files: Vec::new(),
        acceptance_level: level,
        live_install_allowed: true,
        live_remove_allowed: true,
        cimom_restart: false,
        stateless_ready: true,
        payloads: Vec::new(),
    }
}
