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
