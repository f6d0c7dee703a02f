//! Builds the library that stands between a simulated host's processes and the network.

use std::path::PathBuf;

fn main() {
    let source = "csrc/hostnet.c";
    println!("cargo::rerun-if-changed={source}");
    let out = std::env::var_os("OUT_DIR").map(PathBuf::from);
    let out = out.unwrap_or_default().join("libhostnet.so");
    let mut build = cc::Build::new();
    build
        .pic(true)
        .opt_level(2)
        .warnings(true)
        .extra_warnings(true);
    let mut compiler = build.get_compiler().to_command();
    compiler.args(["-shared", "-fvisibility=hidden", "-Werror", source, "-o"]);
    let done = compiler.arg(&out).args(["-ldl", "-pthread"]).status();
    match done {
        Ok(status) if status.success() => {}
        other => panic!("cannot build {source}: {other:?}"),
    }
}
