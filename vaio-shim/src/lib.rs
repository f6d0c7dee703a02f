//! The filter library: filter-core behind the C contract of include/iofilter.h.
