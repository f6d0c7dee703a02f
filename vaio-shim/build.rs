//! Compiles the C side of the layout test, and gives the library its lasting name.

fn main() {
    println!("cargo:rerun-if-changed=csrc/layout.c");
    println!("cargo:rerun-if-changed=../include/iofilter.h");
    cc::Build::new()
        .file("csrc/layout.c")
        .include("../include")
        .std("c11")
        .flag("-pedantic")
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .compile("jetdr_layout");
    // Cargo does not allow a hyphen in a library's name: the file is renamed when it is packaged,
    // the name inside is right from the start.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libvmiof-disk-jetdr.so");
}
