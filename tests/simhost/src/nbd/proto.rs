//! Numbers of the NBD protocol (doc/proto.md of the NBD project), and parsers of a peer's bytes.
//!
//! Invariant: the parsers are pure functions over byte slices; none panics whatever it is given.

/// `NBDMAGIC`, first word of a server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before the handshake flags and before each option.
pub const OPT_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPT_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake: no 124 zeros after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 2;

/// Options.
pub mod opt {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

/// Information types of INFO and GO.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags that this server sets.
pub mod tflag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod cmd {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod cflag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
}

/// Types of structured chunks, and their flag.
pub mod chunk {
    #![allow(missing_docs)]
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
}

/// Error numbers on the wire.
pub mod errno {
    #![allow(missing_docs)]
    pub const PERM: u32 = 1;
    pub const IO: u32 = 5;
    pub const INVAL: u32 = 22;
    pub const NOSPC: u32 = 28;
    pub const OVERFLOW: u32 = 75;
    pub const NOTSUP: u32 = 95;
    pub const SHUTDOWN: u32 = 108;
}

/// Longest payload of a READ or WRITE.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// Longest data of an option.
pub const MAX_OPTION_BYTES: u32 = 8192;
/// Longest export name.
pub const MAX_NAME_BYTES: usize = 1024;
/// Bytes of a request without its payload.
pub const REQUEST_BYTES: usize = 28;
/// The one metadata context.
pub const CONTEXT_NAME: &str = "base:allocation";
/// Its number.
pub const CONTEXT_ID: u32 = 1;

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// `cflag`.
    pub flags: u16,
    /// `cmd`.
    pub command: u16,
    /// Returned with the reply.
    pub cookie: u64,
    /// Start, in bytes.
    pub offset_bytes: u64,
    /// Length, in bytes.
    pub len_bytes: u32,
}

/// A big-endian number at the start of a slice, and the rest.
pub fn be_u16(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (head, rest) = bytes.split_first_chunk()?;
    Some((u16::from_be_bytes(*head), rest))
}

/// As [`be_u16`].
pub fn be_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (head, rest) = bytes.split_first_chunk()?;
    Some((u32::from_be_bytes(*head), rest))
}

/// As [`be_u16`].
pub fn be_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (head, rest) = bytes.split_first_chunk()?;
    Some((u64::from_be_bytes(*head), rest))
}

/// Parses a request's header; `None`: the magic is wrong, the stream has lost its place.
pub fn parse_request(raw: &[u8; REQUEST_BYTES]) -> Option<RequestHeader> {
    let (magic, rest) = be_u32(raw)?;
    let (flags, rest) = be_u16(rest)?;
    let (command, rest) = be_u16(rest)?;
    let (cookie, rest) = be_u64(rest)?;
    let (offset_bytes, rest) = be_u64(rest)?;
    let (len_bytes, _) = be_u32(rest)?;
    (magic == REQUEST_MAGIC).then_some(RequestHeader {
        flags,
        command,
        cookie,
        offset_bytes,
        len_bytes,
    })
}

/// Parses the data of INFO and GO: the export's name. The information requests after it are counted
/// but not needed: everything is sent.
pub fn parse_info(data: &[u8]) -> Option<&str> {
    let (len, rest) = be_u32(data)?;
    let (name, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
    let (count, rest) = be_u16(rest)?;
    let whole = rest.len() == usize::from(count) * 2 && name.len() <= MAX_NAME_BYTES;
    whole.then_some(std::str::from_utf8(name).ok()?)
}

/// Parses the data of the META_CONTEXT options: the export's name and the queries.
pub fn parse_meta(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let (len, rest) = be_u32(data)?;
    let (name, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
    let (count, mut rest) = be_u32(rest)?;
    if count as usize > rest.len() / 4 {
        return None;
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        let (len, after) = be_u32(rest)?;
        let (query, after) = after.split_at_checked(usize::try_from(len).ok()?)?;
        queries.push(std::str::from_utf8(query).ok()?);
        rest = after;
    }
    rest.is_empty()
        .then_some((std::str::from_utf8(name).ok()?, queries))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuzz_parsers() {
        bolero::check!().for_each(|input: &[u8]| {
            let _ = parse_info(input);
            let _ = parse_meta(input);
            if let Some(raw) = input.first_chunk() {
                let _ = parse_request(raw);
            }
        });
    }

    #[test]
    fn a_count_that_cannot_be_is_refused() {
        assert_eq!(parse_meta(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), None);
        assert_eq!(parse_info(&[0xff, 0xff, 0xff, 0xff, 0, 0]), None);
        assert_eq!(parse_info(&[0, 0, 0, 1, b'a', 0, 1, 0, 3]), Some("a"));
        assert_eq!(parse_info(&[0, 0, 0, 1, b'a', 0, 2, 0, 3]), None);
    }
}
