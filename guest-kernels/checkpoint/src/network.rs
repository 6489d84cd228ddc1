//! The guest's network, which is the workload's too.
//!
//! In: an address, or what was recorded of it on `/persist`. Out: `eth0` with that address, down, and then up. Holds: while a
//! connection is restored the interface is down: what peers send waits on the host, and is there when the interface comes up.
//!
//! Source: rtnetlink(7), Linux `include/uapi/linux/rtnetlink.h`.

use crate::netlink::{self, ACK, Message, REPLACE, ROUTE};
use crate::place;
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;

const RECORD: &str = "/persist/.checkpoint/network";
const INTERFACE: &str = "eth0";
/// Without a route to its peer no connection is restored, even one that may send nothing yet. This one leads nowhere, by `lo`, and any
/// other comes before it.
const LAST: u32 = 4_000_000_000;
/// The number that `lo` has everywhere.
const LOOPBACK: u32 = 1;

// Kinds of messages, and attributes.
const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const LINK_NAME: u16 = 3;
const ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const ROUTE_BY: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;
const ROUTE_PRIORITY: u16 = 6;
// Of a route: the table, who made it, how far it reaches, and that it is an ordinary one.
const MAIN: u8 = 254;
const BOOT: u8 = 3;
const EVERYWHERE: u8 = 0;
const LINK: u8 = 253;
const NOWHERE: u8 = 255;
const UNICAST: u8 = 1;

/// An interface's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    address: IpAddr,
    /// Of the address, which all of its network have.
    bits: u8,
    gateway: Option<IpAddr>,
}

impl Network {
    /// `10.0.0.2/24` and `10.0.0.1`, or nothing if they mean nothing.
    pub(crate) fn parse(address: &str, gateway: Option<&str>) -> Option<Network> {
        let (address, bits) = address.split_once('/')?;
        let (address, bits): (IpAddr, u8) = (address.parse().ok()?, bits.parse().ok()?);
        let gateway: Option<IpAddr> = gateway.map(str::parse).transpose().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let alike = gateway.is_none_or(|gateway| gateway.is_ipv4() == address.is_ipv4());
        (bits <= most && alike).then_some(Network { address, bits, gateway })
    }

    fn recorded() -> Result<Option<Network>> {
        let text = match fs::read_to_string(RECORD) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context(format!("cannot read {RECORD}")),
        };
        let mut lines = text.lines();
        let network = lines.next().and_then(|address| Network::parse(address, lines.next()));
        Ok(Some(network.with_context(|| format!("{RECORD} has no address: {text}"))?))
    }

    /// Keeps it for the kernels to come.
    pub(crate) fn record(&self) -> Result<()> {
        let gateway = self.gateway.map_or(String::new(), |gateway| format!("{gateway}\n"));
        place::put(RECORD, &format!("{}/{}\n{gateway}", self.address, self.bits))
    }

    fn family(&self) -> u8 {
        // AF_INET, AF_INET6.
        if self.address.is_ipv4() { 2 } else { 10 }
    }

    /// The address of that interface, in place of the same with another prefix.
    fn assign(&self, interface: u32) -> Message {
        let head = [[self.family(), self.bits, 0, 0], interface.to_ne_bytes()].concat();
        let address = octets(self.address);
        Message::new(NEW_ADDRESS, REPLACE, &head).with(ADDRESS_LOCAL, &address).with(ADDRESS, &address)
    }

    /// A route to everybody, with its flags.
    fn route(&self, kind: u16, flags: u16, [who, reach, what]: [u8; 3]) -> Message {
        Message::new(kind, flags, &[self.family(), 0, 0, 0, MAIN, who, reach, what, 0, 0, 0, 0])
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn link_up(name: &str) -> Message {
    // Family, type, number; flags, and which of them are meant: IFF_UP.
    let head = [[0; 4], [0; 4], 1u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat();
    Message::new(NEW_LINK, ACK, &head).text(LINK_NAME, name)
}

fn interface() -> Result<u32> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    name_to_index(&any, INTERFACE).with_context(|| format!("there is no {INTERFACE}"))
}

fn nowhere(route: Message) -> Message {
    route.with(ROUTE_BY, &LOOPBACK.to_ne_bytes()).with(ROUTE_PRIORITY, &LAST.to_ne_bytes())
}

fn tell(message: Message) -> rustix::io::Result<()> {
    netlink::tell(ROUTE, vec![message])
}

/// Gives the interface the recorded address, if there is one, and leaves it down.
pub(crate) fn attach() -> Result<()> {
    let Some(network) = Network::recorded()? else { return Ok(()) };
    tell(link_up("lo")).context("cannot bring lo up")?;
    tell(network.assign(interface()?)).with_context(|| {
        format!("cannot give {INTERFACE} the address {}/{}", network.address, network.bits)
    })?;
    let route = network.route(NEW_ROUTE, REPLACE, [BOOT, LINK, UNICAST]);
    tell(nowhere(route)).context("cannot make a route that leads nowhere")
}

/// Brings the interface up, with the recorded gateway.
pub(crate) fn up() -> Result<()> {
    let Some(network) = Network::recorded()? else { return Ok(()) };
    tell(link_up(INTERFACE)).with_context(|| format!("cannot bring {INTERFACE} up"))?;
    if let Some(gateway) = network.gateway {
        let route = network.route(NEW_ROUTE, REPLACE, [BOOT, EVERYWHERE, UNICAST]);
        tell(route.with(ROUTE_GATEWAY, &octets(gateway)).with(ROUTE_BY, &interface()?.to_ne_bytes()))
            .with_context(|| format!("cannot make a route by {gateway}"))?;
    }
    match tell(nowhere(network.route(DELETE_ROUTE, ACK, [0, NOWHERE, 0]))) {
        // It is there if this kernel was attached and not up before.
        Err(Errno::SRCH) => Ok(()),
        done => done.context("cannot remove the route that leads nowhere"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_prefix_and_a_gateway_of_its_kind() {
        let network = Network::parse("10.0.0.2/24", Some("10.0.0.1")).unwrap();
        assert_eq!((network.bits, network.gateway), (24, Some([10, 0, 0, 1].into())));
        assert!(Network::parse("fd00::2/64", Some("fe80::1")).is_some());
        for (address, gateway) in
            [("10.0.0.2", None), ("10.0.0.2/33", None), ("10.0.0/24", None), ("10.0.0.2/24", Some("fe80::1"))]
        {
            assert_eq!(Network::parse(address, gateway), None, "{address}");
        }
    }
}
