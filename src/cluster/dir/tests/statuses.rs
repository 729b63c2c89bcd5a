use super::*;
use crate::api::{
    AddressPair, Allocation, AllocationKind, EgressGatewayStatus, EgressNodeStatus, EgressPolicyStatus,
    RefusedAllocation, TakenAllocation,
};
use crate::model::PolicyKey;
use crate::model::egress_node::EgressNode;

fn gateway_status(allocations: u16) -> EgressGatewayStatus {
    let allocation = |id| Allocation {
        id,
        kind: AllocationKind::Shared,
        ordinal: 0,
        address: AddressPair { ipv4: Some([192, 0, 2, id as u8].into()), ipv6: "2001:db8::1".parse().ok() },
        node: (id % 2 == 0).then(|| "node-1".into()),
        since: 1_700_000_000 + i64::from(id),
        leaving: (id % 3 == 0).then(|| "node-2".into()),
        service: None,
        policies: ["x/p", "yes"].into_iter().map(PolicyKey::from).collect(),
    };
    EgressGatewayStatus {
        nodes: vec!["node-1".into()],
        allocations: (1..=allocations).map(allocation).collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn written_statuses_are_read_back() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &[gateway("g", "192.0.2.1"), policy("x", "p", 1)].join("---\n"));
    let mut source = fixture.open().await;
    let statuses = source.0.statuses.clone();
    // 1000 allocations are written as JSON.
    for allocations in [0, 3, 1000] {
        statuses.gateway("g", &gateway_status(allocations), None, Vec::new()).await.unwrap();
        let c = source.until("the allocations", |c| *c.gateways["g"].status == gateway_status(allocations)).await;
        assert_eq!(c.gateways["g"].pool.len(), 1);
    }
    let node = EgressNodeStatus {
        tunnel_address: "192.0.2.11".parse().ok(),
        tunnel_mac: Some("02:00:00:00:00:01".into()),
        answers: true,
        allocations: vec![1, 2],
        taken: vec![TakenAllocation { id: 2, since: 1_700_000_002 }],
        refused: vec![RefusedAllocation { id: 3, message: "somebody else has 192.0.2.3: see \"arp\"\n".into() }],
        ..Default::default()
    };
    statuses.node("node-1", &node).await.unwrap();
    source
        .until("the node", |c| c.egress_nodes.get("node-1").is_some_and(|n| **n == EgressNode::from(node.clone())))
        .await;
    for key in ["x/p", "p"] {
        let key = PolicyKey::from(key);
        let status = EgressPolicyStatus { pods: 7, node: Some("true".into()), ..Default::default() };
        statuses.policy(&key, &status, Vec::new()).await.unwrap();
        source.until("the policy", |c| c.policy_statuses.get(&key).is_some_and(|s| **s == status)).await;
    }
    assert_eq!(source.problems(), [""; 0]);

    // A user's change keeps the allocations, and a new start finds all of them.
    fixture.put("a.yaml", &[gateway("g", "192.0.2.9"), policy("x", "p", 1)].join("---\n"));
    source
        .until("the pool", |c| c.gateways["g"].pool[0].first == "192.0.2.9".parse::<std::net::IpAddr>().unwrap())
        .await;
    let again = fixture.open().await;
    assert_eq!(again.now(), source.now());
    assert_eq!(*again.now().gateways["g"].status, gateway_status(1000));
    // A node does not need the policies' statuses.
    let node = fixture.open_for(Scope::Node("node-1".into())).await;
    assert!(node.now().policy_statuses.is_empty());
    assert_eq!(*node.now().gateways["g"].status, gateway_status(1000));
}

#[tokio::test]
async fn statuses_in_manifests_are_ignored() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &(gateway("g", "192.0.2.1") + "status: {nodes: [evil], allocations: x}\n"));
    fixture.put(
        "b.yaml",
        "apiVersion: egret.dev/v1alpha1\nkind: EgressNode\nmetadata: {name: n}\nspec: {}\nstatus: {tunnelAddress: 192.0.2.7}\n",
    );
    let mut source = fixture.open().await;
    assert_eq!(source.problems(), [""; 0]);
    assert_eq!(*source.now().gateways["g"].status, EgressGatewayStatus::default());
    // An EgressNode in a manifest counts until the node itself writes one.
    assert!(source.now().egress_nodes["n"].tunnel_address.is_some());
    source.0.statuses.node("n", &EgressNodeStatus::default()).await.unwrap();
    source.until("the node's own", |c| c.egress_nodes["n"].tunnel_address.is_none()).await;
    assert_eq!(source.problems(), [""; 0]);
}

#[tokio::test]
async fn a_status_is_written_atomically_and_only_when_it_changed() {
    let fixture = Fixture::new();
    let source = fixture.open().await;
    let statuses = source.0.statuses.clone();
    statuses.gateway("g", &gateway_status(2), None, Vec::new()).await.unwrap();
    let file = fixture.path("status/egressgateways/g.yaml");
    let inode = |f: &PathBuf| std::os::unix::fs::MetadataExt::ino(&fs::metadata(f).unwrap());
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.starts_with("apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata:\n  name: g\n"), "{text}");
    let before = inode(&file);
    statuses.gateway("g", &gateway_status(2), None, Vec::new()).await.unwrap();
    assert_eq!(inode(&file), before);
    statuses.gateway("g", &gateway_status(3), None, Vec::new()).await.unwrap();
    assert_ne!(inode(&file), before);
    assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "nothing else is left there");
    for name in ["", "../x", "a/b", "A"] {
        assert!(statuses.gateway(name, &gateway_status(1), None, Vec::new()).await.is_err(), "{name}");
    }
    fs::remove_dir_all(fixture.path("")).unwrap();
    statuses.gateway("g", &gateway_status(3), None, Vec::new()).await.unwrap_err();
    assert!(!fixture.path("").exists(), "a directory of manifests that went is not made anew");
}

#[tokio::test]
async fn an_invalid_status_keeps_the_last_good_one() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &gateway("g", "192.0.2.1"));
    let mut source = fixture.open().await;
    source.0.statuses.gateway("g", &gateway_status(2), None, Vec::new()).await.unwrap();
    source.until("the allocations", |c| *c.gateways["g"].status == gateway_status(2)).await;
    fixture.put(
        "status/egressgateways/g.yaml",
        "apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata: {name: h}\nstatus: {}\n",
    );
    let told = source.until_problem("which is of EgressGateway/g").await;
    assert!(told.starts_with("status/egressgateways/g.yaml:3: "), "{told}");
    assert_eq!(*source.now().gateways["g"].status, gateway_status(2));
    source.0.statuses.gateway("g", &gateway_status(3), None, Vec::new()).await.unwrap();
    source.until("the next allocations", |c| *c.gateways["g"].status == gateway_status(3)).await;
    source.until_well().await;
}

#[tokio::test]
async fn only_statuses_of_removed_objects_are_deleted() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &[gateway("g", "192.0.2.1"), policy("x", "p", 1)].join("---\n"));
    fixture.put("status/notes.txt", "mine");
    let mut source = fixture.open().await;
    let statuses = source.0.statuses.clone();
    for name in ["g", "gone"] {
        statuses.gateway(name, &gateway_status(1), None, Vec::new()).await.unwrap();
        statuses.node(name, &EgressNodeStatus::default()).await.unwrap();
    }
    for key in ["x/p", "x/gone", "y/gone", "gone"] {
        statuses.policy(&key.into(), &EgressPolicyStatus::default(), Vec::new()).await.unwrap();
    }
    let there = || {
        let mut all: Vec<String> =
            ["egressgateways", "egressnodes", "egresspolicies/x", "egresspolicies/y", "clusteregresspolicies"]
                .iter()
                .flat_map(|d| {
                    fs::read_dir(fixture.path(&format!("status/{d}")))
                        .into_iter()
                        .flatten()
                        .map(move |e| format!("{d}/{}", e.unwrap().file_name().display()))
                })
                .collect();
        all.sort();
        all
    };
    assert_eq!(there().len(), 8);

    // The objects of a file that was never valid may still exist.
    fixture.put("b.yaml", "x: [\n");
    source.until_problem("b.yaml").await;
    statuses.forget(&source.now()).await.unwrap();
    assert_eq!(there().len(), 8);
    fs::remove_file(fixture.path("b.yaml")).unwrap();
    source.until_well().await;

    statuses.forget(&source.now()).await.unwrap();
    assert_eq!(
        there(),
        ["egressgateways/g.yaml", "egressnodes/g.yaml", "egressnodes/gone.yaml", "egresspolicies/x/p.yaml"]
    );
    assert!(fixture.path("status/notes.txt").exists() && !fixture.path("status/egresspolicies/y").exists());
    statuses.forget(&source.now()).await.unwrap();
}
