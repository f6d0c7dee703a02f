//! CRC32C with the processor's instruction, and the copy into the ring that computes it on the way.
//!
//! Invariant: each byte of the source is loaded exactly once, and the byte that is stored is the
//! byte that was summed. A guest may change its buffer while an I/O is in flight; a copy followed by
//! a second read for the CRC would then publish a record whose payload fails its check.
//!
//! Three independent streams keep the instruction's latency hidden; their registers are joined with
//! `crc::zero_shift` tables.

use crate::crc;

/// Bytes of one of the three streams of the long loop: 3 x 1344 + 64 = 4096.
const LONG: usize = 1344;
/// Bytes of one of the three streams of the short loop.
const SHORT: usize = 128;
static SHIFT_LONG: [[u32; 256]; 4] = crc::zero_shift(LONG);
static SHIFT_SHORT: [[u32; 256]; 4] = crc::zero_shift(SHORT);

/// CRC32C of `bytes`, continuing from `seed`.
pub fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    // SAFETY: the slice is readable for its length; nothing is written.
    unsafe { run::<false>(seed, bytes.as_ptr(), core::ptr::null_mut(), bytes.len()) }
}

/// Copies `len` bytes from `source` to `target` and returns the CRC32C of what was copied,
/// continuing from `seed`. Both may be memory that somebody else changes meanwhile.
///
/// # Safety
/// `source` must be readable and `target` writable for `len` bytes, and they must not overlap.
pub unsafe fn copy_crc32c(seed: u32, source: *const u8, target: *mut u8, len: usize) -> u32 {
    // SAFETY: the caller's promise, passed on.
    unsafe { run::<true>(seed, source, target, len) }
}

/// # Safety
/// `source` readable for `len`; if `COPY`, `target` writable for `len`, without overlap.
unsafe fn run<const COPY: bool>(seed: u32, source: *const u8, target: *mut u8, len: usize) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if has_sse42() {
        // SAFETY: SSE4.2 was just found on this processor; the pointers are the caller's promise.
        return !unsafe { x86::run::<COPY>(!seed, source, target, len) };
    }
    // SAFETY: the caller's promise, passed on.
    !unsafe { tail::<COPY>(!seed, source, target, len, crc::step_u64) }
}

/// The plain loop over what is left: words, then bytes.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn tail<const COPY: bool>(
    mut crc: u32,
    source: *const u8,
    target: *mut u8,
    len: usize,
    step: impl Fn(u32, u64) -> u32,
) -> u32 {
    let mut at = 0;
    while at + 8 <= len {
        // SAFETY: at + 8 <= len, which the caller promised readable (and writable).
        let word = unsafe { move_word::<COPY>(source, target, at) };
        crc = step(crc, word);
        at += 8;
    }
    while at < len {
        // SAFETY: at < len.
        let byte = unsafe { source.add(at).read_volatile() };
        if COPY {
            // SAFETY: at < len, and the caller promised the target.
            unsafe { target.add(at).write(byte) };
        }
        crc = crc::step_u8(crc, byte);
        at += 1;
    }
    crc
}

/// Loads one word once, stores it if `COPY`, returns it.
///
/// # Safety
/// `at + 8` bytes of both must be accessible.
#[inline(always)]
unsafe fn move_word<const COPY: bool>(source: *const u8, target: *mut u8, at: usize) -> u64 {
    // SAFETY: the caller's promise. Volatile over an unaligned word type: one load of eight bytes,
    // never repeated, so what is summed is what is stored.
    let word = unsafe { source.add(at).cast::<Unaligned>().read_volatile().0 };
    if COPY {
        // SAFETY: the caller's promise.
        unsafe { target.add(at).cast::<u64>().write_unaligned(word) };
    }
    u64::from_le(word)
}

/// A word that may lie at any address.
#[repr(C, packed)]
struct Unaligned(u64);

#[cfg(target_arch = "x86_64")]
fn has_sse42() -> bool {
    use core::sync::atomic::{AtomicU8, Ordering};
    static FOUND: AtomicU8 = AtomicU8::new(0); // 0 unknown, 1 absent, 2 present
    // Relaxed: the answer is the same whoever computes it, nothing else hangs on it.
    match FOUND.load(Ordering::Relaxed) {
        0 => {
            let present = !cfg!(miri) && core::arch::x86_64::__cpuid(1).ecx & (1 << 20) != 0;
            FOUND.store(1 + u8::from(present), Ordering::Relaxed); // Relaxed: see above
            present
        }
        found => found == 2,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LONG, SHIFT_LONG, SHIFT_SHORT, SHORT, move_word, tail};
    use crate::crc;
    use core::arch::x86_64::_mm_crc32_u64;

    /// # Safety
    /// SSE4.2 must be present; otherwise as for `super::run`.
    #[target_feature(enable = "sse4.2")]
    pub unsafe fn run<const COPY: bool>(
        mut crc: u32,
        mut source: *const u8,
        mut target: *mut u8,
        mut len: usize,
    ) -> u32 {
        while len >= 3 * LONG {
            // SAFETY: three streams of LONG bytes are left.
            crc = unsafe { three::<COPY, LONG>(crc, source, target, &SHIFT_LONG) };
            // SAFETY: stays within the buffers, by the loop's condition.
            source = unsafe { source.add(3 * LONG) };
            target = target.wrapping_add(3 * LONG);
            len -= 3 * LONG;
        }
        while len >= 3 * SHORT {
            // SAFETY: three streams of SHORT bytes are left.
            crc = unsafe { three::<COPY, SHORT>(crc, source, target, &SHIFT_SHORT) };
            // SAFETY: stays within the buffers, by the loop's condition.
            source = unsafe { source.add(3 * SHORT) };
            target = target.wrapping_add(3 * SHORT);
            len -= 3 * SHORT;
        }
        // SAFETY: `len` bytes are left.
        unsafe { tail::<COPY>(crc, source, target, len, |c, w| step(c, w)) }
    }

    #[target_feature(enable = "sse4.2")]
    fn step(crc: u32, word: u64) -> u32 {
        _mm_crc32_u64(u64::from(crc), word) as u32
    }

    /// # Safety
    /// `3 * N` bytes of both must be accessible.
    #[target_feature(enable = "sse4.2")]
    #[inline]
    unsafe fn three<const COPY: bool, const N: usize>(
        crc: u32,
        source: *const u8,
        target: *mut u8,
        shift: &[[u32; 256]; 4],
    ) -> u32 {
        let (mut a, mut b, mut c) = (u64::from(crc), 0u64, 0u64);
        let mut at = 0;
        while at < N {
            // SAFETY: at + 8 <= N in each of the three streams.
            unsafe {
                a = _mm_crc32_u64(a, move_word::<COPY>(source, target, at));
                b = _mm_crc32_u64(b, move_word::<COPY>(source, target, at + N));
                c = _mm_crc32_u64(c, move_word::<COPY>(source, target, at + 2 * N));
            }
            at += 8;
        }
        let joined = crc::shift(shift, a as u32) ^ b as u32;
        crc::shift(shift, joined) ^ c as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn copies_and_sums_the_same_bytes(
            bytes in proptest::collection::vec(any::<u8>(), 0..9000),
            skew in 0usize..8,
        ) {
            let source = &bytes[skew.min(bytes.len())..];
            let mut target = alloc::vec![0u8; source.len()];
            // SAFETY: two separate buffers of the same length.
            let crc = unsafe {
                copy_crc32c(0, source.as_ptr(), target.as_mut_ptr(), source.len())
            };
            prop_assert_eq!(crc, crc::crc32c_table(0, source));
            prop_assert_eq!(&target[..], source);
        }
    }
}
