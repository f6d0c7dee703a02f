//! The few requests that parts send to the management server: HTTP/1.1 over TLS 1.3, one a connection.
//!
//! Invariant: every wait has an end and every length a limit; an answer counts only if all of it came.

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::Value;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A request and its answer, from the connection on, take no longer; one with a large body as much longer as
/// a slow line needs for it.
const LIMIT: Duration = Duration::from_secs(20);
/// One read or write of it.
const STEP_LIMIT: Duration = Duration::from_secs(10);
/// What a slow line carries.
const SLOW_BYTES_S: u64 = 64 << 10;
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const MAX_HEAD_BYTES: usize = 32 << 10;
/// What the largest documents (revocation list, assignments) stay far below.
const MAX_BODY_BYTES: usize = 16 << 20;
/// What every path begins with.
const PREFIX: &str = "/api/v1";

/// Where the management server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    host: String,
    port: u16,
}

impl Server {
    /// From its address.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "https://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "https://{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}`: write https://NAME or https://NAME:PORT");
        let rest = text.strip_prefix("https://").ok_or_else(bad)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or_else(bad)?;
                (
                    host,
                    after
                        .strip_prefix(':')
                        .or(after.is_empty().then_some("443")),
                )
            }
            None => match rest.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (rest, Some("443")),
            },
        };
        let port = port.and_then(|port| port.parse().ok()).ok_or_else(bad)?;
        if host.is_empty() || ServerName::try_from(host).is_err() {
            return Err(bad());
        }
        Ok(Self::new(host, port))
    }
}

/// Why there is no answer, or none that helps.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nobody answers.
    #[error("the management server at {server} cannot be reached: {source}")]
    Unreachable {
        /// Where.
        server: String,
        /// Why.
        source: io::Error,
    },
    /// The two ends do not trust each other.
    #[error("{0}")]
    Tls(String),
    /// It is no answer.
    #[error("the management server's answer cannot be understood: {0}")]
    Answer(&'static str),
    /// It says no.
    #[error("the management server refuses ({status}): {detail}")]
    Refused {
        /// The answer's status.
        status: u16,
        /// Its words.
        detail: String,
    },
}

/// Fetches the authority's certificate (PEM), which is believed by its SHA-256 alone: who answers is not
/// asked, since nothing is known of the authority yet.
pub fn fetch_authority(server: &Server, sha256: &[u8; 32]) -> Result<Vec<u8>, HttpError> {
    let config = tls::config::unverified_client_config(&tls::provider::ring());
    let config = config.map_err(|error| HttpError::Tls(error.to_string()))?;
    let client = Client::new(server.clone(), Arc::new(config));
    let pem = client.send("GET", "/authority", None)?;
    let found = ring::digest::digest(&ring::digest::SHA256, &pem);
    match found.as_ref() == sha256 {
        true => Ok(pem),
        false => Err(HttpError::Answer(
            "its authority's certificate is not the one that was named (SHA-256): somebody else answers, or the authority has changed",
        )),
    }
}

/// A connection that ends at its time, whatever the other end does.
struct Timed {
    stream: TcpStream,
    end: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.end.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left.min(STEP_LIMIT))),
        }
    }
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(into)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends requests, with what `config` shows of this end.
#[derive(Clone)]
pub struct Client {
    server: Server,
    config: Arc<ClientConfig>,
    limit: Duration,
    /// `Authorization: Bearer`, for programs of users.
    pub token: Option<String>,
}

impl Client {
    /// For this server.
    pub fn new(server: Server, config: Arc<ClientConfig>) -> Self {
        Self {
            server,
            config,
            limit: LIMIT,
            token: None,
        }
    }

    fn failed(&self, source: io::Error) -> HttpError {
        if let Some(inner) = source.get_ref()
            && let Some(error) = inner.downcast_ref::<rustls::Error>()
        {
            return HttpError::Tls(tls::explain(error, "the management server"));
        }
        let source = match source.kind() {
            // As a socket says it: "Resource temporarily unavailable" would help nobody.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                io::Error::new(io::ErrorKind::TimedOut, "it does not answer in time")
            }
            _ => source,
        };
        HttpError::Unreachable {
            server: self.server.to_string(),
            source,
        }
    }

    fn connect(&self, end: Instant) -> io::Result<StreamOwned<ClientConnection, Timed>> {
        let Server { host, port } = &self.server;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host.as_str(), *port).to_socket_addrs()? {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match TcpStream::connect_timeout(&address, left.min(CONNECT_LIMIT)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    let stream = Timed { stream, end };
                    let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
                    let connection = ClientConnection::new(self.config.clone(), name);
                    let connection = connection.map_err(io::Error::other)?;
                    return Ok(StreamOwned::new(connection, stream));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Sends one request (`path` below `/api/v1`); the body of an answer that says yes.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Vec<u8>, HttpError> {
        let body = body.map(Value::to_string).unwrap_or_default();
        self.send_bytes(method, path, "application/json", body.as_bytes())
    }

    /// The same with a body of any kind.
    pub fn send_bytes(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> Result<Vec<u8>, HttpError> {
        let slow = Duration::from_secs(body.len() as u64 / SLOW_BYTES_S);
        let end = Instant::now() + self.limit + slow;
        let mut stream = self.connect(end).map_err(|error| self.failed(error))?;
        let kind = match body.is_empty() {
            true => String::new(),
            false => format!("Content-Type: {kind}\r\n"),
        };
        let token = self.token.as_ref();
        let token = token.map_or(String::new(), |t| format!("Authorization: Bearer {t}\r\n"));
        let head = format!(
            "{method} {PREFIX}{path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{kind}{token}Content-Length: {}\r\n\r\n",
            self.server.host,
            body.len()
        );
        let sent = stream.write_all(&[head.as_bytes(), body].concat());
        let sent = sent.and_then(|()| stream.flush());
        let answer = read_answer(&mut stream, end);
        // A server that has said no need not read the rest; one that ended the handshake says why.
        let (status, body) = match (answer, sent) {
            (Ok(answer), _) => answer?,
            (Err(error), Ok(())) | (Err(_), Err(error)) => return Err(self.failed(error)),
        };
        if (200..300).contains(&status) {
            return Ok(body);
        }
        let detail = serde_json::from_slice::<Value>(&body).ok();
        let detail = detail
            .as_ref()
            .and_then(|problem| problem.get("detail")?.as_str())
            .unwrap_or("it gives no reason");
        Err(HttpError::Refused {
            status,
            detail: detail
                .chars()
                .filter(|c| !c.is_control())
                .take(500)
                .collect(),
        })
    }

    /// The same, where the answer is a JSON document.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, HttpError> {
        let body = self.send(method, path, body)?;
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|_| HttpError::Answer("it is no JSON document"))
    }
}

/// Status and length of the body, from the head of an answer.
fn parse_head(head: &[u8]) -> Result<(u16, Option<usize>), HttpError> {
    let head = std::str::from_utf8(head).map_err(|_| HttpError::Answer("its head is not text"))?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| {
        let rest = line.strip_prefix("HTTP/1.1 ")?;
        rest.get(..3)?.parse().ok()
    });
    let status = status.ok_or(HttpError::Answer("it is not HTTP/1.1"))?;
    let mut length = None;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            let parsed = value.trim().parse().ok();
            length = Some(parsed.ok_or(HttpError::Answer("its length is no number"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(HttpError::Answer("it comes in chunks"));
        }
    }
    Ok((status, length))
}

type Answered = Result<(u16, Vec<u8>), HttpError>;

fn read_answer(stream: &mut impl Read, end: Instant) -> io::Result<Answered> {
    let (mut all, mut chunk) = (Vec::new(), vec![0; 16 << 10]);
    let mut head: Option<(u16, Option<usize>, usize)> = None;
    loop {
        if let Some((status, Some(length), from)) = head
            && all.len() - from >= length
        {
            let body = all.get(from..from + length).unwrap_or_default().to_vec();
            return Ok(Ok((status, body)));
        }
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let n = match stream.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            read => read?,
        };
        if n == 0 {
            return match head {
                // Without a length the end is the end.
                Some((status, None, from)) => {
                    let body = all.get(from..).unwrap_or_default().to_vec();
                    Ok(Ok((status, body)))
                }
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
        all.extend_from_slice(chunk.get(..n).unwrap_or_default());
        if head.is_none() {
            let at = all.windows(4).position(|four| four == b"\r\n\r\n");
            match at {
                Some(at) => match parse_head(all.get(..at).unwrap_or_default()) {
                    Ok((_, Some(length))) if length > MAX_BODY_BYTES => {
                        return Ok(Err(HttpError::Answer("it is too long")));
                    }
                    Ok((status, length)) => head = Some((status, length, at + 4)),
                    Err(error) => return Ok(Err(error)),
                },
                None if all.len() > MAX_HEAD_BYTES => {
                    return Ok(Err(HttpError::Answer("its head is too long")));
                }
                None => {}
            }
        }
        if all.len() > MAX_BODY_BYTES + MAX_HEAD_BYTES {
            return Ok(Err(HttpError::Answer("it is too long")));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses() {
        let parsed = |text: &str| text.parse::<Server>();
        assert_eq!(
            parsed("https://msa.example.org"),
            Ok(Server::new("msa.example.org", 443))
        );
        assert_eq!(
            parsed("https://10.0.0.5:8443/"),
            Ok(Server::new("10.0.0.5", 8443))
        );
        assert_eq!(parsed("https://[::1]:8443"), Ok(Server::new("::1", 8443)));
        assert_eq!(
            parsed("https://[::1]").unwrap().to_string(),
            "https://[::1]:443"
        );
        for bad in [
            "",
            "msa",
            "http://msa",
            "https://",
            "https://:1",
            "https://a b",
            "https://a:x",
            "https://a:99999",
            "https://[::1]x",
            "https://a/b",
            "https://a\r\nb",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_server_that_answers_nothing_or_byte_by_byte_has_its_time() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let silent = std::thread::spawn(move || {
            // One that takes what it is sent and says nothing; one that never ends a handshake record.
            let (first, _) = listener.accept().unwrap();
            let (mut second, _) = listener.accept().unwrap();
            second.write_all(&[22, 3, 3, 0x3f, 0xff]).unwrap();
            let pace = Some(Duration::from_millis(20));
            second.set_read_timeout(pace).unwrap();
            while second.write_all(&[0]).is_ok() {
                let _ = second.read(&mut [0; 1024]);
            }
            drop(first);
        });
        let roots = Arc::new(rustls::RootCertStore::empty());
        let config = ClientConfig::builder_with_provider(tls::provider::ring())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut client = Client::new(Server::new("127.0.0.1", port), Arc::new(config));
        client.limit = Duration::from_millis(500);
        for _ in 0..2 {
            let since = Instant::now();
            let said = client.send("GET", "/version", None).unwrap_err();
            let said = said.to_string();
            assert!(said.contains("does not answer in time"), "{said}");
            assert!(since.elapsed() < STEP_LIMIT, "the whole has its limit");
        }
        silent.join().unwrap();
    }

    fn answer(text: &str) -> Result<(u16, Vec<u8>), String> {
        // A byte at a time: wherever it is cut, it is the same.
        struct Slow<'a>(&'a [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
                let Some((first, rest)) = self.0.split_first() else {
                    return Ok(0);
                };
                into[0] = *first;
                self.0 = rest;
                Ok(1)
            }
        }
        let read = read_answer(&mut Slow(text.as_bytes()), Instant::now() + LIMIT);
        read.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }

    #[test]
    fn answers() {
        let yes = answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").unwrap();
        assert_eq!(yes, (200, b"hi".to_vec()));
        let open = answer("HTTP/1.1 201 Created\r\nX: y\r\n\r\nall of it").unwrap();
        assert_eq!(open, (201, b"all of it".to_vec()));
        for bad in [
            "",
            "hello",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi",
            "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhi",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nhi",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            "HTTP/1.1 2\r\n\r\n",
            "SSH-2.0\r\n\r\n",
        ] {
            assert!(answer(bad).is_err(), "{bad}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "y".repeat(MAX_HEAD_BYTES));
        assert!(answer(&endless).unwrap_err().contains("too long"));
    }
}
