//! CRC32C (Castagnoli): the table version, and the choice between it and the processor's own.
//!
//! Invariant: every way of computing it gives the same value; `crc32c(crc32c(0, a), b)` equals
//! `crc32c(0, a ++ b)`.

const POLYNOMIAL: u32 = 0x82f6_3b78;

const fn byte_table() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 {
                (crc >> 1) ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            bit += 1;
        }
        tables[0][i] = crc;
        i += 1;
    }
    let mut i = 0;
    while i < 256 {
        let mut k = 1;
        while k < 8 {
            let before = tables[k - 1][i];
            tables[k][i] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            k += 1;
        }
        i += 1;
    }
    tables
}

static TABLES: [[u32; 256]; 8] = byte_table();

/// One step of the raw register (no inversion) over eight bytes.
pub(crate) fn step_u64(crc: u32, word: u64) -> u32 {
    let x = word ^ u64::from(crc);
    let at = |k: usize, shift: u32| TABLES[k][(x >> shift) as usize & 0xff];
    at(7, 0) ^ at(6, 8) ^ at(5, 16) ^ at(4, 24) ^ at(3, 32) ^ at(2, 40) ^ at(1, 48) ^ at(0, 56)
}

/// One step of the raw register (no inversion) over one byte.
pub(crate) fn step_u8(crc: u32, byte: u8) -> u32 {
    (crc >> 8) ^ TABLES[0][((crc ^ u32::from(byte)) & 0xff) as usize]
}

/// CRC32C of `bytes` by table, continuing from `seed` (0 to start).
pub fn crc32c_table(seed: u32, bytes: &[u8]) -> u32 {
    let mut crc = !seed;
    let (words, tail) = bytes.as_chunks::<8>();
    for word in words {
        crc = step_u64(crc, u64::from_le_bytes(*word));
    }
    for byte in tail {
        crc = step_u8(crc, *byte);
    }
    !crc
}

/// CRC32C of `bytes`, continuing from `seed` (0 to start), the fastest way this processor has.
pub fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    crate::lane::copy::crc32c(seed, bytes)
}

/// The table that advances a raw register over `len` zero bytes: four lookups instead of `len`
/// steps. `zero_shift(N)` is evaluated at compile time for the interleaved loops.
pub(crate) const fn zero_shift(len: usize) -> [[u32; 256]; 4] {
    // Columns of the operator: what each single bit of the register becomes after `len` zeros.
    let mut columns = [0u32; 32];
    let mut bit = 0;
    while bit < 32 {
        let mut crc = 1u32 << bit;
        let mut i = 0;
        while i < len * 8 {
            crc = if crc & 1 != 0 {
                (crc >> 1) ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            i += 1;
        }
        columns[bit] = crc;
        bit += 1;
    }
    let mut tables = [[0u32; 256]; 4];
    let mut k = 0;
    while k < 4 {
        let mut value = 0usize;
        while value < 256 {
            let mut crc = 0;
            let mut bit = 0;
            while bit < 8 {
                if value & (1 << bit) != 0 {
                    crc ^= columns[k * 8 + bit];
                }
                bit += 1;
            }
            tables[k][value] = crc;
            value += 1;
        }
        k += 1;
    }
    tables
}

/// Applies a table of [`zero_shift`].
pub(crate) fn shift(tables: &[[u32; 256]; 4], crc: u32) -> u32 {
    let at = |k: usize| tables[k][(crc >> (8 * k)) as usize & 0xff];
    at(0) ^ at(1) ^ at(2) ^ at(3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 3720 (iSCSI), appendix B.4.
    #[test]
    fn published_vectors() {
        let ascending: [u8; 32] = core::array::from_fn(|i| i as u8);
        for f in [crc32c_table, crc32c] {
            assert_eq!(f(0, &[0; 32]), 0x8a91_36aa);
            assert_eq!(f(0, &[0xff; 32]), 0x62a8_ab43);
            assert_eq!(f(0, &ascending), 0x46dd_794e);
            assert_eq!(f(0, b"123456789"), 0xe306_9283);
        }
    }

    proptest! {
        #[test]
        fn all_ways_agree(bytes in proptest::collection::vec(any::<u8>(), 0..9000), cut in 0usize..9000) {
            let expected = crc32c::crc32c(&bytes);
            prop_assert_eq!(crc32c_table(0, &bytes), expected);
            prop_assert_eq!(crc32c(0, &bytes), expected);
            let (a, b) = bytes.split_at(cut.min(bytes.len()));
            prop_assert_eq!(crc32c(crc32c(0, a), b), expected);
        }
    }
}
