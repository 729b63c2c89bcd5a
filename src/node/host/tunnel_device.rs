//! The tunnel device, and the way by which packets enter it.

use super::Host;
use crate::check;
use crate::datapath::names::{TUNNEL_PORT, TUNNEL_VNI};
use crate::datapath::sysctl;
use crate::datapath::tunnel::{self, Tunnel};
use crate::datapath::underlay::Underlay;
use crate::datapath::veth_pair;
use crate::model::tunnel_mac;
use crate::node_plan::View;
use anyhow::{Context, Result};
use egret_nft::Nftables;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// How packets enter the tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TunnelEgress {
    /// As the kernel supports it.
    #[default]
    Auto,
    /// By the egress hook of the tunnel device.
    Hook,
    /// By a pair of veths before the tunnel device.
    Veth,
}

impl TunnelEgress {
    /// Whether packets enter the tunnel by a pair of veths.
    pub(super) fn uses_veths(self, nft: &mut Nftables) -> Result<bool> {
        let uses_veths = match self {
            TunnelEgress::Hook => false,
            TunnelEgress::Veth => true,
            TunnelEgress::Auto => !check::has_egress_hook(nft).context("nf_tables: an egress hook, tried")?,
        };
        if uses_veths {
            tracing::info!("packets enter the tunnel by the veths egret-out and egret-hop");
        }
        Ok(uses_veths)
    }
}

impl Host {
    /// Creates or adjusts the tunnel device.
    pub async fn tunnel(&mut self, node: &str, local: IpAddr, view: &View) -> Result<()> {
        let peers = view.allocations.peers.values().map(|p| p.address).filter(|p| p.is_ipv4() == local.is_ipv4());
        let peers: BTreeSet<IpAddr> = peers.collect();
        let known = self.underlay.as_ref().filter(|u| !self.underlay_is_stale && u.local() == local);
        if known.is_none_or(|u| !u.peers().eq(peers.iter().copied())) {
            let known = known.cloned();
            match Underlay::read(&self.routes, local, peers, known).await {
                Ok(underlay) => (self.underlay, self.underlay_is_stale) = (Some(underlay), false),
                // The host has lost the address, maybe for a moment. Existing and new pods keep the tunnel as it is.
                Err(e) if self.tunnel.as_ref().is_some_and(|(there, _)| there.local == local) => {
                    self.underlay_is_stale = true;
                    tracing::warn!("the tunnel keeps its MTU: {e:#}");
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        let Some(mtu) = self.underlay.as_ref().map(tunnel::mtu) else { return Ok(()) };
        let ipv6 = sysctl::ipv6()? && mtu >= tunnel::IPV6_MIN_MTU;
        let tunnel = Tunnel { vni: TUNNEL_VNI, port: TUNNEL_PORT, local, mac: tunnel_mac::of_node(node), mtu, ipv6 };
        if self.tunnel.as_ref().is_none_or(|(there, _)| *there != tunnel) {
            let index = tunnel::ensure(&self.routes, &tunnel).await?;
            self.way_in = if self.uses_veths {
                veth_pair::ensure(&self.routes, &tunnel).await?
            } else {
                veth_pair::remove(&self.routes).await?;
                index
            };
            self.tunnel = Some((tunnel, index));
        }
        Ok(())
    }
}
