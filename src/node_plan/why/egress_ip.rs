//! The egress IP that a pod has of a policy.

use crate::api::{Condition, Spread};
use crate::model::marks::EgressId;
use crate::model::precedence::Ranked;
use crate::model::target::Target;
use crate::model::{Client, Cluster, ObjectKey, Pod, addresses_of};
use crate::node_plan::allocations::NodeAllocations;
use crate::node_plan::expected;
use std::net::IpAddr;

/// The egress IP that a pod has of a policy.
pub(super) struct EgressIp {
    /// Its allocation.
    pub(super) id: Option<EgressId>,
    /// Its address of the target's family.
    pub(super) address: Option<IpAddr>,
    /// Whether there is one, of whatever family.
    pub(super) has_allocation: bool,
    /// Whether a node holds it.
    pub(super) ready: Option<Ready>,
    /// Which of several it is, as text.
    pub(super) which: String,
}

/// Whether a node holds an egress IP.
pub(super) struct Ready {
    /// `True`, `False` or `Unknown`.
    pub(super) status: String,
    /// For users.
    pub(super) message: String,
}

impl From<&Condition> for Ready {
    fn from(condition: &Condition) -> Self {
        Ready { status: condition.status.clone(), message: condition.message.clone() }
    }
}

/// The egress IP that a pod has of the policy that decides.
pub(super) fn of_pod(cluster: &Cluster, pod: (&ObjectKey, &Pod), ranked: &Ranked, target: Target) -> EgressIp {
    let status = cluster.policy_statuses.get(&ranked.key);
    let condition = |type_: &str| status.and_then(|status| status.conditions.iter().find(|c| c.type_ == type_));
    let towards = |a: &IpAddr| a.is_ipv4() == target.address.is_ipv4();
    if ranked.policy.address.count() < 2 {
        let addresses = status.and_then(|status| status.addresses.as_ref());
        let lists = cluster.allocations().find(|allocation| allocation.policies.contains(&ranked.key));
        return EgressIp {
            id: lists.map(|allocation| allocation.id),
            address: addresses.and_then(|pair| addresses_of(pair).find(towards)),
            has_allocation: addresses.is_some(),
            ready: condition("Ready").map(Into::into),
            which: String::new(),
        };
    }
    let Some(chosen) = chosen(cluster, pod, ranked) else {
        let refused = condition("Accepted").filter(|accepted| accepted.status == "False");
        let ready = refused.map(|accepted| Ready { status: "False".to_owned(), message: accepted.message.clone() });
        return EgressIp { id: None, address: None, has_allocation: false, ready, which: String::new() };
    };
    let reported = status.and_then(|status| status.egress_ips.iter().find(|of| of.address == chosen.address));
    let ready = reported.map(|of| {
        let holds = match of.ready.as_str() {
            "True" => "holds",
            "False" => "does not hold",
            _ => "may hold",
        };
        let message = match &of.node {
            Some(node) => format!("node {node:?} {holds} it"),
            None => "no node holds it".to_owned(),
        };
        Ready { status: of.ready.clone(), message }
    });
    EgressIp {
        id: Some(chosen.id),
        address: addresses_of(&chosen.address).find(towards),
        has_allocation: true,
        ready,
        which: format!(", {}", chosen.which),
    }
}

/// An egress IP that a policy with several has for a pod.
pub(super) struct Chosen {
    id: EgressId,
    pub(super) address: crate::api::AddressPair,
    /// Which it is, as text.
    pub(super) which: String,
}

/// The egress IP that a policy with several has for a pod; `None`: it has none for it.
pub(super) fn chosen(cluster: &Cluster, (key, pod): (&ObjectKey, &Pod), ranked: &Ranked) -> Option<Chosen> {
    let Ranked { key: of, policy, .. } = ranked;
    let node = pod.node.as_deref().unwrap_or_default();
    let allocations = NodeAllocations::new(cluster, node, &expected::facts(cluster, node));
    let id = *allocations.chosen(of, policy, Client::of(key, pod)).first()?;
    let choices = allocations.of(of, policy);
    let ordinal = choices.iter().find(|choice| choice.of == id)?.ordinal;
    let by = match policy.spread {
        Spread::Pod => "by the pod's uid",
        Spread::Ordinal => "by the pod's ordinal",
        Spread::Connection => "",
    };
    let which = match policy.spread {
        Spread::Connection => format!("or another of the policy's {} egress IPs (by connection)", choices.len()),
        _ => format!("egress IP {} of {} ({by})", ordinal + 1, policy.address.count()),
    };
    Some(Chosen { id, address: allocations.allocations.get(&id)?.address.clone(), which })
}
