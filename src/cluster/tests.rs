//! What both sources make of the same objects: a directory of manifests, and objects as the API server sends them.

use super::decode::{Reading, decode};
use super::kind::Kind;
use super::names::Names;
use super::store::Store;
use super::{Scope, Source, dir};
use crate::model::{Cluster, ObjectKey, PodMatch, PolicyKey};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;
use tempfile::TempDir;

/// Longer than a change of a file takes to be seen, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(8);

/// Both sources, for a controller.
struct Both {
    directory: TempDir,
    files: Source,
    store: Store,
    names: Names,
    of_api_server: Cluster,
}

impl Both {
    async fn open(objects: &[Value]) -> Both {
        let directory = tempfile::tempdir().unwrap();
        objects.iter().for_each(|object| write(&directory, object));
        let files = dir::open(directory.path(), Scope::Controller).await.unwrap();
        let (store, names) = (Store::new(true, true), Names::default());
        let mut both = Both { directory, files, store, names, of_api_server: Cluster::default() };
        objects.iter().for_each(|object| both.decode(object));
        both
    }

    fn decode(&mut self, object: &Value) {
        let kind = kind(object);
        let text = object.to_string();
        let decoded = decode(kind, text.as_bytes(), &Reading { node: None }, &mut self.names).unwrap();
        self.store.apply(kind, decoded);
    }

    /// An object is added or changes.
    fn apply(&mut self, object: &Value) {
        write(&self.directory, object);
        self.decode(object);
    }

    fn delete(&mut self, object: &Value) {
        fs::remove_file(self.directory.path().join(file(object))).unwrap();
        let text = |field: &str| object["metadata"][field].as_str();
        self.store.delete(kind(object), &(text("namespace").map(Into::into), text("name").unwrap().into()));
    }

    /// Waits until the condition holds for both.
    async fn until(&mut self, what: &str, condition: impl Fn(&Cluster) -> bool) -> [Cluster; 2] {
        if let Some(news) = self.store.news() {
            self.of_api_server = news;
        }
        assert!(condition(&self.of_api_server), "{what}, by the API server: {:?}", self.of_api_server);
        let seen = tokio::time::timeout(LIMIT, self.files.snapshots.wait_for(|cluster| condition(cluster))).await;
        let Ok(seen) = seen.map(|seen| seen.unwrap().clone()) else {
            panic!("{what}, by files: {:?}", self.files.snapshots.borrow())
        };
        [Cluster::clone(&seen), self.of_api_server.clone()]
    }
}

fn kind(object: &Value) -> Kind {
    Kind::of(object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap()).unwrap().unwrap()
}

fn file(object: &Value) -> String {
    format!("{}-{}.json", object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap())
}

/// A gateway's status is in a file of its own.
fn write(directory: &TempDir, object: &Value) {
    if kind(object) == Kind::EgressGateway {
        let path = directory.path().join("status/egressgateways");
        fs::create_dir_all(&path).unwrap();
        let name = object["metadata"]["name"].as_str().unwrap();
        let mut status = object.clone();
        status.as_object_mut().unwrap().remove("spec");
        fs::write(path.join(format!("{name}.yaml")), status.to_string()).unwrap();
    }
    fs::write(directory.path().join(file(object)), object.to_string()).unwrap();
}

fn object(api_version: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
}

fn policy(name: &str, spec: Value) -> Value {
    object("egret.dev/v1alpha1", "EgressPolicy", name, spec)
}

/// A gateway with an allocation that these policies use.
fn gateway(spec: Value, policies: &[&str]) -> Value {
    let mut gateway = object("egret.dev/v1alpha1", "EgressGateway", "g", spec);
    let allocation = json!({"id": 5, "kind": "Dedicated", "ipv4": "192.0.2.50", "policies": policies});
    gateway["status"] = json!({"allocations": [allocation]});
    gateway
}

fn good_gateway(policies: &[&str]) -> Value {
    gateway(json!({"nodeSelector": {}, "addresses": ["192.0.2.50-192.0.2.59"]}), policies)
}

#[tokio::test]
async fn valid_objects_are_the_same() {
    let mut pod = object("v1", "Pod", "a", json!({"nodeName": "n1"}));
    pod["status"] = json!({"podIP": "10.0.0.1"});
    pod["metadata"]["labels"] = json!({"app": "a"});
    let mut node = object("v1", "Node", "n1", json!({"podCIDR": "10.0.0.7/24", "unschedulable": true}));
    node["status"] = json!({"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]});
    let mut egress_node = object("egret.dev/v1alpha1", "EgressNode", "n1", json!({}));
    egress_node["status"] = json!({"tunnelAddress": "192.0.2.1", "answers": true});
    let objects = [
        object("v1", "Namespace", "shop", json!({})),
        node,
        pod,
        object("v1", "Service", "frontend", json!({"selector": {"app": "a"}, "clusterIP": "10.96.0.7"})),
        good_gateway(&["shop/p"]),
        policy("p", json!({"podSelector": {"matchLabels": {"app": "a"}}, "priority": 7})),
        egress_node,
    ];
    let mut both = Both::open(&objects).await;
    let [files, api] = both.until("all objects", |c| c.pods.len() == 1 && c.egress_nodes.len() == 1).await;
    assert_eq!((&files.nodes, &files.namespaces, &files.pods), (&api.nodes, &api.namespaces, &api.pods));
    assert_eq!((&files.policies, &files.egress_nodes), (&api.policies, &api.egress_nodes));
    let label = |c: &Cluster| c.namespaces["shop"].get("kubernetes.io/metadata.name").map(|v| v.to_string());
    assert_eq!([label(&files), label(&api)], [Some("shop".into()), Some("shop".into())]);
    let [of_files, of_api] = [&files, &api].map(|c| c.gateways["g"].clone());
    assert_eq!((&of_files.pool, &of_files.status), (&of_api.pool, &of_api.status));
    let service = |c: &Cluster| c.services[&ObjectKey::new("shop", "frontend")].clone();
    assert_eq!(service(&files).selector, service(&api).selector);
    assert_eq!([files.unreadable.len(), api.unreadable.len()], [0, 0]);
    for object in &objects {
        if !matches!(kind(object), Kind::EgressNode) {
            both.delete(object);
        }
    }
    both.until("the end", |c| c.pods.is_empty() && c.policies.is_empty() && c.gateways.is_empty()).await;
}

#[tokio::test]
async fn a_policy_in_force_that_is_refused_keeps_its_egress_ip() {
    let bad =
        |name| policy(name, json!({"podSelector": {"matchLabels": {"app": "x"}}, "priority": 7, "gateway": ["g"]}));
    let mut both = Both::open(&[good_gateway(&["shop/p"]), bad("p"), bad("never")]).await;
    let key = PolicyKey::from("shop/p");
    for cluster in both.until("the fallback policy", |c| c.policies.contains_key(&key)).await {
        assert_eq!(cluster.policies.len(), 1);
        let stands = &cluster.policies[&key];
        assert!(stands.egress.is_none() && stands.priority == 7 && stands.gateway.as_deref() == Some("g"));
        assert!(matches!(&stands.pods, PodMatch::Labels(pods) if !pods.matches(&[("app", "y")].into_iter().collect())));
        let message = |name: &str| cluster.unreadable[&PolicyKey::from(name)].message.clone();
        assert!(message("shop/p").contains("by the egress IP that it has"), "{}", message("shop/p"));
        assert!(message("shop/never").contains("it is not used"), "{}", message("shop/never"));
    }
    // It is corrected, and invalid again: then it has a last good state.
    both.apply(&policy("p", json!({"podSelector": {}, "priority": 3})));
    both.until("the policy", |c| c.policies[&key].priority == 3 && c.unreadable.len() == 1).await;
    both.apply(&bad("p"));
    let is_told = |c: &Cluster| c.unreadable.get(&key).is_some_and(|u| u.message.contains("last good state is used"));
    let clusters = both.until("the last good state", is_told).await;
    assert!(clusters.iter().all(|c| c.policies[&key].priority == 3));
    both.delete(&bad("p"));
    both.until("its end", |c| c.policies.is_empty() && c.unreadable.len() == 1).await;
    both.delete(&bad("never"));
    both.until("no report", |c| c.unreadable.is_empty()).await;
}

#[tokio::test]
async fn a_refused_gateway_keeps_its_allocations_and_gives_out_nothing() {
    let overlap = json!({"nodeSelector": {}, "interface": "eth1", "addresses": ["192.0.2.50", "192.0.2.50"]});
    let nonsense = json!({"nodeSelector": 7});
    for (spec, interface) in [(&overlap, Some("eth1")), (&nonsense, None)] {
        let objects = [gateway(spec.clone(), &["shop/p"]), policy("p", json!({"podSelector": {}}))];
        let mut both = Both::open(&objects).await;
        for cluster in both.until("the allocations", |c| c.gateways.contains_key("g")).await {
            let gateway = &cluster.gateways["g"];
            assert!(gateway.frozen && gateway.fault.is_some() && gateway.pool.len() == 1, "{gateway:?}");
            assert_eq!((gateway.interface.as_deref(), gateway.status.allocations[0].id), (interface, 5));
        }
        both.apply(&good_gateway(&["shop/p"]));
        let is_good = |c: &Cluster| !c.gateways["g"].frozen && c.gateways["g"].fault.is_none();
        both.until("the gateway", is_good).await;
        // Now it has a last good state.
        both.apply(&gateway(spec.clone(), &["shop/p", "shop/q"]));
        let is_told = |c: &Cluster| c.gateways["g"].fault.is_some() && c.gateways["g"].status.allocations.len() == 1;
        let clusters = both.until("the fault", |c| is_told(c) && !c.gateways["g"].frozen).await;
        assert!(clusters.iter().all(|c| c.gateways["g"].pool[0].last.to_string() == "192.0.2.59"));
        both.until("the new status", |c| c.gateways["g"].status.allocations[0].policies.len() == 2).await;
    }
}

#[tokio::test]
async fn an_object_with_an_impossible_name_is_refused() {
    let mut both = Both::open(&[policy("A_b", json!({"podSelector": {}}))]).await;
    both.until("nothing", |c| c.policies.is_empty()).await;
    both.apply(&policy("good", json!({"podSelector": {}})));
    both.until("the other policy", |c| c.policies.len() == 1).await;
}

#[tokio::test]
async fn a_gateway_that_may_be_asked_for_stands_for_two_policies() {
    let gateway = |spec: Value| json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressGateway", "metadata": {"name": "g"}, "spec": spec});
    let asked =
        gateway(json!({"nodeSelector": {}, "addresses": ["192.0.2.50"], "namespaceSelector": {}, "optIn": true}));
    let mut both = Both::open(std::slice::from_ref(&asked)).await;
    let count = |cluster: &Cluster| {
        cluster.policies.keys().filter(|key| crate::model::opt_in::gateway_of(key) == Some("g")).count()
    };
    both.until("two policies", |cluster| count(cluster) == 2).await;
    // A relist does not remove them.
    both.store.retain(Kind::ClusterEgressPolicy, |_| false);
    both.until("two policies", |cluster| count(cluster) == 2).await;
    // What cannot be read stays as it was, and after a restart blocks those who ask.
    let broken = gateway(
        json!({"nodeSelector": {}, "addresses": ["192.0.2.50"], "namespaceSelector": {}, "optIn": true, "later": 1}),
    );
    both.apply(&broken);
    both.until("two policies", |cluster| count(cluster) == 2).await;
    let mut both = Both::open(&[broken]).await;
    both.until("two policies", |cluster| count(cluster) == 2).await;
    both.apply(&gateway(json!({"nodeSelector": {}, "addresses": ["192.0.2.50"]})));
    both.until("no policies", |cluster| count(cluster) == 0).await;
    both.apply(&asked);
    both.until("two policies", |cluster| count(cluster) == 2).await;
    both.delete(&asked);
    both.until("no policies", |cluster| count(cluster) == 0).await;
}
