//! How each pod leaves the cluster, and how that changes.

use super::{Computed, Kind, PodsChange};
use crate::allocation::Decision;
use crate::api::{ExistingConnections, Fallback};
use crate::ctl::pods::list;
use crate::model::destination::comma_separated;
use crate::model::precedence::{PolicyIndex, Ranked, passed_over};
use crate::model::spread::Near;
use crate::model::{Client, ObjectKey, Pod, addresses_of};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

/// One way out of the cluster, for some destinations.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Egress {
    /// The policy that decides.
    pub policy: String,
    /// The destinations: `everything`, or networks and ports.
    pub covers: String,
    /// Whether the traffic leaves as if Egret were not there.
    pub direct: bool,
    /// The egress IP; empty, unless it is direct: the traffic is blocked.
    pub egress_ip: Vec<IpAddr>,
    /// The DSCP that the policy gives packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dscp: Option<u8>,
    /// The bandwidth that the policy gives its egress IP, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<String>,
    /// Whether connections that began before the policy are ended.
    #[serde(skip)]
    ends_existing: bool,
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Egress { policy, covers, direct, egress_ip, .. } = self;
        match egress_ip.as_slice() {
            [] if *direct => write!(f, "direct by {policy}")?,
            [] => write!(f, "blocked by {policy}")?,
            some => write!(f, "{} by {policy}", list(some))?,
        }
        if let Some(dscp) = self.dscp {
            write!(f, " with DSCP {dscp}")?;
        }
        if let Some(bandwidth) = &self.bandwidth {
            write!(f, " with {bandwidth}")?;
        }
        if covers != "everything" { write!(f, " for {covers}") } else { Ok(()) }
    }
}

/// The ways of all pods that policies select, in the order in which they decide.
fn ways(computed: &Computed) -> BTreeMap<&ObjectKey, Vec<Egress>> {
    let index = PolicyIndex::new(&computed.cluster);
    let each = computed.cluster.pods.iter().filter(|(_, pod)| !pod.host_network && !pod.finished);
    let of_pod = each
        .map(|(key, pod)| (key, of_policies(computed, (key, pod), &index.policies_for(&key.namespace, &pod.labels))));
    of_pod.filter(|(_, ways)| !ways.is_empty()).collect()
}

fn of_policies(computed: &Computed, (name, pod): (&ObjectKey, &Pod), policies: &[&Ranked]) -> Vec<Egress> {
    let near = |node: Option<&str>| Near::of(&computed.cluster, pod.node.as_deref().unwrap_or_default(), node);
    let mut ways = Vec::new();
    for ranked in policies {
        let Ranked { key, policy, .. } = ranked;
        let address = match computed.outcome.decisions.get(key) {
            Some(Decision::Granted(grants)) => {
                let of_pod = grants.of_pod(policy, Client::of(name, pod), near);
                Some(of_pod.into_iter().flat_map(|grant| addresses_of(&grant.address)).collect::<Vec<IpAddr>>())
            }
            _ => None,
        };
        if passed_over(ranked, policies, address.is_some()).is_some() {
            continue;
        }
        // `egress: []` covers nothing.
        if policy.egress.as_ref().is_some_and(|covers| covers.is_empty()) {
            continue;
        }
        let covers = match &policy.egress {
            Some(destinations) if !policy.covers_everything() => comma_separated(destinations),
            _ => "everything".to_owned(),
        };
        ways.push(Egress {
            policy: key.to_string(),
            covers,
            direct: policy.is_direct(),
            egress_ip: address.unwrap_or_default(),
            dscp: policy.dscp,
            bandwidth: policy.bandwidth.map(|bandwidth| bandwidth.to_string()),
            ends_existing: policy.existing_connections == ExistingConnections::End,
        });
        if policy.covers_everything() {
            break;
        }
    }
    // A pod that only direct policies select leaves as if there were none.
    if ways.iter().all(|way| way.direct) { Vec::new() } else { ways }
}

/// The pods whose way out changes, those with the same change together.
pub(super) fn pods(before: &Computed, after: &Computed) -> Vec<PodsChange> {
    let (old, new) = (ways(before), ways(after));
    let in_use: BTreeSet<IpAddr> = after
        .outcome
        .gateways
        .values()
        .flat_map(|status| &status.allocations)
        .flat_map(|allocation| addresses_of(&allocation.address))
        .collect();
    let keys: BTreeSet<&ObjectKey> = old.keys().chain(new.keys()).copied().collect();
    let mut groups: BTreeMap<(Kind, Vec<Egress>, Vec<Egress>), Vec<String>> = BTreeMap::new();
    for key in keys.into_iter().filter(|key| after.cluster.pods.contains_key(*key)) {
        let (from, to) = (old.get(key).cloned().unwrap_or_default(), new.get(key).cloned().unwrap_or_default());
        if from == to {
            continue;
        }
        let kind = match (from.is_empty(), to.is_empty()) {
            (true, _) => Kind::Gain,
            (_, true) => Kind::Lose,
            _ => Kind::Change,
        };
        groups.entry((kind, from, to)).or_default().push(key.to_string());
    }
    let change = |((kind, from, to), pods): ((Kind, Vec<Egress>, Vec<Egress>), Vec<String>)| {
        let connections = connections(&from, &to, &in_use);
        PodsChange { kind, from, to, connections, pods }
    };
    groups.into_iter().map(change).collect()
}

/// What becomes of open connections. Those of an egress IP live as long as the pod has a policy with it.
fn connections(from: &[Egress], to: &[Egress], in_use: &BTreeSet<IpAddr>) -> String {
    let old: BTreeSet<IpAddr> = from.iter().flat_map(|way| way.egress_ip.iter().copied()).collect();
    let new: BTreeSet<IpAddr> = to.iter().flat_map(|way| way.egress_ip.iter().copied()).collect();
    let gone: Vec<IpAddr> = old.difference(&new).copied().collect();
    if !gone.is_empty() {
        let released: Vec<IpAddr> = gone.iter().filter(|address| !in_use.contains(address)).copied().collect();
        let why = if released.is_empty() { "" } else { ", which is given back" };
        return format!("connections from {}{why} end", list(&gone));
    }
    if from.is_empty() {
        return if to.iter().any(|way| way.ends_existing) {
            "open connections to covered destinations end (existingConnections: End)".to_owned()
        } else {
            "open connections keep the node's address (existingConnections: Keep)".to_owned()
        };
    }
    "open connections continue".to_owned()
}

/// Whether a policy without an egress IP lets its traffic pass.
pub(super) fn falls_back(fallback: Fallback) -> bool {
    fallback == Fallback::NodeAddress
}
