//! What a remote gateway costs traffic: throughput, processor time, requests and new connections a second, against the
//! same two hops by a bare VXLAN device and masquerade, with the fast path on, and with 10,000 policies and allocations
//! against one; and what Egret costs the traffic of pods that no policy selects, against a node without Egret.

mod harness;

use harness::{Bound, Table, cluster, connections, median, pods};
use lab::server::{ECHO, UDP_WHO};
use lab::{EXT4, Lab, NodeSpec, Pod, Pods};
use serde_json::Value;
use std::env;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const MANY: usize = 10_000;
const LOCAL_PODS: usize = 200;
const ROUNDS: usize = 21;
const SECONDS: u64 = 2;
const STREAMS: usize = 4;
/// Port of `iperf3`, its default.
const IPERF: u16 = 5201;

/// The daemon's arguments with the fast path.
const FAST: &[&str] = &["--fast-path-lease=1s"];

/// What nodes' links are made to carry where processors shall not be what limits traffic.
const LINK: &str = "5gbit";

/// What is measured from a pod; more is better.
#[derive(Clone, Copy)]
struct Measure {
    what: &'static str,
    unit: &'static str,
    of: fn(&Pod) -> f64,
}

impl Measure {
    fn print(self, table: Table) {
        table.print([self.what, self.unit, "of the first"]);
    }
}

const ONE_STREAM: Measure = Measure { what: "TCP, one stream", unit: "Gbit/s", of: |pod| throughput(pod, 1) };
const STREAMS_AT_ONCE: Measure =
    Measure { what: "TCP, several streams", unit: "Gbit/s", of: |pod| throughput(pod, STREAMS) };
const REQUESTS: Measure = Measure { what: "TCP, request and answer", unit: "/s", of: requests };
const DATAGRAMS: Measure = Measure { what: "UDP, request and answer", unit: "/s", of: datagrams };
const CONNECTIONS: Measure =
    Measure { what: "New connections", unit: "/s", of: |pod| connections::a_second(pod, SECONDS) };
const EFFICIENCY: Measure =
    Measure { what: "Processor time, several streams", unit: "Gbit for a second of it", of: efficiency };

const PACKETS: Measure =
    Measure { what: "TCP, one stream in packets of MTU size", unit: "Gbit/s", of: throughput_by_packets };

/// What is measured through a remote gateway.
const REMOTE: [Measure; 6] = [ONE_STREAM, STREAMS_AT_ONCE, PACKETS, REQUESTS, DATAGRAMS, CONNECTIONS];

fn main() {
    harness::begin("Traffic through a remote gateway, IPv4");
    // `cargo bench --bench traffic -- REQUEST`: what contains one of the words, and of it the fast path.
    let words: Vec<String> = env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    if words.is_empty() {
        return all();
    }
    let (one, fast) = (egret(1, &[]), egret(1, FAST));
    let bare = bare(&one.lab);
    let _servers: Vec<Service> = [&one.lab, &fast.lab].map(Service::start).into();
    let ways = [
        ("bare VXLAN and masquerade", &bare, Bound::None),
        ("egret, one policy", &one.pod, Bound::None),
        ("egret, one policy, fast path", &fast.pod, Bound::None),
    ];
    for measure in REMOTE.into_iter().filter(|measure| words.iter().any(|word| measure.what.contains(word))) {
        let (mut table, figures) = compare(measure, &ways);
        table.row("fast path against none", String::new(), of(&figures[2], &figures[1]), Bound::None);
        measure.print(table);
    }
}

fn all() {
    let one = egret(1, &[]);
    let many = egret(MANY, &[]);
    let fast = egret(1, FAST);
    let bare = bare(&one.lab);
    let _servers: Vec<Service> = [&one.lab, &many.lab, &fast.lab].map(Service::start).into();
    let remote = [
        ("bare VXLAN and masquerade", &bare, Bound::None),
        ("egret, one policy", &one.pod, Bound::AtLeast(0.95)),
        ("egret, 10,000 policies and allocations", &many.pod, Bound::AtLeast(0.95)),
        ("egret, one policy, fast path", &fast.pod, Bound::AtLeast(0.95)),
    ];
    for measure in REMOTE {
        let (mut table, figures) = compare(measure, &remote);
        table.row("10,000 against one", String::new(), of(&figures[2], &figures[1]), Bound::AtLeast(0.97));
        table.row("fast path against none", String::new(), of(&figures[3], &figures[1]), Bound::None);
        measure.print(table);
    }

    println!("A pod that no policy selects:\n");
    let plain = pod_without_egret(&one.lab, "bg");
    let other = one.lab.add_pod("n1", "other", "client", &[]);
    let others = [("a node without Egret", &plain, Bound::None), ("a node with Egret", &other, Bound::None)];
    for measure in [ONE_STREAM, STREAMS_AT_ONCE, EFFICIENCY] {
        measure.print(compare(measure, &others).0);
    }

    println!("Nodes with links of {LINK}, through a remote gateway:\n");
    for node in [&one.lab, &many.lab, &fast.lab].iter().flat_map(|lab| lab.nodes()) {
        let shape = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", LINK];
        node.run(shape.into_iter().chain(["burst", "1mb", "latency", "20ms"]));
    }
    for measure in [ONE_STREAM, STREAMS_AT_ONCE] {
        measure.print(compare(measure, &remote).0);
    }
    EFFICIENCY.print(compare(EFFICIENCY, &remote.map(|(what, pod, _)| (what, pod, Bound::None))).0);
}

/// Measures the ways by turns: what each is of the first, and its figures.
fn compare(measure: Measure, ways: &[(&str, &Pod, Bound)]) -> (Table, Vec<Vec<f64>>) {
    let mut figures = vec![Vec::new(); ways.len()];
    for round in 0..ROUNDS {
        for turn in 0..ways.len() {
            // Each way comes at each place as often.
            let at = (turn + round) % ways.len();
            figures[at].push((measure.of)(ways[at].1));
        }
    }
    let mut table = Table::default();
    for ((what, _, bound), own) in ways.iter().zip(&figures) {
        table.row(what, format!("{:.2}", median(own)), of(own, &figures[0]), *bound);
    }
    (table, figures)
}

/// The median of what is within a round, which is short: a shared machine is faster in one than in another.
fn of(a: &[f64], b: &[f64]) -> f64 {
    median(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<f64>>())
}

/// A lab with Egret on `n1` and the gateway `g1`, and a pod that a policy selects.
struct Egret {
    lab: Lab,
    pod: Pod,
}

fn egret(policies: usize, arguments: &[&str]) -> Egret {
    let nodes = vec![
        NodeSpec::new("n1", 11, Pods::Routed),
        NodeSpec::gateway("g1", 21, Pods::Routed),
        NodeSpec::new("b1", 31, Pods::Routed),
        NodeSpec::new("bg", 32, Pods::Routed),
    ];
    let lab = Lab::builder().nodes(nodes).node_arguments(arguments).build();
    // Noting every packet would cost all ways the same, and so make them look more alike.
    lab.host("fab").nft("delete table bridge wire");
    let directory = lab.manifests().path();
    cluster::write_policies(&lab, policies);
    cluster::write_gateway(directory, policies, &["g1"]);
    lab.host("ext").ip("route add 198.18.0.0/15 dev eth0");
    pods::populate(&lab, "n1", LOCAL_PODS);
    for node in ["g1", "n1"] {
        lab.start_node(node);
    }
    for node in ["g1", "n1"] {
        lab.wait_ready(node);
    }
    let policy = cluster::policy(0);
    // It shall cover the server.
    lab.write_manifest("first.yaml", &policy.manifest(&[]));
    let pod = lab.add_pod("n1", &policy.namespace, "client", &[("app", &policy.name)]);
    lab.wait_seen_as(&pod, policy.address);
    Egret { lab, pod }
}

/// The same two hops without Egret: a VXLAN device between `b1` and `bg`, and masquerade on `bg`.
fn bare(lab: &Lab) -> Pod {
    let (node, gateway) = (lab.node("b1"), lab.node("bg"));
    let pods = node.pods4();
    let device = |own: Ipv4Addr, other: Ipv4Addr, address: &str| {
        vec![
            format!("link add vx type vxlan id 99 dstport 4790 local {own} remote {other} dev eth0"),
            format!("addr add {address}/30 dev vx"),
            "link set vx up".to_owned(),
        ]
    };
    let mut lines = device(node.ipv4(), gateway.ipv4(), "172.31.0.1");
    lines.push("route add default via 172.31.0.2 table 100".into());
    lines.push(format!("rule add from {pods} iif eth0 lookup main priority 99"));
    lines.push(format!("rule add from {pods} lookup 100 priority 100"));
    lines.push(format!("rule add to {pods} lookup main priority 98"));
    node.ip_batch(&lines);
    // Translated on the gateway alone. The CNI's own rule stays, and with it the tracking of connections, as on any
    // node of a cluster: without a rule that needs it the kernel does not do it.
    node.run(["iptables", "-t", "nat", "-I", "POSTROUTING", "-s", &pods.to_string(), "-j", "ACCEPT"]);
    let mut lines = device(gateway.ipv4(), node.ipv4(), "172.31.0.2");
    lines.push(format!("route replace {pods} via 172.31.0.1"));
    gateway.ip_batch(&lines);
    gateway.nft(&format!(
        "table ip gateway {{ chain post {{ type nat hook postrouting priority 99; ip saddr {pods} oif eth0 masquerade; }}; }}"
    ));
    let pod = pod_without_egret(lab, "b1");
    assert_eq!(pod.who(EXT4).ok(), Some(IpAddr::from(gateway.ipv4())), "the bare way leads through the gateway");
    pod
}

/// A pod that was made without the plugin, on a node where no daemon runs.
fn pod_without_egret(lab: &Lab, node: &str) -> Pod {
    lab.node(node).set_conflist(lab.plain_conflist(node));
    lab.add_pod(node, "bare", node, &[])
}

/// What the outside host serves: iperf3, and a port that takes connections and closes them.
struct Service {
    iperf: Child,
    _connections: connections::Service,
}

impl Service {
    fn start(lab: &Lab) -> Service {
        let host = lab.host("ext");
        let mut command = Command::new("iperf3");
        command.args(["-s", "-p", &IPERF.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
        let iperf = host.spawn(&mut command).expect("iperf3; tests/setup.sh installs it");
        let up = || host.within(|| TcpStream::connect((Ipv4Addr::LOCALHOST, IPERF)).is_ok());
        lab.wait_until("iperf3 listens", Duration::from_secs(5), up);
        Service { iperf, _connections: connections::Service::start(lab) }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.iperf.kill();
        let _ = self.iperf.wait();
    }
}

/// Gbit a second that arrived.
fn throughput(pod: &Pod, streams: usize) -> f64 {
    let (server, port, seconds) = (EXT4.to_string(), IPERF.to_string(), SECONDS.to_string());
    let command = ["iperf3", "-c", &server, "-p", &port, "-t", &seconds, "-P", &streams.to_string(), "-J"];
    for _ in 0..20 {
        let report: Value = serde_json::from_str(&pod.run(command)).expect("iperf3's JSON");
        if let Some(bits) = report["end"]["sum_received"]["bits_per_second"].as_f64() {
            return bits / 1e9;
        }
        // Between two tests its server does not listen for a moment, or has not noticed the end of the last one.
        let error = report["error"].to_string();
        let passes = ["unable to connect", "the server is busy"].iter().any(|text| error.contains(text));
        assert!(passes, "no figure in {report}");
        thread::sleep(Duration::from_millis(100));
    }
    panic!("iperf3's server does not listen");
}

/// As [`throughput`], of a pod that segments by itself: each packet passes the hosts by itself.
fn throughput_by_packets(pod: &Pod) -> f64 {
    let segments_itself = |is_so: bool| {
        let by_device = if is_so { "off" } else { "on" };
        pod.run(["ethtool", "-K", "eth0", "tso", by_device, "gso", by_device]);
    };
    segments_itself(true);
    let arrived = throughput(pod, 1);
    segments_itself(false);
    arrived
}

/// Requests of sixteen bytes on one connection, each with an answer, one after the other.
fn requests(pod: &Pod) -> f64 {
    let mut stream = pod.within(|| TcpStream::connect((EXT4, ECHO))).expect("the echo port");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    let mut answer = [0; 16];
    pace(|| {
        stream.write_all(&[b'x'; 16]).expect("a request");
        stream.read_exact(&mut answer).expect("an answer");
    })
}

/// Datagrams from one port, each with an answer, one after the other.
fn datagrams(pod: &Pod) -> f64 {
    let socket = pod.udp_socket((EXT4, UDP_WHO).into()).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    let mut answer = [0; 64];
    pace(|| {
        socket.send(b"who").expect("a request");
        // One that is lost costs its time.
        let _ = lab::machine::receive(&socket, &mut answer);
    })
}

/// How often it can be done in a second.
fn pace(mut action: impl FnMut()) -> f64 {
    let (begin, mut times) = (Instant::now(), 0_u32);
    while begin.elapsed() < Duration::from_secs(SECONDS) {
        action();
        times += 1;
    }
    f64::from(times) / begin.elapsed().as_secs_f64()
}

/// Gbit that arrived for each second of processor time of the whole machine.
fn efficiency(pod: &Pod) -> f64 {
    let before = busy();
    let arrived = throughput(pod, STREAMS) * SECONDS as f64;
    arrived / (busy() - before)
}

/// Seconds in which processors were not idle, of all of them, proc_stat(5).
fn busy() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").expect("/proc/stat");
    let ticks: Vec<f64> = text.lines().next().unwrap_or_default().split(' ').filter_map(|n| n.parse().ok()).collect();
    // user, nice, system; idle, iowait; irq, softirq. 100 ticks a second.
    (ticks[..3].iter().sum::<f64>() + ticks[5..7].iter().sum::<f64>()) / 100.0
}
