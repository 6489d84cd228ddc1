//! What a user asks of the network: `--net` of `vmm run`, and of `vmm restore`.
//!
//! In: text; the devices of a snapshot. Out: network devices after reset, or those of the snapshot on this host's taps.
//! Holds: an address is given once and kept; no two devices of a machine have one tap, and none has a tap of another process.

use crate::options::{Options, OptionsError};
use crate::tap::{TapError, TapName};
use crate::virtio::{DeviceState, SlotState};
use devices::virtio::{Mac, MacError, MmioState, NetState};
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;

/// `--net` of `vmm run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetWish {
    id: Option<String>,
    tap: TapName,
    mac: Option<Mac>,
    mtu: Option<u16>,
}

/// `--net` of `vmm restore`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetPlace {
    id: String,
    tap: TapName,
    mac: Option<Mac>,
}

/// A wish that can't be read, or can't be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No list of options.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// No tap's name.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// No descriptor's number.
    #[error("`{0}` is no file descriptor: expected a number")]
    Descriptor(String),
    /// Neither a name nor a descriptor, or both.
    #[error("expected either tap=NAME or fd=NUMBER")]
    OneTap,
    /// No address.
    #[error(transparent)]
    Mac(#[from] MacError),
    /// No MTU.
    #[error("mtu={0}: expected a number from 68 to 65535")]
    Mtu(String),
    /// Not an id and a tap.
    #[error("`{0}`: expected ID=NAME or ID=fd:NUMBER")]
    Place(String),
    /// The snapshot has no such device.
    #[error("no network device `{id}` in the snapshot: it has {known}")]
    Unknown {
        /// What was asked for.
        id: String,
        /// Those there are.
        known: String,
    },
    /// A descriptor of a process that is gone.
    #[error(
        "network device `{0}` had a tap that came as a file descriptor: give it one with --net {0}=NAME or --net {0}=fd:NUMBER"
    )]
    Gone(String),
    /// Two devices on one tap.
    #[error("tap {0} is given to two network devices")]
    Twice(TapName),
    /// No random address.
    #[error("cannot get random bytes for a MAC address")]
    Random(#[source] io::Error),
}

/// The least MTU (virtio 1.2, section 5.1.4.1).
const LEAST_MTU: u16 = 68;

impl NetWish {
    /// Reads `tap=NAME,mac=…,id=…,mtu=…`, with `fd=NUMBER` in place of `tap=NAME`; a name alone is enough.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn parse(text: &str) -> Result<Self, NetworkError> {
        let mut options = Options::parse(text, "tap")?;
        let tap = match (options.take("tap"), options.take("fd")) {
            (Some(name), None) => TapName::interface(&name)?,
            (None, Some(number)) => descriptor(&number)?,
            _ => return Err(NetworkError::OneTap),
        };
        let mac = options.take("mac").map(|mac| mac.parse()).transpose()?;
        let id = options.take("id");
        let mtu = options.take("mtu").map(mtu).transpose()?;
        options.done("tap, fd, mac, id, mtu")?;
        Ok(Self { id, tap, mac, mtu })
    }

    fn slot(&self, number: usize) -> Result<SlotState, NetworkError> {
        let mac = self.mac.map_or_else(random_mac, Ok)?;
        let device = NetState { mac, mtu: self.mtu, ..NetState::default() };
        let state = MmioState { registers: None, device };
        let id = self.id.clone().unwrap_or_else(|| format!("net{number}"));
        Ok(SlotState { id, device: DeviceState::Net { tap: self.tap.clone(), state } })
    }
}

impl NetPlace {
    /// Reads `ID=NAME` or `ID=fd:NUMBER`, with `,mac=…` behind it if need be.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn parse(text: &str) -> Result<Self, NetworkError> {
        let place = || NetworkError::Place(text.to_owned());
        let (id, rest) = text.split_once('=').filter(|(id, _)| !id.is_empty()).ok_or_else(place)?;
        let mut options = Options::parse(rest, "tap")?;
        let tap = options.take("tap").ok_or_else(place)?;
        let tap = match tap.strip_prefix("fd:") {
            Some(number) => descriptor(number)?,
            None => TapName::interface(&tap)?,
        };
        let mac = options.take("mac").map(|mac| mac.parse()).transpose()?;
        options.done("mac")?;
        Ok(Self { id: id.to_owned(), tap, mac })
    }
}

fn descriptor(text: &str) -> Result<TapName, NetworkError> {
    let number = text.parse().ok().filter(|&fd| fd >= 0);
    number.map(TapName::Descriptor).ok_or_else(|| NetworkError::Descriptor(text.to_owned()))
}

fn mtu(text: String) -> Result<u16, NetworkError> {
    text.parse().ok().filter(|&mtu| mtu >= LEAST_MTU).ok_or(NetworkError::Mtu(text))
}

/// The network devices of a new machine. One without an id is `net0`, `net1` and so on; one without an address gets a
/// random one, which it keeps.
///
/// # Errors
/// A tap that is there twice, or a host without random bytes.
pub fn fresh(wishes: &[NetWish]) -> Result<Vec<SlotState>, NetworkError> {
    let devices = wishes.iter().enumerate().map(|(number, wish)| wish.slot(number));
    let devices = devices.collect::<Result<Vec<_>, _>>()?;
    each_its_own(&devices)?;
    Ok(devices)
}

/// Puts a snapshot's network devices on this host's taps. Those that no place is given for keep the tap of their name.
///
/// # Errors
/// A device that isn't there, or one whose tap was a descriptor of a process that is gone.
pub fn place(devices: &mut [SlotState], places: &[NetPlace]) -> Result<(), NetworkError> {
    let known = known(devices);
    if let Some(place) = places.iter().find(|place| !known.contains(&place.id)) {
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(NetworkError::Unknown { id: place.id.clone(), known });
    }
    for slot in devices.iter_mut() {
        let DeviceState::Net { tap, state } = &mut slot.device else { continue };
        match places.iter().rfind(|place| place.id == slot.id) {
            Some(place) => {
                tap.clone_from(&place.tap);
                state.device.mac = place.mac.unwrap_or(state.device.mac);
            }
            None if matches!(tap, TapName::Descriptor(_)) => return Err(NetworkError::Gone(slot.id.clone())),
            None => {}
        }
    }
    each_its_own(devices)
}

fn known(devices: &[SlotState]) -> Vec<String> {
    let is_net = |slot: &&SlotState| matches!(slot.device, DeviceState::Net { .. });
    devices.iter().filter(is_net).map(|slot| slot.id.clone()).collect()
}

fn each_its_own(devices: &[SlotState]) -> Result<(), NetworkError> {
    let mut taps = Vec::new();
    for slot in devices {
        let DeviceState::Net { tap, .. } = &slot.device else { continue };
        if taps.contains(&tap) {
            return Err(NetworkError::Twice(tap.clone()));
        }
        taps.push(tap);
    }
    Ok(())
}

fn random_mac() -> Result<Mac, NetworkError> {
    let mut bytes = [0; 6];
    // So few bytes come whole or not at all (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty()).map_err(|errno| NetworkError::Random(errno.into()))?;
    Ok(Mac::from_random(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(text: &str) -> String {
        match NetWish::parse(text) {
            Ok(wish) => format!("{wish:?}"),
            Err(error) => error.to_string(),
        }
    }

    fn devices(wishes: &[&str]) -> Vec<SlotState> {
        let wishes: Vec<_> = wishes.iter().map(|text| NetWish::parse(text).unwrap()).collect();
        fresh(&wishes).unwrap()
    }

    fn placed(wishes: &[&str], places: &[&str]) -> Result<Vec<(TapName, Mac)>, String> {
        let mut devices = devices(wishes);
        let places: Vec<_> = places.iter().map(|text| NetPlace::parse(text).unwrap()).collect();
        place(&mut devices, &places).map_err(|error| error.to_string())?;
        let end = |slot: SlotState| match slot.device {
            DeviceState::Net { tap, state } => (tap, state.device.mac),
            _ => unreachable!("only network devices were asked for"),
        };
        Ok(devices.into_iter().map(end).collect())
    }

    #[test]
    fn wishes_are_read() {
        let name = NetWish::parse("tap0").unwrap();
        assert_eq!(
            name,
            NetWish { id: None, tap: TapName::interface("tap0").unwrap(), mac: None, mtu: None }
        );
        let all = NetWish::parse("fd=5,mac=02:00:00:00:00:01,id=lan,mtu=9000").unwrap();
        let mac = Some(Mac([2, 0, 0, 0, 0, 1]));
        assert_eq!(
            all,
            NetWish { id: Some("lan".into()), tap: TapName::Descriptor(5), mac, mtu: Some(9000) }
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(wish("tap=a,fd=3"), "expected either tap=NAME or fd=NUMBER");
        assert_eq!(wish("mac=02:00:00:00:00:01"), "expected either tap=NAME or fd=NUMBER");
        assert_eq!(wish("tap0,mtu=67"), "mtu=67: expected a number from 68 to 65535");
        assert_eq!(wish("fd=-1"), "`-1` is no file descriptor: expected a number");
        assert_eq!(wish("tap0,bridge=br0"), "unknown option `bridge`: expected tap, fd, mac, id, mtu");
        for text in ["net0", "=tap0", "net0=", "net0=fd:x", "net0=tap0,mtu=1500", "net0=tap0,mac=x"] {
            assert!(NetPlace::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_are_numbered_and_addresses_differ() {
        let devices = devices(&["tap0", "tap1,id=lan", "tap2"]);
        assert_eq!(devices.iter().map(|slot| &slot.id[..]).collect::<Vec<_>>(), ["net0", "lan", "net2"]);
        let ends = placed(&["tap0", "tap1"], &[]).unwrap();
        assert_ne!(ends[0].1, ends[1].1);
    }

    #[test]
    fn a_restored_device_keeps_its_address_on_another_tap() {
        let wishes = ["tap0,mac=02:00:00:00:00:01", "tap1,mac=02:00:00:00:00:02"];
        let ends = placed(&wishes, &["net1=fd:7", "net0=tap9,mac=02:00:00:00:00:09"]).unwrap();
        assert_eq!(ends[0], (TapName::Interface("tap9".into()), Mac([2, 0, 0, 0, 0, 9])));
        assert_eq!(ends[1], (TapName::Descriptor(7), Mac([2, 0, 0, 0, 0, 2])));
    }

    #[test]
    fn places_that_are_none_are_refused() {
        let refused = |wishes: &[&str], places: &[&str]| placed(wishes, places).unwrap_err();
        let unknown = refused(&["tap0"], &["net7=tap1"]);
        assert_eq!(unknown, "no network device `net7` in the snapshot: it has net0");
        assert!(refused(&[], &["net0=tap1"]).ends_with("it has none"));
        assert!(refused(&["fd=3"], &[]).starts_with("network device `net0` had a tap that came as a file"));
        assert_eq!(refused(&["tap0", "tap1"], &["net1=tap0"]), "tap `tap0` is given to two network devices");
    }
}
