#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn identity() -> Identity {
    Identity {
        geometry: Geometry::for_disk(1 << 30, MIN_RING_BYTES).unwrap(),
        disk_id: [1; 16],
        vm_id: [2; 16],
        boot_id: [3; 16],
        base_seq: 1,
        domain: "finance".into(),
        vm_name: "db-1".into(),
        disk_label: "data".into(),
    }
}

#[test]
fn identity_survives_and_each_flipped_bit_is_noticed() {
    let page = identity().encode().unwrap();
    assert_eq!(Identity::decode(&page), Ok(identity()));
    for bit in 0..page.len() * 8 {
        let mut bad = page;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Identity::decode(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn impossible_geometries_are_refused() {
    for ring_bytes in [0, 4096, MIN_RING_BYTES + 64, MAX_RING_BYTES * 2, u64::MAX] {
        assert!(
            Geometry::for_disk(1 << 30, ring_bytes).is_err(),
            "{ring_bytes}"
        );
    }
    assert!(Geometry::for_disk(u64::MAX, MIN_RING_BYTES).is_err());
    let geometry = Geometry::for_disk(1 << 30, MIN_RING_BYTES).unwrap();
    assert!(geometry.max_capacity_bytes() >= 2 << 30);
}

#[test]
fn a_name_that_is_too_long_is_refused() {
    let mut long = identity();
    long.domain = "x".repeat(MAX_NAME_BYTES + 1);
    assert!(matches!(
        long.encode(),
        Err(LaneError::Field {
            field: "name length",
            ..
        })
    ));
}

proptest! {
    #[test]
    fn arbitrary_pages_never_panic(bytes in proptest::collection::vec(any::<u8>(), 512)) {
        let page: [u8; 512] = bytes.try_into().unwrap();
        prop_assert!(Identity::decode(&page).is_err());
    }
}

/// Both sides of a lane may be of different builds: these numbers change with `LANE_VERSION` only.
#[test]
fn the_pages_lie_where_they_always_lay() {
    use core::mem::{align_of, offset_of, size_of};
    assert_eq!(LANE_MAGIC.to_le_bytes(), *b"jdrLANE1");
    assert_eq!(LANE_VERSION, 4);
    let pages = [
        PRODUCER_AT,
        INFLIGHT_AT,
        CONSUMER_AT,
        HASH_AT,
        DIRTY_AT,
        PAGE_BYTES,
    ];
    assert_eq!(pages, [4096, 8192, 12288, 16384, 20480, 4096]);
    assert_eq!(DIRTY_BLOCK_BYTES, 65_536);
    assert_eq!((MIN_RING_BYTES, MAX_RING_BYTES), (2 << 20, 1 << 30));
    assert_eq!(MAX_NAME_BYTES, 80);
    assert_eq!(crate::lane::inflight::SLOTS, 256);

    let width = |_: fn(&ProducerWords) -> &AtomicU64| size_of::<AtomicU64>();
    let narrow = |_: fn(&ProducerWords) -> &AtomicU32| size_of::<AtomicU32>();
    type P = ProducerWords;
    let producer = [
        (offset_of!(P, tail), width(|w| &w.tail)),
        (offset_of!(P, last_seq), width(|w| &w.last_seq)),
        (offset_of!(P, state), narrow(|w| &w.state)),
        (offset_of!(P, attach_epoch), narrow(|w| &w.attach_epoch)),
        (offset_of!(P, stamping), narrow(|w| &w.stamping)),
        (offset_of!(P, restart_done), narrow(|w| &w.restart_done)),
        (offset_of!(P, restart_at), width(|w| &w.restart_at)),
        (offset_of!(P, restart_seq), width(|w| &w.restart_seq)),
        (offset_of!(P, last_stamp), width(|w| &w.last_stamp)),
        (offset_of!(P, capacity_bytes), width(|w| &w.capacity_bytes)),
        (offset_of!(P, pid), narrow(|w| &w.pid)),
        (
            offset_of!(P, tracking_rounds),
            narrow(|w| &w.tracking_rounds),
        ),
        (offset_of!(P, dirty_bytes), width(|w| &w.dirty_bytes)),
        (offset_of!(P, hash_ask), narrow(|w| &w.hash_ask)),
        (offset_of!(P, hash_blocks), narrow(|w| &w.hash_blocks)),
        (offset_of!(P, hash_offset), width(|w| &w.hash_offset)),
        (offset_of!(P, intent_late), narrow(|w| &w.intent_late)),
    ];
    let expected = [
        (0, 8),
        (8, 8),
        (16, 4),
        (20, 4),
        (24, 4),
        (28, 4),
        (32, 8),
        (40, 8),
        (48, 8),
        (56, 8),
        (64, 4),
        (68, 4),
        (72, 8),
        (80, 4),
        (84, 4),
        (88, 8),
        (96, 4),
    ];
    assert_eq!(producer, expected);
    assert_eq!((size_of::<P>(), align_of::<P>()), (128, 64));

    type O = OpeningWords;
    let opening = [
        offset_of!(O, epoch),
        offset_of!(O, root_epoch),
        offset_of!(O, id),
        offset_of!(O, told_generation),
        offset_of!(O, durable_generation),
        offset_of!(O, count),
        offset_of!(O, ancestors),
    ];
    assert_eq!(opening, [0, 4, 8, 16, 24, 32, 40]);
    assert_eq!((OPENINGS_AT, size_of::<O>()), (5120, 832));

    let width = |_: fn(&ConsumerWords) -> &AtomicU64| size_of::<AtomicU64>();
    let narrow = |_: fn(&ConsumerWords) -> &AtomicU32| size_of::<AtomicU32>();
    type C = ConsumerWords;
    let consumer = [
        (offset_of!(C, head), width(|w| &w.head)),
        (offset_of!(C, durable_seq), width(|w| &w.durable_seq)),
        (offset_of!(C, sleeping), narrow(|w| &w.sleeping)),
        (
            offset_of!(C, restart_request),
            narrow(|w| &w.restart_request),
        ),
        (
            offset_of!(C, restart_above_seq),
            width(|w| &w.restart_above_seq),
        ),
        (offset_of!(C, wake_slot), narrow(|w| &w.wake_slot)),
        (offset_of!(C, linked), narrow(|w| &w.linked)),
        (offset_of!(C, uploaded_seq), width(|w| &w.uploaded_seq)),
        (offset_of!(C, fenced_epoch), narrow(|w| &w.fenced_epoch)),
        (offset_of!(C, hash_answer), narrow(|w| &w.hash_answer)),
        (offset_of!(C, hash_count), narrow(|w| &w.hash_count)),
    ];
    let expected = [
        (0, 8),
        (8, 8),
        (16, 4),
        (20, 4),
        (24, 8),
        (32, 4),
        (36, 4),
        (40, 8),
        (48, 4),
        (52, 4),
        (56, 4),
    ];
    assert_eq!(consumer, expected);
    assert_eq!((size_of::<C>(), align_of::<C>()), (64, 64));

    use LaneState::*;
    for (state, word) in [Fresh, Streaming, Syncing, Tracking, Closed]
        .into_iter()
        .zip(0..)
    {
        assert_eq!(state as u32, word);
        assert_eq!(LaneState::from_word(word), Some(state));
    }
    assert_eq!(LaneState::from_word(5), None);
}

#[test]
fn an_identity_page_has_the_bytes_it_always_had() {
    let mut page = [0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"jdrLANE1");
    put(8, &[4, 0, 0, 0]);
    put(16, &[0, 0, 0x20, 0, 0, 0, 0, 0]); // 2 MiB of ring
    put(24, &[0, 0x10, 0, 0, 0, 0, 0, 0]); // a page of map
    put(32, &[1; 16]);
    put(48, &[2; 16]);
    put(64, &[3; 16]);
    put(80, &[1, 0, 0, 0, 0, 0, 0, 0]);
    put(96, b"\x07\0\0\0finance");
    put(180, b"\x04\0\0\0db-1");
    put(264, b"\x04\0\0\0data");
    put(508, &[0xcb, 0x02, 0x43, 0x76]); // CRC32C of the 508 bytes before, by another program
    assert_eq!(identity().encode().unwrap(), page);
    assert_eq!(Identity::decode(&page), Ok(identity()));
}

/// The pages of a lane in memory: what lies where, told by the bytes.
#[test]
fn a_fresh_lane_says_what_it_was_made_for() {
    use super::super::sync::Ordering::Relaxed;
    let lane = super::super::test_lane::HeapLane::new(1 << 30, MIN_RING_BYTES, 77);
    let memory = lane.memory();
    let geometry = memory.geometry();
    assert_eq!(
        (geometry.data_at(), geometry.total_bytes()),
        (24_576, 24_576 + (2 << 20))
    );
    // SAFETY: inside the lane, which lives here; aligned.
    let word = |at: usize| unsafe { lane.base().add(at).cast::<u64>().read() };
    assert_eq!(word(4096 + 8), 76, "last seq");
    assert_eq!(word(4096 + 40), 76, "restart seq");
    assert_eq!(word(4096 + 56), 1 << 30, "capacity");
    assert_eq!(
        (word(12_288 + 8), word(12_288 + 40)),
        (76, 76),
        "durable, uploaded"
    );
    memory.inflight_words()[511].store(5, Relaxed);
    memory.dirty_words()[511].store(6, Relaxed);
    assert_eq!((word(12_288 - 8), word(24_576 - 8)), (5, 6));
    assert_eq!(
        (memory.inflight_words().len(), memory.dirty_words().len()),
        (512, 512)
    );
}

#[test]
fn a_mapping_that_is_short_or_crooked_is_refused() {
    let lane = super::super::test_lane::HeapLane::new(1 << 30, MIN_RING_BYTES, 1);
    let total = lane.memory().geometry().total_bytes() as usize;
    let base = NonNull::new(lane.base()).unwrap();
    // SAFETY: never more than the lane's length, and its memory lives here.
    let open = |len| unsafe { LaneMemory::open(base, len) };
    assert!(open(total).is_ok());
    for len in [0, 511, DIRTY_AT - 1, DIRTY_AT, total - 1] {
        assert!(
            matches!(open(len), Err(LaneError::TooShort { .. })),
            "{len}"
        );
    }
    let page = identity().encode().unwrap();
    // SAFETY: 512 bytes from there lie inside the lane.
    unsafe {
        base.add(32)
            .as_ptr()
            .copy_from_nonoverlapping(page.as_ptr(), 512)
    };
    // SAFETY: what is mapped from there is 32 bytes less.
    let crooked = unsafe { LaneMemory::open(base.add(32), total - 32) };
    assert_eq!(crooked.map(|_| ()), Err(LaneError::Alignment));
}
