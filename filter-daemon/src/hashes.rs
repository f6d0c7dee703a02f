//! What the filter asks the appliance about blocks: found in the lane's page, sent, answered into it.
//!
//! Invariant: each question is answered once, also when nobody can know. It is sent only when all that
//! was published before it has gone out on the same channel: an answer never tells of a block as it was
//! before one of those records.

use crate::connection::LinkError;
use filter_core::lane::consumer::Consumer;
use filter_core::lane::layout::{DIRTY_BLOCK_BYTES, HASH_BYTES, MAX_HASHES};
use filter_core::lane::sync::Ordering::{Acquire, Relaxed, Release};
use filter_core::mutant::{Guard, holds};
use filter_core::record::MAX_DISK_BYTES;
use filter_core::wire::Message;

/// A question of the filter.
#[derive(Clone, Copy, Debug)]
struct Question {
    number: u32,
    offset_bytes: u64,
    blocks: u32,
    /// What was published when it was found ends here.
    end: u64,
    /// It is on its way to the appliance.
    sent: bool,
}

/// The questions of one lane.
#[derive(Debug)]
pub struct Questions {
    answered: u32,
    open: Option<Question>,
}

impl Questions {
    /// Of a lane whose last daemon answered up to where its words say.
    pub fn of(consumer: &Consumer) -> Self {
        let words = consumer.memory();
        Self {
            answered: words.consumer().hash_answer.load(Relaxed), // our own side's word
            open: None,
        }
    }

    /// Whether one waits for its answer. Cheap: one load if there is none.
    pub fn is_asked(&self, consumer: &Consumer) -> bool {
        let words = consumer.memory();
        let asked = words.producer().hash_ask.load(Relaxed); // read again, in order, by `find`
        self.open.is_some() || asked != self.answered
    }

    /// Looks for a question. `reachable`: the appliance can be asked now or soon.
    pub fn find(&mut self, consumer: &Consumer, reachable: bool) {
        if !self.is_asked(consumer) {
            return;
        }
        if self.open.is_none_or(|open| !open.sent) {
            let memory = consumer.memory();
            let words = memory.producer();
            let number = words.hash_ask.load(Acquire); // pairs with the producer's Release
            let known = self.open.is_some_and(|open| open.number == number);
            if !known {
                self.open = Some(Question {
                    number,
                    offset_bytes: words.hash_offset.load(Relaxed), // ordered by the Acquire above
                    blocks: words.hash_blocks.load(Relaxed),       // as above
                    end: consumer.published_end().unwrap_or(u64::MAX),
                    sent: false,
                });
            }
        }
        if let Some(open) = self.open.filter(|open| !open.sent) {
            let sane = open.offset_bytes.is_multiple_of(DIRTY_BLOCK_BYTES)
                && open.offset_bytes <= MAX_DISK_BYTES
                && (1..=MAX_HASHES as u32).contains(&open.blocks);
            if !reachable || !sane || open.end == u64::MAX || consumer.restarting() {
                self.answer(consumer, &[]);
            }
        }
    }

    /// The question to be sent now, if there is one and its turn has come. The caller sends it behind
    /// everything that was taken.
    pub fn to_send(&mut self, consumer: &Consumer) -> Option<Message> {
        let open = self.open.as_mut().filter(|open| !open.sent)?;
        if !consumer.has_taken(open.end) && holds(Guard::HashesBehind) {
            return None;
        }
        open.sent = true;
        Some(Message::HashRequest {
            offset_bytes: open.offset_bytes,
            blocks: open.blocks,
        })
    }

    /// The appliance has answered. It answers each request once, in order.
    pub fn came(
        &mut self,
        consumer: &Consumer,
        offset_bytes: u64,
        hashes: &[[u8; HASH_BYTES]],
    ) -> Result<(), LinkError> {
        let asked = self.open.filter(|open| {
            open.sent && open.offset_bytes == offset_bytes && hashes.len() <= open.blocks as usize
        });
        if asked.is_none() {
            return Err(LinkError::Protocol("hashes that nobody asked for"));
        }
        self.answer(consumer, hashes);
        Ok(())
    }

    /// The channel has ended: what was sent over it is not answered any more.
    pub fn lost(&mut self, consumer: &Consumer) {
        if self.open.is_some_and(|open| open.sent) {
            self.answer(consumer, &[]);
        }
    }

    /// Answers the open question. A filter that has given it up and asked another one sees by the number
    /// that this is not its answer.
    fn answer(&mut self, consumer: &Consumer, hashes: &[[u8; HASH_BYTES]]) {
        let Some(open) = self.open.take() else {
            return;
        };
        let memory = consumer.memory();
        let page = memory.hash_words().chunks(2);
        for (words, hash) in page.zip(hashes) {
            for (word, bytes) in words.iter().zip(hash.as_chunks::<8>().0) {
                word.store(u64::from_le_bytes(*bytes), Relaxed); // published by the Release below
            }
        }
        let words = memory.consumer();
        words.hash_count.store(hashes.len() as u32, Relaxed); // as above
        words.hash_answer.store(open.number, Release); // pairs with the producer's Acquire
        self.answered = open.number;
    }
}
