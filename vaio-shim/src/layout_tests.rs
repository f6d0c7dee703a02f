//! The C compiler and the bindings agree on the contract's layout.

use crate::abi;
use core::ffi::{CStr, c_char};
use std::mem::{offset_of, size_of};

unsafe extern "C" {
    fn jetdr_layout_count() -> usize;
    fn jetdr_layout_name(i: usize) -> *const c_char;
    fn jetdr_layout_value(i: usize) -> usize;
}

#[test]
fn c_and_rust_agree() {
    let rust = [
        ("jio_iovec_t", size_of::<abi::jio_iovec>()),
        ("jio_io_t", size_of::<abi::jio_io>()),
        ("jio_request_t", size_of::<abi::jio_request>()),
        ("jio_property_t", size_of::<abi::jio_property>()),
        ("jio_disk_info_t", size_of::<abi::jio_disk_info>()),
        ("jio_snapshot_t", size_of::<abi::jio_snapshot>()),
        ("jio_requirements_t", size_of::<abi::jio_requirements>()),
        ("jio_filter_status_t", size_of::<abi::jio_filter_status>()),
        ("jio_host_t", size_of::<abi::jio_host>()),
        ("jio_filter_t", size_of::<abi::jio_filter>()),
        ("jio_io_t.filter_word", offset_of!(abi::jio_io, filter_word)),
        ("jio_request_t.done", offset_of!(abi::jio_request, done)),
        (
            "jio_disk_info_t.properties",
            offset_of!(abi::jio_disk_info, properties),
        ),
        ("jio_host_t.submit", offset_of!(abi::jio_host, submit)),
        (
            "jio_host_t.sidecar_create",
            offset_of!(abi::jio_host, sidecar_create),
        ),
        (
            "jio_host_t.timer_start",
            offset_of!(abi::jio_host, timer_start),
        ),
        (
            "jio_host_t.work_submit",
            offset_of!(abi::jio_host, work_submit),
        ),
        (
            "jio_host_t.property_get",
            offset_of!(abi::jio_host, property_get),
        ),
        (
            "jio_host_t.event_post",
            offset_of!(abi::jio_host, event_post),
        ),
        (
            "jio_filter_t.io_start",
            offset_of!(abi::jio_filter, io_start),
        ),
        ("jio_filter_t.stun", offset_of!(abi::jio_filter, stun)),
        ("jio_filter_t.status", offset_of!(abi::jio_filter, status)),
    ];
    // SAFETY: plain functions without arguments that could be wrong.
    let count = unsafe { jetdr_layout_count() };
    assert_eq!(count, rust.len());
    for (i, (name, value)) in rust.into_iter().enumerate() {
        // SAFETY: `i` is below the count, so the name is a C string.
        let c_name = unsafe { CStr::from_ptr(jetdr_layout_name(i)) };
        assert_eq!(c_name.to_str(), Ok(name));
        // SAFETY: as above.
        assert_eq!(unsafe { jetdr_layout_value(i) }, value, "{name}");
    }
}
