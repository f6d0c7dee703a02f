//! The server as a process of this machine: made, started, found again, stopped.
//!
//! Invariant: a process is the server only if its command line says that it runs this installation's folder; no
//! other is ever ended.

use super::fields::Fields;
use crate::parts;
use anyhow::{Context, bail};
use msa::text::Password;
use std::fs::{self, File};
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The server's folder in the installation's.
pub const DATA: &str = "msa";
const PID: &str = "msa.pid";
const LOG: &str = "msa.log";
const UNIT: &str = "jetdr-msa.service";
/// The administrator's password, if it was made up here.
pub const PASSWORD: &str = "admin-password";
/// All that is put into the installation's folder but the journal.
pub const FILES: [&str; 6] = [PID, UNIT, PASSWORD, DATA, ".msa.partial", LOG];

/// It may take so long to be up, and to stop.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// For so long it is tried again.
const AGAIN: Duration = Duration::from_secs(2);

/// Whether a server is in an installation's folder.
pub fn is_there(folder: &Path) -> bool {
    folder.join(DATA).exists()
}

/// The first line of a file, or of standard input.
pub fn read_line(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let what = || format!("cannot read the password from {}", path.display());
    if path.as_os_str() == "-" {
        std::io::stdin().take(4096).read_to_string(&mut text)
    } else {
        File::open(path).and_then(|file| file.take(4096).read_to_string(&mut text))
    }
    .with_context(what)?;
    let line = text.lines().next().unwrap_or_default().to_owned();
    if line.is_empty() {
        bail!("{} holds no password on its first line", path.display());
    }
    Ok(line)
}

/// The administrator's password: the one that is given, else that of an earlier try, else a new one.
pub fn password(folder: &Path, given: Option<&Path>) -> anyhow::Result<String> {
    let kept = folder.join(PASSWORD);
    match given {
        Some(path) => read_line(path),
        None if kept.exists() => read_line(&kept),
        None => {
            let made = uuid::Uuid::new_v4().simple().to_string();
            msa::authority::write_private(&kept, format!("{made}\n").as_bytes())?;
            Ok(made)
        }
    }
}

/// Makes the server's folder, unless it is there: it is there whole or not at all.
pub fn make(folder: &Path, fields: &Fields, password: &str) -> anyhow::Result<()> {
    let data = folder.join(DATA);
    if !data.exists() {
        let password = Password::try_from(password.to_owned())?;
        msa::cli::make_server(&data, &fields.names()?, &fields.admin, &password)?;
    }
    let unit = unit(&command(folder, fields)?);
    let path = folder.join(UNIT);
    fs::write(&path, unit).with_context(|| format!("cannot write {}", path.display()))
}

/// The server's command line.
fn command(folder: &Path, fields: &Fields) -> anyhow::Result<Vec<PathBuf>> {
    let word = |text: &str| PathBuf::from(text);
    Ok(vec![
        std::env::current_exe().context("where is this program?")?,
        word("msa"),
        word("run"),
        word("--data-dir"),
        folder.join(DATA),
        word("--listen"),
        word(&fields.listen()?.to_string()),
        word("--public-url"),
        word(&fields.url()?),
        word("--pid-file"),
        folder.join(PID),
    ])
}

/// For a machine that is to start it at each boot.
fn unit(command: &[PathBuf]) -> String {
    let quoted = |word: &PathBuf| {
        let text = word.display().to_string();
        let text = text.replace('%', "%%").replace('$', "$$");
        format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
    };
    let words: Vec<String> = command.iter().map(quoted).collect();
    format!(
        "[Unit]\nDescription=jetdr management server\nAfter=network-online.target\nWants=network-online.target\n\n\
         [Service]\nExecStart={}\nRestart=on-failure\nRestartSec=5\n\n[Install]\nWantedBy=multi-user.target\n",
        words.join(" ")
    )
}

/// The server's process, if it runs.
pub fn running(folder: &Path) -> Option<u32> {
    let text = fs::read_to_string(folder.join(PID)).ok()?;
    let pid: u32 = text.trim().parse().ok()?;
    let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let data = folder.join(DATA);
    let mut words = words.split(|byte| *byte == 0);
    // Its id may be another process's by now.
    words
        .any(|word| word == data.as_os_str().as_bytes())
        .then_some(pid)
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n  ")
}

/// Starts the server, unless it runs, and waits until it answers; whether it had to be started.
pub fn start(folder: &Path, fields: &Fields) -> anyhow::Result<bool> {
    let address = fields.listen()?;
    let log = folder.join(LOG);
    let mut child = None;
    let since = Instant::now();
    let is_new = running(folder).is_none();
    loop {
        if running(folder).is_some() && answers(folder, address) {
            return Ok(is_new);
        }
        if child.is_none() && running(folder).is_none() {
            child = Some(spawn(folder, fields, &log)?);
        }
        if let Some(process) = &mut child
            && let Some(status) = process.try_wait()?
        {
            // One that was started just before this program was killed may have the folder: it is the
            // server, but has not said so yet.
            if running(folder).is_none() && since.elapsed() > AGAIN {
                bail!(
                    "the server does not start ({status}), {} says:\n  {}",
                    log.display(),
                    tail(&log)
                );
            }
            child = None;
            std::thread::sleep(AGAIN / 4);
        }
        if since.elapsed() > LIMIT {
            bail!(
                "the server does not answer at {address} within {} s, {} says:\n  {}",
                LIMIT.as_secs(),
                log.display(),
                tail(&log)
            );
        }
        std::thread::sleep(POLL);
    }
}

fn spawn(folder: &Path, fields: &Fields, log: &Path) -> anyhow::Result<std::process::Child> {
    let open = || File::options().create(true).append(true).open(log);
    let what = || format!("cannot write {}", log.display());
    let (out, errors) = (open().with_context(what)?, open().with_context(what)?);
    let words = command(folder, fields)?;
    let (program, arguments) = words.split_first().context("an empty command")?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(errors)
        // A group of its own: it outlives this program, and Ctrl-C is not for it.
        .process_group(0)
        .spawn()
        .context("cannot start the server")
}

fn answers(folder: &Path, address: SocketAddr) -> bool {
    let client = super::rest::client(folder, address);
    client.is_ok_and(|client| client.send("GET", "/authority", None).is_ok())
}

/// Stops the server, if it runs.
pub fn stop(folder: &Path) -> anyhow::Result<()> {
    let since = Instant::now();
    let mut asked = None;
    while let Some(pid) = running(folder) {
        if asked != Some(pid) {
            parts::terminate(pid);
            asked = Some(pid);
        }
        if since.elapsed() > LIMIT {
            bail!(
                "the server (process {pid}) does not stop within {} s: end it, then try again",
                LIMIT.as_secs()
            );
        }
        std::thread::sleep(POLL);
    }
    super::journal::remove(&folder.join(PID))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_not_the_server_is_not_taken_for_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(running(folder.path()), None);
        // This very process is no server of that folder.
        fs::write(folder.path().join(PID), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(running(folder.path()), None);
        for text in ["", "x", "-1", "99999999999"] {
            fs::write(folder.path().join(PID), text).unwrap();
            assert_eq!(running(folder.path()), None);
        }
    }

    #[test]
    fn the_unit_quotes_what_systemd_would_expand() {
        let text = unit(&["/opt/a b".into(), "x%i$y\"z".into()]);
        assert!(
            text.contains("ExecStart=\"/opt/a b\" \"x%%i$$y\\\"z\"\n"),
            "{text}"
        );
    }
}
