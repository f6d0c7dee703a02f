//! What comes out of a package, and that nothing comes out of a bad one; random and damaged bytes.

mod support;

use bolero::TypeGenerator;
use std::collections::BTreeMap;
use std::io::{self, Read};
use support::*;
use vib_packaging::{EntryKind, File, Format, Limits, Policy, Rule, UnpackError, Vib};

fn unpacked(vib: &Vib) -> (Vec<String>, BTreeMap<String, File>) {
    let (mut folders, mut files) = (Vec::new(), BTreeMap::new());
    vib.unpack(false, |entry, body| {
        let mut bytes = Vec::new();
        body.read_to_end(&mut bytes)?;
        assert_eq!(bytes.len() as u64, entry.len_bytes);
        match entry.kind {
            EntryKind::Folder => folders.push(entry.path.clone()),
            EntryKind::File => {
                drop(files.insert(entry.path.clone(), file(&entry.path, entry.mode, &bytes)))
            }
        }
        Ok(())
    })
    .expect("a good package");
    (folders, files)
}

#[test]
fn what_went_in_comes_out() {
    for format in [Format::Tgz, Format::Vgz] {
        let (folders, files) = unpacked(&good(format));
        let wanted: BTreeMap<_, _> = support::files()
            .into_iter()
            .map(|file| (file.path.clone(), file))
            .collect();
        assert_eq!(files, wanted);
        assert_eq!(
            folders,
            [
                "etc",
                "etc/config",
                "etc/vmware",
                "etc/vmware/firewall",
                "opt",
                "opt/note",
                "opt/note/bin"
            ]
        );
    }
}

#[test]
fn bytes_that_are_not_read_are_skipped() {
    for format in [Format::Tgz, Format::Vgz] {
        let mut paths = Vec::new();
        let vib = good(format);
        vib.unpack(false, |entry, _| {
            paths.push(entry.path.clone());
            Ok(())
        })
        .expect("a good package");
        let wanted: Vec<_> = vib
            .entries()
            .iter()
            .map(|entry| entry.path.clone())
            .collect();
        assert_eq!(paths, wanted);
    }
}

/// Some foreign tools write each path behind `./`, headers with times, a folder for the root.
#[test]
fn a_tar_of_other_tools_is_taken() {
    let record = b"20 mtime=1700000000\n";
    let header = |name, kind, len_bytes| TarHeader {
        name,
        kind,
        len_bytes,
        ..TarHeader::default()
    };
    let bytes = tar(&[
        (header("./", b'5', 0), b""),
        (header("./opt/", b'5', 0), b""),
        (header("x", b'x', record.len() as u64), record),
        (header("./opt/a", b'0', 3), b"abc"),
        (
            TarHeader {
                magic: b"ustar  \0",
                ..header("opt/b", b'0', 0)
            },
            b"",
        ),
    ]);
    let vib = Vib::open(
        "x.vib",
        package_of("tgz", &bytes, &["opt/a", "opt/b"]),
        &policy(),
        false,
    )
    .expect("a good package");
    let (folders, files) = unpacked(&vib);
    assert_eq!(folders, ["opt"]);
    assert_eq!(files.keys().collect::<Vec<_>>(), ["opt/a", "opt/b"]);
    assert_eq!(files["opt/a"].bytes, b"abc");
}

#[test]
fn nothing_comes_out_of_a_bad_package() {
    let link = TarHeader {
        name: "opt/link",
        kind: b'2',
        link: "/etc",
        ..TarHeader::default()
    };
    let bytes = tar(&[(TarHeader::default(), b""), (link, b"")]);
    let (vib, report) = Vib::examine(
        "x.vib",
        package_of("tgz", &bytes, &["opt/note/note"]),
        &policy(),
    );
    assert!(
        report
            .findings
            .iter()
            .any(|found| found.rule == Rule::EntryKind),
        "{report:?}"
    );
    let vib = vib.expect("its descriptor can be read");
    for force in [false, true] {
        let outcome = vib.unpack(force, |entry, _| panic!("{} came out", entry.path));
        let Err(UnpackError::Rejected(rejected)) = outcome else {
            panic!("it was not rejected");
        };
        assert!(
            rejected.to_string().contains("a symbolic link to `/etc`"),
            "{rejected}"
        );
    }
}

#[test]
fn a_sink_that_fails_ends_it_and_is_told() {
    for format in [Format::Tgz, Format::Vgz] {
        let mut calls = 0;
        let outcome = good(format).unpack(false, |entry, _| {
            calls += 1;
            if entry.path == "opt/note" {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            Ok(())
        });
        let Err(UnpackError::Sink { path, source }) = outcome else {
            panic!("it was not told");
        };
        assert_eq!(
            (path.as_str(), source.kind(), calls),
            ("opt/note", io::ErrorKind::StorageFull, 6)
        );
    }
}

/// The limit is on all payloads together, and counts what comes out, not what a header says.
#[test]
fn the_limit_of_unpacked_bytes_is_exact() {
    let bytes = good(Format::Tgz).bytes().to_vec();
    let tar_bytes = {
        let vib = good(Format::Tgz);
        let mut tar = Vec::new();
        let stored = vib.content("note").expect("the payload").to_vec();
        flate2::read::GzDecoder::new(stored.as_slice())
            .read_to_end(&mut tar)
            .expect("gzip");
        tar.len() as u64
    };
    for (unpacked_bytes, accepted) in [(tar_bytes, true), (tar_bytes - 1, false)] {
        let policy = Policy {
            limits: Limits {
                unpacked_bytes,
                ..Limits::default()
            },
            ..policy()
        };
        assert_eq!(
            Vib::examine("x.vib", bytes.clone(), &policy)
                .1
                .accepted(false),
            accepted
        );
    }
}

/// Whatever the bytes: no panic, and what is accepted is harmless.
fn harmless(bytes: Vec<u8>) -> bool {
    let (vib, report) = Vib::examine("x.vib", bytes, &policy());
    let Some(vib) = vib.filter(|_| report.accepted(true)) else {
        return false;
    };
    let mut count = 0;
    vib.unpack(true, |entry, body| {
        count += 1;
        let parts: Vec<&str> = entry.path.split('/').collect();
        assert!(
            !parts.iter().any(|part| matches!(*part, "" | "." | "..")),
            "{}",
            entry.path
        );
        assert_eq!(entry.mode & 0o6000, 0);
        let read = io::copy(body, &mut io::sink())?;
        assert_eq!(read, entry.len_bytes);
        Ok(())
    })
    .expect("what was accepted can be unpacked");
    assert_eq!(count, vib.entries().len());
    true
}

#[test]
fn every_cut_and_every_flipped_byte_is_noticed() {
    for format in [Format::Tgz, Format::Vgz] {
        let whole = good(format).bytes().to_vec();
        let (vib, _) = Vib::examine("x.vib", whole.clone(), &policy());
        let vib = vib.expect("a good package");
        for length in 0..whole.len() {
            // Without the newline that pads the last member it is whole.
            let padded = length + 1 == whole.len()
                && vib
                    .content("note")
                    .is_some_and(|stored| stored.len() % 2 == 1);
            assert_eq!(
                harmless(whole[..length].to_vec()),
                padded,
                "cut to {length}"
            );
        }
        let payload_at = whole.len() - vib.content("note").expect("the payload").len() - 1;
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            let taken = harmless(flipped);
            assert!(
                !taken || at < payload_at,
                "byte {at} of the payload was flipped, and it was accepted"
            );
        }
    }
}

#[test]
fn random_packages_do_no_harm() {
    bolero::check!().for_each(|bytes: &[u8]| {
        harmless(bytes.to_vec());
        harmless([b"!<arch>\n", bytes].concat());
    });
}

/// An entry of a tar out of random numbers: mostly plausible.
#[derive(Debug, TypeGenerator)]
struct RandomEntry {
    name: u8,
    kind: u8,
    len_bytes: u16,
    data_bytes: u16,
    mode: u16,
    data_at: u16,
}

fn header_of(entry: &RandomEntry, visor: bool) -> TarHeader<'static> {
    const NAMES: [&str; 8] = [
        "opt/a",
        "opt/a/b",
        "opt/",
        "./opt/c",
        "../d",
        "/e",
        "opt/a",
        "usr/lib/vmware/x",
    ];
    const KINDS: [u8; 8] = [b'0', b'0', b'5', 0, b'x', b'2', b'L', b'7'];
    TarHeader {
        name: NAMES[usize::from(entry.name) % NAMES.len()],
        kind: KINDS[usize::from(entry.kind) % KINDS.len()],
        len_bytes: u64::from(entry.len_bytes % 2048),
        mode: u32::from(entry.mode),
        magic: if visor { VISOR } else { USTAR },
        visor: [u32::from(entry.data_at), 0, 0, 0],
        link: "",
    }
}

#[test]
fn random_payloads_do_no_harm() {
    bolero::check!()
        .with_type::<(bool, Vec<RandomEntry>, Vec<u8>)>()
        .for_each(|(visor, entries, rest)| {
            let mut bytes = Vec::new();
            for entry in entries {
                bytes.extend_from_slice(&header_of(entry, *visor).block());
                if !visor {
                    bytes.resize(bytes.len() + usize::from(entry.data_bytes % 2048), 1);
                    bytes.resize(bytes.len().next_multiple_of(512), 0);
                }
            }
            bytes.resize(bytes.len() + 1024, 0);
            bytes.extend_from_slice(rest);
            let kind = if *visor { "vgz" } else { "tgz" };
            harmless(package_of(
                kind,
                &bytes,
                &["opt/a", "opt/c", "usr/lib/vmware/x"],
            ));
            let stored = gzip(rest);
            let document = document_for(kind, &stored, rest, &[]);
            harmless(ar(&[
                ("descriptor.xml", document.as_bytes()),
                ("sig.pkcs7", b""),
                ("note", &stored),
            ]));
        });
}

#[test]
fn random_descriptors_do_no_harm() {
    let stored = gzip(&tar(&[]));
    let document = document_for("tgz", &stored, &tar(&[]), &[]);
    bolero::check!()
        .with_type::<(u16, u8, Vec<u8>)>()
        .for_each(|(at, cut, bytes)| {
            let mut edited = document.clone().into_bytes();
            let at = usize::from(*at) % edited.len();
            let end = (at + usize::from(*cut)).min(edited.len());
            edited.splice(at..end, bytes.iter().copied());
            harmless(ar(&[
                ("descriptor.xml", &edited),
                ("sig.pkcs7", bytes),
                ("note", &stored),
            ]));
        });
}

#[test]
fn random_signatures_and_bundles_do_no_harm() {
    let document = document_for("tgz", b"", b"", &[]);
    bolero::check!().for_each(|bytes: &[u8]| {
        let pem =
            x509_cert::der::pem::encode_string("PKCS7", x509_cert::der::pem::LineEnding::LF, bytes)
                .expect("a PEM block");
        harmless(ar(&[
            ("descriptor.xml", document.as_bytes()),
            ("sig.pkcs7", &gzip(pem.as_bytes())),
            ("note", b""),
        ]));
        let (_, report) = vib_packaging::Bundle::examine("b.zip", bytes.to_vec(), &policy());
        assert!(!report.accepted(true));
    });
}
