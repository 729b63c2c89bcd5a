//! Properties of the allocations after any sequence of events.

use crate::allocation::{AllocationResult, COOLDOWN_SECONDS, Decision, Grants, Reason, allocate};
use crate::api::{Action, Allocate, AllocationKind, EgressPolicySpec, Sharing};
use crate::fixture::{World, asking, naming, naming_several, reservation};
use crate::model::PolicyKey;
use crate::model::marks::MAX_EGRESS_ID;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

const POOLS: [&[&str]; 5] = [
    &["192.0.2.0-192.0.2.9"],
    &["192.0.2.0-192.0.2.3", "2001:db8::-2001:db8::5"],
    &["192.0.2.5-192.0.2.12", "2001:db8::4-2001:db8::f"],
    &["2001:db8::-2001:db8::2"],
    &[],
];

/// An event.
#[derive(Clone, Debug)]
enum Step {
    Policy { name: usize, gateway: Option<usize>, address: Ask },
    NoPolicy(usize),
    Node(usize, usize),
    NoNode(usize),
    Pool(usize, usize),
    Default(usize, bool),
    Sharing(usize, bool),
    Wait(i64),
}

#[derive(Clone, Debug)]
enum Ask {
    V4(u8),
    Both(u8, u8),
    Allocate(Allocate),
    Several(u8, u8),
    Count(u16),
    Direct,
}

impl Ask {
    fn for_one(self) -> Self {
        match self {
            Ask::Several(first, _) => Ask::V4(first),
            Ask::Count(_) => Ask::Count(1),
            other => other,
        }
    }

    fn spec(&self) -> EgressPolicySpec {
        match self {
            Ask::V4(a) => naming(&[&format!("192.0.2.{a}")]),
            Ask::Both(a, b) => naming(&[&format!("192.0.2.{a}"), &format!("2001:db8::{b}")]),
            Ask::Allocate(allocate) => asking(*allocate),
            Ask::Several(first, count) => naming_several((*first..first + count).map(|a| format!("192.0.2.{a}"))),
            Ask::Count(count) => EgressPolicySpec { address_count: Some(*count), ..asking(Allocate::Dedicated) },
            Ask::Direct => EgressPolicySpec { action: Action::Direct, allocate: None, ..asking(Allocate::Dedicated) },
        }
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    prop_oneof![
        (0..12u8).prop_map(Ask::V4),
        (0..12u8, 0..8u8).prop_map(|(a, b)| Ask::Both(a, b)),
        Just(Ask::Allocate(Allocate::Dedicated)),
        Just(Ask::Allocate(Allocate::Shared)),
        Just(Ask::Allocate(Allocate::Node)),
        (0..10u8, 1..4u8).prop_map(|(first, count)| Ask::Several(first, count)),
        (1..5u16).prop_map(Ask::Count),
        Just(Ask::Direct),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..12usize, proptest::option::of(0..2usize), ask())
            .prop_map(|(name, gateway, address)| Step::Policy { name, gateway, address }),
        3 => (0..12usize).prop_map(Step::NoPolicy),
        2 => (0..4usize, 0..2usize).prop_map(|(node, gateway)| Step::Node(node, gateway)),
        1 => (0..4usize).prop_map(Step::NoNode),
        1 => (0..2usize, 0..POOLS.len()).prop_map(|(gateway, pool)| Step::Pool(gateway, pool)),
        1 => (0..2usize, any::<bool>()).prop_map(|(gateway, default)| Step::Default(gateway, default)),
        1 => (0..2usize, any::<bool>()).prop_map(|(gateway, sharing)| Step::Sharing(gateway, sharing)),
        2 => (1..800i64).prop_map(Step::Wait),
    ]
}

const GATEWAYS: [&str; 2] = ["g", "h"];

/// A cluster, and the present specs of its gateways.
struct Story {
    world: World,
    pools: [usize; 2],
    defaults: [bool; 2],
    sharing: [bool; 2],
}

impl Story {
    fn new() -> Self {
        let mut story = Story { world: World::new(&[]), pools: [1, 2], defaults: [true, false], sharing: [true; 2] };
        story.gateways();
        story
    }

    fn gateways(&mut self) {
        for (i, name) in GATEWAYS.into_iter().enumerate() {
            let default = self.defaults[i];
            self.world.gateway(name, POOLS[self.pools[i]], |spec| {
                spec.default = default;
                spec.sharing = if self.sharing[i] { Sharing::Cluster } else { Sharing::Namespace };
                spec.reservations = match i {
                    0 => vec![],
                    _ => vec![reservation(&["192.0.2.6-192.0.2.8", "2001:db8::4"], &["other"])],
                };
            });
        }
    }

    fn apply(&mut self, step: &Step) {
        let key = |name: &usize| match name {
            0..7 => format!("ns/p{name}"),
            7..10 => format!("other/p{name}"),
            _ => format!("c{name}"),
        };
        match step {
            Step::Policy { name, gateway, address } => {
                let spec = address.spec();
                let gateway = gateway.map(|g| GATEWAYS[g].to_owned()).filter(|_| !matches!(address, Ask::Direct));
                self.world.policy(&key(name), EgressPolicySpec { gateway, ..spec });
            }
            Step::NoPolicy(name) => {
                self.world.cluster.policies.remove(&PolicyKey::from(&*key(name)));
            }
            // 192.0.2.2 is in a pool, too.
            Step::Node(node, gateway) => {
                let address = format!("192.0.2.{}", node * 100 + 2);
                let addresses: &[&str] = if *node < 3 { &[&address, "fd00::1"] } else { &[] };
                self.world.node(&format!("n{node}"), GATEWAYS[*gateway], addresses);
            }
            Step::NoNode(node) => {
                self.world.cluster.nodes.remove(&*format!("n{node}"));
            }
            Step::Pool(gateway, pool) => {
                self.pools[*gateway] = *pool;
                self.gateways();
            }
            Step::Default(gateway, default) => {
                self.defaults[*gateway] = *default;
                self.gateways();
            }
            Step::Sharing(gateway, sharing) => {
                self.sharing[*gateway] = *sharing;
                self.gateways();
            }
            Step::Wait(seconds) => self.world.now += seconds,
        }
    }
}

fn addresses(pair: &crate::api::AddressPair) -> Vec<IpAddr> {
    [pair.ipv4.map(IpAddr::from), pair.ipv6.map(IpAddr::from)].into_iter().flatten().collect()
}

/// Ids and addresses are unique. Each policy has an allocation or a rejection, and the allocations agree.
fn check_sound(world: &World, outcome: &AllocationResult) -> Result<(), TestCaseError> {
    let (mut ids, mut held) = (BTreeSet::new(), BTreeSet::new());
    let mut of_nodes = BTreeSet::new();
    let mut users: BTreeMap<PolicyKey, BTreeSet<u16>> = BTreeMap::new();
    let mut ordinals = BTreeSet::new();
    for (name, status) in &outcome.gateways {
        let mut of_this_gateways_nodes = BTreeSet::new();
        for allocation in &status.allocations {
            prop_assert!(
                (1..=MAX_EGRESS_ID).contains(&allocation.id) && ids.insert(allocation.id),
                "id {} twice",
                allocation.id
            );
            prop_assert!(!allocation.address.is_empty() && !allocation.policies.is_empty());
            for address in addresses(&allocation.address) {
                if allocation.kind == AllocationKind::Node {
                    prop_assert!(of_this_gateways_nodes.insert((allocation.node.clone(), address)));
                    of_nodes.insert(address);
                } else {
                    prop_assert!(held.insert(address), "{address} twice");
                    let pool = &world.cluster.gateways[name].pool;
                    prop_assert!(pool.iter().any(|range| range.contains(address)), "{address} is not in the pool");
                }
            }
            match &allocation.node {
                Some(node) => prop_assert!(status.nodes.iter().any(|name| **name == **node)),
                None => prop_assert!(status.nodes.is_empty()),
            }
            for policy in &allocation.policies {
                users.entry(policy.clone()).or_default().insert(allocation.id);
                let index = (policy.clone(), allocation.ordinal);
                prop_assert!(allocation.kind != AllocationKind::Dedicated || ordinals.insert(index), "{policy}");
            }
        }
    }
    prop_assert!(held.is_disjoint(&of_nodes));
    check_tenants(world, outcome)?;
    prop_assert_eq!(outcome.decisions.len(), world.cluster.policies.len());
    for (key, decision) in &outcome.decisions {
        match decision {
            Decision::Granted(grants) => {
                let ids: BTreeSet<u16> = grants.iter().map(|grant| grant.id).collect();
                prop_assert_eq!(ids.len(), grants.count());
                prop_assert_eq!(users.get(key), Some(&ids));
                prop_assert_eq!(grants.missing.is_none(), grants.count() == grants.asked);
            }
            Decision::Rejected(rejection) => {
                prop_assert!(!users.contains_key(key));
                prop_assert!(rejection.message.contains(';'), "no remedy in {:?}", rejection.message);
            }
            Decision::Direct => prop_assert!(!users.contains_key(key) && world.cluster.policies[key].is_direct()),
        }
    }
    Ok(())
}

/// A named address belongs to one namespace, unless the gateway allows sharing. A reserved address belongs to its
/// namespaces.
fn check_tenants(world: &World, outcome: &AllocationResult) -> Result<(), TestCaseError> {
    for (name, status) in &outcome.gateways {
        let gateway = &world.cluster.gateways[name];
        for allocation in &status.allocations {
            let namespaces: BTreeSet<_> = allocation.policies.iter().map(|key| key.namespace.clone()).collect();
            if allocation.kind == AllocationKind::Explicit && gateway.sharing == Sharing::Namespace {
                prop_assert_eq!(namespaces.len(), 1);
            }
            let reserved =
                addresses(&allocation.address).iter().any(|a| gateway.reservations.iter().any(|r| r.contains(*a)));
            let may =
                allocation.kind == AllocationKind::Explicit && namespaces.iter().flatten().all(|ns| &**ns == "other");
            prop_assert!(allocation.kind == AllocationKind::Node || !reserved || may, "{allocation:?} is reserved");
        }
    }
    Ok(())
}

/// The policies that last used an id or address, and when it was given back.
#[derive(Default)]
struct History {
    ids: HashMap<u16, (i64, BTreeSet<PolicyKey>)>,
    addresses: HashMap<IpAddr, (i64, BTreeSet<PolicyKey>)>,
}

impl History {
    /// No policy gets an id that another gave back less than ten minutes ago, nor such an address unless it names it.
    fn check(&mut self, world: &World, outcome: &AllocationResult) -> Result<(), TestCaseError> {
        let rested = |last: Option<&(i64, BTreeSet<PolicyKey>)>, users: &BTreeSet<PolicyKey>| match last {
            Some((at, before)) => world.now >= at + COOLDOWN_SECONDS || !before.is_disjoint(users),
            None => true,
        };
        for allocation in outcome.gateways.values().flat_map(|status| &status.allocations) {
            let users: BTreeSet<PolicyKey> = allocation.policies.iter().cloned().collect();
            prop_assert!(rested(self.ids.get(&allocation.id), &users), "id {} is reused", allocation.id);
            self.ids.insert(allocation.id, (world.now, users.clone()));
            if allocation.kind != AllocationKind::Node {
                for address in addresses(&allocation.address) {
                    let named = allocation.kind == AllocationKind::Explicit;
                    prop_assert!(named || rested(self.addresses.get(&address), &users), "{address} is reused");
                    self.addresses.insert(address, (world.now, users.clone()));
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn the_allocations_are_valid_after_any_events(steps in proptest::collection::vec((step(), any::<bool>()), 1..60)) {
        let mut story = Story::new();
        let mut history = History::default();
        for (step, look) in &steps {
            story.apply(step);
            // Several changes may be seen as one.
            if !look {
                continue;
            }
            let twice = allocate(&story.world.cluster, story.world.now);
            let outcome = story.world.allocate();
            prop_assert_eq!(&twice, &outcome);
            check_sound(&story.world, &outcome)?;
            history.check(&story.world, &outcome)?;
            let again = story.world.allocate();
            for (name, status) in &again.gateways {
                let same = (&outcome.gateways[name].allocations, &outcome.gateways[name].released);
                prop_assert_eq!((&status.allocations, &status.released), same, "the same again changes nothing");
            }
            // A policy that is rejected for one of two default gateways has no gateway the next time, and is then
            // rejected for that reason.
            if story.defaults != [true, true] {
                prop_assert_eq!(&again, &outcome);
            }
        }
    }

    #[test]
    fn one_policys_change_touches_no_other(
        steps in proptest::collection::vec(step(), 1..40), change in (0..12usize, ask()), removed in any::<bool>(),
    ) {
        let mut story = Story::new();
        for step in &steps {
            story.apply(step);
        }
        let before = story.world.allocate();
        let (name, address) = change;
        story.apply(&match removed {
            true => Step::NoPolicy(name),
            false => Step::Policy { name, gateway: None, address },
        });
        let after = story.world.allocate();
        for (key, decision) in &before.decisions {
            if let (Decision::Granted(was), Some(Decision::Granted(is))) = (decision, after.decisions.get(key))
                && !key.name.ends_with(&name.to_string())
            {
                // One that it lacked may have become free.
                for was in was.iter() {
                    let is = is.iter().find(|is| is.id == was.id);
                    let is = is.map(|is| (is.ordinal, &is.address, &is.node));
                    prop_assert_eq!(Some((was.ordinal, &was.address, &was.node)), is, "{}", key);
                }
            } else if let Decision::Granted(_) = decision {
                prop_assert!(key.name.ends_with(&name.to_string()), "{key} has lost its allocation");
            }
        }
    }

    /// The egress IPs of one policy go to different nodes first, so policies with several can leave a larger difference.
    #[test]
    fn from_nothing_the_nodes_are_balanced_within_one(
        asks in proptest::collection::vec(ask().prop_map(Ask::for_one), 1..60), nodes in 1..6usize,
    ) {
        let mut world = World::new(&["192.0.2.0/24", "2001:db8::/64"]);
        world.cluster.nodes.clear();
        for node in 0..nodes {
            world.node(&format!("n{node}"), "g", &[&format!("10.0.0.{node}")]);
        }
        for (i, ask) in asks.iter().enumerate() {
            world.policy(&format!("ns/p{i}"), ask.spec());
        }
        let outcome = world.allocate();
        let mut count: BTreeMap<&str, usize> = (0..nodes).map(|_| ("", 0)).collect();
        count.clear();
        let status = &outcome.gateways["g"];
        for node in &status.nodes {
            count.insert(node, status.allocations.iter().filter(|p| p.node.as_deref() == Some(&**node)).count());
        }
        let (least, most) = (count.values().min().unwrap(), count.values().max().unwrap());
        prop_assert!(most - least <= 1, "{count:?}");
    }

    #[test]
    fn a_policy_that_returns_in_time_gets_the_same_allocation(
        steps in proptest::collection::vec(step(), 1..40), name in 0..12usize, after in 0..COOLDOWN_SECONDS,
    ) {
        let mut story = Story::new();
        for step in &steps {
            story.apply(step);
        }
        let before = story.world.allocate();
        let key = before.decisions.keys().nth(name % before.decisions.len().max(1)).cloned();
        if let Some(key) = key && let Decision::Granted(was) = &before.decisions[&key] {
            let policy = story.world.cluster.policies.remove(&key).unwrap();
            let without = story.world.allocate();
            // Another policy may have waited for an address that it names.
            let allocations = without.gateways.values().flat_map(|status| &status.allocations);
            let mut named = allocations.filter(|allocation| allocation.kind == AllocationKind::Explicit).flat_map(|allocation| addresses(&allocation.address));
            let own: Vec<IpAddr> = was.iter().flat_map(|was| addresses(&was.address)).collect();
            prop_assume!(!named.any(|address| own.contains(&address)));
            story.world.now += after;
            story.world.cluster.policies.insert(key.clone(), policy);
            match &story.world.allocate().decisions[&key] {
                Decision::Granted(is) => {
                    let all = |grants: &Grants| -> BTreeSet<(u16, Vec<IpAddr>)> {
                        grants.iter().map(|grant| (grant.id, addresses(&grant.address))).collect()
                    };
                    prop_assert!(all(was).is_subset(&all(is)) || was.first.kind == AllocationKind::Node);
                }
                // With two default gateways, it is unknown from which one the policy's allocation came.
                Decision::Rejected(rejection) => prop_assert_eq!(rejection.reason, Reason::SeveralDefaultGateways),
                Decision::Direct => return Err(TestCaseError::fail("it asked for an egress IP")),
            }
        }
    }
}

#[test]
fn ten_thousand_policies_each_get_a_dedicated_allocation() {
    let mut world = World::new(&["10.1.0.0/16", "2001:db8::/64"]);
    for i in 0..10_000 {
        world.policy(&format!("ns{}/p{i}", i % 100), asking(Allocate::Dedicated));
    }
    let outcome = world.allocate();
    assert_eq!(world.allocate(), outcome);
    assert_eq!(outcome.gateways["g"].allocations.len(), 10_000);
}
