//! `kubectl egret pods`: which pods are behind which egress IP.

use super::output::{Colour, Show, View, count};
use super::state::ClusterState;
use super::status::{PolicyState, state_of};
use super::subject::Subject;
use super::table::{Cell, Table};
use crate::model::precedence::{PolicyIndex, Ranked, passed_over};
use crate::model::selector::Name;
use crate::model::{Client, Cluster, ObjectKey, Pod, PolicyKey, addresses_of};
use crate::node_plan::allocations::NodeAllocations;
use crate::node_plan::expected;
use serde::Serialize;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;

/// Pods and the egress IPs that they leave from.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pods {
    /// By name.
    pub pods: Vec<PodEgress>,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodEgress {
    /// `namespace/name`.
    pub pod: String,
    /// Its node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The policies that select it, in the order in which they decide.
    pub policies: Vec<PolicyOfPod>,
}

/// A policy of a pod.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyOfPod {
    /// Its name.
    pub name: String,
    /// Whether it decides for some destinations of the pod.
    pub decides: bool,
    /// Whether it covers all destinations outside the cluster.
    pub covers_everything: bool,
    /// Whether what it covers leaves as if Egret were not there (`action: Direct`).
    pub direct: bool,
    /// Its egress IP; of several, the pod's, or with `spread: Connection` all of them.
    pub egress_ip: Vec<IpAddr>,
    /// The node that holds the (first) egress IP now, else the one that is to hold it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Whether it works.
    pub state: PolicyState,
}

/// The pods of the subject that policies select; without a subject, all of the namespace, or of all namespaces.
pub fn pods(state: &ClusterState, subject: Option<&Subject>, namespace: Option<&str>) -> Pods {
    let cluster = &*state.cluster;
    let index = PolicyIndex::new(cluster);
    let facts = PodFacts::new(cluster);
    let wanted = subject.and_then(Subject::policies);
    let is_there = |key: &ObjectKey, pod: &Pod| match subject {
        Some(Subject::Node(name)) => pod.node.as_ref() == Some(name),
        Some(_) => true,
        None => namespace.is_none_or(|namespace| *key.namespace == *namespace),
    };
    let each = cluster.pods.iter().filter(|(key, pod)| !pod.host_network && !pod.finished && is_there(key, pod));
    let found = each.filter_map(|(key, pod)| {
        let policies = facts.of_pod((key, pod), &index.policies_for(&key.namespace, &pod.labels));
        let is_wanted = |policy: &PolicyOfPod| {
            let has_address = match subject {
                Some(Subject::EgressIp(address, _)) => policy.egress_ip.contains(address),
                _ => true,
            };
            has_address && wanted.is_none_or(|all| all.iter().any(|key| key.to_string() == policy.name))
        };
        policies.iter().any(is_wanted).then(|| PodEgress {
            pod: key.to_string(),
            node: pod.node.as_deref().map(str::to_owned),
            addresses: pod.addresses.to_vec(),
            policies,
        })
    });
    Pods { pods: found.collect() }
}

/// What is needed of the cluster for each pod.
struct PodFacts<'a> {
    cluster: &'a Cluster,
    listed: HashSet<&'a PolicyKey>,
    /// The node that has each egress IP.
    holders: HashMap<u16, &'a Name>,
    /// The allocation of each policy, or one of several.
    allocations: HashMap<&'a PolicyKey, u16>,
    /// The allocations as each node sees them, for policies with several.
    by_node: RefCell<HashMap<Name, Rc<NodeAllocations>>>,
}

impl<'a> PodFacts<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let mut held: HashMap<u16, &Name> = HashMap::new();
        for (name, node) in cluster.egress_nodes.iter() {
            held.extend(node.of_allocations().held.iter().map(|id| (*id, name)));
        }
        let (mut listed, mut holders, mut allocations) = (HashSet::new(), HashMap::new(), HashMap::new());
        for allocation in cluster.allocations() {
            let holder = held.get(&allocation.id).copied().or(allocation.node.as_ref());
            holders.extend(holder.map(|holder| (allocation.id, holder)));
            for policy in &allocation.policies {
                listed.insert(policy);
                allocations.insert(policy, allocation.id);
            }
        }
        PodFacts { cluster, listed, holders, allocations, by_node: RefCell::default() }
    }

    /// The allocation of a policy that a pod uses, with its addresses. Without several egress IPs, the policy's status
    /// has them.
    fn egress_ip(
        &self,
        (key, pod): (&ObjectKey, &Pod),
        Ranked { key: of, policy, .. }: &Ranked,
    ) -> (Option<u16>, Vec<IpAddr>) {
        if policy.address.count() < 2 {
            let pair = self.cluster.policy_statuses.get(of).and_then(|status| status.addresses.as_ref());
            return (
                self.allocations.get(of).copied(),
                pair.map(|pair| addresses_of(pair).collect()).unwrap_or_default(),
            );
        }
        let node = pod.node.clone().unwrap_or_default();
        let mut by_node = self.by_node.borrow_mut();
        let allocations = by_node.entry(node.clone()).or_insert_with(|| {
            Rc::new(NodeAllocations::new(self.cluster, &node, &expected::facts(self.cluster, &node)))
        });
        let ids = allocations.chosen(of, policy, Client::of(key, pod));
        let chosen = ids.iter().filter_map(|id| allocations.allocations.get(id));
        (ids.first().copied(), chosen.flat_map(|chosen| addresses_of(&chosen.address)).collect())
    }

    fn of_pod(&self, pod: (&ObjectKey, &Pod), policies: &[&Ranked]) -> Vec<PolicyOfPod> {
        let mut all_covered = false;
        let each = policies.iter().map(|ranked| {
            let Ranked { key, policy, .. } = ranked;
            let decides = !all_covered && passed_over(ranked, policies, self.listed.contains(key)).is_none();
            all_covered |= decides && policy.covers_everything();
            let status = self.cluster.policy_statuses.get(key);
            let (id, egress_ip) = self.egress_ip(pod, ranked);
            PolicyOfPod {
                name: key.to_string(),
                decides,
                covers_everything: policy.covers_everything(),
                direct: policy.is_direct(),
                egress_ip,
                owner: id.and_then(|id| self.holders.get(&id)).map(|name| name.to_string()),
                state: status.map_or(PolicyState::Pending, |status| state_of(status)),
            }
        });
        each.collect()
    }
}

impl Show for Pods {
    fn text(&self, view: View) -> String {
        if self.pods.is_empty() {
            return "No policy selects a pod here.\n".to_owned();
        }
        let mut table = Table::new(["POD", "POD IP", "NODE", "POLICY", "COVERS", "EGRESS IP", "HELD BY", "STATE"]);
        for pod in &self.pods {
            for (at, policy) in pod.policies.iter().filter(|policy| view.wide || policy.decides).enumerate() {
                let of_pod = |text: String| if at == 0 { text.into() } else { Cell::from("") };
                let colour = match policy.state {
                    PolicyState::Ready => Colour::Good,
                    PolicyState::Pending | PolicyState::Shadowed => Colour::Doubtful,
                    _ => Colour::Bad,
                };
                let state = match policy.decides {
                    true => Cell::coloured(colour, format!("{:?}", policy.state)),
                    false => Cell::from("never decides"),
                };
                table.row([
                    of_pod(pod.pod.clone()),
                    of_pod(list(&pod.addresses)),
                    of_pod(pod.node.clone().unwrap_or_default()),
                    policy.name.as_str().into(),
                    if policy.covers_everything { "everything" } else { "some" }.into(),
                    if policy.direct { "direct".into() } else { list(&policy.egress_ip).into() },
                    policy.owner.clone().unwrap_or_default().into(),
                    state,
                ]);
            }
        }
        table.text(view, 0) + &format!("{}\n", count(self.pods.len(), "pod", "pods"))
    }
}

/// Addresses as text.
pub fn list(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Allocate, EgressPolicySpec};
    use crate::fixture::{World, asking, naming, selector};
    use std::sync::Arc;

    fn world() -> World {
        let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
        let of_app = |app: &str, spec: EgressPolicySpec| EgressPolicySpec {
            pod_selector: Some(selector(&[("app", app)])),
            ..spec
        };
        world.policy("shop/visitors", of_app("visitor", naming(&["192.0.2.50"])));
        world.now += 1;
        world.policy("shop/late", of_app("visitor", naming(&["192.0.2.51"])));
        world.policy("office/shared", of_app("clerk", naming(&["192.0.2.52"])));
        world.policy("fallback", EgressPolicySpec { priority: -1, ..asking(Allocate::Shared) });
        world.pod("shop", "visitor", &[("app", "visitor")]);
        world.pod("shop", "other", &[]);
        world.pod("office", "clerk", &[("app", "clerk")]);
        world.report();
        world.settle();
        world.report();
        world
    }

    fn found(world: &World, subject: Option<&str>, namespace: Option<&str>) -> Vec<String> {
        let state = ClusterState { cluster: Arc::new(world.cluster.clone()), ..ClusterState::default() };
        let subject = subject.map(|text| Subject::find(&state.cluster, text, "shop").unwrap());
        pods(&state, subject.as_ref(), namespace).pods.into_iter().map(|pod| pod.pod).collect()
    }

    #[test]
    fn pods_are_found_by_policy_egress_ip_and_namespace() {
        let world = world();
        assert_eq!(found(&world, Some("shop/visitors"), None), ["shop/visitor"]);
        assert_eq!(found(&world, Some("visitors"), None), ["shop/visitor"]);
        assert_eq!(found(&world, Some("192.0.2.52"), None), ["office/clerk"]);
        assert_eq!(found(&world, None, Some("shop")), ["shop/other", "shop/visitor"]);
        assert_eq!(found(&world, Some("fallback"), None).len(), 3);
        assert_eq!(found(&world, Some("n1"), None), [""; 0]);
        let missing = |text: &str| Subject::find(&world.cluster, text, "shop").unwrap_err().to_string();
        assert!(missing("203.0.113.1").contains("kubectl egret ip"), "{}", missing("203.0.113.1"));
        assert!(missing("nobody").contains("NAMESPACE/NAME") && missing("a/b").contains("kubectl get"));
    }

    #[test]
    fn of_several_policies_the_one_that_decides_is_shown() {
        let state = ClusterState { cluster: Arc::new(world().cluster), ..ClusterState::default() };
        let all = pods(&state, None, Some("shop"));
        let visitor = all.pods.iter().find(|pod| pod.pod == "shop/visitor").unwrap();
        let decides: Vec<(&str, bool)> = visitor.policies.iter().map(|p| (p.name.as_str(), p.decides)).collect();
        assert_eq!(decides, [("shop/visitors", true), ("shop/late", false), ("fallback", false)]);
        assert_eq!(visitor.policies[0].owner.as_deref(), Some("n1"));
        let text = all.text(View::default());
        assert!(text.contains("192.0.2.50") && !text.contains("shop/late"), "{text}");
        assert!(all.text(View { wide: true, colour: false }).contains("never decides"));
    }
}
