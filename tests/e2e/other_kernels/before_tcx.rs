//! The fast path where the kernel attaches no programs by tcx.

use lab::fault_injection::{dies, owner_and_other};
use lab::{Lab, Pod, VISITOR};
use std::time::Duration;

#[test]
#[ignore = "needs Linux before 6.6: make vm-test KERNEL=6.1"]
fn a_node_without_tcx_says_so_and_its_pods_take_the_kernels_own_way() {
    let lab = Lab::builder().node_arguments(&["--fast-path-lease=1s"]).scene();
    let pods: Vec<Pod> =
        lab.nodes().iter().map(|n| lab.add_pod(&n.name, "shop", &format!("visitor-{}", n.name), VISITOR)).collect();
    lab.assert_carries(&pods);
    let why = "the kernel attaches no eBPF programs to interfaces by tcx";
    for node in lab.nodes() {
        let metrics = lab.metrics(&node.name);
        assert_eq!(metrics.get("egret_node_fast_path_open", &[]), Some(0.0), "{}", node.name);
        assert_eq!(metrics.get("egret_node_fast_path_packets_total", &[]), Some(0.0), "{}", node.name);
        let log = lab.daemon(&node.name).log();
        assert!(log.contains(why), "{}: {log}", node.name);
    }
    let said = || lab.manifests().statuses().matches(why).count() >= lab.nodes().len();
    lab.wait_until("the nodes' status says why", Duration::from_secs(10), said);
    let (owner, other) = owner_and_other(&lab);
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    dies(&lab, &owner, &other, &others);
    lab.assert_nothing_leaked();
}
