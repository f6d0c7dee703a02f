//! The state's own promises: versions, rules of the schema, the audit in the same transaction.
#![allow(clippy::unwrap_used)]

use msa::clock::{ManualClock, SystemClock};
use msa::store::{Actor, Done, FILE, Store, StoreError, schema};
use std::path::Path;
use std::sync::Arc;

fn made(dir: &Path) -> Store {
    Store::open_or_make(dir, Arc::new(ManualClock::at(1000))).unwrap()
}

fn raw(dir: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(dir.join(FILE)).unwrap()
}

#[test]
fn a_state_of_a_newer_program_is_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    drop(made(dir.path()));
    let newer = schema::newest() as i64 + 1;
    raw(dir.path())
        .pragma_update(None, "user_version", newer)
        .unwrap();
    let before = std::fs::read(dir.path().join(FILE)).unwrap();
    let refused = Store::open(dir.path(), Arc::new(SystemClock))
        .err()
        .unwrap();
    assert!(matches!(refused, StoreError::Newer { .. }), "{refused}");
    let said = refused.to_string();
    assert!(said.contains(&format!("has schema {newer}")), "{said}");
    assert!(said.contains("run the newer program"), "{said}");
    assert_eq!(std::fs::read(dir.path().join(FILE)).unwrap(), before);
}

#[test]
fn a_file_of_another_program_is_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    raw(dir.path())
        .execute_batch("CREATE TABLE users (name)")
        .unwrap();
    let before = std::fs::read(dir.path().join(FILE)).unwrap();
    let refused = Store::open(dir.path(), Arc::new(SystemClock))
        .err()
        .unwrap();
    assert!(matches!(refused, StoreError::Foreign { .. }), "{refused}");
    assert_eq!(std::fs::read(dir.path().join(FILE)).unwrap(), before);
    std::fs::write(
        dir.path().join(FILE),
        "not a database at all, but long enough to be read",
    )
    .unwrap();
    let refused = Store::open(dir.path(), Arc::new(SystemClock))
        .err()
        .unwrap();
    assert!(matches!(refused, StoreError::Foreign { .. }), "{refused}");
}

#[test]
fn there_is_one_writer_and_no_state_by_accident() {
    let dir = tempfile::tempdir().unwrap();
    let refused = Store::open(dir.path(), Arc::new(SystemClock))
        .err()
        .unwrap();
    assert!(refused.to_string().contains("jetdr msa init"), "{refused}");
    let first = made(dir.path());
    let refused = Store::open(dir.path(), Arc::new(SystemClock))
        .err()
        .unwrap();
    assert!(matches!(refused, StoreError::InUse { .. }), "{refused}");
    drop(first);
    let again = Store::open(dir.path(), Arc::new(SystemClock)).unwrap();
    assert_eq!(again.check().unwrap(), Vec::<String>::new());
    use std::os::unix::fs::PermissionsExt;
    for name in [FILE, "msa.sqlite-wal", "lock"] {
        let mode = std::fs::metadata(dir.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0, "{name}");
    }
    let mode: String = raw(dir.path())
        .pragma_query_value(None, "journal_mode", |row| row.get(0))
        .unwrap();
    assert_eq!(mode, "wal");
}

/// What is there is brought to the newest schema, and stays.
#[test]
fn opening_twice_migrates_once() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let store = made(dir.path());
        store
            .record(|t| {
                t.execute("INSERT OR IGNORE INTO meta VALUES ('kept', 'yes')", [])?;
                Ok(())
            })
            .unwrap();
    }
    let version: i64 = raw(dir.path())
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .unwrap();
    assert_eq!(version, schema::newest() as i64);
}

#[test]
fn a_change_and_its_line_in_the_audit_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = made(dir.path());
    let site = |store: &Store, fails: bool| {
        store.change(&Actor::system(), "create site", |t| {
            t.execute(
                "INSERT INTO sites (id, name, store, created_at_ms) VALUES ('1', 'a', '/a', 1)",
                [],
            )?;
            match fails {
                true => Err(StoreError::conflict("no")),
                false => Ok(Done::new((), "site a")),
            }
        })
    };
    let counts = || {
        let count = |t: &rusqlite::Transaction<'_>, sql| t.query_row(sql, [], |row| row.get(0));
        let read = store.read(|t| {
            let sites: i64 = count(t, "SELECT count(*) FROM sites")?;
            let lines: i64 = count(t, "SELECT count(*) FROM audit")?;
            Ok((sites, lines))
        });
        read.unwrap()
    };
    assert!(site(&store, true).is_err());
    assert_eq!(counts(), (0, 0));
    site(&store, false).unwrap();
    assert_eq!(counts(), (1, 1));
    let said = site(&store, false).unwrap_err().to_string();
    assert!(
        said.contains("create site: another one has the same"),
        "{said}"
    );
    assert_eq!(counts(), (1, 1));
}

/// Each of these breaks a rule that code should keep anyway; the schema keeps it too.
#[test]
fn what_must_not_be_is_refused_by_the_schema() {
    let dir = tempfile::tempdir().unwrap();
    let store = made(dir.path());
    let run = |sql: &str| {
        store.record(|t| {
            t.execute_batch(sql)?;
            Ok(())
        })
    };
    let hash = "0".repeat(64);
    let other = "1".repeat(64);
    let execution = |id: &str, state: &str| {
        format!(
            "INSERT INTO executions (id, name, kind, parameters, state, created_by, timeout_s, \
             retention_days, created_at_ms) VALUES ('{id}', '{id}', 'k', '{{}}', '{state}', 'u', 1, 1, 1)"
        )
    };
    let certificate = |serial: &str| {
        format!(
            "INSERT INTO certificates (serial, role, entity_id, key_hash, certificate, \
             created_at_ms, expires_at_ms) VALUES ('{serial}', 'host', 'h', '{hash}', x'00', 1, 2)"
        )
    };
    for fine in [
        "INSERT INTO users (id, name, role, password_hash, created_at_ms) VALUES ('u', 'anna', 'admin', 'h', 1)".to_owned(),
        "INSERT INTO vcenters (id, name, address, port, created_at_ms) VALUES ('v', 'v', 'a', 443, 1)".into(),
        "INSERT INTO clusters (id, vcenter_id, moid, name, created_at_ms) VALUES ('c', 'v', 'm', 'c', 1), ('d', 'v', 'n', 'd', 1)".into(),
        "INSERT INTO hosts (id, cluster_id, moid, name, created_at_ms) VALUES ('h', 'c', 'm', 'h', 1)".into(),
        "INSERT INTO drvas (id, name, address, port_base, created_at_ms) VALUES ('r', 'r', 'a', 1, 1), ('q', 'q', 'b', 1, 1)".into(),
        "INSERT INTO sites (id, name, store, created_at_ms) VALUES ('s', 's', '/s', 1)".into(),
        "INSERT INTO log_volumes (id, drva_id, name, path, capacity_bytes, created_at_ms) VALUES ('l', 'r', 'l', '/l', 67108864, 1)".into(),
        execution("e", "running"),
        certificate("ab"),
        "UPDATE certificates SET revoked_at_ms = 1, reason = 'r' WHERE serial = 'ab'".into(),
        "INSERT INTO audit (at_ms, actor, action, target, outcome, detail) VALUES (1, 'a', 'a', 't', 'done', '')".into(),
    ] {
        run(&fine).unwrap_or_else(|error| panic!("{fine}: {error}"));
    }
    for bad in [
        "INSERT INTO users (id, name, role, password_hash, created_at_ms) VALUES ('w', 'ANNA', 'admin', 'h', 1)".to_owned(),
        "UPDATE users SET role = 'root'".into(),
        "INSERT INTO tokens (id, user_id, name, hash, created_at_ms, expires_at_ms) VALUES ('t', 'u', 't', 'plain', 1, 2)".into(),
        format!("INSERT INTO tokens (id, user_id, name, hash, created_at_ms, expires_at_ms) VALUES ('t', 'x', 't', '{other}', 1, 2)"),
        "UPDATE vcenters SET port = 0".into(),
        "UPDATE vcenters SET port = 'https'".into(),
        "DELETE FROM vcenters".into(),
        "UPDATE clusters SET state = 'on'".into(),
        "UPDATE hosts SET drva_id = 'x'".into(),
        "DELETE FROM clusters WHERE id = 'c'".into(),
        // Of another cluster than its host.
        "INSERT INTO vms (id, cluster_id, host_id, moid, name, uuid, created_at_ms) VALUES ('m', 'd', 'h', 'm', 'm', 'm', 1)".into(),
        // Protected in no domain.
        "INSERT INTO vms (id, cluster_id, moid, name, uuid, state, created_at_ms) VALUES ('m', 'c', 'm', 'm', 'm', 'recoverable', 1)".into(),
        // The log of one appliance, the domain of another.
        "INSERT INTO domains (id, name, site_id, drva_id, log_volume_id, ack, created_at_ms) VALUES ('d', 'd', 's', 'q', 'l', 'host', 1)".into(),
        "UPDATE log_volumes SET capacity_bytes = 1".into(),
        execution("f", "running"),
        execution("f", "blocked"),
        execution("f", "succeeded"),
        "UPDATE executions SET parameters = 'no json'".into(),
        "UPDATE certificates SET revoked_at_ms = NULL, reason = NULL".into(),
        "DELETE FROM certificates".into(),
        certificate("ab"),
        "UPDATE audit SET actor = 'somebody else'".into(),
        "DELETE FROM audit".into(),
    ] {
        assert!(run(&bad).is_err(), "not refused: {bad}");
    }
    assert_eq!(store.check().unwrap(), Vec::<String>::new());
}
