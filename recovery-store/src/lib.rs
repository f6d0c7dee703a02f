//! The layout of a recovery container: write, read, verify.
