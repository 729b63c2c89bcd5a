//! The tunnel device, and the way by which packets enter it.

use super::Host;
use crate::check;
use crate::datapath::names::{TUNNEL_PORT, TUNNEL_VNI};
use crate::datapath::ruleset;
use crate::datapath::sysctl;
use crate::datapath::tunnel::{self, Tunnel};
use crate::datapath::underlay::Underlay;
use crate::datapath::veth_pair;
use crate::model::tunnel_mac;
use crate::node_plan::{TunnelWay, View};
use anyhow::{Context, Result};
use egret_nft::Nftables;
use std::collections::BTreeSet;
use std::fmt::Display;
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

/// The pair of veths before the tunnel device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pair {
    /// An earlier daemon may have left one.
    Unknown,
    Absent,
    /// The index of the device into which packets are routed.
    Present(u32),
}

/// The way by which packets enter the tunnel. The egress hook of the tunnel device is the shorter one. Packets that came by
/// an ifb device pass no egress hook, so while there are any, all packets are routed into the pair of veths.
#[derive(Debug)]
pub(super) struct Entrance {
    /// Whether the kernel has the hook, or the user asks for it.
    has_hook: bool,
    /// Whether the user forbids the pair.
    hook_only: bool,
    /// Whether the kernel has refused the pair or its chain, although it has the hook.
    is_refused: bool,
    /// Whether a warning was logged that it has.
    was_refused: bool,
    /// Whether selected pods' packets come by ifb devices.
    has_ifbs: bool,
    /// Whether the tables of an earlier daemon have the pair's chain.
    had_chain: bool,
    pair: Pair,
    /// The device into which packets were routed last.
    routed: Option<u32>,
}

impl Entrance {
    /// The entrance as an earlier daemon may have left it.
    ///
    /// # Errors
    /// The hook cannot be tried, or the tables cannot be read.
    pub(super) fn new(egress: TunnelEgress, nft: &mut Nftables) -> Result<Self> {
        let has_hook = match egress {
            TunnelEgress::Hook => true,
            TunnelEgress::Veth => false,
            TunnelEgress::Auto => check::has_egress_hook(nft).context("nf_tables: an egress hook, tried")?,
        };
        if !has_hook {
            tracing::info!("packets enter the tunnel by the veths egret-out and egret-hop");
        }
        let hook_only = egress == TunnelEgress::Hook;
        let chains = nft.chains(ruleset::NETDEV).context("nf_tables")?;
        let had_chain = chains.iter().any(|chain| **chain == *ruleset::INTO_TUNNEL);
        // It had limited pods; whether there still are any, the first tables tell.
        let has_ifbs = had_chain;
        Ok(Entrance {
            has_hook,
            hook_only,
            is_refused: false,
            was_refused: false,
            has_ifbs,
            had_chain,
            pair: Pair::Unknown,
            routed: None,
        })
    }

    /// Makes the next reconciliation adjust the pair.
    pub(super) fn invalidate(&mut self) {
        self.pair = Pair::Unknown;
    }

    /// Whether packets are to enter by the pair.
    fn needs_pair(&self) -> bool {
        !self.has_hook || self.has_ifbs && !self.hook_only && !self.is_refused
    }

    /// Does without the pair, although packets come by ifb devices: a pod's limit must not cost the others their rules.
    pub(super) fn refuse_pair(&mut self, why: &impl Display) {
        self.is_refused = true;
        if !std::mem::replace(&mut self.was_refused, true) {
            tracing::warn!(
                "selected pods that an ifb device limits (kubernetes.io/egress-bandwidth) are blocked: {why}"
            );
        }
    }

    /// Makes the next reconciliation try the pair again if the kernel has refused it.
    pub(super) fn try_again(&mut self) {
        self.is_refused = false;
    }

    /// Why packets are to enter by the pair, if they are.
    pub(super) fn reason(&self) -> Option<&'static str> {
        let reason = match self.has_hook {
            true => "packets enter the tunnel by a pair of veths, because ifb devices limit what pods of the node send",
            false => "packets enter the tunnel by a pair of veths",
        };
        self.needs_pair().then_some(reason)
    }

    fn is_routed_into_pair(&self) -> bool {
        self.routed.is_some_and(|device| self.pair == Pair::Present(device))
    }

    /// The device into which packets are to be routed. `tables` are the ones that this daemon has put in force: without the
    /// pair's chain, a packet in the pair is dropped.
    pub(super) fn device(&self, tunnel: u32, tables: Option<TunnelWay>) -> u32 {
        let has_chain = tables.map_or(self.had_chain || !self.has_hook, |way| way.by_veths().is_some());
        match self.pair {
            Pair::Present(device) if self.needs_pair() && has_chain => device,
            _ => tunnel,
        }
    }

    /// Records into which device packets are routed.
    pub(super) fn routed(&mut self, device: u32) {
        self.routed = Some(device);
    }

    /// The chains that the tables are to have.
    pub(super) fn way(&self, tunnel: u32) -> TunnelWay {
        let has_pair = matches!(self.pair, Pair::Present(_)) && (self.needs_pair() || self.is_routed_into_pair());
        match (self.has_hook, has_pair) {
            (false, _) => TunnelWay::Veths { tunnel },
            (true, true) => TunnelWay::Both { tunnel },
            (true, false) => TunnelWay::EgressHook,
        }
    }

    /// Takes whether selected pods' packets come by ifb devices.
    pub(super) fn set_ifbs(&mut self, has_ifbs: bool) {
        let before = self.needs_pair();
        let is_news = std::mem::replace(&mut self.has_ifbs, has_ifbs) != has_ifbs;
        match (before, self.needs_pair()) {
            (false, true) => tracing::info!(
                "packets enter the tunnel by the veths egret-out and egret-hop: ifb devices limit what selected pods send"
            ),
            (true, false) => tracing::info!("packets enter the tunnel by its egress hook again"),
            (false, false) if is_news && has_ifbs && !self.is_refused => tracing::warn!(
                "selected pods that an ifb device limits (kubernetes.io/egress-bandwidth) are blocked: --tunnel-egress=hook"
            ),
            _ => {}
        }
    }

    /// Whether devices, routes or tables are not yet as they are to be, with these tables in force.
    pub(super) fn is_unsettled(&self, way: TunnelWay) -> bool {
        match self.needs_pair() {
            true => way.by_veths().is_none() || !self.is_routed_into_pair(),
            false => way != TunnelWay::EgressHook || self.pair != Pair::Absent,
        }
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
                    return self.pair().await;
                }
                Err(e) => return Err(e),
            }
        }
        let Some(mtu) = self.underlay.as_ref().map(tunnel::mtu) else { return Ok(()) };
        let ipv6 = sysctl::ipv6()? && mtu >= tunnel::IPV6_MIN_MTU;
        let tunnel = Tunnel { vni: TUNNEL_VNI, port: TUNNEL_PORT, local, mac: tunnel_mac::of_node(node), mtu, ipv6 };
        if self.tunnel.as_ref().is_none_or(|(there, _)| *there != tunnel) {
            let index = tunnel::ensure(&self.routes, &tunnel).await?;
            self.entrance.invalidate();
            self.tunnel = Some((tunnel, index));
        }
        self.pair().await
    }

    /// Creates, adjusts or removes the pair of veths.
    async fn pair(&mut self) -> Result<()> {
        let Some((tunnel, _)) = &self.tunnel else { return Ok(()) };
        let entrance = &mut self.entrance;
        let chains = self.ruleset.as_ref().and_then(|ruleset| ruleset.plan().way.by_veths());
        if entrance.needs_pair() {
            if !matches!(entrance.pair, Pair::Present(_)) {
                match veth_pair::ensure(&self.routes, tunnel).await {
                    Ok(device) => entrance.pair = Pair::Present(device),
                    Err(e) if entrance.has_hook => entrance.refuse_pair(&format_args!("{e:#}")),
                    Err(e) => return Err(e),
                }
            }
        } else if entrance.pair != Pair::Absent && chains.is_none() {
            // No packet is routed into it any more.
            veth_pair::remove(&self.routes).await?;
            entrance.pair = Pair::Absent;
        }
        Ok(())
    }
}
