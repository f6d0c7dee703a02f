//! A disk under the filter: its I/O on the way down and up, and its life.
//!
//! Invariant: each I/O gets one verdict and one answer; between the filter's close and the next open
//! nothing of the disk is passed to the filter.

use super::load::Filter;
use super::tasks::Tasks;
use crate::abi;
use crate::contract::{Contract, IoCell, IoState};
use crate::disk::{self, DiskError, Extent, FlatFile, Format};
use crate::nbd::engine::{Engine, Io, Kind, execute, wire_error};
use crate::nbd::proto::errno;
use crate::nbd::server::Connection;
use anyhow::{Context, bail};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a VM process knows of a disk before it is opened.
#[derive(Clone, Debug)]
pub struct DiskSetup {
    /// Short name, and name of the export.
    pub label: String,
    /// The file.
    pub path: PathBuf,
    /// How it is stored.
    pub format: Format,
    /// The VM's name.
    pub vm_name: String,
    /// The VM's id.
    pub vm_uuid: [u8; 16],
    /// The host's run folder.
    pub run_dir: PathBuf,
    /// For the filter.
    pub properties: Vec<(String, String)>,
    /// What is to go wrong.
    pub faults: Faults,
}

/// Faults on request.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    delay_us: u64,
    writes: Vec<(u64, u64, Arc<AtomicU64>)>,
}

impl Faults {
    /// From the flags that name this disk: LABEL:OFFSET:LENGTH:COUNT.
    pub fn parse(label: &str, flags: &[String], delay_us: u64) -> anyhow::Result<Self> {
        let mut writes = Vec::new();
        for flag in flags {
            let parts: Vec<&str> = flag.split(':').collect();
            let [of, offset, len, count] = parts.as_slice() else {
                bail!("--fault-write {flag}: expected LABEL:OFFSET:LENGTH:COUNT");
            };
            let number = |text: &str| {
                text.parse::<u64>()
                    .with_context(|| format!("--fault-write {flag}: `{text}`"))
            };
            let (offset, len, count) = (number(offset)?, number(len)?, number(count)?);
            if *of == label {
                writes.push((offset, len, Arc::new(AtomicU64::new(count))));
            }
        }
        Ok(Self { delay_us, writes })
    }

    /// Whether this I/O is to fail; delays it if asked to.
    fn strike(&self, kind: Kind, offset: u64, len: u64) -> bool {
        if self.delay_us > 0 {
            std::thread::sleep(Duration::from_micros(self.delay_us));
        }
        matches!(kind, Kind::Write | Kind::Zero | Kind::Unmap)
            && self.writes.iter().any(|(at, span, left)| {
                *at < offset + len
                    && offset < at + span
                    && left
                        .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1))
                        .is_ok()
            })
    }
}

/// An I/O on its way through the filter. The contract's struct comes first, so that a pointer to one
/// is a pointer to the other.
#[repr(C)]
pub struct FilterIo {
    jio: abi::jio_io,
    iov: abi::jio_iovec,
    state: IoCell,
    io: Option<Box<Io>>,
    disk: Option<Arc<HostDisk>>,
    started: Option<Instant>,
    result: i32,
}

/// Filter I/O objects that are kept for reuse.
const POOL: usize = 64;

/// An open disk under the filter. A pointer to it is the contract's disk handle.
pub struct HostDisk {
    /// Its setup.
    pub setup: DiskSetup,
    /// The file.
    pub disk: FlatFile,
    /// The filter.
    pub filter: Filter,
    /// The host's threads.
    pub tasks: Arc<Tasks>,
    /// The checks.
    pub contract: Arc<Contract>,
    /// Sidecars that the filter has open.
    pub sidecars: Mutex<HashMap<usize, super::sidecar::SidecarFile>>,
    /// The filter may use timers, work and own I/O.
    pub open: AtomicBool,
    instance: AtomicPtr<c_void>,
    next_id: AtomicU64,
    #[allow(clippy::vec_box)] // objects travel by pointer and come back the same
    pool: Mutex<Vec<Box<FilterIo>>>,
    /// I/Os that the filter holds: address, and the connection they came from.
    deferred: Mutex<Vec<(usize, usize)>>,
}

// SAFETY: the pools hold I/O objects that no thread uses; the handle's pointers are only compared or
// handed to the filter, as the contract allows from any thread.
unsafe impl Send for HostDisk {}
// SAFETY: as above.
unsafe impl Sync for HostDisk {}

struct InfoStrings {
    label: CString,
    path: CString,
    vm_name: CString,
    run_dir: CString,
    boot_id: CString,
    properties: Vec<(CString, CString)>,
}

impl HostDisk {
    /// The contract's handle.
    pub fn handle(self: &Arc<Self>) -> *mut abi::jio_disk {
        Arc::as_ptr(self).cast_mut().cast()
    }

    /// The disk behind a handle.
    ///
    /// # Safety
    /// `handle` must be NULL or come from `handle()` of a disk that lives.
    pub unsafe fn of<'a>(handle: *mut abi::jio_disk) -> Option<&'a Self> {
        // SAFETY: the caller's promise.
        unsafe { handle.cast::<Self>().as_ref() }
    }

    /// The same, counted.
    ///
    /// # Safety
    /// As for [`HostDisk::of`].
    pub unsafe fn arc_of(handle: *mut abi::jio_disk) -> Option<Arc<Self>> {
        if handle.is_null() {
            return None;
        }
        // SAFETY: the caller's promise: the handle is an Arc's pointer, and that Arc lives.
        unsafe {
            Arc::increment_strong_count(handle.cast::<Self>());
            Some(Arc::from_raw(handle.cast::<Self>()))
        }
    }

    /// Opens a disk, and attaches it to the filter if it is not yet.
    pub fn open(
        filter: Filter,
        tasks: Arc<Tasks>,
        contract: Arc<Contract>,
        setup: DiskSetup,
    ) -> anyhow::Result<Arc<Self>> {
        let disk = disk::open(&setup.path, Some(setup.format))?;
        let this = Arc::new(Self {
            setup,
            disk,
            filter,
            tasks,
            contract,
            sidecars: Mutex::default(),
            open: AtomicBool::new(true),
            instance: AtomicPtr::new(null_mut()),
            next_id: AtomicU64::new(1),
            pool: Mutex::default(),
            deferred: Mutex::default(),
        });
        let handle = this.handle();
        let (instance, status) = this.with_info(|info| {
            let (mut instance, status) = this.filter.open(handle, info);
            let mut status = status;
            if status == abi::JIO_E_NOT_FOUND {
                status = this.filter.attach(handle, info);
                if status >= 0 {
                    (instance, status) = this.filter.open(handle, info);
                }
            }
            (instance, status)
        })?;
        if status < 0 {
            let path = this.setup.path.display();
            let why = if status == abi::JIO_E_BUSY {
                ": another process has it open"
            } else {
                ""
            };
            bail!("the filter refuses to open {path} (code {status}){why}; its log says more");
        }
        this.instance.store(instance, Ordering::Release); // pairs with the loads in the I/O path
        Ok(this)
    }

    fn with_info<R>(&self, act: impl FnOnce(&abi::jio_disk_info) -> R) -> anyhow::Result<R> {
        let setup = &self.setup;
        let boot_id = std::fs::read_to_string(setup.run_dir.join("boot-id")).unwrap_or_default();
        let path = setup.path.to_string_lossy();
        let run_dir = setup.run_dir.to_string_lossy();
        let mut strings = InfoStrings {
            label: CString::new(setup.label.as_str())?,
            path: CString::new(path.as_ref())?,
            vm_name: CString::new(setup.vm_name.as_str())?,
            run_dir: CString::new(run_dir.as_ref())?,
            boot_id: CString::new(boot_id.trim())?,
            properties: Vec::new(),
        };
        for (key, value) in &setup.properties {
            strings
                .properties
                .push((CString::new(key.as_str())?, CString::new(value.as_str())?));
        }
        let properties: Vec<abi::jio_property> = strings
            .properties
            .iter()
            .map(|(key, value)| abi::jio_property {
                key: key.as_ptr(),
                value: value.as_ptr(),
            })
            .collect();
        let info = abi::jio_disk_info {
            size: size_of::<abi::jio_disk_info>() as u32,
            purpose: abi::JIO_PURPOSE_VM,
            flags: 0,
            block_bytes: 512,
            capacity_bytes: self.disk.capacity_bytes(),
            disk_uuid: [0; 16],
            vm_uuid: setup.vm_uuid,
            label: strings.label.as_ptr(),
            path: strings.path.as_ptr(),
            vm_name: strings.vm_name.as_ptr(),
            run_dir: strings.run_dir.as_ptr(),
            boot_id: strings.boot_id.as_ptr(),
            properties: properties.as_ptr(),
            property_count: properties.len() as u64,
            reserved: [0; 4],
        };
        Ok(act(&info))
    }

    fn instance(&self) -> *mut c_void {
        self.instance.load(Ordering::Acquire) // pairs with the stores of open and close
    }

    /// Closes the disk; nothing is in flight.
    pub fn close(self: &Arc<Self>) {
        let instance = self.instance.swap(null_mut(), Ordering::AcqRel);
        if instance.is_null() {
            return;
        }
        let status = self.filter.close(instance, abi::JIO_CLOSE_CLEAN);
        self.open.store(false, Ordering::Release); // pairs with the services' looks
        if status < 0 {
            tracing::warn!(
                "disk {}: the filter's close answered {status}",
                self.setup.label
            );
        }
        if !self.sidecars.lock().is_empty() {
            self.contract
                .violated(&self.setup.label, "a sidecar is open after close");
        }
        if !self.deferred.lock().is_empty() {
            self.contract
                .violated(&self.setup.label, "an I/O is still held after close");
        }
    }

    /// The filter's status.
    pub fn status(&self) -> Option<abi::jio_filter_status> {
        let instance = self.instance();
        if instance.is_null() {
            None
        } else {
            self.filter.status(instance)
        }
    }

    /// Waits until everything captured is durable elsewhere.
    pub fn drain(&self, timeout: Duration) -> i32 {
        let instance = self.instance();
        if instance.is_null() {
            return abi::JIO_E_CLOSED;
        }
        self.filter.drain(instance, timeout.as_nanos() as u64)
    }

    /// Enlarges the disk and tells the filter.
    pub fn grow(&self, capacity_bytes: u64) -> anyhow::Result<i32> {
        self.disk.grow(capacity_bytes)?;
        Ok(self.filter.grow(self.instance(), capacity_bytes))
    }

    fn take(self: &Arc<Self>, io: Box<Io>) -> Box<FilterIo> {
        let mut object = self.pool.lock().pop().unwrap_or_else(|| {
            Box::new(FilterIo {
                // SAFETY: plain numbers and pointers, for which zeros are valid.
                jio: unsafe { std::mem::zeroed() },
                iov: abi::jio_iovec {
                    base: null_mut(),
                    len_bytes: 0,
                },
                state: IoCell::default(),
                io: None,
                disk: None,
                started: None,
                result: 0,
            })
        });
        let jio = &mut object.jio;
        jio.size = size_of::<abi::jio_io>() as u32;
        jio.kind = match io.kind {
            Kind::Read => abi::JIO_IO_READ,
            Kind::Write => abi::JIO_IO_WRITE,
            Kind::Zero => abi::JIO_IO_ZERO,
            Kind::Unmap => abi::JIO_IO_UNMAP,
            Kind::Flush => abi::JIO_IO_FLUSH,
        };
        jio.flags = if io.fua { abi::JIO_IO_FUA } else { 0 }
            | if io.may_unmap && io.kind == Kind::Zero {
                abi::JIO_IO_MAY_UNMAP
            } else {
                0
            };
        jio.id = self.next_id.fetch_add(1, Ordering::Relaxed); // unique is all it must be
        jio.offset_bytes = io.offset_bytes;
        jio.len_bytes = u64::from(io.len_bytes);
        jio.filter_word = [0; 2];
        let has_data = matches!(io.kind, Kind::Read | Kind::Write);
        jio.iov_count = u32::from(has_data);
        jio.iov = if has_data {
            &raw const object.iov
        } else {
            std::ptr::null()
        };
        object.iov.base = io.buffer.as_ptr().cast_mut().cast();
        object.iov.len_bytes = u64::from(io.len_bytes);
        object.io = Some(io);
        object.disk = Some(self.clone());
        object.result = 0;
        object
    }

    /// An I/O of the guest.
    fn submit(self: &Arc<Self>, io: Box<Io>) {
        let instance = self.instance();
        if instance.is_null() {
            io.complete(errno::SHUTDOWN);
            return;
        }
        let from = io
            .connection
            .as_ref()
            .map_or(0, |c| Arc::as_ptr(c) as usize);
        let object = self.take(io);
        object.state.set(IoState::Starting);
        let raw = Box::into_raw(object);
        let (verdict, status) = self.filter.io_start(instance, raw.cast());
        // SAFETY: the object is this thread's until its state says otherwise: only `io_continue` and
        // `io_complete` touch it meanwhile, and they leave it alive while it is `Starting`.
        let object = unsafe { &mut *raw };
        match verdict {
            abi::JIO_PASS => {
                if object.state.step(IoState::Starting, IoState::Down).is_err() {
                    self.contract
                        .violated(&self.setup.label, "continued, then passed");
                }
                // SAFETY: from `into_raw` above; nobody else has it.
                self.run_down(unsafe { Box::from_raw(raw) });
            }
            abi::JIO_DEFER => {
                object.started = Some(Instant::now());
                self.deferred.lock().push((raw as usize, from));
                // If the filter was faster, the I/O goes on here; otherwise it is the filter's now.
                if object
                    .state
                    .step(IoState::Starting, IoState::Deferred)
                    .is_err()
                {
                    self.forget(raw);
                    object.state.set(IoState::Down);
                    // SAFETY: `io_continue` left it to this thread.
                    self.run_down(unsafe { Box::from_raw(raw) });
                }
            }
            abi::JIO_COMPLETE | abi::JIO_FAIL => {
                let failed = verdict == abi::JIO_FAIL;
                if failed && status >= 0 {
                    self.contract
                        .violated(&self.setup.label, "FAIL without a status");
                }
                // SAFETY: as above.
                let object = unsafe { Box::from_raw(raw) };
                self.finish(object, if failed { errno::IO } else { 0 });
            }
            other => {
                self.contract
                    .violated(&self.setup.label, &format!("verdict {other} is none"));
                // SAFETY: as above.
                self.run_down(unsafe { Box::from_raw(raw) });
            }
        }
    }

    /// The layers below, then the completion up.
    fn run_down(self: &Arc<Self>, mut object: Box<FilterIo>) {
        let Some(io) = object.io.as_mut() else { return };
        let (kind, offset, len) = (io.kind, io.offset_bytes, u64::from(io.len_bytes));
        let outcome = if self.setup.faults.strike(kind, offset, len) {
            Err(errno::IO)
        } else {
            execute(&self.disk, io).map_err(|error| {
                tracing::warn!("disk {}: {error}", self.setup.label);
                wire_error(&error)
            })
        };
        let error = outcome.err().unwrap_or(0);
        object.result = error as i32;
        let status = match error {
            0 => abi::JIO_OK,
            errno::NOSPC => abi::JIO_E_NO_SPACE,
            errno::PERM => abi::JIO_E_READ_ONLY,
            _ => abi::JIO_E_IO,
        };
        self.contract.calls.fetch_add(1, Ordering::Relaxed); // a counter
        let instance = self.instance();
        let raw = Box::into_raw(object);
        let verdict = self.filter.io_done(instance, raw.cast(), status);
        // SAFETY: the object is this thread's: `io_release` leaves it alive while it is `Down`.
        let object = unsafe { &mut *raw };
        match verdict {
            abi::JIO_DEFER if object.state.step(IoState::Down, IoState::Held).is_ok() => return,
            abi::JIO_PASS | abi::JIO_DEFER => {}
            other => {
                self.contract
                    .violated(&self.setup.label, &format!("io_done's verdict {other}"));
            }
        }
        // SAFETY: from `into_raw` above, and not held.
        self.finish(unsafe { Box::from_raw(raw) }, error);
    }

    fn finish(&self, mut object: Box<FilterIo>, error: u32) {
        object.state.set(IoState::Ended);
        object.disk = None;
        object.started = None;
        let io = object.io.take();
        let mut pool = self.pool.lock();
        if pool.len() < POOL {
            pool.push(object);
        }
        drop(pool);
        if let Some(io) = io {
            io.complete(error);
        }
    }

    fn forget(&self, raw: *mut FilterIo) {
        let mut deferred = self.deferred.lock();
        deferred.retain(|(address, _)| *address != raw as usize);
        // SAFETY: the object lives: it is being answered by the caller.
        if let Some(started) = unsafe { (*raw).started } {
            self.contract
                .note_deferral(started.elapsed().as_nanos() as u64);
        }
    }

    /// The filter continues (`error` `None`) or completes a deferred I/O.
    pub fn answer_deferred(self: &Arc<Self>, jio: *mut abi::jio_io, error: Option<u32>) -> i32 {
        let raw = jio.cast::<FilterIo>();
        if raw.is_null() {
            return abi::JIO_E_INVALID;
        }
        // SAFETY: the contract: an I/O of this disk that has not ended.
        let object = unsafe { &*raw };
        let early = error.is_none()
            && object
                .state
                .step(IoState::Starting, IoState::Continued)
                .is_ok();
        if early {
            return abi::JIO_OK; // its io_start, still running, sees it
        }
        if let Err(found) = object.state.step(IoState::Deferred, IoState::Down) {
            let what = format!(
                "an answer to I/O {} which is {found:?}, not deferred",
                object.jio.id
            );
            self.contract.violated(&self.setup.label, &what);
            return abi::JIO_E_DENIED;
        }
        self.forget(raw);
        // SAFETY: it was deferred and is now this call's: the state has just been moved.
        let object = unsafe { Box::from_raw(raw) };
        let this = self.clone();
        let send = SendBox(object);
        self.tasks.run_io(Box::new(move || {
            let object = send.into_inner();
            match error {
                None => this.run_down(object),
                Some(error) => this.finish(object, error),
            }
        }));
        abi::JIO_OK
    }

    /// The filter releases a completion that it held.
    pub fn answer_held(self: &Arc<Self>, jio: *mut abi::jio_io) -> i32 {
        let raw = jio.cast::<FilterIo>();
        if raw.is_null() {
            return abi::JIO_E_INVALID;
        }
        // SAFETY: the contract: an I/O of this disk that has not ended.
        let object = unsafe { &*raw };
        if object.state.step(IoState::Down, IoState::Released).is_ok() {
            return abi::JIO_OK; // its io_done, still running, sees it
        }
        if let Err(found) = object.state.step(IoState::Held, IoState::Ended) {
            let what = format!("a release of I/O {} which is {found:?}", object.jio.id);
            self.contract.violated(&self.setup.label, &what);
            return abi::JIO_E_DENIED;
        }
        // SAFETY: it was held and is now this call's.
        let object = SendBox(unsafe { Box::from_raw(raw) });
        let this = self.clone();
        self.tasks.run_io(Box::new(move || {
            let object = object.into_inner();
            let error = object.result as u32;
            this.finish(object, error);
        }));
        abi::JIO_OK
    }

    /// A client is gone: what the filter holds of it is given up, if the filter lets go.
    fn abort_of(self: &Arc<Self>, connection: usize) {
        let mine: Vec<usize> = {
            let deferred = self.deferred.lock();
            deferred
                .iter()
                .filter(|(_, from)| *from == connection)
                .map(|(io, _)| *io)
                .collect()
        };
        for address in mine {
            let raw = address as *mut FilterIo;
            let instance = self.instance();
            if instance.is_null() || self.filter.io_abort(instance, raw.cast()) < 0 {
                continue; // answered, or kept: the usual answer comes
            }
            self.forget(raw);
            // SAFETY: the filter let go of it: nobody else has it.
            self.finish(unsafe { Box::from_raw(raw) }, errno::IO);
        }
    }
}

/// A box that may change threads.
struct SendBox(Box<FilterIo>);
// SAFETY: an I/O that its state has given to whoever holds the box.
unsafe impl Send for SendBox {}

impl SendBox {
    fn into_inner(self) -> Box<FilterIo> {
        self.0
    }
}

/// A disk as an export.
pub struct FilterEngine(pub Arc<HostDisk>);

impl Engine for FilterEngine {
    fn capacity_bytes(&self) -> u64 {
        self.0.disk.capacity_bytes()
    }

    fn submit(&self, io: Box<Io>) {
        self.0.submit(io);
    }

    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>, DiskError> {
        self.0.disk.extents(offset, len, limit)
    }

    fn disconnected(&self, connection: &Arc<Connection>) {
        self.0.abort_of(Arc::as_ptr(connection) as usize);
    }
}
