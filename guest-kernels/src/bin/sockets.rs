//! `sockets echo PORT | call PORT BYTES | hold PORT`: a Linux program at the guest's end of vsock connections.
//!
//! In: what to do. Out: lines that begin with `sockets`, and status 1 after one with `FAIL`. Holds: what comes back is
//! compared with what went out, byte for byte.
//!
//! `echo` listens and sends back what comes, for ever. `call` connects to the host, which is to do the same. `hold` connects to
//! the host, says `hello`, waits for the end of the connection and tells how it came.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

const HOST: u32 = libc::VMADDR_CID_HOST;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse().ok());
    let done = match (words.first().map(String::as_str), number(1), number(2)) {
        (Some("echo"), Some(port), None) => echo(port),
        (Some("call"), Some(port), Some(bytes)) => call(port, bytes as usize),
        (Some("hold"), Some(port), None) => hold(port),
        _ => {
            eprintln!("usage: sockets echo PORT | call PORT BYTES | hold PORT");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("sockets FAIL {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn echo(port: u32) -> io::Result<()> {
    let listener = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is of the length that is given, and outlives the call.
    check(unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), LENGTH) })?;
    // SAFETY: two numbers.
    check(unsafe { libc::listen(listener.as_raw_fd(), 16) })?;
    println!("sockets echo port={port}");
    loop {
        // SAFETY: accept may be told not to write the peer's address.
        let fd = check(unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        })?;
        // SAFETY: a new descriptor, which nobody else owns.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        std::thread::spawn(move || send_back(&stream));
    }
}

fn send_back(stream: &UnixStream) {
    let (mut from, mut to) = (stream, stream);
    match io::copy(&mut from, &mut to) {
        Ok(bytes) => println!("sockets echo ended bytes={bytes}"),
        Err(error) => println!("sockets echo ended {error}"),
    }
    let _ = stream.shutdown(Shutdown::Write);
}

fn call(port: u32, bytes: usize) -> io::Result<()> {
    let stream = connect(port)?;
    let sent: Vec<u8> = (0..bytes).map(|at| (at * 7 + at / 251) as u8).collect();
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            (&stream).write_all(&sent)?;
            stream.shutdown(Shutdown::Write)
        });
        (&stream).read_to_end(&mut received)?;
        writer.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")))
    })?;
    if received != sent {
        return Err(io::Error::other(format!("{} bytes came back, and not those sent", received.len())));
    }
    println!("sockets call port={port} bytes={bytes} ok");
    Ok(())
}

fn hold(port: u32) -> io::Result<()> {
    let mut stream = connect(port)?;
    stream.write_all(b"hello")?;
    println!("sockets hold port={port}");
    match stream.read(&mut [0]) {
        Ok(0) => println!("sockets hold ended"),
        Ok(_) => return Err(io::Error::other("a byte that was not to come")),
        Err(error) => println!("sockets hold ended {error}"),
    }
    Ok(())
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: a sockaddr_vm is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: three numbers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A vsock stream is used like a Unix one, once it is connected.
fn connect(port: u32) -> io::Result<UnixStream> {
    let socket = socket()?;
    let address = address(HOST, port);
    // SAFETY: the address is of the length that is given, and outlives the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) })?;
    Ok(socket.into())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
