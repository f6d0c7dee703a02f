//! The model's producer: what it publishes, and where in the stream that must lie.

use super::*;

impl World {
    /// Takes a record into the model, at the place that the layout's rules give it.
    fn record(&mut self, header: RecordHeader, noise_at: usize) {
        let span = record_span_bytes(header.payload_len) as u64;
        let contiguous = RING - self.tail % RING;
        if contiguous < span {
            self.tail += contiguous;
            self.seen.pads += 1;
        }
        let (start, end) = (self.tail, self.tail + span);
        self.seen.exact_ends += u64::from(end.is_multiple_of(RING));
        self.tail = end;
        self.next_seq += 1;
        self.all.push(Rec {
            header,
            noise_at,
            start,
            end,
        });
    }

    fn header(&self, kind: RecordKind, flags: u8, offset_bytes: u64, len: u64) -> RecordHeader {
        let has_data = matches!(kind, RecordKind::Write | RecordKind::Sync) && len > 0;
        RecordHeader {
            kind,
            flags,
            payload_len: if has_data { len as u32 } else { 0 },
            payload_crc: 0,
            seq: self.next_seq,
            stamp: 0,
            offset_bytes,
            attach_epoch: self.attach_epoch,
            cut_epoch: self.cut_epoch.load(Relaxed),
            time_ns: 77 * self.next_seq,
            range_len: len as u32,
        }
    }

    fn data_len(&mut self) -> u64 {
        let contiguous = RING - self.tail % RING;
        let fits_exactly = contiguous.saturating_sub(64);
        match self.numbers.below(100) {
            0..25 if (1..=LARGEST).contains(&fits_exactly) => fits_exactly,
            25..35 if (1..LARGEST).contains(&fits_exactly) => fits_exactly + 1,
            35..45 if (2..=LARGEST).contains(&fits_exactly) => fits_exactly - 1,
            45..52 => LARGEST,
            52..57 => self.numbers.between(LARGEST + 1, RING / 2 - LARGEST),
            57..58 => self.numbers.between(RING / 2, RING),
            58..70 => self.numbers.pick(&[1, 63, 64, 65, 512, 4095, 4096]),
            70..80 => self.numbers.between(1, LARGEST),
            _ => self.numbers.between(1, 20_000),
        }
    }

    pub(super) fn publish(&mut self) {
        if self.numbers.chance(5) {
            let next = self.cut_epoch.load(Relaxed) + self.numbers.between(1, 3) as u32;
            self.cut_epoch.store(next, Relaxed);
        }
        let kind = self.numbers.pick(&[
            RecordKind::Write,
            RecordKind::Write,
            RecordKind::Write,
            RecordKind::Sync,
            RecordKind::Zero,
            RecordKind::Unmap,
            RecordKind::Void,
        ]);
        if self.numbers.chance(6) {
            return self.publish_marker();
        }
        let has_data = matches!(kind, RecordKind::Write | RecordKind::Sync);
        let range = u64::from(MAX_RANGE_BYTES);
        let (len, step) = if has_data {
            (self.data_len(), LARGEST)
        } else {
            let most = self.numbers.pick(&[1, 4096, range, 3 * range]);
            (self.numbers.between(1, most), range)
        };
        let noise_at = self
            .numbers
            .below((self.noise.len() as u64 - len.min(RING)) / 2) as usize;
        let offset_bytes = self.numbers.below(1 << 40);
        let noise = std::mem::take(&mut self.noise);
        let mut sources = Vec::new();
        if has_data {
            let (mut at, end) = (noise_at, noise_at + len as usize);
            while at < end {
                let most = self.numbers.pick(&[0, 1, 512, 70_000, len]).min(len);
                let take = (self.numbers.below(most + 1) as usize).min(end - at);
                let take = if sources.len() > 20 { end - at } else { take };
                sources.push(Source::from_slice(&noise[at..at + take]));
                at += take;
            }
        }
        let draft = Draft {
            kind,
            offset_bytes,
            len_bytes: len,
            sources: &sources,
        };
        let time_ns = 77 * self.next_seq;
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: &self.cut_epoch,
            time_ns,
        };
        let mut first_stamp = self.stamp.load(Relaxed);
        let result = self.producer.publish(&draft, &stamps);
        self.noise = noise;
        let largest = if has_data {
            record_span_bytes(len.min(step) as u32) as u64
        } else {
            64
        };
        let needed = (len.div_ceil(step) + 1) * largest;
        let free = RING - (self.tail - self.head());
        match result {
            Err(PublishError::TooLarge { .. }) => {
                assert!(needed > RING / 2);
                self.seen.too_large += 1;
            }
            Err(PublishError::Full { .. }) => {
                assert!(needed <= RING / 2 && needed > free, "{needed} of {free}");
                assert!(free < RING, "an empty ring takes everything");
                self.seen.full += 1;
            }
            Err(PublishError::Range) => panic!("the range is a good one"),
            Ok(group) => {
                assert!(needed <= free.min(RING / 2), "{needed} of {free}");
                assert_eq!(group.wake, self.asleep);
                let mut done = 0;
                while done < len {
                    let piece = step.min(len - done);
                    let more = done + piece < len;
                    let flags = if more { FLAG_FRAGMENT_MORE } else { 0 };
                    self.seen.fragments += u64::from(more);
                    let mut header = self.header(kind, flags, offset_bytes + done, piece);
                    first_stamp += 1;
                    header.stamp = first_stamp;
                    header.time_ns = time_ns;
                    let bytes_before = if has_data { done as usize } else { 0 };
                    self.record(header, noise_at + bytes_before);
                    done += piece;
                }
                assert_eq!(group.last.seq(), self.next_seq - 1);
            }
        }
    }

    fn publish_marker(&mut self) {
        let begin = self.numbers.chance(50);
        let flags = match (begin, self.base_pending) {
            (true, true) => FLAG_SYNC_BEGIN | FLAG_STREAM_BASE,
            (true, false) => FLAG_SYNC_BEGIN,
            (false, _) => FLAG_SYNC_END,
        };
        let mut header = self.header(RecordKind::Sync, flags, 0, 0);
        header.stamp = self.stamp.load(Relaxed) + 1;
        let stamps = Stamps {
            stamp: &self.stamp,
            cut_epoch: &self.cut_epoch,
            time_ns: 77 * self.next_seq,
        };
        if let Ok(group) = self.producer.publish_marker(begin, &stamps) {
            assert_eq!(group.last.seq(), self.next_seq);
            assert_eq!(group.wake, self.asleep);
            self.base_pending &= !begin;
            self.record(header, 0);
        } else {
            assert!(RING - (self.tail - self.head()) < 128);
        }
    }
}
