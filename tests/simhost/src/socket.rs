//! Listening sockets: bound without harm to what is in the way, woken without help from outside.
//!
//! Invariant: the only file that is ever removed is a socket: one on which nobody listens any more when
//! a new one takes its place, and our own at the end, if it is still ours.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why there is no listening socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A file that is no socket has the name.
    #[error(
        "cannot listen on {path}: a file that is no socket has this name, and was left as it is; \
         give another path"
    )]
    NotASocket {
        /// Its path.
        path: PathBuf,
    },
    /// Another process has the socket.
    #[error("cannot listen on {path}: another process does; stop it, or give another path")]
    InUse {
        /// Its path.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot listen on {place}: {source}")]
    Io {
        /// The path or the address.
        place: String,
        /// Why not.
        source: io::Error,
    },
}

impl ListenError {
    pub(crate) fn io(place: impl ToString) -> impl FnOnce(io::Error) -> Self {
        let place = place.to_string();
        move |source| Self::Io { place, source }
    }
}

/// A listening unix socket. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    /// The listening socket again: shutting it down ends a waiting `accept`.
    waker: UnixStream,
    path: PathBuf,
    /// Device and inode: by these the file is known to be ours.
    identity: Option<(u64, u64)>,
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Removes a socket that an ended process left behind; anything else stays.
fn clear(path: &Path) -> Result<(), ListenError> {
    let path = path.to_owned();
    let meta = match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(ListenError::io(path.display()))?,
    };
    if !meta.file_type().is_socket() {
        return Err(ListenError::NotASocket { path });
    }
    // A datagram socket cannot connect to a listening one, and says so without disturbing anybody
    // and without ever waiting; only if nobody has the socket open it is refused.
    let asked = UnixDatagram::unbound().and_then(|probe| probe.connect(&path));
    match asked {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(&path).map_err(ListenError::io(path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(ListenError::Io {
            place: path.display().to_string(),
            source: error,
        }),
        _ => Err(ListenError::InUse { path }),
    }
}

impl UnixSocket {
    /// Listens on a path.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                clear(path)?;
                UnixListener::bind(path)
            }
            other => other,
        };
        let listener = listener.map_err(ListenError::io(path.display()))?;
        let waker = listener
            .try_clone()
            .map_err(ListenError::io(path.display()))?;
        Ok(Self {
            listener,
            waker: OwnedFd::from(waker).into(),
            path: path.to_owned(),
            identity: identity(path).ok(),
        })
    }

    /// A socket that another process listened on; its file is ours from now on.
    pub fn inherit(fd: OwnedFd, path: &Path) -> io::Result<Self> {
        let listener = UnixListener::from(fd);
        Ok(Self {
            waker: OwnedFd::from(listener.try_clone()?).into(),
            listener,
            path: path.to_owned(),
            identity: identity(path).ok(),
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for a client. Fails at once after [`Self::wake`].
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().map(|(stream, _)| stream)
    }

    /// Ends a waiting `accept`, now and for good.
    pub fn wake(&self) {
        let _ = self.waker.shutdown(Shutdown::Both);
    }
}

impl AsFd for UnixSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl AsFd for TcpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path).ok() == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A listening TCP socket.
#[derive(Debug)]
pub struct TcpSocket {
    listener: TcpListener,
    waker: TcpStream,
    address: SocketAddr,
}

impl TcpSocket {
    /// Listens on an address; port 0 takes a free one.
    pub fn bind(address: SocketAddr) -> Result<Self, ListenError> {
        let bind = || {
            let listener = TcpListener::bind(address)?;
            Ok(Self {
                waker: OwnedFd::from(listener.try_clone()?).into(),
                address: listener.local_addr()?,
                listener,
            })
        };
        bind().map_err(ListenError::io(address))
    }

    /// A socket that another process listened on.
    pub fn inherit(fd: OwnedFd) -> io::Result<Self> {
        let listener = TcpListener::from(fd);
        Ok(Self {
            waker: OwnedFd::from(listener.try_clone()?).into(),
            address: listener.local_addr()?,
            listener,
        })
    }

    /// Where it really listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for a client. Fails at once after [`Self::wake`].
    pub fn accept(&self) -> io::Result<TcpStream> {
        self.listener.accept().map(|(stream, _)| stream)
    }

    /// Ends a waiting `accept`, now and for good.
    pub fn wake(&self) {
        let _ = self.waker.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, b"precious").unwrap();
        let error = UnixSocket::bind(&path).unwrap_err().to_string();
        assert!(error.contains("disk.img"), "{error}");
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let link = dir.path().join("link.sock");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(UnixSocket::bind(&link).is_err());
        assert!(link.is_symlink() && path.exists());
        assert!(UnixSocket::bind(dir.path()).is_err());
    }

    #[test]
    fn a_socket_in_use_is_left_alone_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let first = UnixListener::bind(&path).unwrap();
        let error = UnixSocket::bind(&path).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        UnixStream::connect(&path).unwrap();
        drop(first); // the file stays
        let second = UnixSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_took_the_place_of_the_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let socket = UnixSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"somebody else's").unwrap();
        drop(socket);
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody else's");
    }

    #[test]
    fn accept_ends_when_woken() {
        let dir = tempfile::tempdir().unwrap();
        let unix = Arc::new(UnixSocket::bind(&dir.path().join("s.sock")).unwrap());
        let tcp = Arc::new(TcpSocket::bind(([127, 0, 0, 1], 0).into()).unwrap());
        let (send, ended) = std::sync::mpsc::channel();
        let (one, two) = (unix.clone(), tcp.clone());
        let other = send.clone();
        std::thread::spawn(move || send.send(one.accept().is_err()));
        std::thread::spawn(move || other.send(two.accept().is_err()));
        unix.wake();
        tcp.wake();
        for _ in 0..2 {
            assert_eq!(
                ended.recv_timeout(std::time::Duration::from_secs(60)),
                Ok(true)
            );
        }
    }
}
