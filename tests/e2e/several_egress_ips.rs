//! Policies with several egress IPs: which pod leaves from which, and what happens to one of them alone. Needs root.

use lab::fault_injection::{label, plugged};
use lab::survival::{assert_live, assert_short, sessions};
use lab::{EXT4, EXT6, Lab, Pod, SERVERS, Session, VISITOR, manifests};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::Command;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

/// The visitors' policy with the egress IPs 192.0.2.N and 2001:db8::N, where N are `numbers`.
fn policy(numbers: &[u8], more: &str) -> String {
    let pair = |n: &u8| format!("{{ ipv4: 192.0.2.{n}, ipv6: \"2001:db8::{n}\" }}");
    let pairs: Vec<String> = numbers.iter().map(pair).collect();
    let spec =
        format!("podSelector: {{ matchLabels: {{ app: visitor }} }}\n  addresses: [{}]\n  {more}", pairs.join(", "));
    manifests::policy("shop", "visitors", &spec)
}

fn egress_ips(n: u8) -> [IpAddr; 2] {
    let digits = u16::from_str_radix(&n.to_string(), 16).expect("digits");
    [[192, 0, 2, n].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, digits].into()]
}

/// Which of these egress IPs the servers see, by TCP and UDP, IPv4 and IPv6: always the same one.
#[track_caller]
fn seen_as(pod: &Pod, numbers: &[u8]) -> u8 {
    let found = [EXT4.into(), EXT6.into()].map(|server: IpAddr| {
        let udp = pod.udp_who_patiently(server).unwrap_or_else(|e| panic!("{} by UDP to {server}: {e}", pod.name));
        let tcp = pod.who(server).unwrap_or_else(|e| panic!("{} by TCP to {server}: {e}", pod.name));
        assert_eq!(udp, tcp, "{} to {server}", pod.name);
        tcp
    });
    let number = numbers.iter().find(|n| egress_ips(**n) == found);
    *number.unwrap_or_else(|| panic!("{} leaves from {found:?}", pod.name))
}

/// The scene, with these egress IPs for the visitors' policy instead of its one. They are on their nodes.
fn lab_with(numbers: &[u8], more: &str) -> Lab {
    let lab = Lab::scene();
    lab.write_manifest("policy.yaml", &policy(numbers, more));
    wait_held(&lab, numbers);
    lab
}

/// The gateway nodes that have an egress IP.
fn holders(lab: &Lab, n: u8) -> Vec<String> {
    let has = |name: &&str| lab.node(name).ip("-o addr").contains(&format!(" 192.0.2.{n}/32 "));
    ["g1", "g2"].iter().filter(|name| has(name)).map(|name| (*name).to_owned()).collect()
}

/// Waits until the policy's status says that these egress IPs are held, and no others.
#[track_caller]
fn wait_held(lab: &Lab, numbers: &[u8]) {
    let status = lab.manifests().path().join("status/egresspolicies/shop/visitors.yaml");
    lab.wait_until("the egress IPs are held", PATIENCE, || {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        text.lines().filter(|line| line.trim().starts_with("ready:") && line.contains("True")).count() == numbers.len()
            && numbers.iter().all(|n| text.contains(&format!("ipv4: \"192.0.2.{n}\"\n")))
    });
    lab.forget_wire();
}

/// Panics if a server saw a packet from elsewhere. A node that has just given an address up answers the server's packets
/// by ICMP, as itself.
#[track_caller]
fn assert_only_from(lab: &Lab, numbers: &[u8]) {
    let wire = lab.wire();
    for (family, server) in SERVERS.into_iter().enumerate() {
        let allowed: BTreeSet<IpAddr> = numbers.iter().map(|n| egress_ips(*n)[family]).collect();
        let of_pods = wire.iter().filter(|seen| seen.to == server && !seen.protocol.contains("icmp"));
        let sources: BTreeSet<IpAddr> = of_pods.map(|seen| seen.from).collect();
        assert!(sources.is_subset(&allowed) && !sources.is_empty(), "packets to {server} from {sources:?}");
    }
}

/// Three pods on each node.
fn pods(lab: &Lab) -> Vec<Pod> {
    let places = ["n1", "n2", "g1", "g2"].into_iter().flat_map(|node| [1, 2, 3].map(|n| (node, n)));
    places.map(|(node, n)| lab.add_pod(node, "shop", &format!("visitor-{node}-x{n}"), VISITOR)).collect()
}

fn seen(pods: &[Pod], numbers: &[u8]) -> Vec<u8> {
    pods.iter().map(|pod| seen_as(pod, numbers)).collect()
}

/// Pods with sessions, by the egress IP of the pod.
fn sessions_by(pods: &[Pod], seen: &[u8]) -> BTreeMap<u8, Vec<(String, Session)>> {
    let mut all: BTreeMap<u8, Vec<(String, Session)>> = BTreeMap::new();
    for (pod, number) in pods.iter().zip(seen) {
        all.entry(*number).or_default().extend(sessions(std::slice::from_ref(pod)));
    }
    all
}

#[test]
fn pods_are_divided_among_the_egress_ips_and_an_added_one_takes_its_share_alone() {
    let lab = lab_with(&[51, 52], "");
    let pods = pods(&lab);
    let before = seen(&pods, &[51, 52]);
    assert!(before.contains(&51) && before.contains(&52), "{before:?}");
    assert_eq!(seen(&pods, &[51, 52]), before, "each pod keeps its egress IP");
    assert_only_from(&lab, &[51, 52]);

    let live = sessions_by(&pods, &before);
    lab.write_manifest("policy.yaml", &policy(&[53, 52, 51], ""));
    wait_held(&lab, &[51, 52, 53]);
    lab.wait_until("a pod has the added egress IP", PATIENCE, || seen(&pods, &[51, 52, 53]).contains(&53));
    thread::sleep(Duration::from_secs(1));
    let after = seen(&pods, &[51, 52, 53]);
    for (pod, (was, is)) in pods.iter().zip(before.iter().zip(&after)) {
        assert!(was == is || *is == 53, "{} changed from {was} to {is}", pod.name);
    }
    let all: Vec<_> = live.into_values().flatten().collect();
    assert_short(assert_live("one was added", all), 150);

    // The pods of a removed one change, and their connections on it end. All others go on.
    let mut live = sessions_by(&pods, &after);
    lab.write_manifest("policy.yaml", &policy(&[53, 51], ""));
    lab.wait_until("no pod has the removed egress IP", PATIENCE, || {
        pods.iter().all(|pod| pod.who(EXT4).is_ok_and(|address| address != egress_ips(52)[0]))
    });
    thread::sleep(Duration::from_secs(1));
    let last = seen(&pods, &[53, 51]);
    for (pod, (was, is)) in pods.iter().zip(after.iter().zip(&last)) {
        assert!(was == is || *was == 52, "{} changed from {was} to {is}", pod.name);
    }
    for (name, session) in live.remove(&52).unwrap_or_default() {
        let report = session.stop();
        assert!(report.broken.is_some(), "{name} goes on from an egress IP that its policy does not have: {report:?}");
    }
    let others: Vec<_> = live.into_values().flatten().collect();
    assert_short(assert_live("one was removed", others), 150);
    assert_only_from(&lab, &[51, 52, 53]);
}

#[test]
fn the_first_packet_of_a_pod_and_of_a_daemon_that_was_restarted_is_right() {
    let lab = lab_with(&[51, 52, 53], "");
    let pods = pods(&lab);
    let before = seen(&pods, &[51, 52, 53]);
    for node in ["n1", "g1"] {
        lab.daemon(node).kill9();
        lab.daemon(node).restart();
        lab.wait_ready(node);
    }
    assert_eq!(seen(&pods, &[51, 52, 53]), before);
    // The cluster forgets pods whose containers still run.
    pods.iter().for_each(Pod::forget);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(seen(&pods, &[51, 52, 53]), before);
    assert_only_from(&lab, &[51, 52, 53]);
}

#[test]
fn replicas_of_a_stateful_set_have_the_egress_ips_of_their_ordinals() {
    let numbers = [53, 51, 52];
    let lab = lab_with(&numbers, "spread: Ordinal");
    let nodes = ["n1", "n2", "g1", "g2", "n1"];
    for (ordinal, node) in nodes.into_iter().enumerate() {
        let pod = lab.add_pod(node, "shop", &format!("web-{ordinal}"), VISITOR);
        assert_eq!(seen_as(&pod, &numbers), numbers[ordinal % 3], "web-{ordinal} on {node}");
        // Another pod of the same name has the same.
        pod.delete();
        let again = lab.add_pod("n2", "shop", &format!("web-{ordinal}"), VISITOR);
        assert_eq!(seen_as(&again, &numbers), numbers[ordinal % 3], "web-{ordinal} again");
    }
    let labels = [VISITOR, &[("apps.kubernetes.io/pod-index", "1")]].concat();
    let labelled = lab.add_pod("n1", "shop", "other-0", &labels);
    assert_eq!(seen_as(&labelled, &numbers), 51);
    assert_only_from(&lab, &numbers);
}

#[test]
fn so_many_egress_ips_as_a_policy_asks_for_are_allocated_in_a_lasting_order() {
    let lab = Lab::scene();
    let allocated = |count: u8| {
        let spec =
            format!("podSelector: {{ matchLabels: {{ app: visitor }} }}\n  addressCount: {count}\n  spread: Ordinal");
        lab.write_manifest("policy.yaml", &manifests::policy("shop", "visitors", &spec));
    };
    allocated(3);
    // The policy's own address is in cooldown, and given to it again.
    wait_held(&lab, &[50, 51, 52]);
    let pods = ["n1", "g1", "n2"].into_iter().enumerate();
    let pods: Vec<Pod> = pods.map(|(n, node)| lab.add_pod(node, "shop", &format!("web-{n}"), VISITOR)).collect();
    let all = [50, 51, 52, 53];
    let before = seen(&pods, &all);
    assert_eq!(before.iter().collect::<BTreeSet<_>>().len(), 3, "{before:?}");
    allocated(4);
    wait_held(&lab, &all);
    let fourth = lab.add_pod("g2", "shop", "web-3", VISITOR);
    let last = seen_as(&fourth, &all);
    assert!(!before.contains(&last), "{before:?} and {last}");
    assert_eq!(seen(&pods, &all), before);
    allocated(2);
    lab.wait_until("the third begins again", PATIENCE, || pods[2].who(EXT4).ok() == Some(egress_ips(before[0])[0]));
    lab.wait_until("so does the fourth", PATIENCE, || fourth.who(EXT4).ok() == Some(egress_ips(before[1])[0]));
    assert_eq!(seen(&pods, &all), [before[0], before[1], before[0]]);
    assert_eq!(seen_as(&fourth, &all), before[1]);
    assert_only_from(&lab, &all);
}

#[test]
fn of_two_egress_ips_the_dead_nodes_one_moves_and_the_other_is_not_touched() {
    let lab = lab_with(&[51, 52], "");
    let owners = [51, 52].map(|n| holders(&lab, n));
    let both: BTreeSet<&String> = owners.iter().flatten().collect();
    assert_eq!((owners[0].len(), owners[1].len(), both.len()), (1, 1, 2), "each is on another node: {owners:?}");
    let place = |at: usize| ["n1", "n2"][at % 2];
    let pods: Vec<Pod> = (0..8).map(|n| lab.add_pod(place(n), "shop", &format!("visitor-x{n}"), VISITOR)).collect();
    let before = seen(&pods, &[51, 52]);
    assert!(before.contains(&51) && before.contains(&52), "{before:?}");
    let mut live = sessions_by(&pods, &before);
    let (dead, other) = (&owners[0][0], &owners[1][0]);
    plugged(&lab, dead, false);
    lab.wait_for("the first egress IP is on", &vec![other.clone()], || holders(&lab, 51));
    thread::sleep(Duration::from_secs(2));
    assert_eq!(seen(&pods, &[51, 52]), before, "each pod keeps its egress IP");
    assert_eq!(holders(&lab, 52), [other.as_str()]);
    assert_short(assert_live("of the other node", live.remove(&52).expect("sessions")), 150);
    assert_short(assert_live("of the dead node", live.remove(&51).expect("sessions")), 1500);
    assert_only_from(&lab, &[51, 52]);
}

#[test]
fn connections_are_divided_among_the_egress_ips_and_keep_theirs() {
    let lab = lab_with(&[51, 52], "spread: Connection");
    let pods = ["n1", "g1", "g2"].map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
    let seen = |pod: &Pod, server: IpAddr| -> BTreeSet<IpAddr> {
        (0..24).map(|_| pod.who(server).unwrap_or_else(|e| panic!("{} to {server}: {e}", pod.name))).collect()
    };
    let both = |family: usize| [51, 52].map(|n| egress_ips(n)[family]).into();
    for pod in &pods {
        for (family, server) in SERVERS.into_iter().enumerate() {
            assert_eq!(seen(pod, server), both(family), "{} to {server}", pod.name);
            // The same ports have the same egress IP, also after the connection is forgotten.
            let own = pod.udp_who_from(4242, (server, lab::server::UDP_WHO).into()).expect("an answer");
            pod.node.run(["conntrack", "-D", "-p", "udp", "--sport", "4242"]);
            let again = pod.udp_who_from(4242, (server, lab::server::UDP_WHO).into()).expect("an answer");
            assert_eq!(own, again, "{} to {server}", pod.name);
            pod.ping(server).expect("a reply");
        }
    }
    // The egress IP of a node that dies moves, and no connection ends.
    let live = sessions(&pods[..1]);
    let dead = holders(&lab, 51).remove(0);
    plugged(&lab, &dead, false);
    lab.wait_until("the egress IP moves", PATIENCE, || holders(&lab, 51).iter().any(|holder| *holder != dead));
    thread::sleep(Duration::from_secs(1));
    for (family, server) in SERVERS.into_iter().enumerate() {
        assert_eq!(seen(&pods[0], server), both(family), "to {server}");
    }
    assert_short(assert_live("by connection", live), 1500);
    assert_only_from(&lab, &[51, 52]);
}

#[test]
fn with_fallback_node_address_connections_leave_from_the_node_while_no_egress_ip_is_ready() {
    let lab = lab_with(&[51, 52], "spread: Connection\n  fallback: NodeAddress");
    let pod = lab.add_pod("n1", "shop", "visitor-n1", VISITOR);
    let gateway = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    lab.write_manifest("gateway.yaml", &gateway.replace("\"true\"", "\"no\""));
    lab.wait_seen_as(&pod, pod.node.ipv4());
    lab.wait_seen_as(&pod, pod.node.ipv6());
    lab.write_manifest("gateway.yaml", &gateway);
    wait_held(&lab, &[51, 52]);
    for (family, server) in SERVERS.into_iter().enumerate() {
        let expected = [51, 52].map(|n| egress_ips(n)[family]);
        lab.wait_until("an egress IP again", PATIENCE, || pod.who(server).is_ok_and(|seen| expected.contains(&seen)));
    }
}

#[test]
fn pods_prefer_the_egress_ips_of_their_node_and_zone() {
    let lab = Lab::scene();
    for (node, zone) in [("n1", "a"), ("g1", "a"), ("n2", "b"), ("g2", "b")] {
        label(&lab, node, &[("topology.kubernetes.io/zone", zone)]);
    }
    let numbers = [51, 52, 53, 54];
    lab.write_manifest("policy.yaml", &policy(&numbers, "preference: [SameNode, SameZone]"));
    wait_held(&lab, &numbers);
    let of = |gateway: &str| -> BTreeSet<u8> {
        numbers.into_iter().filter(|n| holders(&lab, *n) == [gateway.to_owned()]).collect()
    };
    let (of_a, of_b) = (of("g1"), of("g2"));
    assert_eq!((of_a.len(), of_b.len()), (2, 2), "{of_a:?} and {of_b:?}");
    let pods = pods(&lab);
    let wanted = |pod: &Pod| if ["n1", "g1"].contains(&pod.node.name.as_str()) { &of_a } else { &of_b };
    for pod in &pods {
        let number = seen_as(pod, &numbers);
        assert!(wanted(pod).contains(&number), "{} on {} has {number}", pod.name, pod.node.name);
    }
    // Without a near one, any other is used.
    plugged(&lab, "g1", false);
    lab.wait_until("all egress IPs are on g2", PATIENCE, || {
        numbers.iter().all(|n| holders(&lab, *n).contains(&"g2".to_owned()))
    });
    thread::sleep(Duration::from_secs(1));
    let others: Vec<&Pod> = pods.iter().filter(|pod| pod.node.name != "g1").collect();
    let used: BTreeSet<u8> = others.iter().map(|pod| seen_as(pod, &numbers)).collect();
    assert!(used.len() > 2, "{used:?}");
    assert_only_from(&lab, &numbers);
}

#[test]
fn why_and_kubectl_egret_name_the_pods_own_egress_ip() {
    let lab = lab_with(&[51, 52], "");
    let pods: Vec<Pod> = (0..6).map(|n| lab.add_pod("n1", "shop", &format!("visitor-x{n}"), VISITOR)).collect();
    let numbers = seen(&pods, &[51, 52]);
    let cluster = format!("dir:{}", lab.manifests().path().display());
    let says = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-egret"));
        let output = command.env_clear().args(arguments).args(["--cluster", &cluster]).output().expect("kubectl-egret");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    for (pod, number) in pods.iter().zip(&numbers) {
        for (server, own) in SERVERS.into_iter().zip(egress_ips(*number)) {
            let said = says(&["why", &pod.name, "-n", "shop", "--to", &server.to_string()]);
            let words = format!("{server} leaves from {own}, egress IP {} of 2 (by the pod's uid)", number - 50);
            assert!(said.contains(&words), "{words:?} is not in {said}");
            let other = egress_ips(if *number == 51 { 52 } else { 51 })[usize::from(server.is_ipv6())].to_string();
            let listed =
                |command: &str, address: &str| says(&[command, address]).contains(&format!("shop/{}", pod.name));
            for command in ["ip", "pods"] {
                assert!(listed(command, &own.to_string()) && !listed(command, &other), "{command} of {}", pod.name);
            }
        }
    }
    let status = says(&["status"]);
    assert!(status.contains("192.0.2.51") && status.contains("192.0.2.52"), "{status}");
}
