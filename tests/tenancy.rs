//! Several tenants: whose address is whose, and who decides. Needs root.

mod lab;

use lab::scene::assert_leaves_by_egress;
use lab::{EGRESS4, Lab, VISITOR};
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
