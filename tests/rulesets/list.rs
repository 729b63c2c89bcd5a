// Golden file, cluster, node: `egretd ruleset --cluster dir:tests/rulesets/CLUSTER --node NODE` prints FILE.nft.
&[
    ("no-policy", "dual-stack", "plain"),
    ("one-policy", "dual-stack", "source"),
    ("gateway", "dual-stack", "gateway"),
    ("planned-move", "dual-stack", "new"),
    ("planned-move-old-node", "dual-stack", "old"),
    ("ipv6-only", "ipv6-only", "n1"),
    ("everything", "dual-stack", "everything"),
    // The same, with what only the node knows (node.rs): the uplink is in a VRF; pods' packets come by ifb devices.
    ("uplink-in-vrf", "dual-stack", "everything"),
    ("limited-pods", "dual-stack", "everything"),
]
