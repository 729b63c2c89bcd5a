//! The tunnel device, and the address to which other nodes send tunnel packets.

use super::NodeDaemon;
use crate::model::tunnel_family::{self, internal};
use anyhow::{Context, Result};
use egret_nft::Family;
use std::collections::BTreeMap;
use std::net::IpAddr;

impl NodeDaemon {
    /// The step [`Tunnel`](super::steps::Step::Tunnel).
    pub(super) async fn apply_tunnel(&mut self) -> Result<()> {
        let local = self.find_tunnel_address().await?;
        self.host.tunnel(&self.options.name, local, &self.view).await?;
        self.tunnel_address = Some(local);
        Ok(())
    }

    async fn find_tunnel_address(&mut self) -> Result<IpAddr> {
        self.problems.tunnel_family = None;
        if let Some(address) = self.options.tunnel_address {
            let others = tunnel_family::of_others(&self.cluster, &self.options.name);
            if let Some(family) = others.filter(|family| *family != Family::of(&address)) {
                self.problems.tunnel_family = Some(format!(
                    "most nodes' ends of the tunnel are {family}: {address}, by --tunnel-address, reaches none of them; give an \
                     {family} address of this host"
                ));
            }
            return Ok(address);
        }
        let Some(node) = self.cluster.nodes.get(&*self.options.name) else {
            // If the Node was deleted while the daemon runs, its egress IPs must still be handed over.
            return self.tunnel_address.with_context(|| {
                format!("the cluster has no Node {:?}; give the name that it has there with --name", self.options.name)
            });
        };
        let family = self.options.tunnel_family.unwrap_or_else(|| tunnel_family::of_cluster(&self.cluster));
        let of_family = |address: &IpAddr| Family::of(address) == family;
        if let Some(address) = internal(node).filter(of_family).find(|a| self.facts.addresses.contains(a)) {
            return Ok(address);
        }
        // The address may have been added since the facts were read.
        let here = self.host.facts(BTreeMap::new()).await?.addresses;
        let own: Vec<IpAddr> = internal(node).filter(|address| here.contains(address)).collect();
        let first = own.iter().copied().find(of_family).or(own.first().copied()).with_context(|| {
            format!(
                "none of the InternalIPs of Node {:?} is on this host; name one with --tunnel-address",
                self.options.name
            )
        })?;
        if !of_family(&first) {
            self.problems.tunnel_family = Some(format!(
                "the cluster's tunnel is {family}, and no InternalIP of Node {:?} on this host is: {first} reaches no node whose end \
                 is {family}; give the Node an {family} InternalIP, or name the tunnel's family with --tunnel-family on all nodes",
                self.options.name
            ));
        }
        Ok(first)
    }
}
