//! The source addresses that servers and pods see. Needs root.

use lab::client::udp_who_by;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node, egress_towards, visitors};
use lab::server::UDP_WHO;
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, Lab, SERVERS, Server, Session, VISITOR, manifests};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

#[test]
fn pods_on_every_kind_of_node_leave_from_the_egress_ip() {
    let lab = Lab::scene();
    for node in lab.nodes() {
        let pod = lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), VISITOR);
        assert_leaves_by_egress(&pod);
        for server in SERVERS {
            pod.ping(server).unwrap_or_else(|e| panic!("{} by ICMP to {server}: {e}", pod.name));
        }
    }
    lab.assert_nothing_leaked();
}

#[test]
fn a_new_pods_first_packet_leaves_from_the_egress_ip() {
    let lab = Lab::scene();
    for round in 0..5 {
        for node in lab.nodes() {
            let pod = lab.add_pod(&node.name, "shop", &format!("visitor-{round}-{}", node.name), VISITOR);
            let server = SERVERS[round % 2];
            let address = pod.udp_who(server).unwrap_or_else(|e| panic!("the first packet on {}: {e}", node.name));
            assert_eq!(address, lab::scene::egress_towards(server));
            pod.delete();
        }
    }
    lab.assert_nothing_leaked();
}

#[test]
fn pods_that_no_policy_selects_are_not_affected() {
    let lab = Lab::scene();
    for node in lab.nodes() {
        let unlabelled = lab.add_pod(&node.name, "shop", &format!("other-{}", node.name), &[("app", "other")]);
        assert_leaves_by_node(&unlabelled);
        let elsewhere = lab.add_pod(&node.name, "office", &format!("visitor-{}", node.name), VISITOR);
        assert_leaves_by_node(&elsewhere);
    }
}

#[test]
fn traffic_inside_the_cluster_is_not_affected() {
    let lab = Lab::scene();
    let to: Vec<_> =
        lab.nodes().iter().map(|n| lab.add_pod(&n.name, "office", &format!("to-{}", n.name), &[])).collect();
    let _servers: Vec<_> = to.iter().map(|p| Server::start(p)).collect();
    let _on_nodes: Vec<_> = lab.nodes().iter().map(|n| Server::start(n)).collect();
    for node in lab.nodes() {
        let pod = lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), VISITOR);
        for other in &to {
            assert_eq!(pod.who(other.ipv4()).ok(), Some(pod.ipv4().into()), "{} to {}", pod.name, other.name);
            assert_eq!(pod.udp_who(other.ipv6()).ok(), Some(pod.ipv6().into()), "{} to {}", pod.name, other.name);
        }
        for other in lab.nodes() {
            assert!(pod.who(other.ipv4()).is_ok(), "{} to node {}", pod.name, other.name);
            assert!(pod.who(other.ipv6()).is_ok(), "{} to node {}", pod.name, other.name);
        }
        let _in_the_pod = Server::start(&pod);
        assert!(node.who(pod.ipv4()).is_ok() && node.who(pod.ipv6()).is_ok(), "{} to its pod", node.name);
    }
    lab.assert_nothing_arrives();
}

#[test]
fn a_pod_may_send_from_the_tunnels_port() {
    let lab = Lab::scene();
    for node in ["n1", "n2", "g1", "g2"] {
        let selected = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        let other = lab.add_pod(node, "office", &format!("other-{node}"), &[]);
        for server in SERVERS {
            let own: IpAddr = if server.is_ipv4() { other.node.ipv4().into() } else { other.node.ipv6().into() };
            for (pod, wanted) in [(&selected, egress_towards(server)), (&other, own)] {
                let who = pod.udp_who_from(7871, (server, UDP_WHO).into());
                assert_eq!(who.ok(), Some(wanted), "{} to {server}", pod.name);
            }
        }
    }
}

#[test]
fn a_cluster_policy_applies_to_the_namespaces_that_it_selects_after_namespaced_policies() {
    let lab = Lab::scene();
    lab.add_namespace("office", &[("team", "sales")]);
    lab.add_namespace("attic", &[("team", "none")]);
    lab.write_manifest(
        "cluster-policy.yaml",
        "apiVersion: egret.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: { name: sales }\nspec:\n  \
         namespaceSelector: { matchLabels: { team: sales } }\n  podSelector: {}\n  address: { ipv4: 192.0.2.54 }\n",
    );
    let pod = lab.add_pod("n1", "office", "clerk", &[]);
    lab.wait_seen_as(&pod, [192, 0, 2, 54]);
    assert_leaves_by_egress(&lab.add_pod("n1", "shop", "visitor", VISITOR));
    assert_leaves_by_node(&lab.add_pod("n1", "attic", "ghost", VISITOR));
    lab.add_namespace("attic", &[("team", "sales")]);
    let pod = lab.add_pod("n2", "attic", "ghost-2", VISITOR);
    lab.wait_seen_as(&pod, [192, 0, 2, 54]);
}

#[test]
fn a_policy_can_select_pods_by_services() {
    let lab = Lab::scene();
    lab.write_manifest(
        "services.yaml",
        &("apiVersion: v1\nkind: Service\nmetadata: { namespace: shop, name: frontend }\nspec:\n  \
           selector: { tier: front }\n  clusterIP: 10.96.0.20\n"
            .to_owned()
            + &manifests::policy("shop", "front", "services: [frontend]\n  address: { ipv4: 192.0.2.55 }")),
    );
    let selected = lab.add_pod("n1", "shop", "front", &[("tier", "front")]);
    let other = lab.add_pod("n1", "shop", "back", &[("tier", "back")]);
    lab.wait_seen_as(&selected, [192, 0, 2, 55]);
    assert_leaves_by_node(&other);
}

#[test]
fn with_fallback_node_address_pods_leave_from_the_node_while_no_gateway_node_holds_the_egress_ip() {
    let lab = Lab::scene();
    lab.write_manifest("policy.yaml", &(visitors() + "  fallback: NodeAddress\n"));
    let nobody =
        manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50"]).replace("\"true\"", "\"no\"");
    let pods = ["n1", "n2", "g1"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    lab.write_manifest("gateway.yaml", &nobody);
    for pod in &pods {
        lab.wait_seen_as(pod, pod.node.ipv4());
        lab.wait_seen_as(pod, pod.node.ipv6());
    }
    assert_leaves_by_node(&lab.add_pod("n2", "shop", "new", VISITOR));
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50"]));
    for pod in &pods {
        lab.wait_seen_as(pod, EGRESS4);
        lab.wait_seen_as(pod, EGRESS6);
    }
}

#[test]
fn labels_addresses_and_policies_change_under_running_pods() {
    let lab = Lab::scene();
    for node in ["n1", "n2", "g1"] {
        let mut pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), &[]);
        assert_leaves_by_node(&pod);
        pod.relabel(VISITOR);
        lab.wait_seen_as(&pod, EGRESS4);
        lab.wait_seen_as(&pod, EGRESS6);
        pod.relabel(&[("app", "other")]);
        lab.wait_seen_as(&pod, pod.node.ipv4());
        lab.wait_seen_as(&pod, pod.node.ipv6());
        pod.relabel(VISITOR);
        lab.wait_seen_as(&pod, EGRESS4);
    }
    let pod = lab.add_pod("n2", "shop", "visitor", VISITOR);
    lab.forget_wire();
    lab.write_manifest(
        "policy.yaml",
        &visitors().replace("192.0.2.50", "192.0.2.57").replace("2001:db8::50", "2001:db8::57"),
    );
    lab.wait_seen_as(&pod, [192, 0, 2, 57]);
    assert!(!lab.sources(EXT4).contains(&pod.node.ipv4().into()), "leaked while the address changed");
    lab.remove_manifest("policy.yaml");
    lab.wait_seen_as(&pod, pod.node.ipv4());
}

#[test]
fn a_new_policy_keeps_connections_and_a_deleted_one_ends_its_own() {
    let lab = Lab::scene();
    let before = lab.add_pod("n1", "office", "before", &[("app", "clerk")]);
    let old = before.session(EXT4).expect("a session");
    lab.write_manifest(
        "office.yaml",
        &manifests::policy("office", "clerks", "podSelector: {}\n  address: { ipv4: 192.0.2.58 }"),
    );
    lab.wait_seen_as(&before, [192, 0, 2, 58]);
    let new = before.session(EXT4).expect("a session");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!old.is_over() && !new.is_over());
    let connections = lab.server("ext").lock().expect("a lock").connections();
    let from: Vec<IpAddr> = connections.iter().map(SocketAddr::ip).collect();
    assert_eq!(from, [IpAddr::from(before.node.ipv4()), IpAddr::from([192, 0, 2, 58])]);

    lab.forget_wire();
    lab.remove_manifest("office.yaml");
    lab.wait_seen_as(&before, before.node.ipv4());
    lab.wait_until("the policy's session is over, or silent", Duration::from_secs(10), || {
        lab.forget_wire();
        std::thread::sleep(Duration::from_millis(300));
        !lab.sources(EXT4).contains(&IpAddr::from([192, 0, 2, 58]))
    });
    let report = old.stop();
    assert!(report.broken.is_none(), "the older session: {report:?}");
    let report = new.stop();
    assert!(report.broken.is_some() || report.longest_silence > Duration::from_millis(300), "{report:?}");
}

#[test]
fn a_policy_that_ends_while_the_daemon_is_away_ends_its_connections() {
    let lab = Lab::scene();
    for node in ["n1", "n2", "g1", "g2"] {
        let [stays, mut leaves] =
            ["stays", "leaves"].map(|name| lab.add_pod(node, "shop", &format!("{name}-{node}"), VISITOR));
        let sessions = [&stays, &leaves].map(|pod| SERVERS.map(|server| pod.session(server).expect("a session")));
        let sockets = SERVERS.map(|server| leaves.udp_socket((server, UDP_WHO).into()).expect("a socket"));
        let seen = || sockets.each_ref().map(|socket| udp_who_by(socket).expect("an answer"));
        assert_eq!(seen(), SERVERS.map(egress_towards), "on {node}");

        let daemon = lab.daemon(node);
        daemon.kill9();
        leaves.relabel(&[("app", "other")]);
        daemon.restart();
        lab.wait_ready(node);
        assert_eq!(seen(), [IpAddr::from(leaves.node.ipv4()), leaves.node.ipv6().into()], "on {node}");
        assert_leaves_by_egress(&stays);
        std::thread::sleep(Duration::from_millis(500));
        let [stay, left] = sessions.map(|of_pod| of_pod.map(Session::stop));
        stay.iter().for_each(|report| assert!(report.broken.is_none(), "on {node}: {report:?}"));
        for report in left {
            assert!(
                report.broken.is_some() || report.longest_silence > Duration::from_millis(400),
                "on {node}: {report:?}"
            );
        }
        stays.delete();
        leaves.delete();
    }
}

/// A pod on the host's network has the node's address, and another pod may have the address of an ended one.
#[test]
fn pods_on_the_hosts_network_and_ended_pods_affect_no_other_pod() {
    let lab = Lab::scene();
    for name in ["n1", "n2", "g1"] {
        let node = lab.node(name);
        let other = lab.add_pod(name, "office", &format!("other-{name}"), &[]);
        let selected = |pod: &str, addresses: &[IpAddr]| manifests::pod(name, "shop", pod, pod, VISITOR, addresses);
        let mut on_host = selected("on-host", &[node.ipv4().into(), node.ipv6().into()]);
        on_host["spec"]["hostNetwork"] = true.into();
        let mut done = selected("done", &other.addresses);
        done["status"]["phase"] = "Succeeded".into();
        let mut failed = selected("failed", &other.addresses);
        failed["status"]["phase"] = "Failed".into();
        for (file, object) in [("on-host.yaml", on_host), ("done.yaml", done), ("failed.yaml", failed)] {
            lab.manifests().write_object(file, &object);
        }
        // The search for veths of selected pods runs after each change; this one comes after them.
        let visitor = lab.add_pod(name, "shop", &format!("visitor-{name}"), VISITOR);
        lab.wait_seen_as(&visitor, EGRESS4);
        let rules = node.ip("rule") + &node.ip("-6 rule");
        assert!(!rules.contains("lookup 7873"), "{name}: {rules}");
        assert_eq!(node.who(EXT4).ok(), Some(node.ipv4().into()), "{name}");
        assert_eq!(node.who(EXT6).ok(), Some(node.ipv6().into()), "{name}");
        assert_leaves_by_node(&other);
    }
}

#[test]
fn a_tunnel_over_ipv6_carries_both_families() {
    let lab = Lab::builder().ipv6_tunnel().scene();
    let pods: Vec<_> = lab
        .nodes()
        .iter()
        .map(|node| lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), VISITOR))
        .collect();
    for again in [false, true] {
        if again {
            for node in lab.nodes() {
                lab.daemon(&node.name).kill9();
                lab.daemon(&node.name).restart();
                lab.wait_ready(&node.name);
            }
        }
        for pod in &pods {
            assert_leaves_by_egress(pod);
            for server in SERVERS {
                pod.ping(server).unwrap_or_else(|e| panic!("{} by ICMP to {server}: {e}", pod.name));
            }
        }
    }
    let between = |a: IpAddr| lab.nodes().iter().any(|n| a == IpAddr::from(n.ipv4()) || a == IpAddr::from(n.ipv6()));
    let tunnel = lab.wire().into_iter().filter(|s| s.protocol == "udp" && between(s.from) && between(s.to));
    let tunnel: Vec<_> = tunnel.collect();
    assert!(!tunnel.is_empty() && tunnel.iter().all(|s| s.from.is_ipv6()), "{tunnel:?}");
}

/// Traffic of a family for which the allocation has no address is blocked. It does not leave by the other family or
/// from the node.
#[test]
fn an_allocation_of_one_family_blocks_the_other() {
    let lab = Lab::scene();
    for (name, own, other) in [("four", EXT4.into(), EXT6.into()), ("six", IpAddr::from(EXT6), IpAddr::from(EXT4))] {
        let address: IpAddr = if own.is_ipv4() { [192, 0, 2, 57].into() } else { "2001:db8::57".parse().expect("one") };
        let field = if own.is_ipv4() { "ipv4" } else { "ipv6" };
        let spec = format!("podSelector: {{}}\n  address: {{ {field}: \"{address}\" }}");
        lab.write_manifest(&format!("{name}.yaml"), &manifests::policy(name, "only", &spec));
        lab.wait_until("the allocation is there", Duration::from_secs(10), || {
            let pod = lab.add_pod("n1", name, "probe", &[]);
            let there = pod.who(own).is_ok_and(|who| who == address);
            pod.delete();
            there
        });
        let blocked =
            || -> f64 { lab.nodes().iter().filter_map(|node| lab.metrics(&node.name).dropped("blocked")).sum() };
        for node in ["n1", "n2", "g1", "g2"] {
            let pod = lab.add_pod(node, name, &format!("pod-{node}"), &[]);
            lab.wait_seen_as(&pod, address);
            let before = blocked();
            lab.forget_wire();
            assert!(pod.udp_who(other).is_err() && pod.who(other).is_err(), "from {node} to {other}");
            assert_eq!(lab.sources(other), [].into(), "from {node} to {other}");
            assert!(blocked() >= before + 2.0, "from {node} to {other}: {before}, {}", blocked());
        }
    }
}

/// Gateway nodes do not know pods' policies, and each packet of a connection extends their entry for it.
#[test]
fn a_socket_continues_from_the_new_egress_ip_when_its_pods_policy_changes() {
    let lab = Lab::scene();
    // Two of four allocations are on the gateway node that has the first one, or one is.
    let addresses = |n: usize| {
        let texts = [format!("192.0.2.{}", 51 + n), format!("2001:db8::{}", 51 + n)];
        texts.map(|text| text.parse::<IpAddr>().expect("an address"))
    };
    let others = ["red", "green", "blue"];
    for (n, name) in others.iter().enumerate() {
        let [v4, v6] = addresses(n);
        let spec =
            format!("podSelector: {{ matchLabels: {{ app: {name} }} }}\n  address: {{ ipv4: {v4}, ipv6: \"{v6}\" }}");
        lab.write_manifest(&format!("{name}.yaml"), &manifests::policy("shop", name, &spec));
    }
    for node in ["n1", "g1", "g2"] {
        // The first allocation stays in use.
        let stays = lab.add_pod(node, "shop", &format!("stays-{node}"), VISITOR);
        let mut changes = lab.add_pod(node, "shop", &format!("changes-{node}"), VISITOR);
        let sockets = SERVERS.map(|server| changes.udp_socket((server, UDP_WHO).into()).expect("a socket"));
        let seen = || sockets.each_ref().map(|socket| udp_who_by(socket).ok());
        assert_eq!(seen(), SERVERS.map(egress_towards).map(Some), "on {node}");
        for (n, name) in others.iter().enumerate() {
            changes.relabel(&[("app", name)]);
            lab.wait_for(&format!("sockets on {node} are {name}"), &addresses(n).map(Some), seen);
            changes.relabel(VISITOR);
            lab.wait_for(&format!("sockets on {node} are as before"), &SERVERS.map(egress_towards).map(Some), seen);
        }
        assert_leaves_by_egress(&stays);
    }
}

/// Nobody answers these packets, so they belong to no established connection that could be kept.
#[test]
fn unanswered_udp_uses_the_egress_ip_when_a_policy_begins() {
    let lab = Lab::scene();
    for node in ["n1", "n2", "g1", "g2"] {
        let mut pod = lab.add_pod(node, "shop", &format!("log-{node}"), &[("app", "other")]);
        let [nobody4, nobody6] = SERVERS.map(|server| pod.udp_socket((server, 9).into()).expect("a socket"));
        let left_from = |address: [IpAddr; 2]| {
            lab.forget_wire();
            for _ in 0..3 {
                // The server's host may answer that the port is closed.
                drop(nobody4.send(b"log"));
                drop(nobody6.send(b"log"));
                std::thread::sleep(Duration::from_millis(20));
            }
            [EXT4.into(), EXT6.into()].map(|server: IpAddr| lab.sources(server)) == address.map(|a| [a].into())
        };
        let own = [pod.node.ipv4().into(), pod.node.ipv6().into()];
        lab.wait_until(&format!("what {node} sends has its own address"), Duration::from_secs(5), || left_from(own));
        pod.relabel(VISITOR);
        let egress = [EGRESS4.into(), EGRESS6.into()];
        lab.wait_until(&format!("what {node} sends has the policy's"), Duration::from_secs(10), || left_from(egress));
    }
}

#[test]
fn pods_that_ran_before_egret_are_adopted() {
    let lab = Lab::new();
    let mut pods = Vec::new();
    for node in lab.nodes() {
        node.set_conflist(lab.plain_conflist(&node.name));
        pods.push(lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), VISITOR));
        pods.push(lab.add_pod(&node.name, "shop", &format!("other-{}", node.name), &[("app", "other")]));
    }
    pods.iter().for_each(assert_leaves_by_node);
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["192.0.2.50", "2001:db8::50"]));
    lab.write_manifest("policy.yaml", &visitors());
    lab.start();
    for pod in &pods {
        if pod.name.starts_with("visitor") {
            lab.wait_seen_as(pod, EGRESS4);
            lab.wait_seen_as(pod, EGRESS6);
            assert_leaves_by_egress(pod);
        } else {
            assert_leaves_by_node(pod);
        }
    }
}

#[test]
fn a_pod_that_the_cluster_does_not_know_yet_is_isolated_until_it_does() {
    let lab = Lab::scene();
    for node in ["n1", "n2", "g1"] {
        let mut pod = lab.sandbox_unknown(node, "shop", &format!("late-{node}"));
        pod.attach().unwrap_or_else(|e| panic!("ADD: {e}"));
        assert_blocked(&pod);
        let object = manifests::pod(node, "shop", &pod.name, &pod.uid, VISITOR, &pod.addresses);
        lab.manifests().write_object(&format!("{}.yaml", pod.name), &object);
        lab.wait_seen_as(&pod, EGRESS4);
    }
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
}

#[test]
fn policies_without_an_address_get_one_and_keep_it() {
    let lab = Lab::scene();
    lab.write_manifest(
        "allocated.yaml",
        &[
            manifests::policy("one", "own", "podSelector: {}"),
            manifests::policy("two", "shared", "podSelector: {}\n  allocate: Shared"),
            manifests::policy("three", "shared", "podSelector: {}\n  allocate: Shared"),
            manifests::policy("four", "node", "podSelector: {}\n  allocate: Node"),
        ]
        .concat(),
    );
    let pods = ["one", "two", "three", "four"].map(|ns| lab.add_pod("n1", ns, "pod", &[]));
    let mut seen = Vec::new();
    for pod in &pods {
        lab.wait_until(&format!("{} has its address", pod.namespace), Duration::from_secs(10), || {
            pod.who(EXT4).is_ok_and(|a| a != IpAddr::from(pod.node.ipv4()))
        });
        seen.push([pod.who(EXT4).expect("IPv4"), pod.who(EXT6).expect("IPv6")]);
    }
    let [own, two, three, node] = seen.try_into().expect("four pods");
    assert_eq!(two, three, "policies that share");
    assert!(own != two && !own.contains(&EGRESS4.into()) && !two.contains(&EGRESS4.into()), "{own:?} {two:?}");
    let gateways = ["g1", "g2"].map(|g| [IpAddr::from(lab.node(g).ipv4()), lab.node(g).ipv6().into()]);
    assert!(gateways.contains(&node), "a gateway node's own address: {node:?}");
    lab.daemon("controller").restart();
    lab.wait_ready("controller");
    for (pod, before) in pods.iter().zip([own, two, three, node]) {
        assert_eq!([pod.who(EXT4).expect("IPv4"), pod.who(EXT6).expect("IPv6")], before, "{}", pod.namespace);
    }
}
