//! Events for users: not every state, but changes that they should act on or know of.

use super::ports::PORTS_NEARLY_EXHAUSTED;
use super::{OVER_NODE_LIMIT, REFUSED, SHARED};
use crate::allocation::in_words;
use crate::api::{AddressPair, Condition, EgressGatewayStatus, EgressPolicyStatus};
use crate::model::notice::Notice;

/// The notices for a change of a policy's status.
pub fn of_policy(before: Option<&EgressPolicyStatus>, after: &EgressPolicyStatus) -> Vec<Notice> {
    let old = before.map(|s| s.conditions.as_slice()).unwrap_or_default();
    let mut notices = Vec::new();
    for condition in &after.conditions {
        let was = old.iter().find(|c| c.type_ == condition.type_);
        let same = was.is_some_and(|was| was.status == condition.status && was.reason == condition.reason);
        match (&*condition.type_, &*condition.status) {
            _ if same => {}
            ("Accepted", "False") => {
                notices.push(Notice::warning(&condition.reason, format!("rejected: {}", condition.message)));
            }
            ("Accepted", "True") if condition.reason == SHARED && was.is_some() => {
                notices.push(Notice::normal(SHARED, condition.message.clone()));
            }
            // This state does not end by itself.
            ("Ready", "False") if condition.reason == REFUSED => {
                notices.push(Notice::warning(REFUSED, format!("blocked: {}", condition.message)));
            }
            ("Ready", "Unknown") => {
                notices.push(Notice::warning(&condition.reason, format!("maybe blocked: {}", condition.message)));
            }
            // A new policy is not ready for a moment. This is no event.
            ("Ready", "False") if was.is_some_and(|was| was.status == "True") && condition.reason != "NotAccepted" => {
                notices.push(Notice::warning(&condition.reason, format!("blocked: {}", condition.message)));
            }
            (kind @ (OVER_NODE_LIMIT | PORTS_NEARLY_EXHAUSTED), "True") => {
                notices.push(Notice::warning(kind, condition.message.clone()));
            }
            ("Shadowed", "True") => notices.push(Notice::warning("Shadowed", condition.message.clone())),
            _ => {}
        }
    }
    if let Some(before) = before {
        notices.extend(changed_addresses(&before.all_egress_ips(), &after.all_egress_ips()));
    }
    notices
}

/// The notices for changes of egress IPs and of their nodes.
fn changed_addresses(before: &[(&AddressPair, Option<&str>)], after: &[(&AddressPair, Option<&str>)]) -> Vec<Notice> {
    let words = |all: &[(&AddressPair, Option<&str>)]| {
        all.iter().map(|(address, _)| in_words(address)).collect::<Vec<_>>().join(", ")
    };
    let has = |all: &[(&AddressPair, Option<&str>)], wanted: &AddressPair| all.iter().any(|(a, _)| *a == wanted);
    if before.is_empty() || after.is_empty() {
        return Vec::new();
    }
    let (from, to) = (words(before), words(after));
    let same = before.len() == after.len() && before.iter().all(|(address, _)| has(after, address));
    if !same {
        let its = if before.len() + after.len() > 2 { "its egress IPs changed" } else { "its egress IP changed" };
        return vec![Notice::normal("AddressChanged", format!("{its} from {from} to {to}"))];
    }
    let moved = after.iter().filter_map(|(address, node)| {
        let (_, was) = before.iter().find(|(a, _)| a == address)?;
        let (from, to) = (was.as_ref()?, node.as_ref()?);
        let note = || format!("{} moved from node {from:?} to node {to:?}", in_words(address));
        (from != to).then(|| Notice::normal("AddressMoved", note()))
    });
    moved.collect()
}

/// The notices for a change of a gateway's status.
pub fn of_gateway(before: &EgressGatewayStatus, after: &EgressGatewayStatus) -> Vec<Notice> {
    let is_new = |condition: &&Condition| {
        let was = before.conditions.iter().find(|c| c.type_ == condition.type_);
        // This condition is there only while something is wrong.
        let is_wrong = condition.status != "True" || condition.type_ == PORTS_NEARLY_EXHAUSTED && was.is_none();
        is_wrong && was.is_none_or(|was| was.status == "True" || was.reason != condition.reason)
    };
    let warning = |c: &Condition| Notice::warning(&c.reason, c.message.clone());
    after.conditions.iter().filter(is_new).map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::PolicyEgressIp;
    use crate::fixture::pair;

    fn status(conditions: &[(&str, &str, &str)], address: &str, node: &str) -> EgressPolicyStatus {
        let condition = |(type_, status, reason): &(&str, &str, &str)| Condition {
            type_: (*type_).to_owned(),
            status: (*status).to_owned(),
            reason: (*reason).to_owned(),
            message: "because".to_owned(),
            last_transition_time: String::new(),
            observed_generation: None,
        };
        EgressPolicyStatus {
            gateway: None,
            addresses: Some(pair(&[address])),
            node: Some(node.to_owned()),
            conditions: conditions.iter().map(condition).collect(),
            ..EgressPolicyStatus::default()
        }
    }

    fn notices(before: Option<&EgressPolicyStatus>, after: &EgressPolicyStatus) -> Vec<String> {
        of_policy(before, after).into_iter().map(|n| format!("{}: {}", n.reason, n.note)).collect()
    }

    #[test]
    fn changes_make_notices() {
        let good = status(&[("Accepted", "True", "Accepted"), ("Ready", "True", "AddressHeld")], "192.0.2.50", "g1");
        let new = status(&[("Accepted", "True", "Accepted"), ("Ready", "False", "AddressNotHeld")], "192.0.2.50", "g1");
        assert!(
            notices(None, &new).is_empty()
                && notices(Some(&new), &good).is_empty()
                && notices(Some(&good), &good).is_empty()
        );
        assert_eq!(notices(Some(&good), &new), ["AddressNotHeld: blocked: because"]);
        let unknown =
            status(&[("Accepted", "True", "Accepted"), ("Ready", "Unknown", "NodeStatusUnknown")], "192.0.2.50", "g1");
        assert_eq!(notices(Some(&good), &unknown), ["NodeStatusUnknown: maybe blocked: because"]);
        assert!(notices(Some(&unknown), &unknown).is_empty() && notices(Some(&unknown), &good).is_empty());
        let conflict = status(&[("Accepted", "True", "Accepted"), ("Ready", "False", REFUSED)], "192.0.2.50", "g1");
        assert_eq!(notices(None, &conflict), ["AddressRefused: blocked: because"]);
        assert_eq!(notices(Some(&new), &conflict), ["AddressRefused: blocked: because"]);
        assert!(notices(Some(&conflict), &conflict).is_empty());
        let rejected =
            status(&[("Accepted", "False", "PoolExhausted"), ("Ready", "False", "NotAccepted")], "::1", "g1");
        assert_eq!(notices(None, &rejected), ["PoolExhausted: rejected: because"]);
        assert!(notices(Some(&rejected), &rejected).is_empty());
        let moved = EgressPolicyStatus { node: Some("g2".into()), ..good.clone() };
        assert_eq!(notices(Some(&good), &moved), ["AddressMoved: 192.0.2.50 moved from node \"g1\" to node \"g2\""]);
        let other = EgressPolicyStatus { addresses: Some(pair(&["192.0.2.51"])), ..good.clone() };
        assert_eq!(
            notices(Some(&good), &other),
            ["AddressChanged: its egress IP changed from 192.0.2.50 to 192.0.2.51"]
        );
        let of_two = |last: &str, node: &str| EgressPolicyStatus {
            egress_ips: [("192.0.2.50", "g1"), (last, node)]
                .map(|(address, node)| PolicyEgressIp {
                    address: pair(&[address]),
                    node: Some(node.to_owned()),
                    ..PolicyEgressIp::default()
                })
                .into(),
            ..good.clone()
        };
        assert_eq!(
            notices(Some(&of_two("192.0.2.51", "g1")), &of_two("192.0.2.51", "g2")),
            ["AddressMoved: 192.0.2.51 moved from node \"g1\" to node \"g2\""]
        );
        assert_eq!(
            notices(Some(&of_two("192.0.2.51", "g1")), &of_two("192.0.2.52", "g1")),
            ["AddressChanged: its egress IPs changed from 192.0.2.50, 192.0.2.51 to 192.0.2.50, 192.0.2.52"]
        );
        let shadowed = status(&[("Shadowed", "True", "Shadowed")], "192.0.2.50", "g1");
        assert_eq!(notices(Some(&good), &shadowed), ["Shadowed: because"]);
    }
}
