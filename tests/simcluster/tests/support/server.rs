//! A management server's folder: made, and told of the site's vCenter and packages.

use super::{PASSWORD, Site, USER};
use msa::inventory::{self, NewVcenter};
use msa::outside::{self, Login};
use msa::store::{Actor, Done, Store};
use msa::{cli, packages};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use sha2::Digest;
use std::path::Path;
use vib_packaging::component;

/// Makes it, as an operator would.
pub fn init(folder: &Path) {
    let password_file = folder.with_extension("password");
    std::fs::write(&password_file, "correct horse battery").unwrap();
    msa::run(&msa::Command::Init(cli::InitArgs {
        data_dir: folder.to_owned(),
        names: vec!["127.0.0.1".parse().unwrap()],
        admin: "admin".parse().unwrap(),
        password_file,
    }))
    .unwrap();
}

/// Registers the site's vCenter by its fingerprint, with its login.
pub fn register(store: &Store, folder: &Path, site: &Site) {
    let pem = site.server.certificate.as_bytes();
    let certificate = CertificateDer::from_pem_slice(pem).unwrap();
    let digest = sha2::Sha256::digest(certificate.as_ref());
    let fingerprint: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let address = site.server.address;
    let new: NewVcenter = serde_json::from_value(json!({
        "name": "vc1", "address": address.ip(), "port": address.port(),
        "fingerprint": fingerprint,
    }))
    .unwrap();
    let now_ms = store.now_ms();
    let made = store.change(&Actor::system(), "create vCenter", |t| {
        let made: inventory::Vcenter = inventory::create(t, &new, now_ms)?;
        Ok(Done::new(made.id, "vc1"))
    });
    let login = json!({"user": USER, "password": PASSWORD});
    let login: Login = serde_json::from_value(login).unwrap();
    outside::keep_login(folder, made.unwrap(), &login).unwrap();
}

/// Uploads the site's package.
pub fn upload(store: &Store, folder: &Path, site: &Site, version: &str) {
    upload_for(store, folder, site, version, component::MSA_PORT);
}

/// The same, for hosts that reach the server at this port.
pub fn upload_for(store: &Store, folder: &Path, site: &Site, version: &str, port: u16) {
    let vib = site.packager.package_for(version, port, |_| {});
    let package = packages::take(folder, vib, store.now_ms()).unwrap();
    let done = store.change(&Actor::system(), "upload package", |t| {
        packages::insert(t, &package)?;
        Ok(Done::new((), version))
    });
    done.unwrap();
}
