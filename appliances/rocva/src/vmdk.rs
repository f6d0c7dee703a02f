//! Writers of VMDK: the descriptor of a flat disk, and the stream-optimised form.
//!
//! Invariant: a stream is written front to back, without seeking; its grain tables name only grains
//! that were written before them.

use anyhow::{Context, bail};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use uuid::Uuid;

/// VMDK counts in these.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// Sectors of a grain: 64 KiB, the only size that every reader takes.
const GRAIN_SECTORS: u64 = 128;
const GRAIN_BYTES: u64 = GRAIN_SECTORS * SECTOR_BYTES;
/// Entries of a grain table.
const TABLE_ENTRIES: u64 = 512;
/// What one grain table covers: 32 MiB.
const TABLE_BYTES: u64 = TABLE_ENTRIES * GRAIN_BYTES;
/// Sectors kept for the descriptor, after the header.
const DESCRIPTOR_SECTORS: u64 = 20;
/// "The grain directory is named in the footer."
const GD_AT_END: u64 = u64::MAX;

const MARKER_EOS: u32 = 0;
const MARKER_GT: u32 = 1;
const MARKER_GD: u32 = 2;
const MARKER_FOOTER: u32 = 3;

/// The content id of a disk: the same for the same cut of the same disk.
pub(crate) fn content_id(cut_sha256: &[u8; 32], disk: Uuid) -> u32 {
    let id = cut_sha256
        .chunks(4)
        .chain(disk.as_bytes().chunks(4))
        .filter_map(|word| word.first_chunk::<4>())
        .fold(0u32, |id, word| {
            id.rotate_left(5) ^ u32::from_le_bytes(*word)
        });
    // The two highest values mean "no parent" and "unknown".
    id & 0x7fff_ffff
}

fn descriptor(kind: &str, extent: &str, len_bytes: u64, id: u32) -> String {
    let sectors = len_bytes / SECTOR_BYTES;
    let cylinders = (sectors / (255 * 63)).clamp(1, 65535);
    format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         CID={id:08x}\n\
         parentCID=ffffffff\n\
         createType=\"{kind}\"\n\
         \n\
         # Extent description\n\
         {extent}\n\
         \n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.virtualHWVersion = \"14\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"255\"\n\
         ddb.geometry.sectors = \"63\"\n\
         ddb.adapterType = \"lsilogic\"\n"
    )
}

/// The text of `<name>.vmdk` beside the flat file.
pub(crate) fn flat_descriptor(flat_name: &str, len_bytes: u64, id: u32) -> String {
    let sectors = len_bytes / SECTOR_BYTES;
    let extent = format!("RW {sectors} FLAT \"{flat_name}\" 0");
    descriptor("monolithicFlat", &extent, len_bytes, id)
}

/// Counts what goes out, in sectors.
struct Sectors<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Sectors<W> {
    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.out.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Fills the sector up with zeros.
    fn pad(&mut self) -> anyhow::Result<()> {
        self.pad_to(self.bytes.next_multiple_of(SECTOR_BYTES))
    }

    fn pad_to(&mut self, end: u64) -> anyhow::Result<()> {
        let mut missing = end.saturating_sub(self.bytes) as usize;
        let zeros = [0u8; 512];
        while missing > 0 {
            let now = zeros.get(..missing.min(512)).unwrap_or(&zeros);
            self.write(now)?;
            missing -= now.len();
        }
        Ok(())
    }

    /// The current sector, as the 32-bit tables can hold it.
    fn sector(&self) -> anyhow::Result<u32> {
        u32::try_from(self.bytes / SECTOR_BYTES)
            .ok()
            .context("a stream-optimised VMDK cannot be larger than 2 TiB: use another format")
    }

    fn marker(&mut self, sectors: u64, kind: u32) -> anyhow::Result<()> {
        self.write(&sectors.to_le_bytes())?;
        self.write(&0u32.to_le_bytes())?;
        self.write(&kind.to_le_bytes())?;
        self.pad()
    }

    fn table(&mut self, entries: &[u32]) -> anyhow::Result<()> {
        for entry in entries {
            self.write(&entry.to_le_bytes())?;
        }
        self.pad()
    }
}

/// The header, and the footer, which is a copy that knows the grain directory.
fn header(capacity_sectors: u64, directory_sector: u64) -> [u8; 512] {
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(b"KDMV");
    out.extend_from_slice(&3u32.to_le_bytes());
    // Newline test valid, compressed grains, markers.
    out.extend_from_slice(&0x0003_0001u32.to_le_bytes());
    for value in [capacity_sectors, GRAIN_SECTORS, 1, DESCRIPTOR_SECTORS] {
        out.extend_from_slice(&value.to_le_bytes());
    }
    out.extend_from_slice(&(TABLE_ENTRIES as u32).to_le_bytes());
    // No redundant directory; the directory; the overhead before the first grain.
    for value in [0, directory_sector, GRAIN_SECTORS] {
        out.extend_from_slice(&value.to_le_bytes());
    }
    out.push(0);
    out.extend_from_slice(b"\n \r\n");
    out.extend_from_slice(&1u16.to_le_bytes());
    let mut sector = [0; 512];
    for (to, from) in sector.iter_mut().zip(out) {
        *to = from;
    }
    sector
}

/// Writes `len_bytes` of `raw` as a stream-optimised VMDK. `data` are the sorted ranges that may hold
/// something else than zeros; only these are read.
pub(crate) fn write_stream(
    raw: &File,
    data: impl Iterator<Item = Range<u64>>,
    len_bytes: u64,
    name: &str,
    id: u32,
    out: &File,
    mut progress: impl FnMut(u64),
) -> anyhow::Result<()> {
    let capacity_sectors = len_bytes / SECTOR_BYTES;
    if !len_bytes.is_multiple_of(SECTOR_BYTES) {
        bail!("the length {len_bytes} is not a multiple of a sector");
    }
    let mut out = Sectors {
        out: BufWriter::with_capacity(1 << 20, out),
        bytes: 0,
    };
    out.write(&header(capacity_sectors, GD_AT_END))?;
    let extent = format!("RW {capacity_sectors} SPARSE \"{name}\"");
    let text = descriptor("streamOptimized", &extent, len_bytes, id);
    if text.len() as u64 > DESCRIPTOR_SECTORS * SECTOR_BYTES {
        bail!("the name {name:?} is too long for a descriptor");
    }
    out.write(text.as_bytes())?;
    out.pad_to(GRAIN_BYTES)?;

    let mut directory = vec![0u32; len_bytes.div_ceil(TABLE_BYTES) as usize];
    let mut table: Option<(u64, Vec<u32>)> = None;
    let mut grain_packer = GrainPacker::new(raw, len_bytes);
    let mut next_grain = 0;
    for range in data {
        progress(range.end - range.start);
        let last = range.end.min(len_bytes).div_ceil(GRAIN_BYTES);
        for grain in next_grain.max(range.start / GRAIN_BYTES)..last {
            next_grain = grain + 1;
            let number = grain / TABLE_ENTRIES;
            if let Some((open, entries)) = table.take_if(|(open, _)| *open != number) {
                close_table(&mut out, &mut directory, open, &entries)?;
            }
            let sector = out.sector()?;
            if grain_packer.pack(grain, &mut out)? {
                let (_, entries) =
                    table.get_or_insert_with(|| (number, vec![0u32; TABLE_ENTRIES as usize]));
                if let Some(entry) = entries.get_mut((grain % TABLE_ENTRIES) as usize) {
                    *entry = sector;
                }
            }
        }
    }
    if let Some((open, entries)) = table {
        close_table(&mut out, &mut directory, open, &entries)?;
    }
    out.marker(
        (directory.len() as u64 * 4).div_ceil(SECTOR_BYTES),
        MARKER_GD,
    )?;
    let directory_sector = out.sector()?;
    out.table(&directory)?;
    out.marker(1, MARKER_FOOTER)?;
    out.write(&header(capacity_sectors, directory_sector.into()))?;
    out.marker(0, MARKER_EOS)?;
    out.out.flush()?;
    Ok(())
}

fn close_table<W: Write>(
    out: &mut Sectors<W>,
    directory: &mut [u32],
    number: u64,
    entries: &[u32],
) -> anyhow::Result<()> {
    out.marker(TABLE_ENTRIES * 4 / SECTOR_BYTES, MARKER_GT)?;
    let sector = out.sector()?;
    out.table(entries)?;
    if let Some(entry) = directory.get_mut(number as usize) {
        *entry = sector;
    }
    Ok(())
}

/// Compresses grains; keeps its buffers.
struct GrainPacker<'a> {
    raw: &'a File,
    len_bytes: u64,
    grain: Vec<u8>,
    packed: Vec<u8>,
}

impl<'a> GrainPacker<'a> {
    fn new(raw: &'a File, len_bytes: u64) -> Self {
        Self {
            raw,
            len_bytes,
            grain: vec![0; GRAIN_BYTES as usize],
            packed: Vec::with_capacity(GRAIN_BYTES as usize),
        }
    }

    /// Writes a grain with its marker, unless it is all zeros. Returns whether it was written.
    fn pack<W: Write>(&mut self, grain: u64, out: &mut Sectors<W>) -> anyhow::Result<bool> {
        let offset = grain * GRAIN_BYTES;
        let len = GRAIN_BYTES.min(self.len_bytes.saturating_sub(offset)) as usize;
        // The last grain of a disk is filled up with zeros.
        self.grain.fill(0);
        let bytes = self.grain.get_mut(..len).unwrap_or_default();
        self.raw
            .read_exact_at(bytes, offset)
            .with_context(|| format!("reading the grain at byte {offset}"))?;
        if self.grain.iter().all(|byte| *byte == 0) {
            return Ok(false);
        }
        self.packed.clear();
        let mut encoder = ZlibEncoder::new(&mut self.packed, Compression::new(3));
        encoder.write_all(&self.grain)?;
        encoder.finish()?;
        out.write(&(grain * GRAIN_SECTORS).to_le_bytes())?;
        out.write(&(self.packed.len() as u32).to_le_bytes())?;
        out.write(&self.packed)?;
        out.pad()?;
        Ok(true)
    }
}
