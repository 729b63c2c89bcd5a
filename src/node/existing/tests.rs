use super::*;
use crate::model::PolicyKey;
use crate::model::destination::{Destination, Ports};
use crate::model::marks::Marks;
use crate::node_plan::policy_chain::Step;

const ALLOCATION: EgressId = 7;
const HTTPS: u16 = 443;

fn holder() -> Holder {
    Holder::Adopted(3)
}

/// Of one policy, which covers port 443 alone.
fn policy_chain(existing_connections: ExistingConnections, fallback: Fallback) -> Arc<PolicyChain> {
    let ports = Ports { protocol: crate::api::Protocol::Tcp, first: HTTPS, last: HTTPS };
    let covers = Destination { networks: Box::default(), ports: [ports].into() };
    let policy = PolicyKey::from("a/p");
    let covers = Arc::new(vec![covers].into());
    Arc::new(PolicyChain::Steps(vec![Step {
        policy,
        allocation: Some(ALLOCATION),
        fallback,
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

/// What becomes of connections 1 and 2, of which the first has been kept, and of one to another port.
fn fates(mended: bool, policy_chain: &Arc<PolicyChain>, ready: &[EgressId], before: &Arc<PolicyChain>) -> [Fate; 3] {
    let pod = Pod { policy_chain: before.clone(), kept: [1].into(), is_new: false };
    let seen = Seen { ready: [ALLOCATION].into(), mended, has_looked: true, ..Seen::default() };
    let ready = ready.iter().copied().collect();
    [(1, HTTPS), (2, HTTPS), (3, 80)]
        .map(|(id, port)| seen.fate(Some(&pod), policy_chain, &ready, &connection(id, port)))
}

#[test]
fn connections_without_a_policys_decision_are_kept_or_ended_as_it_says() {
    use ExistingConnections::{End, Keep};
    use Fate::{Ended, Kept, Passes};
    let (keep, end) = (policy_chain(Keep, Fallback::Block), policy_chain(End, Fallback::Block));
    let free = Arc::new(PolicyChain::Steps(vec![]));
    // A policy begins; what has begun before is known from then on.
    assert_eq!(fates(false, &keep, &[ALLOCATION], &free), [Kept, Kept, Passes]);
    assert_eq!(fates(false, &end, &[ALLOCATION], &free), [Ended, Ended, Passes]);
    // Somebody has taken rules away: what is not known has begun meanwhile.
    assert_eq!(fates(true, &keep, &[ALLOCATION], &keep), [Kept, Ended, Passes]);
    assert_eq!(fates(true, &keep, &[], &keep), [Kept, Ended, Passes]);
    assert_eq!(fates(true, &keep, &[ALLOCATION], &free), [Kept, Kept, Passes]);
    // What nobody knows anything of may be anything.
    assert_eq!(fates(false, &Arc::new(PolicyChain::Isolated), &[], &free), [Kept, Kept, Kept]);
}

#[test]
fn a_fallback_to_the_nodes_address_makes_connections_that_stay_while_it_lasts() {
    use ExistingConnections::{End, Keep};
    use Fate::{Ended, Kept, Passes};
    let (keep, end) = (policy_chain(Keep, Fallback::NodeAddress), policy_chain(End, Fallback::NodeAddress));
    assert_eq!(fates(true, &end, &[], &end), [Passes, Passes, Passes]);
    assert_eq!(fates(false, &end, &[ALLOCATION], &end), [Ended, Ended, Passes]);
    assert_eq!(fates(true, &keep, &[], &keep), [Passes, Passes, Passes]);
    assert_eq!(fates(true, &keep, &[ALLOCATION], &keep), [Kept, Ended, Passes]);
}

#[test]
fn a_daemon_that_finds_its_rules_gone_ends_what_it_cannot_know() {
    let ready = [ALLOCATION].into();
    let keep = policy_chain(ExistingConnections::Keep, Fallback::Block);
    let fate = |mended, has_looked| {
        let seen = Seen { mended, has_looked, ..Seen::default() };
        seen.fate(None, &keep, &ready, &connection(1, HTTPS))
    };
    assert_eq!([fate(false, false), fate(true, false), fate(true, true)], [Fate::Kept, Fate::Ended, Fate::Kept]);
}

#[test]
fn a_pod_that_began_under_its_policies_is_not_looked_at() {
    let keep = policy_chain(ExistingConnections::Keep, Fallback::Block);
    let mut seen = Seen::default();
    let is_looked_at = |seen: &Seen, policy_chain: &Arc<PolicyChain>| {
        seen.is_to_be_looked_at(&holder(), policy_chain, &[ALLOCATION].into())
    };
    assert!(is_looked_at(&seen, &keep), "it ran before");
    let held = Arc::new(PolicyChain::Isolated);
    seen.pods.insert(holder(), Pod { policy_chain: held.clone(), kept: HashSet::new(), is_new: true });
    assert!(!is_looked_at(&seen, &keep));
    seen.pods.insert(holder(), Pod { policy_chain: held, kept: HashSet::new(), is_new: false });
    assert!(is_looked_at(&seen, &keep), "it was held later");
    seen.pods.insert(holder(), Pod { policy_chain: keep.clone(), kept: HashSet::new(), is_new: false });
    assert!(!is_looked_at(&seen, &keep));
    seen.mended = true;
    assert!(is_looked_at(&seen, &keep));
}

#[test]
fn what_is_told_twice_is_done_once() {
    let (jobs, incoming) = channel();
    let told = Default::default();
    let mut existing = Existing { jobs, marks: Marks::default(), told, new: BTreeSet::new(), mended: false };
    let used = Use { policy_chain: Some(policy_chain(ExistingConnections::Keep, Fallback::Block)), ..Use::default() };
    let uses = Uses::from([(holder(), Arc::new(used))]);
    let mut look = |mended| {
        existing.look(&uses, [ALLOCATION].into(), mended, &Shared::default(), &BTreeSet::new());
        incoming.try_iter().count()
    };
    assert_eq!([look(false), look(false), look(true), look(false)], [1, 0, 1, 0]);
}
