//! What `kubectl egret status` names in a cluster with a fault of each kind.

/// Waits until `status --exit-code -o wide`, whose exit code and output `status` returns, has found problems and names
/// the faults with their remedies: a full pool, a gateway without nodes, a shadowed policy, a node that is dead as
/// `dead` says, and a CNI that goes past netfilter.
pub fn assert_told(lab: &crate::Lab, dead: &str, status: impl Fn() -> (i32, String)) {
    let wanted = [
        "EgressGateway small: PoolExhausted",
        "add addresses to its spec.addresses",
        "EgressGateway nowhere: NoNode",
        "label a node, or correct the selector",
        "EgressPolicy shop/late: Shadowed",
        "set its priority to 1 or more",
        dead,
        "see whether the node and egretd run there",
        "CNI Cilium: BypassesNetfilter",
        "bpf.hostLegacyRouting=true",
    ];
    lab.wait_for("what is not told", &Vec::<&str>::new(), || {
        let (code, text) = status();
        wanted.iter().copied().filter(|words| code != 2 || !text.contains(words)).collect()
    });
}
