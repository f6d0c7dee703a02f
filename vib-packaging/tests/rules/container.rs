//! The `ar` around it all.

use crate::support::*;
use crate::{Case, case};
use vib_packaging::{Format, Limits, Policy, Rule, Vib};

/// Descriptor and payload of the small package.
pub fn parts() -> (String, Vec<u8>) {
    let vib = good(Format::Tgz);
    let document = String::from_utf8(vib.document().to_vec()).expect("UTF-8");
    (document, vib.content("note").expect("the payload").to_vec())
}

/// A member of odd length that is padded with something else than a newline.
fn badly_padded() -> Vec<u8> {
    let (mut document, payload) = parts();
    if document.len() % 2 == 0 {
        document.push('\n');
    }
    let members = [
        ("descriptor.xml", document.as_bytes()),
        ("sig.pkcs7", b""),
        ("note", &payload),
    ];
    let mut bytes = ar(&members);
    bytes[8 + 60 + document.len()] = b'x';
    bytes
}

pub fn cases() -> Vec<Case> {
    let whole = good(Format::Tgz).bytes().to_vec();
    let (document, payload) = parts();
    let document = document.as_bytes();
    let patched = |at: usize, bytes: &[u8]| {
        let mut patched = whole.clone();
        patched[at..at + bytes.len()].copy_from_slice(bytes);
        examine(patched)
    };
    let tight = Policy {
        limits: Limits {
            vib_bytes: 1000,
            ..Limits::default()
        },
        ..policy()
    };
    vec![
        case(Rule::ArMagic, "x.vib", "", patched(0, b"?")),
        case(
            Rule::ArHeader,
            "x.vib",
            "member 1 at byte 8",
            patched(8 + 58, b"x"),
        ),
        case(
            Rule::ArHeader,
            "x.vib",
            "member 1 at byte 8",
            patched(8 + 48, b"-1        "),
        ),
        case(
            Rule::ArHeader,
            "x.vib",
            "member 1 at byte 8",
            examine(badly_padded()),
        ),
        case(
            Rule::ArLength,
            "x.vib",
            "member 1",
            patched(8 + 48, b"9999999999"),
        ),
        case(
            Rule::ArTrailing,
            "x.vib",
            "member 4",
            examine([whole.as_slice(), b"garbage"].concat()),
        ),
        case(
            Rule::ArName,
            "x.vib",
            "member 1",
            patched(8, b"../../etc/passw "),
        ),
        case(
            Rule::ArName,
            "x.vib",
            "member 4",
            examine(ar(&[
                ("descriptor.xml", document),
                ("sig.pkcs7", b""),
                ("note", &payload),
                ("note", &payload),
            ])),
        ),
        case(
            Rule::ArOrder,
            "x.vib",
            "sig.pkcs7",
            examine(ar(&[
                ("descriptor.xml", document),
                ("note", &payload),
                ("sig.pkcs7", b""),
            ])),
        ),
        case(
            Rule::ArOrder,
            "x.vib",
            "descriptor.xml",
            examine(ar(&[("sig.pkcs7", b"")])),
        ),
        case(
            Rule::ArFields,
            "x.vib",
            "descriptor.xml",
            patched(8 + 16, b"1700000000"),
        ),
        case(
            Rule::ArFields,
            "x.vib",
            "descriptor.xml",
            patched(8 + 14, b"/"),
        ),
        case(
            Rule::TooLarge,
            "x.vib",
            "",
            Vib::examine("x.vib", whole.clone(), &tight).1,
        ),
        case(
            Rule::PayloadMissing,
            "descriptor.xml",
            "payloads/payload[1]",
            examine(ar(&[("descriptor.xml", document), ("sig.pkcs7", b"")])),
        ),
        case(
            Rule::PayloadExtra,
            "x.vib",
            "more",
            examine(ar(&[
                ("descriptor.xml", document),
                ("sig.pkcs7", b""),
                ("note", &payload),
                ("more", b"x"),
            ])),
        ),
    ]
}
