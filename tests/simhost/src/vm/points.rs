//! Named points at which a VM's process can be killed, on request.
//!
//! Invariant: a point that is named is one that the process passes; an unknown name is an error that
//! lists the known ones.

use anyhow::bail;

macro_rules! points {
    ($($name:ident = $text:literal: $doc:literal,)*) => {
        /// A place in the process.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $(#[doc = $doc] $name,)*
        }

        /// All of them, with their names.
        const POINTS: &[(Point, &str)] = &[$((Point::$name, $text),)*];
    };
}

points! {
    Opening = "open-before": "Before the filter's open.",
    Opened = "open-after": "After it.",
    SidecarBefore = "sidecar-before": "Before a write to a sidecar.",
    SidecarAfter = "sidecar-after": "After it is durable, before the filter is told.",
    IoStarted = "io-started": "After io_start, before the disk is written.",
    IoWritten = "io-written": "After the disk was written, before io_done.",
    Flushed = "flushed": "After a flush of the disk, before io_done.",
    Closing = "close-before": "Before the filter's close.",
    Closed = "close-after": "After it, before the disk is noted as closed in order.",
    SnapshotPre = "snapshot-pre": "After the filter agreed to a snapshot event, before the content changes.",
    SnapshotContent = "snapshot-content": "After the content was copied or put back, before the filter is told.",
    OutPrepared = "migrate-out-prepared": "Source: the filter agreed to a migration.",
    OutStunned = "migrate-out-stunned": "Source: the guest is stopped, its I/O drained.",
    OutHandoff = "migrate-out-handoff": "Source: after migrate(HANDOFF), before close(HANDOFF).",
    OutClosed = "migrate-out-closed": "Source: the disks are closed, nothing was handed over yet.",
    OutSent = "migrate-out-sent": "Source: disks and connections were handed over, the other side has not answered.",
    OutGo = "migrate-out-go": "Source: the other side has the disks open and may not go on yet.",
    InWaiting = "migrate-in-waiting": "Destination: connected, nothing was handed over yet.",
    InReceived = "migrate-in-received": "Destination: it has the connections, no disk is open.",
    InOpened = "migrate-in-opened": "Destination: the disks are open, the source was not told.",
    InArrived = "migrate-in-arrived": "Destination: after migrate(ARRIVED), the guest goes on next.",
}

impl Point {
    /// By its name.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        match POINTS.iter().find(|(_, known)| *known == name) {
            Some((point, _)) => Ok(*point),
            None => {
                let known: Vec<&str> = POINTS.iter().map(|(_, name)| *name).collect();
                bail!("there is no point `{name}`; known are {}", known.join(", "))
            }
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        let found = POINTS.iter().find(|(point, _)| *point == self);
        found.map_or("", |(_, name)| name)
    }
}
