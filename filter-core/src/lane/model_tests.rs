//! Producer and consumer of one lane against a plain list of records.
//!
//! The model knows what was published, where in the stream it lies, and what the consumer was told;
//! after each step the shared words, the runs and the positions must be what follows from that.
#![allow(clippy::unwrap_used)]

use super::consumer::{Consumer, LaneFault, Run};
use super::layout::MIN_RING_BYTES;
use super::producer::{Draft, Producer, PublishError, Source, Stamps};
use super::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};
use super::test_lane::{HeapLane, Numbers, noise, with_seeds};
use super::walk::scan;
use crate::position::Durable;
use crate::record::{
    FLAG_FRAGMENT_MORE, FLAG_STREAM_BASE, FLAG_SYNC_BEGIN, FLAG_SYNC_END, MAX_PAYLOAD_BYTES,
    MAX_RANGE_BYTES, RecordHeader, RecordIter, RecordKind, record_span_bytes,
};

#[path = "model_publish_tests.rs"]
mod publish;

const RING: u64 = MIN_RING_BYTES;
const LARGEST: u64 = MAX_PAYLOAD_BYTES as u64;

/// A published record: its header, its bytes in the noise, its place in the stream.
#[derive(Clone, Debug)]
struct Rec {
    header: RecordHeader,
    noise_at: usize,
    start: u64,
    end: u64,
}

/// How often the rare things happened, so that a test can tell that it tested them.
#[derive(Debug, Default)]
struct Seen {
    full: u64,
    too_large: u64,
    pads: u64,
    exact_ends: u64,
    ended_at_wrap: u64,
    refused: u64,
    jumps: u64,
    sequence_faults: u64,
    fragments: u64,
    edges: u64,
}

struct World {
    lane: HeapLane,
    numbers: Numbers,
    noise: Vec<u8>,
    stamp: AtomicU64,
    cut_epoch: AtomicU32,
    producer: Producer,
    consumer: Consumer,
    /// Everything ever published, in order.
    all: Vec<Rec>,
    tail: u64,
    next_seq: u64,
    attach_epoch: u32,
    base_pending: bool,
    sent: u64,
    /// The last record that any consumer ever took: no appliance holds more.
    ever_sent: u64,
    durable: u64,
    /// Ends of the runs that were taken and not forgotten: (last seq, end).
    runs: Vec<(u64, u64)>,
    /// A restart was asked for, above this seq.
    asked: Option<u64>,
    /// The producer's answer: where the stream goes on, and the last seq before.
    answer: Option<(u64, u64)>,
    /// Epochs below this one were before the consumer came.
    epoch_floor: u32,
    asleep: bool,
    /// Of 100 calls, so many publish: decides whether the ring is full or empty most of the time.
    publishing: u64,
    seen: Seen,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let base_seq = numbers.pick(&[1, 1, 2, 1000, 1 << 40]);
        let lane = HeapLane::new(1 << 30, RING, base_seq);
        let producer = Producer::new(lane.memory(), 1, 0, base_seq);
        let consumer = Consumer::attach(lane.memory());
        Self {
            numbers,
            noise: noise(2 << 20),
            stamp: AtomicU64::new(0),
            cut_epoch: AtomicU32::new(1),
            producer,
            consumer,
            all: Vec::new(),
            tail: 0,
            next_seq: base_seq,
            attach_epoch: 1,
            base_pending: false,
            sent: base_seq - 1,
            ever_sent: base_seq - 1,
            durable: base_seq - 1,
            runs: Vec::new(),
            asked: None,
            answer: None,
            epoch_floor: 0,
            asleep: false,
            publishing: 42,
            seen: Seen::default(),
            lane,
        }
    }

    fn head(&self) -> u64 {
        self.lane.memory().consumer().head.load(Relaxed)
    }

    /// Index of the first record after `seq`.
    fn after(&self, seq: u64) -> usize {
        self.all.partition_point(|rec| rec.header.seq <= seq)
    }

    /// The run's bytes are exactly the records that come next.
    fn check_run(&mut self, run: &Run, max_bytes: usize) {
        let first = self.after(self.sent);
        let ring_offset = self.lane.ring_offset(run.base).unwrap();
        assert_eq!(ring_offset, self.all[first].start % RING);
        let bytes = self.lane.bytes_of(run).unwrap();
        let mut at = first;
        for record in RecordIter::new(&bytes) {
            let record = record.unwrap();
            let expected = &self.all[at];
            let follows = self.sent + 1 + (at - first) as u64;
            assert_eq!(record.header.seq, follows, "a gap was taken");
            let payload_crc = record.header.payload_crc;
            let header = RecordHeader {
                payload_crc,
                ..expected.header
            };
            assert_eq!(record.header, header);
            let noise = &self.noise[expected.noise_at..][..record.payload.len()];
            assert!(record.payload == noise, "payload of {}", header.seq);
            at += 1;
        }
        let last = &self.all[at - 1];
        assert_eq!(run.first_seq, self.all[first].header.seq);
        assert_eq!(run.last_seq, last.header.seq);
        assert_eq!(run.time_ns, last.header.time_ns);
        let markers = self.all[first..at].iter().rev();
        let marker = markers
            .map(|rec| rec.header)
            .find(RecordHeader::is_marker)
            .map(|header| header.flags & FLAG_SYNC_BEGIN != 0);
        assert_eq!(run.marker, marker);
        assert!(at - first == 1 || run.len_bytes <= max_bytes);
        let base = |rec: &Rec| rec.header.flags & FLAG_STREAM_BASE != 0;
        assert!(
            !self.all[first..at - 1].iter().any(base),
            "a base in company"
        );
        // It is as long as it may be.
        if let Some(next) = self.all.get(at) {
            let wraps = next.start.is_multiple_of(RING);
            self.seen.ended_at_wrap += u64::from(wraps);
            let too_long = run.len_bytes + next.header.span_bytes() > max_bytes;
            // What does not follow is a fault, of the next call: what was good goes first.
            let jumps = next.header.seq != run.last_seq + 1;
            assert!(
                wraps || too_long || jumps || base(last),
                "ends early at {}",
                run.last_seq
            );
        }
        self.sent = run.last_seq;
        self.ever_sent = self.ever_sent.max(self.sent);
        self.runs.push((run.last_seq, last.end));
    }

    fn take(&mut self) {
        let max = self.numbers.pick(&[0, 1, 64, 5000, 300_000, 1 << 20]);
        let max_bytes = self.numbers.pick(&[max, usize::MAX]);
        let result = self.consumer.take(max_bytes);
        if self.asked.is_some() {
            let Some((at, seq)) = self.answer.take() else {
                assert_eq!(result, Ok(None));
                return;
            };
            // The consumer jumps to the stream's new beginning.
            assert!(seq >= self.durable);
            self.asked = None;
            self.runs.clear();
            (self.sent, self.durable) = (seq, seq);
            self.epoch_floor = self.epoch_of(seq);
            assert!(self.head() >= at);
            self.seen.jumps += 1;
        }
        let next = self.after(self.sent);
        match result {
            Ok(Some(run)) => self.check_run(&run, max_bytes),
            Ok(None) => assert_eq!(next, self.all.len(), "something is there"),
            Err(fault) => self.check_fault(fault),
        }
    }

    /// The one fault in a lane that nobody damaged: the consumer went away between the answer to
    /// its request and the jump, and its successor walks into the gap.
    fn check_fault(&mut self, fault: LaneFault) {
        let LaneFault::Sequence { last, found, .. } = fault else {
            panic!("{fault}")
        };
        let next = self.after(last);
        assert_eq!(self.all[next].header.seq, found);
        assert!(found > last + 1, "{fault}");
        assert!(self.seen.jumps + self.seen.sequence_faults > 0 || self.durable < last + 1);
        self.seen.sequence_faults += 1;
        self.sent = self.consumer.sent().0;
        self.ask(last);
    }

    fn ask(&mut self, above: u64) {
        self.consumer.request_restart(above);
        self.asked = Some(above.max(self.durable));
        self.answer = None;
        self.runs.clear();
    }

    fn answer(&mut self) {
        let open = self.asked.is_some() && self.answer.is_none();
        assert_eq!(self.producer.restart_requested(), open);
        let Some(above) = self.asked.filter(|_| open) else {
            return;
        };
        self.producer.restart();
        self.next_seq = self.next_seq.max(above + 1);
        self.answer = Some((self.tail, self.next_seq - 1));
        self.base_pending = true;
    }

    fn epoch_of(&self, seq: u64) -> u32 {
        let at = self.after(seq);
        at.checked_sub(1)
            .map_or(0, |at| self.all[at].header.cut_epoch)
    }

    fn release(&mut self) {
        let to = match self.numbers.below(10) {
            0 => self.sent + self.numbers.between(1, 3),
            1 => self.durable.saturating_sub(1),
            2..6 => self.sent,
            _ => self.numbers.between(self.durable, self.sent),
        };
        let before = self.head();
        let believed = self.consumer.release(Durable(to));
        assert_eq!(believed, to <= self.sent, "{to} of {}", self.sent);
        if !believed {
            assert_eq!(self.head(), before, "freed by an impossible answer");
            self.seen.refused += 1;
            return;
        }
        self.durable = self.durable.max(to);
        for (last, end) in &self.runs {
            assert!(
                *last > self.durable || self.head() >= *end,
                "a run is durable, and its space not free"
            );
        }
        let durable = self.durable;
        self.runs.retain(|(last, _)| *last > durable);
    }

    /// After a rewind the head stands at the first record that is not durable.
    fn rewound(&mut self, result: Result<(), LaneFault>) {
        self.sent = self.durable;
        self.runs.clear();
        if self.asked.is_some() {
            return assert_eq!(result, Ok(()));
        }
        let next = self.after(self.durable);
        match self.all.get(next) {
            Some(rec) if rec.header.seq != self.durable + 1 => {
                self.check_fault(result.unwrap_err());
            }
            Some(rec) => assert_eq!((result, self.head()), (Ok(()), rec.start)),
            None => assert_eq!((result, self.head()), (Ok(()), self.tail)),
        }
    }

    fn resume_after(&mut self) {
        let most = self.ever_sent.max(self.durable);
        let to = self.numbers.between(self.durable, most);
        let result = self.consumer.resume_after(Durable(to));
        self.durable = self.durable.max(to);
        self.rewound(result);
    }

    fn attach_consumer(&mut self) {
        self.consumer = Consumer::attach(self.lane.memory());
        self.asleep = false;
        self.epoch_floor = self.epoch_of(self.durable);
        self.sent = self.durable;
        self.runs.clear();
        if self.answer.take().is_some() {
            // What was asked for is answered, only the jump is lost.
            self.asked = None;
        }
        let open = self.asked.is_some();
        let next = self.after(self.durable);
        let gap = |rec: &Rec| rec.header.seq != self.durable + 1;
        if !open && self.all.get(next).is_some_and(gap) {
            self.seen.sequence_faults += 1;
            self.asked = Some(self.durable);
        }
        assert_eq!(self.consumer.restarting(), self.asked.is_some());
        assert_eq!(self.consumer.durable().0, self.durable);
    }

    fn attach_producer(&mut self) {
        let found = scan(self.lane.memory()).unwrap();
        assert_eq!((found.tail, found.next_seq), (self.tail, self.next_seq));
        assert_eq!(found.last_stamp, self.stamp.load(Relaxed));
        self.attach_epoch += 1;
        let (tail, seq) = (found.tail, found.next_seq);
        self.producer = Producer::new(self.lane.memory(), self.attach_epoch, tail, seq);
        self.base_pending = self.numbers.chance(50);
        if self.base_pending {
            self.producer.start_base(0);
        }
    }

    fn sleep_or_wake(&mut self) {
        if self.asleep {
            self.consumer.awake();
            self.asleep = false;
            return;
        }
        let drained = self.consumer.is_drained();
        let safe = self.consumer.prepare_sleep();
        self.asleep = true;
        match (self.asked, self.answer) {
            (Some(_), answer) => assert_eq!(safe, answer.is_none()),
            (None, _) => assert_eq!((safe, drained), {
                let all = self.after(self.sent) == self.all.len();
                (all, all)
            }),
        }
    }

    fn step(&mut self) {
        if self.numbers.chance(1) {
            self.publishing = self.numbers.pick(&[20, 45, 70, 85]);
        }
        if self.numbers.chance(self.publishing) {
            return self.publish();
        }
        match self.numbers.below(1000) {
            0..480 => self.take(),
            480..820 => self.release(),
            820..850 => {
                let result = self.consumer.rewind();
                self.rewound(result);
            }
            850..860 => self.resume_after(),
            860..880 => self.attach_consumer(),
            880..900 => self.attach_producer(),
            900..905 => {
                let above = self.numbers.between(self.durable, self.next_seq + 5);
                self.ask(above);
            }
            905..910 => {
                // The one that asked is gone before it sees the answer.
                self.ask(self.next_seq + 2);
                self.answer();
                self.publish();
                self.attach_consumer();
            }
            910..930 => self.answer(),
            _ => self.sleep_or_wake(),
        }
    }

    fn check(&mut self) {
        let words = self.lane.memory();
        let (theirs, ours) = (words.consumer(), words.producer());
        let published = self.producer.published().0;
        assert_eq!(published, self.next_seq - 1);
        let (sent, durable) = (self.consumer.sent().0, self.consumer.durable().0);
        assert_eq!((sent, durable), (self.sent, self.durable));
        assert!(published >= sent && sent >= durable);
        assert_eq!(ours.tail.load(Relaxed), self.tail);
        assert_eq!(ours.last_seq.load(Relaxed), published);
        assert_eq!(ours.stamping.load(Relaxed) % 2, 0);
        assert_eq!(theirs.durable_seq.load(Relaxed), durable);
        let head = self.head();
        assert_eq!(self.producer.free_bytes(), RING - (self.tail - head));
        assert_eq!(self.producer.bad_heads(), 0);
        assert_eq!(self.consumer.backlog_bytes(), self.tail - head);
        // What is not durable keeps its space; once all is durable there is none to keep.
        match self.all.get(self.after(durable)) {
            Some(rec) => assert!(head <= rec.start, "freed before it was durable"),
            None if self.asked.is_some() => {}
            None => {
                let whole = self.runs.is_empty();
                assert!(!whole || head == self.tail, "durable, and not free");
            }
        }
        if self.asked.is_none() {
            let next = self.all.get(self.after(sent));
            let base = next.is_some_and(|rec| rec.header.flags & FLAG_STREAM_BASE != 0);
            assert_eq!(self.consumer.next_is_base(), base);
            self.check_epochs();
        }
    }

    fn check_epochs(&mut self) {
        let now = self.cut_epoch.load(Relaxed);
        let oldest = self.epoch_floor.max(now.saturating_sub(30));
        let epoch = self.numbers.between(oldest.into(), u64::from(now) + 1) as u32;
        let later = self.all.partition_point(|r| r.header.cut_epoch <= epoch);
        let expected = match self.all.get(later) {
            Some(rec) if rec.header.seq <= self.sent => {
                self.seen.edges += 1;
                rec.header.seq - 1
            }
            _ => self.sent,
        };
        assert_eq!(self.consumer.last_seq_of_epoch(epoch), expected, "{epoch}");
    }

    /// Everything is taken and acknowledged: the ring must be empty then.
    fn drain(&mut self) {
        for _ in 0..100_000 {
            if self.durable == self.next_seq - 1 && self.asked.is_none() {
                break;
            }
            self.answer();
            self.take();
            if self.consumer.release(Durable(self.sent)) {
                self.durable = self.durable.max(self.sent);
                self.runs.clear();
            }
        }
        self.check();
        assert_eq!(self.head(), self.tail, "wholly durable, and not empty");
        assert_eq!(self.producer.free_bytes(), RING);
    }
}

#[test]
fn any_order_of_calls_gives_what_the_model_gives() {
    let total = std::cell::RefCell::new(Seen::default());
    with_seeds(16, |seed| {
        let mut world = World::new(seed);
        for _ in 0..8000 {
            world.step();
            world.check();
        }
        world.drain();
        let (mut sum, seen) = (total.borrow_mut(), &world.seen);
        sum.full += seen.full;
        sum.too_large += seen.too_large;
        sum.pads += seen.pads;
        sum.exact_ends += seen.exact_ends;
        sum.ended_at_wrap += seen.ended_at_wrap;
        sum.refused += seen.refused;
        sum.jumps += seen.jumps;
        sum.sequence_faults += seen.sequence_faults;
        sum.fragments += seen.fragments;
        sum.edges += seen.edges;
    });
    let seen = total.into_inner();
    println!("{seen:?}");
    if std::env::var_os("JETDR_SEED").is_none() {
        let rare = [
            seen.full,
            seen.too_large,
            seen.pads,
            seen.exact_ends,
            seen.ended_at_wrap,
            seen.refused,
            seen.jumps,
            seen.sequence_faults,
            seen.fragments,
            seen.edges,
        ];
        assert!(rare.iter().all(|count| *count >= 10), "{seen:?}");
    }
}
