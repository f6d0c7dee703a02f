//! What is inside a payload.

use crate::support::*;
use crate::{Case, case};
use vib_packaging::{Limits, Policy, Report, Rule, Vib};

fn one(header: TarHeader<'_>, data: &[u8]) -> Report {
    let name = header.name.to_owned();
    examine(package_of("tgz", &tar(&[(header, data)]), &[&name]))
}

fn named(name: &str) -> TarHeader<'_> {
    TarHeader {
        name,
        ..TarHeader::default()
    }
}

fn kind(kind: u8) -> TarHeader<'static> {
    TarHeader {
        kind,
        link: "/etc/passwd",
        ..TarHeader::default()
    }
}

fn visor(data_at: u32, len_bytes: u64, extra: u32) -> TarHeader<'static> {
    TarHeader {
        magic: VISOR,
        visor: [data_at, extra, 0, 0],
        len_bytes,
        ..TarHeader::default()
    }
}

/// Headers, a block of zeros, data.
fn vgz(headers: &[TarHeader<'_>], data: &[u8]) -> Report {
    let mut bytes: Vec<u8> = headers.iter().flat_map(|header| header.block()).collect();
    bytes.resize(bytes.len() + 512, 0);
    bytes.extend_from_slice(data);
    let names: Vec<&str> = headers.iter().map(|header| header.name).collect();
    examine(package_of("vgz", &bytes, &names))
}

pub fn cases() -> Vec<Case> {
    let p = "x.vib: note";
    let entry = "entry `opt/note/note`";
    let sized = |len_bytes| TarHeader {
        len_bytes,
        ..TarHeader::default()
    };
    let mode = |mode| TarHeader {
        mode,
        ..TarHeader::default()
    };
    let empty = tar(&[(TarHeader::default(), b"")]);
    let stored = gzip(&empty);
    let with_payload = |stored: &[u8]| {
        let document = document_for("tgz", stored, &empty, &["opt/note/note"]);
        examine(ar(&[
            ("descriptor.xml", document.as_bytes()),
            ("sig.pkcs7", b""),
            ("note", stored),
        ]))
    };
    let limited = |limits: Limits, bytes: Vec<u8>| {
        Vib::examine("x.vib", bytes, &Policy { limits, ..policy() }).1
    };
    let zeros = vec![0u8; 4 << 20];
    let bomb = package_of(
        "tgz",
        &tar(&[(sized(zeros.len() as u64), &zeros)]),
        &["opt/note/note"],
    );
    let small = Limits {
        unpacked_bytes: 1024,
        ..Limits::default()
    };
    let few = Limits {
        entries: 1,
        ..Limits::default()
    };
    let two = tar(&[(named("opt/a"), b""), (named("opt/b"), b"")]);
    let mut damaged = empty.clone();
    damaged[0] ^= 1;
    let mut garbage = empty.clone();
    garbage.extend_from_slice(&[7; 512]);
    let mut pad = tar(&[(sized(3), b"abc")]);
    pad[512 + 3] = 1;
    let pax = |record: &[u8]| {
        one(
            TarHeader {
                kind: b'x',
                len_bytes: record.len() as u64,
                ..TarHeader::default()
            },
            record,
        )
    };
    vec![
        case(Rule::Gzip, p, "", with_payload(&stored[..stored.len() - 9])),
        case(
            Rule::Gzip,
            p,
            "",
            with_payload(&[stored.as_slice(), &stored].concat()),
        ),
        case(Rule::Gzip, p, "", with_payload(b"no gzip")),
        case(Rule::Bomb, p, "", examine(bomb)),
        case(
            Rule::UnpackedTooLarge,
            p,
            "",
            limited(small, package_of("tgz", &empty, &["opt/note/note"])),
        ),
        case(
            Rule::TooManyEntries,
            p,
            "",
            limited(few, package_of("tgz", &two, &["opt/a", "opt/b"])),
        ),
        case(
            Rule::TarHeader,
            p,
            "header at byte 0",
            examine(package_of("tgz", &damaged, &[])),
        ),
        case(
            Rule::TarHeader,
            p,
            "header at byte 0",
            examine(package_of("vgz", &empty, &[])),
        ),
        case(
            Rule::TarHeader,
            p,
            "pax header at byte 0",
            pax(b"19 path=etc/shadow\n"),
        ),
        case(
            Rule::TarHeader,
            p,
            "pax header at byte 0",
            pax(b"99 mtime=1\n"),
        ),
        case(Rule::TarHeader, p, entry, vgz(&[visor(1024, 3, 1)], b"abc")),
        case(
            Rule::TarLength,
            p,
            entry,
            examine(package_of("tgz", &sized(3).block(), &[])),
        ),
        case(
            Rule::TarLength,
            p,
            "byte 512",
            examine(package_of(
                "tgz",
                &TarHeader::default().block(),
                &["opt/note/note"],
            )),
        ),
        case(
            Rule::TarLength,
            p,
            "block at byte 512",
            examine(package_of("tgz", &empty[..600], &["opt/note/note"])),
        ),
        case(
            Rule::TarLength,
            p,
            entry,
            one(
                TarHeader {
                    kind: b'5',
                    len_bytes: 512,
                    ..TarHeader::default()
                },
                &[0; 512],
            ),
        ),
        case(Rule::TarLength, p, entry, vgz(&[visor(1024, 4, 0)], b"abc")),
        case(Rule::TarLength, p, entry, vgz(&[visor(512, 3, 0)], b"abc")),
        case(
            Rule::TarLength,
            p,
            "entry `opt/other`",
            vgz(
                &[
                    visor(1536, 3, 0),
                    TarHeader {
                        name: "opt/other",
                        ..visor(1536, 3, 0)
                    },
                ],
                b"abc",
            ),
        ),
        case(
            Rule::TarTrailing,
            p,
            "byte 512",
            examine(package_of("tgz", &garbage, &["opt/note/note"])),
        ),
        case(
            Rule::TarTrailing,
            p,
            "byte 515",
            examine(package_of("tgz", &pad, &["opt/note/note"])),
        ),
        case(
            Rule::TarTrailing,
            p,
            "byte 1024",
            vgz(&[visor(1027, 3, 0)], b"xyzabc"),
        ),
        case(Rule::EntryKind, p, entry, one(kind(b'2'), b"")),
        case(Rule::EntryKind, p, entry, one(kind(b'1'), b"")),
        case(Rule::EntryKind, p, entry, one(kind(b'3'), b"")),
        case(Rule::EntryKind, p, entry, one(kind(b'4'), b"")),
        case(Rule::EntryKind, p, entry, one(kind(b'6'), b"")),
        case(Rule::EntryKind, p, entry, one(kind(b'L'), b"")),
        case(
            Rule::EntryPath,
            p,
            "entry `../up`",
            one(named("../up"), b""),
        ),
        case(
            Rule::EntryPath,
            p,
            "entry `opt/../../up`",
            one(named("opt/../../up"), b""),
        ),
        case(
            Rule::EntryPath,
            p,
            "entry `/etc/passwd`",
            one(named("/etc/passwd"), b""),
        ),
        case(
            Rule::EntryPath,
            p,
            "entry `.//etc/passwd`",
            one(named(".//etc/passwd"), b""),
        ),
        case(
            Rule::EntryPath,
            p,
            "entry `opt//x`",
            one(named("opt//x"), b""),
        ),
        case(
            Rule::EntryPath,
            p,
            "entry `opt/x\\n`",
            one(named("opt/x\n"), b""),
        ),
        case(Rule::EntryPath, p, "entry ``", one(named(""), b"")),
        case(
            Rule::EntryPath,
            p,
            "entry `opt/",
            one(named(&format!("opt/{}", "x".repeat(96))), b""),
        ),
        case(
            Rule::EntryTwice,
            p,
            "entry `opt/a`",
            examine(package_of(
                "tgz",
                &tar(&[(named("opt/a"), b""), (named("opt/a"), b"")]),
                &["opt/a"],
            )),
        ),
        case(
            Rule::EntryTwice,
            p,
            "entry `opt/a`",
            examine(package_of(
                "tgz",
                &tar(&[(named("opt/a"), b""), (named("./opt/a"), b"")]),
                &["opt/a"],
            )),
        ),
        case(
            Rule::EntryTwice,
            p,
            "entry `opt/a/b`",
            examine(package_of(
                "tgz",
                &tar(&[(named("opt/a"), b""), (named("opt/a/b"), b"")]),
                &["opt/a", "opt/a/b"],
            )),
        ),
        case(
            Rule::EntryTwice,
            p,
            "entry `opt/a`",
            examine(package_of(
                "tgz",
                &tar(&[(named("opt/a/b"), b""), (named("opt/a"), b"")]),
                &["opt/a", "opt/a/b"],
            )),
        ),
        case(Rule::EntryMode, p, entry, one(mode(0o4555), b"")),
        case(Rule::EntryMode, p, entry, one(mode(0o2555), b"")),
        case(Rule::EntryMode, p, entry, one(mode(0o666), b"")),
        case(Rule::EntryModeUsual, p, entry, one(mode(0o640), b"")),
        case(
            Rule::Place,
            "x.vib",
            "entry `etc/init.d/note`",
            one(named("etc/init.d/note"), b""),
        ),
        case(
            Rule::Firewall,
            "x.vib: note: etc/vmware/firewall/x.xml",
            "service[1]/rule[1]",
            host_file(
                "etc/vmware/firewall/x.xml",
                0o444,
                RULESET.replace("<begin>1", "<begin>7").as_bytes(),
            ),
        ),
        case(
            Rule::Firewall,
            "x.vib: note: etc/vmware/firewall/x.xml",
            "service[1]/rule[1]",
            host_file(
                "etc/vmware/firewall/x.xml",
                0o444,
                RULESET.replace("outbound", "sideways").as_bytes(),
            ),
        ),
        case(
            Rule::Firewall,
            "x.vib: note: etc/vmware/firewall/x.xml",
            "line 1",
            host_file("etc/vmware/firewall/x.xml", 0o444, b"<ConfigRoot>"),
        ),
        case(
            Rule::InitScript,
            "x.vib: note: etc/init.d/x",
            "",
            host_file("etc/init.d/x", 0o444, INIT),
        ),
        case(
            Rule::InitScript,
            "x.vib: note: etc/init.d/x",
            "",
            host_file("etc/init.d/x", 0o555, b"#!/bin/sh\n"),
        ),
        case(
            Rule::InitScript,
            "x.vib: note: etc/init.d/x",
            "line 1",
            host_file("etc/init.d/x", 0o555, b"# chkconfig: on 90 90\n"),
        ),
    ]
}

fn host_file(path: &str, mode: u32, bytes: &[u8]) -> Report {
    let header = TarHeader {
        mode,
        len_bytes: bytes.len() as u64,
        ..named(path)
    };
    one(header, bytes)
}
