//! An NBD client by hand: says anything, in any order, and reads what comes back.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

pub const OPT_MAGIC: &[u8; 8] = b"IHAVEOPT";
pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED: u32 = 8;
pub const OPT_SET_META: u32 = 10;
pub const REP_ACK: u32 = 1;
pub const REP_INFO: u32 = 3;
pub const ERR_UNSUP: u32 = 0x8000_0001;
pub const ERR_INVALID: u32 = 0x8000_0003;
pub const ERR_UNKNOWN: u32 = 0x8000_0006;
pub const ERR_TOO_BIG: u32 = 0x8000_0009;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const ZERO: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;

pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EOVERFLOW: u32 = 75;
pub const ENOTSUP: u32 = 95;

pub trait Socket: Read + Write + Send {}
impl Socket for UnixStream {}
impl Socket for TcpStream {}
impl Socket for Box<dyn Socket> {}

/// A connection on which nothing is taken for granted.
pub struct Raw {
    pub stream: Box<dyn Socket>,
    pub structured: bool,
}

impl Raw {
    /// The server has said hello, the client nothing.
    pub fn greeted(stream: impl Socket + 'static) -> Self {
        let mut raw = Self {
            stream: Box::new(stream),
            structured: false,
        };
        let hello = raw.take(18);
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(hello[17] & 3, 3, "fixed newstyle, no zeroes");
        raw
    }

    /// Options may follow.
    pub fn haggling(stream: impl Socket + 'static) -> Self {
        let mut raw = Self::greeted(stream);
        raw.send(&3u32.to_be_bytes());
        raw
    }

    /// In transmission, with simple replies or structured ones.
    pub fn transmitting(stream: impl Socket + 'static, structured: bool) -> Self {
        let mut raw = Self::haggling(stream);
        if structured {
            raw.option(OPT_STRUCTURED, &[]);
            assert_eq!(raw.option_reply().1, REP_ACK);
            raw.structured = true;
        }
        raw.option(OPT_GO, &go("disk"));
        while raw.option_reply().1 != REP_ACK {}
        raw
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut all = vec![0; len];
        self.stream.read_exact(&mut all).unwrap();
        all
    }

    pub fn number<const N: usize>(&mut self) -> u64 {
        let raw = self.take(N);
        raw.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    }

    /// The server hangs up, and says nothing more before.
    pub fn assert_ended(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("not ended: {error}"),
        }
        assert!(rest.is_empty(), "said before the end: {rest:?}");
    }

    pub fn option_head(&mut self, option: u32, len: u32) {
        let mut out = OPT_MAGIC.to_vec();
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        self.send(&out);
    }

    pub fn option(&mut self, option: u32, data: &[u8]) {
        self.option_head(option, data.len() as u32);
        self.send(data);
    }

    /// The option, the kind and the data of a reply.
    pub fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        assert_eq!(self.number::<8>(), 0x0003_e889_0455_65a9);
        let option = self.number::<4>() as u32;
        let kind = self.number::<4>() as u32;
        let len = self.number::<4>() as usize;
        (option, kind, self.take(len))
    }

    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.send(&request(command, flags, cookie, offset, len));
    }

    /// The cookie, the error and the data (of a read of `len`) of a reply.
    pub fn reply(&mut self, len: usize) -> (u64, u32, Vec<u8>) {
        if !self.structured {
            assert_eq!(self.number::<4>(), 0x6744_6698);
            let error = self.number::<4>() as u32;
            let cookie = self.number::<8>();
            let len = if error == 0 { len } else { 0 };
            return (cookie, error, self.take(len));
        }
        assert_eq!(self.number::<4>(), 0x668e_33ef);
        assert_eq!(self.number::<2>(), 1, "one chunk is all");
        let kind = self.number::<2>();
        let cookie = self.number::<8>();
        let got = self.number::<4>() as usize;
        let body = self.take(got);
        match kind {
            0 => (cookie, 0, body),
            1 => (cookie, 0, body[8..].to_vec()),
            0x8001 => {
                let error = u32::from_be_bytes(body[..4].try_into().unwrap());
                let text = u16::from_be_bytes(body[4..6].try_into().unwrap());
                assert_eq!(body.len(), 6 + usize::from(text));
                (cookie, error, Vec::new())
            }
            _ => (cookie, 0, body),
        }
    }

    /// A request without payload, and the error of its reply; the place in the stream is right after.
    pub fn error_of(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> u32 {
        self.request(command, flags, 77, offset, len);
        let data = if command == READ { len } else { 0 };
        let (cookie, error, _) = self.reply(data as usize);
        assert_eq!(cookie, 77);
        error
    }
}

/// A request's header.
pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out
}

/// The data of GO.
pub fn go(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&[0, 0]);
    data
}
