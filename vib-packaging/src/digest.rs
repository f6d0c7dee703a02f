//! Checksums as descriptors and bundles tell them: lower-case hex of SHA-256 and SHA-1.

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of some bytes, as 64 hex digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&SHA256, bytes).as_ref())
}

/// Both checksums of a stream that is read once.
pub(crate) struct Digests {
    sha1: Context,
    sha256: Context,
}

impl Digests {
    pub(crate) fn new() -> Digests {
        Digests {
            sha1: Context::new(&SHA1_FOR_LEGACY_USE_ONLY),
            sha256: Context::new(&SHA256),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.sha1.update(bytes);
        self.sha256.update(bytes);
    }

    /// SHA-1 and SHA-256 as hex digits.
    pub(crate) fn finish(self) -> (String, String) {
        (
            hex(self.sha1.finish().as_ref()),
            hex(self.sha256.finish().as_ref()),
        )
    }
}

/// SHA-256 as bytes.
pub(crate) fn sha256_raw(bytes: &[u8]) -> Vec<u8> {
    ring::digest::digest(&SHA256, bytes).as_ref().to_vec()
}
