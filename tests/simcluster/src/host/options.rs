//! A host's advanced options: what vCenter sets by name, and the host's own command shows.
//!
//! Invariant: options are a file in the root, a line each; without options there is no file.

use super::Host;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const FILE: &str = "etc/vmware/options.conf";
/// Options of a host, and the length of a value.
const MAX_OPTIONS: usize = 256;
const MAX_VALUE_BYTES: usize = 16 << 10;

fn read(path: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(" = "));
    pairs
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

impl Host {
    fn options_path(&self) -> PathBuf {
        self.root().join(FILE)
    }

    /// The options, by name.
    pub fn options(&self) -> BTreeMap<String, String> {
        read(&self.options_path())
    }

    /// Sets an option; an empty value takes it away.
    pub fn set_option(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let known = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
        if key.is_empty() || key.len() > 128 || !key.bytes().all(known) {
            anyhow::bail!("`{}` is no option's name", key.escape_default());
        }
        if value.len() > MAX_VALUE_BYTES || value.chars().any(char::is_control) {
            anyhow::bail!("{key} takes one line of at most {MAX_VALUE_BYTES} bytes");
        }
        let _one = self.work.lock();
        let mut options = self.options();
        match value.is_empty() {
            true => options.remove(key),
            false => options.insert(key.to_owned(), value.to_owned()),
        };
        if options.len() > MAX_OPTIONS {
            anyhow::bail!("a host has {MAX_OPTIONS} options");
        }
        let path = self.options_path();
        if options.is_empty() {
            if path.exists() {
                fs::remove_file(path)?;
            }
            return Ok(());
        }
        let line = |(key, value): (&String, &String)| format!("{key} = {value}\n");
        let text: String = options.iter().map(line).collect();
        let new = path.with_extension("new");
        fs::write(&new, text)?;
        Ok(fs::rename(new, path)?)
    }
}
