//! Who signed it, and whether.

use crate::support::*;
use crate::{Case, case};
use vib_packaging::{AcceptanceLevel, Anchors, Builder, Format, Policy, Rule, Signer, Trust, Vib};

/// A certificate that signs itself, for code, and its key.
fn self_signed(folder: &std::path::Path, name: &str) -> Option<(Vec<u8>, Vec<u8>)> {
    let (key, certificate) = (
        folder.join(format!("{name}.key")),
        folder.join(format!("{name}.pem")),
    );
    let mut openssl = tool("openssl")?;
    openssl.args([
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj",
    ]);
    openssl.arg(format!("/CN={name}")).args([
        "-addext",
        "keyUsage=critical,digitalSignature",
        "-addext",
        "extendedKeyUsage=codeSigning",
    ]);
    output(
        openssl
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate),
    );
    Some((
        std::fs::read(key).expect("the key"),
        std::fs::read(certificate).expect("the certificate"),
    ))
}

pub fn cases() -> Option<Vec<Case>> {
    let folder = tempfile::tempdir().expect("a folder");
    let (key, certificate) = self_signed(folder.path(), "one")?;
    let (_, other) = self_signed(folder.path(), "two")?;
    let signer = Signer::from_pem(("one.key", &key), ("one.pem", &certificate)).expect("a signer");
    let make =
        |builder: Builder, signer: Option<&Signer>| builder.build(signer).expect("a package");
    let partner = || builder(Format::Tgz, AcceptanceLevel::Partner);
    let signed = make(partner(), Some(&signer));
    let s = "x.vib: sig.pkcs7";
    let with = |document: &[u8], signature: &[u8]| {
        let payload = signed.content("note").expect("the payload");
        ar(&[
            ("descriptor.xml", document),
            ("sig.pkcs7", signature),
            ("note", payload),
        ])
    };
    let signature = signed.content("sig.pkcs7").expect("the signature");
    let changed = String::from_utf8(signed.document().to_vec())
        .expect("UTF-8")
        .replace("A note</summary>", "A nose</summary>");
    let look = |anchors: &[u8], at_s: Option<u64>| {
        let anchors = Anchors::from_pem("ca.pem", anchors).expect("certificates");
        let policy = Policy {
            trust: Trust::Anchors(&anchors, at_s),
            ..policy()
        };
        Vib::examine("x.vib", signed.bytes().to_vec(), &policy).1
    };
    assert!(
        look(&certificate, None).findings.is_empty(),
        "{:?}",
        look(&certificate, None)
    );
    Some(vec![
        case(
            Rule::SignatureMissing,
            s,
            "",
            examine(make(partner(), None).bytes().to_vec()),
        ),
        case(
            Rule::SignatureFormat,
            s,
            "",
            examine(with(signed.document(), b"no gzip")),
        ),
        case(
            Rule::SignatureFormat,
            s,
            "",
            examine(with(
                signed.document(),
                &gzip(b"-----BEGIN PKCS7-----\nAAAA\n-----END PKCS7-----\n"),
            )),
        ),
        case(
            Rule::SignatureFormat,
            s,
            "",
            examine(with(signed.document(), &gzip(&certificate))),
        ),
        case(
            Rule::SignatureWrong,
            s,
            "",
            examine(with(changed.as_bytes(), signature)),
        ),
        case(Rule::SignatureChain, s, "", look(&other, None)),
        case(
            Rule::SignatureTime,
            s,
            "",
            look(&certificate, Some(1_000_000_000)),
        ),
    ])
}
