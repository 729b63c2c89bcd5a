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

/// A gateway's allocations: each node names `has` of them, with the ids from 1 in turn.
fn named(has: &[u32]) -> BTreeMap<EgressId, usize> {
    let nodes = has.iter().enumerate().flat_map(|(node, count)| std::iter::repeat_n(node, *count as usize));
    (1..).zip(nodes).map(|(id, node)| (id * 7, node)).collect()
}

/// The owners where each node has a maximum, and some have taken egress IPs over.
fn limited<'a>(
    members: &'a [Name],
    named: &BTreeMap<EgressId, usize>,
    (liveness, most): (&mut Liveness, &[u32]),
    taken: &BTreeMap<EgressId, Vec<&'a str>>,
) -> BTreeMap<EgressId, Option<String>> {
    let takers = |id: EgressId| taken.get(&id).map(Vec::as_slice).unwrap_or_default();
    let inputs = named
        .iter()
        .map(|(id, node)| (*id, OwnershipInputs { takers: takers(*id), ..of(*id, &members[*node], members) }));
    let most = members.iter().cloned().zip(most.iter().copied()).collect();
    let owners = super::owners(&inputs.collect(), liveness, &most);
    owners.into_iter().map(|(id, owner)| (id, owner.map(str::to_owned))).collect()
}

/// How many each node names, how much room it has beside, and whether it is dead.
fn nodes() -> impl Strategy<Value = Vec<(u32, u32, bool)>> {
    prop::collection::vec((0..12u32, 0..5u32, any::<bool>()), 2..7)
}

proptest! {
    /// Every node computes this, so it must not depend on which takeovers a node has already learned of.
    #[test]
    fn no_node_takes_more_than_its_maximum_and_a_reported_takeover_changes_nothing_for_the_others(
        nodes in nodes(), reported in prop::collection::vec(any::<bool>(), 70), weights in prop::collection::vec(1..6u16, 7),
    ) {
        let members = names(nodes.len());
        let has: Vec<u32> = nodes.iter().map(|(has, ..)| *has).collect();
        let most: Vec<u32> = nodes.iter().map(|(has, room, _)| has + room).collect();
        let named = named(&has);
        let dead: Vec<bool> = nodes.iter().map(|(.., dead)| *dead).collect();
        let mut liveness = liveness(&members, &dead);
        liveness.weights = members.iter().cloned().zip(weights).collect();
        let owners = limited(&members, &named, (&mut liveness, &most), &BTreeMap::new());
        let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
        for (id, owner) in &owners {
            let node = named[id];
            match owner {
                Some(owner) => {
                    prop_assert!(liveness.is_alive(owner) && (dead[node] || **owner == *members[node]), "{}", id);
                    *counts.entry(owner).or_default() += 1;
                }
                None => prop_assert!(dead[node], "{}", id),
            }
        }
        for (name, most) in members.iter().zip(&most) {
            prop_assert!(counts.get(&**name).copied().unwrap_or_default() <= *most);
            let is_full = counts.get(&**name).copied().unwrap_or_default() == *most;
            prop_assert!(!liveness.is_alive(name) || liveness.full.contains(name) == is_full);
        }
        if owners.values().any(Option::is_none) {
            prop_assert!(members.iter().all(|name| !liveness.is_alive(name) || liveness.full.contains(name)));
        }
        // Some of the takeovers are reported.
        let taken = owners.iter().zip(&reported).filter(|((id, _), reported)| **reported && dead[named[*id]]);
        let taken = taken.filter_map(|((id, owner), _)| Some((*id, vec![owner.as_deref()?]))).collect();
        prop_assert_eq!(&limited(&members, &named, (&mut liveness, &most), &taken), &owners);
    }

    #[test]
    fn a_death_moves_only_the_dead_nodes_egress_ips_where_nodes_have_a_maximum(
        nodes in nodes(), which in any::<prop::sample::Index>(), reported in any::<bool>(),
    ) {
        let members = names(nodes.len());
        let has: Vec<u32> = nodes.iter().map(|(has, ..)| *has).collect();
        let most: Vec<u32> = nodes.iter().map(|(has, room, _)| has + room).collect();
        let (named, which) = (named(&has), which.index(nodes.len()));
        let mut dead: Vec<bool> = nodes.iter().map(|(.., dead)| *dead).collect();
        dead[which] = false;
        let before = limited(&members, &named, (&mut liveness(&members, &dead), &most), &BTreeMap::new());
        dead[which] = true;
        // Without reports of what was taken over before, egress IPs of two dead nodes compete for the room.
        prop_assume!(reported || dead.iter().filter(|dead| **dead).count() == 1);
        let taken = before.iter().filter_map(|(id, owner)| Some((*id, vec![owner.as_deref()?]))).collect();
        let after = limited(&members, &named, (&mut liveness(&members, &dead), &most), &taken);
        for (id, owner) in &before {
            if owner.as_deref() != Some(&*members[which]) && owner.is_some() {
                prop_assert_eq!(owner, &after[id], "{}", id);
            }
        }
    }
}

#[test]
fn a_dead_nodes_egress_ips_are_spread_by_weight() {
    let members = names(4);
    let mut liveness = liveness(&members, &[true]);
    liveness.weights = members.iter().cloned().zip([1, 1, 2, 5]).collect();
    let mut count: BTreeMap<&str, u32> = BTreeMap::new();
    for id in 1..=8000 {
        *count.entry(owner(of(id, &members[0], &members), &liveness).unwrap()).or_default() += 1;
    }
    for (name, weight) in members.iter().zip([0, 1, 2, 5]) {
        // Four standard deviations of a fair draw.
        let (fair, off) = (1000 * weight, 4 * f64::from(1000 * weight).sqrt() as u32);
        let is = count.get(&**name).copied().unwrap_or_default();
        assert!(is.abs_diff(fair) <= off, "{count:?}");
    }
}

#[test]
fn a_node_that_has_lost_less_takes_nothing_over_if_it_is_full() {
    let members = names(2);
    let needs = [UplinkKey { interface: None, ipv4: false, gateway: None }];
    let lost =
        || Liveness { lost: [(members[0].clone(), needs.iter().cloned().collect())].into(), ..Liveness::default() };
    let inputs: BTreeMap<EgressId, OwnershipInputs> =
        (1..=3).map(|id| (id, OwnershipInputs { needs: &needs, ..of(id, &members[0], &members) })).collect();
    let owners = super::owners(&inputs, &mut lost(), &[(members[1].clone(), 2)].into());
    let of_node = |node: usize| owners.values().filter(|owner| **owner == Some(&*members[node])).count();
    assert_eq!((of_node(0), of_node(1)), (1, 2), "what has no place elsewhere stays");
    assert_eq!(owners[&3], Some(&*members[0]), "the order of the ids decides");
}
