//! Events for users: not every state, but changes that they should act on or know of.

use super::ports::PORTS_NEARLY_EXHAUSTED;
use super::{OVER_NODE_LIMIT, REFUSED, SHARED};
use crate::allocation::in_words;
use crate::api::{Condition, EgressGatewayStatus, EgressPolicyStatus};
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
                notices.push(Notice::warning(&condition.reason, format!("refused: {}", condition.message)));
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
        match (&before.addresses, &after.addresses) {
            (Some(from), Some(to)) if from != to => {
                let note = format!("its egress IP changed from {} to {}", in_words(from), in_words(to));
                notices.push(Notice::normal("AddressChanged", note));
            }
            (Some(address), Some(_)) => {
                if let (Some(from), Some(to)) = (&before.node, &after.node)
                    && from != to
                {
                    let note = format!("{} moved from node {from:?} to node {to:?}", in_words(address));
                    notices.push(Notice::normal("AddressMoved", note));
                }
            }
            _ => {}
        }
    }
    notices
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
            pods: 0,
            pods_by_node: Vec::new(),
            conditions: conditions.iter().map(condition).collect(),
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
        let unheard =
            status(&[("Accepted", "True", "Accepted"), ("Ready", "Unknown", "NodeNotHeard")], "192.0.2.50", "g1");
        assert_eq!(notices(Some(&good), &unheard), ["NodeNotHeard: maybe blocked: because"]);
        assert!(notices(Some(&unheard), &unheard).is_empty() && notices(Some(&unheard), &good).is_empty());
        let conflict = status(&[("Accepted", "True", "Accepted"), ("Ready", "False", REFUSED)], "192.0.2.50", "g1");
        assert_eq!(notices(None, &conflict), ["AddressRefused: blocked: because"]);
        assert_eq!(notices(Some(&new), &conflict), ["AddressRefused: blocked: because"]);
        assert!(notices(Some(&conflict), &conflict).is_empty());
        let refused = status(&[("Accepted", "False", "PoolExhausted"), ("Ready", "False", "NotAccepted")], "::1", "g1");
        assert_eq!(notices(None, &refused), ["PoolExhausted: refused: because"]);
        assert!(notices(Some(&refused), &refused).is_empty());
        let moved = EgressPolicyStatus { node: Some("g2".into()), ..good.clone() };
        assert_eq!(notices(Some(&good), &moved), ["AddressMoved: 192.0.2.50 moved from node \"g1\" to node \"g2\""]);
        let other = EgressPolicyStatus { addresses: Some(pair(&["192.0.2.51"])), ..good.clone() };
        assert_eq!(
            notices(Some(&good), &other),
            ["AddressChanged: its egress IP changed from 192.0.2.50 to 192.0.2.51"]
        );
        let shadowed = status(&[("Shadowed", "True", "Shadowed")], "192.0.2.50", "g1");
        assert_eq!(notices(Some(&good), &shadowed), ["Shadowed: because"]);
    }
}
