//! One exit of one vCPU, forwarded to a bus or turned into a reason to stop.
//!
//! In: a vCPU that is to run, the buses. Out: go on, a kick was seen, or the reason why the guest can't go on. Holds: an
//! exit that nobody knows stops the machine with a message; it is never ignored.

use crate::fault;
use crate::vcpu::Vcpu;
use devices::{Bus, Request};
use kvm_ioctls::VcpuExit;
use std::slice;
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

/// Runs the guest until its next exit, and answers it.
pub fn step(vcpu: &mut Vcpu, buses: &Buses) -> Step {
    match vcpu.fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            let (data, len) = (data.as_ptr(), data.len());
            // SAFETY: the slice is in the vCPU's mapped kvm_run, which stays as it is until this thread's next KVM_RUN.
            let data = unsafe { slice::from_raw_parts(data, len) };
            write_port(&buses.ports, port, data, element_size(vcpu))
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            let (data, len) = (data.as_mut_ptr(), data.len());
            let size = element_size(vcpu);
            // SAFETY: as above, and nobody else has a reference into it.
            let data = unsafe { slice::from_raw_parts_mut(data, len) };
            data.chunks_mut(size).for_each(|element| buses.ports.read(u64::from(port), element));
            Step::Continue
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

/// Bytes of one element of the last port access. A string instruction has many, each an access of its own.
fn element_size(vcpu: &mut Vcpu) -> usize {
    // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the field of the union that the kernel filled.
    usize::from(unsafe { vcpu.fd.get_kvm_run().__bindgen_anon_1.io.size }).max(1)
}

/// After a request the rest is dropped: the machine ends.
fn write_port(ports: &Bus, port: u16, data: &[u8], size: usize) -> Step {
    requested(data.chunks(size).find_map(|element| ports.write(u64::from(port), element)))
}

fn requested(request: Option<Request>) -> Step {
    request.map_or(Step::Continue, |request| Step::Stop(Stop::Guest(request)))
}
