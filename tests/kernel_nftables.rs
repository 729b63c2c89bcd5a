//! The datapath's tables in a real kernel, looked at with `nft`. Needs root.

mod namespace;

use egret::api::{AddressPair, Fallback, MAX_EXCEPTIONS, Protocol};
use egret::kernel::datapath::{self, INET, Made, PeerIndexes, SharedSets, set};
use egret::kernel::nft::Nftables;
use egret::plan::destination::{Destination, Network, Ports};
use egret::plan::mac;
use egret::plan::marks::Marks;
use egret::plan::model::PolicyKey;
use egret::plan::networks::Networks;
use egret::plan::node::{NodePlan, PodPlan, View, chain_name};
use egret::plan::paths::{Path, PathState, Peer, Placing};
use egret::plan::profile::{Profile, Step};
use namespace::{in_namespace, ip, run};
use std::sync::Arc;

fn path(state: PathState, last: u8) -> Path {
    Path {
        gateway: "gw".into(),
        address: AddressPair {
            ipv4: Some([192, 0, 2, last].into()),
            ipv6: Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)].into()),
        },
        state,
        member: true,
        managed: true,
        answers_ping: false,
        translates: true,
        handed_by: None,
        placed: true,
        placing: Placing::Never,
        by_ledger: true,
        taken_over: false,
        since: 0,
        interface: None,
        uplink: 0,
    }
}

/// A node with `pods` pods of two profiles, in a cluster of `nodes` nodes.
fn view_and_plan(nodes: u16, pods: u32) -> (View, NodePlan, PeerIndexes) {
    let mut view = View::default();
    view.paths.is_gateway = true;
    let mut peers = PeerIndexes::new();
    for n in 1..=nodes {
        let mac = mac::of_node(&format!("node-{n}"));
        let [a, b] = n.to_be_bytes();
        view.paths
            .peers
            .insert(mac, Peer { node: format!("node-{n}").into(), address: [10, 1, a, b].into(), is_gateway: n == 1 });
        view.networks.hosts.insert([10, 1, a, b].into());
        peers.insert(mac, n);
    }
    let networks = Networks::new(&Default::default(), &["10.244.0.0/16".parse().unwrap()], []);
    view.networks = Networks { hosts: view.networks.hosts.clone(), ..networks }.into();
    view.paths.paths.insert(17, path(PathState::Remote(mac::of_node("node-1")), 50));
    view.paths.paths.insert(18, path(PathState::Local, 51));
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
        let step = |name: &str, path, fallback, covers: Vec<Destination>| Step {
            policy: PolicyKey::from(name),
            path: Some(path),
            fallback,
            covers: covers.into(),
        };
        let profile = if n % 2 == 0 {
            Profile::Steps(vec![
                step("a/b", 17, Fallback::NodeAddress, vec![covers]),
                step("c", 18, Fallback::Block, vec![]),
            ])
        } else {
            Profile::Steps(vec![step("a/b", 17, Fallback::Block, vec![covers])])
        };
        let pod = PodPlan {
            interface: format!("veth{n}"),
            interface_index: 1000 + n,
            addresses: vec![[10, 244, 1, n as u8].into(), [0xfd00, 0, 0, 0, 0, 0, 0, n as u16].into()],
            tag: n as u16 + 1,
            profile: profile.name(),
        };
        plan.add(&view, chain_name(pod.tag, pod.interface_index), pod.into(), profile.into());
    }
    (view, plan, peers)
}

/// The plan of [`view_and_plan`], and the sets of its cluster.
fn plan_and_sets(nodes: u16, pods: u32) -> (NodePlan, SharedSets) {
    let (view, plan, peers) = view_and_plan(nodes, pods);
    (plan, datapath::shared_sets(&view, &peers, Marks::default(), &SharedSets::default()))
}

/// The tables of a plan, made without any before it.
fn made_of(plan: &NodePlan, shared: &SharedSets) -> Made {
    Made::new(plan.clone(), shared, Marks::default(), None)
}

/// As much as policies may cover, and a rule as long as a rule can get.
#[test]
fn the_kernel_takes_what_policies_may_be() {
    in_namespace(|| async {
        veths(1);
        let (view, mut plan, peers) = view_and_plan(3, 1);
        let inside = |n: usize| format!("2001:db8:{n:x}::/48").parse().unwrap();
        let network =
            Network { cidr: "2001:db8::/32".parse().unwrap(), except: (1..=MAX_EXCEPTIONS).map(inside).collect() };
        let ports = |first| Ports { protocol: Protocol::Sctp, first, last: first + 1 };
        let covers = Destination { networks: vec![network; 40].into(), ports: (1..=25).map(ports).collect() };
        assert_eq!(covers.rules(), 1_000);
        let step = |fallback| Step {
            policy: PolicyKey::from("a/b"),
            path: Some(17),
            fallback,
            covers: [covers.clone()].into(),
        };
        let steps = [Fallback::NodeAddress, Fallback::Block, Fallback::Block].map(step);
        let profile = Profile::Steps(steps.into());
        let (chain, mut pod) = plan.pods.pop_first().unwrap();
        Arc::make_mut(&mut pod).profile = profile.name();
        plan.add(&view, chain, pod, profile.into());
        let shared = datapath::shared_sets(&view, &peers, Marks::default(), &SharedSets::default());
        let made = Made::new(plan, &shared, Marks::default(), None);
        let mut nft = Nftables::open().unwrap();
        assert!(nft.apply(made.tables()).unwrap() > 4_000);
        nft.distrust();
        assert_eq!(nft.apply(made.tables()).unwrap(), 0, "read back");
    });
}

fn veths(n: u32) {
    for i in 0..n {
        ip(&format!("link add veth{i} type veth peer name p{i}"));
    }
    ip("link add egret type vxlan id 7871 dstport 7871 local 127.0.0.1 nolearning gbp");
}

#[test]
fn what_was_applied_is_read_back_as_the_same() {
    in_namespace(|| async {
        veths(4);
        let (plan, shared) = plan_and_sets(1200, 4);
        let made = made_of(&plan, &shared);
        let tables = made.tables();
        let mut nft = Nftables::open().unwrap();
        assert!(nft.apply(tables).unwrap() > 1200);
        assert_eq!(nft.apply(tables).unwrap(), 0, "known without reading");
        nft.distrust();
        assert_eq!(nft.apply(tables).unwrap(), 0, "read back");
        println!("{}", run("nft", "list ruleset"));
        assert_eq!(nft.elements(INET, set::PEER).unwrap().iter().count(), 1200);
    });
}

#[test]
fn what_somebody_takes_away_is_put_back() {
    in_namespace(|| async {
        veths(2);
        let (plan, shared) = plan_and_sets(3, 2);
        let made = made_of(&plan, &shared);
        let tables = made.tables();
        let mut nft = Nftables::open().unwrap();
        nft.apply(tables).unwrap();
        let whole = run("nft", "list ruleset");
        for damage in [
            "delete element inet egret path_out { 0x45470011 }",
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
            nft.distrust();
            assert!(nft.apply(tables).unwrap() > 0, "{damage} is noticed");
            assert_eq!(run("nft", "list ruleset"), whole, "{damage} is mended");
        }
    });
}

/// Networks of nodes that come and go are joined to ranges and divided again, which the kernel does not take bit by bit.
#[test]
fn ranges_become_any_other_ranges() {
    in_namespace(|| async {
        veths(0);
        let mut nft = Nftables::open().unwrap();
        // A generator of numbers, of Knuth's: the same ones each time.
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
            let shared = datapath::shared_sets(&view, &peers, Marks::default(), &SharedSets::default());
            let made = made_of(&plan, &shared);
            nft.apply(made.tables()).unwrap_or_else(|e| panic!("round {round}: {e}"));
            nft.distrust();
            assert_eq!(nft.apply(made.tables()).unwrap(), 0, "round {round}, read back");
        }
    });
}

/// A pod's start adds to what was made for the others: whatever comes and goes, it is as if it were made anew.
#[test]
fn what_follows_from_the_last_plan_is_what_is_made_anew() {
    in_namespace(|| async {
        veths(5);
        let (all, shared) = plan_and_sets(3, 5);
        let only = |pods: &[u32]| {
            let mut plan = all.clone();
            plan.pods.retain(|_, pod| pods.contains(&(pod.interface_index - 1000)));
            let used: Vec<_> = plan.pods.values().map(|pod| pod.profile.clone()).collect();
            plan.profiles.retain(|name, _| used.contains(name));
            plan
        };
        let with = |mut plan: NodePlan, unfound: &str| {
            plan.unfound.insert(unfound.parse().unwrap());
            plan
        };
        let renumbered = |pods: &[u32], tag| {
            let mut plan = only(pods);
            let (_, mut pod) = plan.pods.pop_first().unwrap();
            Arc::make_mut(&mut pod).tag = tag;
            plan.pods.insert(chain_name(tag, pod.interface_index), pod);
            plan
        };
        let elsewhere = |pods: &[u32]| {
            let mut plan = only(pods);
            let pod = plan.pods.values_mut().next().unwrap();
            Arc::make_mut(pod).addresses = vec![[10, 244, 9, 9].into()];
            plan
        };
        let mut nft = Nftables::open().unwrap();
        let mut made: Option<Made> = None;
        for plan in [
            only(&[]),
            only(&[2]),
            only(&[2, 4]),
            only(&[0, 2, 3, 4]),
            only(&[1, 2, 3]),
            with(only(&[1, 2, 3]), "10.244.1.77"),
            with(only(&[0, 1, 2, 3]), "10.244.1.77"),
            // Of a pod's that is found then.
            with(only(&[0, 1, 2, 3]), "10.244.1.4"),
            only(&[0, 1, 2, 3, 4]),
            elsewhere(&[0, 1, 4]),
            renumbered(&[0, 1, 4], 9),
            only(&[0, 1, 4]),
            only(&[]),
        ] {
            let (pods, unfound) = (plan.pods.len(), plan.unfound.len());
            let next = Made::new(plan.clone(), &shared, Marks::default(), made.as_ref());
            nft.apply(next.tables()).unwrap();
            nft.distrust();
            let anew = made_of(&plan, &shared);
            assert_eq!(nft.apply(anew.tables()).unwrap(), 0, "with {pods} pods and {unfound} addresses");
            made = Some(next);
        }
    });
}

#[test]
fn a_view_that_is_out_of_date_is_read_again() {
    in_namespace(|| async {
        veths(2);
        let (plan, shared) = plan_and_sets(3, 2);
        let mut nft = Nftables::open().unwrap();
        nft.apply(made_of(&NodePlan::default(), &shared).tables()).unwrap();
        run("nft", "flush ruleset");
        // It believes that the tables are there: the kernel refuses, and it looks.
        nft.apply(made_of(&plan, &shared).tables()).unwrap();
        ip("link del veth0");
        let mut fewer = plan.clone();
        fewer.pods.retain(|_, p| p.interface != "veth0");
        nft.apply(made_of(&fewer, &shared).tables()).unwrap();
        nft.distrust();
        assert_eq!(nft.apply(made_of(&fewer, &shared).tables()).unwrap(), 0);
    });
}
