//! The bundle around packages.

use crate::support::*;
use crate::{Case, case};
use std::io::Write;
use vib_packaging::{Bundle, BundleBuilder, Format, Report, Rule};

fn bundle_builder() -> BundleBuilder {
    BundleBuilder {
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
        platforms: vec!["7.*".into(), "8.*".into()],
        vibs: vec![good(Format::Tgz)],
    }
}

type Files = Vec<(String, Vec<u8>)>;

fn unzip(bytes: &[u8]) -> Files {
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes)).expect("a zip");
    let mut files = Vec::new();
    for index in 0..archive.len() {
        let mut file = archive.by_index(index).expect("a file");
        let mut bytes = Vec::new();
        std::io::copy(&mut file, &mut bytes).expect("its bytes");
        files.push((file.name().expect("a name").into_owned(), bytes));
    }
    files
}

fn zipped(files: &Files) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in files {
        zip.start_file(name.as_str(), zip::write::SimpleFileOptions::default())
            .expect("to memory");
        zip.write_all(bytes).expect("to memory");
    }
    zip.finish().expect("to memory").into_inner()
}

/// The good bundle after a change of its files, or of those in its metadata.
fn bundle_with(change: impl FnOnce(&mut Files), of_metadata: impl FnOnce(&mut Files)) -> Report {
    let bundle = bundle_builder().build().expect("a bundle");
    let mut files = unzip(bundle.bytes());
    let metadata = files
        .iter_mut()
        .find(|(name, _)| name == "metadata.zip")
        .expect("the metadata");
    let mut inside = unzip(&metadata.1);
    of_metadata(&mut inside);
    metadata.1 = zipped(&inside);
    change(&mut files);
    Bundle::examine("b.zip", zipped(&files), &policy()).1
}

fn replace(files: &mut Files, name: &str, from: &str, to: &str) {
    let (_, bytes) = files
        .iter_mut()
        .find(|(path, _)| path.contains(name))
        .expect("the file");
    let text = String::from_utf8(bytes.clone()).expect("UTF-8");
    assert!(text.contains(from), "`{from}` is not in {name}:\n{text}");
    *bytes = text.replace(from, to).into_bytes();
}

/// A zip in which two files have one path: writers refuse to make it, so the bytes are changed.
fn with_a_path_twice() -> Report {
    let bundle = bundle_builder().build().expect("a bundle");
    let mut files = unzip(bundle.bytes());
    files.push(("index.xm1".into(), b"<vendorList/>".to_vec()));
    let mut bytes = zipped(&files);
    let places = bytes
        .windows(9)
        .enumerate()
        .filter(|(_, part)| *part == b"index.xm1");
    let places: Vec<usize> = places.map(|(at, _)| at).collect();
    assert_eq!(places.len(), 2, "in its own header and in the directory");
    places.iter().for_each(|at| bytes[at + 8] = b'l');
    Bundle::examine("b.zip", bytes, &policy()).1
}

fn with_a_link() -> Report {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    zip.add_symlink("index.xml", "/etc/passwd", options)
        .expect("to memory");
    let bytes = zip.finish().expect("to memory").into_inner();
    Bundle::examine("b.zip", bytes, &policy()).1
}

pub fn cases() -> Vec<Case> {
    let same = |_: &mut Files| {};
    let index = |name: &'static str, from: &'static str, to: &'static str| {
        bundle_with(move |files| replace(files, name, from, to), same)
    };
    let metadata = |name: &'static str, from: &'static str, to: &'static str| {
        bundle_with(same, move |files| replace(files, name, from, to))
    };
    let without = |name: &'static str| {
        bundle_with(
            move |files| files.retain(|(path, _)| !path.contains(name)),
            same,
        )
    };
    let response = "b.zip: metadata.zip: vmware.xml";
    let clean = bundle_with(same, same);
    assert!(clean.findings.is_empty(), "{clean:?}");
    vec![
        case(
            Rule::BundleZip,
            "b.zip",
            "",
            Bundle::examine("b.zip", b"no zip".to_vec(), &policy()).1,
        ),
        case(
            Rule::BundlePath,
            "b.zip",
            "file `../x`",
            bundle_with(|files| files.push(("../x".into(), Vec::new())), same),
        ),
        case(Rule::BundlePath, "b.zip", "", with_a_path_twice()),
        case(Rule::BundlePath, "b.zip", "file `index.xml`", with_a_link()),
        case(
            Rule::BundleMissing,
            "b.zip",
            "index.xml",
            without("index.xml"),
        ),
        case(
            Rule::BundleMissing,
            "b.zip",
            "metadata.zip",
            without("metadata.zip"),
        ),
        case(
            Rule::BundleMissing,
            "b.zip",
            "vib20/note/ACME_bootbank_note_1.0-1.vib",
            without("vib20"),
        ),
        case(
            Rule::BundleIndex,
            "b.zip: index.xml",
            "vendor[1]/code",
            index("index.xml", "<code>not</code>", "<code>note</code>"),
        ),
        case(
            Rule::BundleIndex,
            "b.zip: vendor-index.xml",
            "metadata[1]/productId",
            bundle_with(
                |files| {
                    let (_, bytes) = files
                        .iter_mut()
                        .find(|(path, _)| path == "vendor-index.xml")
                        .expect("the file");
                    *bytes = String::from_utf8(bytes.clone())
                        .expect("UTF-8")
                        .replace("embeddedEsx", "esx")
                        .into_bytes();
                },
                same,
            ),
        ),
        case(
            Rule::BundleMetadata,
            response,
            "version",
            metadata("vmware.xml", "<version>3.0<", "<version>2.0<"),
        ),
        case(
            Rule::BundleMetadata,
            response,
            "bulletin `xnote_1.0-1`/id",
            metadata("vmware.xml", "<id>note_", "<id>xnote_"),
        ),
        case(
            Rule::BundleMetadata,
            response,
            "bulletins/note_1.0-1.xml",
            metadata("bulletins/", "general", "critical"),
        ),
        case(
            Rule::BundleMetadata,
            response,
            "vib `ACME_bootbank_note_1.0-1`",
            metadata(
                "vibs/",
                "<checksum checksum-type=\"sha-256\">",
                "<checksum checksum-type=\"sha-256\">0",
            ),
        ),
        case(
            Rule::BundleVib,
            response,
            "vib `ACME_bootbank_note_1.0-1`",
            metadata("vmware.xml", "<packedSize>", "<packedSize>1"),
        ),
        case(
            Rule::BundleVib,
            response,
            "vib `ACME_bootbank_nose_1.0-1`",
            metadata(
                "vmware.xml",
                "<vibID>ACME_bootbank_note",
                "<vibID>ACME_bootbank_nose",
            ),
        ),
        case(
            Rule::BundleComponent,
            response,
            "componentNameSpec",
            metadata(
                "vmware.xml",
                "<componentNameSpec name=\"note\" uiString=\"Note\"/>",
                "",
            ),
        ),
        case(
            Rule::BundleExtra,
            "b.zip",
            "readme.txt",
            bundle_with(|files| files.push(("readme.txt".into(), Vec::new())), same),
        ),
    ]
}
