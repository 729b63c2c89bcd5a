//! Several tenants: whose address is whose, and who decides. Needs root.

mod lab;

use lab::scene::assert_leaves_by_egress;
use lab::{EGRESS4, EXT4, Lab, VISITOR, manifests};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// Whether the ledger has so many addresses of the gateway's ten in use.
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
        let before = lab.path_id(if name == "visitors" { "shop/guests" } else { "shop/visitors" });
        // GitOps in the other order: what is old goes before what is new comes.
        lab.remove_manifest("policy.yaml");
        lab.wait_until("its address is given back", PATIENCE, || in_use(&lab, 0));
        lab.write_manifest("policy.yaml", text);
        lab.wait_until("it is given again", PATIENCE, || in_use(&lab, 1));
        lab.wait_seen_as(&pod, EGRESS4);
        assert_leaves_by_egress(&pod);
        assert_ne!(lab.path_id(name), before);
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
