//! The session with the server: as its administrator, over its real port.
//!
//! Invariant: the password is sent to the server that has this folder's authority, and to no other.

use super::server::DATA;
use crate::commands::{self, text};
use anyhow::{Context, bail};
use enrol::HttpError;
use enrol::http::{Client, Server};
use serde_json::{Map, Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// A client that believes only the server of this folder.
pub fn client(folder: &Path, address: SocketAddr) -> anyhow::Result<Client> {
    let authority = tls::files::certificates(&folder.join(DATA).join(msa::authority::CERTIFICATE))?;
    let trust = tls::Trust::new(&authority, None)?;
    let config = tls::client_config(&tls::provider::ring(), None, &trust, &[tls::Role::Msa])?;
    let server = Server::new(address.ip().to_string(), address.port());
    Ok(Client::new(server, Arc::new(config)))
}

/// Logs in.
pub fn log_in(
    folder: &Path,
    address: SocketAddr,
    admin: &str,
    password: &str,
) -> anyhow::Result<Client> {
    let mut client = client(folder, address)?;
    let login = json!({"name": admin, "password": password});
    let answer = client
        .call("POST", "/login", Some(&login))
        .with_context(|| {
            format!("cannot log in as {admin}: give the password by --password-file")
        })?;
    client.token = Some(text(&answer, "token").to_owned());
    Ok(client)
}

/// All of a list.
fn all(client: &Client, path: &str) -> anyhow::Result<Vec<Value>> {
    let (mut found, mut after) = (Vec::new(), 0);
    loop {
        let part = client.call("GET", &format!("{path}?limit=200&after={after}"), None)?;
        let items = part.get("items").and_then(Value::as_array);
        found.extend(items.into_iter().flatten().cloned());
        match part.get("next").and_then(Value::as_i64) {
            Some(next) => after = next,
            None => return Ok(found),
        }
    }
}

/// Removes one; it may be gone already.
fn remove(client: &Client, path: &str) -> anyhow::Result<()> {
    match client.send("DELETE", path, None) {
        Ok(_) | Err(HttpError::Refused { status: 404, .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Registers a vCenter, unless one has the name, and keeps its login; its id.
pub fn register(client: &Client, new: &Value, login: &Value) -> anyhow::Result<String> {
    let known = all(client, "/vcenters")?;
    let found = known
        .iter()
        .find(|one| text(one, "name") == text(new, "name"));
    let id = match found {
        Some(one) => text(one, "id").to_owned(),
        None => text(&client.call("POST", "/vcenters", Some(new))?, "id").to_owned(),
    };
    client.send("PUT", &format!("/vcenters/{id}/login"), Some(login))?;
    Ok(id)
}

/// The same of the vCenter of a name, if there is one.
pub fn unregister_named(client: &Client, name: &str) -> anyhow::Result<()> {
    let known = all(client, "/vcenters")?;
    match known.iter().find(|one| text(one, "name") == name) {
        Some(one) => unregister(client, text(one, "id")),
        None => Ok(()),
    }
}

/// Removes a vCenter, with its clusters, their hosts and machines.
pub fn unregister(client: &Client, vcenter: &str) -> anyhow::Result<()> {
    let of = |path: &str, column: &str, id: &str| -> anyhow::Result<Vec<String>> {
        let all = all(client, path)?.into_iter();
        let fitting = all.filter(|one| text(one, column) == id);
        Ok(fitting.map(|one| text(&one, "id").to_owned()).collect())
    };
    for cluster in of("/clusters", "vcenter_id", vcenter)? {
        for path in ["/vms", "/hosts"] {
            for id in of(path, "cluster_id", &cluster)? {
                remove(client, &format!("{path}/{id}"))?;
            }
        }
        remove(client, &format!("/clusters/{cluster}"))?;
    }
    remove(client, &format!("/vcenters/{vcenter}"))
}

/// Clusters on which the component is, or half.
pub fn clusters(client: &Client) -> anyhow::Result<Vec<String>> {
    let all = all(client, "/clusters")?.into_iter();
    let on = all.filter(|one| text(one, "state") != "disabled");
    Ok(on.map(|one| text(&one, "name").to_owned()).collect())
}

/// Gives the server a package, unless it has these bytes.
pub fn upload(client: &Client, bytes: &[u8]) -> anyhow::Result<()> {
    let sha256 = msa::secret::sha256(bytes);
    let known = all(client, "/packages")?;
    if !known.iter().any(|one| text(one, "sha256") == sha256) {
        client.send_bytes("POST", "/packages", "application/octet-stream", bytes)?;
    }
    Ok(())
}

/// What is carried out.
pub struct Wish<'a> {
    /// What its name begins with.
    pub prefix: &'a str,
    pub kind: &'a str,
    pub cluster: &'a str,
    pub more: Map<String, Value>,
    pub timeout_s: u32,
}

/// Has the server carry something out, and shows its output; goes on with one that was asked for before.
pub fn carry(client: &Client, wish: &Wish<'_>) -> anyhow::Result<ExitCode> {
    let open = all(client, "/executions")?.into_iter().find(|one| {
        let is_ours = text(one, "name").starts_with(wish.prefix) && text(one, "kind") == wish.kind;
        let of = one
            .get("parameters")
            .map_or("", |p| text(p, "protected_cluster"));
        is_ours && of == wish.cluster && one.get("ended_at_ms").is_none_or(Value::is_null)
    });
    let id = match open {
        Some(one) => text(&one, "id").to_owned(),
        None => {
            let ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
            let mut parameters = wish.more.clone();
            parameters.insert("protected_cluster".into(), json!(wish.cluster));
            let asked = json!({
                "name": format!("{}{ms}", wish.prefix), "kind": wish.kind,
                "parameters": parameters, "timeout_s": wish.timeout_s, "retention_days": 60,
            });
            text(&client.call("POST", "/executions", Some(&asked))?, "id").to_owned()
        }
    };
    let ended = commands::follow(client, &id)?;
    match text(&ended, "state") {
        "succeeded" => commands::failed_hosts(client, wish.kind),
        state => bail!("{} is {state}: {}", wish.kind, text(&ended, "error")),
    }
}
