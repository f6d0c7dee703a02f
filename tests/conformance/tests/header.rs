//! The header compiles by itself, in C and in C++, and its Rust bindings are up to date.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

#[test]
fn the_layout_holds_for_the_c_compiler() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("layout");
    conformance::compile(&["layout.c"], &[], &program).unwrap();
    let status = Command::new(&program).status().unwrap();
    assert!(status.success(), "layout.c: {status}");
}

#[test]
fn a_moved_member_does_not_compile() {
    let folder = tempfile::tempdir().unwrap();
    let header =
        std::fs::read_to_string(conformance::sources().join("../../../include/iofilter.h"));
    let header = header.unwrap();
    let moved = header.replacen(
        "    uint64_t id;  ",
        "    uint64_t other;\n    uint64_t id;  ",
        1,
    );
    assert_ne!(
        moved, header,
        "the test edits a line of the header that is gone"
    );
    std::fs::write(folder.path().join("moved.h"), &moved).unwrap();
    let include = format!("-include{}", folder.path().join("moved.h").display());
    let error = conformance::compile(&["layout.c"], &[&include], &folder.path().join("out"));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("jio_io_t.id has moved"), "{error}");
}

#[test]
fn cxx_takes_the_header() {
    let Ok(found) = Command::new("c++").arg("--version").output() else {
        eprintln!("skipped: no C++ compiler");
        return;
    };
    assert!(found.status.success());
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("header.cc");
    std::fs::write(&source, "#include \"iofilter.h\"\n").unwrap();
    let output = Command::new("c++")
        .args([
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-fsyntax-only",
            "-I",
        ])
        .arg(conformance::sources().join("../../../include"))
        .arg(&source)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

fn libclang_is_here() -> bool {
    let folders = [
        "/usr/lib",
        "/usr/lib64",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/local/lib",
    ];
    let named = |folder: &Path| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .any(|name| name.starts_with("libclang.so") || name.starts_with("libclang-"))
    };
    let llvm = std::fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten();
    let llvm = llvm
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("llvm-"))
        .any(|entry| named(&entry.path().join("lib")));
    llvm || folders.iter().any(|folder| named(Path::new(folder)))
        || std::env::var_os("LIBCLANG_PATH").is_some()
}

#[test]
fn the_bindings_are_up_to_date() {
    if !libclang_is_here() {
        eprintln!("skipped: libclang is not installed");
        return;
    }
    // Examples are built with the tests of their package, one folder beside this program's.
    let program = std::env::current_exe().unwrap();
    let generator = program
        .ancestors()
        .nth(2)
        .unwrap()
        .join("examples/bindings");
    let output = Command::new(&generator).arg("--check").output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", generator.display()));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}
