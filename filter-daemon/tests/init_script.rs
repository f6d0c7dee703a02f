//! The init script of the package, run as a host runs it: with a plain shell, below a root folder, with
//! the real daemon.

use filter_core::mapping::{RunFolder, hex};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const DISK: [u8; 16] = [7; 16];

fn package_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../vib-packaging/host")
        .join(name)
}

/// The shells to run it with: the system's, and those of small systems where they are there.
fn shells() -> Vec<Vec<&'static str>> {
    let there = |shell: &&[&str]| {
        let found = Command::new(shell[0])
            .args(&shell[1..])
            .args(["-c", "exit 0"])
            .status()
            .is_ok();
        assert!(
            found || std::env::var_os("CI").is_none(),
            "{shell:?} is missing: scripts/bootstrap.sh test"
        );
        found
    };
    let known: [&[&str]; 3] = [&["sh"], &["dash"], &["busybox", "sh"]];
    known
        .iter()
        .filter(|shell| there(shell))
        .map(|shell| shell.to_vec())
        .collect()
}

/// A host's root with the package's files in their places.
struct Root {
    folder: tempfile::TempDir,
    shell: Vec<&'static str>,
}

impl Root {
    fn new(shell: &[&'static str]) -> Root {
        let root = Root {
            folder: tempfile::tempdir().expect("a folder"),
            shell: shell.to_vec(),
        };
        let place = |name: &str, path: &str| {
            let to = root.path(path);
            fs::create_dir_all(to.parent().expect("a folder")).expect("made");
            fs::copy(package_file(name), &to).expect("copied");
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).expect("its mode");
        };
        place("iofilterd-jetdr", "etc/init.d/iofilterd-jetdr");
        place("shutdown", "etc/shutdown.d/iofilterd-jetdr");
        fs::create_dir_all(root.path("opt/jetdr/bin")).expect("made");
        symlink(
            env!("CARGO_BIN_EXE_iofilterd-jetdr"),
            root.path("opt/jetdr/bin/iofilterd-jetdr"),
        )
        .expect("a link");
        // Ports that nobody serves.
        root.configure("# A comment\n\ndrva = 127.0.0.1\nport-base = 1\nname = a host\ninsecure-plain-text = true");
        root
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn configure(&self, text: &str) {
        fs::create_dir_all(self.path("etc/config/jetdr")).expect("made");
        fs::write(self.path("etc/config/jetdr/iofilterd.conf"), text).expect("written");
    }

    fn command(&self, script: &str, words: &[&str]) -> Command {
        let mut command = Command::new(self.shell[0]);
        command
            .args(&self.shell[1..])
            .arg(self.path(script))
            .args(words);
        command
    }

    fn call(&self, words: &[&str]) -> Output {
        self.command("etc/init.d/iofilterd-jetdr", words)
            .output()
            .expect("the shell starts")
    }

    /// Calls the script, which must end with `code`; what it said.
    fn expect(&self, code: i32, words: &[&str]) -> String {
        let done = self.call(words);
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
        assert_eq!(
            done.status.code(),
            Some(code),
            "{:?} {words:?}: {said}",
            self.shell
        );
        said
    }

    fn pid(&self, file: &str) -> Option<String> {
        let text = fs::read_to_string(self.path("var/run").join(file)).ok()?;
        Some(text.trim().to_owned())
    }

    fn daemon(&self) -> Option<String> {
        self.pid("iofilterd-jetdr.pid")
    }

    /// Every file below the root.
    fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("listed") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        for file in ["iofilterd-jetdr.watchdog.pid", "iofilterd-jetdr.pid"] {
            if let Some(pid) = self
                .pid(file)
                .filter(|pid| pid.parse::<u32>().is_ok() && *pid != std::process::id().to_string())
            {
                signal("-KILL", &pid);
            }
        }
    }
}

fn signal(which: &str, pid: &str) {
    let _ = Command::new("kill").args([which, pid]).output();
}

fn lives(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20)); // poll
    }
}

#[test]
fn every_verb_does_what_it_says() {
    for shell in shells() {
        let root = Root::new(&shell);
        assert!(root.expect(3, &["status"]).contains("is not running"));
        root.expect(0, &["stop"]);
        root.expect(0, &["start"]);
        let first = root.daemon().expect("a pid file");
        assert!(root.expect(0, &["status"]).contains(&first));
        root.expect(0, &["start"]);
        assert_eq!(
            root.daemon().as_ref(),
            Some(&first),
            "a second start started it again"
        );
        root.expect(0, &["restart"]);
        let second = root.daemon().expect("a pid file");
        assert!(first != second && !lives(&first) && lives(&second));
        root.expect(0, &["upgrade"]);
        let third = root.daemon().expect("a pid file");
        assert!(!lives(&second) && lives(&third));
        let id = || fs::read_to_string(root.path("etc/config/jetdr/host-id")).expect("an id");
        let before = id();
        root.expect(0, &["stop"]);
        // As a boot does.
        fs::remove_dir_all(root.path("var/run/jetdr")).expect("removed");
        root.expect(0, &["start"]);
        assert_eq!(id(), before, "a host is who it was before it booted");
        let third = root.daemon().expect("a pid file");
        root.expect(0, &["stop"]);
        assert!(!lives(&third));
        root.expect(3, &["status"]);
        root.expect(2, &[]);
        root.expect(2, &["reload"]);
        root.expect(2, &["start", "remove"]);
        // In order: the daemon takes its socket along.
        assert!(!root.path("var/run/jetdr/status.sock").exists());
    }
}

#[test]
fn the_watchdog_starts_it_again() {
    for shell in shells() {
        let root = Root::new(&shell);
        root.expect(0, &["start"]);
        let first = root.daemon().expect("a pid file");
        signal("-KILL", &first);
        // A process that was just made still has the shell's command line: not ours yet.
        wait_for("another daemon runs", || {
            root.daemon().is_some_and(|pid| pid != first && lives(&pid))
                && root.call(&["status"]).status.success()
        });
        root.expect(0, &["status"]);
        let log = fs::read_to_string(root.path("var/log/iofilterd-jetdr.log")).expect("the log");
        assert!(log.contains("watchdog: the daemon ended with 137"), "{log}");
        root.expect(0, &["stop"]);
        assert!(root.daemon().is_none());
    }
}

#[test]
fn a_daemon_without_its_watchdog_is_told_and_stopped() {
    let root = Root::new(&["sh"]);
    root.expect(0, &["start"]);
    let (daemon, watchdog) = (
        root.daemon().expect("a pid file"),
        root.pid("iofilterd-jetdr.watchdog.pid")
            .expect("a pid file"),
    );
    signal("-KILL", &watchdog);
    wait_for("the watchdog is gone", || !lives(&watchdog));
    assert!(root.expect(0, &["status"]).contains("without its watchdog"));
    root.expect(0, &["start"]);
    let second = root.daemon().expect("a pid file");
    assert!(!lives(&daemon) && lives(&second) && second != daemon);
    assert!(!root.expect(0, &["status"]).contains("without"));
}

#[test]
fn a_daemon_that_hangs_is_killed() {
    let root = Root::new(&["sh"]);
    root.expect(0, &["start"]);
    let daemon = root.daemon().expect("a pid file");
    signal("-STOP", &daemon);
    let done = root
        .command("etc/init.d/iofilterd-jetdr", &["stop"])
        .env("JETDR_STOP_SECONDS", "1")
        .output()
        .expect("the shell starts");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(
        done.status.success() && said.contains("it is killed"),
        "{said}"
    );
    wait_for("it is gone", || !lives(&daemon));
    root.expect(3, &["status"]);
}

/// Numbers are given again: a pid file from before may name anybody.
#[test]
fn a_foreign_process_is_left_alone() {
    let root = Root::new(&["sh"]);
    let mut other = Command::new("sleep").arg("60").spawn().expect("a process");
    fs::create_dir_all(root.path("var/run")).expect("made");
    for file in ["iofilterd-jetdr.pid", "iofilterd-jetdr.watchdog.pid"] {
        fs::write(root.path("var/run").join(file), format!("{}\n", other.id())).expect("written");
    }
    root.expect(3, &["status"]);
    root.expect(0, &["stop"]);
    assert!(other.try_wait().expect("a state").is_none(), "it was ended");
    fs::write(root.path("var/run/iofilterd-jetdr.pid"), "no number").expect("written");
    root.expect(3, &["status"]);
    root.expect(0, &["start"]);
    root.expect(0, &["stop"]);
    other.kill().expect("ended");
    let _ = other.wait();
}

#[test]
fn a_bad_configuration_is_told_and_starts_nothing() {
    let root = Root::new(&["sh"]);
    for (text, told) in [
        ("drva = a\nport-base 7\n", "line 2: write NAME = VALUE"),
        ("drva=a", "line 1: write NAME = VALUE"),
        ("x; reboot = 1", "line 1: write NAME = VALUE"),
        ("x;y = 1", "line 1: write NAME = VALUE"),
        ("--drva = a", "line 1: write NAME = VALUE"),
        ("drva =", "line 1: write NAME = VALUE"),
        (
            "run-dir = /",
            "line 1: run-dir is not for the configuration",
        ),
        ("colour = green", "--colour"),
        ("port-base = 65535", "six ports from there on do not exist"),
    ] {
        root.configure(text);
        let said = root.expect(1, &["start"]);
        assert!(said.contains(told), "{text}: {said}");
        root.expect(3, &["status"]);
        assert!(
            root.daemon().is_none() && root.pid("iofilterd-jetdr.watchdog.pid").is_none(),
            "{text}"
        );
    }
    // A value is one word of the daemon's, whatever is in it.
    root.configure(
        "drva = 127.0.0.1\nport-base = 1\nname = $(touch pwned) `touch pwned` ; touch pwned *\n",
    );
    root.expect(0, &["start"]);
    assert!(!Path::new("pwned").exists() && !root.path("pwned").exists());
    fs::remove_file(root.path("opt/jetdr/bin/iofilterd-jetdr")).expect("removed");
    root.expect(0, &["stop"]);
    assert!(
        root.expect(1, &["start"])
            .contains("is missing: install the package again")
    );
}

#[test]
fn a_removal_leaves_nothing_and_takes_nothing_that_is_used() {
    for words in [&["remove"][..], &["stop", "remove"]] {
        let root = Root::new(&["sh"]);
        let before = root.files();
        root.expect(0, &["start", "install"]);
        let run = RunFolder::open(&root.path("var/run/jetdr")).expect("the run folder");
        let disk = run
            .lock_disk(&DISK)
            .expect("locked")
            .expect("nobody else has it");
        let said = root.expect(1, words);
        assert!(said.contains(&hex(&DISK)), "{said}");
        root.expect(0, &["status"]);
        drop(disk);
        root.expect(0, words);
        assert_eq!(root.files(), before);
        assert!(!root.path("var/run/jetdr").exists());
    }
}

#[test]
fn the_firewall_is_read_again_when_the_package_comes_and_goes() {
    let root = Root::new(&["sh"]);
    let calls = root.path("calls");
    fs::create_dir_all(root.path("bin")).expect("made");
    let script = format!("#!/bin/sh\necho \"$*\" >>{}\n", calls.display());
    fs::write(root.path("bin/esxcli"), script).expect("written");
    fs::set_permissions(root.path("bin/esxcli"), fs::Permissions::from_mode(0o755))
        .expect("its mode");
    for (number, words) in [
        &["install"][..],
        &["stop", "upgrade"],
        &["start", "upgrade"],
        &["remove"],
    ]
    .iter()
    .enumerate()
    {
        root.expect(0, words);
        let called = fs::read_to_string(&calls).expect("it was called");
        let refreshes = called
            .lines()
            .filter(|of| *of == "network firewall refresh");
        assert_eq!(
            refreshes.count(),
            [1, 1, 2, 3][number],
            "{words:?}: {called}"
        );
    }
}

#[test]
fn calls_at_the_same_time_start_one_daemon() {
    let root = Root::new(&["sh"]);
    let calls: Vec<_> = (0..4)
        .map(|_| {
            root.command("etc/init.d/iofilterd-jetdr", &["start"])
                .spawn()
                .expect("the shell starts")
        })
        .collect();
    for mut call in calls {
        assert!(call.wait().expect("it ends").success());
    }
    let daemon = root.daemon().expect("a pid file");
    root.expect(0, &["stop"]);
    assert!(!lives(&daemon));
    // Who died with the lock does not block the next.
    fs::create_dir_all(root.path("var/run/iofilterd-jetdr.lock")).expect("made");
    fs::write(root.path("var/run/iofilterd-jetdr.lock/pid"), "999999999\n").expect("written");
    root.expect(0, &["start"]);
}

#[test]
fn a_shutdown_of_the_host_stops_it() {
    let root = Root::new(&["sh"]);
    root.expect(0, &["start"]);
    let daemon = root.daemon().expect("a pid file");
    let done = Command::new(root.path("etc/shutdown.d/iofilterd-jetdr"))
        .status()
        .expect("it starts");
    assert!(done.success() && !lives(&daemon));
}

/// A host speaks by certificates unless its configuration says otherwise; their folder goes with a removal.
#[test]
fn the_daemon_is_given_its_folder_of_certificates() {
    for shell in shells() {
        let root = Root::new(&shell);
        let folder = root.path("etc/config/jetdr/tls");
        let flags = || {
            let pid = root.daemon().expect("it runs");
            let line = fs::read(format!("/proc/{pid}/cmdline")).expect("its flags");
            let words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
            let words: Vec<String> = words.map(|word| word.into_owned()).collect();
            words.contains(&format!("--tls-dir={}", folder.display()))
        };
        root.expect(0, &["start"]);
        assert!(!flags(), "{shell:?}: the configuration asks for plain text");
        root.configure("# as it was installed\n");
        root.expect(0, &["restart"]);
        assert!(flags(), "{shell:?}");
        let mode = folder.metadata().expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o1700);
        fs::write(folder.join("token"), "jde_1").expect("written");
        root.expect(0, &["remove"]);
        assert!(!folder.exists(), "{shell:?}: keys are left behind");
    }
}
