//! A tap device: the host's end of a guest's network cable.
//!
//! In: its name, or a descriptor of it that another process opened. Out: a [`Wire`] whose frames carry the header that
//! virtio-net uses. Holds: nothing here waits, and what can't be had is named in one line.
//!
//! ```text
//! tap ── readable, or room ──┐
//!                            ├──► epoll ──► watched by the I/O thread
//! again ── another turn ─────┘
//! ```

use devices::virtio::{Offloads, Wire};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// How a tap is named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TapName {
    /// By its interface's name. One that doesn't exist is made, and goes with the process.
    Interface(String),
    /// By the number of a descriptor that this process was started with.
    Descriptor(RawFd),
}

/// Why a tap can't be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface can be called that.
    #[error("`{0}` is no interface's name: expected 1 to 15 printable characters without `/`, `:` or blanks")]
    BadName(String),
    /// The host has no taps.
    #[error("/dev/net/tun can't be opened; it comes with the kernel module `tun`")]
    Tun(#[source] io::Error),
    /// Another process has it.
    #[error("tap `{0}` is in use by another process")]
    Busy(String),
    /// It is there, but not for us.
    #[error("tap `{0}` belongs to another user")]
    NotOurs(String),
    /// It isn't there, and can't be made.
    #[error("no tap `{0}`, and no permission to make one (as root: ip tuntap add {0} mode tap user NAME)")]
    NotThere(String),
    /// An interface of another kind.
    #[error("`{0}` is no tap that this process can use: expected a tap with a single queue")]
    NotATap(String),
    /// A descriptor of something else.
    #[error("file descriptor {0} is no tap")]
    DescriptorIsNoTap(RawFd),
    /// A tap that was opened in another way.
    #[error("file descriptor {0}: expected a tap opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    DescriptorFlags(RawFd),
    /// A call on it failed.
    #[error("tap {name}: {call} failed")]
    Call {
        /// Its name.
        name: String,
        /// The call.
        call: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// An open tap.
pub struct Tap {
    file: File,
    epoll: Epoll,
    again: EventFd,
}

/// Bytes of the header before each frame: `struct virtio_net_hdr` with `num_buffers`.
const HEADER: libc::c_int = 12;
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

impl Tap {
    /// Opens the tap.
    ///
    /// # Errors
    /// It can't be had, or can't do what virtio-net needs.
    pub fn open(name: &TapName) -> Result<Self, TapError> {
        let file = match name {
            TapName::Interface(interface) => by_name(interface)?,
            TapName::Descriptor(fd) => by_descriptor(*fd)?,
        };
        let failed = |call| move |source| TapError::Call { name: name.to_string(), call, source };
        call(&file, libc::TUNSETVNETHDRSZ, &mut HEADER.clone()).map_err(failed("TUNSETVNETHDRSZ"))?;
        let mut tap = Self::on(file).map_err(failed("epoll"))?;
        // A driver is asked nothing when its choice is applied later: all can be had, or the tap can't.
        let all = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };
        for offloads in [all, Offloads::default()] {
            tap.set_offloads(offloads).map_err(failed("TUNSETOFFLOAD"))?;
        }
        Ok(tap)
    }

    fn on(file: File) -> io::Result<Self> {
        let (epoll, again) = (Epoll::new()?, EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let watch = |fd, events| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, 0))
        };
        watch(file.as_raw_fd(), EventSet::IN)?;
        watch(again.as_raw_fd(), EventSet::IN)?;
        Ok(Self { file, epoll, again })
    }

    /// Looked at anew, the tap tells of room that it has already, or of the next there is.
    fn tell_of_room(&self) {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        // It fails only for a descriptor that isn't watched.
        let _ = self.epoll.ctl(ControlOperation::Modify, self.file.as_raw_fd(), EpollEvent::new(events, 0));
    }
}

impl Wire for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the epoll's own, which lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.epoll.as_raw_fd()) }
    }

    fn seen(&mut self) {
        // Nothing to read, or no event, is no harm: it was seen before.
        let _ = self.again.read();
        let _ = self.epoll.wait(0, &mut [EpollEvent::default(); 2]);
    }

    fn again(&mut self) {
        // It fails only when 2^64 - 2 turns are asked for already.
        let _ = self.again.write(1);
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.file.read(frame)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let sent = self.file.write(frame);
        if sent.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
            self.tell_of_room();
        }
        sent.map(drop)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let Offloads { checksum, tso4, tso6, ecn } = offloads;
        let bits = [
            (checksum, libc::TUN_F_CSUM),
            (tso4, libc::TUN_F_TSO4),
            (tso6, libc::TUN_F_TSO6),
            (ecn, libc::TUN_F_TSO_ECN),
        ];
        let bits = bits.iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, bit)| all | bit);
        // SAFETY: TUNSETOFFLOAD takes a number, and no memory of ours.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(f, "`{name}`"),
            Self::Descriptor(fd) => write!(f, "on file descriptor {fd}"),
        }
    }
}

impl TapName {
    /// As it is written in a place for a restored device: the interface's name, or `fd:` and the descriptor's number.
    pub fn place(&self) -> String {
        match self {
            Self::Interface(name) => name.clone(),
            Self::Descriptor(fd) => format!("fd:{fd}"),
        }
    }

    /// An interface's name as a user, or a snapshot, gives it. The kernel would take `%d` in it as a wish for a free number.
    ///
    /// # Errors
    /// No interface can be called that.
    pub fn interface(name: &str) -> Result<Self, TapError> {
        let fits = (1..libc::IFNAMSIZ).contains(&name.len()) && ![".", ".."].contains(&name);
        if fits && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte)) {
            Ok(Self::Interface(name.to_owned()))
        } else {
            Err(TapError::BadName(name.to_owned()))
        }
    }
}

fn by_name(name: &str) -> Result<File, TapError> {
    TapName::interface(name)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(TapError::Tun)?;
    let mut request = interface_request();
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    call(&file, libc::TUNSETIFF, &mut request).map_err(|source| refused(name, source))?;
    Ok(file)
}

fn refused(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy(name),
        Some(libc::EINVAL) => TapError::NotATap(name),
        Some(libc::EPERM) if exists(&name) => TapError::NotOurs(name),
        Some(libc::EPERM) => TapError::NotThere(name),
        _ => TapError::Call { name: format!("`{name}`"), call: "TUNSETIFF", source },
    }
}

fn exists(name: &str) -> bool {
    let name = std::ffi::CString::new(name).unwrap_or_default();
    // SAFETY: the name is a string that ends in a zero byte.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

/// A duplicate of the descriptor, whose number may have another owner in this process.
fn by_descriptor(fd: RawFd) -> Result<File, TapError> {
    let mut request = interface_request();
    // SAFETY: TUNGETIFF writes one ifreq, to where there is room for it; others refuse the call.
    check(unsafe { libc::ioctl(fd, libc::TUNGETIFF, &mut request) })
        .map_err(|_| TapError::DescriptorIsNoTap(fd))?;
    // SAFETY: the kernel has set the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & FLAGS != FLAGS {
        return Err(TapError::DescriptorFlags(fd));
    }
    let failed =
        |call| move |source| TapError::Call { name: format!("on file descriptor {fd}"), call, source };
    // SAFETY: fcntl with F_DUPFD_CLOEXEC takes numbers only.
    let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    check(own).map_err(failed("F_DUPFD_CLOEXEC"))?;
    // SAFETY: the descriptor is fresh, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(own) });
    rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::NONBLOCK)
        .map_err(|errno| failed("F_SETFL")(errno.into()))?;
    Ok(file)
}

fn interface_request() -> libc::ifreq {
    // SAFETY: an ifreq of zeroes is one with an empty name.
    unsafe { std::mem::zeroed() }
}

fn call<T>(file: &File, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: the calls made here (TUNSETIFF, TUNSETVNETHDRSZ) read a `T` and at most write one back; each caller passes the
    // type that its call takes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, argument) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
