//! Transmission: requests are read, checked, and handed to the engine.
//!
//! Invariant: a length from the client is checked before anything is reserved for it; what is answered
//! with an error leaves the place in the stream right.

use super::connection::Connection;
use super::engine::{self, Kind};
use super::handshake::Agreed;
use super::proto::{self, REQUEST_BYTES, RequestHeader, cflag, cmd, errno};
use std::io;
use std::sync::Arc;

/// Requests are read this much at a time.
const INPUT_BYTES: usize = 256 * 1024;
/// Extents in one answer.
const MAX_EXTENTS: usize = 1024;

/// Bytes read ahead from a client.
struct Input {
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    /// The request whose payload is being read, as it came.
    request: [u8; REQUEST_BYTES],
    /// So much of its payload was thrown away: what it was does not matter to anybody.
    skipped: usize,
    /// The payload is thrown away: no request of the engine waits for it.
    is_skipping: bool,
}

impl Input {
    fn available(&self) -> &[u8] {
        self.buffer.get(self.at..self.end).unwrap_or_default()
    }

    /// Reads until `need` bytes (at most a request's header) are there. `false`: orderly end.
    fn fill(&mut self, connection: &Connection, need: usize) -> io::Result<bool> {
        while self.end - self.at < need {
            // Nothing more is at hand: what was gathered goes out before this thread may wait.
            if !connection.flush() {
                return Ok(false);
            }
            self.buffer.copy_within(self.at..self.end, 0);
            self.end -= self.at;
            self.at = 0;
            let (ahead, free) = self.buffer.split_at_mut(self.end);
            match connection.read(free, || (ahead.to_vec(), false))? {
                0 if self.end == 0 => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.end += n,
            }
        }
        Ok(true)
    }

    /// Moves exactly `target.len()` bytes of payload: what was read ahead, then from the socket.
    fn take(&mut self, connection: &Connection, target: &mut [u8]) -> io::Result<()> {
        let mut done = self.available().len().min(target.len());
        let head = target.get_mut(..done).unwrap_or_default();
        head.copy_from_slice(self.available().get(..done).unwrap_or_default());
        self.at += done;
        if done < target.len() {
            connection.flush();
        }
        while done < target.len() {
            let (have, free) = target.split_at_mut(done);
            // All of the request so far: whoever goes on with the connection begins with it.
            let so_far = || {
                let mut ahead = self.request.to_vec();
                ahead.resize(REQUEST_BYTES + self.skipped, 0);
                ahead.extend_from_slice(have);
                (ahead, !self.is_skipping)
            };
            match connection.read(free, so_far)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    fn skip(&mut self, connection: &Connection, mut len: usize) -> io::Result<()> {
        let mut sink = [0u8; 4096];
        self.is_skipping = true;
        while len > 0 {
            let step = len.min(sink.len());
            self.take(connection, sink.get_mut(..step).unwrap_or_default())?;
            self.skipped += step;
            len -= step;
        }
        (self.skipped, self.is_skipping) = (0, false);
        Ok(())
    }
}

/// Why transmission ended.
#[derive(Debug, thiserror::Error)]
pub enum TransmissionError {
    /// The connection failed or ended within a request.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Not a request.
    #[error("request magic is wrong: the client has lost its place in the stream")]
    Magic,
    /// A payload that cannot be skipped in bounded time.
    #[error("a write of {0} bytes was announced, at most {max} are allowed", max = proto::MAX_PAYLOAD_BYTES)]
    PayloadTooLong(u32),
}

/// Serves requests until the client goes, first those that were read `ahead`.
pub fn transmit(
    connection: &Arc<Connection>,
    agreed: &Agreed,
    ahead: Vec<u8>,
) -> Result<(), TransmissionError> {
    let end = ahead.len();
    let mut buffer = ahead;
    buffer.resize(end.max(INPUT_BYTES), 0);
    let mut input = Input {
        buffer,
        at: 0,
        end,
        request: [0; REQUEST_BYTES],
        skipped: 0,
        is_skipping: false,
    };
    connection.begin();
    while input.fill(connection, REQUEST_BYTES)? {
        let Some(raw) = input.available().first_chunk::<REQUEST_BYTES>() else {
            break;
        };
        input.request = *raw;
        let header = proto::parse_request(&input.request).ok_or(TransmissionError::Magic)?;
        input.at += REQUEST_BYTES;
        if header.command == cmd::DISC {
            break;
        }
        serve(connection, agreed, &mut input, &header)?;
    }
    Ok(())
}

/// The flags that a command may carry.
fn known_flags(agreed: &Agreed, command: u16) -> u16 {
    let own = match command {
        cmd::READ if agreed.structured => cflag::DF,
        cmd::WRITE_ZEROES if agreed.fast_zero => cflag::NO_HOLE | cflag::FAST_ZERO,
        cmd::WRITE_ZEROES => cflag::NO_HOLE,
        cmd::BLOCK_STATUS => cflag::REQ_ONE,
        _ => 0,
    };
    own | cflag::FUA
}

/// Whether a request may go on; otherwise the error for the client.
fn check(agreed: &Agreed, header: &RequestHeader) -> Result<(), u32> {
    if header.flags & !known_flags(agreed, header.command) != 0 {
        return Err(errno::INVAL);
    }
    let end = header.offset_bytes.checked_add(header.len_bytes.into());
    let inside = end.is_some_and(|end| end <= agreed.engine.capacity_bytes());
    match header.command {
        cmd::FLUSH => Ok(()),
        cmd::READ if header.len_bytes > proto::MAX_PAYLOAD_BYTES => Err(errno::OVERFLOW),
        cmd::WRITE | cmd::WRITE_ZEROES if !inside => Err(errno::NOSPC),
        _ if !inside || header.len_bytes == 0 => Err(errno::INVAL),
        _ => Ok(()),
    }
}

fn serve(
    connection: &Arc<Connection>,
    agreed: &Agreed,
    input: &mut Input,
    header: &RequestHeader,
) -> Result<(), TransmissionError> {
    let write = header.command == cmd::WRITE;
    if write && header.len_bytes > proto::MAX_PAYLOAD_BYTES {
        // The payload cannot be skipped in bounded time: the client is answered and cut off.
        connection.reply_error(header.cookie, errno::OVERFLOW);
        return Err(TransmissionError::PayloadTooLong(header.len_bytes));
    }
    if let Err(error) = check(agreed, header) {
        if write {
            input.skip(connection, header.len_bytes as usize)?;
        }
        connection.reply_error(header.cookie, error);
        return Ok(());
    }
    let kind = match header.command {
        cmd::READ => Kind::Read,
        cmd::WRITE => Kind::Write,
        cmd::FLUSH => Kind::Flush,
        cmd::TRIM => Kind::Unmap,
        cmd::WRITE_ZEROES => Kind::Zero,
        cmd::BLOCK_STATUS if agreed.block_status => {
            block_status(connection, agreed, header);
            return Ok(());
        }
        cmd::CACHE => {
            connection.reply_error(header.cookie, 0);
            return Ok(());
        }
        _ => {
            connection.reply_error(header.cookie, errno::INVAL);
            return Ok(());
        }
    };
    let io = connection.take_io(header, kind);
    let mut io = io.ok_or(io::Error::from(io::ErrorKind::BrokenPipe))?;
    if kind == Kind::Flush {
        (io.offset_bytes, io.len_bytes) = (0, 0);
    }
    if write {
        input.take(connection, io.data_mut())?;
    }
    agreed.engine.submit(io);
    Ok(())
}

fn block_status(connection: &Arc<Connection>, agreed: &Agreed, header: &RequestHeader) {
    let one = header.flags & cflag::REQ_ONE != 0;
    let limit = if one { 1 } else { MAX_EXTENTS };
    let len = u64::from(header.len_bytes);
    match agreed.engine.extents(header.offset_bytes, len, limit) {
        Ok(extents) => connection.reply_extents(header.cookie, &extents),
        Err(error) => {
            tracing::warn!("{error}");
            connection.reply_error(header.cookie, engine::wire_error(&error));
        }
    }
}
