//! Reading durable batches, for the upload.
//!
//! Invariant: only batches that the writer has made durable are read; one batch is in memory at a
//! time.

use super::format::{BATCH_HEADER_BYTES, BatchError, BatchHeader};
use super::{Log, segment};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Reads and checks a batch's body.
pub fn read_body(file: &File, at: u64, header: &BatchHeader) -> Result<Vec<u8>, BatchError> {
    let mut body = vec![0u8; header.body_len as usize];
    let bad = BatchError::Body(header.number);
    file.read_exact_at(&mut body, at + BATCH_HEADER_BYTES as u64)
        .map_err(|_| bad.clone())?;
    if crc32c::crc32c(&body) == header.body_crc {
        Ok(body)
    } else {
        Err(bad)
    }
}

/// A place in the log.
pub struct Reader {
    next: u64,
    open: Option<(u64, File, u64)>,
    /// Places of batches passed, so that going back is quick: batch, segment, offset.
    marks: Vec<(u64, u64, u64)>,
}

impl Reader {
    /// From this batch on.
    pub const fn new(next: u64) -> Self {
        Self {
            next,
            open: None,
            marks: Vec::new(),
        }
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
    pub fn next(&mut self, log: &Log) -> std::io::Result<Option<(u64, Vec<u8>)>> {
        if self.next > log.durable_batch() {
            return Ok(None);
        }
        loop {
            if self.open.is_none() {
                self.seek(log)?;
            }
            let Some((first, file, at)) = &mut self.open else {
                return Err(std::io::Error::other("the log holds no segment"));
            };
            let mut raw = [0u8; BATCH_HEADER_BYTES];
            let header = file
                .read_exact_at(&mut raw, *at)
                .ok()
                .and_then(|()| BatchHeader::decode(&raw).ok())
                .map(|(header, _)| header);
            match header {
                Some(header) if header.number == self.next => {
                    let body = read_body(file, *at, &header)
                        .map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, e))?;
                    if self.marks.len() >= 64 {
                        self.marks.drain(..32);
                    }
                    self.marks.push((header.number, *first, *at));
                    *at += header.span_bytes();
                    self.next += 1;
                    return Ok(Some((header.number, body)));
                }
                Some(header) if header.number < self.next => *at += header.span_bytes(),
                _ => {
                    // The segment ends here: the batch is the first of the next one.
                    let segments = log.segments();
                    let Some(next) = segments
                        .into_iter()
                        .find(|s| *s > *first && *s <= self.next)
                    else {
                        let text = format!("batch {} is missing from the log", self.next);
                        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
                    };
                    let file = File::open(segment::path_of(log.dir(), next))?;
                    self.open = Some((next, file, 0));
                }
            }
        }
    }

    fn seek(&mut self, log: &Log) -> std::io::Result<()> {
        let mark = self
            .marks
            .iter()
            .find(|(batch, ..)| *batch == self.next)
            .copied();
        let (first, at) = match mark {
            Some((_, first, at)) => (first, at),
            None => match log.segments().into_iter().rfind(|s| *s <= self.next) {
                Some(first) => (first, 0),
                None => match log.segments().first() {
                    // What came before was uploaded and freed.
                    Some(first) => {
                        self.next = *first;
                        (*first, 0)
                    }
                    None => return Ok(()),
                },
            },
        };
        self.open = Some((first, File::open(segment::path_of(log.dir(), first))?, at));
        Ok(())
    }
}
