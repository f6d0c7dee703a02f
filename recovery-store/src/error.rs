//! What can go wrong with a container. Every error names the object or the disk that it is about.

use uuid::Uuid;

/// Why bytes are not what the format says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than needed.
    #[error("{what}: cut short, {have} bytes where {need} are needed")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Bytes present.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// The magic number is another one.
    #[error("{what}: not a part of a jetdr container (magic {found:02x?})")]
    Magic {
        /// What was being read.
        what: &'static str,
        /// The bytes found.
        found: [u8; 8],
    },
    /// A version that this reader does not know.
    #[error(
        "format version {found} is newer than this program knows ({supported}): use a newer jetdr"
    )]
    Version {
        /// The version found.
        found: u32,
        /// The newest known.
        supported: u32,
    },
    /// A checksum does not match.
    #[error("{what}: corrupt, CRC32C {stored:#010x} stored, {computed:#010x} computed")]
    Crc {
        /// What was being read.
        what: &'static str,
        /// The checksum stored.
        stored: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// A field is outside its limits although its checksum matches.
    #[error("{what}: the value {value} is out of range")]
    Field {
        /// The field's name.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A block does not decompress to its length.
    #[error("block {block}: does not decompress: {reason}")]
    Decompress {
        /// The block's number in its part.
        block: u32,
        /// What the decompressor said.
        reason: String,
    },
    /// A name is not UTF-8.
    #[error("{0}: not UTF-8")]
    Utf8(&'static str),
    /// A JSON document does not parse.
    #[error("not the JSON that is expected here: {0}")]
    Json(String),
}

/// What can go wrong with a container.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The location cannot be understood.
    #[error("store location {url:?}: {reason}")]
    Url {
        /// The location as given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store answered with an error.
    #[error("cannot {action} {object} in {location}: {source}")]
    Store {
        /// What was being done.
        action: &'static str,
        /// The object.
        object: String,
        /// The store.
        location: String,
        /// The store's answer.
        source: Box<object_store::Error>,
    },
    /// An upload failed for good, or too often.
    #[error("cannot write {object} to {location} after {attempts} attempt(s): {source}")]
    Upload {
        /// The object.
        object: String,
        /// The store.
        location: String,
        /// How often it was tried.
        attempts: u32,
        /// The last answer.
        source: Box<object_store::Error>,
    },
    /// There is no container.
    #[error("no jetdr container at {location}: there is no domain.json")]
    NoContainer {
        /// The store.
        location: String,
    },
    /// `domain.json` is of something else.
    #[error("{location} holds a container of another format: {found}")]
    OtherFormat {
        /// The store.
        location: String,
        /// What was found.
        found: String,
    },
    /// The container is of a newer version.
    #[error(
        "{location} holds a container of format version {found}; this program knows versions up to {supported}: use a newer jetdr"
    )]
    NewerVersion {
        /// The store.
        location: String,
        /// Its version.
        found: u64,
        /// The newest known here.
        supported: u64,
    },
    /// The container belongs to another domain.
    #[error(
        "{location} holds domain {found}, not {expected}: give each domain a container of its own"
    )]
    OtherDomain {
        /// The store.
        location: String,
        /// The domain expected.
        expected: Uuid,
        /// The domain found.
        found: Uuid,
    },
    /// Bytes of an object are not what the format says.
    #[error("{object}: {source}")]
    Format {
        /// The object.
        object: String,
        /// What is wrong.
        source: FormatError,
    },
    /// An object of that name is there with other content.
    #[error(
        "{object} is there already with other content (there: {theirs}; to be written: {ours}): another writer uses this container"
    )]
    Conflict {
        /// The object.
        object: String,
        /// Length and hash of what was to be written.
        ours: String,
        /// Length and hash of what is there.
        theirs: String,
    },
    /// An object says that it is another than its name.
    #[error("{object}: holds {found} (an object was swapped or replayed)")]
    Identity {
        /// The object.
        object: String,
        /// What the object says of itself.
        found: String,
    },
    /// The hash chain is broken.
    #[error(
        "{object}: names {found} as the hash of its predecessor {previous}, which is {expected} (an object was replaced or replayed)"
    )]
    Chain {
        /// The object.
        object: String,
        /// Its predecessor by name.
        previous: String,
        /// The predecessor's hash.
        expected: String,
        /// The hash named in the object.
        found: String,
    },
    /// An object's own hash does not match its bytes.
    #[error("{object}: SHA-256 {stored} stored, {computed} computed (the object was changed)")]
    Hash {
        /// The object.
        object: String,
        /// The hash stored.
        stored: String,
        /// The hash of the bytes.
        computed: String,
    },
    /// An object that must be there is not.
    #[error("{object} is missing")]
    Missing {
        /// The object.
        object: String,
    },
    /// The cut that was asked for is not there.
    #[error("there is no cut {wanted}: {hint}")]
    NoSuchCut {
        /// What was asked for.
        wanted: String,
        /// What is there.
        hint: String,
    },
    /// The disk that was asked for is not there.
    #[error("cut {cut} has no disk {wanted}; it has {have}")]
    NoSuchDisk {
        /// The cut.
        cut: u64,
        /// What was asked for.
        wanted: String,
        /// The disks of the cut.
        have: String,
    },
    /// A record of a disk that was not announced.
    #[error("record of disk {0}, which is not registered with this writer")]
    UnknownDisk(Uuid),
    /// The disk's description is not acceptable.
    #[error("disk {disk}: {reason}")]
    Disk {
        /// The disk.
        disk: Uuid,
        /// What is wrong.
        reason: String,
    },
    /// Records of a disk are missing.
    #[error("disk {disk}: record {got} came where {expected} was due (records are missing)")]
    SeqGap {
        /// The disk.
        disk: Uuid,
        /// The seq that was due.
        expected: u64,
        /// The seq that came.
        got: u64,
    },
    /// A record of an owner that lost the disk.
    #[error(
        "disk {disk}: record {seq} is of attach epoch {got}, the container has epoch {have} already"
    )]
    StaleEpoch {
        /// The disk.
        disk: Uuid,
        /// The record's seq.
        seq: u64,
        /// The record's epoch.
        got: u32,
        /// The highest epoch in the container.
        have: u32,
    },
    /// The cut cannot be committed as asked.
    #[error("cut {cut} cannot close: {reason}")]
    Commit {
        /// The cut.
        cut: u64,
        /// Why.
        reason: String,
    },
    /// The writer failed before; a new one must be opened.
    #[error("this writer stopped at an earlier error ({0}): open the container again")]
    Poisoned(String),
    /// A task of the writer or the reader ended without a result.
    #[error("a background task ended abnormally: {0}")]
    Task(String),
}

impl StoreError {
    pub(crate) fn format(object: impl ToString, source: FormatError) -> Self {
        Self::Format {
            object: object.to_string(),
            source,
        }
    }
}
