//! `vmm-agent`: lets the host run commands in this guest, over vsock.
//!
//! In: connections from the host on vsock port 1024. Out: what their requests ask for, and a line on standard output once
//! the host can connect. Holds: it runs until it is killed; without vsock it says so in one line and ends with status 1.

use agent::vsock::Listener;
use agent::{PORT, server};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let listener = match Listener::bind(PORT) {
        Ok(listener) => listener,
        Err(e) => {
            eprintln!("vmm-agent: cannot listen on vsock port {PORT}: {e}");
            return ExitCode::FAILURE;
        }
    };
    // Whoever started it may have gone on without reading.
    let _ = writeln!(std::io::stdout(), "vmm-agent: listening on vsock port {PORT}");
    loop {
        match listener.accept() {
            Ok(client) => server::serve_aside(client),
            // Out of descriptors or memory: others give some back.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
