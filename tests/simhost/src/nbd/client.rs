//! A small NBD client: for tests, and for a demo where no other is installed.
//!
//! Invariant: the server is checked as strictly as the server checks its clients: magics, cookies
//! and lengths are looked at before they are used.

use super::proto::{self, cflag, chunk, cmd, info, opt, rep};
use super::stream::Stream;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

fn bad(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// A request that can be in flight with others.
#[derive(Debug)]
pub enum Op<'a> {
    /// Read `len_bytes` at `offset_bytes`; the data comes with the result.
    Read(u64, u32),
    /// Write.
    Write(u64, &'a [u8]),
    /// Write zeros.
    Zero(u64, u32),
    /// Discard.
    Trim(u64, u32),
    /// Flush.
    Flush,
}

/// A completed request.
#[derive(Debug)]
pub struct Done {
    /// The number that `submit` returned.
    pub cookie: u64,
    /// 0, or the server's error number.
    pub error: u32,
    /// The data of a read.
    pub data: Vec<u8>,
    /// From submit to the reply, in ns.
    pub latency_ns: u64,
}

/// A connection in transmission.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    capacity_bytes: u64,
    next_cookie: u64,
    in_flight: HashMap<u64, (Instant, u32)>,
}

impl Client {
    /// Connects to an export over a unix socket.
    pub fn connect_unix(path: &Path, export: &str) -> io::Result<Self> {
        Self::shake(Stream::Unix(UnixStream::connect(path)?), export)
    }

    /// Connects to an export over TCP.
    pub fn connect_tcp(address: &str, export: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Self::shake(Stream::Tcp(stream), export)
    }

    fn shake(stream: Stream, export: &str) -> io::Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut client = Self {
            stream,
            capacity_bytes: 0,
            next_cookie: 1,
            in_flight: HashMap::new(),
        };
        let hello: [u8; 18] = client.read()?;
        if hello.get(..8) != Some(&proto::INIT_MAGIC.to_be_bytes()) {
            return Err(bad("not an NBD server"));
        }
        let flags = u32::from(proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES);
        client.send(&flags.to_be_bytes())?;
        client.option(opt::STRUCTURED_REPLY, &[])?;
        if client.option_reply(opt::STRUCTURED_REPLY)?.0 != rep::ACK {
            return Err(bad("the server has no structured replies"));
        }
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&0u16.to_be_bytes());
        client.option(opt::GO, &data)?;
        loop {
            let (kind, data) = client.option_reply(opt::GO)?;
            match kind {
                rep::ACK => break,
                rep::INFO => {
                    if let Some((info::EXPORT, rest)) = proto::be_u16(&data)
                        && let Some((capacity, _)) = proto::be_u64(rest)
                    {
                        client.capacity_bytes = capacity;
                    }
                }
                _ => return Err(bad(format!("refused: {}", String::from_utf8_lossy(&data)))),
            }
        }
        Ok(client)
    }

    /// Capacity of the export, in bytes.
    pub const fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        (&mut &self.stream).write_all(bytes)
    }

    fn read<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut raw = [0u8; N];
        (&mut &self.stream).read_exact(&mut raw)?;
        Ok(raw)
    }

    fn option(&self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut out = proto::OPT_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        self.send(&out)
    }

    fn option_reply(&self, option: u32) -> io::Result<(u32, Vec<u8>)> {
        let magic = u64::from_be_bytes(self.read()?);
        let about = u32::from_be_bytes(self.read()?);
        let kind = u32::from_be_bytes(self.read()?);
        let len = u32::from_be_bytes(self.read()?);
        if magic != proto::OPT_REPLY_MAGIC || about != option || len > proto::MAX_OPTION_BYTES {
            return Err(bad("malformed reply to an option"));
        }
        let mut data = vec![0; len as usize];
        (&mut &self.stream).read_exact(&mut data)?;
        Ok((kind, data))
    }

    /// Sends a request without waiting for its reply.
    pub fn submit(&mut self, op: &Op<'_>, fua: bool) -> io::Result<u64> {
        let (command, offset, len, data): (u16, u64, u32, &[u8]) = match *op {
            Op::Read(offset, len) => (cmd::READ, offset, len, &[]),
            Op::Write(offset, data) => (cmd::WRITE, offset, data.len() as u32, data),
            Op::Zero(offset, len) => (cmd::WRITE_ZEROES, offset, len, &[]),
            Op::Trim(offset, len) => (cmd::TRIM, offset, len, &[]),
            Op::Flush => (cmd::FLUSH, 0, 0, &[]),
        };
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut out = Vec::with_capacity(proto::REQUEST_BYTES + data.len());
        out.extend_from_slice(&proto::REQUEST_MAGIC.to_be_bytes());
        out.extend_from_slice(&(if fua { cflag::FUA } else { 0 }).to_be_bytes());
        out.extend_from_slice(&command.to_be_bytes());
        out.extend_from_slice(&cookie.to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(data);
        let expected = if command == cmd::READ { len } else { 0 };
        self.in_flight.insert(cookie, (Instant::now(), expected));
        self.send(&out)?;
        Ok(cookie)
    }

    /// Requests whose reply has not come.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Waits for the next completed request.
    pub fn next_done(&mut self) -> io::Result<Done> {
        let magic = u32::from_be_bytes(self.read()?);
        if magic != proto::STRUCTURED_REPLY_MAGIC {
            return Err(bad("malformed reply"));
        }
        let flags = u16::from_be_bytes(self.read()?);
        let kind = u16::from_be_bytes(self.read()?);
        let cookie = u64::from_be_bytes(self.read()?);
        let len = u32::from_be_bytes(self.read()?);
        let Some((since, expected)) = self.in_flight.remove(&cookie) else {
            return Err(bad(format!("a reply to nothing: cookie {cookie}")));
        };
        if flags & chunk::DONE == 0 || len > expected.max(4096) + 8 {
            return Err(bad("an unexpected kind of reply"));
        }
        let mut body = vec![0; len as usize];
        (&mut &self.stream).read_exact(&mut body)?;
        let latency_ns = since.elapsed().as_nanos() as u64;
        let (error, data) = match kind {
            chunk::NONE => (0, Vec::new()),
            chunk::OFFSET_DATA if len == expected + 8 => (0, body.split_off(8)),
            chunk::ERROR => (
                proto::be_u32(&body).map_or(5, |(error, _)| error),
                Vec::new(),
            ),
            _ => return Err(bad("an unexpected kind of reply")),
        };
        Ok(Done {
            cookie,
            error,
            data,
            latency_ns,
        })
    }

    /// Sends a request and waits for its reply; nothing else may be in flight.
    pub fn call(&mut self, op: &Op<'_>, fua: bool) -> io::Result<Vec<u8>> {
        self.submit(op, fua)?;
        let done = self.next_done()?;
        match done.error {
            0 => Ok(done.data),
            error => Err(io::Error::from_raw_os_error(error as i32)),
        }
    }

    /// Says good-bye.
    pub fn disconnect(self) {
        let mut out = proto::REQUEST_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&cmd::DISC.to_be_bytes());
        out.extend_from_slice(&[0; 20]);
        let _ = self.send(&out);
        self.stream.shutdown();
    }
}
