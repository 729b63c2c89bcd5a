//! The status of EgressPolicies and ClusterEgressPolicies.

use super::{AddressPair, Condition, Name};
use serde::{Deserialize, Serialize};

/// The egress IP and the conditions of a policy. Only the controller writes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressPolicyStatus {
    /// The gateway of the policy: the one that it names, else the default one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The egress IP; of several, the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<AddressPair>,
    /// The node that holds the egress IP; of several, the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The number of egress IPs; a pair counts once.
    #[serde(default)]
    pub address_count: u32,
    /// If the policy asks for several egress IPs: all that it has, in the order of `spec.addresses`.
    #[serde(rename = "egressIPs", default, skip_serializing_if = "Vec::is_empty")]
    pub egress_ips: Vec<PolicyEgressIp>,
    /// How many pods the policy selects. The number may be ten seconds old.
    #[serde(default)]
    pub pods: u32,
    /// The same by node, sorted; absent if the pods run on 100 nodes or more. Pods that no node has yet are not in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods_by_node: Vec<PodsOfNode>,
    /// `Accepted`: the policy has an egress IP. `Ready`: its node holds it. `Shadowed`: other policies decide for all
    /// pods of this one. `PortsNearlyExhausted` (absent if not so): connections to a destination use most of the egress IP's
    /// source ports. `OverNodeLimit` (absent if not so): its pods on some nodes are isolated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl EgressPolicyStatus {
    /// The egress IPs, each with its node.
    pub fn all_egress_ips(&self) -> Vec<(&AddressPair, Option<&str>)> {
        if self.egress_ips.is_empty() {
            return self.addresses.iter().map(|address| (address, self.node.as_deref())).collect();
        }
        self.egress_ips.iter().map(|of| (&of.address, of.node.as_deref())).collect()
    }
}

/// One of several egress IPs of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyEgressIp {
    /// The addresses.
    #[serde(flatten)]
    pub address: AddressPair,
    /// Its position among the egress IPs that the policy asks for, from 0.
    pub ordinal: u16,
    /// The node that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Whether its node holds it: `True`, `False` or `Unknown`.
    pub ready: String,
}

/// How many pods of a policy run on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodsOfNode {
    /// The node.
    #[schemars(with = "String")]
    pub node: Name,
    /// The number of pods.
    pub pods: u32,
}
