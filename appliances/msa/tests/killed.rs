//! The server as a process: killed at any point, started again; what was answered is there, and what
//! was begun goes on or goes back.
#![allow(clippy::unwrap_used)]

mod support;

use msa::clock::SystemClock;
use msa::store::Store;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use support::{Client, PASSWORD, wait_for};

struct Process {
    child: Child,
    client: Client,
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        support::init(&dir.path().join("msa"));
        Self { dir }
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("msa")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Starts it; nothing, if it died before it was ready.
    fn start(&self, fault: &str) -> Option<Process> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_msa"))
            .args(["run", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(self.folder())
            .env("JETDR_FAULT", fault)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let Some(ready) = line.strip_prefix("READY ") else {
            child.wait().unwrap();
            return None;
        };
        let ready: Value = serde_json::from_str(ready).unwrap();
        let address = ready["address"].as_str().unwrap().parse().unwrap();
        let authority = ready["authority"].as_str().unwrap();
        let client = Client::of(address, Path::new(authority));
        Some(Process { child, client })
    }

    /// What is in the state, looked at while nobody runs.
    fn names(&self, sql: &str) -> Vec<String> {
        let store = Store::open(&self.folder(), Arc::new(SystemClock)).unwrap();
        assert_eq!(store.check().unwrap(), Vec::<String>::new());
        let read = store.read(|t| {
            let mut statement = t.prepare(sql)?;
            let rows = statement.query_map([], |row| row.get(0))?;
            Ok(rows.collect::<rusqlite::Result<Vec<String>>>()?)
        });
        read.unwrap()
    }
}

impl Process {
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Logs in, unless the process dies meanwhile.
fn log_in(client: &Client) -> Option<Client> {
    let login = json!({"name": "admin", "password": PASSWORD});
    let (status, answer) = client.try_call("POST", "/login", &login).ok()?;
    assert_eq!(status, 200, "{answer}");
    let mut client = client.clone();
    client.token = Some(answer["token"].as_str()?.to_owned());
    Some(client)
}

/// Makes sites until the process is gone; those that were answered.
fn make_sites(client: &Client, round: u64, limit: usize) -> Vec<String> {
    let mut answered = Vec::new();
    let Some(client) = log_in(client) else {
        return answered;
    };
    for at in 0..limit {
        let name = format!("s-{round}-{at}");
        let site = json!({"name": name, "store": format!("/{name}")});
        match client.try_call("POST", "/sites", &site) {
            Ok((201, _)) => answered.push(name),
            Ok((status, answer)) => panic!("{status} {answer}"),
            Err(_) => break,
        }
    }
    answered
}

#[test]
fn what_was_answered_outlives_a_kill_at_any_moment() {
    let place = Place::new();
    let mut numbers = support::Numbers(support::seed());
    let mut answered = Vec::new();
    for round in 0..6 {
        // Half of them die between the change and its commit, or between the commit and the answer.
        let fault = match numbers.below(4) {
            0 => format!("msa.before-commit:{}", 4 + numbers.below(8)),
            1 => format!("msa.after-commit:{}", 4 + numbers.below(8)),
            _ => String::new(),
        };
        let Some(mut process) = place.start(&fault) else {
            assert!(place.log().contains("killed on request"), "{}", place.log());
            continue;
        };
        let client = process.client.clone();
        let limit = 1 + numbers.below(20) as usize;
        let worker = std::thread::spawn(move || make_sites(&client, round, limit));
        if fault.is_empty() {
            // Somewhere among them.
            let made = numbers.below(limit as u64 + 1) as usize;
            let client = process.client.clone();
            wait_for("some sites", || {
                let client = log_in(&client)?;
                let all = client.get("/sites?limit=200").to_string();
                let count = all.matches(&format!("\"s-{round}-")).count();
                (count >= made || worker.is_finished()).then_some(())
            });
            process.kill();
        }
        answered.extend(worker.join().unwrap());
        process.kill();
        let there = place.names("SELECT name FROM sites ORDER BY seq");
        for name in &answered {
            assert!(
                there.contains(name),
                "{name} was answered, and is not there: {there:?}"
            );
        }
        // Each is in the audit, once; and nothing is there that the audit does not know.
        let audited = place.names(
            "SELECT substr(target, 6) FROM audit WHERE action = 'create site' \
             AND outcome = 'done' ORDER BY seq",
        );
        assert_eq!(audited, there);
    }
    assert!(!answered.is_empty(), "nothing was tried: {}", place.log());
}

/// Where executions can die, by number, until one comes to its end without.
#[test]
fn a_backup_is_finished_wherever_the_server_was_killed() {
    let place = Place::new();
    let backups = place.folder().join("backups");
    for point in ["msa.execution.before-action", "msa.execution.after-action"] {
        let mut kills = 0;
        for nth in 1.. {
            let name = format!("b{nth}{}", point.len());
            let mut process = place.start(&format!("{point}:{nth}")).unwrap();
            let admin = log_in(&process.client).unwrap();
            let asked = json!({"name": name, "kind": "backup"});
            // The answer may be cut off; the execution is queued by then, or was not asked for.
            let submitted = admin.try_call("POST", "/executions", &asked);
            let died = wait_for("its end, or the server's", || {
                if process.child.try_wait().unwrap().is_some() {
                    return Some(true);
                }
                let (_, all) = admin
                    .try_call("GET", "/executions?limit=200", &Value::Null)
                    .ok()?;
                let all = all["items"].as_array()?.clone();
                let ours = all.into_iter().find(|one| one["name"] == name.as_str())?;
                ours["ended_at_ms"].is_i64().then_some(false)
            });
            process.kill();
            if !died {
                break;
            }
            kills += 1;
            drop(submitted);
            let process = place.start("").unwrap();
            let admin = log_in(&process.client).unwrap();
            let ended = wait_for("its end after the restart", || {
                let all = admin.get("/executions?limit=200");
                let all = all["items"].as_array()?.clone();
                let ours = all.into_iter().find(|one| one["name"] == name.as_str())?;
                ours["ended_at_ms"].is_i64().then_some(ours)
            });
            assert_eq!(
                (ended["state"].as_str(), ended["starts"].as_i64()),
                (Some("succeeded"), Some(2))
            );
            assert!(backups.join(format!("{name}.sqlite")).is_file());
            assert!(!backups.join(format!("{name}.partial")).exists());
        }
        // Begin and do each of three steps, and the end.
        assert_eq!(kills, 7, "{point}: {}", place.log());
    }
}

#[test]
fn a_first_start_that_dies_while_it_makes_the_state_can_be_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("msa");
    let password = dir.path().join("password");
    std::fs::write(&password, PASSWORD).unwrap();
    let init = |fault: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_msa"));
        command
            .args(["init", "--name", "127.0.0.1", "--data-dir"])
            .arg(&folder);
        command.arg("--password-file").arg(&password);
        command.env("JETDR_FAULT", fault).output().unwrap()
    };
    for point in [
        "msa.before-migration",
        "msa.after-migration",
        "msa.before-commit",
        "msa.after-commit:2",
    ] {
        let output = init(point);
        assert!(!output.status.success(), "{point}");
        assert!(
            !folder.exists(),
            "{point}: a half server bears the name of a whole one"
        );
    }
    let output = init("");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let again = init("");
    assert!(!again.status.success());
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(said.contains("is not empty: nothing was changed"), "{said}");
    // An open password is not taken from the command line at all.
    let mut command = Command::new(env!("CARGO_BIN_EXE_msa"));
    command.args([
        "init",
        "--name",
        "a",
        "--data-dir",
        "x",
        "--password",
        PASSWORD,
    ]);
    assert!(!command.output().unwrap().status.success());
}

#[test]
fn it_stops_in_order_and_two_do_not_share_a_state() {
    let place = Place::new();
    let mut process = place.start("").unwrap();
    assert!(place.start("").is_none());
    assert!(
        place
            .log()
            .contains("is in use by another management server"),
        "{}",
        place.log()
    );
    let kill = Command::new("kill")
        .arg(process.child.id().to_string())
        .status();
    assert!(kill.unwrap().success());
    assert!(process.child.wait().unwrap().success(), "{}", place.log());
    for secret in [PASSWORD, "PRIVATE KEY", "$argon2"] {
        assert!(!place.log().contains(secret));
    }
}
