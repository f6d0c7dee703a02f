//! The host's services, behind functions that can be called without `unsafe`.
//!
//! Invariant: the table was checked at entry (version, size, no NULL in a required slot) and lives
//! until the process ends, so every call through it is sound; a disk handle is used only between the
//! calls that the contract names.

use crate::abi;
use core::ffi::{CStr, c_char, c_void};
use core::ptr::{NonNull, null_mut};

/// Log levels of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something is lost or cannot be done.
    Error,
    /// Something is not as it should be.
    Warn,
    /// Something that an operator may want to know.
    Info,
}

/// The host's table, checked.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    table: NonNull<abi::jio_host>,
}

// SAFETY: the contract says that the table is unchanged until the process ends, and that each of its
// functions may be called from several threads at once.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

/// A disk's handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskHandle(pub *mut abi::jio_disk);

// SAFETY: an opaque handle; the host's functions that take it may be called from any thread.
unsafe impl Send for DiskHandle {}
// SAFETY: as above.
unsafe impl Sync for DiskHandle {}

/// Calls a slot of the table that the check at entry found to be set.
macro_rules! call {
    ($self:ident . $slot:ident ( $($arg:expr),* ) else $missing:expr) => {{
        // SAFETY: the table lives until the process ends and is not changed.
        match unsafe { $self.table.as_ref() }.$slot {
            // SAFETY: a required slot, called as the contract says; the arguments are the caller's.
            Some(function) => unsafe { function($($arg),*) },
            None => $missing,
        }
    }};
}

impl Host {
    /// Checks a host's table.
    ///
    /// # Safety
    /// `table` must be NULL or point to a table as the contract describes it.
    pub unsafe fn check(table: *const abi::jio_host, version: u32) -> Result<Self, &'static str> {
        if version >> 16 != abi::JIO_ABI_MAJOR {
            return Err("the host has another major version of the contract");
        }
        let Some(table) = NonNull::new(table.cast_mut()) else {
            return Err("the host's table is NULL");
        };
        // SAFETY: every version of the table begins with these two words.
        let (size, own) = unsafe {
            (
                (*table.as_ptr()).size as usize,
                (*table.as_ptr()).abi_version,
            )
        };
        if own != version {
            return Err("the host's table and its version disagree");
        }
        if size < core::mem::offset_of!(abi::jio_host, property_get) {
            return Err("the host's table is too small");
        }
        // SAFETY: the table is at least this large: only members before `property_get` are read.
        let t = unsafe { table.as_ref() };
        let complete = t.log.is_some()
            && t.now_mono_ns.is_some()
            && t.now_wall_ns.is_some()
            && t.random_bytes.is_some()
            && t.io_continue.is_some()
            && t.io_complete.is_some()
            && t.io_release.is_some()
            && t.submit.is_some()
            && t.sidecar_create.is_some()
            && t.sidecar_open.is_some()
            && t.sidecar_close.is_some()
            && t.sidecar_read.is_some()
            && t.sidecar_write.is_some()
            && t.sidecar_delete.is_some()
            && t.timer_start.is_some()
            && t.timer_cancel.is_some()
            && t.work_submit.is_some()
            && t.work_flush.is_some();
        if complete {
            Ok(Self { table })
        } else {
            Err("a required slot of the host's table is NULL")
        }
    }

    /// Whether this is the same table.
    pub fn is_same(&self, table: *const abi::jio_host) -> bool {
        core::ptr::eq(self.table.as_ptr(), table)
    }

    fn context(&self) -> *mut c_void {
        // SAFETY: the table lives until the process ends.
        unsafe { (*self.table.as_ptr()).host_ctx }
    }

    /// Appends to the host's log.
    pub fn log(&self, disk: Option<DiskHandle>, level: Level, message: &str) {
        let level = match level {
            Level::Error => abi::JIO_LOG_ERROR,
            Level::Warn => abi::JIO_LOG_WARN,
            Level::Info => abi::JIO_LOG_INFO,
        };
        let disk = disk.map_or(null_mut(), |d| d.0);
        let len = message.len().min(abi::JIO_LOG_MESSAGE_MAX as usize) as u64;
        call!(self.log(self.context(), disk, level, message.as_ptr().cast::<c_char>(), len) else ());
    }

    /// Tells the operator, where the host can; into the log in any case.
    pub fn event(&self, disk: DiskHandle, level: Level, code: u32, message: &str) {
        self.log(Some(disk), level, message);
        let at = core::mem::offset_of!(abi::jio_host, event_post) + size_of::<usize>();
        // SAFETY: the table lives until the process ends.
        if (unsafe { (*self.table.as_ptr()).size } as usize) < at {
            return;
        }
        let level = match level {
            Level::Error => abi::JIO_LOG_ERROR,
            Level::Warn => abi::JIO_LOG_WARN,
            Level::Info => abi::JIO_LOG_INFO,
        };
        let (text, len) = (message.as_ptr().cast::<c_char>(), message.len() as u64);
        call!(self.event_post(self.context(), disk.0, level, code, text, len) else ());
    }

    /// Monotonic time.
    pub fn now_mono_ns(&self) -> u64 {
        call!(self.now_mono_ns(self.context()) else 0)
    }

    /// Time since 1970.
    pub fn now_wall_ns(&self) -> u64 {
        call!(self.now_wall_ns(self.context()) else 0)
    }

    /// 16 unpredictable bytes, or `None`.
    pub fn random_id(&self) -> Option<[u8; 16]> {
        let mut id = [0u8; 16];
        let status =
            call!(self.random_bytes(self.context(), id.as_mut_ptr().cast(), 16) else abi::JIO_E_IO);
        (status >= 0).then_some(id)
    }

    /// A deferred I/O goes on.
    pub fn io_continue(&self, disk: DiskHandle, io: *mut abi::jio_io) -> i32 {
        call!(self.io_continue(disk.0, io) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// A held completion goes up.
    pub fn io_release(&self, disk: DiskHandle, io: *mut abi::jio_io) -> i32 {
        call!(self.io_release(disk.0, io) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// Queues the filter's own I/O. The request must stay where it is until its `done` was called.
    pub fn submit(&self, disk: DiskHandle, request: *mut abi::jio_request) -> i32 {
        call!(self.submit(disk.0, request) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// Starts a one-shot timer. `userdata` must live until it has run or was cancelled.
    pub fn timer_start(
        &self,
        disk: DiskHandle,
        delay_ns: u64,
        task: unsafe extern "C" fn(*mut c_void),
        userdata: *mut c_void,
    ) -> Result<u64, i32> {
        let mut timer = 0;
        let status = call!(
            self.timer_start(disk.0, delay_ns, Some(task), userdata, &raw mut timer)
            else abi::JIO_E_NOT_SUPPORTED
        );
        if status >= 0 { Ok(timer) } else { Err(status) }
    }

    /// Cancels a timer; afterwards its task is not running. `true`: it never ran and never will.
    pub fn timer_cancel(&self, disk: DiskHandle, timer: u64) -> bool {
        call!(self.timer_cancel(disk.0, timer) else abi::JIO_E_NOT_FOUND) >= 0
    }

    /// Runs a task soon where blocking is allowed. `userdata` must live until it has run.
    pub fn work_submit(
        &self,
        disk: DiskHandle,
        task: unsafe extern "C" fn(*mut c_void),
        userdata: *mut c_void,
    ) -> i32 {
        call!(self.work_submit(disk.0, Some(task), userdata) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// Waits for all work of the disk.
    pub fn work_flush(&self, disk: DiskHandle) {
        let _ = call!(self.work_flush(disk.0) else abi::JIO_OK);
    }

    /// Makes a sidecar.
    pub fn sidecar_create(&self, disk: DiskHandle, key: u64, len: u64) -> Result<OpenSidecar, i32> {
        let mut handle = null_mut();
        let status = call!(
            self.sidecar_create(disk.0, key, len, &raw mut handle) else abi::JIO_E_NOT_SUPPORTED
        );
        if status >= 0 {
            Ok(OpenSidecar {
                host: *self,
                disk,
                handle,
            })
        } else {
            Err(status)
        }
    }

    /// Opens a sidecar; gives its length too.
    pub fn sidecar_open(&self, disk: DiskHandle, key: u64) -> Result<(OpenSidecar, u64), i32> {
        let (mut handle, mut len) = (null_mut(), 0);
        let status = call!(
            self.sidecar_open(disk.0, key, &raw mut handle, &raw mut len)
            else abi::JIO_E_NOT_SUPPORTED
        );
        if status >= 0 {
            Ok((
                OpenSidecar {
                    host: *self,
                    disk,
                    handle,
                },
                len,
            ))
        } else {
            Err(status)
        }
    }

    /// Deletes a sidecar.
    pub fn sidecar_delete(&self, disk: DiskHandle, key: u64) -> i32 {
        call!(self.sidecar_delete(disk.0, key) else abi::JIO_E_NOT_SUPPORTED)
    }
}

/// A sidecar that is open; closed when dropped.
#[derive(Debug)]
pub struct OpenSidecar {
    host: Host,
    disk: DiskHandle,
    handle: *mut abi::jio_sidecar,
}

// SAFETY: an opaque handle; the host's functions that take it may be called from any thread.
unsafe impl Send for OpenSidecar {}

impl OpenSidecar {
    /// Reads a piece.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), i32> {
        let (host, len) = (self.host, buffer.len() as u64);
        let status = call!(
            host.sidecar_read(self.disk.0, self.handle, offset, buffer.as_mut_ptr().cast(), len)
            else abi::JIO_E_NOT_SUPPORTED
        );
        if status >= 0 { Ok(()) } else { Err(status) }
    }

    /// Writes a piece; it is durable on success.
    pub fn write(&self, offset: u64, buffer: &[u8]) -> Result<(), i32> {
        let (host, len) = (self.host, buffer.len() as u64);
        let status = call!(
            host.sidecar_write(self.disk.0, self.handle, offset, buffer.as_ptr().cast(), len)
            else abi::JIO_E_NOT_SUPPORTED
        );
        if status >= 0 { Ok(()) } else { Err(status) }
    }
}

impl Drop for OpenSidecar {
    fn drop(&mut self) {
        let host = self.host;
        call!(host.sidecar_close(self.disk.0, self.handle) else ());
    }
}

/// What the host says of a disk, copied.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Nothing will be written.
    pub read_only: bool,
    /// Capacity in bytes.
    pub capacity_bytes: u64,
    /// The host's id of the disk, if it has one.
    pub disk_uuid: Option<[u8; 16]>,
    /// The VM's id; zeros if none.
    pub vm_uuid: [u8; 16],
    /// The disk's label in its VM.
    pub label: String,
    /// Where it is, for messages.
    pub path: String,
    /// The VM's name.
    pub vm_name: String,
    /// The host's run folder.
    pub run_dir: String,
    /// What the host calls the disk's content now, and what it called it before this opening; 0: it
    /// cannot tell.
    pub content_id: u64,
    /// See `content_id`.
    pub content_before: u64,
    /// Properties, in order.
    pub properties: Vec<(String, String)>,
}

impl DiskInfo {
    /// Copies what the host says.
    ///
    /// # Safety
    /// `info` must be NULL or point to a struct as the contract describes it.
    pub unsafe fn read(info: *const abi::jio_disk_info) -> Option<Self> {
        // SAFETY: the caller's promise; NULL is looked for.
        let info = unsafe { info.as_ref() }?;
        if (info.size as usize) < size_of::<abi::jio_disk_info>() {
            return None;
        }
        let count = info.property_count.min(u64::from(abi::JIO_PROPERTIES_MAX)) as usize;
        let mut properties = Vec::with_capacity(count);
        for i in 0..count {
            if info.properties.is_null() {
                return None;
            }
            // SAFETY: `property_count` properties lie there, by the contract.
            let property = unsafe { &*info.properties.add(i) };
            properties.push((text(property.key), text(property.value)));
        }
        let id = info.disk_uuid;
        Some(Self {
            read_only: info.flags & abi::JIO_DISK_READ_ONLY != 0,
            capacity_bytes: info.capacity_bytes,
            disk_uuid: (id != [0; 16]).then_some(id),
            vm_uuid: info.vm_uuid,
            label: text(info.label),
            path: text(info.path),
            vm_name: text(info.vm_name),
            run_dir: text(info.run_dir),
            content_id: info.content_id,
            content_before: info.content_id_before,
            properties,
        })
    }

    /// A property's value.
    pub fn property(&self, key: &str) -> Option<&str> {
        self.properties
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value.as_str())
    }
}

/// A C string of the host, copied; empty if it is NULL.
pub fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: strings of the contract end with a NUL.
    unsafe { CStr::from_ptr(string) }
        .to_string_lossy()
        .into_owned()
}
