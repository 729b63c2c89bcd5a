//! The forwarding entries and neighbours of other nodes in the tunnel. A fault of one node does not affect others.

use super::{Digest, Host};
use crate::datapath::fdb;
use crate::datapath::names::{HEALTH, PROBER, of_mac, of_uplink};
use crate::datapath::neighbours;
use crate::node_plan::View;
use anyhow::Result;
use egret_nft::Family;
use egret_nft::mac::Mac;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

/// Faults by the object that they concern, such as `node n2` or `network 10.9.0.0/16`.
pub type Faults = BTreeMap<String, String>;

impl Host {
    /// Brings the tunnel's forwarding entries and neighbours in sync.
    pub async fn forwarding(&mut self, view: &View) -> Result<usize> {
        let Some((tunnel, device)) = &self.tunnel else { return Ok(0) };
        let (local, device) = (tunnel.local, *device);
        let mut faults = Faults::new();
        let (mut nodes, mut neighbours): (BTreeMap<Mac, IpAddr>, BTreeMap<Ipv6Addr, Mac>) = Default::default();
        for (mac, peer) in &view.allocations.peers {
            if let Some(why) = unreachable(local, peer.address) {
                faults.insert(of_node(&peer.node), why);
                continue;
            }
            nodes.insert(*mac, peer.address);
            if self.speaks_ipv6() && peer.is_gateway {
                neighbours.insert(of_mac(HEALTH, *mac), *mac);
                let uplinks = view.allocations.uplinks_of(&peer.node);
                neighbours.extend(uplinks.iter().map(|key| (of_uplink(key.code(), *mac), *mac)));
            }
            if self.speaks_ipv6() && view.allocations.is_gateway {
                neighbours.insert(of_mac(PROBER, *mac), *mac);
            }
        }
        let digest = Digest::new(&(&nodes, &neighbours));
        if self.forwarding == Some(digest) {
            // A rejected entry leaves no digest, so the only faults are those of unreachable peers.
            self.faults.peers = faults;
            return Ok(0);
        }
        let of = |mac: &Mac| {
            view.allocations.peers.get(mac).map_or_else(|| "a former node".into(), |peer| of_node(&peer.node))
        };
        let mut entries = fdb::sync_each(&self.routes, device, &nodes).await?;
        let mut refused: Vec<_> = entries.refused.drain(..).map(|(mac, e)| (of(&mac), e)).collect();
        if self.speaks_ipv6() {
            let applied = neighbours::sync(&self.routes, device, &neighbours).await?;
            entries.changes += applied.changes;
            let of_address = |a: &Ipv6Addr| neighbours.get(a).map_or_else(|| "a former node".into(), of);
            refused.extend(applied.refused.into_iter().map(|(address, e)| (of_address(&address), e)));
        }
        self.forwarding = refused.is_empty().then_some(digest);
        faults.extend(refused.into_iter().map(|(of, e)| (of, format!("{e:#}"))));
        self.faults.peers = faults;
        Ok(entries.changes)
    }
}

fn of_node(name: &str) -> String {
    format!("node {name}")
}

/// Why tunnel packets cannot be sent to `to`; `None` if they can.
fn unreachable(local: IpAddr, to: IpAddr) -> Option<String> {
    let (own, theirs) = (Family::of(&local), Family::of(&to));
    if own != theirs {
        return Some(format!(
            "its end of the tunnel is {to}, {theirs}, and this node's is {local}: they cannot reach each other; give all \
             nodes an InternalIP of one family, or name the family with --tunnel-family on all of them"
        ));
    }
    let broadcast = matches!(to, IpAddr::V4(a) if a.is_broadcast());
    (to.is_unspecified() || to.is_multicast() || to.is_loopback() || broadcast).then(|| {
        format!("its end of the tunnel is {to}, which is no host's address; give it another with --tunnel-address")
    })
}
