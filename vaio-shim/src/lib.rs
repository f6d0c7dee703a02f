//! The filter library: `filter-core` behind the C contract of `include/iofilter.h`.
//!
//! Built as `libvmiof-disk-jetdr.so`. It has no thread of its own: it runs when the host calls it,
//! on the host's threads, timers and work queue.
//!
//! Invariant: no panic crosses the border, and no function here trusts a pointer that may be NULL.
//!
//! | file | holds |
//! |---|---|
//! | this one | the exported entry and the table of callbacks |
//! | `open` | sidecar, lane, decision: from a disk to an attached lane |
//! | `beside` | the sidecar: header and region map |
//! | `instance` | an open disk: I/O down and up |
//! | `drive` | timers, work, the sync's reads |
//! | `hold` | completions that wait for the appliance's log, or for a cut |
//! | `events` | snapshot, clone, migration, growth |
//! | `regions` | the region map at work, fencing |
//! | `host` | the host's services, made callable without `unsafe` |
//! | `vm` | what the disks of one VM share |
//! | `guard` | stops panics |

mod abi;
mod beside;
mod drive;
mod events;
mod guard;
mod hold;
mod host;
mod instance;
mod looked;
mod open;
mod properties;
mod regions;
mod vm;

use crate::host::{DiskHandle, DiskInfo, Host, Level};
use crate::instance::{Instance, Replicated};
use crate::open::OpenError;
use core::ffi::{c_char, c_void};
use filter_core::disk::cut_hold::CUT_HOLD_NS;
use filter_core::sidecar::regions::REGION_SHIFTS;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

static HOST: OnceLock<Host> = OnceLock::new();

struct Table(abi::jio_filter);
// SAFETY: constant pointers to constants; nobody writes it.
unsafe impl Sync for Table {}

static TABLE: Table = Table(abi::jio_filter {
    size: size_of::<abi::jio_filter>() as u32,
    abi_version: abi::JIO_ABI_VERSION,
    name: c"jetdr".as_ptr(),
    vendor: c"jetdr".as_ptr(),
    version: concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast(),
    filter_class: abi::JIO_CLASS_REPLICATION,
    flags: 0,
    requirements: Some(requirements),
    attach: Some(attach),
    detach: Some(detach),
    open: Some(open_disk),
    close: Some(close),
    io_start: Some(io_start),
    io_done: Some(io_done),
    io_abort: Some(io_abort),
    stun: Some(events::stun),
    unstun: Some(events::stun),
    snapshot: Some(events::snapshot),
    clone: Some(events::clone),
    migrate: Some(events::migrate),
    grow: Some(events::grow),
    property_set: None,
    property_get: None,
    property_list: Some(property_list),
    status: Some(status),
    drain: Some(drain),
    reserved: [None; 8],
});

/// The one exported symbol; see `include/iofilter.h`.
///
/// # Safety
/// `host` must be NULL or a table as the contract describes it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn jio_filter_entry(
    host: *const abi::jio_host,
    host_abi_version: u32,
) -> *const abi::jio_filter {
    let entered = guard::any(|| {
        if let Some(known) = HOST.get() {
            return known.is_same(host);
        }
        // SAFETY: the caller's promise.
        match unsafe { Host::check(host, host_abi_version) } {
            Ok(checked) => HOST.set(checked).is_ok(),
            Err(why) => {
                // SAFETY: as above; the log slot is looked for before it is used.
                unsafe { refuse(host, host_abi_version, why) };
                false
            }
        }
    });
    if entered == Some(true) {
        &raw const TABLE.0
    } else {
        core::ptr::null()
    }
}

/// Says why in the host's log, if the table can be trusted to have one.
///
/// # Safety
/// `host` must be NULL or point to a table.
unsafe fn refuse(host: *const abi::jio_host, version: u32, why: &str) {
    let needed = core::mem::offset_of!(abi::jio_host, heap_alloc);
    if host.is_null() || version >> 16 != abi::JIO_ABI_MAJOR {
        return;
    }
    // SAFETY: not NULL and of this major version: it begins with its size.
    if (unsafe { (*host).size } as usize) < needed {
        return;
    }
    // SAFETY: `log` lies within the size.
    if let Some(log) = unsafe { (*host).log } {
        let text = format!("jetdr: {why}");
        let (at, len) = (text.as_ptr().cast::<c_char>(), text.len() as u64);
        // SAFETY: called as the contract says.
        unsafe {
            log(
                (*host).host_ctx,
                core::ptr::null_mut(),
                abi::JIO_LOG_ERROR,
                at,
                len,
            )
        };
    }
}

const OK: i32 = abi::JIO_OK;

/// Runs a control call; a panic becomes JIO_E_INTERNAL.
fn control(body: impl FnOnce(Host) -> i32) -> i32 {
    let Some(host) = HOST.get() else {
        return abi::JIO_E_CLOSED;
    };
    guard::any(|| body(*host)).unwrap_or(abi::JIO_E_INTERNAL)
}

/// Runs a control call about a disk that is not open.
///
/// # Safety
/// `info` must be NULL or as the contract describes it.
unsafe fn with_info(
    disk: *mut abi::jio_disk,
    info: *const abi::jio_disk_info,
    body: impl FnOnce(Host, DiskHandle, &DiskInfo) -> i32,
) -> i32 {
    control(|host| {
        // SAFETY: the caller's promise.
        match unsafe { DiskInfo::read(info) } {
            Some(info) if !disk.is_null() => body(host, DiskHandle(disk), &info),
            _ => abi::JIO_E_INVALID,
        }
    })
}

fn report(host: Host, handle: DiskHandle, what: &str, info: &DiskInfo, error: &OpenError) -> i32 {
    let text = format!("{what} {} ({}): {error}", info.label, info.path);
    // A disk that is opened before it is attached is how a host finds out, not a fault.
    let expected = matches!(error, OpenError::NotAttached);
    host.log(
        Some(handle),
        if expected { Level::Info } else { Level::Error },
        &text,
    );
    error.code()
}

unsafe extern "C" fn requirements(
    info: *const abi::jio_disk_info,
    out: *mut abi::jio_requirements,
) -> i32 {
    control(|_| {
        if out.is_null() {
            return abi::JIO_E_INVALID;
        }
        // SAFETY: the contract: NULL or a struct.
        let info = unsafe { DiskInfo::read(info) };
        let config = match info.as_ref().map(properties::config).transpose() {
            Ok(config) => config.unwrap_or_default(),
            Err(error) => return error.code(),
        };
        let ack = match info.as_ref().map(properties::ack_config).transpose() {
            Ok(ack) => ack.unwrap_or_default(),
            Err(error) => return error.code(),
        };
        let cut_hold_ns = match info.as_ref().map(properties::cut_hold_ns).transpose() {
            Ok(cut_hold_ns) => cut_hold_ns.unwrap_or(CUT_HOLD_NS),
            Err(error) => return error.code(),
        };
        let capacity = info.as_ref().map_or(1 << 40, |info| info.capacity_bytes);
        let ring = filter_core::lane::layout::DEFAULT_RING_BYTES;
        let geometry = filter_core::lane::layout::Geometry::for_disk(capacity, ring);
        let mapped_bytes = geometry.map_or(0, |geometry| geometry.total_bytes());
        // SAFETY: zeros are valid for plain numbers.
        let mut all: abi::jio_requirements = unsafe { core::mem::zeroed() };
        all.timers = 10;
        all.work_items = 3;
        all.requests = config.sync_reads as u32 + 2;
        all.heap_bytes = 0;
        all.mapped_bytes = mapped_bytes;
        // With the smallest regions; the map of a usual disk takes a few blocks.
        let blocks = beside::region_blocks(capacity, *REGION_SHIFTS.start());
        all.sidecar_bytes = filter_core::sidecar::total_bytes(blocks);
        // What `properties::config` took off for late timers is the host's to count on.
        all.defer_ns_max = config.defer_budget_ns + 2 * instance::RETRY_NS;
        all.defer_ns_max += cut_hold_ns + 2 * hold::CUT_POLL_NS;
        if ack.log {
            all.defer_ns_max += ack.budget_ns + 2 * hold::ACK_POLL_NS;
        }
        // SAFETY: `out` points to a struct whose maker set `size`.
        unsafe { fill(out.cast(), &all) };
        OK
    })
}

/// Copies a struct out as far as the receiver's `size` (its first word) allows; the size stays.
///
/// # Safety
/// `out` must point to a struct of the contract that begins with its size.
unsafe fn fill<T>(out: *mut u8, value: &T) {
    // SAFETY: the caller's promise: the first word is the size of what lies there.
    let size = unsafe { out.cast::<u32>().read() } as usize;
    let len = size.min(size_of::<T>());
    if len > 4 {
        let from = (&raw const *value).cast::<u8>();
        // SAFETY: `len` bytes lie on both sides; the first four, the size, are left alone.
        unsafe { out.add(4).copy_from_nonoverlapping(from.add(4), len - 4) };
    }
}

unsafe extern "C" fn attach(disk: *mut abi::jio_disk, info: *const abi::jio_disk_info) -> i32 {
    let body = |host, handle, info: &DiskInfo| match open::protect(host, handle, info) {
        Ok(()) => OK,
        Err(error) => report(host, handle, "attach", info, &error),
    };
    // SAFETY: the contract.
    unsafe { with_info(disk, info, body) }
}

unsafe extern "C" fn detach(disk: *mut abi::jio_disk, info: *const abi::jio_disk_info) -> i32 {
    let body = |host, handle, info: &DiskInfo| match open::unprotect(host, handle, info) {
        Ok(()) => OK,
        Err(error) => report(host, handle, "detach", info, &error),
    };
    // SAFETY: the contract.
    unsafe { with_info(disk, info, body) }
}

unsafe extern "C" fn open_disk(
    disk: *mut abi::jio_disk,
    info: *const abi::jio_disk_info,
    out_instance: *mut *mut c_void,
) -> i32 {
    if out_instance.is_null() {
        return abi::JIO_E_INVALID;
    }
    let body = |host, handle, info: &DiskInfo| match open_instance(host, handle, info) {
        Ok(instance) => {
            let raw = Box::into_raw(Box::new(instance));
            // SAFETY: not NULL, and by the contract a place for a pointer.
            unsafe { out_instance.write(raw.cast()) };
            OK
        }
        Err(error) => report(host, handle, "open", info, &error),
    };
    // SAFETY: the contract.
    unsafe { with_info(disk, info, body) }
}

fn open_instance(host: Host, handle: DiskHandle, info: &DiskInfo) -> Result<Instance, OpenError> {
    if info.read_only {
        open::load(host, handle)?;
        return Ok(Instance::Passing);
    }
    match open::attach(host, handle, info) {
        Ok(attached) => {
            let text = format!("{}: {}", info.label, attached.story);
            host.log(Some(handle), Level::Info, &text);
            let replicated = Replicated::new(host, handle, attached);
            replicated.arm(0, drive::housekeeping_task);
            Ok(Instance::Replicated(replicated))
        }
        Err(error @ (OpenError::Mapping(_) | OpenError::Lane(_))) => {
            // The guest must run although nothing can be replicated; the loss is written down
            // first, so that the next open that can replicate syncs the disk in full.
            open::give_up(host, handle, info)?;
            let text = format!("{}: not replicated: {error}", info.label);
            host.event(handle, Level::Error, 4, &text);
            Ok(Instance::Passing)
        }
        Err(error) => Err(error),
    }
}

/// The instance behind a pointer, or `None` for NULL.
///
/// # Safety
/// `instance` must be NULL or come from `open` and not be closed.
unsafe fn instance_of<'a>(instance: *mut c_void) -> Option<&'a Instance> {
    // SAFETY: the caller's promise.
    unsafe { instance.cast::<Instance>().as_ref() }
}

/// A migration has drained already, and the guest waits.
fn drain_for(how: u32) -> Duration {
    match how {
        abi::JIO_CLOSE_HANDOFF => Duration::ZERO,
        _ => regions::CLOSE_LIMIT,
    }
}

unsafe extern "C" fn close(instance: *mut c_void, how: u32) -> i32 {
    if instance.is_null() {
        return abi::JIO_E_INVALID;
    }
    control(|_| {
        // SAFETY: the contract: from `open`, closed once.
        let instance = unsafe { Box::from_raw(instance.cast::<Instance>()) };
        match *instance {
            Instance::Passing => OK,
            Instance::Replicated(replicated) => {
                let flushed =
                    how != abi::JIO_CLOSE_LOST && replicated.prepare_close(drain_for(how));
                replicated.finish();
                replicated.close(how, flushed)
            }
        }
    })
}

unsafe extern "C" fn io_start(
    instance: *mut c_void,
    io: *mut abi::jio_io,
    _out_status: *mut i32,
) -> u32 {
    // SAFETY: the contract.
    let Some(Instance::Replicated(disk)) = (unsafe { instance_of(instance) }) else {
        return abi::JIO_PASS;
    };
    // SAFETY: the contract: the I/O lives, and is the filter's to write until it answers.
    let Some(io) = (unsafe { io.as_mut() }) else {
        return abi::JIO_PASS;
    };
    guard::disk(disk, "io_start", || disk.io_start(io)).unwrap_or(abi::JIO_PASS)
}

unsafe extern "C" fn io_done(instance: *mut c_void, io: *mut abi::jio_io, status: i32) -> u32 {
    // SAFETY: the contract.
    let Some(Instance::Replicated(disk)) = (unsafe { instance_of(instance) }) else {
        return abi::JIO_PASS;
    };
    if io.is_null() {
        return abi::JIO_PASS;
    }
    guard::disk(disk, "io_done", || disk.io_done(io, status)).unwrap_or(abi::JIO_PASS)
}

unsafe extern "C" fn io_abort(instance: *mut c_void, io: *mut abi::jio_io) -> i32 {
    // SAFETY: the contract.
    match unsafe { instance_of(instance) } {
        Some(Instance::Replicated(disk)) => {
            guard::disk(disk, "io_abort", || disk.io_abort(io)).unwrap_or(abi::JIO_E_NOT_FOUND)
        }
        Some(Instance::Passing) => abi::JIO_E_NOT_FOUND,
        None => abi::JIO_E_INVALID,
    }
}

/// Runs a control call about an open disk.
///
/// # Safety
/// `instance` must be NULL or as the contract describes it.
unsafe fn with_disk(instance: *mut c_void, body: impl FnOnce(&Arc<Replicated>) -> i32) -> i32 {
    // SAFETY: the caller's promise.
    match unsafe { instance_of(instance) } {
        None => abi::JIO_E_INVALID,
        Some(Instance::Passing) => OK,
        Some(Instance::Replicated(disk)) => {
            guard::disk(disk, "a control call", || body(disk)).unwrap_or(abi::JIO_E_INTERNAL)
        }
    }
}

unsafe extern "C" fn property_list(
    _instance: *mut c_void,
    function: abi::jio_property_fn,
    userdata: *mut c_void,
) -> i32 {
    let Some(function) = function else {
        return abi::JIO_E_INVALID;
    };
    let known = [
        (c"jetdr.domain", c"the protected domain"),
        (
            c"jetdr.ring-bytes",
            c"length of the lane's ring: a power of two",
        ),
        (
            c"jetdr.defer-budget-us",
            c"longest deferral of a write, in microseconds",
        ),
        (
            c"jetdr.ack",
            c"a write is done when the disk has it (host), or the appliance's log too (log)",
        ),
        (
            c"jetdr.ack-budget-us",
            c"longest wait for the appliance's log, in microseconds",
        ),
        (
            c"jetdr.cut-hold-us",
            c"longest hold of a completion for a cut over several hosts, in microseconds",
        ),
        (
            c"jetdr.sync-floor-bytes-s",
            c"a sync is not slower than this for the guest's sake",
        ),
        (
            c"jetdr.sync-max-bytes-s",
            c"a sync is never faster than this",
        ),
        (
            c"jetdr.region-bytes",
            c"length of a region of the region map: a power of two",
        ),
        (
            c"jetdr.region-quiet-ms",
            c"quiet after which a region's bit is cleared, in ms",
        ),
        (
            c"jetdr.handoff-drain-ms",
            c"longest wait of a migration for the appliance to hold everything, in ms",
        ),
        (
            c"jetdr.sync-hashes",
            c"on or off: a sync after a crash asks what the replica holds already",
        ),
        (
            c"jetdr.region-intent",
            c"budget: a write waits for its region's bit within the budget; strict: however long",
        ),
    ];
    let tell = || {
        for (key, about) in known {
            // SAFETY: the host's function, called as the contract says.
            unsafe { function(userdata, key.as_ptr(), about.as_ptr()) };
        }
        OK
    };
    guard::any(tell).unwrap_or(abi::JIO_E_INTERNAL)
}

unsafe extern "C" fn status(instance: *mut c_void, out: *mut abi::jio_filter_status) -> i32 {
    if out.is_null() {
        return abi::JIO_E_INVALID;
    }
    // SAFETY: zeros are valid for plain numbers.
    let mut all: abi::jio_filter_status = unsafe { core::mem::zeroed() };
    all.state = abi::JIO_STATE_IDLE;
    let body = |disk: &Arc<Replicated>| {
        disk.status(&mut all);
        OK
    };
    // SAFETY: the contract.
    let result = unsafe { with_disk(instance, body) };
    if result >= 0 {
        // SAFETY: not NULL, and by the contract a struct that begins with its size.
        unsafe { fill(out.cast(), &all) };
    }
    result
}

unsafe extern "C" fn drain(instance: *mut c_void, timeout_ns: u64) -> i32 {
    let body = |disk: &Arc<Replicated>| {
        let deadline = Instant::now() + Duration::from_nanos(timeout_ns);
        let (target, _, streaming) = disk.positions();
        if !streaming {
            return abi::JIO_E_BUSY;
        }
        loop {
            let (_, durable, streaming) = disk.positions();
            if durable >= target {
                return OK;
            }
            if !streaming {
                return abi::JIO_E_BUSY;
            }
            if Instant::now() >= deadline {
                return abi::JIO_E_TIMED_OUT;
            }
            // The acknowledgement comes from another process, which wakes nobody.
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    // SAFETY: the contract.
    unsafe { with_disk(instance, body) }
}

#[cfg(test)]
mod layout_tests;
