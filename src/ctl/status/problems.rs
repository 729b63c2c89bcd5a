//! What is wrong. A cause is named once, with everything that follows from it.

use super::facts::StatusFacts;
use super::{NodeState, PolicyState, state_of};
use crate::api::Condition;
use crate::ctl::output::{count, few, number};
use crate::ctl::problem::{Problem, Severity};
use crate::model::opt_in;
use crate::model::selector::Name;
use crate::model::{PolicyKey, addresses_of};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// From this share of a pool in use on, in percent, it counts as nearly exhausted.
const NEARLY: u128 = 90;

/// The smallest MTU of a device with IPv6 (`IPV6_MIN_MTU`, include/uapi/linux/ipv6.h).
const IPV6_MIN_MTU: u32 = 1280;

/// What is wrong, the worst first.
pub(super) fn problems(facts: &StatusFacts) -> Vec<Problem> {
    let mut found = ProblemList { all: facts.state.of_site.clone(), ..ProblemList::default() };
    found.unread(facts);
    found.missing_controller(facts);
    facts.state.cluster.gateways.keys().for_each(|name| found.gateway(facts, name));
    found.dead_nodes(facts);
    found.nodes_without_daemon(facts);
    facts.state.cluster.egress_nodes.keys().for_each(|name| found.node(facts, name));
    found.tunnel_mtus(facts);
    found.policies(facts);
    let mut all = found.all;
    // Where packets bypass netfilter, nothing else matters.
    let of_site = |p: &Problem| facts.state.of_site.contains(p);
    all.sort_by_key(|p| (p.severity, !of_site(p), Reverse(p.pods), Reverse(p.policies.len())));
    all
}

/// The cause of a policy's problem, if it is the problem of another object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    /// The gateway, and the reason of its condition.
    Gateway(String, String),
    /// A dead node.
    Node(String),
    /// The controller has not written the status.
    Controller,
}

#[derive(Default)]
struct ProblemList {
    all: Vec<Problem>,
    /// Indices in `all` of problems that others follow from.
    causes: BTreeMap<Cause, usize>,
}

impl ProblemList {
    fn add(&mut self, problem: Problem) {
        self.all.push(problem);
    }

    fn add_cause(&mut self, cause: Cause, problem: Problem) {
        self.causes.insert(cause, self.all.len());
        self.all.push(problem);
    }

    fn unread(&mut self, facts: &StatusFacts) {
        for text in &facts.state.unread {
            self.add(
                Problem::new(Severity::Error, "object that cannot be read", "Invalid", text)
                    .or_else("correct the object; nodes use its last good state, if they have one"),
            );
        }
    }

    /// Every gateway gets conditions from the controller, and every policy a status.
    fn missing_controller(&mut self, facts: &StatusFacts) {
        let cluster = &*facts.state.cluster;
        let gateways = cluster.gateways.values().filter(|gateway| gateway.status.conditions.is_empty()).count();
        let policies: Vec<&PolicyKey> =
            facts.policies().map(|(key, _)| key).filter(|key| !cluster.policy_statuses.contains_key(*key)).collect();
        if gateways + policies.len() > 0 {
            let message = format!(
                "it has written no status of {} and {}",
                count(gateways, "gateway", "gateways"),
                count(policies.len(), "policy", "policies")
            );
            let problem = Problem::new(Severity::Error, "controller", "NoStatus", message).or_else(
                "see whether the controller runs (Deployment egret-controller), and its log; new objects get a status \
                 within a second",
            );
            self.add_cause(Cause::Controller, problem);
        }
    }

    fn gateway(&mut self, facts: &StatusFacts, name: &Name) {
        let Some(gateway) = facts.state.cluster.gateways.get(name) else { return };
        let object = format!("EgressGateway {name}");
        for condition in gateway.status.conditions.iter().filter(|c| c.status != "True") {
            // Nothing is blocked before a node dies.
            let is_ahead = condition.reason == "NoRoomForFailover";
            let severity = if is_ahead { Severity::Warning } else { Severity::Error };
            let problem = Problem::new(severity, &object, &condition.reason, &condition.message);
            let problem = problem.or_else("see kubectl describe egressgateway");
            self.add_cause(Cause::Gateway(name.to_string(), condition.reason.clone()), problem);
        }
        let of = facts.gateway(name);
        if of.ready_nodes < of.nodes && of.ready_nodes <= 1 && of.nodes > 1 {
            let message = format!(
                "{} of {} nodes can hold its egress IPs; bring the others back, or label more nodes",
                of.ready_nodes, of.nodes
            );
            self.add(Problem::new(Severity::Warning, &object, "NoStandby", message));
        } else if of.nodes == 1 && of.egress_ips > 0 {
            let message = "it has one node, and its egress IPs have nowhere to go when that node dies; label one more";
            self.add(Problem::new(Severity::Warning, &object, "NoStandby", message));
        }
        let exhausted = gateway.status.conditions.iter().any(|c| c.type_ == "AddressesLeft" && c.status == "False");
        for pool in of.pool.iter().filter(|_| !exhausted) {
            let gone = pool.used as u128 + pool.cooling_down as u128;
            if gone * 100 >= pool.total * NEARLY && pool.total > 1 && pool.used > 0 {
                let message = format!(
                    "{} of {} {} addresses are in use and {} in cooldown; add addresses to spec.addresses before \
                     policies are rejected",
                    number(pool.used),
                    pool.total,
                    pool.family,
                    pool.cooling_down
                );
                self.add(Problem::new(Severity::Warning, &object, "PoolNearlyExhausted", message));
            }
        }
    }

    /// Gateway nodes that hold nothing, because they are dead or cut off.
    fn dead_nodes(&mut self, facts: &StatusFacts) {
        let members: BTreeSet<&Name> = facts.members.values().flatten().copied().collect();
        for name in members {
            let (reason, message) = match facts.state_of(name) {
                NodeState::Ready | NodeState::NoDaemon => continue,
                NodeState::Unfit => (
                    "NodeUnfit",
                    "it reports that it cannot hold any egress IP; see `egretd check` and egretd's log there"
                        .to_owned(),
                ),
                NodeState::Lost => ("NodeLost", "its kubelet reports nothing; see whether the node runs".to_owned()),
                NodeState::Unreachable => {
                    let by = facts.state.cluster.egress_nodes.iter().filter(|(_, node)| {
                        node.of_allocations().unreachable_peers.iter().any(|peer| **peer == **name)
                    });
                    let by: Vec<&Name> = by.map(|(by, _)| by).filter(|by| *by != name).collect();
                    let message = format!(
                        "it does not answer {}; see whether the node and egretd run there, and whether UDP 7871 \
                         passes between the nodes",
                        few(&by, 3)
                    );
                    ("NodeUnreachable", message)
                }
            };
            self.add_cause(
                Cause::Node(name.to_string()),
                Problem::new(Severity::Error, format!("gateway node {name}"), reason, message),
            );
        }
    }

    fn nodes_without_daemon(&mut self, facts: &StatusFacts) {
        let without: Vec<&Name> =
            facts.state.cluster.nodes.keys().filter(|name| facts.state_of(name) == NodeState::NoDaemon).collect();
        let (gateways, sources): (Vec<&Name>, Vec<&Name>) =
            without.into_iter().partition(|name| facts.is_gateway_node(name));
        for name in gateways {
            let message = "no daemon of Egret's has reported there; see whether the DaemonSet egret-node has a pod on \
                           it, and that pod's log";
            let problem = Problem::new(Severity::Error, format!("gateway node {name}"), "NodeNotReporting", message);
            self.add_cause(Cause::Node(name.to_string()), problem);
        }
        if !sources.is_empty() {
            let message = format!(
                "no daemon of Egret's has reported on {}, so policies have no effect on the pods there; see whether the \
                 DaemonSet egret-node has pods there",
                few(&sources, 4)
            );
            let object = count(sources.len(), "node", "nodes");
            self.add(Problem::new(Severity::Warning, object, "NodeNotReporting", message));
        }
    }

    /// A node derives its tunnel's MTU from its own routes and interfaces, and cannot see the other end's.
    fn tunnel_mtus(&mut self, facts: &StatusFacts) {
        let mut by_mtu: BTreeMap<u32, Vec<&Name>> = BTreeMap::new();
        for name in facts.state.cluster.nodes.keys() {
            if let Some(mtu) = facts.reports(name).and_then(|reports| reports.tunnel_mtu) {
                by_mtu.entry(mtu).or_default().push(name);
            }
        }
        for (mtu, nodes) in by_mtu.iter().filter(|(mtu, _)| **mtu < IPV6_MIN_MTU) {
            let message = format!(
                "the tunnel takes packets of {mtu} bytes on {}, and IPv6 needs {IPV6_MIN_MTU}: these nodes cannot hold \
                 egress IPs",
                few(nodes, 4)
            );
            let problem = Problem::new(Severity::Error, "tunnel", "TunnelMtuTooSmall", message);
            self.add(problem.or_else(
                "raise the MTU of the interfaces by which these nodes reach the others: 1330 over IPv4, 1350 over IPv6",
            ));
        }
        if by_mtu.len() > 1 {
            let listed: Vec<String> =
                by_mtu.iter().map(|(mtu, nodes)| format!("{mtu} bytes on {}", few(nodes, 4))).collect();
            let message = format!(
                "the tunnel takes packets of {}: packets of a node with the larger MTU are lost where the other end or \
                 the network between takes less and does not report it",
                listed.join(", of ")
            );
            let problem = Problem::new(Severity::Warning, "tunnel", "TunnelMtuDiffers", message);
            self.add(problem.or_else("give the interfaces by which nodes reach each other the same MTU on all nodes"));
        }
    }

    /// What a node reports itself.
    fn node(&mut self, facts: &StatusFacts, name: &Name) {
        let Some(reports) = facts.reports(name).filter(|_| facts.state.cluster.nodes.contains_key(name)) else {
            return;
        };
        let object = format!("node {name}");
        for condition in &reports.failing {
            let problem = Problem::new(Severity::Error, &object, &condition.reason, &condition.message);
            self.add(problem.or_else("run `egretd check` there"));
        }
        // The gateway's condition names the nodes on which its probes fail.
        for lost in reports.lost.iter().filter(|lost| lost.gateway.is_none()) {
            let uplink = lost.interface.as_deref().map_or_else(String::new, |interface| format!(" of {interface}"));
            let message = format!("its uplink has lost {}{uplink}: {}", lost.family, lost.message);
            let problem = Problem::new(Severity::Error, &object, "UplinkLost", message);
            self.add(problem.or_else("bring the interface, its address and its default route back"));
        }
        for refused in &reports.refused {
            let problem = Problem::new(Severity::Error, &object, "AddressRefused", &refused.message);
            self.add_cause(
                Cause::Gateway(name.to_string(), refused.id.to_string()),
                problem.or_else("see egretd's log on this node"),
            );
        }
        let blocked: Vec<_> = reports.blocked.iter().filter(|blocked| !self.follows(facts, blocked.id)).collect();
        for blocked in blocked {
            let family = blocked.family.as_deref().map(|family| format!(" ({family})")).unwrap_or_default();
            let message = format!("it drops packets of {}{family}: {}", address_of(facts, blocked.id), blocked.message);
            self.add(Problem::new(Severity::Error, &object, "Blocked", message).or_else("see egretd's log there"));
        }
        for fault in &reports.faults {
            let message = format!("{}: {}", fault.of, fault.message);
            self.add(Problem::new(Severity::Warning, &object, "Skipped", message).or_else("see egretd's log there"));
        }
    }

    fn policies(&mut self, facts: &StatusFacts) {
        let mut groups: BTreeMap<(PolicyState, String, String), (Problem, Option<Cause>)> = BTreeMap::new();
        for (key, _) in facts.policies() {
            let Some(status) = facts.state.cluster.policy_statuses.get(key) else {
                self.concerns(&Cause::Controller, key, 0);
                continue;
            };
            let gateway = status.gateway.clone().unwrap_or_default();
            if let Some(condition) = condition(&status.conditions, "OverNodeLimit", "True") {
                let problem =
                    Problem::new(Severity::Error, format!("EgressPolicy {key}"), &condition.reason, &condition.message);
                self.add(problem);
            }
            if let Some(condition) = condition(&status.conditions, "PortsNearlyExhausted", "True") {
                let object = format!("EgressPolicy {key}");
                self.add(Problem::new(Severity::Warning, object, &condition.type_, &condition.message));
            }
            let state = state_of(status);
            let bad = match state {
                PolicyState::Ready | PolicyState::Pending => continue,
                PolicyState::Rejected => condition(&status.conditions, "Accepted", "False"),
                PolicyState::NotReady => condition(&status.conditions, "Ready", "False"),
                PolicyState::Unknown => condition(&status.conditions, "Ready", "Unknown"),
                PolicyState::Shadowed => condition(&status.conditions, "Shadowed", "True"),
            };
            let Some(bad) = bad else { continue };
            let pods = u64::from(status.pods);
            let causes = [
                Cause::Gateway(gateway.clone(), bad.reason.clone()),
                Cause::Node(status.node.clone().unwrap_or_default()),
            ];
            if let Some(cause) = causes.iter().find(|cause| state != PolicyState::Shadowed && self.is_known(cause)) {
                self.concerns(&cause.clone(), key, pods);
                continue;
            }
            let group = groups.entry((state, bad.reason.clone(), gateway)).or_insert_with(|| {
                let severity = if state == PolicyState::Shadowed { Severity::Warning } else { Severity::Error };
                let problem = Problem::new(severity, "", &bad.reason, &bad.message);
                (problem.or_else("see kubectl describe egresspolicy"), None)
            });
            group.0.policies.push(key.to_string());
            group.0.pods += pods;
        }
        for (problem, _) in groups.into_values() {
            self.add(named(problem));
        }
    }

    /// Whether an egress IP is blocked because its gateway has no node, or because that node is dead.
    fn follows(&self, facts: &StatusFacts, id: u16) -> bool {
        let mut allocations = facts.state.cluster.allocations();
        let Some(allocation) = allocations.find(|allocation| allocation.id == id) else { return false };
        let dead = |node: &Name| self.is_known(&Cause::Node(node.to_string()));
        allocation.node.as_ref().is_none_or(dead)
    }

    fn is_known(&self, cause: &Cause) -> bool {
        self.causes.contains_key(cause)
    }

    /// A policy has the problem because of this cause.
    fn concerns(&mut self, cause: &Cause, policy: &PolicyKey, pods: u64) {
        if let Some(problem) = self.causes.get(cause).and_then(|index| self.all.get_mut(*index)) {
            problem.policies.push(policy.to_string());
            problem.pods += pods;
        }
    }
}

/// A problem of one policy bears its name; one of several is told by the first one's message.
fn named(mut problem: Problem) -> Problem {
    let kind = |name: &str| if name.contains('/') { "EgressPolicy" } else { "ClusterEgressPolicy" };
    let first = problem.policies.first().cloned().unwrap_or_default();
    problem.object = match opt_in::gateway_of(&PolicyKey::from(&*first)) {
        Some(gateway) => format!("EgressGateway {gateway} (optIn)"),
        None => format!("{} {first}", kind(&first)),
    };
    if problem.policies.len() > 1 {
        problem.object += &format!(" and {} more", number(problem.policies.len() - 1));
    }
    problem
}

fn condition<'c>(conditions: &'c [Condition], type_: &str, status: &str) -> Option<&'c Condition> {
    conditions.iter().find(|c| c.type_ == type_ && c.status == status)
}

/// The egress IP with this id, as text.
fn address_of(facts: &StatusFacts, id: u16) -> String {
    let mut allocations = facts.state.cluster.allocations();
    let found = allocations.find(|allocation| allocation.id == id);
    let addresses = found.map(|allocation| addresses_of(&allocation.address).collect::<Vec<_>>()).unwrap_or_default();
    match addresses.as_slice() {
        [] => format!("the egress IP with id {id}"),
        some => few(some, 2),
    }
}
