//! What guest, disk, daemon and host do in one step.

use super::*;

/// What records are stamped with; a macro, since a method would borrow the whole world.
macro_rules! stamps {
    ($world:expr) => {
        &Stamps {
            stamp: &$world.stamp,
            cut_epoch: &$world.cut_epoch,
            time_ns: $world.now_ns,
        }
    };
}

impl World {
    pub(super) fn guest_writes(&mut self) {
        while self.inflight.len() >= self.depth {
            self.complete();
        }
        let sectors = self.primary.len() as u64 / 512;
        let len = match self.numbers.below(100) {
            0..50 => self.numbers.between(1, 16),
            50..80 => 128,
            80..97 => self.numbers.between(1, 600),
            97..99 => self.numbers.between(1, 1600),
            _ => self.numbers.between(1600, 2600),
        };
        let len = len.min(sectors);
        let at = self.numbers.between(0, sectors - len) as usize * 512;
        // The last, cut block is of interest.
        let at = if self.numbers.chance(10) {
            self.primary.len() - len as usize * 512
        } else {
            at
        };
        let len = len as usize * 512;
        let busy = |io: &Io| io.at < at + len && at < io.at + io.len;
        let held = self.held.iter().any(|(io, ..)| busy(io));
        if held || self.inflight.iter().any(|(io, _)| busy(io)) {
            if self.numbers.chance(70) {
                return; // a guest that cares does not write to the same place twice at a time
            }
            self.seen.overlaps += 1;
        }
        let kinds = [
            RecordKind::Write,
            RecordKind::Write,
            RecordKind::Zero,
            RecordKind::Unmap,
        ];
        let kind = self.numbers.pick(&kinds);
        let noise_at = self.numbers.below(self.noise.len() as u64 - len as u64) as usize;
        let data = match kind {
            RecordKind::Write if self.numbers.chance(10) => vec![0; len],
            RecordKind::Write => self.noise[noise_at..noise_at + len].to_vec(),
            _ => Vec::new(),
        };
        let landed = false;
        let io = Io {
            kind,
            at,
            len,
            data,
            landed,
        };
        if let Some((io, why)) = self.offer(io, None) {
            self.seen.deferred += 1;
            self.held.push_back((io, self.now_ns, why));
        }
    }

    /// Shows an I/O to the filter; gives it back if it is to be held.
    fn offer(&mut self, io: Io, waited: Option<(u64, Why)>) -> Option<(Io, Why)> {
        let published = self.disk.producer().published();
        let sources = [Source::from_slice(&io.data)];
        let change = Change {
            kind: io.kind,
            offset_bytes: io.at as u64,
            len_bytes: io.len as u64,
            sources: if io.data.is_empty() { &[] } else { &sources },
        };
        // Who came first goes first, unless all go by the marks.
        let room = |(_, _, why): &(Io, u64, Why)| *why == Why::Room;
        let waits = waited.is_none() && self.held.iter().any(room);
        let waits = waits && self.disk.state() != LaneState::Tracking;
        let decision = match waited {
            None => self.disk.start(&change, stamps!(self)),
            Some((ns, why)) => self.disk.retry(&change, stamps!(self), ns, why),
        };
        match decision {
            Decision::Pass { token, .. } => {
                assert!(!waits, "went before those that wait");
                if self.disk.producer().published() == published {
                    assert!(self.marked(io.at, io.len), "neither published nor marked");
                    self.seen.tracked += 1;
                }
                assert_eq!(Token::from_word(token.to_word()), Some(token));
                self.inflight.push((io, token));
                None
            }
            Decision::Defer(why) => {
                let sidecar = why == Why::Intent && self.config.intent_strict;
                let late = waited.is_some_and(|(ns, _)| ns >= BUDGET_NS);
                assert!(sidecar || !late, "held too long for {why:?}");
                Some((io, why))
            }
        }
    }

    pub(super) fn retry(&mut self) {
        let mut kept = VecDeque::new();
        while let Some((io, since, why)) = self.held.pop_front() {
            if let Some((io, why)) = self.offer(io, Some((self.now_ns - since, why))) {
                kept.push_back((io, since, why));
                if why == Why::Room {
                    break; // those behind it wait for room, too, or have come later
                }
            }
        }
        kept.append(&mut self.held);
        self.held = kept;
    }

    pub(super) fn abort(&mut self) {
        if !self.held.is_empty() {
            let at = self.numbers.below(self.held.len() as u64) as usize;
            if let Some((_, _, why)) = self.held.remove(at) {
                self.disk.forget_deferred(why);
            }
        }
    }

    /// A write reaches the disk, some time before its completion is told.
    pub(super) fn land(&mut self) {
        let at = self.numbers.below(self.inflight.len() as u64) as usize;
        if let Some((io, _)) = self.inflight.get_mut(at) {
            io.landed = true;
            let io = io.clone();
            io.land(&mut self.primary, io.len);
        }
    }

    pub(super) fn complete(&mut self) {
        if self.inflight.is_empty() {
            return;
        }
        let at = self.numbers.below(self.inflight.len() as u64) as usize;
        let (io, token) = self.inflight.swap_remove(at);
        let ok = !self.numbers.chance(3);
        if !ok {
            self.seen.failed += 1;
        }
        if !io.landed {
            // A write that fails leaves any part of itself.
            let part = self.numbers.below(io.len as u64 / 512 + 1) as usize * 512;
            io.land(&mut self.primary, if ok { io.len } else { part });
        }
        let completed = self.disk.done(token, ok, stamps!(self));
        assert!(ok || completed.sync);
        // An answer that comes twice changes nothing.
        let again = self.disk.done(token, false, stamps!(self));
        assert_eq!(again, super::super::Completed::default());
    }

    pub(super) fn drive_sync(&mut self) {
        for _ in 0..8 {
            self.disk.tick();
            match self.disk.sync_step(stamps!(self)) {
                SyncStep::Idle | SyncStep::Wait { .. } => return,
                SyncStep::Finished { .. } => {
                    self.seen.finished += 1;
                    assert_eq!(self.disk.dirty_bytes(), 0);
                    let seq = self.disk.producer().published().0;
                    let expected = self.expected();
                    return self.ends.push_back((seq, expected));
                }
                SyncStep::Read {
                    ticket,
                    offset_bytes,
                    len_bytes,
                    ..
                } => {
                    let at = offset_bytes as usize;
                    let early = self.primary[at..at + len_bytes as usize].to_vec();
                    self.reading.push(Reading { ticket, at, early });
                }
            }
        }
    }

    /// The disk answers a read: each part of it as it was at some time since.
    pub(super) fn sync_read_back(&mut self) {
        if self.reading.is_empty() {
            return;
        }
        let which = self.numbers.below(self.reading.len() as u64) as usize;
        let Reading { ticket, at, early } = self.reading.swap_remove(which);
        let late = self.numbers.below(early.len() as u64 + 1) as usize;
        let mut data = early;
        let end = at + data.len();
        data[late..].copy_from_slice(&self.primary[at + late..end]);
        let data = (!self.numbers.chance(5)).then_some(data.as_slice());
        let hashes: Vec<_> = match data {
            Some(data) if self.disk.wants_hashes() => {
                data.chunks_exact(BLOCK).map(super::crash::hash).collect()
            }
            _ => Vec::new(),
        };
        self.disk
            .sync_read_hashed(ticket, data, &hashes, stamps!(self));
    }

    /// The daemon takes and sends, the appliance applies and acknowledges.
    pub(super) fn drain(&mut self, runs: u64) {
        self.take_runs(runs);
        self.answer_hashes();
    }

    fn take_runs(&mut self, runs: u64) {
        for _ in 0..runs {
            let run = match self.consumer.take(300_000) {
                Ok(Some(run)) => run,
                Ok(None) => break,
                Err(fault) => {
                    // Its predecessor went away before it saw the answer to its request.
                    assert!(self.reattached, "{fault}");
                    let durable = self.consumer.durable().0;
                    return self.consumer.request_restart(durable);
                }
            };
            let bytes = self.lane.bytes_of(&run).unwrap();
            if !self.apply(&bytes) {
                // Gone between its answer and the new beginning: the daemon asks again.
                self.seen.gaps += 1;
                assert!(self.epoch > 1, "a gap, and nobody was gone");
                let above = self.receiver.received().0.max(run.last_seq);
                return self.consumer.request_restart(above);
            }
            let held = self.receiver.received().0.min(self.consumer.sent().0);
            let from = self.consumer.durable().0.min(held);
            let all = runs == u64::MAX || self.numbers.chance(60);
            let to = if all {
                held
            } else {
                self.numbers.between(from, held)
            };
            assert!(self.consumer.release(Durable(to)));
        }
    }

    fn apply(&mut self, bytes: &[u8]) -> bool {
        for record in RecordIter::new(bytes) {
            let record = record.unwrap();
            let header = record.header;
            match self.receiver.admit(&header) {
                Ok(Admit::Append) if header.flags & FLAG_STREAM_BASE == 0 => {}
                Ok(Admit::Append) if header.offset_bytes == 0 => self.beside.full_base = header.seq,
                Ok(Admit::Append) => {}
                Ok(Admit::Duplicate) => continue,
                Err(_) => return false,
            }
            let (at, end) = match header.is_marker() {
                true => (0, 0),
                false => (header.offset_bytes as usize, header.end_bytes() as usize),
            };
            if end > self.replica.len() {
                self.replica.resize(end, 0);
            }
            match header.kind {
                RecordKind::Write | RecordKind::Sync => {
                    self.replica[at..end].copy_from_slice(record.payload);
                }
                RecordKind::Zero | RecordKind::Unmap => self.replica[at..end].fill(0),
                RecordKind::Void | RecordKind::Pad => {}
            }
            while self.ends.front().is_some_and(|(seq, _)| *seq < header.seq) {
                self.ends.pop_front(); // of a stream that was given up
            }
            if header.flags & FLAG_SYNC_END != 0 {
                let (seq, expected) = self.ends.pop_front().unwrap();
                assert_eq!(seq, header.seq);
                self.replica.resize(expected.len(), 0);
                assert!(self.replica == expected, "SYNC_END over a difference");
            }
        }
        true
    }

    pub(super) fn ask_for_restart(&mut self) {
        let above = self.receiver.received().0 + self.numbers.below(3);
        self.consumer.request_restart(above);
        self.seen.restarts += 1;
    }

    pub(super) fn grow(&mut self) {
        let more = self.numbers.between(1, 300) as usize * 512;
        let new = self.primary.len() + more;
        if new > 60 * BLOCK {
            return;
        }
        // What a new part holds is the host's matter: not always zeros.
        let fill = self.noise[new..new + more].to_vec();
        self.primary.extend_from_slice(&fill);
        assert!(self.disk.grow(new as u64));
        self.seen.grown += 1;
        if self.numbers.chance(20) {
            self.crash();
        } else {
            self.know_length();
        }
    }

    /// The content changes below the filter; the guest stands still meanwhile.
    pub(super) fn revert(&mut self) {
        if !self.held.is_empty() || !self.inflight.is_empty() {
            return;
        }
        // The host waits for the sidecar before it changes the content. Everything else goes on, then and
        // until it says that it has: it may take long.
        self.disk.change_begins();
        self.settle_intent();
        self.everything_else();
        if self.numbers.chance(10) {
            return self.disk.change_ends(false);
        }
        let at = self.numbers.below(4 << 20) as usize;
        let len = self.primary.len();
        self.primary.copy_from_slice(&self.noise[at..at + len]);
        match self.numbers.below(10) {
            0 => self.crash(),
            1 => self.kill(),
            _ => {
                self.everything_else();
                self.disk.change_ends(true);
            }
        }
    }

    fn everything_else(&mut self) {
        for _ in 0..self.numbers.below(100) {
            self.now_ns += self.numbers.below(20_000_000);
            match self.numbers.below(4) {
                0 => self.drive_sync(),
                1 => self.sync_read_back(),
                2 => self.drive_intent(),
                _ => self.drain(3),
            }
        }
    }

    /// The VM's process dies: what was passed down may land or not, nobody hears of it. Then the
    /// disk is opened again.
    pub(super) fn kill(&mut self) {
        self.seen.kills += 1;
        self.held.clear();
        self.reading.clear();
        for (io, _) in std::mem::take(&mut self.inflight) {
            if self.numbers.chance(50) {
                io.land(&mut self.primary, io.len);
            }
        }
        self.reopen(Start::Marked);
    }

    pub(super) fn close(&mut self) {
        if !self.held.is_empty() || !self.inflight.is_empty() || !self.reading.is_empty() {
            return;
        }
        let clean = self.disk.close();
        self.reopen(if clean { Start::Clean } else { Start::Marked });
    }

    fn reopen(&mut self, start: Start) {
        let memory = self.lane.memory();
        self.seen.touched += self.disk.counters().sync_touched;
        let found = scan(memory).unwrap();
        self.epoch += 1;
        let mut producer = Producer::new(memory, self.epoch, found.tail, found.next_seq);
        let start = if producer.restart_requested() {
            producer.restart();
            Start::Full
        } else {
            start
        };
        let capacity = self.primary.len() as u64;
        // Whatever was under way to the files ends before the process does.
        while self.beside.busy() {
            self.drive_intent();
        }
        let intent = self.beside.load();
        self.disk = Disk::new(producer, capacity, start, Some(intent), self.config);
    }
}
