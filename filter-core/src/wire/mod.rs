//! Frames between the host daemon and the DR appliance.
//!
//! Invariant: a body length is believed only after the header's CRC checked, and only up to the
//! limit of its kind; a body is parsed only after its own CRC checked. The HELLO frame (header and
//! body) is frozen for ever: a newer program can always tell an older one what it speaks.
//!
//! Frame header, 32 bytes, little-endian:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `JDF1` |
//! | 4 | 1 | kind |
//! | 5 | 1 | flags: zero, and checked |
//! | 6 | 2 | reserved: zero, and checked |
//! | 8 | 4 | body length in bytes |
//! | 12 | 4 | channel: a lane on this connection, chosen by the daemon; 0 for the connection itself |
//! | 16 | 8 | word: a seq or a number, by kind |
//! | 24 | 4 | CRC32C of the body; 0 for DATA, whose records carry their own |
//! | 28 | 4 | CRC32C of the 28 bytes before |

mod body;
mod message;

use crate::crc::crc32c;
use crate::lineage::{Attach, Lineage};
use crate::record::{le_u32, le_u64};
use alloc::boxed::Box;
use alloc::string::String;
pub use message::Message;

/// `JDF1`.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"JDF1");
/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 32;
/// Largest body of a DATA frame.
pub const MAX_DATA_BYTES: u32 = 1 << 20;
/// Largest body of any other frame.
pub const MAX_BODY_BYTES: u32 = 256 * 1024;
/// Longest text in a body.
pub const MAX_TEXT_BYTES: usize = 1024;
/// Most disks that one CUT_POSITIONS or CUT_REPORT names.
pub const MAX_CUT_DISKS: u32 = 8192;
/// The first TCP port; see [`PortRole`] for the others.
pub const DEFAULT_PORT_BASE: u16 = 32873;
/// The protocol that this program speaks best. 2: a daemon answers a cut with [`Message::CutReport`],
/// also when it has no disk of the domain, and is on the control port whether or not it has any; it can hold
/// completions for a cut over several hosts.
pub const PROTOCOL_NEWEST: u16 = 2;
/// The oldest protocol that it still speaks.
pub const PROTOCOL_OLDEST: u16 = 1;

/// What a port is for. The port is the base plus the role's offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortRole {
    /// Base + 0: hello, cuts, heartbeats.
    Control,
    /// Base + 1 to base + 4: lanes that stream, each hashed to one.
    Data(u8),
    /// Base + 5: lanes that sync.
    Bulk,
}

impl PortRole {
    /// All roles, in port order.
    pub const ALL: [Self; 6] = [
        Self::Control,
        Self::Data(0),
        Self::Data(1),
        Self::Data(2),
        Self::Data(3),
        Self::Bulk,
    ];

    /// The offset from the base, 0 to 5.
    pub const fn offset(self) -> u16 {
        match self {
            Self::Control => 0,
            Self::Data(n) => 1 + n as u16,
            Self::Bulk => 5,
        }
    }

    /// The role at an offset.
    pub fn from_offset(offset: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.offset() == offset)
    }

    /// The data port of a disk.
    pub fn of_disk(disk_id: &[u8; 16]) -> Self {
        Self::Data((crc32c(0, disk_id) % 4) as u8)
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// First frame both ways.
    Hello = 1,
    /// Daemon: this channel is a lane of this disk.
    OpenLane = 2,
    /// Appliance: go on after `word`, the last seq that is durable here.
    LaneOpened = 3,
    /// Daemon: whole records, the first with seq `word`.
    Data = 4,
    /// Appliance: everything up to `word` is durable.
    Ack = 5,
    /// Either: what is wrong.
    Error = 6,
    /// Appliance, on control: move the domain's cut epoch to `word`.
    CutRequest = 7,
    /// Daemon, on control: the positions of the cut whose epoch is below `word`.
    CutPositions = 8,
    /// Either: I am here; `word` is the sender's clock, returned in the answer.
    Heartbeat = 9,
    /// Daemon: this channel ends.
    CloseLane = 10,
    /// Daemon: what does the appliance hold from `word` on.
    HashRequest = 11,
    /// Appliance: hashes of the blocks from `word` on.
    Hashes = 12,
    /// Daemon, on control, from protocol 2 on instead of CUT_POSITIONS: how the domain's disks on this
    /// host stand below the epoch `word`.
    CutReport = 13,
    /// Appliance, on control: hold completions, then move the domain's cut epoch to `word`.
    CutHold = 14,
    /// Daemon, on control: that is done, and completions are held.
    CutHeld = 15,
    /// Appliance, on control: every host has moved its epoch to `word`, or nothing comes of it.
    CutRelease = 16,
}

impl FrameKind {
    fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::OpenLane,
            3 => Self::LaneOpened,
            4 => Self::Data,
            5 => Self::Ack,
            6 => Self::Error,
            7 => Self::CutRequest,
            8 => Self::CutPositions,
            9 => Self::Heartbeat,
            10 => Self::CloseLane,
            11 => Self::HashRequest,
            12 => Self::Hashes,
            13 => Self::CutReport,
            14 => Self::CutHold,
            15 => Self::CutHeld,
            16 => Self::CutRelease,
            _ => return None,
        })
    }
}

/// Why bytes are not a frame or a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The peer speaks something else.
    #[error("not a jetdr peer: frame magic {0:#010x}, expected {FRAME_MAGIC:#010x}")]
    Magic(u32),
    /// The header does not match its CRC.
    #[error("frame header is corrupt: CRC32C {stored:#010x} stored, {computed:#010x} computed")]
    HeaderCrc {
        /// The CRC in the header.
        stored: u32,
        /// The CRC of its bytes.
        computed: u32,
    },
    /// The body does not match its CRC.
    #[error(
        "frame body of kind {kind} is corrupt: CRC32C {stored:#010x} stored, {computed:#010x} computed"
    )]
    BodyCrc {
        /// The frame's kind.
        kind: u8,
        /// The CRC in the header.
        stored: u32,
        /// The CRC of the body.
        computed: u32,
    },
    /// A kind that this version does not know.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// Reserved bits are set.
    #[error("frame has reserved bits set: {0:#x}")]
    Reserved(u32),
    /// The body is longer than its kind allows.
    #[error("frame of kind {kind} announces a body of {len} bytes, at most {limit} are allowed")]
    TooLong {
        /// The frame's kind.
        kind: u8,
        /// Announced length.
        len: u32,
        /// The limit.
        limit: u32,
    },
    /// The body ends before its fields do, or a field is outside its limits.
    #[error("frame body of kind {kind}: field `{field}` is cut short or invalid")]
    Field {
        /// The frame's kind.
        kind: u8,
        /// The field.
        field: &'static str,
    },
    /// No common protocol.
    #[error(
        "the peer speaks protocols {oldest} to {newest}, this program {PROTOCOL_OLDEST} to {PROTOCOL_NEWEST}: upgrade the older side"
    )]
    Version {
        /// The peer's oldest.
        oldest: u16,
        /// The peer's newest.
        newest: u16,
    },
}

/// A decoded frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame is.
    pub kind: FrameKind,
    /// Bytes of body that follow.
    pub body_len: u32,
    /// The lane, or 0.
    pub channel: u32,
    /// A seq or a number, by kind.
    pub word: u64,
    /// CRC32C of the body, 0 for DATA.
    pub body_crc: u32,
}

impl FrameHeader {
    /// The header of a DATA frame with `body_len` bytes of whole records.
    pub const fn data(channel: u32, first_seq: u64, body_len: u32) -> Self {
        Self {
            kind: FrameKind::Data,
            body_len,
            channel,
            word: first_seq,
            body_crc: 0,
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = [0u8; FRAME_HEADER_BYTES];
        out[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        out[4] = self.kind as u8;
        out[8..12].copy_from_slice(&self.body_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.channel.to_le_bytes());
        out[16..24].copy_from_slice(&self.word.to_le_bytes());
        out[24..28].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32c(0, &out[..28]);
        out[28..32].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and checks a header.
    pub fn decode(raw: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, WireError> {
        let magic = le_u32(raw, 0);
        if magic != FRAME_MAGIC {
            return Err(WireError::Magic(magic));
        }
        let (stored, computed) = (le_u32(raw, 28), crc32c(0, &raw[..28]));
        if stored != computed {
            return Err(WireError::HeaderCrc { stored, computed });
        }
        let kind = FrameKind::from_wire(raw[4]).ok_or(WireError::Kind(raw[4]))?;
        let reserved = le_u32(raw, 4) >> 8;
        if reserved != 0 {
            return Err(WireError::Reserved(reserved));
        }
        let len = le_u32(raw, 8);
        let limit = if kind == FrameKind::Data {
            MAX_DATA_BYTES
        } else {
            MAX_BODY_BYTES
        };
        if len > limit {
            return Err(WireError::TooLong {
                kind: raw[4],
                len,
                limit,
            });
        }
        Ok(Self {
            kind,
            body_len: len,
            channel: le_u32(raw, 12),
            word: le_u64(raw, 16),
            body_crc: le_u32(raw, 24),
        })
    }

    /// Checks a body against its header (DATA is checked record by record instead).
    pub fn check_body(&self, body: &[u8]) -> Result<(), WireError> {
        let computed = if self.kind == FrameKind::Data {
            0
        } else {
            crc32c(0, body)
        };
        if computed != self.body_crc {
            let (kind, stored) = (self.kind as u8, self.body_crc);
            return Err(WireError::BodyCrc {
                kind,
                stored,
                computed,
            });
        }
        Ok(())
    }
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRole {
    /// A host's filter daemon.
    Daemon,
    /// A DR appliance.
    Appliance,
}

/// First frame both ways. Frozen: fields are appended only, and a reader ignores what it does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest protocol spoken.
    pub oldest: u16,
    /// Newest protocol spoken.
    pub newest: u16,
    /// Who speaks.
    pub role: PeerRole,
    /// Offset of the port that is meant, 0 to 5.
    pub port_offset: u8,
    /// The sender's lasting identity.
    pub peer_id: [u8; 16],
    /// Changes when the sender restarts.
    pub incarnation: u64,
    /// The sender's name, for people.
    pub name: String,
}

impl Hello {
    /// The newest protocol that both sides speak.
    pub fn agree(&self) -> Result<u16, WireError> {
        let newest = self.newest.min(PROTOCOL_NEWEST);
        if newest < self.oldest.max(PROTOCOL_OLDEST) || self.oldest > self.newest {
            return Err(WireError::Version {
                oldest: self.oldest,
                newest: self.newest,
            });
        }
        Ok(newest)
    }
}

/// What a lane is, as its daemon presents it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenLane {
    /// The disk.
    pub disk_id: [u8; 16],
    /// Its VM.
    pub vm_id: [u8; 16],
    /// The channel is open already: this is news of its lane, of no use if the channel was closed
    /// meanwhile, or the lane opened elsewhere.
    pub again: bool,
    /// Epoch of the producer that is attached (or was last).
    pub attach_epoch: u32,
    /// See [`crate::lineage::Attach`].
    pub attach_id: u64,
    /// Generation of the region map: told again when it rises, before the records that rely on it.
    pub map_generation: u64,
    /// What the opening goes back to.
    // Boxed: it is long, and few messages open a lane.
    pub lineage: Box<Lineage>,
    /// Everything up to here was acknowledged as durable before.
    pub durable_seq: u64,
    /// Capacity in bytes.
    pub capacity_bytes: u64,
    /// The next record begins the stream anew (STREAM_BASE), relying on this seq; 0: on nothing.
    pub base: Option<u64>,
    /// The protected domain.
    pub domain: String,
    /// The VM's name.
    pub vm_name: String,
    /// The disk's label within its VM.
    pub disk_label: String,
}

impl OpenLane {
    /// The opening that it presents.
    pub const fn attach(&self) -> Attach {
        Attach {
            epoch: self.attach_epoch,
            id: self.attach_id,
            generation: self.map_generation,
        }
    }
}

/// How one disk of a cut stands, as its host says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskReport {
    /// The disk.
    pub disk_id: [u8; 16],
    /// Its last record below the cut's epoch.
    pub seq: u64,
    /// A process had it open at some time while the cut was taken. Then no other host has.
    pub open: bool,
    /// Its stream held every write all the while; otherwise `seq` is worth nothing.
    pub complete: bool,
}

/// What went wrong, as a number for programs. Never renumbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum ErrorCode {
    /// Bytes that are no frame, record or message.
    Malformed = 1,
    /// No common protocol version.
    Version = 2,
    /// The channel is not open.
    NoChannel = 3,
    /// A record's CRC did not match: send it again.
    Corrupt = 4,
    /// A record came whose predecessor did not.
    Gap = 5,
    /// A newer attach epoch exists: this host lost the VM.
    Fenced = 6,
    /// The appliance does not serve this domain.
    Domain = 7,
    /// The log cannot take records now.
    Log = 8,
    /// A limit was exceeded (disks, hosts).
    Limit = 9,
    /// Anything else.
    Other = 10,
}

impl ErrorCode {
    fn from_wire(code: u16) -> Self {
        use ErrorCode::*;
        let known = [
            Malformed, Version, NoChannel, Corrupt, Gap, Fenced, Domain, Log, Limit,
        ];
        known
            .into_iter()
            .find(|known| *known as u16 == code)
            .unwrap_or(Other)
    }
}

/// Longest name of a domain, VM or disk on the wire: what a lane's identity can hold.
pub const MAX_NAME_BYTES: usize = 80;

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
