//! `jetdr`, the operator's command.

fn main() {}
