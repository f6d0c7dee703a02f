//! The host's package by the command that makes it, and installed: its files in a root folder, its
//! daemon started by its init script, its library in a VM, a disk protected and recovered.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use support::{Stack, client, jetdr, ok};
use vib_packaging::{EntryKind, Limits, Policy, Trust, Vib};

const DATE: &str = "2026-01-31T12:00:00Z";
const ID: &str = "JetDR_bootbank_jetdr_0.1.0-1";

/// Library and daemon as a host gets them (`make host-objects`); without those, this build's own, which
/// need this machine's libc. In CI the former must be there.
fn objects() -> (PathBuf, PathBuf, bool) {
    let target = Path::new(env!("CARGO_BIN_EXE_jetdr"))
        .parent()
        .unwrap()
        .parent()
        .unwrap();
    let shipped = target.join("host-objects");
    let library = shipped.join("libvmiof-disk-jetdr.so");
    if library.exists() {
        return (library, shipped.join("iofilterd-jetdr"), true);
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "no {}: make host-objects",
        shipped.display()
    );
    eprintln!(
        "no {}: this build's own objects are packed (make host-objects)",
        shipped.display()
    );
    (
        target.join("debug/libvaio_shim.so"),
        target.join("debug/iofilterd-jetdr"),
        false,
    )
}

fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--help").output().is_ok();
    assert!(
        found || std::env::var_os("CI").is_none(),
        "{tool} is missing: scripts/bootstrap.sh test"
    );
    if !found {
        eprintln!("SKIPPED, {tool} is missing: scripts/bootstrap.sh test");
    }
    found
}

fn vib(arguments: &[&str]) -> Command {
    let mut command = jetdr();
    command
        .arg("vib")
        .args(arguments)
        .env_remove("SOURCE_DATE_EPOCH");
    command
}

fn build(out: &Path, more: &[&str]) -> PathBuf {
    let (library, daemon, _) = objects();
    let mut command = vib(&[
        "build",
        "--date",
        DATE,
        "--package-version",
        "0.1.0-1",
        "--library",
    ]);
    command
        .arg(library)
        .arg("--daemon")
        .arg(daemon)
        .arg("--out")
        .arg(out)
        .args(more);
    ok(command.output());
    out.join(format!("{ID}.vib"))
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn fails(command: &mut Command, told: &str) {
    let output = command.output().unwrap();
    assert!(
        !output.status.success() && said(&output).contains(told),
        "{command:?}: {}",
        said(&output)
    );
}

/// A key and a certificate for code that signs itself.
fn key_pair(folder: &Path) -> (String, String) {
    let (key, certificate) = (
        folder.join("key.pem").display().to_string(),
        folder.join("cert.pem").display().to_string(),
    );
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "30",
        "-subj",
        "/CN=packager",
    ]);
    openssl.args([
        "-addext",
        "keyUsage=critical,digitalSignature",
        "-addext",
        "extendedKeyUsage=codeSigning",
    ]);
    ok(openssl
        .args(["-keyout", &key, "-out", &certificate])
        .output());
    (key, certificate)
}

#[test]
fn the_same_inputs_give_the_same_package() {
    let folder = tempfile::tempdir().unwrap();
    let first = fs::read(build(&folder.path().join("a"), &[])).unwrap();
    // Another umask, time zone and time of the inputs.
    let (library, daemon, _) = objects();
    for (name, from) in [("lib", library), ("daemon", daemon)] {
        fs::copy(from, folder.path().join(name)).unwrap();
    }
    let line = "umask 077; exec \"$@\"";
    let mut again = Command::new("sh");
    again
        .args(["-c", line, "sh"])
        .arg(env!("CARGO_BIN_EXE_jetdr"));
    again.args([
        "vib",
        "build",
        "--package-version",
        "0.1.0-1",
        "--library",
        "lib",
        "--daemon",
        "daemon",
        "--out",
        "b",
    ]);
    // The same second, told another way.
    again
        .current_dir(folder.path())
        .env("TZ", "Asia/Tokyo")
        .env("SOURCE_DATE_EPOCH", "1769860800");
    ok(again.output());
    let second = folder.path().join("b").join(format!("{ID}.vib"));
    assert_eq!(
        fs::metadata(&second).unwrap().permissions().mode() & 0o777,
        0o644,
        "a web server may read it"
    );
    assert_eq!(fs::read(second).unwrap(), first);
    let tgz = fs::read(build(&folder.path().join("c"), &["--format", "tgz"])).unwrap();
    assert_ne!(tgz, first);
}

#[test]
fn a_package_is_inspected_verified_signed_and_bundled() {
    if !has("openssl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let package = build(folder.path(), &["--level", "partner", "--firewall", "both"]);
    let path = package.to_str().unwrap();
    let shown: serde_json::Value =
        serde_json::from_str(&ok(vib(&["inspect", "--json", path]).output())).unwrap();
    assert_eq!(
        (&shown["vib"]["id"], &shown["vib"]["acceptance_level"]),
        (&ID.into(), &"partner".into())
    );
    assert_eq!(
        shown["findings"].as_array().unwrap().len(),
        1,
        "only the signature: {shown}"
    );
    let entries = shown["vib"]["entries"].as_array().unwrap();
    assert!(
        entries
            .iter()
            .any(|e| e["path"] == "etc/init.d/iofilterd-jetdr" && e["mode"] == "0555"),
        "{shown}"
    );
    // Not signed: only a host that is forced takes it.
    fails(&mut vib(&["verify", path]), "signature-missing");
    ok(vib(&["verify", "--force", path]).output());
    let (key, certificate) = key_pair(folder.path());
    ok(vib(&["sign", path, "--key", &key, "--cert", &certificate]).output());
    ok(vib(&["verify", path, "--ca", &certificate]).output());
    fails(&mut vib(&["verify", path]), "signature-chain");
    fails(
        &mut vib(&[
            "verify",
            path,
            "--ca",
            &certificate,
            "--at",
            "2001-01-01T00:00:00Z",
        ]),
        "signature-time",
    );
    // Built with the key it is the same.
    let direct = build(
        &folder.path().join("direct"),
        &[
            "--level",
            "partner",
            "--firewall",
            "both",
            "--key",
            &key,
            "--cert",
            &certificate,
        ],
    );
    assert_eq!(fs::read(direct).unwrap(), fs::read(&package).unwrap());
    let out = folder.path().to_str().unwrap();
    ok(vib(&["bundle", path, "--out", out]).output());
    let bundle = folder.path().join("jetdr_0.1.0-1.zip");
    let bundle = bundle.to_str().unwrap();
    ok(vib(&["verify", bundle, "--ca", &certificate]).output());
    assert!(ok(vib(&["inspect", bundle]).output()).contains("bulletin          jetdr_0.1.0-1"));
    // One bit of the payload.
    let mut bytes = fs::read(&package).unwrap();
    let at = bytes.len() - 1000;
    bytes[at] ^= 1;
    fs::write(&package, bytes).unwrap();
    fails(&mut vib(&["verify", "--force", path]), "checksum-wrong");
    fails(&mut vib(&["bundle", path, "--out", out]), "checksum-wrong");
}

#[test]
fn what_an_operator_gets_wrong_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (library, daemon, _) = objects();
    let wrong = |more: &[&str], told: &str| {
        let mut command = vib(&["build", "--library"]);
        command
            .arg(&library)
            .arg("--daemon")
            .arg(&daemon)
            .arg("--out")
            .arg(folder.path());
        fails(command.args(more), told);
    };
    wrong(&[], "--date");
    wrong(&["--date", "yesterday"], "`yesterday` is no date");
    wrong(
        &["--date", DATE, "--package-version", "1.0"],
        "write <version>-<release>",
    );
    wrong(
        &["--date", DATE, "--level", "friend"],
        "certified, accepted, partner, community",
    );
    wrong(
        &["--date", DATE, "--firewall", "up"],
        "outbound, inbound, both",
    );
    wrong(&["--date", DATE, "--format", "zip"], "neither tgz nor vgz");
    wrong(&["--date", DATE, "--key", "k.pem"], "--cert");
    wrong(
        &["--date", DATE, "--key", "k.pem", "--cert", "c.pem"],
        "cannot read k.pem",
    );
    let none = folder.path().join("none.vib").display().to_string();
    fails(&mut vib(&["verify", &none]), "cannot read");
    fs::write(&none, "no package").unwrap();
    fails(
        &mut vib(&["verify", &none]),
        "it does not begin with `!<arch>`",
    );
    fails(&mut vib(&["inspect", &none]), "ar-magic");
    fails(&mut vib(&["sign", &none]), "give --key and --cert");
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        1,
        "something was written"
    );
}

/// The scripts that a host runs, and the objects that it loads.
#[test]
fn what_is_shipped_fits_an_old_host() {
    let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("vib-packaging/host");
    if has("shellcheck") {
        let mut check = Command::new("shellcheck");
        ok(check
            .args(["-s", "sh"])
            .arg(host.join("iofilterd-jetdr"))
            .arg(host.join("shutdown"))
            .output());
    }
    let (library, daemon, shipped) = objects();
    if !shipped || !has("objdump") {
        return;
    }
    for object in [library, daemon] {
        let symbols = ok(Command::new("objdump").arg("-T").arg(&object).output());
        let versions = symbols.split("GLIBC_").skip(1).filter_map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let mut numbers = rest[..end].split('.').map(|n| n.parse::<u32>().unwrap());
            Some((numbers.next()?, numbers.next()?))
        });
        let newest = versions.max().unwrap();
        assert!(
            newest <= (2, 17),
            "{} needs GLIBC {newest:?}",
            object.display()
        );
        let headers = ok(Command::new("objdump").arg("-p").arg(&object).output());
        let needed = headers
            .lines()
            .filter_map(|line| line.trim().strip_prefix("NEEDED"));
        for library in needed.map(str::trim) {
            let own = [
                "libc.so.6",
                "libm.so.6",
                "libpthread.so.0",
                "libdl.so.2",
                "librt.so.1",
                "ld-linux-x86-64.so.2",
            ];
            assert!(
                own.contains(&library),
                "{} needs {library}",
                object.display()
            );
        }
        println!(
            "{}: {} bytes, GLIBC {newest:?}",
            object.display(),
            fs::metadata(&object).unwrap().len()
        );
    }
}

/// What a host does with a package: all of it is looked at, then it is written below the root.
fn install(package: &Path, root: &Path) {
    let policy = Policy {
        trust: Trust::Unchecked,
        limits: Limits::default(),
    };
    let package = Vib::open("package", fs::read(package).unwrap(), &policy, true).unwrap();
    let write = |entry: &vib_packaging::Entry, body: &mut dyn Read| {
        let path = root.join(&entry.path);
        match entry.kind {
            EntryKind::Folder => fs::create_dir_all(path)?,
            EntryKind::File => {
                let mut file = fs::File::create_new(&path)?;
                std::io::copy(body, &mut file)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode))?;
            }
        }
        Ok(())
    };
    package.unpack(true, write).unwrap();
}

fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn an_installed_package_protects_a_disk() {
    for format in ["vgz", "tgz"] {
        let mut stack = Stack::new(&[("d0.raw", 16 << 20)]);
        stack.start_drva();
        let package = build(stack.dir.path(), &["--format", format]);
        let root = stack.run.path().join("root");
        install(&package, &root);
        let before = files(&root);
        let config = root.join("etc/config/jetdr/iofilterd.conf");
        fs::write(
            &config,
            format!(
                "drva = 127.0.0.1\nport-base = {}\ninsecure-plain-text = true\n",
                stack.port_base
            ),
        )
        .unwrap();
        let script = |verb: &str| {
            Command::new(root.join("etc/init.d/iofilterd-jetdr"))
                .arg(verb)
                .output()
        };
        ok(script("install"));
        // The stack's own run folder gives way to the installed daemon's.
        let mut arguments = stack.vm_arguments();
        let at = arguments
            .iter()
            .position(|argument| argument == "--run-dir")
            .unwrap();
        arguments[at + 1] = root.join("var/run/jetdr").display().to_string();
        arguments.extend(support::flag(
            "--filter-lib",
            &root.join("usr/lib64/vmware/plugin/libvmiof-disk-jetdr.so"),
        ));
        stack.vm = Some(support::Part::start(&stack.log("vm"), &arguments));
        let mut io = client("qemu-io");
        io.args([
            "-f",
            "raw",
            "-c",
            "write -P 7 0 8M",
            "-c",
            "write -P 8 9M 64k",
        ]);
        ok(io.arg(stack.uri("d0")).output());
        stack.recover_and_compare("installed");
        stack.assert_contract();
        let refused = script("remove").unwrap();
        assert!(
            said(&refused).contains("disks are open with the filter"),
            "{}",
            said(&refused)
        );
        // An upgrade under the running VM: its stream goes on.
        ok(script("upgrade"));
        let mut io = client("qemu-io");
        ok(io
            .args(["-f", "raw", "-c", "write -P 9 2M 4M"])
            .arg(stack.uri("d0"))
            .output());
        stack.recover_and_compare("upgraded");
        stack.vm.take().unwrap().stop();
        ok(script("remove"));
        assert_eq!(
            files(&root),
            before,
            "the removal left something, or took something"
        );
    }
}
