//! Each rule fires on what it forbids, and is silent on what stands beside it.

use super::*;

fn file(path: &str, text: &str) -> File {
    File {
        path: path.to_owned(),
        text: text.to_owned(),
    }
}

fn lines(found: &[Finding]) -> Vec<usize> {
    found.iter().map(|finding| finding.line).collect()
}

#[test]
fn a_module_without_an_opening_is_found() {
    assert_eq!(
        lines(&module_opens_with_doc(&file(
            "a/src/x.rs",
            "use std::fs;\n"
        ))),
        [1]
    );
    assert_eq!(
        lines(&module_opens_with_doc(&file("a/src/x.rs", "// plain\n"))),
        [1]
    );
    assert!(module_opens_with_doc(&file("a/src/x.rs", "//! Owns x.\n")).is_empty());
    assert!(module_opens_with_doc(&file("a/src/x.rs", "#![no_main]\n//! X.\n")).is_empty());
    assert!(module_opens_with_doc(&file("a/tests/x.rs", "use std::fs;\n")).is_empty());
    assert!(module_opens_with_doc(&file("a/src/x_tests.rs", "use a::b;\n")).is_empty());
    assert_eq!(
        lines(&module_opens_with_doc(&file(
            "tests/simhost/src/x.rs",
            "fn f() {}"
        ))),
        [1]
    );
}

#[test]
fn a_long_file_is_found() {
    let long = "x\n".repeat(MAX_LINES + 1);
    assert_eq!(
        lines(&not_too_long(&file("a/src/x.rs", &long))),
        [MAX_LINES + 1]
    );
    assert!(not_too_long(&file("a/src/x.rs", &"x\n".repeat(MAX_LINES))).is_empty());
    assert!(not_too_long(&file("Cargo.lock", &long)).is_empty());
}

#[test]
fn a_path_of_a_machine_is_found() {
    let bad = concat!(
        "ok\ncd /wo",
        "rk/main\nls \"/ho",
        "me/me\"\n/ro",
        "ot/.cargo\n"
    );
    assert_eq!(lines(&no_machine_paths(&file("docs/x.md", bad))), [2, 3, 4]);
    let good = concat!("a/ro", "ot/b {dir}/wo", "rk/c .", "/ho", "me/d");
    assert!(no_machine_paths(&file("docs/x.md", good)).is_empty());
}

#[test]
fn unfinished_work_is_found() {
    let bad = concat!(
        "to",
        "do!()\nunimpl",
        "emented!()\n// FIX",
        "ME later\n// XX",
        "X\n#[ig",
        "nore]\n"
    );
    assert_eq!(
        lines(&nothing_left_open(&file("a/src/x.rs", bad))),
        [1, 2, 3, 4, 5]
    );
    assert!(nothing_left_open(&file("x.sh", "mktemp -d t.XXXXXX\n")).is_empty());
}

#[test]
fn a_hopeful_sleep_is_found() {
    let sleep = concat!("std::thread", "::sleep(pause);\n");
    let tokio = concat!("tokio::time", "::sleep(pause).await;\n");
    assert_eq!(lines(&no_hopeful_sleep(&file("a/tests/x.rs", sleep))), [1]);
    assert_eq!(lines(&no_hopeful_sleep(&file("a/tests/x.rs", tokio))), [1]);
    assert!(
        no_hopeful_sleep(&file("a/src/x.rs", sleep)).is_empty(),
        "not a test"
    );
    let inside = format!("fn f() {{ {sleep} }}\n#[cfg(test)]\nmod tests {{\n{sleep}}}\n");
    assert_eq!(lines(&no_hopeful_sleep(&file("a/src/x.rs", &inside))), [5]);
    for reason in SLEEP_REASONS {
        let above = format!("{reason}: why\n{sleep}");
        assert!(no_hopeful_sleep(&file("a/tests/x.rs", &above)).is_empty());
        let beside = format!("{} {reason}\n", sleep.trim_end());
        assert!(no_hopeful_sleep(&file("a/tests/x.rs", &beside)).is_empty());
    }
}

#[test]
fn misplaced_unsafe_is_found() {
    let block = format!("fn f() {{\n    {UNSAFE} {{ g() }}\n}}\n");
    assert_eq!(
        lines(&unsafe_in_its_place(&file("drva/src/x.rs", &block), &[])),
        [2]
    );
    for place in [
        "filter-core/src/lane/ring.rs",
        "vaio-shim/src/abi.rs",
        "a/src/mapping.rs",
    ] {
        assert!(
            unsafe_in_its_place(&file(place, &block), &[]).is_empty(),
            "{place}"
        );
    }
    let listed = [("drva/src/x.rs", "fallocate has no safe call")];
    assert!(unsafe_in_its_place(&file("drva/src/x.rs", &block), &listed).is_empty());
    assert_eq!(
        lines(&unsafe_in_its_place(
            &file("drva/src/x.rs", "fn f() {}"),
            &listed
        )),
        [1]
    );
    let bare = [("drva/src/x.rs", "")];
    assert_eq!(
        lines(&unsafe_in_its_place(&file("drva/src/x.rs", &block), &bare)),
        [1]
    );
    let words = format!("// {UNSAFE}\n\"{UNSAFE} {{\"\n#![deny({UNSAFE}_code)]\n");
    assert!(unsafe_in_its_place(&file("drva/src/x.rs", &words), &[]).is_empty());
}

#[test]
fn a_dependency_with_its_own_version_is_found() {
    let text = "[package]\nname = \"x\"\n[dependencies]\nlibc = \"0.2\"\ncc.workspace = true\n\
        [target.'cfg(loom)'.dependencies]\nloom = { version = \"0.7\" }\n\
        uuid = { workspace = true, features = [\"v4\"] }\n[dependencies.foo]\nversion = \"1\"\n";
    assert_eq!(
        lines(&dependencies_are_inherited(
            &file("x/Cargo.toml", text),
            &[]
        )),
        [4, 7, 9]
    );
    let excepted = [("x/Cargo.toml", "libc", "why")];
    let found = dependencies_are_inherited(&file("x/Cargo.toml", text), &excepted);
    assert_eq!(lines(&found), [7, 9]);
    let root = "[workspace.dependencies]\nlibc = \"0.2\"\n";
    assert!(dependencies_are_inherited(&file("Cargo.toml", root), &[]).is_empty());
}

#[test]
fn a_wildcard_version_is_found() {
    let text =
        "[workspace.dependencies]\na = \"*\"\nb = { version = \"*\" }\nc = \"1.*\"\nd = \"1\"\n";
    assert_eq!(
        lines(&no_wildcard_version(&file("Cargo.toml", text))),
        [2, 3, 4]
    );
}

#[test]
fn a_dependency_without_a_reason_is_found() {
    let root = file(
        "Cargo.toml",
        "[workspace.dependencies]\nours = { path = \"ours\" }\nlibc = \"0.2\"\ncc = \"1\"\n",
    );
    let doc = file(
        "docs/dependencies.md",
        "| `libc` | OS calls |\n| `cc` |  |\n",
    );
    assert_eq!(lines(&dependencies_have_reasons(&root, &doc)), [4]);
    let doc = file(
        "docs/dependencies.md",
        "| `libc` | a |\n| `cc` | b |\n| `gone` | c |\n",
    );
    let found = dependencies_have_reasons(&root, &doc);
    assert_eq!(found.len(), 1);
    assert!(found[0].what.contains("`gone`"));
}

#[test]
fn a_document_that_nothing_links_to_is_found() {
    let docs = [
        "docs/architecture.md",
        "docs/a.md",
        "docs/b.md",
        "docs/lost.md",
    ];
    let readme = "See [it](docs/architecture.md) and [a](docs/a.md).";
    let found = docs_are_linked(&docs, readme, "and [b](b.md#part)");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].path, "docs/lost.md");
}
