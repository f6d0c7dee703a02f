//! fio as the guest: its nbd engine, one job per run, read back from its JSON.
//!
//! Invariant: a job differs from its peer's only in the server it talks to.

use crate::process::pinned;
use anyhow::Context;
use std::process::Stdio;

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its name in the report.
    pub name: &'static str,
    /// fio's `rw`.
    pub pattern: &'static str,
    /// Bytes of one I/O.
    pub block_bytes: u32,
    /// I/Os under way.
    pub depth: u32,
    /// Writes per second, if the load is paced.
    pub paced_per_second: Option<u32>,
}

/// 4 KiB random writes, one at a time.
pub const DEPTH_1: Job = Job {
    name: "randwrite 4k depth 1",
    pattern: "randwrite",
    block_bytes: 4096,
    depth: 1,
    paced_per_second: None,
};
/// 4 KiB random writes, sixteen at a time.
pub const DEPTH_16: Job = Job {
    name: "randwrite 4k depth 16",
    pattern: "randwrite",
    depth: 16,
    ..DEPTH_1
};
/// 4 KiB random reads, sixteen at a time.
pub const READS: Job = Job {
    name: "randread 4k depth 16",
    pattern: "randread",
    depth: 16,
    ..DEPTH_1
};
/// 60 reads to 40 writes.
pub const MIXED: Job = Job {
    name: "randrw 60/40 4k depth 16",
    pattern: "randrw",
    depth: 16,
    ..DEPTH_1
};
/// Large writes in a row.
pub const SEQUENTIAL: Job = Job {
    name: "seqwrite 128k depth 4",
    pattern: "write",
    block_bytes: 128 << 10,
    depth: 4,
    paced_per_second: None,
};
/// A load that leaves room: what counts is the latency.
pub const PACED: Job = Job {
    name: "randwrite 4k paced 2,000/s",
    depth: 4,
    paced_per_second: Some(2000),
    ..DEPTH_1
};

/// The same with reads.
pub const PACED_READS: Job = Job {
    name: "randread 4k paced 2,000/s",
    pattern: "randread",
    ..PACED
};

/// What a run reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reached {
    /// I/Os per second, reads and writes.
    pub per_second: f64,
    /// MB/s, reads and writes.
    pub mb_per_second: f64,
    /// Median latency, us, of the writes if there are any.
    pub p50_us: f64,
    /// 99th percentile, us, of the same.
    pub p99_us: f64,
}

/// Runs `job` for `seconds` against the NBD server at `uri`.
pub fn run(
    job: Job,
    uri: &str,
    disk_bytes: u64,
    seconds: u32,
    core: Option<u32>,
) -> anyhow::Result<Reached> {
    let mut command = pinned(core, "fio");
    command.args([
        "--name=job",
        "--ioengine=nbd",
        "--output-format=json",
        "--time_based",
    ]);
    command.args([
        "--randrepeat=1",
        "--rwmixread=60",
        "--norandommap",
        "--percentile_list=50:99",
    ]);
    command.arg(format!("--uri={uri}"));
    command.arg(format!("--rw={}", job.pattern));
    command.arg(format!("--bs={}", job.block_bytes));
    command.arg(format!("--iodepth={}", job.depth));
    command.arg(format!("--size={disk_bytes}"));
    command.arg(format!("--runtime={seconds}"));
    // The first moments are the caches', the branch predictors' and the allocators'.
    command.arg("--ramp_time=1");
    if let Some(rate) = job.paced_per_second {
        command.arg(format!("--rate_iops={rate}"));
    }
    let output = command.stdin(Stdio::null()).output().context("start fio")?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(
        output.status.success(),
        "fio {} against {uri}: {errors}",
        job.name
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse(&text).with_context(|| format!("read what fio said about {}: {errors}", job.name))
}

/// Writes the whole disk once, front to back, and flushes.
pub fn fill(uri: &str, disk_bytes: u64) -> anyhow::Result<()> {
    let mut command = pinned(None, "fio");
    command.args([
        "--name=fill",
        "--ioengine=nbd",
        "--rw=write",
        "--bs=256k",
        "--iodepth=8",
    ]);
    command.args(["--end_fsync=1", "--output-format=json"]);
    command
        .arg(format!("--uri={uri}"))
        .arg(format!("--size={disk_bytes}"));
    let output = command.stdin(Stdio::null()).output().context("start fio")?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(output.status.success(), "fio fills {uri}: {errors}");
    Ok(())
}

fn parse(text: &str) -> anyhow::Result<Reached> {
    // fio may say a line or two before the JSON.
    let start = text.find('{').context("no JSON")?;
    let json: serde_json::Value = serde_json::from_str(text.get(start..).unwrap_or_default())?;
    let job = &json["jobs"][0];
    anyhow::ensure!(
        job["error"].as_i64() == Some(0),
        "fio reports error {}",
        job["error"]
    );
    let number = |side: &str, key: &str| job[side][key].as_f64().unwrap_or(0.0);
    let side = if number("write", "total_ios") > 0.0 {
        "write"
    } else {
        "read"
    };
    let percentile = |which: &str| {
        let found = job[side]["clat_ns"]["percentile"][which].as_f64();
        found
            .map(|ns| ns / 1000.0)
            .with_context(|| format!("no percentile {which}"))
    };
    let per_second = number("read", "iops") + number("write", "iops");
    anyhow::ensure!(per_second > 0.0, "fio did no I/O");
    Ok(Reached {
        per_second,
        mb_per_second: (number("read", "bw_bytes") + number("write", "bw_bytes")) / 1e6,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(error: u32, writes: u32) -> String {
        let side = |ios: u32| {
            format!(
                r#"{{"total_ios":{ios},"iops":{ios}.0,"bw_bytes":{},"clat_ns":{{"percentile":
                {{"50.000000":12000,"99.000000":345000}}}}}}"#,
                u64::from(ios) * 4096
            )
        };
        let (read, write) = (side(100), side(writes));
        format!("fio: note\n{{\"jobs\":[{{\"error\":{error},\"read\":{read},\"write\":{write}}}]}}")
    }

    #[test]
    fn what_fio_says_is_read() {
        let reached = parse(&sample(0, 1000)).expect("as fio writes it");
        assert_eq!(reached.per_second, 1100.0);
        assert_eq!((reached.p50_us, reached.p99_us), (12.0, 345.0));
        assert!((reached.mb_per_second - 4.5056).abs() < 1e-9);
    }

    #[test]
    fn an_error_of_fio_is_an_error() {
        let error = parse(&sample(5, 1000)).expect_err("error 5");
        assert!(error.to_string().contains("error 5"));
        assert!(parse("nothing").is_err());
        assert!(parse(r#"{"jobs":[]}"#).is_err());
    }
}
