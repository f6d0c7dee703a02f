//! A web server for packages: plain, and with TLS.

use parking_lot::Mutex;
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

type Files = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// Who fetched what.
type Visits = Arc<Mutex<Vec<(String, SocketAddr)>>>;

pub struct Web {
    plain: SocketAddr,
    tls: SocketAddr,
    files: Files,
    visits: Visits,
    /// Its certificate with TLS: PEM.
    pub certificate: String,
}

fn answer(stream: &mut (impl Read + Write), from: SocketAddr, files: &Files, visits: &Visits) {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    let _ = reader.read_line(&mut first);
    let mut line = String::from("-");
    while !line.trim().is_empty() {
        line.clear();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
    }
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let body = files.lock().get(&path).cloned();
    visits.lock().push((path, from));
    let (status, body) = match body {
        Some(body) => ("200 OK", body),
        None => ("404 Not Found", Vec::new()),
    };
    let stream = reader.into_inner();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body);
    let _ = stream.flush();
}

impl Web {
    pub fn start() -> Self {
        let (files, visits) = (Files::default(), Visits::default());
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let config = Arc::new(config);
        let (plain, tls) = (listener(), listener());
        let (plain_at, tls_at) = (plain.local_addr().unwrap(), tls.local_addr().unwrap());
        let (of, seen) = (files.clone(), visits.clone());
        std::thread::spawn(move || {
            for mut stream in plain.incoming().flatten() {
                let from = stream.peer_addr().unwrap();
                answer(&mut stream, from, &of, &seen);
            }
        });
        let (of, seen) = (files.clone(), visits.clone());
        std::thread::spawn(move || {
            for stream in tls.incoming().flatten() {
                let from = stream.peer_addr().unwrap();
                let connection = ServerConnection::new(config.clone()).unwrap();
                let mut stream = StreamOwned::new(connection, stream);
                answer(&mut stream, from, &of, &seen);
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        });
        Self {
            plain: plain_at,
            tls: tls_at,
            files,
            visits,
            certificate: made.cert.pem(),
        }
    }

    pub fn put(&self, path: &str, bytes: Vec<u8>) {
        self.files.lock().insert(path.into(), bytes);
    }

    pub fn get(&self, path: &str) -> Vec<u8> {
        self.files.lock().get(path).cloned().unwrap()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.plain)
    }

    pub fn tls_url(&self, path: &str) -> String {
        format!("https://{}{path}", self.tls)
    }

    /// The addresses from which a path was fetched.
    pub fn visitors(&self, path: &str) -> Vec<std::net::IpAddr> {
        let visits = self.visits.lock();
        let found = visits.iter().filter(|(visited, _)| visited == path);
        found.map(|(_, from)| from.ip()).collect()
    }
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}
