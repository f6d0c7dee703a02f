//! How much a package may make a reader do: every number that comes out of a package is compared with
//! one of these before it is used.

/// Hard limits of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a VIB.
    pub vib_bytes: u64,
    /// Bytes of a descriptor, of a signature as PEM, or of an XML file of a bundle.
    pub text_bytes: u64,
    /// Members of a VIB.
    pub members: usize,
    /// Entries of all payloads of a VIB, or of a bundle.
    pub entries: usize,
    /// Bytes of all unpacked payloads of a VIB together.
    pub unpacked_bytes: u64,
    /// Times that a payload may be larger unpacked than packed, beyond its first MiB.
    pub ratio: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            vib_bytes: 256 << 20,
            text_bytes: 4 << 20,
            members: 64,
            entries: 4096,
            unpacked_bytes: 512 << 20,
            ratio: 200,
        }
    }
}
