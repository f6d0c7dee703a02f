//! Connections and listeners that go to another process, in the middle of their life.
//!
//! A server is paused: no connection is accepted, each reading thread stands at the beginning of a
//! request (or in its payload, of which it keeps what it has), each request is over and each reply sent. Then
//! what is left of a connection is its socket, what was agreed, and the bytes read ahead.
//!
//! Invariant: until the other process goes on, all of it is still here and can go on here. A socket is never
//! shut down by the process that handed it over.

use super::handshake::Agreed;
use super::server::{Exports, Listen, Server};
use super::stream::Stream;
use crate::raw;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The longest description; and the most bytes read ahead of one connection.
const MAX_MESSAGE_BYTES: u32 = 64 << 20;
/// Most sockets.
const MAX_SOCKETS: usize = 1024;

/// A listener, described.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Place {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// A connection, described.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Description {
    export: String,
    structured: bool,
    fast_zero: bool,
    block_status: bool,
    is_tcp: bool,
    ahead_bytes: usize,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Descriptions {
    listeners: Vec<Place>,
    connections: Vec<Description>,
}

/// A connection that goes on where it stood.
pub struct Parked {
    /// Its socket.
    pub stream: Stream,
    /// What was agreed.
    pub agreed: Agreed,
    /// Read, and not yet served.
    pub ahead: Vec<u8>,
}

/// Sends a message: its length, then it.
pub fn send(mut to: &UnixStream, value: &impl Serialize) -> io::Result<()> {
    let bytes = serde_json::to_vec(value)?;
    to.write_all(&(bytes.len() as u32).to_le_bytes())?;
    to.write_all(&bytes)
}

/// Takes a message. Nothing that follows it is read.
pub fn receive<T: for<'a> Deserialize<'a>>(mut from: &UnixStream) -> io::Result<T> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > MAX_MESSAGE_BYTES {
        let text = format!("a message of {len} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut bytes = vec![0; len as usize];
    from.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

impl Server {
    /// Gives a copy of everything to another process. The server must be paused, and stays so.
    pub fn hand_over(&self, to: &UnixStream) -> io::Result<usize> {
        let (listeners, connections) = (self.listeners()?, self.parked()?);
        let descriptions = Descriptions {
            listeners: listeners.iter().map(|(listen, _)| listen.into()).collect(),
            connections: connections.iter().map(Description::of).collect(),
        };
        send(to, &descriptions)?;
        for (_, fd) in &listeners {
            raw::send_fd(to, fd.as_fd())?;
        }
        for parked in &connections {
            raw::send_fd(to, parked.stream.as_fd())?;
        }
        for parked in &connections {
            (&mut &*to).write_all(&parked.ahead)?;
        }
        Ok(connections.len())
    }
}

impl From<&Listen> for Place {
    fn from(listen: &Listen) -> Self {
        match listen {
            Listen::Unix(path) => Self::Unix(path.clone()),
            Listen::Tcp(address) => Self::Tcp(*address),
        }
    }
}

impl Description {
    fn of(parked: &Parked) -> Self {
        Self {
            export: parked.agreed.export.clone(),
            structured: parked.agreed.structured,
            fast_zero: parked.agreed.fast_zero,
            block_status: parked.agreed.block_status,
            is_tcp: matches!(parked.stream, Stream::Tcp(_)),
            ahead_bytes: parked.ahead.len(),
        }
    }
}

/// What another process handed over, before there is an engine for it.
pub struct Received {
    listeners: Vec<(Listen, OwnedFd)>,
    connections: Vec<(Description, OwnedFd, Vec<u8>)>,
}

/// Takes what [`Server::hand_over`] gives.
pub fn take_over(from: &UnixStream) -> io::Result<Received> {
    let all: Descriptions = receive(from)?;
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    if all.listeners.len() + all.connections.len() > MAX_SOCKETS {
        return Err(invalid("too many sockets"));
    }
    let mut listeners = Vec::new();
    for place in all.listeners {
        let listen = match place {
            Place::Unix(path) => Listen::Unix(path),
            Place::Tcp(address) => Listen::Tcp(address),
        };
        listeners.push((listen, raw::receive_fd(from)?));
    }
    let mut connections = Vec::new();
    for description in all.connections {
        connections.push((description, raw::receive_fd(from)?, Vec::new()));
    }
    for (description, _, ahead) in &mut connections {
        if description.ahead_bytes > MAX_MESSAGE_BYTES as usize {
            return Err(invalid("more read ahead than a request holds"));
        }
        ahead.resize(description.ahead_bytes, 0);
        (&mut &*from).read_exact(ahead)?;
    }
    Ok(Received {
        listeners,
        connections,
    })
}

impl Received {
    /// Where it listens.
    pub fn listens(&self) -> Vec<Listen> {
        let listens = self.listeners.iter();
        listens.map(|(listen, _)| listen.clone()).collect()
    }

    /// Goes on with all of it.
    pub fn serve(self, exports: Exports) -> anyhow::Result<Server> {
        let mut server = Server::inherit(self.listeners, exports.clone())?;
        for (description, fd, ahead) in self.connections {
            let Some(engine) = exports.find(&description.export) else {
                anyhow::bail!("no export `{}` for a connection", description.export);
            };
            let stream = if description.is_tcp {
                Stream::Tcp(fd.into())
            } else {
                Stream::Unix(fd.into())
            };
            server.adopt(Parked {
                stream,
                agreed: Agreed {
                    engine,
                    export: description.export,
                    structured: description.structured,
                    fast_zero: description.fast_zero,
                    block_status: description.block_status,
                },
                ahead,
            })?;
        }
        Ok(server)
    }
}
