//! Lints the repository: what a reviewer would otherwise have to remember is checked here.
//!
//! Every rule is a function from file contents to findings, so that its own test can show that it
//! fires. Patterns are put together from halves: this file is checked by itself as well.

#[path = "tidy/rule_tests.rs"]
mod rule_tests;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// No file is excepted: a long file has more than one subject.
const MAX_LINES: usize = 700;

/// Files outside the lane, the shim and the mappings that may hold the keyword, each with its reason.
const UNSAFE_ALLOWED: &[(&str, &str)] = &[
    ("src/parts.rs", "kill: SIGTERM for a child has no safe call"),
    (
        "appliances/drva/src/raw.rs",
        "fallocate, nice, and memory aligned for O_DIRECT",
    ),
    (
        "filter-daemon/src/connection.rs",
        "carries a pointer into a ring from thread to thread",
    ),
    (
        "filter-daemon/src/raw.rs",
        "poll, and a gathering write straight from a ring",
    ),
    (
        "tests/simhost/src/disk/file.rs",
        "fallocate and SEEK_DATA have no safe call",
    ),
    ("tests/simhost/src/host.rs", "kill has no safe call"),
    (
        "tests/simhost/src/nbd/connection.rs",
        "a thread that is called out of a read must live",
    ),
    (
        "tests/simhost/src/raw.rs",
        "descriptors in messages, poll, listen and signals have no safe call",
    ),
    (
        "tests/simhost/src/vm/hostdisk.rs",
        "the host's side of the C contract",
    ),
    (
        "tests/simhost/src/vm/load.rs",
        "the host's side of the C contract: dlopen",
    ),
    (
        "tests/simhost/src/vm/pipeline.rs",
        "the host's side of the C contract: I/Os travel by pointer",
    ),
    (
        "tests/simhost/src/vm/requests.rs",
        "the host's side of the C contract: the filter's own I/O",
    ),
    (
        "tests/simhost/src/vm/services.rs",
        "the host's side of the C contract: its services",
    ),
    (
        "tests/simhost/src/vm/tasks.rs",
        "the host's side of the C contract: callbacks",
    ),
];

/// Dependencies that cannot be inherited from the workspace, each with its reason.
const NOT_INHERITED: &[(&str, &str, &str)] = &[(
    "filter-core/Cargo.toml",
    "thiserror",
    "the core is no_std, and inheritance cannot switch the default features off",
)];

/// Extensions (and names) of the files that people write and read.
const TEXT: &[&str] = &[
    "rs", "c", "h", "sh", "md", "toml", "json", "js", "yml", "yaml", "Makefile", "run",
];

/// Written by tools: read by nobody, so their length says nothing.
const GENERATED: &[&str] = &[
    "Cargo.lock",
    "package-lock.json",
    "bindings.rs",
    "msa-openapi.json",
];

const BUILT_FOLDERS: &[&str] = &["target", "node_modules"];
const SKIPPED_FOLDERS: &[&str] = &[".git", "target", "node_modules"];

const UNSAFE: &str = concat!("un", "safe");
const SLEEPS: [&str; 2] = [concat!("thread", "::sleep"), concat!("time", "::sleep")];
const SLEEP_REASONS: [&str; 2] = ["// time under test", "// poll"];

struct File {
    path: String,
    text: String,
}

#[derive(PartialEq, Eq)]
struct Finding {
    path: String,
    line: usize,
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.what)
    }
}

impl fmt::Debug for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn finding(file: &File, line: usize, what: impl Into<String>) -> Finding {
    Finding {
        path: file.path.clone(),
        line,
        what: what.into(),
    }
}

fn kind(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.rsplit('.').next().unwrap_or(name)
}

/// True for a file that holds nothing but tests.
fn is_test_file(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let in_tests_folder = path.split('/').any(|part| part == "tests");
    let in_crate_source = path.contains("/src/");
    name == "tests.rs" || name.ends_with("_tests.rs") || (in_tests_folder && !in_crate_source)
}

fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// True if `word` stands in `line` with no letter, digit or underscore on either side.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = at.checked_sub(1).and_then(|i| line.as_bytes().get(i));
        let after = line.as_bytes().get(at + word.len());
        !before.is_some_and(|b| is_word_byte(*b)) && !after.is_some_and(|b| is_word_byte(*b))
    })
}

/// The code of a Rust line: without its comment and without the contents of its strings.
fn code_of(line: &str) -> String {
    let mut code = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    let mut in_string = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' if in_string => {
                chars.next();
            }
            '\'' if !in_string && chars.peek() == Some(&'"') => {
                chars.next();
            }
            '"' => in_string = !in_string,
            '/' if !in_string && chars.peek() == Some(&'/') => break,
            _ if !in_string => code.push(c),
            _ => {}
        }
    }
    code
}

/// Numbered lines of the tests in a file: all of a test file, else what follows its test module.
fn test_lines(file: &File) -> Vec<(usize, &str)> {
    let lines: Vec<&str> = file.text.lines().collect();
    let first = if is_test_file(&file.path) {
        Some(0)
    } else {
        lines
            .iter()
            .position(|line| line.trim() == "#[cfg(test)]")
            .filter(|at| {
                let item = lines
                    .iter()
                    .skip(at + 1)
                    .find(|line| !line.trim().starts_with("#["));
                item.is_some_and(|line| line.contains("mod ") && line.contains('{'))
            })
    };
    match first {
        Some(first) => lines
            .into_iter()
            .enumerate()
            .skip(first)
            .map(|(i, l)| (i + 1, l))
            .collect(),
        None => Vec::new(),
    }
}

// ---- rules over one file ------------------------------------------------------------------------

fn module_opens_with_doc(file: &File) -> Vec<Finding> {
    let is_generated = file.text.starts_with("/* automatically generated");
    if kind(&file.path) != "rs" || is_test_file(&file.path) || is_generated {
        return Vec::new();
    }
    let first = file
        .text
        .lines()
        .find(|line| !line.is_empty() && !line.starts_with("#!["));
    if first.is_some_and(|line| line.starts_with("//!")) {
        return Vec::new();
    }
    vec![finding(
        file,
        1,
        "the module does not open with `//!`: what it owns, what it keeps",
    )]
}

fn not_too_long(file: &File) -> Vec<Finding> {
    if GENERATED.contains(&file.path.rsplit('/').next().unwrap_or_default()) {
        return Vec::new();
    }
    match file.text.lines().count() {
        lines if lines > MAX_LINES => {
            vec![finding(
                file,
                lines,
                format!("{lines} lines, the limit is {MAX_LINES}: split it"),
            )]
        }
        _ => Vec::new(),
    }
}

/// A path of somebody's machine. `x/root/y` and `{dir}/root` are parts of another path: no match.
fn no_machine_paths(file: &File) -> Vec<Finding> {
    let roots = [
        concat!("/wo", "rk/"),
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
    ];
    let absolute = |line: &str, root: &str| {
        line.match_indices(root).any(|(at, _)| {
            let before = at
                .checked_sub(1)
                .and_then(|i| line.as_bytes().get(i))
                .copied();
            !before.is_some_and(|b| is_word_byte(b) || b"./-})$~".contains(&b))
        })
    };
    let mut found = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for root in roots.iter().filter(|root| absolute(line, root)) {
            found.push(finding(
                file,
                index + 1,
                format!("a path of one machine: `{root}`"),
            ));
        }
    }
    found
}

fn nothing_left_open(file: &File) -> Vec<Finding> {
    let calls = [
        concat!("to", "do!("),
        concat!("unimpl", "emented!("),
        concat!("#[ig", "nore"),
    ];
    let words = [concat!("FIX", "ME"), concat!("XX", "X")];
    let mut found = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        let call = calls.iter().filter(|call| line.contains(**call));
        let word = words.iter().filter(|word| has_word(line, word));
        found.extend(call.chain(word).map(|open| {
            finding(
                file,
                index + 1,
                format!("`{open}`: finish it, or say it in the README"),
            )
        }));
    }
    found
}

fn no_hopeful_sleep(file: &File) -> Vec<Finding> {
    if kind(&file.path) != "rs" {
        return Vec::new();
    }
    let lines = test_lines(file);
    let mut found = Vec::new();
    let mut previous = "";
    for (number, line) in lines {
        let sleeps = SLEEPS.iter().any(|sleep| code_of(line).contains(sleep));
        let is_import = line.trim_start().starts_with("use ");
        let has_reason = SLEEP_REASONS
            .iter()
            .any(|r| line.contains(r) || previous.contains(r));
        if sleeps && !is_import && !has_reason {
            let reasons = SLEEP_REASONS.join("` or `");
            found.push(finding(
                file,
                number,
                format!("a sleep in a test without `{reasons}`"),
            ));
        }
        previous = line;
    }
    found
}

fn may_be_unsafe(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let lane = path.starts_with("filter-core/src/lane") || path.starts_with("filter-core/tests/");
    let mapping = name.starts_with("map") || name.starts_with("mapping");
    let shim = path.starts_with("vaio-shim/") || path == "include/bindings.rs";
    lane || shim || mapping
}

fn unsafe_in_its_place(file: &File, allowed: &[(&str, &str)]) -> Vec<Finding> {
    if kind(&file.path) != "rs" || may_be_unsafe(&file.path) {
        return Vec::new();
    }
    let uses = |line: &str| has_word(&code_of(line), UNSAFE);
    let listed = allowed.iter().find(|(path, _)| *path == file.path);
    let mut at = file
        .text
        .lines()
        .enumerate()
        .filter(|(_, line)| uses(line))
        .map(|(i, _)| i + 1);
    match listed {
        Some((_, "")) => {
            vec![finding(file, 1, "allowed to be unsafe without a reason")]
        }
        Some(_) if at.next().is_none() => {
            vec![finding(
                file,
                1,
                "allowed to be unsafe, and is not any more: take it off the list",
            )]
        }
        Some(_) => Vec::new(),
        None => at
            .map(|line| {
                finding(
                    file,
                    line,
                    "outside the lane, the shim and the mappings: no unsafe",
                )
            })
            .collect(),
    }
}

// ---- rules over manifests -----------------------------------------------------------------------

/// One dependency line of a manifest.
struct Dependency<'a> {
    line: usize,
    name: &'a str,
    /// All after the name: `.workspace = true`, ` = "1.2"`, ` = { ... }`.
    rest: &'a str,
    in_workspace_table: bool,
}

fn dependencies(manifest: &File) -> Vec<Dependency<'_>> {
    let mut section = "";
    let mut found = Vec::new();
    for (index, line) in manifest.text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') && line.ends_with(']') {
            section = line.trim_matches(['[', ']']);
            let table = section.rsplit_once("dependencies.").map(|(_, name)| name);
            if let Some(name) = table {
                let in_workspace_table = section.starts_with("workspace.");
                found.push(Dependency {
                    line: index + 1,
                    name,
                    rest: "",
                    in_workspace_table,
                });
            }
            continue;
        }
        if !section.ends_with("dependencies") || line.is_empty() || line.starts_with('#') {
            continue;
        }
        let end = line.find(['.', ' ', '=']).unwrap_or(line.len());
        let (name, rest) = line.split_at(end);
        let in_workspace_table = section.starts_with("workspace.");
        found.push(Dependency {
            line: index + 1,
            name,
            rest,
            in_workspace_table,
        });
    }
    found
}

fn is_manifest(file: &File) -> bool {
    file.path == "Cargo.toml" || file.path.ends_with("/Cargo.toml")
}

fn dependencies_are_inherited(file: &File, excepted: &[(&str, &str, &str)]) -> Vec<Finding> {
    if !is_manifest(file) {
        return Vec::new();
    }
    let inherited = |dep: &Dependency<'_>| {
        dep.rest.replace(' ', "").starts_with(".workspace=true")
            || dep.rest.replace(' ', "").contains("workspace=true")
    };
    let is_excepted = |name: &str| {
        excepted
            .iter()
            .any(|(path, dep, _)| *path == file.path && *dep == name)
    };
    dependencies(file)
        .iter()
        .filter(|dep| !dep.in_workspace_table && !inherited(dep) && !is_excepted(dep.name))
        .map(|dep| {
            finding(
                file,
                dep.line,
                format!("`{}` must be `workspace = true`", dep.name),
            )
        })
        .collect()
}

fn no_wildcard_version(file: &File) -> Vec<Finding> {
    if !is_manifest(file) {
        return Vec::new();
    }
    dependencies(file)
        .iter()
        .filter(|dep| dep.rest.contains("\"*\"") || dep.rest.contains(".*\""))
        .map(|dep| {
            finding(
                file,
                dep.line,
                format!("`{}` has a wildcard version", dep.name),
            )
        })
        .collect()
}

/// Names in the first column of the table of `docs/dependencies.md` that have a reason beside them.
fn explained(doc: &str) -> Vec<&str> {
    doc.lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| line.split_once("` | "))
        .filter(|(_, reason)| !reason.trim_end_matches('|').trim().is_empty())
        .map(|(name, _)| name)
        .collect()
}

fn dependencies_have_reasons(workspace: &File, doc: &File) -> Vec<Finding> {
    let ours = |dep: &Dependency<'_>| dep.rest.contains("path =");
    let all = dependencies(workspace);
    let used: Vec<_> = all
        .iter()
        .filter(|d| d.in_workspace_table && !ours(d))
        .collect();
    let reasons = explained(&doc.text);
    let missing = used
        .iter()
        .filter(|dep| !reasons.contains(&dep.name))
        .map(|dep| {
            finding(
                workspace,
                dep.line,
                format!("`{}` has no reason in {}", dep.name, doc.path),
            )
        });
    let stale = reasons
        .iter()
        .filter(|name| !used.iter().any(|dep| dep.name == **name));
    missing
        .chain(stale.map(|name| finding(doc, 1, format!("`{name}` is not a dependency any more"))))
        .collect()
}

// ---- rules over documents -----------------------------------------------------------------------

fn docs_are_linked(docs: &[&str], readme: &str, architecture: &str) -> Vec<Finding> {
    let linked = |path: &str| {
        let name = path.trim_start_matches("docs/");
        path == "docs/architecture.md" && readme.contains(path)
            || readme.contains(&format!("({path}"))
            || architecture.contains(&format!("({name}"))
    };
    let lost = docs.iter().filter(|path| !linked(path));
    lost.map(|path| Finding {
        path: (*path).to_owned(),
        line: 1,
        what: "linked neither from README.md nor from docs/architecture.md".to_owned(),
    })
    .collect()
}

/// Links of a document to files of the repository lead to files that are there.
fn links_lead_somewhere(file: &File, exists: impl Fn(&str) -> bool) -> Vec<Finding> {
    if kind(&file.path) != "md" {
        return Vec::new();
    }
    let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut found = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        let targets = line
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        for target in targets.map(|target| target.split('#').next().unwrap_or_default()) {
            let is_outside = target.contains("://") || target.starts_with("mailto:");
            let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
            for part in target.split('/') {
                match part {
                    ".." => drop(parts.pop()),
                    "." | "" => {}
                    part => parts.push(part),
                }
            }
            if !target.is_empty() && !is_outside && !exists(&parts.join("/")) {
                found.push(finding(
                    file,
                    index + 1,
                    format!("`{target}` does not exist"),
                ));
            }
        }
    }
    found
}

/// Nothing that a tool builds or downloads is committed: paths as git lists them.
fn nothing_built_is_tracked(tracked: &str) -> Vec<Finding> {
    let built = |path: &&str| path.split('/').any(|part| BUILT_FOLDERS.contains(&part));
    let mut folders: Vec<&str> = tracked.lines().filter(built).collect();
    folders.dedup_by_key(|path| {
        let end = BUILT_FOLDERS
            .iter()
            .find_map(|f| path.find(f))
            .unwrap_or(path.len());
        path[..end].to_owned()
    });
    let tracked = |path: &&str| Finding {
        path: (*path).to_owned(),
        line: 1,
        what: "built or downloaded, and tracked by git: `git rm --cached`, and .gitignore"
            .to_owned(),
    };
    folders.iter().map(tracked).collect()
}

// ---- the repository -----------------------------------------------------------------------------

fn walk(root: &Path, folder: &Path, files: &mut Vec<File>) {
    let entries = fs::read_dir(folder).expect("the repository can be listed");
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a folder entry can be read").path())
        .collect();
    paths.sort();
    for path in paths {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if path.is_dir() {
            if !SKIPPED_FOLDERS.contains(&name) {
                walk(root, &path, files);
            }
        } else if TEXT.contains(&kind(name)) || GENERATED.contains(&name) {
            let text = fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{} cannot be read: {error}", path.display()));
            let relative = path.strip_prefix(root).expect("below the root");
            files.push(File {
                path: relative.to_string_lossy().into_owned(),
                text,
            });
        }
    }
}

fn repository(root: &Path) -> Vec<File> {
    let mut files = Vec::new();
    walk(root, root, &mut files);
    files
}

/// What git tracks; nothing, where this is no checkout (an unpacked archive).
fn tracked_files() -> String {
    let listed = std::process::Command::new("git")
        .args(["-c", "safe.directory=*", "ls-files"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    listed
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}

#[test]
fn the_repository_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = repository(root);
    let find = |path: &str| files.iter().find(|file| file.path == path);
    let empty = |path: &str| File {
        path: path.to_owned(),
        text: String::new(),
    };
    let mut found = Vec::new();
    for file in &files {
        found.extend(module_opens_with_doc(file));
        found.extend(not_too_long(file));
        found.extend(no_machine_paths(file));
        found.extend(nothing_left_open(file));
        found.extend(no_hopeful_sleep(file));
        found.extend(unsafe_in_its_place(file, UNSAFE_ALLOWED));
        found.extend(dependencies_are_inherited(file, NOT_INHERITED));
        found.extend(no_wildcard_version(file));
        found.extend(links_lead_somewhere(file, |path| root.join(path).exists()));
    }
    let doc = empty("docs/dependencies.md");
    let doc = find("docs/dependencies.md").unwrap_or(&doc);
    let manifest = find("Cargo.toml").expect("the workspace's manifest");
    found.extend(dependencies_have_reasons(manifest, doc));
    let is_doc = |path: &str| {
        path.strip_prefix("docs/")
            .is_some_and(|n| n.ends_with(".md") && !n.contains('/'))
    };
    let docs: Vec<&str> = files
        .iter()
        .map(|file| file.path.as_str())
        .filter(|path| is_doc(path))
        .collect();
    let text = |path: &str| {
        find(path)
            .map(|file| file.text.as_str())
            .unwrap_or_default()
    };
    found.extend(docs_are_linked(
        &docs,
        text("README.md"),
        text("docs/architecture.md"),
    ));
    for (path, _) in UNSAFE_ALLOWED {
        assert!(
            find(path).is_some(),
            "{path} is on the list of unsafe files and does not exist"
        );
    }
    found.extend(nothing_built_is_tracked(&tracked_files()));
    let report: Vec<String> = found.iter().map(Finding::to_string).collect();
    assert!(
        report.is_empty(),
        "{} findings:\n{}",
        report.len(),
        report.join("\n")
    );
}
