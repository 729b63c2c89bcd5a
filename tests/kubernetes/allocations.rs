//! A gateway whose allocations are too long for one object. Needs root.

use super::{PATIENCE, allocations};
use lab::{Lab, NodeSpec, Pods, manifests};
use serde_json::json;

/// With the longest possible names, this number of allocations exceeds etcd's limit.
const TOO_MANY: usize = 4_200;

#[test]
fn a_status_that_is_too_long_is_rejected_with_a_reason_and_the_written_one_stays() {
    let lab = Lab::builder().kubernetes().nodes(vec![NodeSpec::gateway("g1", 21, Pods::Routed)]).build();
    let namespace = "n".repeat(63);
    lab.add_namespace(&namespace, &[]);
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["198.18.0.0/15"]));
    let create = |n: usize| {
        let policy = json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy",
            "metadata": {"namespace": namespace, "name": format!("{n:0>253}")}, "spec": {"podSelector": {}}});
        let path = format!("/apis/egret.dev/v1alpha1/namespaces/{namespace}/egresspolicies");
        lab.api().ask("POST", &path, Some(("application/json", &policy)));
    };
    (0..3).for_each(create);
    let controller = lab.start_controller();
    lab.wait_until("there are allocations", PATIENCE, || allocations(&lab).len() == 3);
    let before = allocations(&lab);
    // So that the controller need not write them one by one.
    assert!(controller.term().success());
    (3..TOO_MANY).for_each(create);
    let controller = lab.start_controller();
    lab.wait_until("the controller says what to do", PATIENCE, || controller.log().contains("divide the gateway"));
    lab.wait_until("it is not ready", PATIENCE, || !lab.ready("controller"));
    assert_eq!(allocations(&lab), before);
}
