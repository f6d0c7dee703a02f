//! The simulated host's NBD server without a filter, beside `nbdkit file`, both on tmpfs.
//!
//! The filter's cost can only be seen if the server under it is not the slow part: this shows that
//! it is not. Invariant: both servers get files of the same kind and length, every byte allocated.

use crate::Settings;
use crate::fio::{self, Job};
use crate::process::{Placement, Running, is_installed, memory_folder, pinned, wait_for};
use crate::report::{Goal, Measurement};
use anyhow::Context;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Larger than the near caches, small enough for anybody's memory.
pub const DISK_BYTES: u64 = 256 << 20;
const GOAL: Goal = Goal::RatioAtLeast(0.7);
/// How long a server may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);

const JOBS: [(Job, &[Placement]); 4] = [
    (
        fio::DEPTH_1,
        &[Placement::Together, Placement::Apart, Placement::Free],
    ),
    (fio::DEPTH_16, &[Placement::Apart, Placement::Free]),
    (fio::READS, &[Placement::Apart, Placement::Free]),
    (fio::SEQUENTIAL, &[Placement::Apart, Placement::Free]),
];

/// Makes a disk with every byte allocated.
pub fn make_disk(path: &Path, len_bytes: u64) -> anyhow::Result<()> {
    let make = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(path)?;
        let zeros = std::io::repeat(0);
        std::io::copy(&mut std::io::Read::take(zeros, len_bytes), &mut file)?;
        Ok(())
    };
    make().with_context(|| format!("make the disk {}", path.display()))
}

/// The URI of an NBD server on a unix socket.
pub fn unix_uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn our_server(
    folder: &Path,
    settings: &Settings,
    core: Option<u32>,
) -> anyhow::Result<(Running, String)> {
    let (disk, socket) = (folder.join("ours.img"), folder.join("ours.sock"));
    let _ = std::fs::remove_file(&socket);
    make_disk(&disk, DISK_BYTES)?;
    let mut command = pinned(core, &settings.jetdr);
    command
        .args(["simhost", "nbd"])
        .arg("--disk")
        .arg(&disk)
        .arg("--socket")
        .arg(&socket);
    let (running, _) = Running::start_ready("jetdr simhost nbd", command)?;
    Ok((running, unix_uri(&socket)))
}

fn nbdkit(folder: &Path, core: Option<u32>) -> anyhow::Result<(Running, String)> {
    let (disk, socket) = (folder.join("nbdkit.img"), folder.join("nbdkit.sock"));
    let _ = std::fs::remove_file(&socket);
    make_disk(&disk, DISK_BYTES)?;
    let mut command: Command = pinned(core, "nbdkit");
    command
        .arg("-f")
        .arg("-U")
        .arg(&socket)
        .arg("file")
        .arg(&disk);
    let mut running = Running::start("nbdkit", command)?;
    wait_for("nbdkit's socket", LISTEN_LIMIT, || {
        running.check()?;
        Ok(std::os::unix::net::UnixStream::connect(&socket).ok())
    })?;
    Ok((running, unix_uri(&socket)))
}

/// All jobs in all placements.
pub fn measure(settings: &Settings) -> anyhow::Result<Vec<Measurement>> {
    for program in ["fio", "nbdkit", "taskset"] {
        anyhow::ensure!(
            is_installed(program),
            "{program} is not installed: scripts/bootstrap.sh bench"
        );
    }
    let folder = tempfile::Builder::new()
        .prefix("jetdr-bench-")
        .tempdir_in(memory_folder())
        .context("make a folder for the disks")?;
    let mut found = Vec::new();
    for placement in [Placement::Together, Placement::Apart, Placement::Free] {
        let (_ours, our_uri) = our_server(folder.path(), settings, placement.server())?;
        let (_theirs, their_uri) = nbdkit(folder.path(), placement.server())?;
        for (job, _) in JOBS
            .iter()
            .filter(|(_, placements)| placements.contains(&placement))
        {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..settings.runs {
                let go =
                    |uri| fio::run(*job, uri, DISK_BYTES, settings.seconds, placement.client());
                theirs.push(go(&their_uri)?.per_second);
                ours.push(go(&our_uri)?.per_second);
            }
            let name = format!("{}, {}", job.name, placement.name());
            let beside = "nbdkit file";
            found.push(Measurement::compared(
                "nbd",
                name,
                "IOPS",
                &ours,
                beside,
                &theirs,
                Some(GOAL),
            ));
        }
    }
    Ok(found)
}
