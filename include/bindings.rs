/* automatically generated from iofilter.h by tests/conformance/examples/bindings.rs; do not edit.
   The filter library and the simulated host include it, each in a module of its own. */

pub const JIO_ABI_MAJOR: u32 = 1;
pub const JIO_ABI_MINOR: u32 = 1;
pub const JIO_ABI_VERSION: u32 = 65537;
pub const JIO_PROPERTY_KEY_MAX: u32 = 64;
pub const JIO_PROPERTY_VALUE_MAX: u32 = 1024;
pub const JIO_PROPERTIES_MAX: u32 = 256;
pub const JIO_IOV_MAX: u32 = 1024;
pub const JIO_IO_LEN_MAX: u32 = 33554432;
pub const JIO_LOG_MESSAGE_MAX: u32 = 4096;
pub const JIO_SIDECAR_UNIT_BYTES: u32 = 4096;
pub const JIO_SIDECAR_MAX_BYTES: u32 = 268435456;
pub const JIO_OK: i32 = 0;
pub const JIO_E_INVALID: i32 = -1;
pub const JIO_E_NOT_SUPPORTED: i32 = -2;
pub const JIO_E_NO_MEMORY: i32 = -3;
pub const JIO_E_NOT_FOUND: i32 = -4;
pub const JIO_E_EXISTS: i32 = -5;
pub const JIO_E_BUSY: i32 = -6;
pub const JIO_E_CLOSED: i32 = -7;
pub const JIO_E_ABI: i32 = -8;
pub const JIO_E_RANGE: i32 = -9;
pub const JIO_E_TIMED_OUT: i32 = -10;
pub const JIO_E_CANCELLED: i32 = -11;
pub const JIO_E_DENIED: i32 = -12;
pub const JIO_E_INTERNAL: i32 = -13;
pub const JIO_E_IO: i32 = -32;
pub const JIO_E_NO_SPACE: i32 = -33;
pub const JIO_E_READ_ONLY: i32 = -34;
pub const JIO_IO_READ: u32 = 1;
pub const JIO_IO_WRITE: u32 = 2;
pub const JIO_IO_ZERO: u32 = 3;
pub const JIO_IO_UNMAP: u32 = 4;
pub const JIO_IO_FLUSH: u32 = 5;
pub const JIO_IO_FUA: u32 = 1;
pub const JIO_IO_MAY_UNMAP: u32 = 2;
pub const JIO_PASS: u32 = 1;
pub const JIO_COMPLETE: u32 = 2;
pub const JIO_FAIL: u32 = 3;
pub const JIO_DEFER: u32 = 4;
pub const JIO_PURPOSE_VM: u32 = 1;
pub const JIO_PURPOSE_OFFLINE: u32 = 2;
pub const JIO_DISK_READ_ONLY: u32 = 1;
pub const JIO_DISK_MIGRATED: u32 = 2;
pub const JIO_DISK_CREATED: u32 = 4;
pub const JIO_CLOSE_CLEAN: u32 = 1;
pub const JIO_CLOSE_HANDOFF: u32 = 2;
pub const JIO_CLOSE_LOST: u32 = 3;
pub const JIO_PHASE_PRE: u32 = 1;
pub const JIO_PHASE_POST: u32 = 2;
pub const JIO_PHASE_CANCEL: u32 = 3;
pub const JIO_SNAPSHOT_CREATE: u32 = 1;
pub const JIO_SNAPSHOT_REVERT: u32 = 2;
pub const JIO_SNAPSHOT_CONSOLIDATE: u32 = 3;
pub const JIO_MIGRATE_PREPARE: u32 = 1;
pub const JIO_MIGRATE_HANDOFF: u32 = 2;
pub const JIO_MIGRATE_ARRIVED: u32 = 3;
pub const JIO_MIGRATE_CANCEL: u32 = 4;
pub const JIO_MIGRATE_VM: u32 = 1;
pub const JIO_MIGRATE_STORAGE: u32 = 2;
pub const JIO_STATE_IDLE: u32 = 1;
pub const JIO_STATE_STREAMING: u32 = 2;
pub const JIO_STATE_TRACKING: u32 = 3;
pub const JIO_STATE_SYNCING: u32 = 4;
pub const JIO_STATE_FAILED: u32 = 5;
pub const JIO_ALARM_NO_CONSUMER: u32 = 1;
pub const JIO_ALARM_BACK_PRESSURE: u32 = 2;
pub const JIO_ALARM_TRACKING: u32 = 4;
pub const JIO_ALARM_SIDECAR: u32 = 8;
pub const JIO_ALARM_INTERNAL: u32 = 16;
pub const JIO_ALARM_ACK_FALLBACK: u32 = 32;
pub const JIO_LOG_ERROR: u32 = 1;
pub const JIO_LOG_WARN: u32 = 2;
pub const JIO_LOG_INFO: u32 = 3;
pub const JIO_LOG_DEBUG: u32 = 4;
pub const JIO_CLASS_INSPECTION: u32 = 1;
pub const JIO_CLASS_COMPRESSION: u32 = 2;
pub const JIO_CLASS_ENCRYPTION: u32 = 3;
pub const JIO_CLASS_REPLICATION: u32 = 4;
pub const JIO_CLASS_CACHE: u32 = 5;
pub const JIO_FILTER_ENTRY_SYMBOL: &[u8; 17] = b"jio_filter_entry\0";
pub type jio_status_t = i32;
pub type jio_verdict_t = u32;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_iovec {
    pub base: *mut ::core::ffi::c_void,
    pub len_bytes: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_iovec"][::core::mem::size_of::<jio_iovec>() - 16usize];
    ["Alignment of jio_iovec"][::core::mem::align_of::<jio_iovec>() - 8usize];
    ["Offset of field: jio_iovec::base"][::core::mem::offset_of!(jio_iovec, base) - 0usize];
    ["Offset of field: jio_iovec::len_bytes"][::core::mem::offset_of!(jio_iovec, len_bytes) - 8usize];
};
pub type jio_iovec_t = jio_iovec;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_io {
    pub size: u32,
    pub kind: u32,
    pub flags: u32,
    pub iov_count: u32,
    pub id: u64,
    pub offset_bytes: u64,
    pub len_bytes: u64,
    pub iov: *const jio_iovec_t,
    pub filter_word: [u64; 2usize],
    pub reserved: [u64; 3usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_io"][::core::mem::size_of::<jio_io>() - 88usize];
    ["Alignment of jio_io"][::core::mem::align_of::<jio_io>() - 8usize];
    ["Offset of field: jio_io::size"][::core::mem::offset_of!(jio_io, size) - 0usize];
    ["Offset of field: jio_io::kind"][::core::mem::offset_of!(jio_io, kind) - 4usize];
    ["Offset of field: jio_io::flags"][::core::mem::offset_of!(jio_io, flags) - 8usize];
    ["Offset of field: jio_io::iov_count"][::core::mem::offset_of!(jio_io, iov_count) - 12usize];
    ["Offset of field: jio_io::id"][::core::mem::offset_of!(jio_io, id) - 16usize];
    ["Offset of field: jio_io::offset_bytes"][::core::mem::offset_of!(jio_io, offset_bytes) - 24usize];
    ["Offset of field: jio_io::len_bytes"][::core::mem::offset_of!(jio_io, len_bytes) - 32usize];
    ["Offset of field: jio_io::iov"][::core::mem::offset_of!(jio_io, iov) - 40usize];
    ["Offset of field: jio_io::filter_word"][::core::mem::offset_of!(jio_io, filter_word) - 48usize];
    ["Offset of field: jio_io::reserved"][::core::mem::offset_of!(jio_io, reserved) - 64usize];
};
pub type jio_io_t = jio_io;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_request {
    pub size: u32,
    pub kind: u32,
    pub flags: u32,
    pub iov_count: u32,
    pub offset_bytes: u64,
    pub len_bytes: u64,
    pub iov: *const jio_iovec_t,
    pub done: ::core::option::Option<
        unsafe extern "C" fn(
            userdata: *mut ::core::ffi::c_void,
            request: *mut jio_request,
            status: jio_status_t,
        ),
    >,
    pub userdata: *mut ::core::ffi::c_void,
    pub host_word: [u64; 4usize],
    pub reserved: [u64; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_request"][::core::mem::size_of::<jio_request>() - 104usize];
    ["Alignment of jio_request"][::core::mem::align_of::<jio_request>() - 8usize];
    ["Offset of field: jio_request::size"][::core::mem::offset_of!(jio_request, size) - 0usize];
    ["Offset of field: jio_request::kind"][::core::mem::offset_of!(jio_request, kind) - 4usize];
    ["Offset of field: jio_request::flags"][::core::mem::offset_of!(jio_request, flags) - 8usize];
    ["Offset of field: jio_request::iov_count"][::core::mem::offset_of!(jio_request, iov_count) - 12usize];
    ["Offset of field: jio_request::offset_bytes"][::core::mem::offset_of!(jio_request, offset_bytes) - 16usize];
    ["Offset of field: jio_request::len_bytes"][::core::mem::offset_of!(jio_request, len_bytes) - 24usize];
    ["Offset of field: jio_request::iov"][::core::mem::offset_of!(jio_request, iov) - 32usize];
    ["Offset of field: jio_request::done"][::core::mem::offset_of!(jio_request, done) - 40usize];
    ["Offset of field: jio_request::userdata"][::core::mem::offset_of!(jio_request, userdata) - 48usize];
    ["Offset of field: jio_request::host_word"][::core::mem::offset_of!(jio_request, host_word) - 56usize];
    ["Offset of field: jio_request::reserved"][::core::mem::offset_of!(jio_request, reserved) - 88usize];
};
pub type jio_request_t = jio_request;
#[repr(C)]
#[derive(Debug)]
pub struct jio_disk {
    _unused: [u8; 0],
}
pub type jio_disk_t = jio_disk;
#[repr(C)]
#[derive(Debug)]
pub struct jio_sidecar {
    _unused: [u8; 0],
}
pub type jio_sidecar_t = jio_sidecar;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_property {
    pub key: *const ::core::ffi::c_char,
    pub value: *const ::core::ffi::c_char,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_property"][::core::mem::size_of::<jio_property>() - 16usize];
    ["Alignment of jio_property"][::core::mem::align_of::<jio_property>() - 8usize];
    ["Offset of field: jio_property::key"][::core::mem::offset_of!(jio_property, key) - 0usize];
    ["Offset of field: jio_property::value"][::core::mem::offset_of!(jio_property, value) - 8usize];
};
pub type jio_property_t = jio_property;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_disk_info {
    pub size: u32,
    pub purpose: u32,
    pub flags: u32,
    pub block_bytes: u32,
    pub capacity_bytes: u64,
    pub disk_uuid: [u8; 16usize],
    pub vm_uuid: [u8; 16usize],
    pub label: *const ::core::ffi::c_char,
    pub path: *const ::core::ffi::c_char,
    pub vm_name: *const ::core::ffi::c_char,
    pub run_dir: *const ::core::ffi::c_char,
    pub boot_id: *const ::core::ffi::c_char,
    pub properties: *const jio_property_t,
    pub property_count: u64,
    pub content_id: u64,
    pub content_id_before: u64,
    pub reserved: [u64; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_disk_info"][::core::mem::size_of::<jio_disk_info>() - 144usize];
    ["Alignment of jio_disk_info"][::core::mem::align_of::<jio_disk_info>() - 8usize];
    ["Offset of field: jio_disk_info::size"][::core::mem::offset_of!(jio_disk_info, size) - 0usize];
    ["Offset of field: jio_disk_info::purpose"][::core::mem::offset_of!(jio_disk_info, purpose) - 4usize];
    ["Offset of field: jio_disk_info::flags"][::core::mem::offset_of!(jio_disk_info, flags) - 8usize];
    ["Offset of field: jio_disk_info::block_bytes"][::core::mem::offset_of!(jio_disk_info, block_bytes) - 12usize];
    ["Offset of field: jio_disk_info::capacity_bytes"][::core::mem::offset_of!(jio_disk_info, capacity_bytes) - 16usize];
    ["Offset of field: jio_disk_info::disk_uuid"][::core::mem::offset_of!(jio_disk_info, disk_uuid) - 24usize];
    ["Offset of field: jio_disk_info::vm_uuid"][::core::mem::offset_of!(jio_disk_info, vm_uuid) - 40usize];
    ["Offset of field: jio_disk_info::label"][::core::mem::offset_of!(jio_disk_info, label) - 56usize];
    ["Offset of field: jio_disk_info::path"][::core::mem::offset_of!(jio_disk_info, path) - 64usize];
    ["Offset of field: jio_disk_info::vm_name"][::core::mem::offset_of!(jio_disk_info, vm_name) - 72usize];
    ["Offset of field: jio_disk_info::run_dir"][::core::mem::offset_of!(jio_disk_info, run_dir) - 80usize];
    ["Offset of field: jio_disk_info::boot_id"][::core::mem::offset_of!(jio_disk_info, boot_id) - 88usize];
    ["Offset of field: jio_disk_info::properties"][::core::mem::offset_of!(jio_disk_info, properties) - 96usize];
    ["Offset of field: jio_disk_info::property_count"][::core::mem::offset_of!(jio_disk_info, property_count) - 104usize];
    ["Offset of field: jio_disk_info::content_id"][::core::mem::offset_of!(jio_disk_info, content_id) - 112usize];
    ["Offset of field: jio_disk_info::content_id_before"][::core::mem::offset_of!(jio_disk_info, content_id_before) - 120usize];
    ["Offset of field: jio_disk_info::reserved"][::core::mem::offset_of!(jio_disk_info, reserved) - 128usize];
};
pub type jio_disk_info_t = jio_disk_info;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_snapshot {
    pub size: u32,
    pub event: u32,
    pub phase: u32,
    pub flags: u32,
    pub snapshot_id: u64,
    pub reserved: [u64; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_snapshot"][::core::mem::size_of::<jio_snapshot>() - 40usize];
    ["Alignment of jio_snapshot"][::core::mem::align_of::<jio_snapshot>() - 8usize];
    ["Offset of field: jio_snapshot::size"][::core::mem::offset_of!(jio_snapshot, size) - 0usize];
    ["Offset of field: jio_snapshot::event"][::core::mem::offset_of!(jio_snapshot, event) - 4usize];
    ["Offset of field: jio_snapshot::phase"][::core::mem::offset_of!(jio_snapshot, phase) - 8usize];
    ["Offset of field: jio_snapshot::flags"][::core::mem::offset_of!(jio_snapshot, flags) - 12usize];
    ["Offset of field: jio_snapshot::snapshot_id"][::core::mem::offset_of!(jio_snapshot, snapshot_id) - 16usize];
    ["Offset of field: jio_snapshot::reserved"][::core::mem::offset_of!(jio_snapshot, reserved) - 24usize];
};
pub type jio_snapshot_t = jio_snapshot;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_clone {
    pub size: u32,
    pub phase: u32,
    pub flags: u32,
    pub pad: u32,
    pub dest_disk_uuid: [u8; 16usize],
    pub dest_path: *const ::core::ffi::c_char,
    pub reserved: [u64; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_clone"][::core::mem::size_of::<jio_clone>() - 56usize];
    ["Alignment of jio_clone"][::core::mem::align_of::<jio_clone>() - 8usize];
    ["Offset of field: jio_clone::size"][::core::mem::offset_of!(jio_clone, size) - 0usize];
    ["Offset of field: jio_clone::phase"][::core::mem::offset_of!(jio_clone, phase) - 4usize];
    ["Offset of field: jio_clone::flags"][::core::mem::offset_of!(jio_clone, flags) - 8usize];
    ["Offset of field: jio_clone::pad"][::core::mem::offset_of!(jio_clone, pad) - 12usize];
    ["Offset of field: jio_clone::dest_disk_uuid"][::core::mem::offset_of!(jio_clone, dest_disk_uuid) - 16usize];
    ["Offset of field: jio_clone::dest_path"][::core::mem::offset_of!(jio_clone, dest_path) - 32usize];
    ["Offset of field: jio_clone::reserved"][::core::mem::offset_of!(jio_clone, reserved) - 40usize];
};
pub type jio_clone_t = jio_clone;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_migrate {
    pub size: u32,
    pub phase: u32,
    pub what: u32,
    pub flags: u32,
    pub dest_path: *const ::core::ffi::c_char,
    pub reserved: [u64; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_migrate"][::core::mem::size_of::<jio_migrate>() - 40usize];
    ["Alignment of jio_migrate"][::core::mem::align_of::<jio_migrate>() - 8usize];
    ["Offset of field: jio_migrate::size"][::core::mem::offset_of!(jio_migrate, size) - 0usize];
    ["Offset of field: jio_migrate::phase"][::core::mem::offset_of!(jio_migrate, phase) - 4usize];
    ["Offset of field: jio_migrate::what"][::core::mem::offset_of!(jio_migrate, what) - 8usize];
    ["Offset of field: jio_migrate::flags"][::core::mem::offset_of!(jio_migrate, flags) - 12usize];
    ["Offset of field: jio_migrate::dest_path"][::core::mem::offset_of!(jio_migrate, dest_path) - 16usize];
    ["Offset of field: jio_migrate::reserved"][::core::mem::offset_of!(jio_migrate, reserved) - 24usize];
};
pub type jio_migrate_t = jio_migrate;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_requirements {
    pub size: u32,
    pub timers: u32,
    pub work_items: u32,
    pub requests: u32,
    pub heap_bytes: u64,
    pub mapped_bytes: u64,
    pub sidecar_bytes: u64,
    pub defer_ns_max: u64,
    pub reserved: [u64; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_requirements"][::core::mem::size_of::<jio_requirements>() - 80usize];
    ["Alignment of jio_requirements"][::core::mem::align_of::<jio_requirements>() - 8usize];
    ["Offset of field: jio_requirements::size"][::core::mem::offset_of!(jio_requirements, size) - 0usize];
    ["Offset of field: jio_requirements::timers"][::core::mem::offset_of!(jio_requirements, timers) - 4usize];
    ["Offset of field: jio_requirements::work_items"][::core::mem::offset_of!(jio_requirements, work_items) - 8usize];
    ["Offset of field: jio_requirements::requests"][::core::mem::offset_of!(jio_requirements, requests) - 12usize];
    ["Offset of field: jio_requirements::heap_bytes"][::core::mem::offset_of!(jio_requirements, heap_bytes) - 16usize];
    ["Offset of field: jio_requirements::mapped_bytes"][::core::mem::offset_of!(jio_requirements, mapped_bytes) - 24usize];
    ["Offset of field: jio_requirements::sidecar_bytes"][::core::mem::offset_of!(jio_requirements, sidecar_bytes) - 32usize];
    ["Offset of field: jio_requirements::defer_ns_max"][::core::mem::offset_of!(jio_requirements, defer_ns_max) - 40usize];
    ["Offset of field: jio_requirements::reserved"][::core::mem::offset_of!(jio_requirements, reserved) - 48usize];
};
pub type jio_requirements_t = jio_requirements;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_filter_status {
    pub size: u32,
    pub state: u32,
    pub alarms: u32,
    pub pad: u32,
    pub epoch: u64,
    pub published_seq: u64,
    pub durable_seq: u64,
    pub lane_used_bytes: u64,
    pub lane_capacity_bytes: u64,
    pub dirty_bytes: u64,
    pub deferred_count: u64,
    pub deferred_ns_max: u64,
    pub held_count: u64,
    pub tracking_count: u64,
    pub intent_bytes: u64,
    pub intent_late_count: u64,
    pub synced_bytes: u64,
    pub held_bytes: u64,
    pub reserved: [u64; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_filter_status"][::core::mem::size_of::<jio_filter_status>() - 144usize];
    ["Alignment of jio_filter_status"][::core::mem::align_of::<jio_filter_status>() - 8usize];
    ["Offset of field: jio_filter_status::size"][::core::mem::offset_of!(jio_filter_status, size) - 0usize];
    ["Offset of field: jio_filter_status::state"][::core::mem::offset_of!(jio_filter_status, state) - 4usize];
    ["Offset of field: jio_filter_status::alarms"][::core::mem::offset_of!(jio_filter_status, alarms) - 8usize];
    ["Offset of field: jio_filter_status::pad"][::core::mem::offset_of!(jio_filter_status, pad) - 12usize];
    ["Offset of field: jio_filter_status::epoch"][::core::mem::offset_of!(jio_filter_status, epoch) - 16usize];
    ["Offset of field: jio_filter_status::published_seq"][::core::mem::offset_of!(jio_filter_status, published_seq) - 24usize];
    ["Offset of field: jio_filter_status::durable_seq"][::core::mem::offset_of!(jio_filter_status, durable_seq) - 32usize];
    ["Offset of field: jio_filter_status::lane_used_bytes"][::core::mem::offset_of!(jio_filter_status, lane_used_bytes) - 40usize];
    ["Offset of field: jio_filter_status::lane_capacity_bytes"][::core::mem::offset_of!(jio_filter_status, lane_capacity_bytes) - 48usize];
    ["Offset of field: jio_filter_status::dirty_bytes"][::core::mem::offset_of!(jio_filter_status, dirty_bytes) - 56usize];
    ["Offset of field: jio_filter_status::deferred_count"][::core::mem::offset_of!(jio_filter_status, deferred_count) - 64usize];
    ["Offset of field: jio_filter_status::deferred_ns_max"][::core::mem::offset_of!(jio_filter_status, deferred_ns_max) - 72usize];
    ["Offset of field: jio_filter_status::held_count"][::core::mem::offset_of!(jio_filter_status, held_count) - 80usize];
    ["Offset of field: jio_filter_status::tracking_count"][::core::mem::offset_of!(jio_filter_status, tracking_count) - 88usize];
    ["Offset of field: jio_filter_status::intent_bytes"][::core::mem::offset_of!(jio_filter_status, intent_bytes) - 96usize];
    ["Offset of field: jio_filter_status::intent_late_count"][::core::mem::offset_of!(jio_filter_status, intent_late_count) - 104usize];
    ["Offset of field: jio_filter_status::synced_bytes"][::core::mem::offset_of!(jio_filter_status, synced_bytes) - 112usize];
    ["Offset of field: jio_filter_status::held_bytes"][::core::mem::offset_of!(jio_filter_status, held_bytes) - 120usize];
    ["Offset of field: jio_filter_status::reserved"][::core::mem::offset_of!(jio_filter_status, reserved) - 128usize];
};
pub type jio_filter_status_t = jio_filter_status;
pub type jio_task_fn = ::core::option::Option<
    unsafe extern "C" fn(userdata: *mut ::core::ffi::c_void),
>;
pub type jio_property_fn = ::core::option::Option<
    unsafe extern "C" fn(
        userdata: *mut ::core::ffi::c_void,
        key: *const ::core::ffi::c_char,
        value: *const ::core::ffi::c_char,
    ),
>;
pub type jio_timer_t = u64;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_host {
    pub size: u32,
    pub abi_version: u32,
    pub host_ctx: *mut ::core::ffi::c_void,
    pub name: *const ::core::ffi::c_char,
    pub log: ::core::option::Option<
        unsafe extern "C" fn(
            host_ctx: *mut ::core::ffi::c_void,
            disk: *mut jio_disk_t,
            level: u32,
            message: *const ::core::ffi::c_char,
            len_bytes: u64,
        ),
    >,
    pub heap_alloc: ::core::option::Option<
        unsafe extern "C" fn(
            host_ctx: *mut ::core::ffi::c_void,
            disk: *mut jio_disk_t,
            len_bytes: u64,
            align_bytes: u64,
        ) -> *mut ::core::ffi::c_void,
    >,
    pub heap_free: ::core::option::Option<
        unsafe extern "C" fn(
            host_ctx: *mut ::core::ffi::c_void,
            disk: *mut jio_disk_t,
            ptr: *mut ::core::ffi::c_void,
        ),
    >,
    pub now_mono_ns: ::core::option::Option<
        unsafe extern "C" fn(host_ctx: *mut ::core::ffi::c_void) -> u64,
    >,
    pub now_wall_ns: ::core::option::Option<
        unsafe extern "C" fn(host_ctx: *mut ::core::ffi::c_void) -> u64,
    >,
    pub random_bytes: ::core::option::Option<
        unsafe extern "C" fn(
            host_ctx: *mut ::core::ffi::c_void,
            buffer: *mut ::core::ffi::c_void,
            len_bytes: u64,
        ) -> jio_status_t,
    >,
    pub io_continue: ::core::option::Option<
        unsafe extern "C" fn(disk: *mut jio_disk_t, io: *mut jio_io_t) -> jio_status_t,
    >,
    pub io_complete: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            io: *mut jio_io_t,
            status: jio_status_t,
        ) -> jio_status_t,
    >,
    pub io_release: ::core::option::Option<
        unsafe extern "C" fn(disk: *mut jio_disk_t, io: *mut jio_io_t) -> jio_status_t,
    >,
    pub submit: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            request: *mut jio_request_t,
        ) -> jio_status_t,
    >,
    pub sidecar_create: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            key: u64,
            len_bytes: u64,
            out_sidecar: *mut *mut jio_sidecar_t,
        ) -> jio_status_t,
    >,
    pub sidecar_open: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            key: u64,
            out_sidecar: *mut *mut jio_sidecar_t,
            out_len_bytes: *mut u64,
        ) -> jio_status_t,
    >,
    pub sidecar_close: ::core::option::Option<
        unsafe extern "C" fn(disk: *mut jio_disk_t, sidecar: *mut jio_sidecar_t),
    >,
    pub sidecar_read: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            sidecar: *mut jio_sidecar_t,
            offset_bytes: u64,
            buffer: *mut ::core::ffi::c_void,
            len_bytes: u64,
        ) -> jio_status_t,
    >,
    pub sidecar_write: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            sidecar: *mut jio_sidecar_t,
            offset_bytes: u64,
            buffer: *const ::core::ffi::c_void,
            len_bytes: u64,
        ) -> jio_status_t,
    >,
    pub sidecar_delete: ::core::option::Option<
        unsafe extern "C" fn(disk: *mut jio_disk_t, key: u64) -> jio_status_t,
    >,
    pub timer_start: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            delay_ns: u64,
            fn_: jio_task_fn,
            userdata: *mut ::core::ffi::c_void,
            out_timer: *mut jio_timer_t,
        ) -> jio_status_t,
    >,
    pub timer_cancel: ::core::option::Option<
        unsafe extern "C" fn(disk: *mut jio_disk_t, timer: jio_timer_t) -> jio_status_t,
    >,
    pub work_submit: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            fn_: jio_task_fn,
            userdata: *mut ::core::ffi::c_void,
        ) -> jio_status_t,
    >,
    pub work_flush: ::core::option::Option<
        unsafe extern "C" fn(disk: *mut jio_disk_t) -> jio_status_t,
    >,
    pub property_get: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            key: *const ::core::ffi::c_char,
            buffer: *mut ::core::ffi::c_char,
            buffer_len_bytes: u64,
        ) -> jio_status_t,
    >,
    pub event_post: ::core::option::Option<
        unsafe extern "C" fn(
            host_ctx: *mut ::core::ffi::c_void,
            disk: *mut jio_disk_t,
            level: u32,
            code: u32,
            message: *const ::core::ffi::c_char,
            len_bytes: u64,
        ),
    >,
    pub reserved: [::core::option::Option<unsafe extern "C" fn()>; 8usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_host"][::core::mem::size_of::<jio_host>() - 264usize];
    ["Alignment of jio_host"][::core::mem::align_of::<jio_host>() - 8usize];
    ["Offset of field: jio_host::size"][::core::mem::offset_of!(jio_host, size) - 0usize];
    ["Offset of field: jio_host::abi_version"][::core::mem::offset_of!(jio_host, abi_version) - 4usize];
    ["Offset of field: jio_host::host_ctx"][::core::mem::offset_of!(jio_host, host_ctx) - 8usize];
    ["Offset of field: jio_host::name"][::core::mem::offset_of!(jio_host, name) - 16usize];
    ["Offset of field: jio_host::log"][::core::mem::offset_of!(jio_host, log) - 24usize];
    ["Offset of field: jio_host::heap_alloc"][::core::mem::offset_of!(jio_host, heap_alloc) - 32usize];
    ["Offset of field: jio_host::heap_free"][::core::mem::offset_of!(jio_host, heap_free) - 40usize];
    ["Offset of field: jio_host::now_mono_ns"][::core::mem::offset_of!(jio_host, now_mono_ns) - 48usize];
    ["Offset of field: jio_host::now_wall_ns"][::core::mem::offset_of!(jio_host, now_wall_ns) - 56usize];
    ["Offset of field: jio_host::random_bytes"][::core::mem::offset_of!(jio_host, random_bytes) - 64usize];
    ["Offset of field: jio_host::io_continue"][::core::mem::offset_of!(jio_host, io_continue) - 72usize];
    ["Offset of field: jio_host::io_complete"][::core::mem::offset_of!(jio_host, io_complete) - 80usize];
    ["Offset of field: jio_host::io_release"][::core::mem::offset_of!(jio_host, io_release) - 88usize];
    ["Offset of field: jio_host::submit"][::core::mem::offset_of!(jio_host, submit) - 96usize];
    ["Offset of field: jio_host::sidecar_create"][::core::mem::offset_of!(jio_host, sidecar_create) - 104usize];
    ["Offset of field: jio_host::sidecar_open"][::core::mem::offset_of!(jio_host, sidecar_open) - 112usize];
    ["Offset of field: jio_host::sidecar_close"][::core::mem::offset_of!(jio_host, sidecar_close) - 120usize];
    ["Offset of field: jio_host::sidecar_read"][::core::mem::offset_of!(jio_host, sidecar_read) - 128usize];
    ["Offset of field: jio_host::sidecar_write"][::core::mem::offset_of!(jio_host, sidecar_write) - 136usize];
    ["Offset of field: jio_host::sidecar_delete"][::core::mem::offset_of!(jio_host, sidecar_delete) - 144usize];
    ["Offset of field: jio_host::timer_start"][::core::mem::offset_of!(jio_host, timer_start) - 152usize];
    ["Offset of field: jio_host::timer_cancel"][::core::mem::offset_of!(jio_host, timer_cancel) - 160usize];
    ["Offset of field: jio_host::work_submit"][::core::mem::offset_of!(jio_host, work_submit) - 168usize];
    ["Offset of field: jio_host::work_flush"][::core::mem::offset_of!(jio_host, work_flush) - 176usize];
    ["Offset of field: jio_host::property_get"][::core::mem::offset_of!(jio_host, property_get) - 184usize];
    ["Offset of field: jio_host::event_post"][::core::mem::offset_of!(jio_host, event_post) - 192usize];
    ["Offset of field: jio_host::reserved"][::core::mem::offset_of!(jio_host, reserved) - 200usize];
};
pub type jio_host_t = jio_host;
#[repr(C)]
#[derive(Copy, Clone)]
pub struct jio_filter {
    pub size: u32,
    pub abi_version: u32,
    pub name: *const ::core::ffi::c_char,
    pub vendor: *const ::core::ffi::c_char,
    pub version: *const ::core::ffi::c_char,
    pub filter_class: u32,
    pub flags: u32,
    pub requirements: ::core::option::Option<
        unsafe extern "C" fn(
            info: *const jio_disk_info_t,
            out: *mut jio_requirements_t,
        ) -> jio_status_t,
    >,
    pub attach: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            info: *const jio_disk_info_t,
        ) -> jio_status_t,
    >,
    pub detach: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            info: *const jio_disk_info_t,
        ) -> jio_status_t,
    >,
    pub open: ::core::option::Option<
        unsafe extern "C" fn(
            disk: *mut jio_disk_t,
            info: *const jio_disk_info_t,
            out_instance: *mut *mut ::core::ffi::c_void,
        ) -> jio_status_t,
    >,
    pub close: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            how: u32,
        ) -> jio_status_t,
    >,
    pub io_start: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            io: *mut jio_io_t,
            out_status: *mut jio_status_t,
        ) -> jio_verdict_t,
    >,
    pub io_done: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            io: *mut jio_io_t,
            status: jio_status_t,
        ) -> jio_verdict_t,
    >,
    pub io_abort: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            io: *mut jio_io_t,
        ) -> jio_status_t,
    >,
    pub stun: ::core::option::Option<
        unsafe extern "C" fn(instance: *mut ::core::ffi::c_void) -> jio_status_t,
    >,
    pub unstun: ::core::option::Option<
        unsafe extern "C" fn(instance: *mut ::core::ffi::c_void) -> jio_status_t,
    >,
    pub snapshot: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            info: *const jio_snapshot_t,
        ) -> jio_status_t,
    >,
    pub clone: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            info: *const jio_clone_t,
        ) -> jio_status_t,
    >,
    pub migrate: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            info: *const jio_migrate_t,
        ) -> jio_status_t,
    >,
    pub grow: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            new_capacity_bytes: u64,
        ) -> jio_status_t,
    >,
    pub property_set: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            key: *const ::core::ffi::c_char,
            value: *const ::core::ffi::c_char,
        ) -> jio_status_t,
    >,
    pub property_get: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            key: *const ::core::ffi::c_char,
            buffer: *mut ::core::ffi::c_char,
            buffer_len_bytes: u64,
        ) -> jio_status_t,
    >,
    pub property_list: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            fn_: jio_property_fn,
            userdata: *mut ::core::ffi::c_void,
        ) -> jio_status_t,
    >,
    pub status: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            out: *mut jio_filter_status_t,
        ) -> jio_status_t,
    >,
    pub drain: ::core::option::Option<
        unsafe extern "C" fn(
            instance: *mut ::core::ffi::c_void,
            timeout_ns: u64,
        ) -> jio_status_t,
    >,
    pub reserved: [::core::option::Option<unsafe extern "C" fn()>; 8usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of jio_filter"][::core::mem::size_of::<jio_filter>() - 256usize];
    ["Alignment of jio_filter"][::core::mem::align_of::<jio_filter>() - 8usize];
    ["Offset of field: jio_filter::size"][::core::mem::offset_of!(jio_filter, size) - 0usize];
    ["Offset of field: jio_filter::abi_version"][::core::mem::offset_of!(jio_filter, abi_version) - 4usize];
    ["Offset of field: jio_filter::name"][::core::mem::offset_of!(jio_filter, name) - 8usize];
    ["Offset of field: jio_filter::vendor"][::core::mem::offset_of!(jio_filter, vendor) - 16usize];
    ["Offset of field: jio_filter::version"][::core::mem::offset_of!(jio_filter, version) - 24usize];
    ["Offset of field: jio_filter::filter_class"][::core::mem::offset_of!(jio_filter, filter_class) - 32usize];
    ["Offset of field: jio_filter::flags"][::core::mem::offset_of!(jio_filter, flags) - 36usize];
    ["Offset of field: jio_filter::requirements"][::core::mem::offset_of!(jio_filter, requirements) - 40usize];
    ["Offset of field: jio_filter::attach"][::core::mem::offset_of!(jio_filter, attach) - 48usize];
    ["Offset of field: jio_filter::detach"][::core::mem::offset_of!(jio_filter, detach) - 56usize];
    ["Offset of field: jio_filter::open"][::core::mem::offset_of!(jio_filter, open) - 64usize];
    ["Offset of field: jio_filter::close"][::core::mem::offset_of!(jio_filter, close) - 72usize];
    ["Offset of field: jio_filter::io_start"][::core::mem::offset_of!(jio_filter, io_start) - 80usize];
    ["Offset of field: jio_filter::io_done"][::core::mem::offset_of!(jio_filter, io_done) - 88usize];
    ["Offset of field: jio_filter::io_abort"][::core::mem::offset_of!(jio_filter, io_abort) - 96usize];
    ["Offset of field: jio_filter::stun"][::core::mem::offset_of!(jio_filter, stun) - 104usize];
    ["Offset of field: jio_filter::unstun"][::core::mem::offset_of!(jio_filter, unstun) - 112usize];
    ["Offset of field: jio_filter::snapshot"][::core::mem::offset_of!(jio_filter, snapshot) - 120usize];
    ["Offset of field: jio_filter::clone"][::core::mem::offset_of!(jio_filter, clone) - 128usize];
    ["Offset of field: jio_filter::migrate"][::core::mem::offset_of!(jio_filter, migrate) - 136usize];
    ["Offset of field: jio_filter::grow"][::core::mem::offset_of!(jio_filter, grow) - 144usize];
    ["Offset of field: jio_filter::property_set"][::core::mem::offset_of!(jio_filter, property_set) - 152usize];
    ["Offset of field: jio_filter::property_get"][::core::mem::offset_of!(jio_filter, property_get) - 160usize];
    ["Offset of field: jio_filter::property_list"][::core::mem::offset_of!(jio_filter, property_list) - 168usize];
    ["Offset of field: jio_filter::status"][::core::mem::offset_of!(jio_filter, status) - 176usize];
    ["Offset of field: jio_filter::drain"][::core::mem::offset_of!(jio_filter, drain) - 184usize];
    ["Offset of field: jio_filter::reserved"][::core::mem::offset_of!(jio_filter, reserved) - 192usize];
};
pub type jio_filter_t = jio_filter;
pub type jio_filter_entry_fn = ::core::option::Option<
    unsafe extern "C" fn(
        host: *const jio_host_t,
        host_abi_version: u32,
    ) -> *const jio_filter_t,
>;
