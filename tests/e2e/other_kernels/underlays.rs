//! WireGuard below Egret's tunnel, and IPIP between pods' nodes.

use lab::fault_injection::{dies, owner_and_other};
use lab::scene::assert_leaves_by_egress;
use lab::survival::{assert_live, sessions};
use lab::{Host, Lab, Pod, SERVERS, VISITOR};
use std::fs;

const MEGABYTE: usize = 1_000_000;

fn visitors(lab: &Lab) -> Vec<Pod> {
    lab.nodes().iter().map(|n| lab.add_pod(&n.name, "shop", &format!("visitor-{}", n.name), VISITOR)).collect()
}

/// A WireGuard device on each node, `10.99.0.LAST`, with all others as its peers.
fn wireguard(lab: &Lab) {
    let key = |node: &str, kind: &str| lab.directory().join(format!("{node}.{kind}"));
    for node in lab.nodes() {
        let private = node.run(["wg", "genkey"]);
        fs::write(key(&node.name, "private"), &private).expect("write a key");
        fs::write(key(&node.name, "public"), node.feed(["wg", "pubkey"], &private)).expect("write a key");
    }
    for node in lab.nodes() {
        let private = key(&node.name, "private");
        node.ip_batch(&[
            "link add wg0 type wireguard".into(),
            format!("addr add 10.99.0.{}/24 dev wg0", node.spec.last),
            "link set wg0 mtu 1420 up".into(),
        ]);
        node.run(["wg", "set", "wg0", "listen-port", "51820", "private-key", &private.display().to_string()]);
        for peer in lab.nodes().iter().filter(|peer| peer.name != node.name) {
            let public = fs::read_to_string(key(&peer.name, "public")).expect("a key");
            let (allowed, endpoint) = (format!("10.99.0.{}/32", peer.spec.last), format!("{}:51820", peer.ipv4()));
            node.run(["wg", "set", "wg0", "peer", public.trim(), "allowed-ips", &allowed, "endpoint", &endpoint]);
        }
    }
}

/// Counts packets at the fabric to which the condition applies.
fn count(fab: &Host, condition: &str) {
    fab.nft(&format!(
        "table bridge counted {{\n counter those {{ }}\n chain pass {{\n  type filter hook prerouting priority -200;\n  \
         {condition} counter name those\n }}\n}}\n"
    ));
}

fn counted(fab: &Host) -> u64 {
    let text = fab.run(["nft", "list", "counters", "table", "bridge", "counted"]);
    let number = text.split_whitespace().skip_while(|word| *word != "packets").nth(1);
    number.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no counter: {text}"))
}

#[test]
#[ignore = "needs CONFIG_WIREGUARD: make vm-test"]
fn the_tunnel_goes_by_wireguard_with_its_mtu_and_nothing_in_clear() {
    let lab = Lab::builder().tunnel_network("10.99.0.").router().build();
    wireguard(&lab);
    let fab = lab.host("fab");
    count(fab, "ip protocol udp udp dport 7871");
    let lab = lab.with_scene();
    let pods = visitors(&lab);
    for node in lab.nodes() {
        let link = node.ip("-o link show egret");
        assert!(link.contains(" mtu 1370 "), "1420 less 50, although the default route's interface has 1500: {link}");
    }
    for pod in &pods {
        assert_leaves_by_egress(pod);
        for server in SERVERS {
            pod.bulk(server, MEGABYTE).unwrap_or_else(|e| panic!("{} to {server}: {e}", pod.name));
        }
    }
    for node in lab.nodes() {
        let snmp = node.run(["cat", "/proc/self/net/snmp"]);
        let values: Vec<&str> = snmp.lines().filter(|line| line.starts_with("Ip:")).collect();
        let at = values[0].split(' ').position(|name| name == "FragCreates").expect("a column");
        assert_eq!(values[1].split(' ').nth(at), Some("0"), "fragments on {}", node.name);
    }
    let (owner, other) = owner_and_other(&lab);
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    let going_on = sessions(&others);
    let gap = dies(&lab, &owner, &other, &others);
    println!("by WireGuard: answered after {gap:?}");
    assert_live("the owner's death", going_on);
    assert_eq!(counted(lab.host("fab")), 0, "tunnel packets in clear");
    lab.assert_nothing_leaked();
}

/// As Calico's mode IPIP: one device, and routes by way of the other nodes' addresses.
#[test]
#[ignore = "needs CONFIG_NET_IPIP: make vm-test"]
fn pods_leave_from_the_egress_ip_beside_a_network_of_ipip() {
    let lab = Lab::scene();
    for node in lab.nodes() {
        node.ip_batch(&[format!("link add ipip0 type ipip local {} ttl 64", node.ipv4()), "link set ipip0 up".into()]);
        for other in lab.nodes().iter().filter(|other| other.name != node.name) {
            node.ip(&format!("route replace {} via {} dev ipip0 onlink", other.pods4(), other.ipv4()));
        }
    }
    count(lab.host("fab"), "ip protocol 4");
    let pods = visitors(&lab);
    lab.assert_carries(&pods);
    assert!(counted(lab.host("fab")) > 0, "nothing went by IPIP");
    let (owner, other) = owner_and_other(&lab);
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    dies(&lab, &owner, &other, &others);
    lab.assert_nothing_leaked();
}
