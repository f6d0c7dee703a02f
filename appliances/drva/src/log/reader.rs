//! Reading durable batches, for the upload.
//!
//! Invariant: only batches that the writer has made durable are read; one batch is in memory at a
//! time.

use super::format::{BATCH_HEADER_BYTES, BatchError, BatchHeader};
use super::volume::{Readable, Volume};
use filter_core::mutant::{Guard, holds};
use std::io;

/// Why a batch could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The storage refused: says nothing of what is there.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What is there is not the batch.
    #[error("{0}")]
    Bad(#[from] BatchError),
}

/// A log as its readers see it.
pub trait Batches {
    /// The newest durable batch.
    fn durable_batch(&self) -> u64;
    /// The first batch of each segment.
    fn segments(&self) -> Vec<u64>;
    /// Where they lie.
    fn volume(&self) -> &dyn Volume;
}

/// Fills `raw` from `at` on; `false`: the file ends before.
fn read_whole(file: &dyn Readable, raw: &mut [u8], at: u64) -> io::Result<bool> {
    match file.read_exact_at(raw, at) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads and checks a batch's header; also gives its chain value.
pub fn read_header(file: &dyn Readable, at: u64) -> Result<(BatchHeader, u32), ReadError> {
    let mut raw = [0u8; BATCH_HEADER_BYTES];
    if !read_whole(file, &mut raw, at)? {
        return Err(BatchError::None.into());
    }
    Ok(BatchHeader::decode(&raw)?)
}

/// Reads and checks a batch's body.
pub fn read_body(file: &dyn Readable, at: u64, header: &BatchHeader) -> Result<Vec<u8>, ReadError> {
    let mut body = vec![0u8; header.body_len as usize];
    let whole = read_whole(file, &mut body, at + BATCH_HEADER_BYTES as u64)?;
    if whole && (crc32c::crc32c(&body) == header.body_crc || !holds(Guard::TornEnd)) {
        Ok(body)
    } else {
        Err(BatchError::Body(header.number).into())
    }
}

/// A place in the log.
pub struct Reader {
    next: u64,
    open: Option<(u64, Box<dyn Readable>, u64)>,
}

impl Reader {
    /// From this batch on.
    pub const fn new(next: u64) -> Self {
        Self { next, open: None }
    }

    /// The batch that is read next.
    pub const fn next_batch(&self) -> u64 {
        self.next
    }

    /// Goes back to a batch.
    pub fn rewind(&mut self, batch: u64) {
        self.next = batch;
        self.open = None;
    }

    /// The next durable batch's number and body; `None`: nothing more is durable.
    pub fn next(&mut self, log: &dyn Batches) -> io::Result<Option<(u64, Vec<u8>)>> {
        if self.next > log.durable_batch() {
            return Ok(None);
        }
        loop {
            if self.open.is_none() {
                self.seek(log)?;
            }
            let Some((first, file, at)) = &mut self.open else {
                return Err(io::Error::other("the log holds no segment"));
            };
            let header = match read_header(&**file, *at) {
                Ok((header, _)) => Some(header),
                Err(ReadError::Bad(_)) => None,
                Err(ReadError::Io(error)) => return Err(error),
            };
            match header {
                Some(header) if header.number == self.next => {
                    let body = read_body(&**file, *at, &header).map_err(|error| match error {
                        ReadError::Io(error) => error,
                        ReadError::Bad(error) => io::Error::new(io::ErrorKind::InvalidData, error),
                    })?;
                    *at += header.span_bytes();
                    self.next += 1;
                    return Ok(Some((header.number, body)));
                }
                Some(header) if header.number < self.next => *at += header.span_bytes(),
                _ => {
                    // The segment ends here: the batch is the first of the next one.
                    let segments = log.segments();
                    let held = |s: &&u64| **s > *first && **s <= self.next;
                    let next = segments.iter().find(held).copied();
                    let Some(next) = next else {
                        if segments.first().is_some_and(|first| *first > self.next) {
                            self.open = None; // freed meanwhile: the store holds it
                            continue;
                        }
                        let text = format!("batch {} is missing from the log", self.next);
                        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                    };
                    let file = log.volume().open(next)?;
                    self.open = Some((next, file, 0));
                }
            }
        }
    }

    /// Opens the segment that holds the next batch; headers are passed until it comes.
    fn seek(&mut self, log: &dyn Batches) -> io::Result<()> {
        let segments = log.segments();
        let holder = segments.iter().rfind(|first| **first <= self.next);
        let Some(first) = holder.or(segments.first()).copied() else {
            return Ok(());
        };
        // What came before the first segment was uploaded and freed.
        self.next = self.next.max(first);
        let file = log.volume().open(first)?;
        self.open = Some((first, file, 0));
        Ok(())
    }
}
