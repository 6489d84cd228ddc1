//! One exit of one vCPU, forwarded to a bus or turned into a reason to stop.
//!
//! In: a vCPU that is to run, the buses. Out: go on, a kick was seen, or the reason why the guest can't go on. Holds: an
//! exit that nobody knows stops the machine with a message; it is never ignored.

use crate::fault;
use crate::vcpu::Vcpu;
use devices::{Bus, Request};
use kvm_ioctls::VcpuExit;
use std::sync::Arc;

/// The two address spaces that a guest reaches devices through.
#[derive(Clone)]
pub struct Buses {
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Memory-mapped devices.
    pub memory: Arc<Bus>,
}

/// Why the guest can't go on by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A device was asked for something that ends the VM.
    Guest(Request),
    /// KVM_EXIT_SHUTDOWN: the last resort of a kernel that wants a reset, or of one that has lost its way.
    TripleFault,
    /// KVM can't go on; the text says where and why.
    Fault(String),
}

/// What a step led to.
pub enum Step {
    /// The exit is dealt with.
    Continue,
    /// A kick, or a signal that isn't ours.
    Interrupted,
    /// The guest has to stop.
    Stop(Stop),
}

/// A port access as KVM hands it over: possibly many elements of `size` bytes, for a string instruction.
struct PortData {
    port: u16,
    write: bool,
    bytes: *mut u8,
    len: usize,
}

/// Runs the guest until its next exit, and answers it.
pub fn step(vcpu: &mut Vcpu, buses: &Buses) -> Step {
    match vcpu.fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            let access = PortData { port, write: true, bytes: data.as_ptr().cast_mut(), len: data.len() };
            port_access(vcpu, access, &buses.ports)
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            let access = PortData { port, write: false, bytes: data.as_mut_ptr(), len: data.len() };
            port_access(vcpu, access, &buses.ports)
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.memory.read(address, data);
            Step::Continue
        }
        Ok(VcpuExit::MmioWrite(address, data)) => requested(buses.memory.write(address, data)),
        Ok(VcpuExit::Intr | VcpuExit::Hlt) => Step::Continue,
        Ok(VcpuExit::Shutdown) => Step::Stop(Stop::TripleFault),
        // KVM gives the bytes of an instruction that it can't emulate, so guest memory isn't needed.
        Ok(_) => Step::Stop(Stop::Fault(fault::report(&mut vcpu.fd, |_, _| false))),
        Err(error) => failed_run(error.errno()),
    }
}

/// EAGAIN is a vCPU that waits for its start-up IPI.
fn failed_run(errno: i32) -> Step {
    match errno {
        libc::EINTR => Step::Interrupted,
        libc::EAGAIN => Step::Continue,
        _ => Step::Stop(Stop::Fault(format!("KVM_RUN failed: {}", std::io::Error::from_raw_os_error(errno)))),
    }
}

/// Each element of a string instruction is an access of its own. After a request the rest is dropped: the machine ends.
fn port_access(vcpu: &mut Vcpu, access: PortData, ports: &Bus) -> Step {
    // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the field of the union that the kernel filled.
    let size = usize::from(unsafe { vcpu.fd.get_kvm_run().__bindgen_anon_1.io.size }).max(1);
    // SAFETY: pointer and length are those of the slice in the vCPU's mapped kvm_run, which nothing else uses until the
    // next KVM_RUN of this same thread.
    let data = unsafe { std::slice::from_raw_parts_mut(access.bytes, access.len) };
    let address = u64::from(access.port);
    for element in data.chunks_mut(size) {
        if !access.write {
            ports.read(address, element);
        } else if let Some(request) = ports.write(address, element) {
            return Step::Stop(Stop::Guest(request));
        }
    }
    Step::Continue
}

fn requested(request: Option<Request>) -> Step {
    request.map_or(Step::Continue, |request| Step::Stop(Stop::Guest(request)))
}
