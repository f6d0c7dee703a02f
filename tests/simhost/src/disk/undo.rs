//! A volatile write cache: what a power cut takes back.
//!
//! The disk's writes go to its file as ever; what the file held before goes to a journal beside it first.
//! A flush makes the file durable and empties the journal. A power cut, which the host does after it
//! killed the VM, puts back what the journal holds.
//!
//! Invariant: at every moment the file with the journal undone is the disk as of the last flush. One lock
//! covers the old content's way to the journal and the write, so the journal is in the order of the writes.
//! An entry that is cut off at the journal's end has no write yet.

use super::{DiskError, FlatFile, io_error};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: u64 = 0x6f64_6e75_6864_6a01;
const HEAD_BYTES: u64 = 40;
/// A longer write has several entries.
const ENTRY_BYTES: u64 = 1 << 20;
/// A cache is not endless: it writes back by itself when it is full.
const JOURNAL_BYTES: u64 = 256 << 20;
const SECTOR_BYTES: u64 = 512;

/// The journal of a disk.
pub fn journal_path(disk: &Path) -> PathBuf {
    let mut name = disk.file_name().unwrap_or_default().to_os_string();
    name.push(".undo");
    disk.with_file_name(name)
}

fn sum(words: &[u64], bytes: &[u8]) -> u64 {
    let mut state = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |word: u64| {
        state = (state ^ word).wrapping_mul(0x0000_0100_0000_01b3);
        state ^= state >> 32;
    };
    words.iter().copied().for_each(&mut mix);
    for chunk in bytes.chunks(8) {
        let mut word = [0u8; 8];
        word.iter_mut()
            .zip(chunk)
            .for_each(|(to, from)| *to = *from);
        mix(u64::from_le_bytes(word));
    }
    state
}

/// The journal of an open disk.
#[derive(Debug)]
pub struct Undo {
    file: File,
    path: PathBuf,
    end: u64,
}

/// An entry that was found whole.
struct Entry {
    offset_bytes: u64,
    len_bytes: u64,
    /// Where its content lies in the journal; none: zeros.
    content_at: Option<u64>,
}

fn read_entry(file: &File, at: u64) -> io::Result<Option<(Entry, u64)>> {
    let mut raw = [0u8; HEAD_BYTES as usize];
    if let Err(error) = file.read_exact_at(&mut raw, at) {
        return match error.kind() {
            ErrorKind::UnexpectedEof => Ok(None),
            _ => Err(error),
        };
    }
    let mut words = raw.chunks_exact(8).map(|word| {
        let mut bytes = [0u8; 8];
        bytes.copy_from_slice(word);
        u64::from_le_bytes(bytes)
    });
    let mut next = || words.next().unwrap_or_default();
    let (magic, offset_bytes, len_bytes, stored, expected) =
        (next(), next(), next(), next(), next());
    let is_sane =
        magic == MAGIC && len_bytes <= ENTRY_BYTES && (stored == 0 || stored == len_bytes);
    if !is_sane {
        return Ok(None);
    }
    let mut content = vec![0; stored as usize];
    match file.read_exact_at(&mut content, at + HEAD_BYTES) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    if sum(&[magic, offset_bytes, len_bytes, stored], &content) != expected {
        return Ok(None);
    }
    let entry = Entry {
        offset_bytes,
        len_bytes,
        content_at: (stored > 0).then_some(at + HEAD_BYTES),
    };
    Ok(Some((entry, at + HEAD_BYTES + stored)))
}

fn entries(file: &File) -> io::Result<(Vec<Entry>, u64)> {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some((entry, end)) = read_entry(file, at)? {
        found.push(entry);
        at = end;
    }
    Ok((found, at))
}

impl Undo {
    /// The journal of a disk, with what an earlier process left: a killed process is no power cut, its
    /// writes are in the cache still.
    pub fn open(disk: &Path) -> Result<Self, DiskError> {
        let path = journal_path(disk);
        let open = || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            let (_, end) = entries(&file)?;
            file.set_len(end)?;
            Ok((file, end))
        };
        let (file, end) = open().map_err(io_error("open", &path))?;
        Ok(Self { file, path, end })
    }

    /// Notes what a range holds, before it is written.
    pub fn note(&mut self, disk: &FlatFile, offset: u64, len: u64) -> Result<(), DiskError> {
        let mut at = offset;
        let end = offset.saturating_add(len);
        while at < end {
            if self.end >= JOURNAL_BYTES {
                self.flush(disk)?;
            }
            let step = ENTRY_BYTES.min(end - at);
            let mut old = vec![0; step as usize];
            disk.read_at(&mut old, at)?;
            if old.iter().all(|byte| *byte == 0) {
                old.clear();
            }
            let words = [MAGIC, at, step, old.len() as u64];
            let mut raw: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            raw.extend_from_slice(&sum(&words, &old).to_le_bytes());
            raw.extend_from_slice(&old);
            let written = self.file.write_all_at(&raw, self.end);
            written.map_err(io_error("write", &self.path))?;
            self.end += raw.len() as u64;
            at += step;
        }
        Ok(())
    }

    /// Makes the disk durable: nothing is taken back any more.
    pub fn flush(&mut self, disk: &FlatFile) -> Result<(), DiskError> {
        disk.flush()?;
        self.file
            .set_len(0)
            .map_err(io_error("empty", &self.path))?;
        self.end = 0;
        Ok(())
    }
}

/// The cache of a disk is written back, and there is none any more.
pub fn settle(disk: &Path, file: &FlatFile) -> Result<(), DiskError> {
    let path = journal_path(disk);
    if !path.exists() {
        return Ok(());
    }
    file.flush()?;
    std::fs::remove_file(&path).map_err(io_error("remove", &path))
}

/// What a power cut took back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// Writes that no flush had covered (a long one counts several times).
    pub writes: u64,
    /// Bytes put back, each sector as often as it had been written.
    pub bytes: u64,
}

/// Whether a sector of the cache had reached the disk all the same: the same for the same seed.
fn is_kept(seed: u64, sector: u64, keep: f64) -> bool {
    let mut x = seed ^ sector.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    ((x >> 11) as f64 / (1u64 << 53) as f64) < keep
}

/// A power cut: puts back what no flush covered, but for a part `keep` (0 to 1) of the sectors, which
/// the cache had written back by itself. Nobody may have the disk open.
pub fn power_cut(path: &Path, disk: &FlatFile, keep: f64, seed: u64) -> Result<Undone, DiskError> {
    let journal = journal_path(path);
    let file = match File::open(&journal) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Undone::default()),
        other => other.map_err(io_error("open", &journal))?,
    };
    let (found, _) = entries(&file).map_err(io_error("read", &journal))?;
    let mut undone = Undone::default();
    for entry in found.iter().rev() {
        undone.writes += 1;
        let mut old = vec![0; entry.len_bytes as usize];
        if let Some(at) = entry.content_at {
            let read = file.read_exact_at(&mut old, at);
            read.map_err(io_error("read", &journal))?;
        }
        let mut at = entry.offset_bytes;
        for sector in old.chunks(SECTOR_BYTES as usize) {
            if !is_kept(seed, at / SECTOR_BYTES, keep) {
                disk.write_at(sector, at)?;
                undone.bytes += sector.len() as u64;
            }
            at += sector.len() as u64;
        }
    }
    disk.flush()?;
    std::fs::remove_file(&journal).map_err(io_error("remove", &journal))?;
    Ok(undone)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn disk(dir: &Path) -> (PathBuf, FlatFile) {
        let path = dir.join("d.raw");
        let disk = FlatFile::create(&path, 8 << 20).unwrap();
        (path, disk)
    }

    fn write(undo: &mut Undo, disk: &FlatFile, fill: u8, at: u64, len: usize) {
        undo.note(disk, at, len as u64).unwrap();
        disk.write_at(&vec![fill; len], at).unwrap();
    }

    fn sector(disk: &FlatFile, at: u64) -> u8 {
        let mut buffer = [0; 512];
        disk.read_at(&mut buffer, at).unwrap();
        assert!(buffer.iter().all(|b| *b == buffer[0]), "a mixed sector");
        buffer[0]
    }

    #[test]
    fn what_no_flush_covered_is_taken_back_in_reverse_order() {
        let dir = tempfile::tempdir().unwrap();
        let (path, disk) = disk(dir.path());
        let mut undo = Undo::open(&path).unwrap();
        write(&mut undo, &disk, 1, 0, 4096);
        undo.flush(&disk).unwrap();
        write(&mut undo, &disk, 2, 512, 1024);
        write(&mut undo, &disk, 3, 1024, 4096);
        // Another process goes on with the same cache, and writes more than one entry holds.
        drop(undo);
        let mut undo = Undo::open(&path).unwrap();
        write(&mut undo, &disk, 4, 0, 3 << 20);
        drop(undo);
        let undone = power_cut(&path, &disk, 0.0, 1).unwrap();
        assert_eq!(undone.writes, 5);
        for at in (0..3 << 20).step_by(512) {
            assert_eq!(sector(&disk, at), u8::from(at < 4096), "byte {at}");
        }
        assert_eq!(power_cut(&path, &disk, 0.0, 1).unwrap(), Undone::default());
    }

    #[test]
    fn an_entry_that_is_cut_off_has_no_write() {
        let dir = tempfile::tempdir().unwrap();
        let (path, disk) = disk(dir.path());
        let mut undo = Undo::open(&path).unwrap();
        disk.write_at(&[9; 1024], 0).unwrap();
        write(&mut undo, &disk, 1, 0, 512);
        undo.note(&disk, 512, 512).unwrap();
        undo.file.set_len(undo.end - 1).unwrap();
        drop(undo);
        assert_eq!(power_cut(&path, &disk, 0.0, 1).unwrap().writes, 1);
        assert_eq!(sector(&disk, 0), 9);
    }

    #[test]
    fn a_part_of_the_cache_may_have_been_written_back() {
        let dir = tempfile::tempdir().unwrap();
        let (path, disk) = disk(dir.path());
        let mut undo = Undo::open(&path).unwrap();
        for fill in 1..=3 {
            write(&mut undo, &disk, fill, 0, 1 << 20);
        }
        drop(undo);
        power_cut(&path, &disk, 0.5, 7).unwrap();
        let kept = (0..2048).filter(|s| sector(&disk, s * 512) == 3).count();
        let lost = (0..2048).filter(|s| sector(&disk, s * 512) == 0).count();
        assert_eq!(kept + lost, 2048, "old content that was never the last");
        assert!((800..1250).contains(&kept), "{kept}");
    }
}
