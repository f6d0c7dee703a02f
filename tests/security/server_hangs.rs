//! A management server that takes connections and never answers.

use super::Visit;
use super::site::{Site, said, wait_said};
use filter_core::wire::PortRole;
use serde_json::json;
use std::net::TcpListener;
use std::time::{Duration, Instant};
use tls::{Folder, Identity, Role, Trust};

/// A request to it ends after 20 s; who is revoked is cut off long before that.
#[test]
fn nobody_who_is_revoked_stays_because_the_server_hangs() {
    let site = Site::start();
    let (vm, _) = site.assigned_vm(0, "web");
    let hangs = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stack = site.stack(&site.prepared(0), &vm);
    let own: Folder = site.enrol("drva", &site.drva);
    stack.drva_security = super::support::flag("--tls-dir", own.path()).into();
    let msa = format!("--msa=https://{}", hangs.local_addr().unwrap());
    stack.drva_security.extend([msa, "--msa-poll-s=1".into()]);
    stack.start_drva();
    // It is asking now, and will be for a while.
    let _asks = hangs.accept().unwrap();
    let asked = Instant::now();
    let host = site.enrol("host", &site.hosts[0]).files().own().unwrap();
    let serial = tls::identity::serial_of(&host.chain[0]).unwrap();
    let trust = Trust::new(&tls::files::certificates(&site.ca()).unwrap(), None).unwrap();
    let visit = Visit {
        port: site.port_base,
        role: PortRole::Control,
        to: Identity::new(Role::Drva, site.drva.parse().unwrap()),
        host: site.hosts[0].parse().unwrap(),
        more: Vec::new(),
    };
    let drva = stack.log("drva");
    let cut = "is ended: its certificate was revoked";
    let _ = visit.stay(Some(&host), &trust, || {
        let path = format!("/certificates/{}/revoke", msa::secret::hex(&serial));
        site.call("POST", &path, json!({"reason": "stolen"}));
        // The list comes by hand meanwhile.
        let client = enrol::steps::client_of(&own, &site.server).unwrap();
        let list = client.send("GET", "/authority/revocation-list", None);
        own.write(&own.revocation_list(), &list.unwrap()).unwrap();
        wait_said(&drva, cut, 0);
    });
    assert_eq!(said(&drva, cut), 1);
    assert!(asked.elapsed() < Duration::from_secs(15), "it waited");
}
