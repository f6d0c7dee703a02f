//! Benchmarks: the producer, the whole path, and the peers beside them.
//!
//! Invariant: a number is only shown beside what it is compared with, measured in the same run,
//! interleaved (A B A B ...), in the same placement of processes on cores. Medians, never the best.
//!
//! | module | measures |
//! |---|---|
//! | [`producer`] | one 4 KiB write into the lane, beside memcpy + CRC32C of the same bytes |
//! | [`nbd_alone`] | the simulated host's NBD server without a filter, beside `nbdkit file` |
//! | [`path`] | fio with and without the filter, throughput to the durable ack, memory |
//! | [`secure`] | what TLS between daemon and appliance costs |
//! | [`sync`] | a guest's latency while its disk is synced, and how fast the sync is |
//! | [`ack`] | a guest's latency with and without write-through |
//! | [`stack`] | all parts of a protected host, started as processes |
//! | [`report`] | the list of measurements: one table, or JSON |
//! | [`fio`] | fio's nbd engine, and what it said |
//! | [`process`] | processes that are ended with the benchmark, and their cores |
//! | [`map`] | memory of the lane's kind, for the plain copy |

pub mod ack;
pub mod fio;
pub mod map;
pub mod nbd_alone;
pub mod path;
pub mod process;
pub mod producer;
pub mod report;
pub mod secure;
pub mod stack;
pub mod sync;

use std::path::PathBuf;

/// How long and how often everything is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Runs of each side, interleaved.
    pub runs: usize,
    /// Seconds of each run.
    pub seconds: u32,
    /// The operator's command, which starts all parts.
    pub jetdr: PathBuf,
}
