//! The condition `PortsNearlyExhausted`: what owners report about the source ports of their egress IPs.

use crate::api::{Allocation, PortsNearlyExhausted};
use crate::model::Cluster;
use crate::model::text::few;
use std::collections::HashMap;

/// The condition of policies and gateways. It is absent while there are enough ports.
pub const PORTS_NEARLY_EXHAUSTED: &str = "PortsNearlyExhausted";
/// The reason of [`PORTS_NEARLY_EXHAUSTED`].
pub const FEW_PORTS: &str = "FewSourcePorts";
/// At most so many destinations are named.
const NAMED: usize = 3;

/// What the owners of egress IPs report.
pub struct PortReports<'a> {
    by_id: HashMap<u16, Vec<&'a PortsNearlyExhausted>>,
}

impl<'a> PortReports<'a> {
    /// The reports of all nodes that hold the egress IPs that they report about.
    pub fn new(cluster: &'a Cluster) -> Self {
        let mut by_id: HashMap<u16, Vec<&PortsNearlyExhausted>> = HashMap::new();
        for (_, node) in cluster.egress_nodes.iter().filter(|(name, _)| cluster.nodes.contains_key(*name)) {
            let reports = node.of_allocations();
            for found in reports.ports_nearly_exhausted.iter().filter(|found| reports.held.contains(&found.id)) {
                by_id.entry(found.id).or_default().push(found);
            }
        }
        PortReports { by_id }
    }

    /// The message for a policy with this allocation, if its egress IP has few ports left.
    pub fn of_policy(&self, id: u16) -> Option<String> {
        let found = self.by_id.get(&id)?;
        Some(format!(
            "{}: when all are in use, new connections there are dropped; divide its connections among several egress \
             IPs (addresses or addressCount, spread: Connection), or let clients keep connections open{}",
            listed(found),
            from_higher_ports(found)
        ))
    }

    /// The message for a gateway with these allocations, if one of their egress IPs has few ports left.
    pub fn of_gateway(&self, allocations: &[Allocation]) -> Option<String> {
        let found: Vec<&PortsNearlyExhausted> =
            allocations.iter().filter_map(|allocation| self.by_id.get(&allocation.id)).flatten().copied().collect();
        (!found.is_empty()).then(|| {
            format!(
                "{}: when all are in use, new connections there are dropped; give the policies of these egress IPs more \
                 of them, or let clients keep connections open{}",
                listed(&found),
                from_higher_ports(&found)
            )
        })
    }
}

fn listed(found: &[&PortsNearlyExhausted]) -> String {
    let one = |found: &&PortsNearlyExhausted| {
        let PortsNearlyExhausted { address, destination, port, protocol, ports, .. } = found;
        let server = std::net::SocketAddr::new(*destination, *port);
        format!("connections from {address} to {server} ({protocol}) use more than 70 % of the source ports {ports}")
    };
    few(found.iter().map(one), NAMED)
}

/// The remedy where the range is a small one.
fn from_higher_ports(found: &[&PortsNearlyExhausted]) -> &'static str {
    let is_high = |found: &&PortsNearlyExhausted| found.ports.starts_with("1024-");
    if found.iter().all(is_high) { "" } else { ", or let them send from ports above 1023, of which there are 64,512" }
}
