//! The address of a LoadBalancer Service as the egress IP. The test plays the load balancer: kube-vip, which puts the
//! address onto a node's interface, and MetalLB and Cilium, which answer for it from a node that does not have it. Needs
//! root.

use lab::fault_injection::answered_after;
use lab::survival::assert_short;
use lab::wire::Seen;
use lab::{EXT4, EXT6, Lab, Node, Pod, SERVERS, Server, manifests};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);
/// The addresses of the Service `shop/web`.
const WEB4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);
const WEB6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x200);
/// The labels of its pods.
const WEB: &[(&str, &str)] = &[("app", "web")];
/// The port at which it is reached.
const HTTP: u16 = 80;

/// Where load balancers' addresses are, on whichever node.
fn gateway() -> String {
    let pool = ["192.0.2.192/26", "2001:db8::200-2001:db8::2ff"];
    format!(
        "apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata: {{ name: load-balancers }}\nspec:\n  \
         nodeSelector: {{}}\n  placement: External\n  addresses: {pool:?}\n"
    )
}

fn service(addresses: &[IpAddr], annotations: Value) -> Value {
    let ingress: Vec<Value> = addresses.iter().map(|address| json!({"ip": address})).collect();
    json!({"apiVersion": "v1", "kind": "Service",
           "metadata": {"namespace": "shop", "name": "web", "annotations": annotations},
           "spec": {"type": "LoadBalancer", "selector": {"app": "web"}, "clusterIP": "10.96.0.7",
                    "ports": [{"port": HTTP, "targetPort": 8080, "nodePort": 30080}]},
           "status": {"loadBalancer": {"ingress": ingress}}})
}

fn write_service(lab: &Lab, addresses: &[IpAddr], annotations: Value) {
    lab.manifests().write_object("service.yaml", &service(addresses, annotations));
}

const BOTH: [IpAddr; 2] = [IpAddr::V4(WEB4), IpAddr::V6(WEB6)];

/// A lab with the Service and a policy of its pods.
fn scene() -> Lab {
    let lab = Lab::new();
    lab.write_manifest("gateway.yaml", &gateway());
    write_service(&lab, &BOTH, json!({}));
    let spec = "services: [web]\n  address: { service: { name: web } }";
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "web", spec));
    lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
    lab.start();
    lab
}

/// kube-vip puts the address onto a node, and tells the link.
fn put(lab: &Lab, node: &str) {
    lab.node(node).ip(&format!("addr add {WEB4}/32 dev eth0"));
    lab.node(node).ip(&format!("addr add {WEB6}/128 dev eth0 nodad"));
    lab.host("ext").ip("neigh flush dev eth0");
}

fn take(lab: &Lab, node: &str) {
    lab.node(node).ip(&format!("addr del {WEB4}/32 dev eth0"));
    lab.node(node).ip(&format!("addr del {WEB6}/128 dev eth0"));
}

/// MetalLB or Cilium answers for the address from a node.
fn answer_from(lab: &Lab, node: &str) {
    let mac = lab.node(node).mac("eth0");
    for address in BOTH {
        lab.host("ext").ip(&format!("neigh replace {address} lladdr {mac} dev eth0 nud permanent"));
    }
}

fn wait_seen(lab: &Lab, pods: &[Pod]) {
    for pod in pods {
        lab.wait_seen_as(pod, WEB4);
        lab.wait_seen_as(pod, WEB6);
    }
}

fn assert_blocked(pods: &[Pod]) {
    for pod in pods {
        for server in SERVERS {
            let seen = pod.udp_who(server);
            assert!(seen.is_err(), "{} reached {server}, which saw {seen:?}", pod.name);
        }
    }
}

/// A node without the address that gets packets for it answers by ICMP, from its own address.
fn assert_nothing_leaked(lab: &Lab) {
    for (server, web) in [(IpAddr::V4(EXT4), IpAddr::V4(WEB4)), (EXT6.into(), WEB6.into())] {
        let of_pods = |seen: &Seen| seen.to == server && ["tcp", "udp"].contains(&seen.protocol.as_str());
        let sources: BTreeSet<IpAddr> = lab.wire().into_iter().filter(of_pods).map(|seen| seen.from).collect();
        assert_eq!(sources, [web].into(), "sources of packets to {server}");
    }
}

fn pods(lab: &Lab) -> Vec<Pod> {
    ["n1", "n2", "g1"].map(|node| lab.add_pod(node, "shop", &format!("web-{node}"), WEB)).into()
}

fn why(lab: &Lab, pod: &str) -> String {
    let cluster = format!("dir:{}", lab.manifests().path().display());
    let output = Command::new(lab::places::program("egretd")).args(["why", pod, "--cluster", &cluster]).output();
    String::from_utf8_lossy(&output.expect("egretd").stdout).into_owned()
}

fn wait_why(lab: &Lab, words: &[&str]) {
    let has = || words.iter().all(|words| why(lab, "shop/web-n1").contains(words));
    lab.wait_until(&format!("why says {words:?}"), PATIENCE, has);
}

#[test]
fn pods_leave_from_the_address_of_their_service_by_the_node_that_has_it() {
    let lab = scene();
    let pods = pods(&lab);
    assert_blocked(&pods);
    wait_why(&lab, &["no node announces 192.0.2.200 and 2001:db8::200 of Service shop/web"]);
    put(&lab, "g2");
    wait_seen(&lab, &pods);
    let sessions = SERVERS.map(|server| pods[0].session(server).expect("a session"));
    // kube-vip moves it, to a node that is no gateway node of Egret's own.
    take(&lab, "g2");
    put(&lab, "n2");
    wait_seen(&lab, &pods);
    for session in sessions {
        let report = session.stop();
        assert!(report.broken.is_none() && report.rounds > 0, "{report:?}");
        println!("a held connection: {report:?}");
        assert_short(report.longest_silence, 100);
    }
    take(&lab, "n2");
    lab.wait_until("nobody has it", PATIENCE, || pods.iter().all(|pod| pod.udp_who(EXT4).is_err()));
    wait_why(&lab, &["no node announces"]);
    assert_nothing_leaked(&lab);
}

#[test]
fn the_owner_is_the_node_that_the_load_balancer_names() {
    let lab = scene();
    let pods = pods(&lab);
    let metallb = |node: &str| {
        json!({"apiVersion": "metallb.io/v1beta1", "kind": "ServiceL2Status",
               "metadata": {"namespace": "metallb-system", "name": "l2-x7"},
               "status": {"node": node, "serviceName": "web", "serviceNamespace": "shop",
                          "interfaces": [{"name": "eth0"}]}})
    };
    let cilium = |node: &str| {
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
               "metadata": {"namespace": "kube-system", "name": "cilium-l2announce-shop-web"},
               "spec": {"holderIdentity": node, "leaseDurationSeconds": 15}})
    };
    let names = |load_balancer: &str, node: &str| match load_balancer {
        "Cilium" => lab.manifests().write_object("lease.yaml", &cilium(node)),
        "MetalLB" => lab.manifests().write_object("l2status.yaml", &metallb(node)),
        _ => write_service(&lab, &BOTH, json!({"kube-vip.io/vipHost": node})),
    };
    for load_balancer in ["Cilium", "MetalLB", "kube-vip"] {
        for node in ["g1", "n2"] {
            answer_from(&lab, node);
            names(load_balancer, node);
            let took = answered_after(&pods[0], Instant::now());
            println!("{load_balancer}: {took:?}");
            assert_short(took, 100);
            wait_seen(&lab, &pods);
            wait_why(&lab, &[&format!("node \"{node}\" holds")]);
        }
    }
    // The address is on an interface after all.
    answer_from(&lab, "g2");
    put(&lab, "g2");
    wait_seen(&lab, &pods);
    wait_why(&lab, &["node \"g2\" holds"]);
    assert_nothing_leaked(&lab);
}

/// What kube-proxy does with connections to the Service's address: on each node, also where the pod is not.
fn proxy_to(lab: &Lab, pod: &Pod, local_only: bool) {
    let masquerade = if local_only { "" } else { "meta mark set meta mark | 0x4000 " };
    for node in lab.nodes() {
        node.nft(&format!(
            "add table inet proxy\ndelete table inet proxy\ntable inet proxy {{\n \
             chain in {{ type nat hook prerouting priority dstnat;\n  \
             ip daddr {WEB4} tcp dport {HTTP} {masquerade}dnat ip to {}:8080\n  \
             ip6 daddr {WEB6} tcp dport {HTTP} {masquerade}dnat ip6 to [{}]:8080\n }}\n \
             chain out {{ type nat hook postrouting priority srcnat;\n  meta mark & 0x4000 == 0x4000 masquerade\n }}\n}}\n",
            pod.ipv4(),
            pod.ipv6()
        ));
    }
}

#[test]
fn connections_to_the_service_are_answered_while_its_pods_leave_from_its_address() {
    let lab = scene();
    let pods = pods(&lab);
    put(&lab, "g1");
    wait_seen(&lab, &pods);
    let ext = lab.host("ext");
    for pod in &pods {
        let _server = Server::start(pod);
        let here = pod.node.name == "g1";
        for local_only in [false, true] {
            if local_only && !here {
                continue;
            }
            proxy_to(&lab, pod, local_only);
            for (to, own) in [(IpAddr::V4(WEB4), IpAddr::V4(EXT4)), (WEB6.into(), EXT6.into())] {
                let seen = ext.who_at(SocketAddr::new(to, HTTP));
                assert!(seen.is_ok(), "{} at {to}: {seen:?}", pod.name);
                assert!(!local_only || seen.is_ok_and(|seen| seen == own), "{} at {to} sees the client", pod.name);
            }
        }
        for server in SERVERS {
            let web: IpAddr = if server.is_ipv4() { WEB4.into() } else { WEB6.into() };
            assert_eq!(pod.who(server).ok(), Some(web), "{} leaves", pod.name);
        }
    }
}

#[test]
fn the_status_says_why_a_service_gives_no_address() {
    let lab = scene();
    let pods = pods(&lab);
    put(&lab, "g1");
    wait_seen(&lab, &pods);
    lab.remove_manifest("service.yaml");
    // It selects the pods by the Service, too: none is selected now. By labels they are.
    lab.write_manifest(
        "policy.yaml",
        &manifests::policy("shop", "web", "podSelector: {}\n  address: { service: { name: web } }"),
    );
    wait_why(&lab, &["there is no Service shop/web"]);
    lab.wait_until("the pods are blocked", PATIENCE, || pods.iter().all(|pod| pod.udp_who(EXT4).is_err()));
    // What the tenant writes himself does not count.
    let mut own = service(&[], json!({}));
    own["spec"]["externalIPs"] = json!([WEB4]);
    own["spec"]["loadBalancerIP"] = json!(WEB4);
    lab.manifests().write_object("service.yaml", &own);
    wait_why(&lab, &["Service shop/web has no address of a load balancer"]);
    assert_blocked(&pods);
    write_service(&lab, &["198.51.100.7".parse().expect("an address")], json!({}));
    wait_why(&lab, &["no EgressGateway with placement: External has 198.51.100.7"]);
    write_service(&lab, &BOTH, json!({}));
    wait_seen(&lab, &pods);
}

#[test]
fn a_service_that_has_no_address_for_a_moment_loses_it_to_no_other_namespace() {
    let lab = scene();
    let pods = pods(&lab);
    put(&lab, "g2");
    wait_seen(&lab, &pods);
    write_service(&lab, &[], json!({}));
    lab.wait_until("its pods are blocked", PATIENCE, || {
        pods.iter().all(|pod| SERVERS.iter().all(|server| pod.udp_who(*server).is_err()))
    });
    let named = format!("gateway: load-balancers\n  address: {{ ipv4: {WEB4}, ipv6: \"{WEB6}\" }}");
    lab.add_namespace("other", &[]);
    lab.write_manifest("other.yaml", &manifests::policy("other", "all", &format!("podSelector: {{}}\n  {named}")));
    let status = lab.manifests().path().join("status/egresspolicies/other/all.yaml");
    let says = |words: &str| std::fs::read_to_string(&status).is_ok_and(|text| text.contains(words));
    lab.wait_until("its status says why", PATIENCE, || says("AddressOfService") && says("egret.dev/end-cooldown"));
    // Nodes know the policy by now.
    let others = [lab.add_pod("n1", "other", "pod", &[])];
    assert_blocked(&others);
    assert_blocked(&pods);
    write_service(&lab, &BOTH, json!({}));
    wait_seen(&lab, &pods);
    assert_blocked(&others);
    assert_nothing_leaked(&lab);
}

fn add_ipvs_device(node: &Node) {
    node.ip_batch(&[
        // Not every machine of the tests has dummy devices.
        "link add kube-ipvs0 type bridge".into(),
        format!("addr add {WEB4}/32 dev kube-ipvs0"),
        format!("addr add {WEB6}/128 dev kube-ipvs0 nodad"),
    ]);
}

/// kube-proxy in IPVS mode puts all Services' addresses onto a device of every node.
#[test]
fn an_address_that_every_node_has_for_ipvs_makes_no_owner() {
    let lab = scene();
    lab.nodes().iter().for_each(|node| add_ipvs_device(node));
    let pods = pods(&lab);
    put(&lab, "g2");
    wait_seen(&lab, &pods);
    wait_why(&lab, &["node \"g2\" holds"]);
    assert_nothing_leaked(&lab);
}

#[test]
fn annotations_of_kube_vip_make_a_policy_where_the_administrator_allows_it() {
    let lab = Lab::builder().controller_arguments(&["--kube-vip-annotations"]).build();
    lab.write_manifest("gateway.yaml", &gateway());
    let annotated = |more: Value| {
        let mut all = json!({"kube-vip.io/egress": "true"});
        all.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
        write_service(&lab, &BOTH, all);
    };
    annotated(json!({}));
    lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
    lab.start();
    put(&lab, "g2");
    let pods = pods(&lab);
    let own4 = |pod: &Pod| IpAddr::from(pod.node.ipv4());
    let own6 = |pod: &Pod| IpAddr::from(pod.node.ipv6());
    for pod in &pods {
        lab.wait_seen_as(pod, WEB4);
        lab.wait_seen_as(pod, own6(pod));
    }
    annotated(json!({"kube-vip.io/egress-ipv6": "true"}));
    for pod in &pods {
        lab.wait_seen_as(pod, own4(pod));
        lab.wait_seen_as(pod, WEB6);
    }
    // A fault leaves the last good state as it is, and is named.
    annotated(json!({"kube-vip.io/egress-destination-ports": "udp:many"}));
    lab.wait_until("the fault is named", PATIENCE, || lab.daemon("controller").log().contains("udp:many"));
    lab.wait_seen_as(&pods[0], WEB6);
    annotated(json!({"kube-vip.io/egress-denied-networks": format!("{EXT4}/32")}));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, own4(pod)));
    annotated(json!({"kube-vip.io/egress-allowed-networks": format!("{EXT4}/32,{EXT6}/128")}));
    wait_seen(&lab, &pods);
    write_service(&lab, &BOTH, json!({}));
    for pod in &pods {
        lab.wait_seen_as(pod, own4(pod));
        lab.wait_seen_as(pod, own6(pod));
    }
}
