//! What a person should hear of at once, as an event: not every state, but changes to act on or to know of.

use super::{REFUSED, SHARED};
use crate::allocation::in_words;
use crate::api::{Condition, EgressGatewayStatus, EgressPolicyStatus};
use crate::model::notice::Notice;

/// What is to be told when a policy's status changes.
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
            // This does not pass by itself.
            ("Ready", "False") if condition.reason == REFUSED => {
                notices.push(Notice::warning(REFUSED, format!("blocked: {}", condition.message)));
            }
            ("Ready", "Unknown") => {
                notices.push(Notice::warning(&condition.reason, format!("maybe blocked: {}", condition.message)));
            }
            // A policy that begins is not ready for a moment, which is nobody's concern.
            ("Ready", "False") if was.is_some_and(|was| was.status == "True") && condition.reason != "NotAccepted" => {
                notices.push(Notice::warning(&condition.reason, format!("blocked: {}", condition.message)));
            }
            ("Shadowed", "True") => notices.push(Notice::warning("Shadowed", condition.message.clone())),
            _ => {}
        }
    }
    if let Some(before) = before {
        match (&before.addresses, &after.addresses) {
            (Some(from), Some(to)) if from != to => {
                let note = format!("its address moved from {} to {}", in_words(from), in_words(to));
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

/// What is to be told when a gateway's status changes.
pub fn of_gateway(before: &EgressGatewayStatus, after: &EgressGatewayStatus) -> Vec<Notice> {
    let is_new = |condition: &&Condition| {
        let was = before.conditions.iter().find(|c| c.type_ == condition.type_);
        condition.status != "True" && was.is_none_or(|was| was.status == "True" || was.reason != condition.reason)
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
            conditions: conditions.iter().map(condition).collect(),
        }
    }

    fn told(before: Option<&EgressPolicyStatus>, after: &EgressPolicyStatus) -> Vec<String> {
        of_policy(before, after).into_iter().map(|n| format!("{}: {}", n.reason, n.note)).collect()
    }

    #[test]
    fn a_person_hears_of_what_changes() {
        let good = status(&[("Accepted", "True", "Accepted"), ("Ready", "True", "AddressHeld")], "192.0.2.50", "g1");
        let new = status(&[("Accepted", "True", "Accepted"), ("Ready", "False", "AddressNotHeld")], "192.0.2.50", "g1");
        assert!(
            told(None, &new).is_empty() && told(Some(&new), &good).is_empty() && told(Some(&good), &good).is_empty()
        );
        assert_eq!(told(Some(&good), &new), ["AddressNotHeld: blocked: because"]);
        let unheard =
            status(&[("Accepted", "True", "Accepted"), ("Ready", "Unknown", "NodeNotHeard")], "192.0.2.50", "g1");
        assert_eq!(told(Some(&good), &unheard), ["NodeNotHeard: maybe blocked: because"]);
        assert!(told(Some(&unheard), &unheard).is_empty() && told(Some(&unheard), &good).is_empty());
        let stranger = status(&[("Accepted", "True", "Accepted"), ("Ready", "False", REFUSED)], "192.0.2.50", "g1");
        assert_eq!(told(None, &stranger), ["AddressRefused: blocked: because"]);
        assert_eq!(told(Some(&new), &stranger), ["AddressRefused: blocked: because"]);
        assert!(told(Some(&stranger), &stranger).is_empty());
        let refused = status(&[("Accepted", "False", "PoolExhausted"), ("Ready", "False", "NotAccepted")], "::1", "g1");
        assert_eq!(told(None, &refused), ["PoolExhausted: refused: because"]);
        assert!(told(Some(&refused), &refused).is_empty());
        let moved = EgressPolicyStatus { node: Some("g2".into()), ..good.clone() };
        assert_eq!(told(Some(&good), &moved), ["AddressMoved: 192.0.2.50 moved from node \"g1\" to node \"g2\""]);
        let other = EgressPolicyStatus { addresses: Some(pair(&["192.0.2.51"])), ..good.clone() };
        assert_eq!(told(Some(&good), &other), ["AddressChanged: its address moved from 192.0.2.50 to 192.0.2.51"]);
        let shadowed = status(&[("Shadowed", "True", "Shadowed")], "192.0.2.50", "g1");
        assert_eq!(told(Some(&good), &shadowed), ["Shadowed: because"]);
    }
}
