//! What a restored machine has of this host in place of what its snapshot names.
//!
//! In: wishes from the command line. Out: the devices' states, changed. Holds: only the host's side changes, and of what
//! the guest knows at most a MAC address; a wish for a device that the machine has not is refused by name.

use crate::network::{self, NetPlace, NetworkError};
use crate::virtio::{DeviceState, SlotState};
use std::path::PathBuf;

/// The host's sides to take instead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The vsock device's socket file.
    pub vsock: Option<PathBuf>,
    /// The network devices' taps.
    pub nets: Vec<NetPlace>,
}

/// A wish that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum OverrideError {
    /// There is no such device to give it to.
    #[error("{option}: the machine has no {kind} device")]
    NoDevice {
        /// The option.
        option: &'static str,
        /// What is not there.
        kind: &'static str,
    },
    /// A network device.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

impl Overrides {
    /// Changes the devices' states.
    ///
    /// # Errors
    /// A device that isn't there, or one that can't go on with what it has.
    pub fn apply(self, slots: &mut [SlotState]) -> Result<(), OverrideError> {
        if let Some(path) = self.vsock {
            let place = slots.iter_mut().find_map(|slot| match &mut slot.device {
                DeviceState::Vsock { path, .. } => Some(path),
                _ => None,
            });
            *place.ok_or(OverrideError::NoDevice { option: "--vsock", kind: "vsock" })? = path;
        }
        Ok(network::place(slots, &self.nets)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::virtio::{MmioState, VsockState};

    fn slot(id: &str, device: DeviceState) -> SlotState {
        SlotState { id: id.to_owned(), device }
    }

    #[test]
    fn a_clone_gets_a_socket_of_its_own() {
        let state = MmioState { registers: None, device: VsockState::new(3) };
        let mut slots = vec![
            slot("rng", DeviceState::Rng(MmioState::default())),
            slot("vsock", DeviceState::Vsock { path: "/a".into(), state }),
        ];
        Overrides::default().apply(&mut slots).unwrap();
        assert!(
            matches!(&slots[1].device, DeviceState::Vsock { path, .. } if path == "/a".as_ref() as &std::path::Path)
        );
        Overrides { vsock: Some("/b".into()), ..Overrides::default() }.apply(&mut slots).unwrap();
        assert!(
            matches!(&slots[1].device, DeviceState::Vsock { path, .. } if path == "/b".as_ref() as &std::path::Path)
        );
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let mut slots = vec![slot("rng", DeviceState::Rng(MmioState::default()))];
        let error =
            Overrides { vsock: Some("/b".into()), ..Overrides::default() }.apply(&mut slots).unwrap_err();
        assert_eq!(error.to_string(), "--vsock: the machine has no vsock device");
    }
}
