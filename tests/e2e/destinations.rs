//! Which destinations a policy covers: networks, exceptions, ports and protocols. Needs root.

use lab::scene::{assert_leaves_by_egress, egress_towards, visitors};
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, FAR4, FAR6, Lab, Pod, SERVERS, Server, VISITOR, manifests};
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

#[test]
fn destinations_exceptions_ports_and_priorities_decide_between_policies() {
    let lab = Lab::builder().router().scene();
    let far = lab.host("far");
    far.ip("addr add 203.0.113.7/24 dev eth0");
    lab.server("far").lock().expect("a lock").also_tell_on(far, 5060);
    lab.server("far").lock().expect("a lock").also_tell_on(far, 5071);
    lab.server("ext").lock().expect("a lock").also_tell_on(lab.host("ext"), 5060);
    let of = |name: &str, last: u8, rest: &str| {
        manifests::policy("shop", name, &format!("podSelector: {{}}\n  address: {{ ipv4: 192.0.2.{last} }}\n  {rest}"))
    };
    lab.write_manifest(
        "more.yaml",
        &[
            of(
                "far",
                51,
                "egress: [{ to: [{ ipBlock: { cidr: 203.0.113.0/24, except: [203.0.113.7/32] } }] }]\n  priority: 10",
            ),
            of("voice", 52, "egress: [{ ports: [{ protocol: UDP, port: 5060, endPort: 5070 }] }]\n  priority: 20"),
            of("never", 53, "egress: [{ to: [{ ipBlock: { cidr: 203.0.113.0/24 } }] }]\n  priority: -1"),
        ]
        .concat(),
    );
    let excepted = IpAddr::from([203, 0, 113, 7]);
    for node in ["n1", "n2", "g1"] {
        let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        lab.wait_for("the first policy's address", &Some(IpAddr::from([192, 0, 2, 51])), || pod.who(FAR4).ok());
        let expect = |found: std::io::Result<IpAddr>, last: u8, what: &str| {
            assert_eq!(found.ok(), Some(IpAddr::from([192, 0, 2, last])), "{what}, from {node}");
        };
        expect(pod.who(EXT4), 50, "elsewhere");
        expect(pod.who(excepted), 50, "the excepted address");
        expect(pod.udp_who_at(SocketAddr::new(FAR4.into(), 5060)), 52, "the port's policy");
        expect(pod.udp_who_at(SocketAddr::new(EXT4.into(), 5060)), 52, "the port's policy, elsewhere");
        expect(pod.udp_who_at(SocketAddr::new(FAR4.into(), 5071)), 51, "a port beyond the range");
        expect(pod.who_at(SocketAddr::new(FAR4.into(), 5060)), 51, "the same port of another protocol");
        assert_eq!(pod.who(FAR6).ok(), Some(EGRESS6.into()), "the family that the narrower policies do not cover");
    }
    assert!(
        !lab.wire().iter().any(|s| s.from == IpAddr::from([192, 0, 2, 53])),
        "a shadowed policy's address was used"
    );
}

#[test]
fn an_api_server_outside_of_the_nodes_is_inside_the_cluster() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let slice = |name: &str, service: &str, address: IpAddr| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  namespace: default\n  labels: \
             {{ kubernetes.io/service-name: {service} }}\naddressType: IPv4\nendpoints: [{{ addresses: [\"{address}\"] }}]\n---\n"
        )
    };
    // As `kubectl get -o yaml` writes it: the kind is the last field but one.
    let endpoints = "subsets: [{ addresses: [{ ip: 192.0.2.3 }] }]\nmetadata: { name: kubernetes, namespace: default }\nkind: \
                     Endpoints\napiVersion: v1\n";
    lab.write_manifest("other.yaml", &slice("other", "database", EXT4.into()));
    lab.write_manifest("api.yaml", endpoints);
    lab.wait_until("the API server is direct", Duration::from_secs(5), || {
        why(&lab, "192.0.2.3").contains("goes direct")
    });
    assert_leaves_by_egress(&pod);
    lab.write_manifest("api.yaml", &slice("kubernetes", "kubernetes", EXT4.into()));
    lab.wait_for("its node's address", &Some(IpAddr::from(lab.node("n1").ipv4())), || pod.who(EXT4).ok());
    assert_eq!(pod.who(EXT6).ok(), Some(EGRESS6.into()));
    lab.remove_manifest("api.yaml");
    lab.wait_seen_as(&pod, EGRESS4);
}

fn why(lab: &Lab, to: &str) -> String {
    let source = format!("dir:{}", lab.manifests().path().display());
    lab.node("n1").run([env!("CARGO_BIN_EXE_egretd"), "why", "shop/visitor", "--to", to, "--cluster", &source])
}

#[test]
fn a_destination_that_no_policy_covers_is_not_affected() {
    let lab = Lab::builder().router().scene();
    lab.write_manifest("policy.yaml", &(visitors() + "  egress: [{ to: [{ ipBlock: { cidr: 203.0.113.0/24 } }] }]\n"));
    for node in ["n1", "n2", "g1"] {
        let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        lab.wait_for("the covered destination's source", &Some(EGRESS4.into()), || pod.who(FAR4).ok());
        lab.wait_for("the other destination's source", &Some(IpAddr::from(pod.node.ipv4())), || pod.who(EXT4).ok());
        assert_eq!(pod.who(EXT6).ok(), Some(pod.node.ipv6().into()));
    }
}

/// SCTP's protocol number, and the port of Diameter (RFC 6733).
const SCTP: u8 = 132;
const DIAMETER: u16 = 3868;

/// An association's first packet: a common header and an INIT chunk, RFC 9260, sections 3.1 and 3.3.2.
fn sctp_init(from: u16, to: u16) -> Vec<u8> {
    let mut packet = [from.to_be_bytes(), to.to_be_bytes()].concat();
    packet.extend([0; 4]);
    packet.extend([0; 4]);
    packet.extend([1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    let checksum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&checksum);
    packet
}

/// RFC 9260, appendix A. With a wrong checksum, connection tracking treats the packet as damaged.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

/// Sends SCTP packets from the pod, each from a port of its own. Returns the source addresses that the server sees.
fn sctp_seen_from(lab: &Lab, pod: &Pod, from: u16, server: SocketAddr) -> BTreeSet<IpAddr> {
    let file = lab.directory().join("packet");
    fs::write(&file, sctp_init(from, server.port())).expect("write a packet");
    lab.forget_wire();
    let to = match server.ip() {
        IpAddr::V4(ip) => format!("IP4-SENDTO:{ip}:{SCTP}"),
        IpAddr::V6(ip) => format!("IP6-SENDTO:[{ip}]:{SCTP}"),
    };
    pod.run(["socat", "-u", &format!("OPEN:{}", file.display()), &to]);
    let sctp = [SCTP.to_string(), "sctp".to_owned()];
    let wire = lab.wire().into_iter().filter(|seen| seen.to == server.ip() && sctp.contains(&seen.protocol));
    wire.map(|seen| seen.from).collect()
}

#[test]
fn a_policy_for_an_sctp_port_covers_this_port_only() {
    let lab = Lab::scene();
    let port = format!("  egress: [{{ ports: [{{ protocol: SCTP, port: {DIAMETER} }}] }}]\n");
    lab.write_manifest("policy.yaml", &(visitors() + &port));
    let mut from = 5_000;
    for node in ["n1", "n2", "g1", "g2"] {
        let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        for server in SERVERS {
            let own: IpAddr = if server.is_ipv4() { pod.node.ipv4().into() } else { pod.node.ipv6().into() };
            let mut seen = |port| {
                from += 1;
                sctp_seen_from(&lab, &pod, from, (server, port).into())
            };
            lab.wait_for("what is not covered to leave from the node", &Some(own), || pod.who(server).ok());
            assert_eq!(seen(DIAMETER), [egress_towards(server)].into(), "{node}, the policy's port");
            assert_eq!(seen(DIAMETER + 1), [own].into(), "{node}, another port");
            assert_eq!(pod.who(server).ok(), Some(own), "{node}, another protocol");
        }
    }
}

/// The nodes' pod networks are adjacent and form one range in the kernel, which is split and joined again.
#[test]
fn a_removed_node_that_returns_interrupts_nothing() {
    let lab = Lab::scene();
    let n2 = lab.node("n2");
    let direct = || lab.node("n1").nft("list set inet egret direct4");
    let errors = |node: &str| lab.metrics(node).get("egret_node_apply_errors_total", &[]);
    let others = ["n1", "g1", "g2"];
    for round in 0..3 {
        lab.remove_manifest("node-n2.yaml");
        lab.wait_until("n1 knows that n2 is gone", Duration::from_secs(5), || direct().contains("10.244.1.0/24"));
        let pod = lab.add_pod("n1", "shop", &format!("without-{round}"), VISITOR);
        assert_leaves_by_egress(&pod);
        assert_eq!(pod.who(EXT4).ok(), Some(EGRESS4.into()));
        lab.manifests().write_object("node-n2.yaml", &manifests::node(n2));
        lab.wait_until("n1 knows that n2 is back", Duration::from_secs(5), || !direct().contains("10.244.1.0/24"));
        pod.delete();
        assert_leaves_by_egress(&lab.add_pod("n1", "shop", &format!("with-{round}"), VISITOR));
    }
    assert_eq!(others.map(errors), [Some(0.0); 3]);
    lab.wait_ready("n2");
    let back = lab.add_pod("n2", "shop", "back", VISITOR);
    lab.wait_seen_as(&back, EGRESS4);
}

/// Clusters whose CNI manages addresses itself: no Node has its pods' network.
#[test]
fn pod_networks_that_only_the_user_names_are_direct_and_get_their_replies() {
    let lab = Lab::builder().node_arguments(&["--direct", "10.244.0.0/16,fd00:244::/32"]).build();
    for node in lab.nodes() {
        let mut object = manifests::node(node);
        object["spec"] = serde_json::json!({});
        lab.manifests().write_object(&format!("node-{}.yaml", node.name), &object);
    }
    let lab = lab.with_scene();
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    for node in ["n1", "n2", "g1", "g2"] {
        let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        assert_leaves_by_egress(&pod);
        assert_eq!(pod.who(inside.ipv4()).ok(), Some(pod.ipv4().into()), "from {node}");
        assert_eq!(pod.who(inside.ipv6()).ok(), Some(pod.ipv6().into()), "from {node}");
    }
    // If the kernel filters strictly, the pods' nodes drop replies that come through the CNI's network.
    assert!(!lab.daemon("n1").log().contains("name their networks with --direct"));
}

#[test]
fn unknown_pod_networks_are_logged() {
    let lab = Lab::new();
    for node in lab.nodes() {
        let mut object = manifests::node(node);
        object["spec"] = serde_json::json!({});
        lab.manifests().write_object(&format!("node-{}.yaml", node.name), &object);
    }
    lab.start();
    let log = lab.daemon("n1").log();
    assert_eq!(log.matches("name their networks with --direct").count(), 1, "{log}");
}
