//! Other software's settings stay unchanged and keep working. Needs root.

use lab::client::udp_who_by;
use lab::scene::{assert_leaves_by_egress, assert_leaves_by_node};
use lab::{EGRESS4, EXT4, EXT6, Lab, Node, Pods, Server, VISITOR, server};
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// The node's network sysctls, without those of devices that are added and removed.
fn settings(node: &Node) -> Vec<String> {
    let out = node.try_run(["sysctl", "-a"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let volatile = |l: &&str| l.contains(".egret.") || l.contains(".veth") || l.contains("nf_conntrack_count");
    text.lines().filter(|l| l.starts_with("net.")).filter(|l| !volatile(l)).map(str::to_owned).collect()
}

/// Rules, routes and addresses that are not Egret's.
fn others(node: &Node) -> Vec<String> {
    let mut lines = Vec::new();
    for table in node.run(["nft", "list", "tables"]).lines().filter(|t| !t.ends_with(" egret")) {
        let mut command = vec!["nft", "-s", "list"];
        command.extend(table.split(' '));
        lines.push(node.run(command));
    }
    // The tunnel device's own network comes with its address.
    let routes = node.ip("route show table main");
    lines.extend(routes.lines().filter(|route| !route.contains(" dev egret ")).map(str::to_owned));
    lines.push(node.ip("-6 route show table main dev eth0"));
    lines.push(node.ip("addr show dev lo"));
    lines
}

#[test]
fn strict_filtering_masquerades_and_all_other_settings_of_the_node_stay_unchanged() {
    let lab = Lab::new();
    let before: Vec<_> = lab.nodes().iter().map(|n| (settings(n), others(n))).collect();
    drop(lab);
    let lab = Lab::scene();
    for (node, (settings_before, others_before)) in lab.nodes().iter().zip(before) {
        assert_eq!(node.run(["cat", "/proc/sys/net/ipv4/conf/all/rp_filter"]).trim(), "1");
        assert_eq!(node.run(["cat", "/proc/sys/net/ipv4/conf/all/src_valid_mark"]).trim(), "1");
        // The probes have created the CNI's bridge, and its settings are the CNI's.
        let added: Vec<_> =
            settings(node).into_iter().filter(|l| !l.contains(".cni0.") && !settings_before.contains(l)).collect();
        assert!(added.is_empty(), "settings that changed on {}: {added:#?}", node.name);
        if node.spec.pods == lab::Pods::Routed {
            assert_eq!(others(node), others_before, "{}", node.name);
        }
    }
}

#[test]
fn connections_into_a_pod_from_outside_keep_their_replies() {
    let lab = Lab::scene();
    let ext = lab.host("ext");
    for node in lab.nodes() {
        ext.ip(&format!("route add {} via {}", node.pods4(), node.ipv4()));
        ext.ip(&format!("route add {} via {}", node.pods6(), node.ipv6()));
    }
    for node in lab.nodes() {
        let pod = lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), VISITOR);
        let _server = Server::start(&pod);
        assert_eq!(ext.who(pod.ipv4()).ok(), Some(EXT4.into()), "into {}", pod.name);
        assert_eq!(ext.who(pod.ipv6()).ok(), Some(EXT6.into()), "into {}", pod.name);
        assert_eq!(ext.udp_who(pod.ipv4()).ok(), Some(EXT4.into()), "into {} by UDP", pod.name);
        let inbound = ext.session(pod.ipv4()).expect("a session into the pod");
        assert_leaves_by_egress(&pod);
        std::thread::sleep(Duration::from_millis(200));
        let report = inbound.stop();
        assert!(report.broken.is_none() && report.rounds > 5, "{report:?}");
        assert!(node.who(pod.ipv4()).is_ok() && node.who(pod.ipv6()).is_ok(), "probes from the node to {}", pod.name);
    }
}

#[test]
fn host_ports_of_a_selected_pod_work_from_outside() {
    let lab = Lab::scene();
    let node = lab.node("n2");
    let mut pod = lab.sandbox("n2", "shop", "shopfront", VISITOR);
    pod.runtime.capabilities =
        json!({"portMappings": [{"hostPort": 30080, "containerPort": server::WHO, "protocol": "tcp"}]});
    pod.attach().unwrap_or_else(|e| panic!("ADD: {e}"));
    let _server = Server::start(&pod);
    let asked = lab.host("ext").who_at((node.ipv4(), 30080).into());
    assert_eq!(asked.expect("through the host port"), IpAddr::from(EXT4));
    assert_leaves_by_egress(&pod);
}

/// A small kube-proxy: destination NAT of a Service's address on the node, for its pods and for the node itself.
fn service(node: &Node, address: Ipv4Addr, backend: SocketAddr) {
    for chain in ["PREROUTING", "OUTPUT"] {
        let rule =
            format!("iptables -t nat -A {chain} -d {address} -p tcp --dport 80 -j DNAT --to-destination {backend}");
        node.run(rule.split(' '));
    }
}

#[test]
fn a_service_with_a_backend_outside_gets_the_egress_ip_and_one_inside_does_not() {
    let lab = Lab::scene();
    let (inside, outside, on_node) = ([10, 96, 0, 10].into(), [10, 96, 0, 11].into(), [10, 96, 0, 12].into());
    let backend = lab.add_pod("n2", "office", "backend", &[]);
    let _server = Server::start(&backend);
    let _on_the_node = Server::start(lab.node("g2"));
    for node in lab.nodes() {
        service(node, inside, (backend.ipv4(), server::WHO).into());
        service(node, outside, (EXT4, server::WHO).into());
        service(node, on_node, (lab.node("g2").ipv4(), server::WHO).into());
    }
    for node in ["n1", "g1"] {
        let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        let other = lab.add_pod(node, "office", &format!("other-{node}"), &[]);
        let ask = |pod: &lab::Pod, service: Ipv4Addr| pod.who_at((service, 80).into());
        assert_eq!(ask(&pod, inside).ok(), Some(pod.ipv4().into()), "{node}: the backend inside sees the pod");
        assert!(ask(&pod, on_node).is_ok(), "{node}: the backend on a node");
        lab.assert_nothing_arrives();
        assert_eq!(ask(&pod, outside).ok(), Some(EGRESS4.into()), "{node}: the backend outside");
        assert_eq!(ask(&other, outside).ok(), Some(pod.node.ipv4().into()), "{node}: of a pod without a policy");
        lab.forget_wire();
    }
}

#[test]
fn the_nodes_own_traffic_leaves_as_before() {
    let lab = Lab::scene();
    for node in lab.nodes() {
        assert_eq!(node.who(EXT4).ok(), Some(node.ipv4().into()), "{}", node.name);
        assert_eq!(node.who(EXT6).ok(), Some(node.ipv6().into()), "{}", node.name);
        assert_eq!(node.udp_who(EXT4).ok(), Some(node.ipv4().into()), "{}", node.name);
    }
}

#[test]
fn a_masquerade_that_comes_after_egret_changes_nothing() {
    let lab = Lab::scene();
    for name in ["n1", "n2", "g1"] {
        let node = lab.node(name);
        let pod = lab.add_pod(name, "shop", &format!("visitor-{name}"), VISITOR);
        let other = lab.add_pod(name, "office", &format!("other-{name}"), &[]);
        // Both tools, with and without random ports, before and after other rules.
        node.run([
            "iptables",
            "-t",
            "nat",
            "-I",
            "POSTROUTING",
            "1",
            "-s",
            "10.244.0.0/16",
            "-j",
            "MASQUERADE",
            "--random-fully",
        ]);
        node.run(["ip6tables", "-t", "nat", "-I", "POSTROUTING", "1", "-s", "fd00:244::/32", "-j", "MASQUERADE"]);
        node.nft("add table inet late; add chain inet late post { type nat hook postrouting priority 101; }; add rule inet late post masquerade fully-random");
        assert_leaves_by_egress(&pod);
        assert_leaves_by_node(&other);
    }
}

#[test]
fn a_masquerade_that_comes_before_others_changes_nothing() {
    let lab = Lab::scene();
    for node in lab.nodes() {
        // One as kindnet's, and one with a priority that other programs use.
        node.nft(
            "table inet kindnet-ipmasq { chain postrouting { type nat hook postrouting priority srcnat - 10; \
               ip daddr 10.244.0.0/16 return; ip6 daddr fd00:244::/32 return; masquerade; }; }
             table inet other { chain post { type nat hook postrouting priority srcnat - 1; masquerade; }; }",
        );
    }
    for node in ["n1", "n2", "g1", "g2"] {
        assert_leaves_by_egress(&lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
        assert_leaves_by_node(&lab.add_pod(node, "office", &format!("other-{node}"), &[]));
    }
}

/// Packets that the plugin `bandwidth` delays come back past the chain on the pod's veth, and enter the tunnel past
/// the chain there. So only the owner can send them out: docs/limits.md.
#[test]
fn a_bandwidth_limit_does_not_bypass_egret() {
    let lab = Lab::scene();
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    for name in ["n1", "n2", "g1", "g2"] {
        let node = lab.node(name);
        let limit = json!({"type": "bandwidth", "egressRate": 100_000_000, "egressBurst": 100_000_000});
        let own = node.cni_entry();
        let plain = lab.plain_conflist(name);
        for conflist in [plain.clone().with(limit.clone()).with(own.clone()), plain.with(own).with(limit)] {
            node.set_conflist(conflist);
            let pod = lab.add_pod(name, "shop", "visitor", VISITOR);
            let other = lab.add_pod(name, "office", "other", &[]);
            lab.forget_wire();
            lab.wait_seen_as(&pod, EGRESS4);
            assert_leaves_by_egress(&pod);
            lab.assert_nothing_leaked();
            lab.forget_wire();
            if node.spec.pods == Pods::Routed {
                let forged = Ipv4Addr::from(u32::from(pod.ipv4()) + 99);
                pod.send_as(forged.into(), EXT4.into());
                std::thread::sleep(Duration::from_millis(50));
            }
            lab.assert_nothing_arrives();
            assert_eq!(pod.who(inside.ipv4()).ok(), Some(pod.ipv4().into()), "{name}");
            assert_eq!(pod.who(inside.ipv6()).ok(), Some(pod.ipv6().into()), "{name}");
            assert_leaves_by_node(&other);
            pod.delete();
            other.delete();
        }
    }
}

#[test]
fn services_of_a_gateway_node_cannot_be_reached_by_its_egress_ip() {
    let lab = Lab::scene();
    let _servers: Vec<_> = lab.nodes().iter().map(|n| Server::start(n)).collect();
    // A server on the node must not be reachable from outside by the egress IP, because nothing there was requested.
    assert!(lab.host("ext").who(EGRESS4).is_err());
}

#[test]
fn the_marks_can_use_other_bits() {
    let lab = Lab::builder().node_arguments(&["--mark-shift", "16", "--connection-mark", "0x0048"]).scene();
    for node in ["n1", "n2", "g1", "g2"] {
        assert_leaves_by_egress(&lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
        assert_leaves_by_node(&lab.add_pod(node, "shop", &format!("other-{node}"), &[("app", "other")]));
        let rules = lab.node(node).ip("rule");
        assert!(rules.contains("fwmark 0x4000000/0x6000000"), "{rules}");
    }
}

/// The new daemon does not know their marks. Without an allocation they would leave with the pods' own addresses.
#[test]
fn connections_are_classified_anew_when_the_marks_change() {
    let lab = Lab::scene();
    let pods = ["n1", "n2", "g1", "g2"].map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
    let socket = |pod: &lab::Pod, server: IpAddr| pod.udp_socket((server, server::UDP_WHO).into()).expect("a socket");
    let sockets = pods.each_ref().map(|pod| lab::SERVERS.map(|server| socket(pod, server)));
    let seen = || sockets.each_ref().map(|of| of.each_ref().map(|socket| udp_who_by(socket).ok()));
    let egress = [lab::SERVERS.map(|server| Some(lab::scene::egress_towards(server))); 4];
    assert_eq!(seen(), egress);
    lab.forget_wire();
    for node in lab.nodes() {
        lab.daemon(&node.name).kill9();
        let arguments = lab.node_daemon_arguments(&node.name).into_iter();
        let other = ["--mark-shift", "16", "--connection-mark", "0x0048"].map(str::to_owned);
        lab.start_daemon(&node.name, node, arguments.chain(other).collect());
        lab.wait_ready(&node.name);
    }
    assert_eq!(seen(), egress);
    lab.assert_nothing_leaked();
}

#[test]
fn no_policy_covers_destinations_that_the_user_declares_direct() {
    let lab = Lab::builder().node_arguments(&["--direct", "192.0.2.100/32,2001:db8::100/128"]).build();
    lab.write_manifest("gateway.yaml", &lab::manifests::gateway("default", &["192.0.2.50", "2001:db8::50"]));
    lab.write_manifest("policy.yaml", &lab::scene::visitors());
    lab.start();
    assert_leaves_by_node(&lab.add_pod("n1", "shop", "visitor", VISITOR));
    assert_leaves_by_node(&lab.add_pod("n2", "shop", "visitor-2", VISITOR));
}
