//! The rules that kube-router v2.11.0 writes on a node by iptables: its NetworkPolicy controller's, for local pods under one
//! NetworkPolicy (pkg/controllers/netpol/npc_iptables.go), and its masquerade (pkg/controllers/routing/pod_egress.go).
//! Without comments; the names of chains and sets are shorter than its hashes.

use super::Pod;
use super::topology::Node;
use std::net::IpAddr;

/// The networks that the NetworkPolicy allows, the last one outside of the cluster; ICMP that each pod may send; the
/// Services' network; the nodes.
struct OfFamily {
    restore: &'static str,
    set: &'static str,
    family: &'static str,
    allowed: [&'static str; 2],
    icmp: &'static [(&'static str, &'static str)],
    services: &'static str,
    reject: &'static str,
}

const FAMILIES: [OfFamily; 2] = [
    OfFamily {
        restore: "iptables-restore",
        set: "",
        family: "inet",
        allowed: ["10.244.0.0/16", "192.0.2.0/24"],
        icmp: &[
            ("icmp -m icmp --icmp-type", "8"),
            ("icmp -m icmp --icmp-type", "3"),
            ("icmp -m icmp --icmp-type", "11"),
        ],
        services: "10.96.0.0/16",
        reject: "icmp-port-unreachable",
    },
    OfFamily {
        restore: "ip6tables-restore",
        set: "inet6:",
        family: "inet6",
        allowed: ["fd00:244::/32", "2001:db8::/64"],
        icmp: &[
            ("ipv6-icmp -m icmp6 --icmpv6-type", "128"),
            ("ipv6-icmp -m icmp6 --icmpv6-type", "1"),
            ("ipv6-icmp -m icmp6 --icmpv6-type", "3"),
            ("ipv6-icmp -m icmp6 --icmpv6-type", "135"),
            ("ipv6-icmp -m icmp6 --icmpv6-type", "136"),
            ("ipv6-icmp -m icmp6 --icmpv6-type", "129"),
        ],
        services: "fd00:96::/112",
        reject: "icmp6-port-unreachable",
    },
];

/// Writes all of its rules, in the place of what was in iptables' tables. `allow` says whether the NetworkPolicy, which
/// selects these pods of the node, allows the server outside.
pub fn write(node: &Node, pods: &[&Pod], allow: bool) {
    for of in &FAMILIES {
        let own = |address: &&IpAddr| address.is_ipv4() == (of.family == "inet");
        let addresses: Vec<IpAddr> = pods.iter().filter_map(|pod| pod.addresses.iter().find(own).copied()).collect();
        node.feed(["ipset", "restore", "-exist"], &sets(of, &addresses, allow));
        node.feed([of.restore], &filter(of, &addresses));
    }
}

/// Removes all of its rules.
pub fn remove(node: &Node) {
    for of in &FAMILIES {
        node.feed([of.restore], "*filter\nCOMMIT\n*nat\nCOMMIT\n");
    }
    node.run(["ipset", "destroy"]);
}

fn sets(of: &OfFamily, pods: &[IpAddr], allow: bool) -> String {
    let OfFamily { set, family, allowed, .. } = of;
    let sets = [
        ("kube-router-pod-subnets", "net", vec![allowed[0].to_owned()]),
        ("kube-router-node-ips", "ip", Vec::new()),
        ("KUBE-SRC", "ip", pods.iter().map(ToString::to_string).collect()),
        ("KUBE-DST", "net", allowed[..if allow { 2 } else { 1 }].iter().map(ToString::to_string).collect()),
    ];
    let mut text = String::new();
    for (name, kind, members) in sets {
        text += &format!("create {set}{name} hash:{kind} family {family}\nflush {set}{name}\n");
        members.iter().for_each(|member| text += &format!("add {set}{name} {member}\n"));
    }
    text
}

fn filter(of: &OfFamily, pods: &[IpAddr]) -> String {
    let OfFamily { set, icmp, services, reject, .. } = of;
    let mut text = String::from("*filter\n");
    let fixed =
        ["NWPLCY", "NWPLCY-COMMON", "NWPLCY-DEFAULT", "NWPLCY-TAIL", "ROUTER-FORWARD", "ROUTER-INPUT", "ROUTER-OUTPUT"];
    fixed.iter().for_each(|chain| text += &format!(":KUBE-{chain} - [0:0]\n"));
    (0..pods.len()).for_each(|n| text += &format!(":KUBE-POD-FW-{n} - [0:0]\n"));
    let matched = format!("-m set --match-set {set}KUBE-SRC src -m set --match-set {set}KUBE-DST dst");
    text += &format!(
        "-A INPUT -j KUBE-ROUTER-INPUT\n-A FORWARD -j KUBE-ROUTER-FORWARD\n-A OUTPUT -j KUBE-ROUTER-OUTPUT\n\
         -A KUBE-NWPLCY {matched} -j MARK --set-xmark 0x10000/0x10000\n\
         -A KUBE-NWPLCY {matched} -m mark --mark 0x10000/0x10000 -j RETURN\n\
         -A KUBE-NWPLCY-COMMON -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-NWPLCY-COMMON -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
    );
    icmp.iter().for_each(|(kind, number)| text += &format!("-A KUBE-NWPLCY-COMMON -p {kind} {number} -j ACCEPT\n"));
    text += "-A KUBE-NWPLCY-DEFAULT -j MARK --set-xmark 0x10000/0x10000\n\
             -A KUBE-NWPLCY-TAIL -m mark --mark 0x20000/0x20000 -j ACCEPT\n";
    for (n, pod) in pods.iter().enumerate() {
        let chain = format!("KUBE-POD-FW-{n}");
        text += &format!(
            "-A {chain} -j KUBE-NWPLCY-COMMON\n-A {chain} -d {pod} -m addrtype --src-type LOCAL -j ACCEPT\n\
             -A {chain} -d {pod} -j KUBE-NWPLCY-DEFAULT\n-A {chain} -s {pod} -j KUBE-NWPLCY\n\
             -A {chain} -m mark ! --mark 0x10000/0x10000 -m limit --limit 10/min --limit-burst 10 -j NFLOG --nflog-group 100\n\
             -A {chain} -m mark ! --mark 0x10000/0x10000 -j REJECT --reject-with {reject}\n\
             -A {chain} -j MARK --set-xmark 0x0/0x10000\n-A {chain} -j MARK --set-xmark 0x20000/0x20000\n"
        );
        for hook in [format!("FORWARD -d {pod}"), format!("FORWARD -s {pod}")] {
            text += &format!(
                "-A KUBE-ROUTER-{hook} -j {chain}\n-A KUBE-ROUTER-{hook} -m physdev --physdev-is-bridged -j {chain}\n"
            );
        }
        for hook in [format!("INPUT -s {pod}"), format!("OUTPUT -d {pod}"), format!("OUTPUT -s {pod}")] {
            text += &format!("-A KUBE-ROUTER-{hook} -j {chain}\n");
        }
    }
    text += &format!("-A KUBE-ROUTER-INPUT -d {services} -j RETURN\n");
    for hook in ["FORWARD", "INPUT", "OUTPUT"] {
        text += &format!(
            "-A KUBE-ROUTER-{hook} -j KUBE-NWPLCY-TAIL\n-A KUBE-ROUTER-{hook} -m mark --mark 0x20000/0x20000 -j ACCEPT\n"
        );
    }
    let pods = format!("{set}kube-router-pod-subnets");
    text + &format!(
        "COMMIT\n*nat\n-A POSTROUTING -m set --match-set {pods} src -m set ! --match-set {pods} dst \
         -m set ! --match-set {set}kube-router-node-ips dst -j MASQUERADE --random-fully\nCOMMIT\n"
    )
}
