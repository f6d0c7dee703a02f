//! Who is let in, and for what: real processes, a real authority, and what each refusal says and changes.
#![allow(clippy::unwrap_used)]

#[path = "security/server_hangs.rs"]
mod server_hangs;
#[path = "security/site.rs"]
mod site;
mod support;

use filter_core::wire::{
    Hello, Message, OpenLane, PROTOCOL_NEWEST, PROTOCOL_OLDEST, PeerRole, PortRole,
};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use site::{Site, in_days, issue, said, wait, wait_said};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use support::{Part, Stack, client, ok};
use tls::{Folder, Identity, Own, Role, Trust};
use uuid::Uuid;

fn write(stack: &Stack, pattern: u8, at: &str) {
    let mut io = client("qemu-io");
    io.args(["-f", "raw", "-c", &format!("write -P {pattern} {at} 1M")]);
    ok(io.arg(stack.uri("d0")).output());
}

fn received(stack: &Stack) -> u64 {
    let domain = stack.domain();
    domain["disks"][0]["received_seq"].as_u64().unwrap_or(0)
}

#[test]
fn a_host_that_enrols_by_itself_streams_until_it_is_revoked_and_again_when_it_enrols_anew() {
    let mut site = Site::start();
    let (vm, _) = site.assigned_vm(0, "web");
    let folder = site.prepared(0);
    let mut stack = site.stack_with_drva(&folder, &vm);
    stack.start_daemon();
    stack.start_vm();
    write(&stack, 7, "0");
    stack.recover_and_compare("by-certificate");
    assert!(!folder.token().exists(), "a token is used once");
    // The management server is away, and everything is started again: it goes on.
    site.msa.take().unwrap().kill();
    for part in [&mut stack.drva, &mut stack.daemon] {
        part.take().unwrap().kill();
    }
    stack.start_drva();
    stack.start_daemon();
    write(&stack, 8, "1M");
    stack.recover_and_compare("without-msa");
    site.restart_msa();
    // The connections that stand are cut, and new ones refused.
    let own = folder.files().own().unwrap();
    let serial = tls::identity::serial_of(&own.chain[0]).unwrap();
    let serial = msa::secret::hex(&serial);
    let (drva, daemon) = (stack.log("drva"), stack.log("filterd"));
    let path = format!("/certificates/{serial}/revoke");
    site.call("POST", &path, json!({"reason": "the host was stolen"}));
    let host = &site.hosts[0];
    wait_said(
        &drva,
        &format!("jetdr://host/{host} is ended: its certificate was revoked"),
        0,
    );
    wait_said(&daemon, "refuses this end's certificate: it was revoked", 0);
    stack.wait("no lane is attached", |stack| {
        stack.domain()["disks"][0]["connected"] == false
    });
    let before = received(&stack);
    write(&stack, 9, "2M");
    wait_said(
        &drva,
        "the certificate of the host is refused: it was revoked",
        2,
    );
    assert_eq!(received(&stack), before, "nothing of it was taken");
    // With a new certificate it is the same host.
    std::fs::write(folder.token(), site.token("host", host)).unwrap();
    stack.recover_and_compare("enrolled-anew");
    stack.assert_contract();
}

#[test]
fn a_host_speaks_for_the_machines_of_its_cluster_and_no_others() {
    let site = Site::start();
    let (vm, vm_id) = site.assigned_vm(0, "web");
    let (other_vm, _) = site.assigned_vm(1, "other");
    let mut stack = site.stack_with_drva(&site.prepared(0), &vm);
    stack.start_daemon();
    stack.start_vm();
    write(&stack, 7, "0");
    stack.recover_and_compare("assigned");
    let drva = stack.log("drva");
    // A host of another cluster calls itself the machine's.
    let folder = site.enrol("host", &site.hosts[1]);
    let mut other = site.stack(&folder, &vm);
    other.start_daemon();
    other.start_vm();
    wait_said(&drva, "it is no host of its cluster", 0);
    wait_said(&other.log("filterd"), "may not speak for VM", 0);
    other.vm.take().unwrap().kill();
    other.daemon.take().unwrap().kill();
    // It knows the machine's disk, and calls it one of its own machine, with an epoch above all others.
    let shown = |domain: &Value| {
        let disk = &domain["disks"][0];
        let figure = |name: &str| disk[name].clone();
        ["uuid", "vm", "received_seq", "attach_epoch"].map(figure)
    };
    let before = shown(&stack.domain());
    let disk: Uuid = before[0].as_str().unwrap().parse().unwrap();
    let own = folder.files().own().unwrap();
    let trust = Trust::new(&tls::files::certificates(&site.ca()).unwrap(), None).unwrap();
    let knock = |disk: Uuid, vm: &str| {
        let vm: Uuid = vm.parse().unwrap();
        let role = PortRole::of_disk(disk.as_bytes());
        let visit = Visit {
            port: site.port_base,
            role,
            to: Identity::new(Role::Drva, site.drva.parse().unwrap()),
            host: site.hosts[1].parse().unwrap(),
            more: vec![opening(disk, vm)],
        };
        visit.knock(Some(&own), &trust).unwrap()
    };
    let answer = knock(disk, &other_vm);
    let refusal = format!("may not speak for VM {vm}");
    assert!(answer.contains(&refusal), "{answer:?}");
    assert!(knock(disk, &vm).contains(&refusal));
    assert_eq!(shown(&stack.domain()), before, "nothing has changed");
    // A disk of its own machine it may open.
    let answer = knock(Uuid::new_v4(), &other_vm);
    assert!(!answer.contains("may not"), "{answer:?}");
    assert_eq!(stack.domain()["disks"].as_array().unwrap().len(), 2);
    // What is not assigned any more is closed while it is open, and comes back when it is again.
    stack.settle();
    let before = said(&drva, "is closed: VM");
    site.assign(&vm_id, Value::Null);
    wait_said(&drva, "is closed: VM", before);
    write(&stack, 9, "2M");
    site.assign(&vm_id, json!(site.domain));
    stack.settle();
    stack.assert_contract();
}

/// A lane of a disk, as a daemon presents it.
fn opening(disk: Uuid, vm: Uuid) -> Message {
    Message::OpenLane(OpenLane {
        disk_id: disk.into_bytes(),
        vm_id: vm.into_bytes(),
        attach_epoch: 1000,
        again: false,
        attach_id: 7,
        map_generation: 1000,
        lineage: Box::default(),
        durable_seq: 0,
        capacity_bytes: 16 << 20,
        base: Some(0),
        domain: support::DOMAIN.into(),
        vm_name: "mine".into(),
        disk_label: "d0".into(),
    })
}

/// Somebody who comes to a port of the appliance.
struct Visit {
    port: u64,
    role: PortRole,
    /// The appliance.
    to: Identity,
    /// As whom it comes, in its hello.
    host: Uuid,
    /// What it says then.
    more: Vec<Message>,
}

impl Visit {
    /// What the appliance says after the handshake, up to the end.
    fn knock(&self, own: Option<&Own>, trust: &Trust) -> Result<String, String> {
        self.stay(own, trust, || {})
    }

    /// The same of a visitor who only leaves after something.
    fn stay(
        &self,
        own: Option<&Own>,
        trust: &Trust,
        meanwhile: impl FnOnce(),
    ) -> Result<String, String> {
        let provider = tls::provider::ring();
        let config = tls::client_config(&provider, own, trust, &[Role::Drva]).unwrap();
        let name = self.to.server_name().unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let port = self.port as u16 + self.role.offset();
        let socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
        socket.set_read_timeout(Some(support::LIMIT)).unwrap();
        let mut stream = StreamOwned::new(connection, socket);
        let hello = Hello {
            oldest: PROTOCOL_OLDEST,
            newest: PROTOCOL_NEWEST,
            role: PeerRole::Daemon,
            port_offset: self.role.offset() as u8,
            peer_id: self.host.into_bytes(),
            incarnation: 1,
            name: "knocking".into(),
        };
        let mut bytes = Message::Hello(hello).encode(0);
        for message in &self.more {
            bytes.extend(message.encode(1));
        }
        let sent = stream.write_all(&bytes);
        meanwhile();
        stream.conn.send_close_notify();
        let sent = sent.and_then(|()| stream.flush());
        let mut came = Vec::new();
        let read = stream.read_to_end(&mut came);
        match (read, sent) {
            _ if !came.is_empty() => Ok(String::from_utf8_lossy(&came).into_owned()),
            (Err(error), _) | (Ok(_), Err(error)) => Err(error.to_string()),
            (Ok(_), Ok(())) => Err("nothing came".into()),
        }
    }
}

#[test]
fn who_is_not_a_host_of_this_site_is_refused_told_why_and_changes_nothing() {
    let site = Site::start();
    let (vm, _) = site.assigned_vm(0, "web");
    let stack = site.stack_with_drva(&site.prepared(0), &vm);
    let drva = stack.log("drva");
    let authority = site.authority();
    let trust = Trust::new(&tls::files::certificates(&site.ca()).unwrap(), None).unwrap();
    let appliance = Identity::new(Role::Drva, site.drva.parse().unwrap());
    let host: Uuid = site.hosts[0].parse().unwrap();
    let host_identity = Identity::new(Role::Host, host);
    let visit = |host| Visit {
        port: site.port_base,
        role: PortRole::Control,
        to: appliance,
        host,
        more: Vec::new(),
    };
    let elsewhere = tempfile::tempdir().unwrap();
    let stranger = msa::authority::Authority::make(elsewhere.path(), in_days(0)).unwrap();
    let cases: [(&str, Option<Own>, &str); 6] = [
        ("no certificate", None, "showed no certificate"),
        (
            "another authority",
            Some(issue(&stranger, host_identity, in_days(0)).0),
            "another authority issued it",
        ),
        (
            "expired",
            Some(issue(&authority, host_identity, in_days(-91)).0),
            "it has expired",
        ),
        (
            "not yet valid",
            Some(issue(&authority, host_identity, in_days(2)).0),
            "it is not valid yet",
        ),
        (
            "an appliance's",
            Some(issue(&authority, appliance, in_days(0)).0),
            "is not host",
        ),
        (
            "an operator's",
            Some(issue(&authority, Identity::new(Role::Operator, host), in_days(0)).0),
            "is not host",
        ),
    ];
    for (what, own, why) in &cases {
        let before = said(&drva, why);
        let refused = visit(host).knock(own.as_ref(), &trust);
        assert!(refused.is_err(), "{what}: {refused:?}");
        wait_said(&drva, why, before);
    }
    // A host that calls itself another.
    let own = issue(&authority, host_identity, in_days(0)).0;
    let other: Uuid = site.hosts[1].parse().unwrap();
    let answer = visit(other).knock(Some(&own), &trust).unwrap();
    assert!(answer.contains("the hello names host"), "{answer:?}");
    // One whose time is over while it stands.
    let soon_ms = in_days(-90) + 4000;
    let own = issue(&authority, host_identity, soon_ms).0;
    let over = format!("{host_identity} is ended: its certificate has expired");
    let _ = visit(host).stay(Some(&own), &trust, || wait_said(&drva, &over, 0));
    assert_eq!(said(&drva, &over), 1);
    // Who waits and says nothing, and who talks nonsense.
    let mut nonsense = TcpStream::connect(("127.0.0.1", site.port_base as u16 + 1)).unwrap();
    nonsense.write_all(&[0x16, 3, 1, 0xff, 0xff, 0]).unwrap();
    nonsense.write_all(&[7; 70_000]).unwrap();
    nonsense.set_read_timeout(Some(support::LIMIT)).unwrap();
    let _ = nonsense.read_to_end(&mut Vec::new());
    assert!(stack.domain().is_null(), "{}", stack.domain());
    assert!(
        !stack
            .dir
            .path()
            .join("store")
            .join(support::DOMAIN)
            .exists()
    );
}

/// An appliance that shows this certificate on its control port; what becomes of who dials.
fn pretend(port: u64, own: &Own, trust: &Trust) -> std::thread::JoinHandle<Result<(), String>> {
    let provider = tls::provider::ring();
    let peers = tls::Peers::Only(&[Role::Host]);
    let config = tls::server_config(&provider, own, trust, peers).unwrap();
    let listener = TcpListener::bind(("127.0.0.1", port as u16)).unwrap();
    std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(support::LIMIT)).unwrap();
        let connection = ServerConnection::new(Arc::new(config)).unwrap();
        let mut stream = StreamOwned::new(connection, socket);
        let mut hello = [0; 32];
        stream
            .read_exact(&mut hello)
            .map_err(|error| error.to_string())
    })
}

#[test]
fn a_daemon_tells_nothing_to_who_is_not_its_appliance() {
    let site = Site::start();
    let folder = site.enrol("host", &site.hosts[0]);
    let trust = Trust::new(&tls::files::certificates(&site.ca()).unwrap(), None).unwrap();
    let authority = site.authority();
    let appliance = Identity::new(Role::Drva, site.drva.parse().unwrap());
    let elsewhere = tempfile::tempdir().unwrap();
    let stranger = msa::authority::Authority::make(elsewhere.path(), in_days(0)).unwrap();
    let other = Identity::new(Role::Drva, Uuid::from_u128(9));
    let host = Identity::new(Role::Host, appliance.id);
    for (what, own, why) in [
        (
            "another authority",
            issue(&stranger, appliance, in_days(0)).0,
            "another authority issued it",
        ),
        (
            "expired",
            issue(&authority, appliance, in_days(-91)).0,
            "it has expired",
        ),
        (
            "another appliance",
            issue(&authority, other, in_days(0)).0,
            "it is another's than the one that was dialled",
        ),
        (
            "a host's",
            issue(&authority, host, in_days(0)).0,
            "it is another's than the one that was dialled",
        ),
    ] {
        let ended = pretend(site.port_base, &own, &trust);
        let mut stack = Stack::new(&[]);
        stack.port_base = site.port_base;
        stack.daemon_security = site.daemon_security(&folder);
        stack.start_daemon();
        wait_said(
            &stack.log("filterd"),
            &format!("the certificate of the appliance is refused: {why}"),
            0,
        );
        let got = ended.join().unwrap();
        assert!(got.is_err(), "{what}: it was told a hello");
    }
}

#[test]
fn plain_text_and_tls_do_not_mix_and_both_ends_say_so() {
    let site = Site::start();
    let (vm, _) = site.assigned_vm(0, "web");
    // A plain daemon and an appliance with certificates.
    let mut stack = site.stack_with_drva(&site.prepared(0), &vm);
    stack.daemon_security = vec![support::PLAIN.into()];
    stack.start_daemon();
    wait_said(&stack.log("drva"), "the host does not speak TLS", 0);
    wait_said(
        &stack.log("filterd"),
        "the appliance speaks TLS, and this daemon does not",
        0,
    );
    assert!(stack.domain().is_null());
    // The other way round.
    let mut plain = Stack::new(&[]);
    plain.start_drva();
    let folder = site.enrol("host", &site.hosts[0]);
    plain.daemon_security = site.daemon_security(&folder);
    plain
        .daemon_security
        .push(format!("--drva-id={}", site.drva));
    plain.start_daemon();
    wait_said(&plain.log("filterd"), "the appliance does not speak TLS", 0);
    wait_said(
        &plain.log("drva"),
        "the host speaks TLS, and this appliance was started with",
        0,
    );
}

#[test]
fn without_a_word_about_security_nothing_starts() {
    let refused = |stack: &Stack, arguments: &[&str]| {
        let mut words: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        if words[0] == "drva" {
            words.extend(support::flag("--data-dir", &stack.dir.path().join("data")));
            words.extend(["--store".into(), stack.store.clone()]);
        } else {
            words.extend(support::flag("--run-dir", stack.run.path()));
        }
        Part::try_start(&stack.log("refused"), &words)
            .err()
            .unwrap()
    };
    let stack = Stack::new(&[]);
    let folder = stack.dir.path().join("tls").display().to_string();
    for part in ["drva", "filterd"] {
        let said = refused(&stack, &[part]);
        assert!(said.contains("--insecure-plain-text"), "{said}");
    }
    let said = refused(&stack, &["drva", "--tls-dir", &folder]);
    assert!(said.contains("--assign any"), "{said}");
    let said = refused(&stack, &["drva", "--tls-dir", &folder, "--assign", "any"]);
    assert!(said.contains("holds no certificate"), "{said}");
    for words in [
        &["drva", "--tls-dir", &folder, "--insecure-plain-text"][..],
        &["drva", "--insecure-plain-text", "--assign", "any"],
        &["filterd", "--tls-dir", &folder, "--insecure-plain-text"],
        &["filterd", "--insecure-plain-text", "--msa", "https://msa"],
    ] {
        refused(&stack, words);
    }
    assert!(!Path::new(&folder).join("identity.pem").exists());
}

/// Without a management server: a file says who may speak for what, and a change of it counts.
#[test]
fn assignments_of_a_file_are_followed() {
    let site = Site::start();
    let vm = Uuid::new_v4().to_string();
    let document = |hosts: &[&str]| {
        json!({"clusters": [{"id": site.clusters[0], "hosts": hosts}],
            "domains": [{"name": support::DOMAIN, "vms": [{"uuid": vm, "cluster": site.clusters[0]}]}]})
    };
    let folder = site.enrol("host", &site.hosts[0]);
    let mut stack = site.stack(&folder, &vm);
    let file = stack.dir.path().join("assignments.json");
    let put = |document: &Value| {
        let new = file.with_extension("new");
        std::fs::write(&new, document.to_string()).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    put(&document(&[]));
    let own = site.enrol("drva", &site.drva);
    stack.drva_security = support::flag("--tls-dir", own.path()).into();
    stack
        .drva_security
        .extend(support::flag("--assignments", &file));
    stack
        .daemon_security
        .push(format!("--drva-id={}", site.drva));
    stack.start_drva();
    stack.start_daemon();
    stack.start_vm();
    let drva = stack.log("drva");
    wait_said(&drva, "it is no host of its cluster", 0);
    put(&document(&[&site.hosts[0]]));
    write(&stack, 7, "0");
    stack.recover_and_compare("named");
    // A host that has nothing to do with the domain is not asked, and learns nothing of it.
    let trust = Trust::new(&tls::files::certificates(&site.ca()).unwrap(), None).unwrap();
    let other = site.enrol("host", &site.hosts[1]).files().own().unwrap();
    let visit = Visit {
        port: site.port_base,
        role: PortRole::Control,
        to: Identity::new(Role::Drva, site.drva.parse().unwrap()),
        host: site.hosts[1].parse().unwrap(),
        more: Vec::new(),
    };
    let heard = visit.stay(Some(&other), &trust, || {
        stack.cut("unheard");
    });
    let heard = heard.unwrap();
    assert!(!heard.contains(support::DOMAIN), "{heard:?}");
    // What cannot be read changes nothing.
    std::fs::write(&file, "{").unwrap();
    wait_said(&drva, "assignments are not taken, the old ones stay", 0);
    write(&stack, 8, "1M");
    stack.recover_and_compare("stays");
}

/// A certificate of which less than a third is left is renewed, and the connection that stands goes on.
#[test]
fn certificates_are_renewed_while_the_disks_stream() {
    let site = Site::start();
    let (vm, _) = site.assigned_vm(0, "web");
    let folder = site.enrol("host", &site.hosts[0]);
    let mut stack = site.stack_with_drva(&folder, &vm);
    stack.start_daemon();
    stack.start_vm();
    stack.settle();
    let before = folder.files().own().unwrap().chain;
    let connected = said(&stack.log("filterd"), "connection to the appliance");
    // As if most of its time were over: the server knows it, since it issued it.
    let renewed = enrol::steps::renew(&folder, &site.server).unwrap();
    assert!(renewed.until_s > enrol::steps::now_s());
    wait_said(&stack.log("filterd"), "are in force", 1);
    assert_ne!(folder.files().own().unwrap().chain, before);
    write(&stack, 7, "0");
    stack.recover_and_compare("renewed");
    assert_eq!(
        said(&stack.log("filterd"), "connection to the appliance"),
        connected
    );
    wait(
        "the appliance still has the host's control connection",
        || stack.domain()["hosts"][0]["connected"] == true,
    );
    // An appliance that was revoked gets nothing more.
    let drva = Folder::at(site.dir.path().join(format!("tls-drva-{}", site.drva)));
    let drva = drva.files().own().unwrap();
    let serial = tls::identity::serial_of(&drva.chain[0]).unwrap();
    let path = format!("/certificates/{}/revoke", msa::secret::hex(&serial));
    site.call("POST", &path, json!({"reason": "stolen"}));
    let daemon = stack.log("filterd");
    wait_said(&daemon, "the appliance's certificate was revoked", 0);
    wait_said(
        &daemon,
        "the certificate of the appliance is refused: it was revoked",
        0,
    );
}

/// The management server names another appliance: the daemon leaves the one that it has.
#[test]
fn a_host_goes_to_the_appliance_that_it_is_told() {
    let site = Site::start();
    let (vm, _) = site.assigned_vm(0, "web");
    let mut stack = site.stack_with_drva(&site.prepared(0), &vm);
    stack.start_daemon();
    stack.start_vm();
    write(&stack, 7, "0");
    stack.recover_and_compare("at-first");
    let other = json!({"name": "dr2", "address": "127.0.0.1", "port_base": 1});
    let other = site.call("POST", "/drvas", other)["id"].clone();
    let path = format!("/hosts/{}/appliance", site.hosts[0]);
    site.call("PUT", &path, json!({"drva_id": other}));
    wait_said(
        &stack.log("filterd"),
        "this host was assigned to another appliance",
        0,
    );
    wait_said(
        &stack.log("filterd"),
        "connection to the appliance at 127.0.0.1:1:",
        0,
    );
    stack.wait("no lane is attached", |stack| {
        stack.domain()["disks"][0]["connected"] == false
    });
    // The guest notices nothing of that, and what it wrote follows it back.
    write(&stack, 8, "1M");
    site.call("PUT", &path, json!({"drva_id": site.drva}));
    stack.recover_and_compare("back");
}
