//! The agent's listening socket.
//!
//! In: a port. Out: connections from the host. Holds: a process of the guest itself is turned away, since the agent acts
//! as root.
//!
//! Source: vsock(7).

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A listening vsock socket.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens on this port, whatever the guest's context ID is or becomes.
    ///
    /// # Errors
    /// The kernel has no vsock, or the port is taken.
    pub fn bind(port: u32) -> io::Result<Self> {
        // SAFETY: takes numbers only.
        let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeros are a valid sockaddr_vm.
        let mut address: libc::sockaddr_vm = unsafe { zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        (address.svm_cid, address.svm_port) = (libc::VMADDR_CID_ANY, port);
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address is as long as we say and lives until the call returns.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
        // SAFETY: takes numbers only.
        check(unsafe { libc::listen(socket.as_raw_fd(), 16) })?;
        Ok(Self { socket })
    }

    /// Waits for the next connection from the host.
    ///
    /// # Errors
    /// What accept(2) says; the socket is still good.
    pub fn accept(&self) -> io::Result<File> {
        loop {
            let (connection, cid) = self.accept_any()?;
            if cid == libc::VMADDR_CID_HOST {
                return Ok(connection);
            }
        }
    }

    fn accept_any(&self) -> io::Result<(File, u32)> {
        // SAFETY: all zeros are a valid sockaddr_vm.
        let mut peer: libc::sockaddr_vm = unsafe { zeroed() };
        let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        let socket = self.socket.as_raw_fd();
        let (address, flags) = ((&raw mut peer).cast(), libc::SOCK_CLOEXEC);
        // SAFETY: the kernel writes at most `length` bytes of an address, which is what `peer` has.
        let fd = check(unsafe { libc::accept4(socket, address, &raw mut length, flags) })?;
        // SAFETY: the descriptor is new and nobody else's.
        Ok((unsafe { File::from_raw_fd(fd) }, peer.svm_cid))
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
