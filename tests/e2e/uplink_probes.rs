//! Gateways' probes of targets beyond their uplinks: the network breaks behind the link, which stays up. Needs root.

use lab::fault_injection::{assert_stays, holders, owner_and_other, wait_holder};
use lab::scene::assert_leaves_by_egress;
use lab::survival::assert_short;
use lab::{EGRESS4, EGRESS6, FAR4, FAR6, Lab, Pod, Session, VISITOR, manifests, server};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);
const GATEWAYS: [&str; 2] = ["g1", "g2"];

/// Sets the gateway's probes, two a second, and `more` of its spec.
fn set_probes(lab: &Lab, probes: &str, more: &str) {
    let gateway = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    let probes = format!("  probes: {probes}\n  probeIntervalMilliseconds: 500\n{more}");
    lab.write_manifest("gateway.yaml", &(gateway + &probes));
}

/// The scene with a router, these probes, and a pod on each node.
fn scene(probes: &str) -> (Lab, Vec<Pod>) {
    let lab = Lab::builder().router().scene();
    let pods: Vec<Pod> =
        ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR)).into();
    set_probes(&lab, probes, "");
    (lab, pods)
}

/// The state of a node's uplink by the probes of a family.
fn state(lab: &Lab, node: &str, family: &str) -> String {
    let metrics = lab.metrics(node);
    let is = |state: &&str| {
        let labels = [("gateway", "default"), ("family", family), ("state", state)];
        metrics.get("egret_node_probed_uplinks", &labels) == Some(1.0)
    };
    ["unproven", "succeeds", "fails", "lost"].iter().copied().find(is).unwrap_or("none").to_owned()
}

#[track_caller]
fn wait_state(lab: &Lab, node: &str, family: &str, wanted: &str) {
    lab.wait_for(&format!("{node} by {family}"), &wanted.to_owned(), || state(lab, node, family));
}

/// What a node's EgressNode says.
fn says(lab: &Lab, node: &str, text: &str) -> bool {
    let statuses = lab.manifests().statuses();
    let of_node = statuses.split("--- ").find(|part| part.contains(&format!("egressnodes/{node}")));
    of_node.is_some_and(|part| part.contains(text))
}

/// The router drops what these rules match, each without its verdict, and nothing else. No link goes down.
fn drop_at_router(lab: &Lab, rules: &[String]) {
    let rules: String = rules.iter().map(|rule| format!("  {rule} counter drop\n")).collect();
    lab.host("router").nft(&format!(
        "add table inet break\ndelete table inet break\n\
         table inet break {{\n chain pass {{\n  type filter hook forward priority 0;\n{rules} }}\n}}\n"
    ));
}

/// All that a node sends by the router, with whatever address.
fn of_node(lab: &Lab, node: &str, more: &str) -> String {
    let mac = lab.node(node).run(["cat", "/sys/class/net/eth0/address"]);
    format!("ether saddr {} {more}", mac.trim())
}

fn far_sessions(pods: &[Pod]) -> Vec<(String, Session)> {
    let open = |pod: &Pod| {
        [IpAddr::from(FAR4), FAR6.into()].map(|s| (format!("{} to {s}", pod.name), pod.session(s).expect("a session")))
    };
    pods.iter().flat_map(open).collect()
}

#[test]
fn a_node_whose_uplink_leads_nowhere_gives_its_egress_ips_to_one_whose_does_and_sessions_live_on() {
    let (lab, pods) = scene(&format!("[{{ icmp: {FAR4} }}]"));
    let (owner, other) = owner_and_other(&lab);
    GATEWAYS.iter().for_each(|node| wait_state(&lab, node, "ipv4", "succeeds"));
    pods.iter().for_each(assert_leaves_by_egress);
    let sessions = far_sessions(&pods);
    thread::sleep(Duration::from_millis(500));

    let begin = Instant::now();
    drop_at_router(&lab, &[of_node(&lab, &owner, "")]);
    wait_holder(&lab, &other);
    let took = begin.elapsed();
    println!("the egress IP is on the other gateway after {took:?}");
    assert_short(took, 6000);
    for pod in &pods {
        lab.wait_until(&format!("{} reaches the far server", pod.name), PATIENCE, || {
            pod.udp_who(FAR4).ok() == Some(EGRESS4.into()) && pod.udp_who(FAR6).ok() == Some(EGRESS6.into())
        });
    }
    println!("all pods reach the far server after {:?}", begin.elapsed());
    lab.wait_until("the status says why", PATIENCE, || says(&lab, &owner, "gateway: default"));
    assert_eq!((state(&lab, &owner, "ipv4"), state(&lab, &other, "ipv4")), ("lost".into(), "succeeds".into()));

    // A restart neither ends the loss nor moves anything.
    lab.daemon(&owner).restart();
    lab.wait_ready(&owner);
    let restarted = Instant::now();
    while restarted.elapsed() < Duration::from_secs(4) {
        assert!(says(&lab, &owner, "gateway: default"), "after {:?}", restarted.elapsed());
        assert_stays(&lab, &other, Duration::from_millis(200), || ());
    }

    drop_at_router(&lab, &[]);
    wait_state(&lab, &owner, "ipv4", "succeeds");
    lab.wait_until("nothing is lost", PATIENCE, || !says(&lab, &owner, "lost:"));
    assert_stays(&lab, &other, Duration::from_secs(3), || ());
    pods.iter().for_each(assert_leaves_by_egress);
    let longest = lab::survival::assert_live("uplink probes", sessions);
    println!("longest silence of a session: {longest:?}");
    lab.assert_nothing_leaked();
}

#[test]
fn targets_that_no_node_reaches_move_nothing_and_interrupt_nothing() {
    let (lab, pods) = scene(&format!("[{{ icmp: {FAR4} }}, {{ tcp: \"[{FAR6}]:{}\" }}]", server::ECHO));
    let (owner, other) = owner_and_other(&lab);
    for family in ["ipv4", "ipv6"] {
        GATEWAYS.iter().for_each(|node| wait_state(&lab, node, family, "succeeds"));
    }
    pods.iter().for_each(assert_leaves_by_egress);
    let floods: Vec<_> = pods.iter().map(|pod| pod.flood(lab::EXT4, Duration::from_millis(5), false)).collect();
    // Other packets pass: the targets alone do not answer.
    drop_at_router(&lab, &["ip protocol icmp".to_owned(), format!("tcp dport {}", server::ECHO)]);
    for node in GATEWAYS {
        ["ipv4", "ipv6"].iter().for_each(|family| wait_state(&lab, node, family, "fails"));
        lab.wait_until("the status says so", PATIENCE, || says(&lab, node, "failingProbes:"));
    }
    assert_stays(&lab, &owner, Duration::from_secs(5), || ());
    // Nor does a daemon that starts now, on either node.
    for node in [&owner, &other] {
        lab.daemon(node).restart();
        lab.wait_ready(node);
        wait_state(&lab, node, "ipv4", "fails");
    }
    assert_stays(&lab, &owner, Duration::from_secs(3), || ());
    drop_at_router(&lab, &[]);
    for node in GATEWAYS {
        ["ipv4", "ipv6"].iter().for_each(|family| wait_state(&lab, node, family, "succeeds"));
        lab.wait_until("the status says so", PATIENCE, || !says(&lab, node, "failingProbes:"));
        assert!(!says(&lab, node, "lost:"));
    }
    assert_stays(&lab, &owner, Duration::from_secs(3), || ());
    for flood in floods {
        let report = flood.stop();
        println!("{} of {} packets lost", report.lost(), report.sent);
        assert!(report.lost() * 100 < report.sent, "{} of {} packets lost", report.lost(), report.sent);
    }
    lab.assert_nothing_leaked();
}

#[test]
fn a_family_is_lost_alone_and_any_target_of_it_suffices() {
    let probes = format!("[{{ icmp: 203.0.113.99 }}, {{ tcp: \"{FAR4}:{}\" }}, {{ icmp: \"{FAR6}\" }}]", server::ECHO);
    let (lab, pods) = scene(&probes);
    let spec = "podSelector: { matchLabels: { app: plain } }\n  address: { ipv4: 192.0.2.51 }";
    lab.write_manifest("plain.yaml", &manifests::policy("shop", "plain", spec));
    let plain = lab.add_pod("n1", "shop", "plain", &[("app", "plain")]);
    lab.wait_seen_as(&plain, [192, 0, 2, 51]);
    let of_plain = || {
        let has = |node: &&&str| lab.node(node).ip("-o addr").contains(" 192.0.2.51/32 ");
        GATEWAYS.iter().filter(has).map(ToString::to_string).collect::<Vec<_>>()
    };
    let (owner, other) = owner_and_other(&lab);
    for family in ["ipv4", "ipv6"] {
        // 203.0.113.99 answers nobody.
        GATEWAYS.iter().for_each(|node| wait_state(&lab, node, family, "succeeds"));
    }
    let before = of_plain();
    drop_at_router(&lab, &[of_node(&lab, &owner, "ip6 version 6")]);
    let begin = Instant::now();
    lab.wait_for("the pair is on", &vec![other.clone()], || holders(&lab));
    println!("the egress IP is on the other gateway after {:?}", begin.elapsed());
    assert_eq!((state(&lab, &owner, "ipv4"), state(&lab, &owner, "ipv6")), ("succeeds".into(), "lost".into()));
    assert_eq!(of_plain(), before, "an egress IP without IPv6 does not need it");
    for pod in &pods {
        lab.wait_until(&format!("{} reaches the far server", pod.name), PATIENCE, || {
            pod.udp_who(FAR6).ok() == Some(EGRESS6.into())
        });
    }
    drop_at_router(
        &lab,
        &[of_node(&lab, &other, "tcp dport 1-65535 ip version 4"), of_node(&lab, &owner, "ip6 version 6")],
    );
    wait_state(&lab, &other, "ipv4", "lost");
    // Each has lost one family: the pair stays.
    assert_stays(&lab, &other, Duration::from_secs(3), || ());
    lab.wait_for("the egress IP without IPv6 is on", &vec![owner.clone()], of_plain);
}

#[test]
fn random_loss_moves_nothing() {
    let (lab, pods) = scene(&format!("[{{ icmp: {FAR4} }}, {{ tcp: \"[{FAR6}]:{}\" }}]", server::ECHO));
    let (owner, _) = owner_and_other(&lab);
    for family in ["ipv4", "ipv6"] {
        GATEWAYS.iter().for_each(|node| wait_state(&lab, node, family, "succeeds"));
    }
    // In each direction.
    for (percent, seconds) in [(5, 25), (20, 40)] {
        drop_at_router(&lab, &[format!("numgen random mod 100 < {percent}")]);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(seconds) {
            assert_stays(&lab, &owner, Duration::from_millis(300), || ());
            for node in GATEWAYS {
                let states = ["ipv4", "ipv6"].map(|family| state(&lab, node, family));
                assert!(!states.contains(&"lost".to_owned()), "{node}: {states:?} at {percent} % loss");
            }
        }
        let metrics = lab.metrics(&owner);
        let count = |result| metrics.get("egret_node_uplink_probes_total", &[("result", result)]);
        println!("{percent} %: {:?} answered, {:?} not", count("answered"), count("unanswered"));
    }
    let metrics = lab.metrics(&owner);
    assert!(metrics.get("egret_node_uplink_probes_total", &[("result", "unanswered")]) > Some(10.0), "no loss");
    drop_at_router(&lab, &[]);
    pods.iter().for_each(assert_leaves_by_egress);
}

#[test]
fn probes_take_the_gateways_own_next_hop() {
    let lab = Lab::builder().router().scene();
    // By the main table nothing gets beyond the link, though replies may come back by it.
    for node in GATEWAYS {
        for (family, nobody) in [("-4", "192.0.2.254"), ("-6", "2001:db8::fe")] {
            lab.node(node).ip(&format!("{family} route replace default via {nobody} dev eth0"));
        }
    }
    let probes = format!("[{{ icmp: {FAR4} }}, {{ icmp: \"{FAR6}\" }}, {{ tcp: \"{FAR4}:{}\" }}]", server::ECHO);
    set_probes(&lab, &probes, "  nextHop: { ipv4: 192.0.2.1, ipv6: \"2001:db8::1\" }\n");
    for node in GATEWAYS {
        ["ipv4", "ipv6"].iter().for_each(|family| wait_state(&lab, node, family, "succeeds"));
        for target in [format!("icmp {FAR4}"), format!("icmp {FAR6}"), format!("tcp {FAR4}:{}", server::ECHO)] {
            let labels = [("target", &*target), ("result", "answered")];
            let answered = || lab.metrics(node).get("egret_node_uplink_probes_total", &labels) > Some(0.0);
            lab.wait_until(&format!("{target} answers {node}"), Duration::from_secs(10), answered);
        }
    }
    // From the node's own addresses.
    let own = |node: &str| [IpAddr::from(lab.node(node).ipv4()), lab.node(node).ipv6().into()];
    let own: BTreeSet<IpAddr> = GATEWAYS.into_iter().flat_map(own).collect();
    let sources: BTreeSet<IpAddr> =
        [IpAddr::from(FAR4), FAR6.into()].into_iter().flat_map(|to| lab.sources(to)).collect();
    assert_eq!(sources, own);
    set_probes(&lab, &probes, "");
    for node in GATEWAYS {
        ["ipv4", "ipv6"].iter().for_each(|family| wait_state(&lab, node, family, "fails"));
    }
}
