//! Each rule broken once: the finding must name the rule, the file and the element, and say what to do.

mod bundle;
mod container;
mod descriptor;
mod payload;
mod signature;
#[path = "../support/mod.rs"]
mod support;

use support::good;
use vib_packaging::{Format, Report, Rule, Severity};

/// A package that breaks a rule: which, where it must be found, and what a look at it tells.
struct Case {
    rule: Rule,
    file: &'static str,
    element: &'static str,
    report: Report,
}

fn case(rule: Rule, file: &'static str, element: &'static str, report: Report) -> Case {
    Case {
        rule,
        file,
        element,
        report,
    }
}

#[test]
fn each_rule_is_broken_once_and_told_precisely() {
    for format in [Format::Tgz, Format::Vgz] {
        assert!(
            good(format).report().findings.is_empty(),
            "{:?}",
            good(format).report()
        );
    }
    let mut cases = container::cases();
    cases.extend(descriptor::cases());
    cases.extend(payload::cases());
    cases.extend(bundle::cases());
    let signature = signature::cases();
    let has_tools = signature.is_some();
    cases.extend(signature.unwrap_or_default());
    let mut wrong = Vec::new();
    for case in &cases {
        let Case {
            rule,
            file,
            element,
            report,
        } = case;
        let fits = |found: &&vib_packaging::Finding| {
            found.rule == *rule && found.file.contains(file) && found.element.contains(element)
        };
        let Some(found) = report.findings.iter().find(fits) else {
            wrong.push(format!(
                "{} was not found at `{file}`, `{element}`: {:#?}",
                rule.name(),
                report.findings
            ));
            continue;
        };
        let text = found.to_string();
        assert!(
            !found.problem.is_empty() && text.contains(rule.remedy()) && text.contains(rule.name()),
            "{text}"
        );
        let (plain, force) = (report.accepted(false), report.accepted(true));
        let taken = match rule.severity() {
            Severity::Advice => true,
            Severity::NeedsForce => !plain,
            Severity::Refused => !plain && !force,
        };
        assert!(taken, "{text}: taken {plain}, with force {force}");
        if !report.accepted(true) {
            assert!(report.clone().into_result(true).is_err());
        }
        println!("{text}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let untested = Rule::ALL
        .iter()
        .filter(|rule| !cases.iter().any(|case| case.rule == **rule));
    let untested: Vec<&str> = untested.map(|rule| rule.name()).collect();
    assert!(
        untested.is_empty() || !has_tools,
        "no case breaks {untested:?}"
    );
}
