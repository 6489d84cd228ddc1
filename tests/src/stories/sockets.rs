//! Stories of sockets between a guest and the host.
//!
//! In: a Linux guest with the program `sockets`, a directory. Out: nothing, or why the story failed. Holds: every byte that is
//! sent is compared with the one that comes back.

use crate::guests::Guest;
use crate::vm::{TestVm, vmm};
use anyhow::{Context, Result, bail, ensure};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the guest does in [`both_ways`].
pub const ECHO_AND_CALL: &str = "sockets echo 7 & sockets call 52 2097152; sockets call 53 1";
/// What the guest does in [`socket_clones`].
pub const ECHO_AND_HOLD: &str = "sockets echo 7 & sockets hold 52; sockets call 52 1048576";

const MIB: usize = 1 << 20;

/// A directory's socket file, and the guest with a device there.
fn with_vsock(guest: &Guest, path: &Path) -> Guest {
    guest.clone().argument("--vsock", &path.display().to_string())
}

/// Bytes go both ways through connections from both sides, also half-closed ones; where nobody listens is no connection.
///
/// # Errors
/// Bytes are lost or changed, or a connection is there that should not be.
pub fn both_ways(guest: &Guest, dir: &Path) -> Result<()> {
    let path = dir.join("v.sock");
    echo_server(&path)?;
    let mut vm = TestVm::start(&with_vsock(guest, &path).run_args())?;
    wait_for_all(&mut vm, &["sockets echo port=7", "sockets call port=52 bytes=2097152 ok"])?;
    vm_fails_to_connect(&mut vm)?;
    let told = vm.ask("status", &[])?;
    ensure!(told["vsock"] == path.display().to_string(), "{told}");

    let mut clients = [connect(&path, 7)?, connect(&path, 7)?];
    clients.iter_mut().try_for_each(|client| comes_back(client, 2 * MIB))?;
    for client in clients {
        client.shutdown(Shutdown::Write)?;
        ends(client)?;
    }
    let nobody = connect(&path, 9).err().context("somebody listens at port 9")?;
    ensure!(nobody.to_string().contains("no answer"), "{nobody:#}");
    vm.ask("stop", &[])?;
    vm.wait()?;
    ensure!(!path.exists(), "the socket file is still there");
    Ok(())
}

/// The program says FAIL, which is right here.
fn vm_fails_to_connect(vm: &mut TestVm) -> Result<()> {
    let deadline = Instant::now() + crate::vm::LIMIT;
    while !vm.next_line(deadline)?.contains("sockets FAIL call 53 1: Connection reset") {}
    Ok(())
}

/// A machine that goes on after a snapshot keeps its connections. A clone loses them at once and makes new ones; two clones
/// need two sockets, and say so.
///
/// # Errors
/// A connection ends that should not, or lives on that should not, or a clone takes the other's socket.
pub fn socket_clones(guest: &Guest, dir: &Path) -> Result<()> {
    let (path, file) = (dir.join("v.sock"), dir.join("snapshot"));
    let listener = UnixListener::bind(port_path(&path, 52))?;
    let mut vm = TestVm::start(&with_vsock(guest, &path).run_args())?;
    let mut held = accepted(&listener)?;
    held.read_exact(&mut [0; 5])?;
    wait_for_all(&mut vm, &["sockets hold port=52"])?;
    let mut client = connect(&path, 7)?;
    comes_back(&mut client, MIB)?;
    vm.snapshot(&file, "resume")?;
    comes_back(&mut client, MIB).context("after a snapshot")?;
    refused_while_the_other_lives(&file, &path)?;
    vm.ask("stop", &[])?;
    vm.wait()?;
    ends(client).context("the client of a machine that has ended")?;
    ends(held).context("the server of a machine that has ended")?;
    together(&file, dir)
}

fn refused_while_the_other_lives(file: &Path, path: &Path) -> Result<()> {
    let output = vmm(["restore", file.to_str().context("path")?])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let names = said.contains("--vsock") && said.contains(&path.display().to_string());
    ensure!(output.status.code() == Some(1) && said.lines().count() == 1 && names, "{said}");
    Ok(())
}

fn together(file: &Path, dir: &Path) -> Result<()> {
    let paths = ["one", "two"].map(|name| dir.join(name));
    paths.iter().try_for_each(|path| echo_server(path))?;
    let start = |path: &PathBuf| TestVm::start(&restore_args(file, path));
    let mut vms = paths.iter().map(start).collect::<Result<Vec<_>>>()?;
    // At once, while the guest may still hold its old connections.
    let mut clients = paths.iter().map(|path| connect(path, 7)).collect::<Result<Vec<_>>>()?;
    for (vm, client) in vms.iter_mut().zip(&mut clients) {
        comes_back(client, MIB).context("a new connection")?;
        wait_for_all(vm, &["sockets hold ended", "sockets call port=52 bytes=1048576 ok"])?;
        comes_back(client, MIB).context("later")?;
    }
    Ok(())
}

fn restore_args(file: &Path, path: &Path) -> Vec<String> {
    ["restore".to_owned(), file.display().to_string(), "--vsock".to_owned(), path.display().to_string()]
        .into()
}

/// Waits for lines with these texts, in any order.
fn wait_for_all(vm: &mut TestVm, texts: &[&str]) -> Result<()> {
    let mut missing = texts.to_vec();
    let already = |text: &&str| !vm.seen().iter().any(|line| line.contains(*text));
    missing.retain(already);
    let deadline = Instant::now() + crate::vm::LIMIT;
    while !missing.is_empty() {
        let line = vm.next_line(deadline).with_context(|| format!("while waiting for {missing:?}"))?;
        ensure!(!line.contains("FAIL"), "the guest says: {line}");
        missing.retain(|text| !line.contains(text));
    }
    Ok(())
}

fn port_path(path: &Path, port: u32) -> PathBuf {
    PathBuf::from(format!("{}_{port}", path.display()))
}

/// What the guest's connections to port 52 come to: it sends back what it gets, until the test ends.
fn echo_server(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(port_path(path, 52))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let (mut from, mut to) = (&stream, &stream);
                let _ = io::copy(&mut from, &mut to);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
    Ok(())
}

fn accepted(listener: &UnixListener) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + crate::vm::LIMIT;
    while Instant::now() < deadline {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_read_timeout(Some(crate::vm::LIMIT))?;
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("the guest does not connect")
}

/// A connection to the guest's port, which the guest has accepted.
fn connect(path: &Path, port: u32) -> Result<UnixStream> {
    let deadline = Instant::now() + crate::vm::LIMIT;
    let mut stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => bail!("{}: {error}", path.display()),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    stream.set_read_timeout(Some(crate::vm::LIMIT))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut line = String::new();
    // One byte at a time: what follows belongs to the connection.
    BufReader::with_capacity(1, &stream).read_line(&mut line)?;
    ensure!(!line.is_empty(), "no answer from port {port}");
    ensure!(line.starts_with("OK ") && line[3..].trim_end().parse::<u32>().is_ok(), "\"{line}\"");
    Ok(stream)
}

/// Sends bytes to an echo, and has them come back while it sends.
fn comes_back(stream: &mut UnixStream, count: usize) -> Result<()> {
    let pattern: Vec<u8> = (0..count).map(|at| (at * 5 + at / 253) as u8).collect();
    let sent = &pattern[..];
    let mut received = vec![0; count];
    std::thread::scope(|scope| {
        let (mut writer, mut reader) = (&*stream, &*stream);
        let write = scope.spawn(move || writer.write_all(sent));
        reader.read_exact(&mut received).context("nothing comes back")?;
        write.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?.context("cannot send")
    })?;
    ensure!(received == sent, "other bytes came back");
    Ok(())
}

/// The connection comes to its end, whatever kind of end.
fn ends(mut stream: UnixStream) -> Result<()> {
    stream.set_read_timeout(Some(crate::vm::LIMIT))?;
    match stream.read(&mut [0]) {
        Ok(0) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Ok(_) => bail!("a byte that nobody sent"),
        Err(error) => Err(error).context("the connection goes on"),
    }
}
