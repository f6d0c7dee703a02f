//! Gzip: written with nothing in it that a machine could change, read with a limit on what comes out.
//!
//! Invariant: the same bytes in give the same bytes out, on every machine: the compressor is one
//! without machine-dependent paths, and the header has no name and no time. A reader hands out no
//! more than its allowance, and takes one member that ends where the file ends.

use crate::finding::Rule;
use crate::limits::Limits;
use flate2::bufread::GzDecoder;
use std::io::{self, Read};

/// Deflate's best; packages are built seldom and carried often.
const LEVEL: u8 = 9;
/// Below that a payload may shrink as well as it likes.
const RATIO_FLOOR_BYTES: u64 = 1 << 20;

/// Compresses `bytes`.
pub(crate) fn write(bytes: &[u8]) -> Vec<u8> {
    // Deflate; no flags, no time; best compression; made on Unix.
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 3];
    out.extend_from_slice(&miniz_oxide::deflate::compress_to_vec(bytes, LEVEL));
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    out.extend_from_slice(&crc.sum().to_le_bytes());
    // Gzip keeps the length modulo 2^32.
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out
}

/// Reads one gzip member out of `packed`, which must end with it.
pub(crate) struct Reader<'a> {
    inner: GzDecoder<&'a [u8]>,
    packed_bytes: u64,
    unpacked_bytes: u64,
    /// What may still come out of all payloads of the package.
    left_bytes: u64,
    ratio: u64,
    broken: Option<(Rule, String)>,
    ended: bool,
}

impl<'a> Reader<'a> {
    /// `left_bytes`: how much may come out.
    pub(crate) fn new(packed: &'a [u8], left_bytes: u64, limits: &Limits) -> Reader<'a> {
        Reader {
            inner: GzDecoder::new(packed),
            packed_bytes: packed.len() as u64,
            unpacked_bytes: 0,
            left_bytes,
            ratio: limits.ratio,
            broken: None,
            ended: false,
        }
    }

    fn fail(&mut self, rule: Rule, problem: String) -> io::Error {
        self.broken = Some((rule, problem.clone()));
        io::Error::new(io::ErrorKind::InvalidData, problem)
    }

    /// Why a read failed, if one did.
    pub(crate) fn broken(&self) -> Option<(Rule, String)> {
        self.broken.clone()
    }

    /// How much came out so far.
    pub(crate) fn unpacked_bytes(&self) -> u64 {
        self.unpacked_bytes
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some((_, problem)) = &self.broken {
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem.clone()));
        }
        if self.ended || into.is_empty() {
            return Ok(0);
        }
        let count = match self.inner.read(into) {
            Ok(count) => count,
            Err(error) => {
                let at = self.unpacked_bytes;
                return Err(self.fail(
                    Rule::Gzip,
                    format!("cannot be unpacked beyond byte {at}: {error}"),
                ));
            }
        };
        if count == 0 {
            self.ended = true;
            let left = self.inner.get_ref().len();
            if left > 0 {
                return Err(self.fail(
                    Rule::Gzip,
                    format!("{left} bytes follow the end of the gzip stream"),
                ));
            }
            return Ok(0);
        }
        self.unpacked_bytes += count as u64;
        let (packed, unpacked) = (self.packed_bytes, self.unpacked_bytes);
        if unpacked > self.left_bytes {
            let problem = format!(
                "it unpacks to more than the {} bytes that are left to it",
                self.left_bytes
            );
            return Err(self.fail(Rule::UnpackedTooLarge, problem));
        }
        if unpacked > RATIO_FLOOR_BYTES && unpacked / self.ratio > packed {
            let problem = format!("{packed} bytes unpack to over {} times as much", self.ratio);
            return Err(self.fail(Rule::Bomb, problem));
        }
        Ok(count)
    }
}
