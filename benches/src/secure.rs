//! What TLS costs: the same pass over a disk, from the guest to the durable ack, with and without it.
//!
//! Invariant: the two differ in nothing but the flags of the daemon and of the appliance; the sides
//! alternate.

use crate::Settings;
use crate::path::{check_tools, fill};
use crate::report::Measurement;
use crate::stack::Speak;
use anyhow::Context;
use enrol::request::Request;
use msa::authority::{self, Authority};
use tempfile::TempDir;
use tls::{Folder, Identity, Role};
use uuid::Uuid;

/// An authority for one measurement, and the folders of both ends.
struct Site {
    /// How both ends are started.
    speak: Speak,
    _dir: TempDir,
}

fn part(dir: &TempDir, authority: &Authority, role: Role, id: Uuid) -> anyhow::Result<String> {
    let folder = Folder::at(dir.path().join(role.name()));
    folder.make()?;
    let now_ms = enrol::steps::now_s() * 1000;
    let made = Request::make()?;
    let request = authority::Request::parse(&made.request_pem)?;
    let issued = authority.issue(Identity::new(role, id), &request, now_ms)?;
    let both = format!("{}{}", made.key_pem, issued.pem());
    folder.write(&folder.authority(), authority.certificate_pem().as_bytes())?;
    folder.write(&folder.identity(), both.as_bytes())?;
    let list = authority.revocation_list(&[], 1, now_ms)?;
    folder.write(&folder.revocation_list(), &list)?;
    Ok(format!("--tls-dir={}", folder.path().display()))
}

impl Site {
    fn make() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("make a folder for certificates")?;
        let authority = Authority::make(dir.path(), enrol::steps::now_s() * 1000)?;
        let (drva, host) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let of_drva = part(&dir, &authority, Role::Drva, drva)?;
        let of_host = part(&dir, &authority, Role::Host, host)?;
        let speak = Speak {
            drva: vec![of_drva, "--assign=any".into()],
            daemon: vec![of_host, format!("--drva-id={drva}")],
        };
        Ok(Self { speak, _dir: dir })
    }
}

/// From the guest to the durable ack, with TLS beside plain text.
pub fn measure(settings: &Settings) -> anyhow::Result<Vec<Measurement>> {
    check_tools(&["fio"])?;
    let site = Site::make()?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let mut cpu = (Vec::new(), Vec::new());
    for _ in 0..settings.runs {
        let plain = fill(settings, &Speak::plain())?;
        let secure = fill(settings, &site.speak)?;
        without.push(plain.mb_per_second);
        with.push(secure.mb_per_second);
        cpu.0.push(secure.cpu_s);
        cpu.1.push(plain.cpu_s);
    }
    let line = |name: &str, unit, ours: &[f64], theirs: &[f64]| {
        Measurement::compared("tls", name, unit, ours, "plain text", theirs, None)
    };
    Ok(vec![
        line(
            "1 GiB in a row with TLS, guest to durable ack",
            "MB/s",
            &with,
            &without,
        ),
        line(
            "processor time of daemon and appliance for it",
            "s",
            &cpu.0,
            &cpu.1,
        ),
    ])
}
