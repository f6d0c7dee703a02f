//! The rules of single values, shared by descriptors and by the metadata of bundles.

use super::{Constraint, Relationships, SystemRequires};
use crate::finding::{Finding, Report, Rule};
use crate::xml::Element;

const MAX_NAME: usize = 35;
const MAX_SUMMARY: usize = 80;
const MAX_URL_KEY: usize = 20;
const RELATIONS: [&str; 5] = ["<<", "<=", "=", ">=", ">>"];

/// Where findings of one element of a document go.
pub(crate) struct Scope<'r> {
    pub(crate) file: &'r str,
    pub(crate) report: &'r mut Report,
}

/// At most as much of a value as a message can bear.
pub(crate) fn shown(value: &str) -> String {
    let mut text: String = value.escape_default().take(80).collect();
    if text.len() < value.len() {
        text.push('…');
    }
    format!("`{text}`")
}

fn is_name(value: &str) -> bool {
    (1..=MAX_NAME).contains(&value.len())
        && value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn is_version(value: &str) -> bool {
    let digit_first = |part: &str| part.starts_with(|c: char| c.is_ascii_digit());
    is_name(value)
        && value
            .split_once('-')
            .is_some_and(|(version, release)| digit_first(version) && digit_first(release))
}

fn is_date(value: &str) -> bool {
    value.len() <= 40
        && value
            .bytes()
            .all(|b| b.is_ascii_digit() || b"TZ:.+-".contains(&b))
        && value.parse::<jiff::Timestamp>().is_ok()
}

/// Checks name, vendor, version, summary and date, wherever they stand.
pub(crate) fn check_named(scope: &mut Scope<'_>, rule: Rule, element: &str, value: &str) {
    let good = match rule {
        Rule::Name => is_name(value),
        Rule::Version => is_version(value),
        Rule::Summary => {
            (1..=MAX_SUMMARY).contains(&value.chars().count()) && !value.contains(['\n', '\r'])
        }
        Rule::ReleaseDate => is_date(value),
        _ => true,
    };
    if !good {
        scope.find(rule, element, format!("{} will not do", shown(value)));
    }
}

impl Scope<'_> {
    pub(crate) fn find(&mut self, rule: Rule, element: &str, problem: impl Into<String>) {
        self.report
            .add(Finding::new(rule, self.file, element, problem));
    }

    /// The one child of that name; more than one is a finding, none is one only if `missing` says so.
    pub(crate) fn one<'e>(
        &mut self,
        parent: &'e Element,
        name: &str,
        missing: Option<Rule>,
    ) -> Option<&'e Element> {
        if parent.all(name).nth(1).is_some() {
            self.find(Rule::ElementTwice, name, "it is there more than once");
        }
        let found = parent.child(name);
        if let (None, Some(rule)) = (found, missing) {
            self.find(rule, name, "it is missing");
        }
        found
    }

    pub(crate) fn boolean(
        &mut self,
        parent: &Element,
        name: &str,
        missing: Option<Rule>,
    ) -> Option<bool> {
        let text = self.one(parent, name, missing)?.text.trim();
        let value = text.parse().ok();
        if value.is_none() {
            self.find(
                Rule::Boolean,
                name,
                format!("{} is neither true nor false", shown(text)),
            );
        }
        value
    }

    pub(super) fn urls(&mut self, urls: &Element) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for (at, url) in urls.all("url").enumerate() {
            let key = url.attribute("key").unwrap_or_default();
            if !(1..=MAX_URL_KEY).contains(&key.chars().count()) {
                self.find(
                    Rule::UrlKey,
                    &format!("urls/url[{}]@key", at + 1),
                    format!("{} will not do", shown(key)),
                );
            }
            found.push((key.to_owned(), url.text.trim().to_owned()));
        }
        found
    }

    fn constraints(&mut self, parent: &Element, name: &str) -> Vec<Constraint> {
        let Some(list) = self.one(parent, name, Some(Rule::ElementUsual)) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for (at, child) in list.children.iter().enumerate() {
            let place = format!("relationships/{name}/{}[{}]", child.name, at + 1);
            if child.name != "constraint" {
                self.find(Rule::Relation, &place, "it is no constraint");
                continue;
            }
            let other = child.attribute("name").unwrap_or_default();
            if other.is_empty() || other.contains(char::is_whitespace) {
                self.find(
                    Rule::Relation,
                    &place,
                    format!("its name {} will not do", shown(other)),
                );
            }
            let version = match (child.attribute("relation"), child.attribute("version")) {
                (None, None) => None,
                (Some(relation), Some(version)) => {
                    if !RELATIONS.contains(&relation) || version.is_empty() {
                        let problem = format!(
                            "{} {} is no relation and version",
                            shown(relation),
                            shown(version)
                        );
                        self.find(Rule::Relation, &place, problem);
                    }
                    Some((relation.to_owned(), version.to_owned()))
                }
                _ => {
                    self.find(Rule::Relation, &place, "relation and version go together");
                    None
                }
            };
            found.push(Constraint {
                name: other.to_owned(),
                version,
            });
        }
        found
    }

    pub(super) fn relationships(&mut self, element: &Element) -> Relationships {
        let depends = self.constraints(element, "depends");
        let conflicts = self.constraints(element, "conflicts");
        let replaces = self.constraints(element, "replaces");
        let provides = self.one(element, "provides", Some(Rule::ElementUsual));
        let compatible_with = self.constraints(element, "compatibleWith");
        let mut provided = Vec::new();
        for (at, child) in provides.iter().flat_map(|list| &list.children).enumerate() {
            let name = child.attribute("name").unwrap_or_default();
            if child.name != "provide" || name.is_empty() {
                let place = format!("relationships/provides/{}[{}]", child.name, at + 1);
                self.find(Rule::Relation, &place, "it is no provide@name");
            }
            provided.push((
                name.to_owned(),
                child.attribute("version").map(str::to_owned),
            ));
        }
        Relationships {
            depends,
            conflicts,
            replaces,
            provides: provided,
            compatible_with,
        }
    }

    pub(super) fn system_requires(&mut self, element: &Element) -> SystemRequires {
        let mut found = SystemRequires::default();
        if let Some(mode) = self.one(element, "maintenance-mode", Some(Rule::ElementUsual)) {
            let mut value = |name: &str, text: &str| {
                let value = text.trim().parse().ok();
                if value.is_none() {
                    let place = format!("system-requires/maintenance-mode{name}");
                    self.find(
                        Rule::SystemRequires,
                        &place,
                        format!("{} is neither true nor false", shown(text)),
                    );
                }
                value
            };
            let both = (!mode.text.trim().is_empty())
                .then(|| value("", &mode.text))
                .flatten();
            let mut when = |name: &str| {
                let text = mode.attribute(name);
                text.map_or(both, |text| value(&format!("@{name}"), text))
                    .unwrap_or(false)
            };
            found.maintenance_mode = (when("on-install"), when("on-remove"));
        }
        for (at, platform) in element.all("hwplatform").enumerate() {
            if platform.attribute("vendor").is_none_or(str::is_empty) {
                self.find(
                    Rule::SystemRequires,
                    &format!("system-requires/hwplatform[{}]", at + 1),
                    "it names no vendor",
                );
            }
            found.hardware.push(platform.attributes.clone());
        }
        for (at, platform) in element.all("softwarePlatform").enumerate() {
            let value = |name: &str| platform.attribute(name).unwrap_or_default().to_owned();
            if value("productLineID") != "embeddedEsx" {
                let place = format!("system-requires/softwarePlatform[{}]@productLineID", at + 1);
                self.find(
                    Rule::SystemRequires,
                    &place,
                    format!("{} is no product line", shown(&value("productLineID"))),
                );
            }
            found
                .software
                .push((value("version"), value("locale"), value("productLineID")));
        }
        found
    }
}
