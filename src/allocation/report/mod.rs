//! The statuses of policies: egress IP, node, number of pods, and conditions.

mod coverage;
mod notices;
pub(super) mod ports;
mod treatment;

pub use notices::{of_gateway, of_policy};

use crate::allocation::services::Announcements;
use crate::allocation::{Decision, Grant, Grants, Outcome, in_words, unreachable};
use crate::api::{AllocationKind, EgressPolicyStatus, Placement, PodsOfNode, PolicyEgressIp};
use crate::model::condition::Conditions;
use crate::model::egress_node::OfAllocations;
use crate::model::precedence::{PassedOver, PolicyIndex, Ranked, passed_over};
use crate::model::quota;
use crate::model::selector::Name;
use crate::model::text::few;
use crate::model::uplink_key::UplinkKey;
use crate::model::{Cluster, Gateway, MOVE_TO, Namespaces, Node, ObjectKey, Policy, PolicyKey, Tier};
use coverage::Coverage;
use ports::{FEW_PORTS, PORTS_NEARLY_EXHAUSTED, PortReports};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use treatment::treatments;

/// The reason of `Ready=False` when the node cannot hold the egress IP: another host has the address, or the node has
/// no interface for it.
const REFUSED: &str = "AddressRefused";

/// The reason of `Ready=False` when no node of the gateway announces the Service's address.
const NOT_ANNOUNCED: &str = "AddressNotAnnounced";

/// The reason of `Ready=Unknown` when Kubernetes hears nothing from the node that held the egress IP.
const NOT_HEARD: &str = "NodeNotHeard";

/// The reason of `Accepted=True` when other policies share the named egress IP.
const SHARED: &str = "AddressShared";

/// The reason of `Accepted=True` and `Ready=True` with `action: Direct`.
const DIRECT: &str = "Direct";

/// The condition of a policy whose pods are isolated on some nodes, because it lists too many destinations for one.
/// It is absent otherwise.
const OVER_NODE_LIMIT: &str = "OverNodeLimit";

/// The nodes with a policy's pods are listed in its status if there are no more than this.
const LISTED_NODES: usize = 99;

/// What nodes report about egress IPs and about each other.
struct NodeReports<'a> {
    cluster: &'a Cluster,
    held: HashMap<&'a str, HashSet<u16>>,
    /// Why a node cannot hold an egress IP.
    refused: HashMap<(&'a str, u16), &'a str>,
    /// Nodes that count as unreachable.
    unreachable: HashSet<&'a str>,
    /// The nodes on which a policy lists too many destinations.
    over_limit: BTreeMap<&'a PolicyKey, Vec<&'a str>>,
}

/// The status of each policy. `now` is in seconds since the Unix epoch.
pub fn report(cluster: &Cluster, outcome: &Outcome, now: i64) -> BTreeMap<PolicyKey, EgressPolicyStatus> {
    let use_of = uses(cluster, outcome);
    let reports = NodeReports::new(cluster);
    let living: HashMap<&Name, Vec<&Name>> =
        cluster.gateways.iter().map(|(name, gateway)| (name, reports.living(gateway, now))).collect();
    let over_quota = quota::over(&cluster.policies);
    let ports = PortReports::new(cluster);
    let treatments = treatments(cluster, outcome);
    let mut statuses = BTreeMap::new();
    for (key, policy) in &cluster.policies {
        let Some(decision) = outcome.decisions.get(key) else { continue };
        let previous = cluster.policy_statuses.get(key).map(|s| s.conditions.as_slice()).unwrap_or_default();
        let mut conditions = Conditions::new(previous, policy.generation(), now);
        let mut status = EgressPolicyStatus::default();
        match decision {
            Decision::Rejected(rejection) => {
                status.gateway = policy.gateway.as_deref().map(str::to_owned);
                conditions.add("Accepted", false, rejection.reason, rejection.message.as_str());
                conditions.add("Ready", false, "NotAccepted", "it has no egress IP; see the condition Accepted");
            }
            Decision::Direct => {
                conditions.add("Accepted", true, DIRECT, "what it covers leaves as if Egret were not there");
                conditions.add("Ready", true, DIRECT, "it needs no egress IP");
            }
            Decision::Granted(grants) => {
                let grant = &grants.first;
                status.gateway = Some(grant.gateway.to_string());
                status.addresses = Some(grant.address.clone());
                status.node = grant.node.as_deref().map(str::to_owned);
                status.address_count = u32::try_from(grants.count()).unwrap_or(u32::MAX);
                let treated =
                    treatments.get(&grant.id).map(|treatment| treatment.text(key, policy)).unwrap_or_default();
                add_accepted(&mut conditions, grants, &treated);
                let living = living.get(&grant.gateway).map_or(&[][..], Vec::as_slice);
                let each: Vec<Readiness> = grants.iter().map(|grant| reports.ready(grant, living)).collect();
                if grants.asked > 1 {
                    status.egress_ips = grants.iter().zip(&each).map(egress_ip).collect();
                }
                let mut ready = together(each);
                if let Some(over) = over_quota.get(key) {
                    ready = Readiness { is_ready: Some(false), reason: quota::REASON, message: over.to_string() };
                }
                ready.message += &wants_other_node(policy, grants);
                match ready.is_ready {
                    Some(is_true) => conditions.add("Ready", is_true, ready.reason, ready.message),
                    None => conditions.add_unknown("Ready", ready.reason, ready.message),
                }
                if let Some(message) = grants.iter().find_map(|grant| ports.of_policy(grant.id)) {
                    conditions.add(PORTS_NEARLY_EXHAUSTED, true, FEW_PORTS, message);
                }
            }
        }
        if let Some(nodes) = reports.over_limit.get(key) {
            conditions.add(OVER_NODE_LIMIT, true, quota::REASON, over_limit_of_nodes(nodes));
        }
        let usage = use_of.get(key);
        status.pods = usage.map_or(0, |u| u.pods);
        status.pods_by_node = usage.map(Usage::by_node).unwrap_or_default();
        add_shadowed(&mut conditions, cluster, policy, usage);
        status.conditions = conditions.finish();
        statuses.insert(key.clone(), status);
    }
    for (key, unreadable) in &cluster.unreadable {
        let previous = cluster.policy_statuses.get(key).map(|s| s.conditions.as_slice()).unwrap_or_default();
        let mut conditions = Conditions::new(previous, unreadable.generation, now);
        conditions.add("Accepted", false, "Invalid", unreadable.message.as_str());
        // The fallback policy applies until the policy is corrected, if there is one.
        let status = statuses.entry(key.clone()).or_default();
        if status.conditions.is_empty() {
            conditions.add("Ready", false, "NotAccepted", "it has no egress IP; see the condition Accepted");
        }
        status.conditions.retain(|c| c.type_ != "Accepted");
        status.conditions.splice(0..0, conditions.finish());
    }
    statuses
}

/// Adds the condition `Shadowed`.
fn add_shadowed(conditions: &mut Conditions, cluster: &Cluster, policy: &Policy, usage: Option<&Usage>) {
    match usage {
        None => conditions.add("Shadowed", false, "NoPods", "it selects no pod now"),
        Some(Usage { decides: true, .. }) => {
            conditions.add("Shadowed", false, "NotShadowed", "it decides for some traffic of its pods");
        }
        Some(Usage { passed_over: Some(PassedOver::NoEgressIp), .. }) => {
            let message = "it has no egress IP and has fallback: NodeAddress, so the next policy of each pod decides";
            conditions.add("Shadowed", false, "PassedOver", message);
        }
        Some(Usage { passed_over: Some(PassedOver::ClusterPolicy), .. }) => {
            let message = "it has action: Direct and decides for no pod, because no EgressPolicy exempts pods from \
                           the ClusterEgressPolicies that select them; ask for a ClusterEgressPolicy with action: \
                           Direct";
            conditions.add("Shadowed", true, "PassedOver", message);
        }
        Some(usage) => conditions.add("Shadowed", true, "Shadowed", shadowed(cluster, policy, &usage.shadowed_by)),
    }
}

/// What a policy's status says if another node is asked for than the egress IP's.
fn wants_other_node(policy: &Policy, grants: &Grants) -> String {
    let wanted = policy.move_to().filter(|wanted| grants.iter().any(|grant| grant.node.as_ref() != Some(wanted)));
    let text = |wanted| {
        format!(
            "; {MOVE_TO} asks for node {wanted:?}, which cannot have it now: it is not a node of the gateway, is drained, \
             does not answer, or a policy with the same egress IP asks for another node"
        )
    };
    wanted.map(text).unwrap_or_default()
}

/// At most three of the nodes are named.
fn over_limit_of_nodes(nodes: &[&str]) -> String {
    format!(
        "its pods on {} are isolated: the policies of the pods there list more destinations than one node takes, \
         and this one lists the most; list fewer destinations, or use wider networks",
        few(nodes, 3)
    )
}

/// Adds the condition `Accepted` of a policy with egress IPs.
fn add_accepted(conditions: &mut Conditions, grants: &Grants, treated: &str) {
    if let Some(missing) = &grants.missing {
        let message = format!(
            "it has {} of {} egress IPs, which its pods use: {}",
            grants.count(),
            grants.asked,
            missing.message
        );
        conditions.add("Accepted", false, missing.reason, message);
        return;
    }
    let reason = if grants.iter().any(|grant| grant.shared_with.is_some()) { SHARED } else { "Accepted" };
    let message = match grants.others.as_slice() {
        [] => accepted(&grants.first),
        [..] => {
            let addresses: Vec<String> = grants.iter().take(NAMED).map(|grant| in_words(&grant.address)).collect();
            let more =
                if grants.count() > NAMED { format!(" and {} more", grants.count() - NAMED) } else { String::new() };
            let find = |what: fn(&Grant) -> &Option<String>| grants.iter().find_map(|grant| what(grant).as_ref());
            let with = find(|grant| &grant.shared_with).map(|with| format!(", shared with {with}")).unwrap_or_default();
            let note = find(|grant| &grant.note).map(|note| format!("; {note}")).unwrap_or_default();
            format!(
                "it leaves from {}{more} ({} egress IPs{with}) through EgressGateway {:?}{note}",
                addresses.join(", "),
                grants.count(),
                grants.first.gateway
            )
        }
    };
    conditions.add("Accepted", true, reason, message + treated);
}

/// At most so many of a policy's egress IPs are named.
const NAMED: usize = 3;

/// Whether an egress IP is on its node.
struct Readiness {
    /// `None`: unknown.
    is_ready: Option<bool>,
    reason: &'static str,
    message: String,
}

impl Readiness {
    fn new(is_ready: Option<bool>, reason: &'static str, message: String) -> Self {
        Readiness { is_ready, reason, message }
    }
}

fn egress_ip((grant, readiness): (&Grant, &Readiness)) -> PolicyEgressIp {
    let ready = match readiness.is_ready {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    PolicyEgressIp {
        address: grant.address.clone(),
        ordinal: grant.ordinal,
        node: grant.node.as_deref().map(str::to_owned),
        ready: ready.to_owned(),
    }
}

/// The readiness of a policy with these egress IPs: that of the one that is worst off.
fn together(mut each: Vec<Readiness>) -> Readiness {
    let rank = |readiness: &Readiness| readiness.is_ready.map_or(1, |is_ready| if is_ready { 2 } else { 0 });
    let (all, ready) = (each.len(), each.iter().filter(|readiness| readiness.is_ready == Some(true)).count());
    let worst = (0..all).min_by_key(|at| rank(&each[*at])).unwrap_or_default();
    if all > 1 && ready == all {
        let named: Vec<&str> = each.iter().take(NAMED).map(|readiness| readiness.message.as_str()).collect();
        let more = if all > NAMED { format!("; and {} more", all - NAMED) } else { String::new() };
        let message = named.join("; ") + &more;
        return Readiness { message, ..each.swap_remove(worst) };
    }
    let of_all = if all > 1 { format!("{ready} of {all} egress IPs are held: ") } else { String::new() };
    let worst = each.swap_remove(worst);
    Readiness { message: of_all + &worst.message, ..worst }
}

fn accepted(grant: &Grant) -> String {
    let whose = match grant.kind {
        AllocationKind::Explicit => "as it asks for",
        AllocationKind::Dedicated => "its own",
        AllocationKind::Shared => "shared",
        AllocationKind::Pooled if grant.shared_with.is_none() => "its own",
        AllocationKind::Pooled => "of the pool",
        AllocationKind::Node => "the node's own",
        AllocationKind::Service => "its Service's",
    };
    let note = grant.note.as_ref().map(|note| format!("; {note}")).unwrap_or_default();
    let with = grant.shared_with.as_ref().map(|with| format!(", shared with {with}")).unwrap_or_default();
    format!(
        "it leaves from {} ({whose}{with}) through EgressGateway {:?}{note}",
        in_words(&grant.address),
        grant.gateway
    )
}

impl<'a> NodeReports<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let nodes = || cluster.egress_nodes.iter().map(|(name, node)| (&**name, node.of_allocations()));
        let refused = |(name, allocations): (&'a str, &'a OfAllocations)| {
            allocations.refused.iter().map(move |refused| ((name, refused.id), refused.message.as_str()))
        };
        let mut over_limit: BTreeMap<&PolicyKey, Vec<&str>> = BTreeMap::new();
        for (name, allocations) in nodes().filter(|(name, _)| cluster.nodes.contains_key(*name)) {
            for policy in &allocations.over_limit {
                over_limit.entry(policy).or_default().push(name);
            }
        }
        NodeReports {
            cluster,
            held: nodes().map(|(name, allocations)| (name, allocations.held.iter().copied().collect())).collect(),
            refused: nodes().flat_map(refused).collect(),
            unreachable: unreachable(cluster),
            over_limit,
        }
    }

    /// The nodes of the gateway that count as alive.
    fn living(&self, gateway: &Gateway, now: i64) -> Vec<&'a Name> {
        let lives = |name: &Name, node: &Node| {
            !node.is_lost(now) && !self.unreachable.contains(&**name) && self.cluster.egress_nodes.contains_key(name)
        };
        let nodes = self.cluster.nodes.iter().filter(|(_, node)| gateway.nodes.matches(&node.labels));
        nodes.filter(|(name, node)| lives(name, node)).map(|(name, _)| name).collect()
    }

    /// Whether the report of the holder that it holds the egress IP is still valid. A node that has died cannot
    /// withdraw its report. But if other nodes are alive, they would report it as unreachable, or take over.
    fn is_believed(&self, holder: &Name, grant: &Grant, living: &[&Name]) -> bool {
        if living.contains(&holder) {
            return true;
        }
        let takes_over = |node: &&Name| !self.refused.contains_key(&(&***node, grant.id));
        // Even if Kubernetes hears nothing from the node, other nodes would report it as unreachable.
        let others_would_tell = !self.unreachable.contains(&**holder) && !living.is_empty();
        let moves = !self.is_external(grant) && grant.kind != AllocationKind::Node;
        others_would_tell || moves && living.iter().any(takes_over)
    }

    /// Whether the egress IP has external placement.
    fn is_external(&self, grant: &Grant) -> bool {
        self.cluster.gateways.get(&grant.gateway).is_some_and(|g| g.placement == Placement::External)
    }

    fn holds(&self, node: &str, allocation: u16) -> bool {
        self.held.get(node).is_some_and(|allocations| allocations.contains(&allocation))
    }

    /// The uplinks and families that the holder needs and has lost, as text.
    fn lost(&self, holder: &Name, grant: &Grant) -> String {
        let gateway = self.cluster.gateways.get(&grant.gateway);
        let interface = gateway.and_then(|gateway| gateway.interface.as_ref());
        let probed = gateway.map(|gateway| gateway.probed()).unwrap_or_default();
        let Some(reports) = self.cluster.egress_nodes.get(holder) else { return String::new() };
        let needs = UplinkKey::with_probes(&grant.address, interface, &grant.gateway, probed);
        let lost = needs.filter_map(|key| reports.of_allocations().loss(&key).map(|lost| (key, lost)));
        lost.map(|(key, lost)| format!("; it has lost {key}, and no other node has lost less: {}", lost.message))
            .collect()
    }

    /// Why a Service's address has no node, as text.
    fn not_announced(&self, grant: &Grant, service: &ObjectKey) -> String {
        let (address, gateway) = (in_words(&grant.address), &grant.gateway);
        match Announcements::new(self.cluster).node_of(service, |_| true) {
            Some(node) => format!(
                "node {node:?} announces {address} of Service {service}, and is not a node of EgressGateway {gateway:?}; \
                 make it one (spec.nodeSelector)"
            ),
            None => format!(
                "no node announces {address} of Service {service}: no node of EgressGateway {gateway:?} has it on an \
                 interface, and neither kube-vip, MetalLB nor Cilium names one; see whether its load balancer works"
            ),
        }
    }

    /// Whether the egress IP is on its node. `living` has the nodes of the gateway that count as alive.
    fn ready(&self, grant: &Grant, living: &[&Name]) -> Readiness {
        let address = in_words(&grant.address);
        let Some(node) = &grant.node else {
            if let Some(service) = &grant.service {
                return Readiness::new(Some(false), NOT_ANNOUNCED, self.not_announced(grant, service));
            }
            let message = if self.is_external(grant) {
                format!("no node of EgressGateway {:?} has {address}; place it on one", grant.gateway)
            } else {
                format!("EgressGateway {:?} has no node; label one, or correct its nodeSelector", grant.gateway)
            };
            return Readiness::new(Some(false), "NoNode", message);
        };
        if !self.cluster.egress_nodes.contains_key(node) {
            let message = format!("node {node:?} has no status; see whether egretd runs there");
            return Readiness::new(Some(false), "NodeNotReporting", message);
        }
        let old = grant.leaving.as_ref().filter(|old| self.holds(old, grant.id));
        let holder = old.or(Some(node).filter(|node| self.holds(node, grant.id)));
        let Some(holder) = holder else {
            return match self.refused.get(&(&**node, grant.id)) {
                Some(why) => {
                    Readiness::new(Some(false), REFUSED, format!("node {node:?} cannot hold {address}: {why}"))
                }
                None => {
                    let message =
                        format!("node {node:?} does not hold {address} yet; if that lasts, see egretd's log there");
                    Readiness::new(Some(false), "AddressNotHeld", message)
                }
            };
        };
        if !self.is_believed(holder, grant, living) {
            let message = format!("node {holder:?} held {address}, and nobody hears from it now; see whether it runs");
            return Readiness::new(None, NOT_HEARD, message);
        }
        let lost = self.lost(holder, grant);
        let until = old.map(|_| format!(" until node {node:?} does")).unwrap_or_default();
        Readiness::new(Some(true), "AddressHeld", format!("node {holder:?} holds {address}{until}{lost}"))
    }
}

fn shadowed(cluster: &Cluster, policy: &Policy, by: &BTreeSet<&PolicyKey>) -> String {
    format!(
        "for each of its pods, policies before it decide for all its destinations: {}; {}, or narrow their \
         egress",
        few(by, 3),
        before_them(policy, by.iter().filter_map(|key| cluster.policies.get(*key)).map(|policy| &**policy))
    )
}

/// How the policy can be made to decide before the others, as text.
fn before_them<'a>(policy: &Policy, others: impl Iterator<Item = &'a Policy> + Clone) -> String {
    let tier = others.clone().map(|other| other.tier).min().unwrap_or_default().min(policy.tier);
    let of_tier = others.filter(|other| other.tier == tier);
    let highest = of_tier.map(|other| other.priority).max().unwrap_or_default();
    let first = match (tier == policy.tier, &policy.namespaces, tier) {
        (true, ..) => String::new(),
        (false, Namespaces::One(_), _) => {
            return "a cluster administrator can take them out of tier Admin".to_owned();
        }
        (false, Namespaces::Selected(_), Tier::Admin) => "set its tier to Admin, and ".to_owned(),
        (false, Namespaces::Selected(_), _) => "leave out its tier, and ".to_owned(),
    };
    match highest.checked_add(1) {
        Some(above) => format!("{first}set its priority to {above} or more"),
        None => format!("{first}set its priority to {highest} and theirs below that"),
    }
}

/// What a policy decides, over all pods.
#[derive(Default)]
struct Usage<'a> {
    /// How many pods the policy selects.
    pods: u32,
    /// How many of them each node has.
    by_node: BTreeMap<&'a Name, u32>,
    /// Whether it decides for some destination of some pod.
    decides: bool,
    /// Why it is passed over, for some pod at least.
    passed_over: Option<PassedOver>,
    /// The policies that decide instead of it.
    shadowed_by: BTreeSet<&'a PolicyKey>,
}

impl Usage<'_> {
    /// The pods of each node; none if there are too many nodes to list.
    fn by_node(&self) -> Vec<PodsOfNode> {
        let of = |(node, pods): (&&Name, &u32)| PodsOfNode { node: Name::clone(node), pods: *pods };
        if self.by_node.len() > LISTED_NODES { Vec::new() } else { self.by_node.iter().map(of).collect() }
    }
}

/// Pods that the same policies select.
#[derive(Default)]
struct PodGroup<'i, 'a> {
    policies: Vec<&'i Ranked>,
    pods: u32,
    by_node: BTreeMap<&'a Name, u32>,
}

/// The usage of each policy that selects a pod.
fn uses<'a>(cluster: &'a Cluster, outcome: &Outcome) -> HashMap<&'a PolicyKey, Usage<'a>> {
    let index = PolicyIndex::new(cluster);
    // Pods with the same policies are counted together; there are many of them.
    let mut policy_chains: BTreeMap<Vec<&PolicyKey>, PodGroup> = BTreeMap::new();
    for (key, pod) in &cluster.pods {
        if pod.host_network || pod.finished {
            continue;
        }
        let policies = index.policies_for(&key.namespace, &pod.labels);
        let keys = policies.iter().map(|r| &r.key).collect();
        let group = policy_chains.entry(keys).or_default();
        group.policies = policies;
        group.pods += 1;
        if let Some(node) = &pod.node {
            *group.by_node.entry(node).or_default() += 1;
        }
    }
    let mut uses: HashMap<&PolicyKey, Usage> = HashMap::new();
    for PodGroup { policies, pods, by_node } in policy_chains.values() {
        let mut coverage = Coverage::default();
        for ranked in policies {
            // The keys of the index live shorter than those of the cluster.
            let Some((key, policy)) = cluster.policies.get_key_value(&ranked.key) else { continue };
            let usage = uses.entry(key).or_default();
            usage.pods += pods;
            by_node.iter().for_each(|(node, pods)| *usage.by_node.entry(node).or_default() += pods);
            if let Some(why) = passed_over(ranked, policies, outcome.gateway_of(key).is_some()) {
                usage.passed_over = Some(why);
                continue;
            }
            match coverage.covers(policy) {
                Some(by) => usage.shadowed_by.extend(by),
                None => usage.decides = true,
            }
            coverage.add(key, policy);
        }
    }
    uses
}

#[cfg(test)]
mod tests;
