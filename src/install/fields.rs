//! What an installation is told, and what can be wrong with it by itself: addresses, names, files.
//!
//! Invariant: no secret is among the fields: they are written to the journal as they are.

use super::dns;
use anyhow::Context;
use msa::text::{Account, Address, Fingerprint, Label, Name};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Addressing {
    /// At the address of this machine to which its name resolves.
    Dhcp,
    /// At an address that is given.
    Static {
        /// The address.
        ms_ip: Ipv4Addr,
        /// Its network, in bits.
        netmask: u8,
        /// Where other networks are reached.
        gateway: Ipv4Addr,
        /// The name server.
        dns: SocketAddr,
    },
}

/// What an installation is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fields {
    pub addressing: Addressing,
    pub host_name: Address,
    pub port: u16,
    pub register_with_ip: bool,
    pub protected_cluster: Label,
    pub cluster: Label,
    pub datastore: Label,
    pub network: Label,
    pub vm_name: Label,
    pub vcenter_name: Name,
    pub vcenter: Address,
    pub vcenter_port: u16,
    pub fingerprint: Option<Fingerprint>,
    pub vcenter_user: Account,
    pub service_user: Account,
    pub admin: Name,
    pub package: PathBuf,
    pub drva: Option<Name>,
    pub min_hosts: Option<usize>,
    pub timeout_s: u32,
}

/// Something that is wrong: what, where and what to do, and its name.
pub struct Wrong {
    pub name: &'static str,
    pub text: String,
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} [{}]", self.text, self.name)
    }
}

fn mask(bits: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0)
}

/// What does not fit together of a static address.
fn static_address(
    (ms_ip, netmask, gateway): (Ipv4Addr, u8, Ipv4Addr),
    mut find: impl FnMut(&'static str, String),
) {
    if !(1..=30).contains(&netmask) {
        find(
            "netmask",
            format!("--netmask {netmask} is no network's: give its length in bits, like 22 or 24"),
        );
        return;
    }
    let mask = mask(netmask);
    let host = u32::from(ms_ip) & !mask;
    if host == 0 || host == !mask {
        find(
            "netmask",
            format!(
                "--ms-ip {ms_ip} is the network's own or its broadcast address with {netmask} bits: correct one of them"
            ),
        );
    }
    if u32::from(gateway) & mask != u32::from(ms_ip) & mask || gateway == ms_ip {
        find(
            "gateway",
            format!(
                "--gateway {gateway} is not another machine of the network of {ms_ip}/{netmask}: correct it"
            ),
        );
    }
}

/// The addresses of a name, as this machine knows them.
fn addresses(name: &Address) -> Vec<IpAddr> {
    if let Ok(ip) = name.as_str().parse() {
        return vec![ip];
    }
    let found = (name.as_str(), 0).to_socket_addrs();
    let mut all: Vec<IpAddr> = found.into_iter().flatten().map(|at| at.ip()).collect();
    all.sort(); // an IPv4 address first
    all.dedup();
    all
}

fn is_here(ip: IpAddr) -> bool {
    !ip.is_unspecified() && TcpListener::bind((ip, 0)).is_ok()
}

impl Fields {
    /// The address at which the server listens; nothing, if its name leads to none of this machine.
    pub fn ip(&self) -> Option<IpAddr> {
        match self.addressing {
            Addressing::Static { ms_ip, .. } => Some(ms_ip.into()),
            Addressing::Dhcp => addresses(&self.host_name)
                .into_iter()
                .find(|ip| is_here(*ip)),
        }
    }

    /// What is wrong with the fields by themselves.
    pub fn look(&self, folder: &Path) -> Vec<Wrong> {
        let mut all = Vec::new();
        let mut find = |name, text| all.push(Wrong { name, text });
        if let Addressing::Static {
            ms_ip,
            netmask,
            gateway,
            dns,
        } = &self.addressing
        {
            static_address((*ms_ip, *netmask, *gateway), &mut find);
            match dns::addresses(*dns, self.host_name.as_str()) {
                Ok(found) if found.contains(ms_ip) => {}
                Ok(found) => find(
                    "dns-wrong",
                    format!(
                        "name server {dns} says that {} is {found:?}, not {ms_ip}: correct its entry, or --ms-ip",
                        self.host_name
                    ),
                ),
                Err(error) => find(
                    "dns-wrong",
                    format!(
                        "name server {dns} does not say where {} is: {error:#}: correct --dns, or enter the name there",
                        self.host_name
                    ),
                ),
            }
        }
        match self.ip() {
            None => find(
                "address-absent",
                format!(
                    "{} leads to no address of this machine: correct --host-name, or its entry in DNS",
                    self.host_name
                ),
            ),
            Some(ip) if !is_here(ip) => find(
                "address-absent",
                format!("{ip} is no address of this machine: set it up here, or correct --ms-ip"),
            ),
            Some(ip) => {
                if let Err(error) = TcpListener::bind((ip, self.port)) {
                    find(
                        "port-taken",
                        format!(
                            "cannot listen on {ip} port {}: {error}: choose another --port",
                            self.port
                        ),
                    );
                }
            }
        }
        if self.register_with_ip && addresses(&self.vcenter).is_empty() {
            find(
                "vcenter-unreachable",
                format!(
                    "{} resolves to no address by which vCenter could be registered: give the address by --vcenter",
                    self.vcenter
                ),
            );
        }
        if super::server::is_there(folder) {
            find(
                "folder-taken",
                format!(
                    "{} holds a server already: give another --dir",
                    folder.display()
                ),
            );
        }
        all
    }

    /// Where vCenter is dialled and registered.
    pub fn vcenter_address(&self) -> anyhow::Result<Address> {
        if !self.register_with_ip {
            return Ok(self.vcenter.clone());
        }
        let found = addresses(&self.vcenter);
        let first = found
            .first()
            .with_context(|| format!("{} does not resolve here", self.vcenter))?;
        Ok(first.to_string().parse()?)
    }

    /// Where the server listens.
    pub fn listen(&self) -> anyhow::Result<SocketAddr> {
        let ip = self.ip().with_context(|| {
            format!(
                "{} leads to no address of this machine any more: correct its entry in DNS",
                self.host_name
            )
        })?;
        Ok(SocketAddr::new(ip, self.port))
    }

    /// The names in the server's certificate: that of its machine first, then the address.
    pub fn names(&self) -> anyhow::Result<Vec<Address>> {
        let ip: Address = self.listen()?.ip().to_string().parse()?;
        let mut names = vec![self.host_name.clone()];
        if ip != self.host_name {
            names.push(ip);
        }
        Ok(names)
    }

    /// Where hosts and vCenter reach the server.
    pub fn url(&self) -> anyhow::Result<String> {
        Ok(match self.register_with_ip {
            true => format!("https://{}", self.listen()?),
            false => format!("https://{}:{}", self.host_name, self.port),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_of_a_static_address_is_told_once_each() {
        let ip = Ipv4Addr::from;
        let found = |ms_ip, bits, gateway| {
            let mut names = Vec::new();
            static_address((ip(ms_ip), bits, ip(gateway)), |name, _| names.push(name));
            names
        };
        assert!(found([10, 0, 1, 5], 24, [10, 0, 1, 1]).is_empty());
        assert!(found([10, 0, 1, 5], 22, [10, 0, 3, 254]).is_empty());
        assert_eq!(found([10, 0, 1, 5], 24, [10, 0, 2, 1]), ["gateway"]);
        assert_eq!(found([10, 0, 1, 5], 24, [10, 0, 1, 5]), ["gateway"]);
        for bits in [0, 31, 32, 33, 255] {
            assert_eq!(found([10, 0, 1, 5], bits, [10, 0, 1, 1]), ["netmask"]);
        }
        assert_eq!(found([10, 0, 1, 0], 24, [10, 0, 1, 1]), ["netmask"]);
        assert_eq!(found([10, 0, 1, 255], 24, [10, 0, 1, 1]), ["netmask"]);
    }
}
