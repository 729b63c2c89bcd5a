use super::*;
use crate::model::PolicyKey;
use crate::model::destination::{Destination, Ports};
use crate::model::marks::Marks;
use crate::node_plan::policy_chain::{PolicyAction, PolicyStep};

const ALLOCATION: EgressId = 7;
const HTTPS: u16 = 443;

fn pod_id() -> PodId {
    PodId::Adopted(3)
}

/// The policy chain of one policy that covers port 443 only.
fn policy_chain(existing_connections: ExistingConnections, fallback: Fallback) -> Arc<PolicyChain> {
    let ports = Ports { protocol: crate::api::Protocol::Tcp, first: HTTPS, last: HTTPS };
    let covers = Destination { networks: Box::default(), ports: [ports].into() };
    let policy = PolicyKey::from("a/p");
    let covers = Arc::new(vec![covers].into());
    Arc::new(PolicyChain::Steps(vec![PolicyStep {
        policy,
        action: PolicyAction::EgressIp { allocation: Some(ALLOCATION), fallback },
        others: Box::default(),
        by_connection: Box::default(),
        existing_connections,
        covers,
    }]))
}

fn connection(id: u32, port: u16) -> Connection {
    let [pod, node, server] = ["10.0.0.5", "192.0.2.1", "203.0.113.9"].map(|a| a.parse().unwrap());
    let (protocol, reply_port) = (6, Some(port));
    Connection {
        source: pod,
        destination: server,
        reply_source: server,
        reply_destination: node,
        protocol,
        reply_port,
        mark: 0,
        id,
        out: None,
    }
}

/// The actions for connection 1, which was kept before, for connection 2, and for one to another port.
fn actions(
    mended: bool,
    policy_chain: &Arc<PolicyChain>,
    ready: &[EgressId],
    before: &Arc<PolicyChain>,
) -> [Action; 3] {
    let pod = Pod { policy_chain: before.clone(), kept: [1].into(), is_new: false };
    let review =
        ConnectionReview { ready: [ALLOCATION].into(), mended, is_complete: true, ..ConnectionReview::default() };
    let ready = ready.iter().copied().collect();
    [(1, HTTPS), (2, HTTPS), (3, 80)]
        .map(|(id, port)| review.action(Some(&pod), policy_chain, &ready, &connection(id, port)))
}

#[test]
fn connections_without_a_policys_decision_are_kept_or_ended_as_it_says() {
    use Action::{End as Ended, Ignore as Passes, Keep as Kept};
    use ExistingConnections::{End, Keep};
    let (keep, end) = (policy_chain(Keep, Fallback::Block), policy_chain(End, Fallback::Block));
    let free = Arc::new(PolicyChain::Steps(vec![]));
    // A new policy: the connections that exist are stored.
    assert_eq!(actions(false, &keep, &[ALLOCATION], &free), [Kept, Kept, Passes]);
    assert_eq!(actions(false, &end, &[ALLOCATION], &free), [Ended, Ended, Passes]);
    // Another program has removed rules: connections that are not stored began meanwhile.
    assert_eq!(actions(true, &keep, &[ALLOCATION], &keep), [Kept, Ended, Passes]);
    assert_eq!(actions(true, &keep, &[], &keep), [Kept, Ended, Passes]);
    assert_eq!(actions(true, &keep, &[ALLOCATION], &free), [Kept, Kept, Passes]);
    // An isolated pod's policies are unknown.
    assert_eq!(actions(false, &Arc::new(PolicyChain::Isolated), &[], &free), [Kept, Kept, Kept]);
}

#[test]
fn connections_by_the_fallback_to_the_nodes_address_are_kept_while_the_fallback_lasts() {
    use Action::{End as Ended, Ignore as Passes, Keep as Kept};
    use ExistingConnections::{End, Keep};
    let (keep, end) = (policy_chain(Keep, Fallback::NodeAddress), policy_chain(End, Fallback::NodeAddress));
    assert_eq!(actions(true, &end, &[], &end), [Passes, Passes, Passes]);
    assert_eq!(actions(false, &end, &[ALLOCATION], &end), [Ended, Ended, Passes]);
    assert_eq!(actions(true, &keep, &[], &keep), [Passes, Passes, Passes]);
    assert_eq!(actions(true, &keep, &[ALLOCATION], &keep), [Kept, Ended, Passes]);
}

#[test]
fn a_daemon_that_finds_its_rules_removed_ends_unknown_connections() {
    let ready = [ALLOCATION].into();
    let keep = policy_chain(ExistingConnections::Keep, Fallback::Block);
    let action = |mended, is_complete| {
        let review = ConnectionReview { mended, is_complete, ..ConnectionReview::default() };
        review.action(None, &keep, &ready, &connection(1, HTTPS))
    };
    assert_eq!(
        [action(false, false), action(true, false), action(true, true)],
        [Action::Keep, Action::End, Action::Keep]
    );
}

#[test]
fn a_pod_that_started_under_its_policies_is_not_reviewed() {
    let keep = policy_chain(ExistingConnections::Keep, Fallback::Block);
    let mut review = ConnectionReview::default();
    let is_reviewed = |review: &ConnectionReview, policy_chain: &Arc<PolicyChain>| {
        review.needs_review(&pod_id(), policy_chain, &[ALLOCATION].into())
    };
    assert!(is_reviewed(&review, &keep), "it ran before");
    let isolated = Arc::new(PolicyChain::Isolated);
    review.pods.insert(pod_id(), Pod { policy_chain: isolated.clone(), kept: HashSet::new(), is_new: true });
    assert!(!is_reviewed(&review, &keep));
    review.pods.insert(pod_id(), Pod { policy_chain: isolated, kept: HashSet::new(), is_new: false });
    assert!(is_reviewed(&review, &keep), "it was isolated later");
    review.pods.insert(pod_id(), Pod { policy_chain: keep.clone(), kept: HashSet::new(), is_new: false });
    assert!(!is_reviewed(&review, &keep));
    review.mended = true;
    assert!(is_reviewed(&review, &keep));
}

#[test]
fn an_unchanged_state_is_sent_once() {
    let (jobs, incoming) = channel();
    let sent = Default::default();
    let mut existing = Existing { jobs, marks: Marks::default(), sent, new: BTreeSet::new(), mended: false };
    let used = Use { policy_chain: Some(policy_chain(ExistingConnections::Keep, Fallback::Block)), ..Use::default() };
    let uses = Uses::from([(pod_id(), Arc::new(used))]);
    let mut jobs_after = |mended| {
        existing.update(&uses, [ALLOCATION].into(), mended, &Shared::default(), &BTreeSet::new());
        incoming.try_iter().count()
    };
    assert_eq!([jobs_after(false), jobs_after(false), jobs_after(true), jobs_after(false)], [1, 0, 1, 0]);
}

#[test]
fn a_direct_policy_ends_connections_with_an_egress_ip_only_if_it_says_so() {
    for (existing, ends) in [(ExistingConnections::Keep, false), (ExistingConnections::End, true)] {
        let mut direct = (*policy_chain(existing, Fallback::Block)).clone();
        let PolicyChain::Steps(steps) = &mut direct else { panic!("no steps") };
        steps[0].action = PolicyAction::Direct;
        assert_eq!(ends_at_direct(&direct, &connection(1, HTTPS)), ends);
        assert!(!ends_at_direct(&direct, &connection(1, 80)), "it covers no other port");
        // A connection without an egress IP may leave so.
        assert_eq!(decides(&direct, &[ALLOCATION].into(), &connection(1, HTTPS)), None);
    }
    assert!(!ends_at_direct(&policy_chain(ExistingConnections::End, Fallback::Block), &connection(1, HTTPS)));
}
