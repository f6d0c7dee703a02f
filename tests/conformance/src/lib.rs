//! C programs under `c/` drive the filter library by `include/iofilter.h` alone; `tests/` runs them.
//!
//! This crate builds them with the system's C compiler, with all warnings as errors, and knows where
//! the filter library is. Invariant: the Rust bindings are not used here; the C side stands alone.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the header and its users must compile with, without a word from the compiler.
const FLAGS: [&str; 8] = [
    "-std=c11",
    "-pedantic",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-O1",
    "-g",
    "-D_GNU_SOURCE",
];

/// The repository's folder of the C sources.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("c")
}

/// Compiles sources of `c/` into `out`; with `-shared` among the extra flags it is a library.
pub fn compile(names: &[&str], extra: &[&str], out: &Path) -> io::Result<()> {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let output = Command::new(&compiler)
        .args(FLAGS)
        .arg("-I")
        .arg(sources().join("../../../include"))
        .args(names.iter().map(|name| sources().join(name)))
        .args(extra)
        .arg("-o")
        .arg(out)
        .args(["-pthread", "-ldl"])
        .output()
        .map_err(|error| {
            io::Error::new(error.kind(), format!("C compiler {compiler:?}: {error}"))
        })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "{names:?} does not compile:\n{text}"
    )))
}

/// Compiles one of the C filters into a library in `folder`.
pub fn compile_filter(name: &str, folder: &Path) -> io::Result<PathBuf> {
    let library = folder.join(format!("lib{name}.so"));
    compile(&[&format!("{name}.c")], &["-fPIC", "-shared"], &library)?;
    Ok(library)
}

/// Compiles the driver into `folder`.
pub fn compile_driver(folder: &Path) -> io::Result<PathBuf> {
    let program = folder.join("drive");
    compile(
        &["drive.c", "memhost.c", "memdisk.c", "memio.c"],
        &[],
        &program,
    )?;
    Ok(program)
}

/// The filter library that was built with these tests.
pub fn filter_library() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("JETDR_FILTER_LIB") {
        return Ok(path.into());
    }
    // Beside the test program, where cargo puts the libraries that its package depends on.
    let program = std::env::current_exe()?;
    let candidates = program
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("libvaio_shim.so"));
    let tried: Vec<PathBuf> = candidates.collect();
    tried
        .iter()
        .find(|path| path.exists())
        .cloned()
        .ok_or_else(|| {
            io::Error::other(format!(
                "the filter library is not built: none of {tried:?}"
            ))
        })
}
