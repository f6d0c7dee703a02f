//! The same inputs give the same bytes, on every machine and in every release. A change of these
//! numbers is a change of every package that anybody builds again: say why in the commit.

mod support;

use support::*;
use vib_packaging::{AcceptanceLevel, BundleBuilder, Format};

const TGZ: &str = "d8f262529695b408efdbbe307777d919eec386db4879a1a71351904ecf83b900";
const VGZ: &str = "59a996eb6ad9963a8eda4002dabc814c398ddcecd4a5cd15206f42e77400a33c";
const BUNDLE: &str = "678a9fadcb7053548dcd55334ce1b5b8feaccfa6a7fb537f696e75dba319fc3d";

#[test]
fn fixed_inputs_give_fixed_bytes() {
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
        vibs: vec![good(Format::Tgz)],
    };
    let bundle = bundle.build().expect("a bundle");
    let is = [
        sha256(good(Format::Tgz).bytes()),
        sha256(good(Format::Vgz).bytes()),
        sha256(bundle.bytes()),
    ];
    assert_eq!(
        is,
        [TGZ, VGZ, BUNDLE],
        "a built package differs from those of before"
    );
}

#[test]
fn the_order_of_the_files_does_not_matter() {
    for format in [Format::Tgz, Format::Vgz] {
        let mut other = builder(format, AcceptanceLevel::Community);
        other.files.reverse();
        other.files.swap(0, 1);
        let other = other.build(None).expect("a package");
        assert_eq!(other.bytes(), good(format).bytes());
    }
}
