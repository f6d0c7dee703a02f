//! The invitation that the management server lays on a host: an advanced option, read by the host's own command.
//!
//! Invariant: the command has its time, and what it says a limit; nothing that it says is believed beyond the
//! text of the option.

use enrol::Invitations;
use enrol::invitation::MAX_BYTES;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The option, as the host's command names it. vCenter calls it `UserVars.JetdrEnrolment`.
const OPTION: &str = "/UserVars/JetdrEnrolment";
/// Before the option's text in what the command says.
const VALUE: &str = "String Value:";
/// How long the command may take: a real one takes about a second.
const LIMIT: Duration = Duration::from_secs(20);
const POLL_EVERY: Duration = Duration::from_millis(50);

/// An advanced option of this host.
#[derive(Debug)]
pub struct HostOption {
    esxcli: PathBuf,
}

impl HostOption {
    /// Read by this command.
    pub fn by(esxcli: &Path) -> Self {
        Self {
            esxcli: esxcli.to_owned(),
        }
    }

    /// Runs the command; what it printed.
    fn run(&self, arguments: &[&str]) -> io::Result<String> {
        let mut child = Command::new(&self.esxcli)
            .args(["system", "settings", "advanced"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let end = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() >= end {
                child.kill()?;
                child.wait()?;
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    self.said("does not end"),
                ));
            }
            std::thread::sleep(POLL_EVERY);
        };
        if !status.success() {
            return Err(io::Error::other(self.said(&format!("ended with {status}"))));
        }
        let mut text = Vec::new();
        if let Some(out) = child.stdout.take() {
            out.take(16 << 10).read_to_end(&mut text)?;
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn said(&self, what: &str) -> String {
        format!("{} {what}", self.esxcli.display())
    }
}

/// The option's text, from what the command said of it.
fn value_of(text: &str) -> Option<String> {
    let mut lines = text.lines().map(str::trim_start);
    let value = lines.find_map(|line| line.strip_prefix(VALUE))?.trim();
    let fits = !value.is_empty() && value.len() <= MAX_BYTES;
    fits.then(|| value.to_owned())
}

impl Invitations for HostOption {
    fn look(&mut self) -> io::Result<Option<String>> {
        let text = self.run(&["list", "-o", OPTION])?;
        Ok(value_of(&text))
    }

    fn clear(&mut self) -> io::Result<()> {
        // Back to its default, which is no text.
        self.run(&["set", "-d", "-o", OPTION]).map(drop)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A command of a host, by a script.
    fn host(dir: &Path, script: &str) -> HostOption {
        let path = dir.join("esxcli");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        HostOption::by(&path)
    }

    #[test]
    fn the_option_is_read_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut option = host(
            dir.path(),
            r#"echo "$*" >>"$0.called"
               printf '   Path: %s\n   Type: string\n   String Value: %s\n   Default String Value: \n' "$6" 'https://m pin token'"#,
        );
        let found = option.look().unwrap();
        assert_eq!(found.as_deref(), Some("https://m pin token"));
        option.clear().unwrap();
        let called = std::fs::read_to_string(dir.path().join("esxcli.called")).unwrap();
        let called: Vec<&str> = called.lines().collect();
        assert_eq!(
            called,
            [
                "system settings advanced list -o /UserVars/JetdrEnrolment",
                "system settings advanced set -d -o /UserVars/JetdrEnrolment",
            ]
        );
    }

    #[test]
    fn no_value_and_no_option_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let mut empty = host(dir.path(), "echo '   String Value: '");
        assert_eq!(empty.look().unwrap(), None);
        let mut long = host(dir.path(), "printf 'String Value: %02000d' 7");
        assert_eq!(long.look().unwrap(), None);
        let mut none = host(dir.path(), "echo 'no such option' >&2; exit 1");
        let said = none.look().unwrap_err().to_string();
        assert!(said.contains("esxcli ended with"), "{said}");
        let said = HostOption::by(&dir.path().join("missing")).look();
        assert_eq!(said.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
