//! Uplinks that are a VLAN or a bond, or that are in a VRF.

use crate::uninstall::uninstalled;
use lab::own_uplinks::{
    Kind, OUTSIDE, OwnUplinks, VRF, behind_router, both, holders, next_hop, scene_of, set_gateway, vlan,
};
use lab::server::WHO;
use lab::survival::{assert_live, sessions_with};
use lab::{Host, Lab, Pod, machine};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

fn scene(kind: Kind) -> (Lab, OwnUplinks, Vec<Pod>) {
    let lab = Lab::new();
    let uplinks = scene_of(&lab, kind);
    let pods = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), &[])).into();
    lab.wait_until("one node holds it", PATIENCE, || holders(&lab).len() == 1);
    (lab, uplinks, pods)
}

/// Each pod leaves from the egress IP in both families, by UDP, TCP and ICMP.
#[track_caller]
fn served<'a>(lab: &Lab, pods: impl IntoIterator<Item = &'a Pod>) {
    for pod in pods {
        for (server, egress) in both() {
            let what = format!("{server} to see {} on {}", pod.name, pod.node.name);
            lab.wait_for(&what, &Some(egress), || pod.udp_who(server).ok());
            assert_eq!(pod.who(server).ok(), Some(egress), "{what}");
            pod.ping(server).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
}

/// The owner's uplink dies: the other gateway node serves all pods.
fn moves_when_the_uplink_dies(lab: &Lab, uplinks: &OwnUplinks, pods: &[Pod]) {
    let owner = holders(lab).remove(0);
    let other = if owner == "g1" { "g2" } else { "g1" };
    uplinks.host.ip(&format!("link set p-{owner} down"));
    lab.wait_for("the egress IP is on", &vec![other.to_owned()], || holders(lab));
    served(lab, pods);
    uplinks.host.ip(&format!("link set p-{owner} up"));
    thread::sleep(Duration::from_secs(2));
    assert_eq!(holders(lab), [other]);
    served(lab, pods);
}

#[test]
#[ignore = "needs CONFIG_VLAN_8021Q: make vm-test"]
fn egress_ips_are_on_a_vlan() {
    let (lab, uplinks, pods) = scene(Kind::Vlan);
    served(&lab, &pods);
    moves_when_the_uplink_dies(&lab, &uplinks, &pods);
}

/// The names of a node's VLAN interfaces.
fn vlans(lab: &Lab, node: &str) -> Vec<String> {
    let all = lab.node(node).ip("-o link show type vlan");
    let name = |line: &str| Some(line.split_once(": ")?.1.split_once('@')?.0.to_owned());
    all.lines().filter_map(name).collect()
}

/// The name of the interface that Egret makes for a VLAN on `eth1`.
fn own_name(lab: &Lab, node: &str, id: u16) -> String {
    let line = lab.node(node).ip("-o link show eth1");
    format!("egret{}.{id}", line.split_once(':').expect("an index").0)
}

#[test]
#[ignore = "needs CONFIG_VLAN_8021Q: make vm-test"]
fn egret_makes_the_interface_of_a_vlan_and_removes_it() {
    let (lab, uplinks, pods) = scene(Kind::OwnVlan);
    served(&lab, &pods);
    let of_100 = |node| vec![own_name(&lab, node, 100)];
    assert_eq!(["g1", "g2", "n1"].map(|node| vlans(&lab, node)), [of_100("g1"), of_100("g2"), vec![]]);
    moves_when_the_uplink_dies(&lab, &uplinks, &pods);

    // Somebody removes it from the owner. It comes back, and whoever then has the egress IP serves.
    let owner = holders(&lab).remove(0);
    lab.node(&owner).ip(&format!("link del {}", own_name(&lab, &owner, 100)));
    lab.wait_for(&format!("interfaces of VLANs on {owner}:"), &of_100(&owner), || vlans(&lab, &owner));
    served(&lab, &pods);
    let sessions = sessions_with(&pods, both().map(|(server, _)| server));
    for node in ["g1", "g2"] {
        lab.daemon(node).kill9();
        lab.daemon(node).restart();
    }
    lab.wait_ready("g1");
    lab.wait_ready("g2");
    assert_live("daemons were killed and started again", sessions);

    // Another VLAN, of which one node has an interface already. That one stays the host's.
    let hosts = "blue200";
    lab.node("g1").ip_batch(&[format!("link add {hosts} link eth1 type vlan id 200"), format!("link set {hosts} up")]);
    // No route of the main table leads by it, and the host looks after its own interfaces.
    lab.node("g1").sysctl(&[&format!("net.ipv4.conf.{hosts}.rp_filter=2")]);
    for node in ["g1", "g2"] {
        uplinks.host.ip_batch(&[
            format!("link add p-{node}.200 link p-{node} type vlan id 200"),
            format!("link set p-{node}.200 master br0 up"),
            format!("link del p-{node}.100"),
        ]);
    }
    set_gateway(&lab, &vlan(200));
    lab.wait_for("interfaces of VLANs on g1:", &vec![hosts.to_owned()], || vlans(&lab, "g1"));
    lab.wait_for("interfaces of VLANs on g2:", &vec![own_name(&lab, "g2", 200)], || vlans(&lab, "g2"));
    served(&lab, &pods);
    moves_when_the_uplink_dies(&lab, &uplinks, &pods);

    // No more VLAN. The network is without a tag now.
    for node in ["g1", "g2"] {
        uplinks.host.ip(&format!("link set p-{node} master br0"));
        lab.node(node).sysctl(&["net.ipv4.conf.eth1.rp_filter=2"]);
    }
    set_gateway(&lab, &format!("  interface: eth1\n{}", next_hop()));
    lab.wait_for("interfaces of VLANs on g2:", &vec![], || vlans(&lab, "g2"));
    assert_eq!(vlans(&lab, "g1"), [hosts]);
    served(&lab, &pods);

    // An uninstallation removes an own interface, and the host's stays.
    set_gateway(&lab, &vlan(100));
    lab.wait_for("interfaces of VLANs on g2:", &of_100("g2"), || vlans(&lab, "g2"));
    lab.wait_until("g1 has both", PATIENCE, || vlans(&lab, "g1").len() == 2);
    for node in ["g1", "g2"] {
        lab.daemon(node).kill9();
    }
    // Also one whose parent somebody has moved into a pod.
    let own = of_100("g2");
    lab.node("g2").ip(&format!("link set eth1 netns {}", pods[0].netns));
    assert_eq!(vlans(&lab, "g2"), own);
    for node in ["g1", "g2"] {
        uninstalled(lab.node(node), &[]);
    }
    assert_eq!(["g1", "g2"].map(|node| vlans(&lab, node)), [vec![hosts.to_owned()], vec![]]);
}

#[test]
#[ignore = "needs CONFIG_BONDING: make vm-test"]
fn egress_ips_are_on_a_bond_and_stay_there_when_one_of_its_links_dies() {
    let (lab, uplinks, pods) = scene(Kind::Bond);
    served(&lab, &pods);
    let owner = holders(&lab).remove(0);
    uplinks.host.ip(&format!("link set p-{owner} down"));
    thread::sleep(Duration::from_secs(2));
    assert_eq!(holders(&lab), [owner.as_str()]);
    served(&lab, &pods);
    uplinks.host.ip(&format!("link set q-{owner} down"));
    lab.wait_until("the other one holds it", PATIENCE, || holders(&lab).first().is_some_and(|node| *node != owner));
    served(&lab, &pods);
}

/// The server behind the router sees the egress IP, and its ICMP error about a pod's packet comes back to the pod.
#[track_caller]
fn reaches(pod: &Pod, (server, egress): (IpAddr, IpAddr)) {
    let what = format!("{} on {} to {server}", pod.name, pod.node.name);
    assert_eq!(pod.who(server).ok(), Some(egress), "{what}");
    pod.ping(server).unwrap_or_else(|e| panic!("{what}: {e}"));
    let socket = pod.udp_socket(SocketAddr::new(server, 9)).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout");
    socket.send(b"?").expect("sent");
    let got = machine::receive(&socket, &mut [0; 8]).map_err(|e| e.kind());
    assert_eq!(got, Err(ErrorKind::ConnectionRefused), "{what}");
}

/// A host in the VRF does not reach a pod of a node in it, though the node has routing rules for such pods.
fn does_not_reach(host: &Host, pod: &Pod) {
    let port = 5555;
    let socket = pod.within(|| UdpSocket::bind((pod.ipv4(), port))).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
    host.ip(&format!("route add {}/32 via 198.51.100.{}", pod.ipv4(), pod.node.spec.last));
    host.within(|| {
        let sender = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        assert_eq!(sender.send_to(b"x", (pod.ipv4(), port)).expect("sent"), 1);
    });
    let got = machine::receive(&socket, &mut [0; 8]).map_err(|e| e.kind());
    assert_eq!(got, Err(ErrorKind::WouldBlock), "{} on {}", pod.name, pod.node.name);
}

/// Whether a node has the rule for what comes back by a VRF, of both families.
fn has_rule(lab: &Lab, node: &str) -> [bool; 2] {
    ["-4", "-6"]
        .map(|family| lab.node(node).ip(&format!("{family} rule")).contains("lookup main suppress_prefixlength 0"))
}

#[test]
#[ignore = "needs CONFIG_NET_VRF: make vm-test"]
fn egress_ips_are_on_an_interface_in_a_vrf() {
    let (lab, uplinks, pods) = scene(Kind::Vrf);
    served(&lab, &pods);
    let behind_router = || pods.iter().for_each(|pod| behind_router().into_iter().for_each(|to| reaches(pod, to)));
    behind_router();
    pods.iter().filter(|pod| pod.node.spec.gateway).for_each(|pod| does_not_reach(&uplinks.host, pod));
    let sessions = sessions_with(&pods, both().map(|(server, _)| server));
    moves_when_the_uplink_dies(&lab, &uplinks, &pods);
    behind_router();
    assert_live("the other gateway node in the VRF took over", sessions);

    // Only where an uplink is in a VRF there is one more routing rule.
    assert_eq!(["n1", "g1", "g2"].map(|node| has_rule(&lab, node)), [[false; 2], [true; 2], [true; 2]]);
    lab.node("g1").ip("link set eth1 nomaster");
    lab.wait_for("rules on g1, out of the VRF", &[false; 2], || has_rule(&lab, "g1"));
    lab.node("g1").ip(&format!("link set eth1 master {VRF}"));
    lab.wait_for("rules on g1, in the VRF", &[true; 2], || has_rule(&lab, "g1"));
}

#[test]
#[ignore = "needs CONFIG_NET_VRF: make vm-test"]
fn probes_and_pings_come_back_by_a_vrf_and_what_cannot_work_there_is_said() {
    let (lab, uplinks, pods) = scene(Kind::Vrf);
    let probes = format!("  probes: [{{ tcp: \"{}:{WHO}\" }}, {{ icmp: \"{}\" }}]\n", OUTSIDE.0, OUTSIDE.1);
    let works = format!("  interface: eth1\n{}{probes}  answerPing: true\n", next_hop());
    set_gateway(&lab, &works);
    let succeeds = |node, family| {
        let labels = [("gateway", "default"), ("family", family), ("state", "succeeds")];
        lab.metrics(node).get("egret_node_probed_uplinks", &labels) == Some(1.0)
    };
    for (node, family) in [("g1", "ipv4"), ("g1", "ipv6"), ("g2", "ipv4"), ("g2", "ipv6")] {
        lab.wait_until(&format!("{node}'s probes by {family} succeed"), PATIENCE, || succeeds(node, family));
    }
    let answered = || both().map(|(_, egress)| uplinks.host.ping(egress).is_ok());
    lab.wait_for("answers to ping:", &[true, true], answered);
    served(&lab, &pods);

    let blocked = || pods.iter().all(|pod| both().iter().all(|(server, _)| pod.udp_who(*server).is_err()));
    set_gateway(&lab, "  interface: eth1\n");
    lab.wait_until("it is said that a next hop is missing", PATIENCE, || {
        lab.manifests().statuses().contains("interface eth1 is in a VRF")
    });
    assert!(blocked());
    set_gateway(&lab, &format!("  interface: {VRF}\n{}", next_hop()));
    lab.wait_until("it is said that a VRF is no uplink", PATIENCE, || {
        lab.manifests().statuses().contains("is the device of a VRF")
    });
    assert!(blocked());
    set_gateway(&lab, &works);
    served(&lab, &pods);
}
