//! What waits to be sent to one peer.
//!
//! Invariant: it never waits for the peer, and never grows beyond its limits: a peer that lets more wait is
//! cut off, and after that nothing is queued for it.

use crate::link::Link;
use filter_core::wire::Message;
use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;

/// Frames that may wait for one peer: as many answers as may be asked for at once come far below it.
pub const MAX_WAITING: usize = 4096;
/// Their bytes.
pub const MAX_WAITING_BYTES: usize = 8 << 20;

#[derive(Default)]
struct Waiting {
    frames: Vec<Vec<u8>>,
    /// Of `frames`.
    waiting_bytes: usize,
    acks: BTreeMap<u32, (u64, u64)>,
    /// Nothing more is taken.
    closed: bool,
    /// It was closed because the peer did not read.
    overflowed: bool,
}

impl Waiting {
    fn drain(&mut self, out: &mut Vec<u8>) {
        for frame in self.frames.drain(..) {
            out.extend_from_slice(&frame);
        }
        self.waiting_bytes = 0;
        for (channel, (durable_seq, uploaded_seq)) in std::mem::take(&mut self.acks) {
            let ack = Message::Ack {
                durable_seq,
                uploaded_seq,
            };
            out.extend_from_slice(&ack.encode(channel));
        }
    }

    /// The peer has let too much wait: what waits is of no use to it any more.
    fn overflow(&mut self) {
        (self.closed, self.overflowed) = (true, true);
        self.frames = Vec::new();
        self.acks = BTreeMap::new();
    }
}

/// What is to be sent to one peer. Acknowledgements of a lane replace each other, frames have a limit, and
/// who reads too little to stay below it is cut off: so it stays small.
pub struct Outbox {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Default for Outbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Outbox {
    /// Nothing waits.
    pub fn new() -> Self {
        Self {
            waiting: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Queues an acknowledgement.
    pub fn acknowledge(&self, channel: u32, durable_seq: u64, uploaded_seq: u64) {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return;
        }
        waiting.acks.insert(channel, (durable_seq, uploaded_seq));
        // A peer chooses the channels' numbers, and those of lanes that it has closed may still wait.
        if waiting.acks.len() > MAX_WAITING {
            waiting.overflow();
        }
        self.changed.notify_one();
    }

    /// Queues a frame. A peer that lets too many wait is cut off, and after that nothing is queued.
    pub fn send(&self, message: &Message, channel: u32) {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return;
        }
        let frame = message.encode(channel);
        let fits = waiting.waiting_bytes + frame.len() <= MAX_WAITING_BYTES;
        if fits && waiting.frames.len() < MAX_WAITING {
            waiting.waiting_bytes += frame.len();
            waiting.frames.push(frame);
        } else {
            waiting.overflow();
        }
        self.changed.notify_one();
    }

    /// Whether the peer let too much wait: its session is to end.
    pub fn has_overflowed(&self) -> bool {
        self.waiting.lock().overflowed
    }

    /// Nothing more is taken; what waits is still sent.
    pub fn close(&self) {
        self.waiting.lock().closed = true;
        self.changed.notify_all();
    }

    /// Takes what waits: whole frames.
    pub fn drain(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.waiting.lock().drain(&mut out);
        out
    }

    /// Sends until the connection ends.
    pub fn run(&self, link: &Link<'_>) {
        loop {
            let mut out = Vec::new();
            {
                let mut waiting = self.waiting.lock();
                while waiting.frames.is_empty() && waiting.acks.is_empty() && !waiting.closed {
                    self.changed.wait(&mut waiting);
                }
                waiting.drain(&mut out);
                if waiting.closed && out.is_empty() {
                    break;
                }
            }
            if link.send(&out).is_err() {
                break;
            }
        }
        link.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Message {
        Message::Heartbeat {
            clock_ns: 1,
            answer: true,
        }
    }

    #[test]
    fn what_waits_has_limits_and_who_passes_them_is_cut_off() {
        let outbox = Outbox::new();
        for _ in 0..MAX_WAITING {
            outbox.send(&question(), 0);
        }
        assert!(!outbox.has_overflowed());
        for _ in 0..10 * MAX_WAITING {
            outbox.send(&question(), 0);
            outbox.acknowledge(1, 2, 1);
        }
        assert!(outbox.has_overflowed());
        assert!(outbox.drain().is_empty(), "nothing is kept for it");
        // Large frames: by their bytes.
        let outbox = Outbox::new();
        let large = Message::Hashes {
            offset_bytes: 0,
            hashes: vec![[7; 16]; 256],
        };
        let fit = MAX_WAITING_BYTES / large.encode(1).len();
        assert!(fit < MAX_WAITING);
        for _ in 0..fit {
            outbox.send(&large, 1);
        }
        assert!(!outbox.has_overflowed());
        outbox.send(&large, 1);
        assert!(outbox.has_overflowed());
        // Lanes that were opened and closed, one after the other.
        let outbox = Outbox::new();
        for channel in 0..=MAX_WAITING as u32 {
            assert!(!outbox.has_overflowed());
            outbox.acknowledge(channel, 1, 1);
        }
        assert!(outbox.has_overflowed());
    }

    #[test]
    fn what_was_taken_makes_room_and_what_comes_after_the_end_is_dropped() {
        let outbox = Outbox::new();
        for _ in 0..3 * MAX_WAITING {
            outbox.send(&question(), 0);
            outbox.acknowledge(1, 2, 1);
            assert!(!outbox.drain().is_empty());
        }
        assert!(!outbox.has_overflowed());
        outbox.send(&question(), 0);
        outbox.close();
        let farewell = outbox.drain();
        assert!(!farewell.is_empty() && !outbox.has_overflowed());
        outbox.send(&question(), 0);
        outbox.acknowledge(1, 2, 1);
        assert!(outbox.drain().is_empty());
    }
}
