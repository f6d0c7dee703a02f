//! Messages: frames with their bodies parsed.
//!
//! Invariant: what is encoded here is decoded to the same; a decoded message is within its limits.

use super::body::{Body, Cursor};
use super::{
    DiskReport, ErrorCode, FrameHeader, FrameKind, Hello, MAX_CUT_DISKS, OpenLane, PeerRole,
    WireError,
};
use crate::crc::crc32c;
use crate::lane::layout::{HASH_BYTES, MAX_HASHES};
use alloc::string::String;
use alloc::vec::Vec;

/// A frame with its body parsed. DATA bodies stay bytes: see [`crate::record::RecordIter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`OpenLane`]; on `channel`.
    OpenLane(OpenLane),
    /// Go on after `durable_seq`; `attach_epoch` is the newest that the appliance has seen.
    LaneOpened {
        /// Last durable seq; 0 for a disk never seen.
        durable_seq: u64,
        /// Newest attach epoch seen.
        attach_epoch: u32,
        /// Seq of the last base that relied on nothing; 0 for a disk never seen. No later base may
        /// rely on less.
        full_base_seq: u64,
    },
    /// Everything up to `durable_seq` is durable, up to `uploaded_seq` in the object store.
    Ack {
        /// Last durable seq.
        durable_seq: u64,
        /// Last seq in the object store.
        uploaded_seq: u64,
    },
    /// What is wrong; about seq `seq` where that is known.
    Error {
        /// For programs.
        code: ErrorCode,
        /// The seq that it is about, or 0.
        seq: u64,
        /// For people.
        text: String,
    },
    /// Move the domain's cut epoch to `epoch` and report the positions below it.
    CutRequest {
        /// The new epoch.
        epoch: u32,
        /// The domain.
        domain: String,
    },
    /// The last seq of an epoch below `epoch`, disk by disk.
    CutPositions {
        /// The new epoch, as requested.
        epoch: u32,
        /// The domain.
        domain: String,
        /// Disk and last seq of each lane of the domain on this host.
        positions: Vec<([u8; 16], u64)>,
    },
    /// The same from protocol 2 on: every disk of the domain on this host, and none if it has none.
    CutReport {
        /// The new epoch, as requested.
        epoch: u32,
        /// The domain.
        domain: String,
        /// Disk by disk.
        disks: Vec<DiskReport>,
    },
    /// Hold the completions of writes, move the domain's cut epoch to `epoch`, and say so; report the positions
    /// once released.
    CutHold {
        /// The new epoch.
        epoch: u32,
        /// The domain.
        domain: String,
    },
    /// Completions are held, and the epoch is moved.
    CutHeld {
        /// The new epoch, as requested.
        epoch: u32,
        /// The domain.
        domain: String,
    },
    /// Hold completions no longer: every host has moved its epoch, or the cut is given up.
    CutRelease {
        /// The epoch of the cut.
        epoch: u32,
        /// The domain.
        domain: String,
    },
    /// I am here.
    Heartbeat {
        /// The clock of who asked, ns.
        clock_ns: u64,
        /// Whether this is the answer.
        answer: bool,
    },
    /// This channel ends.
    CloseLane {
        /// The disk was closed in order, and everything that was published of it has been acknowledged.
        in_order: bool,
    },
    /// What does the appliance hold of these blocks of the channel's disk?
    HashRequest {
        /// Start of the first, in bytes: a multiple of a block.
        offset_bytes: u64,
        /// How many blocks of 64 KiB, 1 to [`MAX_HASHES`].
        blocks: u32,
    },
    /// The answer: the first bytes of each block's SHA-256, zeros where it is not known. Empty: nothing
    /// is known.
    Hashes {
        /// As it was asked for.
        offset_bytes: u64,
        /// Block by block.
        hashes: Vec<[u8; HASH_BYTES]>,
    },
}

impl Message {
    /// The whole frame.
    pub fn encode(&self, channel: u32) -> Vec<u8> {
        let mut body = Body::default();
        let (kind, word) = match self {
            Self::Hello(hello) => {
                body.u16(hello.oldest);
                body.u16(hello.newest);
                body.u8(match hello.role {
                    PeerRole::Daemon => 1,
                    PeerRole::Appliance => 2,
                });
                body.u8(hello.port_offset);
                body.0.extend_from_slice(&hello.peer_id);
                body.text(&hello.name);
                (FrameKind::Hello, hello.incarnation)
            }
            Self::OpenLane(lane) => {
                body.0.extend_from_slice(&lane.disk_id);
                body.0.extend_from_slice(&lane.vm_id);
                body.u32(lane.attach_epoch);
                body.u64(lane.attach_id);
                body.u64(lane.capacity_bytes);
                body.u8(lane.base.is_some().into());
                body.u64(lane.base.unwrap_or(0));
                body.text(&lane.domain);
                body.text(&lane.vm_name);
                body.text(&lane.disk_label);
                body.u8(lane.again.into());
                body.u64(lane.map_generation);
                body.u32(lane.lineage.root_epoch());
                body.u8(lane.lineage.ancestors().len() as u8);
                for ancestor in lane.lineage.ancestors() {
                    body.u32(ancestor.epoch);
                    body.u64(ancestor.id);
                    body.u64(ancestor.generation);
                }
                (FrameKind::OpenLane, lane.durable_seq)
            }
            Self::LaneOpened {
                durable_seq,
                attach_epoch,
                full_base_seq,
            } => {
                body.u32(*attach_epoch);
                body.u64(*full_base_seq);
                (FrameKind::LaneOpened, *durable_seq)
            }
            Self::Ack {
                durable_seq,
                uploaded_seq,
            } => {
                body.u64(*uploaded_seq);
                (FrameKind::Ack, *durable_seq)
            }
            Self::Error { code, seq, text } => {
                body.u16(*code as u16);
                body.text(text);
                (FrameKind::Error, *seq)
            }
            Self::CutRequest { epoch, domain } => {
                body.text(domain);
                (FrameKind::CutRequest, u64::from(*epoch))
            }
            Self::CutPositions {
                epoch,
                domain,
                positions,
            } => {
                body.text(domain);
                body.u32(positions.len() as u32);
                for (disk_id, seq) in positions {
                    body.0.extend_from_slice(disk_id);
                    body.u64(*seq);
                }
                (FrameKind::CutPositions, u64::from(*epoch))
            }
            Self::Heartbeat { clock_ns, answer } => {
                body.u8((*answer).into());
                (FrameKind::Heartbeat, *clock_ns)
            }
            Self::CutReport {
                epoch,
                domain,
                disks,
            } => {
                body.text(domain);
                body.u32(disks.len() as u32);
                for disk in disks {
                    body.0.extend_from_slice(&disk.disk_id);
                    body.u64(disk.seq);
                    body.u8(u8::from(disk.open) | u8::from(disk.complete) << 1);
                }
                (FrameKind::CutReport, u64::from(*epoch))
            }
            Self::CutHold { epoch, domain } => {
                body.text(domain);
                (FrameKind::CutHold, u64::from(*epoch))
            }
            Self::CutHeld { epoch, domain } => {
                body.text(domain);
                (FrameKind::CutHeld, u64::from(*epoch))
            }
            Self::CutRelease { epoch, domain } => {
                body.text(domain);
                (FrameKind::CutRelease, u64::from(*epoch))
            }
            Self::CloseLane { in_order } => (FrameKind::CloseLane, u64::from(*in_order)),
            Self::HashRequest {
                offset_bytes,
                blocks,
            } => {
                body.u32(*blocks);
                (FrameKind::HashRequest, *offset_bytes)
            }
            Self::Hashes {
                offset_bytes,
                hashes,
            } => {
                body.u32(hashes.len() as u32);
                for hash in hashes {
                    body.0.extend_from_slice(hash);
                }
                (FrameKind::Hashes, *offset_bytes)
            }
        };
        let body = body.0;
        let body_crc = crc32c(0, &body);
        let header = FrameHeader {
            kind,
            body_len: body.len() as u32,
            channel,
            word,
            body_crc,
        };
        let mut out = header.encode().to_vec();
        out.extend_from_slice(&body);
        out
    }

    /// Parses a body. DATA is refused here: its body is records.
    pub fn decode(header: &FrameHeader, body: &[u8]) -> Result<Self, WireError> {
        header.check_body(body)?;
        let mut cursor = Cursor {
            kind: header.kind as u8,
            rest: body,
        };
        let word = header.word;
        Ok(match header.kind {
            FrameKind::Hello => Self::Hello(cursor.hello(word)?),
            FrameKind::OpenLane => Self::OpenLane(cursor.open_lane(word)?),
            FrameKind::LaneOpened => Self::LaneOpened {
                durable_seq: cursor.seq(word)?,
                attach_epoch: cursor.u32("attach epoch")?,
                full_base_seq: cursor.u64("full base seq")?,
            },
            FrameKind::Ack => Self::Ack {
                durable_seq: cursor.seq(word)?,
                uploaded_seq: cursor.u64("uploaded seq")?,
            },
            FrameKind::Error => Self::Error {
                code: ErrorCode::from_wire(cursor.u16("code")?),
                seq: word,
                text: cursor.text("text")?,
            },
            FrameKind::CutRequest => Self::CutRequest {
                epoch: cursor.epoch(word)?,
                domain: cursor.text("domain")?,
            },
            FrameKind::CutPositions => {
                let (epoch, domain) = (cursor.epoch(word)?, cursor.text("domain")?);
                let count = cursor.u32("count")?;
                if count > MAX_CUT_DISKS || count as usize * 24 > cursor.rest.len() {
                    return Err(cursor.bad("count"));
                }
                let mut positions = Vec::with_capacity(count as usize);
                for _ in 0..count {
                    let disk_id = cursor.id("disk id")?;
                    let seq = cursor.u64("seq")?;
                    positions.push((disk_id, cursor.seq(seq)?));
                }
                Self::CutPositions {
                    epoch,
                    domain,
                    positions,
                }
            }
            FrameKind::Heartbeat => Self::Heartbeat {
                clock_ns: word,
                answer: cursor.u8("answer")? != 0,
            },
            FrameKind::CutReport => Self::CutReport {
                epoch: cursor.epoch(word)?,
                domain: cursor.text("domain")?,
                disks: cursor.disk_reports()?,
            },
            FrameKind::CutHold => Self::CutHold {
                epoch: cursor.epoch(word)?,
                domain: cursor.text("domain")?,
            },
            FrameKind::CutHeld => Self::CutHeld {
                epoch: cursor.epoch(word)?,
                domain: cursor.text("domain")?,
            },
            FrameKind::CutRelease => Self::CutRelease {
                epoch: cursor.epoch(word)?,
                domain: cursor.text("domain")?,
            },
            FrameKind::CloseLane => match word {
                0 | 1 => Self::CloseLane {
                    in_order: word == 1,
                },
                _ => return Err(cursor.bad("in order")),
            },
            FrameKind::HashRequest => {
                let offset_bytes = cursor.block_offset(word)?;
                let blocks = cursor.u32("blocks")?;
                if blocks == 0 || blocks as usize > MAX_HASHES {
                    return Err(cursor.bad("blocks"));
                }
                Self::HashRequest {
                    offset_bytes,
                    blocks,
                }
            }
            FrameKind::Hashes => {
                let offset_bytes = cursor.block_offset(word)?;
                let count = cursor.u32("count")? as usize;
                if count > MAX_HASHES || count * HASH_BYTES > cursor.rest.len() {
                    return Err(cursor.bad("count"));
                }
                let hashes = (0..count).map(|_| cursor.array("hash"));
                Self::Hashes {
                    offset_bytes,
                    hashes: hashes.collect::<Result<_, _>>()?,
                }
            }
            FrameKind::Data => return Err(WireError::Kind(FrameKind::Data as u8)),
        })
    }
}
