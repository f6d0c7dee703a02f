//! The container of a VIB: a Unix `ar` whose members have short names and no owner, time or mode.
//!
//! Invariant: a member that is handed out lies wholly inside the file, and every byte of the file is
//! accounted for: magic, header, member, or the newline that pads it.

use crate::finding::{Finding, Report, Rule};
use std::ops::Range;

const MAGIC: &[u8] = b"!<arch>\n";
const HEADER_BYTES: usize = 60;
const END: &[u8] = b"`\n";
/// A longer one would need a table of names as the first member.
pub(crate) const MAX_NAME: usize = 15;

/// A member: where it lies in the file.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) bytes: Range<usize>,
}

/// True for what a member and a payload may be called.
pub(crate) fn name_is_good(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && name != "."
        && name != ".."
}

/// Puts members into a container. The names must be good.
pub(crate) fn write(members: &[(&str, &[u8])]) -> Vec<u8> {
    let total: usize = members
        .iter()
        .map(|(_, bytes)| HEADER_BYTES + bytes.len() + 1)
        .sum();
    let mut out = Vec::with_capacity(MAGIC.len() + total);
    out.extend_from_slice(MAGIC);
    for (name, bytes) in members {
        debug_assert!(name_is_good(name));
        let header = format!(
            "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
            0,
            0,
            0,
            0,
            bytes.len()
        );
        debug_assert_eq!(header.len(), HEADER_BYTES);
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(bytes);
        if bytes.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    out
}

/// A field of a header as text, without the spaces that pad it.
fn field(header: &[u8], range: Range<usize>) -> Option<&str> {
    let text = std::str::from_utf8(header.get(range)?).ok()?;
    text.is_ascii().then(|| text.trim_end_matches(' '))
}

/// What a header says: the name, whether all else is as usual, the member's length.
fn parse_header(header: &[u8]) -> Result<(String, bool, usize), String> {
    if header.get(58..60) != Some(END) {
        return Err("the header does not end with `` `\\n ``".into());
    }
    let name = field(header, 0..16).ok_or("the name is no ASCII text")?;
    let length = field(header, 48..58).ok_or("the length is no ASCII text")?;
    if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!(
            "the length `{}` is no decimal number",
            length.escape_default()
        ));
    }
    let length = length
        .parse()
        .map_err(|_| "the length is no number of this machine")?;
    let zero = [16..28, 28..34, 34..40, 40..48]
        .into_iter()
        .all(|range| field(header, range) == Some("0"));
    let plain = name
        .strip_suffix('/')
        .filter(|plain| !plain.is_empty() && *plain != "/");
    let usual = zero && plain.is_none();
    Ok((plain.unwrap_or(name).to_owned(), usual, length))
}

/// The members of a container, or as many as can be told; what is wrong goes into `report`. `None` if
/// the rest of the file cannot be told: nothing of it may be used then.
pub(crate) fn read(
    file: &str,
    bytes: &[u8],
    max_members: usize,
    report: &mut Report,
) -> Option<Vec<Member>> {
    if !bytes.starts_with(MAGIC) {
        report.add(Finding::new(
            Rule::ArMagic,
            file,
            "",
            "it does not begin with `!<arch>`",
        ));
        return None;
    }
    let mut members: Vec<Member> = Vec::new();
    let mut at = MAGIC.len();
    let mut whole = true;
    while at < bytes.len() {
        let place = format!("member {} at byte {at}", members.len() + 1);
        let rest = bytes.get(at..).unwrap_or_default();
        let Some(header) = rest.get(..HEADER_BYTES) else {
            let rule = if members.is_empty() {
                Rule::ArHeader
            } else {
                Rule::ArTrailing
            };
            let problem = format!("{} bytes are left, a header has {HEADER_BYTES}", rest.len());
            report.add(Finding::new(rule, file, place, problem));
            return None;
        };
        let (name, usual, length) = match parse_header(header) {
            Ok(parsed) => parsed,
            Err(problem) => {
                report.add(Finding::new(Rule::ArHeader, file, place, problem));
                return None;
            }
        };
        if members.len() == max_members {
            let problem = format!("it has more than {max_members} members");
            report.add(Finding::new(Rule::TooLarge, file, place, problem));
            return None;
        }
        let body = at + HEADER_BYTES;
        let left = bytes.len() - body;
        if length > left {
            let problem = format!("it says {length} bytes, and {left} are left in the file");
            report.add(Finding::new(Rule::ArLength, file, place, problem));
            return None;
        }
        if !name_is_good(&name) {
            let problem = format!("`{}` is no name for a member", name.escape_default());
            report.add(Finding::new(Rule::ArName, file, place.as_str(), problem));
            whole = false;
        } else if members.iter().any(|member| member.name == name) {
            let problem = format!("`{name}` is there twice");
            report.add(Finding::new(Rule::ArName, file, place.as_str(), problem));
            whole = false;
        }
        if !usual {
            let problem = "name, time, owner, group or mode of the header are not the usual ones";
            report.add(Finding::new(Rule::ArFields, file, name.as_str(), problem));
        }
        let end = body + length;
        members.push(Member {
            name,
            bytes: body..end,
        });
        at = end;
        if length % 2 == 1 {
            // The last member may end the file, or be padded too.
            match bytes.get(end) {
                None => {}
                Some(b'\n') => at += 1,
                Some(_) => {
                    let problem = "no newline pads a member of odd length";
                    report.add(Finding::new(Rule::ArHeader, file, place, problem));
                    return None;
                }
            }
        }
    }
    whole.then_some(members)
}
