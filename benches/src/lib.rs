//! Benchmarks: the producer, the whole path, and the peers beside them.
