//! Packages for tests: a small good one, and the means to make bad ones byte by byte, written apart
//! from the library so that a mistake of its own cannot hide.
#![allow(dead_code, reason = "each test program uses a part of it")]

use flate2::{Compression, GzBuilder};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use std::io::Write;
use std::process::Command;
use vib_packaging::{
    AcceptanceLevel, Builder, Constraint, Descriptor, File, Format, KEPT, Limits, Policy,
    Relationships, Report, SystemRequires, Trust, Vib,
};

pub const DATE: &str = "2026-01-31T12:00:00+00:00";

pub fn policy() -> Policy<'static> {
    Policy {
        trust: Trust::Unchecked,
        limits: Limits::default(),
    }
}

pub fn file(path: &str, mode: u32, bytes: &[u8]) -> File {
    File {
        path: path.into(),
        mode,
        bytes: bytes.to_vec(),
    }
}

pub const INIT: &[u8] = b"#!/bin/sh\n# chkconfig: on 90 90\nexit 0\n";
pub const RULESET: &str = "<ConfigRoot><service id=\"0000\"><id>note</id><rule id=\"0000\"><direction>outbound</direction><protocol>tcp</protocol><porttype>dst</porttype><port><begin>1</begin><end>2</end></port></rule><enabled>true</enabled><required>false</required></service></ConfigRoot>";

pub fn descriptor(level: AcceptanceLevel) -> Descriptor {
    Descriptor {
        name: "note".into(),
        version: "1.0-1".into(),
        vendor: "ACME".into(),
        summary: "A note".into(),
        description: "A note <for> tests & \"more\"".into(),
        release_date: DATE.into(),
        urls: vec![("home".into(), "https://example.org/?a=1&b=2".into())],
        relationships: Relationships {
            depends: vec![Constraint {
                name: "esx-version".into(),
                version: Some((">=".into(), "7.0.0".into())),
            }],
            provides: vec![("note".into(), Some("1.0".into()))],
            ..Relationships::default()
        },
        tags: vec!["driver".into()],
        system_requires: SystemRequires {
            maintenance_mode: (true, false),
            ..SystemRequires::default()
        },
        files: Vec::new(),
        acceptance_level: level,
        live_install_allowed: true,
        live_remove_allowed: true,
        cimom_restart: false,
        stateless_ready: true,
        payloads: Vec::new(),
    }
}

pub fn files() -> Vec<File> {
    vec![
        file("opt/note/bin/note", 0o555, b"#!/bin/sh\necho note\n"),
        file("etc/vmware/firewall/note.xml", 0o444, RULESET.as_bytes()),
        file("etc/config/note.conf", KEPT | 0o644, b"colour=green\n"),
        file("opt/note/empty", 0o444, b""),
    ]
}

pub fn builder(format: Format, level: AcceptanceLevel) -> Builder {
    Builder {
        descriptor: descriptor(level),
        files: files(),
        payload: "note".into(),
        format,
        limits: Limits::default(),
    }
}

pub fn good(format: Format) -> Vib {
    builder(format, AcceptanceLevel::Community)
        .build(None)
        .expect("the small package is good")
}

pub fn examine(bytes: Vec<u8>) -> Report {
    Vib::examine("x.vib", bytes, &policy()).1
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn sha1(bytes: &[u8]) -> String {
    hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, bytes).as_ref())
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzBuilder::new().write(Vec::new(), Compression::best());
    encoder.write_all(bytes).expect("to memory");
    encoder.finish().expect("to memory")
}

/// An `ar` of these members.
pub fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = b"!<arch>\n".to_vec();
    for (name, bytes) in members {
        writeln!(
            out,
            "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`",
            0,
            0,
            0,
            0,
            bytes.len()
        )
        .expect("to memory");
        out.extend_from_slice(bytes);
        if bytes.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    out
}

/// A header of a tar, with what a test wants to be wrong.
pub struct TarHeader<'a> {
    pub name: &'a str,
    pub mode: u32,
    pub kind: u8,
    pub len_bytes: u64,
    pub link: &'a str,
    pub magic: &'a [u8; 8],
    /// Data offset, text offset, text size, fix-ups.
    pub visor: [u32; 4],
}

pub const USTAR: &[u8; 8] = b"ustar\x0000";
pub const VISOR: &[u8; 8] = b"visor  \0";

impl Default for TarHeader<'_> {
    fn default() -> Self {
        TarHeader {
            name: "opt/note/note",
            mode: 0o444,
            kind: b'0',
            len_bytes: 0,
            link: "",
            magic: USTAR,
            visor: [0; 4],
        }
    }
}

impl TarHeader<'_> {
    pub fn block(&self) -> [u8; 512] {
        let mut block = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, self.name.as_bytes());
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(124, format!("{:011o}", self.len_bytes).as_bytes());
        put(136, b"00000000000");
        put(148, b"        ");
        put(156, &[self.kind]);
        put(157, self.link.as_bytes());
        put(257, self.magic);
        if self.magic == VISOR {
            for (at, value) in self.visor.iter().enumerate() {
                put(0x1f0 + 4 * at, &value.to_le_bytes());
            }
        }
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// An ordinary tar of headers with their data.
pub fn tar(entries: &[(TarHeader<'_>, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (header, data) in entries {
        out.extend_from_slice(&header.block());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// The descriptor of a package with one payload, told truly.
pub fn document_for(kind: &str, stored: &[u8], unpacked: &[u8], files: &[&str]) -> String {
    let list: String = files
        .iter()
        .map(|path| format!("<file>{path}</file>"))
        .collect();
    format!(
        "<vib version=\"5.0\"><type>bootbank</type><name>note</name><version>1.0-1</version>\
         <vendor>ACME</vendor><summary>A note</summary><description/><release-date>{DATE}</release-date>\
         <urls/><relationships><depends/><conflicts/><replaces/><provides/><compatibleWith/></relationships>\
         <software-tags/><system-requires><maintenance-mode>false</maintenance-mode></system-requires>\
         <file-list>{list}</file-list><acceptance-level>community</acceptance-level>\
         <live-install-allowed>true</live-install-allowed><live-remove-allowed>true</live-remove-allowed>\
         <cimom-restart>false</cimom-restart><stateless-ready>true</stateless-ready><overlay>false</overlay>\
         <payloads><payload name=\"note\" type=\"{kind}\" size=\"{}\">\
         <checksum checksum-type=\"sha-256\">{}</checksum>\
         <checksum checksum-type=\"sha-256\" verify-process=\"gunzip\">{}</checksum>\
         <checksum checksum-type=\"sha-1\" verify-process=\"gunzip\">{}</checksum></payload></payloads></vib>",
        stored.len(),
        sha256(stored),
        sha256(unpacked),
        sha1(unpacked),
    )
}

/// A package whose only payload is that tar; all else is right.
pub fn package_of(kind: &str, tar: &[u8], files: &[&str]) -> Vec<u8> {
    let stored = gzip(tar);
    let document = document_for(kind, &stored, tar, files);
    ar(&[
        ("descriptor.xml", document.as_bytes()),
        ("sig.pkcs7", b""),
        ("note", &stored),
    ])
}

/// A command of the operating system that checks our bytes; in CI it must be there.
pub fn tool(name: &str) -> Option<Command> {
    let local = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target/tools/bin")
        .join(name);
    let program = if local.exists() {
        local.into_os_string()
    } else {
        name.into()
    };
    let found = Command::new(&program).arg("--help").output().is_ok();
    assert!(
        found || std::env::var_os("CI").is_none(),
        "{name} is missing: scripts/bootstrap.sh test"
    );
    if !found {
        eprintln!("SKIPPED, {name} is missing: scripts/bootstrap.sh test");
    }
    found.then(|| Command::new(program))
}

/// Runs a tool; its output. A failure ends the test.
pub fn output(command: &mut Command) -> Vec<u8> {
    let done = command.output().expect("the tool starts");
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success(),
        "{command:?}: {}\n{error}",
        done.status
    );
    done.stdout
}
