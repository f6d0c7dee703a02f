//! The plain calls that the standard library does not offer: poll, and what reads from the ring.
//!
//! Invariant: the ring's memory is handed to the kernel or copied raw, never read through a Rust reference;
//! it stays mapped and unreleased for as long as a frame of it is being sent.

use filter_core::lane::consumer::Run;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// What one descriptor is waited for, and what came.
#[derive(Clone, Copy, Debug)]
pub struct Interest {
    /// The descriptor.
    pub fd: RawFd,
    /// It is to be written, not only read.
    pub write: bool,
}

/// Waits until one is ready or the time is up.
pub fn poll(interests: &[Interest], limit: Duration) -> io::Result<()> {
    let mut fds: Vec<libc::pollfd> = interests
        .iter()
        .map(|interest| libc::pollfd {
            fd: interest.fd,
            events: libc::POLLIN | if interest.write { libc::POLLOUT } else { 0 },
            revents: 0,
        })
        .collect();
    let timeout_ms = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the array lives for the length of the call and its length is given.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted {
            Ok(())
        } else {
            Err(error)
        };
    }
    Ok(())
}

/// Sends what is left of a frame: its header, then the run's bytes straight from the ring. `sent` is
/// how much of both together has gone; returns how much went now.
pub fn send_frame(
    socket: &impl AsRawFd,
    header: &[u8],
    run: &Run,
    sent: usize,
) -> io::Result<usize> {
    let head = header.get(sent.min(header.len())..).unwrap_or_default();
    let from = sent.saturating_sub(header.len()).min(run.len_bytes);
    let iov = [
        libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        },
        libc::iovec {
            iov_base: run.base.wrapping_add(from).cast_mut().cast(),
            iov_len: run.len_bytes - from,
        },
    ];
    // SAFETY: a plain struct of pointers and numbers, for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_ptr().cast_mut();
    message.msg_iovlen = 2;
    // SAFETY: the header lives for the length of the call; the run lies in the lane's mapping, which
    // its owner keeps until the frame is gone. The kernel reads both and writes neither.
    let gone = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(gone).map_err(|_| io::Error::last_os_error())
}

/// Copies what is left of a frame, at most `max_bytes` of it, out of the ring: `out` holds it then.
pub fn copy_frame(header: &[u8], run: &Run, sent: usize, max_bytes: usize, out: &mut Vec<u8>) {
    out.clear();
    let head = header.get(sent.min(header.len())..).unwrap_or_default();
    let head = head.get(..max_bytes.min(head.len())).unwrap_or_default();
    out.extend_from_slice(head);
    let from = sent.saturating_sub(header.len()).min(run.len_bytes);
    let len = (run.len_bytes - from).min(max_bytes - head.len());
    out.reserve(len);
    // SAFETY: `from + len` lies within the run, which lies in the lane's mapping; its owner keeps that
    // until the frame is gone. `out` has room for `len` more bytes, all of which are written before its
    // length says so. Should the other process change them meanwhile, some of either go: their CRC tells.
    unsafe {
        let target = out.as_mut_ptr().add(out.len());
        std::ptr::copy_nonoverlapping(run.base.add(from), target, len);
        out.set_len(out.len() + len);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_frame_is_copied_whole_wherever_it_is_cut() {
        let header: Vec<u8> = (0..32).collect();
        let body: Vec<u8> = (0..1000u32).map(|at| (at % 251) as u8).collect();
        let run = Run {
            base: body.as_ptr(),
            len_bytes: body.len(),
            first_seq: 1,
            last_seq: 1,
            time_ns: 0,
            marker: None,
        };
        let whole: Vec<u8> = header.iter().chain(&body).copied().collect();
        let mut out = Vec::new();
        for step in [1, 7, 31, 32, 33, 500, 1032, 5000] {
            let mut all = Vec::new();
            loop {
                copy_frame(&header, &run, all.len(), step, &mut out);
                assert!(out.len() <= step);
                if out.is_empty() {
                    break;
                }
                all.extend_from_slice(&out);
            }
            assert_eq!(all, whole, "{step}");
        }
    }
}
