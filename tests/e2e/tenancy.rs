//! Several tenants: who may use which egress IP, and which policy decides. Needs root.

use lab::scene::{assert_blocked, assert_leaves_by_egress};
use lab::{EGRESS4, EXT4, Lab, Pod, VISITOR, manifests};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

/// Whether the allocations use this number of the gateway's ten addresses.
fn in_use(lab: &Lab, count: usize) -> bool {
    lab.manifests().statuses().contains(&format!("IPv4: {count} of 10 in use"))
}

#[test]
fn a_policy_that_is_created_again_under_another_name_gets_its_egress_ip_at_once() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let renamed = lab::scene::visitors().replace("name: visitors", "name: guests");
    let everywhere = "---\napiVersion: egret.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: { name: visitors }\nspec:\n  \
                      podSelector: { matchLabels: { app: visitor } }\n  \
                      address: { ipv4: 192.0.2.50, ipv6: \"2001:db8::50\" }\n";
    for (name, text) in [("shop/guests", renamed.as_str()), ("visitors", everywhere)] {
        let before = lab.egress_id(if name == "visitors" { "shop/guests" } else { "shop/visitors" });
        // GitOps in the other order: the old object is deleted before the new one is created.
        lab.remove_manifest("policy.yaml");
        lab.wait_until("its address is given back", PATIENCE, || in_use(&lab, 0));
        lab.wait_seen_as(&pod, pod.node.ipv4());
        lab.write_manifest("policy.yaml", text);
        lab.wait_until("it is given again", PATIENCE, || in_use(&lab, 1));
        lab.wait_seen_as(&pod, EGRESS4);
        assert_leaves_by_egress(&pod);
        assert_ne!(lab.egress_id(name), before);
    }
}

/// A ClusterEgressPolicy for all traffic of pods of the namespace `shop`, from 192.0.2.51.
fn everybodys(more: &str) -> String {
    format!(
        "---\napiVersion: egret.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {{ name: everybody }}\nspec:\n  \
         namespaceSelector: {{ matchLabels: {{ team: sales }} }}\n  podSelector: {{}}\n  \
         address: {{ ipv4: 192.0.2.51, ipv6: \"2001:db8::51\" }}\n{more}"
    )
}

#[test]
fn a_tenant_cannot_escape_a_clusteregresspolicy() {
    let lab = Lab::scene();
    let everybody: IpAddr = Ipv4Addr::new(192, 0, 2, 51).into();
    lab.write_manifest("cluster.yaml", &everybodys(""));
    // Requests that no gateway can meet: an unknown gateway, and an address that is in no pool.
    for ask in ["gateway: nope", "address: { ipv4: 192.0.2.99 }"] {
        let spec = format!("podSelector: {{}}\n  {ask}\n  fallback: NodeAddress\n  priority: 100");
        lab.write_manifest("policy.yaml", &manifests::policy("shop", "out", &spec));
        let pods = ["n1", "g1"].map(|node| lab.add_pod(node, "shop", &format!("tenant-{node}"), VISITOR));
        for pod in &pods {
            lab.wait_seen_as(pod, everybody);
        }
        lab.wait_until("the policy is rejected", PATIENCE, || {
            lab.manifests().statuses().contains("reason: NotAccepted")
        });
        lab.forget_wire();
        for pod in pods {
            assert_eq!(pod.who(EXT4).ok(), Some(everybody), "{}", pod.name);
            pod.delete();
        }
        assert_eq!(lab.sources(EXT4), [everybody].into());
    }

    // A policy with an egress IP precedes it, also while its gateway nodes are dead: it blocks or falls back, as it
    // says.
    let spec = "podSelector: {}\n  address: { ipv4: 192.0.2.50 }\n  fallback: NodeAddress\n  priority: 2147483647";
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "own", spec));
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.wait_seen_as(&pod, EGRESS4);
    // The administrator's tier precedes every priority.
    lab.write_manifest("cluster.yaml", &everybodys("  tier: Admin\n"));
    lab.wait_seen_as(&pod, everybody);
    lab.write_manifest("cluster.yaml", &everybodys("  tier: Baseline\n"));
    lab.wait_seen_as(&pod, EGRESS4);
}

/// The condition `Accepted` of the EgressPolicy, as text.
fn is_told(lab: &Lab, policy: &str, words: &str) -> bool {
    let path = lab.manifests().path().join(format!("status/egresspolicies/{policy}.yaml"));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    // Long messages are folded.
    text.split_whitespace().collect::<Vec<_>>().join(" ").contains(words)
}

#[test]
fn an_egress_ip_is_shared_across_namespaces_only_if_the_gateway_allows_it() {
    let lab = Lab::scene();
    lab.add_namespace("thief", &[("kubernetes.io/metadata.name", "thief")]);
    let owner = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&owner);
    let own = "podSelector: {}\n  address: { ipv4: 192.0.2.50, ipv6: \"2001:db8::50\" }";
    lab.write_manifest("thief.yaml", &manifests::policy("thief", "mine", own));
    lab.wait_until("the second one is rejected", PATIENCE, || is_told(&lab, "thief/mine", "reason: AddressNotShared"));
    let thief = lab.add_pod("n1", "thief", "pod", &[]);
    lab.forget_wire();
    assert_blocked(&thief);
    assert_leaves_by_egress(&owner);

    let gateway = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    lab.write_manifest("gateway.yaml", &format!("{gateway}  sharing: Cluster\n"));
    lab.wait_seen_as(&thief, EGRESS4);
    assert_leaves_by_egress(&owner);
    lab.wait_until("each is told of the other", PATIENCE, || {
        is_told(&lab, "shop/visitors", "shared with thief/mine")
            && is_told(&lab, "thief/mine", "shared with shop/visitors")
    });

    let reserved = "  sharing: Cluster\n  reservations:\n  - addresses: [192.0.2.50]\n    \
                    namespaceSelector: { matchLabels: { team: sales } }\n";
    lab.write_manifest("gateway.yaml", &format!("{gateway}{reserved}"));
    lab.wait_until("it is reserved", PATIENCE, || is_told(&lab, "thief/mine", "reason: AddressReserved"));
    lab.wait_until("the pod is blocked", PATIENCE, || thief.udp_who(EXT4).is_err());
    assert_blocked(&thief);
    assert_leaves_by_egress(&owner);
}

#[test]
fn an_address_of_the_host_itself_or_of_no_host_is_not_taken() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    // A virtual address of the gateway nodes themselves, as keepalived would place it, and a server that listens
    // there.
    let vip = Ipv4Addr::new(192, 0, 2, 57);
    for gateway in ["g1", "g2"] {
        lab.node(gateway).ip(&format!("addr add {vip}/32 dev eth0"));
    }
    // The port is closed, and the host says so. If Egret dropped packets to the address, nothing would answer.
    let connect = || TcpStream::connect_timeout(&(vip, 9).into(), Duration::from_secs(1));
    let answers = || lab.host("ext").within(connect).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
    assert!(answers());
    for (address, words) in [
        ("192.0.2.57", "192.0.2.57 is this node's own address"),
        ("192.0.2.255", "192.0.2.255 is the broadcast address of this node's network 192.0.2.0/24"),
    ] {
        let gateway = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "192.0.2.255"]);
        lab.write_manifest("gateway.yaml", &gateway);
        let spec = format!("podSelector: {{ matchLabels: {{ app: visitor }} }}\n  address: {{ ipv4: {address} }}");
        lab.write_manifest("policy.yaml", &manifests::policy("shop", "visitors", &spec));
        lab.wait_until("the policy is told", PATIENCE, || is_told(&lab, "shop/visitors", words));
        lab.wait_until("the pod is blocked", PATIENCE, || pod.udp_who(EXT4).is_err());
        assert!(answers(), "what the host has on its own answers as before");
    }
    lab.write_manifest(
        "policy.yaml",
        &manifests::policy("shop", "visitors", "podSelector: {}\n  address: { ipv4: 192.0.2.50 }"),
    );
    lab.wait_seen_as(&pod, EGRESS4);
}

/// Four policies of the namespace `greedy` for all of its pods, each with this number of rules of 25 networks and 100
/// ports.
fn greedy(rules: usize) -> String {
    let ports: String = (0..100).map(|n| format!("{{ protocol: TCP, port: {} }}, ", 1_000 + 2 * n)).collect();
    let rule = |of: usize, n: usize| {
        let cidr = |i| format!("{{ ipBlock: {{ cidr: 11.{of}.{n}.{}/32 }} }}, ", 2 * i);
        let networks: String = (0..25).map(cidr).collect();
        format!("\n  - to: [{networks}]\n    ports: [{ports}]")
    };
    let policy = |of: usize| {
        let rules: String = (0..rules).map(|n| rule(of, n)).collect();
        let spec = format!("podSelector: {{}}\n  priority: {of}\n  egress:{rules}");
        manifests::policy("greedy", &format!("p{of}"), &spec)
    };
    (0..4).map(policy).collect()
}

/// The median time of some ADDs of the pod by egret-cni, each undone before the next.
fn time_of_add(pod: &Pod) -> Duration {
    let add = || {
        pod.egret("DEL", |_| ()).expect("DEL");
        let begin = Instant::now();
        pod.egret("ADD", |_| ()).expect("ADD");
        begin.elapsed()
    };
    let mut times: Vec<Duration> = (0..7).map(|_| add()).collect();
    times.sort_unstable();
    times[3]
}

#[test]
fn a_hundred_thousand_destinations_of_one_tenant_delay_no_other_pod() {
    let _machine = lab::turn::alone();
    let lab = Lab::scene();
    lab.write_manifest("greedy.yaml", &greedy(1));
    let pods: Vec<Pod> = (0..24).map(|n| lab.add_pod("n1", "greedy", &format!("greedy-{n}"), &[])).collect();
    let other = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let elements = || lab.node("n1").nft("list table inet egret").matches(" 11.").count();
    lab.wait_until("its lists are in the kernel", PATIENCE, || elements() >= 100);
    let before = time_of_add(&other);
    lab.write_manifest("greedy.yaml", &greedy(10));
    // One element for each network and port.
    lab.wait_until("its long lists are in the kernel", 6 * PATIENCE, || elements() >= 100_000);
    lab.wait_ready("n1");
    let beside = time_of_add(&other);
    println!("ADD of another tenant's pod: {before:?}, and {beside:?} beside 100,000 destinations");
    assert!(beside < before * 3 + Duration::from_millis(50), "{before:?}, and {beside:?}");
    assert_leaves_by_egress(&other);
    let begin = Instant::now();
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    println!("ready {:?} after a restart", begin.elapsed());
    assert_leaves_by_egress(&other);
    assert!(pods.iter().all(|pod| pod.check().is_ok()));
}
