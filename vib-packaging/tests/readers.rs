//! Readers that know nothing of this crate agree with it: GNU ar, tar and gzip, xmllint, openssl,
//! Python's zipfile, and vmtar for visor tars. And what openssl signs is taken here.

mod support;

use std::fs;
use std::path::Path;
use support::*;
use vib_packaging::{
    AcceptanceLevel, Anchors, BundleBuilder, Format, Policy, Rule, Signer, Trust, Vib,
};

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn ar_lists_and_prints_the_members() {
    let Some(mut ar) = tool("ar") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let vib = good(Format::Tgz);
    let path = folder.path().join("x.vib");
    fs::write(&path, vib.bytes()).expect("written");
    let listed = text(output(ar.arg("tv").arg(&path)));
    let names: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.rsplit(' ').next())
        .collect();
    assert_eq!(names, ["descriptor.xml", "sig.pkcs7", "note"], "{listed}");
    assert!(
        listed
            .lines()
            .all(|line| line.contains(" 0/0 ") && line.contains("1970")),
        "{listed}"
    );
    for (member, _) in vib.members() {
        let printed = output(
            tool("ar")
                .expect("it was there")
                .arg("p")
                .arg(&path)
                .arg(member),
        );
        assert_eq!(Some(printed.as_slice()), vib.content(member), "{member}");
    }
    // The other way round: GNU ar's own container is taken, with advice.
    for (member, _) in vib.members() {
        fs::write(
            folder.path().join(member),
            vib.content(member).expect("a member"),
        )
        .expect("written");
    }
    let mut ar = tool("ar").expect("it was there");
    output(ar.current_dir(folder.path()).args([
        "rc",
        "theirs.vib",
        "descriptor.xml",
        "sig.pkcs7",
        "note",
    ]));
    let theirs = fs::read(folder.path().join("theirs.vib")).expect("the file");
    let report = examine(theirs);
    assert!(
        report.accepted(false)
            && report
                .findings
                .iter()
                .all(|found| found.rule == Rule::ArFields),
        "{report:?}"
    );
}

#[test]
fn tar_and_gzip_unpack_a_tgz() {
    let (Some(mut gzip), Some(mut tar)) = (tool("gzip"), tool("tar")) else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let vib = good(Format::Tgz);
    let path = folder.path().join("note.tgz");
    fs::write(&path, vib.content("note").expect("the payload")).expect("written");
    output(gzip.arg("-t").arg(&path));
    let listed = text(output(
        tar.env("LC_ALL", "C")
            .env("TZ", "UTC")
            .arg("tvzf")
            .arg(&path),
    ));
    assert!(
        listed.contains("-r-xr-xr-x 0/0              20 2026-01-31 12:00 opt/note/bin/note"),
        "{listed}"
    );
    assert!(
        listed.contains("-rw-r--r-T 0/0              13 2026-01-31 12:00 etc/config/note.conf"),
        "{listed}"
    );
    output(
        tool("tar")
            .expect("it was there")
            .arg("xzf")
            .arg(&path)
            .arg("-C")
            .arg(folder.path()),
    );
    compare(folder.path());
}

fn compare(root: &Path) {
    for file in files() {
        let bytes = fs::read(root.join(&file.path))
            .unwrap_or_else(|error| panic!("{}: {error}", file.path));
        assert_eq!(bytes, file.bytes, "{}", file.path);
    }
}

#[test]
fn vmtar_unpacks_a_vgz() {
    let Some(mut vmtar) = tool("vmtar") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("note.vgz");
    fs::write(
        &path,
        good(Format::Vgz).content("note").expect("the payload"),
    )
    .expect("written");
    let listed = text(output(vmtar.arg("-l").arg(&path)));
    for file in files() {
        assert!(listed.contains(&file.path), "{}: {listed}", file.path);
    }
    output(
        tool("vmtar")
            .expect("it was there")
            .arg("-e")
            .arg(&path)
            .arg(folder.path()),
    );
    compare(folder.path());
}

#[test]
fn xmllint_reads_every_document() {
    let Some(_) = tool("xmllint") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let vib = good(Format::Tgz);
    let bundle = bundle(vec![vib.clone()]);
    let mut documents = vec![vib.document().to_vec()];
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bundle)).expect("a zip");
    for name in ["index.xml", "vendor-index.xml"] {
        let mut bytes = Vec::new();
        std::io::copy(&mut archive.by_name(name).expect("the file"), &mut bytes)
            .expect("its bytes");
        documents.push(bytes);
    }
    for document in documents {
        let path = folder.path().join("x.xml");
        fs::write(&path, document).expect("written");
        output(
            tool("xmllint")
                .expect("it was there")
                .arg("--noout")
                .arg("--nonet")
                .arg(&path),
        );
    }
}

fn bundle(vibs: Vec<Vib>) -> Vec<u8> {
    let bundle = BundleBuilder {
        name: "note".into(),
        title: "Note".into(),
        version: "1.0-1".into(),
        vendor: "ACME".into(),
        vendor_code: "not".into(),
        summary: "A note".into(),
        description: "A note".into(),
        kb_url: "https://example.org".into(),
        contact: "note@example.org".into(),
        release_date: DATE.into(),
        platforms: vec!["7.*".into()],
        vibs,
    };
    bundle.build().expect("a bundle").bytes().to_vec()
}

#[test]
fn zipfile_tests_a_bundle() {
    let Some(mut python) = tool("python3") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("b.zip");
    fs::write(&path, bundle(vec![good(Format::Tgz)])).expect("written");
    output(python.args(["-m", "zipfile", "-t"]).arg(&path));
    let listed = text(output(
        tool("python3")
            .expect("it was there")
            .args(["-m", "zipfile", "-l"])
            .arg(&path),
    ));
    assert!(
        listed.contains("vib20/note/ACME_bootbank_note_1.0-1.vib")
            && listed.contains("2026-01-31 12:00:00"),
        "{listed}"
    );
}

/// A CA, and a key with a certificate for code that it issued.
struct Issued {
    folder: tempfile::TempDir,
}

impl Issued {
    fn new(key: &[&str], usage: &str) -> Option<Issued> {
        let folder = tempfile::tempdir().expect("a folder");
        let run = |arguments: &[&str]| {
            let mut openssl = tool("openssl")?;
            output(openssl.current_dir(folder.path()).args(arguments));
            Some(())
        };
        run(&[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "30",
            "-subj",
            "/CN=test CA",
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
        ])?;
        let mut request = vec![
            "req",
            "-new",
            "-nodes",
            "-subj",
            "/O=ACME/CN=packager",
            "-keyout",
            "own.key",
            "-out",
            "own.csr",
        ];
        request.extend_from_slice(key);
        run(&request)?;
        fs::write(folder.path().join("ext"), format!("basicConstraints=CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage={usage}\n")).expect("written");
        run(&[
            "x509",
            "-req",
            "-in",
            "own.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "20",
            "-extfile",
            "ext",
            "-out",
            "own.pem",
        ])?;
        Some(Issued { folder })
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.folder.path().join(name)).expect("the file")
    }

    fn signer(&self) -> Signer {
        Signer::from_pem(
            ("own.key", &self.read("own.key")),
            ("own.pem", &self.read("own.pem")),
        )
        .expect("a signer")
    }

    fn report(&self, bytes: &[u8]) -> vib_packaging::Report {
        let anchors = Anchors::from_pem("ca.pem", &self.read("ca.pem")).expect("certificates");
        let policy = Policy {
            trust: Trust::Anchors(&anchors, None),
            ..policy()
        };
        Vib::examine("x.vib", bytes.to_vec(), &policy).1
    }

    /// openssl's own look at the signature of a package, after `gzip -d`.
    fn openssl_verifies(&self, vib: &Vib) {
        let folder = self.folder.path();
        fs::write(
            folder.join("sig.gz"),
            vib.content("sig.pkcs7").expect("the signature"),
        )
        .expect("written");
        fs::write(folder.join("descriptor.xml"), vib.document()).expect("written");
        let pem = output(
            tool("gzip")
                .expect("gzip")
                .args(["-dc", "sig.gz"])
                .current_dir(folder),
        );
        fs::write(folder.join("sig.pem"), pem).expect("written");
        let arguments = [
            "cms",
            "-verify",
            "-binary",
            "-inform",
            "PEM",
            "-in",
            "sig.pem",
            "-content",
            "descriptor.xml",
            "-CAfile",
            "ca.pem",
            "-purpose",
            "any",
            "-out",
            "signed",
        ];
        output(
            tool("openssl")
                .expect("openssl")
                .args(arguments)
                .current_dir(folder),
        );
        assert_eq!(self.read("signed"), vib.document());
    }
}

#[test]
fn openssl_verifies_what_is_signed_here() {
    for key in [
        &["-newkey", "rsa:2048"][..],
        &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
    ] {
        let Some(issued) = Issued::new(key, "codeSigning") else {
            return;
        };
        let make = || {
            builder(Format::Vgz, AcceptanceLevel::Partner)
                .build(Some(&issued.signer()))
                .expect("a package")
        };
        let vib = make();
        assert_eq!(vib.signer(), Some("CN=packager,O=ACME"));
        assert!(
            issued.report(vib.bytes()).findings.is_empty(),
            "{:?}",
            issued.report(vib.bytes())
        );
        issued.openssl_verifies(&vib);
        if key.len() == 2 {
            assert_eq!(
                make().bytes(),
                vib.bytes(),
                "an RSA signature is the same each time"
            );
        }
        // Signing again changes nothing but the signature.
        let plain = builder(Format::Vgz, AcceptanceLevel::Partner)
            .build(None)
            .expect("a package");
        let signed = vib_packaging::sign("x.vib", &plain, &issued.signer()).expect("signed");
        assert_eq!(
            (signed.document(), signed.content("note")),
            (vib.document(), vib.content("note"))
        );
    }
}

/// With signed attributes, as openssl makes them unless it is told otherwise, and without.
#[test]
fn what_openssl_signs_is_taken_here() {
    for attributes in [None, Some("-noattr")] {
        let Some(issued) = Issued::new(&["-newkey", "rsa:2048"], "codeSigning") else {
            return;
        };
        let plain = builder(Format::Tgz, AcceptanceLevel::Partner)
            .build(None)
            .expect("a package");
        fs::write(
            issued.folder.path().join("descriptor.xml"),
            plain.document(),
        )
        .expect("written");
        let mut openssl = tool("openssl").expect("openssl");
        openssl.current_dir(issued.folder.path()).args([
            "cms",
            "-sign",
            "-binary",
            "-md",
            "sha256",
            "-in",
            "descriptor.xml",
        ]);
        openssl.args([
            "-signer",
            "own.pem",
            "-inkey",
            "own.key",
            "-certfile",
            "ca.pem",
            "-outform",
            "PEM",
            "-out",
            "sig.pem",
        ]);
        output(openssl.args(attributes));
        let signature = gzip(&issued.read("sig.pem"));
        let payload = plain.content("note").expect("the payload");
        let package = |document: &[u8]| {
            ar(&[
                ("descriptor.xml", document),
                ("sig.pkcs7", &signature),
                ("note", payload),
            ])
        };
        let report = issued.report(&package(plain.document()));
        assert!(report.findings.is_empty(), "{report:?}");
        let changed = [plain.document(), b"\n"].concat();
        let report = issued.report(&package(&changed));
        assert!(
            report
                .findings
                .iter()
                .any(|found| found.rule == Rule::SignatureWrong),
            "{report:?}"
        );
    }
}

/// A host looks for SHA-256: a signature with another digest is told before it is looked at.
#[test]
fn another_digest_than_sha_256_is_not_taken() {
    let Some(issued) = Issued::new(&["-newkey", "rsa:2048"], "codeSigning") else {
        return;
    };
    let plain = builder(Format::Tgz, AcceptanceLevel::Partner).build(None);
    let plain = plain.expect("a package");
    fs::write(
        issued.folder.path().join("descriptor.xml"),
        plain.document(),
    )
    .expect("written");
    let arguments = "cms -sign -binary -md sha512 -in descriptor.xml -signer own.pem -inkey own.key -outform PEM -out sig.pem";
    let mut openssl = tool("openssl").expect("openssl");
    output(
        openssl
            .current_dir(issued.folder.path())
            .args(arguments.split(' ')),
    );
    let signature = gzip(&issued.read("sig.pem"));
    let payload = plain.content("note").expect("the payload");
    let members = [
        ("descriptor.xml", plain.document()),
        ("sig.pkcs7", signature.as_slice()),
        ("note", payload),
    ];
    let report = issued.report(&ar(&members));
    let found = report
        .findings
        .iter()
        .find(|found| found.rule == Rule::SignatureFormat);
    assert!(
        found.is_some_and(|found| found.problem.contains("not SHA-256")),
        "{report:?}"
    );
}

/// A certificate of the same CA that is for something else does not make a package trusted.
#[test]
fn a_certificate_for_another_purpose_is_not_trusted() {
    let Some(issued) = Issued::new(&["-newkey", "rsa:2048"], "serverAuth,clientAuth") else {
        return;
    };
    let vib = builder(Format::Tgz, AcceptanceLevel::Partner)
        .build(Some(&issued.signer()))
        .expect("a package");
    let report = issued.report(vib.bytes());
    let found = report
        .findings
        .iter()
        .find(|found| found.rule == Rule::SignatureChain);
    assert!(
        found.is_some_and(|found| found.problem.contains("not one for signing code")),
        "{report:?}"
    );
    assert!(!report.accepted(false) && report.accepted(true));
}

/// What a certificate says is critical must be understood, or it is not what it seems.
#[test]
fn a_certificate_with_something_unknown_is_not_trusted() {
    let usage = "codeSigning\n1.2.3.4=critical,ASN1:NULL";
    let Some(issued) = Issued::new(&["-newkey", "rsa:2048"], usage) else {
        return;
    };
    let vib = builder(Format::Tgz, AcceptanceLevel::Partner).build(Some(&issued.signer()));
    let report = issued.report(vib.expect("a package").bytes());
    let found = report
        .findings
        .iter()
        .find(|found| found.rule == Rule::SignatureChain);
    assert!(
        found.is_some_and(|found| found.problem.contains("1.2.3.4, which is not understood")),
        "{report:?}"
    );
}

/// A certificate that was issued by one that may not issue: whoever has a key for code could else
/// make more of them.
#[test]
fn a_certificate_from_one_that_may_not_issue_is_not_trusted() {
    let Some(issued) = Issued::new(&["-newkey", "rsa:2048"], "codeSigning") else {
        return;
    };
    let run = |arguments: &[&str]| {
        output(
            tool("openssl")
                .expect("openssl")
                .current_dir(issued.folder.path())
                .args(arguments),
        )
    };
    run(&[
        "req",
        "-new",
        "-nodes",
        "-newkey",
        "rsa:2048",
        "-subj",
        "/CN=second",
        "-keyout",
        "second.key",
        "-out",
        "second.csr",
    ]);
    run(&[
        "x509",
        "-req",
        "-in",
        "second.csr",
        "-CA",
        "own.pem",
        "-CAkey",
        "own.key",
        "-CAcreateserial",
        "-days",
        "10",
        "-extfile",
        "ext",
        "-out",
        "second.pem",
    ]);
    let chain = [issued.read("second.pem"), issued.read("own.pem")].concat();
    let signer = Signer::from_pem(
        ("second.key", &issued.read("second.key")),
        ("chain.pem", &chain),
    )
    .expect("a signer");
    let vib = builder(Format::Tgz, AcceptanceLevel::Partner)
        .build(Some(&signer))
        .expect("a package");
    let report = issued.report(vib.bytes());
    let found = report
        .findings
        .iter()
        .find(|found| found.rule == Rule::SignatureChain);
    assert!(
        found.is_some_and(|found| found.problem.contains("may not issue")),
        "{report:?}"
    );
}

#[test]
fn keys_that_do_not_fit_are_told() {
    let Some(issued) = Issued::new(&["-newkey", "rsa:2048"], "codeSigning") else {
        return;
    };
    let (key, certificate) = (issued.read("ca.key"), issued.read("own.pem"));
    let told = |key: &[u8], certificate: &[u8]| match Signer::from_pem(
        ("k.pem", key),
        ("c.pem", certificate),
    ) {
        Ok(_) => panic!("it was taken"),
        Err(error) => error.to_string(),
    };
    assert!(
        told(&key, &certificate)
            .contains("k.pem: it does not belong to the first certificate of c.pem")
    );
    assert!(
        told(&certificate, &certificate)
            .contains("k.pem: a PEM block `CERTIFICATE` is no private key")
    );
    assert!(told(b"nothing", &certificate).contains("k.pem: it is no PEM block"));
    assert!(told(&key, b"nothing").contains("c.pem: no certificates in PEM"));
}
