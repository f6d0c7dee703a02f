//! What the descriptor says.

use crate::container::parts;
use crate::support::*;
use crate::{Case, case};
use vib_packaging::{Report, Rule};

fn edited(from: &str, to: &str) -> Report {
    let (document, payload) = parts();
    assert_eq!(
        document.matches(from).count(),
        1,
        "`{from}` is not there once:\n{document}"
    );
    let document = document.replace(from, to);
    examine(ar(&[
        ("descriptor.xml", document.as_bytes()),
        ("sig.pkcs7", b""),
        ("note", &payload),
    ]))
}

pub fn cases() -> Vec<Case> {
    let d = "x.vib: descriptor.xml";
    let e = |rule, element, from: &str, to: &str| case(rule, d, element, edited(from, to));
    let sum = |text: &str| {
        text.find("<checksum checksum-type=\"sha-256\">")
            .map(|at| text[at..at + 109].to_owned())
    };
    let (document, _) = parts();
    let stored = sum(&document).expect("a checksum");
    let long = "9".repeat(80);
    vec![
        e(Rule::XmlSyntax, "line 2", "</type>", "</typo>"),
        e(
            Rule::XmlSyntax,
            "line 1",
            "<vib ",
            "<!DOCTYPE vib [<!ENTITY a \"b\">]><vib ",
        ),
        e(Rule::XmlSyntax, "line 3", ">note</name>", ">&a;</name>"),
        e(
            Rule::XmlSyntax,
            "line 3",
            ">note</name>",
            ">no\u{1}te</name>",
        ),
        e(Rule::VibVersion, "", "version=\"5.0\"", "version=\"6.0\""),
        e(Rule::ElementMissing, "type", "<type>bootbank</type>", ""),
        e(
            Rule::ElementTwice,
            "name",
            "<name>note</name>",
            "<name>note</name><name>note</name>",
        ),
        e(
            Rule::ElementUnknown,
            "colour",
            "<name>note</name>",
            "<name>note</name><colour/>",
        ),
        e(
            Rule::ElementUsual,
            "cimom-restart",
            "<cimom-restart>false</cimom-restart>",
            "",
        ),
        e(
            Rule::ElementUsual,
            "compatibleWith",
            "<compatibleWith/>",
            "",
        ),
        e(
            Rule::ElementOrder,
            "type",
            "<type>bootbank</type>\n  <name>note</name>",
            "<name>note</name><type>bootbank</type>",
        ),
        e(Rule::Type, "type", "bootbank", "locker"),
        e(
            Rule::Name,
            "name",
            "<name>note</name>",
            "<name>no te</name>",
        ),
        e(
            Rule::Name,
            "name",
            "<name>note</name>",
            &format!("<name>{long}</name>"),
        ),
        e(Rule::Name, "vendor", "<vendor>ACME</vendor>", "<vendor/>"),
        e(Rule::Version, "version", "<version>1.0-1<", "<version>1.0<"),
        e(
            Rule::Version,
            "version",
            "<version>1.0-1<",
            "<version>1.0-r1<",
        ),
        e(
            Rule::Summary,
            "summary",
            "<summary>A note</summary>",
            &format!("<summary>{long}9</summary>"),
        ),
        e(
            Rule::Summary,
            "summary",
            "<summary>A note</summary>",
            "<summary>A\nnote</summary>",
        ),
        e(Rule::ReleaseDate, "release-date", DATE, "2026-01-31"),
        e(
            Rule::UrlKey,
            "urls/url[1]@key",
            "key=\"home\"",
            "key=\"a key of over 20 chars\"",
        ),
        e(
            Rule::Relation,
            "relationships/depends/constraint[1]",
            "relation=\"&gt;=\"",
            "relation=\"=>\"",
        ),
        e(
            Rule::Relation,
            "relationships/depends/constraint[1]",
            " relation=\"&gt;=\"",
            "",
        ),
        e(
            Rule::Relation,
            "relationships/provides/provide[1]",
            "<provide name=\"note\"",
            "<provide name=\"\"",
        ),
        e(
            Rule::SystemRequires,
            "system-requires/maintenance-mode@on-install",
            "on-install=\"true\"",
            "on-install=\"yes\"",
        ),
        e(
            Rule::SystemRequires,
            "system-requires/softwarePlatform[1]@productLineID",
            "<system-requires>",
            "<system-requires><softwarePlatform version=\"7.*\" locale=\"\" productLineID=\"esx\"/>",
        ),
        e(
            Rule::SystemRequires,
            "system-requires/hwplatform[1]",
            "<system-requires>",
            "<system-requires><hwplatform/>",
        ),
        e(
            Rule::Boolean,
            "live-install-allowed",
            "<live-install-allowed>true",
            "<live-install-allowed>1",
        ),
        e(Rule::Overlay, "overlay", "<overlay>false", "<overlay>true"),
        e(
            Rule::AcceptanceLevel,
            "acceptance-level",
            ">community<",
            ">friend<",
        ),
        e(
            Rule::FileName,
            "file-list/file[1]",
            "<file>etc/config/note.conf",
            "<file>/etc/config/note.conf",
        ),
        e(
            Rule::FileName,
            "file-list/file[1]",
            "<file>etc/config/note.conf",
            &format!("<file>opt/{long}{long}"),
        ),
        e(
            Rule::FileName,
            "file-list/file[2]",
            "<file>etc/config/note.conf<",
            "<file>etc/config/note.conf</file><file>etc/config/note.conf<",
        ),
        e(
            Rule::PayloadName,
            "payloads/payload[1]@name",
            "<payload name=\"note\"",
            "<payload name=\"no/te\"",
        ),
        e(
            Rule::PayloadName,
            "payloads/payload[1]@name",
            "<payload name=\"note\"",
            "<payload name=\"sig.pkcs7\"",
        ),
        e(
            Rule::PayloadType,
            "payloads/payload[1]@type",
            "type=\"tgz\"",
            "type=\"boot\"",
        ),
        e(
            Rule::PayloadSize,
            "payloads/payload[1]@size",
            " size=\"",
            " size=\"1",
        ),
        e(
            Rule::PayloadSize,
            "payloads/payload[1]@size",
            " size=\"",
            " size=\"-",
        ),
        e(Rule::ChecksumMissing, "payloads/payload[1]", &stored, ""),
        e(
            Rule::ChecksumAge,
            "payloads/payload[1]",
            "<checksum checksum-type=\"sha-1\" verify-process=\"gunzip\">",
            "<checksum checksum-type=\"sha-1\">",
        ),
        e(
            Rule::ChecksumFormat,
            "payloads/payload[1]/checksum[3]@checksum-type",
            "\"sha-1\"",
            "\"md5\"",
        ),
        e(
            Rule::ChecksumFormat,
            "payloads/payload[1]/checksum[1]",
            &stored,
            "<checksum checksum-type=\"sha-256\">12</checksum>",
        ),
        e(
            Rule::ChecksumWrong,
            "payloads/payload[1]/checksum",
            &stored,
            &format!(
                "<checksum checksum-type=\"sha-256\">{}</checksum>",
                "0".repeat(64)
            ),
        ),
        e(
            Rule::FileUnlisted,
            "file-list",
            "<file>opt/note/empty</file>",
            "",
        ),
        e(
            Rule::FileAbsent,
            "file-list",
            "<file>opt/note/empty<",
            "<file>opt/note/empty</file><file>opt/note/gone<",
        ),
    ]
}
