use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn names(n: usize) -> Vec<Name> {
    (0..n).map(|i| format!("gateway-{i}.example.org").into()).collect()
}

fn liveness(members: &[Name], dead: &[bool]) -> Liveness {
    let dead = members.iter().zip(dead).filter(|(_, dead)| **dead).map(|(name, _)| name.clone());
    Liveness { dead: dead.collect(), ..Liveness::default() }
}

fn of<'a>(id: EgressId, node: &'a str, members: &'a [Name]) -> OwnershipInputs<'a> {
    OwnershipInputs { id, node: Some(node), leaving: None, arrived: true, takers: &[], members, needs: &[] }
}

/// Each allocation's owner, if the allocations assign allocation n to the node n modulo the number of nodes.
fn owners<'a>(members: &'a [Name], ids: u16, liveness: &Liveness) -> BTreeMap<EgressId, Option<&'a str>> {
    let node = |id: EgressId| &*members[usize::from(id) % members.len()];
    (1..=ids).map(|id| (id, owner(of(id, node(id), members), liveness))).collect()
}

proptest! {
    #[test]
    fn only_a_live_node_is_the_owner(dead in prop::collection::vec(any::<bool>(), 1..8), id in 1u16..16384) {
        let members = names(dead.len());
        let liveness = liveness(&members, &dead);
        for node in &members {
            let owner = owner(of(id, node, &members), &liveness);
            prop_assert_eq!(owner.is_none(), dead.iter().all(|d| *d));
            prop_assert!(owner.is_none_or(|o| liveness.is_alive(o)));
            prop_assert!(!liveness.is_alive(node) || owner == Some(&**node));
        }
    }

    #[test]
    fn the_order_in_which_nodes_are_listed_does_not_matter(
        (members, shuffled) in (2..8usize).prop_map(names).prop_flat_map(|m| (Just(m.clone()), Just(m).prop_shuffle())),
        id in 1u16..16384,
    ) {
        let liveness = liveness(&members, &[true]);
        prop_assert_eq!(owner(of(id, &members[0], &members), &liveness), owner(of(id, &members[0], &shuffled), &liveness));
    }

    #[test]
    fn a_death_moves_only_the_dead_nodes_allocations_and_a_return_restores_those_not_taken_over(
        dead in prop::collection::vec(any::<bool>(), 2..8), which in any::<prop::sample::Index>(),
    ) {
        let members = names(dead.len());
        let which = which.index(dead.len());
        let with = |d: bool| liveness(&members, &[&dead[..which], &[d], &dead[which + 1..]].concat());
        let (before, after) = (owners(&members, 200, &with(false)), owners(&members, 200, &with(true)));
        for (id, owner) in &before {
            if *owner != Some(&*members[which]) {
                prop_assert_eq!(owner, &after[id], "allocation {}", id);
            } else {
                prop_assert_ne!(owner, &after[id], "allocation {}", id);
            }
        }
    }

    #[test]
    fn a_taken_over_allocation_stays_until_its_new_owner_dies(dead in prop::collection::vec(any::<bool>(), 3..8), id in 1u16..16384) {
        let members = names(dead.len());
        let liveness = liveness(&members, &dead);
        let takers = [&*members[1], &members[2]];
        let owner = owner(OwnershipInputs { takers: &takers, ..of(id, &members[0], &members) }, &liveness);
        match (dead[1], dead[2]) {
            (true, true) => prop_assert!(owner.is_none_or(|o| !takers.contains(&o))),
            (false, true) => prop_assert_eq!(owner, Some(takers[0])),
            (true, false) => prop_assert_eq!(owner, Some(takers[1])),
            (false, false) => prop_assert!(owner.is_some_and(|o| takers.contains(&o))),
        }
    }
}

#[test]
fn a_dead_nodes_allocations_are_spread_evenly_over_those_that_are_left() {
    for nodes in [3, 5, 11] {
        let members = names(nodes);
        let liveness = liveness(&members, &[true]);
        let mut count: BTreeMap<&str, u32> = BTreeMap::new();
        for id in 1..=1000 {
            *count.entry(owner(of(id, &members[0], &members), &liveness).unwrap()).or_default() += 1;
        }
        let fair = 1000 / (nodes as u32 - 1);
        // Four standard deviations of a fair draw.
        let off = 4 * (f64::from(fair).sqrt() as u32);
        assert_eq!(count.len(), nodes - 1);
        assert!(count.values().all(|n| n.abs_diff(fair) <= off), "{count:?}");
    }
}

#[test]
fn an_allocation_that_is_moved_on_purpose_stays_until_the_new_node_has_it() {
    let members = names(3);
    let moving = |arrived, dead: &[bool]| {
        let allocation = OwnershipInputs { leaving: Some(&members[0]), arrived, ..of(7, &members[1], &members) };
        owner(allocation, &liveness(&members, dead)).unwrap()
    };
    assert_eq!(moving(false, &[]), &*members[0]);
    assert_eq!(moving(true, &[]), &*members[1]);
    assert_eq!(moving(false, &[true]), &*members[1], "who leaves has died: the new node has it at once");
    assert_eq!(moving(false, &[false, true]), &*members[0], "the new node is dead: the old one goes on");
    assert_eq!(moving(true, &[true, true]), &*members[2]);
}

#[test]
fn a_drained_node_is_the_last_resort() {
    let members = names(3);
    let mut liveness = liveness(&members, &[true]);
    liveness.drained.insert(members[1].clone());
    assert!((1..100).all(|id| owner(of(id, &members[0], &members), &liveness) == Some(&members[2])));
    liveness.dead.insert(members[2].clone());
    assert_eq!(owner(of(1, &members[0], &members), &liveness), Some(&*members[1]));
}

#[test]
fn an_allocation_without_an_assigned_node_has_no_owner() {
    let members = names(3);
    assert_eq!(owner(OwnershipInputs { node: None, ..of(1, "", &members) }, &Liveness::default()), None);
}

#[test]
fn in_a_planned_move_the_old_node_is_the_owner_until_the_new_one_holds_it() {
    let members = names(3);
    let [new, old] = [&*members[0], &members[1]];
    let moving = |arrived| OwnershipInputs { leaving: Some(old), arrived, ..of(7, new, &members) };
    let with = |dead: [bool; 2]| liveness(&members, &dead);
    assert_eq!(owner(moving(false), &with([false, false])), Some(old));
    assert_eq!(owner(moving(true), &with([false, false])), Some(new));
    assert_eq!(owner(moving(true), &with([true, false])), Some(old), "it was drained, and is not known to live again");
    assert_eq!(owner(moving(false), &with([false, true])), Some(new));
    assert_eq!(owner(moving(true), &with([true, true])), Some(&*members[2]));
}

#[test]
fn a_node_that_has_lost_fewer_families_becomes_the_owner() {
    let members = names(3);
    let needs: Vec<UplinkKey> = [true, false].map(|ipv4| UplinkKey { interface: None, ipv4, gateway: None }).into();
    let lost = |of: &[(usize, &[UplinkKey])]| {
        let lost = of.iter().map(|(n, keys)| (members[*n].clone(), keys.iter().cloned().collect()));
        Liveness { lost: lost.collect(), ..Liveness::default() }
    };
    let allocation =
        |takers: &'static [&'static str]| OwnershipInputs { takers, needs: &needs, ..of(7, &members[0], &members) };
    let (v4, v6) = (&needs[..1], &needs[1..]);
    let first = owner(allocation(&[]), &lost(&[(0, v6)]));
    assert!(first == Some(&members[1]) || first == Some(&members[2]));
    let of_one_family = OwnershipInputs { needs: v4, ..of(7, &members[0], &members) };
    assert_eq!(owner(of_one_family, &lost(&[(0, v6)])), Some(&*members[0]), "it needs no IPv6");
    assert_eq!(owner(allocation(&[]), &lost(&[(0, v6), (1, v6), (2, v6)])), Some(&*members[0]));
    assert_eq!(owner(allocation(&[]), &lost(&[(0, v6), (1, v4), (2, v4)])), Some(&*members[0]), "none has more");
    assert_eq!(owner(allocation(&[]), &lost(&[(0, v6), (1, &needs), (2, v4)])), Some(&*members[0]));
    assert_eq!(owner(allocation(&[]), &lost(&[(0, &needs), (1, v6), (2, &needs)])), Some(&*members[1]));
    assert_eq!(
        owner(allocation(&["gateway-1.example.org"]), &lost(&[])),
        Some(&*members[1]),
        "who took it over keeps it"
    );
    assert_eq!(owner(allocation(&["gateway-1.example.org"]), &lost(&[(1, v6), (2, v6)])), Some(&*members[0]));
    let mut drained = lost(&[(0, v6), (1, v6)]);
    drained.drained.insert(members[2].clone());
    assert_eq!(owner(allocation(&[]), &drained), Some(&*members[0]), "who is drained gets nothing new");
    let moving = OwnershipInputs { leaving: Some(&members[1]), arrived: true, ..allocation(&[]) };
    assert_eq!(owner(moving, &lost(&[(0, v6)])), Some(&*members[0]), "what is moved on purpose arrives");
}
