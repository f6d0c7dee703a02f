//! The Unix socket that tells how the daemon stands: one JSON document for each connection, one line.
//!
//! Invariant: nothing that a client does or leaves undone holds anything up but other clients, and those
//! for [`ANSWER_LIMIT`] at most. No file is removed but a socket that nobody serves, and the own one.

use crate::status::Shared;
use anyhow::{Context, bail};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a client may take to read its answer. What fits the socket's buffer waits for nobody.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// The socket, served by a thread of its own.
pub struct StatusSocket {
    path: PathBuf,
    /// Device and inode: tells the own socket from another that took its place.
    identity: Option<(u64, u64)>,
    thread: JoinHandle<()>,
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Clears the way for a socket at `path`, if it is only a dead one that is in the way.
fn make_way(path: &Path) -> anyhow::Result<()> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot look at the status socket {}", path.display()));
        }
    };
    if !meta.file_type().is_socket() {
        bail!(
            "the status socket cannot be made: {} is there and is no socket; remove it or choose another path",
            path.display()
        );
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
                .with_context(|| format!("cannot remove the dead status socket {}", path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => bail!(
            "the status socket {} is served by another process: choose another path",
            path.display()
        ),
    }
}

impl StatusSocket {
    /// Begins to serve.
    pub fn serve(path: &Path, shared: Arc<Shared>) -> anyhow::Result<Self> {
        make_way(path)?;
        let listener = UnixListener::bind(path)
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        let identity = identity(path);
        let thread = std::thread::Builder::new().name("status".into());
        let thread = thread.spawn(move || {
            for stream in listener.incoming() {
                if shared.stopping.load(Ordering::Acquire) {
                    return; // pairs with the store at SIGTERM
                }
                match stream.and_then(|stream| answer(stream, &shared)) {
                    Ok(()) => {}
                    // No descriptor left, or a client that is gone: neither may make this spin.
                    Err(error) => {
                        tracing::debug!("status socket: {error}");
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
            }
        })?;
        Ok(Self {
            path: path.to_owned(),
            identity,
            thread,
        })
    }

    /// Ends it, once the daemon is stopping, and removes it.
    pub fn stop(self) {
        // The thread sits in accept: a connection makes it look. Without one it ends with the process.
        let woken = UnixStream::connect(&self.path).is_ok();
        if identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
            if woken {
                let _ = self.thread.join();
            }
        }
    }
}

fn answer(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    let mut text = shared.document().to_string();
    text.push('\n');
    stream.write_all(text.as_bytes())
}
