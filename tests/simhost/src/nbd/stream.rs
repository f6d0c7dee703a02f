//! A connection's socket: TCP or unix.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connected socket.
#[derive(Debug)]
pub enum Stream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a unix socket.
    Unix(UnixStream),
}

/// Does the same with either kind of socket.
macro_rules! either {
    ($stream:expr, $s:ident => $act:expr) => {
        match $stream {
            Stream::Tcp($s) => $act,
            Stream::Unix($s) => $act,
        }
    };
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, s => s.as_fd())
    }
}

impl Stream {
    /// A second handle of the same socket.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(s) => Self::Tcp(s.try_clone()?),
            Self::Unix(s) => Self::Unix(s.try_clone()?),
        })
    }

    /// Ends both directions; a thread that reads or writes wakes up.
    pub fn shutdown(&self) {
        let _ = either!(self, s => s.shutdown(Shutdown::Both));
    }

    /// Limits how long a read may wait.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        either!(self, s => s.set_read_timeout(limit))
    }

    /// Limits how long a write may wait.
    pub fn set_write_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        either!(self, s => s.set_write_timeout(limit))
    }

    /// Writes what the socket takes without waiting; `WouldBlock` if that is nothing.
    ///
    /// The switch is the whole socket's: no other thread may be about to write, and one that begins
    /// to read meanwhile may get `WouldBlock` too.
    pub fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        either!(self, s => s.set_nonblocking(true))?;
        let written = (&mut &*self).write(bytes);
        either!(self, s => s.set_nonblocking(false))?;
        written
    }

    /// Writes all of both.
    pub fn write_both(&self, mut head: &[u8], mut tail: &[u8]) -> io::Result<()> {
        while !head.is_empty() && !tail.is_empty() {
            let both = [IoSlice::new(head), IoSlice::new(tail)];
            let written = match either!(self, s => (&mut &*s).write_vectored(&both)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let of_head = written.min(head.len());
            head = head.get(of_head..).unwrap_or_default();
            tail = tail.get(written - of_head..).unwrap_or_default();
        }
        (&mut &*self).write_all(head)?;
        (&mut &*self).write_all(tail)
    }

    /// The stream with an end to all that is read and written through it.
    pub const fn until(&self, deadline: Instant) -> Timed<'_> {
        Timed {
            stream: self,
            deadline,
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        either!(self, s => (&mut &*s).read(buffer))
    }
}

impl Write for &Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        either!(self, s => (&mut &*s).write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stream on which everything must be over at a moment, however slowly the peer goes on.
#[derive(Clone, Copy, Debug)]
pub struct Timed<'a> {
    stream: &'a Stream,
    deadline: Instant,
}

/// The kernel's limit is for one piece of a write: more at once could take many times the limit.
const TIMED_PIECE_BYTES: usize = 32 * 1024;

impl Timed<'_> {
    fn late() -> io::Error {
        io::Error::new(
            io::ErrorKind::TimedOut,
            "the client took longer than it may",
        )
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(Self::late())
        } else {
            Ok(Some(left))
        }
    }

    fn named(outcome: io::Result<usize>) -> io::Result<usize> {
        outcome.map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => Self::late(),
            _ => error,
        })
    }

    /// Takes the limits off the stream.
    pub fn release(&self) -> io::Result<()> {
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        Self::named((&mut &*self.stream).read(buffer))
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        let piece = buffer.get(..TIMED_PIECE_BYTES).unwrap_or(buffer);
        Self::named((&mut &*self.stream).write(piece))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
