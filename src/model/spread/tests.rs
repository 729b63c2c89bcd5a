use super::*;
use crate::fixture::World;
use crate::model::selector::Labels;
use std::collections::BTreeSet;
use std::sync::Arc;

const HELD: ChoiceState = ChoiceState { is_held: true, is_ready: true, near: Near::Far };

fn by(spread: Spread, asked: usize) -> Division<'static> {
    Division { spread, preference: &[], asked }
}

fn pod(uid: &str) -> Client<'_> {
    Client { namespace: "a", name: "p", uid, labels: None }
}

fn named(addresses: &[u8]) -> Vec<Choice<u8>> {
    let pair = |last: u8| AddressPair { ipv4: Some([192, 0, 2, last].into()), ipv6: None };
    (0..).zip(addresses).map(|(ordinal, last)| Choice::named(*last, ordinal, &pair(*last), HELD)).collect()
}

/// The egress IP of each of a thousand pods.
fn chosen(division: Division<'_>, choices: &[Choice<u8>]) -> Vec<u8> {
    let uids = (0..1000).map(|n| format!("7f3c2f7e-4a53-4a3e-9d0c-{n:012x}"));
    uids.map(|uid| division.one(choices, pod(&uid)).unwrap()).collect()
}

#[test]
fn pods_are_divided_evenly_and_an_added_egress_ip_takes_only_its_share() {
    let of = |addresses: &[u8]| chosen(by(Spread::Pod, addresses.len()), &named(addresses));
    let (three, four) = (of(&[1, 2, 3]), of(&[1, 2, 3, 4]));
    for (choices, all) in [(&three, 3), (&four, 4)] {
        for last in 1..=all {
            let share = choices.iter().filter(|chosen| **chosen == last).count();
            let fair = 1000 / usize::from(all);
            assert!((fair * 8 / 10..fair * 12 / 10).contains(&share), "{last} of {all}: {share}");
        }
    }
    assert!(three.iter().zip(&four).all(|(before, after)| before == after || *after == 4));
    // Neither the order nor the place of a removed one matters.
    let without = of(&[4, 3, 1]);
    assert!(four.iter().zip(&without).all(|(before, after)| before == after || *before == 2));
}

#[test]
fn a_replica_has_the_egress_ip_of_its_ordinal() {
    let (all, ordinals) = (named(&[1, 2, 3]), by(Spread::Ordinal, 3));
    let of =
        |name: &str, labels: Option<&Labels>| ordinals.one(&all, Client { namespace: "a", name, uid: "u", labels });
    assert_eq!([0, 1, 2, 3, 4].map(|n| of(&format!("web-{n}"), None)), [1, 2, 3, 1, 2].map(Some));
    let labels: Labels = [("apps.kubernetes.io/pod-index", "2")].into_iter().collect();
    assert_eq!(of("web-0", Some(&labels)), Some(3));
    let labels: Labels = [("batch.kubernetes.io/job-completion-index", "1")].into_iter().collect();
    assert_eq!(of("job-0-x7k2p", Some(&labels)), Some(2));
    assert_eq!(of("web", None), by(Spread::Pod, 3).one(&all, pod("u")));
    // The second has no allocation: no other replica's egress IP is used instead.
    let lacking = [all[0], all[2]];
    let second = Client { namespace: "a", name: "web-1", uid: "u", labels: None };
    assert_eq!(ordinals.one(&lacking, second), None);
}

#[test]
fn an_egress_ip_that_no_node_holds_yet_waits_while_there_are_others() {
    let (mut all, pods) = (named(&[1, 2]), by(Spread::Pod, 2));
    all[1].state.is_held = false;
    assert!(chosen(pods, &all).iter().all(|chosen| *chosen == 1));
    all[0].state.is_held = false;
    assert_eq!(chosen(pods, &all), chosen(pods, &named(&[1, 2])));
}

#[test]
fn a_pod_keeps_an_egress_ip_that_is_not_ready_for_a_while() {
    let (mut all, pods) = (named(&[1, 2]), by(Spread::Pod, 2));
    all[1].state.is_ready = false;
    assert_eq!(chosen(pods, &all), chosen(pods, &named(&[1, 2])));
}

#[test]
fn connections_have_any_egress_ip_that_is_ready() {
    let (mut all, connections) = (named(&[1, 2, 3]), by(Spread::Connection, 3));
    all.swap(0, 2);
    assert_eq!(connections.all(&all, pod("u")), [1, 2, 3]);
    assert_eq!(by(Spread::Pod, 3).all(&all, pod("u")).len(), 1);
    all[0].state.is_held = false;
    assert_eq!(connections.all(&all, pod("u")), [1, 2]);
    all[1].state.is_ready = false;
    assert_eq!((connections.all(&all, pod("u")), connections.one(&all, pod("u"))), (vec![1], Some(1)));
    all[2].state.is_ready = false;
    assert_eq!(connections.all(&all, pod("u")), [1, 2]);
}

#[test]
fn a_near_egress_ip_is_preferred_while_it_is_ready() {
    use Preference::{SameNode, SameZone};
    let mut all = named(&[1, 2, 3, 4]);
    for (choice, near) in all.iter_mut().zip([Near::Far, Near::Zone, Near::Node, Near::Zone]) {
        choice.state.near = near;
    }
    let of = |preference: &[Preference], all: &[Choice<u8>]| -> BTreeSet<u8> {
        chosen(Division { preference, ..by(Spread::Pod, 4) }, all).into_iter().collect()
    };
    assert_eq!(of(&[SameNode, SameZone], &all), [3].into());
    assert_eq!(of(&[SameZone], &all), [2, 3, 4].into());
    assert_eq!(of(&[], &all), [1, 2, 3, 4].into());
    all[2].state.is_ready = false;
    assert_eq!(of(&[SameNode, SameZone], &all), [2, 4].into());
    assert_eq!(of(&[SameNode], &all), [1, 2, 3, 4].into());
    let near = Division { preference: &[SameZone], ..by(Spread::Connection, 4) };
    assert_eq!(near.all(&all, pod("u")), [2, 4]);
}

#[test]
fn nodes_are_near_by_their_zone_label() {
    let mut world = World::new(&[]);
    world.node("n3", "g", &["10.0.0.3"]);
    world.node("n4", "g", &["10.0.0.4"]);
    for (node, zone) in [("n1", "a"), ("n2", "a"), ("n3", "b")] {
        let of = world.cluster.nodes.get_mut(node).unwrap();
        Arc::make_mut(of).labels = [("topology.kubernetes.io/zone", zone)].into_iter().collect();
    }
    let near = |other| Near::of(&world.cluster, "n1", other);
    assert_eq!(["n1", "n2", "n3", "n4"].map(|n| near(Some(n))), [Near::Node, Near::Zone, Near::Far, Near::Far]);
    assert_eq!((near(None), Near::of(&world.cluster, "n4", Some("n5"))), (Near::Far, Near::Far));
}

#[test]
fn a_pod_without_a_uid_is_known_by_its_name() {
    let all: Vec<Choice<u16>> = (0..8).map(|n| Choice::numbered(n, n, HELD)).collect();
    let of = |name: &str| by(Spread::Pod, 8).one(&all, Client { namespace: "a", name, uid: "", labels: None });
    let several: BTreeSet<_> = (0..20).map(|n| of(&format!("p{n}"))).collect();
    assert!(several.len() > 4 && of("p1") == of("p1"));
}
