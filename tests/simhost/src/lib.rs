//! The simulated host: VM processes that load the filter and serve its disks over NBD.
//!
//! | module | holds |
//! |---|---|
//! | [`disk`] | raw and flat VMDK files as disks |
//! | [`nbd`] | the NBD server and client: how guests reach the disks |
//! | [`contract`] | the checks of the filter's side of `include/iofilter.h` |
//! | [`vm`] | the process of one VM |
//! | [`host`] | a host, which runs VMs as processes |
//! | [`link`] | a network that can be made to fail |
//! | [`snapshot`] | snapshots and copies of disks |
//! | [`socket`] | listening sockets of all of these |
//! | [`cli`] | the commands |

mod abi;
pub mod cli;
pub mod contract;
pub mod disk;
pub mod host;
pub mod link;
pub mod nbd;
mod raw;
pub mod snapshot;
pub mod socket;
pub mod vm;
