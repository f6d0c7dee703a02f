//! C programs under `c/` drive the filter library by `include/iofilter.h` alone; `tests/` builds and runs them.
