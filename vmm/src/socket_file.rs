//! The file that a Unix socket has in the file system.
//!
//! In: a path. Out: a listening socket that only this user can reach. Holds: a live server's socket is never replaced, a
//! dead one's is, and the file is removed at the end by the process that made it and by no other.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The longest path of a Unix socket: `sun_path` without its NUL (unix(7)).
pub const PATH_MAX: usize = 107;
/// Connections that the kernel keeps waiting.
const BACKLOG: libc::c_int = 16;
/// A server binds, and then listens: between the two its socket looks dead.
const SECOND_LOOK: Duration = Duration::from_millis(50);

/// Why there is no socket at the path.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// It doesn't fit in a socket address.
    #[error("{what} path is {length} bytes long, and may have {PATH_MAX} at most: {path}", path = path.display())]
    TooLong {
        /// What the socket is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// A NUL byte, or nothing at all.
    #[error("{0} path is empty or has a NUL byte in it")]
    NotAPath(&'static str),
    /// Somebody listens there.
    #[error("{what} is in use by another process: {path}", path = path.display())]
    InUse {
        /// What the socket is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Something else has that name.
    #[error("{what} path exists and is not a socket: {path}", path = path.display())]
    NotASocket {
        /// What the socket is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot make the {what} {path}: {source}", path = path.display())]
    Io {
        /// What the socket is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// A listening socket's file; removed when dropped, if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    /// A forked child that drops this is not the owner.
    owner: u32,
}

impl SocketFile {
    /// Binds and listens at `path`, with mode 0600, in place of a dead server's socket if there is one. `what` the socket is
    /// for is told in errors.
    ///
    /// # Errors
    /// The path can't be a socket's, is taken, or the kernel refused.
    pub fn listen(what: &'static str, path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let address = Address::new(what, path)?;
        let refused = |source| SocketError::Io { what, path: path.into(), source };
        let socket = socket().map_err(refused)?;
        match bind(&socket, &address) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                clear_dead(what, path, &address)?;
                bind(&socket, &address).map_err(refused)?;
            }
            other => other.map_err(refused)?,
        }
        let identity = identity(path).map_err(refused)?;
        let file = Self { path: path.into(), identity, owner: std::process::id() };
        // SAFETY: listen takes a descriptor and a number.
        check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) }).map_err(refused)?;
        Ok((file, socket.into()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = identity(&self.path).is_ok_and(|now| now == self.identity);
        if ours && self.owner == std::process::id() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

struct Address {
    address: libc::sockaddr_un,
    length: libc::socklen_t,
}

impl Address {
    fn new(what: &'static str, path: &Path) -> Result<Self, SocketError> {
        let bytes = path.as_os_str().as_bytes();
        if bytes.is_empty() || bytes.contains(&0) {
            return Err(SocketError::NotAPath(what));
        }
        if bytes.len() > PATH_MAX {
            return Err(SocketError::TooLong { what, path: path.into(), length: bytes.len() });
        }
        // SAFETY: a sockaddr_un is plain numbers, for which zero is a value.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        Ok(Self { address, length: size_of::<libc::sockaddr_un>() as libc::socklen_t })
    }

    fn pointer(&self) -> *const libc::sockaddr {
        (&raw const self.address).cast()
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: three numbers.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(socket: &OwnedFd, address: &Address) -> io::Result<()> {
    // Linux gives the file the socket's own mode, so it is never open to others, not even for a moment.
    // SAFETY: a descriptor and a number.
    check(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) })?;
    // SAFETY: the address is `length` bytes long and outlives the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), address.pointer(), address.length) }).map(drop)
}

/// Removes a socket that nobody listens on.
fn clear_dead(what: &'static str, path: &Path, address: &Address) -> Result<(), SocketError> {
    let refused = |source| SocketError::Io { what, path: path.into(), source };
    let kind = std::fs::symlink_metadata(path).map_err(refused)?.file_type();
    if !kind.is_socket() {
        return Err(SocketError::NotASocket { what, path: path.into() });
    }
    let dead = identity(path).map_err(refused)?;
    for _ in 0..2 {
        if is_live(address).map_err(refused)? {
            return Err(SocketError::InUse { what, path: path.into() });
        }
        std::thread::sleep(SECOND_LOOK);
    }
    remove_if(path, dead).map_err(refused)
}

/// Another VMM may clear the same dead socket and put its own there at any moment. So it is moved aside, looked at, and
/// put back if it isn't the one that was found dead; the `bind` that follows then says that the path is in use.
fn remove_if(path: &Path, dead: (u64, u64)) -> io::Result<()> {
    let mut aside = OsString::from(path);
    aside.push(format!(".{}", std::process::id()));
    std::fs::rename(path, &aside)?;
    if identity(Path::new(&aside))? != dead {
        return std::fs::rename(&aside, path);
    }
    std::fs::remove_file(&aside)
}

/// Whether somebody accepts connections, found out without waiting.
fn is_live(address: &Address) -> io::Result<bool> {
    let probe = socket()?;
    // SAFETY: F_SETFL takes a number.
    check(unsafe { libc::fcntl(probe.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
    // SAFETY: the address is `length` bytes long and outlives the call.
    match check(unsafe { libc::connect(probe.as_raw_fd(), address.pointer(), address.length) }) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        // Its queue is full: somebody is there.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
        other => other.map(|_| true),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        (directory, path)
    }

    #[test]
    fn the_socket_is_private_and_goes_when_its_owner_goes() {
        let (_directory, path) = place();
        let (file, _listener) = SocketFile::listen("test socket", &path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_left_alone() {
        let (_directory, path) = place();
        let (_file, _listener) = SocketFile::listen("test socket", &path).unwrap();
        assert!(matches!(SocketFile::listen("test socket", &path), Err(SocketError::InUse { .. })));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_socket_with_a_full_queue_is_in_use_too() {
        let (_directory, path) = place();
        let (_file, _listener) = SocketFile::listen("test socket", &path).unwrap();
        let address = Address::new("test socket", &path).unwrap();
        let waiting: Vec<OwnedFd> = (0..=BACKLOG).map(|_| connected(&address)).collect();
        assert!(matches!(SocketFile::listen("test socket", &path), Err(SocketError::InUse { .. })));
        drop(waiting);
    }

    fn connected(address: &Address) -> OwnedFd {
        let socket = socket().unwrap();
        // SAFETY: the address is `length` bytes long and outlives the call.
        check(unsafe { libc::connect(socket.as_raw_fd(), address.pointer(), address.length) }).unwrap();
        socket
    }

    #[test]
    fn a_dead_socket_is_replaced() {
        let (directory, path) = place();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_file, _listener) = SocketFile::listen("test socket", &path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn other_files_are_left_alone() {
        let (directory, path) = place();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(SocketFile::listen("test socket", &path), Err(SocketError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert!(matches!(
            SocketFile::listen("test socket", directory.path()),
            Err(SocketError::NotASocket { .. })
        ));
    }

    #[test]
    fn a_successor_s_socket_is_not_removed() {
        let (_directory, path) = place();
        let (file, _listener) = SocketFile::listen("test socket", &path).unwrap();
        let kept = path.with_extension("kept");
        std::fs::rename(&path, &kept).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(file);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_path_has_107_bytes_at_most() {
        let directory = tempfile::tempdir().unwrap();
        let fill = PATH_MAX - directory.path().as_os_str().len() - 1;
        let fits = directory.path().join("x".repeat(fill));
        let (_file, _listener) = SocketFile::listen("test socket", &fits).unwrap();
        let too_long = directory.path().join("x".repeat(fill + 1));
        let error = SocketFile::listen("test socket", &too_long).unwrap_err();
        assert!(matches!(error, SocketError::TooLong { length: 108, .. }), "{error}");
        assert!(matches!(SocketFile::listen("test socket", Path::new("")), Err(SocketError::NotAPath(_))));
    }

    #[test]
    fn a_directory_that_is_missing_is_named() {
        let error =
            SocketFile::listen("test socket", Path::new("/nonexistent/api.sock")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/api.sock"), "{error}");
    }
}
