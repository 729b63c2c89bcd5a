//! How soon what a user asks of the Kubernetes API is so: a real API server and etcd, two nodes, all on this machine.
//! And what a big cluster costs: how long the controller computes, how much memory the daemons take.

mod harness;

use egret::allocation::allocate;
use egret::api::{EgressGatewaySpec, EgressPolicySpec};
use egret::model::{self, Cluster, Gateway, Metadata, Policy, PolicyKey};
use harness::{Bound, Memory, Table, api, mb, median, ms, pods};
use lab::{Daemon, EXT4, Lab, Node, NodeSpec, Pod, Pods, manifests};
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROUNDS: usize = 60;
const POLICIES: usize = 10_000;
const NODES: usize = 5_000;
/// Pods on each of the nodes whose daemons are measured.
const LOCAL_PODS: usize = 250;
/// Nodes of the gateway, each with its part of the allocations. Only the first one is real.
const GATEWAYS: usize = 3;
/// An even number: the last one makes the policy what it was.
const CHANGES: usize = 20;
/// What is asked for: the median and the 99th percentile from a change to traffic, and the time for a gateway's
/// allocations.
const MEDIAN: Duration = Duration::from_millis(60);
const P99: Duration = Duration::from_millis(300);
const ALLOCATIONS: Duration = Duration::from_secs(2);
/// What a node's daemon may take, bytes: 20 MB, and 10 MB more with the API as its source.
const MEMORY: f64 = 30e6;
/// What etcd takes in one request, bytes (<https://etcd.io/docs/v3.5/dev-guide/limit/>).
const MOST: f64 = 1.5 * 1024.0 * 1024.0;
/// So long after a policy has gone the next one comes.
const REST: Duration = Duration::from_millis(200);
/// So long a probe waits for its answer.
const PROBE: Duration = Duration::from_millis(3);

fn main() {
    harness::begin("Kubernetes as the source: from a change to the traffic");
    let lab = Lab::builder()
        .kubernetes()
        .nodes(vec![NodeSpec::new("n1", 11, Pods::Routed), NodeSpec::gateway("g1", 21, Pods::Routed)])
        .build();
    lab.add_namespace("shop", &[]);
    lab.write_manifest(
        "gateway.yaml",
        &manifests::gateway("default", &["192.0.2.50-192.0.2.59", "192.0.2.120-192.0.2.199"]),
    );
    lab.start();
    let mut table = Table::default();
    let mut row = |what: &str, times: &[Duration]| {
        let mut sorted = times.to_vec();
        sorted.sort();
        let (middle, late) = (median(times), sorted[(sorted.len() * 99).div_ceil(100) - 1]);
        let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64();
        table.row(&format!("{what}, median"), ms(middle), ratio(middle, MEDIAN), Bound::AtMost(1.0));
        table.row(&format!("{what}, 99th percentile"), ms(late), ratio(late, P99), Bound::AtMost(1.0));
    };
    row("EgressPolicy created, until its traffic leaves from the address", &policies(&lab));
    row("label of a pod changed, until its traffic leaves from the address", &labels(&lab));
    let time = gateway_status();
    let ratio = time.as_secs_f64() / ALLOCATIONS.as_secs_f64();
    table.row(&format!("allocations of {POLICIES} policies from nothing"), ms(time), ratio, Bound::AtMost(1.0));
    table.print(["what", "time", "of what is asked"]);
    drop(lab);
    big_cluster();
}

/// What the daemons take in a big cluster.
fn big_cluster() {
    let lab = Lab::builder()
        .kubernetes()
        .nodes(vec![NodeSpec::new("n1", 11, Pods::Routed), NodeSpec::gateway("g1", 21, Pods::Routed)])
        .build();
    api::nodes(&lab, NODES - lab.nodes().len(), GATEWAYS - 1);
    api::policies(&lab, POLICIES);
    for node in lab.nodes() {
        pods::populate(&lab, &node.name, LOCAL_PODS);
    }
    let gateway = manifests::gateway("default", &["198.18.0.0/16", "2001:db8:1::/112"]) + "  interface: eth0\n";
    lab.write_manifest("gateway.yaml", &gateway);
    let controller = lab.start_controller();
    let labels = [("object", "policy"), ("result", "ok")];
    lab.wait_until("every policy has been told of its address", Duration::from_secs(900), || {
        std::thread::sleep(Duration::from_secs(1));
        lab.metrics("controller").get("egret_status_writes_total", &labels).unwrap_or(0.0) >= POLICIES as f64
    });
    let gateway_status =
        lab.api().egret("egressgateways/default")["status"]["text"].as_str().unwrap_or_default().to_owned();
    let allocations = gateway_status.lines().filter(|line| line.contains(",2001:db8:1::")).count();
    assert_eq!(allocations, POLICIES, "every allocation has both families");
    let mut table = Table::default();
    table.row(
        "the allocations, as it is written",
        mb(gateway_status.len() as f64),
        gateway_status.len() as f64 / MOST,
        Bound::AtMost(1.0),
    );
    for (node, role) in lab.nodes().iter().zip(["a source node", "one of three gateways"]) {
        daemon_of(&lab, node, role, &mut table);
    }
    let now = Memory::of(&controller);
    table.row("the controller", mb(now.resident), now.resident / MEMORY, Bound::None);
    table.row("the controller, at its peak", mb(now.peak), now.peak / MEMORY, Bound::None);
    println!("{NODES} nodes, {POLICIES} policies and allocations, {LOCAL_PODS} pods on the node:\n");
    table.print(["memory", "resident", "of what is asked"]);
}

fn daemon_of(lab: &Lab, node: &Node, role: &str, table: &mut Table) {
    let begun = Instant::now();
    let daemon: Daemon = lab.start_node(&node.name);
    let patience = Duration::from_secs(120);
    lab.wait_until("the daemon is ready", patience, || node.cni_socket().exists());
    table.row(&format!("{role}: start, until in sync"), ms(begun.elapsed()), 0.0, Bound::None);
    // One of each family for each allocation.
    let wanted = if node.spec.gateway { 2 * (POLICIES / GATEWAYS) } else { 0 };
    lab.wait_until("the egress addresses are on the node", patience, || {
        let addresses = node.run(["ip", "-o", "addr", "show", "dev", "eth0"]);
        addresses.lines().filter(|l| l.contains(" 198.18.") || l.contains(" 2001:db8:1::")).count() >= wanted
    });
    std::thread::sleep(Duration::from_secs(10));
    let after_start = Memory::of(&daemon);
    for n in 0..CHANGES {
        let network = if n.is_multiple_of(2) { "198.51.100.0/24" } else { "203.0.113.0/24" };
        api::change_policy(lab, 0, network);
        lab.wait_until("the kernel has the change", patience, || {
            let tables = node.run(["nft", "list", "table", "inet", "egret"]);
            tables.contains("ip daddr 198.51.100.0/24") == n.is_multiple_of(2)
        });
        std::thread::sleep(Duration::from_millis(300));
    }
    std::thread::sleep(Duration::from_secs(10));
    let after_changes = Memory::of(&daemon);
    let written = node.run(["du", "-sb", &node.run_dir().join("known").display().to_string()]);
    let written: f64 = written.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number");
    let mut resident = |when: &str, memory: Memory| {
        let (all, file) = (memory.resident, memory.file);
        table.row(&format!("{role}, {when}"), mb(all), all / MEMORY, Bound::AtMost(1.0));
        table.row("of that, pages of the program's file", mb(file), file / MEMORY, Bound::None);
    };
    resident("after the start", after_start);
    resident(&format!("after {CHANGES} changes"), after_changes);
    table.row(&format!("{role}, at its peak"), mb(after_changes.peak), after_changes.peak / MEMORY, Bound::None);
    table.row(
        &format!("{role}, what is written down in its run directory"),
        mb(written),
        written / MEMORY,
        Bound::None,
    );
}

/// Sends from new ports until the server sees the pod as `wanted`.
fn until_seen_as(pod: &Pod, wanted: Ipv4Addr, begun: Instant) -> Duration {
    let server = SocketAddr::new(EXT4.into(), lab::server::UDP_WHO);
    pod.within(|| {
        let mut buffer = [0; 64];
        loop {
            // A connection keeps the allocation that it began with.
            let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
            socket.connect(server).expect("a route");
            socket.set_read_timeout(Some(PROBE)).expect("a timeout");
            // A blocked packet may be an error at once.
            let answer = socket.send(b"who").and_then(|_| lab::machine::receive(&socket, &mut buffer));
            if let Ok(size) = answer
                && String::from_utf8_lossy(&buffer[..size]).parse() == Ok(IpAddr::V4(wanted))
            {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "never seen as {wanted}");
        }
    })
}

fn policies(lab: &Lab) -> Vec<Duration> {
    let pod = lab.add_pod("n1", "shop", "visitor", &[("app", "visitor")]);
    let path = "/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies";
    // Kubernetes 1.36 takes two seconds for the first object of a kind after the kind's definition.
    let first = json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"namespace": "shop", "name": "first"}, "spec": {"podSelector": {}}});
    lab.api().ask("POST", &format!("{path}?dryRun=All"), Some(("application/json", &first)));
    let mut times = Vec::new();
    for i in 0..ROUNDS {
        // Each another one: an address that was somebody's rests.
        let address = Ipv4Addr::new(192, 0, 2, 120 + u8::try_from(i).unwrap_or(0));
        let policy = json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy",
            "metadata": {"namespace": "shop", "name": format!("p{i}")},
            "spec": {"podSelector": {"matchLabels": {"app": "visitor"}}, "address": {"ipv4": address}}});
        let begun = Instant::now();
        lab.api().ask("POST", path, Some(("application/json", &policy)));
        times.push(until_seen_as(&pod, address, begun));
        lab.api().delete(&format!("{path}/p{i}"));
        until_seen_as(&pod, lab.node("n1").ipv4(), Instant::now());
        // What goes with the policy is no part of what is measured next.
        std::thread::sleep(REST);
    }
    times
}

fn labels(lab: &Lab) -> Vec<Duration> {
    let mut pod = lab.add_pod("n1", "shop", "changing", &[("app", "a")]);
    for (app, last) in [("a", 57), ("b", 58)] {
        let spec = format!("podSelector: {{ matchLabels: {{ app: {app} }} }}\n  address: {{ ipv4: 192.0.2.{last} }}");
        lab.write_manifest(&format!("{app}.yaml"), &manifests::policy("shop", app, &spec));
    }
    until_seen_as(&pod, Ipv4Addr::new(192, 0, 2, 57), Instant::now());
    pod.relabel(&[("app", "b")]);
    until_seen_as(&pod, Ipv4Addr::new(192, 0, 2, 58), Instant::now());
    let mut times = Vec::new();
    for i in 0..ROUNDS {
        let (app, last) = if i % 2 == 0 { ("a", 57) } else { ("b", 58) };
        let begun = Instant::now();
        pod.relabel(&[("app", app)]);
        times.push(until_seen_as(&pod, Ipv4Addr::new(192, 0, 2, last), begun));
    }
    times
}

fn gateway_status() -> Duration {
    let mut cluster = Cluster::default();
    let gateway = EgressGatewaySpec { addresses: vec!["198.18.0.0/15".into()], default: true, ..Default::default() };
    let gateway = Gateway::new(&gateway, Metadata::default()).expect("a gateway");
    cluster.gateways.insert("default".into(), Arc::new(gateway));
    for i in 0..3 {
        cluster.nodes.insert(format!("g{i}").into(), Arc::new(model::Node::default()));
    }
    let spec = EgressPolicySpec { pod_selector: Some(Default::default()), ..Default::default() };
    for i in 0..POLICIES {
        let namespace = format!("namespace-{}", i % 100);
        let policy = Policy::namespaced(&namespace, &spec, Metadata::default()).expect("a policy");
        let key = PolicyKey { namespace: Some(namespace.as_str().into()), name: format!("policy-{i}").into() };
        cluster.policies.insert(key, Arc::new(policy));
    }
    let begun = Instant::now();
    let outcome = allocate(&cluster, 1_000_000);
    let time = begun.elapsed();
    assert_eq!(outcome.gateways["default"].allocations.len(), POLICIES);
    time
}
