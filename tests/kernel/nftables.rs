//! The datapath's tables in a real kernel, checked with `nft`. Needs root.

use crate::namespace::{in_namespace, ip, run};
use egret::api::{AddressPair, Fallback, Placement, Protocol};
use egret::datapath::ruleset::{self, INET, PeerIndexes, Ruleset, SharedSets, set};
use egret::model::PolicyKey;
use egret::model::bandwidth::{Bandwidth, BitRate};
use egret::model::destination::{Destination, Network, Ports};
use egret::model::marks::Marks;
use egret::model::networks::Networks;
use egret::model::tunnel_mac;
use egret::node_plan::allocations::{AllocationState, Assignment, NodeAllocation, Peer, Placing, Role};
use egret::node_plan::policy_chain::{PolicyAction, PolicyChain, PolicyStep};
use egret::node_plan::{NodePlan, PodPlan, View, chain_name};
use egret_nft::Nftables;
use ipnetwork::IpNetwork;
use std::net::IpAddr;
use std::sync::Arc;

fn limited(rate: &str) -> Bandwidth {
    let rate = BitRate::parse(rate).ok();
    Bandwidth { egress: rate, ingress: rate }
}

fn allocation(state: AllocationState, last: u8) -> NodeAllocation {
    NodeAllocation {
        gateway: "gw".into(),
        address: AddressPair {
            ipv4: Some([192, 0, 2, last].into()),
            ipv6: Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)].into()),
        },
        service: None,
        state,
        role: Role::Translator,
        placement: Placement::Managed,
        answers_ping: false,
        fast_path: true,
        handed_by: None,
        ordinal: 0,
        owner_holds: true,
        is_held: true,
        near: egret::model::spread::Near::Far,
        placing: Placing::Never,
        assignment: Assignment::Here,
        since: 0,
        routed: false,
        unassigned: false,
        handed_to: None,
        interface: None,
        probed: Default::default(),
        dscp: last.is_multiple_of(2).then_some(46),
        bandwidth: if last.is_multiple_of(2) { Bandwidth::default() } else { limited("10Mbit") },
        uplink: 0,
    }
}

/// A node with `pods` pods of two policy chains, in a cluster of `nodes` nodes.
fn view_and_plan(nodes: u16, pods: u32) -> (View, NodePlan, PeerIndexes) {
    let mut view = View::default();
    view.allocations.is_gateway = true;
    let mut peers = PeerIndexes::new();
    for n in 1..=nodes {
        let mac = tunnel_mac::of_node(&format!("node-{n}"));
        let [a, b] = n.to_be_bytes();
        view.allocations
            .peers
            .insert(mac, Peer { node: format!("node-{n}").into(), address: [10, 1, a, b].into(), is_gateway: n == 1 });
        view.networks.hosts.insert([10, 1, a, b].into());
        peers.insert(mac, n);
    }
    let networks = Networks::new(&Default::default(), &["10.244.0.0/16".parse().unwrap()], []);
    view.networks = Networks { hosts: view.networks.hosts.clone(), ..networks }.into();
    view.allocations.allocations.insert(17, allocation(AllocationState::Remote(tunnel_mac::of_node("node-1")), 50));
    view.allocations.allocations.insert(18, allocation(AllocationState::Local, 51));
    let mut plan = NodePlan::default();
    for n in 0..pods {
        let covers = Destination {
            networks: [Network {
                cidr: "203.0.113.0/24".parse().unwrap(),
                except: ["203.0.113.7/32".parse().unwrap()].into(),
            }]
            .into(),
            ports: [
                Ports { protocol: Protocol::Tcp, first: 80, last: 443 },
                Ports { protocol: Protocol::Udp, first: 53, last: 53 },
            ]
            .into(),
        };
        let step = |name: &str, allocation, fallback, covers: Vec<Destination>| PolicyStep {
            policy: PolicyKey::from(name),
            action: PolicyAction::EgressIp { allocation: Some(allocation), fallback },
            others: Box::default(),
            by_connection: Box::default(),
            existing_connections: Default::default(),
            covers: Arc::new(covers.into()),
        };
        let policy_chain = if n % 2 == 0 {
            PolicyChain::Steps(vec![
                step("a/b", 17, Fallback::NodeAddress, vec![covers]),
                step("c", 18, Fallback::Block, vec![]),
            ])
        } else {
            PolicyChain::Steps(vec![step("a/b", 17, Fallback::Block, vec![covers])])
        };
        let pod = PodPlan {
            interface: format!("veth{n}"),
            interface_index: 1000 + n,
            addresses: vec![[10, 244, 1, n as u8].into(), [0xfd00, 0, 0, 0, 0, 0, 0, n as u16].into()],
            pod_mark: n as u16 + 1,
            policy_chain: policy_chain.name(),
        };
        plan.add(&view, chain_name(pod.pod_mark, pod.interface_index), pod.into(), policy_chain.into());
    }
    (view, plan, peers)
}

/// The plan of [`view_and_plan`], and the sets of its cluster.
fn plan_and_sets(nodes: u16, pods: u32) -> (NodePlan, SharedSets) {
    let (view, plan, peers) = view_and_plan(nodes, pods);
    (plan, ruleset::shared_sets(&view, &peers, Marks::default(), &SharedSets::default()))
}

/// The tables of a plan, computed without earlier ones.
fn made_of(plan: &NodePlan, shared: &SharedSets) -> Ruleset {
    Ruleset::new(plan.clone(), shared, Marks::default(), None)
}

/// A plan with one pod and three policies, each with `networks` networks and ports.
fn listing(networks: u32) -> (NodePlan, SharedSets) {
    let (view, mut plan, peers) = view_and_plan(3, 1);
    let step = |n: u32| {
        let v4 = |i: u32| Network {
            cidr: IpNetwork::new(IpAddr::V4((0x1400_0000 + (i << 8)).into()), 25).unwrap(),
            except: Box::default(),
        };
        let v6 = |i: u32| Network {
            cidr: IpNetwork::new(IpAddr::V6(((0x2001_0db8 << 96) + (u128::from(i) << 64)).into()), 64).unwrap(),
            // One network each, because the kernel splits the rest into 64.
            except: if i == 0 {
                [IpNetwork::from(IpAddr::V6((0x2001_0db8 << 96).into()))].into()
            } else {
                Box::default()
            },
        };
        let ports = |first| Ports { protocol: Protocol::Sctp, first, last: first + 1 };
        let all = Ports { protocol: Protocol::Tcp, first: 0, last: u16::MAX };
        let covers = vec![
            Destination {
                networks: (0..networks / 2).flat_map(|i| [v4(i), v6(i)]).collect(),
                ports: (1..=20).map(|p| ports(p * 4)).chain([all]).collect(),
            },
            Destination { networks: [v4(networks + n)].into(), ports: Box::default() },
        ];
        PolicyStep {
            policy: PolicyKey::from("a/b"),
            action: PolicyAction::EgressIp { allocation: Some(17), fallback: Fallback::Block },
            others: Box::default(),
            by_connection: Box::default(),
            existing_connections: Default::default(),
            covers: Arc::new(covers.into()),
        }
    };
    let policy_chain = PolicyChain::Steps((0..3).map(step).collect());
    let (chain, mut pod) = plan.pods.pop_first().unwrap();
    Arc::make_mut(&mut pod).policy_chain = policy_chain.name();
    plan.policy_chains.clear();
    plan.add(&view, chain, pod, policy_chain.into());
    (plan, ruleset::shared_sets(&view, &peers, Marks::default(), &SharedSets::default()))
}

#[test]
fn a_chain_does_not_grow_with_what_its_policies_list() {
    in_namespace(|| async {
        veths(1);
        let mut lengths = Vec::new();
        for networks in [2, 1_000, 100, 2] {
            let (plan, shared) = listing(networks);
            let name = plan.policy_chains.keys().next().unwrap().clone();
            let made = Ruleset::new(plan, &shared, Marks::default(), None);
            let mut nft = Nftables::open().unwrap();
            assert!(nft.apply(made.tables()).unwrap() > networks as usize);
            nft.invalidate();
            assert_eq!(nft.apply(made.tables()).unwrap(), 0, "read back");
            lengths.push(run("nft", &format!("list chain inet egret {name}")).lines().count());
            let sets = run("nft", "-t list sets inet");
            assert_eq!(sets.matches("constant").count(), 3 * 5, "those of earlier lists are gone: {sets}");
        }
        assert_eq!(lengths, [lengths[0]; 4]);
    });
}

#[test]
fn a_pods_start_writes_no_list_of_other_policies() {
    in_namespace(|| async {
        veths(2);
        let starting = |networks| {
            let (before, shared) = listing(networks);
            let mut nft = Nftables::open().unwrap();
            let made = Ruleset::new(before.clone(), &shared, Marks::default(), None);
            nft.apply(made.tables()).unwrap();
            let mut with = before;
            let (_, others, _) = view_and_plan(3, 2);
            let (chain, pod) = others.pods.last_key_value().unwrap();
            with.pods.insert(chain.clone(), pod.clone());
            with.policy_chains.insert(pod.policy_chain.clone(), others.policy_chains[&pod.policy_chain].clone());
            let begin = std::time::Instant::now();
            let next = Ruleset::new(with, &shared, Marks::default(), Some(&made));
            let changes = nft.apply(next.tables()).unwrap();
            println!("{networks} networks: {changes} changes in {:?}", begin.elapsed());
            changes
        };
        assert_eq!(starting(2), starting(1_600));
    });
}

#[test]
fn the_kernel_refuses_to_remove_an_element_that_a_policy_covers() {
    in_namespace(|| async {
        veths(1);
        let (plan, shared) = listing(4);
        let made = made_of(&plan, &shared);
        let mut nft = Nftables::open().unwrap();
        nft.apply(made.tables()).unwrap();
        let whole = run("nft", "list table inet egret");
        let sets = run("nft", "-t list sets inet");
        let kinds = sets.lines().filter_map(|line| line.trim().strip_suffix(" {")?.split_once(' '));
        let constant: Vec<_> = kinds.filter(|(_, name)| name.contains('-')).collect();
        assert_eq!(constant.len(), 3 * 5, "{sets}");
        for (kind, name) in constant {
            let out = std::process::Command::new("nft").args(["flush", kind, "inet", "egret", name]).output().unwrap();
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(!out.status.success() && said.contains("busy"), "{name}: {said}");
        }
        assert_eq!(run("nft", "list table inet egret"), whole);
        // Without the rules, which blocks traffic, the element can be removed. Then everything is created again.
        let chain = plan.policy_chains.keys().next().unwrap();
        let set = run("nft", "-t list sets inet");
        let set =
            set.lines().find_map(|line| line.trim().strip_prefix("set to4-")?.strip_suffix(" {")).unwrap().to_owned();
        run("nft", &format!("flush chain inet egret {chain}"));
        run("nft", &format!("flush set inet egret to4-{set}"));
        nft.invalidate();
        assert!(nft.apply(made.tables()).unwrap() > 0);
        assert_eq!(run("nft", "list table inet egret"), whole);
    });
}

fn veths(n: u32) {
    for i in 0..n {
        ip(&format!("link add veth{i} type veth peer name p{i}"));
    }
    ip("link add egret type vxlan id 7871 dstport 7871 local 127.0.0.1 nolearning gbp");
}

#[test]
fn an_applied_table_is_read_back_unchanged() {
    in_namespace(|| async {
        veths(4);
        let (plan, shared) = plan_and_sets(1200, 4);
        let made = made_of(&plan, &shared);
        let tables = made.tables();
        let mut nft = Nftables::open().unwrap();
        assert!(nft.apply(tables).unwrap() > 1200);
        assert_eq!(nft.apply(tables).unwrap(), 0, "known without reading");
        nft.invalidate();
        assert_eq!(nft.apply(tables).unwrap(), 0, "read back");
        println!("{}", run("nft", "list ruleset"));
        assert_eq!(nft.elements(INET, set::PEER).unwrap().iter().count(), 1200);
    });
}

#[test]
fn removed_objects_are_restored() {
    in_namespace(|| async {
        veths(2);
        let (plan, shared) = plan_and_sets(3, 2);
        let made = made_of(&plan, &shared);
        let tables = made.tables();
        let mut nft = Nftables::open().unwrap();
        nft.apply(tables).unwrap();
        let whole = run("nft", "list ruleset");
        for damage in [
            "delete element inet egret egress_id_out { 0x45470011 }",
            "delete element netdev egret hop { 0x45470011 }",
            "delete element inet egret pods { 0x40200000 }",
            "delete element inet egret direct4 { 10.244.0.0/16 }",
            "flush chain inet egret prerouting",
            "flush chain inet egret pod-1-1000",
            "delete table netdev egret",
            "flush ruleset",
            "add rule inet egret srcnat accept",
            "add chain inet egret somebodys",
            "add element inet egret hosts4 { 9.9.9.9 }",
        ] {
            run("nft", damage);
            assert_ne!(run("nft", "list ruleset"), whole, "{damage} changes something");
            nft.invalidate();
            assert!(nft.apply(tables).unwrap() > 0, "{damage} is noticed");
            assert_eq!(run("nft", "list ruleset"), whole, "{damage} is mended");
        }
    });
}

/// Networks of added and removed nodes are joined to ranges and split again. The kernel cannot change ranges in
/// place.
#[test]
fn ranges_become_any_other_ranges() {
    in_namespace(|| async {
        veths(0);
        let mut nft = Nftables::open().unwrap();
        // A generator of numbers (Knuth), the same ones each time.
        let mut random = 7_u64;
        for round in 0..120 {
            let (mut view, plan, peers) = view_and_plan(1, 0);
            let mut pods = Vec::new();
            for third in 0..24u8 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                if random >> 62 != 0 {
                    pods.push(format!("10.244.{third}.0/24").parse().unwrap());
                    pods.push(format!("fd00:244:{third}::/48").parse().unwrap());
                }
            }
            view.networks = Networks::new(&Default::default(), &pods, []).into();
            let shared = ruleset::shared_sets(&view, &peers, Marks::default(), &SharedSets::default());
            let made = made_of(&plan, &shared);
            nft.apply(made.tables()).unwrap_or_else(|e| panic!("round {round}: {e}"));
            nft.invalidate();
            assert_eq!(nft.apply(made.tables()).unwrap(), 0, "round {round}, read back");
        }
    });
}

/// A pod's start adds to the tables of the other pods. Whatever the changes, the result must equal tables that are
/// computed anew.
#[test]
fn tables_from_the_last_plan_equal_tables_made_anew() {
    in_namespace(|| async {
        veths(5);
        let (all, shared) = plan_and_sets(3, 5);
        let only = |pods: &[u32]| {
            let mut plan = all.clone();
            plan.pods.retain(|_, pod| pods.contains(&(pod.interface_index - 1000)));
            let used: Vec<_> = plan.pods.values().map(|pod| pod.policy_chain.clone()).collect();
            plan.policy_chains.retain(|name, _| used.contains(name));
            plan
        };
        let with = |mut plan: NodePlan, unfound: &str| {
            plan.unfound.insert(unfound.parse().unwrap());
            plan
        };
        let renumbered = |pods: &[u32], pod_mark| {
            let mut plan = only(pods);
            let (_, mut pod) = plan.pods.pop_first().unwrap();
            Arc::make_mut(&mut pod).pod_mark = pod_mark;
            plan.pods.insert(chain_name(pod_mark, pod.interface_index), pod);
            plan
        };
        let elsewhere = |pods: &[u32]| {
            let mut plan = only(pods);
            let pod = plan.pods.values_mut().next().unwrap();
            Arc::make_mut(pod).addresses = vec![[10, 244, 9, 9].into()];
            plan
        };
        let mut nft = Nftables::open().unwrap();
        let mut made: Option<Ruleset> = None;
        for plan in [
            only(&[]),
            only(&[2]),
            only(&[2, 4]),
            only(&[0, 2, 3, 4]),
            only(&[1, 2, 3]),
            with(only(&[1, 2, 3]), "10.244.1.77"),
            with(only(&[0, 1, 2, 3]), "10.244.1.77"),
            // The addresses of a pod whose veth is found then.
            with(only(&[0, 1, 2, 3]), "10.244.1.4"),
            only(&[0, 1, 2, 3, 4]),
            elsewhere(&[0, 1, 4]),
            renumbered(&[0, 1, 4], 9),
            only(&[0, 1, 4]),
            only(&[]),
        ] {
            let (pods, unfound) = (plan.pods.len(), plan.unfound.len());
            let next = Ruleset::new(plan.clone(), &shared, Marks::default(), made.as_ref());
            nft.apply(next.tables()).unwrap();
            nft.invalidate();
            let anew = made_of(&plan, &shared);
            assert_eq!(nft.apply(anew.tables()).unwrap(), 0, "with {pods} pods and {unfound} addresses");
            made = Some(next);
        }
    });
}

#[test]
fn an_outdated_view_of_the_kernel_is_read_again() {
    in_namespace(|| async {
        veths(2);
        let (plan, shared) = plan_and_sets(3, 2);
        let mut nft = Nftables::open().unwrap();
        nft.apply(made_of(&NodePlan::default(), &shared).tables()).unwrap();
        run("nft", "flush ruleset");
        // It assumes that the tables exist. The kernel rejects the change, and it reads them again.
        nft.apply(made_of(&plan, &shared).tables()).unwrap();
        ip("link del veth0");
        let mut fewer = plan.clone();
        fewer.pods.retain(|_, p| p.interface != "veth0");
        nft.apply(made_of(&fewer, &shared).tables()).unwrap();
        nft.invalidate();
        assert_eq!(nft.apply(made_of(&fewer, &shared).tables()).unwrap(), 0);
    });
}
