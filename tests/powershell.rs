//! The PowerShell module without PowerShell: its functions are those that its manifest names, what it sends to
//! the server is what the server takes, and the flags that it gives the command are the command's.
#![allow(clippy::unwrap_used)]

use msa::executions::operation::Making;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

const DOCUMENTED: [&str; 8] = [
    "Disable-JetDRForCluster",
    "Enable-JetDRForCluster",
    "Install-JetDRWithDHCP",
    "Install-JetDRWithStaticIP",
    "Invoke-PreflightJetDRInstall",
    "Invoke-PreflightJetDRSystemCheck",
    "Invoke-PreflightJetDRUninstall",
    "Uninstall-JetDR",
];

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn module() -> String {
    read("powershell/JetDR.RunCommands/JetDR.RunCommands.psm1")
}

/// Functions with their text.
fn functions(module: &str) -> Vec<(&str, &str)> {
    let parts = module.split("\nfunction ").skip(1);
    parts.map(|part| part.split_once(' ').unwrap()).collect()
}

/// What stands in quotes in a list that begins after `start`.
fn quoted<'t>(text: &'t str, start: &str) -> Vec<&'t str> {
    let (_, rest) = text.split_once(start).unwrap();
    let (list, _) = rest.split_once("\n)").or(rest.split_once("    )")).unwrap();
    list.lines()
        .filter_map(|line| line.trim().strip_prefix('\'')?.strip_suffix('\''))
        .collect()
}

/// The names in a hashtable `@{ a = ...; b = ... }`.
fn names(table: &str) -> Vec<&str> {
    let body = table.split_once('}').unwrap().0;
    let pairs = body.split(';');
    pairs
        .map(|pair| pair.split_once('=').unwrap().0.trim())
        .collect()
}

#[test]
fn the_manifest_names_the_documented_functions_and_all_are_there() {
    let manifest = read("powershell/JetDR.RunCommands/JetDR.RunCommands.psd1");
    let module = module();
    assert_eq!(quoted(&manifest, "FunctionsToExport = @("), DOCUMENTED);
    assert_eq!(
        quoted(&module, "Export-ModuleMember -Function @("),
        DOCUMENTED
    );
    let defined: BTreeSet<&str> = functions(&module).iter().map(|(name, _)| *name).collect();
    for name in DOCUMENTED {
        assert!(defined.contains(name), "{name}");
    }
    for (open, close) in [('{', '}'), ('(', ')'), ('[', ']')] {
        let count = |which: char| module.chars().filter(|c| *c == which).count();
        assert_eq!(count(open), count(close), "{open}{close}");
    }
}

#[test]
fn what_it_sends_is_what_the_server_takes() {
    let module = module();
    let registry = msa::service::registry();
    let mut kinds = BTreeSet::new();
    for (name, text) in functions(&module) {
        let Some((_, rest)) = text.split_once("Invoke-JetDRExecution -Kind '") else {
            continue;
        };
        let (kind, rest) = rest.split_once('\'').unwrap();
        let (_, table) = rest.split_once("-Fields @{").unwrap();
        let mut parameters = Map::new();
        for field in names(table) {
            let value = match field {
                "detach" => json!(true),
                _ => json!("One"),
            };
            parameters.insert(field.to_owned(), value);
        }
        let parameters = Value::Object(parameters);
        let made = (registry[kind].make)(&Making {
            parameters: &parameters,
            name: "x",
            data_dir: Path::new("."),
        });
        assert!(made.is_ok(), "{name}: {:?}", made.err());
        kinds.insert(kind.to_owned());
    }
    let expected = [
        "disable-cluster",
        "enable-cluster",
        "preflight-install",
        "preflight-system",
        "preflight-uninstall",
    ];
    assert_eq!(kinds, expected.map(str::to_owned).into());

    let document: Value = serde_json::from_str(&read("docs/msa-openapi.json")).unwrap();
    let schemas = &document["components"]["schemas"];
    for (start, schema) in [
        ("$execution = @{", "NewExecution"),
        ("$login = @{", "Login"),
    ] {
        let (_, table) = module.split_once(start).unwrap();
        let sent: BTreeSet<&str> = names(table).into_iter().collect();
        let known = schemas[schema]["properties"].as_object().unwrap();
        let known: BTreeSet<&str> = known.keys().map(String::as_str).collect();
        assert_eq!(sent, known, "{schema}");
    }
    for (field, schema) in [
        ("seq", "OutputLine"),
        ("text", "OutputLine"),
        ("ended_at_ms", "Execution"),
        ("state", "Execution"),
        ("error", "Execution"),
        ("token", "NewTokenAnswer"),
    ] {
        assert!(
            schemas[schema]["properties"].get(field).is_some(),
            "{field}"
        );
        assert!(module.contains(&format!(".{field}")), "{field}");
    }
    for path in [
        "/login",
        "/executions",
        "/executions/{id}",
        "/executions/{id}/output",
    ] {
        assert!(document["paths"].get(path).is_some(), "{path}");
    }
}

#[test]
fn the_flags_that_it_gives_are_the_commands() {
    let module = module();
    for (name, text) in functions(&module) {
        let command = match name {
            "Uninstall-JetDR" => "uninstall",
            name if name.starts_with("Install-") => "install",
            _ => continue,
        };
        let help = Command::new(env!("CARGO_BIN_EXE_jetdr"))
            .args([command, "--help"])
            .output()
            .unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        let flags: Vec<&str> = text
            .split('\'')
            .filter(|word| word.starts_with("--"))
            .collect();
        assert!(flags.len() >= 2, "{name}");
        for flag in flags {
            let is_there = help.split_whitespace().any(|word| word == flag);
            assert!(is_there, "{name}: {flag}");
        }
    }
}
