//! The DR appliance.
pub mod log;
pub mod raw;
