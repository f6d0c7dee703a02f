//! Small XML documents as trees: read with limits, written the same way each time.
//!
//! Invariant: a tree that was read holds no more than the limits allow, and nothing that the document
//! did not say itself: no document types, no entities but XML's own five.

use crate::finding::{Finding, Report, Rule};
use quick_xml::XmlVersion;
use quick_xml::events::{BytesRef, BytesStart, Event};

const MAX_DEPTH: usize = 16;
const MAX_ELEMENTS: usize = 200_000;

/// An element. Of mixed content only the text is kept, in one piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) name: String,
    pub(crate) attributes: Vec<(String, String)>,
    pub(crate) text: String,
    pub(crate) children: Vec<Element>,
}

impl Element {
    pub(crate) fn new(name: &str) -> Element {
        Element {
            name: name.to_owned(),
            ..Element::default()
        }
    }

    pub(crate) fn text(name: &str, text: impl Into<String>) -> Element {
        Element {
            text: text.into(),
            ..Element::new(name)
        }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Element {
        self.attributes.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn holding(mut self, children: impl IntoIterator<Item = Element>) -> Element {
        self.children.extend(children);
        self
    }

    pub(crate) fn attribute(&self, name: &str) -> Option<&str> {
        let found = self.attributes.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    pub(crate) fn all<'e>(&'e self, name: &'e str) -> impl Iterator<Item = &'e Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// The text of a child, without the space around it.
    pub(crate) fn child_text(&self, name: &str) -> Option<&str> {
        self.child(name).map(|child| child.text.trim())
    }

    /// The document with this root: a line an element, two spaces a level.
    pub(crate) fn document(&self, declaration: bool) -> String {
        let mut out = String::new();
        if declaration {
            out.push_str("<?xml version=\"1.0\" encoding=\"utf-8\"?>\n");
        }
        self.write(&mut out, 0);
        out
    }

    fn write(&self, out: &mut String, depth: usize) {
        let indent = "  ".repeat(depth);
        out.push_str(&indent);
        out.push('<');
        out.push_str(&self.name);
        for (name, value) in &self.attributes {
            out.push(' ');
            out.push_str(name);
            out.push_str("=\"");
            escape(value, true, out);
            out.push('"');
        }
        if self.children.is_empty() && self.text.is_empty() {
            out.push_str("/>\n");
            return;
        }
        out.push('>');
        escape(&self.text, false, out);
        if !self.children.is_empty() {
            out.push('\n');
            for child in &self.children {
                child.write(out, depth + 1);
            }
            out.push_str(&indent);
        }
        out.push_str("</");
        out.push_str(&self.name);
        out.push_str(">\n");
    }
}

fn escape(text: &str, attribute: bool, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' if attribute => out.push_str("&quot;"),
            '\r' => out.push_str("&#13;"),
            '\n' | '\t' if attribute => out.push_str(&format!("&#{};", u32::from(c))),
            c => out.push(c),
        }
    }
}

/// True for what XML 1.0 can hold.
fn is_xml_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

fn element_of(start: &BytesStart<'_>) -> Result<Element, String> {
    let utf8 = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|error| error.to_string());
    let mut element = Element::new(&utf8(start.name().as_ref())?);
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| error.to_string())?;
        let value = attribute.normalized_value(XmlVersion::Implicit1_0);
        let value = value.map_err(|error| error.to_string())?.into_owned();
        if !value.chars().all(is_xml_char) {
            return Err("an attribute holds a character that XML cannot hold".into());
        }
        element
            .attributes
            .push((utf8(attribute.key.as_ref())?, value));
    }
    Ok(element)
}

fn resolve(reference: &BytesRef<'_>) -> Result<char, String> {
    if let Some(c) = reference
        .resolve_char_ref()
        .map_err(|error| error.to_string())?
    {
        return Some(c)
            .filter(|c| is_xml_char(*c))
            .ok_or_else(|| "a reference to a character that XML cannot hold".into());
    }
    match reference
        .decode()
        .map_err(|error| error.to_string())?
        .as_ref()
    {
        "amp" => Ok('&'),
        "lt" => Ok('<'),
        "gt" => Ok('>'),
        "quot" => Ok('"'),
        "apos" => Ok('\''),
        other => Err(format!(
            "the entity `{}` is not one of XML's own",
            other.escape_default()
        )),
    }
}

/// The elements that are open, and the root once it is closed.
#[derive(Default)]
struct Tree {
    open: Vec<Element>,
    root: Option<Element>,
    count: usize,
}

impl Tree {
    fn begin(&mut self, element: Element) -> Result<(), String> {
        self.count += 1;
        if self.root.is_some() {
            return Err(format!(
                "`{}` follows the end of the document",
                element.name.escape_default()
            ));
        }
        if self.open.len() >= MAX_DEPTH || self.count > MAX_ELEMENTS {
            return Err(format!(
                "more than {MAX_ELEMENTS} elements, or {MAX_DEPTH} inside one another"
            ));
        }
        self.open.push(element);
        Ok(())
    }

    fn end(&mut self) {
        if let Some(mut done) = self.open.pop() {
            // Between elements it is indentation, which differs from document to document.
            if !done.children.is_empty() && done.text.trim().is_empty() {
                done.text.clear();
            }
            match self.open.last_mut() {
                Some(parent) => parent.children.push(done),
                None => self.root = Some(done),
            }
        }
    }

    fn add(&mut self, text: &str) -> Result<(), String> {
        if !text.chars().all(is_xml_char) {
            return Err("a character that XML cannot hold".into());
        }
        match self.open.last_mut() {
            Some(element) => element.text.push_str(text),
            None if text.trim().is_empty() => {}
            None => return Err("text outside of the document's root".into()),
        }
        Ok(())
    }
}

fn tree_of(text: &str) -> Result<Element, (u64, String)> {
    let mut reader = quick_xml::Reader::from_str(text);
    let mut tree = Tree::default();
    loop {
        let event = reader.read_event();
        let at = reader.buffer_position();
        let event = event.map_err(|error| (reader.error_position(), error.to_string()))?;
        let step = match event {
            Event::Start(start) => element_of(&start).and_then(|element| tree.begin(element)),
            Event::Empty(start) => element_of(&start)
                .and_then(|element| tree.begin(element))
                .map(|()| tree.end()),
            Event::End(_) => {
                tree.end();
                Ok(())
            }
            Event::Text(text) => text
                .xml10_content()
                .map_err(|error| error.to_string())
                .and_then(|text| tree.add(&text)),
            Event::CData(text) => text
                .xml10_content()
                .map_err(|error| error.to_string())
                .and_then(|text| tree.add(&text)),
            Event::GeneralRef(reference) => {
                resolve(&reference).and_then(|c| tree.add(c.encode_utf8(&mut [0; 4])))
            }
            Event::DocType(_) => Err("a document type: a package needs none".into()),
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) => Ok(()),
            Event::Eof => break,
        };
        step.map_err(|problem| (at, problem))?;
    }
    let end = text.len() as u64;
    match (tree.open.last(), tree.root) {
        (Some(open), _) => Err((
            end,
            format!("`{}` is not closed", open.name.escape_default()),
        )),
        (None, Some(root)) => Ok(root),
        (None, None) => Err((end, "there is no element".into())),
    }
}

/// Reads a document; what is wrong with it goes into `report` under `rule`.
pub(crate) fn parse(
    file: &str,
    bytes: &[u8],
    max_bytes: u64,
    rule: Rule,
    report: &mut Report,
) -> Option<Element> {
    if bytes.len() as u64 > max_bytes {
        let problem = format!("it has {} bytes, over {max_bytes}", bytes.len());
        report.add(Finding::new(Rule::TooLarge, file, "", problem));
        return None;
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let place = format!("byte {}", error.valid_up_to());
            report.add(Finding::new(rule, file, place, "it is no UTF-8"));
            return None;
        }
    };
    match tree_of(text) {
        Ok(root) => Some(root),
        Err((at, problem)) => {
            let before = text
                .get(..usize::try_from(at).unwrap_or(usize::MAX))
                .unwrap_or(text);
            let place = format!("line {}", before.matches('\n').count() + 1);
            report.add(Finding::new(rule, file, place, problem));
            None
        }
    }
}
