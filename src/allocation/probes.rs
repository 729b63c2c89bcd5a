//! What the nodes of a gateway report about its probes.

use super::allocator::{Allocator, GatewayPool};
use crate::model::condition::Conditions;
use crate::model::text::few;

/// At most so many nodes are named.
const NAMED: usize = 4;

/// Adds the condition `ProbesSucceed` of a gateway with probes.
pub(super) fn add_condition(conditions: &mut Conditions, allocator: &Allocator, gateway_pool: &GatewayPool) {
    if !gateway_pool.gateway.probed().is_any() {
        return;
    }
    let (mut lost, mut failing) = (Vec::new(), Vec::new());
    for (node, _) in &gateway_pool.nodes {
        let Some(status) = allocator.cluster.egress_nodes.get(*node) else { continue };
        let reports = status.of_allocations();
        let of_gateway = |of: Option<&str>| of == Some(&**gateway_pool.name);
        let of_lost = reports.lost.iter().filter(|lost| of_gateway(lost.gateway.as_deref()));
        lost.extend(of_lost.map(|lost| format!("{node} ({})", lost.family)));
        let of_failing = reports.failing_probes.iter().filter(|failing| of_gateway(Some(&failing.gateway)));
        failing.extend(of_failing.map(|failing| format!("{node} ({})", failing.family)));
    }
    if let Some(nodes) = named(&lost) {
        let message = format!(
            "the probes fail on {nodes} and succeed on another node; egress IPs move there; see what lies between these \
             nodes and the targets"
        );
        conditions.add("ProbesSucceed", false, "UplinkLost", message);
    } else if let Some(nodes) = named(&failing) {
        let message = format!(
            "the probes fail on {nodes}, and on no other node they are known to succeed, so nothing moves; see whether \
             the targets of spec.probes answer"
        );
        conditions.add("ProbesSucceed", false, "ProbesFail", message);
    } else {
        conditions.add("ProbesSucceed", true, "ProbesSucceed", "no node reports that they fail");
    }
}

fn named(nodes: &[String]) -> Option<String> {
    (!nodes.is_empty()).then(|| few(nodes, NAMED))
}

#[cfg(test)]
mod tests {
    use crate::api::{FailingProbes, LostUplink, UplinkProbe};
    use crate::fixture::World;
    use std::sync::Arc;

    fn condition(world: &mut World) -> Option<(String, String, String)> {
        let conditions = world.allocate().gateways["g"].conditions.clone();
        let found = conditions.into_iter().find(|c| c.type_ == "ProbesSucceed");
        found.map(|c| (c.status, c.reason, c.message))
    }

    #[test]
    fn the_condition_says_where_probes_fail_and_whether_egress_ips_move() {
        let mut world = World::new(&["192.0.2.50"]);
        assert_eq!(condition(&mut world), None, "a gateway without probes");
        world.gateway("g", &["192.0.2.50"], |spec| {
            spec.probes = vec![UplinkProbe { icmp: Some("192.0.2.1".to_owned()), tcp: None }];
        });
        assert_eq!(condition(&mut world).unwrap().0, "True");

        let mut reports = |lost: Option<&str>, failing: Option<&str>| {
            let node = world.cluster.nodes.keys().next().unwrap().clone();
            let status = Arc::make_mut(world.cluster.egress_nodes.entry(node).or_default());
            let reports = status.of_allocations_mut();
            let family = || "IPv4".to_owned();
            let of_lost = |gateway: &str| LostUplink {
                gateway: Some(gateway.to_owned()),
                family: family(),
                ..LostUplink::default()
            };
            reports.lost = lost.map(of_lost).into_iter().collect();
            let of_failing = |gateway: &str| FailingProbes {
                gateway: gateway.to_owned(),
                family: family(),
                ..FailingProbes::default()
            };
            reports.failing_probes = failing.map(of_failing).into_iter().collect();
            condition(&mut world).unwrap()
        };
        let (status, reason, message) = reports(None, Some("g"));
        assert_eq!((&*status, &*reason), ("False", "ProbesFail"));
        assert!(message.contains("(IPv4)"), "{message}");
        assert_eq!(reports(Some("g"), Some("g")).1, "UplinkLost");
        assert_eq!(reports(Some("other"), Some("other")).0, "True");
    }
}
