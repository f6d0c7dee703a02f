//! A fresh root: what a host has before any package is in it.

use super::Host;
use anyhow::Context;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const FOLDERS: [&str; 16] = [
    "bin",
    "etc/config",
    "etc/init.d",
    "etc/shutdown.d",
    "etc/vmware/firewall",
    "etc/vmware/service",
    "etc/vmware/ssl",
    "etc/vmware/vm-support",
    "opt",
    "usr/lib/vmware/iofilter/server/catalogs/en",
    "usr/lib/vmware/vmiof/disk",
    "usr/lib64/vmware/plugin",
    "var/db/esximg/vibs",
    "var/lib",
    "var/log",
    "var/run",
];

/// Of the host's own services: names are looked up, vCenter and shells come in, packages are fetched.
const RULES: &str = r#"<ConfigRoot>
  <service id="0000"><id>dns</id>
    <rule id="0000"><direction>outbound</direction><protocol>udp</protocol><porttype>dst</porttype><port>53</port></rule>
    <rule id="0001"><direction>outbound</direction><protocol>tcp</protocol><porttype>dst</porttype><port>53</port></rule>
    <enabled>true</enabled><required>false</required></service>
  <service id="0001"><id>sshServer</id>
    <rule id="0000"><direction>inbound</direction><protocol>tcp</protocol><porttype>dst</porttype><port>22</port></rule>
    <enabled>false</enabled><required>false</required></service>
  <service id="0002"><id>httpClient</id>
    <rule id="0000"><direction>outbound</direction><protocol>tcp</protocol><porttype>dst</porttype><port>80</port></rule>
    <rule id="0001"><direction>outbound</direction><protocol>tcp</protocol><porttype>dst</porttype><port>443</port></rule>
    <enabled>true</enabled><required>false</required></service>
</ConfigRoot>
"#;

/// The part of a host's own command that packages use.
const ESXCLI: &str = r#"#!/bin/sh
case "$*" in
    'network firewall refresh')
        exec @PROGRAM@ firewall-refresh @ROOT@ @RULES@
        ;;
    'system settings advanced list -o /'*)
        name=$(printf '%s' "${6#/}" | tr / .)
        if [ -f @ROOT@/etc/vmware/options.conf ]; then
            while IFS= read -r line; do
                case $line in "$name = "*)
                    printf '   Path: %s\n   Type: string\n   String Value: %s\n' "$6" "${line#* = }"
                    exit 0
                    ;;
                esac
            done <@ROOT@/etc/vmware/options.conf
        fi
        echo "Unable to find option $6" >&2
        exit 1
        ;;
    'system settings advanced add '* | 'system settings advanced set '* | 'system settings advanced remove '*)
        verb=$4
        shift 4
        exec @PROGRAM@ host-option @ROOT@ "$verb" "$@"
        ;;
esac
echo "esxcli: unknown: $*" >&2
exit 1
"#;

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

impl Host {
    /// Makes the root, in place of the one that was.
    pub(super) fn lay_root(&self) -> anyhow::Result<()> {
        let root = self.root();
        if root.exists() {
            fs::remove_dir_all(&root)
                .with_context(|| format!("cannot remove {}", root.display()))?;
        }
        for folder in FOLDERS {
            fs::create_dir_all(root.join(folder))?;
        }
        for folder in ["log", "machines"] {
            fs::create_dir_all(self.folder.join(folder))?;
        }
        self.forget_packages()?;
        fs::write(root.join("etc/vmware/firewall/service.xml"), RULES)?;
        // Whom the host trusts on the web: nobody, until somebody puts an authority there.
        fs::write(root.join("etc/vmware/ssl/castore.pem"), "")?;
        fs::write(
            root.join("etc/hosts"),
            format!("{} {}\n", self.address, self.name),
        )?;
        let words = [&self.tools.program.display().to_string()]
            .into_iter()
            .chain(&self.tools.prefix)
            .map(|word| quoted(word))
            .collect::<Vec<_>>();
        let script = ESXCLI
            .replace("@PROGRAM@", &words.join(" "))
            .replace("@ROOT@", &quoted(&root.display().to_string()))
            .replace("@RULES@", &quoted(&self.rules_path().display().to_string()));
        let path = root.join("bin/esxcli");
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o555))?;
        Ok(())
    }
}

/// Removes everything in a folder.
pub fn empty(folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let removed = match path.is_dir() && !path.is_symlink() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
