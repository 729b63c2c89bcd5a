//! Whether packets that a pod sends arrive at nf_tables, or an eBPF program at its veth takes them elsewhere.
//!
//! A packet of the pod's to an address of documentation (RFC 5737, RFC 3849) comes in by the veth, as if the pod had sent
//! it (`datapath/probe.rs`). A chain in front of all others counts it and drops it.

use crate::datapath::{probe, probe_packet};
use crate::model::trace::{Protocol, TraceSpec};
use anyhow::{Context, Result};
use egret_nft::Nftables;
use egret_nft::rule::{Rule, protocol};
use egret_nft::table::{Chain, Hook, Lifetime, Policy, Table, TableName, hook};
use egret_nft::uapi::NFPROTO_INET;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

const TABLE: TableName = TableName { family: NFPROTO_INET, name: "egret-arrival" };
const ARRIVED: &str = "arrived";
/// In front of the chain on the pod's veth, at 0.
const PRIORITY: i32 = -20;
/// UDP port 9, discard (RFC 863).
const DISCARD: u16 = 9;
const SOURCE_PORT: u16 = 61_871;
const TO4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 71);
const TO6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x7871, 0, 0, 0, 0, 1);
/// How often the counter is read: the packet waits in a queue of the processor (`netif_rx`).
const READS: u32 = 10;
const INTERVAL: Duration = Duration::from_millis(5);

/// One probe at a time: they use one table and one device.
static TURN: Mutex<()> = Mutex::new(());

/// Sends a packet from `source` by the veth, and tells whether it arrives. It takes some tens of milliseconds.
///
/// # Errors
/// The kernel lacks what it needs, or the veth is gone.
pub fn of(veth: u32, name: &str, source: IpAddr) -> Result<bool> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let destination = if source.is_ipv4() { TO4.into() } else { TO6.into() };
    let mut nft = Nftables::open()?;
    nft.apply(&[(TABLE, table(name, source, destination))]).context("the table that counts a probe")?;
    let request = TraceSpec {
        node: String::new(),
        namespace: String::new(),
        pod: String::new(),
        source,
        destination,
        protocol: Protocol::Udp,
        port: DISCARD,
        source_port: Some(SOURCE_PORT),
        seconds: 1,
    };
    probe::send(veth, |from, to| probe_packet::frame(&request, SOURCE_PORT, 0, from, to))?;
    for _ in 0..READS {
        if nft.counters(TABLE)?.get(ARRIVED).is_some_and(|count| count.packets > 0) {
            return Ok(true);
        }
        thread::sleep(INTERVAL);
    }
    Ok(false)
}

fn table(veth: &str, source: IpAddr, destination: IpAddr) -> Table {
    let on_veth = Hook {
        kind: "filter".into(),
        number: hook::INGRESS,
        priority: PRIORITY,
        policy: Policy::Accept,
        device: Some(veth.to_owned()),
    };
    let rule = Rule::new().saddr_in(source.into()).daddr_in(destination.into()).l4(protocol::UDP).dport(DISCARD);
    let chain = Chain::new(Some(on_veth), vec![rule.counter(ARRIVED).drop()]);
    Table {
        chains: [("probe".into(), Arc::new(chain))].into(),
        counters: [ARRIVED].into(),
        lifetime: Lifetime::OfSocket,
        ..Table::default()
    }
}
