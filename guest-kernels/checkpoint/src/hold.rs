//! The network, held.
//!
//! In: nothing. Out: a table of ours in nf_tables, or none. Holds: while it is there, no IP packet comes in or goes out, on any
//! interface; what comes is as lost as on a bad wire, and its sender tries again.
//!
//! ```text
//! table inet vmm_hold {
//!     chain in { type filter hook prerouting priority -400; policy drop; }
//!     chain out { type filter hook output priority -400; policy drop; }
//! }
//! ```
//!
//! Source: Linux `include/uapi/linux/netfilter/nf_tables.h`, `nfnetlink.h`.

use crate::netlink::{self, ACK, CREATE, Message};
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;

const TABLE: &str = "vmm_hold";
const PRIORITY: i32 = -400;
/// The part of netfilter that this is for.
const NF_TABLES: u8 = 10;
// Kinds of messages: what is between the first two takes effect at once, or nothing of it.
const BEGIN: u16 = 16;
const END: u16 = 17;
const NEW_TABLE: u16 = (NF_TABLES as u16) << 8;
const DELETE_TABLE: u16 = NEW_TABLE | 2;
const NEW_CHAIN: u16 = NEW_TABLE | 3;
// Attributes of tables, and of chains.
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
// Where chains are hooked in, and what they do.
const PREROUTING: u32 = 0;
const OUTPUT: u32 = 3;
const DROP: u32 = 0;
/// `inet` as a family.
const INET: [u8; 4] = [1, 0, 0, 0];

pub(crate) fn hold() -> Result<()> {
    let table = Message::new(NEW_TABLE, CREATE, &INET).text(TABLE_NAME, TABLE);
    tell(vec![table, chain("in", PREROUTING), chain("out", OUTPUT)]).context("cannot hold the network")
}

pub(crate) fn release() -> Result<()> {
    match tell(vec![Message::new(DELETE_TABLE, ACK, &INET).text(TABLE_NAME, TABLE)]) {
        // It is not held.
        Err(Errno::NOENT) => Ok(()),
        done => done.context("cannot release the network"),
    }
}

fn chain(name: &str, hook: u32) -> Message {
    let hook = [(HOOK_NUMBER, hook.to_be_bytes()), (HOOK_PRIORITY, PRIORITY.to_be_bytes())];
    let chain = Message::new(NEW_CHAIN, CREATE, &INET).text(CHAIN_TABLE, TABLE).text(CHAIN_NAME, name);
    chain.text(CHAIN_TYPE, "filter").nested(CHAIN_HOOK, &hook).with(CHAIN_POLICY, &DROP.to_be_bytes())
}

fn tell(messages: Vec<Message>) -> rustix::io::Result<()> {
    let edge = |kind| Message::new(kind, 0, &[0, 0, 0, NF_TABLES]);
    let batch = [vec![edge(BEGIN)], messages, vec![edge(END)]];
    netlink::tell(Some(NETFILTER), batch.concat())
}
