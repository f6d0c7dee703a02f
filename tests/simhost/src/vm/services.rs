//! The functions behind the host's table.
//!
//! Invariant: each checks what the filter hands over before it uses it; what breaks the contract is
//! refused and counted.

use super::faults::{Strike, What, die};
use super::hostdisk::HostDisk;
use super::points::Point;
use super::requests::submit;
use super::sidecar::{self, SidecarFile};
use super::tasks::Task;
use crate::abi;
use crate::contract::context::{self, Context};
use crate::contract::io::Answer;
use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{CStr, c_char, c_void};
use std::io;
use std::ptr::null_mut;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const OK: i32 = abi::JIO_OK;
static START: LazyLock<Instant> = LazyLock::new(Instant::now);
static NEXT_SIDECAR: AtomicUsize = AtomicUsize::new(1);

struct Table(abi::jio_host);
// SAFETY: constant pointers; nobody writes it.
unsafe impl Sync for Table {}

static TABLE: Table = Table(abi::jio_host {
    size: size_of::<abi::jio_host>() as u32,
    abi_version: abi::JIO_ABI_VERSION,
    host_ctx: null_mut(),
    name: c"jetdr simhost".as_ptr(),
    log: Some(log),
    heap_alloc: Some(heap_alloc),
    heap_free: Some(heap_free),
    now_mono_ns: Some(now_mono_ns),
    now_wall_ns: Some(now_wall_ns),
    random_bytes: Some(random_bytes),
    io_continue: Some(io_continue),
    io_complete: Some(io_complete),
    io_release: Some(io_release),
    submit: Some(submit),
    sidecar_create: Some(sidecar_create),
    sidecar_open: Some(sidecar_open),
    sidecar_close: Some(sidecar_close),
    sidecar_read: Some(sidecar_read),
    sidecar_write: Some(sidecar_write),
    sidecar_delete: Some(sidecar_delete),
    timer_start: Some(timer_start),
    timer_cancel: Some(timer_cancel),
    work_submit: Some(work_submit),
    work_flush: Some(work_flush),
    property_get: Some(property_get),
    event_post: Some(event_post),
    reserved: [None; 8],
});

/// The table.
pub fn table() -> *const abi::jio_host {
    LazyLock::force(&START);
    &raw const TABLE.0
}

/// Notes a call from where it is not allowed. It is carried out all the same.
fn only_where_blocking_is_allowed(disk: &HostDisk, service: &str) {
    if !context::may_block() {
        let from = context::current();
        let what = format!("{service} called from {from:?}, which must not block");
        disk.violated(&what);
    }
}

fn label_of(disk: *mut abi::jio_disk) -> String {
    // SAFETY: the contract: NULL or a disk that lives.
    unsafe { HostDisk::of(disk) }.map_or("-".into(), |disk| disk.setup.label.clone())
}

/// # Safety
/// `message` must be readable for `len` bytes.
unsafe fn text_of(message: *const c_char, len: u64) -> String {
    if message.is_null() {
        return String::new();
    }
    let len = len.min(u64::from(abi::JIO_LOG_MESSAGE_MAX)) as usize;
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(message.cast::<u8>(), len) };
    String::from_utf8_lossy(bytes).into_owned()
}

unsafe extern "C" fn log(
    _ctx: *mut c_void,
    disk: *mut abi::jio_disk,
    level: u32,
    message: *const c_char,
    len: u64,
) {
    // SAFETY: the contract.
    let text = unsafe { text_of(message, len) };
    let label = label_of(disk);
    match level {
        abi::JIO_LOG_ERROR => tracing::error!(disk = label, "filter: {text}"),
        abi::JIO_LOG_WARN => tracing::warn!(disk = label, "filter: {text}"),
        abi::JIO_LOG_INFO => tracing::info!(disk = label, "filter: {text}"),
        _ => tracing::debug!(disk = label, "filter: {text}"),
    }
}

unsafe extern "C" fn event_post(
    _ctx: *mut c_void,
    disk: *mut abi::jio_disk,
    level: u32,
    code: u32,
    message: *const c_char,
    len: u64,
) {
    // SAFETY: the contract.
    let text = unsafe { text_of(message, len) };
    tracing::warn!(disk = label_of(disk), level, code, "event: {text}");
}

/// The heap keeps each block's layout before it.
const HEAP_HEAD: usize = 4096;

unsafe extern "C" fn heap_alloc(
    _ctx: *mut c_void,
    disk: *mut abi::jio_disk,
    len: u64,
    align: u64,
) -> *mut c_void {
    let (Ok(len), Ok(align)) = (usize::try_from(len), usize::try_from(align)) else {
        return null_mut();
    };
    if len == 0 || !align.is_power_of_two() || align > HEAP_HEAD {
        return null_mut();
    }
    let total = len
        .checked_add(HEAP_HEAD)
        .and_then(|n| Layout::from_size_align(n, HEAP_HEAD).ok());
    let Some(layout) = total else {
        return null_mut();
    };
    // SAFETY: the layout is not empty.
    let base = unsafe { alloc(layout) };
    if base.is_null() {
        return null_mut();
    }
    // SAFETY: HEAP_HEAD bytes and more were allocated, aligned for a number.
    let memory = unsafe {
        base.cast::<usize>().write(layout.size());
        base.add(HEAP_HEAD)
    };
    // SAFETY: the contract: NULL or a disk that lives.
    if let Some(disk) = unsafe { HostDisk::of(disk) } {
        disk.ledger.allocated(memory as usize, len as u64);
    }
    memory.cast()
}

unsafe extern "C" fn heap_free(_ctx: *mut c_void, disk: *mut abi::jio_disk, ptr: *mut c_void) {
    if ptr.is_null() {
        return;
    }
    // SAFETY: the contract: NULL or a disk that lives.
    if let Some(disk) = unsafe { HostDisk::of(disk) }
        && !disk.ledger.freed(ptr as usize)
    {
        let what = "heap_free of memory that was not taken for this disk";
        disk.violated(what);
        return;
    }
    // SAFETY: the contract: from `heap_alloc`, which keeps the size HEAP_HEAD bytes before.
    unsafe {
        let base = ptr.cast::<u8>().sub(HEAP_HEAD);
        let size = base.cast::<usize>().read();
        if let Ok(layout) = Layout::from_size_align(size, HEAP_HEAD) {
            dealloc(base, layout);
        }
    }
}

unsafe extern "C" fn now_mono_ns(_ctx: *mut c_void) -> u64 {
    START.elapsed().as_nanos() as u64
}

unsafe extern "C" fn now_wall_ns(_ctx: *mut c_void) -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64)
}

unsafe extern "C" fn random_bytes(_ctx: *mut c_void, buffer: *mut c_void, len: u64) -> i32 {
    if buffer.is_null() {
        return abi::JIO_E_INVALID;
    }
    let mut done = 0usize;
    while (done as u64) < len {
        // SAFETY: the contract: `len` bytes may be written at `buffer`.
        let got = unsafe { libc::getrandom(buffer.add(done), len as usize - done, 0) };
        match usize::try_from(got) {
            Ok(got) => done += got,
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return abi::JIO_E_IO,
        }
    }
    OK
}

fn answer(disk: *mut abi::jio_disk, io: *mut abi::jio_io, answer: Answer, status: i32) -> i32 {
    // SAFETY: the contract: NULL or a disk that lives.
    match unsafe { HostDisk::arc_of(disk) } {
        Some(disk) => disk.answer(io, answer, status),
        None => abi::JIO_E_INVALID,
    }
}

unsafe extern "C" fn io_continue(disk: *mut abi::jio_disk, io: *mut abi::jio_io) -> i32 {
    answer(disk, io, Answer::Continue, OK)
}

unsafe extern "C" fn io_complete(
    disk: *mut abi::jio_disk,
    io: *mut abi::jio_io,
    status: i32,
) -> i32 {
    answer(disk, io, Answer::Complete, status)
}

unsafe extern "C" fn io_release(disk: *mut abi::jio_disk, io: *mut abi::jio_io) -> i32 {
    answer(disk, io, Answer::Release, OK)
}

fn status_of(disk: &HostDisk, error: &io::Error) -> i32 {
    if !matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
    ) {
        tracing::warn!("disk {}: its sidecar: {error}", disk.setup.label);
    }
    match error.kind() {
        io::ErrorKind::NotFound => abi::JIO_E_NOT_FOUND,
        io::ErrorKind::AlreadyExists => abi::JIO_E_EXISTS,
        io::ErrorKind::WouldBlock => abi::JIO_E_BUSY,
        io::ErrorKind::StorageFull => abi::JIO_E_NO_SPACE,
        io::ErrorKind::UnexpectedEof => abi::JIO_E_RANGE,
        _ => abi::JIO_E_IO,
    }
}

fn keep(disk: &HostDisk, file: SidecarFile) -> *mut abi::jio_sidecar {
    let id = NEXT_SIDECAR.fetch_add(1, Ordering::Relaxed); // unique is all it must be
    disk.sidecars.lock().insert(id, file);
    id as *mut abi::jio_sidecar
}

unsafe extern "C" fn sidecar_create(
    disk: *mut abi::jio_disk,
    key: u64,
    len: u64,
    out: *mut *mut abi::jio_sidecar,
) -> i32 {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    only_where_blocking_is_allowed(disk, "sidecar_create");
    if key == 0 || out.is_null() {
        return abi::JIO_E_INVALID;
    }
    if !len.is_multiple_of(sidecar::UNIT_BYTES) || len == 0 || len > sidecar::MAX_BYTES {
        disk.violated("a sidecar's length is not a multiple of 4096");
        return abi::JIO_E_RANGE;
    }
    match SidecarFile::create(&disk.setup.path, disk.setup.format, key, len) {
        Ok(file) => {
            // SAFETY: not NULL.
            unsafe { out.write(keep(disk, file)) };
            OK
        }
        Err(error) => status_of(disk, &error),
    }
}

unsafe extern "C" fn sidecar_open(
    disk: *mut abi::jio_disk,
    key: u64,
    out: *mut *mut abi::jio_sidecar,
    out_len: *mut u64,
) -> i32 {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    only_where_blocking_is_allowed(disk, "sidecar_open");
    if key == 0 || out.is_null() || out_len.is_null() {
        return abi::JIO_E_INVALID;
    }
    match SidecarFile::open(&disk.setup.path, key) {
        Ok(file) => {
            // SAFETY: not NULL.
            unsafe {
                out_len.write(file.len_bytes());
                out.write(keep(disk, file));
            }
            OK
        }
        Err(error) => status_of(disk, &error),
    }
}

unsafe extern "C" fn sidecar_close(disk: *mut abi::jio_disk, handle: *mut abi::jio_sidecar) {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::of(disk) }) else {
        return;
    };
    if handle.is_null() {
        return;
    }
    only_where_blocking_is_allowed(disk, "sidecar_close");
    if disk.sidecars.lock().remove(&(handle as usize)).is_none() {
        disk.violated("close of a sidecar that is not open");
    }
}

fn with_sidecar(
    disk: *mut abi::jio_disk,
    handle: *mut abi::jio_sidecar,
    (offset, len): (u64, u64),
    act: impl FnOnce(&SidecarFile) -> io::Result<()>,
) -> i32 {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    only_where_blocking_is_allowed(disk, "sidecar I/O");
    let sidecars = disk.sidecars.lock();
    let Some(file) = sidecars.get(&(handle as usize)) else {
        return abi::JIO_E_NOT_FOUND;
    };
    if !(offset | len).is_multiple_of(sidecar::UNIT_BYTES) {
        disk.violated("sidecar I/O is not in multiples of 4096");
        return abi::JIO_E_RANGE;
    }
    if offset
        .checked_add(len)
        .is_none_or(|end| end > file.len_bytes())
    {
        return abi::JIO_E_RANGE;
    }
    act(file).map_or_else(|error| status_of(disk, &error), |()| OK)
}

unsafe extern "C" fn sidecar_read(
    disk: *mut abi::jio_disk,
    handle: *mut abi::jio_sidecar,
    offset: u64,
    buffer: *mut c_void,
    len: u64,
) -> i32 {
    if buffer.is_null() {
        return abi::JIO_E_INVALID;
    }
    // SAFETY: the contract: `len` bytes may be written at `buffer`.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), len as usize) };
    with_sidecar(disk, handle, (offset, len), |file| file.read(offset, bytes))
}

/// Writes to a sidecar what the faults leave of it.
fn write_struck(disk: &HostDisk, file: &SidecarFile, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let (faults, label) = (&disk.setup.faults, &disk.setup.label);
    match faults.strike(What::Sidecar, label, offset, bytes.len() as u64) {
        Strike::Pass => return file.write(offset, bytes),
        Strike::Fail => {}
        Strike::Tear { landed, kill } => {
            for run in landed {
                let at = offset + run.start as u64;
                file.write(at, bytes.get(run).unwrap_or_default())?;
            }
            if kill {
                die("in the middle of a write of a sidecar");
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::EIO))
}

unsafe extern "C" fn sidecar_write(
    disk: *mut abi::jio_disk,
    handle: *mut abi::jio_sidecar,
    offset: u64,
    buffer: *const c_void,
    len: u64,
) -> i32 {
    if buffer.is_null() {
        return abi::JIO_E_INVALID;
    }
    // SAFETY: the contract: `len` bytes may be read at `buffer`.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), len as usize) };
    // SAFETY: the contract.
    let Some(of) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    with_sidecar(disk, handle, (offset, len), |file| {
        of.pass(Point::SidecarBefore);
        write_struck(of, file, offset, bytes)?;
        of.pass(Point::SidecarAfter);
        Ok(())
    })
}

unsafe extern "C" fn sidecar_delete(disk: *mut abi::jio_disk, key: u64) -> i32 {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    only_where_blocking_is_allowed(disk, "sidecar_delete");
    match sidecar::delete(&disk.setup.path, disk.setup.format, key) {
        Ok(()) => OK,
        Err(error) => status_of(disk, &error),
    }
}

unsafe extern "C" fn timer_start(
    disk: *mut abi::jio_disk,
    delay_ns: u64,
    function: abi::jio_task_fn,
    userdata: *mut c_void,
    out: *mut u64,
) -> i32 {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    let Some(function) = function.filter(|_| !out.is_null()) else {
        return abi::JIO_E_INVALID;
    };
    if !disk.open.load(Ordering::Acquire) {
        disk.violated("a timer on a closed disk");
        return abi::JIO_E_CLOSED;
    }
    let delay = Duration::from_nanos(delay_ns);
    // SAFETY: not NULL; written before the timer can fire.
    let number = |id| unsafe { out.write(id) };
    let ledger = disk.ledger.clone();
    let task = Task {
        function,
        userdata,
        ledger,
    };
    if disk.tasks.timer_start(delay, task, number) {
        OK
    } else {
        abi::JIO_E_NO_MEMORY
    }
}

unsafe extern "C" fn timer_cancel(disk: *mut abi::jio_disk, timer: u64) -> i32 {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    // A timer may cancel itself; that does not wait.
    if context::current() != Context::Callback {
        only_where_blocking_is_allowed(disk, "timer_cancel");
    }
    if disk.tasks.timer_cancel(timer) {
        OK
    } else {
        abi::JIO_E_NOT_FOUND
    }
}

unsafe extern "C" fn work_submit(
    disk: *mut abi::jio_disk,
    function: abi::jio_task_fn,
    userdata: *mut c_void,
) -> i32 {
    // SAFETY: the contract.
    let Some(of) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    let Some(function) = function else {
        return abi::JIO_E_INVALID;
    };
    if !of.open.load(Ordering::Acquire) {
        of.violated("work on a closed disk");
        return abi::JIO_E_CLOSED;
    }
    let ledger = of.ledger.clone();
    let task = Task {
        function,
        userdata,
        ledger,
    };
    if of.tasks.work_submit(disk as usize, task) {
        OK
    } else {
        abi::JIO_E_NO_MEMORY
    }
}

unsafe extern "C" fn work_flush(disk: *mut abi::jio_disk) -> i32 {
    // SAFETY: the contract.
    let Some(of) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    if context::current() != Context::Control {
        // From work it would wait for itself: that is refused, not only noted.
        let what = "work_flush called outside of a control call";
        of.violated(what);
        return abi::JIO_E_DENIED;
    }
    of.tasks.work_flush(disk as usize);
    OK
}

unsafe extern "C" fn property_get(
    disk: *mut abi::jio_disk,
    key: *const c_char,
    buffer: *mut c_char,
    len: u64,
) -> i32 {
    // SAFETY: the contract.
    let Some(disk) = (unsafe { HostDisk::of(disk) }) else {
        return abi::JIO_E_INVALID;
    };
    if key.is_null() || buffer.is_null() {
        return abi::JIO_E_INVALID;
    }
    // SAFETY: the contract: a C string.
    let key = unsafe { CStr::from_ptr(key) }.to_string_lossy();
    let found = disk
        .setup
        .properties
        .iter()
        .find(|(known, _)| *known == key);
    let Some((_, value)) = found else {
        return abi::JIO_E_NOT_FOUND;
    };
    if value.len() as u64 >= len {
        return abi::JIO_E_RANGE;
    }
    // SAFETY: `len` bytes may be written, which is more than the value and its NUL.
    unsafe {
        buffer
            .cast::<u8>()
            .copy_from_nonoverlapping(value.as_ptr(), value.len());
        buffer.add(value.len()).write(0);
    }
    OK
}
