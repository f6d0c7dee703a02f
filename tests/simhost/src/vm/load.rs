//! The filter library: found, loaded, checked; its callbacks made callable.
//!
//! Invariant: the library is never unloaded, so its table and code stay valid; a slot is called only
//! if the table's size says that it is there.

use super::services;
use crate::abi;
use crate::contract::context::{self, Context as In};
use anyhow::{Context, bail};
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::ptr::{NonNull, null_mut};

/// The filter's table, checked.
#[derive(Clone, Copy, Debug)]
pub struct Filter(NonNull<abi::jio_filter>);

// SAFETY: the contract: the table is constant, its functions may be called from several threads.
unsafe impl Send for Filter {}
// SAFETY: as above.
unsafe impl Sync for Filter {}

/// Names under which the library is looked for beside the program.
const NAMES: [&str; 2] = ["libvmiof-disk-jetdr.so", "libvaio_shim.so"];

/// Where the library is: as given, by the environment, or beside this program.
pub fn find(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    if let Some(path) = std::env::var_os("JETDR_FILTER_LIB") {
        return Ok(path.into());
    }
    let program = std::env::current_exe().context("where is this program?")?;
    // Test programs lie one folder below the library.
    let folders = program.ancestors().skip(1).take(2);
    let mut tried = Vec::new();
    for path in folders.flat_map(|folder| NAMES.map(|name| folder.join(name))) {
        if path.exists() {
            return Ok(path);
        }
        tried.push(path.display().to_string());
    }
    bail!(
        "the filter library was not found; looked for {}; give --filter-lib",
        tried.join(", ")
    )
}

/// Loads the library and checks its table.
pub fn load(given: Option<&Path>) -> anyhow::Result<Filter> {
    let path = find(given)?;
    let name = path.display().to_string();
    // SAFETY: loading runs the library's initialisers; which library it is, the operator says.
    let library = unsafe { libloading::Library::new(&path) }
        .with_context(|| format!("cannot load the filter library {name}"))?;
    // SAFETY: the symbol's type is the contract's.
    let entry = unsafe {
        library.get::<unsafe extern "C" fn(*const abi::jio_host, u32) -> *const abi::jio_filter>(
            b"jio_filter_entry",
        )
    };
    let entry = *entry.with_context(|| format!("{name} is not a filter"))?;
    // Never unloaded: the table points into it.
    std::mem::forget(library);
    // SAFETY: called as the contract says, with a table that lives until the process ends.
    let table = unsafe { entry(services::table(), abi::JIO_ABI_VERSION) };
    let Some(table) = NonNull::new(table.cast_mut()) else {
        bail!("the filter {name} refuses this host; its log says why");
    };
    // SAFETY: a table begins with its size and version.
    let (size, version) = unsafe { ((*table.as_ptr()).size, (*table.as_ptr()).abi_version) };
    if version >> 16 != abi::JIO_ABI_MAJOR {
        bail!(
            "{name} was built for major version {} of the contract",
            version >> 16
        );
    }
    if (size as usize) < std::mem::offset_of!(abi::jio_filter, stun) {
        bail!("{name}: its table of {size} bytes lacks required callbacks");
    }
    let filter = Filter(table);
    let t = filter.table();
    let complete = t.requirements.is_some()
        && t.attach.is_some()
        && t.detach.is_some()
        && t.open.is_some()
        && t.close.is_some()
        && t.io_start.is_some()
        && t.io_done.is_some()
        && t.io_abort.is_some();
    if !complete {
        bail!("{name}: a required callback is NULL");
    }
    Ok(filter)
}

/// Calls a slot if it is there.
macro_rules! call {
    ($context:ident: $self:ident . $slot:ident ( $($arg:expr),* ) else $missing:expr) => {{
        let _entered = context::enter(In::$context);
        let end = std::mem::offset_of!(abi::jio_filter, $slot) + size_of::<usize>();
        match $self.table().$slot {
            Some(function) if $self.table().size as usize >= end => {
                // SAFETY: a slot of the table, called as the contract says.
                unsafe { function($($arg),*) }
            }
            _ => $missing,
        }
    }};
}

impl Filter {
    fn table(&self) -> &abi::jio_filter {
        // SAFETY: the table lives until the process ends. Slots past its size are not used.
        unsafe { self.0.as_ref() }
    }

    /// See the contract: what any disk needs at most. `None`: the filter does not say.
    pub fn requirements(&self) -> Option<abi::jio_requirements> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut out: abi::jio_requirements = unsafe { std::mem::zeroed() };
        out.size = size_of::<abi::jio_requirements>() as u32;
        let info = std::ptr::null();
        let status =
            call!(Control: self.requirements(info, &raw mut out) else abi::JIO_E_NOT_SUPPORTED);
        (status >= 0).then_some(out)
    }

    /// See the contract.
    pub fn attach(&self, disk: *mut abi::jio_disk, info: &abi::jio_disk_info) -> i32 {
        call!(Control: self.attach(disk, info) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract.
    pub fn detach(&self, disk: *mut abi::jio_disk, info: &abi::jio_disk_info) -> i32 {
        call!(Control: self.detach(disk, info) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract.
    pub fn open(&self, disk: *mut abi::jio_disk, info: &abi::jio_disk_info) -> (*mut c_void, i32) {
        let mut instance = null_mut();
        let status =
            call!(Control: self.open(disk, info, &raw mut instance) else abi::JIO_E_NOT_SUPPORTED);
        (instance, status)
    }

    /// See the contract.
    pub fn close(&self, instance: *mut c_void, how: u32) -> i32 {
        call!(Control: self.close(instance, how) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract. Returns the verdict and the status that goes with FAIL.
    pub fn io_start(&self, instance: *mut c_void, io: *mut abi::jio_io) -> (u32, i32) {
        let mut status = 0;
        let verdict = call!(Io: self.io_start(instance, io, &raw mut status) else abi::JIO_PASS);
        (verdict, status)
    }

    /// See the contract.
    pub fn io_done(&self, instance: *mut c_void, io: *mut abi::jio_io, status: i32) -> u32 {
        call!(Io: self.io_done(instance, io, status) else abi::JIO_PASS)
    }

    /// See the contract.
    pub fn io_abort(&self, instance: *mut c_void, io: *mut abi::jio_io) -> i32 {
        call!(Io: self.io_abort(instance, io) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract.
    pub fn grow(&self, instance: *mut c_void, capacity_bytes: u64) -> i32 {
        call!(Control: self.grow(instance, capacity_bytes) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract.
    pub fn stun(&self, instance: *mut c_void) -> i32 {
        call!(Control: self.stun(instance) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract.
    pub fn unstun(&self, instance: *mut c_void) -> i32 {
        call!(Control: self.unstun(instance) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract.
    pub fn snapshot(&self, instance: *mut c_void, info: &abi::jio_snapshot) -> i32 {
        call!(Control: self.snapshot(instance, info) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract: `clone`, a name that Rust gives to something else.
    pub fn clone_disk(&self, instance: *mut c_void, info: &abi::jio_clone) -> i32 {
        call!(Control: self.clone(instance, info) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract.
    pub fn migrate(&self, instance: *mut c_void, info: &abi::jio_migrate) -> i32 {
        call!(Control: self.migrate(instance, info) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract.
    pub fn drain(&self, instance: *mut c_void, timeout_ns: u64) -> i32 {
        call!(Control: self.drain(instance, timeout_ns) else abi::JIO_E_NOT_SUPPORTED)
    }

    /// See the contract; `None`: the filter has no status.
    pub fn status(&self, instance: *mut c_void) -> Option<abi::jio_filter_status> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut out: abi::jio_filter_status = unsafe { std::mem::zeroed() };
        out.size = size_of::<abi::jio_filter_status>() as u32;
        let status = call!(Io: self.status(instance, &raw mut out) else abi::JIO_E_NOT_SUPPORTED);
        (status >= 0).then_some(out)
    }
}
