//! The statuses of policies: egress IP, node, number of pods, and conditions.

mod coverage;
mod notices;
pub(super) mod ports;
mod readiness;
mod treatment;

pub use notices::{of_gateway, of_policy};

use crate::allocation::{AllocationResult, Decision, Grant, Grants, in_words};
use crate::api::{AllocationKind, EgressPolicyStatus, PodsOfNode};
use crate::model::condition::Conditions;
use crate::model::opt_in;
use crate::model::precedence::{PassedOver, PolicyIndex, Ranked, passed_over};
use crate::model::quota;
use crate::model::selector::Name;
use crate::model::text::few;
use crate::model::{AddressRequest, Cluster, MOVE_TO, Namespaces, Policy, PolicyKey, Tier};
use coverage::Coverage;
use ports::{FEW_PORTS, PORTS_NEARLY_EXHAUSTED, PortReports};
use readiness::{NAMED, NodeReports, REFUSED, Readiness, egress_ip, together};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use treatment::treatments;

/// The reason of `Accepted=True` when other policies share the named egress IP.
const SHARED: &str = "AddressShared";

/// The reason of `Accepted=True` and `Ready=True` with `action: Direct`.
const DIRECT: &str = "Direct";

/// The condition of a policy whose pods are isolated on some nodes, because it lists too many destinations for one.
/// It is absent otherwise.
const OVER_NODE_LIMIT: &str = "OverNodeLimit";

/// The nodes with a policy's pods are listed in its status if there are no more than this.
const LISTED_NODES: usize = 99;

/// The status of each policy. `now` is in seconds since the Unix epoch.
pub fn report(cluster: &Cluster, outcome: &AllocationResult, now: i64) -> BTreeMap<PolicyKey, EgressPolicyStatus> {
    let use_of = uses(cluster, outcome);
    let reports = NodeReports::new(cluster, outcome);
    let living: HashMap<&Name, Vec<&Name>> =
        cluster.gateways.iter().map(|(name, gateway)| (name, reports.living(gateway, now))).collect();
    let over_quota = quota::over(&cluster.policies);
    let ports = PortReports::new(cluster);
    let treatments = treatments(cluster, outcome);
    let mut statuses = BTreeMap::new();
    for (key, policy) in &cluster.policies {
        let Some(decision) = outcome.decisions.get(key) else { continue };
        let previous = previous(cluster, key).map(|s| s.conditions.as_slice()).unwrap_or_default();
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
                add_accepted(&mut conditions, policy, grants, &treated);
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

/// The status that was last written of a policy. Those that a gateway stands for have theirs in its status.
fn previous<'a>(cluster: &'a Cluster, key: &PolicyKey) -> Option<&'a EgressPolicyStatus> {
    match opt_in::gateway_of(key) {
        Some(gateway) => cluster.gateways.get(gateway)?.status.opt_in.as_deref(),
        None => cluster.policy_statuses.get(key).map(|status| &**status),
    }
}

/// The status of those who ask for each gateway that may be asked for. It takes the place of its policies' statuses.
pub fn opted_in(reports: &mut BTreeMap<PolicyKey, EgressPolicyStatus>) -> BTreeMap<Name, EgressPolicyStatus> {
    let gateways: BTreeSet<Name> = reports.keys().filter_map(opt_in::gateway_of).map(Name::from).collect();
    let joined = gateways.into_iter().filter_map(|gateway| {
        let [of_pods, of_namespaces] = opt_in::keys(&gateway).map(|key| reports.remove(&key));
        let (mut status, other) = (of_pods?, of_namespaces?);
        status.pods += other.pods;
        let mut by_node: BTreeMap<Name, u32> = BTreeMap::new();
        for of in status.pods_by_node.drain(..).chain(other.pods_by_node) {
            *by_node.entry(of.node).or_default() += of.pods;
        }
        status.pods_by_node = by_node.into_iter().map(|(node, pods)| PodsOfNode { node, pods }).collect();
        // Which of two policies decides for a pod says nothing about the gateway.
        status.conditions.retain(|condition| condition.type_ != "Shadowed");
        Some((gateway, status))
    });
    joined.collect()
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
             is full, does not answer, or a policy with the same egress IP asks for another node"
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
fn add_accepted(conditions: &mut Conditions, policy: &Policy, grants: &Grants, treated: &str) {
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
        [] => accepted(policy, &grants.first),
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

fn accepted(policy: &Policy, grant: &Grant) -> String {
    let whose = match grant.kind {
        AllocationKind::Explicit if policy.address == AddressRequest::Unspecified => "the gateway's default",
        AllocationKind::Explicit => "as it asks for",
        AllocationKind::Dedicated | AllocationKind::Unknown => "its own",
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
fn uses<'a>(cluster: &'a Cluster, outcome: &AllocationResult) -> HashMap<&'a PolicyKey, Usage<'a>> {
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
