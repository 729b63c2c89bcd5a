//! The chains on pods' veths, and the policy chains.

use super::{choices, counter, covers, set};
use crate::api::Fallback;
use crate::model::marks::{MAX_INDEX, Marks};
use crate::node_plan::PodPlan;
use crate::node_plan::policy_chain::{PolicyAction, PolicyChain, PolicyStep};
use egret_nft::Family;
use egret_nft::rule::Rule;
use egret_nft::uapi::*;
use ipnetwork::IpNetwork;
use std::net::{IpAddr, Ipv6Addr};

/// On the pod's veth: packets from the pod's addresses get the pod mark. IPv6 link-local addresses, the unspecified
/// address (duplicate address detection) and packets that are not IP pass without a mark. Other sources are forged.
pub(super) fn from_pod(pod: &PodPlan, marks: Marks) -> Vec<Rule> {
    from(pod, marks, Rule::saddr_in)
}

/// The same in a chain of the family bridge.
pub(super) fn from_bridge_port(pod: &PodPlan, marks: Marks) -> Vec<Rule> {
    from(pod, marks, Rule::frame_saddr_in)
}

fn from(pod: &PodPlan, marks: Marks, saddr_in: fn(Rule, IpNetwork) -> Rule) -> Vec<Rule> {
    let pod_mark = marks.pod_mark(pod.pod_mark);
    let of_address = |a: &IpAddr| saddr_in(Rule::new(), (*a).into()).set_mark(pod_mark).accept();
    let mut rules: Vec<Rule> = pod.addresses.iter().map(of_address).collect();
    rules.extend(of_every_pod().map(|network| saddr_in(Rule::new(), network).accept()));
    rules.push(Rule::new().not_ip().accept());
    rules.push(Rule::new().counter(counter::SPOOFED).drop());
    rules
}

/// Conditions for the source addresses that every pod may use.
pub(super) fn without_address() -> impl Iterator<Item = Rule> {
    of_every_pod().map(|network| Rule::new().saddr_in(network))
}

/// The source addresses that every pod may use: IPv6 link-local addresses, and the unspecified one.
fn of_every_pod() -> impl Iterator<Item = IpNetwork> {
    let link_local = IpNetwork::new(IpAddr::V6([0xfe80, 0, 0, 0, 0, 0, 0, 0].into()), 10);
    link_local.into_iter().chain([IpAddr::V6(Ipv6Addr::UNSPECIFIED).into()])
}

/// Decides on a pod's new connection. Direct destinations pass. Then the first policy that covers the destination
/// decides.
///
/// A packet that no policy covers passes at the end, if it has come by every rule. Each rule flips the bits of its
/// number in the mark's index, where the pod mark's index is no longer needed. So a removed rule blocks packets and
/// does not open what it covered.
pub(super) fn of_policy_chain(policy_chain: &PolicyChain, marks: Marks) -> Vec<Rule> {
    let pass = |rule: Rule| rule.clear_mark(!marks.kind_and_index_mask()).accept();
    let mut rules: Vec<Rule> = direct().map(pass).collect();
    let PolicyChain::Steps(steps) = policy_chain else {
        rules.push(Rule::new().counter(counter::BLOCKED).drop());
        return rules;
    };
    rules.push(Rule::new().clear_mark(!marks.index_mask()));
    let (mut number, mut passed) = (0, 0);
    let mut numbered = || {
        number = number % MAX_INDEX + 1;
        passed ^= number;
        Rule::new().flip_mark(marks.index(number))
    };
    let first_fallback = steps.iter().position(PolicyStep::falls_back);
    for (at, step) in steps.iter().enumerate() {
        if first_fallback == Some(at) {
            // Packets of state invalid are not translated. They would leave with the pod's own address.
            rules.push(numbered().ct_state(CT_STATE_INVALID).counter(counter::BLOCKED).drop());
        }
        for lookup in covers::lookups(&step.covers) {
            let mut matched = || lookup.append_to(numbered());
            if let count @ 2.. = step.by_connection.len() as u32 {
                // A packet whose connection has no hash has the first of the egress IPs, by the rules below.
                let choices = choices::name(&step.by_connection);
                let by_hash = |ip: &Family| matched().set_ct_mark_by_hash(*ip, count, choices.clone()).goto("known");
                rules.extend(lookup.families().iter().map(by_hash));
            }
            match step.action {
                PolicyAction::Direct => rules.push(pass(matched())),
                PolicyAction::EgressIp { allocation: Some(allocation), fallback: Fallback::Block } => {
                    rules.push(matched().set_ct_mark(marks.connection(allocation)).goto("known"));
                }
                PolicyAction::EgressIp { allocation: Some(allocation), fallback: Fallback::NodeAddress } => {
                    rules.push(
                        matched().set_ct_mark_and_mark_by(marks.connection(allocation), set::EGRESS_ID_OUT).accept(),
                    );
                    rules.push(pass(matched()));
                }
                PolicyAction::EgressIp { allocation: None, fallback: Fallback::Block } => {
                    rules.push(matched().counter(counter::BLOCKED).drop());
                }
                PolicyAction::EgressIp { allocation: None, fallback: Fallback::NodeAddress } => {
                    rules.push(pass(matched()))
                }
            }
        }
    }
    if !steps.iter().any(PolicyStep::covers_everything) {
        let by_all = marks.pod_mark(passed);
        rules.push(pass(Rule::new().mark(marks.kind_and_index_mask(), by_all)));
    }
    rules
}

/// Conditions for the destinations that every pod may reach.
pub(super) fn direct() -> impl Iterator<Item = Rule> {
    let sets = |(at, ip)| [set::HOSTS[at], set::DIRECT[at]].map(|set| Rule::new().daddr_in_set(ip, set));
    Family::BOTH.into_iter().enumerate().flat_map(sets).chain([Rule::new().daddr_type(RTN_LOCAL)])
}
