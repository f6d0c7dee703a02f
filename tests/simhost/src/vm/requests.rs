//! The filter's own I/O: below itself, straight to the disk.
//!
//! Invariant: `done` is called exactly once for each request that was taken, never from inside submit.

use super::hostdisk::{BLOCK_BYTES, HostDisk};
use crate::abi;
use crate::contract::ledger;
use crate::disk::{DiskError, Storage};
use std::sync::atomic::Ordering;

const OK: i32 = abi::JIO_OK;

/// A request on its way to a thread of the host.
struct Request(*mut abi::jio_request);
// SAFETY: the contract: a submitted request is the host's until `done` is called.
unsafe impl Send for Request {}

/// The service. See the contract.
pub unsafe extern "C" fn submit(disk: *mut abi::jio_disk, request: *mut abi::jio_request) -> i32 {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::arc_of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    // SAFETY: the contract: NULL or a request.
    let Some(r) = (unsafe { request.as_ref() }) else {
        return abi::JIO_E_INVALID;
    };
    if !disk.open.load(Ordering::Acquire) {
        disk.violated("submit on a closed disk");
        return abi::JIO_E_CLOSED;
    }
    if !is_well_formed(r) {
        disk.violated("submit of a malformed request");
        return abi::JIO_E_INVALID;
    }
    let end = r.offset_bytes.checked_add(r.len_bytes);
    if end.is_none_or(|end| end > disk.disk.capacity_bytes()) || r.len_bytes > longest(r.kind) {
        return abi::JIO_E_RANGE;
    }
    disk.ledger.taken(ledger::Kind::Request);
    let request = Request(request);
    let of = disk.clone();
    disk.tasks.run_io(Box::new(move || {
        let request = request;
        // SAFETY: submitted, so the request and its buffers live until `done` is called.
        unsafe { run_request(&of, request.0) };
    }));
    OK
}

/// The longest request of a kind: what carries no data may cover the whole disk.
fn longest(kind: u32) -> u64 {
    match kind {
        abi::JIO_IO_READ | abi::JIO_IO_WRITE => abi::JIO_IO_LEN_MAX.into(),
        _ => u64::MAX,
    }
}

/// A request without data.
fn run_plain(
    disk: &impl Storage,
    kind: u32,
    flags: u32,
    at: u64,
    len: u64,
) -> Result<(), DiskError> {
    match kind {
        abi::JIO_IO_ZERO => disk.write_zeroes(at, len, flags & abi::JIO_IO_MAY_UNMAP != 0),
        abi::JIO_IO_UNMAP => disk.write_zeroes(at, len, true),
        _ => disk.flush(),
    }
}

/// The buffers of a request. Empty if it has none.
fn buffers(r: &abi::jio_request) -> &[abi::jio_iovec] {
    if r.iov.is_null() || r.iov_count == 0 {
        return &[];
    }
    // SAFETY: the contract: `iov_count` buffers lie there until `done`.
    unsafe { std::slice::from_raw_parts(r.iov, r.iov_count as usize) }
}

fn is_well_formed(r: &abi::jio_request) -> bool {
    let known = std::mem::offset_of!(abi::jio_request, reserved);
    if (r.size as usize) < known || r.done.is_none() || r.iov_count > abi::JIO_IOV_MAX {
        return false;
    }
    let sum = || {
        buffers(r)
            .iter()
            .try_fold(0u64, |sum, iov| match iov.base.is_null() {
                true => None,
                false => sum.checked_add(iov.len_bytes),
            })
    };
    let aligned = (r.offset_bytes | r.len_bytes).is_multiple_of(BLOCK_BYTES);
    match r.kind {
        abi::JIO_IO_READ | abi::JIO_IO_WRITE => {
            aligned && r.len_bytes > 0 && sum() == Some(r.len_bytes)
        }
        abi::JIO_IO_ZERO | abi::JIO_IO_UNMAP => aligned && r.len_bytes > 0,
        abi::JIO_IO_FLUSH => true,
        _ => false,
    }
}

/// Carries a request out.
///
/// # Safety
/// `request` must be submitted and not yet done.
unsafe fn run_request(disk: &HostDisk, request: *mut abi::jio_request) {
    // SAFETY: the caller's promise.
    let r = unsafe { &*request };
    let outcome = match r.kind {
        abi::JIO_IO_READ | abi::JIO_IO_WRITE => {
            let mut at = r.offset_bytes;
            buffers(r).iter().try_for_each(|iov| {
                let (base, len) = (iov.base.cast::<u8>(), iov.len_bytes as usize);
                // SAFETY: the contract: the buffer is the filter's, of `len_bytes`, until `done`.
                let data = unsafe { std::slice::from_raw_parts_mut(base, len) };
                let from = at;
                at += iov.len_bytes;
                match r.kind {
                    abi::JIO_IO_READ => disk.disk.read_at(data, from),
                    _ => disk.disk.write_at(data, from),
                }
            })
        }
        kind => run_plain(&disk.disk, kind, r.flags, r.offset_bytes, r.len_bytes),
    };
    let outcome = outcome.and_then(|()| match r.flags & abi::JIO_IO_FUA {
        0 => Ok(()),
        _ => disk.disk.flush(),
    });
    let status = match outcome {
        Ok(()) => OK,
        Err(error) => {
            tracing::warn!("disk {}: the filter's own I/O: {error}", disk.setup.label);
            abi::JIO_E_IO
        }
    };
    let (done, userdata) = (r.done, r.userdata);
    disk.ledger.run(ledger::Kind::Request, || {
        if let Some(done) = done {
            // SAFETY: called once, as the contract says; the request is not touched afterwards.
            unsafe { done(userdata, request, status) };
        }
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::disk::Format;

    #[test]
    fn a_request_without_data_may_be_longer_than_4_gib() {
        let dir = tempfile::tempdir().unwrap();
        let len = (4 << 30) + 8192;
        let path = dir.path().join("d.raw");
        crate::disk::create(&path, Format::Raw, len + 8192).unwrap();
        let disk = crate::disk::open(&path, None).unwrap();
        for kind in [abi::JIO_IO_ZERO, abi::JIO_IO_UNMAP] {
            assert!(longest(kind) >= len);
            for at in [4096, 8192, len - 4096, len] {
                disk.write_at(&[7; 4096], at).unwrap();
            }
            run_plain(&disk, kind, abi::JIO_IO_MAY_UNMAP, 4096, len - 4096).unwrap();
            let mut buffer = [1; 4096];
            for at in [4096, 8192, len - 4096] {
                disk.read_at(&mut buffer, at).unwrap();
                assert!(buffer.iter().all(|b| *b == 0), "kind {kind}, byte {at}");
            }
            disk.read_at(&mut buffer, len).unwrap();
            assert_eq!(buffer, [7; 4096], "kind {kind}: what lies behind");
        }
    }
}
