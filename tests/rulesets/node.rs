// What only the node knows, for the golden file of this name. Who includes it has `NodePlan` and `TunnelWay` in scope.
|name: &str, plan: &mut NodePlan| match name {
    "uplink-in-vrf" => plan.from_vrf = Some(vec!["10.244.0.0/20".parse().expect("a network")]),
    "limited-pods" => {
        plan.limited = Some(plan.pods.values().map(|pod| pod.interface_index).collect());
        plan.way = TunnelWay::Both { tunnel: 1000 };
    }
    _ => {}
}
