//! Writes `include/bindings.rs` from `include/iofilter.h`.
//!
//! The output is committed, so that a machine without libclang builds; a test runs this again and
//! fails when the two differ. Run it with `cargo run -p conformance --example bindings`; with
//! `--check` it compares instead of writing.
use std::path::Path;

use bindgen::callbacks::{IntKind, ParseCallbacks};

/// Gives the constants the types that the contract's functions use.
#[derive(Debug)]
struct ConstantTypes;

impl ParseCallbacks for ConstantTypes {
    fn int_macro(&self, name: &str, _value: i64) -> Option<IntKind> {
        let is_status = name == "JIO_OK" || name.starts_with("JIO_E_");
        Some(if is_status {
            IntKind::I32
        } else {
            IntKind::U32
        })
    }
}

const HEAD: &str = "\
/* automatically generated from iofilter.h by tests/conformance/examples/bindings.rs; do not edit.
   The filter library and the simulated host include it, each in a module of its own. */
";

/// One statement a line: the layout assertions are many, and short.
fn compact(text: &str) -> String {
    let mut out = String::new();
    let mut joined = String::new();
    let mut in_assertions = false;
    for line in text.lines() {
        if in_assertions && line.starts_with("    ") {
            joined.push_str(line.trim());
            if line.ends_with(';') {
                out.push_str(&format!("    {}\n", joined.replace(",][", "][")));
                joined.clear();
            }
        } else {
            in_assertions = line == "const _: () = {";
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// Formatted by bindgen itself: no installed rustfmt decides whether the committed file is up to date.
fn generate(header: &Path) -> Result<String, bindgen::BindgenError> {
    let bindings = bindgen::Builder::default()
        .header(header.to_string_lossy())
        .clang_args(["-std=c11", "-Wall", "-Wextra", "-Werror"])
        .allowlist_item("(jio|JIO)_.*")
        .blocklist_item("JIO_(HAS|ASSERT.*|IOFILTER_H|HOST_REQUIRED_SIZE|FILTER_REQUIRED_SIZE)")
        // The library defines it, the host finds it by name: neither imports it.
        .blocklist_function("jio_filter_entry")
        .parse_callbacks(Box::new(ConstantTypes))
        .use_core()
        .layout_tests(true)
        .derive_debug(false)
        .derive_default(false)
        .generate_comments(false)
        .merge_extern_blocks(true)
        .disable_header_comment()
        .formatter(bindgen::Formatter::Prettyplease)
        .generate()?;
    Ok(format!("{HEAD}\n{}", compact(&bindings.to_string())))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../include");
    let text = generate(&include.join("iofilter.h"))?;
    let path = include.join("bindings.rs");
    if !std::env::args().any(|arg| arg == "--check") {
        std::fs::write(path, text)?;
    } else if std::fs::read_to_string(path)? != text {
        return Err(
            "include/bindings.rs does not match include/iofilter.h: `make bindings`".into(),
        );
    }
    Ok(())
}
