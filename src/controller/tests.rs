//! The whole controller, with a directory as the source.

use super::*;
use crate::api::{EgressGatewayStatus, EgressNodeStatus};
use crate::cluster::{self, Scope, SourceName};
use crate::model::PolicyKey;
use crate::telemetry::server::ListenAddress;
use std::path::Path;
use tokio::task::JoinHandle;

const GATEWAY: &str = "
apiVersion: egret.dev/v1alpha1
kind: EgressGateway
metadata: { name: default }
spec: { nodeSelector: { matchLabels: { egress: 'yes' } }, addresses: [192.0.2.50-192.0.2.59], default: true }
---
apiVersion: v1
kind: Node
metadata: { name: n1, labels: { egress: 'yes' } }
status: { addresses: [{ type: InternalIP, address: 10.0.0.1 }] }
";

fn policy(name: &str) -> String {
    format!(
        "apiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: {name}, namespace: shop }}\n\
         spec: {{ podSelector: {{}} }}\n"
    )
}

/// No servers for metrics and health.
const NOWHERE: Addresses = Addresses { metrics: ListenAddress(None), health: ListenAddress(None), guard: None };

async fn started(directory: &Path) -> JoinHandle<anyhow::Result<()>> {
    let name = SourceName::Dir(directory.to_owned());
    tokio::spawn(async move { run(&name, &NOWHERE, Options::default()).await })
}

/// Waits until the directory's snapshot satisfies `good`.
async fn wait(directory: &Path, what: &str, good: impl Fn(&Cluster) -> bool) -> Arc<Cluster> {
    let source = cluster::open(&SourceName::Dir(directory.to_owned()), Scope::Controller).await.unwrap();
    let mut snapshots = source.snapshots;
    match tokio::time::timeout(Duration::from_secs(10), snapshots.wait_for(|c| good(c))).await {
        Ok(cluster) => cluster.unwrap().clone(),
        Err(_) => panic!("not in time: {what}"),
    }
}

fn gateway_status(cluster: &Cluster) -> &EgressGatewayStatus {
    &cluster.gateways["default"].status
}

fn address_of(cluster: &Cluster, policy: &str) -> Option<String> {
    cluster.policy_statuses.get(&PolicyKey::from(policy))?.addresses.as_ref()?.ipv4.map(|a| a.to_string())
}

/// The allocations without `since`, because the second may change during a test.
fn without_since(cluster: &Cluster) -> Vec<crate::api::Allocation> {
    gateway_status(cluster).allocations.iter().map(|path| crate::api::Allocation { since: 0, ..path.clone() }).collect()
}

#[tokio::test]
async fn policies_get_their_addresses_and_keep_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::write(path.join("cluster.yaml"), GATEWAY).unwrap();
    std::fs::write(path.join("q.yaml"), policy("q")).unwrap();
    let controller = started(path).await;
    let first = wait(path, "q has an address", |c| address_of(c, "shop/q").is_some()).await;
    assert_eq!(gateway_status(&first).nodes, ["n1"]);

    std::fs::write(path.join("p.yaml"), policy("p")).unwrap();
    let both = wait(path, "p has an address", |c| address_of(c, "shop/p").is_some()).await;
    assert_eq!(address_of(&both, "shop/q").unwrap(), "192.0.2.50");
    assert_eq!(address_of(&both, "shop/p").unwrap(), "192.0.2.51");

    controller.abort();
    std::fs::remove_file(path.join("q.yaml")).unwrap();
    let controller = started(path).await;
    let one = wait(path, "q is released", |c| gateway_status(c).allocations.len() == 1).await;
    assert_eq!(address_of(&one, "shop/p").unwrap(), "192.0.2.51");
    assert_eq!(gateway_status(&one).released[0].policies[..], ["shop/q".into()]);
    std::fs::write(path.join("q.yaml"), policy("q")).unwrap();
    let back =
        wait(path, "q is back", |c| gateway_status(c).allocations.len() == 2 && address_of(c, "shop/q").is_some())
            .await;
    assert_eq!(without_since(&back), without_since(&both));
    assert!(gateway_status(&back).released.is_empty());
    controller.abort();
}

#[tokio::test]
async fn without_changes_nothing_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::write(path.join("cluster.yaml"), format!("{GATEWAY}---\n{}", policy("p"))).unwrap();
    let controller = started(path).await;
    wait(path, "p has an address", |c| address_of(c, "shop/p").is_some()).await;
    // Until the source has delivered the last write, and the controller has taken it.
    sleep(Duration::from_millis(300)).await;
    let source = cluster::open(&SourceName::Dir(path.to_owned()), Scope::Controller).await.unwrap();
    let snapshot = source.snapshots.borrow().clone();
    let mut second =
        Controller::new(source.statuses, source.leadership, Metrics::new(&mut Registry::default()), Options::default());
    let pass = second.pass(snapshot, || false).await;
    assert!(pass.failure.is_none() && pass.wake.is_none());
    assert!(second.write_overlay.until(Instant::now()).is_none(), "a second controller finds nothing to write");
    controller.abort();
}

#[tokio::test]
async fn pod_counts_are_written_at_once_and_then_at_intervals() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::write(path.join("cluster.yaml"), format!("{GATEWAY}---\n{}", policy("p"))).unwrap();
    let mut source = cluster::open(&SourceName::Dir(path.to_owned()), Scope::Controller).await.unwrap();
    let metrics = Metrics::new(&mut Registry::default());
    let mut controller = Controller::new(source.statuses, source.leadership, metrics, Options::default());
    let (mut counts, mut wake) = (Vec::new(), None);
    for pods in 0..5 {
        let named = |n| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: p{n}, namespace: shop }}\nspec: {{ nodeName: n1 }}\n\
                 status: {{ phase: Running, podIPs: [{{ ip: 10.1.0.{n} }}] }}\n"
            )
        };
        std::fs::write(path.join("pods.yaml"), (0..pods).map(named).collect::<String>()).unwrap();
        let snapshot = source.snapshots.wait_for(|cluster| cluster.pods.len() == pods).await.unwrap().clone();
        wake = controller.pass(snapshot.clone(), || false).await.wake;
        let seen = controller.write_overlay.merge(snapshot, Instant::now());
        counts.push(seen.policy_statuses[&PolicyKey::from("shop/p")].pods);
    }
    // With the first pod, other parts of the status change too.
    assert_eq!(counts, [0, 1, 2, 2, 2]);
    assert!(wake.is_some_and(|wake| wake <= Duration::from_secs(10)), "{wake:?}");
}

/// Every node reads every gateway's status, and a gateway may have 10,000 allocations.
#[tokio::test]
async fn ready_nodes_are_written_at_once_and_then_at_intervals() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let second = GATEWAY.rsplit_once("---\n").unwrap().1.replace("n1", "n2").replace("10.0.0.1", "10.0.0.2");
    std::fs::write(path.join("cluster.yaml"), format!("{GATEWAY}---\n{second}")).unwrap();
    let mut source = cluster::open(&SourceName::Dir(path.to_owned()), Scope::Controller).await.unwrap();
    let metrics = Metrics::new(&mut Registry::default());
    let mut controller = Controller::new(source.statuses.clone(), source.leadership, metrics, Options::default());
    source.statuses.node("n1", &EgressNodeStatus::default()).await.unwrap();
    let (mut counts, mut wake) = (Vec::new(), None);
    for ready in [true, false, true] {
        let unreachable_peers = if ready { vec![] } else { vec!["n2".to_owned()] };
        let node = EgressNodeStatus { answers: ready, unreachable_peers, ..EgressNodeStatus::default() };
        source.statuses.node("n2", &node).await.unwrap();
        let shows = |cluster: &Cluster, node: &str, is: bool| {
            cluster.egress_nodes.get(node).is_some_and(|status| status.answers == is)
        };
        let both = |cluster: &Cluster| shows(cluster, "n1", false) && shows(cluster, "n2", ready);
        let snapshot = source.snapshots.wait_for(|cluster| both(cluster)).await.unwrap().clone();
        wake = controller.pass(snapshot.clone(), || false).await.wake;
        let seen = controller.write_overlay.merge(snapshot, Instant::now());
        let status = gateway_status(&seen);
        counts.push((status.ready_nodes, status.not_ready_nodes.join(" ")));
    }
    // With the first pass other parts of the status change too.
    assert_eq!(counts, [(2, ""), (1, "n2"), (1, "n2")].map(|(n, names)| (n, names.to_owned())));
    assert!(wake.is_some_and(|wake| wake <= Duration::from_secs(10)), "{wake:?}");
}

#[tokio::test]
async fn deleted_allocations_are_written_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::write(path.join("cluster.yaml"), format!("{GATEWAY}---\n{}", policy("p"))).unwrap();
    let controller = started(path).await;
    let before = wait(path, "p has an address", |c| address_of(c, "shop/p").is_some()).await;
    sleep(Duration::from_millis(300)).await;
    std::fs::remove_dir_all(path.join("status")).unwrap();
    let after = wait(path, "the allocations are back", |c| address_of(c, "shop/p").is_some()).await;
    assert_eq!(without_since(&after), without_since(&before));
    controller.abort();
}

#[tokio::test]
async fn a_status_that_cannot_be_written_makes_the_controller_unready() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::write(path.join("cluster.yaml"), GATEWAY).unwrap();
    // Not even root can make a directory where a file is.
    std::fs::write(path.join("status"), "").unwrap();
    let source = cluster::open(&SourceName::Dir(path.to_owned()), Scope::Controller).await.unwrap();
    let snapshot = source.snapshots.borrow().clone();
    let mut controller =
        Controller::new(source.statuses, source.leadership, Metrics::new(&mut Registry::default()), Options::default());
    let failure = controller.pass(snapshot.clone(), || false).await.failure.unwrap();
    assert!(format!("{failure:#}").contains("status"), "{failure:#}");
    std::fs::remove_file(path.join("status")).unwrap();
    assert!(controller.pass(snapshot, || false).await.failure.is_none());
}

#[test]
fn only_changes_that_affect_allocations_interrupt_the_writing_of_statuses() {
    use crate::fixture::{World, naming};
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", naming(&["192.0.2.50"]));
    let before = world.cluster.clone();
    world.allocate();
    world.cluster.policy_statuses.insert("a/p".into(), Arc::default());
    world.pod("a", "pod", &[]);
    assert!(!changes_the_allocations(&before, &world.cluster), "what was written comes back");
    let mut changed = world.clone();
    changed.gateway("g", &["192.0.2.51"], |_| {});
    assert!(changes_the_allocations(&before, &changed.cluster));
    let mut changed = world.clone();
    changed.policy("a/q", naming(&["192.0.2.50"]));
    assert!(changes_the_allocations(&before, &changed.cluster));
    world.holds("n1", &[1]);
    assert!(changes_the_allocations(&before, &world.cluster));
}
