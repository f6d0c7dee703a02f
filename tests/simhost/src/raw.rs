//! Calls of the operating system that the standard library does not offer: descriptors that go along
//! with a message, a wait for two of them, a thread that is called out of a read, a socket that listens again.
//!
//! Invariant: descriptors are owned or borrowed as their types say; a buffer is never longer than what it
//! points to.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::time::Duration;

/// Room for one descriptor in a message, aligned as its header must be.
#[repr(C, align(8))]
struct Ancillary([u8; 32]);

fn message(iov: &mut libc::iovec, ancillary: &mut Ancillary) -> libc::msghdr {
    // SAFETY: plain numbers and pointers, for which zeros are valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message.msg_control = ancillary.0.as_mut_ptr().cast();
    // SAFETY: a computation.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;
    message
}

/// Sends one byte, and a descriptor with it.
pub fn send_fd(to: &UnixStream, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = [b'd'];
    let mut iov = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let mut ancillary = Ancillary([0; 32]);
    let message = message(&mut iov, &mut ancillary);
    // SAFETY: the message's buffers live here, and have room for a header and one descriptor.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        libc::CMSG_DATA(header)
            .cast::<RawFd>()
            .write_unaligned(fd.as_raw_fd());
    }
    loop {
        // SAFETY: a plain call; the message and all that it points to live here.
        let sent = unsafe { libc::sendmsg(to.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        match io::Error::last_os_error() {
            _ if sent == 1 => return Ok(()),
            error if sent < 0 && error.kind() == io::ErrorKind::Interrupted => {}
            error => return Err(error),
        }
    }
}

/// Takes the byte and the descriptor that came with it.
pub fn receive_fd(from: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0u8];
    let mut iov = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let mut ancillary = Ancillary([0; 32]);
    let mut message = message(&mut iov, &mut ancillary);
    let received = loop {
        // SAFETY: a plain call; the message and all that it points to live here.
        let received =
            unsafe { libc::recvmsg(from.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        let error = io::Error::last_os_error();
        if received >= 0 || error.kind() != io::ErrorKind::Interrupted {
            break if received < 0 {
                Err(error)
            } else {
                Ok(received)
            };
        }
    }?;
    // SAFETY: the kernel has filled the message; the header lies in our buffer or is NULL.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message).as_ref() };
    let header = header.filter(|h| h.cmsg_type == libc::SCM_RIGHTS && received == 1);
    let Some(header) = header else {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "no descriptor came",
        ));
    };
    // SAFETY: of this type, so one descriptor follows, and it is ours from now on.
    unsafe {
        let fd = libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned();
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Waits until one of two can be read (or has failed): which.
pub fn wait_for_either(
    one: BorrowedFd<'_>,
    two: BorrowedFd<'_>,
    limit: Option<Duration>,
) -> io::Result<(bool, bool)> {
    let mut both = [one, two].map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    let limit_ms = limit.map_or(-1, |limit| limit.as_millis().min(i32::MAX as u128) as i32);
    loop {
        // SAFETY: a plain call with a list of two.
        let found = unsafe { libc::poll(both.as_mut_ptr(), 2, limit_ms) };
        let error = io::Error::last_os_error();
        if found >= 0 {
            let [one, two] = both.map(|fd| fd.revents != 0);
            return Ok((one, two));
        }
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// A socket that was shut down listens again, on the address that it has kept.
pub fn listen_again(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a plain call.
    match unsafe { libc::listen(socket.as_raw_fd(), 128) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A thread that can be called out of a read. Must not be used when the thread has ended.
#[derive(Clone, Copy, Debug)]
pub struct Thread(libc::pthread_t);

extern "C" fn nothing(_signal: libc::c_int) {}

impl Thread {
    /// This thread.
    pub fn current() -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: a handler that does nothing; without SA_RESTART, so that calls return.
            unsafe {
                let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
                action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
                libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
            }
        });
        // SAFETY: a plain call.
        Self(unsafe { libc::pthread_self() })
    }

    /// Ends a call that it waits in: that returns `Interrupted`.
    ///
    /// # Safety
    /// The thread must not have ended.
    pub unsafe fn interrupt(self) {
        // SAFETY: the caller's promise.
        unsafe { libc::pthread_kill(self.0, libc::SIGUSR1) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_goes_along_with_a_message() {
        let (one, two) = UnixStream::pair().unwrap();
        let (mut sent, mut kept) = UnixStream::pair().unwrap();
        send_fd(&one, sent.as_fd()).unwrap();
        let mut received = UnixStream::from(receive_fd(&two).unwrap());
        kept.write_all(b"for both").unwrap();
        let mut buffer = [0; 4];
        received.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"for ");
        sent.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"both");
        (&one).write_all(b"x").unwrap();
        assert!(receive_fd(&two).is_err(), "a byte without one");
        drop(one);
        assert!(receive_fd(&two).is_err(), "the end");
    }
}
