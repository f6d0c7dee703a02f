//! A host's advanced options: what vCenter sets by name, and the host's own command defines, shows and sets.
//!
//! Invariant: options are a file in the root, a line each; without options there is no file. Only what was
//! defined can be set, and whoever changes them, vCenter or a command of the host, is alone meanwhile.

use super::Host;
use anyhow::bail;
use std::collections::BTreeMap;
use std::fs::{self, File};
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

/// Changes the options of a root.
fn change(
    root: &Path,
    work: impl FnOnce(&mut BTreeMap<String, String>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    // Beside the root: it is none of the host's files.
    let lock = File::create(root.with_file_name("options.lock"))?;
    lock.lock()?; // until it is dropped
    let path = root.join(FILE);
    let mut options = read(&path);
    work(&mut options)?;
    if options.len() > MAX_OPTIONS {
        bail!("a host has {MAX_OPTIONS} options");
    }
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

fn check_value(key: &str, value: &str) -> anyhow::Result<()> {
    if value.len() > MAX_VALUE_BYTES || value.chars().any(char::is_control) {
        bail!("{key} takes one line of at most {MAX_VALUE_BYTES} bytes");
    }
    Ok(())
}

/// What a command of the host says of its options.
#[derive(clap::Args, Clone, Debug)]
pub struct OptionArgs {
    /// The root.
    pub root: PathBuf,
    /// add, remove or set.
    pub verb: String,
    /// The option: its name below UserVars; with `set`, its path.
    #[arg(short = 'o')]
    pub option: String,
    /// With `add`: string.
    #[arg(short = 't')]
    pub kind: Option<String>,
    /// Its value.
    #[arg(short = 's', allow_hyphen_values = true)]
    pub value: Option<String>,
    /// With `add`: what it is; with `set`: back to its default, which is no text.
    #[arg(short = 'd', num_args = 0..=1)]
    pub description: Option<Option<String>>,
}

/// Carries it out.
pub fn command(args: &OptionArgs) -> anyhow::Result<()> {
    let known = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let is_name = |name: &str| !name.is_empty() && name.len() <= 100 && name.bytes().all(known);
    let name = match args.verb.as_str() {
        "set" => args.option.strip_prefix("/UserVars/").unwrap_or_default(),
        _ => &args.option,
    };
    if !is_name(name) {
        bail!("`{}` is no option's name", args.option.escape_default());
    }
    let key = format!("UserVars.{name}");
    let value = args.value.clone().unwrap_or_default();
    check_value(&key, &value)?;
    change(&args.root, |options| {
        match (args.verb.as_str(), options.contains_key(&key)) {
            ("add", true) => bail!("option {name} is defined already"),
            ("add", false) if args.kind.as_deref() != Some("string") => {
                bail!("an option is of type string")
            }
            ("add", false) | ("set", true) => drop(options.insert(key.clone(), value)),
            ("remove", true) => drop(options.remove(&key)),
            ("set" | "remove", false) => bail!("unable to find option {name}"),
            (verb, _) => bail!("`{verb}` is none of add, remove, set"),
        }
        Ok(())
    })
}

impl Host {
    fn options_path(&self) -> PathBuf {
        self.root().join(FILE)
    }

    /// The options, by name.
    pub fn options(&self) -> BTreeMap<String, String> {
        read(&self.options_path())
    }

    /// Sets an option that is defined.
    pub fn set_option(&self, key: &str, value: &str) -> anyhow::Result<()> {
        check_value(key, value)?;
        let _one = self.work.lock();
        change(&self.root(), |options| {
            match options.get_mut(key) {
                Some(known) => value.clone_into(known),
                None => bail!("no option {}", key.escape_default()),
            }
            Ok(())
        })
    }
}
