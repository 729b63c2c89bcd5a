//! Several tenants: whose address is whose, and who decides. Needs root.

use lab::scene::{assert_blocked, assert_leaves_by_egress};
use lab::{EGRESS4, EXT4, Lab, VISITOR, manifests};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// Whether the allocations have so many addresses of the gateway's ten in use.
fn in_use(lab: &Lab, count: usize) -> bool {
    lab.manifests().statuses().contains(&format!("IPv4: {count} of 10 in use"))
}

#[test]
fn a_policy_made_again_under_another_name_has_its_address_at_once() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let renamed = lab::scene::visitors().replace("name: visitors", "name: guests");
    let everywhere = "---\napiVersion: egret.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: { name: visitors }\nspec:\n  \
                      podSelector: { matchLabels: { app: visitor } }\n  \
                      address: { ipv4: 192.0.2.50, ipv6: \"2001:db8::50\" }\n";
    for (name, text) in [("shop/guests", renamed.as_str()), ("visitors", everywhere)] {
        let before = lab.egress_id(if name == "visitors" { "shop/guests" } else { "shop/visitors" });
        // GitOps in the other order: what is old goes before what is new comes.
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

/// A ClusterEgressPolicy for everything that pods of the namespace `shop` send, from 192.0.2.51.
fn everybodys(more: &str) -> String {
    format!(
        "---\napiVersion: egret.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {{ name: everybody }}\nspec:\n  \
         namespaceSelector: {{ matchLabels: {{ team: sales }} }}\n  podSelector: {{}}\n  \
         address: {{ ipv4: 192.0.2.51, ipv6: \"2001:db8::51\" }}\n{more}"
    )
}

#[test]
fn a_tenant_does_not_get_out_of_a_clusteregresspolicy() {
    let lab = Lab::scene();
    let everybody: IpAddr = Ipv4Addr::new(192, 0, 2, 51).into();
    lab.write_manifest("cluster.yaml", &everybodys(""));
    // What no gateway gives: an unknown gateway, and an address that is in no pool.
    for ask in ["gateway: nope", "address: { ipv4: 192.0.2.99 }"] {
        let spec = format!("podSelector: {{}}\n  {ask}\n  fallback: NodeAddress\n  priority: 100");
        lab.write_manifest("policy.yaml", &manifests::policy("shop", "out", &spec));
        let pods = ["n1", "g1"].map(|node| lab.add_pod(node, "shop", &format!("tenant-{node}"), VISITOR));
        for pod in &pods {
            lab.wait_seen_as(pod, everybody);
        }
        lab.wait_until("the policy is refused", PATIENCE, || {
            lab.manifests().statuses().contains("reason: NotAccepted")
        });
        lab.forget_wire();
        for pod in pods {
            assert_eq!(pod.who(EXT4).ok(), Some(everybody), "{}", pod.name);
            pod.delete();
        }
        assert_eq!(lab.sources(EXT4), [everybody].into());
    }

    // One that has an address goes before it, also while its gateways are dead: it blocks, or lets go, as it says.
    let spec = "podSelector: {}\n  address: { ipv4: 192.0.2.50 }\n  fallback: NodeAddress\n  priority: 2147483647";
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "own", spec));
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.wait_seen_as(&pod, EGRESS4);
    // The administrator's tier goes before every priority.
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
fn an_address_is_not_another_namespaces_unless_the_gateway_says_so() {
    let lab = Lab::scene();
    lab.add_namespace("thief", &[("kubernetes.io/metadata.name", "thief")]);
    let owner = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&owner);
    let own = "podSelector: {}\n  address: { ipv4: 192.0.2.50, ipv6: \"2001:db8::50\" }";
    lab.write_manifest("thief.yaml", &manifests::policy("thief", "mine", own));
    lab.wait_until("the second one is refused", PATIENCE, || is_told(&lab, "thief/mine", "reason: AddressNotShared"));
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
fn an_address_that_is_the_hosts_own_or_no_hosts_is_not_taken() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    // A virtual address of the gateways' own, as keepalived would place it, and somebody who listens there.
    let vip = Ipv4Addr::new(192, 0, 2, 57);
    for gateway in ["g1", "g2"] {
        lab.node(gateway).ip(&format!("addr add {vip}/32 dev eth0"));
    }
    // Nobody listens at the port, and the host says so; where Egret drops what comes to the address, nothing does.
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
