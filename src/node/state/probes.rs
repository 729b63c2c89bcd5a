//! Probes of targets beyond the uplinks: what to probe, and what follows from the findings.

use super::NodeDaemon;
use super::steps::Input;
use crate::api::{FailingProbes, LostUplink};
use crate::datapath::names::of_uplink;
use crate::model::Cluster;
use crate::model::uplink_key::UplinkKey;
use crate::node::holding::ProbedUplinks;
use crate::node::uplink_probes::{Finding, Findings, ProbeSettings, ProbeState, Probing, Wanted};
use crate::node_plan::addresses;
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

/// The losses that an earlier daemon on the node `name` had found. A restart must not end them.
pub(super) fn findings_before(cluster: &Cluster, name: &str) -> Findings {
    let status = cluster.egress_nodes.get(name);
    let lost = status.map(|status| status.of_allocations().lost.as_slice()).unwrap_or_default();
    let found = lost.iter().filter_map(|LostUplink { interface, family, gateway, message }| {
        let (interface, gateway) = (interface.as_deref().map(Into::into), Some(gateway.as_deref()?.into()));
        let key = UplinkKey { interface, ipv4: family == "IPv4", gateway };
        Some((key, Finding { state: ProbeState::Lost, message: message.clone() }))
    });
    found.collect()
}

impl NodeDaemon {
    /// Takes new findings.
    pub fn set_findings(&mut self, findings: Findings) {
        self.findings = findings;
        self.pending.raise(Input::Host);
    }

    /// The uplinks that count as lost because probes fail.
    pub fn failed_probes(&self) -> BTreeSet<UplinkKey> {
        self.with_state(ProbeState::Lost).map(|(key, _)| key.clone()).collect()
    }

    fn with_state(&self, state: ProbeState) -> impl Iterator<Item = (&UplinkKey, &Finding)> {
        self.findings.iter().filter(move |(_, finding)| finding.state == state)
    }

    /// This node's uplinks that gateways probe.
    fn probed(&self) -> BTreeSet<UplinkKey> {
        let mut all = self.view.allocations.uplinks_of(&self.options.name);
        all.retain(|key| key.gateway.is_some());
        all
    }

    /// This node's uplinks that gateways probe, and those among them that count as lost.
    pub(super) fn probed_uplinks(&self) -> ProbedUplinks {
        let all = self.probed();
        let lost = self.with_state(ProbeState::Lost).filter(|(key, _)| all.contains(*key));
        let lost = lost.map(|(key, finding)| (key.clone(), finding.message.clone())).collect();
        ProbedUplinks { all, lost }
    }

    /// The probes that fail here, and for all that is known on the other nodes, too.
    pub(super) fn failing_probes(&self) -> Vec<FailingProbes> {
        let failing = self.with_state(ProbeState::Fails).filter_map(|(key, finding)| {
            let (gateway, family) = (key.gateway.as_ref()?.to_string(), key.family().to_owned());
            Some(FailingProbes { gateway, family, message: finding.message.clone() })
        });
        failing.collect()
    }

    /// Sets what is to be probed: on a node of a gateway its targets of each family that its egress IPs have.
    pub(super) fn set_probes(&self) {
        let prober = self.host.prober();
        if prober.is_none() && self.host.tunnel_end().is_none() {
            // While the tunnel is being repaired, the probes stay.
            return;
        }
        let probes = self.probed().into_iter().filter_map(|key| {
            let probing = self.probing(&key)?;
            Some((key, probing))
        });
        let (device, source) = prober.map_or((0, None), |(device, source)| (device, Some(source)));
        let new = Wanted { device, source, probes: probes.collect() };
        self.listeners.probes.send_if_modified(|now| {
            let changed = *now != new;
            *now = new;
            changed
        });
    }

    fn probing(&self, key: &UplinkKey) -> Option<Probing> {
        let name = key.gateway.as_ref()?;
        let probes = &self.cluster.gateways.get(name)?.probes;
        let allocations = &self.view.allocations.allocations;
        let of_gateway = || allocations.values().filter(|allocation| allocation.gateway == *name);
        let uplink = of_gateway().next().map_or(0, |allocation| allocation.uplink);
        let interfaces = of_gateway().flat_map(|allocation| {
            let of_family = addresses(allocation).filter(|address| address.is_ipv4() == key.ipv4);
            of_family.filter_map(|address| self.egress.uplinks.interface(address, allocation))
        });
        let in_vrf =
            interfaces.filter(|interface| interface.is_in_vrf()).map(|interface| interface.name.as_str().into()).next();
        let link = UplinkKey { gateway: None, ..key.clone() };
        let nodes = self.view.allocations.gateway_nodes.get(name)?;
        let others = nodes.iter().filter(|node| ***node != *self.options.name);
        let peers: BTreeMap<Mac, Ipv6Addr> = others
            .filter_map(|node| {
                let status = self.cluster.egress_nodes.get(node)?;
                let mac = status.tunnel_mac.filter(|_| status.answers)?;
                Some((mac, of_uplink(link.code(), mac)))
            })
            .collect();
        Some(Probing {
            settings: ProbeSettings { interval: probes.interval, misses: probes.misses },
            targets: probes.of_family(key.ipv4).cloned().collect(),
            mark: if uplink == 0 { 0 } else { self.options.marks.uplink(uplink) },
            device: in_vrf,
            peers,
        })
    }
}
