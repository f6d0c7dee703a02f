//! A pump over a transport that is faster than any network: how much one round does.

use super::*;
use crate::connection::Identity;
use crate::transport::{Connected, Connector, Transport};
use filter_core::lane::consumer::Run;
use filter_core::lane::layout::{Geometry, Identity as LaneIdentity, LaneState};
use filter_core::lane::producer::{Draft, Producer, Source, Stamps};
use filter_core::lane::sync::{AtomicU32, AtomicU64 as LaneU64};
use filter_core::mapping::{MappedLane, RunFolder};
use filter_core::record::RecordKind;
use filter_core::wire::{Hello, PeerRole};
use std::io::Write;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU64;

/// Takes everything at once; answers the hello and the first OPEN_LANE.
struct Swallow {
    role: PortRole,
    answers: Vec<u8>,
    writes: u32,
    frames: Arc<AtomicU64>,
}

impl Read for Swallow {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.answers.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = into.len().min(self.answers.len());
        into[..n].copy_from_slice(&self.answers[..n]);
        self.answers.drain(..n);
        Ok(n)
    }
}

impl Write for Swallow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writes += 1;
        let (durable_seq, attach_epoch) = (0, 1);
        let answer = match self.writes {
            1 => Message::Hello(Hello {
                oldest: 1,
                newest: 1,
                role: PeerRole::Appliance,
                port_offset: self.role.offset() as u8,
                peer_id: [0; 16],
                incarnation: 0,
                name: String::new(),
            })
            .encode(0),
            2 => Message::LaneOpened {
                durable_seq,
                attach_epoch,
                full_base_seq: 0,
            }
            .encode(1),
            _ => Vec::new(),
        };
        self.answers.extend_from_slice(&answer);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Swallow {
    fn fd(&self) -> RawFd {
        -1 // poll passes over it
    }

    fn set_limit(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn send_frame(&mut self, header: &[u8], run: &Run, sent: usize) -> io::Result<usize> {
        self.frames.fetch_add(1, Ordering::Relaxed); // a count
        Ok(header.len() + run.len_bytes - sent)
    }
}

struct Fast(Arc<AtomicU64>);

impl Connector for Fast {
    fn connect(&self, role: PortRole, _: Duration) -> io::Result<Connected> {
        let transport = Box::new(Swallow {
            role,
            answers: Vec::new(),
            writes: 0,
            frames: self.0.clone(),
        });
        Ok(Connected {
            transport,
            host_id: None,
            appliance_id: None,
        })
    }

    fn describe(&self, _: PortRole) -> String {
        "nowhere".into()
    }
}

#[test]
fn a_round_ends_although_there_is_always_more_to_send() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    let identity = LaneIdentity {
        geometry: Geometry::for_disk(1 << 30, 64 << 20).unwrap(),
        disk_id: [4; 16],
        vm_id: [5; 16],
        boot_id: [6; 16],
        base_seq: 1,
        domain: "d".into(),
        vm_name: "v".into(),
        disk_label: "l".into(),
    };
    let mapped = MappedLane::create(&run, &identity, 1 << 30).unwrap();
    let mut producer = Producer::new(mapped.memory(), 1, 0, 1);
    producer.set_state(LaneState::Streaming);
    let bytes = vec![7u8; 60 * 1024];
    let draft = Draft {
        kind: RecordKind::Write,
        offset_bytes: 0,
        len_bytes: bytes.len() as u64,
        sources: &[Source::from_slice(&bytes)],
    };
    let (stamp, cut_epoch) = (LaneU64::new(0), AtomicU32::new(1));
    let stamps = Stamps {
        stamp: &stamp,
        cut_epoch: &cut_epoch,
        time_ns: 0,
    };
    let mut published = 0;
    while let Ok(group) = producer.publish(&draft, &stamps) {
        published = group.last.seq();
    }

    let role = PortRole::Data(0);
    let pipes = PortRole::ALL.map(|role| run.wake_reader(u32::from(role.offset())).unwrap());
    let shared = Arc::new(Shared::new(pipes.into()));
    let frames = Arc::new(AtomicU64::new(0));
    let id = Identity {
        host_id: [0; 16],
        incarnation: 0,
        name: "h".into(),
    };
    let dialer = Dialer::new(role, Arc::new(Fast(frames.clone())), id, shared.clone());
    let (orders, lanes) = crossbeam::channel::unbounded();
    let pipe = run.wake_reader(u32::from(role.offset())).unwrap();
    let mut pump = Pump::new(role, dialer, (lanes, Vec::new()), pipe, shared);
    let (lane, _asks) = Lane::new(Arc::new(mapped));
    orders.send(Box::new(lane)).unwrap();
    assert!(pump.take_orders());

    let end = Instant::now() + Duration::from_secs(20);
    let (mut before, mut rounds) = (0, 0);
    loop {
        let round = pump.step().unwrap();
        let now = frames.load(Ordering::Relaxed); // a count
        let most = (ROUND_BYTES / FRAME_BYTES) as u64 * 2;
        assert!(now - before <= most, "{} frames in one round", now - before);
        rounds += u32::from(now > before);
        let sent = pump.lanes[0].consumer.sent().seq();
        if now > before && sent < published {
            assert!(round.more, "{sent} of {published} sent, and it would rest");
        }
        before = now;
        if sent == published && !round.worked {
            break;
        }
        assert!(Instant::now() < end, "{sent} of {published} sent");
        std::thread::yield_now();
    }
    assert!(rounds > 10, "{rounds} rounds for 64 MiB");
}
