use super::*;
use crate::cluster::decode::{Reading, decode};
use crate::cluster::kube::watch::Trouble;
use crate::cluster::names::Names;
use crate::model::selector::Name;
use crate::model::{ObjectKey, PodMatch, PolicyKey};
use serde_json::{Value, json};

fn decoded(kind: Kind, object: &Value) -> Decoded {
    let reading = Reading { node: Some("n1".into()) };
    decode(kind, object.to_string().as_bytes(), &reading, &mut Names::default()).unwrap()
}

fn listed(kind: Kind, objects: &[Value]) -> Change {
    let all = objects.iter().map(|o| decoded(kind, o)).map(|d| (d.key.clone(), d)).collect();
    Change::Listed(kind, all)
}

fn pod(name: &str, version: u32) -> Value {
    json!({"metadata": {"namespace": "shop", "name": name, "resourceVersion": version.to_string()},
           "spec": {"nodeName": "n1"}})
}

fn policy(name: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec})
}

fn full() -> Progress {
    let mut store = Progress::new(true);
    for kind in Kind::ALWAYS {
        assert!(store.missing().contains(&kind));
        store.take(listed(kind, &[]));
    }
    assert!(store.missing().is_empty());
    store
}

#[test]
fn a_list_replaces_all_objects_and_only_changes_make_a_snapshot() {
    let mut store = full();
    store.take(listed(Kind::Pod, &[pod("a", 1), pod("b", 2)]));
    assert_eq!(store.news().unwrap().pods.len(), 2);
    store.take(listed(Kind::Pod, &[pod("a", 1), pod("b", 2)]));
    assert!(store.news().is_none());
    store.take(listed(Kind::Pod, &[pod("b", 2)]));
    let cluster = store.news().unwrap();
    assert!(cluster.pods.len() == 1 && cluster.pods.contains_key(&ObjectKey::new("shop", "b")));
}

#[test]
fn an_invalid_object_keeps_its_last_good_state() {
    let mut store = full();
    let (good, bad) = (policy("p", json!({"podSelector": {}})), policy("p", json!({"podSelector": {}, "gateway": 7})));
    store.take(Change::Applied(Kind::EgressPolicy, decoded(Kind::EgressPolicy, &good)));
    assert_eq!(store.news().unwrap().policies.len(), 1);
    store.take(Change::Applied(Kind::EgressPolicy, decoded(Kind::EgressPolicy, &bad)));
    store.take(listed(Kind::EgressPolicy, std::slice::from_ref(&bad)));
    let cluster = store.news().unwrap();
    assert!(cluster.policies.len() == 1 && cluster.unreadable.values().all(|u| u.message.contains("last good state")));
    let problems = store.problems();
    assert!(problems.len() == 1 && problems[0].contains("EgressPolicy shop/p: "), "{problems:?}");
    assert!(problems[0].contains("last good state"), "{problems:?}");
    store.take(Change::Deleted(Kind::EgressPolicy, (Some("shop".into()), "p".into())));
    let cluster = store.news().unwrap();
    assert!(store.problems().is_empty() && cluster.policies.is_empty() && cluster.unreadable.is_empty());
    store.take(Change::Applied(Kind::EgressPolicy, decoded(Kind::EgressPolicy, &bad)));
    assert!(store.problems()[0].contains("not used"));
    store.take(listed(Kind::EgressPolicy, &[]));
    assert!(store.problems().is_empty());
}

/// A daemon that starts while a policy is invalid has no last good state of it, and must not open its pods.
#[test]
fn an_invalid_policy_in_force_is_replaced_by_a_fallback_policy_from_the_allocations() {
    let mut store = full();
    let bad = json!({"podSelector": {"matchLabels": {"app": "x"}}, "priority": 7, "gateway": 7});
    store.take(listed(Kind::EgressPolicy, &[policy("p", bad.clone()), policy("never", bad)]));
    assert!(store.news().unwrap().policies.is_empty());
    let gateway = |policies: Value| {
        json!({"metadata": {"name": "g"}, "spec": {"nodeSelector": {}, "addresses": ["192.0.2.50"]},
            "status": {"allocations": [{"id": 5, "kind": "Dedicated", "ipv4": "192.0.2.50", "policies": policies}]}})
    };
    store.take(listed(Kind::EgressGateway, &[gateway(json!(["shop/p"]))]));
    let cluster = store.news().unwrap();
    let key = PolicyKey::from("shop/p");
    assert_eq!(cluster.policies.keys().collect::<Vec<_>>(), [&key]);
    let stands = &cluster.policies[&key];
    assert!(stands.egress.is_none() && stands.priority == 7 && stands.gateway.as_deref() == Some("g"));
    assert!(matches!(&stands.pods, PodMatch::Labels(pods) if pods.matches(&[("app", "x")].into_iter().collect())));
    assert!(matches!(&stands.pods, PodMatch::Labels(pods) if !pods.matches(&[("app", "y")].into_iter().collect())));
    let told = |name: &str| cluster.unreadable[&PolicyKey::from(name)].message.clone();
    assert!(told("shop/p").contains("by the egress IP that it has"), "{}", told("shop/p"));
    assert!(told("shop/never").contains("it is not used"), "{}", told("shop/never"));
    assert!(
        store.problems().iter().any(|p| p.contains("EgressPolicy shop/p: ") && p.contains("the egress IP that it has"))
    );

    // It is corrected, then invalid again: it has a last good state.
    let good = decoded(Kind::EgressPolicy, &policy("p", json!({"podSelector": {}})));
    store.take(Change::Applied(Kind::EgressPolicy, good));
    let cluster = store.news().unwrap();
    assert!(cluster.policies[&key].gateway.is_none() && !cluster.unreadable.contains_key(&key));
    store.take(Change::Applied(Kind::EgressPolicy, decoded(Kind::EgressPolicy, &policy("p", json!({"gateway": 7})))));
    let cluster = store.news().unwrap();
    assert!(cluster.policies[&key].gateway.is_none() && cluster.unreadable[&key].message.contains("last good state"));
    // It is deleted.
    store.take(Change::Deleted(Kind::EgressPolicy, (Some("shop".into()), "p".into())));
    assert!(store.news().unwrap().policies.is_empty());
    // The fallback policy ends with the allocations' entry.
    let again = decoded(Kind::EgressPolicy, &policy("p", json!({"gateway": 7})));
    store.take(Change::Applied(Kind::EgressPolicy, again));
    assert_eq!(store.news().unwrap().policies.len(), 1);
    store.take(Change::Applied(Kind::EgressGateway, decoded(Kind::EgressGateway, &gateway(json!([])))));
    assert!(store.news().unwrap().policies.is_empty());
}

#[test]
fn a_policy_that_selects_by_services_waits_for_them() {
    let mut store = full();
    let by_service = policy("p", json!({"services": ["frontend"]}));
    store.take(Change::Applied(Kind::EgressPolicy, decoded(Kind::EgressPolicy, &by_service)));
    assert!(store.needs_services() && store.news().is_none_or(|c| c.policies.is_empty()));
    assert_eq!(store.missing(), [Kind::Service]);
    let service = json!({"metadata": {"namespace": "shop", "name": "frontend"},
                         "spec": {"selector": {"app": "x"}, "clusterIP": "10.96.0.7"}});
    store.take(listed(Kind::Service, &[service]));
    let cluster = store.news().unwrap();
    assert_eq!((cluster.policies.len(), cluster.services.len()), (1, 1));
    store.take(listed(Kind::EgressPolicy, &[]));
    assert!(!store.needs_services());
    store.forget_services();
    assert!(store.news().unwrap().services.is_empty());
}

#[test]
fn a_deleted_pod_does_not_return_by_a_lookup() {
    let mut store = full();
    store.take(Change::Found(decoded(Kind::Pod, &pod("a", 5))));
    let pod_a = ObjectKey::new("shop", "a");
    assert!(store.news().unwrap().pods.contains_key(&pod_a));
    store.take(Change::Applied(Kind::Pod, decoded(Kind::Pod, &pod("b", 9))));
    store.take(Change::Deleted(Kind::Pod, (Some("shop".into()), "a".into())));
    store.take(Change::Found(decoded(Kind::Pod, &pod("a", 5))));
    assert!(!store.news().unwrap().pods.contains_key(&pod_a));
}

#[test]
fn a_kind_that_cannot_be_followed_is_a_problem() {
    let mut store = full();
    store.take(Change::State(Kind::Node, Some(Trouble { text: "no rights".into(), away: false })));
    assert_eq!(store.problems(), ["no rights"]);
    store.take(Change::State(Kind::Node, None));
    assert!(store.problems().is_empty());
}

#[test]
fn the_first_snapshot_of_a_node_has_the_networks_inside() {
    let mut store = Progress::new(false);
    for kind in Kind::ALWAYS {
        store.take(listed(kind, &[]));
    }
    assert_eq!(store.missing(), Kind::OPTIONAL);
    let pool = json!({"metadata": {"name": "default"}, "spec": {"cidr": "10.10.0.0/16"}});
    store.take(listed(Kind::IpPool, &[pool]));
    let node = json!({"metadata": {"name": "n1"},
        "spec": {"ipam": {"podCIDRs": ["10.0.1.0/24"], "pools": {"allocated": [{"pool": "a", "cidrs": ["10.11.0.0/27"]}]}}}});
    store.take(listed(Kind::CiliumNode, &[node]));
    store.take(Change::Absent(Kind::ServiceCidr));
    store.take(Change::Absent(Kind::EndpointSlice));
    assert!(store.missing().is_empty() && store.lacks_service_networks());
    // Nobody knows them: then the Services are followed.
    store.take(Change::ServiceNetworks(None));
    assert!(!store.lacks_service_networks());
    assert_eq!(store.missing(), [Kind::Service]);
    let services = [("10.96.0.0/16".parse().unwrap(), Name::from("the API server"))].into();
    store.take(Change::ServiceNetworks(Some(Inside { services, ..Inside::default() })));
    assert!(store.missing().is_empty());
    let cidr = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/108"]}});
    store.take(listed(Kind::ServiceCidr, &[cidr]));
    let inside = &store.news().unwrap().inside;
    assert_eq!((inside.pods.len(), inside.services.len()), (3, 2));
    assert!(inside.services.values().all(|from| from.contains("ServiceCIDR kubernetes")));
    store.take(Change::Deleted(Kind::IpPool, (None, "default".into())));
    store.take(Change::Deleted(Kind::CiliumNode, (None, "n1".into())));
    assert!(store.news().unwrap().inside.pods.is_empty());
}

#[test]
fn an_invalid_gateway_keeps_its_allocations() {
    let gateway = |version: u32, addresses: Value, spec: Value| {
        let mut spec = spec;
        spec["addresses"] = addresses;
        let allocations =
            json!([{"id": version, "kind": "Dedicated", "ipv4": "192.0.2.50", "node": "g1", "policies": ["shop/p"]}]);
        let object = json!({"metadata": {"name": "g", "resourceVersion": version.to_string(), "generation": version},
                            "spec": spec, "status": {"allocations": allocations, "nodes": ["g1"]}});
        let controller = Reading { node: None };
        let of = |reading| decode(Kind::EgressGateway, object.to_string().as_bytes(), reading, &mut Names::default());
        (of(&controller).unwrap(), decoded(Kind::EgressGateway, &object))
    };
    let (good, overlap) = (json!(["192.0.2.50-192.0.2.59"]), json!(["192.0.2.50-192.0.2.59", "192.0.2.55"]));
    let spec = json!({"nodeSelector": {}, "interface": "eth1"});
    let mut store = full();
    store.take(Change::Applied(Kind::EgressGateway, gateway(1, good, spec.clone()).0));
    store.take(Change::Applied(Kind::EgressGateway, gateway(2, overlap.clone(), spec.clone()).0));
    let found = store.news().unwrap().gateways["g"].clone();
    assert!(!found.frozen && found.pool.len() == 1 && found.fault.as_ref().unwrap().contains("overlap"), "{found:?}");
    // The next write replaces this version.
    assert_eq!((found.version.as_deref(), found.generation, found.status.allocations[0].id), (Some("2"), Some(2), 2));

    // Without a last good state.
    let nonsense = json!({"nodeSelector": {}, "nextHop": {}});
    for (spec, interface) in [(spec, Some("eth1")), (nonsense, None)] {
        let mut store = full();
        let (controllers, nodes) = gateway(3, overlap.clone(), spec);
        store.take(Change::Applied(Kind::EgressGateway, controllers));
        let found = store.news().unwrap().gateways["g"].clone();
        assert!(found.frozen && found.fault.is_some() && found.status.allocations[0].id == 3, "{found:?}");
        assert_eq!((found.interface.as_deref(), found.pool.len()), (interface, 1));
        assert!(store.problems()[0].contains("no other ones are given out"), "{:?}", store.problems());
        // A node does without a gateway that it cannot read: what the gateway would carry is blocked.
        store.take(Change::Deleted(Kind::EgressGateway, (None, "g".into())));
        store.take(Change::Applied(Kind::EgressGateway, nodes));
        assert_eq!(store.news().unwrap().gateways.contains_key("g"), interface.is_some());
    }
}

#[test]
fn versions_are_compared_as_numbers() {
    assert!(is_newer("10", "9") && !is_newer("9", "10") && !is_newer("9", "9"));
    assert!(is_newer("1", "") && !is_newer("", "1"));
}
