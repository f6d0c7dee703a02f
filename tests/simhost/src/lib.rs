//! The simulated host: VM processes that load the filter and serve its disks over NBD.
