//! The whole system in one thread and in virtual time, with faults of all kinds, everything from one seed.
//!
//! The parts that decide are the product's own: the disk's state machine and its lane (in ordinary
//! memory), the table of what is found at attach, the sidecar, the daemon's lanes and its answers to
//! messages, the appliance's disks and what they admit, the log's bytes, batches and scan, the container's
//! writer and reader. Mirrored here, step by step and without threads or files, are: the filter library's
//! opening of a disk, the rounds of the daemon's pumps and control thread, the sessions, the taking of
//! cuts, the order in which the upload reads, feeds and commits.
//!
//! | file | holds |
//! |---|---|
//! | [`world`] | everything, the queue of events, the clock |
//! | [`guest`], [`syncs`] | guests' writes, their filters and syncs |
//! | [`through`] | completions that wait for the appliance's log (`ack = log`) |
//! | [`regions`] | the region map in the sidecar, fences |
//! | [`host`] | VMs and hosts: beginnings, ends, crashes |
//! | [`moving`] | VMs that move to another host while they run |
//! | [`daemon`], [`taking`] | pumps, cuts at the host |
//! | [`network`] | connections |
//! | [`links`] | frames on their way |
//! | [`server`], [`cuts`] | the appliance's sessions and log, its cuts, as events |
//! | [`appliance`] | what the appliance's process holds |
//! | [`upload`], [`hasher`] | the upload, the answers to hashes: tasks |
//! | [`storage`], [`volume`], [`store`] | disks and sidecars, the log's volume, the object store: with faults |
//! | [`plan`], [`habits`] | what is planned; how one seed differs from another |
//! | [`faults`], [`mishaps`], [`damage`], [`kinds`] | faults, what befalls VMs and disks, bytes that change, all by name |
//! | [`run`], [`many`] | one seed; many of them |
//! | [`oracle`], [`check`] | what guests were told; what a cut holds |

pub mod appliance;
pub mod check;
pub mod cuts;
pub mod daemon;
pub mod damage;
pub mod faults;
pub mod guest;
pub mod habits;
pub mod hasher;
pub mod host;
pub mod kinds;
pub mod links;
pub mod many;
pub mod mishaps;
pub mod moving;
pub mod network;
pub mod numbers;
pub mod oracle;
pub mod plan;
pub mod regions;
pub mod reverting;
pub mod run;
pub mod server;
pub mod storage;
pub mod store;
pub mod syncs;
pub mod taking;
pub mod through;
pub mod upload;
pub mod volume;
pub mod world;
