//! A disk under the filter: its life.
//!
//! Invariant: between open and close, and only there, I/O is passed to the filter; at close none is
//! under way, and afterwards nothing of the filter's is left.

use super::below::Below;
use super::events::agreed;
use super::faults::Faults;
use super::load::Filter;
use super::pipeline::Pipeline;
use super::points::Point;
use super::tasks::Tasks;
use crate::abi;
use crate::contract::Contract;
use crate::contract::ledger::Ledger;
use crate::disk::undo::Undo;
use crate::disk::{self, Format};
use anyhow::{Context, bail};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::{Duration, Instant};

/// What a VM process knows of a disk before it is opened.
#[derive(Clone)]
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
    /// Completed writes that no flush covered are lost at a power cut.
    pub volatile_cache: bool,
    /// Opened as the destination of a migration.
    pub migrated: bool,
    /// What is to go wrong.
    pub faults: Arc<Faults>,
}

/// Every I/O's offset and length are multiples of this.
pub const BLOCK_BYTES: u64 = 512;

/// How long close waits for I/O that is still under way.
const CLOSE_LIMIT: Duration = Duration::from_secs(30);

/// An open disk under the filter. A pointer to it is the contract's disk handle.
pub struct HostDisk {
    /// Its setup.
    pub setup: DiskSetup,
    /// The file.
    pub disk: Below,
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
    /// What the filter has taken for this disk.
    pub ledger: Arc<Ledger>,
    /// Its I/Os.
    pub pipeline: Pipeline,
    /// The longest that the filter says it holds an I/O.
    pub defer_ns_max: u64,
    /// Between open and close. The instance itself may be anything, NULL too.
    serving: AtomicBool,
    instance: AtomicPtr<c_void>,
}

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
        let (disk, cache) = if setup.volatile_cache {
            let disk = disk::open_cached(&setup.path, Some(setup.format))?;
            (disk, Some(Undo::open(&setup.path)?))
        } else {
            (disk::open(&setup.path, Some(setup.format))?, None)
        };
        let disk = Below::new(disk, &setup.label, setup.faults.clone(), cache);
        let this = Arc::new(Self {
            setup,
            disk,
            filter,
            tasks,
            contract,
            sidecars: Mutex::default(),
            open: AtomicBool::new(true),
            ledger: Arc::default(),
            pipeline: Pipeline::default(),
            defer_ns_max: filter
                .requirements()
                .map_or(0, |needed| needed.defer_ns_max),
            serving: AtomicBool::new(false),
            instance: AtomicPtr::new(null_mut()),
        });
        this.begin(this.setup.migrated)?;
        Ok(this)
    }

    /// Opens it again, where it was closed for a migration that did not happen. `migrated`: it was handed
    /// over, not closed for good.
    pub fn open_again(self: &Arc<Self>, migrated: bool) -> anyhow::Result<()> {
        self.disk.open_again()?;
        self.open.store(true, Ordering::Release); // pairs with the services' looks
        self.begin(migrated)
    }

    /// The filter leaves the disk, which is closed: its sidecar goes.
    pub fn detach(self: &Arc<Self>) -> anyhow::Result<()> {
        self.open.store(true, Ordering::Release); // pairs with the services' looks
        let handle = self.handle();
        let status = self.with_info(false, |info| self.filter.detach(handle, info));
        self.open.store(false, Ordering::Release); // pairs with the services' looks
        match status? {
            status if status < 0 => bail!(
                "the filter does not leave {} (code {status})",
                self.setup.path.display()
            ),
            _ => Ok(()),
        }
    }

    /// The filter's open.
    fn begin(self: &Arc<Self>, migrated: bool) -> anyhow::Result<()> {
        let this = self;
        let handle = this.handle();
        this.pass(Point::Opening);
        let (instance, status) = this.with_info(migrated, |info| {
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
            this.open.store(false, Ordering::Release); // pairs with the services' looks
            let path = this.setup.path.display();
            let why = if status == abi::JIO_E_BUSY {
                ": another process has it open"
            } else {
                ""
            };
            bail!("the filter refuses to open {path} (code {status}){why}; its log says more");
        }
        this.instance.store(instance, Ordering::Relaxed); // published by the next line
        this.pass(Point::Opened);
        this.serving.store(true, Ordering::Release); // pairs with the loads in the I/O path
        Ok(())
    }

    fn with_info<R>(
        &self,
        migrated: bool,
        act: impl FnOnce(&abi::jio_disk_info) -> R,
    ) -> anyhow::Result<R> {
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
        let identity = self.disk.identity();
        let info = abi::jio_disk_info {
            size: size_of::<abi::jio_disk_info>() as u32,
            purpose: abi::JIO_PURPOSE_VM,
            flags: if migrated { abi::JIO_DISK_MIGRATED } else { 0 },
            block_bytes: BLOCK_BYTES as u32,
            capacity_bytes: self.disk.capacity_bytes(),
            disk_uuid: identity.disk_uuid,
            vm_uuid: setup.vm_uuid,
            label: strings.label.as_ptr(),
            path: strings.path.as_ptr(),
            vm_name: strings.vm_name.as_ptr(),
            run_dir: strings.run_dir.as_ptr(),
            boot_id: strings.boot_id.as_ptr(),
            properties: properties.as_ptr(),
            property_count: properties.len() as u64,
            content_id: identity.content_id,
            content_id_before: identity.content_id_before,
            reserved: [0; 2],
        };
        Ok(act(&info))
    }

    /// The filter's instance, while the disk is open.
    pub fn instance(&self) -> Option<*mut c_void> {
        self.serving
            .load(Ordering::Acquire) // pairs with the stores of open and close
            .then(|| self.instance.load(Ordering::Relaxed)) // published by `serving`
    }

    /// The process passes a point at which it may be killed.
    pub fn pass(&self, point: Point) {
        self.setup.faults.pass(point, &self.setup.label);
    }

    /// Notes a violation of the contract.
    pub fn violated(&self, what: &str) {
        self.contract.violated(&self.setup.label, what);
    }

    /// Closes the disk; `how` is the contract's.
    pub fn close(self: &Arc<Self>, how: u32) {
        let Some(instance) = self.instance() else {
            return;
        };
        let deadline = Instant::now() + CLOSE_LIMIT;
        while self.pipeline.in_flight() > 0 {
            if Instant::now() > deadline {
                self.violated("I/O is under way at close");
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.serving.store(false, Ordering::Release); // pairs with the loads in the I/O path
        self.pass(Point::Closing);
        let status = self.filter.close(instance, how);
        self.pass(Point::Closed);
        self.open.store(false, Ordering::Release); // pairs with the services' looks
        if status < 0 {
            tracing::warn!(
                "disk {}: the filter's close answered {status}",
                self.setup.label
            );
        }
        if !self.sidecars.lock().is_empty() {
            self.violated("a sidecar is open after close");
        }
        if let Err(error) = self.disk.closed() {
            tracing::warn!("{error}"); // the next opening takes it for an unclean end
        }
        for left in self.ledger.left_behind() {
            self.violated(&left);
        }
    }

    /// The filter's status.
    pub fn status(&self) -> Option<abi::jio_filter_status> {
        self.filter.status(self.instance()?)
    }

    /// Waits until everything captured is durable elsewhere.
    pub fn drain(&self, timeout: Duration) -> i32 {
        let Some(instance) = self.instance() else {
            return abi::JIO_E_CLOSED;
        };
        self.filter.drain(instance, timeout.as_nanos() as u64)
    }

    /// The filter's stun: the guest is stopped, its I/O has ended.
    pub fn stun(&self) -> anyhow::Result<()> {
        let instance = self.instance().context("the disk is closed")?;
        agreed(&self.setup.label, "stun", self.filter.stun(instance), true)
    }

    /// The filter's unstun.
    pub fn unstun(&self) {
        let code = self.instance().map(|instance| self.filter.unstun(instance));
        if let Some(Err(error)) = code.map(|c| agreed(&self.setup.label, "unstun", c, true)) {
            tracing::warn!("{error}");
        }
    }
}
